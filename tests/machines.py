"""Machines for the tests of what we change on a host: network namespaces, with everything that can be seen of one.

A machine is a process that waits for the end of its stdin, so it and its namespace go when the test does. The first
one makes a user namespace (or needs root where those are refused); further ones are made inside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from ipaddress import IPv6Address

ROOT = Path(__file__).parent.parent
SCRIPTS = {role: ROOT / "scripts" / f"{role}.sh" for role in ("client", "server")}

# A host that is not empty: addresses, default routes, rules, tables and nft of others, among our own numbers too.
FOREIGN = """
ip link add wifi type veth peer name wifi-far; ip link set wifi-far up; ip link set wifi up
ip link add lte type veth peer name lte-far; ip link set lte-far up; ip link set lte up
ip addr add 10.1.0.2/24 dev wifi; ip addr add 2001:db8:1::2/64 dev wifi
ip addr add 10.2.0.2/24 dev lte; ip addr add 2001:db8:2::2/64 dev lte
ip route add default via 10.1.0.1 dev wifi metric 100; ip route add default via 10.2.0.1 dev lte metric 600
ip -6 route add default via 2001:db8:1::1 dev wifi metric 100
ip rule add from 10.2.0.2 lookup 102; ip route add default via 10.2.0.1 dev lte table 102
ip -6 rule add from 2001:db8:2::2 lookup 102; ip -6 route add default via 2001:db8:2::1 dev lte table 102
ip rule add priority 5201 to 192.0.2.0/24 lookup 103; ip rule add priority 5300 to 192.0.2.0/24 lookup 5201
ip rule add priority 52 fwmark 52 lookup 52
nft add table inet mine; nft add chain inet mine forward '{ type filter hook forward priority 5; policy drop; }'
nft add rule inet mine forward ct state established accept comment '"mptunnel mpt01"'
nft add table ip mptunnel_mpt; nft add chain ip mptunnel_mpt mptunnel_mpt0
echo 1 >/proc/sys/net/ipv4/conf/wifi/forwarding; echo 0 >/proc/sys/net/ipv4/conf/all/accept_redirects
echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 1 >/proc/sys/net/ipv4/conf/lte/rp_filter
echo 0 >/proc/sys/net/ipv6/conf/lte/accept_ra
"""
DEVICE = (
    "ip tuntap add {0} mode tun; ip link set {0} mtu 1420 txqueuelen 2000 addrgenmode none up; ip link set {0} down"
)

# Values for the scripts.
CLIENT = {
    "MPT_MTU": "1420",
    "MPT_ADDRESS4": "10.0.1.2",
    "MPT_PEER4": "10.0.1.1",
    "MPT_ADDRESS6": "fd00:1::2",
    "MPT_PEER6": "fd00:1::1",
    "MPT_ROUTES": "0.0.0.0/0 ::/0",
    "MPT_DNS": "9.9.9.9 149.112.112.112 2620:fe::fe",
    "MPT_SERVERS": "198.51.100.1 2001:db8:9::9",
    "MPT_KEEP": "10.1.0.2,203.0.113.7 10.2.0.2,203.0.113.7 2001:db8:1::2,2001:db8:77::1",
}
PATH = {
    "MPT_PATH": "1",
    "MPT_INTERFACE": "lte",
    "MPT_ADDRESS": "10.2.0.2",
    "MPT_GATEWAY": "10.2.0.1",
    "MPT_SERVER": "198.51.100.1",
    "MPT_SHARED": "1",
}
PATH6 = {
    "MPT_PATH": "2",
    "MPT_INTERFACE": "wifi",
    "MPT_ADDRESS": "2001:db8:1::2",
    "MPT_GATEWAY": "fe80::1",
    "MPT_SERVER": "2001:db8:9::9",
}
SERVER = {
    "MPT_MTU": "1420",
    "MPT_ADDRESS4": "10.0.1.1/24",
    "MPT_ADDRESS6": "fd00:1::1/64",
    "MPT_NETWORK4": "10.0.1.0/24",
    "MPT_NETWORK6": "fd00:1::/64",
    "MPT_PORT": "5000",
    "MPT_DNS": "9.9.9.9 10.1.0.53",
}
PEER = {"MPT_PEER": "10.0.1.2 fd00:1::2", "MPT_MTU": "1300"}

_HOLD = ["sh", "-c", "echo; exec cat >/dev/null"]
_QUIET = ("accept_dad=0", "router_solicitations=0", "addr_gen_mode=1")  # no address of the kernel's own, no waiting

# All that may be seen of a machine and that no time changes.
LOOK = r"""
for what in 'addr' '-4 route show table all' '-6 route show table all' '-4 rule' '-6 rule'; do
    echo "== ip $what"; ip -j $what | sed 's/},{/},\n{/g'
done
echo '== nft'; nft list ruleset 2>/dev/null
echo '== iptables-legacy'; for names in /proc/net/ip_tables_names /proc/net/ip6_tables_names; do
    ! grep -qs filter $names || { iptables-legacy -S; ip6tables-legacy -S; }; done
echo '== resolver'; ls -lL --time-style=full-iso /etc/resolv.conf; cat /etc/resolv.conf
echo '== sysctl'; grep -rs '' /proc/sys/net | grep -v -e conntrack_count -e /stat/ | sort
"""

# A TUN device: packets in hexadecimal from stdin go in, those that come out are printed.
_TUN = """
import fcntl, os, struct, sys, threading
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1001))
print("ready", flush=True)
def read():
    while True:
        try:
            print(os.read(fd, 65536).hex(), flush=True)
        except OSError:  # down
            threading.Event().wait(0.01)
threading.Thread(target=read, daemon=True).start()
for line in sys.stdin:
    try:
        os.write(fd, bytes.fromhex(line))
    except OSError as error:
        print("error", error, flush=True)
os._exit(0)
"""

# All packets a machine receives, by any interface, printed from the IP header on.
_SNIFF = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as s:
    print("ready", flush=True)
    while True:
        data, where = s.recvfrom(65536)
        if where[2] == 0:  # PACKET_HOST: to us
            print(data.hex(), flush=True)
"""

# A UDP socket that answers every datagram, and prints it.
_ECHO = """
import socket, sys
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind((sys.argv[2], int(sys.argv[1])))
    print("ready", flush=True)
    while True:
        data, source = s.recvfrom(65536)
        print(source[0].removeprefix("::ffff:"), source[1], data.hex(), flush=True)
        try:
            s.sendto(data, source)
        except OSError:  # no way back
            pass
"""


class Program:
    """A program on a machine whose lines are read as they come."""

    def __init__(self, machine: Machine, source: str, *arguments: str) -> None:
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        self.process = subprocess.Popen(
            [*machine.enter, sys.executable, "-c", source, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        assert self.wait(lambda line: line == "ready", 10.0), "the program did not start"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._arrived:
                self.lines.append(line.rstrip("\n"))
                self._arrived.notify_all()

    def send(self, packet: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(packet.hex() + "\n")
        self.process.stdin.flush()

    def wait(self, wanted: Callable[[str], object], seconds: float = 3.0) -> str | None:
        """Return the first line that is wanted, None if there is none in time."""
        until = time.monotonic() + seconds
        with self._arrived:
            while not (found := [line for line in self.lines if wanted(line)]):
                if not self._arrived.wait(until - time.monotonic()):
                    return None
        return found[0]

    def saw(self, payload: bytes, seconds: float = 3.0) -> bytes | None:
        """Return the packet that holds these bytes, None if none comes in time."""
        line = self.wait(lambda line: payload.hex() in line, seconds)
        return None if line is None else bytes.fromhex(line.split()[-1])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Machine:
    """One network namespace. With `beside` it shares that machine's user namespace and can be wired to it."""

    def __init__(self, beside: Machine | None = None) -> None:
        self._programs: list[Program] = []
        self._holder: subprocess.Popen[bytes]
        self._user = beside is None or "--user" in beside.enter
        inside = ["unshare", "--user", "--map-root-user"] if beside is None else [*beside.enter, "unshare"]
        if not self._hold([*inside, "--net"]):
            self._user = False
            if beside is not None or os.geteuid() or not self._hold(["unshare", "--net"]):
                raise OSError("neither 'unshare --user --net' nor, for root, 'unshare --net' is permitted")
        user = ["--user", "--preserve-credentials"] if self._user else []
        self.pid = self._holder.pid
        self.enter: list[str] = [shutil.which("nsenter") or "nsenter", f"--target={self.pid}", *user, "--net", "--"]
        self.sh("ip link set lo up")
        for setting in _QUIET:
            name, value = setting.split("=")
            self.sh(f"[ ! -d /proc/sys/net/ipv6 ] || echo {value} >/proc/sys/net/ipv6/conf/default/{name}")

    def _hold(self, unshare: list[str]) -> bool:
        """Start the process that holds the namespace; false if the kernel would not."""
        self._holder = subprocess.Popen(
            [*unshare, *_HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline():
            return True
        self._end_holder()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for program in self._programs:
            program.end()
        self._end_holder()

    def _end_holder(self) -> None:
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()
        self._holder.kill()
        self._holder.wait()

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        variables = None if env is None else {"PATH": os.environ["PATH"], **env}
        return subprocess.run(
            [*self.enter, *command], env=variables, cwd=ROOT, capture_output=True, text=True, check=False
        )

    def sh(self, script: str) -> str:
        """Run shell commands, all of which must work, and return what they print."""
        done = self.run("sh", "-ec", script)
        assert not done.returncode, f"{script}: {done.stderr}"
        return done.stdout

    def look(self) -> list[str]:
        """Return everything that can be seen of this machine."""
        return self.sh(LOOK).splitlines()

    def wire(self, name: str, other: Machine, other_name: str) -> None:
        """Lay a cable: interface `name` here, `other_name` there, both up."""
        self.sh(f"ip link add {name} type veth peer name {other_name} netns {other.pid}; ip link set dev {name} up")
        other.sh(f"ip link set dev {other_name} up")

    def start(self, source: str, *arguments: str) -> Program:
        program = Program(self, source, *arguments)
        self._programs.append(program)
        return program

    def tun(self, device: str = "mpt0") -> Program:
        return self.start(_TUN, device)

    def sniff(self) -> Program:
        return self.start(_SNIFF)

    def echo(self, port: int, address: str = "::") -> Program:
        return self.start(_ECHO, str(port), address)


class Setup:
    """A machine with the scripts of one run directory."""

    def __init__(self, machine: Machine, run_dir: Path) -> None:
        self.machine, self.run_dir = machine, run_dir

    def script(
        self, role: str, verb: str, values: dict[str, str] | None = None, device: str = "mpt0", **more: str
    ) -> subprocess.CompletedProcess[str]:
        saved = str(self.run_dir / f"{device}.saved")
        env = {"MPT_DEVICE": device, "MPT_SAVED": saved, **(values or {}), **more}
        return self.machine.run(str(SCRIPTS[role]), verb, env=env)

    def do(self, role: str, verb: str, values: dict[str, str] | None = None, device: str = "mpt0") -> str:
        """Run a verb that has to work, without a word on stderr, and return what it printed."""
        done = self.script(role, verb, values, device)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def value(self, name: str) -> str:
        return self.machine.sh(f"cat /proc/sys/net/{name}").strip()


def machines(count: int) -> Iterator[list[Machine]]:
    """Make so many machines; skip the test, saying why, where the kernel refuses them."""
    with contextlib.ExitStack() as stack:
        made: list[Machine] = []
        try:
            for _ in range(count):
                made.append(stack.enter_context(Machine(made[0] if made else None)))
        except OSError as error:
            if "CI" in os.environ:
                raise
            pytest.skip(f"namespaces are refused here: {error}")
        yield made


def furnished(tmp_path: Path) -> Iterator[Setup]:
    """Make one machine that is in use by others, with a device for the tunnel."""
    for (machine,) in machines(1):
        machine.sh(FOREIGN + DEVICE.format("mpt0"))
        yield Setup(machine, tmp_path / "run")


def udp(source: str, target: str, sport: int, dport: int, payload: bytes) -> bytes:
    """Return an IP packet with a UDP datagram."""
    datagram = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return _packet(17, 6, ip_address(source), ip_address(target), datagram)


def tcp_syn(source: str, target: str, sport: int, dport: int, mss: int) -> bytes:
    """Return an IP packet with a TCP SYN that offers this MSS."""
    segment = struct.pack("!HHIIBBHHHBBH", sport, dport, 7, 0, 0x60, 0x02, 65535, 0, 0, 2, 4, mss)
    return _packet(6, 16, ip_address(source), ip_address(target), segment)


def echo_request(source: str, target: str, payload: bytes) -> bytes:
    """Return an IP packet that asks for an echo."""
    version = ip_address(source).version
    message = struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, 77, 1) + payload
    return _packet(1 if version == 4 else 58, 2, ip_address(source), ip_address(target), message)


def source_of(packet: bytes) -> str:
    """Return a packet's source address."""
    return str(ip_address(packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]))


def target_of(packet: bytes) -> str:
    """Return a packet's destination address."""
    return str(ip_address(packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]))


def ports_of(packet: bytes) -> tuple[int, int]:
    """Return the ports of a TCP or UDP packet."""
    sport, dport = struct.unpack_from("!HH", packet, 20 if packet[0] >> 4 == 4 else 40)
    return sport, dport


def _packet(
    protocol: int, at: int, source: IPv4Address | IPv6Address, target: IPv4Address | IPv6Address, body: bytes
) -> bytes:
    """Return `body` behind an IP header, its checksum (at that offset) filled in."""
    pseudo = source.packed + target.packed + struct.pack("!II", len(body), protocol)
    summed = _checksum((b"" if protocol == 1 else pseudo) + body)
    body = body[:at] + summed.to_bytes(2, "big") + body[at + 2 :]
    if isinstance(source, IPv4Address):
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0)
        header += source.packed + target.packed
        return header[:10] + _checksum(header).to_bytes(2, "big") + header[12:] + body
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + source.packed + target.packed + body


def _checksum(data: bytes) -> int:
    return 0xFFFF - int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF
