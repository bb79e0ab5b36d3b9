"""What accounts have said over time: the last minute, the last hour, since the start or since somebody asked afresh.

An account is a `Receipt`: counts that only grow, and gaps. A `History` keeps what it was at the beginning of each of
the last twenty steps of 3 s, and of 3 min, in the bytes of a RECEIPT (some 130 for two paths), and the longest gaps
of each step. A window is the difference between now and the beginning of its first step, modulo 2^32.

`Told` is the account of the other direction, as the other end tells it: the newest RECEIPT counts, by session and
counter, so one that is lost or late costs nothing. Where counts of a path fall, that path is another one there, or
has begun anew. When the other end has been restarted, what it says is added to what was said before. Its gaps are
since the start and of the last minute; whenever the latter is another than before, a gap has come to an end.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mptunnel.messages import MAX_PATHS, PathReceipt, Receipt, decode_receipt_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Order = tuple[int, int]
    Views = list[tuple[str, Receipt]]

STEPS: Final = 20
MINUTE: Final = 60.0
HOUR: Final = 3600.0
_NO_GAPS: Final = (0.0,) * (MAX_PATHS + 1)
_NOTHING: Final = PathReceipt(0)


class History:
    """One direction's account over time. Gaps are given by way: that of each path, then that of all together."""

    __slots__ = ("_base", "_base_gaps", "_rings")

    def __init__(self) -> None:
        self._rings = (_Ring(MINUTE), _Ring(HOUR))
        self._base: Receipt | None = None  # what had been when somebody asked to begin afresh
        self._base_gaps = array("d", _NO_GAPS)  # since then

    def step(self, account: Callable[[], Receipt], now: float) -> None:
        """Time has passed: begin new steps with what the account says, before anything is added to it."""
        for ring in self._rings:
            if ring.is_due(now):
                ring.begin(account().encode(), now)

    def gap(self, way: int, length: float) -> None:
        """There was a gap."""
        for ring in self._rings:
            ring.gap(way, length)
        self._base_gaps[way] = max(self._base_gaps[way], length)

    def newest_gaps(self) -> Sequence[float]:
        """Return the longest gaps by way since the newest step of the last minute began."""
        return self._rings[0].newest_gaps()

    def longest(self, way: int, now: float) -> float:
        """Return the longest gap of the last minute."""
        return self._rings[0].gaps(now)[way]

    def restart(self, account: Receipt) -> None:
        """From now on show what comes on top of this."""
        self._rings = (_Ring(MINUTE), _Ring(HOUR))
        self._base = account
        self._base_gaps = array("d", _NO_GAPS)

    def forget(self, path: int) -> None:
        """Another path has got this number."""
        for ring in self._rings:
            ring.forget(path)
        if self._base is not None:
            self._base = _without(self._base, path)
        self._base_gaps[path] = 0.0

    def shown(self, account: Receipt) -> Receipt:
        """Return what there is since the start, or since it was begun afresh."""
        return account if self._base is None else _difference(account, self._base, self._base_gaps)

    def views(self, account: Receipt, now: float) -> Views:
        """Return the account of the last minute and of the last hour."""
        return [
            (name, _difference(account, ring.before(now) or account, ring.gaps(now)))
            for name, ring in zip(("minute", "hour"), self._rings, strict=True)
        ]


class Told:
    """What the other end says of what it receives. `account` has its counts, which do not go round here."""

    __slots__ = ("_before", "_last", "_order", "_taken_at", "account", "history")

    def __init__(self, order: Order = (-1, -1)) -> None:
        self._order = order  # session and counter of the newest
        self._last: Receipt | None = None
        self._taken_at = 0.0
        self._before = Receipt()  # the account when the other end began anew
        self.account = Receipt()
        self.history = History()

    @property
    def is_known(self) -> bool:
        """Whether it has said anything yet."""
        return self._last is not None

    def teller_restarted(self, order: Order) -> None:
        """The other end counts from 0 again; what comes before `order` is not of that run yet."""
        self._order = max(order, self._order)
        self._before = self.account
        if self.is_known:
            self._last = Receipt()

    def take(self, receipt: Receipt, order: Order, now: float, sealed: int | None = None) -> bool:
        """Take a RECEIPT; return whether it is newer than what was known.

        `sealed`: so many packets may have been received over there; an account of more began before we did, and only
        what is added to it is ours.
        """
        if order <= self._order:
            return False
        self._order, self._taken_at = order, now
        self.history.step(lambda: self.account, now)
        last, self._last = self._last, receipt
        if last is None:
            self.account = receipt
            if sealed is not None and receipt.packets > sealed:
                self.history.restart(receipt)
            return True
        for each in receipt.records:
            old = path_receipt(last, each.path)
            if _more(old.first, each.first) < 0 or _more(old.missed, each.missed) < 0:  # which else only grow
                last = _without(last, each.path)
                self.forget(each.path)
        self.account = _with_gaps_of(self._before, _continued(self.account, last, receipt))
        self._note_gap(MAX_PATHS, receipt.gap, receipt.recent, last.gap, last.recent)
        for each in receipt.records:
            old = path_receipt(last, each.path)
            self._note_gap(each.path, each.gap, each.recent, old.gap, old.recent)
        return True

    def forget(self, path: int) -> None:
        """Another path has got this number. While the other end does not know, its gaps are still those of both."""
        self.account, self._before = _without(self.account, path), _without(self._before, path)
        self.history.forget(path)

    def begin_afresh(self) -> None:
        """Show from now on what comes on top of what there is."""
        self.history.restart(self.account)

    def status(self, now: float) -> dict[str, Any] | None:
        """What `status` shows of it."""
        return receipt_status(self.history.shown(self.account), self._views(now)) if self.is_known else None

    def path_status(self, path: int, now: float) -> dict[str, Any] | None:
        """What `status` shows of it and of one path."""
        return path_status(self.history.shown(self.account), self._views(now), path) if self.is_known else None

    def _views(self, now: float) -> Views:
        """The last minute's gaps are those that the other end says, if they are newer than what was begun afresh."""
        (name, minute), hour = self.history.views(self.account, now)
        is_new = now - self._taken_at < MINUTE
        records = tuple(
            each._replace(gap=min(each.gap, path_receipt(self.account, each.path).recent if is_new else 0.0))
            for each in minute.records
        )
        minute = minute._replace(gap=min(minute.gap, self.account.recent if is_new else 0.0), records=records)
        return [(name, minute), hour]

    def _note_gap(self, way: int, gap: float, recent: float, last_gap: float, last_recent: float) -> None:
        new = max(gap if gap > last_gap else 0.0, recent if recent != last_recent else 0.0)
        if new:
            self.history.gap(way, new)


def path_receipt(receipt: Receipt, path: int) -> PathReceipt:
    """Return what an account says of a path."""
    return next((each for each in receipt.records if each.path == path), _NOTHING)


def receipt_status(shown: Receipt, views: Views) -> dict[str, Any]:
    """What `status` shows of one direction."""
    return {**_direction(shown), **{name: _direction(receipt) for name, receipt in views}}


def path_status(shown: Receipt, views: Views, path: int) -> dict[str, Any]:
    """What `status` shows of one direction and one path, as if there had been only this path."""
    return {**_alone(shown, path), **{name: _alone(receipt, path) for name, receipt in views}}


def _direction(receipt: Receipt) -> dict[str, Any]:
    return {
        "packets": receipt.packets,
        "received": receipt.received,
        "saved": receipt.saved,
        "lost": receipt.lost,
        "longest_gap_ms": round(receipt.gap * 1e3, 3),
        "outages_bridged": sum(each.bridged for each in receipt.records),
        "bridged_s": sum(each.bridged_ms for each in receipt.records) / 1e3,
    }


def _alone(receipt: Receipt, path: int) -> dict[str, Any]:
    of = path_receipt(receipt, path)
    return {
        "first": of.first,
        "first_share": of.first / receipt.received if receipt.received else None,
        "missed": of.missed,
        "lost": of.missed + receipt.lost,
        "longest_gap_ms": round(of.gap * 1e3, 3),
        "outages_bridged": of.bridged,
        "bridged_s": of.bridged_ms / 1e3,
    }


class _Ring:
    """The last twenty steps of a window: when each began, the account at that moment, the longest gaps since."""

    __slots__ = ("_span", "_steps")

    def __init__(self, span: float) -> None:
        self._span = span
        self._steps: deque[tuple[float, bytes, array[float]]] = deque(maxlen=STEPS + 1)

    def is_due(self, now: float) -> bool:
        return not self._steps or now - self._steps[-1][0] >= self._span / STEPS

    def begin(self, account: bytes, now: float) -> None:
        self._steps.append((now, account, array("d", _NO_GAPS)))

    def gap(self, way: int, length: float) -> None:
        if self._steps:
            gaps = self._steps[-1][2]
            gaps[way] = max(gaps[way], length)

    def forget(self, path: int) -> None:
        for number, (at, said, gaps) in enumerate(self._steps):
            gaps[path] = 0.0
            self._steps[number] = (at, _without(decode_receipt_untrusted(memoryview(said)), path).encode(), gaps)

    def newest_gaps(self) -> Sequence[float]:
        return self._steps[-1][2] if self._steps else _NO_GAPS

    def gaps(self, now: float) -> array[float]:
        """Return the longest gaps of the window by way."""
        found = array("d", _NO_GAPS)
        for _, _, gaps in self._within(now):
            for way, length in enumerate(gaps):
                found[way] = max(found[way], length)
        return found

    def before(self, now: float) -> Receipt | None:
        """Return the account at the beginning of the window; None: nothing has been added to it since."""
        within = self._within(now)
        return decode_receipt_untrusted(memoryview(within[0][1])) if within else None

    def _within(self, now: float) -> list[tuple[float, bytes, array[float]]]:
        return [step for step in self._steps if step[0] > now - self._span * (1 + 1 / STEPS)]


def _difference(receipt: Receipt, base: Receipt, gaps: array[float]) -> Receipt:
    """Return what was added to `base`, with these gaps."""
    records = []
    for each in receipt.records:
        old = path_receipt(base, each.path)
        records.append(
            PathReceipt(
                each.path, _more(old.given, each.given), _more(old.lost, each.lost), _more(old.first, each.first),
                _more(old.missed, each.missed), gaps[each.path], 0.0, _more(old.bridged, each.bridged, 16),
                _more(old.bridged_ms, each.bridged_ms),
            )
        )  # fmt: skip
    return Receipt(
        _more(base.packets, receipt.packets), _more(base.received, receipt.received), _more(base.lost, receipt.lost),
        _more(base.saved, receipt.saved), gaps[MAX_PATHS], 0.0, receipt.paths, tuple(records),
    )  # fmt: skip


def _continued(account: Receipt, last: Receipt, new: Receipt) -> Receipt:
    """Return `account` and what has been added between the RECEIPTs `last` and `new`; its counts do not go round."""
    more = _difference(new, last, array("d", _NO_GAPS))
    records = {each.path: each for each in account.records}
    for each, of in zip(more.records, new.records, strict=True):
        old = records.get(each.path, _NOTHING)
        records[each.path] = PathReceipt(
            each.path, old.given + each.given, old.lost + each.lost, old.first + each.first, old.missed + each.missed,
            of.gap, of.recent, old.bridged + each.bridged, old.bridged_ms + each.bridged_ms,
        )  # fmt: skip
    return Receipt(
        account.packets + more.packets, account.received + more.received, account.lost + more.lost,
        account.saved + more.saved, new.gap, new.recent, new.paths, tuple(records.values()),
    )  # fmt: skip


def _with_gaps_of(before: Receipt, account: Receipt) -> Receipt:
    """Return an account whose gaps are at least as long as those of an earlier one."""
    records = tuple(each._replace(gap=max(each.gap, path_receipt(before, each.path).gap)) for each in account.records)
    return account._replace(gap=max(account.gap, before.gap), records=records)


def _without(receipt: Receipt, path: int) -> Receipt:
    """Return an account that knows nothing of a path."""
    return receipt._replace(records=tuple(each for each in receipt.records if each.path != path))


def _more(before: int, now: int, bits: int = 32) -> int:
    """Return what was added to a count modulo 2^`bits`; less than nothing where it has fallen."""
    half = 1 << bits - 1
    return (now - before + half) % (2 * half) - half
