"""Fixtures that several end-to-end tests share."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

import pytest

from tests.form import FORM
from tests.running import Maker, Opener, Tunnel, labs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: what the tests interrupt ignores it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"hot modules: {FORM}"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets up logging for its process; the next test has the records of its own again."""
    logger = logging.getLogger("mptunnel")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture
def open_lab() -> Iterator[Opener]:
    """A function that opens labs for the time of the test."""
    yield from labs()


@pytest.fixture
def make_tunnel(open_lab: Opener, tmp_path: Path) -> Iterator[Maker]:
    """A function that makes a lab and the place for a tunnel in it; what its processes said is judged in the end."""
    made: list[Tunnel] = []

    def maker(**topology: object) -> Tunnel:
        made.append(Tunnel(open_lab(**topology), tmp_path))
        return made[-1]

    yield maker
    for tunnel in made:
        tunnel.check_logs()
