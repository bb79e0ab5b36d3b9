"""The program of --on-event: what it is told, and that it can hang, fail or come in crowds without harm."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import pytest

from mptunnel import hook
from mptunnel.hook import MAX_RUNNING, MAX_WAITING, Hook, environment
from tests.running import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DOWN = {"event": "path-down", "time": 1.5, "peer": "vpn", "path": "wlan0", "why": "3 probes unanswered; $(touch x)"}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Hook]]:
    """A function that makes a hook of a shell script's lines; $D is the test's directory."""
    made: list[Hook] = []

    def maker(lines: str) -> Hook:
        program = tmp_path / "on-event"
        program.write_text(f"#!/bin/sh\nD='{tmp_path}'\n{lines}\n")
        program.chmod(0o755)
        made.append(Hook(program))
        return made[-1]

    yield maker
    for each in made:
        each.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no zombie, and nothing that runs on


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_it_is_told_the_event_and_nothing_else_of_ours(
    make: Callable[[str], Hook], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPTUNNEL_JOIN_SECRET", "x")
    make('env >"$D/env.new"; pwd >>"$D/env.new"; cat >>"$D/env.new"; mv "$D/env.new" "$D/env"').submit(DOWN)
    lines = wait_until(lambda: text(tmp_path / "env"), "it has run").splitlines()
    assert {line for line in lines if line.startswith("MPTUNNEL_")} == {
        "MPTUNNEL_EVENT=path-down", "MPTUNNEL_TIME=1.5", "MPTUNNEL_PEER=vpn", "MPTUNNEL_PATH=wlan0",
        "MPTUNNEL_WHY=3 probes unanswered; $(touch x)",
    }  # fmt: skip
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert {name for name in names if not name.startswith("MPTUNNEL_")} <= {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}
    assert lines[-1] == "/", "its directory, and nothing came on stdin"


def test_the_environment_has_our_path_with_the_system_directories() -> None:
    assert {"/usr/sbin", "/sbin"} <= set(environment(DOWN)["PATH"].split(":"))


def test_it_has_a_session_of_its_own(make: Callable[[str], Hook], tmp_path: Path) -> None:
    make('echo $$ $(cut -d" " -f6 /proc/$$/stat) >"$D/new"; mv "$D/new" "$D/ids"').submit(DOWN)
    own, session = wait_until(lambda: text(tmp_path / "ids").split(), "it has run")
    assert own == session != str(os.getsid(0))


def test_one_that_hangs_does_not_keep_the_next_from_being_told(make: Callable[[str], Hook], tmp_path: Path) -> None:
    running = make('[ $MPTUNNEL_EVENT != gap ] || sleep 60; echo $MPTUNNEL_EVENT >>"$D/told"')
    for event in ("gap", "gap", "path-up"):
        running.submit({"event": event})
    assert wait_until(lambda: text(tmp_path / "told"), "the third has run") == "path-up\n"


def test_one_that_hangs_is_killed_with_what_it_started(
    make: Callable[[str], Hook], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook, "PATIENCE", 0.3)
    make('sleep 60 & echo $! >"$D/child"; trap "" TERM; sleep 60').submit(DOWN)
    wait_until(lambda: "was killed" in caplog.text, "it is killed")
    child = int(text(tmp_path / "child"))

    def has_ended() -> bool:  # whoever adopts it reaps it, in its own time
        with contextlib.suppress(OSError), open(f"/proc/{child}/stat") as file:  # noqa: PTH123
            return file.read().split()[2] == "Z"
        return True

    wait_until(has_ended, "so is what it started")


def test_more_than_can_wait_are_dropped_the_oldest_first_counted_and_told_once(
    make: Callable[[str], Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = make('while [ ! -e "$D/go" ]; do sleep 0.02; done; echo $MPTUNNEL_N >>"$D/told"')
    for n in range(MAX_RUNNING):
        running.submit({"event": "gap", "n": n})
    wait_until(lambda: len(running._running) == MAX_RUNNING, "all that may run do")
    more = MAX_WAITING + 10
    begun = time.monotonic()
    for n in range(MAX_RUNNING, MAX_RUNNING + more):
        running.submit({"event": "gap", "n": n})
    assert time.monotonic() - begun < 1.0, "nobody waits for it"
    assert running.dropped == 10
    assert caplog.text.count("the oldest are dropped") == 1
    (tmp_path / "go").touch()
    wait_until(lambda: len(text(tmp_path / "told").split()) == MAX_RUNNING + MAX_WAITING, "all others have run")
    told = sorted(int(n) for n in text(tmp_path / "told").split())
    assert told == [*range(MAX_RUNNING), *range(MAX_RUNNING + 10, MAX_RUNNING + more)]


@pytest.mark.parametrize(("line", "said"), [("exit 3", "failed: exit code 3"), ("kill -9 $$", "killed by SIGKILL")])
def test_one_that_fails_is_told_in_the_log(
    line: str, said: str, make: Callable[[str], Hook], caplog: pytest.LogCaptureFixture
) -> None:
    make(line).submit(DOWN)
    wait_until(lambda: f"path-down {said}" in caplog.text or f"failed: {said}" in caplog.text, "the log says so")


def test_one_that_cannot_be_started_is_told_and_the_next_is_tried(
    make: Callable[[str], Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = make('echo yes >"$D/told"')
    (tmp_path / "on-event").rename(tmp_path / "away")
    for _ in range(MAX_RUNNING + 1):
        running.submit(DOWN)
    wait_until(lambda: caplog.text.count("no such file or directory") == MAX_RUNNING + 1, "the log says so")
    (tmp_path / "away").rename(tmp_path / "on-event")
    running.submit(DOWN)
    wait_until(lambda: text(tmp_path / "told"), "it runs")


def test_one_that_ends_well_is_not_worth_a_word(
    make: Callable[[str], Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make('echo yes >"$D/told"').submit(DOWN)
    wait_until(lambda: text(tmp_path / "told"), "it has run")
    assert not caplog.text


def test_closing_kills_what_still_runs_and_starts_nothing_more(
    make: Callable[[str], Hook], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "GRACE", 0.05)
    running = make('echo $$ >>"$D/told"; sleep 60')
    for _ in range(MAX_RUNNING + 5):
        running.submit(DOWN)
    wait_until(lambda: len(text(tmp_path / "told").split()) == MAX_RUNNING, "they run")
    running.close()
    assert len(text(tmp_path / "told").split()) == MAX_RUNNING
    assert not any(thread.is_alive() for thread in running._threads)
