"""Real paths in real trouble: errors of the kernel, sizes that do not pass, IPv6, a server with two addresses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mptunnel.lab import SERVER6, TARGET, TARGET6
from mptunnel.traffic import Datagrams, Download, content_sha256, serve_web
from tests.running import Maker, Tunnel, note, note_flows, until, wait_until

if TYPE_CHECKING:
    from mptunnel.traffic import Flow

pytestmark = pytest.mark.netns

OTHER_SERVER6 = "2001:db8:5::99"
FIREWALL = "add table inet trouble; add chain inet trouble out {{ type filter hook output priority 0; }}; \
add rule inet trouble out oifname p1 udp dport 5000 {}\n"

TROUBLES = {  # what is done to path 1 at the client, and how it is taken back
    "a firewall drops (EPERM)": (f"nft '{FIREWALL.format('drop')}'", "nft delete table inet trouble"),
    "a firewall rejects (EPERM too)": (f"nft '{FIREWALL.format('reject')}'", "nft delete table inet trouble"),
    "a small MTU of the link (EMSGSIZE)": ("ip link set p1 mtu 800", "ip link set p1 mtu 1500"),
    "no route (no error at all: a bound socket takes the link)": (
        "ip route replace unreachable default table 5200",
        "ip route replace default via 192.168.11.1 dev p1 table 5200 proto kernel onlink",
    ),
}


def check_all_arrived(what: str, flows: tuple[Flow, Flow]) -> None:
    note_flows(what, *flows)
    for flow in flows:
        assert (flow.lost, flow.duplicated) == (0, 0)


def wait_mtu(tunnel: Tunnel, mtu: int) -> None:
    """Wait until this is the MTU of the tunnel, of the client's device, and of the server's routes to the client."""
    wait_until(lambda: tunnel.status()["tunnel"]["mtu"] == mtu, f"the tunnel's MTU is {mtu}")
    wait_until(lambda: f"mtu {mtu} " in tunnel.lab.run("cl", ["ip", "link", "show", "mpt0"]), "and the device's")
    wait_until(lambda: f"mtu {mtu}" in tunnel.lab.run("sv", ["ip", "route"]), "and the server's, for this client")


def test_any_error_on_one_path_is_the_affair_of_that_path(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=81)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, len(TROUBLES) * 1.2, rate=300, size=1000)
    for trouble, mending in TROUBLES.values():
        tunnel.lab.run("cl", ["sh", "-ec", trouble])
        time.sleep(0.8)
        tunnel.lab.run("cl", ["sh", "-ec", mending])
    check_all_arrived("errors on path 1", datagrams.finish())
    tunnel.wait_up("p1", "p2")
    errors = tunnel.paths()["p1"]["errors"]
    note(f"errors on path 1: {errors}")
    assert set(errors) >= {"EPERM", "EMSGSIZE"}
    assert not tunnel.paths()["p2"]["errors"]


def test_a_path_that_swallows_large_packets_loses_nothing_for_the_other(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=82)
    tunnel.begin()
    wait_mtu(tunnel, 1420)
    tunnel.lab.wire("p1").set(mtu=1300)
    check_all_arrived("path 1 swallows large packets", Datagrams(tunnel.lab, 1.5, rate=300, size=1372).finish())
    assert tunnel.lab.wire("p1").counts().up.too_long > 100
    assert tunnel.paths()["p1"]["state"] in {"up", "slow"}, "small ones pass"


def test_the_tunnel_takes_the_size_that_every_path_carries(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=83)
    for name, mtu in (("p1", 1500), ("p2", 1420)):
        tunnel.lab.wire(name).set(mtu=mtu)
    serve_web(tunnel.lab)
    tunnel.begin()
    wait_mtu(tunnel, 1360)
    tunnel.lab.wire("p1").cut()
    done = Download(tunnel.lab, 2_000_000).finish()
    assert done.sha256 == content_sha256(2_000_000), done.error
    assert tunnel.lab.wire("p2").counts().down.too_long < 20, "but for the probes of the beginning"


def test_a_size_that_passes_no_more_is_given_up_before_a_transfer_is(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=89)
    serve_web(tunnel.lab)
    tunnel.begin()
    wait_mtu(tunnel, 1420)
    transfer = Download(tunnel.lab, 2_000_000, rate=1_000_000)
    wait_until(lambda: transfer.poll().received > 500_000, "the transfer is under way")
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).set(mtu=1400)
    done = transfer.finish()
    assert done.sha256 == content_sha256(2_000_000), done.error
    note(f"MTU of both paths down to 1400: the transfer stood still for {done.longest_stall():.1f} s")
    wait_mtu(tunnel, 1280)


def test_half_of_one_path_and_the_other_half_of_another_make_a_whole_one(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=90)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, 5.5, rate=300)
    until(datagrams.begun + 0.5)
    tunnel.lab.wire("p1").up.cut()
    time.sleep(0.3)
    tunnel.lab.wire("p2").down.cut()
    check_all_arrived("up by path 2, down by path 1", datagrams.finish())


@pytest.mark.slow
def test_the_two_halves_live_through_a_renewal_of_the_keys(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=91)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, 140.0, rate=200)
    until(datagrams.begun + 0.5)
    tunnel.lab.wire("p1").up.cut()
    tunnel.lab.wire("p2").down.cut()
    until(datagrams.begun + 135.0)
    assert tunnel.status()["server"]["session_age"] < 20.0
    assert [path["carries"] for path in tunnel.status()["paths"]] == [["down"], ["up"]]
    check_all_arrived("up by path 2, down by path 1, for 140 s", datagrams.finish())
    assert "tunnel silent" not in tunnel.log("cl")


def test_ipv6_outside_carries_both_families_inside(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=84, ipv6=True, strict_rp_filter=True)
    tunnel.begin(server=SERVER6, uplinks=["-i", tunnel.lab.client_address6(1), "-i", "p2"])
    assert tunnel.status()["server"]["address"] == SERVER6
    six, four = (Datagrams(tunnel.lab, 2.5, rate=300, address=address) for address in (TARGET6, TARGET))
    time.sleep(0.5)
    tunnel.lab.wire("p1").cut()
    time.sleep(0.5)
    tunnel.lab.wire("p1").mend()
    time.sleep(0.5)
    tunnel.lab.renumber(2)
    check_all_arrived("IPv6 in IPv6", six.finish())
    check_all_arrived("IPv4 in IPv6", four.finish())


def test_ipv4_outside_carries_ipv6_inside(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=85, ipv6=True)
    tunnel.begin()
    assert all("." in path["address"] for path in tunnel.paths().values())
    tunnel.lab.wire("p2").cut()
    check_all_arrived("IPv6 in IPv4", Datagrams(tunnel.lab, 1.0, rate=300, address=TARGET6).finish())


def test_a_server_answers_from_the_address_it_was_asked_on(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=86, ipv6=True)
    tunnel.lab.ip("sv", f"addr add {OTHER_SERVER6}/64 dev pub preferred_lft 0")  # never the kernel's own choice
    token = tunnel.token_file(tunnel.token())
    tunnel.serve()
    tunnel.connect("--join", token, server=OTHER_SERVER6, uplinks=["-i", "p1", "-i", "p2"])
    tunnel.wait_up()
    check_all_arrived("a second address", Datagrams(tunnel.lab, 0.5, rate=300).finish())


def test_without_i_every_uplink_is_a_path(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(paths=3, seed=87)
    tunnel.begin(uplinks=[])
    assert set(tunnel.paths()) == {"p1", "p2", "p3"}
    tunnel.lab.link(2, up=False)
    wait_until(lambda: tunnel.paths().get("p2", {}).get("state") != "up", "path 2 is away")
    tunnel.lab.link(2, up=True)
    tunnel.wait_up("p1", "p2", "p3")


def shared_address(tunnel: Tunnel) -> None:
    """Give both uplinks the same address and gateway, as two identical LTE sticks do."""
    lab = tunnel.lab
    lab.ip("r2", "addr del 192.168.12.1/24 dev lan", "addr add 192.168.11.1/24 dev lan")
    lab.ip(
        "cl",
        "addr del 192.168.12.2/24 dev p2",
        "addr add 192.168.11.2/24 dev p2 noprefixroute",
        "route replace default via 192.168.11.1 dev p2 metric 200 onlink",
    )


def test_two_uplinks_with_the_same_address_are_two_paths(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=88, strict_rp_filter=True)
    shared_address(tunnel)
    tunnel.begin(uplinks=["-i", "p1", "-i", "p2"])
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).cut()
        check_all_arrived(f"without {name}", Datagrams(tunnel.lab, 0.7, rate=300).finish())
        tunnel.lab.wire(name).mend()
        tunnel.wait_up()
