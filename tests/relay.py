"""Two hosts, and between them nothing but `split` and `coalesce`: what the real kernel sends, and what it gets back.

Each host is a network namespace with a TUN device. This process carries frames from one device to the other, as a
tunnel without a wire would, and compares each super-packet with what it became. Run where one may make namespaces, as
`python -m tests.relay JSON` with the fields of `Wish`; prints those of `Seen`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mptunnel.packet import GSO_NONE, GSO_UDP_L4, MAX_SEGMENTS, PLAIN, VNET, VNET_SIZE, coalesce, single, split
from mptunnel.tun import Tun

MTU: Final = 1419  # odd, and so is what a segment holds
HOSTS: Final = (("mpt7", "10.9.0.1", "fd09::1"), ("mpt8", "10.9.0.2", "fd09::2"))
PORT: Final = 4000
PATIENCE: Final = 20.0
_CLONE_NEWNET = 0x40000000
_SOL_UDP, _UDP_SEGMENT = 17, 103


@dataclass
class Wish:
    """What is to be sent, and how it is carried."""

    kind: str  # tcp, udp
    version: int
    writes: list[int]  # bytes of each
    partial: bool  # checksums stay as the kernel left them
    together: bool  # coalesced again; else each packet by itself
    segment: int = 0  # TCP: the largest payload of a segment; UDP: that of each datagram of a write
    options: str = ""  # of the IPv4 header, in hexadecimal
    at_once: bool = False  # TCP: all is written, and the end said, before anything of it is carried
    lost: int = 0  # of each super-packet that is longer, this packet is lost, but no packet twice


@dataclass
class Seen:
    """What became of it."""

    is_whole: bool = False  # everything came in, to the byte; datagrams in their sizes and in order
    kinds: dict[int, int] = field(default_factory=Counter)  # super-packets of each gso_type, there and back
    segments: int = 0  # of the longest one
    flags: int = 0  # TCP flags that super-packets bore
    odd: int = 0  # super-packets with segments, or a last segment, of odd length
    differing: list[tuple[str, str]] = field(default_factory=list)  # headers of super-packets that came out otherwise
    written: int = 0  # the longest frame given to a device
    refused: int = 0
    bad_sums: int = 0  # that a kernel found
    takes_udp: bool = False


class Host:
    """A namespace and the device in it."""

    def __init__(self, number: int) -> None:
        _call("unshare", _CLONE_NEWNET)
        self.name, self.address4, self.address6 = HOSTS[number]
        self._namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.tun = Tun(self.name, MTU)
        lines = (
            "link set lo up",
            f"link set {self.name} addrgenmode none mtu {MTU} up",
            f"addr add {self.address4}/24 dev {self.name}",
            f"addr add {self.address6}/64 dev {self.name} nodad",
        )
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)

    def enter(self) -> None:
        """Let this thread open its sockets here from now on."""
        _call("setns", self._namespace, _CLONE_NEWNET)

    def socket(self, kind: str, version: int) -> socket.socket:
        """Return a socket of this host, bound to its address."""
        self.enter()
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        sock.settimeout(PATIENCE)
        sock.bind((self.address4 if version == 4 else self.address6, PORT))
        return sock

    def bad_sums(self) -> int:
        """Return how many packets with wrong checksums this kernel has got."""
        self.enter()
        found = 0
        for name in ("snmp", "snmp6"):
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
            if name == "snmp6":
                found += sum(int(line.split()[1]) for line in lines if "CsumErrors" in line)
                continue
            for titles, values in zip(lines[::2], lines[1::2], strict=True):
                found += sum(int(v) for t, v in zip(titles.split(), values.split(), strict=True) if "CsumErr" in t)
        return found


class Relay(threading.Thread):
    """Carries frames between the devices until `is_over`."""

    def __init__(self, wish: Wish, seen: Seen, hosts: list[Host]) -> None:
        super().__init__()
        self.is_over = False
        self._wish, self._seen = wish, seen
        self._ways = {a.tun.fileno(): (a.tun, b.tun) for a, b in (hosts, hosts[::-1])}
        self._lost: set[bytes] = set()
        self.gate = threading.Lock()  # who has it is sure that nothing is being carried

    def run(self) -> None:
        """Carry."""
        while not self.is_over:
            ready, _, _ = select.select(list(self._ways), [], [], 0.02)
            with self.gate:
                for fd in ready:
                    source, target = self._ways[fd]
                    for frame in source.read():
                        self._carry(frame, target)

    def _carry(self, frame: bytes, target: Tun) -> None:
        wish, seen = self._wish, self._seen
        pieces = split(frame, takes_partial=wish.partial)
        if VNET.unpack_from(frame)[1] != GSO_NONE:
            self._compare(frame, pieces, target)
            if wish.lost and len(pieces) > wish.lost + 1 and (lost := bytes(pieces[wish.lost])[-64:]) not in self._lost:
                self._lost.add(lost)
                del pieces[wish.lost]
        if wish.together:
            seen.refused += target.write(pieces)
            return
        for piece in pieces:
            os.writev(target.fileno(), [PLAIN, piece])
        seen.written = max(seen.written, *map(len, pieces))

    def _compare(self, frame: bytes, pieces: list[bytes], target: Tun) -> None:
        """Note what a super-packet is, and whether split and put together again it is the same to the byte."""
        seen = self._seen
        _, kind, _, size, start, offset = VNET.unpack_from(frame)
        seen.kinds[kind] += 1
        seen.segments = max(seen.segments, len(pieces))
        seen.odd += size % 2 or len(pieces[-1]) % 2
        is_udp = kind == GSO_UDP_L4
        if not is_udp:
            seen.flags |= frame[VNET_SIZE + start + 13]
        again = [b"".join(each) for each, _ in coalesce(pieces, takes_udp=target.takes_udp)]
        seen.written = max(seen.written, *map(len, again))
        before = _without_hint(bytes(frame))
        is_promised = 1 < len(pieces) <= MAX_SEGMENTS and (target.takes_udp or not is_udp)
        if not self._wish.partial and any(single(piece)[0] != PLAIN for piece in pieces):
            is_promised = False  # one full sum in 65,536 is what the partial one would be, and cannot be told from it
        if is_promised and list(map(_without_hint, again)) != [before]:
            head = VNET_SIZE + start + offset + 20
            seen.differing.append((before[:head].hex(), " ".join(each[:head].hex() for each in again)))


def _without_hint(frame: bytes) -> bytes:
    """Return a frame without hdr_len: how much of it lies in one piece in the kernel's memory, a hint."""
    return frame[:2] + b"\0\0" + frame[4:]


def _tcp(wish: Wish, relay: Relay, near: Host, far: Host) -> bool:
    listener, sender = far.socket("tcp", wish.version), near.socket("tcp", wish.version)
    listener.listen()
    sent, got = hashlib.sha256(), hashlib.sha256()
    with listener, sender:
        if wish.segment:
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, wish.segment)
        if wish.options:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes.fromhex(wish.options))
        if wish.at_once:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()

        def receive() -> None:
            receiver.settimeout(PATIENCE)
            while data := receiver.recv(1 << 18):
                got.update(data)

        thread = threading.Thread(target=receive)
        thread.start()
        chance = random.Random(7)
        with relay.gate if wish.at_once else contextlib.nullcontext():
            for size in wish.writes:
                data = chance.randbytes(size)
                sent.update(data)
                sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)
        thread.join()
        receiver.close()
    return sent.digest() == got.digest()


def _udp(wish: Wish, _: Relay, near: Host, far: Host) -> bool:
    chance, sent, got = random.Random(7), [], []
    with far.socket("udp", wish.version) as receiver, near.socket("udp", wish.version) as sender:
        sender.connect(receiver.getsockname())
        for size in wish.writes:
            data = chance.randbytes(size)
            expected = [data[at : at + wish.segment] for at in range(0, size, wish.segment)]
            sender.sendmsg([data], [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", wish.segment))])
            sent += expected
            got += [receiver.recv(65536) for _ in expected]
    return sent == got


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)


def main() -> None:
    """Do what is wished, and print what was seen."""
    wish, seen = Wish(**json.loads(sys.argv[1])), Seen()
    hosts = [Host(0), Host(1)]
    seen.takes_udp = hosts[1].tun.takes_udp
    relay = Relay(wish, seen, hosts)
    relay.start()
    try:
        seen.is_whole = (_tcp if wish.kind == "tcp" else _udp)(wish, relay, *hosts)
    finally:
        relay.is_over = True
        relay.join()
    seen.bad_sums = sum(host.bad_sums() for host in hosts)
    sys.stdout.write(json.dumps(vars(seen)))


if __name__ == "__main__":
    main()
