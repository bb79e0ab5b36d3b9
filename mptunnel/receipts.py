"""Receipts: who delivered what, settled exactly, two seconds after the fact.

The receiver's window knows for each counter which path delivered it first and which delivered it at all. A PROBE or
an ECHO says how many IP packets its sender has sealed before it (`packets`). Its own counter is therefore a mark: all
data below it was sealed before, and two seconds later every copy that will still come has come. Then

* lost = packets sealed up to the mark - packets delivered up to the mark: lost on every path,
* missed[path] = packets delivered by others that this path did not deliver: what this path alone would have cost,
* saved = packets that were delivered although at least one path in use did not deliver them,
* first[path] = packets whose first copy came by this path.

What arrives later than that is added when it comes. A gap is a silence in which a counter is missing for good while
packets were lost; it begins at an arrival, or at a mark that says that nothing was sealed since the mark before it.
Silence of the application is no gap.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mptunnel.messages import MAX_PATHS
from mptunnel.session import FIRST_PATH, NO_PATH, WINDOW

if TYPE_CHECKING:
    from mptunnel.session import Session

    Gap = tuple[float, Session, int, int]  # how long, and between which counters of a session

SETTLE_AFTER: Final = 2.0
MARK_INTERVAL: Final = 0.2
INF: Final = float("inf")
_GAP: Final = 0.02  # s: shorter silences are not worth a look
_MAX_GAPS: Final = 8  # of those between two marks, the longest

_IS_DATA = bytes(0xFF if who >= NO_PATH else 0 for who in range(256))


class Receipts:
    """The account of one direction, kept by its receiver."""

    __slots__ = (
        "_count", "_gaps", "_last", "_last_at", "_marks", "_newest", "_said", "_sessions", "first", "longest_gap",
        "lost", "missed", "packets", "received", "saved",
    )  # fmt: skip

    def __init__(self) -> None:
        self._marks: deque[tuple[float, Session, int, int, list[Gap]]] = deque()
        self._newest = (-1, -1)  # session and counter of the last mark
        self._sessions: dict[int, Session] = {}  # by serial: those that have brought data
        self._count: int | None = None  # the sender's, modulo 2^32, at the last mark settled
        self._said: int | None = None  # the sender's count at the last mark
        self._last_at = -INF  # since when nothing has come
        self._last = (-1, -1)  # session and highest counter at that time
        self._gaps: list[Gap] = []  # since the last mark
        self.packets = 0
        self.received = 0
        self.lost = 0
        self.saved = 0
        self.longest_gap = 0.0
        self.first = [0] * MAX_PATHS
        self.missed = [0] * MAX_PATHS

    def arrived(self, session: Session, counters: list[int], now: float) -> None:
        """IP packets came in under these counters."""
        silence, lowest = now - self._last_at, min(counters)
        if _GAP < silence < INF:
            after = self._last[1] if self._last[0] == session.serial else -1
            self._gaps.append((silence, session, after, lowest))
            if len(self._gaps) > _MAX_GAPS:
                self._gaps.remove(min(self._gaps, key=_silence))
        self._last_at, self._last = now, (session.serial, session.window.top)
        self._sessions[session.serial] = session
        if lowest <= session.settled:
            late = sum(counter <= session.settled for counter in counters)
            self.received += late
            self.lost = max(0, self.lost - late)

    def mark(self, session: Session, counter: int, packets: int, now: float) -> float:
        """The sender has sealed `packets` (modulo 2^32) before `counter`; return when `settle` should be called."""
        is_newer = (session.serial, counter) > self._newest
        if is_newer and packets == self._said:
            self._last_at, self._last = now, (session.serial, session.window.top)
        self._said = packets if is_newer else self._said
        if is_newer and (not self._marks or now + SETTLE_AFTER - self._marks[-1][0] > MARK_INTERVAL):
            self._newest = (session.serial, counter)
            self._marks.append((now + SETTLE_AFTER, session, counter, packets, self._gaps))
            self._gaps = []
        if not self._marks:
            return INF
        return now if _is_crowded(self._marks[0][1]) else self._marks[0][0]

    def settle(self, in_use: int, now: float) -> float:
        """Account for all marks that are old enough; `in_use` has a bit for each path. Return when to come again."""
        while self._marks and (self._marks[0][0] <= now or _is_crowded(self._marks[0][1])):
            _, session, counter, packets, gaps = self._marks.popleft()
            for older in self._sessions.values():
                if older.serial < session.serial:  # whose last data was sealed before this mark too
                    self._settle_window(older, older.window.top, in_use)
            self._settle_window(session, counter, in_use)
            if self._count is None:
                self.packets = self.received  # our account begins here
            else:
                self.packets += (packets - self._count) % (1 << 32)
            self._count = packets
            lost = max(0, self.packets - self.received)
            if lost > self.lost:
                real = [gap[0] for gap in gaps if gap[0] > self.longest_gap and self._is_lacking(gap)]
                self.longest_gap = max(real, default=self.longest_gap)
            self.lost = lost
        return self._marks[0][0] if self._marks else INF

    def status(self) -> dict[str, float]:
        """What `status` shows of it."""
        return {
            "packets": self.packets,
            "received": self.received,
            "saved": self.saved,
            "lost": self.lost,
            "longest_gap_ms": round(self.longest_gap * 1e3, 3),
        }

    def restart(self) -> None:
        """The sender counts from 0 again; what has come in so far belongs to the old account."""
        for session in self._sessions.values():
            session.settled = session.window.top
        self.__init__()  # type: ignore[misc]

    def retire(self, session: Session, in_use: int) -> None:
        """A session ends: account for what is left in its window, and forget its marks."""
        self._settle_window(session, session.window.top, in_use)
        self._sessions.pop(session.serial, None)
        self._marks = deque(mark for mark in self._marks if mark[1] is not session)

    def _is_lacking(self, gap: Gap) -> bool:
        """Whether a counter is missing in a gap, by now."""
        _, session, after, before = gap
        first = max(after + 1, session.window.top - WINDOW + 1)
        is_open = session.serial in self._sessions
        return is_open and first < before and 0 in session.window.deliveries(first, before - 1)[0]

    def _settle_window(self, session: Session, last: int, in_use: int) -> None:
        window = session.window
        last = min(last, window.top)
        first = max(session.settled + 1, window.top - WINDOW + 1)
        if last < first:
            return
        session.settled = last
        who, paths = window.deliveries(first, last)
        count = len(who)
        data = int.from_bytes(who.translate(_IS_DATA), "little")
        delivered = int.from_bytes(paths, "little")
        self.received += data.bit_count() // 8
        lacking_any = 0
        for path in range(MAX_PATHS):
            self.first[path] += who.count(FIRST_PATH + path)
            if in_use >> path & 1:
                bits = int.from_bytes(bytes((1 << path,)) * count, "little")
                lacking = data & bits & ~delivered
                self.missed[path] += lacking.bit_count()
                lacking_any |= lacking >> path
        self.saved += lacking_any.bit_count()


def _silence(gap: Gap) -> float:
    return gap[0]


def _is_crowded(session: Session) -> bool:
    """Whether so much has come in that the window must be read before it forgets."""
    return session.window.top - session.settled > WINDOW // 2
