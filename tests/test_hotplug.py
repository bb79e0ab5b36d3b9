"""Interfaces that are pulled, renumbered and moved, programs that remove what is ours: the path comes back by itself.

All the while datagrams go both ways, and the other path loses none of them.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.lab import SERVER6
from mptunnel.traffic import Datagrams
from tests.running import Maker, Tunnel, note, note_flows, until, wait_until

if TYPE_CHECKING:
    from mptunnel.traffic import Flow

pytestmark = pytest.mark.netns

BACK_WITHIN = 2.0  # s of its address being there
BY_NAME = ["-i", "p1", "-i", "p2"]
STICKS = "192.168.8.100"  # what two identical sticks give their host


def make(make_tunnel: Maker, seed: int, **topology: Any) -> Tunnel:
    tunnel = make_tunnel(seed=seed, **topology)
    tunnel.begin(uplinks=BY_NAME)
    return tunnel


def replug(tunnel: Tunnel) -> str:
    tunnel.lab.unplug(1)
    time.sleep(0.4)
    tunnel.lab.plug(1)
    tunnel.lab.link(1, up=True)
    return tunnel.lab.client_address(1)


def replug_at_once(tunnel: Tunnel) -> str:
    """Gone and back between two looks at the host: only the index tells."""
    tunnel.lab.unplug(1)
    tunnel.lab.plug(1)
    tunnel.lab.link(1, up=True)
    return tunnel.lab.client_address(1)


def flap_at_once(tunnel: Tunnel) -> str:
    """Down and up between two looks: the kernel has emptied the path's table."""
    address = tunnel.lab.client_address(1)
    lease = f"route replace default via {tunnel.lab.gateway(1)} dev p1 metric 100"
    tunnel.lab.ip("cl", "link set p1 down", "link set p1 up", lease)
    return address


def new_lease(tunnel: Tunnel) -> str:
    return tunnel.lab.renumber(1)


def another_network(tunnel: Tunnel) -> str:
    tunnel.lab.ip("r1", "addr add 192.168.77.1/24 dev lan")
    tunnel.lab.ip("cl", "addr flush dev p1")
    time.sleep(0.3)
    tunnel.lab.ip("cl", "addr add 192.168.77.9/24 dev p1", "route add default via 192.168.77.1 dev p1 metric 100")
    return "192.168.77.9"


def no_carrier(tunnel: Tunnel) -> str:
    tunnel.lab.carrier(1, up=False)
    time.sleep(0.4)
    tunnel.lab.carrier(1, up=True)
    tunnel.lab.link(1, up=True)
    return tunnel.lab.client_address(1)


def no_gateway(tunnel: Tunnel) -> str:
    tunnel.lab.ip("cl", "route del default dev p1")
    time.sleep(0.4)
    tunnel.lab.ip("cl", f"route add default via {tunnel.lab.gateway(1)} dev p1 metric 100")
    return tunnel.lab.client_address(1)


CHANGES = {
    "pulled and plugged in": replug,
    "pulled and plugged in at once": replug_at_once,
    "down and up at once": flap_at_once,
    "another address": new_lease,
    "another network and gateway": another_network,
    "no carrier": no_carrier,
    "no gateway": no_gateway,
}


def seen(tunnel: Tunnel, what: str) -> list[dict[str, Any]]:
    """Return what `ip -json` shows of this at the client."""
    found: list[dict[str, Any]] = json.loads(tunnel.lab.run("cl", ["ip", "-json", *what.split()]) or "[]")
    return found


def stands(tunnel: Tunnel, number: int, interface: str, address: str) -> bool:
    """Whether a path has its rule and its table."""
    table = str(5200 + number)
    rules = [rule for rule in seen(tunnel, "rule") if rule["priority"] == 5200 + number]
    routes = [route for route in seen(tunnel, "-4 route show table all") if route.get("table") == table]
    return [rule["src"] for rule in rules] == [address] and [route["dev"] for route in routes] == [interface]


def wait_put_right(tunnel: Tunnel) -> None:
    """Wait until both paths have their rules and tables again."""
    addresses = {number: tunnel.lab.client_address(number + 1) for number in (0, 1)}
    wait_until(
        lambda: all(stands(tunnel, number, f"p{number + 1}", addresses[number]) for number in (0, 1)),
        "our rules and tables are there again",
        BACK_WITHIN,
    )


def check_whole(what: str, flows: tuple[Flow, Flow]) -> None:
    note_flows(what, *flows)
    for flow in flows:
        assert (flow.lost, flow.duplicated) == (0, 0)


LESS_COMMON = {"down and up at once", "pulled and plugged in at once", "no carrier", "no gateway"}
ALL_CHANGES = [pytest.param(each, marks=[pytest.mark.slow] if each in LESS_COMMON else []) for each in CHANGES]


@pytest.mark.parametrize("change", ALL_CHANGES)
def test_a_path_follows_its_interface_and_the_other_one_loses_nothing(make_tunnel: Maker, change: str) -> None:
    tunnel = make(make_tunnel, seed=91)
    before = tunnel.paths()["p1"]
    datagrams = Datagrams(tunnel.lab, 2.5, rate=500)
    until(datagrams.begun + 0.5)
    address = CHANGES[change](tunnel)
    there = time.monotonic()

    def is_back() -> bool:
        path = tunnel.paths().get("p1", {})
        works = path.get("state") == "up" and path["address"] == address and stands(tunnel, 0, "p1", address)
        return works and path["rx"] > 0

    wait_until(is_back, f"path 1 is back after: {change}", BACK_WITHIN)
    note(f"{change}: back {time.monotonic() - there:.2f} s after its address was there")
    check_whole(change, datagrams.finish())
    after = tunnel.paths()["p1"]
    assert after["id"] == before["id"]
    if address == before["address"] and "at once" not in change:
        assert after["seen_as"].split(":")[0] == before["seen_as"].split(":")[0]
    tunnel.lab.wire("p2").cut()
    check_whole(f"{change}, then path 1 alone", Datagrams(tunnel.lab, 0.5, rate=300).finish())


REMOVALS = {
    "the rule of path 1": ["rule del priority 5200"],
    "all our rules": ["rule del priority 5200", "rule del priority 5201"],
    "the table of path 1": ["route flush table 5200"],
    "both tables": ["route flush table 5200", "route flush table 5201"],
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_what_another_program_removes_of_our_paths_is_there_again_at_once(make_tunnel: Maker, removal: str) -> None:
    tunnel = make(make_tunnel, seed=92)
    datagrams = Datagrams(tunnel.lab, 1.2, rate=500)
    until(datagrams.begun + 0.5)
    begun = time.monotonic()
    tunnel.lab.ip("cl", *REMOVALS[removal])
    wait_put_right(tunnel)
    note(f"{removal}: there again after {time.monotonic() - begun:.2f} s")
    check_whole(removal, datagrams.finish())
    assert tunnel.log("cl").count("rules, routes or addresses of ours are gone") <= 2  # once for each path


def test_a_flush_of_all_rules_is_put_right(make_tunnel: Maker) -> None:
    """As a network manager does it at its start: everything goes, what it knows comes back."""
    tunnel = make(make_tunnel, seed=93)
    datagrams = Datagrams(tunnel.lab, 1.2, rate=500)
    until(datagrams.begun + 0.5)
    known = ["rule add priority 32766 lookup main", "rule add priority 32767 lookup default"]
    tunnel.lab.ip("cl", "rule flush", *known)
    begun = time.monotonic()
    wait_put_right(tunnel)
    note(f"flush: there again after {time.monotonic() - begun:.2f} s")
    flows = datagrams.finish()
    note_flows("flush of all rules", *flows)
    assert flows[0].lost <= 5  # while there is no main table, the sender itself gets "network is unreachable"
    assert flows[1].lost <= 5
    tunnel.wait_up("p1", "p2")


def test_what_is_removed_of_the_tunnel_itself_is_put_right(make_tunnel: Maker) -> None:
    tunnel = make(make_tunnel, seed=94)
    wait_until(lambda: len(seen(tunnel, "route show dev mpt0")) == 3, "the script has run")
    before = seen(tunnel, "route show dev mpt0")
    for removal in ("route flush dev mpt0", "addr flush dev mpt0", "link set mpt0 down", "route del 128.0.0.0/1"):
        tunnel.lab.ip("cl", removal)
        begun = time.monotonic()

        def is_back() -> bool:
            shown = [each["local"] for link in seen(tunnel, "-4 addr show dev mpt0") for each in link["addr_info"]]
            return shown == ["10.0.1.2"] and seen(tunnel, "route show dev mpt0") == before

        wait_until(is_back, f"all is back after {removal}", 10.0)
        note(f"{removal}: back after {time.monotonic() - begun:.2f} s")
    check_whole("after all that", Datagrams(tunnel.lab, 0.5, rate=300).finish())


@pytest.mark.slow
def test_a_program_that_goes_on_removing_our_rules_is_not_fought_without_end(make_tunnel: Maker) -> None:
    tunnel = make(make_tunnel, seed=95)
    removed, end = 0, time.monotonic() + 4.0
    while time.monotonic() < end:
        if any(rule["priority"] == 5200 for rule in seen(tunnel, "rule")):
            tunnel.lab.ip("cl", "rule del priority 5200")
            removed += 1
        time.sleep(0.02)
    note(f"{removed} removals in 4 s")
    assert 3 <= removed <= 7  # at once, then after 0.25 s, 0.5 s, 1 s, 2 s
    log = tunnel.log("cl")
    assert log.count("p1: rules, routes or addresses of ours are gone") == 1
    assert log.count("p1: another program goes on removing") == 1
    tunnel.wait_up("p2")


def test_two_sticks_with_the_same_address_and_gateway_work_by_their_names(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=96, strict_rp_filter=True)
    for number in (1, 2):
        tunnel.lab.ip(f"r{number}", "addr flush dev lan", "addr add 192.168.8.1/24 dev lan")
        tunnel.lab.ip("cl", f"addr flush dev p{number}", f"addr add {STICKS}/24 dev p{number}")
        tunnel.lab.ip("cl", f"route add default via 192.168.8.1 dev p{number} metric {100 * number}")
    tunnel.begin(uplinks=BY_NAME)
    assert {path["address"] for path in tunnel.paths().values()} == {STICKS}
    tunnel.wait_in()
    (peer,) = tunnel.status("sv")["peers"]
    seen_at = sorted(path["endpoint"].rsplit(":", 1)[0] for path in peer["paths"])
    assert seen_at == [tunnel.lab.public_address(1), tunnel.lab.public_address(2)]
    check_whole("both sticks", Datagrams(tunnel.lab, 0.5, rate=300).finish())
    for number in (1, 2):
        tunnel.lab.wire(f"p{number}").cut()
        check_whole(f"without stick {number}", Datagrams(tunnel.lab, 0.5, rate=300).finish())
        tunnel.lab.wire(f"p{number}").mend()
        tunnel.wait_up("p1", "p2")
    begun = time.monotonic()
    tunnel.lab.unplug(2)
    tunnel.lab.plug(2)
    tunnel.lab.ip("r2", "addr flush dev lan", "addr add 192.168.8.1/24 dev lan")
    lease = ["link set p2 up", f"addr add {STICKS}/24 dev p2", "route add default via 192.168.8.1 dev p2 metric 200"]
    tunnel.lab.ip("cl", *lease)
    tunnel.wait_up("p1", "p2", patience=begun + 3.0 - time.monotonic())
    tunnel.lab.wire("p1").cut()
    check_whole("the second stick after it was replugged", Datagrams(tunnel.lab, 0.5, rate=300).finish())


def test_without_i_uplinks_join_and_leave_by_themselves(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=97)
    tunnel.lab.ip("cl", "route del default dev p2")
    tunnel.begin(uplinks=[])
    assert set(tunnel.paths()) == {"p1"}
    tunnel.lab.link(2, up=True)
    tunnel.wait_up("p1", "p2", patience=BACK_WITHIN)
    ids = {name: path["id"] for name, path in tunnel.paths().items()}
    datagrams = Datagrams(tunnel.lab, 2.5, rate=300)
    until(datagrams.begun + 0.4)
    tunnel.lab.ip("cl", "route del default dev p1")
    wait_until(lambda: set(tunnel.paths()) == {"p2"}, "path 1 has left", BACK_WITHIN)
    mine = 5200 + ids["p1"]
    wait_until(lambda: not any(rule["priority"] == mine for rule in seen(tunnel, "rule")), "its rule has gone too")
    (peer,) = tunnel.status("sv")["peers"]
    assert [path["id"] for path in peer["paths"]] == [ids["p2"]]  # the server has been told
    tunnel.lab.link(1, up=True)
    tunnel.wait_up("p1", "p2", patience=BACK_WITHIN)
    assert {name: path["id"] for name, path in tunnel.paths().items()} == ids
    check_whole("an uplink leaves and comes back", datagrams.finish())


def test_paths_are_added_named_metered_and_taken_off_by_the_command_line(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=98)
    tunnel.begin(uplinks=["-i", "p1"])
    tunnel.must("cl", "paths", "add", "p2")
    tunnel.wait_up("p1", "p2", patience=BACK_WITHIN)
    tunnel.must("cl", "paths", "name", "p2", "van")
    tunnel.must("cl", "paths", "priority", "van", "standby")
    tunnel.must("cl", "paths", "metered", "p1", "5GB", "--reset-day", "7")
    datagrams = Datagrams(tunnel.lab, 1.2, rate=300)
    until(datagrams.begun + 0.3)
    before = tunnel.lab.wire("p2").counts()
    time.sleep(0.6)
    after = tunnel.lab.wire("p2").counts()
    check_whole("path 2 stands by", datagrams.finish())
    assert (
        after.up.packets - before.up.packets + after.down.packets - before.down.packets <= 4
    )  # probes and their echoes
    shown = tunnel.must("cl", "paths", "list")
    note(shown)
    assert "van" in shown
    assert "5.0 GB" in shown
    tunnel.stop("cl")
    tunnel.connect(uplinks=["-i", "p1"])
    tunnel.wait_up("p1", "p2")
    first, second = json.loads(tunnel.must("cl", "paths", "list", "--json"))
    assert first["metered"]["used"] > 400 * 200  # what went before the restart is counted still
    assert (second["label"], second["priority"], second["added"]) == ("van", "standby", True)
    near = f"{first['metered']['used'] // 1000 + 60}kB"
    tunnel.must("cl", "paths", "metered", "p1", near, "--reset-day", "7")
    assert tunnel.status()["paths"][0]["use"] == "data"
    check_whole("path 1 reaches its limit", Datagrams(tunnel.lab, 1.2, rate=300).finish())
    wait_until(lambda: tunnel.status()["paths"][0]["use"] == "standby", "path 1 stands by, for it is spent")
    tunnel.must("cl", "paths", "metered", "p1", "off")
    tunnel.must("cl", "paths", "remove", "van")
    wait_until(lambda: set(tunnel.paths()) == {"p1"}, "path 2 is gone")
    code, _, said = tunnel.do("sv", "paths", "list")
    assert code == 3, said


@pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_what_stands_is_not_put_back(make_tunnel: Maker, family: int) -> None:
    """Also after looks at the host that other programs' changes cause."""
    tunnel = make_tunnel(seed=99, ipv6=family == 6)
    if family == 6:
        uplinks = [word for path in (1, 2) for word in ("-i", tunnel.lab.client_address6(path))]
        tunnel.begin(uplinks=uplinks, server=SERVER6)
    else:
        tunnel.begin(uplinks=BY_NAME)
    wait_until(lambda: len(seen(tunnel, "route show dev mpt0")) == 3, "the script has run")
    for number in range(4):
        tunnel.lab.ip("cl", f"addr add 10.99.{number}.1/24 dev p1")
        time.sleep(0.3)
    assert "are gone" not in tunnel.log("cl")
    rules = seen(tunnel, f"-{family} rule")
    assert {rule["priority"] for rule in rules} >= {5200, 5201}
    tunnel.lab.run("cl", ["ip", f"-{family}", "rule", "del", "priority", "5201"])
    wait_until(lambda: seen(tunnel, f"-{family} rule") == rules, "the rule is there again", BACK_WITHIN)
