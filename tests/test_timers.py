"""Deadlines of a peer: each row of WireGuard's table of timers, and what stops it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel.timers import INF, JITTER, PeerTimers, Timer

if TYPE_CHECKING:
    from collections.abc import Callable


def timers(seed: int = 1) -> PeerTimers:
    return PeerTimers(random.Random(seed))


def deadline(peer: PeerTimers, timer: Timer) -> float:
    """When `timer` expires; infinity if it does not run. Takes out what expires before."""
    while (at := peer.next_deadline()) < INF:
        if timer in peer.expired(at):
            return at
    return INF


# timer: how it is started at 100 s, seconds until it expires (jitter comes on top), what stops it, what does not
TABLE: dict[Timer, tuple[Callable[[PeerTimers], None], float, float, list[str], list[str]]] = {
    Timer.RETRANSMIT: (
        lambda t: t.initiation_sent(100.0), 5.0, JITTER,
        ["handshake_done"], ["anything_sent", "anything_received", "data_sent", "data_received"],
    ),
    Timer.KEEPALIVE: (
        lambda t: t.data_received(100.0), 10.0, 0.0,
        ["anything_sent", "handshake_given_up"], ["anything_received", "data_received", "handshake_done"],
    ),
    Timer.NEW_HANDSHAKE: (
        lambda t: t.data_sent(100.0), 15.0, JITTER,
        ["anything_received"], ["anything_sent", "data_sent", "data_received", "handshake_given_up"],
    ),
    Timer.ZERO_KEYS: (
        lambda t: t.handshake_done(100.0), 540.0, 0.0,
        [], ["anything_sent", "anything_received", "handshake_given_up", "initiation_sent"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("timer", TABLE)
def test_a_timer_expires_when_the_table_says(timer: Timer) -> None:
    start, after, jitter, _, _ = TABLE[timer]
    seen = set()
    for seed in range(20):
        peer = timers(seed)
        assert not peer.is_armed(timer)
        start(peer)
        assert peer.is_armed(timer)
        at = deadline(peer, timer)
        assert 100.0 + after <= at <= 100.0 + after + jitter
        seen.add(at)
        assert not peer.is_armed(timer)
    assert (len(seen) > 1) == bool(jitter)


@pytest.mark.parametrize("timer", TABLE)
def test_a_timer_is_stopped_by_what_the_table_says_and_by_nothing_else(timer: Timer) -> None:
    start, after, jitter, stops, passes = TABLE[timer]
    for event in stops:
        peer = timers()
        start(peer)
        getattr(peer, event)(103.0)
        assert not peer.is_armed(timer), event
    for event in passes:
        peer = timers()
        start(peer)
        getattr(peer, event)(103.0)
        assert peer.is_armed(timer), event
        assert deadline(peer, timer) <= 100.0 + after + jitter, event


def test_a_handshake_that_is_done_or_begun_again_counts_from_then() -> None:
    peer = timers()
    peer.initiation_sent(100.0)
    peer.initiation_sent(104.0)
    assert deadline(peer, Timer.RETRANSMIT) >= 109.0
    peer.handshake_done(200.0)
    peer.handshake_done(300.0)
    assert deadline(peer, Timer.ZERO_KEYS) == 840.0


def test_giving_up_lets_the_keys_be_forgotten_no_later_than_before() -> None:
    peer = timers()
    peer.handshake_given_up(100.0)
    assert deadline(peer, Timer.ZERO_KEYS) == 640.0
    peer.handshake_done(100.0)
    peer.handshake_given_up(300.0)
    assert deadline(peer, Timer.ZERO_KEYS) == 640.0


def test_data_that_came_in_while_a_keepalive_was_owed_makes_another_one_due() -> None:
    peer = timers()
    peer.data_received(100.0)
    peer.data_received(105.0)
    assert peer.expired(110.0) == [Timer.KEEPALIVE]
    peer.anything_sent(110.0)
    peer.keepalive_sent(110.0)
    assert deadline(peer, Timer.KEEPALIVE) == 120.0
    peer.keepalive_sent(120.0)
    assert not peer.is_armed(Timer.KEEPALIVE)


def test_one_keepalive_answers_data_that_came_once() -> None:
    peer = timers()
    peer.data_received(100.0)
    assert peer.expired(110.0) == [Timer.KEEPALIVE]
    peer.keepalive_sent(110.0)
    assert peer.next_deadline() == INF


def test_a_persistent_keepalive_is_due_after_silence_in_both_directions() -> None:
    peer = timers()
    peer.anything_sent(100.0)
    assert not peer.is_armed(Timer.PERSISTENT)
    peer.persistent = 25.0
    peer.anything_sent(100.0)
    peer.anything_received(110.0)
    assert deadline(peer, Timer.PERSISTENT) == 135.0


def test_patience_takes_the_place_of_the_five_seconds() -> None:
    peer = timers()
    peer.initiation_sent(100.0, 25.0)
    assert 125.0 <= deadline(peer, Timer.RETRANSMIT) <= 125.0 + JITTER


def test_a_handshake_that_is_done_needs_no_repeats() -> None:
    peer = timers()
    peer.at(Timer.REPEAT, 100.0)
    peer.handshake_done(99.0)
    assert not peer.is_armed(Timer.REPEAT)


def test_without_keys_nothing_is_sent_or_awaited() -> None:
    peer = timers()
    peer.persistent = 25.0
    peer.anything_sent(100.0)
    peer.data_sent(100.0)
    peer.data_received(100.0)
    peer.at(Timer.HELLO, 101.0)
    peer.keys_zeroed()
    assert peer.next_deadline() == INF


def test_what_is_due_comes_in_its_order_and_only_once() -> None:
    peer = timers()
    peer.at(Timer.HELLO, 3.0)
    peer.at(Timer.REPEAT, 1.0)
    peer.at(Timer.ENROL, 2.0)
    peer.at(Timer.SETTLE, 4.0)
    assert peer.expired(3.0) == [Timer.REPEAT, Timer.ENROL, Timer.HELLO]
    assert peer.expired(3.0) == []
    assert peer.next_deadline() == 4.0


def test_a_timer_is_moved_only_forward_by_at_the_latest_and_stopped_by_infinity() -> None:
    peer = timers()
    peer.at_the_latest(Timer.SETTLE, 5.0)
    peer.at_the_latest(Timer.SETTLE, 7.0)
    assert peer.next_deadline() == 5.0
    peer.at_the_latest(Timer.SETTLE, 4.0)
    assert peer.next_deadline() == 4.0
    peer.at(Timer.SETTLE, INF)
    assert not peer.is_armed(Timer.SETTLE)
    peer.at_the_latest(Timer.SETTLE, INF)
    assert peer.next_deadline() == INF
    peer.at(Timer.SETTLE, 4.0)
    peer.stop(Timer.SETTLE)
    assert not peer.is_armed(Timer.SETTLE)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Timer), st.floats(0, 100))), st.floats(0, 100))
def test_asking_for_the_deadline_changes_nothing(set_to: list[tuple[Timer, float]], now: float) -> None:
    peer = timers()
    plain: dict[Timer, float] = {}
    for timer, at in set_to:
        peer.at(timer, at)
        plain[timer] = at
    assert peer.next_deadline() == peer.next_deadline() == min(plain.values(), default=INF)
    due = peer.expired(now)
    assert set(due) == {timer for timer, at in plain.items() if at <= now}
    assert [plain[timer] for timer in due] == sorted(plain[timer] for timer in due)
    assert all(peer.is_armed(timer) == (plain[timer] > now) for timer in plain)
