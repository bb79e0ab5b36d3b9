"""A network behind the client, cables between machines that finish nothing, and captures at their ends.

A veth pair passes checksums that are not computed and packets of 64 KB, since it never leaves the machine. Made `bare`
it is like a real cable: what enters it is what a network card would send, so a capture at its other end is a proof.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from mptunnel.lab import TARGET
from tests.running import wait_until

if TYPE_CHECKING:
    from mptunnel.lab import Lab
    from tests.running import Tunnel

LAN_HOST: Final = "192.168.77.2"
UPLOAD_PORT: Final = 7900
RUN_PORT: Final = 7901
_GATEWAY: Final = "192.168.77.1"

# ETHTOOL_STXCSUM, STSO, SGSO, SGRO: transmit checksums, segmentation for the card and before it, coalescing.
_SET = """
import array, fcntl, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for command, value in ((0x17, 0), (0x1F, 0), (0x24, 0), (0x2C, int(sys.argv[2]))):
        wish = array.array("I", [command, value])
        fcntl.ioctl(s, 0x8946, struct.pack("16sP16x", sys.argv[1].encode(), wish.buffer_info()[0]))
"""

# Takes uploads and answers each with its hash.
_SINK = """
import hashlib, socket, sys
with socket.create_server(("", int(sys.argv[1]))) as s:
    print("ready", flush=True)
    while True:
        with s.accept()[0] as c:
            digest = hashlib.sha256()
            while data := c.recv(1 << 18):
                digest.update(data)
            c.sendall(digest.hexdigest().encode())
"""

# Uploads SIZE bytes in writes of odd lengths; says whether their hash came back.
_UPLOAD = """
import hashlib, random, socket, sys
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data, at, chance = random.Random(5).randbytes(size), 0, random.Random(6)
with socket.create_connection((host, port), 10) as s:
    while at < size:
        step = chance.choice((1, 999, 5001, 70_001))
        s.sendall(data[at : at + step])
        at += step
    s.shutdown(socket.SHUT_WR)
    print(s.makefile().read() == hashlib.sha256(data).hexdigest())
"""

# Runs of datagrams by UDP_SEGMENT, to whom it may concern: COUNT runs of ten, the last one of each shorter.
_RUNS = """
import os, socket, struct, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for _ in range(count):
        s.sendmsg([os.urandom(9 * 1001 + 333)], [(17, 103, struct.pack("=H", 1001))], 0, (host, port))
        time.sleep(0.002)
"""
DATAGRAMS_IN_A_RUN: Final = 10

# One datagram from our own address with a checksum that is wrong.
_WRONG = """
import socket, struct, sys
host, port = sys.argv[1], int(sys.argv[2])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect((host, port))
    own = s.getsockname()[0]
datagram = struct.pack("!HHHH", 4444, port, 8 + 5, 0x1234) + b"wrong"
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 33, 0, 0x4000, 64, 17, 0, socket.inet_aton(own), socket.inet_aton(host))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
    s.sendto(head + datagram, (host, 0))
"""

# What passes a device, into a ring that the kernel fills (packet(7), PACKET_RX_RING) and that holds 2 KB of each
# packet; at the end written as a pcap file. Fails where the ring was too small.
_CAPTURE = """
import mmap, signal, socket, struct, sys
FRAME, COUNT, OUTGOING = 2048, 1 << 14, 4
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
out = sys.stdout.buffer
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as s:
    s.setsockopt(263, 5, struct.pack("IIII", 1 << 16, FRAME * COUNT >> 16, FRAME, COUNT))
    ring = mmap.mmap(s.fileno(), FRAME * COUNT)
    s.bind((sys.argv[1], 3))
    out.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101))
    out.flush()
    signal.sigwait({signal.SIGTERM})
    for at in range(0, FRAME * COUNT, FRAME):
        status, full, kept, _, start, seconds, us = struct.unpack_from("=QIIHHII", ring, at)
        if not status:
            break
        if (ring[at + 32 + 10] == OUTGOING) == int(sys.argv[2]) and ring[at + start] >> 4 in (4, 6):
            out.write(struct.pack("=IIII", seconds, us, kept, full) + ring[at + start : at + start + kept])
    sys.exit(struct.unpack("II", s.getsockopt(263, 6, 8))[1] > 0)
"""


def require_tcpdump() -> str:
    """Return tcpdump's path; skip the test where there is none; in CI, fail it."""
    found = shutil.which("tcpdump", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None and "CI" in os.environ:
        pytest.fail("not found: tcpdump")
    if found is None:
        pytest.skip("not found: tcpdump; install it")
    return found


def bare(lab: Lab, role: str, device: str, *, coalesces: bool = False) -> None:
    """Let the kernel finish all that leaves by this end of a cable; `coalesces`: put together what comes in (GRO)."""
    lab.run(role, [sys.executable, "-c", _SET, device, str(int(coalesces))])


def add_lan(lab: Lab) -> None:
    """Put a host behind the client, as role `lan`, by a bare cable; the client forwards, its card coalesces."""
    pipe = subprocess.PIPE
    holder = lab.spawn("cl", ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=pipe, stdout=pipe)
    assert holder.stdout is not None
    holder.stdout.readline()
    lab._held().namespaces["lan"] = f"/proc/{holder.pid}/ns/net"
    lab.sysctl("cl", {"ipv4/ip_forward": 1})
    lab.ip(
        "cl",
        f"link add lan0 type veth peer name eth0 netns {holder.pid}",
        "link set lan0 addrgenmode none up",
        f"addr add {_GATEWAY}/24 dev lan0",
    )
    lab.ip(
        "lan",
        "link set lo up",
        "link set eth0 addrgenmode none up",
        f"addr add {LAN_HOST}/24 dev eth0",
        f"route add default via {_GATEWAY}",
    )
    bare(lab, "cl", "lan0", coalesces=True)
    bare(lab, "lan", "eth0")


def lay_direct_path(lab: Lab) -> str:
    """Lay a path from client to server that carries runs of datagrams whole; return the client's interface.

    The lab's wires take every datagram by itself, as a network card that coalesces nothing does.
    """
    lab.ip(
        "cl",
        f"link add p9 type veth peer name q9 netns {lab._held().namespaces['sv']}",
        "link set p9 addrgenmode none up",
        "addr add 192.168.99.2/24 dev p9",
    )
    lab.ip("sv", "link set q9 addrgenmode none up", "addr add 192.168.99.1/24 dev q9")
    lab.ip("cl", "route add default via 192.168.99.1 dev p9 metric 900")
    return "p9"


def lay_cable_to_target(lab: Lab) -> None:
    """Make the wire between server and target a bare cable; the server's card coalesces."""
    bare(lab, "sv", "out", coalesces=True)
    bare(lab, "inet", "net0")


def take_uploads(lab: Lab) -> None:
    """Let the target take uploads."""
    sink = lab.spawn("inet", [sys.executable, "-c", _SINK, str(UPLOAD_PORT)], stdout=subprocess.PIPE)
    assert sink.stdout is not None
    sink.stdout.readline()


def upload(lab: Lab, role: str, size: int) -> None:
    """Upload so many bytes to the target; they have to arrive as they were."""
    said = lab.run(role, [sys.executable, "-c", _UPLOAD, TARGET, str(UPLOAD_PORT), str(size)])
    assert said == "True\n"


def send_runs(lab: Lab, role: str, count: int) -> None:
    """Send runs of datagrams to the target."""
    lab.run(role, [sys.executable, "-c", _RUNS, TARGET, str(RUN_PORT), str(count)])


def send_wrong(lab: Lab, role: str) -> None:
    """Send the target a datagram whose checksum is wrong."""
    lab.run(role, [sys.executable, "-c", _WRONG, TARGET, str(RUN_PORT)])


class Capture:
    """All IP packets that come in at a device, or go out; judged by tcpdump.

    tcpdump itself wants to become another user, which a user namespace knows nothing of: here it only reads.
    """

    def __init__(self, tunnel: Tunnel, role: str, device: str, *, way: str = "in") -> None:
        self._lab = tunnel.lab
        self._file = tunnel.places / f"{role}-{device}-{way}.pcap"
        with self._file.open("wb") as file:
            argv = [sys.executable, "-c", _CAPTURE, device, str(int(way == "out"))]
            self._process = self._lab.spawn(role, argv, stdout=file, stderr=None)
        wait_until(lambda: self._file.stat().st_size, "the capture has begun")

    def finish(self) -> None:
        """End the capture; it has to be complete."""
        self._lab.end(self._process)
        assert self._process.returncode == 0

    def sizes(self) -> list[int]:
        """Return the length of each packet."""
        data, at, found = self._file.read_bytes(), _FILE_HEADER, []
        while at < len(data):
            _, _, kept, full = _RECORD.unpack_from(data, at)
            found.append(full)
            at += _RECORD.size + kept
        return found

    def verdict(self) -> tuple[int, list[str]]:
        """Return how many TCP and UDP checksums tcpdump found right, and its lines about wrong ones."""
        argv = [require_tcpdump(), "-n", "-v", "-v", "-r", "-"]
        with self._file.open("rb") as file:
            said = subprocess.run(argv, stdin=file, capture_output=True, text=True, check=True).stdout
        lines = said.splitlines()
        good = sum("(correct)" in line or "[udp sum ok]" in line for line in lines)
        return good, [line for line in lines if _WRONG_SUM.search(line)]


_WRONG_SUM: Final = re.compile(r"incorrect ->|bad (udp |tcp )?cksum")
_FILE_HEADER: Final = 24
_RECORD: Final = struct.Struct("=IIII")  # seconds, microseconds, bytes kept, bytes of the packet
