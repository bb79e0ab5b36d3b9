"""WireGuard as Debian ships it (wireguard-go, set by `wg`) and the real program, side by side in a lab.

`Stock` is a wireguard-go, `Ours` an mptunnel, each in a role's namespace. `Watch` notes every datagram that passes
the server's public interface, and `Flood` sends handshakes that cost their receiver a product. wireguard-go wants
/var/run/wireguard: it gets a mount namespace of its own, so nothing of it is seen elsewhere or stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import control
from mptunnel.config import decode_key
from mptunnel.errors import HostError, MptunnelError
from mptunnel.lab import Lab, Unavailable, two_uplinks
from mptunnel.traffic import Datagrams, Download, Flow, content_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEVICE = "wglab"
STOCK_PORT = 51820
INITIATION, RESPONSE, COOKIE, DATA = 1, 2, 3, 4
KEEPALIVE_SIZE = 32

_MOUNTED = "mount -t tmpfs tmpfs /var/run && mkdir /var/run/wireguard && exec wireguard-go -f " + DEVICE

# All UDP datagrams of a port, one line each: when, from, to, and their first and last bytes.
_WATCH = """
import socket, sys, time
device, port = sys.argv[1], int(sys.argv[2])
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    s.bind((device, 3))
    print("ready", flush=True)
    while True:
        data = s.recv(65536)
        now, is4 = time.monotonic(), data[0] >> 4 == 4
        at = (data[0] & 15) * 4 if is4 else 40
        if data[9 if is4 else 6] != 17:
            continue
        ends = [int.from_bytes(data[at + n : at + n + 2]) for n in (0, 2)]
        if port in ends:
            a, b, c = (12, 16, 20) if is4 else (8, 24, 40)
            body = data[at + 8 : at + int.from_bytes(data[at + 4 : at + 6])]
            print(now, data[a:b].hex(), ends[0], data[b:c].hex(), ends[1], len(body), body[:16].hex(), body[-16:].hex(),
                  flush=True)
"""

# Initiations that nobody made, with the right mac1 for a key: BURST of them, every PAUSE seconds, to PORT right here.
_FLOOD = """
import hashlib, os, socket, sys, time
public, port, burst, pause = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
key = hashlib.blake2s(b"mac1----" + public).digest()
bodies = [bytes([1, 0, 0, 0]) + os.urandom(112) for _ in range(burst)]
floods = [each + hashlib.blake2s(each, key=key, digest_size=16).digest() + bytes(16) for each in bodies]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect(("127.0.0.1", port))
    while True:
        for each in floods:
            try:
                s.send(each)
            except OSError:
                pass
        time.sleep(pause)
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two uplinks with IPv6 too; a test that cannot have them is skipped, in CI it fails."""
    missing = [tool for tool in ("wireguard-go", "wg", "wg-quick") if not shutil.which(tool)]
    with contextlib.ExitStack() as stack:
        try:
            if missing:
                raise Unavailable(f"{', '.join(missing)}: not found; install wireguard-go and wireguard-tools")
            made = stack.enter_context(Lab(two_uplinks(ipv6=True)))
        except Unavailable as error:
            if "CI" in os.environ:
                raise
            pytest.skip(str(error))
        yield made


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Wait until the condition holds, and return what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


class Stock:
    """A wireguard-go in a role's namespace, without addresses and routes."""

    def __init__(self, lab: Lab, role: str, places: Path, *, port: int = 0) -> None:
        self._lab, self._role = lab, role
        self.log = places / f"{role}-wireguard-go.log"
        with self.log.open("wb") as log:
            argv = ["env", "LOG_LEVEL=verbose", "unshare", "--mount", "sh", "-c", _MOUNTED]
            self.process = lab.spawn(role, argv, stdout=log, stderr=log)
        until(lambda: "UAPI listener started" in self.log.read_text(), "wireguard-go is there")
        self.private = lab.run(role, ["wg", "genkey"]).strip()
        self.public = lab.run(role, ["wg", "pubkey"], given=self.private).strip()
        if port:
            self.wg("set", DEVICE, "listen-port", str(port), "private-key", "/dev/stdin", given=self.private)

    def wg(self, *words: str, given: str = "") -> str:
        """Run `wg` where this wireguard-go's socket is."""
        inside = ["nsenter", f"--target={self.process.pid}", "--mount", "--"]
        return self._lab.run(self._role, [*inside, "wg", *words], given=given)

    def up(self, *addresses: str, mtu: int = 1420) -> None:
        """Give the device its addresses."""
        lines = (f"addr add {each} dev {DEVICE}" for each in addresses)
        self._lab.ip(self._role, *lines, f"link set {DEVICE} mtu {mtu} up")

    def setconf(self, configuration: str, places: Path) -> None:
        """Be the client that a wg-quick configuration describes, as wg-quick would set it up, by uplink 1."""
        file = places / f"{DEVICE}.conf"
        file.touch(mode=0o600)
        file.write_text(configuration)
        self.wg("setconf", DEVICE, "/dev/stdin", given=self._lab.run(self._role, ["wg-quick", "strip", str(file)]))
        said = dict(line.split(" = ", 1) for line in configuration.splitlines() if " = " in line)
        self.up(*(each.strip() for each in said["Address"].split(",")), mtu=int(said["MTU"]))
        routes = ("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")
        self._lab.ip(self._role, *(f"route add {each} dev {DEVICE}" for each in routes))

    def peer(self) -> dict[str, Any]:
        """Return what `wg show dump` says of its only peer."""
        key, psk, endpoint, allowed, handshake, rx, tx, keepalive = self.wg("show", DEVICE, "dump").split("\n")[1].split()
        return {
            "public_key": key, "psk": psk, "endpoint": endpoint, "allowed_ips": allowed, "handshake": int(handshake),
            "rx": int(rx), "tx": int(tx), "keepalive": keepalive,
        }  # fmt: skip

    def handshakes(self) -> int:
        """Return how many handshakes it has completed, in either role."""
        text = self.log.read_text()
        return text.count("Received handshake response") + text.count("Sending handshake response")


class Ours:
    """The real program in a role's namespace, with directories of its own. `python` runs before it in its process."""

    def __init__(self, lab: Lab, role: str, places: Path) -> None:
        self._lab, self._role = lab, role
        self._home = places / role
        self.log = places / f"{role}-mptunnel.log"
        self.process: subprocess.Popen[Any] | None = None

    def start(self, *arguments: str, python: str = "pass") -> None:
        """Start it, and wait until it can be asked."""
        source = f"{python}\nfrom mptunnel.cli import main\nmain()"
        with self.log.open("ab") as log:
            argv = [sys.executable, "-c", source, *self._directories(), *arguments]
            self.process = self._lab.spawn(self._role, argv, stdout=log, stderr=log)
        until(self.status, "the program can be asked")

    def run(self, *arguments: str) -> str:
        """Run a subcommand."""
        return self._lab.run(self._role, [sys.executable, "-m", "mptunnel", *self._directories(), *arguments])

    def status(self) -> dict[str, Any]:
        """Return its status object; {} while it does not answer."""
        assert self.process is None or self.process.poll() is None, self.log.read_text()
        try:
            known: dict[str, Any] = control.ask(self._home / "run" / "mpt0.sock", "status")
        except MptunnelError:
            return {}
        return known

    def peer(self) -> dict[str, Any]:
        """Return what a server says of its only client."""
        (peer,) = self.status()["peers"]
        known: dict[str, Any] = peer
        return known

    def _directories(self) -> list[str]:
        return ["--state-dir", str(self._home / "state"), "--run-dir", str(self._home / "run")]


@dataclass(frozen=True, slots=True)
class Datagram:
    """One datagram at the server's public interface."""

    at: float
    source: tuple[str, int]
    target: tuple[str, int]
    size: int
    kind: int
    index: int
    counter: int
    has_mac2: bool  # or any other end than 16 zero bytes


class Watch:
    """All datagrams of the server's UDP port, on its public interface: what is on the wire."""

    def __init__(self, lab: Lab, port: int, places: Path) -> None:
        self._file, self._port = places / f"watch-{port}", port
        with self._file.open("wb") as file:
            argv = [sys.executable, "-c", _WATCH, "pub", str(port)]
            self.process = lab.spawn("sv", argv, stdout=file, stderr=None)
        until(self._file.read_text, "somebody watches")

    def seen(self, since: float = 0.0, *kinds: int) -> list[Datagram]:
        """Return what has passed since then, of these kinds only."""
        lines = self._file.read_text().split("\n")[1:-1]
        return [each for each in map(_datagram, lines) if each.at >= since and (not kinds or each.kind in kinds)]

    def up(self, since: float = 0.0, *kinds: int) -> list[Datagram]:
        """Return what has gone to the server."""
        return [each for each in self.seen(since, *kinds) if each.target[1] == self._port]

    def down(self, since: float = 0.0, *kinds: int) -> list[Datagram]:
        """Return what has come from the server."""
        return [each for each in self.seen(since, *kinds) if each.source[1] == self._port]


def _datagram(line: str) -> Datagram:
    at, source, sport, target, dport, size, head, tail = line.split(" ")
    first = bytes.fromhex(head)
    return Datagram(
        float(at),
        (str(ip_address(bytes.fromhex(source))), int(sport)),
        (str(ip_address(bytes.fromhex(target))), int(dport)),
        int(size),
        int.from_bytes(first[:4], "little"),
        int.from_bytes(first[4:8], "little"),
        int.from_bytes(first[8:16], "little"),
        any(bytes.fromhex(tail)),
    )


class Flood:
    """Handshakes that nobody made, with the right mac1, from the receiver's own machine: bursts of them, for ever."""

    def __init__(self, lab: Lab, role: str, public_key: str, port: int, *, burst: int, pause: float) -> None:
        self._lab = lab
        key = decode_key(public_key).hex()
        self.process = lab.spawn(role, [sys.executable, "-c", _FLOOD, key, str(port), str(burst), str(pause)])

    def end(self) -> None:
        self._lab.end(self.process)


def exchange(lab: Lab, address: str, *, near: str = "cl", far: str, seconds: float = 1.0, rate: int = 200, size: int = 300) -> tuple[Flow, Flow]:
    """Send numbered datagrams both ways, and return what became of them, up and down."""
    return Datagrams(lab, seconds, rate=rate, size=size, address=address, near=near, far=far).finish()


def assert_carries(lab: Lab, far: str, *addresses: str, seconds: float = 0.5) -> None:
    """Hold a tunnel to it: ping, datagrams both ways without loss or copies, and a download with the right hash."""
    flows = [Datagrams(lab, seconds, rate=200, size=1100, address=each, far=far) for each in addresses]
    for address in addresses:
        said = lab.run("cl", ["ping", "-c3", "-i0.05", "-W2", "-s1000", address])
        assert "3 received" in said, said
    for address, flow in zip(addresses, flows, strict=True):
        for way, one in zip(("up", "down"), flow.finish(), strict=True):
            assert (one.lost, one.duplicated) == (0, 0), f"{address}, {way}"
    size = 2_000_000
    for address in addresses:
        done = Download(lab, size, address=address).finish()
        assert done.sha256 == content_sha256(size), done
