"""One remote party: batches, sessions, handshakes and WireGuard's timers, held against a WireGuard by the book."""

from __future__ import annotations

import gc
import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel import noise
from mptunnel.config import ClientSettings
from mptunnel.messages import INITIATION, OVERHEAD, RESPONSE, TRANSPORT
from mptunnel.peer import MAX_STAGED, IndexTable
from mptunnel.session import MAX_RUN, MAX_SEGMENTS, REJECT_AFTER_MESSAGES
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    PSK,
    SERVER_PUBLIC,
    TARGET,
    TUNNEL4,
    Simnet,
    Traffic,
    Wire,
    ipv4,
    snapshot,
    stranger,
)

if TYPE_CHECKING:
    from mptunnel.clientpeer import ClientPeer
    from mptunnel.events import Transmit

CLIENT = str(TUNNEL4[2])
DOWN = ipv4(TARGET, CLIENT, b"down")
UP = ipv4(CLIENT, TARGET, b"up")


def stock(*wires: Wire, **more: Any) -> Simnet:
    """Our server and a stock client on the first of its wires."""
    client = BookPeer(CLIENT_KEY, SERVER_PUBLIC, PSK, endpoint=0, **more)
    return Simnet(*wires, stock_client=client)


def book(net: Simnet) -> BookPeer:
    assert isinstance(net.client_side, BookPeer)
    return net.client_side


def at_endpoint(net: Simnet) -> Any:
    return net.guest.endpoint


# -- indices and batches ---------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_an_index_is_never_given_twice() -> None:
    rng = random.Random(1)
    table = IndexTable(lambda n: (rng.getrandbits(4)).to_bytes(n, "little"))
    peer: Any = object()
    given = {table.new(peer) for _ in range(16)}
    assert given == set(range(16))
    table.drop(7)
    assert table.find(7) is None
    assert table.new(peer) == 7
    assert table.find(7) == (peer, None)


def test_at_most_four_indices_of_a_peer_are_alive() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.3))
    for turn in range(8):
        net.after(17.0 * turn, net.restart_client)
        net.after(17.0 * turn + 3.0, lambda: net.wires[0].__setattr__("cuts_down", True))
        net.after(17.0 * turn + 9.0, lambda: net.wires[0].__setattr__("cuts_down", False))
    for _ in range(280):
        net.run(0.5)
        assert len(net.server.identity.indices) <= 4
        assert len(net.client.identity.indices) <= 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1400), min_size=1, max_size=150))
def test_a_batch_of_packets_of_any_lengths_arrives_whole_and_in_order(lengths: list[int]) -> None:
    net = BUSY
    seen = len(net.at_server), len(net.at_client)
    ups = [ipv4(CLIENT, TARGET, bytes([number & 255]) * length) for number, length in enumerate(lengths)]
    downs = [ipv4(TARGET, CLIENT, bytes([number & 255]) * length) for number, length in enumerate(lengths)]
    net.client_sends(*ups)
    net.server_sends(*downs)
    net.run(0.1)
    assert [packet for _, packet in net.at_server[seen[0] :]] == ups
    assert [packet for _, packet in net.at_client[seen[1] :]] == downs


BUSY = Simnet(Wire(), Wire(delay=0.03))
BUSY.run(3.0)


def test_a_batch_is_sealed_once_in_runs_that_one_system_call_can_send() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    packets = [ipv4(CLIENT, TARGET, bytes(length)) for length in [1400] * 200 + [5] + [1380] * 3 + [100, 90, 80, 1400]]
    counter = net.peer.current.counter if net.peer.current else 0
    out: list[Transmit] = []
    net.peer.send(packets, net.now, out)
    assert net.peer.current is not None
    assert net.peer.current.counter - counter == len(packets)
    first, second = ([t for t in out if t.to == way] for way in (0, 1))
    assert [bytes(t.data) for t in first] == [bytes(t.data) for t in second]
    for transmit in out:
        assert len(transmit.data) <= MAX_RUN
        assert -(-len(transmit.data) // transmit.size) <= MAX_SEGMENTS
    assert sum(-(-len(t.data) // t.size) for t in first) == len(packets)


def test_a_hundred_and_twenty_eight_packets_wait_for_a_session_and_the_oldest_yield() -> None:
    net = Simnet(Wire(), server_starts=False)
    packets = [ipv4(CLIENT, TARGET, number.to_bytes(2, "big")) for number in range(MAX_STAGED + 22)]
    for packet in packets:
        net.client_sends(packet)
    net.start_server()
    net.run(1.0)
    assert [packet for _, packet in net.at_server] == packets[22:]
    assert net.client.drops["staged too long"] == 22


def test_fifty_thousand_packets_leave_no_garbage_to_collect() -> None:
    net = Simnet(Wire(), Wire(delay=0.03))
    net.run(3.0)
    ups = [ipv4(CLIENT, TARGET, bytes(100))] * 250
    downs = [ipv4(TARGET, CLIENT, bytes(100))] * 250
    gc.collect()
    gc.disable()
    try:
        for turn in range(100):
            net.client_sends(*ups)
            net.server_sends(*downs)
            net.deliver(bytes([turn]) * (turn + 1), stranger())  # errors leave none either
            net.deliver(bytes([4, 0, 0, 0]) + net.log[-1][3][4:60], stranger())
            net.run(0.1)
            if turn % 20 == 10:
                net.flush_nat(turn % 2)
        assert len(net.at_server) == len(net.at_client) == 25_000
        net.log.clear()
        assert gc.collect() == 0
    finally:
        gc.enable()


# -- sessions --------------------------------------------------------------------------------------------------------


def test_a_responder_sends_nothing_under_a_session_that_is_not_confirmed() -> None:
    net = stock(Wire())
    net.tap = lambda side, _, datagram: None if side == "up" and datagram[0] == TRANSPORT else datagram
    net.client_sends(UP)
    net.run(1.0)
    assert net.guest.next is not None
    net.server_sends(DOWN)
    net.run(1.0)
    assert net.sent(TRANSPORT, "down") == []
    net.tap = None
    net.client_sends(UP)  # it has a session, and this confirms it
    net.run(1.0)
    assert [packet for _, packet in net.at_client] == [DOWN]


def test_late_copies_of_the_previous_session_are_taken_and_older_ones_are_not() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    first = net.peer.current
    assert first is not None
    kept = [first.seal(UP) for _ in range(2)]
    Traffic(net, rate=2).run(120.0)
    assert net.peer.current is not first
    before = len(net.at_server)
    net.deliver(kept[0], net.source(0))
    assert len(net.at_server) == before + 1
    Traffic(net, rate=2).run(121.0)
    net.deliver(kept[1], net.source(0))
    assert net.server.drops["unknown index"] == 1


def test_no_key_is_used_or_taken_after_180_s() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    old = net.peer.current
    assert old is not None
    kept = old.seal(UP)
    net.wires[0].is_cut = True
    net.run(179.0 - 3.0)
    net.client_sends(UP)
    assert net.log[-1][3][4:8] == old.remote_index.to_bytes(4, "little")
    net.run(2.0)
    since, inside = net.now, len(net.at_server)
    net.client_sends(UP)
    net.server_sends(DOWN)
    net.run(1.0)
    assert net.sent(TRANSPORT, "up", None, since) == []
    assert net.sent(TRANSPORT, "down", None, since) == []
    net.deliver(kept, net.source(0))
    assert len(net.at_server) == inside
    assert net.server.drops["key too old"] == 1


def test_nothing_is_left_540_s_after_the_last_handshake() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    net.wires[0].is_cut = True
    net.run(530.0)
    assert net.peer.current is not None
    assert net.guest.current is not None
    net.run(10.0)
    assert net.peer.current is net.peer.previous is net.guest.current is net.guest.previous is None
    net.wires[0].is_cut = False
    net.run(60.0)
    assert net.peer.current is not None


def test_a_session_ends_before_its_counter_does() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    session = net.peer.current
    assert session is not None
    session.counter = REJECT_AFTER_MESSAGES
    net.client_sends(UP)
    net.run(2.0)
    assert net.peer.current is not session
    assert [packet for _, packet in net.at_server] == [UP]


def test_a_corrupted_copy_does_not_keep_the_good_one_out() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.03))
    net.run(3.0)
    net.tap = lambda _, number, datagram: (
        datagram[:20] + bytes([datagram[20] ^ 1]) + datagram[21:] if number == 0 and len(datagram) > 40 else datagram
    )
    traffic = Traffic(net)
    traffic.run(2.0)
    assert traffic.is_whole()
    assert net.server.drops["not authentic"] >= 200


@pytest.mark.parametrize(
    "plain",
    [
        b"\x45" + bytes(18),
        b"\x45\x00\x00\x40" + bytes(28),
        b"\x60" + bytes(31),
        b"\x42" + bytes(31),
        b"\x10" + bytes(47),
        b"\xff" + bytes(31),
    ],
)
def test_what_is_no_whole_ip_packet_is_dropped_and_counted(plain: bytes) -> None:
    net = Simnet(Wire())
    net.run(3.0)
    assert net.peer.current is not None
    net.deliver(net.peer.current.seal(plain), net.source(0))
    assert net.at_server == []
    assert net.server.drops["malformed IP packet"] == 1


def test_a_control_message_that_is_cut_short_is_counted_and_does_nothing() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    assert net.peer.current is not None
    for kind in range(1, 16):
        net.deliver(net.peer.current.seal(bytes([kind]) + bytes(6)), net.source(0))
    assert net.server.drops["malformed control message"] == 4  # PROBE, RESPONSE, HELLO, RECEIPT; CLOSE fits 16 bytes
    assert net.server.drops["unknown control message"] == 10


# -- handshakes ------------------------------------------------------------------------------------------------------


def first_initiation(net: Simnet) -> bytes:
    return net.sent(INITIATION, "up")[0][1]


def test_an_identical_initiation_is_answered_again_for_5_s_with_the_same_bytes() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    initiation = first_initiation(net)
    responses = {datagram for _, datagram in net.sent(RESPONSE, "down")}
    assert len(responses) == 1
    serial = net.guest._serial
    for number in range(20):
        net.deliver(initiation, stranger(number))
        net.turn()
    assert set(net.to_strangers()) == responses
    assert len(net.to_strangers()) == 20
    assert net.guest._serial == serial
    net.run(4.1)
    net.deliver(initiation, stranger(50))
    net.turn()
    assert net.to_strangers(stranger(50)) == []
    assert net.server.drops["initiation replayed"] == 1


def test_a_copy_that_differs_in_mac2_only_is_answered_too_and_in_anything_else_not() -> None:
    net = Simnet(Wire())
    net.run(0.5)
    initiation = first_initiation(net)
    net.deliver(initiation[:-16] + b"\x07" * 16, stranger(1))
    net.turn()
    assert len(net.to_strangers(stranger(1))) == 1
    for at in (5, 40, 90, 115):
        changed = initiation[:at] + bytes([initiation[at] ^ 1]) + initiation[at + 1 : 116]
        message = changed + noise.mac(net.server.key.mac1_key, changed) + bytes(16)
        net.deliver(message, stranger(2))
        net.turn()
    assert net.to_strangers(stranger(2)) == []


def test_a_second_initiation_within_20_ms_is_refused() -> None:
    net = stock(Wire())
    book(net)._initiate(net.now)
    first = book(net).transmits()[0].data
    book(net)._initiate(net.now)
    second = book(net).transmits()[0].data
    net.deliver(bytes(first), net.source(0))
    net.turn()
    net.run(0.01)
    net.deliver(bytes(second), net.source(0))
    net.turn()
    assert net.server.drops["initiation too soon"] == 1
    net.run(0.02)
    net.deliver(bytes(second), net.source(0))
    net.turn()
    assert len(net.sent(RESPONSE, "down")) == 2


@pytest.mark.parametrize("side", ["up", "down"])
def test_what_has_waited_for_an_outage_to_end_is_dropped_and_what_is_new_comes(side: str) -> None:
    net = Simnet(Wire())
    net.run(3.0)
    Traffic(net, 10.0).run(2.0)
    net.wires[0].is_cut = True
    net.run(400.0)
    old = Traffic(net, 1.0, sides=(side,))
    old.run(5.0, rest=60.0)
    new = Traffic(net, 10.0, sides=(side,))
    new.start(30.0)
    net.run(1.0)
    net.wires[0].is_cut = False
    net.run(40.0)
    assert not old.arrived(side)
    assert new.lost(side, since=net.now - 35.0) == 0


def test_nothing_overtakes_what_waits() -> None:
    net = Simnet(Wire(), settings=ClientSettings(server="sim.example", interfaces=("w0",), idle_probe=25.0))
    net.run(60.0)
    net.run(net.client.paths[0].last_probe_at + 10.0 - net.now)
    packets = [ipv4(TARGET, CLIENT, bytes([number]) * 1000) for number in range(20)]
    net.server_sends(*packets)
    net.server_sends(ipv4(TARGET, CLIENT, b"small"))
    net.run(2.0)
    came = [packet[20:21] for _, packet in net.at_client]
    assert came == [bytes([number]) for number in range(20)] + [b"s"]


def test_an_older_initiation_is_refused() -> None:
    net = stock(Wire())
    book(net)._initiate(net.now)
    first = bytes(book(net).transmits()[0].data)
    book(net)._initiate(net.now)
    second = bytes(book(net).transmits()[0].data)
    for message in (second, first):
        net.deliver(message, net.source(0))
        net.turn()
        net.run(1.0)
    assert net.server.drops["initiation replayed"] == 1


def test_an_initiation_replayed_after_a_restart_never_becomes_a_session_in_use() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    net.restart_server()
    net.is_client_awake = False
    net.deliver(first_initiation(net), stranger())
    net.turn()
    net.server_sends(DOWN)
    net.run(4.0)
    assert net.guest.current is None
    assert {datagram[0] for datagram in net.to_strangers()} == {RESPONSE}


# -- stock peers -----------------------------------------------------------------------------------------------------


def test_a_stock_client_gets_one_copy_and_loses_nothing_over_rekeys() -> None:
    net = stock(Wire())
    traffic = Traffic(net, rate=5)
    traffic.run(400.0)
    assert traffic.is_whole()
    assert book(net).sessions_made == 4
    assert book(net).foreign == []  # no control message comes to one who said no HELLO
    assert book(net).drops == {}
    assert len(net.sent(TRANSPORT, "down")) <= 400 * 5 + 10


def test_the_endpoint_of_a_stock_client_follows_its_newest_authentic_datagram() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(1.0)
    home, elsewhere = net.source(0), stranger()
    assert at_endpoint(net) == home
    assert book(net).current is not None
    net.deliver(book(net).current.seal(UP), elsewhere)  # type: ignore[union-attr]
    assert at_endpoint(net) == elsewhere
    net.server_sends(DOWN)
    assert len(net.to_strangers(elsewhere)) == 1
    net.client_sends(UP)
    net.run(0.1)
    assert at_endpoint(net) == home


def test_the_endpoint_of_a_stock_client_does_not_follow_replays_forgeries_or_old_keys() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(1.0)
    session = book(net).current
    assert session is not None
    _, replay = net.sent(TRANSPORT, "up")[0]
    kept = session.seal(UP)
    forged = kept[:-1] + bytes([kept[-1] ^ 1])
    initiation = first_initiation(net)
    before = snapshot(net.guest)
    for datagram in (replay, forged, initiation[:-16] + bytes(16)):
        net.deliver(datagram, stranger())
        net.turn()
    assert snapshot(net.guest) == before
    net.run(185.0)
    net.deliver(kept, stranger())
    assert at_endpoint(net) == net.source(0)


def test_a_stock_client_is_answered_by_a_keepalive_after_10_s_if_there_is_nothing_else_to_say() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(1.0)
    since = net.now
    net.client_sends(UP)
    net.run(15.0)
    sent = net.sent(TRANSPORT, "down", None, since)
    assert [len(datagram) for _, datagram in sent] == [OVERHEAD]
    assert 9.0 <= sent[0][0] - since <= 10.1


def test_a_stock_client_that_is_silent_is_called_after_15_s_every_5_s_and_given_up_after_20_calls() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(1.0)
    net.is_client_awake = False
    since = net.now
    net.server_sends(DOWN)
    net.run(300.0)
    calls = [at - since for at, _ in net.sent(INITIATION, "down", None, since)]
    assert 15.0 <= calls[0] <= 15.333
    assert all(5.0 <= later - earlier <= 5.333 for earlier, later in pairwise(calls))
    assert len(calls) == 20
    assert len({datagram for _, datagram in net.sent(INITIATION, "down")}) == 20


def test_packets_for_a_stock_client_wait_for_the_handshake_and_are_dropped_when_it_is_given_up() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(190.0)  # the session is over
    net.is_client_awake = False
    net.server_sends(DOWN)
    net.run(120.0)
    net.is_client_awake = True
    net.client_sends(UP)
    net.run(5.0)
    assert net.at_client == []
    net.server_sends(DOWN)
    net.run(1.0)
    assert [packet for _, packet in net.at_client] == [DOWN]


def test_a_handshake_that_the_server_starts_is_confirmed_at_once_even_with_nothing_to_send() -> None:
    net = stock(Wire())
    net.client_sends(UP)
    net.run(1.0)
    net.wires[0].cuts_up = True
    net.server_sends(DOWN)
    net.run(16.0)
    net.wires[0].cuts_up = False  # the handshake comes through, and nothing is staged
    net.run(6.0)
    assert net.guest.current is not None
    assert net.guest.current.is_initiator
    assert book(net).next is None
    assert book(net).current is not None
    assert not book(net).current.is_initiator  # type: ignore[union-attr]


def test_handshakes_of_both_sides_that_cross_are_sorted_out() -> None:
    net = stock(Wire(delay=0.05))
    net.client_sends(UP)
    net.run(190.0)
    net.client_sends(ipv4(CLIENT, TARGET, b"1"))
    net.server_sends(ipv4(TARGET, CLIENT, b"2"))
    net.run(30.0)
    assert [packet[20:] for _, packet in net.at_server] == [b"up", b"1"]
    assert [packet[20:] for _, packet in net.at_client] == [b"2"]


def test_a_response_counts_as_a_handshake_sent_so_that_the_server_does_not_call_back_at_once() -> None:
    net = stock(Wire())
    net.tap = lambda side, _, datagram: None if side == "up" and datagram[0] == TRANSPORT else datagram
    net.client_sends(UP)
    net.run(1.0)
    net.server_sends(DOWN)
    net.run(3.0)
    assert net.sent(INITIATION, "down") == []


def test_persistent_keepalives_go_on_for_ever() -> None:
    net = stock(Wire(), persistent=25.0)
    net.client_sends(UP)
    net.run(1000.0)
    guest: ClientPeer = net.guest
    assert guest.current is not None
    assert net.now - guest.heard_at <= 25.1


def test_a_wrong_preshared_key_makes_no_session() -> None:
    net = Simnet(Wire(), stock_client=BookPeer(CLIENT_KEY, SERVER_PUBLIC, bytes(32), endpoint=0))
    net.client_sends(UP)
    net.run(10.0)
    assert net.at_server == []
    assert book(net).current is None
    assert book(net).drops["not authentic"] >= 1


def test_a_stranger_gets_no_answer() -> None:
    net = Simnet(Wire(), stock_client=BookPeer(b"\x77" * 32, SERVER_PUBLIC, PSK, endpoint=0))
    net.client_sends(UP)
    net.run(10.0)
    assert [entry for entry in net.log if entry[1] == "down"] == []
    assert net.server.drops["initiation of a stranger"] >= 2
