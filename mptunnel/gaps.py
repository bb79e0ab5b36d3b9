"""Silences in which packets were due: the real ones, and those that each path alone would have had.

A way is a path, or all of them together. Its silence lasts from one IP packet that came by it to the next. Of the
counters between the two one may be missing: no copy of it came by this way, neither meanwhile nor in the two seconds
until the receipts are settled. Then the silence is a gap, as long as it was. A copy that a path was not given is
missing on it too. What another path has delivered is known to be missing on this one; of a counter that nobody has
delivered it is not known whether it was a packet or some path's control message, so there a silence is a gap only if
packets were lost on every path between the marks around it.

A silence is a gap too if in it nothing at all came by this way for longer than a probe interval, and the next mark
shows that marks had been due: PROBEs, or what should have answered them, were lost, or were under way for so long (as
through a modem that keeps everything until it has found another cell). So lost PROBEs make gaps of the way down as well
where nothing else comes. If no packet was due, the gap is the time in which nothing came. That a mark is just late, by
up to half an interval, makes no gap unless packets came all the time before. A client that stood still itself owed
nothing.

A silence from before a restart of the sender until after it is a gap, on every way: what it owed it could not bring.

Silence of the application is no gap. A mark that says that nothing was sealed since the mark before it on the same
path ends the silence of all that it came by, and of every path that has brought what there was; a path that owes a
packet is silent until it brings another, or a mark of its own. While the tunnel is idle, so that marks are seconds
apart, nobody knows when a packet was due: silences begin when data comes again.

A gap on one path that another has filled is an outage bridged, if it was longer than 0.3 s. What is no longer than a
millisecond is no gap, and of those up to 20 ms only the longest of some seconds are noted: nobody asks for the others.
So is it where there are very many: of those that wait to be settled the longest are kept.

Copies of what has come before are not opened. Who can forge a path's source can make its silences look shorter here;
so all this is shown, and nothing is decided by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mptunnel.messages import MAX_PATHS, seconds_between
from mptunnel.session import FIRST_PATH, NO_PATH, WINDOW

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mptunnel.session import Session

ALL: Final = MAX_PATHS  # the way that is all paths together
OUTAGE: Final = 0.3
IN_USE_INTERVAL: Final = 1.0  # s: marks that are further apart than this are those of an idle tunnel
ONGOING: Final = 2.0  # s: who owes a packet for so long will hardly bring it
INF: Final = float("inf")
_SHORTEST: Final = 0.001  # s: a silence that is no longer is none
_PATIENCE: Final = 0.02  # s: one that is longer is always looked at, a shorter one if it is the longest lately
_SLACK: Final = 0.02  # s by which a mark may come late
_LATE: Final = 0.01  # s: a mark that was under way for so much longer than the one before it was held up
_LONG: Final = 1.5  # waits: for so long nothing is heard where no mark just came late
_LIVELY: Final = 0.05  # s: what comes at least so often comes all the time
_MANY: Final = 3  # waits: where fewer marks were due than fill the time, something else was going on
_JUDGED_WITHIN: Final = 1.0  # s after a stretch: the next mark has come, or there is none
# Silences of a way that wait to be settled, the longest; more of all paths together, which a slow path may still fill.
_MAX_SUSPECTS, _MAX_OF_ALL = 16, 64

IS_DATA: Final = bytes(0xFF if who >= NO_PATH else 0 for who in range(256))


class Stretch:
    """A time in which nothing at all came by a way, for longer than marks are apart there."""

    __slots__ = ("began_at", "ended_at", "is_long", "owed", "was_lively")

    def __init__(self, began_at: float, ended_at: float, *, is_long: bool, was_lively: bool) -> None:
        self.began_at, self.ended_at = began_at, ended_at
        self.is_long = is_long  # too long for a mark that was just late
        self.was_lively = was_lively  # before it packets came all the time
        self.owed = 0.0  # s of it in which marks were due, as far as is known yet

    @property
    def length(self) -> float:
        """Its length in s."""
        return self.ended_at - self.began_at

    def judge(self, marks: Marks, owed: float) -> None:
        """The newest mark of a path shows that marks were due for `owed` seconds, if it can know."""
        if not self.owed and marks.before_at <= self.began_at and self.length > marks.wait_before:
            is_many = owed > _MANY * marks.wait_before
            self.owed = min(owed, self.length) if owed >= self.length or is_many else 0.0

    def is_open(self, now: float) -> bool:
        """Whether it may still be shown that marks were due in it, or has been."""
        return self.owed > 0.0 or now - self.ended_at < _JUDGED_WITHIN


class Marks:
    """The marks of one path: PROBEs, or the ECHOs that answer them."""

    __slots__ = ("_came_at", "_incarnation", "_sent_us", "_seq", "before_at", "wait_before")

    def __init__(self) -> None:
        self._incarnation = self._seq = self._sent_us = 0
        self._came_at = INF
        self.before_at = INF  # when the one before the newest came, if of the same incarnation
        self.wait_before = INF

    def came(self, incarnation: int, seq: int, sent_us: int, later: float, wait: float, now: float) -> float | None:
        """Take a mark; return for how long marks had been due when it came, None if it was overtaken.

        That is as long as those take that are missing before it, which would have come every `wait` seconds at the
        latest, and by how much it is late itself; which nobody knows for longer than `later` PROBEs were sent after it.
        """
        is_same = incarnation == self._incarnation and self._seq > 0
        if is_same and seq <= self._seq:
            return None
        missing = seq - self._seq - 1
        late = now - self._came_at - seconds_between(self._sent_us, sent_us) if is_same else 0.0
        self.before_at, self.wait_before = self._came_at if is_same else INF, wait
        self._incarnation, self._seq, self._sent_us, self._came_at = incarnation, seq, sent_us, now
        if not is_same or not (missing or late > _LATE):
            return 0.0
        return missing * wait + (wait + late if late <= (later + 1) * wait else 0.0)


class Way:
    """A path, or (`bit` 0) all of them: since when it is silent, what it brought last, its gaps so far."""

    __slots__ = (
        "at", "bit", "bridged", "bridged_time", "fresh", "heard_at", "held", "high", "lively_since", "longest", "marks",
        "newest_stretch", "owes", "patience", "session", "stands_by", "stretch", "wait",
    )  # fmt: skip

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.at = INF  # since when nothing has come; infinity: it is not known that anything was due since
        self.session: Session | None = None
        self.high = -1  # highest counter that it has brought under this session
        self.patience = _SHORTEST  # silences up to this are not worth a look
        self.held: tuple[float, Session, int] | None = None  # a silence that an old packet has ended
        self.owes = False
        self.marks = Marks()
        self.heard_at = INF  # when anything came, a mark or a packet
        self.wait = INF  # for how long that may be ago: a probe interval, and some more
        self.lively_since = INF  # packets come all the time
        self.stretch: Stretch | None = None  # the longest in this silence
        self.newest_stretch: Stretch | None = None
        self.longest = 0.0
        self.fresh = 0.0  # longest since it was taken out last
        self.bridged = 0
        self.bridged_time = 0.0
        self.stands_by = False  # so its silences are no outages

    def begin(self, session: Session, counter: int, now: float) -> None:
        """From now on something is due; what was sealed up to `counter` is none of its business any more."""
        if self.at == INF:
            self.heard_at = now if self.heard_at == INF else max(now, self.heard_at)
            self.stretch = None
        self.at = self.lively_since = now
        self.session, self.high, self.owes, self.held = session, counter, False, None

    def rest(self) -> None:
        """It is not known any more that anything is due."""
        self.at, self.owes, self.held = INF, False, None
        self.lively_since, self.stretch = INF, None

    def listen(self, now: float) -> None:
        """Something comes now: look how long nothing came."""
        silence = now - self.heard_at
        if self.at < INF and silence > self.wait and (self.stretch is None or silence > self.stretch.length):
            was_lively = self.heard_at - self.at <= _LIVELY and self.heard_at - self.lively_since >= self.wait
            is_long = silence > _LONG * self.wait
            self.stretch = self.newest_stretch = Stretch(self.heard_at, now, is_long=is_long, was_lively=was_lively)

    def unheard_since(self, begin: float, now: float) -> float:
        """Return how long nothing at all came in a time that began then, if it is not just marks that are apart."""
        if now - self.heard_at > self.wait:
            return now - self.heard_at
        newest = self.newest_stretch
        return newest.length if newest is not None and newest.ended_at > begin else 0.0

    def take_stretch(self, now: float) -> Stretch | None:
        """Return the longest stretch of a silence that has ended; it is not kept any more."""
        stretch, self.stretch = self.stretch, None
        return stretch if stretch is not None and stretch.is_open(now) else None

    def note(self, length: float, *, is_bridged: bool) -> None:
        """There was a gap."""
        self.longest = max(self.longest, length)
        self.fresh = max(self.fresh, length)
        if is_bridged and length > OUTAGE and not self.stands_by:
            self.bridged += 1
            self.bridged_time += length


class Suspect:
    """A silence between two counters that will have been a gap if one of them stays missing, or if it was `unheard`.

    Where the two are of different sessions, nobody can tell how many there were at the end of the older one.
    """

    __slots__ = (
        "_unheard", "after", "before", "has_loss", "is_filled", "is_lost", "length", "older", "session", "stretch",
        "way",
    )  # fmt: skip

    def __init__(
        self, way: Way, length: float, session: Session, before: int, after: int, older: Session | None = None
    ) -> None:
        self.way, self.length, self.session, self.before = way, length, session, before
        self.after, self.older = after, older  # `after` is a counter of the older session, if there is one
        self.has_loss = False  # between the marks around it packets were lost on every path
        self.stretch: Stretch | None = None  # the longest in it
        self._unheard = 0.0  # how long a gap that makes of it, if marks were due all the time
        self.is_lost = False  # as was seen last
        self.is_filled = False  # meanwhile others have brought what this way has brought later

    def has(self, stretch: Stretch, length: float, *, is_filled: bool) -> None:
        """Nothing at all was heard in it for some time: if marks were due then, it was a gap of this length."""
        self.stretch, self._unheard, self.is_filled = stretch, length, is_filled

    def unheard(self) -> float:
        """Return for how long it was a gap even if nothing was lost."""
        stretch = self.stretch
        if stretch is None:
            return 0.0
        return self._unheard if stretch.owed >= stretch.length else stretch.owed

    def begins_before(self, mark: tuple[int, int]) -> bool:
        """Whether some of it was sealed before a mark."""
        return mark > ((self.older or self.session).serial, self.after)

    def spans(self, serial: float) -> bool:
        """Whether it began before the session `serial` and ended with it or a later one."""
        return self.older is not None and self.older.serial < serial <= self.session.serial

    def concerns(self, session: Session) -> bool:
        """Whether its counters are of this session."""
        return session is self.session or session is self.older

    def is_possible(self) -> bool:
        """Whether it may still have been a gap: no slower path has filled it meanwhile."""
        return self.is_lost or self.older is not None or self.stretch is not None or any(self.lacking())

    def lacking(self) -> tuple[bool, bool]:
        """Return whether a packet is missing on its path by now, and whether one may be missing everywhere."""
        bit = self.way.bit
        if self.older is None:
            is_lacking, is_open = _lacking(self.session, bit, self.after + 1, self.before - 1)
            self.is_lost = is_lacking
            return is_lacking, is_open
        is_lacking = _lacking(self.older, bit, self.after + 1, self.older.window.top)[0]
        return is_lacking or _lacking(self.session, bit, 0, self.before - 1)[0], True


class Gaps:
    """All silences of one direction, as its receiver sees them."""

    __slots__ = ("_anew", "_in_use", "_suspects", "is_idle", "ways")

    def __init__(self) -> None:
        self.ways = [*(Way(1 << path) for path in range(MAX_PATHS)), Way(0)]
        self._suspects: list[Suspect] = []
        self._in_use = 0
        self._anew: float = INF  # the first session since the sender has begun anew
        self.is_idle = True

    def sender_restarted(self, serial: int, now: float) -> None:
        """The session `serial` is the first one of another run of the sender; while there was none, marks were due."""
        self._anew = float(serial)
        for way in self.ways:
            way.listen(now)
            way.heard_at = now
            if way.stretch is not None and way.stretch.is_open(now):
                way.stretch.owed = way.stretch.length

    def stand_by(self, standing: int) -> None:
        """These paths stand by, by bit; they alone would have been silent."""
        for way in self.ways[:MAX_PATHS]:
            way.stands_by = way.bit & standing != 0

    def came(self, numbers: Iterable[int], session: Session, low: int, high: int, now: float) -> None:
        """Copies of IP packets, first or later ones, came by these ways, all within these counters."""
        for number in numbers:
            way = self.ways[number]
            silence = now - way.at
            is_next = low == way.high + 1 and session is way.session
            if (
                (silence > way.patience and (not is_next or silence > _LIVELY))
                or now - way.heard_at > way.wait
                or way.held is not None
                or way.stretch is not None
            ):
                self._look(way, session, low, now)
            way.at = way.heard_at = now
            way.owes = False
            if session is not way.session:
                if way.session is None or session.serial > way.session.serial:
                    way.session, way.high = session, high
            elif high > way.high:
                way.high = high

    def heard(
        self, path: int, incarnation: int, seq: int, probe_us: int, later: float, interval: float, now: float
    ) -> None:
        """A mark came by a path, where the next one is due in `interval` seconds.

        It is the PROBE `seq` of this incarnation, sent at `probe_us`, or its ECHO, and `later` PROBEs are known to have
        been sent after it; an unasked ECHO (0) shows nothing.
        """
        way, whole = self.ways[path], self.ways[ALL]
        wait = way.wait
        for each in (way, whole):
            each.listen(now)
            each.heard_at = now
        way.wait = interval + _SLACK
        if interval <= IN_USE_INTERVAL:  # else others are heard more often
            whole.wait = way.wait
        owed = way.marks.came(incarnation, seq, probe_us, later, wait, now) if seq else None
        if owed is None:
            return
        for stretch in (way.stretch, whole.stretch):
            if stretch is not None:
                stretch.judge(way.marks, owed)
        for suspect in self._suspects:
            if suspect.stretch is not None and (suspect.way is way or suspect.way is whole):
                suspect.stretch.judge(way.marks, owed)

    def woken(self, session: Session, low: int, now: float) -> None:
        """The tunnel was idle, and IP packets came, `low` the first: every path in use owes them from now on."""
        self.is_idle = False
        self.ways[ALL].lively_since = now
        for way in self.ways:
            if way.bit & self._in_use and way.at == INF:
                way.begin(session, low - 1, now)

    def quiet(self, session: Session, counter: int, path: int | None, now: float) -> None:
        """A mark under `counter` by `path` says: nothing was sealed for a while before it, and it is the newest."""
        newest = self.ways[ALL]
        if newest.session is not None and (newest.session.serial, newest.high) > (session.serial, counter):
            return  # the application speaks again
        for number, way in enumerate(self.ways):
            if way.at == INF or (way.owes and number != path):
                continue
            silence, after = now - way.at, way.high if way.session is session else -1
            if way.held is not None:
                silence, after = max(silence, way.held[0]), way.held[2] if way.held[1] is session else after
            is_lacking, is_open = _lacking(session, way.bit, after + 1, counter - 1)
            if is_lacking and number != path:
                way.owes = True
                continue
            suspect = Suspect(way, silence, session, counter, after)
            stretch = way.take_stretch(now) if number in {path, ALL} else None  # the others have still to be heard
            if stretch is not None and stretch.is_long:
                suspect.has(stretch, stretch.length, is_filled=is_lacking)
            if suspect.stretch is not None or ((is_lacking or is_open) and suspect.length > way.patience):
                self._suspect(suspect)
            way.begin(session, counter, now)

    def idle(self) -> None:
        """The next mark is seconds away: from now on nobody knows when what comes was due."""
        self.is_idle = True
        for way in self.ways:
            if not way.owes:
                stretch = way.take_stretch(INF)
                if stretch is not None and stretch.is_long:
                    way.note(stretch.owed, is_bridged=False)
                way.rest()

    def settled(self, session: Session, counter: int, in_use: int, marked_at: float, *, has_loss: bool) -> None:
        """All that was sealed before `counter`, a mark that came at `marked_at`, has come, or will never."""
        kept, mark = [], (session.serial, counter)
        for suspect in self._suspects:
            suspect.has_loss = suspect.has_loss or (has_loss and suspect.begins_before(mark))
            if mark < (suspect.session.serial, suspect.before):
                kept.append(suspect)
            else:
                self._resolve(suspect)
        self._suspects = kept
        if in_use != self._in_use:
            self._use(in_use, session, counter, marked_at)

    def retire(self, session: Session) -> None:
        """A session's window is about to be closed."""
        for suspect in self._suspects:
            if suspect.concerns(session):
                self._resolve(suspect)
        self._suspects = [suspect for suspect in self._suspects if not suspect.concerns(session)]
        for way in self.ways:
            if way.held is not None and way.held[1] is session:
                way.held = None
            if way.session is session:
                way.owes = way.owes or (
                    way.at < INF and _lacking(session, way.bit, way.high + 1, session.window.top)[0]
                )
                way.session = None
                way.high = -1

    def forget(self, path: int) -> None:
        """Another path has got this number."""
        self.ways[path] = Way(1 << path)
        self._suspects = [suspect for suspect in self._suspects if suspect.way.bit != 1 << path]
        self._in_use &= ~(1 << path)  # so it is silent from the next mark on

    def ignore(self, longest: Sequence[float]) -> None:
        """These were the longest gaps lately, by way: shorter ones need not be noted, up to 20 ms."""
        for way, length in zip(self.ways, longest, strict=True):
            way.patience = min(_PATIENCE, max(_SHORTEST, length))

    def ongoing(self, way: Way, now: float) -> float:
        """Return for how long a path that owes a packet has been silent by now, 0 if it is not."""
        silence = now - way.at
        if silence < ONGOING:
            return 0.0
        if not way.owes:
            newest = self.ways[ALL]
            if newest.session is None:
                return 0.0
            after = way.high if way.session is newest.session else -1
            way.owes = _lacking(newest.session, way.bit, after + 1, newest.high)[0]
        return silence if way.owes else 0.0

    def _look(self, way: Way, session: Session, low: int, now: float) -> None:
        """A silence has ended with counter `low`: suspect it, if anything was due in it."""
        if way.at == INF:
            return
        way.listen(now)
        silence, before = now - way.at, way.session
        if silence > _LIVELY:
            way.lively_since = now
        after = way.high if before is session else -1
        if (before is session and low <= after) or (before is not None and session.serial < before.serial):
            # What was due, a newer one will show.
            if silence > way.patience and (way.held is None or silence > way.held[0]):
                way.held = (silence, session, after) if way.held is None else (silence, *way.held[1:])
            return
        if way.held is not None:
            silence = max(silence, way.held[0])
            after = way.held[2] if way.held[1] is session else after
            way.held = None
        stretch = way.take_stretch(now)
        if stretch is None and silence <= way.patience:
            return
        if before is None and way.owes:  # under a session that is gone
            way.note(silence, is_bridged=way.bit > 0)
            return
        older = None if before is session else before
        suspect = Suspect(way, silence, session, low, way.high if older else after, older)
        if stretch is not None and (stretch.is_long or stretch.was_lively):
            alone = stretch.length - self.ways[ALL].unheard_since(stretch.began_at, now)
            is_filled = alone > OUTAGE and _filled(session, way.bit, after + 1)
            is_over = now - stretch.ended_at > _SLACK  # a mark has ended it, and nothing was due for a while
            suspect.has(stretch, stretch.length if is_over else max(silence, stretch.length), is_filled=is_filled)
        if suspect.stretch is not None or any(suspect.lacking()):
            self._suspect(suspect)

    def _suspect(self, suspect: Suspect) -> None:
        self._suspects.append(suspect)
        alike = [other for other in self._suspects if other.way is suspect.way]
        if len(alike) <= (_MAX_SUSPECTS if suspect.way.bit else _MAX_OF_ALL):
            return
        filled = [other for other in alike if not other.is_possible()]
        for other in filled or (min(alike, key=_length),):
            self._suspects.remove(other)

    def _resolve(self, suspect: Suspect) -> None:
        way = suspect.way
        is_lacking, is_open = suspect.lacking()
        is_restart = suspect.spans(self._anew)
        has_lost, unheard = is_restart or is_lacking or (is_open and suspect.has_loss), suspect.unheard()
        if has_lost or unheard:
            is_bridged = is_lacking or (unheard > 0.0 and suspect.is_filled)
            length = max(suspect.length if has_lost else 0.0, unheard)
            way.note(length, is_bridged=is_bridged and not is_restart)

    def _use(self, in_use: int, session: Session, counter: int, since: float) -> None:
        """Other paths are in use now, the new ones since a mark under `counter`."""
        before, self._in_use = self._in_use, in_use
        for way in self.ways[:MAX_PATHS]:
            if not way.bit & in_use:
                way.rest()
            elif not way.bit & before and way.at == INF and not self.is_idle:
                way.begin(session, counter, since)


def _lacking(session: Session, bit: int, first: int, last: int) -> tuple[bool, bool]:
    """Return whether a packet is missing on a path among these counters, and whether one is missing everywhere."""
    window = session.window
    first = max(first, window.top - WINDOW + 1)
    last = min(last, window.top)
    if last < first:
        return False, False
    who, paths = window.deliveries(first, last)
    is_open = 0 in who
    if not bit:
        return False, is_open
    data = int.from_bytes(who.translate(IS_DATA), "little")
    bits = int.from_bytes(bytes((bit,)) * len(who), "little")
    return data & bits & ~int.from_bytes(paths, "little") != 0, is_open


def _filled(session: Session, bit: int, first: int) -> bool:
    """Return whether another path was the first to bring one of the packets from this counter on."""
    window = session.window
    first = max(first, window.top - WINDOW + 1)
    if window.top < first:
        return False
    who = window.deliveries(first, window.top)[0]
    return any(who.count(FIRST_PATH + path) for path in range(MAX_PATHS) if 1 << path != bit)


def _length(suspect: Suspect) -> float:
    return suspect.length
