"""What of ours has to stand on the host, held against what stands there: others remove rules, routes and addresses.

Network managers take away what they do not know when they start, resume or renew a lease, and so does an administrator
by `ip rule flush`. After every look at the host each thing of ours (a path with its rule and its table; the tunnel with
its addresses, its routes and the rules of kept connections) is compared with what its script has made. Where something
is missing the same script runs again: at once, and against a program that goes on removing it after 0.25 s, 0.5 s and
so on up to a minute. It is told once, and once more when it looks like a fight.

Our nft table goes with `nft flush ruleset`, which is how a firewall's service starts anew. Without it a client's
packets leave with a wrong source, and a server neither translates nor forbids anything. The kernel tells when it goes
and when it is there again, both in one when the script replaces it.

What the kernel cannot have had (IPv6 switched off on the device) and what only the script knows (the rules of kept
connections) is expected from when it was first seen. Scripts of the user's own are theirs to keep up.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Final

from mptunnel.config import table_base

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mptunnel.config import Link
    from mptunnel.plan import Tunnel
    from mptunnel.uplinks import Way

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
EVERYTHING: Final[dict[int, IPNetwork]] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}

log = logging.getLogger(__name__)

TUNNEL: Final = -1  # where a path's number could stand
KEPT: Final = 8  # table and priority of kept connections, behind those of the paths
FIRST_SPACING: Final = 0.25
LONGEST_SPACING: Final = 60.0
TABLE_SETTLES: Final = 0.02  # s: whoever takes our nft table away may be the one who makes it anew
PEACE_AFTER: Final = 600.0  # without a removal: the next one is put right at once again
FIGHT: Final = 4  # removals without peace between them are worth a warning
INF: Final = float("inf")
_FOR_NETWORKD = ". With systemd-networkd see ManageForeignRoutes and ManageForeignRoutingPolicyRules"


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule: texts as `ip` shows them, "all" for any address; `rest` tells apart what else it asks for."""

    version: int
    priority: int
    source: str
    target: str
    table: str
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """A route in one of our tables ("main" for those by a tunnel device)."""

    version: int
    table: str
    target: IPNetwork
    device: str
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """The host's rules and routes, as far as they can be ours."""

    rules: frozenset[Rule]
    routes: frozenset[Route]


Expected = Rule | Route


@dataclass(slots=True)
class _Thing:
    """Something that one script call makes."""

    name: str
    wanted: frozenset[Expected]
    hoped: frozenset[Expected] = frozenset()  # expected once they were seen
    addresses: tuple[IPAddress, ...] = ()
    seen: set[Expected | IPAddress] = field(default_factory=set)
    under_way: int = 0  # script calls
    removals: int = 0
    mended_at: float = -INF

    def spacing(self) -> float:
        return 0.0 if not self.removals else min(LONGEST_SPACING, FIRST_SPACING * 2.0 ** (self.removals - 1))


class Upkeep:
    """What the scripts have made. `device` is the tunnel's."""

    __slots__ = ("_base", "_device", "_is_told_taken", "_links", "_picture", "_table_gone_at", "_things")

    def __init__(self, device: str) -> None:
        self._device = device
        self._base = table_base(device)
        self._things: dict[int, _Thing] = {}
        self._picture: Picture | None = None
        self._links: Sequence[Link] = ()
        self._table_gone_at = INF
        self._is_told_taken = False

    # -- what the script has been asked for ------------------------------------------------------------

    def path_asked(self, number: int, way: Way) -> None:
        """The script makes a path's rule and table."""
        table = self._base + number
        rule = Rule(way.address.version, table, str(way.address), str(way.server), str(table))
        gateway = "" if way.gateway is None else str(way.gateway)
        route = Route(way.address.version, str(table), EVERYTHING[way.address.version], way.interface, gateway)
        wanted: set[Expected] = {rule, route}
        if way.carrier is not None:
            wanted.add(Rule(6, table, "all", "all", str(table), f"iif {way.interface}"))
            gateway = "" if way.carrier_gateway is None else str(way.carrier_gateway)
            wanted.add(Route(6, str(table), EVERYTHING[6], way.carrier, gateway))
        self._asked(number, f"path {way.interface}", frozenset(wanted))

    def path_gone(self, number: int) -> None:
        """A path has no rule and no table any more."""
        self._things.pop(number, None)

    def tunnel_asked(self, tunnel: Tunnel, routes: Iterable[IPNetwork]) -> None:
        """The script makes the tunnel's addresses and routes."""
        targets = [half for network in routes for half in _halves(network)]
        pairs = ((tunnel.address4, tunnel.peer4), (tunnel.address6, tunnel.peer6))
        targets += [ip_network(peer) for address, peer in pairs if peer is not None and peer != address]
        made = [Route(network.version, "main", network, self._device) for network in targets]
        thing = self._asked(TUNNEL, self._device, frozenset(route for route in made if route.version == 4))
        thing.hoped = frozenset(route for route in made if route.version == 6)
        thing.addresses = tuple(address for address in (tunnel.address4, tunnel.address6) if address is not None)
        thing.seen.clear()

    def gateway_asked(self) -> None:
        """The script makes a server's side of the tunnel; of that only the nft table is looked after."""
        self._asked(TUNNEL, self._device, frozenset())

    def script_done(self, number: int) -> None:
        """A script call for this path, or for the tunnel, has ended; what was seen before says nothing of it."""
        thing = self._things.get(number)
        if thing is not None:
            thing.under_way = max(0, thing.under_way - 1)
        self._picture = None

    def _asked(self, number: int, name: str, wanted: frozenset[Expected]) -> _Thing:
        thing = self._things.get(number)
        if thing is None:
            thing = self._things[number] = _Thing(name, wanted)
        thing.name, thing.wanted = name, wanted
        thing.under_way += 1
        return thing

    # -- what stands there -----------------------------------------------------------------------------

    def looked(self, links: Sequence[Link], picture: Picture) -> None:
        """The host looks like this."""
        self._links, self._picture = links, picture
        self._tell_taken(picture)
        tunnel = self._things.get(TUNNEL)
        if tunnel is not None and not tunnel.under_way:
            tunnel.seen |= {*self._kept(picture), *(tunnel.hoped & picture.routes), *self._addresses()}

    def _tell_taken(self, picture: Picture) -> None:
        tunnel = self._things.get(TUNNEL)
        ours = set() if tunnel is None else (tunnel.wanted | tunnel.hoped) - picture.routes
        by = {route.device for route in picture.routes if replace(route, device=self._device) in ours}
        if by and not self._is_told_taken:
            log.warning("%s leads what goes by %s: both are to carry the same networks", min(by), self._device)
        self._is_told_taken = bool(by)

    def table_seen(self, now: float, *, is_there: bool) -> None:
        """Our nft table has just gone, or has come."""
        self._table_gone_at = INF if is_there else now

    def due(self, now: float) -> list[int]:
        """Return what has to be made again now: numbers of paths, or TUNNEL. It counts as done by this."""
        due = []
        for number, thing in self._things.items():
            if now >= self._due_at(number, thing):
                if now - thing.mended_at > PEACE_AFTER:
                    thing.removals = 0
                thing.removals += 1
                thing.mended_at = now
                self._tell(number, thing)
                due.append(number)
        return due

    def next_deadline(self) -> float:
        """When something that is missing may be made again; inf: nothing is missing."""
        return min((self._due_at(number, thing) for number, thing in self._things.items()), default=INF)

    def _due_at(self, number: int, thing: _Thing) -> float:
        """When a thing has to be made again; inf: nothing of it is missing."""
        if thing.under_way:
            return INF
        missing_from = -INF if self._is_missing(number, thing) else INF
        if number == TUNNEL:
            missing_from = min(missing_from, self._table_gone_at + TABLE_SETTLES)
        return max(missing_from, thing.mended_at + thing.spacing())

    def _is_missing(self, number: int, thing: _Thing) -> bool:
        picture = self._picture
        if picture is None:
            return False
        taken = self._taken(picture)
        if not thing.wanted <= picture.rules | picture.routes | taken:
            return True
        if number != TUNNEL:
            return False
        return not thing.seen <= {*self._kept(picture), *picture.routes, *taken, *self._addresses()}

    def _taken(self, picture: Picture) -> frozenset[Expected]:
        """What of ours another instance leads its own way: two that lead everything must not fight for it."""
        return frozenset(replace(route, device=self._device) for route in picture.routes if self._is_anothers(route))

    def _is_anothers(self, route: Route) -> bool:
        return route.table == "main" and route.device.startswith("mpt") and route.device != self._device

    def _kept(self, picture: Picture) -> set[Expected]:
        """The rules of kept connections, without which their table is idle; and they without it.

        Those by which questions leave past the tunnel for a while are in that table too; the script takes them back.
        """
        table = str(self._base + KEPT)
        has_table = {route.version for route in picture.routes if route.table == table}
        kept = {rule for rule in picture.rules if rule.table == table and rule.version in has_table}
        return {rule for rule in kept if not rule.rest.startswith("dport 53 ")}

    def _addresses(self) -> set[IPAddress]:
        """The tunnel's addresses that its device has."""
        tunnel = self._things[TUNNEL]
        has = {address.ip for link in self._links if link.name == self._device for address in link.addresses}
        return {address for address in tunnel.addresses if address in has}

    def _tell(self, number: int, thing: _Thing) -> None:
        what, cure = "rules, routes or addresses", _FOR_NETWORKD
        if number == TUNNEL and self._table_gone_at < INF:
            what, cure = "firewall rules", ""
        if thing.removals == 1:
            log.info("%s: %s of ours are gone; putting them back", thing.name, what)
        elif thing.removals == FIGHT:
            text = "%s: another program goes on removing %s of ours; they are put back, ever more slowly%s"
            log.warning(text, thing.name, what, cure)


def _halves(network: IPNetwork) -> list[IPNetwork]:
    """Return a network as the script routes it: everything by its two halves."""
    return list(network.subnets()) if network.prefixlen == 0 else [network]
