"""What the user has said of paths at run time, and what metered ones have carried this month; kept on disk, per server.

A path goes by its uplink: what `-i` or `paths add` said, or the interface found. **Kept over a restart** are labels,
priorities, limits, and uplinks that were added or, where uplinks are found without `-i`, taken off. An uplink that the
command line names with `-i` is there after every start, whatever was taken off before.

**Metered.** Bytes are those of the path's datagrams with their IP and UDP headers, both directions together, by
interface name: the same stick in another port is the same stick. A month begins on its reset day, in local time. The
clock may be wrong: a new month counts as begun when the clock has shown it for ten minutes, or in two runs in a row,
and none ever counts as over because the clock went back: then the count goes on under the month that it shows.
A month that began before clocks can have been right (1970 at boot) is only renamed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from mptunnel.errors import ConfigError
from mptunnel.messages import Use
from mptunnel.records import FORMAT, Fields

if TYPE_CHECKING:
    from mptunnel.records import Document

PRIORITIES: Final = {"data": Use.DATA, "standby": Use.STANDBY}
MAX_LABEL: Final = 32
MAX_RESET_DAY: Final = 28  # every month has it
MAX_LIMIT: Final = 10**15
BELIEF: Final = 600.0  # s for which the clock has to show a new month
TRUE_CLOCK: Final = 2024 * 12  # no clock that was set shows less
SAVE_SPACING: Final = 60.0
SAVE_LATEST: Final = 600.0
SAVE_BYTES: Final = 1_000_000
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(slots=True)
class PathSettings:
    """What was said of one uplink."""

    label: str = ""
    use: Use = Use.DATA
    limit: int | None = None  # bytes a month; None: not metered
    reset_day: int = 1
    is_added: bool = False  # by `paths add`, not by -i

    def to_document(self, uplink: str) -> Document:
        """Return its entry in the file."""
        return {
            "uplink": uplink,
            "label": self.label,
            "standby": self.use is Use.STANDBY,
            "limit": self.limit,
            "reset_day": self.reset_day,
            "added": self.is_added,
        }


@dataclass(slots=True)
class Usage:
    """What an interface has carried in a month: `period` is year * 12 + month - 1 of its beginning."""

    period: int
    used: int
    reset_day: int
    shown: int = 0  # another month that the clock shows; 0: none
    doubted_since: float | None = None  # since when it does in this run


@dataclass(slots=True)
class PathBook:
    """The file `client/paths/<server>`."""

    settings: dict[str, PathSettings] = field(default_factory=dict)
    taken_off: set[str] = field(default_factory=set)  # uplinks found that are not wanted
    usage: dict[str, Usage] = field(default_factory=dict)
    _today: tuple[int, int] | None = None  # the month as year * 12 + month - 1, and the day
    _unsaved: int = 0
    _saved_at: float = -SAVE_SPACING

    # -- what was said ---------------------------------------------------------------------------------

    def of(self, uplink: str) -> PathSettings:
        """Return what was said of an uplink, to be read only."""
        return self.settings.get(uplink) or PathSettings()

    def change(self, uplink: str) -> PathSettings:
        """Return what was said of an uplink, to be changed."""
        return self.settings.setdefault(uplink, PathSettings())

    def added(self) -> list[str]:
        """Return the uplinks that `paths add` has added."""
        return [uplink for uplink, said in self.settings.items() if said.is_added]

    def to_document(self) -> Document:
        """Return the file's content."""
        return {
            "format": FORMAT,
            "paths": [said.to_document(uplink) for uplink, said in self.settings.items()],
            "taken_off": sorted(self.taken_off),
            "usage": [
                {
                    "interface": interface,
                    "period": count.period,
                    "used": count.used,
                    "reset_day": count.reset_day,
                    "shown": count.shown,
                }
                for interface, count in self.usage.items()
            ],
        }

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Raise ConfigError where the document is not a path book's."""
        fields = Fields(document, "paths").check_format()
        book = cls(taken_off=set(fields.texts("taken_off")))
        for entry in fields.entries("paths"):
            limit = entry.number_or_none("limit")
            book.settings[entry.text("uplink")] = PathSettings(
                label=check_label(entry.text("label")),
                use=Use.STANDBY if entry.flag("standby") else Use.DATA,
                limit=None if limit is None else int(limit),
                reset_day=check_reset_day(entry.whole("reset_day")),
                is_added=entry.flag("added"),
            )
        for entry in fields.entries("usage"):
            book.usage[entry.text("interface")] = Usage(
                entry.whole("period"), entry.whole("used"), check_reset_day(entry.whole("reset_day")),
                entry.whole("shown", 0),
            )  # fmt: skip
        return book

    # -- what was carried ------------------------------------------------------------------------------

    @property
    def is_metering(self) -> bool:
        """Whether any path has a limit."""
        return any(said.limit is not None for said in self.settings.values())

    def today_is(self, year: int, month: int, day: int, now: float) -> None:
        """The clock on the wall shows this local date at `now`."""
        self._today = (year * 12 + month - 1, day)
        for count in self.usage.values():
            self._turn(count, now)

    def meter(self, uplink: str, interface: str, limit: int | None, reset_day: int) -> None:
        """Give an uplink a limit, or none; what its interface has carried this month stays."""
        said = self.change(uplink)
        said.limit, said.reset_day = limit, reset_day
        count = self.usage.get(interface)
        if count is not None and count.reset_day != reset_day:
            count.reset_day, count.period = reset_day, self._period(reset_day)

    def carried(self, uplink: str, interface: str, size: int) -> None:
        """So many bytes have passed an uplink's interface; nothing is counted where there is no limit."""
        said = self.settings.get(uplink)
        if said is None or said.limit is None or not interface:
            return
        count = self.usage.get(interface)
        if count is None:
            count = self.usage[interface] = Usage(self._period(said.reset_day), 0, said.reset_day)
        count.used = max(0, count.used + size)
        self._unsaved += size

    def used(self, interface: str) -> int:
        """Return the bytes of this month."""
        count = self.usage.get(interface)
        return 0 if count is None else count.used

    def is_spent(self, uplink: str, interface: str) -> bool:
        """Whether a path has reached its limit for this month."""
        limit = self.of(uplink).limit
        return limit is not None and self.used(interface) >= limit

    def wants_saving(self, now: float) -> bool:
        """Whether what was carried is to be written down: often enough, and gently to the disk."""
        waited = now - self._saved_at
        return waited >= SAVE_SPACING and (self._unsaved >= SAVE_BYTES or (self._unsaved > 0 and waited >= SAVE_LATEST))

    def saved(self, now: float) -> None:
        """It is being written down."""
        self._saved_at, self._unsaved = now, 0

    def _period(self, reset_day: int) -> int:
        """Return the month that runs now; 0 while nobody has told the date."""
        if self._today is None:
            return 0
        month, day = self._today
        return month if day >= reset_day else month - 1

    def _turn(self, count: Usage, now: float) -> None:
        """Begin another month where the clock has shown it long enough; none ends because the clock goes back."""
        period = self._period(count.reset_day)
        if period == count.period:
            self._unsaved += SAVE_BYTES if count.shown else 0  # or the next run would believe this one's error
            count.shown, count.doubted_since = 0, None
        elif period < TRUE_CLOCK:
            return
        elif count.period < TRUE_CLOCK:
            count.period, count.shown, count.doubted_since = period, 0, None
        elif count.shown != period:
            count.shown, count.doubted_since = period, now
            self._unsaved += SAVE_BYTES
        elif count.doubted_since is None or now - count.doubted_since >= BELIEF:  # None: the run before saw it too
            count.used = 0 if period > count.period else count.used
            count.period, count.shown, count.doubted_since = period, 0, None
            self._unsaved += SAVE_BYTES


def parse_limit(text: str) -> int | None:
    """Return the bytes of `5GB`, `750 MB`; None for `off`. Raises ConfigError."""
    words = text.strip().lower().replace(" ", "")
    if words in {"off", "none"}:
        return None
    number = words.rstrip("b")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"limit {text!a}: a size such as 5GB or 750MB, or 'off', is expected") from None
    if not 0 < size <= MAX_LIMIT:
        raise ConfigError(f"limit {text!a}: more than nothing and less than a petabyte is expected")
    return int(size)


def check_label(label: str) -> str:
    """Return a path's label as it is. Raises ConfigError."""
    if len(label) > MAX_LABEL or not label.isprintable() or label.isdigit():
        raise ConfigError(f"label {label[:40]!a}: at most {MAX_LABEL} printable characters, and not only digits")
    return label


def check_reset_day(day: int) -> int:
    """Return the day of the month on which a count begins anew. Raises ConfigError."""
    if not 1 <= day <= MAX_RESET_DAY:
        raise ConfigError(f"reset day {day}: a day from 1 to {MAX_RESET_DAY} is expected, which every month has")
    return day


def parse_priority(text: str) -> Use:
    """Return the use of this priority. Raises ConfigError."""
    use: Any = PRIORITIES.get(text.lower())
    if use is None:
        raise ConfigError(f"priority {text!a}: {' or '.join(PRIORITIES)} is expected")
    return Use(use)
