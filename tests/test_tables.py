"""Our firewall rules and those who take them away: a service that starts anew flushes everything, ours as well."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mptunnel.traffic import Datagrams
from tests.running import note, note_flows, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.running import Tunnel

    Maker = Callable[..., Tunnel]

pytestmark = pytest.mark.netns
OURS = "table inet mptunnel_mpt0"


def rules(tunnel: Tunnel, place: str) -> str:
    """What nft shows of our table, without what it counts; nothing if there is none."""
    said = tunnel.lab.run(place, ["nft", "-s", "list", "ruleset"])
    return said[said.index(OURS) :] if OURS in said else ""


@pytest.mark.parametrize("place", ["sv", "cl"])
def test_a_flush_of_the_whole_ruleset_is_put_right(make_tunnel: Maker, place: str) -> None:
    tunnel = make_tunnel(seed=97)
    tunnel.begin()
    before = wait_until(lambda: rules(tunnel, place), "the table is there")
    datagrams = Datagrams(tunnel.lab, 2.0, rate=300)
    time.sleep(0.5)
    begun = time.monotonic()
    tunnel.lab.run(place, ["nft", "flush", "ruleset"])
    wait_until(lambda: rules(tunnel, place) == before, "the table is there again, as it was")
    took = time.monotonic() - begun
    note(f"nft flush ruleset at {place}: there again after {took:.2f} s")
    flows = datagrams.finish()
    note_flows(f"nft flush ruleset at {place}", *flows)
    assert tunnel.log(place).count("firewall rules of ours are gone") == 1
    later = Datagrams(tunnel.lab, 0.5, rate=300).finish()
    assert [flow.lost for flow in later] == [0, 0]


FIREWALL = """add table inet firewalld
add chain inet firewalld forward { type filter hook forward priority 10; policy accept; }
add rule inet firewalld forward ct state established,related accept
add rule inet firewalld forward reject"""


def test_a_firewall_that_starts_or_reads_its_rules_again_lets_our_traffic_through(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=98)
    tunnel.begin()
    comment = 'comment "mptunnel mpt0"'
    for number in range(2):  # it starts; then it reads its rules again
        again = "delete table inet firewalld\n" if number else ""
        begun = time.monotonic()
        for line in (again + FIREWALL).splitlines():
            tunnel.lab.run("sv", ["nft", line])
        shown = wait_until(
            lambda: (
                text if comment in (text := tunnel.lab.run("sv", ["nft", "list", "table", "inet", "firewalld"])) else ""
            ),
            "it lets us through",
        )
        note(f"another firewall has come: let through after {time.monotonic() - begun:.2f} s")
        assert shown.count(comment) == 2
        flows = Datagrams(tunnel.lab, 0.5, rate=300).finish()
        assert [flow.lost for flow in flows] == [0, 0]
        time.sleep(4.0)  # it is not asked more often than every 5 s
