"""How much a path may be given: a slow or bloated link never hurts, and what it delivers is never old.

A copy on a path whose queue stands is of no use: it comes long after the first one, and when the fast path dies the
survivor is seconds behind. So a path gets less than everything, and the rest of its copies is dropped at the source,

* by **delay**: it is *held* when its one-way delay stands more than 30 ms above its floor. The delay is that of probes
  (up) and ECHOs (down), which wait in the same queues as data; "stands" means: the least of the newest samples, for
  jitter is no queue: where there is much of it more samples are asked, and what it usually is does not count. (A queue
  that grows or drains makes a line of them; jitter is what is off the line.) The floor is the least delay of the last
  minute or so, for clocks drift. What stands on all paths alike is no queue of this one: a busy machine, or a link that
  they share. Nor is what stands though next to nothing was given, or does not get less though so little is given that
  less arrives: a new route, whose delay is the new floor. As long as a queue stands, what arrives does not get less;
* by **loss**: it is held when feedback has said for a second that it delivers less than half of what it is given,
  although another path loses less. An outage is no such loss: then there is no feedback, or nothing comes at all;
* by its own **send queue** (client only): what the kernel has not sent yet may not be more than 50 ms of what the path
  delivers, or two datagrams.

Held means: a rate, enforced by a bucket. While the queue stands, it is as much under what the path delivers as the
queue is long, so that it drains within a second. When the queue is gone, it is just under what the path delivered while
it stood, and grows by a twentieth at a time from there, so that a link that has recovered is found out; after three
seconds without a queue also if less is given, for bursts never fill a rate. Held for nothing but a loss that has ended,
it doubles: nothing gets old by what is lost. A path that has not been at its limit for two seconds is held no more. The
rate does not fall below 64 kbit/s: probes have to get through, and tell when it is better. The path with the least
delay is exempt from all this (see `scheduler`).

Where both ways have a long queue, the answer to a probe comes too late to be of use. But the messages on the other
paths tell which probe came by this one last, and when: its delay, and how fast what was given before it has got
through, are known as soon as it has arrived. Only how many datagrams were lost on the way is not, until the answer
comes.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

STANDS: Final = 0.030  # s above the floor, and what a full datagram takes: a queue
DRAINED: Final = 0.010  # s above the floor, and what a full datagram takes: none
DRAIN_TIME: Final = 0.3  # s: the length of queue that all of the rate is needed to drain
LEAST_GAIN, MOST_GAIN, GROWTH = 0.1, 0.9, 1.05  # of the delivered rate: with a long queue, a short one, none
BLIND_GROWTH: Final = 1.5  # while it is not known what was delivered
LEAST_RATE: Final = 8000.0  # bytes/s
RESPONDS_IN: Final = 1.0  # s, twice the queue more: then it must have become less by
RESPONSE: Final = 0.3  # of what it was; unless less arrives by as much
LEAST_RESPONSE: Final = 0.05  # at the least rate, which may be just under what the link carries
RATE_SPAN: Final = 1.0  # s over which rates are measured
RATE_LEAST_SPAN: Final = 0.25  # a shorter time says nothing of a rate
SHARE_IS_OLD: Final = 5.0  # s after which it is not known any more what part arrives
AHEAD: Final = 0.1  # s by which the other paths must know more for that to be worth more than what is known exactly
MOST_SEEN: Final = 512  # in that time; a peer whose clock hardly goes may say more
GROW_EVERY: Final = 0.1
CALM_AFTER: Final = 3.0  # s without a reason to be held: it grows whether or not what it may be given is given
SAMPLES_SPAN: Final = 0.3  # s: the newest samples of delay
SAMPLES, HELD_SAMPLES, JITTERY_SAMPLES = 3, 2, 5  # at the least; while the path is held; where there is jitter
JITTER_WEIGHT: Final = 1 / 16  # of the newest sample
MOST_JITTER: Final = 0.1  # s: what is more is an event
JITTERY: Final = 0.025  # s: what is less does not matter
SAMPLES_LEAST_SPAN: Final = 0.1  # s that they must be apart to say that something stands
FLOOR_SPAN: Final = 30.0  # the floor is the least delay of this span and of the one before it
QUEUE_TIME: Final = 0.050  # s of the delivered rate that may wait in the kernel
QUEUE_STANDS: Final = 0.020  # s that more than that must have waited: a burst is no queue
TRUESIZE: Final = 2  # TIOCOUTQ counts the kernel's buffers, 1.6 to 2.3 times the bytes
FREE_AFTER: Final = 2.0  # s without having been at the limit
BURST_TIME: Final = 0.02  # s of the rate that may go at once
FULL: Final = 1500  # bytes of a full datagram on the wire
LEAST_GIVEN: Final = 20  # datagrams: fewer say nothing of a loss
LOSS_SPAN: Final = 0.2  # s: a shorter time neither
LOSES_FOR: Final = 1.0  # s
OUTAGE: Final = 0.4  # s without feedback, though in use: what happened meanwhile says nothing of a rate
OUTAGE_IN_A_QUEUE: Final = 2.0  # s: there, what was sent close together arrives far apart
DROUGHT: Final = 0.25  # s in which feedback came, and said that nothing had come: an outage in one direction

INF: Final = float("inf")
_HALF: Final = 1 << 31


class Delay:
    """One-way delay in one direction, from clocks that agree in nothing but their pace."""

    __slots__ = ("_floors", "_floors_at", "_samples", "jitter")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=64)
        self._floors = (INF, INF)  # of the span before, of this one
        self._floors_at = -INF
        self.jitter = 0.0  # s, smoothed: by how much a sample is off the line through the two before it

    def count(self, delay: float, now: float) -> None:
        """A sample: arrival by the receiver's clock minus departure by the sender's, in s."""
        if len(self._samples) > 1:
            (_, last), (_, one_before) = self._samples[-1], self._samples[-2]
            self.jitter += (min(MOST_JITTER, abs(delay - 2 * last + one_before)) - self.jitter) * JITTER_WEIGHT
        if now - self._floors_at > FLOOR_SPAN:
            self._floors = (self._floors[1] if now - self._floors_at < 2 * FLOOR_SPAN else INF, INF)
            self._floors_at = now
        self._floors = (self._floors[0], min(self._floors[1], delay))
        self._samples.append((now, delay))

    def rebase(self) -> None:
        """What stands is no queue: take it for the floor from now on."""
        self._floors = (INF, min(delay for _, delay in [*self._samples][-SAMPLES:]))

    def newest(self) -> float:
        """Return how far the newest sample stands above the floor, in s."""
        return self._samples[-1][1] - min(self._floors) if self._samples else 0.0

    def queue(self, now: float, samples: int = SAMPLES) -> float:
        """Return how far the delay stands above its floor, in s: the least of the newest samples."""
        count, span, least = 0, 0.0, INF
        for at, delay in reversed(self._samples):
            if count >= samples and span >= SAMPLES_LEAST_SPAN and now - at > SAMPLES_SPAN:
                break
            count, span, least = count + 1, self._samples[-1][0] - at, min(least, delay)
        if count < samples or span < SAMPLES_LEAST_SPAN:
            return 0.0
        return max(0.0, least - min(self._floors))


class SendQueue:
    """What waits in a path's own socket, looked at now and then (TIOCOUTQ)."""

    __slots__ = ("_limited_until", "_over_since", "waiting")

    def __init__(self) -> None:
        self.waiting = 0  # bytes
        self._over_since = INF
        self._limited_until = -INF

    def seen(self, truesize: int, delivered_rate: float, now: float) -> None:
        """The kernel's buffers of what waits are of `truesize` bytes."""
        self.waiting = truesize // TRUESIZE
        if self.waiting <= self.limit(delivered_rate):
            self._over_since = INF
        elif self._over_since == INF:
            self._over_since = now
        elif now - self._over_since > QUEUE_STANDS:
            self._limited_until = now + FREE_AFTER

    def is_limited(self, now: float) -> bool:
        """Whether the queue has stood lately, so that the limit holds."""
        return now < self._limited_until

    def limit(self, delivered_rate: float) -> int:
        """Return how many bytes may wait."""
        return max(2 * FULL, int(QUEUE_TIME * delivered_rate))


class Cap:
    """The rate that a path is held at in one direction; `rate` is None while it is not."""

    __slots__ = (
        "_at", "_came_at", "_carries", "_delivered", "_grown_at", "_held_at", "_is_for_loss", "_limited_at",
        "_loses_since", "_marks", "_seen", "_stood", "_stood_until", "_tokens", "rate",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rate: float | None = None
        # By the receiver's time: given, its bytes, delivered; and what had arrived of what was given, and its bytes.
        self._seen: deque[tuple[float, int, int, int]] = deque(maxlen=MOST_SEEN)
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=MOST_SEEN)
        self._delivered = 0  # by the newest feedback
        self._tokens = 0.0
        self._at = -INF
        self._grown_at = -INF
        self._limited_at = -INF
        self._held_at = -INF  # when there was a reason last
        self._loses_since = INF
        self._is_for_loss = False  # that it is held
        self._came_at = INF  # receiver's time of the newest feedback that said that something had come
        self._carries = 0.0  # bytes/s: what it delivered while a queue stood, as far as that is known
        self._stood_until = -INF  # by the receiver's time
        self._stood = (INF, 0.0, 0.0)  # since when a queue stands, how long it was then, and what was delivered

    def restart(self) -> None:
        """Counts begin anew: what was seen before says nothing of them."""
        self._seen.clear()
        self._marks.clear()
        self._loses_since = INF

    def feedback(
        self,
        at: float,
        given: int,
        given_bytes: int,
        delivered: int,
        queue: float,
        now: float,
        *,
        is_worst: bool,
        jitter: float = 0.0,
    ) -> bool:
        """The receiver had received `delivered` datagrams `at` its time, of the `given` ones sent by then.

        `given_bytes` are theirs. All three count on from one feedback to the next, `delivered` modulo 2^32. `queue` is
        by how many seconds the delay stands above its floor, `jitter` how unsteady that is; `is_worst` says that
        another path loses less. Returns whether that is no queue, but a new floor.
        """
        delivered = self._delivered + (delivered - self._delivered + _HALF) % (2 * _HALF) - _HALF
        if not self._is_news(at, given, delivered):
            return False  # an older one that came late
        seen, self._delivered = self._seen, delivered
        seen.append((at, given, given_bytes, delivered))
        if len(seen) > 1 and given > seen[-2][1]:  # else nobody knows of what more has come
            if not (is_worst and self._lost_half()):
                self._loses_since = INF
            elif self._loses_since == INF:
                self._loses_since = now
        while seen[0][0] < at - RATE_SPAN and seen[1][0] <= at - RATE_LEAST_SPAN:
            seen.popleft()
        return self._judge(queue, jitter, now, is_exact=True)

    def arrived(
        self, at: float, given: int, given_bytes: int, queue: float, now: float, *, jitter: float = 0.0
    ) -> bool:
        """The last of `given` datagrams arrived `at` the receiver's time; how many of the others did is not known yet.

        All else is as with `feedback`, which may come much later.
        """
        marks = self._marks
        if marks and (at <= marks[-1][0] or given < marks[-1][1]):
            return False
        if marks and at - marks[-1][0] > OUTAGE_IN_A_QUEUE:
            marks.clear()
        marks.append((at, given, given_bytes))
        while marks[0][0] < at - RATE_SPAN and marks[1][0] <= at - RATE_LEAST_SPAN:
            marks.popleft()
        return self._is_ahead() and self._judge(queue, jitter, now, is_exact=False)

    def _judge(self, queue: float, jitter: float, now: float, *, is_exact: bool) -> bool:
        """Hold the path or let it go, by what has come in; return whether what stands is a new floor.

        `is_exact`: what was lost is known, so that it may be held for that.
        """
        if self.rate is None and queue <= STANDS and self._loses_since == INF:  # as nearly always
            self._stood = (INF, 0.0, 0.0)
            return False
        rate = self.delivered_rate()
        if rate is None:
            return False
        if self._is_idle():
            return queue > STANDS
        if self.rate is not None and self._is_ahead():  # losses that are not known yet make it too much
            rate = min(rate, max(self.rate, self._known_rate() or 0.0))
        length = queue - max(self.time_of_one(), jitter)
        stands = length > (STANDS if self.rate is None else DRAINED)
        is_new_floor = stands and not self._responds(queue, rate, now)
        if is_new_floor or not stands:
            self._stood = (INF, 0.0, 0.0)
        if is_new_floor:
            if self.rate is not None and self.rate > LEAST_RATE:
                self.rate = None
            return True
        loses = now - self._loses_since > LOSES_FOR
        if stands or (loses and is_exact):
            gain = max(LEAST_GAIN, min(MOST_GAIN, 1.0 - (length - DRAINED) / DRAIN_TIME))
            self._is_for_loss = not stands and (self.rate is None or self._is_for_loss)
            if self.rate is None:
                self._tokens, self._at, self._carries = 0.0, now, 0.0
            self.rate = max(LEAST_RATE, gain * rate)
            self._limited_at = self._held_at = now
            if stands:
                self._stood_until = max(known[-1][0] for known in (self._seen, self._marks) if known)
        elif self.rate is not None and not loses:
            if now - self._limited_at > FREE_AFTER:
                self.rate = None
            elif now - self._grown_at >= GROW_EVERY:
                self._grown_at = now
                growth = GROWTH if self._carries > LEAST_RATE else BLIND_GROWTH
                base = self.rate if now - self._held_at > CALM_AFTER else min(self.rate, rate)
                grown = max(self.rate, MOST_GAIN * self._carries, growth * base)
                self.rate = 2 * self.rate if self._is_for_loss else grown
        if is_exact and self._seen[-1][0] <= self._stood_until:
            self._carries = self._known_rate() or 0.0
        return False

    def delivered_rate(self) -> float | None:
        """Return what arrived lately, in bytes/s; None while too little is known."""
        return self._given_rate(self._marks) * self._share() if self._is_ahead() else self._known_rate()

    def time_of_one(self) -> float:
        """Return how long a full datagram takes at what arrived lately, in s."""
        return FULL / max(self.delivered_rate() or 0.0, LEAST_RATE)

    def _known_rate(self) -> float | None:
        if len(self._seen) < 2:
            return None
        (from_at, given_0, bytes_0, delivered_0), (to_at, given, given_bytes, delivered) = self._seen[0], self._seen[-1]
        if to_at - from_at < RATE_LEAST_SPAN or given == given_0:
            return None
        size = (given_bytes - bytes_0) / (given - given_0)
        return (delivered - delivered_0) * size / (to_at - from_at)

    def room(self, wanted: int, now: float) -> int | None:
        """Return how many bytes may go now of `wanted` ones, None for any number."""
        rate = self.rate
        if rate is None:
            return None
        most = max(FULL, rate * BURST_TIME)
        self._tokens = min(most, self._tokens + (now - self._at) * rate)
        self._at = now
        if wanted > self._tokens:
            self._limited_at = now
        return int(self._tokens)

    def spend(self, size: int) -> None:
        """So many bytes went."""
        if self.rate is not None:
            self._tokens -= size

    def _is_news(self, at: float, given: int, delivered: int) -> bool:
        """Whether feedback is newer than all before it; after an outage those before it are forgotten."""
        if not self._seen:
            self._came_at = at
            return True
        last_at, last_given, _, last_delivered = self._seen[-1]
        if at <= last_at or given < last_given or delivered < last_delivered:
            return False
        if delivered > last_delivered:
            self._came_at = at
        if at - last_at > OUTAGE or at - self._came_at > DROUGHT:
            self._seen.clear()
            self._loses_since = INF
        return True

    def _is_idle(self) -> bool:
        """Whether so little was given that no queue can be of it."""
        return self.rate is None and self._given_rate(self._marks if self._is_ahead() else self._seen) < LEAST_RATE

    def _is_ahead(self) -> bool:
        """Whether the other paths know more of what has arrived, and enough for a rate."""
        marks, seen = self._marks, self._seen
        if not marks or marks[-1][0] - marks[0][0] < RATE_LEAST_SPAN:
            return False
        return not seen or marks[-1][0] > seen[-1][0] + AHEAD

    def _given_rate(self, known: Sequence[tuple[float, int, int, *tuple[int, ...]]]) -> float:
        """Return how fast what was given has got through, in bytes/s, if nothing of it was lost."""
        first, last = known[0], known[-1]
        return (last[2] - first[2]) / (last[0] - first[0])

    def _share(self) -> float:
        """Return what part of the datagrams arrived, as far as that is known."""
        if len(self._seen) < 2 or self._marks[-1][0] - self._seen[-1][0] > SHARE_IS_OLD:
            return 1.0
        (_, given_0, _, delivered_0), (_, given, _, delivered) = self._seen[0], self._seen[-1]
        return min(1.0, (delivered - delivered_0) / (given - given_0)) if given > given_0 else 1.0

    def _responds(self, queue: float, rate: float, now: float) -> bool:
        """Whether a queue that stands may be ours: it gets less when less is given, or `rate`, what arrives, does not.

        As long as there is one, the link is busy, and delivers what it can.
        """
        since, length, rate_then = self._stood
        has_responded = now - since > RESPONDS_IN + 2 * length and queue < (1 - RESPONSE) * length
        if since == INF or has_responded:
            self._stood = (now, queue, rate)
        elif queue > (1 + RESPONSE / 3) * length:  # it grows until our restraint arrives
            self._stood = (now, queue, max(rate, rate_then))
        elif now - since > RESPONDS_IN + 2 * length:
            if self.rate == LEAST_RATE:
                return queue < (1 - LEAST_RESPONSE) * length
            return rate > (1 - RESPONSE) * rate_then
        return True

    def _lost_half(self) -> bool:
        """Whether it delivered less than half of what it was given since some feedback not long ago.

        What was given is known as of the last message heard, what was delivered as of now. So only feedback that
        brought news of both is compared.
        """
        known = [later for earlier, later in pairwise(self._seen) if later[1] > earlier[1]]
        at, given, _, delivered = known[-1]
        long_ago = (seen for seen in reversed(known) if seen[0] <= at - LOSS_SPAN and given - seen[1] >= LEAST_GIVEN)
        before = next(long_ago, None)
        return before is not None and 2 * (delivered - before[3]) < given - before[1]


class Loss(Protocol):
    """A meter of losses."""

    def recent(self) -> float | None:
        """Return the share that was lost lately, 0 to 1; None if nothing was sent."""


class Capped(Protocol):
    """What a review must know of a path, in the direction from us to the peer."""

    cap: Cap
    way_out: Delay

    @property
    def loss_out(self) -> Loss:
        """What is lost on the way."""

    def rebase(self) -> None:
        """Take what stands on the way for its floor."""


def review(
    path: Capped, others: Sequence[Capped], at: float, given: tuple[int, int], delivered: int | None, now: float
) -> str:
    """Judge a path, beside the others that live, by new feedback; return why it is held from now on, if it is.

    The peer had received `delivered` datagrams (None: not known) `at` its time, of the (datagrams, bytes) `given`.
    """
    cap, way_out = path.cap, path.way_out
    was_held = cap.rate is not None
    queue = jitter = 0.0
    # Where the newest sample does not stand there is no queue. And a path that is alone gets everything: when another
    # one is back, nothing is against it that was not before.
    if was_held or (others and way_out.newest() > STANDS):
        jitter = way_out.jitter
        samples, many = (HELD_SAMPLES, SAMPLES) if was_held else (SAMPLES, JITTERY_SAMPLES)
        if jitter > max(JITTERY, 1.25 * cap.time_of_one()):
            samples = many
        else:
            jitter = 0.0  # nothing that would be taken for a queue
        queue = way_out.queue(now, samples) - min(
            (other.way_out.queue(now, HELD_SAMPLES) for other in others), default=0.0
        )
    datagrams, size = given
    if delivered is None:
        is_new_floor = cap.arrived(at, datagrams, size, queue, now, jitter=jitter)
    else:
        loss = path.loss_out.recent() or 0.0
        is_worst = loss > 0.0 and any((other.loss_out.recent() or 0.0) < loss for other in others)
        is_new_floor = cap.feedback(at, datagrams, size, delivered, queue, now, is_worst=is_worst, jitter=jitter)
    if is_new_floor:
        path.rebase()
    if was_held or cap.rate is None:
        return ""
    return f"a queue of {queue * 1e3:.0f} ms, {path.loss_out.recent() or 0.0:.0%} lost"
