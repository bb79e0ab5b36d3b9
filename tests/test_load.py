"""Under load: memory stays where it is, and a busy client costs the same whoever else is connected.

Client and server are joined directly, without wires that would remember: what one sends the other has at once, in the
runs in which sockets would give it.
"""

from __future__ import annotations

import gc
import struct
import sys
import tracemalloc
from collections import Counter
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.config import Network
from mptunnel.messages import Capability, Control, Hello, Probe, decode_challenge_untrusted
from mptunnel.packet import GSO_TCPV4, NEEDS_CSUM, TCP, VNET, coalesce
from mptunnel.session import WINDOW
from tests.bookpeer import BookPeer
from tests.running import note
from tests.simnet import PSK, SERVER_PUBLIC, TARGET, TUNNEL4, TUNNEL6, Simnet, Wire, stranger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mptunnel.events import Endpoint

CLIENT = str(TUNNEL4[2])
SEGMENTS, SIZE = 40, 100
TURN = 2 * SEGMENTS  # packets of a turn, both ways
TICK = 0.02  # s: the warm-up is longer than any span over which something is averaged


def super_packet(source: str, target: str) -> bytes:
    """Return a frame that stands for a run of TCP segments."""
    head = struct.pack(">BBHHHBBH", 0x45, 0, 40 + SEGMENTS * SIZE, 7, 0x4000, 64, TCP, 0)
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    tcp = struct.pack(">HHIIBBHHH", 1234, 80, 5, 9, 0x50, 0x10, 500, 0, 0)
    return VNET.pack(NEEDS_CSUM, GSO_TCPV4, 40, SIZE, 20, 16) + head + addresses + tcp + bytes(SEGMENTS * SIZE)


UP, DOWN = super_packet(CLIENT, TARGET), super_packet(TARGET, CLIENT)


class Pump:
    """A busy client of two paths and a server with `others` connected besides: stock peers, or idle ones of ours."""

    def __init__(self, others: int = 0, *, are_ours: bool = False) -> None:
        self.net = Simnet(Wire(), Wire(delay=0.03))
        self.net.run(3.0)
        self.now = self.net.now
        self.client, self.server = self.net.client, self.net.server
        self._paths = {self.net.source(number): number for number in range(2)}
        self._others: dict[Endpoint, BookPeer] = {}
        self.server.register.network = Network(IPv4Network("10.0.0.0/16"), TUNNEL6)  # room for all of them
        for number in range(others):
            self._connect(number)
            if are_ours:
                self._bind(number)
        self.net.log.clear()
        self.idle(15.0)

    def _connect(self, number: int) -> None:
        other = BookPeer((number + 77).to_bytes(4, "big") * 8, SERVER_PUBLIC, PSK, endpoint=0, seed=number)
        self.server.register.add(f"other{number}", other.key.public, PSK, self.now, stock=True)
        self._others[stranger(number)] = other
        self.now += TICK
        other.initiate(self.now)
        for _ in range(3):
            for transmit in other.transmits():
                data = bytes(transmit.data)
                self.server.receive(data, len(data), stranger(number), self.now, [])
            self._carry([], [])
        assert other.current is not None

    def _bind(self, number: int) -> None:
        """Let a client say HELLO and bind a path; it will not probe again for long."""
        other, source = self._others[stranger(number)], stranger(number)
        assert other.current is not None
        offered = Capability.MULTIPATH
        hello = Hello(
            is_answer=False, version=1, oldest=1, capabilities=offered, instance=number, mtu=1420, mode=0, paths=1,
            serial=1,
        )  # fmt: skip
        probe = Probe(0, 7, 1, 600_000, 0, 2, 1, 0)
        for plain in (hello.encode(), probe.encode()):
            self._deliver(other.current.seal(plain), source)
        challenge = decode_challenge_untrusted(memoryview(other.foreign[-1]))
        self._deliver(other.current.seal(challenge.encode(Control.RESPONSE)), source)
        assert self.server._peers[other.key.public].sources.get(source) is not None
        other.foreign.clear()

    def _deliver(self, datagram: bytes, source: Endpoint) -> None:
        self.server.receive(datagram, len(datagram), source, self.now, [])
        self._carry([], [])

    def turn(self) -> None:
        """Let a super-packet go each way; it comes out as one."""
        self.now += TICK
        up: list[bytes] = []
        down: list[bytes] = []
        self.client.send([UP], self.now, down)
        self.server.send([DOWN], self.now)
        self._carry(up, down)
        for inbox in (up, down):
            assert [count for _, count in coalesce(inbox, takes_udp=True)] == [SEGMENTS]

    def turns(self, packets: int) -> None:
        """Let so many packets go, half of them each way."""
        for _ in range(packets // TURN):
            self.turn()

    def idle(self, seconds: float) -> None:
        """Let time pass without packets."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            self._carry([], [])

    def _carry(self, up: list[bytes], down: list[bytes]) -> None:
        """Carry everything between them, and do what is due."""
        net, now = self.net, self.now
        net.now = now
        for role in (self.client, self.server):
            if role.next_deadline() <= now:
                role.handle_timeout(now)
        for _ in range(4):
            for transmit in self.client.transmits():
                source = net.source(transmit.to)
                self.server.receive(bytes(transmit.data), transmit.size, source, now, up)
            self.server.finish_turn(now)
            for transmit in self.server.transmits():
                data = bytes(transmit.data)
                if (path := self._paths.get(transmit.to)) is not None:
                    self.client.receive(data, transmit.size, path, now, down)
                else:
                    self._others[transmit.to].receive(data, len(data), 0, now, [])
            self.client.finish_turn(now)
        net._take_events(self.client.events(), "client")
        net._take_events(self.server.events(), "server")


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """As the loop runs: without the cyclic garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
def test_four_hundred_thousand_packets_leave_memory_where_it_was() -> None:
    pump = Pump()
    pump.turns(2 * WINDOW + 20_000)  # half of them each way: every page of the replay windows has been touched
    gc.collect()
    before = resident()
    pump.turns(50_000)
    grown = resident() - before
    tracemalloc.start()
    try:
        pump.turns(48_000)  # what had been allocated before is not missed when it is given back
        before = tracemalloc.get_traced_memory()[0]
        pump.turns(12_000)
        traced = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    note(f"{grown} bytes more resident, {traced} bytes more allocated")
    assert grown < 300_000  # an arena of the allocator's
    assert traced < 20_000  # what is kept of the last second breathes; a leak of 2 bytes a packet would be more
    assert gc.collect() == 0


@pytest.mark.usefixtures("_no_collector")
def test_a_hundred_clients_cost_a_busy_one_no_call_more() -> None:
    alone, among = cost(Pump()), cost(Pump(others=99))
    note(f"calls a packet: {alone:.2f} alone, {among:.2f} among a hundred")
    assert among <= alone * 1.01


@pytest.mark.usefixtures("_no_collector")
def test_a_thousand_idle_clients_cost_a_busy_one_no_call_and_the_server_little_memory() -> None:
    alone = cost(Pump())
    before = resident()
    pump = Pump(others=999, are_ours=True)
    held = resident() - before
    among = cost(pump)
    note(f"calls a packet: {alone:.2f} alone, {among:.2f} among a thousand")
    note(f"a client: {held / 999:.0f} bytes resident, its own side included")
    assert among <= alone * 1.10
    assert held / 999 < 100_000


@pytest.mark.usefixtures("_no_collector")
def test_a_turn_in_which_nothing_happens_walks_no_peers() -> None:
    few, many = (calls_of(idle_turns(Pump(others, are_ours=True))) for others in (9, 999))
    note(f"calls of 100 turns without anything: {few} with 10 clients, {many} with 1000")
    assert few == many


def idle_turns(pump: Pump) -> Callable[[], None]:
    """Return what the loop does when it wakes up 100 times for nothing."""
    server, now = pump.server, pump.now
    if server.next_deadline() <= now:
        server.handle_timeout(now)
    server.finish_turn(now)
    server.transmits()
    server.events()

    def turns() -> None:
        for _ in range(100):
            assert server.next_deadline() > now
            server.finish_turn(now)
            server.handle_timeout(now)
            server.transmits()
            server.events()

    return turns


def cost(pump: Pump, packets: int = 8000) -> float:
    """Return the calls of functions, ours and built in, that a packet takes."""
    pump.turn()
    return calls_of(lambda: pump.turns(packets)) / packets


def calls_of(work: Callable[[], None]) -> int:
    """Return how many calls of functions, ours and built in, something takes."""
    calls: Counter[str] = Counter()

    def count(_: Any, event: str, __: Any) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]
