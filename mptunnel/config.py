"""Settings of a run, checked; links as the host shows them; and the small grammars of the command line.

What users write (servers, interfaces, routes, resolvers, networks) is parsed here into values; every error says what
was read, why it does not do, and what would. Keys and tokens, the records of the state directory and wg-quick files
live in `keys`, `records` and `wgquick`; their names are offered here too, so that others need one import.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mptunnel.errors import ConfigError
from mptunnel.events import host_port
from mptunnel.keys import (
    NO_PSK,
    JoinToken,
    decode_key,
    encode_key,
    key_short,
    new_private_key,
    public_key,
)
from mptunnel.records import (
    ClientKey,
    Document,
    Fields,
    Network,
    PeerRecord,
    ServerKey,
    ServerRecord,
    Timestamp,
    TokenRecord,
    TokenState,
    add_peer,
    allocate,
    check_name,
    check_token_room,
    expire_tokens,
    forget_peers,
    nearest,
    new_network,
    new_token,
    peers_from_document,
    peers_to_document,
    remove_peer,
    revoke_token,
    tokens_from_document,
    tokens_to_document,
)
from mptunnel.wgquick import WireGuardFile, parse_port, parse_wireguard, split_host_port, wireguard_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "ALL_ROUTES",
    "DEFAULT_NETWORK",
    "DEFAULT_PORT",
    "FALLBACK_DNS",
    "MAX_PATHS",
    "NO_PSK",
    "OUR_TABLES",
    "ClientKey",
    "ClientSettings",
    "DnsMode",
    "Document",
    "Fields",
    "Gateway",
    "JoinToken",
    "Link",
    "Mode",
    "Network",
    "PeerRecord",
    "ServerKey",
    "ServerRecord",
    "ServerSettings",
    "Settings",
    "Timestamp",
    "TokenRecord",
    "TokenState",
    "WireGuardFile",
    "add_peer",
    "allocate",
    "check_name",
    "check_token_room",
    "client_line",
    "decode_key",
    "encode_key",
    "expire_tokens",
    "forget_peers",
    "instance_number",
    "key_short",
    "nearest",
    "new_network",
    "new_private_key",
    "new_token",
    "parse_dns",
    "parse_interfaces",
    "parse_mode",
    "parse_network",
    "parse_port",
    "parse_routes",
    "parse_server",
    "parse_wireguard",
    "peers_from_document",
    "peers_to_document",
    "public_address",
    "public_key",
    "remove_peer",
    "revoke_token",
    "server_argument",
    "spelling",
    "table_base",
    "tokens_from_document",
    "tokens_to_document",
    "wireguard_text",
]

DEFAULT_PORT: Final = 5000
_NETWORKS: Final = tuple(  # of a new server, the first that is free
    map(IPv4Network, ("10.0.1.0/24", "10.91.1.0/24", "172.27.91.0/24", "192.168.191.0/24", "10.203.91.0/24"))
)
DEFAULT_NETWORK: Final = _NETWORKS[0]
FALLBACK_DNS: Final = (IPv4Address("9.9.9.9"), IPv4Address("149.112.112.112"))
ALL_ROUTES: Final = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
MAX_PATHS: Final = 8
INSTANCES: Final = 32
MIN_MTU: Final = 1280  # IPv6 needs it (RFC 8200, 5)
MAX_MTU: Final = 9000

MIN_ALARM_MS: Final = 10
MAX_ALARM_MS: Final = 60_000

_INSTANCE_NUMBERS = frozenset(map(str, range(INSTANCES)))
_TABLES = 5200
_TABLES_PER_INSTANCE = 16
OUR_TABLES: Final = range(_TABLES, _TABLES + INSTANCES * _TABLES_PER_INSTANCE)
_INTERFACE_LETTERS = 15  # IFNAMSIZ - 1 (linux/if.h)


class Mode(enum.Enum):
    """Which paths carry a packet; the values are the wire's."""

    REDUNDANT = 0
    BACKUP = 1
    AGGREGATE = 2
    ADAPTIVE = 3


class DnsMode(enum.Enum):
    """Which resolver the client's names go to: the one the server offers, the one there was, or a given one."""

    AUTO = "auto"
    KEEP = "keep"
    FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Gateway:
    """A default route by some link; `via` is None on a link without gateway (ppp, wwan).

    `source`: the address that the route says to send from (`src` in ip-route(8)).
    """

    via: IPv4Address | IPv6Address | None
    metric: int
    source: IPv4Address | IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface of the host, as far as a path needs it.

    `up`: set up by the administrator, and with carrier. `addresses`: global ones that may be used, in the kernel's
    order, the `deprecated` ones last: they are valid, but past their preferred lifetime (RFC 4862, 5.5.4). A gateway is
    that of the link's default route of lowest metric in the main table.
    """

    name: str
    index: int
    kind: str
    up: bool
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    gateway4: Gateway | None
    gateway6: Gateway | None
    mtu: int
    deprecated: frozenset[IPv4Address | IPv6Address] = frozenset()


def neighbours(network: IPv4Network, links: Iterable[Link]) -> list[tuple[Link, IPv4Interface]]:
    """Return the links, with their addresses there, that share a part of `network`."""
    found = [(link, address) for link in links for address in link.addresses if isinstance(address, IPv4Interface)]
    return [(link, address) for link, address in found if address.network.overlaps(network)]


def free_network(links: Sequence[Link]) -> IPv4Network:
    """Return the tunnel network of a new server on a host with these links: one that is none of their own."""
    return next((network for network in _NETWORKS if not neighbours(network, links)), _NETWORKS[0])


@dataclass(frozen=True, slots=True)
class Settings:
    """What both roles are told. Raises ConfigError for values that cannot be."""

    device: str = "mpt0"
    port: int = DEFAULT_PORT
    mtu: int = 1420
    mode: Mode = Mode.REDUNDANT
    script: Path | None = None
    no_script: bool = False
    state_dir: Path = Path("/var/lib/mptunnel")
    run_dir: Path = Path("/run/mptunnel")
    dry_run: bool = False
    offload: bool = True
    on_event: Path | None = None

    def __post_init__(self) -> None:
        instance_number(self.device)
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not a number from 1 to 65535")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigError(f"tunnel MTU {self.mtu} is not a number from {MIN_MTU} to {MAX_MTU}; the default is 1420")
        if self.mode is not Mode.REDUNDANT:
            raise ConfigError(f"mode {self.mode.name.lower()} is not built yet; leave --mode out, or say 'redundant'")

    @property
    def uses_our_script(self) -> bool:
        """Whether the script that we ship sets the host up: what that makes is kept up, what others make is not."""
        return self.script is None and not self.no_script


@dataclass(frozen=True, slots=True)
class ServerSettings(Settings):
    """What a server is told. `network4` None: the network of the state directory, else the default."""

    network4: IPv4Network | None = None
    lan: bool = False


@dataclass(frozen=True, slots=True)
class ClientSettings(Settings):
    """What a client is told. `server` is "" where it is taken from the state directory or the WireGuard file."""

    server: str = ""
    interfaces: tuple[str, ...] = ()
    routes: tuple[IPv4Network | IPv6Network, ...] = ALL_ROUTES
    dns: tuple[IPv4Address | IPv6Address, ...] | None = None
    dns_mode: DnsMode = DnsMode.AUTO
    join: JoinToken | None = field(default=None, repr=False)
    server_key: bytes | None = None
    wireguard: WireGuardFile | None = field(default=None, repr=False)
    idle_probe: float = 25.0
    alarm_ms: int | None = None

    def __post_init__(self) -> None:
        # super() does not know the class that slots=True makes anew
        Settings.__post_init__(self)
        if len(self.interfaces) > MAX_PATHS:
            raise ConfigError(f"{len(self.interfaces)} times -i: a tunnel has at most {MAX_PATHS} paths")
        if not 1.0 <= self.idle_probe <= 3600.0:
            raise ConfigError(f"idle probe interval {self.idle_probe:g} s is not from 1 to 3600 s; the default is 25 s")
        if self.alarm_ms is not None and not MIN_ALARM_MS <= self.alarm_ms <= MAX_ALARM_MS:
            raise ConfigError(
                f"gap alarm after {self.alarm_ms} ms is not from {MIN_ALARM_MS} to {MAX_ALARM_MS} ms; "
                "a third of it is the time between probes, 5 ms at the least"
            )
        if self.alarm_ms is not None and self.wireguard is not None:
            raise ConfigError("a gap alarm needs probes, which a stock WireGuard server does not answer; leave one out")


def instance_number(device: str) -> int:
    """Return the N of device mptN. Raises ConfigError."""
    digits = device.removeprefix("mpt")
    if digits == device or digits not in _INSTANCE_NUMBERS:
        raise ConfigError(f"device {device!a}: the tunnel's device is one of mpt0 to mpt{INSTANCES - 1}")
    return int(digits)


def table_base(device: str) -> int:
    """Return the first of the device's 16 routing tables, which are its rules' priorities too."""
    return _TABLES + _TABLES_PER_INSTANCE * instance_number(device)


def parse_mode(text: str) -> Mode:
    """Return the mode of this name. Raises ConfigError."""
    names = [mode.name.lower() for mode in Mode]
    if text.lower() not in names:
        raise ConfigError(f"mode {text!a} is not known; there is 'redundant'")
    return Mode[text.upper()]


def parse_server(text: str) -> tuple[str, int | None]:
    """Return host and port of `-c`: SERVER, SERVER:PORT, [v6]:PORT or a bare IPv6 address. Raises ConfigError."""
    if "://" in text:
        raise ConfigError(f"server {text!a}: this is a URL; give the host's name or address, and :PORT if need be")
    host, port = split_host_port(text, "server")
    return host, port


def parse_interfaces(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the interfaces of `-i`: addresses in their canonical form, names as they are. Raises ConfigError."""
    found: list[str] = []
    for text in texts:
        name = _address_or_none(text)
        if name is None:
            _check_interface(text)
            name = text
        if name in found:
            raise ConfigError(f"-i {text} stands twice; every path is an interface of its own")
        found.append(name)
    if len(found) > MAX_PATHS:
        raise ConfigError(f"{len(found)} times -i: a tunnel has at most {MAX_PATHS} paths")
    return tuple(found)


def parse_routes(texts: Sequence[str]) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks of `--route`: `all`, `none`, or what goes into the tunnel. Raises ConfigError."""
    words = [text.lower() for text in texts]
    if not words or words == ["all"]:
        return ALL_ROUTES
    if words == ["none"]:
        return ()
    if "all" in words or "none" in words:
        raise ConfigError("--route all or none stands alone; with networks leave it out")
    return tuple(dict.fromkeys(_network(word, "--route") for word in words))


def parse_dns(texts: Sequence[str]) -> tuple[DnsMode, tuple[IPv4Address | IPv6Address, ...] | None]:
    """Return mode and resolvers of `--dns`: `auto`, `keep`, or addresses. Raises ConfigError."""
    words = [text.lower() for text in texts]
    if not words or words == ["auto"]:
        return DnsMode.AUTO, None
    if words == ["keep"]:
        return DnsMode.KEEP, None
    resolvers = []
    for word in words:
        try:
            resolvers.append(ipaddress.ip_address(word))
        except ValueError:
            raise ConfigError(f"--dns {word!a}: auto, keep, or the address of a resolver is expected") from None
    return DnsMode.FIXED, tuple(dict.fromkeys(resolvers))


def parse_network(text: str) -> IPv4Network:
    """Return the tunnel network of `--network`. Raises ConfigError."""
    network = _network(text, "--network")
    if not isinstance(network, IPv4Network):
        raise ConfigError(f"--network {text}: an IPv4 network is expected; the IPv6 one is made at random")
    if not 8 <= network.prefixlen <= 30:
        raise ConfigError(f"--network {text}: a prefix of /8 to /30 is expected, as in {DEFAULT_NETWORK}")
    address = network.network_address
    if address.is_multicast or address.is_loopback or address.is_link_local or address.is_reserved or not int(address):
        raise ConfigError(f"--network {text}: not a network for hosts; a private one is, as {DEFAULT_NETWORK}")
    return network


def spelling(host: str, port: int) -> str:
    """Return the form under which a server's `-c` is remembered: `host:port`, lower case."""
    return host_port(host.lower().removesuffix("."), port)


def server_argument(host: str, port: int) -> str:
    """Return what a client writes behind `-c` for this server, the port only where it is not the default."""
    return host if port == DEFAULT_PORT else host_port(host, port)


def public_address(links: Iterable[Link]) -> IPv4Address | IPv6Address | None:
    """Return the global address of the default route's link, IPv4 before IPv6; None behind a NAT or without one."""
    links = tuple(links)
    for version in (4, 6):
        ways = [(gateway.metric, link) for link in links if (gateway := _gateway(link, version)) is not None]
        for _, link in sorted(ways, key=lambda way: way[0]):
            for address in link.addresses:
                if address.version == version and address.ip.is_global:
                    return address.ip
    return None


def client_line(server: str, token_text: str | None) -> str:
    """Return the line a client runs to join (or, without a token, to come back), ready to be copied.

    There is no `-i` in it: without one every uplink with a default route is used, so the line runs as it stands on
    any client; placeholders would have to be edited first.
    """
    join = f" --join {token_text}" if token_text else ""
    return f"sudo mptunnel -c {server}{join}"


def _gateway(link: Link, version: int) -> Gateway | None:
    return link.gateway4 if version == 4 else link.gateway6


def _address_or_none(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        return None


def _check_interface(text: str) -> None:
    """Raise ConfigError for what neither an address nor an interface's name can be."""
    if "," in text:
        raise ConfigError(f"-i {text!a}: give -i once for each interface")
    address, slash, _ = text.partition("/")
    if slash and _address_or_none(address) is not None:
        raise ConfigError(f"-i {text!a}: give the address alone, -i {address}")
    if not 0 < len(text) <= _INTERFACE_LETTERS or "/" in text or not text.isprintable() or " " in text:
        raise ConfigError(f"-i {text!a}: neither an address nor an interface's name; see 'ip -brief address'")


def _network(text: str, what: str) -> IPv4Network | IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(f"{what} {text!a}: not a network such as 192.0.2.0/24") from None
    raise ConfigError(f"{what} {text}: there are bits behind the prefix; did you mean {meant}?")
