"""What the core asks of the world: sockets, scripts, files, names; and what it lets it know: notices.

The loop takes these up and reports back.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    from mptunnel.errors import MptunnelError

    IPAddress = IPv4Address | IPv6Address
    ScriptValue = IPAddress | int | str | bool | Path | tuple[object, ...]


def host_port(host: str, port: int) -> str:
    """Return an address or a name and a port as people write them (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint(NamedTuple):
    """Where a server's datagram came from, and the local address it came to, which is the one to answer from.

    `host` is as the kernel gives it (IPv4 as ::ffff:a.b.c.d on a socket for both families).
    """

    host: str
    port: int
    scope: int
    local: bytes

    @property
    def plain_host(self) -> str:
        """The address as people write it."""
        return self.host.removeprefix("::ffff:") if "." in self.host else self.host

    def __str__(self) -> str:
        return host_port(self.plain_host, self.port)


class Transmit(NamedTuple):  # a tuple is made fastest, and there is one for each packet and path
    """Datagrams of `size` bytes each, one behind the other in `data` (the last may be shorter), for one way out.

    `to` is a path's id on a client, an `Endpoint` on a server.
    """

    to: Any
    data: bytes | memoryview
    size: int


@dataclass(frozen=True, slots=True)
class OpenPath:
    """Open the socket of a path: bound to `interface` and `address`, connected to the server.

    Answered by `path_opened` (with the local port) or `path_failed`.
    """

    path: int
    interface: str
    address: IPAddress
    server: tuple[IPAddress, int]
    port: int


@dataclass(frozen=True, slots=True)
class ClosePath:
    """Close the socket of a path."""

    path: int


@dataclass(frozen=True, slots=True)
class RunScript:
    """Run the host script with a verb; answered by `job_done`."""

    verb: str
    values: Mapping[str, ScriptValue]


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write a file of the state directory, whole (`document` None: remove it; str: as text); answered by `job_done`."""

    name: str
    document: Mapping[str, Any] | str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Resolve:
    """Look up a host name; answered by `job_done` with a tuple of addresses."""

    host: str
    port: int


class NoticeKind(enum.Enum):
    """What has happened to a path, to a client's tunnel as a whole, or (at a server) to a client."""

    PATH_UP = "path-up"
    PATH_SLOW = "path-slow"
    PATH_DOWN = "path-down"
    PATH_WAITING = "path-waiting"  # for its interface, or an address
    TUNNEL_UP = "tunnel-up"
    TUNNEL_SILENT = "tunnel-silent"
    GAP = "gap"
    GAP_OVER = "gap-over"
    CLIENT_UP = "client-up"
    CLIENT_GONE = "client-gone"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that whoever looks after the tunnel may want to act on; it has been logged already.

    `wall` is wall-clock time (s since 1970), `peer` the other side's name, `path` the path's (at a server its number),
    "" where the notice is of none. `values` says more: numbers, or words for people.
    """

    kind: NoticeKind
    wall: float
    peer: str
    path: str = ""
    interface: str = ""
    values: Mapping[str, str | float] = field(default_factory=dict)

    def document(self) -> dict[str, str | float]:
        """Return it as it is told outside: as JSON and, in capitals, as environment variables.

        `interface` apart, which subcommands ignore, no key may be an option's name: MPTUNNEL_ in front of it would make
        it one for the `mptunnel` that such a program may start.
        """
        place = {"path": self.path, "interface": self.interface}
        named = {name: text for name, text in place.items() if text}
        return {"event": self.kind.value, "time": round(self.wall, 3), "peer": self.peer, **named, **self.values}


@dataclass(frozen=True, slots=True)
class Stop:
    """The run cannot go on."""

    error: MptunnelError


Job = RunScript | SaveState | Resolve
Event = OpenPath | ClosePath | RunScript | SaveState | Resolve | Stop | Notice
