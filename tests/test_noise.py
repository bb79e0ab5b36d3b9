"""The handshake against published vectors and an independent Noise; MACs, cookies, timestamps."""

from __future__ import annotations

import itertools
import os
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from mptunnel import noise
from mptunnel.errors import NotAuthenticError
from mptunnel.messages import MAC_SIZE, MACS_SIZE, Control
from mptunnel.noise import NO_PSK, TIMESTAMP_STEP, Remote, SessionKeys, StaticKey, Timestamps
from mptunnel.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

# -- vectors (deterministic inputs, confirmed with an independent implementation) --------------------------

INITIATOR, RESPONDER = StaticKey(b"\x01" * 32), StaticKey(b"\x02" * 32)
PSK = b"\x05" * 32
INDEX_I, INDEX_R = 0x11223344, 0x55667788
TIMESTAMP = bytes.fromhex("400000006553f10a00000000")
MESSAGE_1 = bytes.fromhex(
    "01000000443322115dfedd3b6bd47f6fa28ee15d969d5bb0ea53774d488bdaf9df1c6e0124b3ef220a26599fb2188bb723276fc173af67616c817fc32fd0"
    "4d686d87ec152fac10eed2bda3bb3b6f1eded6977684082284d817fb46b3a99b6be3bd273ed6533c68635663c21c99296e34deaf1c8fe94fa4a2254a3a56"
    "cb996456ae5b324a00000000000000000000000000000000"
)
MESSAGE_2 = bytes.fromhex(
    "020000008877665544332211ac01b2209e86354fb853237b5de0f4fab13c7fcbf433a61c019369617fecf10b5176a1060259947cb4f5a7beef58df6998fd"
    "a57eb8180ee4cc29d2d24386638100000000000000000000000000000000"
)
INITIATOR_SENDS = bytes.fromhex("a18cc809fd05b6b5f99644cf506f89dce368c2f54a9dbeb9a384f36c274317ef")
RESPONDER_SENDS = bytes.fromhex("b1aa1b797d3a45da97552b8084ade493aa767f15af95854bc86557f6dacd851d")
COOKIE_SOURCE = bytes.fromhex("c0000201ca6c")
COOKIE = bytes.fromhex("f13b68657cfce9a650fa6c62fd9bd6c1")
MESSAGE_3 = bytes.fromhex(
    "0300000044332211000102030405060708090a0b0c0d0e0f1011121314151617e3bfff50f879a3abaef20ebf415a9f2cdfa1b44a78d06e7b007da39c1ee9f87b"
)


def fixed(*values: bytes) -> Callable[[int], bytes]:
    """Return an entropy that gives these values, one after another, and no others."""
    left = list(values)

    def entropy(n: int) -> bytes:
        value = left.pop(0)
        assert len(value) == n
        return value

    return entropy


def initiate() -> noise.Initiation:
    remote = Remote(INITIATOR, RESPONDER.public, PSK)
    return noise.create_initiation(INITIATOR, remote, INDEX_I, TIMESTAMP, fixed(b"\x03" * 32))


def respond(message: bytes = MESSAGE_1) -> tuple[bytes, SessionKeys]:
    remote = Remote(RESPONDER, INITIATOR.public, PSK)
    consumed = noise.consume_initiation(RESPONDER, message, lambda _: remote.static_static)
    return noise.create_response(remote, consumed, INDEX_R, fixed(b"\x04" * 32))


def finish(message: bytes = MESSAGE_2, initiation: noise.Initiation | None = None, psk: bytes = PSK) -> SessionKeys:
    remote = Remote(INITIATOR, RESPONDER.public, psk)
    return noise.consume_response(INITIATOR, remote, initiation or initiate(), message)


def test_public_keys_are_those_of_the_vectors() -> None:
    assert INITIATOR.public.hex() == "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209"
    assert RESPONDER.public.hex() == "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59"


def test_message_1_is_that_of_the_vectors_and_leaves_their_chain_and_hash() -> None:
    initiation = initiate()
    assert initiation.datagram == MESSAGE_1
    assert initiation.chain.hex() == "4696b0ed00cff9c62cf447eb5f9c899d508e66b889a8cef23c4ae5c60f902b5e"
    assert initiation.hash.hex() == "19016b217eaa957379f75f0e5719be9973d51b0b90cdcdf7fc98f1c4e65f7bd4"
    assert initiation.index == INDEX_I
    assert initiation.datagram[116:132] == MESSAGE_1[116:132]


def test_message_1_of_the_vectors_is_opened() -> None:
    remote = Remote(RESPONDER, INITIATOR.public, PSK)
    consumed = noise.consume_initiation(RESPONDER, MESSAGE_1, {INITIATOR.public: remote.static_static}.get)
    assert (consumed.public, consumed.timestamp, consumed.remote_index) == (INITIATOR.public, TIMESTAMP, INDEX_I)
    assert (consumed.chain, consumed.hash) == (initiate().chain, initiate().hash)


def test_message_2_is_that_of_the_vectors_and_both_sides_have_their_keys() -> None:
    response, keys = respond()
    assert response == MESSAGE_2
    assert keys == SessionKeys(RESPONDER_SENDS, INITIATOR_SENDS, INDEX_R, INDEX_I, is_initiator=False)
    assert finish() == SessionKeys(INITIATOR_SENDS, RESPONDER_SENDS, INDEX_I, INDEX_R, is_initiator=True)


def test_transport_datagrams_are_those_of_the_vectors() -> None:
    initiator, responder = Session(finish(), 1, 0.0), Session(respond()[1], 1, 0.0)
    keepalive = initiator.seal(b"")
    assert keepalive.hex() == "040000008877665500000000000000002573d3030aabba0c616df8e5a1bab60b"
    data = initiator.seal(bytes.fromhex("45000014") + bytes(16))
    assert data.hex() == (
        "04000000887766550100000000000000bff40f9cad16255273b63db4f6f85215"
        "233a5f5be211591600a9e13645a95352fb2473c738b749337b800c2966488153"
    )
    assert responder.seal(b"").hex() == "04000000443322110000000000000000debc5ce8db9dfbdcc00a210e42229c06"
    assert responder.open(keepalive, len(keepalive), None, 0.0).plain == [b""]
    assert responder.open(data, len(data), None, 0.0).plain == [b"\x45\0\0\x14" + bytes(28)]


def test_the_cookie_and_the_mac2_are_those_of_the_vectors() -> None:
    maker = noise.CookieMaker(RESPONDER, fixed(b"\x06" * 32, bytes(range(16)), bytes(range(16, 24))))
    assert not maker.mac2_is_valid(MESSAGE_1, COOKIE_SOURCE, 0.0)
    reply = maker.reply(MESSAGE_1, COOKIE_SOURCE, 0.0)
    assert reply == MESSAGE_3
    assert noise.open_cookie(Remote(INITIATOR, RESPONDER.public), reply, MESSAGE_1[116:132]) == COOKIE
    convincing = noise.with_mac2(MESSAGE_1, COOKIE)
    assert convincing[:-MAC_SIZE] == MESSAGE_1[:-MAC_SIZE]
    assert convincing[-MAC_SIZE:].hex() == "3685f5b36f8468b17739a08ed4c18df9"
    assert maker.mac2_is_valid(convincing, COOKIE_SOURCE, 0.0)


def test_the_key_derivation_is_that_of_the_vectors() -> None:
    outputs = noise._kdf3(b"test-key", b"test-input")
    assert [output.hex() for output in outputs] == [
        "6f0e5ad38daba1bea8a0d213688736f19763239305e0f58aba697f9ffc41c633",
        "df1194df20802a4fe594cde27e92991c8cae66c366e8106aaa937a55fa371e8a",
        "fac6e2745a325f5dc5d11a5b165aad08b0ada28e7b4e666b7c077934a4d76c24",
    ]
    assert noise._kdf2(b"test-key", b"test-input") == outputs[:2]
    assert noise._kdf1(b"test-key", b"test-input") == outputs[0]


def test_hchacha20_is_that_of_the_draft() -> None:
    subkey = noise.hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927"))
    assert subkey.hex() == "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"


# -- an independent Noise ----------------------------------------------------------------------------------


def oracle(own: bytes, psk: bytes, *, remote: bytes | None = None) -> NoiseConnection:
    """Return the library's side: the initiator if it is told the other's public key."""
    connection = NoiseConnection.from_name(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
    connection.set_prologue(b"WireGuard v1 zx2c4 Jason@zx2c4.com")
    connection.set_psks(psk)
    connection.set_keypair_from_private_bytes(Keypair.STATIC, own)
    if remote is None:
        connection.set_as_responder()
    else:
        connection.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, remote)
        connection.set_as_initiator()
    connection.start_handshake()
    return connection


with_and_without_psk = pytest.mark.parametrize("has_psk", [False, True], ids=["no-psk", "psk"])


@with_and_without_psk
def test_our_initiator_agrees_with_an_independent_responder(*, has_psk: bool) -> None:
    for _ in range(4):
        own, theirs = StaticKey(os.urandom(32)), os.urandom(32)
        psk = os.urandom(32) if has_psk else NO_PSK
        other, remote = oracle(theirs, psk), Remote(own, StaticKey(theirs).public, psk)
        initiation = noise.create_initiation(own, remote, 7, TIMESTAMP, os.urandom)
        assert bytes(other.read_message(initiation.datagram[8:116])) == TIMESTAMP
        header = bytes((2, 0, 0, 0, 9, 0, 0, 0, 7, 0, 0, 0))
        keys = noise.consume_response(own, remote, initiation, header + other.write_message() + bytes(32))
        ours = Session(keys, 1, 0.0)
        assert other.decrypt(ours.seal(b"sixteen bytes 01")[16:]) == b"sixteen bytes 01"
        sealed = bytes((4, 0, 0, 0, 7, 0, 0, 0)) + bytes(8) + other.encrypt(b"back")
        assert ours.open(sealed, len(sealed), None, 0.0).plain == [b"back"]


@with_and_without_psk
def test_our_responder_agrees_with_an_independent_initiator(*, has_psk: bool) -> None:
    for _ in range(4):
        own, theirs = StaticKey(os.urandom(32)), os.urandom(32)
        psk = os.urandom(32) if has_psk else NO_PSK
        other, remote = oracle(theirs, psk, remote=own.public), Remote(own, StaticKey(theirs).public, psk)
        message = bytes((1, 0, 0, 0, 9, 0, 0, 0)) + other.write_message(TIMESTAMP) + bytes(32)
        consumed = noise.consume_initiation(own, message, {remote.public: remote.static_static}.get)
        assert (consumed.public, consumed.timestamp, consumed.remote_index) == (remote.public, TIMESTAMP, 9)
        response, keys = noise.create_response(remote, consumed, 7, os.urandom)
        assert bytes(other.read_message(response[12:60])) == b""
        ours = Session(keys, 1, 0.0)
        assert other.decrypt(ours.seal(b"sixteen bytes 02")[16:]) == b"sixteen bytes 02"


# -- what must not be accepted -----------------------------------------------------------------------------

_PRIME = (1 << 255) - 19
LOW_ORDER = [
    point.to_bytes(32, "little")
    for point in (
        0,
        1,
        _PRIME - 1,
        _PRIME,
        _PRIME + 1,
        int.from_bytes(bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"),
        int.from_bytes(bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"),
    )
]
LOW_ORDER += [point[:31] + bytes((point[31] | 0x80,)) for point in LOW_ORDER]


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:4] + point.hex()[-2:])
def test_a_point_of_low_order_is_refused_wherever_it_stands(point: bytes) -> None:
    with pytest.raises(NotAuthenticError):
        Remote(RESPONDER, point)
    with pytest.raises(NotAuthenticError, match="low order"):
        noise.consume_initiation(RESPONDER, MESSAGE_1[:8] + point + MESSAGE_1[40:], lambda _: bytes(32))
    with pytest.raises(NotAuthenticError, match="low order"):
        finish(MESSAGE_2[:12] + point + MESSAGE_2[44:])


def test_a_changed_byte_anywhere_in_message_1_is_noticed() -> None:
    remote = Remote(RESPONDER, INITIATOR.public, PSK)
    for at in range(len(MESSAGE_1) - MAC_SIZE):
        changed = bytearray(MESSAGE_1)
        changed[at] ^= 0x40
        assert not noise.mac1_is_valid(RESPONDER, bytes(changed)), at
        if 8 <= at < len(MESSAGE_1) - MACS_SIZE:
            with pytest.raises(NotAuthenticError):
                noise.consume_initiation(RESPONDER, bytes(changed), {INITIATOR.public: remote.static_static}.get)


def test_a_changed_byte_anywhere_in_message_2_is_noticed_and_the_true_one_still_finishes() -> None:
    initiation = initiate()
    for at in range(len(MESSAGE_2) - MAC_SIZE):
        changed = bytearray(MESSAGE_2)
        changed[at] ^= 0x40
        assert not noise.mac1_is_valid(INITIATOR, bytes(changed)), at
        if 12 <= at < len(MESSAGE_2) - MACS_SIZE:
            with pytest.raises(NotAuthenticError):
                finish(bytes(changed), initiation)
    assert finish(MESSAGE_2, initiation).send == INITIATOR_SENDS


def test_a_stranger_another_server_and_another_psk_get_nothing() -> None:
    with pytest.raises(NotAuthenticError, match="stranger"):
        noise.consume_initiation(RESPONDER, MESSAGE_1, lambda _: None)
    with pytest.raises(NotAuthenticError):
        noise.consume_initiation(StaticKey(b"\x07" * 32), MESSAGE_1, lambda _: bytes(32))
    with pytest.raises(NotAuthenticError):  # who claims a key must have it: the static-static product differs
        noise.consume_initiation(RESPONDER, MESSAGE_1, lambda _: bytes(32))
    with pytest.raises(NotAuthenticError):
        finish(psk=NO_PSK)


def test_a_response_to_another_initiation_of_ours_is_refused() -> None:
    remote = Remote(INITIATOR, RESPONDER.public, PSK)
    later = noise.create_initiation(INITIATOR, remote, INDEX_I, TIMESTAMP, fixed(b"\x08" * 32))
    with pytest.raises(NotAuthenticError):
        finish(MESSAGE_2, later)


def test_roles_cannot_be_swapped_by_reflection() -> None:
    remote = Remote(INITIATOR, RESPONDER.public, PSK)
    assert not noise.mac1_is_valid(INITIATOR, MESSAGE_1)
    with pytest.raises(NotAuthenticError):
        noise.consume_initiation(INITIATOR, MESSAGE_1, lambda _: remote.static_static)


def test_every_initiation_has_an_ephemeral_key_of_its_own() -> None:
    remote = Remote(INITIATOR, RESPONDER.public, PSK)
    made = [noise.create_initiation(INITIATOR, remote, 1, TIMESTAMP, os.urandom).datagram[8:40] for _ in range(8)]
    assert len(set(made)) == 8


def test_no_secret_is_shown() -> None:
    initiation, (_, keys) = initiate(), respond()
    remote = Remote(RESPONDER, INITIATOR.public, PSK)
    consumed = noise.consume_initiation(RESPONDER, MESSAGE_1, lambda _: remote.static_static)
    for value in (keys, initiation, consumed, remote, RESPONDER, Session(keys, 1, 0.0)):
        shown = repr(value)
        for secret in (keys.send, keys.receive, initiation.chain, initiation.hash, PSK, b"\x01" * 32, b"\x02" * 32):
            assert repr(secret)[2:-1] not in shown
            assert secret.hex() not in shown


# -- MACs and cookies --------------------------------------------------------------------------------------


def test_mac1_is_made_for_its_receiver_only() -> None:
    assert noise.mac1_is_valid(RESPONDER, MESSAGE_1)
    assert not noise.mac1_is_valid(INITIATOR, MESSAGE_1)
    assert noise.mac1_is_valid(INITIATOR, MESSAGE_2)
    assert not noise.mac1_is_valid(RESPONDER, MESSAGE_2)
    assert not noise.mac1_is_valid(RESPONDER, MESSAGE_1[:116] + bytes(32))


def test_a_cookie_proves_one_address_and_port_for_two_minutes() -> None:
    maker, remote = noise.CookieMaker(RESPONDER, random.Random(1).randbytes), Remote(INITIATOR, RESPONDER.public)
    here, other_port, elsewhere = b"\x0a\0\0\1\0\1", b"\x0a\0\0\1\0\2", b"\x0a\0\0\2\0\1"
    cookie = noise.open_cookie(remote, maker.reply(MESSAGE_1, here, 100.0), MESSAGE_1[116:132])
    convincing = noise.with_mac2(MESSAGE_1, cookie)
    assert maker.mac2_is_valid(convincing, here, 219.9)
    assert not maker.mac2_is_valid(convincing, other_port, 219.9)
    assert not maker.mac2_is_valid(convincing, elsewhere, 219.9)
    assert not maker.mac2_is_valid(MESSAGE_1, here, 219.9)
    assert not maker.mac2_is_valid(convincing, here, 220.0)
    assert noise.COOKIE_USABLE <= noise.COOKIE_LIFETIME - 5.0


def test_a_cookie_opens_only_for_the_message_it_answers_and_under_the_right_key() -> None:
    reply = noise.CookieMaker(RESPONDER, random.Random(2).randbytes).reply(MESSAGE_1, COOKIE_SOURCE, 0.0)
    remote, mac1 = Remote(INITIATOR, RESPONDER.public), MESSAGE_1[116:132]
    assert len(reply) == 64
    assert reply[4:8] == MESSAGE_1[4:8]
    assert len(noise.open_cookie(remote, reply, mac1)) == MAC_SIZE
    with pytest.raises(NotAuthenticError):
        noise.open_cookie(remote, reply, MESSAGE_2[60:76])
    with pytest.raises(NotAuthenticError):
        noise.open_cookie(Remote(INITIATOR, StaticKey(b"\x09" * 32).public), reply, mac1)
    for at in range(8, 64):
        changed = bytearray(reply)
        changed[at] ^= 1
        with pytest.raises(NotAuthenticError):
            noise.open_cookie(remote, bytes(changed), mac1)


def test_the_secret_and_the_nonce_change_with_every_period_and_the_nonce_with_every_reply() -> None:
    maker = noise.CookieMaker(RESPONDER, random.Random(3).randbytes)
    replies = [maker.reply(MESSAGE_1, COOKIE_SOURCE, now) for now in (0.0, 1.0, 119.9, 120.0)]
    nonces = [reply[8:32] for reply in replies]
    assert len(set(nonces)) == 4
    assert len({nonce[:16] for nonce in nonces}) == 2
    remote = Remote(INITIATOR, RESPONDER.public)
    cookies = [noise.open_cookie(remote, reply, MESSAGE_1[116:132]) for reply in replies]
    assert cookies[0] == cookies[1] == cookies[2] != cookies[3]


def test_a_control_message_cannot_be_taken_for_a_handshake() -> None:
    assert not noise.mac1_is_valid(RESPONDER, bytes((Control.PROBE,)).ljust(148, b"\0"))


# -- timestamps --------------------------------------------------------------------------------------------


def test_tai64n_is_that_of_the_vectors() -> None:
    assert noise.tai64n(1_700_000_000 * 10**9) == TIMESTAMP
    assert noise.tai64n(1_700_000_000 * 10**9 + 123) == TIMESTAMP[:8] + (123).to_bytes(4, "big")


def test_timestamps_are_coarse_and_at_least_a_step_apart() -> None:
    times = Timestamps(0)
    times.offset = 1_700_000_000.0
    times.reserved(1_800_000_000 * 10**9)
    made = []
    for _ in range(5):
        times.next(0.001)
        made.append(times.last)
    assert all(value % TIMESTAMP_STEP == 0 for value in made)
    assert all(later - earlier == TIMESTAMP_STEP for earlier, later in itertools.pairwise(made))
    assert abs(made[0] - 1_700_000_000 * 10**9) <= 2 * TIMESTAMP_STEP


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_timestamps_never_go_back_over_clock_jumps_and_restarts(data: st.DataObject) -> None:
    disk, now, wall = 0, 0.0, data.draw(st.floats(0, 3e9))
    times, last = Timestamps(disk), bytes(12)
    for step in data.draw(st.lists(st.sampled_from(["use", "use", "wait", "jump", "save", "crash", "stop"]))):
        times.offset = wall - now
        match step:
            case "use":
                made = times.next(now)
                assert made > last
                last = made
            case "wait":
                seconds = data.draw(st.floats(0, 1000))
                now, wall = now + seconds, wall + seconds
            case "jump":
                wall = data.draw(st.floats(0, 3e9))
            case "save":
                due = times.reservation(now)
                if due is not None:
                    disk = due
                    times.reserved(due)
            case "stop":
                disk = times.last
                times, now = Timestamps(disk), 0.0
            case "crash":
                # what was promised covers what was used, but for the steps that each took one tick beyond it
                if times.last <= disk:
                    times, now = Timestamps(disk), 0.0


def test_a_reservation_is_renewed_in_time_and_holds_for_minutes() -> None:
    times = Timestamps(0)
    times.offset = 1_700_000_000.0
    due = times.reservation(0.0)
    assert due is not None
    assert due == 1_700_000_300 * 10**9
    assert times.reservation(1.0) is None  # asked for already
    times.reserved(due)
    assert times.reservation(149.0) is None
    again = times.reservation(151.0)
    assert again is not None
    assert again > due


def test_a_clock_ahead_of_the_reservation_is_not_used_before_that_is_on_disk() -> None:
    times = Timestamps(1_700_000_000 * 10**9)
    times.offset = 2_000_000_000.0  # the clock is wrong, by years
    times.next(0.0)
    assert times.last <= 1_700_000_001 * 10**9
    due = times.reservation(0.0)
    assert due is not None
    times.reserved(due)
    times.next(0.0)
    assert times.last >= 1_999_999_999 * 10**9


def test_a_run_after_a_crash_begins_above_all_that_was_reserved() -> None:
    first = Timestamps(0)
    first.offset = 1_700_000_000.0
    due = first.reservation(0.0)
    assert due is not None
    first.reserved(due)
    used = first.next(290.0)
    second = Timestamps(due)
    second.offset = 1_600_000_000.0  # a clock without a battery
    assert second.next(0.0) > used
