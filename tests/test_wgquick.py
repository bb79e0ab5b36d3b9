"""Stock WireGuard configurations, read and written."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.errors import ConfigError
from mptunnel.keys import NO_PSK, encode_key
from mptunnel.wgquick import WireGuardFile, parse_wireguard, split_host_port, wireguard_text

OWN, SERVER, PSK = (bytes([n]) * 32 for n in (1, 2, 3))
WHOLE = f"""\
# from the provider
[Interface]
PrivateKey = {encode_key(OWN)}
Address = 10.2.0.2/32, fd00::2/128   # both
DNS = 10.2.0.1, lan.example
MTU = 1380

[peer]
publickey={encode_key(SERVER)}
PRESHAREDKEY = {encode_key(PSK)}
AllowedIPs = 0.0.0.0/0
AllowedIPs = ::/0
Endpoint = vpn.example.org:51820
PersistentKeepalive = 25
"""


def changed(old: str, new: str) -> str:
    assert old in WHOLE
    return WHOLE.replace(old, new)


def test_a_whole_file_is_read() -> None:
    assert parse_wireguard(WHOLE) == WireGuardFile(
        private_key=OWN,
        addresses=(IPv4Interface("10.2.0.2/32"), IPv6Interface("fd00::2/128")),
        dns=(IPv4Address("10.2.0.1"),),
        mtu=1380,
        public_key=SERVER,
        psk=PSK,
        allowed_ips=(IPv4Network("0.0.0.0/0"), IPv6Network("::/0")),
        endpoint=("vpn.example.org", 51820),
        keepalive=25,
        warnings=("line 5: search domain 'lan.example' is left out",),
    )


def test_what_may_be_missing_may_be_missing() -> None:
    file = parse_wireguard(
        f"[Interface]\r\nPrivateKey={encode_key(OWN)}\r\nAddress=10.2.0.2\r\n[Peer]\r\nPublicKey={encode_key(SERVER)}\r\n"
    )
    assert (file.dns, file.mtu, file.psk, file.endpoint, file.keepalive) == ((), None, NO_PSK, None, None)
    assert file.addresses == (IPv4Interface("10.2.0.2/32"),)


@pytest.mark.parametrize("word", ["off", "0"])
def test_keepalive_can_be_off(word: str) -> None:
    assert parse_wireguard(changed("Keepalive = 25", f"Keepalive = {word}")).keepalive is None


def test_hooks_are_not_run_and_said_so() -> None:
    file = parse_wireguard(changed("MTU = 1380", "PostUp = rm -rf /\nTable = off"))
    assert "line 6: PostUp is a shell command and is not run" in file.warnings
    assert "line 7: Table has no meaning here and is left out" in file.warnings


def test_host_bits_of_a_network_are_dropped_as_wg_does() -> None:
    assert parse_wireguard(changed("::/0", "10.9.8.7/24")).allowed_ips[1] == IPv4Network("10.9.8.0/24")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"PrivateKey is missing under \[Interface\]"),
        (changed("publickey", "# publickey"), r"PublicKey is missing under \[Peer\]"),
        (changed("Address", "# Address"), r"Address is missing"),
        (WHOLE + "[Peer]\n", r"line 15: a second \[Peer\]"),
        (WHOLE + "[Peers]\n", r"section '\[Peers\]' is not known"),
        (WHOLE + "Paths = wlan0\n", r"line 15: 'Paths' is not known under \[Peer\]"),
        (WHOLE + "MTU = 1280\n", r"line 15: 'MTU' is not known under \[Peer\]; it belongs under \[Interface\]"),
        (WHOLE + "Endpoint = x:1\n", r"line 15: Endpoint stands twice \(first in line 13\)"),
        (WHOLE + "what\n", r"line 15: 'Key = value' is expected"),
        ("MTU = 1280\n", r"line 1: 'MTU' stands before \[Interface\]"),
        (changed(encode_key(OWN), encode_key(OWN)[:-4]), r"line 3: PrivateKey: 40 characters"),
        (changed("10.2.0.2/32", "10.2.0/32"), r"line 4: Address '10.2.0/32'"),
        (changed("MTU = 1380", "MTU = 99999"), r"line 6: MTU '99999' is not a number from 576 to 65535"),
        (changed("0.0.0.0/0", "everything"), r"line 11: AllowedIPs 'everything'"),
        (changed("org:51820", "org"), r"line 13: Endpoint 'vpn.example.org' has no port"),
        (changed("org:51820", "org:0"), r"line 13: Endpoint: port '0'"),
        (changed("Keepalive = 25", "Keepalive = on"), r"line 14: PersistentKeepalive 'on'"),
    ],
)
def test_a_wrong_file_is_refused_by_line_and_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_wireguard(text)


def test_neither_repr_nor_message_shows_a_secret() -> None:
    assert repr(OWN) not in repr(parse_wireguard(WHOLE))
    assert repr(PSK) not in repr(parse_wireguard(WHOLE))


@given(st.text() | st.lists(st.text() | st.sampled_from(WHOLE.splitlines())).map("\n".join))
def test_any_text_raises_only_our_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_wireguard(text)


@given(st.lists(st.sampled_from(WHOLE.splitlines())).map("\n".join))
def test_no_message_quotes_a_secret(text: str) -> None:
    message = ""
    try:
        parse_wireguard(text)
    except ConfigError as error:
        message = str(error)
    assert encode_key(OWN)[:12] not in message
    assert encode_key(PSK)[:12] not in message


def test_what_is_written_can_be_read() -> None:
    addresses: list[IPv4Interface | IPv6Interface] = [IPv4Interface("10.0.1.3/32"), IPv6Interface("fd12::3/128")]
    text = wireguard_text(OWN, addresses, [IPv4Address("9.9.9.9")], SERVER, PSK, "vpn.example.org:5000")
    file = parse_wireguard(text)
    assert (file.private_key, file.public_key, file.psk) == (OWN, SERVER, PSK)
    assert file.addresses == tuple(addresses)
    assert file.endpoint == ("vpn.example.org", 5000)
    assert file.warnings == ()


def test_without_psk_dns_or_private_key_their_lines_are_left_out() -> None:
    text = wireguard_text(None, [IPv4Interface("10.0.1.3/32")], [], SERVER, NO_PSK, "SERVER:5000")
    assert "PresharedKey" not in text
    assert "DNS" not in text
    assert "\nPrivateKey" not in text
    assert "# PrivateKey = " in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", None)),
        ("Host.Example.", ("Host.Example.", None)),
        ("host:6000", ("host", 6000)),
        ("192.0.2.1:1", ("192.0.2.1", 1)),
        ("2001:db8::1", ("2001:db8::1", None)),
        ("fe80::1%eth0", ("fe80::1%eth0", None)),
        ("[2001:db8::1]", ("2001:db8::1", None)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("bücher.example", ("bücher.example", None)),
    ],
)
def test_host_and_port_are_told_apart(text: str, expected: tuple[str, int | None]) -> None:
    assert split_host_port(text, "server") == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither a host's name nor an address"),
        ("-i", "neither a host's name"),
        ("a b", "neither a host's name"),
        ("a..b", "neither a host's name"),
        ("a" * 64, "neither a host's name"),
        ("host:", "port ''"),
        ("host:0", "port '0'"),
        ("host:65536", "port '65536'"),
        ("host:5x", "port '5x'"),
        ("host:²", "port"),
        ("192.0.2", "IPv4"),
        ("192.0.2.300:5000", "IPv4"),
        ("2001:db8::1::5000", "neither an IPv6 address nor HOST:PORT"),
        ("[2001:db8::1", "in brackets"),
        ("[host]:5000", "in brackets"),
        ("[2001:db8::1]5000", "in brackets"),
        ("user@host", "only the host's name"),
        ("host/24", "only the host's name"),
    ],
)
def test_what_is_no_host_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        split_host_port(text, "server")
