"""A path is an interface: what `-i` said, held against what the host shows."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mptunnel.config import Gateway, Link
from mptunnel.errors import ConfigError
from mptunnel.host import environment
from mptunnel.plan import path_values
from mptunnel.uplinks import Uplinks, Way

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

ip = ipaddress.ip_address
V4, V6 = ip("198.51.100.1"), ip("2001:db8::1")
NO_GATEWAY: tuple[None, None] = (None, None)


def link(
    name: str, *addresses: str, index: int = 2, up: bool = True, kind: str = "",
    gateways: tuple[str | None, str | None] = ("192.0.2.254", None), source: str = "", deprecated: tuple[str, ...] = (),
) -> Link:  # fmt: skip
    src = ip(source) if source else None
    via4, via6 = (None if via is None else Gateway(ip(via) if via else None, 100, src) for via in gateways)
    own = tuple(map(ipaddress.ip_interface, addresses))
    return Link(name, index, kind, up, own, via4, via6, 1500, frozenset(map(ip, deprecated)))


def find(
    uplinks: Uplinks, *links: Link, avoid: dict[int, int] | None = None, servers: str = "4"
) -> dict[int, Way | None]:
    known: dict[int, IPv4Address | IPv6Address] = {v: s for v, s in ((4, V4), (6, V6)) if str(v) in servers}
    return uplinks.find(links, known, "mpt0", avoid or {})


def way(found: dict[int, Way | None], number: int = 0) -> Way:
    one = found[number]
    assert one is not None
    return one


def test_a_name_is_that_interface_with_its_first_address_and_its_gateway() -> None:
    found = find(Uplinks(["wan1"]), link("wan0", "192.0.2.9/24"), link("wan1", "192.0.2.2/24", "192.0.2.3/24", index=7))
    assert way(found) == Way("wan1", 7, ip("192.0.2.2"), V4, ip("192.0.2.254"))


def wan(*addresses: str, deprecated: tuple[str, ...] = (), gateway: str = "", source: str = "") -> Link:
    """An uplink with a default route. Of IPv6 addresses the kernel shows the newest first."""
    gateways = (gateway, None) if "." in addresses[0] else (None, "fe80::1")
    return link("wan", *addresses, gateways=gateways, source=source, deprecated=deprecated)


def source_of(uplinks: Uplinks, shown: Link, server6: IPv4Address | IPv6Address = V6) -> str:
    one = uplinks.find([shown], {4: V4, 6: server6}, "mpt0", {})[0]
    return str(one.address) if one is not None else ""


MANAGEMENT, CGNAT, CGNAT_GATEWAY = "192.168.100.2/24", "100.70.1.2/10", "100.64.0.1"


def test_the_address_is_the_default_routes_or_of_the_gateways_subnet_not_the_modems() -> None:
    assert source_of(Uplinks(["wan"]), wan(MANAGEMENT, CGNAT, gateway=CGNAT_GATEWAY)) == "100.70.1.2"
    assert source_of(Uplinks(["wan"]), wan("10.0.0.1/32", "10.0.0.2/32", source="10.0.0.2")) == "10.0.0.2"
    both = wan(MANAGEMENT, CGNAT, "100.70.1.3/10", gateway=CGNAT_GATEWAY, source="100.70.1.3")
    assert source_of(Uplinks(["wan"]), both) == "100.70.1.3"
    assert source_of(Uplinks(["192.168.100.2"]), both) == "192.168.100.2"


def test_to_a_server_on_the_link_the_address_is_of_its_subnet() -> None:
    lan = wan("10.0.0.2/24", "198.51.100.77/24", gateway="10.0.0.1", source="10.0.0.2")
    assert source_of(Uplinks(["wan"]), lan) == "198.51.100.77"


def test_a_path_that_began_with_the_modems_address_gets_the_leased_one() -> None:
    uplinks = Uplinks(["wan"])
    assert source_of(uplinks, link("wan", MANAGEMENT, gateways=NO_GATEWAY)) == "192.168.100.2"
    assert source_of(uplinks, wan(MANAGEMENT, CGNAT, gateway=CGNAT_GATEWAY)) == "100.70.1.2"
    assert source_of(uplinks, link("wan", MANAGEMENT, CGNAT, gateways=NO_GATEWAY)) == "100.70.1.2"


def test_a_unique_local_address_is_for_a_server_with_one() -> None:
    both = wan("fd00:1::2/64", "2001:db8:1::2/64")
    assert source_of(Uplinks(["wan"]), both) == "2001:db8:1::2"
    assert source_of(Uplinks(["wan"]), wan("2001:db8:1::2/64", "fd00:1::2/64"), ip("fd00:9::1")) == "fd00:1::2"
    assert source_of(Uplinks(["wan"]), wan("fd00:1::2/64")) == "fd00:1::2"
    retired = wan("fd00:1::2/64", "2001:db8:1::2/64", deprecated=("2001:db8:1::2",))
    assert source_of(Uplinks(["wan"]), retired) == "2001:db8:1::2"


def test_a_path_keeps_its_address_when_another_comes_and_when_it_is_deprecated_until_it_goes() -> None:
    uplinks, old, new = Uplinks(["wan"]), "2001:db8:1::a/64", "2001:db8:1::b/64"
    assert source_of(uplinks, wan(old)) == "2001:db8:1::a"
    assert source_of(uplinks, wan(new, old)) == "2001:db8:1::a"
    assert source_of(uplinks, wan(new, old, deprecated=("2001:db8:1::a",))) == "2001:db8:1::a"
    assert source_of(uplinks, wan(new)) == "2001:db8:1::b"
    assert source_of(uplinks, wan(new, old)) == "2001:db8:1::b"


def test_an_address_that_comes_back_is_not_the_present_one() -> None:
    uplinks, old, new = Uplinks(["wan"]), "2001:db8:1::a/64", "2001:db8:1::b/64"
    assert source_of(uplinks, wan(old)) == "2001:db8:1::a"
    assert source_of(uplinks, link("wan", old, up=False)) == ""
    assert source_of(uplinks, wan(new, old)) == "2001:db8:1::b"


def test_a_deprecated_address_is_the_last_choice_and_one() -> None:
    old, new = "192.0.2.2/24", "192.0.2.3/24"
    assert source_of(Uplinks(["wan"]), wan(old, new, deprecated=("192.0.2.2",))) == "192.0.2.3"
    assert source_of(Uplinks(["wan"]), wan(old, deprecated=("192.0.2.2",))) == "192.0.2.2"
    lease = wan(MANAGEMENT, "192.0.2.2/24", gateway="192.0.2.254", deprecated=("192.0.2.2",))
    assert source_of(Uplinks(["wan"]), lease) == "192.0.2.2"


def test_a_path_leaves_the_address_of_a_prefix_that_the_router_has_withdrawn() -> None:
    uplinks, old, new = Uplinks(["wan"]), "2001:db8:1::a/64", "2001:db8:2::a/64"
    assert source_of(uplinks, wan(old)) == "2001:db8:1::a"
    assert source_of(uplinks, wan(old, deprecated=("2001:db8:1::a",))) == "2001:db8:1::a"
    assert source_of(uplinks, wan(new, old, deprecated=("2001:db8:1::a",))) == "2001:db8:2::a"


def test_an_interface_that_is_down_missing_or_without_address_is_no_way() -> None:
    for links in ([link("wan1", "192.0.2.2/24", up=False)], [], [link("wan1")], [link("wan1", "2001:db8:1::2/64")]):
        assert find(Uplinks(["wan1"]), *links)[0] is None


def test_an_address_names_the_interface_that_holds_it_first_and_stays_with_that() -> None:
    uplinks = Uplinks(["192.0.2.2"])
    assert way(find(uplinks, link("a", "192.0.2.2/24"))).interface == "a"
    moved = way(find(uplinks, link("a", "192.0.2.77/24"), link("b", "192.0.2.2/24", index=3)))
    assert (moved.interface, moved.address) == ("a", ip("192.0.2.77"))  # renumbered: still the same interface
    assert way(find(uplinks, link("a", "192.0.2.77/24", "192.0.2.2/24"))).address == ip("192.0.2.2")


def test_an_address_that_turns_up_elsewhere_takes_the_path_with_it_if_its_interface_has_none() -> None:
    uplinks = Uplinks(["192.0.2.2"])
    find(uplinks, link("a", "192.0.2.2/24"))
    for rest in ([link("a")], [], [link("a", "2001:db8:1::2/64")]):
        uplinks.by_id[0].interface = "a"
        assert way(find(uplinks, *rest, link("b", "192.0.2.2/24", index=3))).interface == "b"
    assert find(uplinks, link("b"))[0] is None


def test_an_address_on_two_interfaces_must_be_a_name() -> None:
    twice = [link("a", "192.0.2.2/24"), link("b", "192.0.2.2/24", index=3)]
    with pytest.raises(ConfigError, match=r"-i 192\.0\.2\.2: a and b have this address; name the interface: -i a"):
        Uplinks(["192.0.2.2"]).check(twice)
    Uplinks(["a", "b"]).check(twice)
    found = find(Uplinks(["a", "b"]), *twice)
    assert way(found, 0).is_shared
    assert way(found, 1).is_shared


def test_the_family_is_that_of_the_address_given() -> None:
    both = link("a", "192.0.2.2/24", "2001:db8:1::2/64", gateways=("192.0.2.254", "fe80::1"))
    assert way(find(Uplinks(["192.0.2.2"]), both, servers="46")).server == V4
    assert way(find(Uplinks(["2001:db8:1::2"]), both, servers="46")).server == V6
    assert find(Uplinks(["2001:db8:1::2"]), both, servers="4")[0] is None


def test_for_a_name_the_family_is_the_one_that_has_a_route_ipv4_first_and_never_the_one_to_avoid() -> None:
    both = link("a", "192.0.2.2/24", "2001:db8:1::2/64", gateways=("192.0.2.254", "fe80::1"))
    assert way(find(Uplinks(["a"]), both, servers="46")).server == V4
    assert way(find(Uplinks(["a"]), both, servers="46", avoid={0: 4})).server == V6
    assert way(find(Uplinks(["a"]), both, servers="4", avoid={0: 4})).server == V4
    only6 = link("a", "192.0.2.2/24", "2001:db8:1::2/64", gateways=(None, "fe80::1"))
    assert way(find(Uplinks(["a"]), only6, servers="46")).server == V6


def test_a_link_without_gateway_and_a_server_on_the_link_need_none() -> None:
    ppp = link("ppp0", "192.0.2.2/32", gateways=("", None))
    assert way(find(Uplinks(["ppp0"]), ppp)).gateway is None
    lan = link("lan", "198.51.100.77/24", gateways=("198.51.100.254", None))
    assert way(find(Uplinks(["lan"]), lan)).gateway is None


def test_without_i_every_uplink_with_a_default_route_is_a_path_tunnels_apart() -> None:
    uplinks = Uplinks([])
    links = [
        link("lo", "127.0.0.1/8", gateways=NO_GATEWAY),
        link("eth0", "192.0.2.2/24"),
        link("wg0", "10.9.0.2/24", kind="wireguard", index=3),
        link("tun0", "10.8.0.2/24", kind="tun", index=4),
        link("mpt1", "10.0.1.2/24", index=5),
        link("mpt0", "10.0.1.2/24", index=6),
        link("docker0", "172.17.0.1/16", gateways=NO_GATEWAY, index=7),
        link("wwan0", "192.0.2.99/32", gateways=("", None), index=8),
    ]
    assert {each.interface for each in find(uplinks, *links).values() if each} == {"eth0", "wwan0"}


CLAT = link("clat", "192.0.0.1/32", kind="tun", gateways=("", None), index=3)
WWAN = link("wwan0", "2001:db8:1::2/64", gateways=(None, "fe80::1"))


def test_the_tun_of_a_clat_is_an_uplink_to_a_server_without_ipv6() -> None:
    ways = [each for each in find(Uplinks([]), WWAN, CLAT).values() if each is not None]
    assert ways == [Way("clat", 3, ip("192.0.0.1"), V4, None, carrier="wwan0", carrier_gateway=ip("fe80::1"))]
    told = environment("path-up", path_values(0, ways[0]))
    assert (told["MPT_CARRIER"], told["MPT_CARRIER_GATEWAY"]) == ("wwan0", "fe80::1")
    uplinks = Uplinks([])
    find(uplinks, WWAN, CLAT)
    assert {each.interface for each in find(uplinks, WWAN, CLAT, servers="46").values() if each} == {"wwan0"}
    assert way(find(Uplinks(["clat"]), CLAT)).carrier is None


def test_what_a_clat_has_translated_leaves_by_the_ipv6_default_route_of_lowest_metric() -> None:
    wlan = replace(link("wlan0", "2001:db8:2::2/64"), gateway6=Gateway(None, 50))
    assert way(find(Uplinks(["clat"]), WWAN, CLAT, wlan)).carrier == "wlan0"
    assert way(find(Uplinks(["wan"]), WWAN, link("wan", "192.0.2.2/24"))).carrier is None


def test_uplinks_found_keep_their_numbers_and_join_and_leave() -> None:
    uplinks = Uplinks([])
    a, b, c = (link(name, f"192.0.2.{n}/24", index=n) for n, name in enumerate("abc", 2))
    assert {n: w.interface for n, w in find(uplinks, a).items() if w} == {0: "a"}
    assert {n: w.interface for n, w in find(uplinks, b, a).items() if w} == {0: "a", 1: "b"}
    assert {n: w.interface for n, w in find(uplinks, b, c).items() if w} == {1: "b", 2: "c"}
    assert {n: w.interface for n, w in find(uplinks, c, b, a).items() if w} == {0: "a", 1: "b", 2: "c"}


def test_at_most_eight_uplinks_are_found_and_one_that_has_gone_yields_its_number() -> None:
    uplinks = Uplinks([])
    links = [link(f"e{n}", f"192.0.2.{n + 2}/24", index=n + 2) for n in range(10)]
    assert set(find(uplinks, *links)) == set(range(8))
    found = find(uplinks, *links[1:])
    assert way(found, 0).interface == "e8"
    assert way(found, 1).interface == "e1"


def test_advice_names_the_nearest() -> None:
    links = [link("wlan0", "192.0.2.2/24"), link("eth0", "198.51.100.7/24", index=3)]
    for name, close in (("wlan1", "wlan0"), ("192.0.2.3", "192.0.2.2")):
        uplinks = Uplinks([name])
        assert f"did you mean {close}?" in uplinks.advice(uplinks.by_id[0], links)
    uplinks = Uplinks(["zzz"])
    assert "see 'ip -brief address'" in uplinks.advice(uplinks.by_id[0], links)
