"""The user's program of `--on-event`: run once for each event, with the event in its environment.

    MPTUNNEL_EVENT=path-down MPTUNNEL_TIME=1700000000.123 MPTUNNEL_PEER=vpn.example.org MPTUNNEL_PATH=wlan0 ...

It runs in a session of its own, in /, with nothing on stdin, what it prints goes to our stderr, and its environment is
PATH and the event's variables only. It never holds up the loop: threads of this module start it and wait for it, four
at a time at most, so that one that hangs does not keep the next from being told; it is killed, with all that it
started, after 30 s. Up to 64 events wait for their turn; then the oldest is dropped, which is counted.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mptunnel.host import search_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_RUNNING: Final = 4
MAX_WAITING: Final = 64
PATIENCE: Final = 30.0  # s, then it is killed
GRACE: Final = 1.0  # s, at the end of our own run

log = logging.getLogger(__name__)


def environment(event: Mapping[str, Any]) -> dict[str, str]:
    """Return the program's whole environment."""
    return {"PATH": search_path(), **{f"MPTUNNEL_{name.upper()}": str(value) for name, value in event.items()}}


class Hook:
    """Runs `program` for each event that is submitted; `dropped` counts those it was not run for."""

    def __init__(self, program: Path) -> None:
        self.dropped = 0
        self._program = program
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._running: set[int] = set()  # process ids, which are session ids too
        self._is_closing = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"mptunnel-hook-{n}", daemon=True) for n in range(MAX_RUNNING)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, event: Mapping[str, Any]) -> None:
        """Let the program be run for `event` as soon as may be."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    log.warning("%s is too slow for all events: the oldest are dropped (told once)", self._program)
            self._waiting.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Start nothing more; what still runs after a second is killed."""
        with self._changed:
            self._is_closing = True
            self._waiting.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, GRACE)
            for process in self._running:
                _kill(process)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
                event = self._waiting.popleft()
            try:
                self._run(event)
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                log.warning("cannot run %s for %s: %s", self._program, event["event"], why)

    def _run(self, event: Mapping[str, Any]) -> None:
        process = subprocess.Popen(
            [self._program],
            stdin=subprocess.DEVNULL,
            stdout=2,
            cwd="/",
            env=environment(event),
            start_new_session=True,
        )
        with self._changed:
            self._running.add(process.pid)
            if self._is_closing:
                _kill(process.pid)
        is_late = not _ends_within(process.pid, PATIENCE)
        with self._changed:  # as long as it is in the set nobody has reaped it, so its number is nobody else's
            if is_late:
                _kill(process.pid)
            self._running.remove(process.pid)
            process.wait()
            self._changed.notify_all()
        if is_late:
            log.warning("%s for %s was killed: it ran for more than %.0f s", self._program, event["event"], PATIENCE)
        elif process.returncode and not self._is_closing:
            log.warning("%s for %s failed: %s", self._program, event["event"], _end(process.returncode))


def _ends_within(process: int, seconds: float) -> bool:
    """Wait until the process has ended, without reaping it; return whether it has."""
    handle = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))
    finally:
        os.close(handle)


def _kill(session: int) -> None:
    os.killpg(session, signal.SIGKILL)


def _end(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
