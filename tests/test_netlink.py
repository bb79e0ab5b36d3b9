"""What is read of the kernel's picture of the network, and what wakes us."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel import netlink
from mptunnel.config import Gateway, Link
from mptunnel.errors import HostError
from mptunnel.netlink import (
    Monitor,
    TableWatch,
    has_chain_of_others,
    parse_connections,
    parse_links,
    parse_table_events,
    snapshot,
)
from tests.machines import machines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machines import Machine


def link(**fields: Any) -> dict[str, Any]:
    return {"ifindex": 7, "ifname": "wlan0", "flags": ["UP", "LOWER_UP"], "operstate": "UP", "mtu": 1500, **fields}


def address(local: str, prefix: int = 24, scope: str = "global", **more: Any) -> dict[str, Any]:
    return {"local": local, "prefixlen": prefix, "scope": scope, **more}


def test_a_link_is_what_ip_shows_of_it() -> None:
    shown = link(
        linkinfo={"info_kind": "tun"},
        addr_info=[
            address("10.1.0.2"),
            address("10.1.0.3", deprecated=True),
            address("2001:db8::9", 64, tentative=True),
            address("2001:db8::8", 64, dadfailed=True),
            address("2001:db8::2", 64, temporary=True),
            address("fe80::2", 64, "link"),
            address("127.0.0.2", 8, "host"),
            {"index": 3},
            address("10.64.0.2", 32, address="10.64.0.1"),
        ],
    )
    assert parse_links([shown, {}], [], []) == (
        Link(
            "wlan0",
            7,
            "tun",
            up=True,
            addresses=tuple(map(ip_interface, ("10.1.0.2/24", "2001:db8::2/64", "10.64.0.2/32", "10.1.0.3/24"))),
            gateway4=None,
            gateway6=None,
            mtu=1500,
            deprecated=frozenset({ip_address("10.1.0.3")}),
        ),
    )


@pytest.mark.parametrize(
    ("flags", "state", "up"),
    [
        (["UP", "LOWER_UP"], "UP", True),
        (["UP", "LOWER_UP", "POINTOPOINT"], "UNKNOWN", True),
        (["UP", "NO-CARRIER"], "UNKNOWN", False),
        (["UP", "LOWER_UP"], "DORMANT", False),
        (["UP"], "DOWN", False),
        (["UP"], "LOWERLAYERDOWN", False),
        (["BROADCAST"], "UP", False),
    ],
)
def test_a_link_is_up_when_set_up_and_with_carrier(flags: list[str], state: str, *, up: bool) -> None:
    assert parse_links([link(flags=flags, operstate=state)], [], [])[0].up is up


def test_the_default_route_of_lowest_metric_counts_for_each_link() -> None:
    routes4 = [
        {"dst": "default", "gateway": "10.1.0.9", "dev": "wlan0", "metric": 600},
        {"dst": "default", "gateway": "10.1.0.1", "dev": "wlan0", "prefsrc": "10.1.0.2", "metric": 100},
        {"dst": "default", "dev": "ppp0"},
        {"type": "unreachable", "dst": "default", "dev": "lo", "metric": 1},
        {"dst": "default", "via": {"family": "inet6", "host": "fe80::1"}, "dev": "wwan0", "metric": 7},
    ]
    hops = [{"gateway": "fe80::1", "dev": "wlan0", "weight": 1}, {"dev": "ppp0", "weight": 1}]
    routes6 = [{"dst": "default", "metric": 1024, "nexthops": hops}]
    names = ("wlan0", "ppp0", "wwan0", "lo")
    found = parse_links([link(ifname=name) for name in names], routes4, routes6)
    assert [each.gateway4 for each in found] == [
        Gateway(IPv4Address("10.1.0.1"), 100, IPv4Address("10.1.0.2")),
        Gateway(None, 0),
        Gateway(IPv6Address("fe80::1"), 7),
        None,
    ]
    assert [each.gateway6 for each in found] == [Gateway(IPv6Address("fe80::1"), 1024), Gateway(None, 1024), None, None]


CONNECTIONS = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 0200010A:0016 0700CB71:C001 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0
   2: 0200010A:0016 0700CB71:C002 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0
   3: 0200010A:C003 0700CB71:0016 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0
   4: 0100007F:0016 0100007F:C004 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0
   5: 0200010A:0050 0800CB71:C005 06 00000000:00000000 00:00000000 00000000     0        0 5 1 0
   6: 0200010A:01BB 0900CB71:C006 01 00000000:00000000 00:00000000 00000000     0        0 6 1 0
"""
CONNECTIONS6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr
   0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0
   1: 0000000000000000FFFF00000200010A:01BB 0000000000000000FFFF00000A00CB71:C001 01 00000000:00000000 00:0
   2: B80D0120000000000000000002000000:0016 B80D0120000000000000000099000000:C001 01 00000000:00000000 00:0
   3: 000080FE000000000000000002000000:0016 000080FE000000000000000099000000:C001 01 00000000:00000000 00:0
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="the sample is of a little-endian machine")
def test_connections_of_others_to_us_are_kept_those_of_ssh_first() -> None:
    pairs = parse_connections(CONNECTIONS6 + CONNECTIONS)
    assert [f"{local} {remote}" for local, remote in pairs] == [
        "2001:db8::2 2001:db8::99",
        "10.1.0.2 113.203.0.7",
        "10.1.0.2 113.203.0.10",
        "10.1.0.2 113.203.0.9",
    ]
    assert parse_connections("") == ()


@pytest.mark.skipif(sys.byteorder != "little", reason="the sample is of a little-endian machine")
def test_a_busy_server_does_not_get_a_rule_for_everybody() -> None:
    listen = CONNECTIONS6.splitlines()[1]
    rows = [f" 1: 0200010A:01BB {number:08X}:C001 01 0" for number in range(0x01000008, 0x01000208)]
    assert len(parse_connections("\n".join([listen, *rows]))) == 64


def test_our_own_connections_are_read_as_they_are() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        text = Path("/proc/self/net/tcp").read_text(encoding="ascii")
        ends = {netlink._endpoint(line.split()[1]) for line in text.splitlines()[1:]}
        assert (ip_address("127.0.0.1"), client.getsockname()[1]) in ends
    assert all(not here.is_loopback for here, _ in netlink.kept_connections())


@given(st.binary(max_size=64))
def test_any_bytes_are_read_as_events_without_an_error(data: bytes) -> None:
    assert netlink._is_news(data) in {True, False}


class Deaf:
    """A socket whose kernel buffer ran over, then is empty."""

    def __init__(self, *errors: OSError) -> None:
        self.errors = [*errors, BlockingIOError()]

    def recv(self, size: int) -> bytes:
        del size
        raise self.errors.pop(0)


def test_lost_events_count_as_a_change_and_other_errors_are_told() -> None:
    monitor = Monitor()
    monitor.close()
    monitor._socket = Deaf(OSError(errno.ENOBUFS, "overrun"))  # type: ignore[assignment]
    assert monitor.drain() is True
    assert monitor._socket.errors == []  # type: ignore[attr-defined]
    monitor._socket = Deaf(OSError(errno.EBADF, "closed"))  # type: ignore[assignment]
    with pytest.raises(OSError, match="closed"):
        monitor.drain()


def test_without_ip_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="ip: not found; install iproute2"):
        snapshot()


@pytest.mark.parametrize(("text", "message"), [("exit 1", "exit code 1"), ("echo no; exit 0", "no JSON")])
def test_an_ip_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ip").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=message):
        snapshot()


def test_a_kernel_without_ipv6_has_links_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = subprocess.run(["sh", "-c", "command -v ip"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "ip").write_text(f'#!/bin/sh\ncase "$*" in *-6*) exit 2 ;; esac\nexec {real} "$@"\n')
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "lo" in {each.name for each in snapshot()}


# -- in a namespace ------------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[Machine]:
    for (made,) in machines(1):
        yield made


# Prints what `drain` says after each line of stdin, once something has come or nothing has for a while.
LISTEN = """
import select, sys
from mptunnel.netlink import Monitor
monitor = Monitor()
print("ready", flush=True)
for line in sys.stdin:
    news = False
    while select.select([monitor], [], [], 0.1)[0]:
        news = monitor.drain() or news
    print("news" if news else "quiet", flush=True)
"""


@pytest.mark.netns
def test_links_addresses_routes_and_rules_of_both_families_wake_us(machine: Machine) -> None:
    listener = machine.start(LISTEN)

    def after(command: str) -> str:
        machine.sh(command)
        listener.lines.clear()
        listener.send(b"")
        return listener.wait(lambda line: line in {"news", "quiet"}) or ""

    assert after(":") == "quiet"
    for command in (
        "ip link add wan type veth peer name far",
        "ip link set wan up",
        "ip link set far up",
        "ip addr add 10.1.0.2/24 dev wan",
        "ip -6 addr add 2001:db8::2/64 dev wan",
        "ip route add default via 10.1.0.1",
        "ip -6 route add default via 2001:db8::1",
        "ip rule add from 10.1.0.2 lookup 7",
        "ip -6 rule add from 2001:db8::2 lookup 7",
        "ip rule del from 10.1.0.2",
        "ip -6 rule del from 2001:db8::2",
        "ip route del default",
        "ip -6 route del default",
        "ip addr del 10.1.0.2/24 dev wan",
        "ip -6 addr del 2001:db8::2/64 dev wan",
        "ip link del wan",
    ):
        assert (command, after(command)) == (command, "news")
    assert after(":") == "quiet"


@pytest.mark.netns
def test_a_snapshot_shows_the_machine_as_it_is(machine: Machine) -> None:
    machine.sh("ip link add wan type veth peer name far; ip link set wan up mtu 1400; ip link set far up")
    machine.sh("ip addr add 10.1.0.2/24 dev wan; ip -6 addr add 2001:db8::2/64 dev wan; ip tuntap add mpt0 mode tun")
    machine.sh("ip addr add 10.1.0.3/24 dev wan; ip addr change 10.1.0.2/24 dev wan valid_lft 600 preferred_lft 0")
    machine.sh("ip route add default via 10.1.0.1 dev wan src 10.1.0.3 metric 50")
    machine.sh("ip -6 route add default dev wan metric 60")
    machine.sh("ip route add 0.0.0.0/1 via 10.1.0.1; ip route add default via 10.1.0.9 dev wan table 7")
    code = (
        "import json, dataclasses; from mptunnel.netlink import snapshot\n"
        "print(json.dumps([dataclasses.asdict(link) for link in snapshot()], default=str))"
    )
    done = machine.run(sys.executable, "-c", code)
    assert not done.returncode, done.stderr
    found = {each.pop("name"): each for each in json.loads(done.stdout)}
    assert {"lo", "wan", "far", "mpt0"} <= set(found)
    wan = found["wan"]
    assert wan.pop("index") > 0
    assert wan == {
        "kind": "veth",
        "up": True,
        "addresses": ["10.1.0.3/24", "2001:db8::2/64", "10.1.0.2/24"],
        "gateway4": {"via": "10.1.0.1", "metric": 50, "source": "10.1.0.3"},
        "gateway6": {"via": None, "metric": 60, "source": None},
        "mtu": 1400,
        "deprecated": "frozenset({IPv4Address('10.1.0.2')})",
    }
    assert (found["mpt0"]["kind"], found["mpt0"]["up"]) == ("tun", False)


# -- the nft table ---------------------------------------------------------------------------------------------------


def nft_event(operation: int, table: bytes, *, before: bytes = b"") -> bytes:
    """A message of NFNL_SUBSYS_NFTABLES; `before` is an attribute in front of the name (linux/netlink.h)."""
    name = struct.pack("=HH", 4 + len(table) + 1, 1) + table + b"\0"
    attributes = before + name + bytes(-len(name) % 4)
    return struct.pack("=IHHII", 20 + len(attributes), 10 << 8 | operation, 0, 0, 0) + bytes(4) + attributes


NEW_TABLE, DELETED_TABLE, NEW_CHAIN, DELETED_RULE = 0, 2, 3, 8
OURS, ANOTHER = b"mptunnel_mpt0", b"mptunnel_mpt1"
HANDLE = struct.pack("=HHQ", 12, 4, 7)


@pytest.mark.parametrize(
    ("messages", "news"),
    [
        ([], None),
        ([nft_event(DELETED_TABLE, OURS)], False),
        ([nft_event(NEW_TABLE, OURS)], True),
        ([nft_event(DELETED_TABLE, OURS, before=HANDLE)], False),
        ([nft_event(DELETED_TABLE, OURS), nft_event(NEW_TABLE, OURS)], True),
        ([nft_event(NEW_TABLE, OURS), nft_event(DELETED_TABLE, ANOTHER)], True),
        ([nft_event(DELETED_TABLE, ANOTHER), nft_event(NEW_CHAIN, OURS), nft_event(DELETED_RULE, OURS)], None),
        ([nft_event(DELETED_TABLE, OURS)[:-9]], None),
        ([nft_event(DELETED_TABLE, OURS)[:-9], nft_event(NEW_TABLE, OURS)], None),
        ([bytes(40)], None),
        ([b"\xff" * 40], None),
    ],
)
def test_of_the_tables_events_the_last_one_that_speaks_of_ours_counts(messages: list[bytes], news: bool | None) -> None:
    assert parse_table_events(b"".join(messages), OURS) is news


@pytest.mark.parametrize(
    ("messages", "have_come"),
    [
        ([nft_event(NEW_CHAIN, b"firewalld")], True),
        ([nft_event(NEW_TABLE, b"filter"), nft_event(NEW_CHAIN, b"filter")], True),
        ([nft_event(NEW_CHAIN, OURS), nft_event(NEW_CHAIN, ANOTHER)], False),
        ([nft_event(NEW_TABLE, b"filter"), nft_event(DELETED_RULE, b"filter")], False),
        ([nft_event(NEW_CHAIN, b"firewalld")[:-9]], False),
    ],
)
def test_new_chains_of_others_are_seen(messages: list[bytes], *, have_come: bool) -> None:
    assert has_chain_of_others(b"".join(messages)) is have_come


def test_a_table_of_which_events_were_lost_counts_as_gone() -> None:
    try:
        watch = TableWatch("mptunnel_mpt9")
    except PermissionError:
        pytest.skip("who may not change tables is not told of them")
    watch.close()
    watch._socket = Deaf(OSError(errno.ENOBUFS, "overrun"))  # type: ignore[assignment]
    assert watch.drain() is False
    watch._socket = Deaf()  # type: ignore[assignment]
    assert watch.drain() is None
