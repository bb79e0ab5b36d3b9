"""Which interface, address and gateway each path uses now: what `-i` said, held against what the host shows.

A path is an interface, not an address. `-i NAME` is that interface. `-i ADDRESS` names the interface that holds the
address when it is first seen; from then on the path is that interface, whatever address of the family it has, ADDRESS
preferred. If ADDRESS turns up elsewhere while the interface has none, the path moves there. Without `-i` every
interface with a default route is a path, tunnels apart; it leaves when it loses that route, and comes back as the same
path unless another has taken its number. The tun of a CLAT is an uplink (464XLAT, RFC 6877: IPv4 over a network of IPv6
only), but not towards a server with an IPv6 address, which is reached by that network's own interface.

Of several addresses that one is used which is likeliest to reach the server and to be reached (see `_source`); of equal
ones the path keeps the one it has, also if that is deprecated: a working socket is not moved.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mptunnel.config import MAX_PATHS, nearest
from mptunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

    from mptunnel.config import Gateway, Link

    IPAddress = IPv4Address | IPv6Address

TUNNELS: Final = frozenset({"tun", "wireguard", "ipip", "sit", "gre", "ip6tnl", "vti", "xfrm"})
_CLAT: Final = ipaddress.IPv4Network("192.0.0.0/29")  # RFC 7335
_ULA: Final = ipaddress.IPv6Network("fc00::/7")  # RFC 4193


@dataclass(frozen=True, slots=True)
class Way:
    """How a path leaves the host now: `gateway` None means that the server is reached on the link itself."""

    interface: str
    index: int
    address: IPAddress
    server: IPAddress
    gateway: IPAddress | None
    is_shared: bool = False  # another interface has the same address
    carrier: str | None = None  # of a CLAT: by which interface, and gateway, what it has translated to IPv6 leaves
    carrier_gateway: IPAddress | None = None


class Uplink:
    """One `-i`, or one interface found."""

    __slots__ = ("address", "interface", "is_found", "name", "source")

    def __init__(self, name: str, *, is_found: bool = False) -> None:
        self.name = name
        self.is_found = is_found  # without -i: it leaves with its default route
        self.address = _address(name)
        self.interface = "" if self.address else name
        self.source: IPAddress | None = None  # the address that its path has now


class Uplinks:
    """The paths that the user wants, by id."""

    __slots__ = ("_former", "by_id", "is_open", "unwanted")

    def __init__(self, names: Sequence[str]) -> None:
        self.is_open = not names  # uplinks join and leave by themselves
        self.unwanted: set[str] = set()  # but not these
        self._former: dict[str, int] = {}  # the number that an uplink found had when it left
        self.by_id: dict[int, Uplink] = {number: Uplink(name) for number, name in enumerate(names)}

    def add(self, name: str) -> int | None:
        """Return the number of a new path; None where there are as many as can be."""
        self.unwanted.discard(name)
        number = self._free_number(name)
        if number is not None:
            self.by_id[number] = Uplink(name)
        return number

    def remove(self, number: int) -> None:
        """Take a path off; without -i it is not found again."""
        uplink = self.by_id.pop(number)
        self._former[uplink.name] = number
        if self.is_open:
            self.unwanted.add(uplink.name)

    def check(self, links: Iterable[Link]) -> None:
        """Raise ConfigError where an address cannot say which interface is meant."""
        for uplink in self.by_id.values():
            holders = [link.name for link in links if _holds(link, uplink.address)]
            if len(holders) > 1:
                raise ConfigError(
                    f"-i {uplink.name}: {' and '.join(holders)} have this address; name the interface: -i {holders[0]}"
                )

    def find(
        self, links: Sequence[Link], servers: Mapping[int, IPAddress], device: str, avoid: Mapping[int, int]
    ) -> dict[int, Way | None]:
        """Return how each path leaves the host, None where it cannot now.

        `servers` is the server's address by IP version; `device` is our own; `avoid` gives, by path, an IP version
        that has not worked there.
        """
        if self.is_open:
            self._adopt(links, device, takes_clat=servers.keys() == {4})
        found: dict[int, Way | None] = {}
        for number, uplink in self.by_id.items():
            link = self._link_of(uplink, links)
            way = None if link is None else _way(uplink, link, links, servers, avoid.get(number, 0))
            uplink.source = None if way is None else way.address
            found[number] = way
        return found

    def advice(self, uplink: Uplink, links: Iterable[Link]) -> str:
        """What to tell about an uplink that is not there."""
        if uplink.address:
            addresses = [str(address.ip) for link in links for address in link.addresses]
            close = nearest(uplink.name, addresses)
        else:
            close = nearest(uplink.name, [link.name for link in links])
        hint = f"; did you mean {close}?" if close else "; see 'ip -brief address'."
        return f"-i {uplink.name} is not there{hint} It is taken up when it appears"

    def _adopt(self, links: Iterable[Link], device: str, *, takes_clat: bool) -> None:
        wanted = [
            link.name
            for link in links
            if link.name != device
            and (link.kind not in TUNNELS or (takes_clat and _is_clat(link)))
            and not link.name.startswith("mpt")
            and (link.gateway4 is not None or link.gateway6 is not None)
        ]
        for number, uplink in list(self.by_id.items()):
            if uplink.is_found and uplink.name not in wanted:
                self._former[uplink.name] = number
                del self.by_id[number]
        known = {uplink.name for uplink in self.by_id.values()} | self.unwanted
        for name in (name for name in wanted if name not in known):
            number_or_none = self._free_number(name)
            if number_or_none is not None:
                self.by_id[number_or_none] = Uplink(name, is_found=True)

    def _free_number(self, name: str) -> int | None:
        """Return the number that this uplink had before, else one that nobody had, else any that is free."""
        free = [number for number in range(MAX_PATHS) if number not in self.by_id]
        former = self._former.pop(name, -1)
        if former in free:
            return former
        return next(iter([number for number in free if number not in self._former.values()] or free), None)

    def _link_of(self, uplink: Uplink, links: Sequence[Link]) -> Link | None:
        by_name = {link.name: link for link in links}
        link = by_name.get(uplink.interface)
        if uplink.address is None:
            return link
        version = uplink.address.version
        if link is not None and any(address.version == version for address in link.addresses):
            return link
        holder = next((link for link in links if _holds(link, uplink.address)), None)
        if holder is not None:
            uplink.interface = holder.name
            return holder
        return link


def _way(
    uplink: Uplink, link: Link, links: Iterable[Link], servers: Mapping[int, IPAddress], avoided: int
) -> Way | None:
    """Return how `uplink` reaches the server by `link`: IPv4 first, unless the name or a failure says otherwise."""
    if not link.up:
        return None
    versions = [uplink.address.version] if uplink.address else sorted(servers, key=lambda v: (v == avoided, v))
    candidates = []
    for version in versions:
        server = servers.get(version)
        own = [address for address in link.addresses if address.version == version]
        if server is None or not own:
            continue
        gateway = link.gateway4 if version == 4 else link.gateway6
        is_on_link = any(server in address.network for address in own)
        via = None if gateway is None or is_on_link else gateway.via
        address = _source(uplink, link, own, server, None if is_on_link else gateway)
        shared = any(_holds(other, address) for other in links if other.name != link.name)
        carrier, carrier_via = _carrier(links) if version == 4 and _is_clat(link) else (None, None)
        way = Way(link.name, link.index, address, server, via, shared, carrier, carrier_via)
        candidates.append((_rank(gateway, is_on_link=is_on_link), way))
    return min(candidates, key=lambda pair: pair[0])[1] if candidates else None


def _rank(gateway: Gateway | None, *, is_on_link: bool) -> int:
    """An address without any route to the server is the last choice."""
    return 0 if gateway is not None or is_on_link else 1


def _source(
    uplink: Uplink,
    link: Link,
    own: Sequence[IPv4Interface | IPv6Interface],
    server: IPAddress,
    gateway: Gateway | None,
) -> IPAddress:
    """Return which of the link's `own` addresses a path has; `gateway` None: the server is on the link, or no route.

    The first difference counts: the one that `-i` names; the default route's; one whose subnet holds the next hop
    (another may be for a modem's own pages); a ULA for a server with one and only for that; one whose network has a
    preferred address (a router deprecates a prefix that leads nowhere any more, RFC 9096, but a host a privacy address
    that still works, RFC 8981); the present one; one that is not deprecated.
    """
    preferred = [address.network for address in own if address.ip not in link.deprecated]
    hop, source = (server, None) if gateway is None else (gateway.via, gateway.source)

    def demerits(address: IPv4Interface | IPv6Interface) -> tuple[bool, ...]:
        return (
            address.ip != uplink.address,
            address.ip != source,
            hop is None or hop not in address.network,
            (address.ip in _ULA) != (server in _ULA),
            not any(address.ip in network for network in preferred),
            address.ip != uplink.source,
            address.ip in link.deprecated,
        )

    return min(own, key=demerits).ip


def _is_clat(link: Link) -> bool:
    return link.kind == "tun" and any(address.ip in _CLAT for address in link.addresses)


def _carrier(links: Iterable[Link]) -> tuple[str | None, IPAddress | None]:
    """Return interface and gateway of the host's own IPv6 default route, as far as there are any."""
    routes = [(link.gateway6, link.name) for link in links if link.gateway6 is not None]
    gateway, name = min(routes, key=lambda route: route[0].metric, default=(None, None))
    return name, None if gateway is None else gateway.via


def _holds(link: Link, address: IPAddress | None) -> bool:
    return address is not None and any(own.ip == address for own in link.addresses)


def _address(text: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
