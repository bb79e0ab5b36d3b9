"""The gap alarm: nothing has come from the other side for so long that a machine wants to know.

With an alarm after T, every path that has a socket is probed every T/3 (at least 5 ms, at most the usual 250 ms), in
use or not, so that something is always due. The first answered probe arms it. A gap begins when nothing authentic, be
it data, an ECHO or anything else, has come for T. It is over when a probe is answered, or data comes: an unasked ECHO
or a challenge says that the way down lives, not yet that the tunnel does. Between two such signs the alarm neither
begins anew nor forgets since when it has been silent. Loss makes gaps too: when every answer of T is lost, nothing has
come for T.
"""

from __future__ import annotations

from typing import Final

FASTEST: Final = 0.005  # s between probes: 200 a second, of which the server answers 256 on each path
PROBES: Final = 3  # in the time after which it is raised
INF: Final = float("inf")


class Alarm:
    """When the other side has been silent for `after` seconds; `interval` is how often it has to be probed for that."""

    __slots__ = ("_after", "_is_armed", "_silent_since", "interval")

    def __init__(self, after: float, slowest: float) -> None:
        self._after = after
        self.interval = min(slowest, max(FASTEST, after / PROBES))
        self._is_armed = False
        self._silent_since = INF

    @property
    def is_raised(self) -> bool:
        """Whether there is a gap now."""
        return self._silent_since < INF

    def due_at(self, heard_at: float) -> float:
        """Return when to raise it if nothing comes after `heard_at`; infinity if it is raised, or not armed."""
        return heard_at + self._after if self._is_armed and not self.is_raised else INF

    def raised(self, heard_at: float, now: float) -> bool:
        """Return whether it is raised just now."""
        if now < self.due_at(heard_at):
            return False
        self._silent_since = heard_at
        return True

    def answered(self, now: float) -> float | None:
        """A probe was answered, or data came: return how long the gap was that this ends, None if there was none."""
        self._is_armed = True
        if not self.is_raised:
            return None
        lasted = now - self._silent_since
        self._silent_since = INF
        return lasted
