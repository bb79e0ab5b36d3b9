"""A path is an interface: what `-i` said, held against what the host shows."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import pytest

from mptunnel.config import Gateway, Link
from mptunnel.errors import ConfigError
from mptunnel.uplinks import Uplinks, Way

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

ip = ipaddress.ip_address
V4, V6 = ip("198.51.100.1"), ip("2001:db8::1")
NO_GATEWAY: tuple[None, None] = (None, None)


def link(
    name: str, *addresses: str, index: int = 2, up: bool = True, kind: str = "",
    gateways: tuple[str | None, str | None] = ("192.0.2.254", None),
) -> Link:  # fmt: skip
    via4, via6 = (None if via is None else Gateway(ip(via) if via else None, 100) for via in gateways)
    return Link(name, index, kind, up, tuple(map(ipaddress.ip_interface, addresses)), via4, via6, 1500)


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
