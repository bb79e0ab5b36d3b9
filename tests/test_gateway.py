"""The server's script as a gateway, packet by packet: the internet is open to clients, all else is closed."""

from __future__ import annotations

import re
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from tests.machines import (
    SERVER,
    Machine,
    Setup,
    echo_request,
    machines,
    ports_of,
    source_of,
    target_of,
    tcp_syn,
    udp,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns

CLIENT4, CLIENT6 = "10.0.1.2", "fd00:1::2"
INTERNET4, INTERNET6 = "203.0.113.2", "2001:db8:113::2"

# What no client may do, by a name that is its payload too; sent with the client's address to port 7 unless said.
HOSTILE = {
    "spoofed source": udp("10.9.9.9", INTERNET4, 4000, 7, b"spoofed source"),
    "spoofed source of the lan": udp("192.168.50.77", INTERNET4, 4000, 7, b"spoofed source of the lan"),
    "spoofed IPv6 source": udp("2001:db8:f::1", INTERNET6, 4000, 7, b"spoofed IPv6 source"),
    "spoofed source to the server": udp("10.9.9.9", "10.0.1.1", 4000, 7, b"spoofed source to the server"),
    "another client": udp(CLIENT4, "10.0.1.3", 4000, 7, b"another client"),
    "another client, IPv6": udp(CLIENT6, "fd00:1::3", 4000, 7, b"another client, IPv6"),
    "metadata": udp(CLIENT4, "169.254.169.254", 4000, 7, b"metadata"),
    "metadata, IPv6": udp(CLIENT6, "fd00:ec2::254", 4000, 7, b"metadata, IPv6"),
    "lan": udp(CLIENT4, "192.168.50.2", 4000, 7, b"lan"),
    "lan, IPv6": udp(CLIENT6, "fd00:50::2", 4000, 7, b"lan, IPv6"),
    "server's tunnel address": udp(CLIENT4, "10.0.1.1", 4000, 7, b"server's tunnel address"),
    "server's tunnel IPv6": udp(CLIENT6, "fd00:1::1", 4000, 7, b"server's tunnel IPv6"),
    "server's outer address": udp(CLIENT4, "203.0.113.1", 4000, 7, b"server's outer address"),
    "server's lan address": udp(CLIENT4, "192.168.50.1", 4000, 7, b"server's lan address"),
    "server's outer IPv6": udp(CLIENT6, "2001:db8:113::1", 4000, 7, b"server's outer IPv6"),
    "echo of the outer address": echo_request(CLIENT4, "203.0.113.1", b"echo of the outer address"),
    "port shadow": udp(CLIENT4, INTERNET4, 5000, 7, b"port shadow"),
    "port shadow, IPv6": udp(CLIENT6, INTERNET6, 5000, 7, b"port shadow, IPv6"),
}
LAN = {name for name in HOSTILE if name.startswith(("lan", "server's", "echo"))}


class Gateway:
    """A server between a tunnel, the internet and a private network, and eyes everywhere."""

    def __init__(self, setup: Setup, internet: Machine, lan: Machine) -> None:
        self.setup, self.machine, self.internet, self.lan = setup, setup.machine, internet, lan
        self.tunnel = setup.machine.tun()
        self.wan = internet.sniff()
        self._eyes = [self.tunnel, self.wan, lan.sniff(), setup.machine.echo(7)]
        self._markers = 0

    def up(self, **values: str) -> None:
        self.setup.do("server", "up", {**SERVER, **values})

    def passed(self, packets: dict[str, bytes]) -> set[str]:
        """Send packets of the tunnel and return the names of those that came out anywhere, or were answered."""
        before = [len(eye.lines) for eye in self._eyes]
        for packet in packets.values():
            self.tunnel.send(packet)
        self._markers += 1
        marker = f"marker {self._markers}".encode()
        self.tunnel.send(udp(CLIENT4, INTERNET4, 4000, 7, marker))
        assert self.wan.saw(marker), "the internet is closed too"
        for eye in self._eyes[2:]:
            eye.wait(lambda _: False, 0.2)
        lines = [line for eye, start in zip(self._eyes, before, strict=True) for line in eye.lines[start:]]
        return {name for name in packets if any(name.encode().hex() in line for line in lines)}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    for server, internet, lan in machines(3):
        server.wire("wan", internet, "up")
        server.wire("lan", lan, "up")
        server.sh("ip addr add 203.0.113.1/24 dev wan; ip -6 addr add 2001:db8:113::1/64 dev wan")
        server.sh("ip addr add 192.168.50.1/24 dev lan; ip -6 addr add fd00:50::1/64 dev lan")
        server.sh("ip route add default via 203.0.113.2; ip route add 169.254.169.254 via 203.0.113.2")
        server.sh("ip -6 route add default via 2001:db8:113::2; ip -6 route add fd00:ec2::254 via 2001:db8:113::2")
        internet.sh("ip addr add 203.0.113.2/24 dev up; ip -6 addr add 2001:db8:113::2/64 dev up")
        internet.sh("ip addr add 169.254.169.254/32 dev lo; ip -6 addr add fd00:ec2::254/128 dev lo")
        for machine, device, address in ((server, "wan", 1), (server, "lan", 1), (internet, "up", 99), (lan, "up", 99)):
            machine.sh(f"ip -6 addr add fe80::{address}/64 dev {device}")  # neighbours are asked from these
        lan.sh("ip addr add 192.168.50.2/24 dev up; ip -6 addr add fd00:50::2/64 dev up")
        yield Gateway(Setup(server, tmp_path / "run"), internet, lan)


def test_the_internet_is_open_under_the_servers_address_and_a_harmless_port(gateway: Gateway) -> None:
    gateway.up()
    gateway.internet.echo(9)
    for source, target, own in ((CLIENT4, INTERNET4, "203.0.113.1"), (CLIENT6, INTERNET6, "2001:db8:113::1")):
        for number in range(8):
            payload = f"packet {number} to {target}".encode()
            gateway.tunnel.send(udp(source, target, 4000 + number, 9, payload))
            packet = gateway.wan.saw(payload)
            assert packet is not None
            assert (source_of(packet), target_of(packet)) == (own, target)
            assert 32768 <= ports_of(packet)[0] <= 60999
            answer = gateway.tunnel.saw(payload)
            assert answer is not None
            assert (source_of(answer), target_of(answer)) == (target, source)
            assert ports_of(answer) == (9, 4000 + number)
        gateway.tunnel.send(echo_request(source, target, b"are you there?"))
        assert gateway.tunnel.wait(lambda line: b"are you there?".hex() in line)
        gateway.tunnel.lines.clear()


@pytest.mark.parametrize(("port", "ports"), [("40000", ":40001-60999"), ("51820", ":32768-51819")])
def test_a_masqueraded_port_is_never_that_of_the_server(gateway: Gateway, port: str, ports: str) -> None:
    gateway.up(MPT_PORT=port)
    rules = gateway.machine.sh("nft list chain inet mptunnel_mpt0 outward")
    assert set(re.findall(r":\d+-\d+", rules)) == {ports}


def test_whatever_a_client_may_not_do_does_not_pass(gateway: Gateway) -> None:
    gateway.up()
    assert gateway.passed(HOSTILE) == set()
    gateway.tunnel.send(echo_request(CLIENT4, "10.0.1.1", b"the server's echo"))
    gateway.tunnel.send(echo_request(CLIENT6, "fd00:1::1", b"the server's IPv6 echo"))
    assert gateway.tunnel.saw(b"the server's echo")
    assert gateway.tunnel.saw(b"the server's IPv6 echo")
    gateway.machine.sh("nft delete table inet mptunnel_mpt0")
    assert gateway.passed(HOSTILE) == set(HOSTILE), "these would not pass anyway, so nothing is shown"


def test_with_lan_private_networks_and_the_server_itself_are_open_and_nothing_more(gateway: Gateway) -> None:
    gateway.up(MPT_LAN="1")
    assert gateway.passed(HOSTILE) == LAN


def test_an_offered_resolver_is_open_for_questions_only_wherever_it_is(gateway: Gateway) -> None:
    names = {"lan": "192.168.50.2", "server": "192.168.50.1", "lan, IPv6": "fd00:50::2", "tunnel": "10.0.1.1"}
    gateway.up(MPT_DNS=" ".join(names.values()))
    gateway.machine.echo(53, "::")
    packets = {}
    for name, address in names.items():
        source = CLIENT6 if ":" in address else CLIENT4
        for port in 53, 7:
            packets[f"{name} {port}!"] = udp(source, address, 4000, port, f"{name} {port}!".encode())
    found = gateway.passed(packets)
    assert gateway.tunnel.saw(b"server 53!"), "there is no answer"
    assert gateway.tunnel.saw(b"tunnel 53!"), "there is no answer"
    assert {name for name in found if name.startswith("lan")} == {"lan 53!", "lan, IPv6 53!"}
    assert not {name for name in found if name.endswith("7!")}


def test_nobody_outside_reaches_a_client_or_speaks_for_one(gateway: Gateway) -> None:
    gateway.up()
    gateway.internet.sh("ip route add 10.0.1.0/24 via 203.0.113.1; ip -6 route add fd00:1::/64 via 2001:db8:113::1")
    gateway.internet.sh("ip addr add 10.0.1.9/32 dev lo; ip -6 addr add fd00:1::9/128 dev lo")
    say = f"{sys.executable} -c \"import socket; s = socket.socket({{}}, 2); s.bind(('{{}}', 0)); "
    say += "s.sendto(b'{}', ('{}', 7))\""

    def unheard() -> set[str]:
        words = {
            "to a client": (2, INTERNET4, CLIENT4),
            "to a client by IPv6": (10, INTERNET6, CLIENT6),
            "for a client": (2, "10.0.1.9", "203.0.113.1"),
            "for a client by IPv6": (10, "fd00:1::9", "2001:db8:113::1"),
            "to the tunnel address": (2, INTERNET4, "10.0.1.1"),
            "to the tunnel address by IPv6": (10, INTERNET6, "fd00:1::1"),
            "by a forwarded port": (2, INTERNET4, "203.0.113.77"),
        }
        for word, (family, source, target) in words.items():
            gateway.internet.sh(say.format(family, source, word, target))
        gateway.internet.sh(say.format(2, INTERNET4, "to the server", "203.0.113.1"))
        eyes = [gateway.tunnel, gateway._eyes[3]]
        assert eyes[1].saw(b"to the server")
        eyes[0].wait(lambda _: False, 0.2)
        return {word for word in words if not any(word.encode().hex() in line for eye in eyes for line in eye.lines)}

    gateway.machine.sh("nft add table ip d; nft 'add chain ip d d { type nat hook prerouting priority -100; }'")
    gateway.machine.sh(f"nft add rule ip d d ip daddr 203.0.113.77 dnat to {CLIENT4}; ip addr add 203.0.113.77 dev wan")
    assert len(unheard()) == 7
    gateway.machine.sh("nft delete table inet mptunnel_mpt0")
    assert unheard() == set(), "these would not arrive anyway, so nothing is shown"


# Say something to an address, and print who we were there, and the answer.
TALK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 4321))
    s.settimeout(3)
    s.connect((sys.argv[1], 9))
    s.send(sys.argv[2].encode())
    print("ready", flush=True)
    print(s.recv(99).decode(), flush=True)
"""


def test_the_server_itself_reaches_clients_and_its_own_address_and_forwards_for_others_as_before(
    gateway: Gateway,
) -> None:
    gateway.up()
    talk = gateway.machine.start(TALK, CLIENT4, "to a client")
    question = gateway.tunnel.saw(b"to a client")
    assert question is not None
    assert (source_of(question), ports_of(question)) == ("10.0.1.1", (4321, 9))
    gateway.tunnel.send(udp(CLIENT4, "10.0.1.1", 9, 4321, b"to the server"))
    assert talk.wait(lambda line: line == "to the server")
    echo = gateway.machine.echo(9)
    gateway.machine.start(TALK, "10.0.1.1", "to itself")
    assert echo.wait(lambda line: line == f"10.0.1.1 4321 {b'to itself'.hex()}")
    gateway.lan.sh("ip route add 203.0.113.0/24 via 192.168.50.1")
    gateway.internet.sh("ip route add 192.168.50.0/24 via 203.0.113.1")
    gateway.internet.echo(9)
    talk = gateway.lan.start(TALK, INTERNET4, "from the lan")
    assert talk.wait(lambda line: line == "from the lan")


NFT = "nft add table inet fw; nft 'add chain inet fw f { type filter hook forward priority 10;"


@pytest.mark.parametrize(
    "firewall",
    [
        f"{NFT} policy drop; }}'; nft add rule inet fw f ct state established accept",
        f"{NFT} }}'; nft add rule inet fw f ct state established accept; nft add rule inet fw f reject",
        "{0} -P FORWARD DROP; {0} -N DOCKER-USER; {0} -A FORWARD -j DOCKER-USER; {0} -A DOCKER-USER -j RETURN",
        "{0}-legacy -P FORWARD DROP; {0}-legacy -A FORWARD -i docker0 -j ACCEPT",
        "{0}-legacy -A FORWARD -i docker0 -j ACCEPT; {0}-legacy -A FORWARD -j REJECT",
    ],
    ids=["nft drop", "firewalld", "iptables-nft", "iptables-legacy", "iptables-legacy reject"],
)
def test_where_others_drop_what_is_forwarded_our_device_is_let_through(gateway: Gateway, firewall: str) -> None:
    if "{0}" in firewall and gateway.machine.run("iptables-legacy", "-V").returncode:
        pytest.skip("iptables is not installed")
    gateway.up()
    gateway.setup.do("server", "down")
    for tool in "iptables", "ip6tables":
        gateway.machine.sh(firewall.replace("{0}", tool))
        if "{0}" not in firewall:
            break
    before = gateway.machine.look()
    gateway.up()
    gateway.internet.echo(9)
    for source, target in ((CLIENT4, INTERNET4), (CLIENT6, INTERNET6)):
        gateway.tunnel.send(udp(source, target, 4000, 9, f"to {target}".encode()))
        assert gateway.tunnel.saw(f"to {target}".encode()), "no packet, or no answer"
    once = gateway.machine.sh("nft list ruleset").count("comment")
    gateway.up()
    assert gateway.machine.sh("nft list ruleset").count("comment") == once
    assert gateway.passed(HOSTILE) == set()
    gateway.setup.do("server", "down")
    assert gateway.machine.look() == before
    gateway.machine.sh("echo 1 >/proc/sys/net/ipv4/ip_forward; ip link set mpt0 up; ip route add 10.0.1.0/24 dev mpt0")
    gateway.tunnel.send(udp(CLIENT4, INTERNET4, 4999, 9, b"dropped"))
    assert not gateway.wan.saw(b"dropped", 0.2), "that firewall drops nothing, so nothing is shown"


def test_tcp_is_told_the_size_that_fits_the_clients_paths(gateway: Gateway) -> None:
    def mss_of(source: str, target: str, port: int) -> int:
        gateway.tunnel.send(tcp_syn(source, target, 4000, port, 1460))
        seen = gateway.wan.wait(lambda line: len(line) > 80 and ports_of(bytes.fromhex(line))[1] == port)
        assert seen is not None
        return int(struct.unpack("!H", bytes.fromhex(seen)[-2:])[0])

    gateway.up()
    assert mss_of(CLIENT4, INTERNET4, 801) == 1380
    assert mss_of(CLIENT6, INTERNET6, 802) == 1360
    gateway.setup.do("server", "peer-up", {"MPT_PEER": f"{CLIENT4} {CLIENT6}", "MPT_MTU": "1300"})
    assert mss_of(CLIENT4, INTERNET4, 803) == 1260
    assert mss_of(CLIENT6, INTERNET6, 804) == 1240
    gateway.setup.do("server", "peer-down", {"MPT_PEER": f"{CLIENT4} {CLIENT6}"})
    assert mss_of(CLIENT4, INTERNET4, 805) == 1380


def test_one_client_cannot_fill_the_servers_table_of_flows(gateway: Gateway) -> None:
    gateway.up()
    gateway.internet.sh("nft add table inet c; nft 'add chain inet c i { type filter hook prerouting priority 0; }'")
    for family in "ipv4", "ipv6":
        gateway.internet.sh(f"nft add rule inet c i meta nfproto {family} udp dport 10000-19999 counter drop")
    for port in range(10000, 18300):
        gateway.tunnel.send(udp(CLIENT4, INTERNET4, 4000, port, b""))
        gateway.tunnel.send(udp(CLIENT6, INTERNET6, 4000, port, b""))
    gateway.tunnel.send(udp("10.0.1.3", INTERNET4, 4000, 7, b"another client's"))
    assert gateway.wan.saw(b"another client's", 10.0)
    assert gateway.internet.sh("nft list chain inet c i").count("packets 8192 ") == 2


# A router advertisement, from the address fe80::99 of interface `up`; the default route lives 1800 s.
ADVERTISE = """
import socket, struct
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as s:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    index = socket.if_nametoindex("up")
    s.bind(("fe80::99", 0, 0, index))
    s.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0), ("ff02::1", 0, 0, index))
"""


def test_a_host_that_lives_on_router_advertisements_keeps_its_ipv6(gateway: Gateway) -> None:
    server = gateway.machine
    server.sh("ip -6 route del default")

    def default() -> str:
        return re.sub(r" expires \d+sec", "", server.sh("ip -6 route show default"))

    def advertised() -> str:
        gateway.internet.sh(f"{sys.executable} -c '{ADVERTISE}'")
        for _ in range(50):
            if default():
                break
            server.sh("sleep 0.02")
        return default()

    before = advertised()
    assert "via fe80::99 dev wan proto ra" in before
    gateway.up()
    assert default() == before
    server.sh("ip -6 route del default")
    assert advertised() == before
    gateway.setup.do("server", "down")
    assert default() == before
    server.sh("ip -6 route del default")
    assert advertised() == before
    assert server.sh("cat /proc/sys/net/ipv6/conf/wan/accept_ra /proc/sys/net/ipv6/conf/all/forwarding") == "1\n0\n"
