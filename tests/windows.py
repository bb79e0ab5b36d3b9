"""What a test asks a replay window."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mptunnel.session import ReplayWindow


def is_fresh(window: ReplayWindow, counter: int) -> bool:
    """Whether a datagram with this counter may still be opened."""
    return counter > window.top or window.refuses(counter, None) is None
