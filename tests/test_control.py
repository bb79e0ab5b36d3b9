"""The control socket: questions and answers, without ever blocking the program that is asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import control
from mptunnel.control import (
    MAX_CONNECTIONS,
    MAX_LISTENERS,
    MAX_REQUEST,
    MAX_UNREAD,
    ControlServer,
    Listening,
    Pending,
    ask,
    find,
    listen,
)
from mptunnel.errors import (
    ConfigError,
    HostError,
    MptunnelError,
    NotPermittedError,
    NotRunningError,
    RefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def echo(verb: str, arguments: dict[str, Any]) -> object:
    if verb == "refuse":
        raise RefusedError("no")
    return {"verb": verb, **arguments}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mpt0.sock"


@pytest.fixture
def server(path: Path) -> Iterator[ControlServer]:
    with contextlib.closing(ControlServer(path, echo)) as listening:
        yield listening


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for client in opened:
        client.close()


def turn(server: ControlServer, now: float = 0.0, wait: float = 0.0) -> bool:
    """Take one turn as the loop does; return whether there was anything to do."""
    readable, writable, _ = select.select(server.readers(), server.writers(), [], wait)
    for fd in {*readable, *writable}:
        server.ready(fd, now)
    if server.next_deadline() <= now:
        server.expire(now)
    return bool(readable or writable)


def settle(server: ControlServer, now: float = 0.0) -> None:
    while turn(server, now):
        pass


def serve_until(server: ControlServer, done: Future[Any]) -> Any:
    while not done.done():
        turn(server, wait=0.01)
    return done.result()


def asked(server: ControlServer, path: Path, verb: str, **arguments: object) -> Any:
    with ThreadPoolExecutor() as pool:
        return serve_until(server, pool.submit(ask, path, verb, **arguments))


def connect(path: Path, clients: list[socket.socket], said: bytes = b"") -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    clients.append(client)
    client.settimeout(5)
    client.connect(str(path))
    client.sendall(said)
    return client


def answer(client: socket.socket) -> Any:
    heard = b""
    while data := client.recv(1 << 16):
        heard += data
    return json.loads(heard)


def test_a_question_is_answered(server: ControlServer, path: Path) -> None:
    assert asked(server, path, "token-new", label="ä", hours=1) == {"verb": "token-new", "label": "ä", "hours": 1}


def test_a_refusal_comes_back_with_its_words_and_its_exit_code(server: ControlServer, path: Path) -> None:
    with pytest.raises(RefusedError, match=r"^no$"):
        asked(server, path, "refuse")


def test_an_exit_code_without_a_class_of_ours_is_a_plain_error(path: Path) -> None:
    def fail(verb: str, arguments: dict[str, Any]) -> object:
        del verb, arguments
        raise HostError("disk full")

    with (
        contextlib.closing(ControlServer(path, fail)) as server,
        pytest.raises(MptunnelError, match="disk full") as caught,
    ):
        asked(server, path, "x")
    assert caught.value.exit_code == 1


def test_an_answer_longer_than_any_socket_buffer_arrives_whole(path: Path) -> None:
    long = "x" * 3_000_000
    with contextlib.closing(ControlServer(path, lambda *_: long)) as server:
        assert asked(server, path, "status") == long


def test_a_slow_reader_does_not_hold_up_the_others(path: Path, clients: list[socket.socket]) -> None:
    long = "x" * 3_000_000
    with contextlib.closing(ControlServer(path, lambda verb, _: long if verb == "status" else verb)) as server:
        slow = connect(path, clients, b'{"verb":"status"}\n')
        turn(server)
        turn(server)
        assert server.writers()
        assert asked(server, path, "quick") == "quick"
        with ThreadPoolExecutor() as pool:
            assert serve_until(server, pool.submit(answer, slow))["result"] == long


@pytest.mark.parametrize("settled_first", [True, False])
def test_an_answer_can_come_later(settled_first: bool, path: Path, clients: list[socket.socket]) -> None:
    pending = Pending()
    with contextlib.closing(ControlServer(path, lambda *_: pending)) as server:
        client = connect(path, clients, b'{"verb":"token-new"}\n')
        if settled_first:
            pending.finish("done")
        settle(server)
        if not settled_first:
            assert server.next_deadline() == math.inf  # working is not being idle
            server.expire(1e9)
            pending.finish("done")
        server.expire(0.0)
        assert answer(client) == {"ok": True, "result": "done"}


def test_a_later_answer_can_be_a_refusal(path: Path, clients: list[socket.socket]) -> None:
    pending = Pending()
    with contextlib.closing(ControlServer(path, lambda *_: pending)) as server:
        client = connect(path, clients, b'{"verb":"token-new"}\n')
        settle(server)
        pending.fail(ConfigError("full"))
        server.expire(0.0)
        assert answer(client) == {"ok": False, "error": "full", "exit": 2}


def test_a_later_answer_to_somebody_who_has_gone_harms_nobody(path: Path, clients: list[socket.socket]) -> None:
    pending = Pending()
    with contextlib.closing(ControlServer(path, lambda *_: pending)) as server:
        connect(path, clients, b'{"verb":"token-new"}\n').close()
        settle(server)
        pending.finish("done")
        server.expire(0.0)
        assert len(server.readers()) == 1  # the listener


@pytest.mark.parametrize(
    "said", [b"\n", b"{}\n", b"[]\n", b'{"verb":1}\n', b"\xff\n", b'{"verb"\n', b"[" * 60_000 + b"\n"]
)
def test_nonsense_is_answered_as_such(
    said: bytes, server: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    client = connect(path, clients, said)
    settle(server)
    assert answer(client)["exit"] == 2


def test_a_question_may_come_in_pieces(server: ControlServer, path: Path, clients: list[socket.socket]) -> None:
    client = connect(path, clients)
    for byte in b'{"verb":"x"}\n':
        client.sendall(bytes([byte]))
        settle(server)
    assert answer(client)["result"] == {"verb": "x"}


def test_a_question_without_end_is_cut_off(server: ControlServer, path: Path, clients: list[socket.socket]) -> None:
    client = connect(path, clients)
    client.setblocking(False)
    sent = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while sent < 10 * MAX_REQUEST:
            sent += client.send(b"x" * 4096)
            settle(server)
    assert sent <= MAX_REQUEST + 8192
    client.setblocking(True)
    assert f"at most {MAX_REQUEST} bytes" in answer(client)["error"]


def test_who_hangs_up_is_forgotten(server: ControlServer, path: Path, clients: list[socket.socket]) -> None:
    connect(path, clients, b'{"verb"').close()
    settle(server)
    assert len(server.readers()) == 1
    assert server.next_deadline() == math.inf


def test_who_says_nothing_is_dropped_after_five_seconds(
    server: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    client = connect(path, clients)
    settle(server, now=100.0)
    assert server.next_deadline() == 105.0
    server.expire(104.9)
    client.send(b"{")
    settle(server, now=104.9)
    assert server.next_deadline() == pytest.approx(109.9)
    server.expire(109.9)
    assert client.recv(1) == b""


def test_the_ninth_connection_waits_until_one_is_free(
    server: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    for _ in range(MAX_CONNECTIONS):
        connect(path, clients)
    ninth = connect(path, clients, b'{"verb":"x"}\n')
    settle(server)
    assert len(server.readers()) == MAX_CONNECTIONS
    clients[0].close()
    settle(server)
    assert answer(ninth)["ok"]


def test_asking_for_the_deadline_changes_nothing(
    server: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    connect(path, clients)
    settle(server, now=1.0)
    assert server.next_deadline() == server.next_deadline() == 6.0


def test_only_the_owner_may_connect_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with contextlib.closing(ControlServer(path, echo)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_closing_removes_the_socket(path: Path) -> None:
    ControlServer(path, echo).close()
    assert not path.exists()


def test_a_dead_ones_socket_is_replaced_and_anything_else_is_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    ControlServer(path, echo).close()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="something else is there"):
        ControlServer(path, echo)
    assert path.read_text() == "precious"


def test_a_run_directory_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no such file or directory; check --run-dir"):
        ControlServer(tmp_path / "no" / "mpt0.sock", echo)
    far = tmp_path / ("x" * 100) / "mpt0.sock"
    far.parent.mkdir()
    for call in (lambda: ControlServer(far, echo), lambda: ask(far, "status")):
        with pytest.raises(ConfigError, match="shorter --run-dir"):
            call()


def test_nobody_there_is_not_running(path: Path) -> None:
    with pytest.raises(NotRunningError, match="does not run as mpt0"):
        ask(path, "status")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotRunningError):
        ask(path, "status")


def test_a_socket_we_may_not_use_says_sudo(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(socket.socket):
        def connect(self, *_: Any) -> None:
            raise PermissionError(13, "no")

    monkeypatch.setattr(socket, "socket", Locked)
    with pytest.raises(NotPermittedError, match="with sudo"):
        ask(path, "status")
    assert find(path.parent, "mpt0") == [path]  # it may well be there


@pytest.mark.parametrize("said", [b"", b"{", b"[]\n", b'{"ok":false}\n', b"null\n"])
def test_half_an_answer_is_an_error_of_ours(said: bytes, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as pool:
        listener.bind(str(path))
        listener.listen()
        answer = pool.submit(ask, path, "status")
        client, _ = listener.accept()
        client.recv(1000)
        client.sendall(said)
        client.close()
        with pytest.raises(HostError, match="no whole answer"):
            answer.result()


def test_who_does_not_answer_is_not_waited_for_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ANSWER_TIMEOUT", 0.05)
    with contextlib.closing(ControlServer(path, echo)), pytest.raises(HostError, match=r"within 0\.05 s"):
        ask(path, "status")


def test_live_sockets_are_found_by_instance_and_dead_ones_are_not(tmp_path: Path) -> None:
    paths = [tmp_path / f"mpt{n}.sock" for n in (10, 2, 0)]
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(contextlib.closing(ControlServer(path, echo)))
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "mpt1.sock"))
        assert find(tmp_path) == [paths[2], paths[1], paths[0]]
        assert find(tmp_path, "mpt2") == [paths[1]]
        assert find(tmp_path, "mpt1") == []
    assert find(tmp_path / "no") == []


# -- listeners ---------------------------------------------------------------------------------------------


def heard(client: socket.socket) -> list[Any]:
    """Return the lines that have come by now."""
    client.setblocking(False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while more := client.recv(1 << 16):
            data += more
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def teller(path: Path) -> Iterator[ControlServer]:
    def answer(verb: str, arguments: dict[str, Any]) -> object:
        return Listening({"device": "mpt0"}) if verb == "events" else echo(verb, arguments)

    with contextlib.closing(ControlServer(path, answer)) as listening:
        yield listening


def test_who_listens_hears_what_is_told_from_then_on_and_is_never_dropped_for_silence(
    teller: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    teller.tell({"event": "gap", "n": 0})
    listeners = [connect(path, clients, b'{"verb":"events"}\n') for _ in range(2)]
    settle(teller, now=1.0)
    assert teller.next_deadline() == math.inf
    teller.expire(1e9)
    for number in (1, 2):
        teller.tell({"event": "gap", "n": number})
    for each in listeners:
        assert heard(each) == [{"ok": True, "result": {"device": "mpt0"}}, *({"event": "gap", "n": n} for n in (1, 2))]
    assert asked(teller, path, "quick")["verb"] == "quick"


def test_a_listener_that_does_not_read_is_cut_off_and_the_others_hear_on(
    teller: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    slow, good = (connect(path, clients, b'{"verb":"events"}\n') for _ in range(2))
    settle(teller)
    told = {"event": "path-down", "why": "x" * 1000}
    count = 0
    while len(teller.readers()) == 3:
        teller.tell(told)
        turn(teller)
        assert heard(good)[-1] == told
        count += 1
        assert count < 2000
    assert count * 1000 > MAX_UNREAD
    teller.tell(told)
    assert heard(good) == [told]
    assert not teller.writers()
    slow.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        while slow.recv(1 << 16):
            pass


def test_a_listener_that_was_slow_for_a_while_misses_nothing(
    teller: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    client = connect(path, clients, b'{"verb":"events"}\n')
    settle(teller)
    sent = 0
    while not teller.writers():
        teller.tell({"n": sent, "why": "x" * 1000})
        sent += 1
    teller.tell({"n": sent, "why": ""})
    read: list[Any] = []
    data = b""
    while not data.endswith(b'"why": ""}\n'):
        data += client.recv(1 << 16)
        turn(teller)
    read = [json.loads(line) for line in data.splitlines()][1:]
    assert [each["n"] for each in read] == list(range(sent + 1))
    assert not teller.writers()


def test_a_listener_that_hangs_up_or_talks_on_harms_nobody(
    teller: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    client = connect(path, clients, b'{"verb":"events"}\n')
    settle(teller)
    client.sendall(b"what else?\n")
    settle(teller)
    assert len(teller.readers()) == 2
    client.close()
    settle(teller)
    assert len(teller.readers()) == 1
    gone = connect(path, clients, b'{"verb":"events"}\n')
    settle(teller)
    gone.close()
    teller.tell({"event": "gap"})
    teller.tell({"event": "gap"})
    settle(teller)
    assert len(teller.readers()) == 1


def test_four_may_listen_so_that_others_can_still_ask(
    teller: ControlServer, path: Path, clients: list[socket.socket]
) -> None:
    for _ in range(MAX_LISTENERS):
        connect(path, clients, b'{"verb":"events"}\n')
    fifth = connect(path, clients, b'{"verb":"events"}\n')
    settle(teller)
    assert "4 listen already" in answer(fifth)["error"]
    assert asked(teller, path, "quick")["verb"] == "quick"


def test_listening_yields_each_event_and_ends_when_the_program_does(path: Path) -> None:
    teller = ControlServer(path, lambda *_: Listening({}))
    with contextlib.closing(teller), ThreadPoolExecutor() as pool:
        stream = listen(path)
        first = pool.submit(next, stream)
        while not first.done():  # who has connected need not have asked yet
            turn(teller, wait=0.01)
            teller.tell({"event": "gap"})
        assert first.result() == {"event": "gap"}
        teller.close()
        with pytest.raises(NotRunningError, match="mpt0 has stopped"):
            list(stream)
    with pytest.raises(NotRunningError, match="does not run"):
        next(listen(path))


def test_an_older_program_that_knows_no_events_says_so(path: Path) -> None:
    def refuse(verb: str, _: dict[str, Any]) -> object:
        raise ConfigError(f"a client cannot be asked for {verb!a}")

    with contextlib.closing(ControlServer(path, refuse)) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(next, listen(path))
        with pytest.raises(ConfigError, match="cannot be asked for 'events'"):
            serve_until(server, first)
