"""A helper thread for what may block: one waits for scripts, one writes files to disk, one looks up names.

Jobs go in by a queue and are done in order, one at a time; results come back in the same order, announced on a
descriptor that the loop waits for. The thread sees values only, never the core's objects nor its keys.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Job = TypeVar("Job")


class Worker(Generic[Job]):
    """Does jobs by `perform`, which returns a result or raises; both come back by `results`."""

    def __init__(self, perform: Callable[[Job], object]) -> None:
        self._perform = perform
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[tuple[Job, object]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="mptunnel-worker", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a result is there."""
        return self._wake

    def submit(self, job: Job) -> None:
        """Let a job be done after those before it."""
        self._queue.put(job)

    def results(self) -> list[tuple[Job, object]]:
        """Take out what has been done: (job, result or exception)."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> list[tuple[Job, object]]:
        """Wait until all jobs are done, end the thread, and return the last results."""
        self._queue.put(None)
        self._thread.join()
        rest = list(self._done)
        os.close(self._wake)
        return rest

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                result = self._perform(job)
            except Exception as error:  # noqa: BLE001  it is the loop's to judge
                result = error
            self._done.append((job, result))
            os.eventfd_write(self._wake, 1)
