"""Silences in which packets were due: the real ones, and those that each path alone would have had.

A way is a path, or all of them together. Its silence lasts from one IP packet that came by it to the next. Of the
counters between the two one may be missing: no copy of it came by this way, neither meanwhile nor in the two seconds
until the receipts are settled. Then the silence is a gap, as long as it was. A copy that a path was not given is
missing on it too. What another path has delivered is known to be missing on this one; of a counter that nobody has
delivered it is not known whether it was a packet or some path's control message, so there a silence is a gap only if
packets were lost on every path between the marks around it.

A silence is a gap too if in it nothing at all came by this way for longer than a probe interval, and the next mark
shows that marks had been due: PROBEs, or what should have answered them, were lost, or were under way for so long (as
through a modem that keeps everything until it has found another cell). If no packet was due, the gap is the time in
which marks were; so short a one that a mark was just late is none. A client that stood still itself owed nothing.

A silence from before a restart of the sender until after it is a gap, on every way: what it owed it could not bring.

Silence of the application is no gap. A mark that says that nothing was sealed since the mark before it on the same
path ends the silence of all that it came by, and of every path that has brought what there was; a path that owes a
packet is silent until it brings another, or a mark of its own. While the tunnel is idle, so that marks are seconds
apart, nobody knows when a packet was due: silences begin when data comes again.

A gap on one path that another has filled is an outage bridged, if it was longer than 0.3 s.

Copies of what has come before are not opened. Who can forge a path's source can make its silences look shorter here;
so all this is shown, and nothing is decided by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mptunnel.messages import MAX_PATHS, seconds_between
from mptunnel.session import NO_PATH, WINDOW

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mptunnel.session import Session

ALL: Final = MAX_PATHS  # the way that is all paths together
OUTAGE: Final = 0.3
ONGOING: Final = 2.0  # s: who owes a packet for so long will hardly bring it
INF: Final = float("inf")
_GAP: Final = 0.02  # s: shorter silences are not worth a look
_LATE: Final = 0.01  # s: a mark that was under way for so much longer than the one before it was held up
_MISSED: Final = 1.5  # waits: for so long nothing is heard where no mark just came late
_MAX_SUSPECTS: Final = 16  # silences of one way that wait to be settled, the longest

IS_DATA: Final = bytes(0xFF if who >= NO_PATH else 0 for who in range(256))


class Way:
    """A path, or (`bit` 0) all of them: since when it is silent, what it brought last, its gaps so far."""

    __slots__ = (
        "_newest_mark", "at", "bit", "bridged", "bridged_time", "doubted", "fresh", "has_missed", "heard_at", "held",
        "high", "longest", "lull", "owes", "patience", "session", "stands_by", "unheard", "wait",
    )  # fmt: skip

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.at = INF  # since when nothing has come; infinity: it is not known that anything was due since
        self.session: Session | None = None
        self.high = -1  # highest counter that it has brought under this session
        self.patience = _GAP
        self.held: tuple[float, Session, int] | None = None  # a silence that an old packet has ended
        self.owes = False
        self.heard_at = INF  # when anything came, a mark or a packet
        self.wait = INF  # for how long that may be ago: a probe interval, and some more
        self.unheard = 0.0  # how long, in this silence, nothing came at all although marks were due
        self.doubted = 0.0  # the same, while the next mark has still to show whether any were
        self.has_missed = False  # it was so long that a mark was not just late
        self.lull = (-INF, 0.0)  # when its last silence ended, and how long it was
        self._newest_mark: tuple[int, int, int, float] | None = None  # incarnation, number, when sent, when it came
        self.longest = 0.0
        self.fresh = 0.0  # longest since it was taken out last
        self.bridged = 0
        self.bridged_time = 0.0
        self.stands_by = False  # so its silences are no outages

    def begin(self, session: Session, counter: int, now: float) -> None:
        """From now on something is due; what was sealed up to `counter` is none of its business any more."""
        if self.at == INF:
            self.heard_at = now
            self.forget_unheard()
        self.at, self.session, self.high, self.owes = now, session, counter, False

    def rest(self) -> None:
        """It is not known any more that anything is due."""
        self.at, self.owes = INF, False
        self.forget_unheard()

    def owed(self, incarnation: int, number: int, sent_us: int, now: float) -> float:
        """Return for how long marks had been due when this one came: those since the last one, and this one if late."""
        before = self._newest_mark
        if before is not None and before[0] == incarnation and number <= before[1]:
            return 0.0  # one that was overtaken
        self._newest_mark = (incarnation, number, sent_us, now)
        if before is None or before[0] != incarnation:
            return 0.0
        late = now - before[3] - seconds_between(before[2], sent_us)
        if number == before[1] + 1 and late < _LATE:
            return 0.0
        return (number - before[1]) * self.wait + max(0.0, late)

    def heard(self, interval: float, now: float) -> None:
        """A mark came by it; the next one is due in `interval` seconds."""
        silence = now - self.heard_at
        if self.at < INF and silence > self.wait:
            self.doubted = max(self.doubted, silence)
            self.has_missed = self.has_missed or silence > _MISSED * self.wait
        self.heard_at, self.wait = now, interval + _GAP

    def judge(self, owed: float) -> None:
        """The mark shows that marks were due for `owed` seconds while nothing was heard."""
        self.unheard = max(self.unheard, min(self.doubted, owed))
        self.doubted = 0.0

    def missed(self) -> float:
        """Return for how long nothing at all was heard in this silence, in which no packet was due, and begin anew."""
        if self.doubted:
            return 0.0  # not yet
        unheard = self.unheard if self.has_missed else 0.0
        self.forget_unheard()
        return unheard

    def forget_unheard(self) -> None:
        """What was unheard was so in a silence that is over."""
        self.unheard = self.doubted = 0.0
        self.has_missed = False

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
        "after", "before", "doubted", "has_loss", "is_filled", "length", "older", "session", "unheard", "way",
    )  # fmt: skip

    def __init__(
        self, way: Way, length: float, session: Session, before: int, after: int, older: Session | None = None
    ) -> None:
        self.way, self.length, self.session, self.before = way, length, session, before
        self.after, self.older = after, older  # `after` is a counter of the older session, if there is one
        self.has_loss = False  # between the marks around it packets were lost on every path
        self.unheard = 0.0  # how long a gap it was even if nothing was lost
        self.doubted = 0.0  # how long nothing came at all, while the next mark has still to show whether any were due
        self.is_filled = False  # meanwhile others have brought what this way has brought later

    def judge(self, owed: float) -> None:
        """The next mark shows that marks were due for `owed` seconds while nothing was heard."""
        if self.doubted:
            self.unheard = max(self.unheard, self.length if owed >= self.doubted else owed)
            self.doubted = 0.0

    def begins_before(self, mark: tuple[int, int]) -> bool:
        """Whether some of it was sealed before a mark."""
        return mark > ((self.older or self.session).serial, self.after)

    def spans(self, serial: float) -> bool:
        """Whether it began before the session `serial` and ended with it or a later one."""
        return self.older is not None and self.older.serial < serial <= self.session.serial

    def concerns(self, session: Session) -> bool:
        """Whether its counters are of this session."""
        return session is self.session or session is self.older

    def lacking(self) -> tuple[bool, bool]:
        """Return whether a packet is missing on its path by now, and whether one may be missing everywhere."""
        bit = self.way.bit
        if self.older is None:
            return _lacking(self.session, bit, self.after + 1, self.before - 1)
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

    def sender_restarted(self, serial: int) -> None:
        """The session `serial` is the first one of another run of the sender."""
        self._anew = float(serial)

    def stand_by(self, standing: int) -> None:
        """These paths stand by, by bit; they alone would have been silent."""
        for way in self.ways[:MAX_PATHS]:
            way.stands_by = way.bit & standing != 0

    def came(self, numbers: Iterable[int], session: Session, low: int, high: int, now: float) -> None:
        """Copies of IP packets, first or later ones, came by these ways, all within these counters."""
        for number in numbers:
            way = self.ways[number]
            if now - way.at > way.patience or now - way.heard_at > way.wait or way.unheard:
                self._look(way, session, low, now)
            way.at = way.heard_at = now
            way.owes = False
            if session is not way.session:
                if way.session is None or session.serial > way.session.serial:
                    way.session, way.high = session, high
            elif high > way.high:
                way.high = high

    def heard(self, path: int, incarnation: int, seq: int, probe_us: int, interval: float, now: float) -> None:
        """A mark came by a path, where the next one is due in `interval` seconds.

        It is the PROBE `seq` of this incarnation, sent at `probe_us`, or its ECHO; an unasked one (0) shows nothing.
        """
        way, whole = self.ways[path], self.ways[ALL]
        owed = way.owed(incarnation, seq, probe_us, now) if seq else 0.0
        for each in (way, whole):
            each.heard(interval, now)
        if not seq:
            return
        way.judge(owed)
        whole.judge(owed)
        for suspect in self._suspects:
            if suspect.way is way or suspect.way is whole:
                suspect.judge(owed)

    def woken(self, session: Session, low: int, now: float) -> None:
        """The tunnel was idle, and IP packets came, `low` the first: every path in use owes them from now on."""
        self.is_idle = False
        for way in self.ways:
            if way.bit & self._in_use and way.at == INF:
                way.begin(session, low - 1, now)

    def quiet(self, session: Session, counter: int, path: int | None, now: float) -> None:
        """A mark under `counter` by `path` says: nothing was sealed for a while before it, and it is the newest."""
        newest = self.ways[ALL]
        if newest.session is session and newest.high > counter:
            return  # the application speaks again
        for number, way in enumerate(self.ways):
            if way.at == INF or (way.owes and number != path):
                continue
            after = way.high if way.session is session else -1
            is_lacking, is_open = _lacking(session, way.bit, after + 1, counter - 1)
            if is_lacking and number != path:
                way.owes = True
                continue
            unheard = way.missed() if number in {path, ALL} else 0.0  # the others have still to be heard
            if unheard or ((is_lacking or is_open) and now - way.at > _GAP):
                suspect = Suspect(way, now - way.at, session, counter, after)
                suspect.unheard, suspect.is_filled = unheard, is_lacking
                self._suspect(suspect)
            way.begin(session, counter, now)

    def idle(self) -> None:
        """The next mark is seconds away: from now on nobody knows when what comes was due."""
        self.is_idle = True
        for way in self.ways:
            if not way.owes:
                if unheard := way.missed():
                    way.note(unheard, is_bridged=False)
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
                way.held, way.patience = None, _GAP
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
        silence, before = now - way.at, way.session
        if now - way.heard_at > way.wait:
            way.doubted = max(way.doubted, now - way.heard_at)
        after = way.high if before is session else -1
        if (before is session and low <= after) or (before is not None and session.serial < before.serial):
            if silence > _GAP and (way.held is None or silence > way.held[0]):  # what was due, a newer one will show
                way.held = (silence, session, after) if way.held is None else (silence, *way.held[1:])
                way.patience = -1.0
            return
        if way.held is not None:
            silence = max(silence, way.held[0])
            after = way.held[2] if way.held[1] is session else after
            way.held, way.patience = None, _GAP
        unheard, doubted = way.unheard, way.doubted
        way.forget_unheard()
        if max(silence, unheard, doubted) <= _GAP:
            return
        way.lull = (now, silence)
        if before is None and way.owes:  # under a session that is gone
            way.note(max(silence, unheard), is_bridged=way.bit > 0)
            return
        older = None if before is session else before
        suspect = Suspect(way, silence, session, low, way.high if older else after, older)
        suspect.length, suspect.doubted = max(silence, doubted), doubted
        suspect.unheard = max(silence, unheard) if unheard else 0.0
        if unheard or doubted:
            ended_at, lull = self.ways[ALL].lull
            is_alone = silence - (lull if now - ended_at < silence else 0.0) > _GAP
            suspect.is_filled = is_alone and _lacking(session, way.bit, after + 1, session.window.top)[0]
        if unheard or doubted or any(suspect.lacking()):
            self._suspect(suspect)

    def _suspect(self, suspect: Suspect) -> None:
        self._suspects.append(suspect)
        alike = [other for other in self._suspects if other.way is suspect.way]
        if len(alike) > _MAX_SUSPECTS:
            self._suspects.remove(min(alike, key=_length))

    def _resolve(self, suspect: Suspect) -> None:
        way = suspect.way
        is_lacking, is_open = suspect.lacking()
        is_restart = suspect.spans(self._anew)
        has_lost = is_restart or is_lacking or (is_open and suspect.has_loss)
        if has_lost or suspect.unheard:
            is_bridged = is_lacking or (suspect.unheard > 0.0 and suspect.is_filled)
            length = max(suspect.length if has_lost else 0.0, suspect.unheard)
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


def _length(suspect: Suspect) -> float:
    return max(suspect.length, suspect.unheard)
