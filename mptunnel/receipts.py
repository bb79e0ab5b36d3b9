"""Receipts: who delivered what, settled exactly, two seconds after the fact.

The receiver's window knows for each counter which path delivered it first and which delivered it at all. A PROBE or
an ECHO says how many IP packets its sender has sealed before it (`packets`). Its own counter is therefore a mark: all
data below it was sealed before, and two seconds later every copy that will still come has come. Then

* lost = packets sealed up to the mark - packets delivered up to the mark: lost on every path,
* missed[path] = packets delivered by others that this path did not deliver: what this path alone would have cost,
* saved = packets that were delivered although at least one path in use did not deliver them,
* first[path] = packets whose first copy came by this path.

What comes for the first time later than that is added when it comes; a copy that does was missed. Which silences were
gaps is in `gaps`.

The sender is told of this account by a RECEIPT: at most one a second, and when nothing is added any more, the last
one again after 1, 2 and 4 s. Its counts are since the account began, so what is lost of them costs nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mptunnel.gaps import ALL, IN_USE_INTERVAL, INF, IS_DATA, Gaps
from mptunnel.history import History, path_status, receipt_status
from mptunnel.messages import MAX_PATHS, PathReceipt, Receipt
from mptunnel.session import FIRST_PATH, WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mptunnel.session import Session

SETTLE_AFTER: Final = 2.0
MARK_INTERVAL: Final = 0.2
_ALL_PATHS: Final = (1 << MAX_PATHS) - 1
_MOD32: Final = 1 << 32
PAUSES: Final[tuple[float, ...]] = (1.0, 1.0, 2.0, 4.0)  # after a RECEIPT, and after each that repeats it


class _Mark(NamedTuple):
    """The sender had sealed `packets` before `counter`; accounted for when it is `due`."""

    due: float
    session: Session
    counter: int
    packets: int
    in_use: int


class Receipts:
    """The account of one direction, kept by its receiver."""

    __slots__ = (
        "_anew", "_begun_in", "_count", "_in_use", "_marks", "_newest", "_repeats", "_said", "_said_at", "_said_by",
        "_sessions", "_standing", "_used", "first", "gaps", "history", "lost", "missed", "packets", "received", "saved",
    )  # fmt: skip

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque()
        self._used = _ALL_PATHS  # those in use at the last mark settled: one that joins is expected from the next on
        self._newest = (-1, -1)  # session and counter of the last mark
        self._sessions: dict[int, Session] = {}  # by serial: those that have brought data
        self._count: int | None = None  # the sender's, modulo 2^32, at the last mark settled
        self._anew: float = INF  # the serial of the first session in which the sender counts from 0 again
        self._begun_in = -1  # a session in which it was known to have done so
        self._said_by: dict[int | None, int] = {}  # the sender's count at the last mark of each path
        self._in_use = 0
        self._standing = 0  # a bit for each path that stands by
        self._said: tuple[int, ...] = ()  # the counts of the last RECEIPT
        self._said_at = -INF
        self._repeats = 0
        self.gaps = Gaps()
        self.history = History()
        self.packets = 0
        self.received = 0
        self.lost = 0
        self.saved = 0
        self.first = [0] * MAX_PATHS
        self.missed = [0] * MAX_PATHS

    @property
    def longest_gap(self) -> float:
        """The longest time in which nothing came although packets were lost, in s."""
        return self.gaps.ways[ALL].longest

    def arrived(self, session: Session, counters: Sequence[int], now: float, path: int | None = None) -> None:
        """IP packets came in under these counters, their first copies, by `path`; of later ones `gaps` is told."""
        lowest = counters[0] if len(counters) == 1 else min(counters)
        gaps = self.gaps
        if gaps.is_idle:
            gaps.woken(session, lowest, now)
        gaps.came((ALL,) if path is None else (ALL, path), session, lowest, counters[-1], now)
        self._sessions[session.serial] = session
        if lowest <= session.settled:
            late = sum(counter <= session.settled for counter in counters)
            self.received += late
            self.lost = max(0, self.lost - late)
            self._count_late(late, path)

    def mark(
        self,
        session: Session,
        counter: int,
        packets: int,
        now: float,
        path: int | None = None,
        interval: float = 0.0,
        in_use: int = _ALL_PATHS,
    ) -> float:
        """The sender has sealed `packets` (modulo 2^32) before `counter`; return when `settle` should be called.

        The mark came by `path`, where the next one is due in `interval` seconds; `in_use` has a bit for each path.
        """
        is_newer = (session.serial, counter) > self._newest
        if is_newer:
            self._newest = (session.serial, counter)
            if self._said_by.get(path) == packets:
                self.gaps.quiet(session, counter, path, now)
            self._said_by[path] = packets
            if interval > IN_USE_INTERVAL and not (path is not None and self._standing >> path & 1):
                self.gaps.idle()
        if is_newer and (not self._marks or now + SETTLE_AFTER - self._marks[-1][0] > MARK_INTERVAL):
            self._marks.append(_Mark(now + SETTLE_AFTER, session, counter, packets, in_use))
        if not self._marks:
            return INF
        return now if _is_crowded(self._marks[0].session) else self._marks[0].due

    def settle(self, in_use: int, now: float, standing: int = 0) -> float:
        """Account for all marks that are old enough. Return when to come again.

        `in_use` has a bit for each path that gets copies: it is held to account for what was sealed between two marks
        at which it did. `standing` has one for each path that stands by: it alone would have brought nothing, but no
        copy of its was lost.
        """
        self._in_use, self._standing = in_use, standing & ~in_use
        self.gaps.stand_by(self._standing)
        self.history.step(self.account, now)
        while self._marks and (self._marks[0].due <= now or _is_crowded(self._marks[0].session)):
            due, session, counter, packets, used_then = self._marks.popleft()
            used, self._used = in_use & used_then & self._used, used_then
            if session.serial >= self._anew or self._has_fallen(packets):
                self._settle_before(min(self._anew, session.serial), used)
                self.packets, self._count = self.received + self.lost, 0
                self._anew, self._begun_in = INF, session.serial
            self._settle_before(session.serial, used)  # whose last data was sealed before this mark too
            self._settle_window(session, counter, used)
            if self._count is None:
                self.packets = self.received  # our account begins here
            else:
                self.packets += (packets - self._count) % _MOD32
            self._count = packets
            lost = max(0, self.packets - self.received)
            awaited = used | self._standing
            self.gaps.settled(session, counter, awaited, due - SETTLE_AFTER, has_loss=lost > self.lost)
            self.lost = lost
        self._note_gaps(now)
        return self._marks[0].due if self._marks else INF

    # -- what is said of it ----------------------------------------------------------------------------

    def account(self, counted: Mapping[int, tuple[int, int]] | None = None, now: float = -INF) -> Receipt:
        """Return the account as it stands; `counted` has the datagrams that each path was given, and has lost."""
        counted = counted or {}
        records = []
        for path, way in enumerate(self.gaps.ways[:MAX_PATHS]):
            if not (self._in_use >> path & 1 or self.first[path] or self.missed[path] or path in counted):
                continue  # one that was said once is always said: else it would be added again when it comes back
            records.append(
                PathReceipt(
                    path, *counted.get(path, (0, 0)), self.first[path], self.missed[path],
                    max(way.longest, self.gaps.ongoing(way, now)), self.history.longest(path, now), way.bridged,
                    round(way.bridged_time * 1e3),
                )
            )  # fmt: skip
        return Receipt(
            self.packets, self.received, self.lost, self.saved, self.longest_gap, self.history.longest(ALL, now),
            self._in_use, tuple(records),
        )  # fmt: skip

    def due(self, now: float) -> float:
        """Return when the next RECEIPT is due: there is something to add to the last one, or that is to be repeated."""
        if self._counts() != self._said:
            return max(now, self._said_at + PAUSES[0])
        return max(now, self._said_at + PAUSES[self._repeats]) if self._repeats < len(PAUSES) else INF

    def say(self, counted: Mapping[int, tuple[int, int]], now: float) -> bytes:
        """Return a RECEIPT's plaintext, which is sent now."""
        counts = self._counts()
        self._repeats = self._repeats + 1 if counts == self._said else 0
        self._said, self._said_at = counts, now
        self._note_gaps(now)
        return self.account(counted, now).encode()

    def begin_afresh(self, now: float) -> None:
        """Show from now on what comes on top of what there is."""
        self._note_gaps(now)
        self.history.restart(self.account(now=now))
        self.gaps.ignore(self.history.newest_gaps())

    def status(self, now: float) -> dict[str, Any]:
        """What `status` shows of it."""
        account = self.account(now=now)
        return receipt_status(self.history.shown(account), self.history.views(account, now))

    def path_status(self, path: int, now: float) -> dict[str, Any]:
        """What `status` shows of it and of one path."""
        account = self.account(now=now)
        return path_status(self.history.shown(account), self.history.views(account, now), path)

    def forget(self, path: int) -> None:
        """Another path has got this number; only what is on its way now may still count for it."""
        self.first[path] = self.missed[path] = 0
        self._said_by.pop(path, None)
        self._marks = deque(mark._replace(in_use=mark.in_use & ~(1 << path)) for mark in self._marks)
        self.gaps.forget(path)
        self.history.forget(path)

    def sender_restarted(self, serial: int, now: float) -> None:
        """With the session `serial` the sender counts from 0 again; the account goes on.

        What it had sealed before and did not get here is not known to anybody. It had been expected, so the silence is
        a gap.
        """
        if serial > self._begun_in:
            self._anew = float(serial)
        self._said_by.clear()
        self._said = ()  # who is told of the account now has heard nothing of it yet
        self.gaps.sender_restarted(serial, now)

    def successor(self) -> Receipts:
        """Return a new account: the sender counts from 0 again. What has come in so far belongs to the old one."""
        for session in self._sessions.values():
            session.settled = session.window.top
        return Receipts()

    def retire(self, session: Session, in_use: int) -> None:
        """A session ends: account for what is left in its window, and forget its marks."""
        self._settle_window(session, session.window.top, in_use)
        self.gaps.retire(session)
        self._sessions.pop(session.serial, None)
        self._marks = deque(mark for mark in self._marks if mark.session is not session)

    def _count_late(self, late: int, path: int | None) -> None:
        """So many packets that were accounted for as lost have come after all, by `path` only."""
        for other in range(MAX_PATHS):
            if other == path:
                self.first[other] += late
            elif self._in_use >> other & 1:
                self.missed[other] += late
        if self._in_use & ~(0 if path is None else 1 << path):
            self.saved += late

    def _counts(self) -> tuple[int, ...]:
        return (self.packets, self.received, self.lost, self.saved, self._in_use)

    def _note_gaps(self, now: float) -> None:
        for number, way in enumerate(self.gaps.ways):
            gap = max(way.fresh, self.gaps.ongoing(way, now))
            if gap:
                self.history.gap(number, gap)
                way.fresh = 0.0
        self.gaps.ignore(self.history.newest_gaps())

    def _has_fallen(self, packets: int) -> bool:
        """Whether the sender says that it has sealed less than before: it was restarted, and has not said so yet."""
        return self._count is not None and (packets - self._count) % _MOD32 > _MOD32 // 2

    def _settle_before(self, serial: float, in_use: int) -> None:
        """Account for all that has come in under the sessions before `serial`."""
        for older in self._sessions.values():
            if older.serial < serial:
                self._settle_window(older, older.window.top, in_use)

    def _settle_window(self, session: Session, last: int, in_use: int) -> None:
        window = session.window
        last = min(last, window.top)
        first = max(session.settled + 1, window.top - WINDOW + 1)
        if last < first:
            return
        session.settled = last
        who, paths = window.deliveries(first, last)
        count = len(who)
        data = int.from_bytes(who.translate(IS_DATA), "little")
        delivered = int.from_bytes(paths, "little")
        self.received += data.bit_count() // 8
        lacking_any = 0
        for path in range(MAX_PATHS):
            self.first[path] += who.count(FIRST_PATH + path)
            if (in_use | self._standing) >> path & 1:
                bits = int.from_bytes(bytes((1 << path,)) * count, "little")
                lacking = data & bits & ~delivered
                self.missed[path] += lacking.bit_count()
                if in_use >> path & 1:
                    lacking_any |= lacking >> path
        self.saved += lacking_any.bit_count()


def _is_crowded(session: Session) -> bool:
    """Whether so much has come in that the window must be read before it forgets."""
    return session.window.top - session.settled > WINDOW // 2
