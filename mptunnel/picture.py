"""The demo's live picture: packets on their way over both uplinks, two downloads, the timeline and the receipts.

What moves is counted, not made up: a dot goes out when the wire carried packets since the last frame, and of the dots
as large a share comes to grief as of the packets. Everything else is a figure from the scene.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mptunnel.story import RATE, SECONDS, SIZE, STORY, UPLINKS, Claim, Mood, Scene, mood_at, received_by

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH: Final = 100  # columns at most; a lane, a bar and the timeline take what the words beside them leave
SPACING: Final = 0.13  # seconds between dots
CROSSING: Final = 1.4  # seconds a dot takes from end to end
GRIEF: Final = 0.35  # seconds a lost dot stays in sight
STILL: Final = 0.3  # seconds without a byte after which a download stands still

_FRAME: Final = 6  # columns of the panel's border and padding
_LANE_WORDS: Final = (11, 6, 1, 0, 1, 6, 24)  # columns of the table around a lane, which is the 0
_BAR_WORDS: Final = 56
_TIMELINE_WORDS: Final = 11
_MARK: Final = 5  # seconds from one number of the timeline to the next
_FULL: Final = 1.5  # times the download's rate: a full bar
_COLOURS: Final = {"p1": "green", "p2": "yellow"}
_BARS: Final = "▁▂▃▄▅▆▇█"
_SMOOTH: Final = 2  # cells over which a pace is taken
_LINES: Final = {Mood.GOOD: "━", Mood.LOSSY: "╍", Mood.CUT: "┄"}


@dataclass(slots=True)
class Dot:
    """Some packets on their way: `at` goes from 0 to 1, or stops at `end` if they are lost."""

    at: float = 0.0
    end: float = 1.0
    grief: float = 0.0


@dataclass(slots=True)
class Stream:
    """The dots of one direction of an uplink."""

    dots: list[Dot] = field(default_factory=list)
    _packets: int = 0  # since the last dot
    _lost: int = 0
    _waited: float = 0.0
    _owed: float = 0.0  # of lost dots, less than one
    _chance: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311

    def step(self, seconds: float, packets: int, lost: int, *, is_cut: bool = False) -> None:
        """Let time go by in which so many packets set out, and so many of them were lost."""
        for dot in self.dots:
            dot.at = min(dot.at + seconds / CROSSING, dot.end)
            if dot.at == dot.end:
                dot.grief += seconds
        self.dots = [dot for dot in self.dots if dot.at < dot.end or (dot.end < 1.0 and dot.grief < GRIEF)]
        self._packets, self._lost, self._waited = self._packets + packets, self._lost + lost, self._waited + seconds
        if self._packets and self._waited >= SPACING:
            self._owed += self._lost / self._packets
            self._packets, self._lost, self._waited = 0, 0, 0.0
            is_lost = self._owed >= 1.0 or is_cut
            self._owed = max(0.0, self._owed - 1.0) if is_lost else self._owed
            self.dots.append(Dot(end=1.0 if not is_lost else 0.5 if is_cut else self._chance.uniform(0.3, 0.8)))

    def draw(self, width: int, mood: Mood, colour: str, *, leftwards: bool) -> Text:
        """Return the lane with its dots; lost ones are red crosses."""
        cells = [(_LINES[mood], f"dim {colour}" if mood is not Mood.CUT else "dim red")] * width
        if mood is Mood.CUT:
            cells[width // 2] = ("┊", "bold red")
        for dot in self.dots:
            place = min(width - 1, int(dot.at * width))
            cell = ("✕", "bold red") if dot.at == dot.end < 1.0 else ("●", f"bold {colour}")
            cells[width - 1 - place if leftwards else place] = cell
        return Text.assemble(*cells)


class Picture:
    """The live picture, for the time of a `with`; told and shown things as any `Teller`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._words = ""
        self._before = Text()  # what was said before there was anything to draw
        self._streams = {uplink.device: (Stream(), Stream()) for uplink in UPLINKS}  # up, down
        self._seen: dict[str, tuple[tuple[int, int], ...]] = {}
        self._drawn_at = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, words: str) -> None:
        """Show what happens now as the headline."""
        self._words = words.strip()
        if not self._seen:
            self._before.append(f"  {words}\n", style="dim")
            self._live.update(self._before, refresh=True)

    def show(self, scene: Scene) -> None:
        """Draw the next frame."""
        now = time.monotonic()
        seconds, self._drawn_at = now - self._drawn_at, now
        self.advance(scene, seconds)
        self._live.update(self.draw(scene), refresh=True)

    def conclude(self, claims: list[Claim]) -> None:
        """Show the verdict beneath the last frame."""
        self._live.stop()
        self._console.print(draw_verdict(claims, min(WIDTH, self._console.width)))

    def advance(self, scene: Scene, seconds: float) -> None:
        """Move the dots by what the wires have carried since the last call."""
        for device, wire in scene.wires.items():
            counts = tuple((each.packets, each.packets - each.delivered) for each in (wire.up, wire.down))
            before = self._seen.get(device, ((0, 0), (0, 0)))
            is_cut = mood_at(device, scene.clock).mood is Mood.CUT
            for stream, new, old in zip(self._streams[device], counts, before, strict=True):
                stream.step(seconds, new[0] - old[0], new[1] - old[1], is_cut=is_cut)
            self._seen[device] = counts

    def draw(self, scene: Scene) -> RenderableType:
        """Return the whole picture."""
        width = min(WIDTH, self._console.width)
        head = Text(self._words, style="bold")
        return Panel(
            Group(
                head,
                Text(),
                self._draw_uplinks(scene, width - _FRAME),
                draw_downloads(scene, width - _FRAME),
                draw_timeline(scene, width - _FRAME),
                draw_receipts(scene),
            ),
            title="[bold]mptunnel[/]  every packet over every uplink, the first copy wins",
            subtitle=f"{scene.clock:.1f} s",
            subtitle_align="right",
            box=box.ROUNDED,
            border_style="blue",
            width=width,
            padding=(1, 2),
        )

    def _draw_uplinks(self, scene: Scene, width: int) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        lane = width - sum(_LANE_WORDS) - len(_LANE_WORDS) + 1
        for words in _LANE_WORDS:
            table.add_column(width=words or lane, no_wrap=True)
        for uplink in UPLINKS:
            chapter, colour = mood_at(uplink.device, scene.clock), _COLOURS[uplink.device]
            up, down = (
                stream.draw(lane, chapter.mood, colour, leftwards=leftwards)
                for stream, leftwards in zip(self._streams[uplink.device], (False, True), strict=True)
            )
            name = Text(uplink.name, style=f"bold {colour}")
            label = Text(chapter.label, style="bold red")
            first, second = _figures(scene, uplink.device)
            table.add_row(name, "laptop", "◀", down, "", "server", first)
            table.add_row(label, "", "", up, "▶", "", second)
            table.add_row()
        return table


def _figures(scene: Scene, device: str) -> tuple[Text, Text]:
    """Return what the program says of a path, in two lines, with what the wire has really lost."""
    path, wire = scene.path(device), scene.wires.get(device)
    rtt, share = path.get("rtt_ms"), path.get("first_share")
    lost = sum(each.packets - each.delivered for each in (wire.up, wire.down)) if wire else 0
    return (
        Text(f"{path.get('state', ''):<12}rtt {'-' if rtt is None else f'{rtt:.0f}'} ms"),
        Text(f"first {'-' if share is None else f'{100 * share:.0f}':>3} %").append(
            f" lost {lost:,}", style="red" if lost else "dim"
        ),
    )


def draw_downloads(scene: Scene, width: int) -> RenderableType:
    """Return the two progress bars."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=18)
    for column, (name, progress, colour) in enumerate(
        (("through the tunnel", scene.tunnel, "cyan"), ("wifi alone", scene.control, "magenta")), 1
    ):
        length = width - _BAR_WORDS
        full = round(length * progress.received / SIZE)
        bar = Text("━" * full, style=f"bold {colour}") + Text("─" * (length - full), style="dim")
        table.add_row(
            Text(name, style=f"bold {colour}"), bar, f"{progress.received / 1e6:5.1f} MB", _pace(scene, column)
        )
    table.add_row()
    return table


def _pace(scene: Scene, column: int) -> Text:
    """Return how fast a download is now, or for how long it has stood still."""
    if not scene.history:
        return Text()
    newest = scene.history[-1]
    if newest[column] >= SIZE:
        return Text("done", style="bold green")
    grew_at = next(each[0] for each in scene.history if each[column] == newest[column])
    if newest[0] - grew_at > STILL:
        return Text(f"stands still for {newest[0] - grew_at:.1f} s", style="bold red")
    past = next(each for each in scene.history if each[0] >= newest[0] - 1.0)
    seconds = newest[0] - past[0]
    return Text(f"{(newest[column] - past[column]) / seconds / 1e6:.1f} MB/s" if seconds else "", style="dim")


def draw_timeline(scene: Scene, width: int) -> RenderableType:
    """Return what is done to the uplinks over time, and under it how the downloads fare."""
    per_second = int((width - _TIMELINE_WORDS) / SECONDS)
    table = Table.grid(padding=(0, 1))
    table.add_column(width=10)
    for uplink in UPLINKS:
        table.add_row(
            Text(uplink.name, style=f"bold {_COLOURS[uplink.device]}"), _fate(uplink.device, scene.clock, per_second)
        )
    for column, (name, colour) in enumerate((("tunnel", "cyan"), ("wifi alone", "magenta")), 1):
        table.add_row(
            Text(name, style=f"bold {colour}"), Text(sparkline(scene.history, column, per_second), style=colour)
        )
    marks = "".join(f"{second:<{_MARK * per_second}}" for second in range(0, int(SECONDS) + 1, _MARK))
    table.add_row(Text("seconds", style="dim"), Text(marks, style="dim"))
    table.add_row()
    return table


def _fate(device: str, clock: float, per_second: int) -> Text:
    """Return an uplink's line of the timeline: the past bright, what is to come dim."""
    line, chapters = Text(), [each for each in STORY if each.device == device]
    for chapter, until in zip(chapters, [*(each.at for each in chapters[1:]), SECONDS], strict=True):
        begin, end = round(chapter.at * per_second), round(until * per_second)
        label = f" {chapter.label} " if chapter.label else ""
        style = {Mood.GOOD: _COLOURS[device], Mood.LOSSY: "bright_red", Mood.CUT: "red"}[chapter.mood]
        glyph = {Mood.GOOD: "━", Mood.LOSSY: "▒", Mood.CUT: "░"}[chapter.mood]
        for place, sign in enumerate(label.center(end - begin, glyph), begin):
            line.append(sign, style=style if place <= clock * per_second else f"dim {style}")
    return line


def sparkline(history: list[tuple[float, int, int]], column: int, per_second: int) -> str:
    """Return how fast a download was in each cell of the timeline that is over, so many a second."""
    if not history:
        return ""
    levels = ""
    for cell in range(1, int(min(SECONDS, history[-1][0]) * per_second) + 1):
        end, begin = cell / per_second, max(0.0, (cell - _SMOOTH) / per_second)
        pace = (received_by(history, column, end) - received_by(history, column, begin)) / (end - begin)
        levels += _BARS[min(len(_BARS) - 1, round(pace / RATE / _FULL * (len(_BARS) - 1)))]
    return levels


def draw_receipts(scene: Scene) -> RenderableType:
    """Return what the program itself says of the packets that came down."""
    known = scene.receipts
    gap = known.get("longest_gap_ms")
    figures = (
        (f"{known.get('received') or 0:,}", "packets down", "bold"),
        (f"{known.get('saved') or 0:,}", "saved by the copy", "bold green"),
        (f"{known.get('lost') or 0:,}", "lost on both", "bold red" if known.get("lost") else "bold green"),
        ("-" if gap is None else f"{gap:.0f} ms", "longest gap", "bold"),
    )
    table = Table.grid(expand=True)
    for _ in figures:
        table.add_column(justify="center", ratio=1)
    table.add_row(*(Text(figure, style=style) for figure, _, style in figures))
    table.add_row(*(Text(caption, style="dim") for _, caption, _ in figures))
    return table


def draw_verdict(claims: list[Claim], width: int) -> RenderableType:
    """Return the verdict: each claim with a tick or a cross."""
    holds = all(claim.holds for claim in claims)
    table = Table.grid(padding=(0, 1))
    for claim in claims:
        table.add_row(Text("✔", "bold green") if claim.holds else Text("✘", "bold red"), claim.words)
    return Panel(
        table,
        title=f"[bold]{'everything held' if holds else 'not everything held'}[/]",
        subtitle="[dim]the real program, in namespaces; this machine is as it was[/]",
        border_style="green" if holds else "red",
        box=box.ROUNDED,
        width=width,
        padding=(1, 2),
    )
