"""What the client's script is for, packet by packet: paths, the tunnel's routes, kept connections, names."""

from __future__ import annotations

import os
import re
import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest

from tests.machines import CLIENT, PATH, PATH6, SCRIPTS, Machine, Setup, furnished, machines, source_of, target_of, udp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    yield from furnished(tmp_path)


def test_kept_connections_and_sshd_go_on_as_before_and_all_else_enters_the_tunnel(setup: Setup) -> None:
    ways = [f"{pair.split(',')[1]} from {pair.split(',')[0]}" for pair in CLIENT["MPT_KEEP"].split()]
    ways += ["203.0.113.99 from 10.1.0.2 ipproto tcp sport 22", "10.1.0.77 from 10.1.0.2 ipproto tcp sport 22"]
    ways += ["2001:db8:88::1 from 2001:db8:1::2 ipproto tcp sport 22", "10.2.0.9 from 10.2.0.2"]
    ways += ["203.0.113.99 from 10.2.0.2 ipproto tcp sport 22", "203.0.113.99 from 10.2.0.2"]  # a rule of the user's

    def next_hops() -> list[str]:
        answers = [setup.machine.sh(f"ip -o route get {way}") for way in ways]
        return [re.sub(r" table \d+| uid \d+| \\.*", "", answer).strip() for answer in answers]

    before = next_hops()
    assert {"wifi", "lte"} == {answer.split(" dev ")[1].split()[0] for answer in before}
    for _ in "up", "up again":
        setup.do("client", "up", CLIENT)
        assert next_hops() == before
        for other in "203.0.113.99 from 10.1.0.2", "203.0.113.7", "10.1.1.7", "2001:db8:88::1 from 2001:db8:1::2":
            assert "dev mpt0" in setup.machine.sh(f"ip route get {other}")
    setup.machine.sh("ip route replace default via 10.1.0.99 dev wifi metric 100")
    setup.do("client", "keep")
    assert "via 10.1.0.99 dev wifi" in setup.machine.sh(f"ip route get {ways[0]}")


def test_kept_connections_outlive_an_outage_of_their_uplink(setup: Setup) -> None:
    here = {"-4": "10.1.0.2/24", "-6": "2001:db8:1::2/64"}
    gateway = {"-4": "10.1.0.1", "-6": "2001:db8:1::1"}
    keep = {name: CLIENT[name] for name in ("MPT_KEEP", "MPT_ADDRESS4", "MPT_ADDRESS6")}

    def loses_its_addresses() -> None:
        for family, address in here.items():
            setup.machine.sh(f"ip {family} addr del {address} dev wifi")

    def gets_them_back() -> None:
        for family, address in here.items():
            setup.machine.sh(f"ip {family} addr add {address} dev wifi")
            setup.machine.sh(f"ip {family} route replace default via {gateway[family]} dev wifi metric 100")

    def rules() -> list[str]:
        return sorted(setup.machine.sh("ip rule; ip -6 rule").splitlines())

    def kept() -> list[str]:
        return [rule for rule in rules() if " lookup 5208" in rule]

    before = rules()
    setup.do("client", "up", CLIENT)
    whole, up = kept(), setup.machine.look()
    assert len(whole) == 4, "two of each address of wifi; that of lte has a rule of the user's"
    loses_its_addresses()
    for verb, values in (("up", CLIENT), ("keep", keep), ("up", CLIENT)):
        setup.do("client", verb, values)
        assert kept() == whole
    gets_them_back()
    for _ in "once", "again":
        setup.do("client", "keep", keep)
        assert kept() == whole
        assert "dev wifi" in setup.machine.sh("ip route get 203.0.113.7 from 10.1.0.2")
        assert "dev wifi" in setup.machine.sh("ip route get 2001:db8:77::1 from 2001:db8:1::2")
    setup.do("client", "up", CLIENT)
    assert sorted(setup.machine.look()) == sorted(up)
    setup.do("client", "down")
    assert rules() == before
    loses_its_addresses()
    setup.do("client", "up", {**CLIENT, "MPT_KEEP": f"{CLIENT['MPT_KEEP']} 10.0.1.2,203.0.113.8"})
    assert not any("10.1.0.2" in rule for rule in kept())  # of an address that is away IPv6 answers all the same
    gets_them_back()
    setup.do("client", "dns", {"MPT_DNS": "", "MPT_OUTSIDE": "1"})
    questions = [rule for rule in kept() if " dport 53 " in rule]
    assert len(questions) == 4
    for _ in "once", "again":
        setup.do("client", "keep", {**keep, "MPT_KEEP": f"{CLIENT['MPT_KEEP']} 10.0.1.2,203.0.113.8"})
        assert kept() == sorted(whole + questions)
    setup.do("client", "up", {**CLIENT, "MPT_KEEP": "10.1.0.2,203.0.113.7"})
    assert kept() == [rule for rule in whole if "10.1.0.2" in rule]
    setup.do("client", "down")
    assert rules() == before


def test_a_path_is_a_rule_and_a_table_and_path_up_replaces_them(setup: Setup) -> None:
    def rules() -> list[str]:
        found = [line.split("\t") for line in setup.machine.sh("ip rule; ip -6 rule").splitlines()]
        return [rule for number, rule in found if number in {"5201:", "5202:"} and "lookup 103" not in rule]

    def tables() -> list[str]:
        shown = "ip route show table $table; ip -6 route show table $table"
        text = setup.machine.sh(f"for table in 5201 5202; do {shown}; done 2>/dev/null || :")
        words = " proto kernel| scope link| metric 1024| onlink| pref medium"
        return [re.sub(words, "", line).strip() for line in text.splitlines()]

    before = setup.machine.look()
    setup.do("client", "path-up", PATH6)
    for values, rule, route in (
        ({}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default via 10.2.0.1 dev lte"),
        ({"MPT_ADDRESS": "10.2.0.3"}, "from 10.2.0.3 to 198.51.100.1 lookup 5201", "default via 10.2.0.1 dev lte"),
        ({"MPT_GATEWAY": ""}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default dev lte"),
        ({"MPT_GATEWAY": "172.31.1.1"}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default via 172.31.1.1 dev lte"),
        ({"MPT_GATEWAY": "fe80::1"}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default via inet6 fe80::1 dev lte"),
        ({"MPT_INTERFACE": "wifi"}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default via 10.2.0.1 dev wifi"),
        (PATH6, "from 2001:db8:1::2 to 2001:db8:9::9 lookup 5201", "default via fe80::1 dev wifi"),
        ({**PATH6, "MPT_GATEWAY": ""}, "from 2001:db8:1::2 to 2001:db8:9::9 lookup 5201", "default dev wifi"),
        ({}, "from 10.2.0.2 to 198.51.100.1 lookup 5201", "default via 10.2.0.1 dev lte"),
    ):
        for _ in "once", "again":
            setup.do("client", "path-up", {**PATH, "MPT_SHARED": "0", **values, "MPT_PATH": "1"})
            assert sorted(rules()) == sorted([rule, "from 2001:db8:1::2 to 2001:db8:9::9 lookup 5202"])
            assert route in tables()
    setup.do("client", "path-down", {"MPT_PATH": "1"})
    assert rules() == ["from 2001:db8:1::2 to 2001:db8:9::9 lookup 5202"]
    assert tables() == ["default via fe80::1 dev wifi"]
    setup.do("client", "path-down", {"MPT_PATH": "1"})
    setup.do("client", "path-down", {"MPT_PATH": "2"})
    assert setup.machine.look() == before


def test_up_with_other_values_leaves_nothing_of_the_former_ones(setup: Setup) -> None:
    other = {
        **CLIENT,
        "MPT_ADDRESS4": "10.0.1.9",
        "MPT_ADDRESS6": "",
        "MPT_PEER6": "",
        "MPT_ROUTES": "192.0.2.0/24 192.0.2.129/32 2001:db8:f::/48 2001:db8:e::1/128",
        "MPT_DNS": "",
        "MPT_KEEP": "",
    }

    def look() -> list[str]:  # the kernel keeps the multicast route of a device that has had IPv6
        return [line.rstrip(",]") for line in setup.machine.look() if '"dst":"ff00::/8","dev":"mpt0"' not in line]

    before = setup.machine.look()
    setup.do("client", "up", other)
    fresh = look()
    routes = setup.machine.sh("ip route show dev mpt0; ip -6 route show dev mpt0")
    assert {line.split()[0] for line in routes.splitlines()} == {
        "10.0.1.1",
        "192.0.2.0/24",
        "192.0.2.129",
        "2001:db8:f::/48",
        "2001:db8:e::1",
    }
    setup.do("client", "up", {**CLIENT, "MPT_ADDRESS4": "10.7.0.5/24", "MPT_PEER4": ""})
    assert "inet 10.7.0.5/24 scope" in setup.machine.sh("ip addr show dev mpt0")
    setup.do("client", "up", CLIENT)
    setup.do("client", "up", other)
    assert look() == fresh
    setup.do("client", "down")
    assert setup.machine.look() == before


def test_a_network_that_the_host_has_a_route_to_stays_there_and_is_named(setup: Setup) -> None:
    """By a metric of ours: none is replaced, neither that of a LAN nor one that somebody has made."""
    setup.machine.sh("ip route add 198.18.0.0/24 via 10.2.0.1; ip -6 route add 2001:db8:18::/48 via 2001:db8:2::1")
    setup.machine.sh("ip route add 198.19.0.0/24 dev wifi metric 50")
    setup.machine.sh("ip -6 route add 2001:db8:19::/48 dev wifi metric 2000")
    own = {"10.1.0.0/24": "wifi", "198.18.0.0/24": "lte", "2001:db8:1::/64": "wifi", "2001:db8:18::/48": "lte"}
    tunnels = ["198.19.0.0/24", "2001:db8:19::/48", "203.0.113.0/24"]
    before = setup.machine.look()
    values = {**CLIENT, "MPT_KEEP": "", "MPT_ROUTES": " ".join([*own, *tunnels])}

    def interface(network: str) -> str:
        answer = setup.machine.sh(f"ip -o route get {ip_network(network)[77]}")
        return answer.split(" dev ")[1].split()[0]

    for more in {"MPT_DRY_RUN": "1"}, {}, {}:
        done = setup.script("client", "up", values, **more)
        assert done.returncode == 0
        assert sorted(done.stderr.splitlines()) == sorted(
            f"warning: {network} stays with {name}, by the host's own route" for network, name in own.items()
        )
        assert {network: interface(network) for network in own} == own
    assert {interface(network) for network in tunnels} == {"mpt0"}
    setup.do("client", "down")
    assert setup.machine.look() == before


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Setup, Machine]]:
    """A client with two uplinks into one server that has an address behind each."""
    for client, server in machines(2):
        client.wire("wifi", server, "wifi-far")
        client.wire("lte", server, "lte-far")
        client.sh("ip addr add 10.1.0.2/24 dev wifi; ip addr add 10.2.0.2/24 dev lte")
        client.sh("ip route add default via 10.1.0.1 dev wifi metric 100")
        client.sh("ip route add default via 10.2.0.1 dev lte metric 600")
        server.sh("ip addr add 10.1.0.1/24 dev wifi-far; ip addr add 10.2.0.1/24 dev lte-far")
        server.sh("ip addr add 198.51.100.1/32 dev lo; ip addr add 203.0.113.7/32 dev lo")
        yield Setup(client, tmp_path / "run"), server


ASK = """
import socket, sys
device, address, server = sys.argv[1:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    if device:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    s.bind((address, 0))
    s.settimeout(0.5)
    s.sendto(b"hello", (server, 5000))
    try:
        print(s.recv(99).decode())
    except TimeoutError:
        print("nothing")
"""


def test_both_paths_work_under_a_strict_rp_filter_with_everything_routed_into_the_tunnel(
    two: tuple[Setup, Machine],
) -> None:
    setup, server = two
    client = setup.machine
    client.sh("for all in all default wifi lte; do echo 1 >/proc/sys/net/ipv4/conf/$all/rp_filter; done")
    client.tun()
    server.echo(5000, "::ffff:198.51.100.1")
    uplinks = {"wifi": ("10.1.0.2", "10.1.0.1"), "lte": ("10.2.0.2", "10.2.0.1")}

    def ask(device: str, address: str) -> str:
        return client.sh(f"{sys.executable} -c '{ASK}' '{device}' {address} 198.51.100.1").strip()

    setup.do("client", "up", {**CLIENT, "MPT_KEEP": "", "MPT_DNS": ""})
    assert [ask(device, address) for device, (address, _) in uplinks.items()] == ["nothing"] * 2, "nothing is shown"
    for number, (device, (address, gateway)) in enumerate(uplinks.items()):
        values = {**PATH, "MPT_PATH": str(number), "MPT_INTERFACE": device, "MPT_ADDRESS": address, "MPT_SHARED": "0"}
        setup.do("client", "path-up", {**values, "MPT_GATEWAY": gateway})
    assert [ask(device, address) for device, (address, _) in uplinks.items()] == ["hello"] * 2
    client.sh("ip addr del 10.2.0.2/24 dev lte; ip addr add 10.2.0.77/24 dev lte")  # and its default route is gone
    values = {**PATH, "MPT_ADDRESS": "10.2.0.77", "MPT_SHARED": "0"}
    setup.do("client", "path-up", values)
    assert ask("lte", "10.2.0.77") == "hello"


def test_what_a_clat_has_translated_leaves_past_the_tunnel(two: tuple[Setup, Machine]) -> None:
    setup, server = two
    client = setup.machine
    client.sh("ip addr flush dev wifi; ip addr add fe80::2/64 dev wifi; ip addr add 2001:db8:1::2/64 dev wifi")
    client.sh("ip -6 route add default via fe80::1 dev wifi; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
    server.sh("ip addr add fe80::1/64 dev wifi-far; ip addr add 64:ff9b::c633:6401/128 dev lo")
    server.sh("ip -6 route add 2001:db8:1::/64 via fe80::2 dev wifi-far")
    before = client.look()
    tunnel, clat = client.tun(), client.tun("clat")
    client.sh("ip addr add 192.0.0.1/32 dev clat; ip link set clat up; ip -6 route add 2001:db8:1::c/128 dev clat")
    setup.do("client", "up", {**CLIENT, "MPT_KEEP": "", "MPT_DNS": ""})
    server.echo(5000)
    values = {**PATH, "MPT_INTERFACE": "clat", "MPT_ADDRESS": "192.0.0.1", "MPT_GATEWAY": "", "MPT_SHARED": "0"}
    setup.do("client", "path-up", values)
    clat.send(udp("2001:db8:1::c", "64:ff9b::c633:6401", 7, 5000, b"round"))
    assert tunnel.saw(b"round"), "nothing is shown"
    for _ in "once", "again":
        setup.do("client", "path-up", {**values, "MPT_CARRIER": "wifi", "MPT_CARRIER_GATEWAY": "fe80::1"})
    assert client.sh("ip -6 rule").count("iif clat lookup 5201") == 1
    clat.send(udp("2001:db8:1::c", "64:ff9b::c633:6401", 8, 5000, b"straight"))
    answer = clat.saw(b"straight")
    assert answer is not None
    assert target_of(answer) == "2001:db8:1::c"
    tunnel.end()
    clat.end()  # its rule is a detached one now
    setup.do("client", "path-down", {"MPT_PATH": "1"})
    setup.do("client", "down")
    assert client.look() == before


def test_two_uplinks_with_one_address_both_hear_their_replies(two: tuple[Setup, Machine]) -> None:
    setup, server = two
    client = setup.machine
    client.sh("for all in all default wifi lte; do echo 1 >/proc/sys/net/ipv4/conf/$all/rp_filter; done")
    client.sh("ip addr flush dev lte; ip addr add 10.1.0.2/24 dev lte")
    client.sh("ip route add default via 10.1.0.1 dev lte metric 600")
    server.sh("ip addr flush dev wifi-far; ip addr flush dev lte-far; ip addr add 10.1.0.1/24 dev lte-far")
    server.echo(5000, "::ffff:198.51.100.1")
    before = client.look()
    way = f"{sys.executable} -c '{ASK}' lte 10.1.0.2 198.51.100.1"
    values = {**PATH, "MPT_ADDRESS": "10.1.0.2", "MPT_GATEWAY": "10.1.0.1"}
    setup.do("client", "path-up", {**values, "MPT_SHARED": "0"})
    setup.do("client", "path-up", {**values, "MPT_SHARED": "0", "MPT_PATH": "0", "MPT_INTERFACE": "wifi"})
    assert client.sh(way).strip() == "nothing", "nothing is shown"
    setup.do("client", "path-up", values)
    assert client.sh(way).strip() == "hello"
    setup.do("client", "down")
    assert [line for line in client.look() if "rp_filter" in line] == [line for line in before if "rp_filter" in line]


def test_names_are_asked_through_the_tunnel_whatever_resolver_an_application_believes_in(
    two: tuple[Setup, Machine],
) -> None:
    setup, _ = two
    client = setup.machine
    tunnel = client.tun()
    client.sh("ip -6 addr add 2001:db8:1::2/64 dev wifi; ip -6 neigh add 2001:db8:1::53 lladdr 2:2:2:2:2:2 dev wifi")
    send = "import socket, sys; kind = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
    send += "socket.socket(kind, 2).sendto(sys.argv[2].encode(), (sys.argv[1], int(sys.argv[3])))"

    def ask(resolver: str, question: str, port: int = 53, seconds: float = 3.0) -> tuple[str, str] | None:
        client.sh(f'{sys.executable} -c "{send}" {resolver} {question} {port}')
        packet = tunnel.saw(question.encode(), seconds)
        return None if packet is None else (source_of(packet), target_of(packet))

    setup.do("client", "up", {**CLIENT, "MPT_DNS": "9.9.9.9 2620:fe::fe", "MPT_KEEP": ""})
    assert ask("10.1.0.1", "question1") == ("10.0.1.2", "9.9.9.9")
    assert ask("2001:db8:1::53", "question2") == ("fd00:1::2", "2620:fe::fe")
    assert ask("10.1.0.1", "question3", port=54, seconds=0.3) is None
    assert ask("127.0.0.1", "question4", seconds=0.3) is None
    assert ask("198.51.100.1", "question5") == ("10.0.1.2", "198.51.100.1"), "the server itself may use port 53"
    setup.do("client", "dns", {"MPT_DNS": "1.1.1.1 8.8.8.8", "MPT_SERVERS": ""})
    found = {ask("10.1.0.1", f"again{number}") for number in range(4)}
    assert found == {("10.0.1.2", "1.1.1.1"), ("10.0.1.2", "8.8.8.8")}
    setup.do("client", "dns", {"MPT_DNS": ""})
    assert ask("10.1.0.1", "question6", seconds=0.3) is None


@pytest.mark.parametrize("keep", [CLIENT["MPT_KEEP"], ""])
def test_questions_may_leave_past_the_tunnel_for_a_while(setup: Setup, keep: str) -> None:
    def interface(target: str, more: str = "") -> str:
        return setup.machine.sh(f"ip -o route get {target} {more}").split(" dev ")[1].split()[0]

    targets = ("8.8.8.8", "2001:4860:4860::8888")
    setup.do("client", "up", {**CLIENT, "MPT_DNS": "9.9.9.9", "MPT_KEEP": keep})
    before = setup.machine.look()
    for _ in "outside", "outside again":
        setup.do("client", "dns", {"MPT_DNS": "", "MPT_OUTSIDE": "1"})
        for target in targets:
            assert {interface(target, f"ipproto {kind} dport 53") for kind in ("udp", "tcp")} == {"wifi"}
            assert interface(target) == interface(target, "ipproto udp dport 443") == "mpt0"
    setup.do("client", "keep")
    assert interface("8.8.8.8", "ipproto udp dport 53") == "wifi"
    setup.do("client", "dns", {"MPT_DNS": "9.9.9.9", "MPT_OUTSIDE": "0", "MPT_SERVERS": CLIENT["MPT_SERVERS"]})
    assert {interface(target, "ipproto udp dport 53") for target in targets} == {"mpt0"}
    assert setup.machine.look() == before
    setup.do("client", "dns", {"MPT_DNS": "", "MPT_OUTSIDE": "1"})
    setup.do("client", "up", {**CLIENT, "MPT_DNS": "9.9.9.9", "MPT_KEEP": keep})
    assert setup.machine.look() == before, "what a killed run has left is gone"


def test_other_hosts_use_the_tunnel_under_its_address_and_nobody_reaches_that_from_outside(
    two: tuple[Setup, Machine],
) -> None:
    setup, lan = two
    client = setup.machine
    tunnel = client.tun()
    setup.do("client", "up", {**CLIENT, "MPT_KEEP": "", "MPT_DNS": ""})
    client.sh("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter")
    probe = client.echo(7)
    lan.sh(
        "ip route add 203.0.113.0/24 via 10.1.0.2; ip route add 10.0.1.2 via 10.1.0.2; ip addr del 203.0.113.7 dev lo"
    )
    say = f"{sys.executable} -c \"import socket; socket.socket(2, 2).sendto(b'{{}}', ('{{}}', 7))\""
    lan.sh(say.format("forwarded", "203.0.113.9"))
    packet = tunnel.saw(b"forwarded")
    assert packet is not None
    assert source_of(packet) == "10.0.1.2"
    lan.sh(say.format("outside", "10.0.1.2"))
    lan.sh(say.format("allowed", "10.1.0.2"))
    assert probe.saw(b"allowed")
    assert not probe.saw(b"outside", 0.2)
    tunnel.send(udp("203.0.113.9", "10.0.1.2", 7, 7, b"inside"))
    assert probe.saw(b"inside")
    client.sh("nft delete table inet mptunnel_mpt0")
    lan.sh(say.format("outside", "10.0.1.2"))
    assert probe.saw(b"outside"), "nothing is shown"


def test_a_lan_that_has_given_us_our_address_in_the_tunnel_is_heard(two: tuple[Setup, Machine]) -> None:
    setup, lan = two
    client = setup.machine
    client.tun()
    plug = "ip addr add 10.0.1.2/24 dev wifi; ip -6 addr add fd00:1::2/64 dev wifi"
    client.sh(f"ip addr flush dev wifi; {plug}; echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter")
    lan.sh("ip addr flush dev wifi-far; ip addr add 10.0.1.9/24 dev wifi-far; ip -6 addr add fd00:1::9/64 dev wifi-far")
    path = {**PATH, "MPT_INTERFACE": "wifi", "MPT_ADDRESS": "10.0.1.2", "MPT_GATEWAY": "10.0.1.9", "MPT_SHARED": "0"}
    probe = client.echo(7)

    def hears(target: str, words: str) -> bool:
        kind = "socket.AF_INET6" if ":" in target else "socket.AF_INET"
        code = f"import socket; socket.socket({kind}, 2).sendto(b'{words}', ('{target}', 7))"
        lan.sh(f'{sys.executable} -c "{code}"')
        return probe.saw(words.encode(), 0.5) is not None

    setup.do("client", "path-up", path)
    setup.do("client", "up", {**CLIENT, "MPT_KEEP": "", "MPT_DNS": ""})
    assert hears("10.0.1.2", "lease")
    assert hears("fd00:1::2", "lease6")
    client.sh(f"ip addr flush dev wifi; {plug}")  # the tunnel's is now the older one
    assert not hears("10.0.1.2", "younger"), "nothing is shown"
    for words in "again", "as before":
        setup.do("client", "path-up", path)
        assert hears("10.0.1.2", words)
    assert hears("fd00:1::2", "again6")
    lan.sh("ip -6 addr add fd00:9::1/64 dev lte-far; ip route add 10.0.1.2 via 10.2.0.2")
    client.sh("ip -6 addr add fd00:9::2/64 dev lte")
    lan.sh("ip -6 route add fd00:1::2 via fd00:9::2")
    for target in "10.0.1.2", "fd00:1::2":
        assert not hears(target, f"by lte {target}")
    setup.do("client", "down")
    for target in "10.0.1.2", "fd00:1::2":
        assert hears(target, f"after down {target}"), "nothing is shown"
    assert "mpt0" not in client.sh("ip route show table local")


def test_a_family_without_an_address_is_refused_at_once_instead_of_leaking(setup: Setup) -> None:
    setup.machine.tun("mpt3")
    setup.do("client", "up", {**CLIENT, "MPT_ADDRESS6": "", "MPT_PEER6": ""}, "mpt3")
    connect = (
        "import socket, time; s = socket.socket(socket.AF_INET6); s.settimeout(5); s.connect(('2001:db8:77::7', 80))"
    )
    done = setup.machine.run(sys.executable, "-c", connect)
    assert re.search(r"ConnectionRefusedError|No route to host|unreachable", done.stderr)


def test_resolved_is_told_in_the_hosts_own_namespace_and_asked_to_forget_at_down(setup: Setup, tmp_path: Path) -> None:
    """With a process 1 of our own the namespace is the host's; resolvectl and systemctl note what they are told."""
    notes, bin_dir, stub = tmp_path / "notes", tmp_path / "bin", tmp_path / "resolv.conf"
    bin_dir.mkdir()
    for tool in ("resolvectl", "systemctl"):
        (bin_dir / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >>{notes}\n')
        (bin_dir / tool).chmod(0o755)
    stub.write_text("nameserver 127.0.0.53\n")
    env = {**CLIENT, "MPT_DEVICE": "mpt0", "MPT_SAVED": str(tmp_path / "run" / "mpt0.saved")}
    env["PATH"] = f"{bin_dir}:{os.environ['PATH']}"
    script = f"mount --bind {stub} /etc/resolv.conf\n{SCRIPTS['client']} up; nft list ruleset; {SCRIPTS['client']} down"
    here = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec"]
    before = setup.machine.look()
    done = setup.machine.run(*here, script, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    told = [line for line in notes.read_text().splitlines() if line.startswith("resolvectl")]
    assert told == [f"resolvectl dns mpt0 {CLIENT['MPT_DNS']}", "resolvectl domain mpt0 ~.", "resolvectl revert mpt0"]
    assert "dnat" not in done.stdout
    assert setup.machine.look() == before
    notes.unlink()
    done = setup.machine.run("unshare", "--mount", "sh", "-ec", script, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dnat" in done.stdout
    assert not notes.exists(), "this would have changed the host's resolver from inside a namespace"
