"""Which paths carry a batch of datagrams, and how much of it.

`allot` asks each path how much it takes now, where one is limited (see `cap`). The path with the least delay is not
asked: every packet goes whole to at least one.

The answer of `choose` is how many leading datagrams of the batch each path gets, 0 to all; so a slow path can be given
the head of a batch that a fast one carries whole. One decision per batch, never per packet.

`redundant` gives everything to every path that may carry data. Which paths may is not decided here: a client leaves
out a path that has been silent for 30 s while another lives, a server those that were not refreshed (see `path`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Carrier(Protocol):
    """What the scheduler must know of a path: how many bytes it takes now, None for any number."""

    room: int | None


class Limited(Carrier, Protocol):
    """A path that may be limited."""

    def is_limited(self, now: float) -> bool:
        """Whether it does not take everything."""

    def delay(self, now: float) -> float:
        """Return how long a datagram takes by it now, in s, as far as that can be compared with another path's."""

    def allot(self, count: int, size: int, now: float) -> None:
        """Set `room`, in bytes, for a batch of `count` datagrams of `size` bytes."""


def allot(carriers: Sequence[Limited], count: int, size: int, now: float) -> None:
    """Let every carrier set its `room` for `count` datagrams of `size` bytes, but the one with the least delay."""
    if not any([carrier.is_limited(now) for carrier in carriers]):  # noqa: C419  a list is faster for so few
        for carrier in carriers:
            carrier.room = None
        return
    least = min(carriers, key=lambda carrier: carrier.delay(now))
    for carrier in carriers:
        if carrier is least:
            carrier.room = None
        else:
            carrier.allot(count, size, now)


AnyCarrier = TypeVar("AnyCarrier", bound=Carrier)


class Redundant:
    """Every packet over every path: a packet is lost only if all paths lose it."""

    __slots__ = ()

    def choose(self, count: int, size: int, carriers: Sequence[AnyCarrier]) -> list[tuple[AnyCarrier, int]]:
        """Return the carriers that get something of `count` datagrams of `size` bytes, and how many each.

        If none had room, the first one gets all: nothing is lost before it has been tried.
        """
        chosen, is_whole = [], False
        for carrier in carriers:
            room = carrier.room
            given = count if room is None or room >= count * size else room // size
            is_whole = is_whole or given == count
            if given > 0:
                chosen.append((carrier, given))
        if carriers and not is_whole:
            first = carriers[0]
            chosen = [(first, count), *(pair for pair in chosen if pair[0] is not first)]
        return chosen
