"""The wires of a lab: one process that holds its namespaces and carries every packet between them.

`lab` starts it as `python -m mptunnel.wires`, writes one JSON request a line to its stdin and reads one answer a
line from its stdout. The first request is the plan: the process then makes a user namespace (unless told not to)
and one network namespace a role, opens a TUN device for each port, and becomes the network between them: a packet
read from one port leaves by the port that its destination address names, after what the `Lane` in between does to
it. Nothing touches the namespace it was started in. When its stdin ends, however its parent died, it kills what
still runs in the namespaces and leaves; the kernel then removes them.

A wire has two lanes, `up` (away from the client) and `down`. A `Lane` decides and counts, and does no I/O; all its
chance comes from its own seed, so the same packets meet the same losses in each run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKET_SIZE: Final = 2048  # more than any MTU of a lab
BATCH: Final = 64  # packets taken from one device before what is due is delivered
TAPE_BYTES: Final = 48  # of a packet are taken down: an IPv4 header, UDP's, and the beginning of what it carries
BUFFER: Final = 64 * 1024  # bytes that wait before a lane with a rate drops

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_TIMERSLACK: Final = 29
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_NETLINK_NETFILTER: Final = 12
# nlmsghdr (length, type, flags, sequence, pid), nfgenmsg (family, version, resource): delete every conntrack entry
_CONNTRACK_FLUSH: Final = struct.pack("=IHHII BBH", 20, 0x0102, 0x0005, 1, 0, 0, 0, 0)


@dataclass(slots=True)
class Weather:
    """What a lane does to packets. Times in seconds, `rate` in bytes per second (0: no limit), shares 0 to 1."""

    is_cut: bool = False  # drop everything, tell nobody
    loss: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0  # up to this much more than `delay`, evenly spread
    rate: float = 0.0
    buffer: int = BUFFER  # bytes that may wait for `rate`; more is dropped
    duplicate: float = 0.0  # share that arrives twice
    reorder: bool = False  # jitter may let a packet overtake another
    mtu: int = 0  # longer packets vanish silently (0: none)
    kept_until: float = 0.0  # by `time.monotonic()`: nothing leaves before, and nothing is lost by it


@dataclass(slots=True)
class Counts:
    """What became of the packets given to a lane: each is delivered, or counted under one of the losses."""

    packets: int = 0
    bytes: int = 0
    delivered: int = 0  # or on their way
    cut: int = 0
    lost: int = 0  # by chance
    overflowed: int = 0  # the buffer was full
    too_long: int = 0
    duplicated: int = 0  # extra copies, not among `delivered`


class Lane:
    """One direction of a wire: says when a packet arrives, if it does, and keeps count."""

    __slots__ = ("_chance", "_free_at", "_last_due", "_losses", "counts", "tape", "weather")

    def __init__(self, seed: str) -> None:
        self.weather = Weather()
        self.counts = Counts()
        self.tape: list[tuple[float | None, bytes]] | None = None  # when each arrives (None: never), how it begins
        self._losses = random.Random(f"{seed} losses")  # noqa: S311  of their own: jitter does not shift the pattern
        self._chance = random.Random(f"{seed} chance")  # noqa: S311
        self._free_at = 0.0  # when the rate lets the next packet go
        self._last_due = 0.0

    def arrivals(self, size: int, now: float) -> tuple[float, ...]:
        """Return when a packet of `size` bytes, sent `now`, arrives: never, once, or twice if it is duplicated."""
        weather, counts = self.weather, self.counts
        counts.packets += 1
        counts.bytes += size
        if weather.is_cut:
            counts.cut += 1
            return ()
        if weather.loss and self._losses.random() < weather.loss:
            counts.lost += 1
            return ()
        if weather.mtu and size > weather.mtu:
            counts.too_long += 1
            return ()
        due = start = max(now, weather.kept_until)
        if weather.rate:
            start = max(start, self._free_at)
            if (start - now) * weather.rate + size > weather.buffer:
                counts.overflowed += 1
                return ()
            due = self._free_at = start + size / weather.rate
        due += weather.delay
        if weather.jitter:
            due += self._chance.random() * weather.jitter
        if not weather.reorder:
            due = max(due, self._last_due)
        self._last_due = due
        counts.delivered += 1
        if weather.duplicate and self._chance.random() < weather.duplicate:
            counts.duplicated += 1
            return (due, due)
        return (due,)


class Port(NamedTuple):
    """A TUN device in one of the namespaces; `up` and `down` are its wire's lanes, where it has a wire."""

    fd: int
    up: Lane | None
    down: Lane | None


@dataclass(slots=True)
class Plan:
    """What to make: network namespaces by role, and the ports of the network between them.

    A port is {role, name, reach, wire}: the device's namespace and name, the addresses (IPv4) and /64 networks (IPv6)
    behind it, and the name of its wire, "" for none.
    """

    roles: list[str]
    ports: list[dict[str, Any]]
    seed: int = 0
    is_rootless: bool = True  # with a user namespace


@dataclass(slots=True)
class Network:
    """The namespaces, held open by their fds, and the ports between which packets move."""

    namespaces: dict[str, int] = field(default_factory=dict)
    ports: dict[int, Port] = field(default_factory=dict)
    reach: dict[bytes, Port] = field(default_factory=dict)  # IPv4 address or upper half of an IPv6 one -> the port
    wires: dict[str, dict[str, Lane]] = field(default_factory=dict)
    astray: int = 0  # packets to an address nobody has
    refused: int = 0  # packets that a device did not take (it is down)


def main() -> None:
    """Serve one lab: the plan comes first, then packets and requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; we end with its pipe
    network, own = Network(), f"/proc/{os.getpid()}"
    plan = Plan(**json.loads(sys.stdin.readline()))
    try:
        _build(network, plan)
    except OSError as error:
        _answer(error=f"{error.filename}: {error.strerror}" if error.filename else error.strerror, errno=error.errno)
        return
    _answer(
        namespaces={role: f"{own}/fd/{fd}" for role, fd in network.namespaces.items()},
        user=f"{own}/ns/user" if plan.is_rootless else None,
    )
    try:
        _serve(network)
    finally:
        _end_everything(network)


def wait_precisely() -> None:
    """Let this process's waits end to the microsecond; the kernel's habit is to let each run over by 50 of them."""
    _call("prctl", _PR_SET_TIMERSLACK, 1, 0, 0, 0)


# -- packets ---------------------------------------------------------------------------------------------------


def _serve(network: Network) -> None:
    """Carry packets and do what is asked, until stdin ends. Wakes when the next packet is due, to some 0.1 ms."""
    wait_precisely()
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles
    control = sys.stdin.fileno()
    os.set_blocking(control, False)
    readers = [control, *network.ports]
    queue: list[tuple[float, int, int, bytes]] = []  # due, serial number (keeps order), device, packet
    serial, request, monotonic = 0, b"", time.monotonic
    while True:
        wait = max(0.0, queue[0][0] - monotonic()) if queue else None
        ready, _, _ = select.select(readers, [], [], wait)
        for fd in ready:
            if fd == control:
                request += (data := os.read(control, 65536))
                if not data:
                    return
                *lines, request = request.split(b"\n")
                for line in lines:
                    _obey(network, json.loads(line))
            else:
                serial = _take(network, fd, monotonic(), queue, serial)
        _deliver(network, monotonic(), queue)


def _take(network: Network, fd: int, now: float, queue: list[tuple[float, int, int, bytes]], serial: int) -> int:
    """Take up to a batch of packets off a device and queue them for their arrival; return the next serial number."""
    read, reach, source = os.read, network.reach, network.ports[fd]
    for _ in range(BATCH):
        try:
            packet = read(fd, PACKET_SIZE)
        except BlockingIOError:
            break
        target = reach.get(packet[16:20] if packet[0] >> 4 == 4 else packet[24:32])
        if target is None:
            network.astray += 1
            continue
        lane = source.up or target.down
        dues = lane.arrivals(len(packet), now) if lane else (now,)
        if lane and lane.tape is not None:
            lane.tape.append((dues[0] if dues else None, packet[:TAPE_BYTES]))
        for due in dues:
            serial += 1
            heapq.heappush(queue, (due, serial, target.fd, packet))
    return serial


def _deliver(network: Network, now: float, queue: list[tuple[float, int, int, bytes]]) -> None:
    while queue and queue[0][0] <= now:
        _, _, fd, packet = heapq.heappop(queue)
        try:
            os.write(fd, packet)
        except OSError:
            network.refused += 1


# -- requests --------------------------------------------------------------------------------------------------


def _obey(network: Network, request: dict[str, Any]) -> None:
    verbs: dict[str, Callable[..., dict[str, Any]]] = {"set": _set, "counts": _counts, "tape": _tape, "forget": _forget}
    _answer(**verbs[request.pop("verb")](network, **request))


def _set(network: Network, wire: str, lanes: list[str], **values: Any) -> dict[str, Any]:
    for lane in lanes:
        for name, value in values.items():
            setattr(network.wires[wire][lane].weather, name, value)
    return {}


def _counts(network: Network, wire: str) -> dict[str, Any]:
    return {name: asdict(lane.counts) for name, lane in network.wires[wire].items()}


def _tape(network: Network, wire: str) -> dict[str, Any]:
    """Return what was taken down of each packet since the last time, and go on; the first time begins it."""
    tapes = {}
    for name, lane in network.wires[wire].items():
        tapes[name] = [(due, head.hex()) for due, head in lane.tape or ()]
        lane.tape = []
    return tapes


def _forget(network: Network, role: str) -> dict[str, Any]:
    """Empty a namespace's conntrack table, so that its NAT makes new mappings. What `conntrack -F` does."""
    with _inside(network, role):
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    with netlink:
        netlink.send(_CONNTRACK_FLUSH)
        code = struct.unpack_from("=i", netlink.recv(4096), 16)[0]  # nlmsgerr after the header
    return {"error": f"conntrack flush: {os.strerror(-code)}", "errno": -code} if code else {}


def _answer(**values: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(values).encode() + b"\n")


# -- namespaces ------------------------------------------------------------------------------------------------


def _build(network: Network, plan: Plan) -> None:
    if plan.is_rootless:
        _become_root()
    for role in plan.roles:
        _call("unshare", _CLONE_NEWNET)
        network.namespaces[role] = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _call("unshare", _CLONE_NEWNET)  # and an empty one to stay in
    for port in plan.ports:
        name = port["wire"]
        if name:
            network.wires[name] = {way: Lane(f"{plan.seed} {name} {way}") for way in ("up", "down")}
        lanes = network.wires.get(name, {})
        with _inside(network, port["role"]):
            made = Port(_open_tun(port["name"]), lanes.get("up"), lanes.get("down"))
        network.ports[made.fd] = made
        for text in port["reach"]:
            network.reach[_key(text)] = made


def _become_root() -> None:
    """Become root of a new user namespace, with this user and group mapped to root."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


@contextlib.contextmanager
def _inside(network: Network, role: str) -> Iterator[None]:
    """Whatever is opened in here belongs to that role's namespace."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", network.namespaces[role], _CLONE_NEWNET)
        yield
    finally:
        _call("setns", home, _CLONE_NEWNET)
        os.close(home)


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return fd


def _key(text: str) -> bytes:
    """Return the part of a destination address that tells the port."""
    return ip_network(text).network_address.packed[:8] if "/" in text else ip_address(text).packed


def _call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _end_everything(network: Network) -> None:
    """Kill what runs in the namespaces, also what our parent did not start itself or did not live to end."""
    ours = {Path(f"/proc/self/fd/{fd}").readlink() for fd in network.namespaces.values()}
    for _ in range(10):  # a process may fork while we look
        found = [int(each.name) for each in Path("/proc").glob("[0-9]*") if _namespace_of(each) in ours]
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _namespace_of(process: Path) -> Path | None:
    try:
        return (process / "ns/net").readlink()
    except OSError:  # it has ended, or is none of ours
        return None


WEATHER_NAMES: Final = frozenset(each.name for each in fields(Weather))

if __name__ == "__main__":
    main()
