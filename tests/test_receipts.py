"""Receipts against a plain account: who delivered what, and what was lost on every path."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel.gaps import INF
from mptunnel.messages import MAX_PATHS
from mptunnel.noise import SessionKeys
from mptunnel.receipts import SETTLE_AFTER, Receipts
from mptunnel.session import WINDOW, Session
from tests.count import Key, account
from tests.windows import is_fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

MOD32 = 1 << 32


def session(serial: int) -> Session:
    return Session(SessionKeys(bytes(32), bytes(32), serial, serial, is_initiator=False), serial, 0.0, WINDOW)


@dataclass
class Direction:
    """A sender, its paths, and a receiver who keeps receipts; beside them the plain account of what happened."""

    rng: random.Random
    losses: tuple[float, ...]
    delays: tuple[float, ...]
    jitter: float = 0.0
    packets: int = 0  # the sender's count, modulo 2^32 on the wire
    receipts: Receipts = field(default_factory=Receipts)
    now: float = 1.0
    current: Session = field(default_factory=lambda: session(1))
    counter: int = 0
    sealed: set[tuple[int, int]] = field(default_factory=set)
    arrivals: list[tuple[float, int, int, Session, int, int]] = field(default_factory=list)
    came: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    order: dict[Key, int] = field(default_factory=dict)
    copies: list[tuple[float, int, Key]] = field(default_factory=list)
    _order: int = 0

    def rekey(self) -> Session:
        """The next session begins; return the one before."""
        before, self.current, self.counter = self.current, session(self.current.serial + 1), 0
        return before

    def send(self, count: int) -> None:
        """Seal IP packets, and give each to every path."""
        for _ in range(count):
            self.sealed.add((self.current.serial, self.counter))
            self.order[bytes((self.current.serial,)), self.counter] = len(self.order)
            self.packets += 1
            for path, loss in enumerate(self.losses):
                if self.rng.random() >= loss:
                    self._travel(path, -1)
            self.counter += 1

    def mark(self, path: int, loss: float | None = None) -> None:
        """Send a PROBE on one path; it says how many packets were sealed before it."""
        if self.rng.random() >= (self.losses[path] if loss is None else loss):
            self._travel(path, self.packets % MOD32)
        self.counter += 1

    def _travel(self, path: int, packets: int) -> None:
        self._order += 1
        when = self.now + self.delays[path] + self.rng.random() * self.jitter
        self.arrivals.append((when, self._order, path, self.current, self.counter, packets))

    def receive(self, until: float) -> None:
        """Let arrive what arrives by then, as a peer takes it."""
        due = sorted((a for a in self.arrivals if a[0] <= until), key=lambda arrival: arrival[:2])
        self.arrivals = [a for a in self.arrivals if a[0] > until]
        settle_at = INF
        for now, _, path, under, counter, packets in due:
            if settle_at <= now:
                settle_at = self.receipts.settle(self.in_use, now)
            if is_fresh(under.window, counter):
                under.window.mark(counter, path)
                if packets < 0:
                    self.receipts.arrived(under, [counter], now, path)
                else:
                    under.window.mark_control(counter)
                    settle_at = min(settle_at, self.receipts.mark(under, counter, packets, now, path))
            elif under.window.credit_run(counter, 1, path):
                self.receipts.gaps.came((path,), under, counter, counter, now)
            if packets < 0:
                self.came.setdefault((under.serial, counter), []).append(path)
                self.copies.append((now, path, (bytes((under.serial,)), counter)))
        self.now = until
        self.receipts.settle(self.in_use, until)

    @property
    def in_use(self) -> int:
        return (1 << len(self.losses)) - 1

    def check(self, *, is_exact: bool = True) -> None:
        """Compare the receipts with the plain account, all of which is settled by now."""
        got, paths = self.receipts, range(len(self.losses))
        assert got.packets == len(self.sealed)
        assert got.received == len(self.came)
        assert got.lost == len(self.sealed) - len(self.came)
        if is_exact:
            assert got.first[: len(paths)] == [sum(by[0] == path for by in self.came.values()) for path in paths]
            assert got.missed[: len(paths)] == [sum(path not in by for by in self.came.values()) for path in paths]
            assert got.saved == sum(len({*by}) < len(paths) for by in self.came.values())
        assert not any(got.first[len(paths) :] + got.missed[len(paths) :])

    def finish(self) -> None:
        """Send a last mark that arrives, and wait until it is settled."""
        self.receive(self.now + 5.0)
        self.mark(0, loss=0.0)
        self.receive(self.now + 5.0)


def began(
    seed: int, losses: tuple[float, ...], delays: tuple[float, ...], packets: int = 0, **more: float
) -> Direction:
    """Return a direction whose receiver has had the first mark."""
    direction = Direction(random.Random(seed), losses, delays, packets=packets, **more)  # type: ignore[arg-type]
    direction.mark(0, loss=0.0)
    direction.receive(direction.now + 5.0)
    return direction


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]), st.floats(0, 0.6)), min_size=1, max_size=3),
    st.sampled_from([0, 7, MOD32 - 50, MOD32 - 1, 5 * MOD32 - 100]),
    st.lists(st.tuples(st.sampled_from(["send", "send", "mark", "rekey", "pause"]), st.integers(1, 30)), max_size=30),
)
def test_receipts_agree_with_a_plain_account(
    seed: int, paths: list[tuple[float, float]], packets: int, life: list[tuple[str, int]]
) -> None:
    losses, delays = zip(*paths, strict=True)
    direction = began(seed, losses, delays, packets, jitter=0.8)
    old: list[Session] = []
    for what, amount in life:
        match what:
            case "send":
                direction.send(amount)
            case "mark":
                direction.mark(amount % len(losses))
            case "rekey":
                old.append(direction.rekey())
                if len(old) > 1:  # rekeys are far enough apart for all copies to have come
                    direction.receive(direction.now + 3.0)
                    direction.receipts.retire(old.pop(0), direction.in_use)
            case "pause":
                direction.receive(direction.now + amount / 10)
        direction.receive(direction.now + 0.05)
    direction.finish()
    direction.check()
    for session_ in old:
        direction.receipts.retire(session_, direction.in_use)
    direction.check()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32),
    st.lists(st.floats(0, 0.6), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.integers(5, 150), st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=4, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 5),
)
def test_gaps_agree_with_a_plain_account(
    seed: int, delays: list[float], life: list[tuple[int, list[float]]], rekey_at: int
) -> None:
    paths = len(delays)
    direction = began(seed, (0.0,) * paths, tuple(delays), jitter=0.008)  # so that nothing overtakes
    for number, (length, losses) in enumerate([(30, [0.0] * 4), *life, (100, [0.0] * 4)]):
        direction.losses = tuple(losses[:paths])
        for turn in range(length):
            direction.send(1)
            direction.receive(direction.now + 0.01)
            if turn % 25 == 0:
                for path in range(paths):
                    direction.mark(path, loss=0.0)  # a lost one looks like a lost packet
        if number == rekey_at:  # at a time when nothing is lost: else nobody can tell how the older session ended
            direction.losses = (0.0,) * paths
            for _ in range(2):
                for _ in range(100):
                    direction.send(1)
                    direction.receive(direction.now + 0.01)
                if direction.current.serial == 1:
                    direction.rekey()
    direction.finish()
    expected, ways = account(direction.order, direction.copies, paths), direction.receipts.gaps.ways
    gaps = [(direction.receipts.longest_gap * 1e3, expected["longest_gap_ms"])]
    gaps += [(way.longest * 1e3, path["longest_gap_ms"]) for way, path in zip(ways, expected["paths"], strict=False)]
    for found, real in gaps:
        assert found == pytest.approx(real, abs=1e-6)
    for way, path in zip(ways, expected["paths"], strict=False):
        assert way.bridged == path["outages_bridged"]
        assert way.bridged_time == pytest.approx(path["bridged_s"])


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_come_later_than_two_seconds_are_added_when_they_come(seed: int) -> None:
    direction = began(seed, (0.5, 0.5), (0.01, 4.0), jitter=2.0)
    for _ in range(40):
        direction.send(5)
        direction.mark(0)
        direction.receive(direction.now + 0.25)
    direction.finish()
    direction.receive(direction.now + 5.0)
    direction.check(is_exact=False)


def test_a_rekey_with_data_on_both_sides_of_it_looks_like_no_loss() -> None:
    direction = began(1, (0.0,), (0.05,))
    direction.send(100)
    direction.mark(0)
    direction.receive(direction.now + 0.3)
    direction.send(50)  # behind the last mark of its session
    before = direction.rekey()
    direction.send(50)
    direction.receive(direction.now + 0.3)
    direction.mark(0)
    direction.receive(direction.now + 3.0)
    assert (direction.receipts.lost, direction.receipts.received) == (0, 200)
    direction.receipts.retire(before, 1)
    assert (direction.receipts.lost, direction.receipts.received) == (0, 200)


def test_the_account_goes_on_when_the_senders_count_goes_round() -> None:
    direction = began(2, (0.1,), (0.02,), packets=MOD32 - 120)
    for _ in range(60):
        direction.send(20)
        direction.mark(0)
        direction.receive(direction.now + 0.25)
    assert direction.receipts.lost > 0
    direction.finish()
    direction.check()


def test_a_sender_that_has_begun_anew_gets_a_new_account_with_nothing_of_the_old_one_in_it() -> None:
    direction = began(3, (0.0, 0.5), (0.02, 0.04))
    direction.send(300)
    direction.receive(direction.now + 0.1)
    old = direction.rekey()
    direction.receipts = direction.receipts.successor()
    nothing = {
        "packets": 0, "received": 0, "saved": 0, "lost": 0, "longest_gap_ms": 0.0, "outages_bridged": 0,
        "bridged_s": 0.0,
    }  # fmt: skip
    assert direction.receipts.status(direction.now) == {**nothing, "minute": nothing, "hour": nothing}
    direction.packets = 0
    direction.sealed.clear()
    direction.came.clear()
    direction.mark(0)
    direction.receive(direction.now + 3.0)
    direction.losses = (1.0, 0.5)
    direction.send(100)
    direction.finish()
    direction.receipts.retire(old, 3)
    direction.check()


def test_a_session_may_end_with_data_that_no_mark_has_covered() -> None:
    direction = began(4, (0.0,), (0.02,))
    direction.send(10)
    direction.receive(direction.now + 0.1)
    direction.receipts.retire(direction.current, 1)
    assert direction.receipts.received == 10
    direction.rekey()
    direction.mark(0)
    direction.receive(direction.now + 3.0)
    direction.check()


def test_marks_that_are_not_newer_than_the_last_one_are_ignored() -> None:
    receipts, first, second = Receipts(), session(1), session(2)
    for under in (first, second):
        for counter in range(20):
            under.window.mark(counter, 0)
            under.window.mark_control(counter)
    assert receipts.mark(second, 5, 10, 1.0) == 1.0 + SETTLE_AFTER
    receipts.mark(second, 4, 9999, 2.0)
    receipts.mark(first, 19, 9999, 2.0)
    assert receipts.settle(1, 10.0) == INF
    assert receipts.packets == 0
    receipts.mark(second, 6, 12, 11.0)
    receipts.settle(1, 20.0)
    assert receipts.packets == 2


def test_marks_are_taken_five_times_a_second_at_most() -> None:
    receipts, under = Receipts(), session(1)
    for counter in range(1000):
        under.window.mark(counter, 0)
        under.window.mark_control(counter)
        receipts.mark(under, counter, 0, counter / 1000)
    assert len(receipts._marks) <= 6


def test_a_full_window_is_read_before_it_forgets() -> None:
    receipts, under, count = Receipts(), session(1), WINDOW * 3
    receipts.mark(under, 0, 0, 1.0)
    for at in range(0, count, 64):
        under.window.mark_run(at, 64, at // 64 % 2)
        receipts.arrived(under, list(range(at, at + 64)), 1.0)
        if at % 8192 == 0 and at:
            under.window.mark_control(at)
            now = 1.0 + at / 1e7  # far sooner than two seconds
            if receipts.mark(under, at, at - at // 8192, now) <= now:
                receipts.settle(3, now)
    receipts.retire(under, 3)
    controls = len(range(8192, count, 8192))
    assert receipts.received == count - controls
    assert sum(receipts.first) == receipts.saved == count - controls
    assert receipts.lost == 0


def test_silence_without_loss_is_no_gap_and_with_loss_it_is() -> None:
    direction = began(5, (0.0,), (0.02,))
    for _ in range(5):
        direction.send(10)
        direction.receive(direction.now + 3.0)
        direction.mark(0)
        direction.receive(direction.now + 0.3)
    assert direction.receipts.longest_gap == 0.0
    direction.send(1)  # after a silence of three seconds, in which nothing was due
    direction.receive(direction.now + 0.1)
    direction.losses = (1.0,)
    direction.send(10)
    direction.receive(direction.now + 0.4)
    direction.losses = (0.0,)
    direction.send(10)
    direction.finish()
    assert direction.receipts.lost == 10
    assert direction.receipts.longest_gap == pytest.approx(0.5)
    assert direction.receipts.status(direction.now)["longest_gap_ms"] == pytest.approx(500)


def test_a_loss_after_a_long_silence_does_not_make_that_a_gap() -> None:
    direction = began(6, (0.0,), (0.02,))
    direction.send(1)
    for _ in range(20):  # the tunnel is idle
        direction.receive(direction.now + 25.0)
        direction.mark(0)
    direction.receive(direction.now + 1.0)
    direction.losses = (1.0,)
    direction.send(1)
    direction.losses = (0.0,)
    direction.send(1)
    direction.finish()
    assert direction.receipts.lost == 1
    assert direction.receipts.longest_gap <= 1.0


def test_what_a_slow_path_brings_after_all_is_no_gap() -> None:
    direction = began(7, (0.0, 0.0), (0.02, 0.6))
    for turn in range(20):
        direction.losses = (1.0 if turn == 10 else 0.0, 0.0)
        direction.send(5)
        direction.receive(direction.now + 0.1)
        direction.mark(0)
        direction.receive(direction.now + 0.1)
    direction.finish()
    direction.check()
    assert direction.receipts.longest_gap == 0.0


def test_data_that_came_by_no_bound_path_is_received_and_first_by_nobody() -> None:
    receipts, under = Receipts(), session(1)
    under.window.mark_run(0, 5)
    receipts.arrived(under, [0, 1, 2, 3, 4], 1.0)
    receipts.retire(under, 1)
    assert (receipts.received, receipts.first, receipts.missed[0]) == (5, [0] * MAX_PATHS, 5)


def calls(work: Callable[[], object]) -> int:
    """Return how many functions of Python and of C some work calls, itself included."""
    found = 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal found
        found += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found - 1  # without the setprofile that ends it


@pytest.mark.parametrize("length", [1, 64])
def test_a_batch_costs_a_handful_of_calls_however_long_it_is(length: int) -> None:
    receipts, under = Receipts(), session(1)
    receipts.mark(under, 0, 0, 0.5, 0)
    receipts.settle(3, 3.0)
    for at in range(1, 1 + 4 * length, length):
        under.window.mark_run(at, length, 0)
        receipts.arrived(under, list(range(at, at + length)), 4.0 + at / 1e6, 0)
    at = 1 + 4 * length
    under.window.mark_run(at, length, 0)
    assert (
        calls(lambda: receipts.arrived(under, list(range(at, at + length)), 4.001, 0)) <= 5
    )  # also the lambda, and min
    under.window.credit_run(at, length, 1)
    assert calls(lambda: receipts.gaps.came((1,), under, at, at + length - 1, 4.001)) <= 2


def test_what_is_settled_costs_calls_per_mark_and_slices_per_packet() -> None:
    figures = []
    for count in (100, 10_000):
        receipts, under = Receipts(), session(1)
        receipts.mark(under, 0, 0, 0.5, 0)
        receipts.settle(3, 3.0)
        under.window.mark_run(1, count, 0)
        under.window.mark(count + 1, 0)
        under.window.mark_control(count + 1)
        receipts.arrived(under, list(range(1, count + 1)), 4.0, 0)
        receipts.mark(under, count + 1, count, 4.0, 0)
        figures.append(calls(lambda receipts=receipts: receipts.settle(3, 6.0)))  # type: ignore[misc]
        assert (receipts.received, receipts.missed[:2]) == (count, [0, count])
    assert figures[0] == figures[1] < 200
