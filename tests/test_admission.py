"""The server's door: what strangers get, and what they can make grow."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

import pytest

from mptunnel import noise
from mptunnel.admission import BUCKET_RATE, COSTLY_PER_SECOND, MAX_BUCKETS, Door, Verdict
from mptunnel.events import Endpoint
from mptunnel.messages import INITIATION_SIZE, MAC_SIZE, MACS_SIZE

SERVER, CLIENT = noise.StaticKey(b"\x01" * 32), noise.StaticKey(b"\x02" * 32)
REMOTE = noise.Remote(CLIENT, SERVER.public)


def door() -> Door:
    return Door(SERVER, random.Random(1).randbytes)


def message(seed: int = 0) -> bytes:
    """Return an initiation with a true mac1 and nothing true inside: the door looks no further."""
    body = bytes((1, 0, 0, 0)) + random.Random(seed).randbytes(INITIATION_SIZE - MACS_SIZE - 4)
    return body + noise.mac(REMOTE.mac1_key, body) + bytes(MAC_SIZE)


def v4(number: int, port: int = 1000) -> Endpoint:
    return Endpoint(f"::ffff:{IPv4Address(0x0A000000 + number)}", port, 0, b"")


def v6(site: int, host: int = 1) -> Endpoint:
    return Endpoint(str(IPv6Address((0x20010DB8 << 96) + (site << 64) + host)), 1000, 0, b"")


def convincing(at: Door, source: Endpoint, now: float) -> bytes:
    """Return a message with the mac2 that a cookie reply to `source` allows."""
    plain = message()
    cookie = noise.open_cookie(REMOTE, at.cookie_reply(plain, source, now), plain[-MACS_SIZE:-MAC_SIZE])
    return noise.with_mac2(plain, cookie)


def loaded(now: float = 100.0) -> Door:
    at = door()
    at.crowded(now)
    return at


def test_a_wrong_mac1_is_dropped_without_a_word_whether_under_load_or_not() -> None:
    wrong = bytearray(message())
    wrong[-MACS_SIZE] ^= 1
    for at in (door(), loaded()):
        assert at.judge(bytes(wrong), v4(1), 100.0) is Verdict.DROP
        assert at.judge(bytes(INITIATION_SIZE), v4(1), 100.0) is Verdict.DROP


def test_without_load_no_cookie_is_asked_for() -> None:
    at = door()
    assert at.judge(message(), v4(1), 100.0) is Verdict.TAKE
    assert not at.is_under_load(100.0)


def test_under_load_only_who_has_shown_where_it_is_gets_in() -> None:
    at = loaded()
    assert at.judge(message(), v4(1), 100.5) is Verdict.COOKIE
    good = convincing(at, v4(1), 100.5)
    assert at.judge(good, v4(2), 100.5) is Verdict.COOKIE
    assert at.judge(good, v4(1, port=1001), 100.5) is Verdict.COOKIE
    assert at.judge(good, v4(1), 100.5) is Verdict.TAKE
    assert at.judge(good[:-1] + bytes((good[-1] ^ 1,)), v4(1), 100.5) is Verdict.COOKIE


def test_a_cookie_reply_is_smaller_than_what_it_answers() -> None:
    assert len(door().cookie_reply(message(), v4(1), 100.0)) == 64 < INITIATION_SIZE


def test_more_than_200_costly_messages_in_a_second_are_load_for_one_second() -> None:
    at = door()
    verdicts = [at.judge(message(), v4(n), 100.0 + n / 1000) for n in range(COSTLY_PER_SECOND + 2)]
    assert verdicts == [Verdict.TAKE] * (COSTLY_PER_SECOND + 1) + [Verdict.COOKIE]
    assert at.is_under_load(101.1)
    assert not at.is_under_load(101.201)
    assert at.judge(message(), v4(1), 101.201) is Verdict.TAKE


def test_fewer_are_no_load_however_long_they_go_on() -> None:
    at = door()
    for n in range(10 * COSTLY_PER_SECOND):
        assert at.judge(message(), v4(1), 100.0 + n / COSTLY_PER_SECOND) is Verdict.TAKE


def test_what_is_dropped_or_answered_by_a_cookie_does_not_count_as_costly() -> None:
    at = door()
    for _ in range(3 * COSTLY_PER_SECOND):
        assert at.judge(bytes(INITIATION_SIZE), v4(1), 100.0) is Verdict.DROP
    assert not at.is_under_load(100.0)
    at.crowded(100.0)
    for _ in range(3 * COSTLY_PER_SECOND):
        assert at.judge(message(), v4(1), 100.1) is Verdict.COOKIE
    assert not at.is_under_load(101.0)


@pytest.mark.parametrize("source", [v4(1), v6(1)], ids=["ipv4", "ipv6"])
def test_a_source_gets_five_at_once_and_then_twenty_a_second(source: Endpoint) -> None:
    at = loaded()
    good = convincing(at, source, 100.0)
    assert [at.judge(good, source, 100.0) for _ in range(7)] == [Verdict.TAKE] * 5 + [Verdict.LIMITED] * 2
    assert at.judge(good, source, 100.02) is Verdict.LIMITED
    assert at.judge(good, source, 100.06) is Verdict.TAKE
    assert at.judge(good, source, 100.07) is Verdict.LIMITED


@pytest.mark.parametrize("rate", [10, 30, 40, 100, 1000])
def test_a_source_that_asks_too_often_still_gets_twenty_a_second(rate: int) -> None:
    at, taken = door(), 0
    good = convincing(at, v4(1), 100.0)
    for n in range(3 * rate):
        now = 100.0 + n / rate
        at.crowded(now)
        taken += at.judge(good, v4(1), now) is Verdict.TAKE
    assert taken <= 5 + 3 * BUCKET_RATE
    assert taken >= min(3 * rate, 3 * BUCKET_RATE - 1)


def test_one_source_does_not_use_up_the_share_of_another() -> None:
    at = loaded()
    sources = [v4(1), v4(2), v6(1), v6(2)]
    for source in sources:
        good = convincing(at, source, 100.0)
        assert [at.judge(good, source, 100.0) for _ in range(6)] == [Verdict.TAKE] * 5 + [Verdict.LIMITED]


def test_ipv6_sources_share_by_site_and_ipv4_sources_by_address_whatever_the_port() -> None:
    at = loaded()
    for n in range(5):
        assert at.judge(convincing(at, v6(7, host=n), 100.0), v6(7, host=n), 100.0) is Verdict.TAKE
        assert at.judge(convincing(at, v4(7, port=n), 100.0), v4(7, port=n), 100.0) is Verdict.TAKE
    assert at.judge(convincing(at, v6(7, host=9), 100.0), v6(7, host=9), 100.0) is Verdict.LIMITED
    assert at.judge(convincing(at, v4(7, port=9), 100.0), v4(7, port=9), 100.0) is Verdict.LIMITED


def test_the_table_of_sources_does_not_grow_beyond_its_bound() -> None:
    at = loaded()
    for n in range(MAX_BUCKETS):
        assert at.judge(convincing(at, v4(n), 100.0), v4(n), 100.0) is Verdict.TAKE
    good = convincing(at, v4(MAX_BUCKETS), 100.0)
    assert at.judge(good, v4(MAX_BUCKETS), 100.0) is Verdict.LIMITED
    assert len(at._buckets) == MAX_BUCKETS
    assert at.judge(convincing(at, v4(0), 100.0), v4(0), 100.0) is Verdict.TAKE  # who is in it is served
    assert at.judge(good, v4(MAX_BUCKETS), 100.06) is Verdict.TAKE  # full buckets have made room
    assert len(at._buckets) == 2
