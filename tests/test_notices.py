"""What the real program tells of a gap, of its paths and of its clients: by the event stream and by --on-event."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.traffic import Datagrams
from tests.running import NEVER_STOOD_STILL, Maker, Tunnel, note, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.netns

ALARM = 100  # ms


def notifier(tunnel: Tunnel, place: str) -> Path:
    """Make a program that writes down what it is told, event by event, and then hangs around for a while."""
    program = tunnel.places / f"notify-{place}"
    told = tunnel.places / f"{place}.told"
    lines = "env | grep ^MPTUNNEL_ | sort | tr '\\n' ';'"
    program.write_text(f'#!/bin/sh\necho "$({lines})" >>{told}\nsleep 0.2\n')  # one write: several run at a time
    program.chmod(0o755)
    told.touch()
    return program


def told(tunnel: Tunnel, place: str, event: str, **values: str) -> list[dict[str, str]]:
    """Return what the program was told of one kind of event."""
    lines = (tunnel.places / f"{place}.told").read_text().splitlines()
    found = [dict(pair.split("=", 1) for pair in line.split(";") if pair) for line in lines]
    wanted = {"MPTUNNEL_EVENT": event} | {f"MPTUNNEL_{name.upper()}": value for name, value in values.items()}
    return [each for each in found if wanted.items() <= each.items()]


def children(process: int) -> list[str]:
    """Return the processes that a process has started and not yet reaped."""
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
        assert file.read()
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return done.stdout.split()


def test_both_wires_cut_are_told_at_once_and_their_return_too_by_stream_program_and_log(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=93)
    token = tunnel.token_file(tunnel.token())
    tunnel.serve("--on-event", str(notifier(tunnel, "sv")))
    tunnel.connect("--join", token, "--alarm", str(ALARM), "--on-event", str(notifier(tunnel, "cl")))
    tunnel.wait_up()
    stream = tunnel.places / "cl.events"
    with stream.open("wb") as out:
        listener = tunnel.lab.spawn("cl", tunnel.command("cl", "events", "--json"), stdout=out)

    def heard(event: str) -> list[dict[str, Any]]:
        events = [json.loads(line) for line in stream.read_text().splitlines() if line.endswith("}")]
        return [each for each in events if each["event"] == event]

    time.sleep(1.0)
    assert listener.poll() is None
    cut_at = time.time()
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).cut()
    wait_until(lambda: told(tunnel, "cl", "gap"), "the program is told of the gap")
    (gap,) = heard("gap")
    note(f"gap told {1e3 * (gap['time'] - cut_at):.0f} ms after the cut, after {gap['silent_ms']} ms of silence")
    assert ALARM <= gap["silent_ms"] < ALARM + 1e3 * NEVER_STOOD_STILL
    assert gap["device"] == "mpt0"
    tunnel.wait_log("cl", "gap: nothing has come from")
    wait_until(lambda: heard("tunnel-silent"), "the tunnel is told silent")
    assert {each["path"] for each in heard("path-down")} == {tunnel.lab.client_address(n) for n in (1, 2)}
    assert {each["interface"] for each in heard("path-down")} == {"p1", "p2"}
    wait_until(lambda: told(tunnel, "sv", "client-gone"), "the server tells that its client is gone")
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).mend()
    wait_until(lambda: told(tunnel, "cl", "gap-over"), "the program is told that it is over")
    (over,) = heard("gap-over")
    assert over["lasted_ms"] == pytest.approx(1e3 * (over["time"] - gap["time"]) + gap["silent_ms"], abs=50)
    wait_until(lambda: heard("tunnel-up"), "the tunnel is told up")
    wait_until(lambda: len(told(tunnel, "sv", "client-up")) == 2, "the server tells that it is back")
    assert told(tunnel, "sv", "path-up", path="0")
    assert len(told(tunnel, "cl", "gap")) == len(told(tunnel, "cl", "gap-over")) == 1
    pid = tunnel.status()["pid"]
    wait_until(lambda: not children(pid), "no process is left of those that were started")
    tunnel.stop("cl")
    assert listener.wait(20) == 3


def test_a_program_that_hangs_holds_up_neither_packets_nor_the_clean_stop(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=94)
    program = tunnel.places / "hang"
    program.write_text(f"#!/bin/sh\necho $$ >>{tunnel.places}/hanging\nsleep 1000\n")
    program.chmod(0o755)
    tunnel.begin("--on-event", str(program))
    hanging = tunnel.places / "hanging"
    wait_until(lambda: hanging.exists() and len(hanging.read_text().split()) >= 3, "three of them hang")
    assert all(path["state"] == "up" for path in tunnel.paths().values())
    for flow in Datagrams(tunnel.lab, 0.5, rate=100).finish():
        assert flow.lost == 0
    pid = tunnel.status()["pid"]
    assert len(children(pid)) >= 3
    tunnel.stop("cl")
    left = subprocess.run(["ps", "-o", "pid=", "-p", ",".join(hanging.read_text().split())], check=False)
    assert left.returncode == 1, "none of them is left"
