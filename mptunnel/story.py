"""The demo's story: what happens to which uplink when, what is seen of it, and what must hold in the end.

At every moment one of the two uplinks is whole, so the promise can be held to the letter: nothing is lost, nothing
waits. `judge` does that with what was measured. Nothing here runs anything: `demo` does, `picture` draws.
"""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from mptunnel.traffic import Flow, Progress, content_sha256

if TYPE_CHECKING:
    from mptunnel.lab import WireCounts

SECONDS: Final = 15.0  # of the story; building the lab and joining come before it
SIZE: Final = 30 * 1024 * 1024  # bytes downloaded, at a rate that lasts through the story
RATE: Final = SIZE / SECONDS
CALL_RATE: Final = 100  # datagrams a second each way
SEED: Final = 7  # of all chance in the wires: each run meets the same losses
MAX_STALL: Final = 0.250  # of the download through the tunnel
MAX_SILENCE: Final = 0.150  # of the call

_LINE_SECONDS: Final = 2.0


# -- the story ---------------------------------------------------------------------------------------------------


class Mood(enum.Enum):
    """What an uplink is like."""

    GOOD = enum.auto()
    LOSSY = enum.auto()
    CUT = enum.auto()


@dataclass(frozen=True, slots=True)
class Uplink:
    """One of the two ways: its interface in the lab, what we call it, and what it is like on a good day."""

    device: str
    name: str
    weather: dict[str, float]


@dataclass(frozen=True, slots=True)
class Chapter:
    """From `at` seconds on, this happens to an uplink."""

    at: float
    device: str
    mood: Mood
    label: str  # on the timeline
    words: str  # in a sentence
    weather: dict[str, float | bool]


UPLINKS: Final = (
    Uplink("p1", "wifi", {"delay": 0.008, "jitter": 0.004, "rate": 8e6, "buffer": 256 * 1024}),
    Uplink("p2", "lte", {"delay": 0.022, "jitter": 0.010, "rate": 8e6, "buffer": 256 * 1024}),
)
STORY: Final = (
    Chapter(0.0, "p2", Mood.GOOD, "", "lte is slower, but whole", {}),
    Chapter(0.0, "p1", Mood.LOSSY, "loses 5 %", "wifi loses 5 % of its packets, as wifi does", {"loss": 0.05}),
    Chapter(3.0, "p1", Mood.CUT, "cut", "wifi is cut: nothing arrives, and nobody is told", {"is_cut": True}),
    Chapter(7.5, "p1", Mood.GOOD, "", "wifi is back", {"is_cut": False, "loss": 0.0}),
    Chapter(10.0, "p2", Mood.LOSSY, "loses 30 %", "lte loses 30 % of its packets", {"loss": 0.30}),
)


def mood_at(device: str, clock: float) -> Chapter:
    """Return the chapter an uplink is in."""
    return [each for each in STORY if each.device == device and each.at <= max(0.0, clock)][-1]


# -- what is seen ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Scene:
    """Everything seen up to a moment of the story; `picture` and `Teller` show it."""

    clock: float = 0.0
    tunnel: Progress = field(default_factory=Progress)
    control: Progress = field(default_factory=Progress)
    wires: dict[str, WireCounts] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)  # of the client, `status --json`
    history: list[tuple[float, int, int]] = field(default_factory=list)  # clock, bytes through tunnel and control

    @property
    def is_over(self) -> bool:
        """Whether the download through the tunnel has ended, well or not."""
        return bool(self.tunnel.sha256 or self.tunnel.error)

    @property
    def receipts(self) -> dict[str, Any]:
        """Return what the client says of the packets that came down."""
        return (self.status.get("receipts") or {}).get("down") or {}

    def path(self, device: str) -> dict[str, Any]:
        """Return what the client says of a path, {} where it says nothing yet."""
        return next((each for each in self.status.get("paths", ()) if each.get("interface") == device), {})


def standstill(history: list[tuple[float, int, int]], column: int) -> float:
    """Return the longest time for which a download of the history got nothing, while it was not yet whole."""
    longest, since, seen = 0.0, 0.0, -1
    for moment in history:
        if moment[column] != seen:
            since, seen = moment[0], int(moment[column])
        if seen < SIZE:
            longest = max(longest, moment[0] - since)
    return longest


def received_by(history: list[tuple[float, int, int]], column: int, clock: float) -> float:
    """Return how many bytes a download had at a time, between two looks in proportion."""
    place = bisect.bisect_left(history, clock, key=lambda moment: moment[0])
    if place == 0 or place == len(history):
        return float(history[min(place, len(history) - 1)][column]) if history else 0.0
    before, after = history[place - 1], history[place]
    return float(before[column] + (after[column] - before[column]) * (clock - before[0]) / (after[0] - before[0]))


class Teller(Protocol):
    """Who shows the demo: the live picture, or the lines."""

    def say(self, words: str) -> None:
        """Tell what happens now."""

    def show(self, scene: Scene) -> None:
        """Show the state of things; called some 12 times a second."""

    def conclude(self, claims: list[Claim]) -> None:
        """Show the verdict."""


class Lines:
    """Tells the demo in lines: each event, and the figures every two seconds."""

    def __init__(self) -> None:
        self._next_at = 1.0

    def say(self, words: str) -> None:
        """Print an event."""
        print(words, flush=True)  # noqa: T201  the demo's answer is its output

    def show(self, scene: Scene) -> None:
        """Print the figures where two seconds have gone by."""
        if scene.clock >= self._next_at:
            self._next_at += _LINE_SECONDS
            self.say(progress_line(scene))

    def conclude(self, claims: list[Claim]) -> None:
        """Print the verdict."""
        for line in verdict_lines(claims):
            self.say(line)


def progress_line(scene: Scene) -> str:
    """Return the figures of a moment as one line."""
    tunnel, alone = (f"{each.received / 1e6:5.1f} MB" for each in (scene.tunnel, scene.control))
    saved = scene.receipts.get("saved")
    tail = "" if saved is None else f"   saved by the other copy {saved:,}"
    return f"{scene.clock:5.1f} s   through the tunnel {tunnel}   over wifi alone {alone}{tail}"


# -- the verdict -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured from the first to the last packet of the story."""

    tunnel: Progress
    call: tuple[Flow, Flow]  # up, down
    control_stall: float  # seconds
    control_received: int
    wires: dict[str, WireCounts]
    receipts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, and whether what was measured bears it out."""

    words: str
    holds: bool


def judge(outcome: Outcome) -> list[Claim]:
    """Hold each promise of the demo against what was measured."""
    tunnel, up, down = outcome.tunnel, *outcome.call
    lost, sent, copies = up.lost + down.lost, up.sent + down.sent, up.duplicated + down.duplicated
    silence = max(up.longest_stall(), down.longest_stall())
    wifi_loss, lte_loss = (_not_delivered(outcome.wires[each.device]) for each in UPLINKS)
    cut = next(each for each in STORY if each.mood is Mood.CUT)
    cut_seconds = next(each.at for each in STORY if each.device == cut.device and each.at > cut.at) - cut.at
    return [
        Claim(
            f"the download is whole: {tunnel.received / 1e6:.1f} MB, "
            + (f"SHA-256 {tunnel.sha256[:8]}… equal" if not tunnel.error else tunnel.error),
            tunnel.sha256 == content_sha256(SIZE, SEED),
        ),
        Claim(
            f"it never waited: longest pause {1000 * tunnel.longest_stall():.0f} ms of at most {1000 * MAX_STALL:.0f}"
            if not tunnel.error
            else "it waited until the end",
            not tunnel.error and tunnel.longest_stall() <= MAX_STALL,
        ),
        Claim(
            f"the call beside it: {lost:,} of {sent:,} datagrams lost, {copies:,} twice, "
            f"longest gap {1000 * silence:.0f} ms of at most {1000 * MAX_SILENCE:.0f}",
            sent > 0 and lost == copies == 0 and silence <= MAX_SILENCE,
        ),
        Claim(f"wifi lost {wifi_loss:,} packets, lte {lte_loss:,}", wifi_loss > 0 and lte_loss > 0),
        Claim(
            f"the receipts agree: {outcome.receipts.get('saved') or 0:,} packets down came by the other uplink only, "
            f"{outcome.receipts.get('lost') or 0:,} by none",
            bool(outcome.receipts.get("saved")) and outcome.receipts.get("lost") == 0,
        ),
        Claim(
            f"the control, over wifi alone, stood still for {outcome.control_stall:.1f} s "
            f"(wifi was away for {cut_seconds:.1f} s)",
            outcome.control_stall >= 0.9 * cut_seconds,
        ),
    ]


def _not_delivered(wire: WireCounts) -> int:
    return sum(each.packets - each.delivered for each in (wire.up, wire.down))


def verdict_lines(claims: list[Claim]) -> list[str]:
    """Return the verdict as text."""
    head = "held" if all(claim.holds for claim in claims) else "NOT held"
    return [*(f"{'  ok  ' if claim.holds else 'FAILED'}  {claim.words}" for claim in claims), f"verdict: {head}"]
