"""WireGuard as Debian ships it: wireguard-go, set by `wg`, beside the real program in a lab.

`Stock` is a wireguard-go in a role's namespace, `Watch` notes every datagram that passes the server's public
interface, and `Flood` sends handshakes that cost their receiver a product. wireguard-go wants /var/run/wireguard: it
gets a mount namespace of its own, so nothing of it is seen elsewhere or stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

import pytest

from mptunnel.keys import decode_key
from mptunnel.traffic import Datagrams, Download, content_sha256
from tests.running import PROGRAM, Tunnel, wait_until

if TYPE_CHECKING:
    from mptunnel.lab import Lab

DEVICE: Final = "wglab"
PORT: Final = 51820
INITIATION, RESPONSE, COOKIE, DATA = 1, 2, 3, 4
KEEPALIVE: Final = 32  # bytes of the datagram

_TOOLS: Final = ("wireguard-go", "wg", "wg-quick", "ping")
_IN_ITS_OWN_RUN = f"mount -t tmpfs tmpfs /var/run && mkdir /var/run/wireguard && exec wireguard-go -f {DEVICE}"

# All UDP datagrams of a port, one line each: when, from, to, size, first and last bytes.
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
        source, target = [int.from_bytes(data[at + n : at + n + 2], "big") for n in (0, 2)]
        if port in (source, target):
            a, b, c = (12, 16, 20) if is4 else (8, 24, 40)
            body = data[at + 8 : at + int.from_bytes(data[at + 4 : at + 6], "big")]
            print(now, data[a:b].hex(), source, data[b:c].hex(), target, len(body), body[:16].hex(), body[-16:].hex(),
                  flush=True)
"""

# Initiations that nobody made, with the right mac1 for a key, to a port right here: bursts of them, for ever.
_FLOOD = """
import hashlib, os, socket, sys, time
public, port, burst, pause = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
key = hashlib.blake2s(b"mac1----" + public).digest()
bodies = [bytes([1, 0, 0, 0]) + os.urandom(112) for _ in range(burst)]
messages = [body + hashlib.blake2s(body, key=key, digest_size=16).digest() + bytes(16) for body in bodies]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    while True:
        for message in messages:
            s.sendto(message, ("127.0.0.1", port))
        time.sleep(pause)
"""


def require_tools() -> None:
    """Skip the test where there is no WireGuard to talk to; in CI, fail it."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing and "CI" in os.environ:
        pytest.fail(f"not found: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not found: {', '.join(missing)}; install wireguard-go, wireguard-tools and iputils-ping")


class Stock:
    """A wireguard-go with a key of its own, as yet without address and peer."""

    def __init__(self, tunnel: Tunnel, role: str, port: int) -> None:
        self._lab, self._role = tunnel.lab, role
        self._log = tunnel.places / f"{role}-wireguard-go"
        with self._log.open("wb") as log:
            argv = ["env", "LOG_LEVEL=verbose", "unshare", "--mount", "sh", "-ec", _IN_ITS_OWN_RUN]
            self.process = self._lab.spawn(role, argv, stdout=log, stderr=log)
        wait_until(lambda: "UAPI listener started" in self.log(), "wireguard-go listens to wg")
        private = self._lab.run(role, ["wg", "genkey"])
        self.public = self._lab.run(role, ["wg", "pubkey"], given=private).strip()
        self.wg("set", DEVICE, "listen-port", str(port), "private-key", "/dev/stdin", given=private)

    def wg(self, *words: str, given: str = "") -> str:
        """Run `wg` where this wireguard-go's socket is."""
        inside = ["nsenter", f"--target={self.process.pid}", "--mount", "--"]
        return self._lab.run(self._role, [*inside, "wg", *words], given=given)

    def set_peer(self, public: str, *words: str, psk: str = "") -> None:
        """Change its peer of this key, or add it."""
        secret = ("preshared-key", "/dev/stdin") if psk else ()
        self.wg("set", DEVICE, "peer", public, *secret, *words, given=psk)

    def up(self, *addresses: str, mtu: int = 1420) -> None:
        """Give the device its addresses."""
        lines = (f"addr replace {each} dev {DEVICE}" for each in addresses)
        self._lab.ip(self._role, f"link set {DEVICE} addrgenmode none mtu {mtu}", f"link set {DEVICE} up", *lines)

    def peer(self) -> dict[str, Any]:
        """Return what it says of its only peer; when the last handshake was (0: never), and bytes."""
        row = self.wg("show", DEVICE, "dump").splitlines()[1].split()
        return {"endpoint": row[2], "handshake_at": int(row[4]), "received": int(row[5]), "sent": int(row[6])}

    def handshakes(self) -> int:
        """Return how many handshakes it has completed as their initiator."""
        return self.log().count("Received handshake response")

    def answers(self) -> int:
        """Return how many handshakes it has answered."""
        return self.log().count("Sending handshake response")

    def log(self) -> str:
        """Return what it has said so far."""
        return self._log.read_text(errors="replace")


class Phone(Stock):
    """A stock client, set up by the wg-quick configuration that `peer add` printed, as wg-quick would do it."""

    def __init__(self, tunnel: Tunnel, configuration: str, path: int = 1) -> None:
        super().__init__(tunnel, "cl", PORT)
        self._file = tunnel.places / f"{DEVICE}.conf"
        self._file.touch(mode=0o600)
        self._file.write_text(configuration)
        self._said = dict(line.split(" = ", 1) for line in configuration.splitlines() if " = " in line)
        self.server_key = self._said["PublicKey"]
        self.go_by(path)
        self.configure()
        self.up(*self._said["Address"].split(", "), mtu=int(self._said["MTU"]))
        halves = ("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1")
        self._lab.ip("cl", *(f"route add {half} dev {DEVICE}" for half in halves))

    def configure(self) -> None:
        """Set the configuration, which makes it forget all keys."""
        stripped = self._lab.run("cl", ["wg-quick", "strip", str(self._file)])
        with_port = stripped.replace("[Interface]", f"[Interface]\nListenPort = {PORT}")
        self.wg("setconf", DEVICE, "/dev/stdin", given=with_port)

    def go_by(self, path: int) -> None:
        """Let its datagrams leave by this uplink from now on."""
        server = self._said["Endpoint"].rpartition(":")[0].strip("[]")
        gateway = "fe80::1" if ":" in server else self._lab.gateway(path)
        self._lab.ip("cl", f"route replace {server} via {gateway} dev p{path}")

    def forget_source(self) -> None:
        """Let it choose anew where it sends from: wireguard-go keeps that with the endpoint."""
        self.set_peer(self.server_key, "endpoint", self._said["Endpoint"])


class Provider(Stock):
    """A stock server that knows one client, ours."""

    ADDRESSES: Final = ("10.9.0.1", "fd09::1")

    def __init__(self, tunnel: Tunnel) -> None:
        super().__init__(tunnel, "sv", PORT)
        self._file = tunnel.places / "provider.conf"
        self.up(*(f"{address}/{bits}" for address, bits in zip(self.ADDRESSES, (24, 64), strict=True)))

    def admit(self, public: str, psk: str = "") -> None:
        """Let a client in."""
        self.client_key = public
        self.set_peer(public, "allowed-ips", "10.9.0.2/32,fd09::2/128", psk=psk)

    def configuration(self, endpoint: str, *, with_psk: bool = False, more: str = "") -> str:
        """Let a new client in, and return the file that its owner gets."""
        private = self._lab.run("sv", ["wg", "genkey"])
        psk = self._lab.run("sv", ["wg", "genpsk"]).strip() if with_psk else ""
        self.admit(self._lab.run("sv", ["wg", "pubkey"], given=private).strip(), psk)
        lines = [
            "[Interface]",
            f"PrivateKey = {private.strip()}",
            "Address = 10.9.0.2/32, fd09::2/128",
            "[Peer]",
            f"PublicKey = {self.public}",
            *([f"PresharedKey = {psk}"] if psk else []),
            "AllowedIPs = 10.9.0.0/24, fd09::/64",
            f"Endpoint = {endpoint}",
            more,
        ]
        self._file.touch(mode=0o600)
        self._file.write_text("\n".join(lines) + "\n")
        return str(self._file)


@dataclass(frozen=True, slots=True)
class Datagram:
    """One datagram at the server's public interface."""

    at: float
    source: tuple[str, int]
    target: tuple[str, int]
    size: int
    kind: int
    index: int
    counter: int  # of type 4
    has_mac2: bool  # of types 1 and 2


class Watch:
    """All datagrams of the server's UDP port as they pass its public interface."""

    def __init__(self, tunnel: Tunnel, port: int) -> None:
        self._file, self._port = tunnel.places / f"watch-{port}", port
        with self._file.open("wb") as file:
            tunnel.lab.spawn("sv", [sys.executable, "-c", _WATCH, "pub", str(port)], stdout=file, stderr=None)
        wait_until(self._file.read_text, "somebody watches")

    def seen(self, *kinds: int, since: float = 0.0) -> list[Datagram]:
        """Return what has passed since then, of these kinds only."""
        lines = self._file.read_text().split("\n")[1:-1]
        return [each for each in map(_datagram, lines) if each.at >= since and (not kinds or each.kind in kinds)]

    def up(self, *kinds: int, since: float = 0.0) -> list[Datagram]:
        """Return what has gone to the server."""
        return [each for each in self.seen(*kinds, since=since) if each.target[1] == self._port]

    def down(self, *kinds: int, since: float = 0.0) -> list[Datagram]:
        """Return what has come from the server."""
        return [each for each in self.seen(*kinds, since=since) if each.source[1] == self._port]


def _datagram(line: str) -> Datagram:
    at, source, from_port, target, to_port, size, head, tail = line.split(" ")
    first = bytes.fromhex(head)
    return Datagram(
        at=float(at),
        source=(str(ip_address(bytes.fromhex(source))), int(from_port)),
        target=(str(ip_address(bytes.fromhex(target))), int(to_port)),
        size=int(size),
        kind=int.from_bytes(first[:4], "little"),
        index=int.from_bytes(first[4:8], "little"),
        counter=int.from_bytes(first[8:16], "little"),
        has_mac2=any(bytes.fromhex(tail)),
    )


class Flood:
    """Initiations of nobody, with the right mac1, from the receiver's own machine: `burst` at once, again and again."""

    def __init__(self, lab: Lab, role: str, public_key: str, port: int, *, burst: int, pause: float = 0.2) -> None:
        key = decode_key(public_key).hex()
        lab.spawn(role, [sys.executable, "-c", _FLOOD, key, str(port), str(burst), str(pause)], stderr=None)


def start_changed(tunnel: Tunnel, place: str, constants: dict[str, float], *words: str) -> None:
    """Start the program with other values of its constants, named `module.NAME`."""
    lines = [f"import mptunnel.{name.partition('.')[0]}; mptunnel.{name} = {constants[name]}" for name in constants]
    source = "\n".join([*lines, "from mptunnel.cli import main", "main()"])
    with tunnel.log_file(place).open("ab") as log:
        argv = [sys.executable, "-c", source, *tunnel.command(place, *words)[len(PROGRAM) :]]
        tunnel.running[place] = tunnel.lab.spawn(place[:2], argv, stdout=log, stderr=log)


def ping(lab: Lab, role: str, address: str) -> bool:
    """Whether an address answers within a second."""
    with contextlib.suppress(Exception):
        return "1 received" in lab.run(role, ["ping", "-c1", "-W1", address])
    return False


def check_traffic(lab: Lab, far: str, *addresses: str) -> None:
    """Hold a tunnel to it: pings, datagrams both ways without loss or copies, downloads with the right hash."""
    running = [Datagrams(lab, 0.5, rate=200, size=1100, address=address, far=far) for address in addresses]
    for address in addresses:
        assert "3 received" in lab.run("cl", ["ping", "-c3", "-i0.05", "-W2", "-s1000", address])
    for address, datagrams in zip(addresses, running, strict=True):
        flows = datagrams.finish()
        assert [(flow.lost, flow.duplicated) for flow in flows] == [(0, 0), (0, 0)], address
    size = 2_000_000
    for address in addresses:
        done = Download(lab, size, address=address).finish()
        assert done.sha256 == content_sha256(size), (address, done.error)


def now() -> float:
    """Return the time of `Datagram.at`."""
    return time.monotonic()
