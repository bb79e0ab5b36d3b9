"""What the host's script is told of a path and of the tunnel: pure values, by the names the script's head describes.

Of a stock WireGuard server, its configuration says what the tunnel is to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

    from mptunnel.config import WireGuardFile
    from mptunnel.uplinks import Way

    IPAddress = IPv4Address | IPv6Address
    Kept = tuple[tuple[IPAddress, IPAddress], ...]


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What the device is to be: addresses, the server's ends, resolvers, whether IPv6 goes on to the internet."""

    address4: IPv4Address | None
    peer4: IPv4Address | None
    address6: IPv6Address | None
    peer6: IPv6Address | None
    ipv6_onward: bool
    dns: tuple[IPAddress, ...] = ()


def stock_tunnel(file: WireGuardFile, dns: tuple[IPAddress, ...]) -> Tunnel:
    """Return the tunnel to a stock server, as its configuration has it."""
    own4 = next((a.ip for a in file.addresses if isinstance(a.ip, IPv4Address)), None)
    own6 = next((a.ip for a in file.addresses if isinstance(a.ip, IPv6Address)), None)
    has_ipv6 = own6 is not None and any(network.version == 6 for network in file.allowed_ips)
    return Tunnel(own4, own4, own6, own6, has_ipv6, dns)


class AllowedAddresses:
    """The packed source addresses that a stock server's packets may have: what AllowedIPs of its file covers."""

    def __init__(self, file: WireGuardFile) -> None:
        self._networks = {version: [n for n in file.allowed_ips if n.version == version] for version in (4, 6)}

    def __contains__(self, source: object) -> bool:
        assert isinstance(source, bytes)  # noqa: S101  as it is in a packet
        address: IPAddress = IPv4Address(source) if len(source) == 4 else IPv6Address(source)
        return any(address in network for network in self._networks[address.version])


def path_values(number: int, way: Way) -> dict[str, Any]:
    """What the script is told of a path (verb path-up)."""
    return {
        "path": number,
        "interface": way.interface,
        "address": way.address,
        "gateway": way.gateway,
        "server": way.server,
        "shared": way.is_shared,
        "carrier": way.carrier,
        "carrier_gateway": way.carrier_gateway,
    }


def tunnel_values(
    tunnel: Tunnel,
    mtu: int,
    routes: tuple[IPv4Network | IPv6Network, ...],
    servers: tuple[IPAddress, ...],
    kept: Kept,
) -> dict[str, Any]:
    """What the script is told of the tunnel (verb up)."""
    return {
        "mtu": mtu,
        "address4": tunnel.address4,
        "peer4": tunnel.peer4,
        "address6": tunnel.address6,
        "peer6": tunnel.peer6,
        "routes": routes,
        "dns": tunnel.dns,
        "servers": servers,
        "keep": kept,
    }


def kept_values(tunnel: Tunnel, kept: Kept) -> dict[str, Any]:
    """What the script is told when the host's addresses or routes have changed (verb keep)."""
    return {"keep": kept, "address4": tunnel.address4, "address6": tunnel.address6}
