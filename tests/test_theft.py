"""Somebody on a path who has every datagram first: what is stolen pays three times its size at most and binds nothing.

Each datagram the client sends reaches the server from another address before it comes from the client's, or instead
of it. A ledger keeps what every address that no challenge was answered from has given, and what it was sent.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mptunnel.events import Endpoint
from mptunnel.messages import INITIATION, TRANSPORT, Close, CloseReason, Control
from tests.running import note
from tests.simnet import TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4, snapshot, stranger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


CLIENT = str(TUNNEL4[2])
MOST = 3  # times what came from an address may go there before it has answered a challenge
PROBE = 0.25
SOURCES = 1000
LOWEST_PACKET = 0x40  # the first byte of an IP packet
NAT_PORT = 40000  # from which a wire's datagrams come until its NAT forgets it
KINDS = ["initiation", "HELLO", "PROBE", "RESPONSE", "RECEIPT", "packet", "everything"]


class Thief:
    """Takes datagrams of a kind off the wires, and hands them to the server from strangers' addresses: first."""

    def __init__(self, net: Simnet, kind: str, sources: Iterator[Endpoint]) -> None:
        self.net, self.kind, self.sources = net, kind, sources
        self.given: Counter[Endpoint] = Counter()
        self.stolen = 0
        self._once_ours = [Endpoint(f"::ffff:{wire.nat_host}", NAT_PORT, 0, b"") for wire in net.wires]
        net.tap = self._tap

    def _tap(self, side: str, _: int, datagram: bytes) -> bytes | None:
        if side == "down" or not self._is_wanted(datagram):
            return datagram
        source = next(self.sources)
        self.stolen += 1
        self.given[source] += len(datagram)
        self.net.after(0.0, partial(self.net.deliver, datagram, source))
        return datagram

    def _is_wanted(self, datagram: bytes) -> bool:
        if self.kind == "everything":
            return True
        if datagram[0] != TRANSPORT:
            return self.kind == "initiation" and datagram[0] == INITIATION
        plain = self.net.plaintext("up", datagram)
        if not plain:
            return False
        return self.kind == "packet" if plain[0] >= LOWEST_PACKET else self.kind == Control(plain[0]).name

    def check(self) -> None:
        """No address was sent more than it may be, and no path is at one of them."""
        got: Counter[Endpoint] = Counter()
        for _, to, datagram in self.net.astray:
            got[to] += len(datagram) if to not in self._once_ours else 0
        worst = max((got[to] / self.given[to] for to in self.given), default=0.0)
        note(f"{self.kind}: {self.stolen} stolen, at most {worst:.2f} times the bytes went to an address")
        assert self.stolen
        for to in got:
            assert got[to] <= MOST * self.given[to], f"{got[to]} bytes for {self.given[to]} to {to}"
        bound = {path.endpoint for path in self.net.guest.paths.values()}
        assert not bound & set(self.given)


def one() -> Iterator[Endpoint]:
    while True:
        yield stranger()


def many() -> Iterator[Endpoint]:
    while True:
        yield from (stranger(number) for number in range(SOURCES))


def start(net: Simnet) -> None:
    for number in range(len(net.wires)):
        net.set_link(number, up=True)


def restart_client(net: Simnet) -> None:
    net.restart_client()


def restart_server(net: Simnet) -> None:
    """It knows nothing of its client, and much waits for it."""
    net.restart_server()
    waiting = [ipv4(TARGET, CLIENT, number.to_bytes(2, "big") + bytes(1000)) for number in range(100)]
    net.known |= set(waiting)
    net.server_sends(*waiting)


def move(net: Simnet) -> None:
    for number in range(len(net.wires)):
        net.flush_nat(number)


MOMENTS: list[Callable[[Simnet], None]] = [start, restart_client, restart_server, move]


CASES = [
    pytest.param(moment, kind, sources, id=f"{moment.__name__}-{kind}-{sources.__name__}")
    for moment in MOMENTS
    for kind in KINDS
    for sources in (one, many)
    if not (moment is move and kind in {"initiation", "HELLO"})  # it says none
]


@pytest.mark.parametrize(("moment", "kind", "sources"), CASES)
def test_what_comes_from_a_thief_first_pays_three_times_its_bytes_at_most_and_moves_no_path(
    moment: Callable[[Simnet], None], kind: str, sources: Callable[[], Iterator[Endpoint]]
) -> None:
    net = Simnet(Wire(delay=0.020), Wire(delay=0.060), seed=11, down=(0, 1) if moment is start else ())
    net.run(5.0)
    thief = Thief(net, kind, sources())
    moment(net)
    traffic = Traffic(net, rate=50)
    traffic.start(9.0)
    net.run(4.0)
    thief.check()
    net.tap = None  # it has lost its place
    begun = net.now
    for number, wire in enumerate(net.wires):
        net.at(begun + 2 * PROBE + 4 * wire.delay, partial(check_true, net, number))
    net.run(6.0)
    thief.check()
    assert traffic.is_whole(since=begun + 2 * PROBE + 4 * 0.020)


def check_true(net: Simnet, number: int) -> None:
    """The path is where its client is. What was challenged just now is challenged again a probe later, not sooner."""
    assert net.guest.paths[number].endpoint == net.source(number)


def test_a_thief_who_relays_has_the_path_no_longer_than_a_probe_and_two_round_trips_after_it_stops() -> None:
    """Who stands on the path and answers the challenge by its client has it, as any router on the way does."""
    delay = 0.020
    net = Simnet(Wire(delay=delay), seed=12)
    net.run(3.0)
    thief, genuine = stranger(), net.source(0)
    traffic = Traffic(net, rate=50)
    traffic.start(8.0)

    def relay(side: str, _: int, datagram: bytes) -> bytes | None:
        if side == "up":
            net.after(0.0, lambda: net.deliver(datagram, thief))
            return None
        return datagram

    def carry_down() -> None:
        for _, to, datagram in net.astray:
            if to == thief:
                net.put("down", 0, datagram)
        net.astray.clear()
        if net.tap is not None:
            net.after(0.005, carry_down)

    net.tap = relay
    carry_down()
    net.run(2.0)
    assert net.guest.paths[0].endpoint == thief
    net.tap = None
    stopped = net.now
    net.run(PROBE + 4 * delay)
    assert net.guest.paths[0].endpoint == genuine
    net.run(8.0)
    assert traffic.lost("up") == 0
    assert traffic.lost("down", since=stopped + PROBE + 4 * delay) == 0


@pytest.mark.parametrize("kind", [Control.RECEIPT, Control.CLOSE])
def test_a_control_message_that_is_replayed_or_reflected_changes_nothing_on_either_side(kind: Control) -> None:
    net = Simnet(Wire(delay=0.020), Wire(delay=0.060), seed=13)
    net.run(3.0)
    Traffic(net, rate=50).run(3.0)
    assert net.peer.current is not None
    if kind is Control.CLOSE:
        net.put("up", 0, net.peer.current.seal(Close(1, CloseReason.INTERFACE_GONE, 4711).encode()))
    net.run(1.0)
    captured = {
        (side, number, datagram)
        for _, side, number, datagram in net.log
        if (plain := net.plaintext(side, datagram)) and plain[0] == kind
    }
    before = [snapshot(net.client), snapshot(net.server)]
    for side, number, datagram in sorted(captured):
        reflected_to = (0, 1) if side == "up" else (number,)
        for source in (net.source(number), stranger()):  # a copy by the other path would count as come by it
            net.deliver(datagram, source)
        for path in reflected_to:
            net.client.receive(datagram, len(datagram), path, net.now, [])
        net.turn()
    assert len(captured) >= (1 if kind is Control.CLOSE else 10)
    assert net.to_strangers() == []
    assert [snapshot(net.client), snapshot(net.server)] == before


def test_a_close_held_back_until_its_path_was_opened_anew_closes_nothing() -> None:
    net = Simnet(Wire(delay=0.020), Wire(delay=0.060), seed=14)
    net.run(3.0)
    held: list[bytes] = []

    def hold(side: str, _: int, datagram: bytes) -> bytes | None:
        plain = net.plaintext("up", datagram) if side == "up" else None
        if plain and plain[0] == Control.CLOSE:
            held.append(datagram)
            return None
        return datagram

    net.tap = hold
    incarnation = net.client.paths[1].incarnation
    net.set_link(1, up=False)
    assert net.peer.current is not None
    net.put("up", 0, net.peer.current.seal(Close(1, CloseReason.INTERFACE_GONE, incarnation).encode()))
    net.set_link(1, up=True)
    net.run(1.0)
    bound = {path.id: path.endpoint for path in net.guest.paths.values()}
    assert len(bound) == 2
    for number, datagram in enumerate(held):
        net.deliver(datagram, stranger(number))
    net.turn()
    assert held
    assert {path.id: path.endpoint for path in net.guest.paths.values()} == bound
    assert net.to_strangers() == []
