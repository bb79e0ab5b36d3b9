"""The live status: what it shows, at which width, and that it survives what it watches."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from mptunnel.errors import HostError
from mptunnel.watch import Rates, draw, picture
from tests.answers import answering
from tests.running import wait_until
from tests.test_report import CLIENT, SERVER

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

ALONE = {"up": {"lost": 12345, "longest_gap_ms": 4000.0, "first_share": 0.4}, "down": None}


def later(status: dict[str, Any]) -> dict[str, Any]:
    """Return the status after another megabyte each way by everything."""
    status = copy.deepcopy(status)
    for owner in [status, *status.get("peers", [])]:
        for traffic in (owner.get("traffic") or {}).values():
            traffic["bytes"] += 1_000_000
        for path in owner.get("paths", []):
            for side in ("tx_bytes", "rx_bytes"):
                path[side] = (path.get(side) or 0) + 1_000_000
    return status


def text(what: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(what)
    return console.export_text()


def shown(status: dict[str, Any], width: int) -> list[str]:
    rates = Rates()
    rates.take(status, 10.0)
    rates.take(later(status), 12.0)
    return text(draw(later(status), rates), width).splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("status", [CLIENT, SERVER])
def test_everything_fits_whole_into_its_lines(status: dict[str, Any], width: int) -> None:
    lines = shown(status, width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)


def test_a_clients_picture_reads_like_this() -> None:
    status = copy.deepcopy(CLIENT)
    status["paths"][0]["alone"] = ALONE
    assert [line.rstrip() for line in shown(status, 80)] == [
        "mpt0 client of vpn.example.org:5000 up running for 2 d 3 h",
        "redundancy saved 1,234 packets and bridged 2 outages (7.9 s); lost on every path",
        "3; longest gap 12 ms",
        "address 10.0.1.2, fd12::2, MTU 1420, session 45 s old",
        "",
        "              rate    packets     bytes     saved        lost   longest gap",
        " up       500 kB/s    120,482    100 MB     1,111           0         12 ms",
        " down     500 kB/s     99,117    1.2 GB       123           3        8.2 ms",
        "",
        "● wlan0 up for 2 h 13 min, round trip 23 ms, jitter 4.1 ms, MTU 1420",
        "  192.168.1.5, seen by the server as 203.0.113.7:41822",
        "              rate  datagrams    bytes    lost  first alone: lost longest gap",
        " up       500 kB/s    120,482   100 MB  0.10 %   40 %      12,345       4.0 s",
        " down     500 kB/s     99,120   1.2 GB   2.5 %   61 %           -           -",
        "",
        "● 10.64.3.9 waiting",
        "  2 x ENODEV",
        " up       500 kB/s          0   1.0 MB       -      -           -           -",
        " down     500 kB/s          0   1.0 MB       -      -       1,060       7.5 s",
    ]


def test_a_server_shows_each_client_that_was_ever_there() -> None:
    lines = shown(SERVER, 80)
    assert lines[0].startswith("mpt1 server on UDP port 5000 up")
    assert lines[1].startswith("1 of 2 clients up")
    assert sum("van-7" in line for line in lines) == 1
    assert not any("phone" in line for line in lines)
    assert any("path 0 fresh" in line for line in lines)
    assert any("203.0.113.7:41822" in line for line in lines)
    assert sum("500 kB/s" in line for line in lines) == 2


def test_what_a_server_receives_is_what_goes_up() -> None:
    status = copy.deepcopy(SERVER)
    status["peers"][1]["paths"][0] |= {"tx": 5, "rx": 7, "first_share": 0.25}
    lines = shown(status, 80)[-2:]
    assert lines[0].split()[:4] == ["up", "500", "kB/s", "7"]
    assert lines[1].split()[:4] == ["down", "500", "kB/s", "5"]
    assert "25 %" in lines[0]
    assert "25 %" not in lines[1]


def test_a_status_that_knows_little_is_shown_too() -> None:
    little = {"format": 1, "role": "client", "device": "mpt0", "state": "connecting", "paths": [{"id": 0}]}
    assert "no receipts yet" in "\n".join(shown(little, 80))


def test_rates_are_taken_over_two_seconds_and_begin_anew_with_another_run() -> None:
    rates, status = Rates(), CLIENT
    for now in range(5):
        rates.take(status, float(now))
        status = later(status)
        assert rates.of("", None, "up") == (1e6 if now else None)
    assert len(rates._seen) <= 4
    rates.take(later(status), 5.0)
    assert rates.of("", 0, "down") == pytest.approx(1.5e6)
    rates.take(CLIENT | {"pid": 2}, 6.0)
    assert rates.of("", None, "up") is None
    assert rates.of("", 7, "up") is None


def program(run_dir: Path, answer: Any = CLIENT) -> contextlib.AbstractContextManager[None]:
    """Answer as a running instance."""

    def handle(_verb: str, _arguments: dict[str, Any]) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return answering(run_dir / "mpt0.sock", handle)


@pytest.mark.parametrize("device", [None, "mpt0"])
def test_a_program_that_stops_is_waited_for_and_shown_again(device: str | None, tmp_path: Path) -> None:
    watched: dict[str, Rates] = {}
    with program(tmp_path):
        assert "mpt0 client of" in text(picture(tmp_path, device, watched), 80)
    for _ in range(2):
        assert text(picture(tmp_path, device, watched), 80) == "mpt0 is not running; waiting for it\n"
    with program(tmp_path, HostError("busy")):
        assert text(picture(tmp_path, device, watched), 80) == "mpt0: busy\n"
    with program(tmp_path):
        assert "mpt0 client of" in text(picture(tmp_path, device, watched), 80)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_terminal_is_given_back_at_the_end(number: signal.Signals, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(ours, False)
    before = termios.tcgetattr(theirs)
    said = bytearray()

    def has_drawn(times: int = 2) -> bool:
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(ours, 1 << 16))
        return said.count(b"client of") >= times

    with program(tmp_path):
        command = [sys.executable, "-m", "mptunnel", "status", "--watch", "--run-dir", str(tmp_path)]
        environment = os.environ | {"TERM": "xterm"}
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        wait_until(has_drawn, "it has drawn twice")
        process.send_signal(number)
        assert process.wait(20) == 0
    has_drawn()
    assert b"Traceback" not in said
    assert said.rindex(b"\x1b[?1049l") > said.index(b"\x1b[?1049h"), "the screen that was there before"
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l"), "the cursor"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
