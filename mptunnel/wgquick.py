"""Stock WireGuard configurations (wg-quick): read the one a provider gave, write the one a phone takes.

Section and key names are case-insensitive, `#` starts a comment (wireguard-tools, config.c). Exactly one peer, the
server. Hooks and what only wg-quick knows are left out with a warning: they are shell, and we run none.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING, Final, TypeAlias

from mptunnel.errors import ConfigError
from mptunnel.keys import NO_PSK, decode_key, encode_key

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERFACE_KEYS = ("privatekey", "address", "dns", "mtu")
_PEER_KEYS = ("publickey", "presharedkey", "allowedips", "endpoint", "persistentkeepalive")
_HOOKS = ("preup", "postup", "predown", "postdown")
_IGNORED = ("listenport", "fwmark", "table", "saveconfig")
_LISTS = ("address", "dns", "allowedips")  # may stand on several lines
_WORDS = {
    "interface": frozenset((*_INTERFACE_KEYS, *_HOOKS, *_IGNORED)),
    "peer": frozenset(_PEER_KEYS),
}
STOCK_MTU: Final = 1280  # carried by every network a phone roams into


@dataclass(frozen=True, slots=True)
class WireGuardFile:
    """A stock server as its wg-quick configuration describes it, with ourselves as its client."""

    private_key: bytes = field(repr=False)
    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    dns: tuple[IPv4Address | IPv6Address, ...]
    mtu: int | None
    public_key: bytes
    psk: bytes = field(repr=False)
    allowed_ips: tuple[IPv4Network | IPv6Network, ...]
    endpoint: tuple[str, int] | None
    keepalive: int | None
    warnings: tuple[str, ...]


def parse_wireguard(text: str) -> WireGuardFile:
    """Parse a wg-quick configuration with one peer. Raises ConfigError that names the line or the missing key."""
    values: dict[str, _Section] = {"interface": {}, "peer": {}}
    warnings: list[str] = []
    section = ""
    peers = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip().lstrip("\ufeff")
        if not words:
            continue
        if words.startswith("["):
            section = words.strip("[]").strip().lower()
            if section not in values:
                raise ConfigError(f"line {number}: section {words!a} is not known; there are [Interface] and [Peer]")
            peers += section == "peer"
            if peers > 1:
                raise ConfigError(f"line {number}: a second [Peer]; exactly one, the server, is expected")
            continue
        _take_line(number, words, section, values, warnings)
    return _assemble(values["interface"], values["peer"], warnings)


def wireguard_text(
    private_key: bytes | None,
    addresses: Sequence[IPv4Interface | IPv6Interface],
    dns: Sequence[IPv4Address | IPv6Address],
    public_key: bytes,
    psk: bytes,
    endpoint: str,
) -> str:
    """Return a stock client's configuration: everything through the server `public_key` at `endpoint` (`host:port`).

    Without a `private_key` its owner is asked to write it in.
    """
    lines = [
        "[Interface]",
        f"PrivateKey = {encode_key(private_key)}" if private_key else "# PrivateKey = (yours, it never left you)",
        f"Address = {', '.join(map(str, addresses))}",
        *([f"DNS = {', '.join(map(str, dns))}"] if dns else []),
        f"MTU = {STOCK_MTU}",
        "",
        "[Peer]",
        f"PublicKey = {encode_key(public_key)}",
        *([f"PresharedKey = {encode_key(psk)}"] if psk != NO_PSK else []),
        f"Endpoint = {endpoint}",
        "AllowedIPs = 0.0.0.0/0, ::/0",
        "PersistentKeepalive = 25",
    ]
    return "\n".join(lines) + "\n"


def split_host_port(text: str, what: str) -> tuple[str, int | None]:
    """Split HOST, HOST:PORT, [v6]:PORT, [v6] or a bare IPv6 address. Raises ConfigError; `what` names the value."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or not _is_address6(host):
            raise ConfigError(f"{what} {text!a}: in brackets an IPv6 address is expected, as in [2001:db8::1]:5000")
        port = rest[1:] if rest else None
    elif text.count(":") > 1:
        host, port = text, None
        if not _is_address6(host):
            raise ConfigError(f"{what} {text!a}: neither an IPv6 address nor HOST:PORT")
    else:
        host, colon, digits = text.partition(":")
        port = digits if colon else None
    _check_host(host, text, what)
    return host, None if port is None else parse_port(port, what)


def parse_port(text: str, what: str) -> int:
    """Return a UDP port of 1 to 65535. Raises ConfigError."""
    port = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    if not 1 <= port <= 65535:
        raise ConfigError(f"{what}: port {text!a} is not a number from 1 to 65535")
    return port


@dataclass(frozen=True, slots=True)
class _Value:
    """What stands behind a key, and where."""

    line: int
    text: str = field(repr=False)


_Section: TypeAlias = dict[str, list[_Value]]


def _take_line(number: int, words: str, section: str, values: dict[str, _Section], warnings: list[str]) -> None:
    """File one `Key = value` under its section."""
    name, equals, value = (part.strip() for part in words.partition("="))
    key = name.lower()
    if not equals:
        raise ConfigError(f"line {number}: 'Key = value' is expected")
    if not section:
        raise ConfigError(f"line {number}: {name!a} stands before [Interface]")
    if key not in _WORDS[section]:
        other = next((f"; it belongs under [{s.title()}]" for s, keys in _WORDS.items() if key in keys), "")
        raise ConfigError(f"line {number}: {name!a} is not known under [{section.title()}]{other}")
    if key in _HOOKS:
        warnings.append(f"line {number}: {name} is a shell command and is not run")
    elif key in _IGNORED:
        warnings.append(f"line {number}: {name} has no meaning here and is left out")
    elif key in values[section] and key not in _LISTS:
        raise ConfigError(f"line {number}: {name} stands twice (first in line {values[section][key][0].line})")
    else:
        values[section].setdefault(key, []).append(_Value(number, value))


def _assemble(interface: _Section, peer: _Section, warnings: list[str]) -> WireGuardFile:
    """Check and convert the values of both sections."""
    for section, found, key in (("Interface", interface, "PrivateKey"), ("Peer", peer, "PublicKey")):
        if key.lower() not in found:
            raise ConfigError(f"{key} is missing under [{section}]")
    if "address" not in interface:
        raise ConfigError("Address is missing under [Interface]")
    psk = _only(peer, "presharedkey")
    return WireGuardFile(
        private_key=_key(interface["privatekey"][0], "PrivateKey"),
        addresses=tuple(_interface(item, line) for item, line in _items(interface.get("address", []))),
        dns=tuple(_dns(interface.get("dns", []), warnings)),
        mtu=_number(_only(interface, "mtu"), "MTU", 576, 65535),
        public_key=_key(peer["publickey"][0], "PublicKey"),
        psk=_key(psk, "PresharedKey") if psk else NO_PSK,
        allowed_ips=tuple(_network(item, line) for item, line in _items(peer.get("allowedips", []))),
        endpoint=_endpoint(_only(peer, "endpoint")),
        keepalive=_keepalive(_only(peer, "persistentkeepalive")),
        warnings=tuple(warnings),
    )


def _only(section: _Section, key: str) -> _Value | None:
    """Return the value of a key that stands once, if it does."""
    return next(iter(section.get(key, [])), None)


def _items(values: list[_Value]) -> list[tuple[str, int]]:
    """Return the parts of comma lists, each with its line."""
    return [(item.strip(), value.line) for value in values for item in value.text.split(",") if item.strip()]


def _key(value: _Value, name: str) -> bytes:
    return decode_key(value.text, f"line {value.line}: {name}")


def _interface(text: str, line: int) -> IPv4Interface | IPv6Interface:
    try:
        return ipaddress.ip_interface(text)
    except ValueError:
        raise ConfigError(f"line {line}: Address {text!a} is not an address such as 10.0.0.2/32") from None


def _network(text: str, line: int) -> IPv4Network | IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)  # wg itself drops host bits
    except ValueError:
        raise ConfigError(f"line {line}: AllowedIPs {text!a} is not a network such as 0.0.0.0/0") from None


def _dns(values: list[_Value], warnings: list[str]) -> list[IPv4Address | IPv6Address]:
    """Return the resolvers; a name among them is a search domain to wg-quick, which we do not set."""
    resolvers: list[IPv4Address | IPv6Address] = []
    for item, line in _items(values):
        try:
            resolvers.append(ipaddress.ip_address(item))
        except ValueError:
            warnings.append(f"line {line}: search domain {item!a} is left out")
    return resolvers


def _number(value: _Value | None, name: str, least: int, most: int) -> int | None:
    if value is None:
        return None
    number = int(value.text) if value.text.isascii() and value.text.isdigit() and len(value.text) < 10 else -1
    if not least <= number <= most:
        raise ConfigError(f"line {value.line}: {name} {value.text!a} is not a number from {least} to {most}")
    return number


def _keepalive(value: _Value | None) -> int | None:
    """Return the seconds; `off` and 0 are none."""
    if value is None or value.text.lower() == "off":
        return None
    return _number(value, "PersistentKeepalive", 0, 65535) or None


def _endpoint(value: _Value | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, port = split_host_port(value.text, f"line {value.line}: Endpoint")
    if port is None:
        raise ConfigError(f"line {value.line}: Endpoint {value.text!a} has no port")
    return host, port


def _is_address6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _check_host(host: str, text: str, what: str) -> None:
    """Raise ConfigError for what no name or address can be; whether it resolves is found out later."""
    if "/" in text or "@" in text:
        raise ConfigError(f"{what} {text!a}: only the host's name or address is expected, as in HOST or HOST:PORT")
    if _is_address6(host):
        return
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(0 < len(label) < 64 and _is_label(label) for label in labels):
        raise ConfigError(f"{what} {text!a}: neither a host's name nor an address")
    if labels[-1].isdigit():
        try:
            IPv4Address(host)
        except ValueError:
            raise ConfigError(f"{what} {text!a}: not a valid IPv4 address") from None


def _is_label(label: str) -> bool:
    return all(letter.isalnum() or letter in "-_" for letter in label) and label[0] != "-"
