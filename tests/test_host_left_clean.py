"""The host is left as it was: addresses, routes, rules, nft, sysctls, resolver; after a clean end and after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mptunnel.lab import TARGET
from tests.running import PATIENCE, Maker, Tunnel, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.netns

# Somebody is logged in: answers every line on port 22.
SSHD = """
import socket
with socket.create_server(("", 22)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(99):
            connection.sendall(data)
"""
# And works: sends each line of stdin there, prints the answer.
SSH = """
import socket, sys
with socket.create_connection((sys.argv[1], 22), 5) as connection:
    connection.settimeout(5)
    for line in sys.stdin:
        connection.sendall(line.encode())
        print(connection.recv(99).decode(), end="", flush=True)
"""
LET_SSH_IN = """
flush chain inet lab forward
table ip ssh {
    chain in { type nat hook prerouting priority -100; tcp dport 22 dnat to 192.168.11.2; }
}
"""


def both(tunnel: Tunnel) -> dict[str, list[str]]:
    return {role: tunnel.look(role) for role in ("cl", "sv")}


def wait_set_up(tunnel: Tunnel) -> None:
    """Wait until the client's device has its routes and its final MTU, and the server's route to it too."""

    def is_set_up() -> bool:
        seen = tunnel.lab.run("cl", ["sh", "-c", "ip route; ip link show mpt0"])
        there = tunnel.lab.run("sv", ["ip", "route"])  # told of a change at most once a second
        return "0.0.0.0/1 dev mpt0" in seen and "mtu 1420" in seen and "mtu 1420" in there

    wait_until(is_set_up, "the client has set up its host")


def clean_end(tunnel: Tunnel) -> None:
    tunnel.stop("cl", "sv")


def impatient_end(tunnel: Tunnel) -> None:
    """Somebody who says it again and again, and closes the terminal."""
    for place in ("cl", "sv"):
        process = tunnel.running.pop(place)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.03)
        assert process.wait(PATIENCE) == 0, tunnel.log(place)


def kill_and_cleanup(tunnel: Tunnel) -> None:
    tunnel.kill("cl", "sv")
    for role in ("cl", "sv"):
        tunnel.must(role, "cleanup")


def kill_and_clean_end_of_the_next(tunnel: Tunnel) -> None:
    tunnel.kill("cl", "sv")
    tunnel.serve()
    tunnel.connect()
    tunnel.wait_up()
    tunnel.stop("cl", "sv")


@pytest.mark.parametrize("end", [clean_end, impatient_end, kill_and_cleanup, kill_and_clean_end_of_the_next])
def test_both_hosts_are_as_they_were_after(make_tunnel: Maker, end: Callable[[Tunnel], None]) -> None:
    tunnel = make_tunnel(seed=51, ipv6=True)
    before = both(tunnel)
    tunnel.begin("--dns", "9.9.9.9")
    wait_set_up(tunnel)
    for role, seen in both(tunnel).items():
        for what in ('"mpt0"', "table inet mptunnel_mpt0"):
            assert any(what in line for line in set(seen) - set(before[role])), f"{role} is set up: {what}"
    assert tunnel.lab.run("sv", ["cat", "/proc/sys/net/ipv4/ip_forward"]) == "1\n"
    end(tunnel)
    after = both(tunnel)
    for role, seen in before.items():
        assert after[role] == seen


@pytest.mark.parametrize("after", [0.1, 0.4, 0.7, 1.0])
def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(make_tunnel: Maker, after: float) -> None:
    tunnel = make_tunnel(seed=52, ipv6=True)
    before = tunnel.look("sv")
    process = tunnel.start("sv", "-s")
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    tunnel.running.pop("sv")
    assert tunnel.look("sv") == before


def test_what_nohup_began_outlives_the_terminal(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=53)
    process = tunnel.lab.spawn("sv", ["nohup", *tunnel.command("sv", "-s")])
    tunnel.running["sv"] = process
    wait_until(lambda: tunnel.status("sv"), "the server listens")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert tunnel.status("sv")
    tunnel.stop("sv")


def test_cleanup_leaves_alone_what_runs(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=52)
    tunnel.begin()
    wait_set_up(tunnel)
    running = both(tunnel)
    for role in ("cl", "sv"):
        assert tunnel.do(role, "cleanup")[0] == 0
        code, _, said = tunnel.do(role, "cleanup", "mpt0")
        assert (code, "mpt0 is in use by process" in said) == (2, True), said
    assert both(tunnel) == running


def test_who_is_logged_in_over_an_uplink_stays_so(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=53, strict_rp_filter=True)
    lab, pipe = tunnel.lab, subprocess.PIPE
    lab.run("r1", ["nft", "-f", "-"], given=LET_SSH_IN)
    sshd = lab.spawn("cl", [sys.executable, "-c", SSHD], stdout=pipe)
    assert sshd.stdout
    sshd.stdout.readline()
    session = lab.spawn("inet", [sys.executable, "-c", SSH, lab.public_address(1)], stdin=pipe, stdout=pipe, text=True)
    asked, answered = session.stdin, session.stdout
    assert asked
    assert answered

    def say(words: str) -> str:
        asked.write(words + "\n")
        asked.flush()
        return str(answered.readline())

    assert say("before") == "before\n"
    tunnel.begin()
    wait_set_up(tunnel)
    assert "dev mpt0" in lab.run("cl", ["ip", "route", "get", TARGET])
    assert say("full tunnel") == "full tunnel\n"
    tunnel.stop("cl")
    assert say("after") == "after\n"
