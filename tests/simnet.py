"""A simulated network for the core: a client, a server, wires with seeded faults, and time that jumps.

The roles are the real ones (or a stock WireGuard peer in place of one); what the loop would do (open paths, save, run
scripts) is done at once and written down, or held back, or made to fail. A minute of tunnel life takes milliseconds,
and the same seed gives the same life. `Traffic` is numbered packets both ways, and what became of them.
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import mmap
import random
import struct
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, Protocol

from mptunnel.aead import CIPHER, NO_DATA
from mptunnel.client import Client, Membership
from mptunnel.config import (
    ClientSettings,
    Gateway,
    JoinToken,
    Link,
    Network,
    PeerRecord,
    ServerRecord,
    TokenRecord,
    peers_from_document,
    peers_to_document,
    tokens_from_document,
    tokens_to_document,
)
from mptunnel.events import ClosePath, Endpoint, Event, Notice, OpenPath, Resolve, RunScript, SaveState, Stop, Transmit
from mptunnel.messages import HEADER_SIZE, TRANSPORT, TRANSPORT_HEADER, Control
from mptunnel.noise import StaticKey
from mptunnel.packet import PLAIN
from mptunnel.server import Offer, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mptunnel.clientpeer import ClientPeer
    from mptunnel.events import NoticeKind
    from mptunnel.serverpeer import ServerPeer
    from mptunnel.session import Session

    IPAddress = IPv4Address | IPv6Address

SERVER_ADDRESS = IPv4Address("198.51.100.1")
TUNNEL4 = IPv4Network("10.0.1.0/24")
TUNNEL6 = IPv6Network("fd00:1::/64")
TARGET = "203.0.113.2"
WALL = 1_800_000_000.0
CLIENT_KEY, SERVER_KEY, PSK = b"\x11" * 32, b"\x22" * 32, b"\x33" * 32
CLIENT_PUBLIC, SERVER_PUBLIC = StaticKey(CLIENT_KEY).public, StaticKey(SERVER_KEY).public


def unsealed(session: Session, datagram: bytes) -> bytes:
    """What is sealed in a datagram to `session`, wherever it went and whether or not it came in already."""
    return session._open(CIPHER.nonce(int.from_bytes(datagram[8:16], "little")), datagram[HEADER_SIZE:], NO_DATA)


def ipv4(source: str, target: str, payload: bytes) -> bytes:
    """An IPv4 packet with this payload (UDP by name only)."""
    length = 20 + len(payload)
    head = struct.pack(">BBHHHBBH", 0x45, 0, length, 0, 0, 64, 17, 0)
    return head + IPv4Address(source).packed + IPv4Address(target).packed + payload


def ipv6(source: bytes, target: bytes, payload: bytes) -> bytes:
    """An IPv6 packet with this payload."""
    return struct.pack(">IHBB", 6 << 28, len(payload), 17, 64) + source + target + payload


def stranger(number: int = 1, port: int = 9999) -> Endpoint:
    """An address that no wire leads from."""
    return Endpoint(f"::ffff:203.0.{113 + number // 250}.{number % 250 + 1}", port, 0, b"")


class Party(Protocol):
    """What stands at an end of the wires."""

    drops: Counter[str]

    def receive(self, datagrams: bytes, size: int, source: Any, now: float, inbox: list[bytes]) -> object: ...
    def transmits(self) -> list[Transmit]: ...
    def events(self) -> list[Event]: ...
    def finish_turn(self, now: float) -> None: ...
    def next_deadline(self) -> float: ...
    def handle_timeout(self, now: float) -> None: ...
    def wall_is(self, now: float, wall: float) -> None: ...


class StockParty(Party, Protocol):
    """A peer that knows only WireGuard."""

    def send(self, packets: list[bytes], now: float) -> None: ...


IP_UDP = 28  # bytes of headers on an IPv4 wire


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
    largest: int = 65535  # bytes of UDP payload
    rate: float = 0.0  # bytes a second, UDP and IP headers counted in, each way; 0: any
    buffer: float = 250_000.0  # bytes that wait for it; what comes on top is lost
    free_at: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})
    took: list[tuple[float, float, str]] = field(default_factory=list)  # with a rate: when sent, how long it took, way
    nat_port: int = 40000
    nat_host: str = ""
    address: str = ""  # the client's, on this wire
    versions: tuple[int, ...] = (4,)  # IP versions that the client has addresses of there
    mute: set[int] = field(default_factory=set)  # IP versions that nothing comes through by
    refuses: set[int] = field(default_factory=set)  # IP versions that no socket can be opened by
    dead_ports: set[int] = field(default_factory=set)  # the client's, that its NAT has a dead mapping for
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
        wall: float = WALL,
        down: Iterable[int] = (),
        mtu: int = 1420,
        stock_client: StockParty | None = None,
        stock_server: StockParty | None = None,
        server_starts: bool = True,
        settings: ClientSettings | None = None,
        named: Sequence[IPAddress] = (SERVER_ADDRESS,),
    ) -> None:
        self.rng = random.Random(seed)
        self.now = start
        self.wall_offset = wall - start
        self.client_ahead = 0.0  # the client's wall clock, of the server's
        self.wires = list(wires) or [Wire(), Wire(delay=0.06)]
        for number, wire in enumerate(self.wires):
            wire.nat_host = wire.nat_host or f"192.0.2.{number + 1}"
            wire.address = wire.address or f"192.168.{number}.2"
        self.down = [number in down for number in range(len(self.wires))]
        self.saved: dict[str, Any] = {}
        self.held: list[SaveState] | None = None  # saves that are not done yet, if they are held back
        self.failing: set[str] = set()  # files that cannot be written
        self.scripts: list[tuple[str, str, dict[str, Any]]] = []
        self.stopped: list[Stop] = []
        self.notices: list[tuple[float, str, Notice]] = []  # when, of which side
        self.named: tuple[IPAddress, ...] = tuple(named)  # what the server's name leads to
        self.server_at = set(self.named)  # where the server is, in truth
        self.open: dict[int, int] = {}  # client's sockets: path -> local port
        self.opened: list[tuple[float, OpenPath]] = []  # when, all of them
        self._ports: Counter[int] = Counter()  # by path, how often it had the choice
        self.towards: dict[int, IPAddress] = {}  # and the address of the server that they are connected to
        self.at_client: list[tuple[float, bytes]] = []
        self.at_server: list[tuple[float, bytes]] = []
        self.log: list[tuple[float, str, int, bytes]] = []
        self.astray: list[tuple[float, Endpoint, bytes]] = []  # what the server sends where no wire leads
        self.known: set[bytes] = set()  # every packet of any traffic
        self.tap: Callable[[str, int, bytes], bytes | None] | None = None
        self.is_server_alive = server_starts
        self.is_client_awake = True
        self.token = token
        self.settings = settings or ClientSettings(
            server="sim.example", interfaces=tuple(f"w{n}" for n in range(len(self.wires))), mtu=mtu
        )
        self._mtu = mtu
        self._queue: list[tuple[float, int, str, int, bytes]] = []
        self._order = count()
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._wall_at = start
        records = [PeerRecord("sim", CLIENT_PUBLIC, PSK, TUNNEL4[2], TUNNEL6[2], wall)] if admitted else []
        self.saved["server/peers"] = peers_to_document(records)
        self.saved["server/tokens"] = tokens_to_document(tokens or [])
        self._stock_server, self._stock_client = stock_server, stock_client
        self.server_side: Party
        self.client_side: Party
        if stock_server is None:
            self.new_server()
        else:
            self.server_side = stock_server
        if stock_client is None:
            self.new_client(
                ServerRecord(SERVER_PUBLIC, PSK if admitted else bytes(32), said_hello=said_hello), self.token
            )
        else:
            self.client_side = stock_client
            self.open[0] = 50000

    # -- building --------------------------------------------------------------------------------------

    def entropy(self, n: int) -> bytes:
        return self.rng.randbytes(n)

    def new_server(self) -> Server:
        """A server starts, with what is on disk."""
        self.server = Server(
            SERVER_KEY, Network(TUNNEL4, TUNNEL6), peers_from_document(self.saved["server/peers"]),
            tokens_from_document(self.saved["server/tokens"]), Offer(self._mtu, True, False),
            reserved=self._reserved("server"), port=5000, entropy=self.entropy, rng=self.rng, now=self.now,
            wall=self.now + self.wall_offset,
        )  # fmt: skip
        self.server_side = self.server
        return self.server

    def new_client(self, record: ServerRecord, token: JoinToken | None = None) -> Client:
        """A client starts with what it knows of the server."""
        self.open.clear()
        self._ports.clear()
        self.client = Client(
            self.settings, Membership(record, CLIENT_KEY, token, "sim"), self.named,
            reserved=self._reserved("client"), kept=(), entropy=self.entropy, rng=self.rng, now=self.now,
            wall=self.now + self.wall_offset + self.client_ahead,
        )  # fmt: skip
        self.client_side = self.client
        self.client.links_changed(self.links(), self.now)
        self._drain()
        return self.client

    def _reserved(self, role: str) -> int:
        return int(self.saved.get(f"{role}/timestamp", {"reserved": 0})["reserved"])

    def links(self) -> tuple[Link, ...]:
        return tuple(
            Link(
                f"w{n}",
                n + 2,
                "",
                not self.down[n],
                tuple(
                    IPv4Interface(f"{wire.address}/24") if version == 4 else IPv6Interface(f"2001:db8:{n}::2/64")
                    for version in wire.versions
                ),
                Gateway(IPv4Address(f"192.168.{n}.1"), 100 + n) if 4 in wire.versions else None,
                Gateway(IPv6Address("fe80::1"), 100 + n) if 6 in wire.versions else None,
                1500,
            )
            for n, wire in enumerate(self.wires)
        )

    @property
    def peer(self) -> ServerPeer:
        """The client's view of the server."""
        return self.client._peer

    @property
    def guest(self) -> ClientPeer:
        """The server's view of the client."""
        return self.server._peers[CLIENT_PUBLIC]

    # -- what happens to the parties -------------------------------------------------------------------

    def kill_server(self) -> None:
        """SIGKILL: nothing is said or saved."""
        self.is_server_alive = False
        self._lose_saves("server")

    def start_server(self) -> None:
        """Start it again, with what is on disk."""
        self.is_server_alive = True
        self.new_server()

    def restart_server(self) -> None:
        """SIGKILL, and a start at once."""
        self.kill_server()
        self.start_server()

    def restart_client(self) -> None:
        """SIGKILL, and a start at once: with the server's record if that is on disk, else as at first."""
        self._lose_saves("client")
        files = [name for name in self.saved if name.startswith("client/servers/")]
        if files:
            self.new_client(ServerRecord.from_document(self.saved[files[0]]))
        else:
            was_admitted = self.token is None
            psk = PSK if was_admitted else bytes(32)
            self.new_client(ServerRecord(SERVER_PUBLIC, psk, said_hello=was_admitted), self.token)

    def _lose_saves(self, side: str) -> None:
        if self.held is not None:
            self.held = [job for job in self.held if not job.name.startswith(side)]

    def stop(self, side: str) -> None:
        """A clean stop: the goodbyes go out."""
        role: Client | Server = self.client if side == "client" else self.server
        role.close(self.now)
        self._drain()
        if side == "server":
            self.is_server_alive = False

    def use_stock_client(self, stock: StockParty) -> None:
        """Somebody runs a stock WireGuard with our client's key instead of our client."""
        self.client_side = self._stock_client = stock
        self.open = {0: 50000}

    def set_link(self, number: int, *, up: bool) -> None:
        self.down[number] = not up
        self.client.links_changed(self.links(), self.now)
        self._drain()

    def renumber(self, number: int) -> None:
        """The path gets another address, and another one behind its NAT."""
        wire = self.wires[number]
        wire.address = f"192.168.{number}.{int(wire.address.rsplit('.', 1)[1]) + 1}"
        wire.nat_host = f"192.0.2.{100 + 10 * number + int(wire.address.rsplit('.', 1)[1])}"
        self.flush_nat(number)
        self.client.links_changed(self.links(), self.now)
        self._drain()

    def flush_nat(self, number: int) -> None:
        """The NAT forgets the path; what is sent next leaves by another port."""
        self.wires[number].nat_port += 7

    def set_wall(self, wall: float) -> None:
        """Somebody sets the wall clock."""
        self.wall_offset = wall - self.now
        self._tell_wall()
        self._drain()

    def _tell_wall(self) -> None:
        self._wall_at = self.now + 1.0
        for party, ahead in ((self.client_side, self.client_ahead), (self.server_side, 0.0)):
            party.wall_is(self.now, self.now + self.wall_offset + ahead)

    def release(self, failure: Exception | None = None) -> None:
        """Let the saves that are held back be done, or fail."""
        held, self.held = self.held or [], []
        for job in held:
            self._save(job, failure)
        self._drain()

    # -- running ---------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Let something happen at a time."""
        heapq.heappush(self._actions, (when, next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen in a while."""
        self.at(self.now + seconds, action)

    def client_sends(self, *packets: bytes) -> None:
        if self._stock_client is not None:
            self._stock_client.send(list(packets), self.now)
        elif self.is_client_awake:
            inbox: list[bytes] = []
            self.client.send([PLAIN + packet for packet in packets], self.now, inbox)
            self.client.finish_turn(self.now)
            self.at_client += [(self.now, bytes(packet)) for packet in inbox]
        self._drain()

    def server_sends(self, *packets: bytes) -> None:
        if self._stock_server is not None:
            self._stock_server.send(list(packets), self.now)
        elif self.is_server_alive:
            self.server.send([PLAIN + packet for packet in packets], self.now)
            self.server.finish_turn(self.now)
        self._drain()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        self._drain()
        while (when := self._next()) <= end:
            self.now = max(self.now, when)
            self._step()
        self.now = end

    def _next(self) -> float:
        """When something happens next."""
        return min(
            self.client_side.next_deadline() if self.is_client_awake else float("inf"),
            self.server_side.next_deadline() if self.is_server_alive else float("inf"),
            self._queue[0][0] if self._queue else float("inf"),
            self._actions[0][0] if self._actions else float("inf"),
        )

    def _step(self) -> None:
        if self.now >= self._wall_at:
            self._tell_wall()
        while self._actions and self._actions[0][0] <= self.now:
            heapq.heappop(self._actions)[2]()
        while self._queue and self._queue[0][0] <= self.now:
            _, _, side, number, datagram = heapq.heappop(self._queue)
            self._deliver(side, number, datagram)
        for party, is_there in ((self.client_side, self.is_client_awake), (self.server_side, self.is_server_alive)):
            if is_there:
                party.finish_turn(self.now)
                if party.next_deadline() <= self.now:
                    party.handle_timeout(self.now)
        self._drain()

    def _deliver(self, side: str, number: int, datagram: bytes) -> None:
        if side == "up":
            self.deliver(datagram, self.source(number))
        elif number in self.open and self.is_client_awake:
            inbox: list[bytes] = []
            self.client_side.receive(datagram, max(1, len(datagram)), number, self.now, inbox)
            self.at_client += [(self.now, bytes(packet)) for packet in inbox]

    def deliver(self, datagram: bytes, source: Endpoint) -> None:
        """Hand the server a datagram, as if from `source`."""
        if self.is_server_alive:
            inbox: list[bytes] = []
            self.server_side.receive(datagram, max(1, len(datagram)), source, self.now, inbox)
            self.at_server += [(self.now, bytes(packet)) for packet in inbox]

    def turn(self) -> None:
        """End the turn: handshakes are taken, and what is to be sent is sent."""
        self.server_side.finish_turn(self.now)
        self.client_side.finish_turn(self.now)
        self._drain()

    def source(self, number: int) -> Endpoint:
        """The address from which the server sees a path."""
        wire = self.wires[number]
        port = self.open.get(number, 50000 + number) - 50000 - number
        return Endpoint(f"::ffff:{wire.nat_host}", wire.nat_port + port, 0, b"")

    def _drain(self) -> None:
        while self._drain_client() | self._drain_server():
            pass

    def _drain_client(self) -> bool:
        if not self.is_client_awake:
            return False
        party = self.client_side
        events, transmits = list(party.events()), list(party.transmits())
        self._take_events(events, "client")
        for transmit in transmits:
            self._send("up", transmit.to, transmit)
        return bool(events or transmits)

    def _drain_server(self) -> bool:
        if not self.is_server_alive:
            return False
        party = self.server_side
        events, transmits = list(party.events()), list(party.transmits())
        self._take_events(events, "server")
        for transmit in transmits:
            number = next((n for n in range(len(self.wires)) if self.source(n) == transmit.to), None)
            if number is None:
                self.astray += [(self.now, transmit.to, datagram) for datagram in _datagrams(transmit)]
            else:
                self._send("down", number, transmit)
        return bool(events or transmits)

    def _take_events(self, events: list[Event], side: str) -> None:
        role: Client | Server | None = None
        if events:
            role = self.client if side == "client" else self.server
        for event in events:
            match event:
                case OpenPath():
                    if event.address.version in self.wires[event.path].refuses:
                        self.client.path_failed(event.path, "ENETUNREACH", self.now)
                        continue
                    self.opened.append((self.now, event))
                    self.open[event.path] = event.port or 50000 + event.path + 100 * self._ports[event.path]
                    self._ports[event.path] += not event.port
                    self.towards[event.path] = event.server[0]
                    self.client.path_opened(event.path, self.open[event.path], self.now)
                case ClosePath():
                    self.open.pop(event.path, None)
                case Stop():
                    self.stopped.append(event)
                case Notice():
                    self.notices.append((self.now, side, event))
                case SaveState() if self.held is not None:
                    self.held.append(event)
                case SaveState():
                    self._save(event, None)
                case RunScript() if role is not None:
                    self.scripts.append((side, event.verb, dict(event.values)))
                    role.job_done(event, None, self.now)
                case Resolve() if role is not None:
                    role.job_done(event, self.named, self.now)

    def _save(self, job: SaveState, failure: Exception | None) -> None:
        side, _, _ = job.name.partition("/")
        role: Client | Server = self.client if side == "client" else self.server
        if job.name in self.failing:
            failure = OSError(28, "no space left on device")
        if failure is None:
            self.saved[job.name] = job.document
        role.job_done(job, failure, self.now)

    def _send(self, side: str, number: int, transmit: Transmit) -> None:
        if side == "up" and number not in self.open:
            return
        for datagram in _datagrams(transmit):
            self.put(side, number, datagram)

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
        towards = self.towards.get(number, SERVER_ADDRESS)
        is_mute = towards not in self.server_at or towards.version in wire.mute
        is_dead = wire.is_cut or cut or self.down[number] or is_mute or self.open.get(number) in wire.dead_ports
        if is_dead or len(datagram) > wire.largest or self.rng.random() < loss:
            wire.counts[f"lost_{side}"] += 1
            return
        waits = 0.0
        if wire.rate:
            waits = max(0.0, wire.free_at[side] - self.now)
            if waits * wire.rate + len(datagram) > wire.buffer:
                wire.counts[f"lost_{side}"] += 1
                return
            waits += (len(datagram) + IP_UDP) / wire.rate
            wire.free_at[side] = self.now + waits
            wire.took.append((self.now, waits + wire.delay, side))
        copies = 2 if self.rng.random() < wire.duplicate else 1
        for _ in range(copies):
            when = self.now + waits + wire.delay + self.rng.random() * wire.jitter
            heapq.heappush(self._queue, (when, next(self._order), side, number, datagram))

    # -- looking back ----------------------------------------------------------------------------------

    def sent(self, kind: int, side: str, number: int | None = None, since: float = 0.0) -> list[tuple[float, bytes]]:
        """What of one type entered the wires (or one of them), and when."""
        return [
            (at, datagram)
            for at, way, wire, datagram in self.log
            if way == side and number in {None, wire} and at >= since and datagram[0] == kind
        ]

    def plaintext(self, side: str, datagram: bytes) -> bytes | None:
        """What is sealed in a type 4 datagram that went up or down; None if it opens under no session of now."""
        receiver: ServerPeer | ClientPeer = self.guest if side == "up" else self.peer
        for session in (receiver.current, receiver.next, receiver.previous):
            if session is not None and datagram[:8] == TRANSPORT_HEADER.pack(TRANSPORT, session.local_index, 0)[:8]:
                with contextlib.suppress(CIPHER.Forged):
                    return unsealed(session, datagram)
        return None

    def controls(self, side: str, kind: Control, number: int | None = None, since: float = 0.0) -> list[float]:
        """When control messages of a kind entered the wires, of those that still can be opened."""
        sent = ((at, self.plaintext(side, datagram)) for at, datagram in self.sent(TRANSPORT, side, number, since))
        return [at for at, plain in sent if plain and plain[0] == kind]

    def told(self, side: str, *kinds: NoticeKind, since: float = 0.0) -> list[tuple[float, dict[str, Any]]]:
        """What one side has told of (these kinds of) happenings, and when."""
        return [
            (at, notice.document())
            for at, who, notice in self.notices
            if who == side and at >= since and (not kinds or notice.kind in kinds)
        ]

    def to_strangers(self, endpoint: Endpoint | None = None) -> list[bytes]:
        """What the server has sent to an address that no wire leads from."""
        return [datagram for _, to, datagram in self.astray if endpoint in {None, to}]


class Traffic:
    """Numbered packets, so many a second each way. No packet may come twice, or other than it was sent."""

    def __init__(
        self, net: Simnet, rate: float = 100.0, size: int = 24, *, sides: Sequence[str] = ("up", "down")
    ) -> None:
        self._net = net
        self._sides = sides
        self._interval = 1.0 / rate
        self._size = size
        self._fill = random.Random(net.now)
        self._left = 0
        self._seen = {"up": len(net.at_server), "down": len(net.at_client)}
        self.sent: dict[str, dict[bytes, float]] = {"up": {}, "down": {}}

    def start(self, seconds: float) -> None:
        """Send both ways for so long, from now on."""
        self._left = round(seconds / self._interval)
        self._net.at(self._net.now, self._send)

    def run(self, seconds: float, rest: float = 3.0) -> None:
        """Send both ways for so long, and wait for what is on its way."""
        self.start(seconds)
        self._net.run(seconds + rest)

    def _send(self) -> None:
        net = self._net
        number = len(self.sent[self._sides[0]])
        payload = number.to_bytes(4, "big") + self._fill.randbytes(self._size)
        up, down = ipv4(str(TUNNEL4[2]), TARGET, payload), ipv4(TARGET, str(TUNNEL4[2]), payload)
        net.known |= {up, down}
        if "up" in self._sides:
            self.sent["up"][up] = net.now
            net.client_sends(up)
        if "down" in self._sides:
            self.sent["down"][down] = net.now
            net.server_sends(down)
        self._left -= 1
        if self._left > 0:
            net.at(net.now + self._interval, self._send)

    def arrived(self, side: str) -> dict[bytes, float]:
        """What came in by now, and when; asserts that it came once, and as it was sent."""
        came = (self._net.at_server if side == "up" else self._net.at_client)[self._seen[side] :]
        assert len({packet for _, packet in came}) == len(came), "delivered twice"
        assert all(packet in self._net.known for _, packet in came), "altered"
        return {packet: at for at, packet in came if packet in self.sent[side]}

    def lost(self, side: str, since: float = 0.0, until: float = float("inf")) -> int:
        """How many of those sent in a time never came."""
        came = self.arrived(side)
        return sum(since <= at < until and packet not in came for packet, at in self.sent[side].items())

    def is_whole(self, since: float = 0.0) -> bool:
        """Whether everything that was sent since then came in, both ways."""
        return not self.lost("up", since) and not self.lost("down", since)

    def longest_gap(self, side: str, since: float = 0.0) -> float:
        """The longest time between two arrivals, or since `since`."""
        times = sorted(at for at in self.arrived(side).values() if at >= since)
        return max((later - earlier for earlier, later in pairwise([since or times[0], *times])), default=0.0)

    def back_at(self, side: str, since: float) -> float:
        """When the first packet that was sent since then came in."""
        came = self.arrived(side)
        return min((came[p] for p, at in self.sent[side].items() if at >= since and p in came), default=float("inf"))


def snapshot(thing: object, leave_out: frozenset[str] = frozenset(), _path: tuple[int, ...] = ()) -> object:
    """Return all that a thing and what it holds consist of, as a value that can be compared; not `leave_out`.

    What is counted of strangers (`drops`) is no state.
    """
    match thing:
        case None | bool() | int() | float() | str() | bytes() | enum.Enum():
            return thing
        case mmap.mmap() | memoryview():
            return zlib.crc32(thing)
        case random.Random():
            return hash(thing.getstate())
    if id(thing) in _path:
        return "again"
    path = (*_path, id(thing))
    match thing:
        case dict():
            return [(snapshot(k, leave_out, path), snapshot(v, leave_out, path)) for k, v in thing.items()]
        case list() | tuple() | deque():
            return [snapshot(each, leave_out, path) for each in thing]
        case set() | frozenset():
            return sorted(str(snapshot(each, leave_out, path)) for each in thing)
    names = {name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())}
    names |= set(getattr(thing, "__dict__", ()))
    kept = sorted(names - leave_out - {"drops"})
    return [(name, snapshot(getattr(thing, name, None), leave_out, path)) for name in kept] or type(thing).__name__


def counter_of(datagram: bytes) -> int | None:
    """The counter of a type 4 datagram."""
    is_transport = datagram[0] == TRANSPORT and len(datagram) >= HEADER_SIZE
    return int.from_bytes(datagram[8:16], "little") if is_transport else None


def _datagrams(transmit: Transmit) -> list[bytes]:
    return [bytes(transmit.data[at : at + transmit.size]) for at in range(0, len(transmit.data), transmit.size)]
