"""Traffic for a lab: numbered datagrams both ways at a fixed rate, a web server, and a download.

`Datagrams` and `Download` start them as processes (`python -m mptunnel.traffic ...`) in a lab's namespaces and tell
what came of them. All times are CLOCK_MONOTONIC, which every process of a machine shares: seconds, as
`time.monotonic()` gives them, unless a name ends in `_ns`.

The datagrams are stamped by the kernel when they arrive, so that a gap is a gap of the network, not of this prober's
own waking up; and when each was sent is kept too (`Flow.longest_send_gap`), so that a stall of the machine can be
told from one of the tunnel.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from mptunnel.errors import HostError
from mptunnel.lab import TARGET, Lab
from mptunnel.wires import wait_precisely

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PORT: Final = 7000
WEB_PORT: Final = 80
BLOCK: Final = 64 * 1024

_HEADER: Final = struct.Struct("<IBxxxIQ")  # magic, kind, number, time sent in ns
_MAGIC: Final = 0x6D70741A
_CALL, _ANSWER, _DATA = range(3)  # the near side calls until the far one answers; then both send data
_CALL_SECONDS: Final = 0.05
_LINGER: Final = 1.0  # what is under way when the sending ends may still arrive
_PATIENCE: Final = 30.0  # for the other side to be there
_TIMESPEC: Final = struct.Struct("@qq")
_SO_TIMESTAMPNS: Final = 35
_SO_MAX_PACING_RATE: Final = 47
_CATCHING_UP: Final = 1.5  # times the rate that a download was asked to have
_PROGRESS_SECONDS: Final = 0.05


# -- numbered datagrams ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """What one direction sent and received: the n-th entries belong to the datagram of number n."""

    sent_at_ns: Sequence[int]
    arrived_at_ns: Sequence[int]  # of the first copy; 0: never
    duplicated: int  # copies that arrived after the first

    @property
    def sent(self) -> int:
        """Datagrams sent."""
        return len(self.sent_at_ns)

    @property
    def lost(self) -> int:
        """Datagrams that never arrived."""
        return sum(not at for at in self.arrived_at_ns)

    @property
    def missing(self) -> list[tuple[int, float]]:
        """Number and sending time of each datagram that never arrived."""
        pairs = enumerate(zip(self.sent_at_ns, self.arrived_at_ns, strict=True))
        return [(number, sent / 1e9) for number, (sent, arrived) in pairs if not arrived]

    @property
    def reordered(self) -> int:
        """Datagrams that arrived after a later one."""
        newest, found = 0, 0
        for at in filter(None, self.arrived_at_ns):
            found += at < newest
            newest = max(newest, at)
        return found

    def longest_gap(self, after: float = 0.0, before: float = math.inf) -> float:
        """Return the longest time without an arrival that ended after `after` and began before `before`.

        The end of the sending ends the last one.
        """
        arrivals = sorted(filter(None, self.arrived_at_ns))
        return _longest([*arrivals, max([*arrivals[-1:], *self.sent_at_ns[-1:]], default=0)], after, before)

    def longest_stall(self, after: float = 0.0, before: float = math.inf) -> float:
        """Return the longest gap less the sender's own pause within it: a stall of the way, not of the machine."""
        order = sorted((at, number) for number, at in enumerate(self.arrived_at_ns) if at)
        longest = 0.0
        for (begin, first), (end, last) in itertools.pairwise(order):
            if (end - begin) / 1e9 > longest and end / 1e9 > after and begin / 1e9 < before:
                pauses = itertools.pairwise(self.sent_at_ns[min(first, last) : max(first, last) + 1])
                longest = max(longest, (end - begin - max(b - a for a, b in pauses)) / 1e9)
        return longest

    def longest_send_gap(self, after: float = 0.0, before: float = math.inf) -> float:
        """Return the same of the sending: how long the machine itself stood still."""
        return _longest(self.sent_at_ns, after, before)

    def delays(self) -> list[float]:
        """Return the one-way delay of each datagram that arrived, sorted."""
        pairs = zip(self.sent_at_ns, self.arrived_at_ns, strict=True)
        return sorted((arrived - sent) / 1e9 for sent, arrived in pairs if arrived)


def _longest(times_ns: Sequence[int], after: float, before: float) -> float:
    pairs = itertools.pairwise(times_ns)
    gaps = ((end - begin) / 1e9 for begin, end in pairs if end / 1e9 > after and begin / 1e9 < before)
    return max(gaps, default=math.inf)


class Datagrams:
    """`rate` datagrams a second each way between two roles for some seconds; begun when the constructor returns.

    `up` is near to far. The far side must be reachable as `address` from the near one, also through a NAT.
    """

    _ports: Iterator[int] = itertools.count(PORT)

    def __init__(
        self,
        lab: Lab,
        seconds: float,
        *,
        rate: int = 1000,
        size: int = 200,
        address: str = TARGET,
        near: str = "cl",
        far: str = "inet",
        device: str = "",
    ) -> None:
        port = next(self._ports)
        how = {"port": port, "seconds": seconds, "rate": rate, "size": size}
        self._seconds = seconds
        self._far = _start(lab, far, "far", how)
        self._near = _start(lab, near, "near", how | {"address": address, "device": device})
        self.begun = _first_line(self._near)["begun_ns"] / 1e9

    def finish(self) -> tuple[Flow, Flow]:
        """Wait for the end; return what became of the datagrams: up, down."""
        near, far = (_last_line(each, self._seconds + _PATIENCE) for each in (self._near, self._far))
        return _flow(near, far), _flow(far, near)


def _flow(sender: dict[str, Any], receiver: dict[str, Any]) -> Flow:
    sent = sender["sent_at_ns"]
    arrived = receiver["arrived_at_ns"]
    arrived += [0] * (len(sent) - len(arrived))
    return Flow(sent, arrived[: len(sent)], receiver["duplicated"])


@dataclass(slots=True)
class _Exchange:
    """One side of `Datagrams`: sends by the clock and notes what arrives."""

    sock: socket.socket
    seconds: float
    rate: int
    size: int
    sent_at_ns: list[int] = field(default_factory=list)
    arrived_at_ns: list[int] = field(default_factory=list)
    duplicated: int = 0

    def run(self) -> None:
        begin, total = time.monotonic_ns(), round(self.seconds * self.rate)
        spacing, number = 1e9 / self.rate, 0
        end = begin + int((self.seconds + _LINGER) * 1e9)
        while (now := time.monotonic_ns()) < end:
            due = min(total, int((now - begin) / spacing) + 1)
            while number < due:
                self._send(number)
                number += 1
            wake = begin + number * spacing if number < total else end
            ready, _, _ = select.select([self.sock], [], [], max(0.0, (wake - time.monotonic_ns()) / 1e9))
            if ready:
                self._receive()

    def _send(self, number: int) -> None:
        now = time.monotonic_ns()
        self.sent_at_ns.append(now)
        with contextlib.suppress(OSError):  # no route, no buffer: it never arrives, and so it counts as lost
            self.sock.send(_datagram(_DATA, number, now, self.size))

    def _receive(self) -> None:
        """Note all that waits. The kernel's stamp is of the wall clock, hence the difference of the clocks."""
        behind = time.time_ns() - time.monotonic_ns()
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(2048, 64)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error of something sent before
                continue
            _, kind, number, _ = _HEADER.unpack_from(data)
            if kind == _CALL:
                self.sock.send(_datagram(_ANSWER, 0, 0, 0))
            if kind != _DATA:
                continue
            if number >= len(self.arrived_at_ns):
                self.arrived_at_ns += [0] * (number + 1 - len(self.arrived_at_ns))
            if self.arrived_at_ns[number]:
                self.duplicated += 1
                continue
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            self.arrived_at_ns[number] = seconds * 1_000_000_000 + nanoseconds - behind


def _datagram(kind: int, number: int, now_ns: int, size: int) -> bytes:
    return _HEADER.pack(_MAGIC, kind, number, now_ns).ljust(size, b".")


def _exchange(sock: socket.socket, how: dict[str, Any]) -> None:
    """Run the exchange on a connected socket and print what it noted."""
    sock.setblocking(False)
    _print(begun_ns=time.monotonic_ns())
    exchange = _Exchange(sock, how["seconds"], how["rate"], how["size"])
    exchange.run()
    _print(
        sent_at_ns=exchange.sent_at_ns,
        arrived_at_ns=exchange.arrived_at_ns,
        duplicated=exchange.duplicated,
    )


def _near(how: dict[str, Any]) -> None:
    """Call until the far side answers, then exchange."""
    with _udp_socket(how["address"]) as sock:
        _bind_to_device(sock, how["device"])
        sock.connect((how["address"], how["port"]))
        end = time.monotonic() + _PATIENCE
        sock.settimeout(_CALL_SECONDS)
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # nobody there yet, or no route to it
                sock.send(_datagram(_CALL, 0, 0, 0))
                sock.recv(2048, socket.MSG_PEEK)  # an answer, or data that overtook it
                return _exchange(sock, how)
        raise HostError(f"nobody answered at {how['address']} port {how['port']}")


def _far(how: dict[str, Any]) -> None:
    """Wait for a call, then exchange with whoever called."""
    with _udp_socket("::") as sock:
        sock.bind(("::", how["port"]))
        sock.settimeout(_PATIENCE)
        _, caller = sock.recvfrom(2048)
        sock.connect(caller)
        sock.send(_datagram(_ANSWER, 0, 0, 0))
        _exchange(sock, how)


def _udp_socket(address: str) -> socket.socket:
    """Return a socket of the address's family; an IPv6 one serves IPv4 too."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return sock


# -- a web server and a download ---------------------------------------------------------------------------------


def content(size: int, seed: int = 1) -> Iterator[bytes]:
    """Yield `size` bytes in blocks of which no two are alike."""
    noise = random.Random(seed).randbytes(BLOCK)  # noqa: S311
    for number in range(-(-size // BLOCK)):
        block = number.to_bytes(8, "big") + noise[8:]
        yield block[: size - number * BLOCK]


def content_sha256(size: int, seed: int = 1) -> str:
    """Return the hash a whole download of this size and seed has."""
    digest = hashlib.sha256()
    for block in content(size, seed):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Progress:
    """A download so far; when it has ended, `sha256` is there, or `error` says why it is not whole."""

    received: int = 0
    at: float = 0.0
    began: float = 0.0
    sha256: str = ""
    error: str = ""
    stalls: tuple[tuple[float, float], ...] = ()  # end and length of each time without a byte, over 10 ms

    def longest_stall(self, after: float = 0.0, before: float = math.inf) -> float:
        """Return the longest time without a byte that ended after `after` and began before `before`."""
        return max((long for end, long in self.stalls if end > after and end - long < before), default=0.0)


class Download:
    """A download of seeded content from a `web` server (`serve_web`) to the client; begun by the constructor."""

    def __init__(
        self,
        lab: Lab,
        size: int,
        *,
        seed: int = 1,
        rate: float = 0.0,
        address: str = TARGET,
        role: str = "cl",
        device: str = "",
    ) -> None:
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{WEB_PORT}/{size}?seed={seed}&rate={rate}"
        self.progress = Progress()
        self.process = _start(lab, role, "fetch", {"url": url, "device": device})
        self._buffer = b""
        assert self.process.stdout  # noqa: S101  it has a pipe
        os.set_blocking(self.process.stdout.fileno(), False)

    def poll(self) -> Progress:
        """Return the newest progress, without waiting."""
        assert self.process.stdout  # noqa: S101
        while data := self.process.stdout.read(1 << 16):
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                known = json.loads(line)
                self.progress = Progress(**known | {"stalls": tuple(map(tuple, known.get("stalls", ())))})
        return self.progress

    def finish(self, patience: float = _PATIENCE) -> Progress:
        """Wait for the end and return it; `error` is set where the download is not whole by then."""
        end = time.monotonic() + patience
        while not (self.poll().sha256 or self.progress.error):
            if time.monotonic() > end or (self.process.poll() is not None and not self.poll().sha256):
                return Progress(self.progress.received, self.progress.at, self.progress.began, error="not finished")
            time.sleep(_PROGRESS_SECONDS)
        return self.progress


def serve_web(lab: Lab, role: str = "inet") -> subprocess.Popen[Any]:
    """Start the web server: GET /SIZE?seed=N&rate=BYTES_PER_SECOND. It listens when this returns."""
    process = _start(lab, role, "web", {})
    _first_line(process)
    return process


class _WebHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Send as many bytes as the path says, at the rate asked for."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        size, rate = int(parts.path.strip("/")), float(query.get("rate", 0))
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if rate:  # what was held up is sent faster, but not all at once, which would fill the queues of others
            self.connection.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(_CATCHING_UP * rate))
        begin, sent = time.monotonic(), 0
        with contextlib.suppress(OSError):  # the client has gone
            for block in content(size, int(query.get("seed", 1))):
                if rate:
                    time.sleep(max(0.0, begin + sent / rate - time.monotonic()))
                self.wfile.write(block)
                sent += len(block)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _WebServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """Serve IPv4 too."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _web(_: dict[str, Any]) -> None:
    with _WebServer(("::", WEB_PORT), _WebHandler) as server:
        _print(listening=WEB_PORT)
        server.serve_forever()


def _fetch(how: dict[str, Any]) -> None:
    """Download a URL and print the progress, then the hash."""
    parts = urlsplit(how["url"])
    began = time.monotonic()
    try:
        with _connect(str(parts.hostname), parts.port or WEB_PORT, how["device"]) as sock:
            sock.sendall(f"GET {parts.path}?{parts.query} HTTP/1.0\r\nHost: {parts.hostname}\r\n\r\n".encode())
            _print(**_read_body(sock, int(parts.path.strip("/")), began))
    except OSError as error:
        _print(error=error.strerror or str(error), began=began, at=time.monotonic())


def _connect(host: str, port: int, device: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    _bind_to_device(sock, device)
    sock.connect((host, port))
    return sock


def _read_body(sock: socket.socket, size: int, began: float) -> dict[str, Any]:
    stream = sock.makefile("rb", 0)
    while stream.readline() not in (b"\r\n", b""):
        pass
    buffer = memoryview(bytearray(1 << 18))
    digest, received, stalls = hashlib.sha256(), 0, []
    last = told = time.monotonic()
    while count := sock.recv_into(buffer):
        now = time.monotonic()
        if now - last > 0.010:
            stalls.append((now, now - last))
        last = now
        digest.update(buffer[:count])
        received += count
        if now - told > _PROGRESS_SECONDS:
            told = now
            _print(received=received, at=now, began=began)
    end = {"sha256": digest.hexdigest()} if received == size else {"error": f"ended after {received} of {size} bytes"}
    return {"received": received, "at": time.monotonic(), "began": began, "stalls": stalls, **end}


# -- processes ---------------------------------------------------------------------------------------------------


def _start(lab: Lab, role: str, what: str, how: dict[str, Any]) -> subprocess.Popen[Any]:
    argv = [sys.executable, "-m", "mptunnel.traffic", what, json.dumps(how)]
    return lab.spawn(role, argv, stdout=subprocess.PIPE, stderr=None)


def _first_line(process: subprocess.Popen[Any]) -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout else b""
    if not line:
        raise HostError(f"a lab's traffic process ended with {process.wait()} before it began")
    known: dict[str, Any] = json.loads(line)
    return known


def _last_line(process: subprocess.Popen[Any], patience: float) -> dict[str, Any]:
    lines = process.communicate(timeout=patience)[0].splitlines()
    if process.returncode or not lines:
        raise HostError(f"a lab's traffic process failed with {process.returncode}")
    known: dict[str, Any] = json.loads(lines[-1])
    return known


def _bind_to_device(sock: socket.socket, device: str) -> None:
    if device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())


def _print(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one of the processes: `python -m mptunnel.traffic far|near|web|fetch JSON`."""
    wait_precisely()
    gc.disable()  # short lives, no cycles
    roles: dict[str, Callable[[dict[str, Any]], None]] = {"far": _far, "near": _near, "web": _web, "fetch": _fetch}
    roles[sys.argv[1]](json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
