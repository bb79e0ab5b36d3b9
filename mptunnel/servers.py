"""The server's addresses, at a client: those known, in the order in which they are tried, and when its name is due.

All paths use one address of each IP version: the first. The name is looked up again every hour, through the live
tunnel, and every 2 s while no address is known. While nothing answers it is looked up outside the tunnel after 30 s,
after 60 s more and so on, up to every 5 minutes: the server may have moved. When a path has opened meanwhile, whose
network may know more, that begins anew after 5 s. What a later answer does not name any more stays only if it is in
use.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

from mptunnel.timers import INF

if TYPE_CHECKING:
    from collections.abc import Iterable

    IPAddress = IPv4Address | IPv6Address

RESOLVE_EVERY: Final = 3600.0
RESOLVE_AGAIN: Final = 2.0  # while no address is known
OUTSIDE_AFTER: Final = 30.0  # s without an answer
OUTSIDE_SOON: Final = 5.0  # s after a path has opened
OUTSIDE_EVERY: Final = 300.0  # at the least


class Servers:
    """The addresses of one server, `known` in order. `name` is how the user calls it, perhaps one of them."""

    __slots__ = ("_is_literal", "_pause", "known", "outside_at", "resolve_at", "turned_at")

    def __init__(self, name: str, known: Iterable[IPAddress], now: float) -> None:
        self._is_literal = _is_literal(name)
        self.known = list(known)
        self.turned_at = now  # when another address was tried last
        self.resolve_at = INF
        self.outside_at = INF  # when the name is to be looked up outside the tunnel
        self._pause = OUTSIDE_AFTER
        self.asked(now)
        self.silent(now)

    def asked(self, now: float) -> bool:
        """The name is due; return whether there is anything to look up."""
        self.resolve_at = now + (RESOLVE_EVERY if self.known else RESOLVE_AGAIN)
        return not self._is_literal

    def next_deadline(self) -> float:
        """When the name is to be looked up next, inside the tunnel or outside."""
        return min(self.resolve_at, self.outside_at)

    def silent(self, now: float) -> None:
        """Nothing answers any more."""
        self._pause = OUTSIDE_AFTER
        self.outside_at = INF if self._is_literal else now + OUTSIDE_AFTER

    def answered(self) -> None:
        """The server is where we think it is."""
        self.outside_at = INF

    def path_opened(self, now: float) -> None:
        """Nothing answers, and there is another path than before."""
        if not self._is_literal:
            self._pause = OUTSIDE_AFTER
            self.outside_at = min(self.outside_at, now + OUTSIDE_SOON)

    def asked_outside(self, now: float) -> None:
        """The name is looked up outside the tunnel now; for the next time there is twice as long."""
        self._pause = min(2 * self._pause, OUTSIDE_EVERY)
        self.outside_at = now + self._pause

    def still_asking(self, now: float) -> None:
        """It is time to look it up outside the tunnel, but what was asked last time has not been answered."""
        self.outside_at = now + OUTSIDE_SOON

    def in_use(self) -> dict[int, IPAddress]:
        """Return the address in use of each IP version: the first that is known."""
        return {address.version: address for address in reversed(self.known)}

    def resolved(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        """The name has these addresses now; return those that were not known."""
        named = list(addresses)
        new = [address for address in named if address not in self.known]
        if new:
            in_use = set(self.in_use().values())
            self.known = [*(a for a in self.known if a in in_use or a in named), *new]
        return new

    def turn(self, now: float) -> None:
        """Let the next address of each IP version be the one in use."""
        self.turned_at = now
        for version in {address.version for address in self.known}:
            same = [address for address in self.known if address.version == version]
            rest = [address for address in self.known if address.version != version]
            self.known = [*same[1:], same[0], *rest]


def _is_literal(host: str) -> bool:
    try:
        IPv6Address(host) if ":" in host else IPv4Address(host)
    except ValueError:
        return False
    return True
