"""One way to the peer: what it is for the client, who knows its socket, and for the server, who knows its endpoint.

**Client.** A path is an interface, named by the user; its socket comes and goes with the interface. Every probe says
when the next one comes; its ECHO proves that the path works both ways, and brings the round trip (`sent` unchanged,
minus `held`), what the server received of what we sent here (loss up) and what it sent (loss down). Probes that
overtake each other do no harm: `seq` pairs, nothing is ordered by it. States: `waiting` there is no interface or no
address; `probing` a socket is open and nothing has been heard; `up`; `slow` (copies yield); `down` three probes are
unanswered and nothing was heard for a second. A path that falls silent keeps getting copies for 30 s: its other
direction may live.

**Server.** A path is an id that the client chose, with one endpoint. An endpoint is bound by a sealed, fresh, newer
PROBE from there and a RESPONSE to our CHALLENGE from there (R2, R3): a stolen packet makes nobody a path. A bound path
is `fresh` for max(3 s, 4 RTT) after it was refreshed, then `idle` if the client had announced a longer interval, else
`lapsed`; it is refreshed only by newer PROBEs from its endpoint and by records that show that the client still hears
it (R5). Data, duplicates and errors refresh nothing (R6).

**One way only.** A path may carry up and not down, or down and not up, and two such halves are a tunnel. Each side is
told by the records of the other paths what comes by this one. A server whose ECHOs on a path were not heard by three
probes in a row (`carries_down`) answers what comes by it on the other paths too: a probe by unasked ECHOs, a handshake
and HELLO by the same bytes. To the client such a path is `down`, but `carries_up` or `carries_down`.

Loss over a path is counted, not guessed: what the sender gave to it (`tx`) minus what arrived by it (`rx`), between
two probes; all counts are modulo 2^32 and start anew with every `incarnation`, that is: every socket. What came so far
and found no room in our own receive queue has arrived (`Overruns`): such a loss is our host's, not the path's.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mptunnel.cap import Cap, Delay, SendQueue
from mptunnel.events import NoticeKind
from mptunnel.messages import NO_NEWS, OVERHEAD, Probe, Record, Use, seconds_between
from mptunnel.packet import MIN_MTU

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from ipaddress import IPv4Address, IPv6Address

PROBE_INTERVAL: Final = 0.25
PROBE_BYTES: Final = 32 * 1024  # sent or received on a path: time for another probe
PROBE_SPACING: Final = 0.02
COPIES_WHILE_SILENT: Final = 30.0
DOUBT_AFTER: Final = 0.5  # s without the answer to a probe: standby paths step in
DOWN_AFTER: Final = 1.0
DOWN_PROBES: Final = 3
FOLLOW_UP: Final = 1.0  # s after which an unanswered probe is followed up, until it is clear that the path is down
HALF_LIVES_FOR: Final = 1.5  # s in which one direction that lives is shown to do so: unasked ECHOs take 1 s to begin
MAX_SEQ: Final = 1 << 31  # probes of one incarnation: there may be as many unasked ECHOs
MAX_PENDING: Final = 1024  # 5 s of probes at the fastest, those of a gap alarm
FRESH_FOR: Final = 3.0
MAX_RTT: Final = 5.0  # s: what a client may claim; it keeps a path fresh for four times as long
IDLE_SLACK: Final = 5.0
IDLE_BYTES: Final = 16 * 1024
IDLE_RECORDS: Final = 3  # that a message takes along in idleness, so that many paths cost no more each than four
YIELDS_FOR: Final = 1.0  # s after the last copy that was withheld: the path is called slow
GIVEN_SPAN: Final = 0.5  # s, packets: over what it is judged whether the server withholds copies
GIVEN_PACKETS: Final = 20
GIVEN_WITHIN: Final = 1.5
GIVEN_SHARE: Final = 0.9
LAST_RESORT: Final = 15.0
FORGET_AFTER: Final = 30.0
UNASKED_AFTER: Final = 1.0  # without a refresh: unasked ECHOs begin, so that a path of which only the way down lives
UNASKED_INTERVAL: Final = 0.25  # never lapses
LARGE: Final = MIN_MTU + OVERHEAD  # bytes of UDP payload: a client's path that carries no such is small
CHALLENGE_LIFETIME: Final = 3.0  # s for which a candidate is sent the same bytes
ANSWER_WITHIN: Final = 8.0  # s: a path whose round trip is longer than the 3 s can be bound too
CHALLENGE_SPACING: Final = 0.25
TOKEN_SIZE: Final = 16
LOSS_SPAN: Final = 10.0  # s: over what time a loss is shown
LOSS_STEP: Final = 0.1  # and how finely that time is cut
MAX_ANSWERS: Final = 256  # a second and path

Arrival = tuple[int, tuple[int, int]]  # when, in us by the receiver's clock, and the datagrams and bytes given by then

_MOD32: Final = 1 << 32
_INF: Final = float("inf")
_TICK: Final = 0.001  # a state changes after its last moment


class PathState(enum.Enum):
    """What is known of a path; the client's five and the server's four."""

    WAITING = "waiting"
    PROBING = "probing"
    UP = "up"
    SLOW = "slow"
    DOWN = "down"
    CANDIDATE = "candidate"
    FRESH = "fresh"
    IDLE = "idle"
    LAPSED = "lapsed"


NOTICES: Final = {  # what is told outside when a path has entered a state
    PathState.WAITING: NoticeKind.PATH_WAITING,
    PathState.UP: NoticeKind.PATH_UP,
    PathState.SLOW: NoticeKind.PATH_SLOW,
    PathState.DOWN: NoticeKind.PATH_DOWN,
    PathState.FRESH: NoticeKind.PATH_UP,
    PathState.LAPSED: NoticeKind.PATH_DOWN,
}


class Allowance:
    """At most 256 answers in a second."""

    __slots__ = ("_count", "_second")

    def __init__(self) -> None:
        self._second = self._count = 0

    def take(self, now: float) -> bool:
        """Whether one more may be sent in this second."""
        if self._second != int(now):
            self._second, self._count = int(now), 0
        self._count += 1
        return self._count <= MAX_ANSWERS


Limits = tuple[Allowance, float]  # of a server's path, see `ServerPath.limits`


class Overruns:
    """How much a receive queue of ours had no room for (SO_RXQ_OVFL, socket(7)): a path's own, or the server's one.

    The kernel counts buffers. A super-packet is one, so nobody knows how many datagrams that was.
    """

    __slots__ = ("buffers",)

    def __init__(self) -> None:
        self.buffers = 0


class LossMeter:
    """Differences of a sender's count and a receiver's, in total and over the last seconds."""

    __slots__ = ("_last", "_recent", "lost", "sent")

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._recent: deque[tuple[float, int, int]] = deque()
        self.sent = 0
        self.lost = 0

    def restart(self) -> None:
        """Both counts begin anew with the next ones; the totals stay."""
        self._last = None

    def receiver_restarted(self) -> None:
        """The receiver counts from 0 again: what it has not counted since is lost."""
        if self._last is not None:
            self._last = (self._last[0], 0)

    def missing(self, sent: int, received: int) -> int:
        """Return how much `count` would take for lost."""
        if self._last is None:
            return 0
        more_sent, more_received = (sent - self._last[0]) % _MOD32, (received - self._last[1]) % _MOD32
        return max(0, more_sent - more_received) if max(more_sent, more_received) <= _MOD32 // 2 else 0

    def count(self, sent: int, received: int, now: float) -> None:
        """The sender has counted `sent` datagrams so far (modulo 2^32), the receiver `received`."""
        if self._last is None:
            self._last = (sent, received)
        more_sent = (sent - self._last[0]) % _MOD32
        more_received = (received - self._last[1]) % _MOD32
        if more_sent > _MOD32 // 2:
            return  # an older message that came late
        self._last = (sent, received)
        if more_received > _MOD32 // 2:
            return  # the receiver has begun anew
        self.sent += more_sent
        self.lost += more_sent - more_received
        self._add(now)

    def end(self, sent: int, now: float) -> None:
        """The sender has counted `sent` datagrams, and will hear of no more of them: they are lost."""
        if self._last is not None:
            self.count(sent, self._last[1], now)

    def told(self, sent: int, lost: int, now: float) -> None:
        """The receiver says what its own meter of this has counted in total."""
        if sent < self.sent:
            self._recent.clear()  # it has begun anew
        self.sent, self.lost = sent, lost
        self._add(now)

    def recent(self) -> float | None:
        """Loss over the last seconds, 0 to 1; None if nothing was sent."""
        if len(self._recent) < 2:
            return None
        _, sent_0, lost_0 = self._recent[0]
        _, sent, lost = self._recent[-1]
        return min(1.0, max(0.0, (lost - lost_0) / (sent - sent_0))) if sent > sent_0 else None

    def _add(self, now: float) -> None:
        if len(self._recent) > 1 and now - self._recent[-2][0] < LOSS_STEP:
            self._recent.pop()
        self._recent.append((now, self.sent, self.lost))
        while self._recent[0][0] < now - LOSS_SPAN:
            self._recent.popleft()


class Path:
    """What both sides keep of a path."""

    __slots__ = (
        "_answers", "_longest_run", "_overran", "_withheld_at", "cap", "errors", "id", "incarnation", "jitter",
        "loss_down", "loss_up", "overruns", "room", "rtt", "rx", "rx_bytes", "rx_size", "since", "state", "tx",
        "tx_bytes", "way_out", "withheld",
    )  # fmt: skip

    def __init__(self, path: int, now: float, overruns: Overruns | None = None) -> None:
        self.id = path
        self.overruns = overruns or Overruns()
        self._overran = self.overruns.buffers  # of them, what has been considered
        self._longest_run = 1  # datagrams that came at once, lately
        self.incarnation = 0
        self.state = PathState.WAITING
        self.since = now
        self.room: int | None = None
        self.cap = Cap()
        self.way_out = Delay()  # to the peer: up at the client, down at the server
        self._withheld_at = -_INF
        self.withheld = 0  # bytes that it was not given, since its queue stood
        self.tx = self.rx = 0  # type 4 datagrams in this incarnation
        self.tx_bytes = self.rx_bytes = 0
        self.rx_size = 0  # longest UDP payload received in this incarnation
        self.rtt: float | None = None
        self.jitter: float | None = None  # mean deviation of `rtt`
        self.loss_up = LossMeter()
        self.loss_down = LossMeter()
        self.errors: dict[str, int] = {}
        self._answers = Allowance()

    def is_limited(self, now: float) -> bool:
        """Whether it does not take everything now, since its queue stands or it loses too much."""
        return self.cap.rate is not None

    def allot(self, count: int, size: int, now: float) -> None:
        """Set how much of `count` datagrams of `size` bytes it takes now; the rest is withheld."""
        self.room = self.cap.room(count * size, now)
        self._withhold(count, size, now)

    def rebase(self) -> None:
        """What stands above the least delay to the peer is no queue: the way has become longer."""
        self.way_out.rebase()

    def yields(self, now: float) -> bool:
        """Whether copies to it were withheld lately."""
        return now - self._withheld_at < YIELDS_FOR

    def _withhold(self, count: int, size: int, now: float) -> None:
        if self.room is not None and self.room < count * size:
            self.withheld += (count - max(0, self.room) // size) * size
            self._withheld_at = now

    def may_answer(self, now: float) -> bool:
        """Whether another message may be answered on this path in this second."""
        return self._answers.take(now)

    def sent(self, count: int, size: int) -> None:
        """`count` datagrams, `size` bytes together, were handed to the kernel."""
        self.tx += count
        self.tx_bytes += size
        if self.cap.rate is not None:
            self.cap.spend(size)

    def not_sent(self, count: int, size: int, why: str) -> None:
        """The kernel did not take them after all."""
        self.tx -= count
        self.tx_bytes -= size
        self.errors[why] = self.errors.get(why, 0) + 1

    def received(self, count: int, size: int, longest: int) -> None:
        """`count` datagrams, `size` bytes together, came in by it, the longest of `longest` bytes."""
        self.rx += count
        self._longest_run = max(self._longest_run, count)
        self.rx_bytes += size
        self.rx_size = max(self.rx_size, longest)

    def _count_in(self, meter: LossMeter, sent: int, now: float) -> None:
        """The other side has given it `sent` datagrams so far: what has not arrived, and not overrun us, is lost.

        Of what overran us since the last time as much is taken to have come by this path as lacks here, and each
        buffer to have held as many datagrams as the longest that found room.
        """
        overran, self._overran = self.overruns.buffers - self._overran, self.overruns.buffers
        if overran:
            self.rx += min(meter.missing(sent, self.rx), overran * self._longest_run)
        self._longest_run = max(1, self._longest_run // 2)
        meter.count(sent, self.rx, now)

    def status(self) -> dict[str, Any]:
        """What `status` shows of it, in its units."""
        return {
            "id": self.id,
            "state": self.state.value,
            "rtt_ms": None if self.rtt is None else round(self.rtt * 1e3, 3),
            "jitter_ms": None if self.jitter is None else round(self.jitter * 1e3, 3),
            "loss_up": self.loss_up.recent(),
            "loss_down": self.loss_down.recent(),
            "lost_up": max(0, self.loss_up.lost),
            "lost_down": max(0, self.loss_down.lost),
            "tx": self.tx,
            "rx": self.rx,
            "tx_bytes": self.tx_bytes,
            "rx_bytes": self.rx_bytes,
            "held_kbit": None if self.cap.rate is None else round(self.cap.rate * 8 / 1000),
            "withheld_bytes": self.withheld,
            "errors": dict(self.errors),
        }

    def _enter(self, state: PathState, now: float) -> bool:
        if state is self.state:
            return False
        self.state = state
        self.since = now
        return True


class ClientPath(Path):
    """A path as its owner sees it: an interface, a socket, probes on their way."""

    __slots__ = (
        "_answered", "_bytes_since_probe", "_given", "_pending", "_reached", "_sampled", "_seq", "_was_challenged",
        "address", "carries", "echoed", "heard_at", "interface", "is_open", "is_small", "label", "last_probe_at",
        "min_rtt", "name", "padded_at", "port", "probe_at", "proof_tries", "proven_at", "queue", "reached_at",
        "seen_as", "silent_since", "told_use", "unanswered", "use", "waiting", "was_heard", "was_padded", "way_down",
    )  # fmt: skip

    def __init__(self, path: int, name: str, now: float) -> None:
        super().__init__(path, now)
        self.name = name
        self.label = ""  # shown instead of its interface
        self.interface = ""
        self.address: IPv4Address | IPv6Address | None = None
        self.port = 0  # local; kept over a new socket, so that a NAT mapping may survive
        self.is_open = False
        self.was_heard = False  # since its socket was opened
        self.use = self.told_use = Use.DATA  # what it is for, and what the last probe said
        self.min_rtt = _INF
        self.queue = 0.0  # s by which the newest ECHO's way down stood above the least
        self.way_down = Delay()
        self.waiting = SendQueue()
        self.seen_as: tuple[str, int] | None = None
        self.carries = 0  # the largest inner packet that was shown to pass both ways
        self.is_small = False  # it has not carried a packet of 1280 bytes
        self.proof_tries = 0  # how often a full-size probe has been sent for that, unanswered
        self.proven_at = -_INF  # when that was shown last
        self._restart_counts(now)

    def _restart_counts(self, now: float) -> None:
        self._seq = 0
        # By seq: when, our `tx`, its bytes, padded size, when by the clock that the probe tells.
        self._pending: dict[int, tuple[float, int, int, int, int]] = {}
        self._answered = (0, 0)  # seq and ECHO number of the newest probe that was answered
        self._given = (-_INF, 0, 0)  # when the server said last what it had given to this path, and of how many packets
        self._was_challenged = False  # and has not been answered since
        self._bytes_since_probe = 0
        self.was_padded = False  # the last probe
        self.padded_at = -_INF  # when a padded one went out last
        self.echoed = 0  # highest ECHO number
        self.heard_at = -_INF  # when anything was heard here last
        self._reached = 0  # newest probe that the server has shown on another path to have come by this one
        self._sampled = 0  # newest one whose way up was counted
        self.reached_at = -_INF  # and when it said so
        self.unanswered = 0
        self.silent_since = _INF
        self.last_probe_at = -_INF
        self.probe_at = _INF
        self.tx = self.rx = 0
        self.rx_size = 0
        self.loss_up.restart()
        self.loss_down.restart()
        self.cap.restart()

    def opened(self, incarnation: int, now: float, *, is_down: bool = False) -> None:
        """A new socket: everything the server knows of the old one is void.

        `is_down`: the path is tried by other means, and stays down and silent until it answers.
        """
        silent_since = self.silent_since
        if is_down:
            self.loss_up.end(self.tx, now)
        self.incarnation = incarnation
        self.is_open = True
        self.carries = self.proof_tries = 0
        self.is_small = self.was_heard = False
        self.min_rtt = _INF
        self.rtt = self.jitter = None
        self.way_out, self.way_down, self.waiting, self.cap = Delay(), Delay(), SendQueue(), Cap()
        self.room = None
        self._restart_counts(now)
        if is_down:
            self.silent_since = silent_since
        self._enter(PathState.DOWN if is_down else PathState.PROBING, now)

    def renew(self, incarnation: int, now: float) -> None:
        """The server has forgotten us: count anew, on the same socket, and by another clock of its."""
        self.incarnation = incarnation
        self.way_out, self.way_down = Delay(), Delay()
        self._restart_counts(now)
        self.probe_at = now

    def closed(self, now: float) -> bool:
        """There is no socket any more; return whether that is news."""
        self.is_open = False
        self.probe_at = _INF
        return self._enter(PathState.WAITING, now)

    def sent(self, count: int, size: int) -> None:
        """Count, and ask for a probe after every 32 KiB."""
        self.tx += count
        self.tx_bytes += size
        self.waiting.waiting += size
        if self.cap.rate is not None:
            self.cap.spend(size)
        self._bytes_since_probe += size
        if self._bytes_since_probe >= PROBE_BYTES:
            self.probe_at = min(self.probe_at, self.last_probe_at + PROBE_SPACING)

    def received(self, count: int, size: int, longest: int) -> None:
        """Count, and ask for a probe after every 32 KiB."""
        super().received(count, size, longest)
        self._bytes_since_probe += size
        if self._bytes_since_probe >= PROBE_BYTES:
            self.probe_at = min(self.probe_at, self.last_probe_at + PROBE_SPACING)

    def status(self) -> dict[str, Any]:
        """See `Path.status`; also what the user calls it and wants it for."""
        return {**super().status(), "label": self.label or None, "use": self.use.name.lower()}

    @property
    def title(self) -> str:
        """What it is called in the log and in events."""
        return self.label or self.name

    @property
    def is_up(self) -> bool:
        """Whether it works both ways, slow or not."""
        return self.state is PathState.UP or self.state is PathState.SLOW

    @property
    def due_at(self) -> float:
        """When it is to be probed: in idleness too an unanswered probe is followed up until the path is down."""
        if not self.unanswered or self.state is PathState.DOWN or self.probe_at == _INF:
            return self.probe_at
        return min(self.probe_at, self.last_probe_at + max(FOLLOW_UP, 2 * (self.rtt or 0.0)))

    def works(self, now: float) -> bool:
        """Whether it answers: what was asked last, or not long before, has come back."""
        return self.is_open and self.is_up and now - self.silent_since <= max(DOUBT_AFTER, 3 * (self.rtt or 0.0))

    def is_silent(self, now: float) -> bool:
        """Whether it has been silent so long that copies are no use any more, and the server does not hear us there."""
        return now - self.silent_since > COPIES_WHILE_SILENT and now - self.reached_at >= HALF_LIVES_FOR

    @property
    def has_counted_out(self) -> bool:
        """Whether its probes, and the ECHOs that answer them, would soon have numbers that are too large to be said."""
        return self._seq >= MAX_SEQ

    def probes_after(self, seq: int) -> int:
        """Return how many probes have been sent since this one."""
        return self._seq - seq

    def next_probe(
        self,
        now: float,
        interval: float,
        sent_us: int,
        packets: int,
        others: tuple[Record, ...],
        padded: int,
        use: Use | None = None,
    ) -> bytes:
        """Return the plaintext of the next probe; the one after it comes in `interval` seconds at the latest.

        The probe counts itself in `tx`: the caller seals and sends it now, then calls `sent`.
        """
        self.told_use = self.use if use is None else use
        self._seq += 1
        if len(self._pending) >= MAX_PENDING:
            del self._pending[next(iter(self._pending))]
        self._pending[self._seq] = (now, self.tx + 1, self.tx_bytes, padded, sent_us)
        self.unanswered += 1
        self.was_padded = padded > 0
        if padded:
            self.padded_at = now
        if self.silent_since == _INF:
            self.silent_since = now
        self.last_probe_at = now
        self.probe_at = now + interval
        self._bytes_since_probe = 0
        return Probe(
            self.id, self.incarnation, self._seq, round(interval * 1000), sent_us, self.tx + 1, self.rx, packets,
            self.echoed, round((self.rtt or 0) * 1e6), round(self.queue * 1e6), min(self.rx_size, 0xFFFF),
            self.told_use, padded > 0, others,
        ).encode(padded)  # fmt: skip

    def record(self, now: float) -> Record:
        """What the probes on the other paths say of this one."""
        return Record(self.id, min(round((now - self.heard_at) * 1000), 0xFFFF) if self.echoed else 0xFFFF, self.echoed)

    def challenged(self) -> None:
        """The server asks whether we are at this address: it counts what it receives here only from now on.

        It has not counted the CHALLENGE as sent here either, which has just been counted as received.
        """
        self._was_challenged = True
        self.rx -= 1

    def heard_unasked(self, number: int, now: float) -> None:
        """An unasked ECHO: its way down lives, which says nothing of its way up."""
        self.echoed = max(self.echoed, number)
        self.heard_at, self.was_heard = now, True

    def reported_by_another(self, record: Record, told_us: int, now: float) -> Arrival | None:
        """Another path's ECHO says which probe of ours came by this one last: its way up lives, if that is news.

        That ECHO was sent `told_us` by the server's clock. Returns the arrival of the probe, if its own ECHO has not
        told it.
        """
        if not self._reached < record.newest <= self._seq:
            return None
        pending = self._pending.get(record.newest)
        if pending is not None and not _may_be_so_old(record, now - pending[0]):
            return None  # of an earlier socket's probe
        self._reached, self.reached_at = record.newest, now
        if pending is None or record.newest <= self._sampled or record.age_ms == NO_NEWS:
            return None
        _, given, given_bytes, _, sent_us = pending
        arrived_us = told_us - record.age_ms * 1000
        self._sampled = record.newest
        self.way_out.count(seconds_between(sent_us, arrived_us), now)
        return arrived_us, (given, given_bytes)

    def is_limited(self, now: float) -> bool:
        """Whether it does not take everything now."""
        return self.cap.rate is not None or self.waiting.is_limited(now)

    def allot(self, count: int, size: int, now: float) -> None:
        """See `Path.allot`; what waits in its own socket counts too."""
        self.room = self.cap.room(count * size, now)
        if self.waiting.is_limited(now):
            most = self.waiting.limit(self.cap.delivered_rate() or 0.0) - self.waiting.waiting
            self.room = most if self.room is None else min(most, self.room)
        self._withhold(count, size, now)

    def queue_seen(self, truesize: int, now: float) -> bool:
        """What waits in the path's socket takes `truesize` bytes of the kernel's memory (TIOCOUTQ, tty_ioctl(4)).

        Returns whether the path is limited by that.
        """
        self.waiting.seen(truesize, self.cap.delivered_rate() or 0.0, now)
        return self.waiting.is_limited(now)

    @property
    def loss_out(self) -> LossMeter:
        """What is lost on the way to the server."""
        return self.loss_up

    def delay(self, now: float) -> float:
        """Return how long a datagram takes upwards, in s; infinity while it is not known.

        A probe that should have been answered by now is worth as much as one that came back so late.
        """
        if self.rtt is None:
            return _INF
        overdue = now - self.silent_since - self.rtt - 4 * (self.jitter or 0.0)
        return self.min_rtt / 2 + self.way_out.queue(now) + max(0.0, overdue)

    def measured(self, seq: int, up: float, down: float, now: float) -> None:
        """The ECHO of a probe has shown how long both ways took.

        Arrival minus departure, each by its own side's clock, in s: only the changes mean something.
        """
        if seq > self._sampled:  # another path may have told that long ago
            self._sampled = seq
            self.way_out.count(up, now)
        self.way_down.count(down, now)
        self.queue = max(0.0, self.way_down.newest())

    def rebase(self) -> None:
        """See `Path.rebase`."""
        super().rebase()
        self.min_rtt = self.rtt or self.min_rtt

    def probed(self, seq: int) -> tuple[int, int] | None:
        """Return how many datagrams and bytes had gone this way with the probe `seq`, None if it is not awaited."""
        pending = self._pending.get(seq)
        return None if pending is None else pending[1:3]

    def echo_received(self, seq: int, number: int, held: float, tx: int, rx: int, now: float) -> int | None:
        """Count an ECHO. Return the padded size it proves (0: none), or None if it answers no probe of ours."""
        self.echoed = max(self.echoed, number)
        self.heard_at, self.was_heard = now, True
        pending = self._pending.pop(seq, None)
        if pending is None:
            return None
        sent_at, our_tx, _, padded, _ = pending
        rtt = max(0.0, now - sent_at - held)
        if self.rtt is None or self.jitter is None:
            self.rtt, self.jitter = rtt, rtt / 2
        else:  # RFC 6298, 2.3
            self.jitter += (abs(self.rtt - rtt) - self.jitter) / 4
            self.rtt += (rtt - self.rtt) / 8
        self.min_rtt = min(self.min_rtt, rtt)
        for older in [s for s in self._pending if s < seq]:
            if self._pending[older][0] < sent_at - 1.0:
                del self._pending[older]
        self.unanswered = 0
        self.silent_since = _INF
        if seq > self._answered[0] and number <= self._answered[1]:
            self.echoed = number  # the server had forgotten this path, and counts from 1 again
            self.loss_up.receiver_restarted()
            self.loss_up.count(our_tx - 1, rx, now)  # this probe arrived
            self.loss_down.restart()
        elif not self._was_challenged:
            self.loss_up.count(our_tx, rx, now)
        self._answered = max(self._answered, (seq, number))
        if self._was_challenged:  # what was under way at that moment has not been counted there
            self._was_challenged = False
            self.loss_up.restart()
            self.cap.restart()
        self._count_in(self.loss_down, tx, now)
        return padded

    def told_given(self, tx: int, packets: int, now: float) -> None:
        """The server has given `tx` datagrams to this path so far, and has sealed `packets` IP packets.

        If it gives fewer than it seals, copies to this path yield. Both are modulo 2^32. What was said long ago is no
        measure: while a path is silent it is given nothing.
        """
        said_at, tx_then, packets_then = self._given
        given, sealed = (tx - tx_then) % _MOD32, (packets - packets_then) % _MOD32
        if now - said_at > GIVEN_WITHIN:
            self._given = (now, tx, packets)
        elif now - said_at > GIVEN_SPAN and sealed < _MOD32 // 2:
            self._given = (now, tx, packets)
            is_expected = self.use is Use.DATA and not self.is_small
            if is_expected and sealed >= GIVEN_PACKETS and given < GIVEN_SHARE * sealed:
                self._withheld_at = now

    def answered(self, now: float) -> bool:
        """The path works both ways; return whether that is news."""
        was_up, self.was_heard = self.is_up, True
        if not self._enter(PathState.SLOW if self.yields(now) else PathState.UP, now):
            return False
        if not self.carries and not was_up:
            self.proof_tries = 0
        return True

    def carries_up(self, now: float) -> bool:
        """Whether it is known to carry to the server now, whatever it does the other way."""
        return self.is_up or self._has_shown(self.reached_at, now)

    def carries_down(self, now: float) -> bool:
        """Whether it is known to carry from the server now, whatever it does the other way."""
        return self.is_up or self._has_shown(self.heard_at, now)

    def lives(self, now: float) -> bool:
        """Whether it is known to carry either way now."""
        return self.carries_up(now) or self.carries_down(now)

    def _has_shown(self, sign_at: float, now: float) -> bool:
        """Whether a sign of life is about as new as the last probe that has had the time to bring one."""
        if not self.is_open or sign_at == -_INF:
            return False
        asked = (at for at, *_ in self._pending.values() if now - at > HALF_LIVES_FOR)
        return sign_at + 2 * UNASKED_INTERVAL > max(asked, default=-_INF)

    def given_up(self, now: float) -> bool:
        """Another path is tried, since a server that answers no probe was silent here; return whether that is news."""
        return self._enter(PathState.DOWN, now)

    def fell_silent(self, now: float) -> bool:
        """Whether the path must be called down now; true once."""
        patience = max(DOWN_AFTER, 4 * (self.rtt or 0.0))
        if self.state is PathState.WAITING or self.unanswered <= DOWN_PROBES or now - self.silent_since < patience:
            return False
        return self._enter(PathState.DOWN, now)


class ServerPath(Path):
    """A path as the server sees it: an id, one endpoint, at most one candidate."""

    __slots__ = (
        "_challenged_at", "_heard", "_least_took", "_order", "_queue_of", "_sampled", "_spacing", "_took", "_tx_at",
        "_unheard", "candidate", "carried_down", "endpoint", "fed_back", "idle_room", "interval", "is_told",
        "is_told_slow", "is_told_up", "number", "refreshed_at", "reported", "seq", "shown_at", "unasked_at", "use",
    )  # fmt: skip

    def __init__(self, path: int, now: float, overruns: Overruns | None = None) -> None:
        super().__init__(path, now, overruns)
        self.state = PathState.CANDIDATE
        self.endpoint: Any = None
        self.candidate: Candidate | None = None
        self._challenged_at = -_INF
        self.is_told_up = self.is_told_slow = False  # by a notice
        self.carried_down = 0  # longest UDP payload that the client has received here in this incarnation
        self._order = (-1, -1)  # session and counter of the newest probe
        self._heard = -_INF
        self.refreshed_at = -_INF
        self.interval = 0.0
        self.idle_room = 0
        self.number = 0  # of the last ECHO
        self._sampled = 0  # the ECHO whose way down was counted last
        self.reported = 0  # newest ECHO that the client has shown to have heard here, here or on another path
        self._unheard = 0  # its probes since then: it may not hear us here
        self.seq = 0
        self.unasked_at = _INF
        self.shown_at = -_INF  # when an unasked ECHO went there last
        self.use = Use.DATA
        self._spacing = PROBE_INTERVAL  # s between two refreshes, smoothed
        self.fed_back: tuple[int, int] | None = None  # datagrams and bytes that the newest probe speaks of
        # When, our `tx`, its bytes, when by the clock that the ECHO tells: of the newest ECHOs up to `number`.
        self._tx_at: deque[tuple[float, int, int, int]] = deque(maxlen=MAX_PENDING)
        self._queue_of = (0, 0.0)  # an ECHO and what the client says of the queue on its way, in s
        self._took = (0, 0.0)  # an ECHO and what its way took, in s, by clocks that agree in their pace only
        self._least_took: float | None = None  # what it takes where there is no queue, by the two
        self.is_told = False  # the client's RECEIPTs say exactly what is lost downwards

    @property
    def loss_out(self) -> LossMeter:
        """What is lost on the way to the client."""
        return self.loss_down

    def delay(self, now: float) -> float:
        """Return how long a datagram takes downwards, in s, as the client says; infinity while it has not said it.

        A probe that should have come by now, as they came lately, is worth as much as one that came so late.
        """
        if self.rtt is None:
            return _INF
        overdue = now - self.refreshed_at - 3 * self._spacing
        return self.rtt / 2 + self.way_out.queue(now) + max(0.0, overdue)

    def is_newer(self, serial: int, counter: int) -> bool:
        """R2: only a probe of a later session, or of the same with a higher counter, counts; it is remembered."""
        if (serial, counter) <= self._order:
            return False
        self._order = (serial, counter)
        return True

    def challenge(self, endpoint: Any, probe: Probe, now: float, entropy: Callable[[int], bytes]) -> bytes | None:
        """Return the 16 bytes to send to a new address; None if it was challenged just now (R3)."""
        candidate = self.candidate
        if now - self._challenged_at < CHALLENGE_SPACING:
            return None
        if candidate is None or candidate.endpoint != endpoint:
            candidate = self.candidate = Candidate(endpoint)
        candidate.probe = probe
        self._challenged_at = candidate.arrived_at = now
        return candidate.token(now, entropy)

    @property
    def limits(self) -> Limits:
        """What it may still answer, and when it challenged last: that limits the next path of this number too."""
        return self._answers, self._challenged_at

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._answers, self._challenged_at = limits

    def bind(self, candidate: Candidate, now: float) -> None:
        """The candidate has answered from its address: it is the path's endpoint from now on."""
        self.endpoint = candidate.endpoint
        self.candidate = None
        self.loss_up.restart()
        self.adopt(candidate.probe, now)
        self.loss_up.restart()  # what was under way before this moment has not been counted

    def unbind(self, now: float) -> None:
        """Its address is another path's now: it has none, until a probe of its own is answered for."""
        self.endpoint, self.unasked_at = None, _INF
        self._enter(PathState.CANDIDATE, now)

    def adopt(self, probe: Probe, now: float) -> None:
        """Take over what a counted probe from the bound endpoint says."""
        if probe.incarnation != self.incarnation:
            self.incarnation = probe.incarnation
            self.tx = self.rx = self.number = self.reported = self.rx_size = self._unheard = self._sampled = 0
            self.loss_up.restart()
            self.loss_down.restart()
            self._tx_at.clear()
            self.cap, self.way_out, self.room = Cap(), Delay(), None
            self._queue_of = self._took = (0, 0.0)
            self._least_took = None
        self._count_in(self.loss_up, probe.tx, now)
        self.fed_back = None
        heard = self._sent_with(probe.echoed)
        if heard is not None:
            _, given, given_bytes, _ = heard
            if not self.is_told:
                self.loss_down.count(given, probe.rx, now)
            if probe.echoed > self._sampled:  # in an outage the client goes on telling of the last one
                self._sampled = probe.echoed
                self.way_out.count(probe.queue_us / 1e6, now)  # as the client says
            self.fed_back = (given, given_bytes)
            self._queue_of = (probe.echoed, probe.queue_us / 1e6)
            self._calibrate()
        self._unheard += 1
        if self.reported < probe.echoed <= self.number:
            self.reported, self._unheard = probe.echoed, 0
        self.seq = probe.seq
        self.interval = probe.interval_ms / 1000
        self.use = probe.use
        self.carried_down = probe.rx_size
        self.rtt = min(probe.rtt_us / 1e6, MAX_RTT) or None
        self._heard = now
        self.refresh(now)

    def receipt_received(self, given: int, lost: int, now: float) -> None:
        """The client says how many datagrams we gave to this path, and how many of them it has lost."""
        self.is_told = True
        self.loss_down.told(given, lost, now)

    def next_number(self, now: float, sent_us: int) -> int:
        """Return the number of the next ECHO, which counts itself in `tx`; it is sent now, and tells `sent_us`."""
        self.number += 1
        self._tx_at.append((now, self.tx + 1, self.tx_bytes, sent_us))
        return self.number

    def _calibrate(self) -> None:
        """What the client says of the queue of an ECHO, and what that took, say what it takes without a queue."""
        if self._queue_of[0] == self._took[0] > 0:
            self._least_took = self._took[1] - self._queue_of[1]

    def _sent_with(self, number: int) -> tuple[float, int, int, int] | None:
        """Return what is kept of the ECHO of this number; None if there was none lately."""
        since = self.number - number
        return self._tx_at[-1 - since] if number and 0 <= since < len(self._tx_at) else None

    def refresh(self, now: float) -> None:
        """There is proof that the client is still at this endpoint."""
        spacing = min(max(now - self.refreshed_at, PROBE_SPACING), self.interval or PROBE_INTERVAL)
        self._spacing += (spacing - self._spacing) / 4
        self.refreshed_at = now
        self.idle_room = IDLE_BYTES
        is_asked = now - self._heard < UNASKED_AFTER  # else only the way down lives, and is known by unasked ECHOs
        self.unasked_at = _INF if self.interval > 1.0 else now + (UNASKED_AFTER if is_asked else UNASKED_INTERVAL)
        self._enter(PathState.FRESH, now)

    def reported_by_another(self, record: Record, told_us: int, now: float) -> Arrival | None:
        """Another path's probe says which ECHO of ours was heard here; one not reported before refreshes (R5 b).

        That probe was sent `told_us` by the client's clock. Returns the arrival of the ECHO, if that is news.
        """
        if self.endpoint is None or not self.reported <= record.newest <= self.number:
            return None
        sent = self._sent_with(record.newest)
        if sent is not None and not _may_be_so_old(record, now - sent[0]):
            return None  # of an earlier socket's ECHO
        is_news = record.newest > self.reported
        if is_news:
            self.reported, self._unheard = record.newest, 0
            self.refresh(now)
        if sent is None or record.age_ms == NO_NEWS:
            return None
        _, given, given_bytes, sent_us = sent
        arrived_us = told_us - record.age_ms * 1000
        self._took = (record.newest, seconds_between(sent_us, arrived_us))
        self._calibrate()
        if not is_news or self._least_took is None:
            return None
        self._sampled = record.newest
        self.way_out.count(max(0.0, self._took[1] - self._least_took), now)
        return arrived_us, (given, given_bytes)

    @property
    def carries_down(self) -> bool:
        """Whether the client has shown by its last probes here that it hears us here."""
        return self._unheard < DOWN_PROBES

    @property
    def mtu(self) -> int | None:
        """The largest inner packet that has been seen to pass both ways; None while no full-size probe has."""
        size = min(self.rx_size, self.carried_down) - OVERHEAD
        return size if size >= MIN_MTU else None

    def record(self, now: float) -> Record:
        """What the ECHOs on the other paths say of this one."""
        return Record(self.id, min(round((now - self._heard) * 1000), 0xFFFF) if self.seq else 0xFFFF, self.seq)

    def update(self, now: float) -> PathState:
        """Let time pass over the state, and return it."""
        if self.endpoint is None:
            return self.state
        age = now - self.refreshed_at
        if age <= max(FRESH_FOR, 4 * (self.rtt or 0.0)):
            state = PathState.FRESH
        elif self.interval > 1.0 and age <= self.interval + IDLE_SLACK:
            state = PathState.IDLE
        else:
            state = PathState.LAPSED
        if self._enter(state, now) and state is PathState.LAPSED:
            self.unasked_at = now
        return state

    def forgotten_at(self) -> float:
        """When nothing has been heard for so long that the address may be somebody else's."""
        since = max(self.since, self._challenged_at) if self.endpoint is None else self.refreshed_at
        return since + max(FORGET_AFTER, 2 * self.interval + IDLE_SLACK)

    def next_deadline(self) -> float:
        """When its state changes by the passing of time, or an unasked ECHO is due."""
        if self.endpoint is None or self.state is PathState.LAPSED:
            return min(self.forgotten_at(), self.unasked_at)
        if self.state is PathState.IDLE:
            return self.refreshed_at + self.interval + IDLE_SLACK + _TICK
        return min(self.unasked_at, self.refreshed_at + max(FRESH_FOR, 4 * (self.rtt or 0.0)) + _TICK)


def records(
    path: Path, paths: Collection[ClientPath] | Collection[ServerPath], now: float, *, is_idle: bool
) -> tuple[Record, ...]:
    """Return what a message on `path` says of the others: in idleness, where bytes count, of those heard last only."""
    found = [other.record(now) for other in paths if other is not path]
    if is_idle and len(found) > IDLE_RECORDS:
        found = sorted(found, key=lambda record: record.age_ms)[:IDLE_RECORDS]
    return tuple(found)


def _may_be_so_old(record: Record, age: float) -> bool:
    """Whether it may have arrived as long ago as the record says what was sent `age` seconds ago."""
    return record.age_ms / 1000 <= age + _TICK


class Candidate:
    """An address that claims a path, and the bytes it must send back to get it."""

    __slots__ = ("_tokens", "arrived_at", "endpoint", "probe")

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self._tokens: deque[tuple[float, bytes]] = deque(maxlen=math.ceil(ANSWER_WITHIN / CHALLENGE_LIFETIME))
        self.arrived_at = -_INF
        self.probe: Probe

    def token(self, now: float, entropy: Callable[[int], bytes]) -> bytes:
        """Return the bytes that it is to send back."""
        if not self._tokens or now - self._tokens[-1][0] >= CHALLENGE_LIFETIME:
            self._tokens.append((now, entropy(TOKEN_SIZE)))
        return self._tokens[-1][1]

    def is_answered_by(self, token: bytes, now: float) -> bool:
        """Whether these are bytes that it was sent, not too long ago."""
        return any(sent == token and now - at < ANSWER_WITHIN for at, sent in self._tokens)
