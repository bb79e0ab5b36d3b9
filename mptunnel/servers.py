"""The server's addresses, at a client: those known, in the order in which they are tried, and when its name is due.

All paths use one address of each IP version: the first. The name is looked up again every hour, through the live
tunnel, every 5 minutes while nothing answers by an IP version that is tried, and every 2 s while no address is known.
While nothing answers at all it is looked up outside the tunnel after 30 s, after 60 s more and so on, up to every 5
minutes: the server may have moved. When a path has opened meanwhile, whose network may know more, that begins anew
after 5 s.

Not every answer is true: a captive portal gives its own address to every name. So an address is proven only by what
comes from it. What an answer names is tried when nothing answers, in turn with the proven address of each IP version,
which stays, also on disk, until another one has proved itself. What else the last answer does not name is forgotten. An
IP version by which nothing answers is moved to what is named also while the other one keeps the tunnel up.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

from mptunnel.timers import INF

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    IPAddress = IPv4Address | IPv6Address

RESOLVE_EVERY: Final = 3600.0
RESOLVE_SILENT: Final = 300.0  # while nothing answers by an IP version, and the tunnel is up
RESOLVE_AGAIN: Final = 2.0  # while no address is known
OUTSIDE_AFTER: Final = 30.0  # s without an answer
OUTSIDE_SOON: Final = 5.0  # s after a path has opened
OUTSIDE_EVERY: Final = 300.0  # at the least


class Servers:
    """The addresses of one server, `known` in order. `name` is how the user calls it, perhaps one of them.

    `named` is what the name leads to now, `kept` what an earlier run has kept (`to_keep`).
    """

    __slots__ = (
        "_asked_at", "_is_literal", "_named", "_pause", "_proven", "known", "outside_at", "resolve_at", "turned_at",
    )  # fmt: skip

    def __init__(self, name: str, named: Iterable[IPAddress], now: float, kept: Iterable[IPAddress] = ()) -> None:
        self._is_literal = _is_literal(name)
        self._named = list(named)
        proven = [] if self._is_literal else list(kept)[:1]
        self._proven = {address.version: address for address in proven}  # that which has answered last, by IP version
        self.known = list(dict.fromkeys([*self._named, *proven]))
        self.turned_at = now  # when another address was tried last
        self.resolve_at = self._asked_at = INF
        self.outside_at = INF  # when the name is to be looked up outside the tunnel
        self._pause = OUTSIDE_AFTER
        self.asked(now)
        self.silent(now)

    def asked(self, now: float) -> bool:
        """The name is due; return whether there is anything to look up."""
        self._asked_at, self.resolve_at = now, now + (RESOLVE_EVERY if self.known else RESOLVE_AGAIN)
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

    def version_silent(self, now: float) -> None:
        """By one IP version nothing answers, while the other one keeps the tunnel up: the server may have moved."""
        self.resolve_at = min(self.resolve_at, max(now, self._asked_at + RESOLVE_SILENT))

    def still_asking(self, now: float) -> None:
        """It is time to look it up outside the tunnel, but what was asked last time has not been answered."""
        self.outside_at = now + OUTSIDE_SOON

    def in_use(self) -> dict[int, IPAddress]:
        """Return the address in use of each IP version: the first that is known."""
        return {address.version: address for address in reversed(self.known)}

    def to_keep(self) -> list[IPAddress]:
        """Return what the next run is to know: those that are proven first."""
        return self._proven_first(self.known)

    def proved(self, address: IPAddress) -> bool:
        """Something authentic has come from an address in use; return whether that is news."""
        version = address.version
        proven = self._proven.get(version)
        if proven is address or proven == address:  # the same object, as a rule; to compare two takes long
            return False
        self._proven[version] = address
        self.known = [a for a in self.known if a.version != version or a == address or a in self._named]
        return True

    def resolved(self, addresses: Iterable[IPAddress], now: float, up: Collection[int]) -> list[IPAddress]:
        """The name has these addresses now; return those that were not known.

        `up` are the IP versions by which something answers. Of any other version whose address in use is not named any
        more, those that are named come first; while nothing answers at all, new ones only, since each has its turn.
        """
        named = list(dict.fromkeys(addresses))
        if not named:
            return []
        in_use = self.in_use()
        new = [address for address in named if address not in self.known]
        kept = {*named, *self._proven.values(), *(address for version, address in in_use.items() if version in up)}
        moved = (
            {a.version for a in (named if up else new)} - set(up) - {a.version for a in in_use.values() if a in named}
        )
        if moved:
            self.turned_at = now
        first = [address for address in self._proven_first(named) if address.version in moved]
        self._named = named
        self.known = [address for address in dict.fromkeys([*first, *self.known, *new]) if address in kept]
        return new

    def _proven_first(self, addresses: Iterable[IPAddress]) -> list[IPAddress]:
        return sorted(addresses, key=lambda address: address not in self._proven.values())

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
