"""What the host's script is told of a path and of the tunnel: pure values, by the names the script's head describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

    from mptunnel.uplinks import Way

    IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What the device is to be: addresses, the server's ends, resolvers, whether IPv6 goes on to the internet."""

    address4: IPv4Address | None
    peer4: IPv4Address | None
    address6: IPv6Address | None
    peer6: IPv6Address | None
    ipv6_onward: bool
    dns: tuple[IPAddress, ...] = ()


def path_values(number: int, way: Way) -> dict[str, Any]:
    """What the script is told of a path (verb path-up)."""
    return {
        "path": number,
        "interface": way.interface,
        "address": way.address,
        "gateway": way.gateway,
        "server": way.server,
        "shared": way.is_shared,
    }


def tunnel_values(
    tunnel: Tunnel,
    mtu: int,
    routes: tuple[IPv4Network | IPv6Network, ...],
    servers: tuple[IPAddress, ...],
    kept: tuple[tuple[IPAddress, IPAddress], ...],
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
