"""Make the pictures of the README's "Watching it": the real programs in a lab, `status --watch` in a real terminal.

Prints what the terminals show at the end of a story of 20 s: traffic both ways, the second uplink loses 5 %, the first
one is cut for two seconds. Needs tmux, which has the terminals. Run it by `make picture`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mptunnel.lab import Lab, two_uplinks
from mptunnel.traffic import Datagrams
from tests.running import Tunnel, until

WINDOWS = {"status --watch": (80, 24), "events": (110, 8)}  # columns and lines
SECONDS = 20.0
STORY = [  # when, which uplink, its delay (s), its loss, and whether it is cut
    (0.0, "p1", 0.012, 0.0, False),
    (0.0, "p2", 0.045, 0.05, False),
    (10.0, "p1", 0.012, 0.0, True),
    (12.0, "p1", 0.012, 0.0, False),
]


def tmux(*words: str) -> str:
    """Run tmux, with a server of our own."""
    command = ["tmux", "-f", "/dev/null", "-L", f"mptunnel-{os.getpid()}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Let the story happen and print the terminals."""
    with tempfile.TemporaryDirectory() as places, Lab(two_uplinks(seed=4)) as lab:
        tunnel = Tunnel(lab, Path(places))
        tunnel.uplinks = ["-i", "p1", "-i", "p2"]
        tunnel.begin("--alarm", "1000")
        for name, (width, height) in WINDOWS.items():
            command = shlex.join(["env", "TZ=UTC", *tunnel.command("cl", *name.split())])
            tmux("new-session", "-d", "-s", name.split()[0], "-x", str(width), "-y", str(height), command)
        try:
            traffic = Datagrams(lab, SECONDS, rate=400, size=1000)
            for at, uplink, delay, loss, is_cut in STORY:
                until(traffic.begun + at)
                lab.wire(uplink).set(delay=delay, loss=loss)
                (lab.wire(uplink).cut if is_cut else lab.wire(uplink).mend)()
            until(traffic.begun + SECONDS - 1.0)
            for name in WINDOWS:
                sys.stdout.write(f"$ mptunnel {name}\n{tmux('capture-pane', '-p', '-t', name.split()[0]).rstrip()}\n\n")
            traffic.finish()
        finally:
            tmux("kill-server")
        tunnel.stop("cl", "sv")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
