"""One way to the peer: how it is bound and kept, what is counted on it, when it is called down."""

from __future__ import annotations

import random
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel.messages import NO_NEWS, Probe, Record, Use, decode_probe_untrusted
from mptunnel.path import (
    IDLE_BYTES,
    LOSS_SPAN,
    MAX_ANSWERS,
    MAX_PENDING,
    Allowance,
    ClientPath,
    LossMeter,
    PathState,
    ServerPath,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MOD32 = 1 << 32
INF = float("inf")
HOME, AWAY, THIEF = ("192.0.2.1", 1000), ("192.0.2.2", 2000), ("203.0.113.66", 666)


# -- loss --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, MOD32 - 1),
    st.integers(0, MOD32 - 1),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 100)), max_size=30),
    st.data(),
)
def test_a_loss_is_what_was_sent_and_did_not_arrive(
    sent: int, received: int, steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    meter = LossMeter()
    meter.count(sent, received, 0.0)
    reports = [(sent, received)]
    total = lost = 0
    for now, (more, percent) in enumerate(steps, 1):
        missing = more * percent // 100
        total, lost = total + more, lost + missing
        sent, received = (sent + more) % MOD32, (received + more - missing) % MOD32
        reports.append((sent, received))
        meter.count(sent, received, float(now))
        old = data.draw(st.sampled_from(reports))
        if old[0] != sent:
            meter.count(*old, float(now))  # a report that comes late changes nothing
        assert (meter.sent, meter.lost) == (total, lost)


def test_the_recent_loss_is_that_of_the_last_seconds() -> None:
    meter = LossMeter()
    assert meter.recent() is None
    meter.count(0, 0, 0.0)
    assert meter.recent() is None
    meter.count(100, 0, 1.0)
    assert meter.recent() == 1.0
    for second in range(2, 30):
        meter.count(100 * second, 100 * (second - 1) - 10 * (second - 1), float(second))
    assert meter.recent() == pytest.approx(0.1)
    meter.count(2900, 2800, 29.0 + 2 * LOSS_SPAN)
    assert meter.recent() is None  # nothing was sent meanwhile


def test_a_loss_is_never_more_than_all_or_less_than_none() -> None:
    meter = LossMeter()
    meter.count(100, 100, 0.0)
    meter.count(110, 120, 1.0)  # what was sent later has overtaken the report
    assert meter.recent() == 0.0
    meter.count(120, 120, 2.0)
    assert (meter.lost, meter.recent()) == (0, 0.0)


def test_totals_stay_when_the_counts_begin_anew() -> None:
    meter = LossMeter()
    meter.count(0, 0, 0.0)
    meter.count(100, 60, 1.0)
    meter.restart()
    meter.count(5, 5, 2.0)
    meter.count(15, 10, 3.0)
    assert (meter.sent, meter.lost) == (110, 45)
    meter.receiver_restarted()
    meter.count(25, 4, 4.0)
    assert (meter.sent, meter.lost) == (120, 51)


def test_a_receiver_that_counts_less_than_before_has_begun_anew() -> None:
    meter = LossMeter()
    meter.count(1000, 1000, 0.0)
    meter.count(2000, 3, 1.0)
    meter.count(2010, 8, 2.0)
    assert (meter.sent, meter.lost) == (10, 5)


def test_at_most_256_answers_go_out_in_a_second() -> None:
    allowance = Allowance()
    assert sum(allowance.take(5.0 + n / 2000) for n in range(1000)) == MAX_ANSWERS == 256
    assert allowance.take(6.0)


# -- the client's side -------------------------------------------------------------------------------------


def client_path(now: float = 0.0) -> ClientPath:
    path = ClientPath(3, "wan0", now)
    path.opened(77, now)
    return path


def probe(path: ClientPath, now: float, interval: float = 0.25, padded: int = 0) -> Probe:
    """Let `path` send a probe and return it as the server reads it."""
    plain = path.next_probe(now, interval, round(now * 1e6), 0, (), padded)
    path.sent(1, len(plain) + 32)
    return decode_probe_untrusted(memoryview(plain))


def state(path: ClientPath | ServerPath) -> PathState:
    return path.state


def test_a_path_waits_probes_is_up_falls_silent_and_comes_back() -> None:
    path = ClientPath(3, "wan0", 0.0)
    assert state(path) is PathState.WAITING
    path.opened(77, 1.0)
    assert (state(path), path.since) == (PathState.PROBING, 1.0)
    path.echo_received(probe(path, 1.0).seq, 1, 0.0, 1, 1, 1.05)
    assert path.answered(1.05)
    assert not path.answered(1.05)
    assert state(path) is PathState.UP
    for n in range(4):
        probe(path, 2.0 + n * 0.25)
        assert not path.fell_silent(2.0 + n * 0.25)
    probe(path, 3.0)
    assert path.fell_silent(3.0)
    assert not path.fell_silent(3.1)
    assert state(path) is PathState.DOWN
    path.echo_received(probe(path, 4.0).seq, 2, 0.0, 2, 2, 4.05)
    assert path.answered(4.05)
    assert path.closed(5.0)
    assert not path.closed(5.0)
    assert (state(path), path.is_open, path.probe_at) == (PathState.WAITING, False, INF)
    assert not path.fell_silent(60.0)


def test_what_another_path_tells_of_a_probe_shows_the_queue_that_it_stood_in_and_counts_once() -> None:
    path = client_path()
    hour_us = 3_600_000_000  # by which the server's clock is ahead
    for number, queue in enumerate((0.0, 0.2, 0.4), 1):
        path.sent(10, 10_000)
        given, size = path.tx + 1, path.tx_bytes
        seq = probe(path, float(number)).seq
        arrived_us = hour_us + number * 1_000_000 + round((0.03 + queue) * 1e6)
        arrival = path.reported_by_another(Record(3, 70, seq), arrived_us + 70_000, number + 0.5)
        assert arrival == (arrived_us, (given, size))
        assert path.way_out.newest() == pytest.approx(queue)
    path.measured(seq, 9.0, 0.0, 4.0)
    assert path.way_out.newest() == pytest.approx(0.4), "that was told before"
    seq = probe(path, 5.0).seq
    path.measured(seq, 3600.13, 0.0, 5.2)
    assert path.way_out.newest() == pytest.approx(0.1)
    path.echo_received(seq, 1, 0.0, 1, 1, 5.2)
    assert path.reported_by_another(Record(3, 0, seq), hour_us, 5.3) is None
    assert path.reported_by_another(Record(3, 0, seq + 1), hour_us, 5.3) is None, "it was never sent"


def test_two_unanswered_probes_or_a_moment_of_silence_do_not_call_a_path_down() -> None:
    path = client_path()
    probe(path, 0.0)
    probe(path, 9.0)
    assert not path.fell_silent(9.0)
    hasty = client_path()
    for n in range(10):
        probe(hasty, n / 100)
    assert not hasty.fell_silent(0.99)
    assert hasty.fell_silent(1.0)


def test_a_slow_path_is_given_four_round_trips() -> None:
    path = client_path()
    path.echo_received(probe(path, 0.0).seq, 1, 0.0, 1, 1, 0.6)
    path.answered(0.6)
    for n in range(8):
        probe(path, 1.0 + n / 4)
    assert not path.fell_silent(3.3)
    assert path.fell_silent(3.4)


def test_a_probe_says_what_the_path_has_counted_and_counts_itself() -> None:
    path = client_path()
    assert (probe(path, 0.0).tx, path.tx) == (1, 1)
    path.sent(10, 1000)
    path.received(4, 400, 99)
    path.echo_received(1, 8, 0.01, 1, 1, 0.05)
    second = probe(path, 0.25, interval=25.0)
    assert (second.path, second.incarnation, second.seq, second.interval_ms) == (3, 77, 2, 25_000)
    assert (second.tx, second.rx, second.rx_size, second.echoed, second.rtt_us) == (12, 4, 99, 8, 40_000)
    path.use = Use.STANDBY
    assert probe(path, 0.5).use is Use.STANDBY
    assert path.probe_at == 0.75


def test_a_padded_probe_is_as_long_as_asked_and_what_it_proves_is_told_by_its_echo() -> None:
    path = client_path()
    plain = path.next_probe(0.0, 0.25, 0, 0, (), 1420)
    assert len(plain) == 1420
    assert decode_probe_untrusted(memoryview(plain)).is_sized
    assert path.was_padded
    assert path.echo_received(1, 1, 0.0, 1, 1, 0.1) == 1420
    assert not probe(path, 0.25).is_sized
    assert not path.was_padded
    assert path.echo_received(2, 2, 0.0, 2, 2, 0.3) == 0


def test_an_echo_of_no_probe_of_ours_proves_nothing() -> None:
    path = client_path()
    seq = probe(path, 0.0).seq
    assert path.echo_received(seq + 1, 1, 0.0, 1, 1, 0.1) is None
    assert (path.rtt, path.unanswered, path.silent_since) == (None, 1, 0.0)
    assert path.echo_received(seq, 1, 0.0, 1, 1, 0.1) == 0
    assert path.echo_received(seq, 1, 0.0, 1, 1, 0.9) is None
    assert path.rtt == pytest.approx(0.1)


def test_the_round_trip_leaves_out_what_the_server_held_and_is_smoothed() -> None:
    path, srtt, var = client_path(), None, 0.0
    rng = random.Random(4)
    for n in range(50):
        now, rtt, held = float(n), 0.05 + 0.1 * rng.random(), 0.2 * rng.random()
        path.echo_received(probe(path, now).seq, n + 1, held, 1, 1, now + rtt + held)
        if srtt is None:
            srtt, var = rtt, rtt / 2
        else:  # RFC 6298, 2.3
            var, srtt = 0.75 * var + 0.25 * abs(srtt - rtt), 0.875 * srtt + 0.125 * rtt
        assert path.rtt == pytest.approx(srtt)
        assert path.jitter == pytest.approx(var)
    assert 0.05 <= path.min_rtt < 0.06


def test_an_unasked_echo_shows_the_way_down_and_not_the_way_up() -> None:
    path = client_path()
    probe(path, 0.0)
    path.heard_unasked(5, 0.5)
    assert (path.echoed, path.heard_at, path.unanswered, path.silent_since) == (5, 0.5, 1, 0.0)
    path.heard_unasked(4, 0.6)
    assert path.echoed == 5


def test_data_and_copies_that_come_in_answer_no_probe() -> None:
    path = client_path()
    path.echo_received(probe(path, 0.0).seq, 1, 0.0, 1, 1, 0.1)
    path.answered(0.1)
    for n in range(5):
        probe(path, 1.0 + n / 4)
        path.received(100, 100_000, 1452)
    assert (path.heard_at, path.unanswered, path.silent_since) == (0.1, 5, 1.0)
    assert path.fell_silent(2.0)


def test_a_silent_path_gets_copies_for_30_seconds() -> None:
    path = client_path()
    assert not path.is_silent(1e9)
    probe(path, 10.0)
    probe(path, 20.0)
    assert not path.is_silent(40.0)
    assert path.is_silent(40.1)
    path.echo_received(2, 1, 0.0, 1, 1, 40.2)
    assert not path.is_silent(1e9)


def test_after_32_kib_either_way_a_probe_is_due_but_no_two_within_20_ms() -> None:
    path = client_path()
    probe(path, 1.0)
    path.sent(10, 32 * 1024 - 1 - 112)
    assert path.probe_at == 1.25
    path.received(1, 113, 113)
    assert path.probe_at == pytest.approx(1.02)
    probe(path, 1.02)
    assert path.probe_at == pytest.approx(1.27)


def test_records_tell_of_the_newest_echo_and_how_long_ago_that_was() -> None:
    path = client_path()
    assert path.record(1.0) == Record(3, NO_NEWS, 0)
    path.heard_unasked(4, 2.0)
    assert path.record(2.5) == Record(3, 500, 4)
    assert path.record(500.0) == Record(3, NO_NEWS, 4)


def test_a_new_socket_counts_from_nothing_and_keeps_totals_and_port() -> None:
    path = client_path()
    path.port = 4711
    for n in range(3):
        path.sent(9, 900)
        path.echo_received(probe(path, float(n)).seq, n + 1, 0.0, n, n, n + 0.1)
    lost = path.loss_up.lost
    assert lost
    path.opened(78, 9.0)
    assert (path.tx, path.rx, path.echoed, path.rtt, path.carries, path.port) == (0, 0, 0, None, 0, 4711)
    assert probe(path, 9.0).seq == 1
    assert path.echo_received(1, 1, 0.0, 1, 1, 9.1) == 0
    assert path.loss_up.lost == lost
    path.renew(79, 10.0)
    assert (path.incarnation, path.probe_at, path.tx, path.is_open) == (79, 10.0, 0, True)


def test_probes_that_are_never_answered_are_forgotten() -> None:
    path = client_path()
    for n in range(3 * MAX_PENDING):
        probe(path, n / 50)
    assert len(path._pending) == MAX_PENDING
    assert path.echo_received(1, 1, 0.0, 1, 1, 100.0) is None
    assert path.echo_received(3 * MAX_PENDING, 1, 0.0, 1, 1, 100.0) == 0
    assert len(path._pending) < MAX_PENDING


def test_what_the_kernel_did_not_take_was_not_sent() -> None:
    path = client_path()
    path.sent(10, 1000)
    path.not_sent(3, 300, "ENOBUFS")
    path.not_sent(1, 100, "ENOBUFS")
    assert (path.tx, path.tx_bytes, path.errors) == (6, 600, {"ENOBUFS": 2})


def test_status_has_everything_in_its_units() -> None:
    path = client_path()
    path.echo_received(probe(path, 0.0).seq, 1, 0.0, 1, 1, 0.05)
    path.answered(0.05)
    shown = path.status()
    assert (shown["id"], shown["state"], shown["rtt_ms"], shown["jitter_ms"]) == (3, "up", 50.0, 25.0)
    assert (shown["loss_up"], shown["lost_up"], shown["tx"]) == (None, 0, 1)


# -- the server's side -------------------------------------------------------------------------------------


def made(seq: int = 1, *, interval: float = 0.25, incarnation: int = 77, **more: Any) -> Probe:
    fields: dict[str, Any] = {"tx": seq, "rx": 0, "packets": 0} | more
    return Probe(3, incarnation, seq, round(interval * 1000), 0, **fields)


def bound(now: float = 0.0, *, endpoint: object = HOME, **more: Any) -> ServerPath:
    """Return a path whose client has answered a challenge."""
    path = ServerPath(3, now)
    assert path.is_newer(1, 0)
    assert path.challenge(endpoint, made(**more), now, random.Random(1).randbytes) is not None
    assert path.candidate is not None
    path.bind(path.candidate, now)
    return path


def entropy() -> Callable[[int], bytes]:
    numbers = count(1)
    return lambda n: next(numbers).to_bytes(n, "big")


def test_a_probe_counts_once_and_only_if_it_is_newer_by_session_and_counter() -> None:
    path = ServerPath(3, 0.0)
    assert path.is_newer(1, 10)
    assert not path.is_newer(1, 10)
    assert not path.is_newer(1, 9)
    assert path.is_newer(1, 11)
    assert path.is_newer(2, 0)
    assert not path.is_newer(1, 1000)
    assert not path.is_newer(2, 0)


def test_an_address_is_bound_by_its_answer_and_not_by_its_probe() -> None:
    path = ServerPath(3, 0.0)
    token = path.challenge(HOME, made(), 0.0, entropy())
    assert token is not None
    assert len(token) == 16
    assert (path.endpoint, path.state) == (None, PathState.CANDIDATE)
    assert path.update(1.0) is PathState.CANDIDATE
    candidate = path.candidate
    assert candidate is not None
    path.bind(candidate, 0.1)
    assert (path.endpoint, state(path)) == (HOME, PathState.FRESH)
    assert path.candidate is not candidate


def test_a_challenge_to_another_address_leaves_the_endpoint_in_use() -> None:
    path = bound()
    assert path.challenge(THIEF, made(2), 1.0, entropy()) is not None
    assert (path.endpoint, path.state) == (HOME, PathState.FRESH)
    assert path.update(3.01) is PathState.LAPSED  # and it refreshes nothing


def test_one_candidate_gets_the_same_bytes_for_three_seconds_and_then_others() -> None:
    path, fresh = ServerPath(3, 0.0), entropy()
    tokens = [path.challenge(HOME, made(), n * 0.25, fresh) for n in range(24)]
    assert None not in tokens
    assert [len({*tokens[:12]}), len({*tokens[12:]}), len({*tokens})] == [1, 1, 2]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 0.4), st.sampled_from([HOME, AWAY, THIEF])), max_size=60))
def test_no_path_challenges_more_than_four_times_a_second_and_no_bytes_serve_two_addresses(
    probes: list[tuple[float, object]],
) -> None:
    path, fresh, now = ServerPath(3, 0.0), entropy(), 0.0
    sent: list[float] = []
    meant_for: dict[bytes, object] = {}
    for wait, endpoint in probes:
        now += wait
        token = path.challenge(endpoint, made(), now, fresh)
        if token is not None:
            sent.append(now)
            assert meant_for.setdefault(token, endpoint) == endpoint
            assert path.candidate is not None
            assert path.candidate.is_answered_by(token, now)
    assert all(later - earlier >= 0.25 - 1e-9 for earlier, later in pairwise(sent))


def test_a_path_is_fresh_for_three_seconds_and_then_lapsed() -> None:
    path = bound(100.0)
    assert path.update(103.0) is PathState.FRESH
    assert path.update(103.01) is PathState.LAPSED
    assert path.unasked_at == 103.01
    path.adopt(made(2), 110.0)
    assert (path.update(110.0), path.unasked_at) == (PathState.FRESH, 111.0)


def test_a_slow_path_is_fresh_for_four_round_trips() -> None:
    path = bound(100.0, rtt_us=2_000_000)
    assert path.update(108.0) is PathState.FRESH
    assert path.update(108.01) is PathState.LAPSED


def test_a_path_that_announced_a_pause_is_idle_until_five_seconds_after_it() -> None:
    path = bound(100.0, interval=25.0)
    assert path.update(103.0) is PathState.FRESH
    assert path.update(103.01) is PathState.IDLE
    assert path.update(130.0) is PathState.IDLE
    assert path.update(130.01) is PathState.LAPSED
    assert bound(0.0, interval=1.0).update(3.01) is PathState.LAPSED
    assert bound(0.0, interval=1.1).update(3.01) is PathState.IDLE


def test_an_idle_path_has_16_kib_until_its_next_probe() -> None:
    path = bound(100.0, interval=25.0)
    path.idle_room -= 10_000
    path.adopt(made(2, interval=25.0), 125.0)
    assert path.idle_room == IDLE_BYTES == 16 * 1024


@pytest.mark.parametrize(("interval", "after"), [(0.25, 30.0), (12.0, 30.0), (25.0, 55.0), (100.0, 205.0)])
def test_a_path_is_forgotten_after_its_time(interval: float, after: float) -> None:
    path = bound(100.0, interval=interval)
    assert path.forgotten_at() == 100.0 + after
    path.adopt(made(2, interval=interval), 110.0)
    assert path.forgotten_at() == 110.0 + after


def test_a_candidate_that_never_answers_is_forgotten() -> None:
    path = ServerPath(3, 100.0)
    path.challenge(THIEF, made(interval=100_000.0), 100.0, entropy())
    assert path.forgotten_at() == path.next_deadline() == 130.0


@pytest.mark.parametrize("interval", [0.25, 25.0])
def test_the_deadline_of_a_path_is_when_its_state_changes(interval: float) -> None:
    path, now = bound(100.0, interval=interval), 100.0
    path.unasked_at = INF
    states = []
    while path.next_deadline() < path.forgotten_at():
        before, now = path.state, path.next_deadline()
        assert path.update(now - 0.002) is before
        assert path.update(now) is not before
        states.append(path.state)
        path.unasked_at = INF
    assert states == ([PathState.LAPSED] if interval < 1 else [PathState.IDLE, PathState.LAPSED])
    assert path.next_deadline() == path.forgotten_at()


def test_data_copies_and_errors_refresh_nothing() -> None:
    path = bound(100.0)
    path.received(100, 100_000, 1452)
    path.sent(100, 100_000)
    path.not_sent(1, 1000, "ECONNREFUSED")
    assert path.refreshed_at == 100.0
    assert path.update(103.01) is PathState.LAPSED


def test_the_record_of_another_path_refreshes_once_for_each_echo_that_was_heard() -> None:
    path = bound(100.0)
    for number in (1, 2, 3):
        assert path.next_number(100.0, 0) == number
    path.reported_by_another(Record(3, 0, 2), 0, 110.0)
    assert (path.refreshed_at, path.update(110.0)) == (110.0, PathState.FRESH)
    path.reported_by_another(Record(3, 0, 2), 0, 120.0)
    path.reported_by_another(Record(3, 0, 1), 0, 120.0)
    path.reported_by_another(Record(3, 0, 4), 0, 120.0)  # of an ECHO that was never sent
    path.reported_by_another(Record(3, 0, 0), 0, 120.0)
    assert path.refreshed_at == 110.0
    path.reported_by_another(Record(3, 0, 3), 0, 121.0)
    assert path.refreshed_at == 121.0


def test_what_another_path_tells_of_an_echo_shows_the_queue_that_it_stood_in_and_counts_once() -> None:
    path = bound(100.0)
    hour_us = 3_600_000_000  # by which the client's clock is ahead
    for number, queue in enumerate((0.0, 0.2, 0.4), 1):
        sent_us = number * 1_000_000
        path.sent(10, 10_000)
        path.next_number(100.0 + number, sent_us)
        arrived_us = hour_us + sent_us + round((0.03 + queue) * 1e6)
        arrival = path.reported_by_another(Record(3, 70, number), arrived_us + 70_000, 100.6 + number)
        if number == 1:  # nobody knows yet what part of it is a queue
            assert arrival is None
            path.adopt(made(2, echoed=1, queue_us=0), 101.8)
        else:
            assert arrival == (arrived_us, (10 * number + 1, 10_000 * number))
        assert path.way_out.newest() == pytest.approx(queue)
    path.adopt(made(3, echoed=3, queue_us=900_000), 104.0)
    assert path.way_out.newest() == pytest.approx(0.4), "that was told before"
    path.next_number(104.0, 4_000_000)
    path.adopt(made(4, echoed=4, queue_us=100_000), 105.0)
    assert path.way_out.newest() == pytest.approx(0.1)
    assert path.reported_by_another(Record(3, 0, 4), hour_us, 106.0) is None


def test_a_record_that_is_older_than_what_it_speaks_of_is_of_an_earlier_socket() -> None:
    path = bound(100.0)
    path.next_number(100.0, 0)
    assert path.reported_by_another(Record(3, 5000, 1), 0, 101.0) is None
    assert (path.reported, path.refreshed_at) == (0, 100.0)
    ours = client_path()
    seq = probe(ours, 10.0).seq
    assert ours.reported_by_another(Record(3, 5000, seq), 0, 11.0) is None
    assert ours.reached_at == -INF
    assert ours.reported_by_another(Record(3, 500, seq), 0, 11.0) is not None
    assert ours.reached_at == 11.0


def test_what_the_paths_own_probe_has_reported_is_no_news_from_another() -> None:
    path = bound(100.0, interval=25.0)
    path.next_number(100.0, 0)
    path.next_number(100.0, 0)
    path.adopt(made(2, interval=25.0, echoed=2), 101.0)
    path.reported_by_another(Record(3, 24_000, 2), 0, 125.0)
    assert path.refreshed_at == 101.0


def test_a_path_without_endpoint_is_refreshed_by_no_record() -> None:
    path = ServerPath(3, 0.0)
    path.number = 10
    path.reported_by_another(Record(3, 0, 5), 0, 1.0)
    assert (path.refreshed_at, path.state) == (-INF, PathState.CANDIDATE)


def test_a_new_incarnation_begins_all_counts_anew() -> None:
    path = bound(100.0)
    path.sent(50, 5000)
    path.received(40, 4000, 1452)
    path.next_number(100.0, 0)
    path.reported_by_another(Record(3, 0, 1), 0, 101.0)
    path.adopt(made(1, incarnation=78), 102.0)
    assert (path.tx, path.rx, path.number, path.reported, path.rx_size, path.incarnation) == (0, 0, 0, 0, 0, 78)
    assert (path.tx_bytes, path.rx_bytes) == (5000, 4000)


def test_a_record_tells_of_the_newest_probe_and_how_long_ago_that_was() -> None:
    path = ServerPath(3, 0.0)
    assert path.record(1.0) == Record(3, NO_NEWS, 0)
    path = bound(100.0, seq=7)
    assert path.record(100.5) == Record(3, 500, 7)
    assert path.record(300.0) == Record(3, NO_NEWS, 7)


# -- both sides together: what each says it has lost is what was lost --------------------------------------


class Wires:
    """A client's path and the server's, between them datagrams that arrive at once or never."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.client, self.server = client_path(), ServerPath(3, 0.0)
        self.lost_up = self.lost_down = 0
        self.loss = 0.0
        self.now = 0.0

    def up(self, number: int) -> bool:
        arrives = self.rng.random() >= self.loss
        self.client.sent(number, 100 * number)
        self.lost_up += 0 if arrives else number
        if arrives and self.server.endpoint is not None:
            self.server.received(number, 100 * number, 100)
        return arrives

    def down(self, number: int) -> bool:
        arrives = self.rng.random() >= self.loss
        self.server.sent(number, 100 * number)
        self.lost_down += 0 if arrives else number
        if arrives:
            self.client.received(number, 100 * number, 100)
        return arrives

    def probe(self) -> None:
        self.now += 0.25
        plain = self.client.next_probe(self.now, 0.25, 0, 0, (), 0)
        sent = decode_probe_untrusted(memoryview(plain))
        if self.up(1):
            if self.server.endpoint is None:
                self.bind(sent)
            else:
                self.server.adopt(sent, self.now)
                self.echo(sent)

    def bind(self, sent: Probe) -> None:
        assert self.server.challenge(HOME, sent, self.now, entropy()) is not None
        self.client.received(1, 92, 92)
        self.client.challenged()
        self.client.sent(1, 92)
        for _ in range(20):
            self.client.sent(1, 100)  # was under way: it arrived, but nobody was bound to count it
        assert self.server.candidate is not None
        self.server.bind(self.server.candidate, self.now)
        self.loss = 0.0
        self.echo(sent)

    def echo(self, sent: Probe) -> None:
        number, tx, rx = self.server.next_number(100.0, 0), self.server.tx + 1, self.server.rx
        if self.down(1):
            self.client.echo_received(sent.seq, number, 0.0, tx, rx, self.now)

    def busy(self, turns: int, loss: float) -> None:
        for _ in range(turns):
            self.loss = loss
            self.up(self.rng.randrange(20))
            self.down(self.rng.randrange(20))
            self.probe()


@pytest.mark.parametrize("seed", range(6))
def test_both_sides_count_exactly_what_was_lost(seed: int) -> None:
    wires = Wires(seed)
    wires.probe()
    wires.probe()
    wires.busy(100, loss=0.3)
    wires.loss = 0.0
    wires.probe()
    assert wires.lost_up > 0 < wires.lost_down
    assert wires.client.loss_up.lost == wires.server.loss_up.lost == wires.lost_up
    assert wires.client.loss_down.lost == wires.lost_down


def test_a_path_that_the_server_had_forgotten_goes_on_with_sound_counts() -> None:
    wires = Wires(9)
    wires.probe()
    wires.busy(40, loss=0.0)
    echoed = wires.client.echoed
    wires.loss = 1.0
    for _ in range(10):
        wires.up(10)
        wires.probe()
        wires.loss = 1.0
    wires.server = ServerPath(3, 40.0)
    wires.loss = 0.0
    wires.probe()
    assert wires.client.loss_up.lost == wires.lost_up == 110
    assert wires.client.echoed == 1 < echoed  # else no record of it would be believed
    wires.busy(40, loss=0.0)
    assert wires.client.loss_up.lost == 110
    assert wires.client.loss_down.lost == 0
    assert wires.client.loss_down.recent() == 0.0


def test_an_echo_that_was_overtaken_by_a_later_one_is_not_a_forgetful_server() -> None:
    path = client_path()
    probe(path, 0.0)
    probe(path, 0.25)
    path.heard_unasked(3, 0.3)
    path.echo_received(2, 2, 0.0, 2, 2, 0.3)
    path.echo_received(1, 1, 0.0, 1, 1, 0.4)
    assert (path.echoed, path.loss_up.lost) == (3, 0)
    path.echo_received(probe(path, 0.5).seq, 4, 0.0, 4, 3, 0.6)
    assert path.echoed == 4
