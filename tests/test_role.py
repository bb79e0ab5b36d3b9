"""Datagrams of strangers: sorted, counted by kind, and without effect; handshakes bounded and after the data."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel import noise
from mptunnel.messages import COOKIE_REPLY, INITIATION, RESPONSE, TRANSPORT
from mptunnel.role import MAX_ANSWERED, MAX_COLLECTED, MAX_TAKEN
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    PSK,
    SERVER_KEY,
    SERVER_PUBLIC,
    TARGET,
    TUNNEL4,
    WALL,
    Simnet,
    Traffic,
    Wire,
    ipv4,
    snapshot,
    stranger,
)

if TYPE_CHECKING:
    from mptunnel.role import Role

CLIENT = str(TUNNEL4[2])
UP = ipv4(CLIENT, TARGET, b"up")
OUTSIDE = frozenset({"_door", "_handshakes"})  # what counts and queues handshakes, bounded, before anything is known
# The lowest-order points of Curve25519 (RFC 7748; cr.yp.to/ecdh.html#validate)
LOW_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    b"\xed" + b"\xff" * 30 + b"\x7f",
    b"\xee" + b"\xff" * 30 + b"\x7f",
]


def busy() -> Simnet:
    net = Simnet(Wire(), Wire(delay=0.06))
    net.run(3.0)
    Traffic(net, rate=20).run(6.0)
    return net


def counted(role: Role) -> int:
    return sum(role.drops.values())


def mutations(net: Simnet, side: str, rng: random.Random, number: int) -> list[bytes]:
    """Datagrams of every type that really went this way, changed; among them mere replays."""
    captured = [datagram for at, way, _, datagram in net.log if way == side and at < net.now - 0.5]
    kinds = [[d for d in captured if d[0] == kind] for kind in (INITIATION, RESPONSE, TRANSPORT)]
    kinds.append([net.server._door.cookie_reply(net.sent(INITIATION, "up")[0][1], stranger(), net.now)])
    made = []
    for _ in range(number):
        datagram = bytearray(rng.choice(rng.choice([kind for kind in kinds if kind])))
        match rng.randrange(7):
            case 0:
                del datagram[rng.randrange(len(datagram)) :]
            case 1:
                datagram += rng.randbytes(rng.randrange(1, 60))
            case 2:
                datagram[rng.randrange(min(16, len(datagram)))] = rng.randrange(256)
            case 3:
                datagram[8:16] = rng.choice([rng.getrandbits(64), rng.getrandbits(20)]).to_bytes(8, "little")
            case 4:
                datagram[0] = rng.randrange(256)
            case _:
                for _ in range(rng.randrange(1, 9)):
                    datagram[rng.randrange(len(datagram))] ^= 1 << rng.randrange(8)
        made.append(bytes(datagram))
    return made


def test_mutated_datagrams_of_every_type_get_no_answer_and_change_nothing_at_the_server() -> None:
    net = busy()
    junk = mutations(net, "up", random.Random(3), 4000)
    before, drops = snapshot(net.server, OUTSIDE), counted(net.server)
    for number, datagram in enumerate(junk):
        net.deliver(datagram, stranger(number % 1000))
        net.server.finish_turn(net.now)
    assert net.server.transmits() == []
    assert net.server.events() == []
    assert snapshot(net.server, OUTSIDE) == before
    assert counted(net.server) - drops == len(junk)  # each counted once


def test_mutated_datagrams_change_nothing_at_the_client() -> None:
    net = busy()
    copies = frozenset({"rx", "rx_bytes", "_paths", "_bytes_since_probe", "probe_at"})  # forged ones only raise them
    copies |= {"ways", "_suspects"}  # and make a path's silences look shorter
    junk = mutations(net, "down", random.Random(4), 3000)
    before, drops = snapshot(net.client, OUTSIDE | copies), counted(net.client)
    inbox: list[Any] = []
    for number, datagram in enumerate(junk):
        net.client.receive(datagram, max(1, len(datagram)), number % 2, net.now, inbox)
        net.client.finish_turn(net.now)
    assert inbox == []
    assert net.client.transmits() == []
    assert net.client.events() == []
    assert snapshot(net.client, OUTSIDE | copies) == before
    assert counted(net.client) - drops == len(junk)


def test_forged_copies_from_a_bound_address_raise_what_is_shown_as_received_once_and_nothing_else() -> None:
    net = busy()
    copies = frozenset({"rx", "rx_bytes", "_paths"})
    before = snapshot(net.server, OUTSIDE | copies)
    path = net.guest.sources.get(net.source(1))
    assert path is not None
    received = path.rx
    _, seen = net.sent(TRANSPORT, "up", 0)[-60]  # a datagram that only the other path carried, perhaps
    for _ in range(1000):
        net.deliver(seen[:16] + bytes(1600), net.source(1))
    assert path.rx - received <= 1
    assert snapshot(net.server, OUTSIDE | copies) == before
    assert path.rx_size < 1600


def test_the_tunnel_beside_a_storm_of_junk_loses_nothing() -> None:
    net, rng = busy(), random.Random(5)
    junk = mutations(net, "up", rng, 3000)
    traffic = Traffic(net)
    for number, datagram in enumerate(junk):
        source = stranger(number % 50) if number % 2 else net.source(number // 2 % 2)
        net.after(number * 0.001, partial(net.deliver, datagram, source))
    traffic.run(4.0)
    assert traffic.is_whole()
    assert [datagram for datagram in net.to_strangers() if datagram[0] != COOKIE_REPLY] == []


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, 1, 2, 3, 4]), st.booleans())
def test_any_bytes_at_all_are_counted_and_have_no_effect(data: bytes, kind: int | None, known: bool) -> None:
    net = BUSY
    if kind is not None:
        data = bytes([kind, 0, 0, 0]) + data
    if known and len(data) >= 8 and net.guest.current is not None:
        data = data[:4] + net.guest.current.local_index.to_bytes(4, "little") + data[8:]
    drops = counted(net.server)
    net.deliver(data, stranger())
    net.server.finish_turn(net.now)
    assert net.server.transmits() == []
    assert counted(net.server) == drops + 1
    assert snapshot(net.server, OUTSIDE) == BEFORE


BUSY = Simnet(Wire())
BUSY.run(1.0)
BEFORE = snapshot(BUSY.server, OUTSIDE)


def test_every_length_up_to_2000_and_every_type_is_dropped() -> None:
    net, rng = busy(), random.Random(6)
    before, drops = snapshot(net.server, OUTSIDE), counted(net.server)
    for length in range(2001):
        net.deliver(bytes([length % 256, *([0, 0, 0] if length % 2 else [1, 0, 0])])[:length].ljust(length), stranger())
    for kind in range(256):
        net.deliver(bytes([kind]) + rng.randbytes(147), stranger())
    net.server.finish_turn(net.now)
    assert net.server.transmits() == []
    assert snapshot(net.server, OUTSIDE) == before
    assert counted(net.server) - drops == 2001 + 256


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("high_bit", [0, 0x80])
def test_an_initiation_with_a_point_of_low_order_is_dropped(point: bytes, high_bit: int) -> None:
    net = BUSY
    point = point[:31] + bytes([point[31] | high_bit])
    body = INITIATION.to_bytes(4, "little") + bytes(4) + point + bytes(76)
    net.deliver(body + noise.mac(net.server.key.mac1_key, body) + bytes(16), stranger())
    net.server.finish_turn(net.now)
    assert net.server.transmits() == []
    assert snapshot(net.server, OUTSIDE) == BEFORE
    assert net.server.drops["public key of low order"] > 0


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_of_datagrams_of_two_peers_and_other_things_is_taken_apart() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    session = net.peer.current
    assert session is not None
    good = [session.seal(ipv4(CLIENT, TARGET, bytes([number]) * 20)) for number in range(5)]
    size = len(good[0])
    foreign = good[0][:4] + b"\xff\xff\xff\xff" + good[0][8:]
    junk = bytes([9]) * size
    run = b"".join([good[0], good[1], foreign, good[2], junk, good[3], good[4], b"\x04\x00\x00\x00" + bytes(9)])
    inbox: list[bytes] = []
    net.server.receive(run, size, net.source(0), net.now, inbox)
    assert [bytes(packet)[20:21] for packet in inbox] == [bytes([number]) for number in range(5)]
    assert net.server.drops["unknown index"] == 1
    assert net.server.drops["malformed datagram"] == 2


def test_a_run_in_which_one_datagram_is_forged_loses_only_that_one() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    session = net.peer.current
    assert session is not None
    good = [session.seal(ipv4(CLIENT, TARGET, bytes([number]) * 20)) for number in range(6)]
    bad = [*good[:2], good[2][:-1] + bytes([good[2][-1] ^ 1]), *good[3:]]
    run = b"".join(bad)
    inbox: list[bytes] = []
    net.server.receive(run, len(good[0]), net.source(0), net.now, inbox)
    assert [bytes(packet)[20] for packet in inbox] == [0, 1, 3, 4, 5]
    assert net.server.drops["not authentic"] == 1
    net.server.receive(good[2], len(good[2]), net.source(0), net.now, inbox)
    assert bytes(inbox[-1])[20] == 2  # the forged one has not marked its counter


# -- handshakes of strangers -----------------------------------------------------------------------------------------


def strange_initiations(net: Simnet, number: int) -> list[bytes]:
    """Initiations with a right mac1, of keys that nobody knows."""
    own, remote = noise.StaticKey(b"\x66" * 32), noise.Remote(noise.StaticKey(b"\x66" * 32), SERVER_PUBLIC)
    return [
        noise.create_initiation(own, remote, n, noise.tai64n(n << 24), net.rng.randbytes).datagram
        for n in range(number)
    ]


def test_a_turn_takes_8_handshakes_and_collects_64() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    for number, message in enumerate(strange_initiations(net, 100)):
        net.deliver(message, stranger(number))
    assert net.server.drops["handshake in a crowd"] == 100 - MAX_COLLECTED
    assert net.server.next_deadline() == float("-inf")
    net.server.finish_turn(net.now)
    answered = net.server.drops["initiation of a stranger"] + net.server.drops["answered by a cookie"]
    assert answered == MAX_TAKEN
    for _ in range(7):
        net.server.finish_turn(net.now)
    assert net.server.next_deadline() > net.now


def test_a_flood_of_strangers_is_answered_by_cookies_smaller_than_what_came() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    messages = strange_initiations(net, 60)
    for number, message in enumerate(messages):
        net.deliver(message, stranger(number))
    for _ in range(10):
        net.turn()
    replies = net.to_strangers()
    assert len(replies) == 60
    assert {datagram[0] for datagram in replies} == {COOKIE_REPLY}
    assert {len(datagram) for datagram in replies} == {64}


def test_wrong_mac1_is_never_answered_not_even_under_load() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    net.server._door._loaded_until = 1e9
    for number, message in enumerate(strange_initiations(net, 60)):
        net.deliver(message[:-32] + bytes(32), stranger(number))
        net.turn()
    assert net.to_strangers() == []
    assert net.server.drops["wrong mac1"] == 60


def test_a_legitimate_client_gets_in_while_strangers_flood() -> None:
    net = Simnet(Wire(), Wire())
    messages = strange_initiations(net, 300)
    for number in range(6000):
        net.after(number * 0.0005, partial(net.deliver, messages[number % 300], stranger(number % 1000)))
    net.client_sends(UP)
    net.run(3.0)
    assert [packet for _, packet in net.at_server] == [UP]
    assert net.server.drops["answered by a cookie"] > 1000


def test_data_of_a_turn_goes_before_its_handshakes() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    assert net.peer.current is not None
    for message in strange_initiations(net, 60):
        net.deliver(message, stranger())
    net.deliver(net.peer.current.seal(UP), net.source(0))
    assert [packet for _, packet in net.at_server] == [UP]
    assert net.server.drops["initiation of a stranger"] == 0


def test_what_is_remembered_of_answered_handshakes_is_bounded() -> None:
    net = Simnet(Wire(), stock_client=BookPeer(CLIENT_KEY, SERVER_PUBLIC, PSK, endpoint=0))
    book = net.client_side
    assert isinstance(book, BookPeer)
    net.server._answered = {bytes([n & 255, n >> 8]) * 16: None for n in range(MAX_ANSWERED)}  # type: ignore[misc]
    net.client_sends(UP)
    net.run(1.0)
    assert len(net.server._answered) == MAX_ANSWERED


@pytest.mark.parametrize("message", [b"\x02" + bytes(91), b"\x03" + bytes(63)])
def test_responses_and_cookies_that_nobody_waits_for_are_dropped(message: bytes) -> None:
    net = busy()
    before = snapshot(net.client, OUTSIDE)
    net.client.receive(message, 200, 0, net.now, [])
    net.client.finish_turn(net.now)
    assert snapshot(net.client, OUTSIDE) == before


def test_the_index_of_a_handshake_is_good_for_a_response_only_and_that_of_a_session_for_data_only() -> None:
    net = Simnet(Wire(), server_starts=False)
    assert net.peer.initiation is not None
    before = snapshot(net.client, OUTSIDE)
    data = b"\x04\x00\x00\x00" + net.peer.initiation.index.to_bytes(4, "little") + bytes(40)
    net.client.receive(data, len(data), 0, net.now, [])
    assert snapshot(net.client, OUTSIDE) == before
    assert net.client.drops["unknown index"] == 1
    net = busy()
    _, response = net.sent(RESPONSE, "down")[0]  # a late copy: its index is that of the session by now
    before = snapshot(net.client, OUTSIDE)
    net.client.receive(response, len(response), 1, net.now, [])
    net.client.finish_turn(net.now)
    assert snapshot(net.client, OUTSIDE) == before


# -- timestamps ------------------------------------------------------------------------------------------------------


def test_a_reservation_of_timestamps_is_saved_at_start_and_renewed_and_a_clean_stop_saves_the_last_one_used() -> None:
    net = Simnet(Wire())
    first = net.saved["client/timestamp"]["reserved"]
    assert first > WALL * 1e9
    Traffic(net, rate=1).run(400.0)
    assert net.saved["client/timestamp"]["reserved"] >= first + 300e9
    net.stop("client")
    last = net.saved["client/timestamp"]["reserved"]
    assert last < (WALL + 400.0) * 1e9
    assert last == net.client.identity.timestamps.last
    assert SERVER_KEY != CLIENT_KEY


def test_a_client_killed_while_its_clock_was_far_ahead_is_admitted_after_it_was_set_right() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    net.set_wall(WALL + 3e8)
    net.restart_client()
    net.run(3.0)
    net.set_wall(WALL)
    net.restart_client()
    begun = net.now
    net.client_sends(UP)
    net.run(1.0)
    assert net.at_server[-1][0] - begun < 0.5
