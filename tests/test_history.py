"""Accounts over time: windows, what is shown afresh, and what the other end tells."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel.history import HOUR, MINUTE, STEPS, History, Told, path_receipt
from mptunnel.messages import MAX_PATHS, PathReceipt, Receipt, decode_receipt_untrusted

MOD32 = 1 << 32


def account(packets: int, lost: int = 0) -> Receipt:
    """Return an account that has grown in all its counts."""
    of = PathReceipt(1, given=packets, lost=lost, first=packets // 2, missed=packets // 3, bridged=packets // 100)
    return Receipt(packets, packets - lost, lost, packets // 4, paths=3, records=(of,))


def live(history: History, seconds: float, *, begin: float = 0.0, rate: int = 10, every: float = 0.2) -> Receipt:
    """Let an account grow steadily; return how it stands at the end."""
    now, whole = begin, account(round(begin * rate))
    while now < begin + seconds:
        history.step(lambda whole=whole: whole, now)  # type: ignore[misc]
        now += every
        whole = account(round(now * rate))
    return whole


def test_the_last_minute_and_the_last_hour_are_what_was_added_in_them() -> None:
    history = History()
    now = live(history, 10_000.0)
    (_, minute), (_, hour) = history.views(now, 10_000.0)
    assert 600 <= minute.packets <= 600 * (1 + 1 / STEPS) + 2
    assert 36_000 <= hour.packets <= 36_000 * (1 + 1 / STEPS) + 2
    assert path_receipt(hour, 1).first == hour.packets // 2
    assert history.shown(now) == now


def test_after_a_silence_the_windows_are_empty_one_after_the_other() -> None:
    history = History()
    now = live(history, 100.0)
    (_, minute), (_, hour) = history.views(now, 100.0 + MINUTE * 1.1)
    assert (minute.packets, hour.packets) == (0, 1000)
    (_, minute), (_, hour) = history.views(now, 100.0 + HOUR * 1.1)
    assert (minute.packets, hour.packets) == (0, 0)


def test_what_comes_after_a_silence_is_not_counted_into_it() -> None:
    history = History()
    now = live(history, 100.0)
    history.step(lambda: now, 1000.0)
    later = account(1500)
    assert [window.packets for _, window in history.views(later, 1001.0)] == [500, 1500]


def test_gaps_leave_the_windows_when_they_are_old() -> None:
    history = History()
    live(history, 10.0)
    history.gap(MAX_PATHS, 0.5)
    history.gap(1, 2.0)
    now = live(history, 20.0, begin=10.0)
    (_, minute), (_, hour) = history.views(now, 30.0)
    assert (minute.gap, path_receipt(minute, 1).gap, hour.gap) == (0.5, 2.0, 0.5)
    history.gap(MAX_PATHS, 0.1)
    now = live(history, 100.0, begin=30.0)
    history.gap(MAX_PATHS, 0.2)
    (_, minute), (_, hour) = history.views(now, 130.0)
    assert (minute.gap, path_receipt(minute, 1).gap) == (0.2, 0.0)
    assert (hour.gap, path_receipt(hour, 1).gap) == (0.5, 2.0)


def test_what_is_shown_afresh_begins_at_nothing_in_every_window() -> None:
    history = History()
    now = live(history, 100.0)
    history.gap(1, 2.0)
    history.restart(now)
    shown = history.shown(account(1500)._replace(gap=9.0))
    assert (shown.packets, shown.gap, path_receipt(shown, 1).gap) == (500, 0.0, 0.0)
    assert [window.packets for _, window in history.views(now, 101.0)] == [0, 0]
    history.step(lambda: now, 102.0)
    history.gap(1, 0.3)
    assert path_receipt(history.shown(account(1500)), 1).gap == 0.3
    assert [window.packets for _, window in history.views(account(1500), 103.0)] == [500, 500]


def test_a_history_holds_no_more_after_a_day_than_after_an_hour() -> None:
    history = History()
    live(history, 90_000.0, every=1.0)
    assert [len(ring._steps) for ring in history._rings] == [STEPS + 1, STEPS + 1]
    size = sum(len(said) + len(gaps) * gaps.itemsize for ring in history._rings for _, said, gaps in ring._steps)
    assert size < 6000  # bytes, for one path


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, MOD32 // 2 - 1), st.integers(-50, 1000), st.booleans()), max_size=30))
def test_counts_that_go_round_on_the_wire_do_not_go_round_here(life: list[tuple[int, int, bool]]) -> None:
    told, packets, lost = Told(), 5, 3
    first = decode_receipt_untrusted(memoryview(account(packets, lost).encode()))
    assert told.take(first, (1, 0), 0.0)
    for number, (more, more_lost, is_lost_on_its_way) in enumerate(life, 1):
        if (packets - told.account.packets) + more >= MOD32 // 2:  # more than can be told from a step back
            continue
        packets += more
        lost = max(0, lost + more_lost)
        if not is_lost_on_its_way or packets - told.account.packets > MOD32 // 4:
            told.take(decode_receipt_untrusted(memoryview(account(packets, lost).encode())), (1, number), float(number))
            assert (told.account.packets, told.account.lost) == (packets, lost)
            assert path_receipt(told.account, 1).given == packets


def test_an_older_receipt_and_one_of_an_older_session_are_ignored() -> None:
    told = Told()
    assert not told.is_known
    assert told.status(0.0) is told.path_status(1, 0.0) is None
    assert told.take(account(100), (2, 7), 0.0)
    for order in ((2, 7), (2, 6), (1, 99)):
        assert not told.take(account(9), order, 1.0)
    assert told.account.packets == 100
    assert told.take(account(101), (2, 8), 1.0)
    assert told.take(account(102), (3, 0), 1.0)
    anew = Told((2, 0))
    assert not anew.take(account(9), (1, 500), 1.0)  # what the one before said last


def test_a_gap_that_is_told_belongs_to_the_time_in_which_it_is_told() -> None:
    told = Told()
    told.take(account(100)._replace(gap=5.0, recent=0.0), (1, 0), 0.0)
    told.begin_afresh()
    told.take(account(110)._replace(gap=5.0, recent=0.25), (1, 1), 1.0)
    status = told.status(2.0)
    assert status is not None
    assert (status["packets"], status["longest_gap_ms"], status["minute"]["longest_gap_ms"]) == (10, 250, 250)
    told.take(account(120)._replace(gap=6.0, recent=6.0), (1, 2), 2.0)
    status = told.status(3.0)
    assert status is not None
    assert (status["longest_gap_ms"], status["hour"]["longest_gap_ms"]) == (6000, 6000)
