"""The tunnel's MTU, at a client: what every path that is up carries, as padded probes show.

It starts at 1280. Each path that is up is shown a probe padded to the wanted size, which the server echoes at the same
size; five unanswered ones mean that it does not pass, and the next smaller size is tried. The tunnel's MTU is the least
of what the paths that are up carry; after its first change it rises only after a minute. In use, each path is shown its
size again every 2 s; where it does not pass any more, the tunnel's MTU falls to 1280 at once. So it does where no path
that is up is known to carry anything any more, and one does not answer at a size that it is asked for: what is full
would vanish while smaller ones are tried. A path that does not carry 1280 either is small: it does not count, and gets
what is smaller.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mptunnel.packet import MIN_MTU
from mptunnel.path import PROBE_SPACING
from mptunnel.timers import INF

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mptunnel.path import ClientPath

log = logging.getLogger(__name__)

PROOF_TRIES: Final = 5
PROVE_AGAIN: Final = 2.0  # in use, a path's size is shown again so often: it can become less without a word
SMALL_AGAIN: Final = 300.0  # in use, a path that carried none of the sizes is asked for them again so often
DOUBT_TRIES: Final = 3  # unanswered at one size, while no other path is known to carry any
FALL_TRIES: Final = 8  # unanswered, while small probes are answered: chance alone hardly does that
MTU_STEPS: Final = (1420, 1400, 1380, 1360, 1340, 1320, 1300, MIN_MTU)
RISE_AFTER: Final = 60.0  # the tunnel's MTU rises no sooner than this after its last change
_PATIENCE: Final = 1.0  # s: so long the first sizes that are known wait for those of the other paths


class TunnelMtu:
    """What the tunnel carries now: `value`."""

    __slots__ = ("changed_at", "value")

    def __init__(self) -> None:
        self.value = MIN_MTU
        self.changed_at = -INF

    def size_to_prove(self, path: ClientPath, wanted: int, now: float, *, is_shown_again: bool) -> int:
        """Return the size that the next probe of `path` is padded to, 0 for a small one; `wanted` is the largest.

        Every other probe is small: a size that does not pass must not make the path look dead; and however often
        probes go out, an answer has the time of a round trip. `is_shown_again`: it matters whether what the path is
        known to carry still passes.
        """
        is_heard = now - path.heard_at <= max(1.0, 4 * (path.rtt or 0.0))
        if now - path.padded_at < max(2 * PROBE_SPACING, path.rtt or 0.0):
            return 0
        if not path.is_up or path.was_padded or not is_heard:
            return 0
        if path.carries:
            if now - path.proven_at < PROVE_AGAIN or not is_shown_again:
                return 0
            path.proof_tries += 1
            if path.proof_tries <= FALL_TRIES:
                return path.carries
            log.info("path %s does not carry packets of %d bytes any more", path.title, path.carries)
            path.carries = path.proof_tries = 0
            if self.value > MIN_MTU:
                self._adopt(MIN_MTU, now)
        sizes = [wanted, *(step for step in MTU_STEPS if step < wanted)]
        step, path.proof_tries = path.proof_tries // PROOF_TRIES, path.proof_tries + 1
        if step < len(sizes):
            return sizes[step]
        path.is_small = True
        if now - path.padded_at < SMALL_AGAIN or not is_shown_again:
            return 0
        path.proof_tries = 1
        return wanted

    def consider(self, paths: Iterable[ClientPath], answered_at: float, now: float) -> None:
        """Adopt what every path that is up carries; it rises only after a while, and falls at once."""
        up = [path for path in paths if path.is_up]
        known = [path.carries for path in up if path.carries]
        if not known and self.value > MIN_MTU and any(path.proof_tries % PROOF_TRIES > DOUBT_TRIES for path in up):
            self._adopt(MIN_MTU, now)
            return
        if not known or (len(known) < len(up) and self.changed_at == -INF and now - answered_at < _PATIENCE):
            return
        mtu = min(known)
        if mtu == self.value or (mtu > self.value and now - self.changed_at < RISE_AFTER):
            return
        self._adopt(mtu, now)

    def _adopt(self, mtu: int, now: float) -> None:
        log.info("tunnel MTU %d", mtu)
        self.value = mtu
        self.changed_at = now


def refused(path: ClientPath, now: float) -> None:
    """The kernel refused a datagram on `path` for its size: the size under test does not pass."""
    if path.carries:  # no more
        path.carries = path.proof_tries = 0
    elif path.proof_tries:
        path.proof_tries = -(-path.proof_tries // PROOF_TRIES) * PROOF_TRIES
    path.probe_at = min(path.probe_at, now + PROBE_SPACING)
