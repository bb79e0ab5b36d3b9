"""Load for a lab: TCP streams, datagrams at a rate, a 1 kHz echo; plain Python with large buffers, so it runs anywhere.

A `Generator` is a process (`python -m mptunnel.load`) in one of a lab's namespaces that does as it is told, one
JSON request a line, and answers in a line each. Two of them, one at the client and one at the target, make all traffic
of the benchmark. They share the processors with what is measured, as an application would; what they can do at the
most is what they do without any tunnel. Datagrams are sent one a call, never as a super-packet.
"""

from __future__ import annotations

import contextlib
import gc
import json
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from mptunnel.errors import HostError
from mptunnel.lab import TARGET
from mptunnel.wires import wait_precisely

if TYPE_CHECKING:
    from collections.abc import Callable

    from mptunnel.lab import Lab

PORT: Final = 7100
WARM_SECONDS: Final = 0.3  # of a transfer, before its bytes count

_PATIENCE: Final = 10.0
_WRITE: Final = 256 * 1024
_READ: Final = 1024 * 1024
_TICK: Final = 0.0001  # s that a sender sleeps between looking what is due
_BURST: Final = 64  # datagrams at once by a sender that has fallen behind
_LINGER: Final = 0.1  # what is under way when the sending ends may still arrive
_NUMBER: Final = struct.Struct("<I")
_STDIN = 0
_TO_FAR, _TO_NEAR = b">", b"<"  # first byte of a connection: which way the stream goes


class Generator:
    """A process that makes or takes traffic in a role's namespace; it ends with the lab."""

    def __init__(self, lab: Lab, role: str) -> None:
        argv = [sys.executable, "-m", "mptunnel.load"]
        self._role = role
        self._process: subprocess.Popen[bytes] = lab.spawn(
            role, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
        )
        self.finish()

    def begin(self, verb: str, **how: Any) -> None:
        """Put a request; `finish` fetches the answer."""
        self._write(json.dumps({"verb": verb, **how}).encode() + b"\n")

    def stop(self) -> dict[str, Any]:
        """End what goes on until it is told to end, and return its answer."""
        self._write(b"\n")
        return self.finish()

    def finish(self, patience: float = _PATIENCE) -> dict[str, Any]:
        """Wait for the answer and return it. Raises `HostError`."""
        assert self._process.stdout  # noqa: S101  it has a pipe
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise HostError(f"the load at {self._role} stands still for {patience:.0f} s: nothing gets through")
        line = self._process.stdout.readline()
        if not line:
            raise HostError(f"the load at {self._role} ended with {self._process.wait()}; its last words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HostError(f"the load at {self._role} cannot go on: {answer['error']}")
        return answer

    def _write(self, line: bytes) -> None:
        assert self._process.stdin  # noqa: S101
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise HostError(f"the load at {self._role} has ended") from None


# -- the process -------------------------------------------------------------------------------------------------


class _Worker:
    """What the process has open: a TCP listener, a UDP socket on the same port, and its orders."""

    def __init__(self) -> None:
        self._orders: BinaryIO = open(_STDIN, "rb", buffering=0, closefd=False)  # noqa: SIM115  for its life
        self._listener = socket.create_server(("", PORT), backlog=64)
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind(("", PORT))
        self._datagrams.setblocking(False)
        self._datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)

    def run(self) -> None:
        """Do what is asked until stdin ends."""
        verbs: dict[str, Callable[..., dict[str, Any]]] = {
            "accept": self._accept,
            "connect": _connect,
            "count": self._count,
            "echo": self._echo,
            "emit": _emit,
            "ping": _ping,
        }
        _print(ready=True)
        while line := self._orders.readline():
            request = json.loads(line)
            try:
                _print(**verbs[request.pop("verb")](**request))
            except OSError as error:
                _print(error=error.strerror or str(error))

    def _accept(self, streams: int, seconds: float) -> dict[str, Any]:
        """Be the far side of a transfer."""
        self._listener.settimeout(_PATIENCE)
        senders: list[socket.socket] = []
        receivers: list[socket.socket] = []
        for _ in range(streams):
            sock, _ = self._listener.accept()
            sock.settimeout(_PATIENCE)
            (receivers if sock.recv(1) == _TO_FAR else senders).append(sock)
        return _transfer(senders, receivers, seconds)

    def _count(self) -> dict[str, Any]:
        """Count datagrams until told to stop; those that this process was too slow to read have arrived, too."""
        sock, buffer, arrived, end = self._datagrams, bytearray(2048), 0, 0.0
        overflows = _overflows()
        while not end or time.monotonic() < end:
            ready, _, _ = select.select([sock.fileno()] if end else [sock.fileno(), _STDIN], [], [], _LINGER)
            if _STDIN in ready:
                self._orders.readline()
                end = time.monotonic() + _LINGER
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.recv_into(buffer)
                    arrived += 1
        return {"arrived": arrived + _overflows() - overflows}

    def _echo(self) -> dict[str, Any]:
        """Send each datagram back until told to stop."""
        sock = self._datagrams
        while True:
            ready, _, _ = select.select([sock.fileno(), _STDIN], [], [])
            with contextlib.suppress(OSError):  # nothing more, or whoever asked has gone
                while True:
                    sock.sendto(*sock.recvfrom(2048))
            if _STDIN in ready:
                self._orders.readline()
                return {}


def _connect(up: int, down: int, seconds: float, address: str = TARGET) -> dict[str, Any]:
    """Be the near side of a transfer: so many streams to the far side, so many from it."""
    senders: list[socket.socket] = []
    receivers: list[socket.socket] = []
    for way, socks, streams in ((_TO_FAR, senders, up), (_TO_NEAR, receivers, down)):
        for _ in range(streams):
            sock = socket.create_connection((address, PORT), timeout=_PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(way)
            socks.append(sock)
    return _transfer(senders, receivers, seconds)


def _transfer(senders: list[socket.socket], receivers: list[socket.socket], seconds: float) -> dict[str, Any]:
    """Send and receive as much as goes for some seconds beyond the warm-up; return what was received.

    `total` bytes in all, `bytes` of them in the `seconds` from the warm-up to the last arrival.
    """
    block, buffer = memoryview(bytes(_WRITE)), bytearray(_READ)
    total = warm_bytes = 0
    last = warm_at = time.monotonic() + WARM_SECONDS
    end = warm_at + seconds
    for sock in (*senders, *receivers):
        sock.setblocking(False)
    reading, writing = list(receivers), list(senders)
    while (now := time.monotonic()) < end and (reading or writing):
        readable, writable, _ = select.select(reading, writing, [], end - now)
        for sock in writable:
            try:
                sock.send(block)
            except BlockingIOError:
                continue
            except OSError:  # the other side has seen enough
                writing.remove(sock)
        for sock in readable:
            try:
                count = sock.recv_into(buffer)
            except OSError:
                count = 0
            if not count:
                reading.remove(sock)
                continue
            total += count
            if (last := time.monotonic()) < warm_at:
                warm_bytes = total
    for sock in (*senders, *receivers):
        sock.close()
    return {"total": total, "bytes": total - warm_bytes, "seconds": max(last - warm_at, 1e-9)}


def _emit(rate: float, size: int, seconds: float, address: str = TARGET) -> dict[str, Any]:
    """Send datagrams of `size` bytes at a rate, as evenly as the clock's ticks allow; return how many in what time."""
    payload, total, sent = bytes(size), round(rate * seconds), 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        send, begin = sock.send, time.monotonic()
        while sent < total:
            due = min(total, int((time.monotonic() - begin) * rate) + 1, sent + _BURST)
            if due <= sent:
                time.sleep(_TICK)
            with contextlib.suppress(OSError):  # an ICMP error of an earlier one: this one counts as lost
                while sent < due:
                    sent += 1
                    send(payload)
        return {"sent": sent, "seconds": time.monotonic() - begin}


def _ping(rate: float, size: int, seconds: float, address: str = TARGET) -> dict[str, Any]:
    """Send datagrams at a rate to an echo; return the round trips in us, sorted."""
    total = round(rate * seconds)
    trips: list[float] = []
    sent_ns: list[int] = []
    filler = bytes(size - _NUMBER.size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        sock.setblocking(False)

        def wait_until(moment: int) -> None:
            while (left := moment - time.monotonic_ns()) > 0:
                if select.select([sock], [], [], left / 1e9)[0]:
                    with contextlib.suppress(OSError):
                        while True:
                            (number,) = _NUMBER.unpack_from(sock.recv(2048))
                            trips.append((time.monotonic_ns() - sent_ns[number]) / 1e3)

        begin = time.monotonic_ns()
        for number in range(total):
            wait_until(begin + int(number * 1e9 / rate))
            sent_ns.append(time.monotonic_ns())
            with contextlib.suppress(OSError):
                sock.send(_NUMBER.pack(number) + filler)
        wait_until(time.monotonic_ns() + int(_LINGER * 1e9))
    return {"sent": total, "us": sorted(trips)}


def _overflows() -> int:
    """Return how many datagrams found their socket's queue full, in this namespace (proc(5): net/snmp)."""
    names, values = (
        line.split()[1:] for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Udp:")
    )
    return int(values[names.index("RcvbufErrors")])


def _print(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Be a generator."""
    wait_precisely()
    gc.disable()  # what is made here is freed by its counts
    _Worker().run()


if __name__ == "__main__":
    main()
