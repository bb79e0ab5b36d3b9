"""The demo: its story, its verdict, its picture; and, in a lab, the whole of it."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mptunnel import demo
from mptunnel.lab import Lab, Unavailable, WireCounts
from mptunnel.picture import SPACING, WIDTH, Picture, Stream, draw_verdict, sparkline
from mptunnel.story import (
    MAX_SILENCE,
    MAX_STALL,
    RATE,
    SECONDS,
    SEED,
    SIZE,
    STORY,
    UPLINKS,
    Claim,
    Lines,
    Mood,
    Outcome,
    Scene,
    judge,
    mood_at,
    progress_line,
    received_by,
    standstill,
    verdict_lines,
)
from mptunnel.traffic import Flow, Progress, content_sha256
from mptunnel.wires import Counts

MS = 1_000_000


def flow(gap_ms: int = 10, lost: int = 0, duplicated: int = 0) -> Flow:
    """Return a call of 100 datagrams with one gap, and so many lost at its end."""
    sent = [n * 10 * MS for n in range(1, 101)]
    arrived = [at + (MS if n < 50 else (gap_ms - 9) * MS) for n, at in enumerate(sent)]
    return Flow(sent, [*arrived[: 100 - lost], *[0] * lost], duplicated)


def wire(lost: int) -> WireCounts:
    return WireCounts(Counts(packets=1000, delivered=1000 - lost), Counts(packets=500, delivered=500))


def outcome(**changed: Any) -> Outcome:
    """Return an outcome that bears out every claim, but for what is changed."""
    good = Outcome(
        tunnel=Progress(received=SIZE, sha256=content_sha256(SIZE, SEED), stalls=((5.0, 0.05),)),
        call=(flow(), flow()),
        control_stall=5.5,
        control_received=SIZE // 2,
        wires={"p1": wire(300), "p2": wire(200)},
        receipts={"received": 20_000, "saved": 1234, "lost": 0, "longest_gap_ms": 20.0},
    )
    return dataclasses.replace(good, **changed)


def failed(**changed: Any) -> list[int]:
    return [number for number, claim in enumerate(judge(outcome(**changed))) if not claim.holds]


def test_a_good_outcome_bears_out_every_claim() -> None:
    assert failed() == []


@pytest.mark.parametrize(
    ("claim", "changed"),
    [
        (0, {"tunnel": Progress(received=SIZE, sha256=content_sha256(SIZE, SEED + 1))}),
        (1, {"tunnel": Progress(SIZE, sha256=content_sha256(SIZE, SEED), stalls=((5.0, MAX_STALL + 0.01),))}),
        (2, {"call": (flow(lost=1), flow())}),
        (2, {"call": (flow(), flow(duplicated=1))}),
        (2, {"call": (flow(), flow(gap_ms=int(1000 * MAX_SILENCE) + 20))}),
        (2, {"call": (Flow([], [], 0), Flow([], [], 0))}),
        (3, {"wires": {"p1": wire(0), "p2": wire(200)}}),
        (3, {"wires": {"p1": wire(300), "p2": wire(0)}}),
        (4, {"receipts": {"saved": 0, "lost": 0}}),
        (4, {"receipts": {"saved": 10, "lost": 1}}),
        (4, {"receipts": {}}),
        (5, {"control_stall": 1.0}),
    ],
)
def test_each_claim_fails_where_it_is_not_borne_out(claim: int, changed: dict[str, Any]) -> None:
    assert failed(**changed) == [claim]


def test_a_download_that_broke_off_fails_with_its_reason() -> None:
    claims = judge(outcome(tunnel=Progress(1000, error="not finished")))
    assert [claim.holds for claim in claims[:2]] == [False, False]
    assert "not finished" in claims[0].words


def test_the_verdict_in_lines_names_what_failed_and_sums_up() -> None:
    assert verdict_lines([Claim("a", True), Claim("b", True)])[-1] == "verdict: held"
    assert verdict_lines([Claim("a", True), Claim("b", False)]) == ["  ok    a", "FAILED  b", "verdict: NOT held"]


def test_one_uplink_is_whole_at_every_moment_of_the_story() -> None:
    """Without that the promise could not be held to the letter, and the demo would prove less."""
    for moment in {chapter.at for chapter in STORY}:
        assert Mood.GOOD in {mood_at(uplink.device, moment).mood for uplink in UPLINKS}


def test_the_story_is_in_order_ends_in_time_and_does_what_the_issue_asks_for() -> None:
    assert [chapter.at for chapter in STORY] == sorted(chapter.at for chapter in STORY)
    assert all(chapter.at < SECONDS for chapter in STORY)
    assert [each.mood for each in STORY if each.device == "p1"][-2:] == [Mood.CUT, Mood.GOOD]
    assert next(each for each in STORY if each.device == "p2" and each.mood is Mood.LOSSY).weather["loss"] >= 0.2


def test_a_standstill_is_found_in_the_middle_and_at_the_end() -> None:
    history = [(0.0, 1, 1), (1.0, 2, 1), (2.0, 3, 1), (5.0, 3, 2), (6.0, 4, 2), (6.5, 4, 2)]
    assert standstill(history, 1) == pytest.approx(3.0)
    assert standstill(history, 2) == pytest.approx(2.0)
    assert standstill(history[:2], 2) == pytest.approx(1.0)


def test_a_download_that_is_whole_does_not_stand_still() -> None:
    assert standstill([(0.0, 0, 0), (1.0, 0, 0), (2.0, SIZE, 0), (9.0, SIZE, 0)], 1) == pytest.approx(1.0)


def test_bytes_between_two_looks_are_in_proportion() -> None:
    history = [(1.0, 0, 10), (2.0, 0, 30)]
    assert [received_by(history, 2, clock) for clock in (0.0, 1.0, 1.5, 2.0, 9.0)] == [10, 10, 20, 30, 30]


def scene(clock: float = 5.0) -> Scene:
    return Scene(
        clock=clock,
        tunnel=Progress(received=int(RATE * clock)),
        control=Progress(received=int(RATE * 3)),
        wires={"p1": wire(300), "p2": wire(0)},
        status={
            "receipts": {"down": {"received": 23_411, "saved": 1204, "lost": 0, "longest_gap_ms": 21.4}, "up": None},
            "paths": [{"interface": "p1", "state": "down", "rtt_ms": None, "first_share": 0.62}],
        },
        history=[(n / 10, int(RATE * n / 10), int(RATE * min(n / 10, 3))) for n in range(int(clock * 10) + 1)],
    )


def test_progress_is_told_in_one_line() -> None:
    assert progress_line(scene()) == (
        "  5.0 s   through the tunnel  10.5 MB   over wifi alone   6.3 MB   saved by the other copy 1,204"
    )
    assert "saved" not in progress_line(dataclasses.replace(scene(), status={})), "the client has not answered yet"


def test_lines_are_told_every_two_seconds_and_not_every_frame(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for clock in (0.5, 1.1, 1.2, 2.0, 3.1, 3.2):
        lines.show(scene(clock))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1.1", "3.1"]


def stream(seconds: float, packets: int, lost: int, *, is_cut: bool = False) -> Stream:
    made = Stream()
    for _ in range(round(seconds / SPACING)):
        made.step(SPACING, packets, lost, is_cut=is_cut)
    return made


def test_dots_cross_the_lane_and_come_out() -> None:
    lane = stream(5.0, 10, 0)
    assert 8 < len(lane.dots) < 14
    assert all(dot.end == 1.0 for dot in lane.dots)
    lane.step(5.0, 0, 0)
    assert lane.dots == []


def test_no_packets_make_no_dots() -> None:
    assert stream(5.0, 0, 0).dots == []


def test_as_many_dots_come_to_grief_as_packets() -> None:
    lane, doomed, born = Stream(), 0, 0
    for _ in range(1000):
        before = set(map(id, lane.dots))
        lane.step(SPACING, 100, 30)
        fresh = [dot for dot in lane.dots if id(dot) not in before or dot.at == 0.0]
        born += len(fresh)
        doomed += sum(dot.end < 1.0 for dot in fresh)
    assert doomed / born == pytest.approx(0.3, abs=0.02)


def test_on_a_cut_lane_every_dot_ends_in_the_middle() -> None:
    assert {dot.end for dot in stream(3.0, 10, 10, is_cut=True).dots} == {0.5}


def test_a_lane_is_drawn_both_ways_and_always_as_wide() -> None:
    lane = Stream()
    lane.step(SPACING, 1, 0)
    lane.step(SPACING, 1, 0)
    rightwards = lane.draw(38, Mood.GOOD, "green", leftwards=False).plain
    assert len(rightwards) == 38
    assert rightwards[0] == "●"
    assert lane.draw(38, Mood.GOOD, "green", leftwards=True).plain == rightwards[::-1]


def test_a_sparkline_shows_where_a_download_stood_still() -> None:
    line = sparkline(scene(SECONDS).history, 2, per_second=5)
    assert len(line) == 5 * SECONDS
    assert "▁" not in line[: 5 * 3]
    assert set(line[5 * 3 + 1 :]) == {"▁"}


def drawn(thing: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [demo.MIN_COLUMNS, 100, 200])
def test_the_picture_fits_and_shows_what_is_known(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    picture = Picture(console)
    picture.advance(scene(), 0.2)
    text = drawn(picture.draw(scene()), width)
    assert {len(line) for line in text.splitlines()} == {min(width, WIDTH)}, "the frame is straight"
    assert len(text.splitlines()) < demo.MIN_ROWS
    for figure in ("1,204", "23,411", "21 ms", "10.5 MB", "stands still for 2.0 s", "cut", "loses 30 %", "5.0 s"):
        assert figure in text


def test_the_picture_bears_a_status_that_says_nothing_yet() -> None:
    assert "wifi" in drawn(Picture(Console(file=io.StringIO())).draw(Scene()))


def test_the_drawn_verdict_says_whether_all_of_it_held() -> None:
    assert "everything held" in drawn(draw_verdict([Claim("a", True)], 80))
    assert "not everything held" in drawn(draw_verdict([Claim("a", True), Claim("b", False)], 80))


def test_without_a_terminal_the_demo_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with demo._teller(live=True) as teller:
        assert isinstance(teller, Lines)


def test_where_namespaces_are_refused_the_demo_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Lab) -> Lab:
        raise Unavailable("refused; run it with sudo", would_root_help=True)

    monkeypatch.setattr(Lab, "__enter__", refuse)
    with pytest.raises(Unavailable, match="sudo"):
        demo.main(live=False)


@pytest.mark.netns
def test_the_whole_demo_holds_what_it_claims_and_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Lab())
        except Unavailable as error:
            if "CI" in os.environ:
                raise
            pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "mptunnel", "demo", "--no-live"],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=Path(demo.__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verdict: held"
    assert list(tmp_path.iterdir()) == []
