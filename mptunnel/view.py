"""The status object of a client, format 1: what `status --json` prints. Pure: from what the client knows to values.

Times are seconds, but for those that say `_ms`; sizes are bytes; shares are fractions of 1; null is "not known (yet)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mptunnel import __version__
from mptunnel.config import encode_key
from mptunnel.events import host_port

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mptunnel.path import ClientPath
    from mptunnel.plan import Tunnel
    from mptunnel.serverpeer import ServerPeer
    from mptunnel.uplinks import Way


def client_status(
    state: str,
    uptime: float,
    name: str,
    public_key: bytes,
    peer: ServerPeer,
    ways: Iterable[Way],
    tunnel: Tunnel | None,
    mtu: int,
    drops: Mapping[str, int],
    now: float,
) -> dict[str, Any]:
    """Return the whole object; `name` is the server's as the user gave it, `mtu` the tunnel's."""
    session = peer.current
    return {
        "format": 1,
        "version": __version__,
        "role": "client",
        "state": state,
        "uptime": round(uptime, 1),
        "server": {
            "name": name,
            "address": ", ".join(sorted({str(way.server) for way in ways})) or None,
            "public_key": encode_key(public_key),
            "multipath": peer.is_multipath,
            "session_age": None if session is None else round(now - session.created_at, 1),
        },
        "tunnel": {
            "ipv4": None if tunnel is None or tunnel.address4 is None else str(tunnel.address4),
            "ipv6": None if tunnel is None or tunnel.address6 is None else str(tunnel.address6),
            "mtu": mtu,
        },
        "traffic": {"up": peer.sent(), "down": peer.received()},
        "receipts": {"up": peer.told.status(now), "down": peer.receipts.status(now)},
        "paths": [path_status(path, peer, now) for path in peer.paths.values()],
        "drops": dict(drops),
    }


def path_status(path: ClientPath, peer: ServerPeer, now: float) -> dict[str, Any]:
    """Return what is said of one path."""
    alone = peer.receipts.path_status(path.id, now)
    return {
        **path.status(),
        "name": path.name,
        "interface": path.interface or None,
        "address": None if path.address is None else str(path.address),
        "seen_as": None if path.seen_as is None else host_port(*path.seen_as),
        "since": round(now - path.since, 1),
        "carries": [way for way, does in (("up", path.carries_up), ("down", path.carries_down)) if does(now)],
        **{name: alone[name] for name in ("first", "first_share", "missed")},
        "alone": {"up": peer.told.path_status(path.id, now), "down": alone},
        "mtu": path.carries or None,
    }
