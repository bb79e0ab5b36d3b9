"""A simulated network for the core: a client, a server, wires with seeded faults, and time that jumps.

The roles are the real ones; what the loop would do (open paths, save, run scripts) is done at once and written down.
A minute of tunnel life takes milliseconds, and the same seed gives the same life.
"""

from __future__ import annotations

import heapq
import random
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network
from itertools import count
from typing import TYPE_CHECKING, Any

from mptunnel.client import Client, Membership
from mptunnel.config import ClientSettings, Gateway, JoinToken, Link, Network, PeerRecord, ServerRecord, TokenRecord
from mptunnel.events import ClosePath, Endpoint, Event, OpenPath, Resolve, RunScript, SaveState, Stop, Transmit
from mptunnel.noise import StaticKey
from mptunnel.server import Offer, Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from mptunnel.packet import Buffer

SERVER_ADDRESS = IPv4Address("198.51.100.1")
TUNNEL4 = IPv4Network("10.0.1.0/24")
TUNNEL6 = IPv6Network("fd00:1::/64")
WALL = 1_800_000_000.0
CLIENT_KEY, SERVER_KEY, PSK = b"\x11" * 32, b"\x22" * 32, b"\x33" * 32


def ipv4(source: str, target: str, payload: bytes) -> bytes:
    """An IPv4 packet with this payload (UDP by name only)."""
    length = 20 + len(payload)
    head = struct.pack(">BBHHHBBH", 0x45, 0, length, 0, 0, 64, 17, 0)
    return head + IPv4Address(source).packed + IPv4Address(target).packed + payload


@dataclass
class Wire:
    """One uplink: seconds, shares, and whether it lets anything through at all."""

    delay: float = 0.02
    jitter: float = 0.0
    loss_up: float = 0.0
    loss_down: float = 0.0
    duplicate: float = 0.0
    is_cut: bool = False
    cuts_up: bool = False
    cuts_down: bool = False
    largest: int = 65535
    nat_port: int = 40000
    nat_host: str = ""
    counts: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0, "lost_up": 0, "lost_down": 0})


class Simnet:
    """A client with `len(wires)` uplinks and a server. `now` is both roles' clock."""

    def __init__(
        self,
        *wires: Wire,
        seed: int = 1,
        token: JoinToken | None = None,
        tokens: list[TokenRecord] | None = None,
        admitted: bool = True,
        said_hello: bool = True,
        start: float = 1000.0,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = start
        self.wall_offset = WALL - start
        self.wires = list(wires) or [Wire(), Wire(delay=0.06)]
        for number, wire in enumerate(self.wires):
            wire.nat_host = wire.nat_host or f"192.0.2.{number + 1}"
        self.down = [False] * len(self.wires)
        self.saved: dict[str, Any] = {}
        self.scripts: list[tuple[str, str, dict[str, Any]]] = []
        self.stopped: list[Stop] = []
        self.open: dict[int, int] = {}  # client's sockets: path -> local port
        self.at_client: list[tuple[float, bytes]] = []
        self.at_server: list[tuple[float, bytes]] = []
        self.log: list[tuple[float, str, int, bytes]] = []
        self.tap: Callable[[str, int, bytes], bytes | None] | None = None
        self.is_server_alive = True
        self._queue: list[tuple[float, int, str, int, bytes]] = []
        self._order = count()
        self._events_due: list[tuple[float, int, Callable[[], None]]] = []
        self.records = (
            [PeerRecord("sim", StaticKey(CLIENT_KEY).public, PSK, TUNNEL4[2], TUNNEL6[2], WALL)] if admitted else []
        )
        self.tokens = tokens or []
        self.server = self.new_server()
        record = ServerRecord(StaticKey(SERVER_KEY).public, PSK if admitted else bytes(32), said_hello=said_hello)
        self.client = self.new_client(record, token)

    # -- building --------------------------------------------------------------------------------------

    def entropy(self, n: int) -> bytes:
        return self.rng.randbytes(n)

    def new_server(self, reserved: int = 0) -> Server:
        return Server(
            SERVER_KEY, Network(TUNNEL4, TUNNEL6), self.records, self.tokens, Offer(1420, True, False), reserved=reserved,
            port=5000, entropy=self.entropy, rng=self.rng, now=self.now, wall=self.now + self.wall_offset,
        )  # fmt: skip

    def new_client(self, record: ServerRecord, token: JoinToken | None = None, reserved: int = 0) -> Client:
        settings = ClientSettings(server="sim.example", interfaces=tuple(f"w{n}" for n in range(len(self.wires))))
        membership = Membership(record, CLIENT_KEY, token, "sim")
        client = Client(
            settings, membership, [SERVER_ADDRESS], reserved=reserved, kept=(), entropy=self.entropy,
            rng=self.rng, now=self.now, wall=self.now + self.wall_offset,
        )  # fmt: skip
        self.client = client
        client.links_changed(self.links(), self.now)
        self._drain()
        return client

    def links(self) -> tuple[Link, ...]:
        return tuple(
            Link(
                f"w{n}", n + 2, "", not self.down[n], (IPv4Interface(f"192.168.{n}.2/24"),),
                Gateway(IPv4Address(f"192.168.{n}.1"), 100 + n), None, 1500,
            )  # fmt: skip
            for n in range(len(self.wires))
        )

    def restart_server(self) -> None:
        self.server = self.new_server()

    def set_link(self, number: int, *, up: bool) -> None:
        self.down[number] = not up
        self.client.links_changed(self.links(), self.now)
        self._drain()

    # -- running ---------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events_due, (when, next(self._order), action))

    def client_sends(self, *packets: bytes) -> None:
        inbox: list[Buffer] = []
        self.client.send(packets, self.now, inbox)
        self.at_client += [(self.now, bytes(packet)) for packet in inbox]
        self._drain()

    def server_sends(self, *packets: bytes) -> None:
        if self.is_server_alive:
            self.server.send(packets, self.now)
        self._drain()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        self._drain()
        while True:
            deadlines = [self.client.next_deadline(), self.server.next_deadline() if self.is_server_alive else end]
            when = min(
                *deadlines,
                self._queue[0][0] if self._queue else end,
                self._events_due[0][0] if self._events_due else end,
            )
            if when > end:
                break
            self.now = max(self.now, when)
            if when == end and not self._is_due(end):
                break
            self._step()
        self.now = end

    def _is_due(self, end: float) -> bool:
        return (
            bool(self._queue and self._queue[0][0] <= end)
            or bool(self._events_due and self._events_due[0][0] <= end)
            or self.client.next_deadline() <= end
            or (self.is_server_alive and self.server.next_deadline() <= end)
        )

    def _step(self) -> None:
        while self._events_due and self._events_due[0][0] <= self.now:
            heapq.heappop(self._events_due)[2]()
        while self._queue and self._queue[0][0] <= self.now:
            _, _, side, number, datagram = heapq.heappop(self._queue)
            self._deliver(side, number, datagram)
        self.client.finish_turn(self.now)
        if self.client.next_deadline() <= self.now:
            self.client.handle_timeout(self.now)
        if self.is_server_alive:
            self.server.finish_turn(self.now)
            if self.server.next_deadline() <= self.now:
                self.server.handle_timeout(self.now)
        self._drain()

    def _deliver(self, side: str, number: int, datagram: bytes) -> None:
        inbox: list[Buffer] = []
        view = memoryview(datagram)
        if side == "up":
            if self.is_server_alive:
                self.server.receive(view, len(view), self.source(number), self.now, inbox)
                self.at_server += [(self.now, bytes(packet)) for packet in inbox]
        elif number in self.open:
            self.client.receive(view, len(view), number, self.now, inbox)
            self.at_client += [(self.now, bytes(packet)) for packet in inbox]

    def source(self, number: int) -> Endpoint:
        """The address from which the server sees a path."""
        wire = self.wires[number]
        return Endpoint(f"::ffff:{wire.nat_host}", wire.nat_port, 0, b"")

    def _drain(self) -> None:
        for _ in range(20):
            self._take_events(self.client.events(), self.client, "client")
            for transmit in self.client.transmits():
                self._send("up", transmit.to, transmit)
            if self.is_server_alive:
                self._take_events(self.server.events(), self.server, "server")
                for transmit in self.server.transmits():
                    number = next((n for n in range(len(self.wires)) if self.source(n) == transmit.to), None)
                    if number is not None:
                        self._send("down", number, transmit)

    def _take_events(self, events: list[Event], role: Client | Server, side: str) -> None:
        for event in events:
            match event:
                case OpenPath():
                    self.open[event.path] = event.port or 50000 + event.path
                    self.client.path_opened(event.path, self.open[event.path], self.now)
                case ClosePath():
                    self.open.pop(event.path, None)
                case Stop():
                    self.stopped.append(event)
                case SaveState():
                    self.saved[event.name] = event.document
                    role.job_done(event, None, self.now)
                case RunScript():
                    self.scripts.append((side, event.verb, dict(event.values)))
                    role.job_done(event, None, self.now)
                case Resolve():
                    role.job_done(event, (SERVER_ADDRESS,), self.now)

    def _send(self, side: str, number: int, transmit: Transmit) -> None:
        if side == "up" and number not in self.open:
            return
        for at in range(0, len(transmit.data), transmit.size):
            self.put(side, number, bytes(transmit.data[at : at + transmit.size]))

    def put(self, side: str, number: int, datagram: bytes) -> None:
        """Let a datagram enter a wire."""
        wire = self.wires[number]
        self.log.append((self.now, side, number, datagram))
        wire.counts[side] += 1
        if self.tap is not None:
            changed = self.tap(side, number, datagram)
            if changed is None:
                return
            datagram = changed
        loss, cut = (wire.loss_up, wire.cuts_up) if side == "up" else (wire.loss_down, wire.cuts_down)
        if wire.is_cut or cut or self.down[number] or len(datagram) > wire.largest or self.rng.random() < loss:
            wire.counts[f"lost_{side}"] += 1
            return
        copies = 2 if self.rng.random() < wire.duplicate else 1
        for _ in range(copies):
            when = self.now + wire.delay + self.rng.random() * wire.jitter
            heapq.heappush(self._queue, (when, next(self._order), side, number, datagram))
