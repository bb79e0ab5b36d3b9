"""What the kernel knows of the network: a socket that wakes us when it changes, and the picture as a whole.

An event is only a wake-up: the picture is then read again, all of it, by `ip -json`, so that no sequence of events has
to be understood. Reading takes some milliseconds and blocks; the loop leaves it to its helper thread.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import struct
import subprocess
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mptunnel.config import OUR_TABLES, Gateway, Link
from mptunnel.errors import HostError
from mptunnel.upkeep import EVERYTHING, Picture, Route, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, RTNLGRP_IPV6_RULE
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18
_HEADER: Final = struct.Struct("=IH10x")  # length, type | flags, sequence, port (linux/netlink.h)
_NEWS: Final = frozenset({16, 17, 20, 21, 24, 25, 32, 33})  # RTM_NEW and _DEL of LINK, ADDR, ROUTE, RULE
_OURS: Final = b"mptunnel_mpt"
_NETFILTER: Final = 12  # linux/netlink.h: NETLINK_NETFILTER
_TABLES_GROUP: Final = 1 << 6  # linux/netfilter/nfnetlink.h: NFNLGRP_NFTABLES
_TABLE_EVENTS: Final = {10 << 8: True, 10 << 8 | 2: False}  # NFNL_SUBSYS_NFTABLES: NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE
_CHAIN_EVENT: Final = 10 << 8 | 3  # NFT_MSG_NEWCHAIN, whose NFTA_CHAIN_TABLE is attribute 1 too
_NFGENMSG: Final = 4  # family, version, resource id; then attributes, of which NFTA_TABLE_NAME is 1
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_BUFFER: Final = 1 << 16
_READS: Final = 64  # in one turn; what is left wakes the loop again

_DOWN: Final = frozenset({"DOWN", "LOWERLAYERDOWN", "NOTPRESENT", "DORMANT"})  # RFC 2863 operational states
_UNUSABLE: Final = ("tentative", "dadfailed")
_ESTABLISHED: Final = "01"  # net/tcp_states.h
_LISTEN: Final = "0A"
_SSH: Final = 22
_MAX_KEPT: Final = 64  # each is a rule that every packet passes

Pair = tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address]


class Monitor:
    """A socket that becomes readable when links, addresses, routes or rules change. No privilege is needed."""

    __slots__ = ("_socket",)

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            self._socket.bind((0, _GROUPS))
        except OSError as error:
            raise HostError(f"cannot listen to the kernel's link events: {os.strerror(error.errno or 0)}") from None

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Read what has come in; return whether the picture may have changed."""
        changed = False
        for data in _events(self._socket):
            changed = changed or data is None or _is_news(data)
        return changed

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class TableWatch:
    """A socket that becomes readable when nft tables go or come. Raises OSError where that is not to be had.

    `have_others_come`: somebody else has made chains, or may have; whoever takes that up sets it back.
    """

    __slots__ = ("_socket", "_table", "have_others_come")

    def __init__(self, table: str) -> None:
        self._table = table.encode("ascii")
        self.have_others_come = False
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETFILTER)
        try:
            self._socket.bind((0, _TABLES_GROUP))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def drain(self) -> bool | None:
        """Read what has come in; return whether the table is there now, None if that is no news.

        If events were lost it counts as gone: there were many, and to make it anew does no harm.
        """
        news = None
        for data in _events(self._socket):
            last = False if data is None else parse_table_events(data, self._table)
            news = news if last is None else last
            self.have_others_come = self.have_others_come or data is None or has_chain_of_others(data)
        return news

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _events(sock: socket.socket) -> Iterator[bytes | None]:
    """Yield what has come in; None where events were lost, for then there were many."""
    for _ in range(_READS):
        try:
            data = sock.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None
        else:
            yield data


def parse_table_events(data: bytes, table: bytes) -> bool | None:
    """Return whether netlink messages leave an nft table there or gone; None: they do not speak of it."""
    news = None
    for kind, name in _nft_events(data):
        if kind in _TABLE_EVENTS and name == table:
            news = _TABLE_EVENTS[kind]
    return news


def has_chain_of_others(data: bytes) -> bool:
    """Whether netlink messages tell of a new nft chain in a table that is no instance's of ours."""
    return any(
        kind == _CHAIN_EVENT and name is not None and not name.startswith(_OURS) for kind, name in _nft_events(data)
    )


def _nft_events(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Yield the kind of each netlink message, and the table that it speaks of."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            break
        yield kind, _attribute(data[at + _HEADER.size + _NFGENMSG : at + length], 1)
        at += -(-length // 4) * 4


def _attribute(data: bytes, wanted: int) -> bytes | None:
    """Return a netlink attribute that is a text, without the zero behind it (linux/netlink.h, struct nlattr)."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            return None
        if kind == wanted:
            return data[at + _ATTRIBUTE.size : at + length].rstrip(b"\0")
        at += -(-length // 4) * 4
    return None


def snapshot() -> tuple[Link, ...]:
    """Return all links as they are now. Raises HostError where `ip` is missing or fails."""
    links = _ip("-details", "address")
    routes4 = _ip("-4", "route", "show", "default")
    try:
        routes6 = _ip("-6", "route", "show", "default")
    except HostError:  # a kernel without IPv6
        routes6 = []
    return parse_links(links, routes4, routes6)


def look() -> tuple[tuple[Link, ...], Picture]:
    """Return all links as they are now, and the rules and routes that can be a tunnel's. Raises HostError.

    The links come last: whatever a link took with it when it went is not missed.
    """
    rules, routes = {}, {}
    for version in (4, 6):
        try:
            rules[version] = _ip(f"-{version}", "rule")
            routes[version] = _ip(f"-{version}", "route", "show", "table", "all")
        except HostError:
            if version == 4:
                raise
            rules[6], routes[6] = [], []  # a kernel without IPv6
    links = parse_links(_ip("-details", "address"), *(_defaults(routes[version]) for version in (4, 6)))
    return links, parse_picture(rules, routes)


def parse_picture(rules: dict[int, list[Any]], routes: dict[int, list[Any]]) -> Picture:
    """Return what can be ours of `ip -json rule` and `ip -json route show table all`, by IP version."""
    return Picture(
        frozenset(_rule(version, rule) for version in rules for rule in rules[version] if _is_ours(rule)),
        frozenset(
            Route(version, str(route.get("table", "main")), _target(version, route), route["dev"], _via(route))
            for version in routes
            for route in routes[version]
            if "dev" in route and (_is_ours(route) or (str(route["dev"]).startswith("mpt") and "table" not in route))
        ),
    )


def parse_links(links: list[Any], routes4: list[Any], routes6: list[Any]) -> tuple[Link, ...]:
    """Return the links of `ip -json -details address` and of the default routes of the main table."""
    gateways4, gateways6 = _gateways(routes4), _gateways(routes6)
    return tuple(
        Link(
            name=link["ifname"],
            index=link["ifindex"],
            kind=link.get("linkinfo", {}).get("info_kind", ""),
            up="UP" in link["flags"] and "NO-CARRIER" not in link["flags"] and link.get("operstate") not in _DOWN,
            addresses=(*_addresses(link, deprecated=False), *_addresses(link, deprecated=True)),
            gateway4=gateways4.get(link["ifname"]),
            gateway6=gateways6.get(link["ifname"]),
            mtu=link.get("mtu", 0),
            deprecated=frozenset(address.ip for address in _addresses(link, deprecated=True)),
        )
        for link in links
        if "ifname" in link
    )


def device_drops(device: str) -> int:
    """Return how many packets the kernel had no room for in a device's queue; 0 where it does not say (proc(5))."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    words = next((line.split() for line in lines if line.strip().startswith(f"{device}:")), [])
    return int(words[12]) if len(words) > 12 and words[12].isdigit() else 0


def kept_connections() -> tuple[Pair, ...]:
    """Return (local, remote) of the TCP connections that others have opened to this host, those of SSH first.

    A full tunnel would take their answers away; the client's script lets them go on as they are. At most 64.
    """
    texts = []
    for name in ("tcp", "tcp6"):
        try:
            texts.append(Path("/proc/self/net", name).read_text(encoding="ascii"))
        except OSError:  # no IPv6
            continue
    return parse_connections("".join(texts))


def parse_connections(text: str) -> tuple[Pair, ...]:
    """Return (local, remote) of established connections to a port that is listened on, from lines of /proc/net/tcp."""
    rows = [row for line in text.splitlines() if len(row := line.split()) > 3 and ":" in row[1]]
    listened = {_endpoint(local)[1] for _, local, _, state, *_ in rows if state == _LISTEN}
    found: dict[Pair, bool] = {}
    for _, local, remote, state, *_ in rows:
        (here, port), (there, _) = _endpoint(local), _endpoint(remote)
        if state == _ESTABLISHED and port in listened and not (there.is_loopback or there.is_link_local):
            found[here, there] = port == _SSH or found.get((here, there), False)
    return tuple(sorted(found, key=lambda pair: not found[pair])[:_MAX_KEPT])


def _is_news(data: bytes) -> bool:
    """Whether one of the messages in a datagram is about a change."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, at)
        if kind in _NEWS:
            return True
        at += max(_HEADER.size, length + 3 & ~3)
    return False


def _is_ours(entry: dict[str, Any]) -> bool:
    """Whether a rule or a route is of a table that can be ours."""
    table = str(entry.get("table", ""))
    return table.isdigit() and int(table) in OUR_TABLES


def _defaults(routes: list[Any]) -> list[Any]:
    """Return the default routes of the main table."""
    return [route for route in routes if route.get("dst") == "default" and "table" not in route]


def _rule(version: int, rule: dict[str, Any]) -> Rule:
    named = {"priority", "src", "dst", "table", "srclen", "dstlen", "protocol"}
    rest = " ".join(f"{name} {rule[name]}" for name in sorted(rule) if name not in named)
    return Rule(version, rule["priority"], rule.get("src", "all"), rule.get("dst", "all"), str(rule["table"]), rest)


def _target(version: int, route: dict[str, Any]) -> IPv4Network | IPv6Network:
    text = route.get("dst", "default")
    return EVERYTHING[version] if text == "default" else ipaddress.ip_network(text, strict=False)


def _via(route: dict[str, Any]) -> str:
    return str(route.get("gateway") or route.get("via", {}).get("host") or "")


def _ip(*words: str) -> list[Any]:
    """Return what `ip -json` answers."""
    command = ["ip", "-json", *words]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        raise HostError("ip: not found; install iproute2") from None
    except OSError as error:
        raise HostError(f"cannot run ip: {os.strerror(error.errno or 0).lower()}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise HostError(f"{' '.join(command)}: {said[-1]}")
    try:
        answer = json.loads(done.stdout or b"[]")
    except ValueError:
        raise HostError(f"{' '.join(command)}: no JSON in its answer; iproute2 4.14 or later is needed") from None
    return answer if isinstance(answer, list) else []


def _addresses(link: dict[str, Any], *, deprecated: bool) -> list[IPv4Interface | IPv6Interface]:
    """Return the usable global addresses of a link that are deprecated, or those that are not."""
    return [
        ipaddress.ip_interface(f"{info['local']}/{info['prefixlen']}")
        for info in link.get("addr_info", [])
        if info.get("scope") == "global" and "local" in info and not any(info.get(flag) for flag in _UNUSABLE)
        if info.get("deprecated", False) is deprecated
    ]


def _gateways(routes: list[Any]) -> dict[str, Gateway]:
    """Return the default route of lowest metric for each interface."""
    found: dict[str, Gateway] = {}
    for route in routes:
        if route.get("type", "unicast") != "unicast":  # unreachable, blackhole and the like lead nowhere
            continue
        for hop in route.get("nexthops", [route]):
            via = hop.get("gateway") or hop.get("via", {}).get("host")
            source = route.get("prefsrc")
            gateway = Gateway(
                ipaddress.ip_address(via) if via else None,
                route.get("metric", 0),
                ipaddress.ip_address(source) if source else None,
            )
            name = hop.get("dev")
            if name is not None and (name not in found or gateway.metric < found[name].metric):
                found[name] = gateway
    return found


def _endpoint(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    """Return address and port of `0100007F:0016`: words of 32 bits, each in the machine's byte order."""
    digits, port = text.split(":")
    words = struct.pack(f"={len(digits) // 8}I", *(int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)))
    address = ipaddress.ip_address(words)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address, int(port, 16)
