"""Transport keys: a counter is used once, a datagram is let in once, and only if it is authentic."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mptunnel.messages import HEADER_SIZE, OVERHEAD, TRANSPORT_HEADER
from mptunnel.noise import SessionKeys
from mptunnel.session import (
    CONTROL,
    FIRST_PATH,
    MAX_RUN,
    MAX_SEGMENTS,
    NARROW_WINDOW,
    NO_PATH,
    REJECT_AFTER_MESSAGES,
    REKEY_AFTER_MESSAGES,
    WINDOW,
    Opened,
    ReplayWindow,
    Session,
    read_counters,
    runs,
    same_headers,
    sealed_size,
)
from tests.windows import is_fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_A, KEY_B = b"\x0a" * 32, b"\x0b" * 32


def pair(width: int = NARROW_WINDOW) -> tuple[Session, Session]:
    """Return the two ends of a session made at 0 s; the first is its initiator."""
    return (
        Session(SessionKeys(KEY_A, KEY_B, 1, 2, is_initiator=True), 1, 0.0, width),
        Session(SessionKeys(KEY_B, KEY_A, 2, 1, is_initiator=False), 1, 0.0, width),
    )


def seal_at(sender: Session, counter: int, plain: bytes = b"") -> bytes:
    sender.counter = counter
    return sender.seal(plain)


def deliver(receiver: Session, datagrams: Sequence[bytes], path: int | None = None, now: float = 1.0) -> Opened:
    """Open datagrams that came in one run: all of one size, the last perhaps shorter."""
    return receiver.open(b"".join(datagrams), len(datagrams[0]), path, now)


def accepts(receiver: Session, sender: Session, counter: int) -> bool:
    return len(deliver(receiver, [seal_at(sender, counter)]).plain) == 1


def plains(count: int, size: int = 64) -> list[bytes]:
    return [bytes((number % 256,)) * size for number in range(count)]


# -- the window --------------------------------------------------------------------------------------------

WIDTHS = st.sampled_from([1, 2, 63, 64, 100, 8128, NARROW_WINDOW, WINDOW - 1, WINDOW]) | st.integers(1, WINDOW)
STARTS = st.sampled_from([0, WINDOW - 3, 5 * WINDOW - 2, (1 << 63) - 1, REJECT_AFTER_MESSAGES - 9 * WINDOW])


@settings(deadline=None, max_examples=150)
@given(WIDTHS, STARTS, st.data())
def test_the_window_agrees_with_a_plain_set(width: int, start: int, data: st.DataObject) -> None:
    window, top = ReplayWindow(width), -1
    accepted: dict[int, tuple[int, int]] = {}  # counter: who was first, bits of all paths
    near = st.integers(-3, 3) | st.sampled_from([-width, 1 - width, -WINDOW, 1 - WINDOW, WINDOW]) | st.integers(-400, 9)
    for _ in range(data.draw(st.integers(1, 25))):
        first = max(0, (start if top < 0 else top) + data.draw(near | st.integers(0, 3 * WINDOW)))
        count, path = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 7))
        run = range(first, first + count)
        fresh = [counter for counter in run if counter not in accepted and counter > top - width]
        assert [counter for counter in run if is_fresh(window, counter)] == fresh
        has_all = all(counter in accepted and counter > top - width for counter in run)
        assert window.seen_run(first, count) == has_all
        if has_all:
            news = [counter for counter in run if not accepted[counter][1] >> path & 1]
            assert window.credit_run(first, count, path) == len(news)
            for counter in news:
                accepted[counter] = (accepted[counter][0], accepted[counter][1] | 1 << path)
        elif len(fresh) == count:
            window.mark_run(first, count, path)
            accepted.update(dict.fromkeys(run, (FIRST_PATH + path, 1 << path)))
            top = max(top, run[-1])
        elif fresh:
            window.mark(fresh[-1], path)
            accepted[fresh[-1]] = (FIRST_PATH + path, 1 << path)
            top = max(top, fresh[-1])
        assert window.top == top
        lowest = max(0, top - min(width, 300) + 1)
        who, bits = window.deliveries(lowest, top)
        assert list(zip(who, bits, strict=True)) == [accepted.get(c, (0, 0)) for c in range(lowest, top + 1)]


@pytest.mark.parametrize("width", [1, 64, NARROW_WINDOW, WINDOW])
def test_random_walks_through_the_window_deliver_nothing_twice(width: int) -> None:
    rng, window, accepted, top = random.Random(width), ReplayWindow(width), set[int](), -1
    for _ in range(20_000):
        counter = max(0, top + rng.choice((1, 1, 1, 2, -1, -5, rng.randrange(-2 * width, 1), rng.randrange(3 * width))))
        is_new = counter not in accepted and counter > top - width
        assert is_fresh(window, counter) == is_new
        if is_new:
            window.mark(counter, counter % 8)
            accepted.add(counter)
            top = max(top, counter)


@pytest.mark.parametrize("width", [64, NARROW_WINDOW, WINDOW])
def test_the_edges_are_those_of_the_kernels_own_test(width: int) -> None:
    edge, reject = width, REJECT_AFTER_MESSAGES  # the oldest that is taken is `edge - 1` behind the newest
    sender, receiver = pair(width)
    cases = [
        (0, True), (1, True), (1, False), (9, True), (8, True), (7, True), (7, False),
        (edge, True), (edge - 1, True), (edge - 1, False), (edge - 2, True), (2, True), (2, False),
        (edge + 16, True), (3, False), (edge + 16, False),
        (edge * 4, True), (edge * 4 - (edge - 1), True), (10, False), (edge * 4 - edge, False),
        (edge * 4 - (edge + 1), False), (edge * 4 - (edge - 2), True), (edge * 4 + 1 - edge, False), (0, False),
        (reject, False), (reject - 1, True), (reject, False), (reject - 1, False), (reject - 2, True),
        (reject + 1, False), (reject + 2, False), (reject - 2, False), (reject - 3, True), (0, False),
    ]  # fmt: skip
    assert len(cases) == 34
    for number, (counter, expected) in enumerate(cases, 1):
        assert accepts(receiver, sender, counter) is expected, f"case {number}: {counter}"


def take(window: ReplayWindow, counter: int) -> bool:
    is_new = is_fresh(window, counter)
    if is_new:
        window.mark(counter)
    return is_new


@pytest.mark.parametrize("width", [64, NARROW_WINDOW])
def test_whole_windows_are_taken_upwards_and_downwards(width: int) -> None:
    span = width - 1
    up, up_from_1, down, down_to_1 = (ReplayWindow(width) for _ in range(4))
    assert all(take(up, counter) for counter in range(1, span + 1))
    assert [take(up, 0), take(up, 0)] == [True, False]
    assert all(take(up_from_1, counter) for counter in range(2, span + 2))
    assert [take(up_from_1, 1), take(up_from_1, 0)] == [True, False]
    assert all(take(down, counter) for counter in range(span, -1, -1))
    assert all(take(down_to_1, counter) for counter in range(span + 1, 0, -1))
    assert not take(down_to_1, 0)
    for last in ([span + 1, 0], [0, span + 1]):
        window = ReplayWindow(width)
        assert all(take(window, counter) for counter in range(span, 0, -1))
        assert [take(window, counter) for counter in last] == ([True, False] if last[1] == 0 else [True, True])


def test_a_window_that_grows_lets_nothing_in_twice() -> None:
    sender, receiver = pair(NARROW_WINDOW)
    for counter in (0, 5, 3 * NARROW_WINDOW):
        assert accepts(receiver, sender, counter)
    assert deliver(receiver, [seal_at(sender, 1)]).late == 1
    receiver.window.width = WINDOW
    assert [accepts(receiver, sender, counter) for counter in (0, 5, 3 * NARROW_WINDOW)] == [False] * 3
    assert accepts(receiver, sender, 1)
    assert not accepts(receiver, sender, 1)


def test_a_jump_over_the_whole_ring_forgets_what_was_in_it() -> None:
    window = ReplayWindow(WINDOW)
    window.mark_run(0, 100, 1)
    window.mark(7 * WINDOW, 2)
    assert all(is_fresh(window, 6 * WINDOW + counter) for counter in range(1, 100))
    assert window.deliveries(6 * WINDOW + 1, 6 * WINDOW + 99) == (bytes(99), bytes(99))


def test_who_delivered_is_remembered_with_and_without_a_path() -> None:
    window = ReplayWindow()
    window.mark(0)
    window.mark(1, 5)
    window.mark(2, 0)
    window.mark_control(2)
    assert window.deliveries(0, 2) == (bytes((NO_PATH, FIRST_PATH + 5, CONTROL)), bytes((0, 1 << 5, 1)))
    assert not any(is_fresh(window, counter) for counter in range(3))


# -- opening -----------------------------------------------------------------------------------------------


def test_a_fresh_run_is_opened_in_order_and_credited_to_its_path() -> None:
    sender, receiver = pair()
    opened = deliver(receiver, [sender.seal(plain) for plain in plains(50)], path=3)
    assert opened.plain == plains(50)
    assert list(opened.counters) == list(range(50))
    assert (opened.repeated, opened.bad, opened.late, opened.expired, receiver.window.top) == (0, 0, 0, 0, 49)
    assert receiver.window.deliveries(0, 49) == (bytes((FIRST_PATH + 3,)) * 50, bytes((8,)) * 50)


def test_a_copy_of_a_run_is_dropped_before_it_is_opened_and_credited_once() -> None:
    sender, receiver = pair()
    run = [sender.seal(plain) for plain in plains(20)]
    deliver(receiver, run, path=0)
    garbled = [datagram[:HEADER_SIZE] + bytes(len(datagram) - HEADER_SIZE) for datagram in run]
    for path, credited in ((1, 20), (1, 0), (0, 0), (None, 0)):
        opened = deliver(receiver, garbled, path=path)  # what it holds is not even looked at
        assert (opened.plain, opened.repeated, opened.credited, opened.bad) == ([], 20, credited, 0)
    assert receiver.window.deliveries(0, 19) == (bytes((FIRST_PATH,)) * 20, bytes((3,)) * 20)


def test_a_half_seen_run_gives_the_other_half() -> None:
    sender, receiver = pair()
    run = [sender.seal(plain) for plain in plains(10)]
    deliver(receiver, run[3:6], path=0)
    opened = deliver(receiver, run, path=1)
    assert opened.plain == [plain for number, plain in enumerate(plains(10)) if number not in range(3, 6)]
    assert list(opened.counters) == [0, 1, 2, 6, 7, 8, 9]
    assert (opened.repeated, opened.credited, opened.bad) == (3, 3, 0)
    assert deliver(receiver, run, path=0).credited == 7


@pytest.mark.parametrize("forged", [0, 4, 9])
def test_a_forged_datagram_in_a_run_costs_only_itself_and_leaves_no_mark(forged: int) -> None:
    sender, receiver = pair()
    run = [sender.seal(plain) for plain in plains(10)]
    false = bytearray(run[forged])
    false[-1] ^= 1
    opened = deliver(receiver, [*run[:forged], bytes(false), *run[forged + 1 :]], path=0)
    assert opened.plain == [plain for number, plain in enumerate(plains(10)) if number != forged]
    assert list(opened.counters) == [number for number in range(10) if number != forged]
    assert (opened.bad, opened.repeated, opened.credited) == (1, 0, 0)
    assert is_fresh(receiver.window, forged)
    assert deliver(receiver, [run[forged]]).plain == [plains(10)[forged]]


def test_a_forged_counter_far_ahead_moves_nothing() -> None:
    sender, receiver = pair()
    first = sender.seal(b"true")
    far = TRANSPORT_HEADER.pack(4, 2, 1 << 40) + first[HEADER_SIZE:]
    run_far = [TRANSPORT_HEADER.pack(4, 2, (1 << 40) + n) + first[HEADER_SIZE:] for n in range(3)]
    assert deliver(receiver, [far]).bad == 1
    assert deliver(receiver, run_far).bad == 3
    assert receiver.window.top == -1
    assert deliver(receiver, [first]).plain == [b"true".ljust(16, b"\0")]


def test_a_short_last_datagram_is_opened_with_its_run() -> None:
    sender, receiver = pair()
    run = [*(sender.seal(plain) for plain in plains(5)), sender.seal(b"")]
    opened = deliver(receiver, run)
    assert opened.plain == [*plains(5), b""]
    assert deliver(receiver, run).repeated == 6
    short = [sender.seal(bytes(48)), sender.seal(bytes(16))]
    assert [len(plain) for plain in deliver(receiver, [short[1]]).plain] == [16]
    opened = deliver(receiver, short)
    assert ([len(plain) for plain in opened.plain], opened.repeated) == ([48], 1)


def test_a_run_in_any_order_with_copies_in_it_is_taken_once() -> None:
    sender, receiver = pair()
    run = [sender.seal(plain) for plain in plains(4)]
    opened = deliver(receiver, [run[2], run[0], run[2], run[3], run[0], run[1]], path=2)
    assert opened.plain == [plains(4)[number] for number in (2, 0, 3, 1)]
    assert list(opened.counters) == [2, 0, 3, 1]
    assert (opened.repeated, opened.credited) == (2, 0)


def test_what_comes_below_the_window_is_late_and_not_opened() -> None:
    sender, receiver = pair()
    old = [seal_at(sender, counter) for counter in (0, 1, 2)]
    assert accepts(receiver, sender, NARROW_WINDOW)
    opened = deliver(receiver, [*old], path=0)
    assert (opened.late, opened.repeated, [list(opened.counters)]) == (1, 0, [[1, 2]])
    assert accepts(receiver, sender, 2 * NARROW_WINDOW + 2)
    assert deliver(receiver, old).late == 3


@pytest.mark.parametrize("first", [REKEY_AFTER_MESSAGES - 2, (1 << 62) - 2, (1 << 63) - 2, 1 << 63])
def test_a_run_of_high_counters_is_taken_whole_and_once(first: int) -> None:
    sender, receiver = pair()
    run = [seal_at(sender, first + number, plain) for number, plain in enumerate(plains(4))]
    opened = deliver(receiver, run, path=0)
    assert (opened.plain, list(opened.counters)) == (plains(4), [first + number for number in range(4)])
    opened = deliver(receiver, run, path=1)
    assert (opened.plain, opened.repeated, opened.credited) == ([], 4, 4)


def test_counters_at_the_end_of_all_counters_are_refused_and_move_nothing() -> None:
    sender, receiver = pair()
    for counters in ([REJECT_AFTER_MESSAGES], [REJECT_AFTER_MESSAGES + n for n in range(4)], [(1 << 64) - 1]):
        opened = deliver(receiver, [seal_at(sender, counter) for counter in counters])
        assert (opened.plain, opened.bad) == ([], len(counters))
    assert receiver.window.top == -1
    opened = deliver(receiver, [seal_at(sender, REJECT_AFTER_MESSAGES - 2 + n) for n in range(4)])
    assert (len(opened.plain), opened.bad) == (2, 2)
    assert receiver.window.top == REJECT_AFTER_MESSAGES - 1


def test_nothing_is_opened_under_keys_that_are_180_seconds_old() -> None:
    sender, receiver = pair()
    run = [sender.seal(plain) for plain in plains(3)]
    opened = deliver(receiver, run, now=180.0)
    assert (opened.plain, opened.expired, receiver.window.top) == ([], 3, -1)
    assert deliver(receiver, run, now=179.9).plain == plains(3)
    assert deliver(receiver, run, path=1, now=180.0).credited == 0


def test_keys_of_another_session_or_of_the_other_direction_open_nothing() -> None:
    sender, receiver = pair()
    other = Session(SessionKeys(b"\x0c" * 32, KEY_B, 1, 2, is_initiator=True), 1, 0.0)
    assert deliver(receiver, [other.seal(b"x")]).bad == 1
    assert deliver(sender, [sender.seal(b"x")]).bad == 1  # sent back to where it came from


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=OVERHEAD, max_size=400), st.integers(OVERHEAD, 400))
def test_any_bytes_at_all_open_nothing_and_mark_nothing(junk: bytes, size: int) -> None:
    _, receiver = pair()
    if len(junk) % size and len(junk) % size < OVERHEAD:
        junk = junk[: len(junk) // size * size] or junk
    opened = receiver.open(junk, size, 0, 1.0)
    assert (opened.plain, opened.credited, receiver.window.top) == ([], 0, -1)
    assert opened.bad == -(-len(junk) // size)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 3), st.data())
def test_datagrams_over_lossy_paths_are_delivered_once_each(seed: int, paths: int, data: st.DataObject) -> None:
    """Whatever the runs look like: what came by any path is delivered, once, and credited to all that brought it."""
    rng = random.Random(seed)
    sender, receiver = pair(WINDOW)
    arrivals: list[tuple[float, int, list[bytes]]] = []
    sent: list[bytes] = []
    brought: dict[int, set[int]] = {}
    for second in range(data.draw(st.integers(1, 8))):
        run = [rng.randbytes(32) for _ in range(rng.randrange(1, 12))]
        datagrams = [sender.seal(plain) for plain in run]
        for path in range(paths):
            kept = [n for n in range(len(run)) if rng.random() > 0.3]
            if kept:
                arrivals.append((second + 3 * rng.random(), path, [datagrams[n] for n in kept]))
            for n in kept:
                brought.setdefault(len(sent) + n, set()).add(path)
        sent += run
    delivered, credits_ = [], 0
    for _, path, datagrams in sorted(arrivals, key=lambda arrival: arrival[0]):
        opened = deliver(receiver, datagrams, path)
        delivered += opened.plain
        credits_ += len(opened.plain) + opened.credited
        assert not opened.bad
        assert [sent[counter] for counter in opened.counters] == opened.plain
    assert sorted(delivered) == sorted(sent[counter] for counter in brought)
    assert credits_ == sum(map(len, brought.values()))
    if brought:
        _, bits = receiver.window.deliveries(0, max(brought))
        assert list(bits) == [sum(1 << path for path in brought.get(n, ())) for n in range(max(brought) + 1)]


# -- sealing -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_no_counter_is_used_twice(batches: list[int]) -> None:
    sender, _ = pair()
    counters: list[int] = []
    for batch in batches:
        if batch == 0:
            counters.append(TRANSPORT_HEADER.unpack_from(sender.seal(b"one"))[2])
        else:
            run = sender.seal_run([bytes(20)] * batch, 0)
            counters += read_counters(run, sealed_size(20, 0))
    assert counters == list(range(len(counters)))
    assert sender.counter == len(counters)


def test_a_counter_is_spent_even_if_sealing_fails() -> None:
    sender, _ = pair()

    def refuse(*_: object) -> bytes:
        raise ValueError("refused")

    sender._seal = refuse
    with pytest.raises(ValueError, match="refused"):
        sender.seal_run([bytes(16)] * 3, 0)
    assert sender.counter == 3


@settings(deadline=None)
@given(st.integers(0, 1500), st.integers(0, 1500))
def test_padding_goes_to_a_multiple_of_16_but_never_beyond_the_limit(length: int, limit: int) -> None:
    sender, receiver = pair()
    packet = bytes((7,)) * length
    datagram = sender.seal(packet, limit)
    padded = len(datagram) - OVERHEAD
    assert len(datagram) == sealed_size(length, limit)
    assert length <= padded < length + 16
    assert padded % 16 == 0 or (limit and padded == max(limit, length))
    assert not limit or padded <= max(limit, length)
    assert deliver(receiver, [datagram]).plain == [packet.ljust(padded, b"\0")]


@settings(deadline=None, max_examples=60)
@example(64, [4], 0, 0)  # the first and the last need no padding, one between them does
@given(st.integers(20, 200), st.lists(st.integers(0, 15), max_size=12), st.integers(0, 200), st.integers(0, 40))
def test_a_run_is_sealed_as_its_packets_are_one_by_one(length: int, shorter: list[int], limit: int, less: int) -> None:
    lengths = [length, *(length - short for short in shorter)]
    packets = [bytes((7,)) * each for each in lengths if sealed_size(each, limit) == sealed_size(length, limit)]
    packets.append(bytes(max(1, length - less)))
    alone, _ = pair()
    together, receiver = pair()
    one_by_one = b"".join(alone.seal(packet, limit) for packet in packets)
    run = together.seal_run(packets, limit)
    assert run == one_by_one
    opened = receiver.open(run, sealed_size(length, limit), 0, 1.0)
    assert [plain[: len(packet)] for plain, packet in zip(opened.plain, packets, strict=True)] == packets


def test_a_session_lives_180_seconds_and_its_initiator_renews_it_earlier() -> None:
    initiator, responder = pair()
    assert initiator.is_alive(179.9)
    assert not initiator.is_alive(180.0)
    assert not initiator.wants_successor(120.0)
    assert initiator.wants_successor(120.1)
    assert not responder.wants_successor(179.0)
    assert not initiator.is_near_its_end(165.0)
    assert initiator.is_near_its_end(165.1)
    assert not responder.is_near_its_end(179.0)
    responder.counter = REKEY_AFTER_MESSAGES + 1
    assert responder.wants_successor(0.0)
    responder.counter = REJECT_AFTER_MESSAGES
    assert not responder.is_alive(0.0)


def test_limits_are_those_of_the_protocol() -> None:
    assert REKEY_AFTER_MESSAGES == 2**60
    assert REJECT_AFTER_MESSAGES == 2**64 - 2**13 - 1
    assert (WINDOW, NARROW_WINDOW) == (2**17, 2**13)


# -- runs --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([1, 4]), st.integers(0, 2)), min_size=1, max_size=12), st.integers(1, 60))
def test_runs_are_cut_where_type_or_index_change(heads: list[tuple[int, int]], last: int) -> None:
    size = 48
    datagrams = [TRANSPORT_HEADER.pack(kind, index, 9).ljust(size, b"x") for kind, index in heads]
    datagrams[-1] = datagrams[-1][: min(last, size)]
    runs = same_headers(b"".join(datagrams), size)
    assert b"".join(runs) == b"".join(datagrams)
    cut = [[datagrams[0]]]
    for before, datagram in pairwise(datagrams):
        if before[:8] == datagram[:8]:
            cut[-1].append(datagram)
        else:
            cut.append([datagram])
    assert runs == [b"".join(run) for run in cut]


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20), st.integers(OVERHEAD, 100), st.data())
def test_counters_are_read_from_every_datagram_of_a_run(counters: list[int], size: int, data: st.DataObject) -> None:
    datagrams = [TRANSPORT_HEADER.pack(4, 1, counter).ljust(size, b"x") for counter in counters]
    datagrams[-1] = datagrams[-1][: data.draw(st.integers(OVERHEAD, size))]
    assert list(read_counters(b"".join(datagrams), size)) == counters


@pytest.mark.parametrize("mtu", [1280, 1300, 1320, 1340, 1360, 1380, 1400, 1420])
def test_no_run_is_longer_than_one_call_takes(mtu: int) -> None:
    for count in range(1, 300):
        found = list(runs([bytes(mtu)] * count, mtu))
        assert sum(len(run) for run, _ in found) == count
        assert all(len(run) <= MAX_SEGMENTS and len(run) * size <= MAX_RUN for run, size in found)
