"""The one select(): who is read how often, and when it has nothing to wait for."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import control, loop, netlink, udp
from mptunnel.config import ServerSettings
from mptunnel.control import MAX_CONNECTIONS
from mptunnel.errors import HostError
from mptunnel.events import Resolve, RunScript, SaveState
from mptunnel.loop import (
    ANSWERED_PEACE,
    CALM,
    LATEST,
    OFFER_SPACING,
    PEACE,
    READS_PER_TURN,
    RHYTHM,
    ClientLoop,
    ServerLoop,
)
from mptunnel.packet import PLAIN
from mptunnel.server import Offer
from mptunnel.timers import INF
from mptunnel.udp import ServerSocket
from tests.simnet import TARGET, Simnet, Wire, ipv4

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = pytest.mark.interpreted  # a loop turned by hand

BETTER = Offer(1420, ipv4_onward=True, ipv6_onward=True)  # what a host has to offer once its network is up
FRAME = PLAIN + ipv4(TARGET, "10.0.1.99", b"to nobody")


class Device:
    """A device whose packets the test writes; `reads` are how many frames each reading brought."""

    name = "mpt9"
    takes_tcp = takes_udp = False

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self.reads: list[tuple[int, int]] = []
        self.has_gone = False

    def fileno(self) -> int:
        return self._near.fileno()

    def read(self) -> list[bytes]:
        return self._frames(READS_PER_TURN)

    def read_one(self) -> bytes | None:
        return next(iter(self._frames(1)), None)

    def _frames(self, most: int) -> list[bytes]:
        if self.has_gone:
            raise OSError(errno.EBADFD, os.strerror(errno.EBADFD))
        frames: list[bytes] = []
        try:
            while len(frames) < most:
                frames.append(self._near.recv(2048))
        except BlockingIOError:
            pass
        self.reads.append((most, len(frames)))
        return frames

    def write(self, packets: list[bytes]) -> int:
        return 0

    def close(self) -> None:
        self._near.close()
        self.far.close()


class Turning(ServerLoop):
    """A server's loop, turn by turn, and its device."""

    def __init__(self, run_dir: Path) -> None:
        self.device = Device()
        net = Simnet(Wire())
        settings = ServerSettings(run_dir=run_dir)
        device: Any = self.device
        nothing: Any = None
        super().__init__(settings, net.server, device, nothing, nothing, ServerSocket(0), lambda: BETTER)
        self._wall_at = self._own_due = float("inf")

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.run_once()

    def listen(self, path: Path) -> control.ControlServer:
        """Let it have a control socket, as `run` does."""
        server = control.ControlServer(path, lambda verb, _: verb)
        self._control = server
        self._watch(server.fileno(), self._control_ready)
        return server

    @property
    def error(self) -> Exception | None:
        return self._error if self._is_stopping else None


@pytest.fixture
def turning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turning]:
    monkeypatch.setattr(loop, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(loop, "PAUSE", 0.015)  # a machine that is busy with other things makes no pause
    made = Turning(tmp_path)
    yield made
    made.finish()


def test_what_comes_alone_is_read_once_and_never_in_vain(turning: Turning) -> None:
    for _ in range(5):
        turning.turns(1)  # waits
        turning.device.far.send(FRAME)
        turning.turns(1)
    assert turning.device.reads == [(1, 1)] * 5
    assert turning._role.drops["packet to nobody"] == 5


def test_a_burst_is_read_in_few_turns(turning: Turning) -> None:
    turning.turns(2)  # the second one waits
    for _ in range(180):
        turning.device.far.send(FRAME)
    turning.turns(CALM + 3)
    full = READS_PER_TURN
    assert turning.device.reads == [(1, 1)] * CALM + [(full, full), (full, full), (full, 180 - CALM - 2 * full)]
    assert turning._role.drops["packet to nobody"] == 180


def test_a_device_that_has_gone_ends_the_run_and_is_named(turning: Turning) -> None:
    turning.device.has_gone = True
    turning.device.far.send(FRAME)
    turning.turns(1)
    assert isinstance(turning.error, HostError)
    assert str(turning.error).startswith("the device mpt9 has gone: ")


def test_a_full_control_socket_is_not_waited_for(
    turning: Turning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one who waits to be let in would keep the loop turning."""
    waited: list[list[int]] = []
    plain = select.select

    def watched(readers: list[int], *more: Any) -> Any:
        waited.append(list(readers))
        return plain(readers, *more)

    server = turning.listen(tmp_path / "mpt9.sock")
    guests = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CONNECTIONS + 1)]
    monkeypatch.setattr(loop, "_select", watched)
    turning.turns(1)
    assert waited[-1].count(server.fileno()) == 1
    for guest in guests:
        guest.connect(str(tmp_path / "mpt9.sock"))
        turning.turns(2)
        assert waited[-1].count(server.fileno()) == int(len(server.connections) < MAX_CONNECTIONS)
    assert len(server.connections) == MAX_CONNECTIONS
    guests[0].sendall(b'{"verb": "status"}\n')
    turning.turns(4)
    assert guests[0].recv(100) == b'{"ok": true, "result": "status"}\n'
    turning.turns(2)
    assert len(server.connections) == MAX_CONNECTIONS, "the one who waited is in"
    for guest in guests:
        guest.close()
    turning.turns(3)
    assert not server.connections
    turning._unwatch(server.fileno())
    turning._control = None
    server.close()


def test_a_turn_in_which_all_went_the_short_way_ends_there_but_not_when_something_is_overdue(
    turning: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[float] = []
    turning.turns(2)
    monkeypatch.setattr(turning._role, "send_one", lambda *_: (b"sealed", ()))
    monkeypatch.setattr(turning._role, "finish_turn", turned.append)
    turning.device.far.send(FRAME)
    turning.turns(1)
    assert turned == []
    turning.device.far.send(FRAME)
    turning._due = loop.now() - 1.0
    turning.turns(1)
    assert len(turned) == 1
    turning.device.far.send(FRAME)
    turning._ledger.due = -INF  # there is so much to be booked
    turning.turns(1)
    assert len(turned) == 2


def test_a_packet_waits_for_nothing_that_is_due_but_not_late(turning: Turning, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[float] = []
    turning.turns(2)
    monkeypatch.setattr(loop, "LATEST", 60.0)
    monkeypatch.setattr(turning._role, "send_one", lambda *_: (b"sealed", ()))
    monkeypatch.setattr(turning._role, "finish_turn", turned.append)
    turning._due = loop.now() - 1.0
    turning.device.far.send(FRAME)
    turning.turns(1)
    assert turned == []
    turning.turns(1)  # nothing comes
    assert len(turned) == 1


class Stage:
    """Time and select() as the test has them, and a role that always has something to do; what comes goes short ways.

    Times are in s from the beginning; `done` is when the role did what was due.
    """

    def __init__(self, turning: Turning, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turning = turning
        self.device, self.socket, self.message = turning._fds[0], turning._socket.fileno(), turning._monitor.fileno()
        self.now, self.waited = 0.0, 0.0
        self.done: list[float] = []
        self._ready: list[int] = []
        monkeypatch.setattr(loop, "LONGEST_WAIT", 1.0)
        monkeypatch.setattr(loop, "_clock", lambda _: self.now)
        monkeypatch.setattr(loop, "_select", self._select)
        monkeypatch.setattr(turning._role, "next_deadline", lambda: -INF)
        monkeypatch.setattr(turning._role, "handle_timeout", self.done.append)
        turning._readers[self.device] = turning._readers[self.socket] = lambda _: True
        turning._readers[self.message] = lambda _: False
        turning._due = INF

    def _select(self, readers: object, writers: object, errors: object, wait: float) -> tuple[list[int], ...]:
        ready, self._ready = self._ready, []
        self.waited = wait
        if not ready:
            self.now += wait
        return ready, [], []

    def comes(self, *ready: int) -> None:
        """These descriptors are ready, in a turn."""
        self._ready = list(ready)
        self.turning.turns(1)

    def nothing_comes(self) -> float:
        """Have a turn in which nothing is ready; return how long it waited."""
        self.turning.turns(1)
        return self.waited


@pytest.fixture
def stage(turning: Turning, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(turning, monkeypatch)


@pytest.mark.parametrize(
    ("due", "wait"),
    [
        (-LATEST / 2, ANSWERED_PEACE),  # it waited while packets passed
        (ANSWERED_PEACE / 2, ANSWERED_PEACE),
        (RHYTHM / 2, RHYTHM),  # a bad time: perhaps the next packet comes before it is done
        (2 * RHYTHM, 2 * RHYTHM),
        (ANSWERED_PEACE / 2 - LATEST, ANSWERED_PEACE / 2),
    ],
)
def test_what_is_due_is_done_in_the_lull_behind_a_packet_or_when_none_is_to_come(
    stage: Stage, due: float, wait: float
) -> None:
    stage.comes(stage.device)
    stage.turning._due = due
    assert stage.nothing_comes() == pytest.approx(wait)
    assert stage.done == [stage.now]


def test_the_lull_is_behind_the_answer_and_there_is_one_thing_in_each(stage: Stage) -> None:
    stage.turning._due = 0.0
    stage.comes(stage.socket)
    stage.now += PEACE / 2
    stage.comes(stage.device)
    assert stage.nothing_comes() == pytest.approx(ANSWERED_PEACE)
    assert len(stage.done) == 1
    assert stage.nothing_comes() == pytest.approx(RHYTHM - ANSWERED_PEACE)
    assert len(stage.done) == 2
    assert stage.nothing_comes() == 0.0, "nobody is to be let by"
    stage.comes(stage.socket)
    assert stage.nothing_comes() == pytest.approx(PEACE)
    assert len(stage.done) == 4


def test_messages_between_packets_do_not_put_off_what_is_due(stage: Stage) -> None:
    stage.comes(stage.device)
    stage.turning._due = stage.now
    for _ in range(10):
        stage.comes(stage.message)
        stage.comes(stage.device)
        if not stage.done:
            stage.now += LATEST / 5
    assert stage.done[0] == pytest.approx(LATEST)
    stage.comes(stage.device)
    assert stage.nothing_comes() == 0.0, "all that is due is late"


def test_a_path_that_has_just_lost_its_socket_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Socket:
        unseen = 0

        def send_one(self, datagram: bytes) -> str:
            sent.append(datagram)
            return ""

    made = ClientLoop.__new__(ClientLoop)
    monkeypatch.setattr(made, "_sockets", {1: Socket()}, raising=False)
    assert made._send_one(b"sealed", [(None, 0), (None, 1)], 0.0)  # type: ignore[list-item]
    assert sent == [b"sealed"]


def test_what_our_own_queue_has_no_room_for_is_told_with_what_comes_next(turning: Turning) -> None:
    turning._socket._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    to = ("::1" if turning._socket.has_ipv6 else "127.0.0.1", turning._socket._socket.getsockname()[1])
    with socket.socket(socket.AF_INET6 if turning._socket.has_ipv6 else socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for _ in range(200):
            stranger.sendto(bytes(1000), to)
        turning.turns(200)
        stranger.sendto(b"one more, which brings the count", to)
        turning.turns(2)
    role = turning._role
    assert role.drops["receive queue full"] == role.identity.overruns.buffers
    assert role.drops["receive queue full"] + role.drops["malformed datagram"] == 201


def script_passes(
    turning: Turning, monkeypatch: pytest.MonkeyPatch, job: Resolve | SaveState, end: threading.Event, result: object
) -> None:
    """Assert that a script is done while a job that was asked for before it is not, and that one when it can `end`."""
    done: list[tuple[object, object]] = []
    monkeypatch.setattr(turning._role, "job_done", lambda job, result, _: done.append((job, result)))
    turning._host = SimpleNamespace(run=lambda *_: None)  # type: ignore[assignment]
    script = RunScript("path-up", {})
    turning._take_up(job, 0.0)
    turning._take_up(script, 0.0)
    while not done:
        turning.turns(1)
    assert done == [(script, None)]
    end.set()
    while len(done) < 2:
        turning.turns(1)
    assert done[1] == (job, result)


def test_a_slow_lookup_of_a_name_holds_up_no_script(turning: Turning, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(udp, "resolve", lambda *_: answers.wait(30.0) and ("resolved",))
    script_passes(turning, monkeypatch, Resolve("sim.example", 5000), answers, ("resolved",))


def test_a_disk_that_stalls_holds_up_no_script(turning: Turning, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()
    turning._state = SimpleNamespace(save=lambda *_: disk.wait(30.0))  # type: ignore[assignment]
    script_passes(turning, monkeypatch, SaveState("server/peers", {}), disk, None)


def test_what_the_host_can_offer_is_looked_at_again_when_its_network_changes(
    turning: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Offer] = []
    monkeypatch.setattr(turning._role, "offer_is", lambda offer, _: said.append(offer))
    turning._wall_at = turning._own_due = 0.0  # at its start
    while not said:
        turning.turns(1)
    assert said == [BETTER]
    looked_at = turning._looked_at
    monkeypatch.setattr(netlink.Monitor, "drain", lambda _: True)
    turning._links_ready(looked_at + 1.0)
    assert turning._look_at == looked_at + OFFER_SPACING
    turning._links_ready(looked_at + 100.0)
    assert turning._look_at == looked_at + OFFER_SPACING, "the first of a burst sets the time"
