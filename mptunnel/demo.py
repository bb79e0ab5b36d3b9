"""`mptunnel demo`: the real program between two shaky uplinks, what is done to them, and a verdict that is checked.

A laptop with two uplinks behind NATs (wifi and lte), a server, and a web server behind it live in a `lab`: namespaces
of their own, no root needed, nothing outside them is touched. The real client and server run there as processes,
joined by a one-time token as their users would join them. For `SECONDS` a download runs through the tunnel, a call
(small datagrams both ways) beside it, and, as the control, the same download over wifi alone. Meanwhile `STORY`
happens to the uplinks. At every moment one of the two is whole, so the promise holds to the letter: nothing is lost
and nothing waits. `judge` holds it against what was measured, and only if all of it held the exit code is 0.

The picture is drawn by `picture` where stdout is a terminal; else, and with `--no-live`, the same is told in lines.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mptunnel import control
from mptunnel.errors import HostError, MptunnelError
from mptunnel.lab import SERVER, Lab, WireCounts, two_uplinks
from mptunnel.story import (
    CALL_RATE,
    RATE,
    SECONDS,
    SEED,
    SIZE,
    STORY,
    UPLINKS,
    Lines,
    Outcome,
    Scene,
    judge,
    standstill,
)
from mptunnel.traffic import Datagrams, Download, serve_web
from mptunnel.wires import Counts

if TYPE_CHECKING:
    import subprocess

    from mptunnel.story import Teller

FRAME_SECONDS: Final = 1 / 12
MIN_COLUMNS, MIN_ROWS = 80, 24  # that the picture needs

_MODULE: Final = [sys.executable, "-m", "mptunnel"]
_JOIN_SECONDS: Final = 15.0
_SETTLE_SECONDS: Final = 0.5
_PATIENCE: Final = 10.0  # beyond the story
_STATUS_SECONDS: Final = 0.2
_RECEIPT_SECONDS: Final = 2.5  # receipts are settled two seconds after the fact


def main(live: bool = True) -> int:
    """Run the demo and return the exit code: 0 only if every claim held.

    Raises `Unavailable` where the kernel refuses namespaces, `HostError` where the program itself does not start.
    """
    with contextlib.ExitStack() as stack:
        places = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mptunnel-demo-")))
        lab = stack.enter_context(Lab(two_uplinks(seed=SEED)))  # ends first, and with it who writes there
        teller = stack.enter_context(_teller(live=live))
        tunnel = Tunnel(lab, places)
        teller.say("server:  mptunnel -s")
        teller.say(f"laptop:  mptunnel -c {SERVER} {' '.join(tunnel.paths)}")
        tunnel.start()
        teller.say("the tunnel is up over wifi and lte; two downloads and a call begin")
        claims = judge(run_story(lab, tunnel, teller))
        teller.conclude(claims)
    return 0 if all(claim.holds for claim in claims) else 1


def _teller(*, live: bool) -> contextlib.AbstractContextManager[Teller]:
    """Return the live picture where the terminal can show it, else the lines."""
    terminal = shutil.get_terminal_size()
    is_large = terminal.columns >= MIN_COLUMNS and terminal.lines >= MIN_ROWS
    if not (live and sys.stdout.isatty() and is_large and (sys.stdout.encoding or "").lower().startswith("utf")):
        return contextlib.nullcontext(Lines())
    from mptunnel.picture import Picture  # noqa: PLC0415  rich is heavy, and only the picture needs it

    return Picture()


class Tunnel:
    """The real program in the lab: a server, and a client that joins it by a token."""

    def __init__(self, lab: Lab, places: Path) -> None:
        self._lab, self._places = lab, places
        self._logs: dict[str, Path] = {}
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        self.paths = [word for path in lab.paths for word in ("-i", lab.client_address(path))]

    def start(self, *words: str) -> None:
        """Start both, the server with these words more, and wait until every path is up.

        Raises `HostError` with the last words of the log.
        """
        token = self._places / "token"
        told = self._lab.run("sv", [*_MODULE, "token", "new", *self._directories("sv")])
        token.touch(mode=0o600)
        token.write_text(told.split()[-1] + "\n")
        self._spawn("sv", "-s", *words)
        self._spawn("cl", "-c", SERVER, *self.paths, "--dns", "keep", "--join", f"@{token}")
        end = time.monotonic() + _JOIN_SECONDS
        while not self._is_up():
            if time.monotonic() > end or any(each.poll() is not None for each in self.processes.values()):
                last = "; ".join(f"{role}: {self._last_words(role)}" for role in self._logs)
                raise HostError(f"the tunnel did not come up; {last}")
            time.sleep(0.05)

    def status(self, role: str = "cl") -> dict[str, Any]:
        """Return a status object, the client's unless told otherwise; {} while it does not answer."""
        try:
            known: dict[str, Any] = control.ask(self._places / role / "run" / "mpt0.sock", "status")
        except MptunnelError:
            return {}
        return known

    def _is_up(self) -> bool:
        status = self.status()
        paths = status.get("paths", ())
        return (
            status.get("state") == "up"
            and len(paths) == len(self._lab.paths)
            and all(p["state"] == "up" for p in paths)
        )

    def _spawn(self, role: str, *arguments: str) -> None:
        self._logs[role] = self._places / f"{role}.log"
        command = [*_MODULE, *self._directories(role), *arguments]
        with self._logs[role].open("wb") as log:
            self.processes[role] = self._lab.spawn(role, command, stdout=log, stderr=log)

    def _directories(self, role: str) -> list[str]:
        here = self._places / role
        return ["--state-dir", str(here / "state"), "--run-dir", str(here / "run")]

    def _last_words(self, role: str) -> str:
        return (self._logs[role].read_text(errors="replace").strip().splitlines() or ["(nothing)"])[-1]


def run_story(lab: Lab, tunnel: Tunnel, teller: Teller) -> Outcome:
    """Let the story happen while the downloads and the call run; return what was measured."""
    for uplink in UPLINKS:
        lab.wire(uplink.device).set(**uplink.weather)
    time.sleep(_SETTLE_SECONDS)  # the paths learn their new delays
    serve_web(lab)
    before = {each.device: lab.wire(each.device).counts() for each in UPLINKS}
    call = Datagrams(lab, SECONDS, rate=CALL_RATE)
    through = Download(lab, SIZE, seed=SEED, rate=RATE)
    alone = Download(lab, SIZE, seed=SEED, rate=RATE, device=UPLINKS[0].device)
    scene, chapters, status_at, begun = Scene(), list(STORY), 0.0, time.monotonic()
    ends_at = begun + SECONDS + _PATIENCE
    while (now := time.monotonic()) < ends_at:
        if not scene.is_over:
            scene.clock = now - begun
            scene.tunnel, scene.control = through.poll(), alone.poll()
            scene.history.append((scene.clock, scene.tunnel.received, scene.control.received))
            if scene.is_over:  # what moves still may be looked at until the receipts are settled
                ends_at = now + _RECEIPT_SECONDS
        while chapters and chapters[0].at <= scene.clock:
            chapter = chapters.pop(0)
            lab.wire(chapter.device).set(**chapter.weather)
            teller.say(f"{chapter.at:5.1f} s   {chapter.words}")
        scene.wires = {each.device: _since(before[each.device], lab.wire(each.device).counts()) for each in UPLINKS}
        if now >= status_at:
            status_at = now + _STATUS_SECONDS
            scene.status = tunnel.status() or scene.status
        teller.show(scene)
        time.sleep(FRAME_SECONDS)
    flows = call.finish()
    return Outcome(
        tunnel=through.finish(0.0),
        call=flows,
        control_stall=standstill(scene.history, 2),
        control_received=scene.control.received,
        wires=scene.wires,
        receipts=scene.receipts,
    )


def _since(before: WireCounts, now: WireCounts) -> WireCounts:
    """Return what a wire counted from one moment to another."""
    both = (
        Counts(**{name: getattr(new, name) - getattr(old, name) for name in Counts.__slots__})
        for old, new in ((before.up, now.up), (before.down, now.down))
    )
    return WireCounts(*both)
