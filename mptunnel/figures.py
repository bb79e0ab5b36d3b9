"""What is made of a benchmark's measurements: medians, ratios, the search for a rate, verdicts, tables of text."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

GOOD_SHARE: Final = 0.99  # of the datagrams sent: less is too much lost
CLOSE_ENOUGH: Final = 1.12  # between the highest good rate and the lowest bad one
FLAT_BYTES: Final = 2_000_000
FLAT_SHARE: Final = 0.02

_FIRST_RATE: Final = 16_000.0
_MOST_TRIALS: Final = 16
_LEAST_RATE: Final = 100.0
_KEPT_UP: Final = 0.9  # of the rate asked for: a sender that did less is at its limit

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of a table: the name that JSON has for it, the words and unit that people read."""

    name: str
    words: str
    unit: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of datagrams sent at a rate for `seconds`."""

    sent: int
    arrived: int
    seconds: float

    @property
    def rate(self) -> float:
        """Datagrams that arrived in a second."""
        return self.arrived / self.seconds

    @property
    def is_good(self) -> bool:
        """Whether less than 1 % was lost."""
        return self.arrived >= GOOD_SHARE * self.sent


@dataclass(frozen=True, slots=True)
class FoundRate:
    """The highest rate that got through; `is_limited` where the sender could not do more, so it is a least figure."""

    rate: float
    is_limited: bool


def find_rate(attempt: Callable[[float], Trial]) -> FoundRate:
    """Return the highest rate at which less than 1 % is lost, by trying rates: doubled, then halved in between.

    What limits, loss or the sender, has to do so twice at a rate: once may be the machine's.
    """
    best, good, bad, rate, is_second = 0.0, 0.0, math.inf, _FIRST_RATE, False
    for _ in range(_MOST_TRIALS):
        trial = attempt(rate)
        is_limited = trial.sent / trial.seconds < _KEPT_UP * rate
        if trial.is_good:
            best = max(best, trial.rate)
        if (is_limited or not trial.is_good) and not is_second:
            is_second = True
            continue
        if trial.is_good and is_limited:
            return FoundRate(best, is_limited=True)
        is_second = False
        good, bad = (rate, bad) if trial.is_good else (good, rate)
        if bad <= good * CLOSE_ENOUGH:
            break
        if bad == math.inf:
            rate *= 2
        else:
            rate = math.sqrt(good * bad) if good else rate / 3
        if rate < _LEAST_RATE:
            break
    return FoundRate(best, is_limited=False)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of these sorted values lie (nearest rank); nan if there are none."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def medians(runs: Iterable[Mapping[str, float]]) -> Figures:
    """Return the median of each figure over the runs that have it."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.median(each) for name, each in values.items()}


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Figures:
    """Return ours divided by theirs, for each figure that both have."""
    return {name: value / theirs[name] for name, value in ours.items() if theirs.get(name)}


def is_flat(samples: Sequence[float]) -> bool:
    """Whether memory stayed where it was: the last third's peak stands no higher than the middle third's.

    2 MB or 2 % are allowed; the first third is the warm-up.
    """
    third = len(samples) // 3
    if not third:
        return False
    middle, last = max(samples[third : 2 * third]), max(samples[2 * third :])
    return last <= max(middle + FLAT_BYTES, middle * (1 + FLAT_SHARE))


def number(value: float | None, unit: str = "") -> str:
    """Return a figure as people read it: three digits that count, thousands apart; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}{unit}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}{unit}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines of text: the first column to the left, the others to the right, each as wide as it has to be."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
    texts = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in [texts[0], "-" * len(texts[0]), *texts[1:]])
