"""Settings and the small grammars of the command line."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.config import (
    ALL_ROUTES,
    ClientSettings,
    DnsMode,
    Gateway,
    JoinToken,
    Link,
    Mode,
    ServerSettings,
    Settings,
    client_line,
    instance_number,
    parse_dns,
    parse_interfaces,
    parse_mode,
    parse_network,
    parse_routes,
    parse_server,
    public_address,
    server_argument,
    spelling,
    table_base,
)
from mptunnel.errors import ConfigError


def link(name: str, addresses: list[str], metric4: int | None = None, metric6: int | None = None) -> Link:
    return Link(
        name=name,
        index=1,
        kind="",
        up=True,
        addresses=tuple(ip_interface(address) for address in addresses),
        gateway4=None if metric4 is None else Gateway(IPv4Address("192.0.2.1"), metric4),
        gateway6=None if metric6 is None else Gateway(None, metric6),
        mtu=1500,
    )


def test_the_defaults_are_those_of_the_two_commands() -> None:
    server, client = ServerSettings(), ClientSettings(server="host")
    assert (server.device, server.port, server.mtu, server.mode) == ("mpt0", 5000, 1420, Mode.REDUNDANT)
    assert (server.state_dir, server.run_dir) == (Path("/var/lib/mptunnel"), Path("/run/mptunnel"))
    assert client.routes == (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
    assert client.dns_mode is DnsMode.AUTO


def test_settings_do_not_show_a_token() -> None:
    assert "JoinToken" not in repr(ClientSettings(server="host", join=JoinToken(bytes(32), bytes(16))))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"port": 0}, "port 0"),
        ({"port": 65536}, "port 65536"),
        ({"mtu": 1279}, "tunnel MTU 1279"),
        ({"mtu": 9001}, "tunnel MTU 9001"),
        ({"device": "tun0"}, "device 'tun0'"),
        ({"mode": Mode.BACKUP}, "mode backup is not built yet"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], why: str) -> None:
    for kind in (Settings, ServerSettings, ClientSettings):
        with pytest.raises(ConfigError, match=why):
            kind(**values)


def test_a_client_has_at_most_eight_paths_and_a_sane_probe_interval() -> None:
    names = tuple(f"eth{n}" for n in range(9))
    ClientSettings(interfaces=names[:8])
    with pytest.raises(ConfigError, match="9 times -i"):
        ClientSettings(interfaces=names)
    for interval in (0.5, 3601.0, float("nan")):
        with pytest.raises(ConfigError, match="idle probe"):
            ClientSettings(idle_probe=interval)


def test_instances_have_numbers_and_tables_that_do_not_overlap() -> None:
    assert [instance_number(f"mpt{n}") for n in range(32)] == list(range(32))
    assert table_base("mpt0") == 5200
    assert all(b - a == 16 for a, b in itertools.pairwise(table_base(f"mpt{n}") for n in range(32)))


@pytest.mark.parametrize(
    "device", ["", "mpt", "mpt32", "mpt01", "mpt-1", "mpt٣", "mpt1 ", "MPT1", "0", "mpt" + "9" * 5000]
)
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="mpt0 to mpt31"):
        instance_number(device)


def test_modes_go_by_their_lower_case_names() -> None:
    assert [parse_mode(name) for name in ("redundant", "Backup")] == [Mode.REDUNDANT, Mode.BACKUP]
    with pytest.raises(ConfigError, match="mode 'fast' is not known; there is 'redundant'"):
        parse_mode("fast")


def test_a_server_may_be_a_name_or_an_address_with_a_port() -> None:
    assert parse_server("VPN.example.org:6000") == ("VPN.example.org", 6000)
    assert parse_server("2001:db8::1") == ("2001:db8::1", None)
    with pytest.raises(ConfigError, match="URL"):
        parse_server("https://vpn.example.org")


def test_spellings_are_lower_case_and_carry_the_port() -> None:
    assert spelling("VPN.Example.org.", 5000) == "vpn.example.org:5000"
    assert spelling("2001:DB8::1", 6000) == "[2001:db8::1]:6000"
    assert server_argument("vpn.example.org", 5000) == "vpn.example.org"
    assert server_argument("SERVER", 6000) == "SERVER:6000"
    assert server_argument("2001:db8::1", 5000) == "2001:db8::1"
    assert server_argument("2001:db8::1", 6000) == "[2001:db8::1]:6000"


@given(st.sampled_from(["a.example", "192.0.2.1", "2001:db8::1"]), st.integers(1, 65535))
def test_what_a_client_is_told_to_write_is_read_back(host: str, port: int) -> None:
    found, given_port = parse_server(server_argument(host, port))
    assert (found, given_port or 5000) == (host, port)


def test_interfaces_are_names_or_addresses_in_canonical_form() -> None:
    assert parse_interfaces(["wlan0", "192.168.1.5", "[2001:DB8:0::5]", "enx0123456789ab"]) == (
        "wlan0",
        "192.168.1.5",
        "2001:db8::5",
        "enx0123456789ab",
    )


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["wlan0", "wlan0"], "stands twice"),
        (["2001:db8::5", "2001:db8:0::5"], "stands twice"),
        (["wlan0,eth0"], "-i once for each"),
        (["192.168.1.5/24"], "-i 192.168.1.5"),
        ([""], "neither an address"),
        (["a/b"], "neither an address"),
        (["an-interface-of-16"], "neither an address"),
        (["wlan 0"], "neither an address"),
        ([f"eth{n}" for n in range(9)], "at most 8"),
    ],
)
def test_what_is_no_interface_is_refused_with_its_reason(texts: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_interfaces(texts)


def test_routes_are_all_none_or_networks() -> None:
    assert parse_routes([]) == parse_routes(["ALL"]) == ALL_ROUTES
    assert parse_routes(["none"]) == ()
    assert parse_routes(["192.0.2.0/24", "2001:db8::/32", "192.0.2.0/24"]) == (
        IPv4Network("192.0.2.0/24"),
        IPv6Network("2001:db8::/32"),
    )
    with pytest.raises(ConfigError, match="stands alone"):
        parse_routes(["all", "192.0.2.0/24"])
    with pytest.raises(ConfigError, match=r"did you mean 192\.0\.2\.0/24"):
        parse_routes(["192.0.2.1/24"])
    with pytest.raises(ConfigError, match="not a network"):
        parse_routes(["home"])


def test_dns_is_auto_keep_or_addresses() -> None:
    assert parse_dns([]) == parse_dns(["auto"]) == (DnsMode.AUTO, None)
    assert parse_dns(["Keep"]) == (DnsMode.KEEP, None)
    assert parse_dns(["9.9.9.9", "2620:fe::fe"]) == (
        DnsMode.FIXED,
        (IPv4Address("9.9.9.9"), IPv6Address("2620:fe::fe")),
    )
    for words in (["auto", "9.9.9.9"], ["dns.example"]):
        with pytest.raises(ConfigError, match="auto, keep, or the address"):
            parse_dns(words)


def test_the_tunnel_network_is_a_private_sized_ipv4_one() -> None:
    assert parse_network("10.7.0.0/16") == IPv4Network("10.7.0.0/16")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.1.0/31", "/8 to /30"),
        ("0.0.0.0/0", "/8 to /30"),
        ("fd00::/64", "IPv4 network"),
        ("10.0.1.1/24", "did you mean 10.0.1.0/24"),
        ("127.0.0.0/8", "not a network for hosts"),
        ("224.0.0.0/8", "not a network for hosts"),
        ("0.0.0.0/8", "not a network for hosts"),
        ("lan", "not a network such as"),
    ],
)
def test_other_tunnel_networks_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_network(text)


def test_the_public_address_is_the_global_one_of_the_best_default_route() -> None:
    private = link("eth0", ["10.0.0.2/24"], metric4=100)
    slow = link("eth1", ["8.8.8.9/24"], metric4=600)
    fast = link("eth2", ["10.0.0.3/24", "8.8.4.5/24", "2001:4860::5/64"], metric4=50, metric6=50)
    unrouted = link("eth3", ["1.1.1.2/24"])
    assert public_address([private, slow, fast, unrouted]) == IPv4Address("8.8.4.5")
    assert public_address([private, slow]) == IPv4Address("8.8.8.9")
    assert public_address([link("eth4", ["10.0.0.9/8", "2001:4860::7/64"], metric4=1, metric6=1)]) == IPv6Address(
        "2001:4860::7"
    )
    assert public_address([private, unrouted]) is None
    assert public_address([]) is None


def test_the_client_line_can_be_copied_as_it_stands() -> None:
    assert client_line("198.51.100.1", "mpt1abc") == "sudo mptunnel -c 198.51.100.1 --join mpt1abc"
    assert client_line("SERVER:6000", None) == "sudo mptunnel -c SERVER:6000"


@given(st.text())
def test_any_text_raises_only_our_error(text: str) -> None:
    for parse in (parse_server, parse_mode, parse_network, instance_number):
        try:
            parse(text)
        except ConfigError:
            continue
    for parse_all in (parse_interfaces, parse_routes, parse_dns):
        try:
            parse_all([text])
        except ConfigError:
            continue
