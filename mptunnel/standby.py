"""Paths that stand by, at a client: when they step in, and how the server learns of it.

A path stands by because the user said so, or because it has carried what it may in this month. It is probed as in
idleness, so that it costs next to nothing and its state is known. It steps in while no path for data works: half a
second after the last of them fell silent (see `ClientPath.works`). Its probes then say that it is for data, so the
server uses it from the same moment; and that it stands by, as soon as a path for data answers again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mptunnel.messages import Use
from mptunnel.path import PROBE_SPACING, ClientPath

if TYPE_CHECKING:
    from collections.abc import Collection


def is_needed(paths: Collection[ClientPath], now: float) -> bool:
    """Whether no path for data works, so that those standing by step in."""
    return not any(path.use is Use.DATA and path.works(now) for path in paths)


def use_now(path: ClientPath, paths: Collection[ClientPath], now: float) -> Use:
    """Return what a path is for at this moment."""
    return Use.DATA if path.use is Use.STANDBY and is_needed(paths, now) else path.use


def carriers(paths: Collection[ClientPath], now: float) -> list[ClientPath]:
    """Return the paths that get data: those for it, those standing by where needed; all if that is none."""
    wanted, standing = [], []
    for path in paths:  # for every batch: once through
        if path.is_open and not path.is_silent(now):
            if path.use is Use.DATA:
                wanted.append(path)
            elif path.use is Use.STANDBY:
                standing.append(path)
    if standing and is_needed(paths, now):
        wanted += standing
    return wanted or [path for path in paths if path.is_open]


def call(paths: Collection[ClientPath], now: float) -> None:
    """Let paths that step in, or stand by again, be probed at once: so the server learns of it."""
    for path in paths:
        if path.is_open and path.use is Use.STANDBY and path.told_use is not use_now(path, paths, now):
            path.probe_at = min(path.probe_at, max(now, path.last_probe_at + PROBE_SPACING))
