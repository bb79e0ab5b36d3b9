"""The real program as processes in a lab: what the end-to-end tests share.

`Tunnel` is a server and a client, each with a state and a run directory of its own, joined as their users would join
them. All that a test does to them comes from outside: command lines, signals, files, wires.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest

from mptunnel import control
from mptunnel.errors import MptunnelError
from mptunnel.lab import SERVER, Lab, Unavailable, two_uplinks
from tests.machines import LOOK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mptunnel.traffic import Flow

Answer = TypeVar("Answer")
Opener = Callable[..., Lab]
Maker = Callable[..., "Tunnel"]
Process = subprocess.Popen[Any]

PROGRAM: Final = [sys.executable, "-m", "mptunnel"]
PATIENCE: Final = 20.0  # s, for what comes soon where nothing else runs
NEVER_STOOD_STILL: Final = 0.25  # s: the longest gap that a busy machine is forgiven
_STEP: Final = 0.02


def labs() -> Iterator[Opener]:
    """Yield a function that opens labs; it skips the test, saying why, where the kernel refuses them."""
    with contextlib.ExitStack() as stack:

        def opener(**topology: Any) -> Lab:
            try:
                return stack.enter_context(Lab(two_uplinks(**topology)))
            except Unavailable as error:
                if "CI" in os.environ:
                    raise
                pytest.skip(str(error))

        yield opener


def wait_until(ask: Callable[[], Answer], what: str, patience: float = PATIENCE) -> Answer:
    """Return the first true answer of `ask`; fail the test, saying `what` did not come, where there is none in time."""
    end = time.monotonic() + patience
    while not (answer := ask()):
        assert time.monotonic() < end, f"not within {patience:.0f} s: {what}"
        time.sleep(_STEP)
    return answer


def until(moment: float) -> None:
    """Sleep until `time.monotonic()` is there."""
    time.sleep(max(0.0, moment - time.monotonic()))


class Tunnel:
    """The program's processes in a lab. A place is where one runs: "sv", "cl", or with more words "cl-thief".

    Its first two letters are the role, hence the namespace; each place has directories and a log of its own.
    """

    def __init__(self, lab: Lab, places: Path) -> None:
        self.lab, self.places = lab, places
        self.running: dict[str, Process] = {}
        self.uplinks = [word for path in lab.paths for word in ("-i", lab.client_address(path))]

    # -- command lines

    def command(self, place: str, *words: str) -> list[str]:
        """Return the program's command line with this place's directories."""
        here = self.places / place
        return [*PROGRAM, *words, "--state-dir", str(here / "state"), "--run-dir", str(here / "run")]

    def do(self, place: str, *words: str, given: str = "", patience: float = 30.0) -> tuple[int, str, str]:
        """Run the program to its end; return its exit code, what it answered and what it said."""
        pipe = subprocess.PIPE
        command = self.command(place, *words)
        process = self.lab.spawn(place[:2], command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        answered, said = process.communicate(given, patience)
        return process.returncode, answered, said

    def must(self, place: str, *words: str) -> str:
        """Run the program to its end, which has to be good, and return what it answered."""
        code, answered, said = self.do(place, *words)
        assert code == 0, said
        return answered

    def token(self, *words: str) -> str:
        """Return a new token of the server."""
        return self.must("sv", "token", "new", *words).strip()

    def token_file(self, token: str) -> str:
        """Return the value of --join for a token that no process list shows."""
        path = self.places / f"token-{len(list(self.places.glob('token-*')))}"
        path.touch(mode=0o600)
        path.write_text(token + "\n")
        return f"@{path}"

    # -- processes

    def start(self, place: str, *words: str) -> Process:
        """Start the program to run on; what it says is added to the place's log."""
        with self.log_file(place).open("ab") as log:
            process = self.lab.spawn(place[:2], self.command(place, *words), stdout=log, stderr=log)
        self.running[place] = process
        return process

    def serve(self, *words: str) -> Process:
        """Start the server and wait until it listens."""
        process = self.start("sv", "-s", *words)
        wait_until(lambda: self.status("sv") or process.poll() is not None, "the server listens")
        assert process.poll() is None, self.log("sv")
        return process

    def connect(
        self, *words: str, place: str = "cl", server: str = SERVER, uplinks: list[str] | None = None
    ) -> Process:
        """Start a client; over every uplink, unless others are given."""
        paths = self.uplinks if uplinks is None else uplinks
        dns = () if "--dns" in words else ("--dns", "keep")
        return self.start(place, "-c", server, *paths, *dns, *words)

    def begin(self, *words: str, **how: Any) -> None:
        """Start a server and a client that joins it, and wait until every path is up."""
        token = self.token_file(self.token())
        self.serve()
        self.connect("--join", token, *words, **how)
        self.wait_up()

    def kill(self, *places: str) -> None:
        """End processes by SIGKILL."""
        for place in places:
            process = self.running.pop(place)
            process.kill()
            process.wait()

    def stop(self, *places: str) -> None:
        """End processes cleanly."""
        for place in places:
            process = self.running.pop(place)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, self.log(place)

    # -- what is seen of them

    def status(self, place: str = "cl") -> dict[str, Any]:
        """Return the status object of what runs there, {} while it does not answer."""
        run_dir = self.places / place / "run"
        try:
            return next((control.ask(path, "status") for path in control.find(run_dir)), {})
        except MptunnelError:
            return {}

    def paths(self, place: str = "cl") -> dict[str, dict[str, Any]]:
        """Return a client's paths by interface; those without one by name."""
        return {each["interface"] or each["name"]: each for each in self.status(place).get("paths", ())}

    def wait_up(self, *interfaces: str, place: str = "cl", patience: float = PATIENCE) -> float:
        """Wait until a client's paths by these interfaces (all its paths) are up; return how long that took."""
        begun = time.monotonic()

        def is_up() -> bool:
            paths = self.paths(place)
            wanted = [paths.get(name, {}) for name in interfaces] or list(paths.values())
            return bool(wanted) and all(path.get("state") == "up" for path in wanted)

        def has_ended_or_is_up() -> bool:
            return self.running[place].poll() is not None or (self.status(place).get("state") == "up" and is_up())

        wait_until(has_ended_or_is_up, "the tunnel is up", patience)
        assert self.running[place].poll() is None, self.log(place)
        return time.monotonic() - begun

    def wait_in(self) -> None:
        """Wait until the server that runs now has its client, by every path."""

        def is_in() -> bool:
            (peer,) = self.status("sv").get("peers") or [{}]
            return peer.get("state") == "up" and len(peer["paths"]) == len(self.lab.paths)

        wait_until(is_in, "the client is in")

    def log_file(self, place: str) -> Path:
        """Return the file of a place's log."""
        return self.places / f"{place}.log"

    def log(self, place: str) -> str:
        """Return what a place's processes have said so far."""
        return self.log_file(place).read_text(errors="replace")

    def wait_log(self, place: str, words: str, patience: float = PATIENCE) -> str:
        """Wait until a place's log has these words, and return the line."""

        def found() -> str | None:
            return next((line for line in self.log(place).splitlines() if words in line), None)

        return wait_until(found, f"{place} says {words!a}", patience) or ""

    def look(self, role: str) -> list[str]:
        """Return everything that can be seen of a machine: addresses, routes, rules, nft, sysctls, resolver."""
        return self.lab.run(role, ["sh", "-ec", LOOK]).splitlines()

    def check_logs(self) -> None:
        """Print all logs, for who has to find out; fail where a process of ours had a bug, or spoke of an error."""
        for path in self.places.glob("*.log"):
            text = path.read_text(errors="replace")
            note(f"-- {path.name}\n{text}")
            assert "Traceback" not in text, text
            assert " error: " not in text, text


def note(figure: str) -> None:
    """Print what was measured, for `pytest -rA` and for who looks after a failure."""
    print(figure)  # noqa: T201  a figure is what the test is for


def note_flows(what: str, *flows: Flow) -> None:
    """Note what became of the datagrams up and down."""
    for name, flow in zip(("up", "down"), flows, strict=True):
        gap, own = flow.longest_gap() * 1e3, flow.longest_send_gap() * 1e3
        note(
            f"{what}, {name}: {flow.sent} sent, {flow.lost} lost, {flow.duplicated} twice, "
            f"longest gap {gap:.1f} ms (the sender's own {own:.1f} ms)"
        )
