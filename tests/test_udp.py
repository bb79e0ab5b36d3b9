"""UDP sockets on loopback: runs in one call, singly where that is refused, answers from the address that was asked."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from mptunnel.errors import ConfigError
from mptunnel.events import Endpoint, OpenPath
from mptunnel.udp import PathError, PathSocket, ServerSocket, resolve


@pytest.fixture
def server() -> Iterator[ServerSocket]:
    sock = None
    for port in range(47000, 47200):
        with contextlib.suppress(ConfigError):
            sock = ServerSocket(port)
            break
    assert sock is not None, "no port is free"
    yield sock
    sock.close()


Opener = Callable[..., PathSocket]


@pytest.fixture
def path(server: ServerSocket) -> Iterator[Opener]:
    """Open paths to the server; they are closed after the test."""
    opened: list[PathSocket] = []

    def opener(*, offload: bool = True) -> PathSocket:
        loopback = ip_address("127.0.0.1")
        opened.append(PathSocket(OpenPath(0, "lo", loopback, (loopback, port_of(server)), 0), offload=offload))
        return opened[-1]

    yield opener
    for sock in opened:
        sock.close()


def port_of(server: ServerSocket) -> int:
    return int(server._socket.getsockname()[1])


def take(server: ServerSocket) -> tuple[bytes, int, Endpoint]:
    assert select.select([server], [], [], 10.0)[0]
    data, size, source = server.receive()
    return bytes(data), size, source


def take_all(server: ServerSocket, length: int) -> list[bytes]:
    found: list[bytes] = []
    while sum(map(len, found)) < length:
        data, size, _ = take(server)
        found += [data[at : at + size] for at in range(0, len(data), size)]
    return found


@pytest.mark.parametrize("offload", [True, False])
def test_a_run_arrives_as_the_datagrams_it_was_made_of(server: ServerSocket, path: Opener, offload: bool) -> None:
    client = path(offload=offload)
    run = b"".join(bytes([n]) * 100 for n in range(20)) + b"end"
    assert client.send(run, 100) == (0, "")
    assert take_all(server, len(run)) == [run[at : at + 100] for at in range(0, len(run), 100)]


def test_a_kernel_that_refuses_runs_gets_single_datagrams(
    server: ServerSocket, path: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = path()

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "no such option")

    monkeypatch.setattr(client, "_sendmsg", refuse)
    assert client.send(b"a" * 50 + b"b" * 50, 50) == (0, "")
    assert not client.sends_runs
    assert take_all(server, 100) == [b"a" * 50, b"b" * 50]


def test_one_address_that_is_no_longer_ours_leaves_runs_to_all_others(server: ServerSocket, path: Opener) -> None:
    client = path()
    client.send(b"1", 1)
    _, _, source = take(server)
    assert server.send(source, b"a" * 100, 50) == (0, "")
    gone = ip_address("2001:db8::1" if server.has_ipv6 else "192.0.2.1").packed
    lost = Endpoint(source.host, source.port, 0, gone + bytes(4) if server.has_ipv6 else gone)
    assert server.send(lost, b"b" * 100, 50) == (2, "EINVAL")
    assert server.sends_runs
    assert server.send(source, b"c" * 100, 50) == (0, "")


def test_an_icmp_message_about_the_size_of_an_earlier_datagram_costs_none(
    server: ServerSocket, path: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = path()

    class Told:
        """A socket whose next call brings the message, and whose next but one does what it should."""

        def __init__(self, real: socket.socket) -> None:
            self.close, self._real, self._pending = real.close, real, True

        def send(self, datagram: bytes) -> int:
            if self._pending:
                self._pending = False
                raise OSError(errno.EMSGSIZE, "message too long")
            return self._real.send(datagram)

    monkeypatch.setattr(client, "_socket", Told(client._socket))
    assert client.send_one(b"small") == ""
    assert take(server)[0] == b"small"


def test_what_our_own_queue_has_no_room_for_is_counted_once(server: ServerSocket, path: Opener) -> None:
    client = path(offload=False)
    client.send(b"1", 1)
    _, _, source = take(server)
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    for _ in range(200):
        assert server.send_one(source, bytes(1000)) == ""
    came = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            client.receive()
            came += 1
    assert 0 < came < 200
    server.send_one(source, b"one more, which brings the count")
    assert select.select([client], [], [], 10.0)[0]
    client.receive()
    assert client.overrun == client.take_overrun() == 200 - came
    assert client.take_overrun() == 0


def test_a_datagram_that_is_too_long_is_told_so(path: Opener) -> None:
    assert path().send_one(bytes(65508)) == "EMSGSIZE"


@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.9"])
def test_the_server_answers_from_the_address_it_was_asked_on(server: ServerSocket, asked: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10.0)
        client.sendto(b"question", (asked, port_of(server)))
        _, _, source = take(server)
        assert server.send(source, b"answer", 6) == (0, "")
        assert client.recvfrom(100) == (b"answer", (asked, port_of(server)))


def test_one_source_is_one_endpoint(server: ServerSocket, path: Opener) -> None:
    client = path()
    client.send(b"1", 1)
    client.send(b"2", 1)
    assert take(server)[2] is take(server)[2]


def test_a_port_in_use_is_the_users_affair(server: ServerSocket) -> None:
    with pytest.raises(ConfigError, match=r"in use"):
        ServerSocket(port_of(server))


def test_an_interface_that_is_not_there_is_told_with_its_name(server: ServerSocket) -> None:
    wish = OpenPath(0, "nowhere0", ip_address("127.0.0.1"), (ip_address("127.0.0.1"), port_of(server)), 0)
    with pytest.raises(PathError, match="nowhere0"):
        PathSocket(wish)


def test_a_stopped_server_costs_the_path_no_datagram_but_those_it_refuses(server: ServerSocket, path: Opener) -> None:
    client = path()
    server.close()
    for _ in range(8):  # each ICMP message about an earlier one fails the next call unsent: it is repeated
        refused, why = client.send(b"x", 1)
        assert (refused, why) in {(0, ""), (1, "ECONNREFUSED")}


def test_addresses_resolve_to_themselves() -> None:
    assert resolve("127.0.0.1", 1) == (ip_address("127.0.0.1"),)
    assert resolve("::1", 1) == (ip_address("::1"),)
