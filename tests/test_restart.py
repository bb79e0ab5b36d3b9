"""Ends and beginnings: either side dies and is started again, or begins before there is any way to the other."""

from __future__ import annotations

import time

import pytest

from mptunnel.traffic import Datagrams
from tests.running import Maker, note, until

pytestmark = pytest.mark.netns


def test_a_server_that_was_killed_carries_traffic_within_three_seconds_of_its_start(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=31)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, 4.0, rate=200)
    until(datagrams.begun + 0.5)
    tunnel.kill("sv")
    killed_at = time.monotonic()
    tunnel.start("sv", "-s")
    up, down = datagrams.finish()
    for name, flow in (("up", up), ("down", down)):
        gap = flow.longest_gap(after=killed_at)
        note(f"server killed and started, {name}: {gap:.2f} s without a datagram, {flow.lost} lost")
        assert 0.1 < gap < 3.0
        assert flow.duplicated == 0
        assert max(flow.arrived_at_ns) / 1e9 > datagrams.begun + 3.9, "and it stays"


def test_a_client_that_was_killed_carries_traffic_within_a_second_of_its_start(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=32)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, 3.0, rate=200)
    until(datagrams.begun + 0.5)
    tunnel.kill("cl")
    started_at = time.monotonic()
    tunnel.connect()
    up, down = datagrams.finish()
    for name, flow in (("up", up), ("down", down)):
        back = min(at / 1e9 for at in flow.arrived_at_ns if at / 1e9 > started_at + 0.05) - started_at
        note(f"client killed and started, {name}: a datagram {back:.2f} s after its start")
        assert back < 2.0  # one on a machine that does nothing else
        assert flow.duplicated == 0


def test_a_client_waits_for_its_server_and_says_so_once(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=35)
    tunnel.begin()
    tunnel.stop("sv", "cl")
    tunnel.connect()
    tunnel.wait_log("cl", "warning: 198.51.100.1:5000 does not answer on any path")
    time.sleep(1.0)
    tunnel.serve()
    note(f"up {tunnel.wait_up():.2f} s after the server")
    assert tunnel.log("cl").count("does not answer") == 1
    tunnel.stop("sv")
    tunnel.wait_log("cl", "warning: 198.51.100.1:5000 has stopped")
    tunnel.serve()
    tunnel.wait_in()


def test_a_client_whose_links_are_all_down_waits_for_the_first_that_appears(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=33, links_up=False)
    token = tunnel.token_file(tunnel.token())
    tunnel.serve()
    tunnel.start("cl", "-c", "198.51.100.1", "-i", "p1", "-i", "p2", "--dns", "keep", "--join", token)
    tunnel.wait_log("cl", "path p2 waits: p2 is down")
    time.sleep(0.5)
    assert tunnel.status()["state"] == "connecting"
    tunnel.lab.link(2, up=True)
    note(f"up {tunnel.wait_up('p2'):.2f} s after the link")
    assert tunnel.paths()["p1"]["state"] == "waiting"
    assert "1 received" in tunnel.lab.run("cl", ["ping", "-c1", "-W2", "203.0.113.2"])
    tunnel.lab.link(1, up=True)
    tunnel.wait_up("p1", "p2")


def test_an_interface_that_is_plugged_in_again_is_used_again(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=34)
    tunnel.begin()
    datagrams = Datagrams(tunnel.lab, 4.0, rate=500)
    until(datagrams.begun + 0.5)
    tunnel.lab.unplug(1)
    time.sleep(0.7)
    tunnel.lab.plug(1)
    tunnel.lab.link(1, up=True)
    tunnel.wait_up("p1", "p2")
    tunnel.lab.wire("p2").cut()
    for flow in datagrams.finish():
        assert (flow.lost, flow.duplicated) == (0, 0)
