"""The short way of packets that come alone: it is taken, and all else is as if it were not."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import peer
from mptunnel.config import Fields
from mptunnel.packet import GSO_NONE, NEEDS_CSUM, PLAIN, VNET
from tests.simnet import TARGET, TUNNEL4, TUNNEL6, Simnet, Traffic, Wire, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Callable


CLIENT = str(TUNNEL4[2])
RATE = 1000.0
PEER6 = TUNNEL6[2].packed
GOOD4 = ipv4(CLIENT, TARGET, b"x")
GOOD6 = ipv6(PEER6, bytes(16), b"y")
JUDGED = {
    "IPv4": (GOOD4, ""),
    "IPv4 with padding": (GOOD4 + bytes(3), ""),
    "IPv6": (GOOD6, ""),
    "IPv6 with padding": (GOOD6 + bytes(7), ""),
    "IPv4 of another client": (ipv4(str(TUNNEL4[3]), TARGET, b"x"), "source not allowed"),
    "IPv6 of another client": (ipv6(TUNNEL6[3].packed, bytes(16), b"y"), "source not allowed"),
    "IPv4 longer than it is": (GOOD4[:2] + b"\x7f\xff" + GOOD4[4:], "malformed IP packet"),
    "IPv4 shorter than its header": (GOOD4[:2] + b"\0\x13" + GOOD4[4:], "malformed IP packet"),
    "IPv6 longer than it is": (GOOD6[:4] + b"\x7f\xff" + GOOD6[6:], "malformed IP packet"),
    "neither": (b"\x55" + GOOD4[1:], "malformed IP packet"),
}


def outcome(*, faults: Callable[[Simnet], None] | None = None, seconds: float = 6.0) -> tuple[Any, int]:
    """Return the receipts after a while of single packets both ways, and how many of them went the short way."""
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015), seed=3)
    net.run(3.0)
    taken = 0
    plain = peer.Peer._book_received

    def counted(self: peer.Peer, *arguments: Any) -> float:
        nonlocal taken
        taken += 1
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer.Peer, "_book_received", counted)
        Traffic(net, RATE).start(seconds)
        if faults is not None:
            faults(net)
        net.run(seconds + 12.0)
    (seen,) = net.server.status(net.now)["peers"]
    return [{**one["receipts"], "traffic": one["traffic"]} for one in (net.client.status(net.now), seen)], taken


def cut(net: Simnet) -> None:
    net.after(2.0, lambda: setattr(net.wires[0], "is_cut", True))
    net.after(4.0, lambda: setattr(net.wires[0], "is_cut", False))


def unplug(net: Simnet) -> None:
    net.after(2.0, lambda: net.set_link(0, up=False))
    net.after(3.0, lambda: net.set_link(0, up=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("faults", [None, cut, unplug])
def test_the_receipts_are_the_same_as_without_it(
    faults: Callable[[Simnet], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, taken = outcome(faults=faults)
    assert taken > RATE, "nearly all packets go the short way"
    monkeypatch.setattr(peer, "SHORT_WAY", 0.0)
    long, untaken = outcome(faults=faults)
    assert untaken == 0
    assert short == long


def test_a_client_may_be_removed_in_the_turn_in_which_its_packet_came() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    Traffic(net, RATE).start(1.0)
    net.run(0.1)
    session = net.peer.current
    assert session is not None
    net.guest.next_deadline()  # what has come so far is in the books
    before = net.guest.packets_received
    datagram = session.seal(ipv4(CLIENT, TARGET, b"x"), 1280)
    guest = net.guest
    inbox: list[bytes] = []
    net.server.receive(datagram, len(datagram), net.source(0), net.now, inbox)
    assert (len(inbox), guest.packets_received) == (1, before), "it went the short way"
    net.server.control("peer-remove", Fields({"name": "sim"}, "peer-remove"), net.now)
    net.turn()
    assert guest.packets_received == before + 1
    net.run(5.0)


def test_one_way_out_less_is_noticed_in_the_same_turn() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    Traffic(net, RATE).start(1.0)
    net.run(0.1)
    net.client.send([PLAIN + ipv4(CLIENT, TARGET, b"x")], net.now, [])
    assert {transmit.to for transmit in net.client.transmits()} == {0, 1}
    net.client.path_failed(0, "its interface has gone", net.now)
    net.client.send([PLAIN + ipv4(CLIENT, TARGET, b"y")], net.now, [])
    assert {transmit.to for transmit in net.client.transmits()} == {1}


@pytest.mark.parametrize("what", JUDGED)
def test_it_lets_nothing_through_that_the_long_way_would_not(what: str) -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    Traffic(net, RATE).start(1.0)
    net.run(0.1)
    plain, complaint = JUDGED[what]
    session = net.peer.current
    assert session is not None
    datagram = session.seal(plain, len(plain))  # as it is, if that is a multiple of 16, else padded
    inbox: list[bytes] = []
    net.server.receive(datagram, len(datagram), net.source(0), net.now, inbox)
    net.turn()
    length = len(GOOD4) if "IPv4" in what else len(GOOD6)
    assert [bytes(packet) for packet in inbox] == ([] if complaint else [plain[:length]])
    assert {name: net.server.drops[name] for name in ("source not allowed", "malformed IP packet")} == {
        name: int(name == complaint) for name in ("source not allowed", "malformed IP packet")
    }


def lone(net: Simnet, count: int, payload: bytes = b"x") -> list[bytes]:
    """Let datagrams come at the server one by one, each alone, while traffic runs; return what they brought."""
    session = net.peer.current
    assert session is not None
    inbox: list[bytes] = []
    for _ in range(count):
        datagram = session.seal(ipv4(CLIENT, TARGET, payload), 1280)
        assert net.server.receive(datagram, len(datagram), net.source(0), net.now, inbox)
    return inbox


def in_traffic() -> Simnet:
    """Return a network in which single packets go the short way, and nothing waits to be booked."""
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    Traffic(net, RATE).start(1.0)
    net.run(0.1)
    net.server.finish_turn(net.now)
    return net


def test_what_went_the_short_way_is_in_the_books_within_20_ms() -> None:
    net = in_traffic()
    before = net.guest.packets_received
    assert len(lone(net, 3)) == 3
    assert net.server.next_deadline() <= net.now + peer.BOOKED_WITHIN
    assert net.guest.packets_received == before
    net.server.finish_turn(net.now + peer.BOOKED_WITHIN)
    assert net.guest.packets_received == before + 3


def test_more_of_it_is_booked_at_the_next_opportunity_and_much_at_once() -> None:
    net = in_traffic()
    before, payload = net.guest.packets_received, bytes(1200)
    lone(net, peer.WORTH_BOOKING // 1200 + 1, payload)
    assert net.server.next_deadline() == net.now
    lone(net, peer.MAX_UNBOOKED // 1200, payload)
    assert net.server.next_deadline() == -math.inf
    net.server.finish_turn(net.now)
    assert net.guest.packets_received == before + peer.WORTH_BOOKING // 1200 + 1 + peer.MAX_UNBOOKED // 1200


def test_who_asks_is_told_of_what_is_not_in_the_books_yet() -> None:
    net = in_traffic()
    net.server.status(net.now)
    before = net.guest.packets_received
    lone(net, 3)
    assert net.guest.packets_received == before
    net.server.status(net.now)
    assert net.guest.packets_received == before + 3


@pytest.mark.interpreted
@pytest.mark.parametrize(("what", "who"), [("_take_one", "guest"), ("_send_batch", "peer")])
def test_one_packet_in_a_second_is_looked_at_closely(what: str, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would see that a client under steady traffic says HELLO no more; not more, for all the probes."""
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    looks: list[float] = []
    plain = getattr(peer.Peer, what)

    def noting(self: peer.Peer, *more: Any) -> None:
        if self is getattr(net, who) and (what != "_take_one" or more[2][:1] >= b"\x10"):  # no control message
            looks.append(net.now)
        plain(self, *more)

    monkeypatch.setattr(peer.Peer, what, noting)
    Traffic(net, RATE).start(10.0)
    net.run(10.0)
    assert 8 <= len(looks) < 40, "most go the short way, and not for ever"
    assert max(after - before for before, after in itertools.pairwise(looks)) < peer.CLOSE_LOOK + 0.1


def test_a_path_that_moves_is_left_out_at_once() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.015))
    net.run(3.0)
    Traffic(net, RATE).start(1.0)
    net.run(0.1)
    assert net.now < net.peer.short_until
    net.wires[0].address = "192.168.0.77"
    net.client.links_changed(net.links(), net.now)
    net.client.send([PLAIN + ipv4(CLIENT, TARGET, b"y")], net.now, [])
    assert {transmit.to for transmit in net.client.transmits()} == {1}


@pytest.mark.parametrize("start", [20, 40])
def test_a_sum_that_begins_further_in_is_not_for_the_short_way(start: int) -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    Traffic(net, 200.0).start(1.0)
    net.run(0.5)
    assert net.client._peer.short_until > net.now
    net.client._peer.takes_partial = True
    frame = VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, start, 16) + ipv4(CLIENT, TARGET, bytes(60))
    sealed = net.client.send_one(frame, net.now)
    assert (sealed is None) is (start != 20)
