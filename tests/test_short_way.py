"""The short way of packets that come alone: it is taken, and all else is as if it were not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import peer
from mptunnel.config import Fields
from mptunnel.packet import PLAIN
from tests.simnet import TARGET, TUNNEL4, TUNNEL6, Simnet, Traffic, Wire, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Callable

    from mptunnel.packet import Buffer

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
    net.guest.finish_turn()  # what has come so far is in the books
    before = net.guest.packets_received
    datagram = session.seal(ipv4(CLIENT, TARGET, b"x"), 1280)
    guest = net.guest
    inbox: list[Buffer] = []
    net.server.receive(memoryview(datagram), len(datagram), net.source(0), net.now, inbox)
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
    net.client.send([memoryview(PLAIN + ipv4(CLIENT, TARGET, b"x"))], net.now, [])
    assert {transmit.to for transmit in net.client.transmits()} == {0, 1}
    net.client.path_failed(0, "its interface has gone", net.now)
    net.client.send([memoryview(PLAIN + ipv4(CLIENT, TARGET, b"y"))], net.now, [])
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
    inbox: list[Buffer] = []
    net.server.receive(memoryview(datagram), len(datagram), net.source(0), net.now, inbox)
    net.turn()
    length = len(GOOD4) if "IPv4" in what else len(GOOD6)
    assert [bytes(packet) for packet in inbox] == ([] if complaint else [plain[:length]])
    assert {name: net.server.drops[name] for name in ("source not allowed", "malformed IP packet")} == {
        name: int(name == complaint) for name in ("source not allowed", "malformed IP packet")
    }
