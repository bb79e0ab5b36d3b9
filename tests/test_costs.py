"""What the program costs while it does nothing: time to help, memory, processor."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.running import PROGRAM, Maker, Tunnel, note

TICKS = os.sysconf("SC_CLK_TCK")
MEMORY = 60_000_000


def processor_time(pid: int) -> float:
    """Return the seconds of processor that a process has used: utime and stime of proc(5)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / TICKS


def memory(pid: int) -> int:
    """Return the bytes of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def shares(tunnel: Tunnel, seconds: float) -> dict[str, float]:
    """Return the share of one processor that each process uses over some seconds."""
    before = {place: processor_time(process.pid) for place, process in tunnel.running.items()}
    time.sleep(seconds)
    return {place: (processor_time(p.pid) - before[place]) / seconds for place, p in tunnel.running.items()}


def test_help_comes_at_once() -> None:
    begun = time.monotonic()
    for _ in range(5):
        done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage: mptunnel")
    note(f"--help: {(time.monotonic() - begun) / 5 * 1e3:.0f} ms")


@pytest.mark.netns
def test_an_idle_pair_costs_next_to_nothing(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=92)
    tunnel.begin("--route", "none")
    used = shares(tunnel, 4.0)  # for 10 s from its beginning a session probes as if it were in use
    for place, process in tunnel.running.items():
        held = memory(process.pid)
        note(f"idle, {place}: {held / 1e6:.1f} MB, {used[place]:.2%} of a processor")
        assert held < MEMORY
        assert used[place] < 0.05


@pytest.mark.slow
@pytest.mark.netns
def test_an_idle_pair_uses_less_than_half_a_percent_of_a_processor(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=93)
    tunnel.begin()
    time.sleep(15.0)
    for place, share in shares(tunnel, 60.0).items():
        note(f"idle, {place}: {share:.2%} of a processor")
        assert share < 0.005
