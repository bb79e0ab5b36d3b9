"""A control socket that answers like a running program, in a thread."""

from __future__ import annotations

import contextlib
import select
import threading
from typing import TYPE_CHECKING, Any

from mptunnel.control import ControlServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def answering(path: Path, handle: Callable[[str, dict[str, Any]], object]) -> Iterator[None]:
    """Let `handle` answer on the control socket at `path`."""
    path.parent.mkdir(exist_ok=True)
    server, stop = ControlServer(path, handle), threading.Event()

    def serve() -> None:
        while not stop.is_set():
            readable, writable, _ = select.select(server.readers(), server.writers(), [], 0.005)
            for fd in {*readable, *writable}:
                server.ready(fd, 0.0)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        server.close()
