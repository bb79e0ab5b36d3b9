"""One lane of a wire, told the time: no namespaces, no waiting."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.wires import Lane, Weather


def lane(seed: str = "seed", **weather: float | bool) -> Lane:
    made = Lane(seed)
    made.weather = Weather(**weather)  # type: ignore[arg-type]
    return made


def pattern(of: Lane, packets: int = 1000) -> list[bool]:
    return [bool(of.arrivals(100, n / 1000)) for n in range(packets)]


def test_a_quiet_lane_delivers_at_once() -> None:
    assert lane().arrivals(1500, 3.0) == (3.0,)


def test_the_same_seed_loses_the_same_packets() -> None:
    assert pattern(lane("a", loss=0.2)) == pattern(lane("a", loss=0.2))


def test_another_seed_loses_others() -> None:
    assert pattern(lane("a", loss=0.2)) != pattern(lane("b", loss=0.2))


def test_jitter_and_duplication_do_not_shift_the_pattern_of_losses() -> None:
    assert pattern(lane("a", loss=0.2, jitter=0.01, duplicate=0.3)) == pattern(lane("a", loss=0.2))


def test_loss_is_as_frequent_as_asked_for() -> None:
    assert 1800 < pattern(lane(loss=0.2), 10_000).count(False) < 2200


def test_a_cut_lane_delivers_nothing_and_counts_it() -> None:
    cut = lane(is_cut=True)
    assert not any(pattern(cut, 10))
    assert cut.counts.cut == cut.counts.packets == 10


def test_what_is_kept_leaves_in_order_at_the_end() -> None:
    keeping = lane(delay=0.020, kept_until=5.0)
    assert [keeping.arrivals(100, now) for now in (3.0, 4.999, 5.0, 6.0)] == [(5.02,), (5.02,), (5.02,), (6.02,)]
    keeping.weather.rate = 1000.0
    assert [keeping.arrivals(100, 3.0) for _ in range(2)] == [(6.02,), (6.02,)]
    keeping.weather.kept_until = 7.0
    assert [keeping.arrivals(100, 6.0) for _ in range(2)] == [pytest.approx((7.12,)), pytest.approx((7.22,))]


def test_delay_is_exact_and_jitter_stays_within_its_bounds() -> None:
    late = lane(delay=0.020, jitter=0.010)
    delays = [late.arrivals(100, now)[0] - now for now in range(100)]
    assert all(0.020 <= delay <= 0.0301 for delay in delays)
    assert max(delays) - min(delays) > 0.005


@given(st.lists(st.floats(0, 0.01), min_size=2, max_size=200))
def test_jitter_alone_never_reorders(pauses: list[float]) -> None:
    late, now, last = lane(delay=0.01, jitter=0.05), 0.0, 0.0
    for pause in pauses:
        now += pause
        (due,) = late.arrivals(100, now)
        assert due >= last
        last = due


def test_jitter_reorders_where_asked_for() -> None:
    late = lane(jitter=0.05, reorder=True)
    arrivals = [late.arrivals(100, n / 1000)[0] for n in range(100)]
    assert arrivals != sorted(arrivals)


def test_a_rate_spaces_packets_out_and_its_buffer_overflows() -> None:
    slow = lane(rate=100_000.0, buffer=3000)
    arrivals = [slow.arrivals(1000, 0.0) for _ in range(5)]
    assert arrivals[:3] == [pytest.approx((0.01,)), pytest.approx((0.02,)), pytest.approx((0.03,))]
    assert arrivals[3:] == [(), ()]
    assert slow.counts.overflowed == 2
    assert slow.arrivals(1000, 0.02) == pytest.approx((0.04,)), "the buffer has emptied meanwhile"


def test_a_packet_longer_than_the_lanes_mtu_vanishes() -> None:
    narrow = lane(mtu=1300)
    assert narrow.arrivals(1300, 0.0)
    assert not narrow.arrivals(1301, 0.0)
    assert narrow.counts.too_long == 1


def test_duplicates_arrive_twice() -> None:
    assert lane(duplicate=1.0).arrivals(100, 5.0) == (5.0, 5.0)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 1500), st.booleans())
def test_every_packet_is_counted_exactly_once(loss: float, duplicate: float, mtu: int, is_cut: bool) -> None:
    any_lane = lane(loss=loss, duplicate=duplicate, mtu=mtu, is_cut=is_cut, rate=1e5, buffer=5000)
    copies = sum(len(any_lane.arrivals(100 * n, n / 1000)) for n in range(1, 50))
    counts = asdict(any_lane.counts)
    assert counts["packets"] == 49
    assert sum(counts[name] for name in ("delivered", "cut", "lost", "overflowed", "too_long")) == 49
    assert copies == counts["delivered"] + counts["duplicated"]
