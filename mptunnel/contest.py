"""Who takes part in a benchmark: mptunnel over all paths, what else this machine has over one, and no tunnel at all.

A `Contestant` brings its tunnel up in a lab (`two_uplinks(direct=True)`), so that what the client sends to `inet` goes
through it, and says what its processes have used. All of them masquerade what leaves the server, as mptunnel does.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from mptunnel.demo import Tunnel
from mptunnel.errors import HostError
from mptunnel.keys import encode_key, new_private_key, public_key
from mptunnel.lab import SERVER, TARGET

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from mptunnel.lab import Lab

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_START_SECONDS: Final = 15.0
_STEP: Final = 0.02
_OWN, _FAR = "10.77.0.2", "10.77.0.1"  # in the tunnels of the others
_TARGETS: Final = "203.0.113.0/24"
_PORT: Final = 51820
_GATEWAY_RULES: Final = """
table ip contest {
    chain nat { type nat hook postrouting priority 100; oifname "out" masquerade; }
}
"""
_SBIN: Final = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Contestant:
    """One that carries the client's packets to the server. This one: nothing does, they go as they are, by p1."""

    name: ClassVar = "no tunnel"
    about: ClassVar = "the kernel forwards, by one path"
    programs: ClassVar[tuple[str, ...]] = ()
    device: ClassVar = "p1"

    def __init__(self, lab: Lab, places: Path) -> None:
        self._lab, self._places = lab, places
        self.processes: dict[str, subprocess.Popen[Any]] = {}

    @classmethod
    def missing(cls) -> list[str]:
        """Return the programs that it needs and that are not here."""
        return [program for program in cls.programs if not shutil.which(program, path=_SBIN)]

    def start(self) -> None:
        """Bring the tunnel up, and return when the route to the target leads through it. Raises `HostError`."""
        self.open()
        self._wait("cl", self._is_routed, f"no route to the target through {self.device}")

    def open(self) -> None:
        """Start what there is to start."""
        self._lab.sysctl("sv", {"ipv4/ip_forward": 1})

    def processor_seconds(self) -> float:
        """Return what the processes of both ends have used so far, all their threads (proc(5), fields 14 and 15)."""
        self.check()
        fields = [Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split() for p in self.processes.values()]
        return sum(int(each[11]) + int(each[12]) for each in fields) / _TICKS

    def memory(self, which: str = "VmRSS") -> dict[str, int]:
        """Return the bytes of memory of each end, now; at its peak with "VmHWM"."""
        self.check()
        found = {}
        for role, process in self.processes.items():
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            found[role] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))
        return found

    def check(self) -> None:
        """Raise `HostError` if one of the processes has ended."""
        for role, process in self.processes.items():
            if process.poll() is not None:
                raise HostError(
                    f"{self.name}: the one at {role} has ended with {process.returncode}{self._words(role)}"
                )

    def _be_gateway(self) -> None:
        """Let the server pass on what comes out of the tunnel."""
        self._lab.sysctl("sv", {"ipv4/ip_forward": 1})
        self._lab.run("sv", ["nft", "-f", "-"], given=_GATEWAY_RULES)

    def _spawn(self, role: str, argv: list[str]) -> subprocess.Popen[Any]:
        with (self._places / f"{role}.log").open("wb") as log:
            self.processes[role] = self._lab.spawn(role, argv, stdout=log, stderr=log)
        return self.processes[role]

    def _words(self, role: str) -> str:
        log = self._places / f"{role}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f": {lines[-1]}" if lines else ""

    def _wait(self, role: str, is_done: Callable[[], object], complaint: str) -> None:
        """Try until it is done: neither false nor a `HostError`. Raises `HostError` if that takes too long."""
        end = time.monotonic() + _START_SECONDS
        while True:
            self.check()
            why = self._words(role)
            try:
                if is_done():
                    return
            except HostError as error:
                why = f": {error}"
            if time.monotonic() > end:
                raise HostError(f"{self.name}: {complaint}{why}")
            time.sleep(_STEP)

    def _is_routed(self) -> bool:
        return f"dev {self.device} " in self._lab.run("cl", ["ip", "route", "get", TARGET])

    def _wait_device(self, role: str) -> None:
        show = ["ip", "link", "show", self.device]
        self._wait(role, lambda: self._lab.run(role, show), f"no device at {role}")


class WireguardGo(Contestant):
    """WireGuard in user space, as the distribution ships it."""

    name = "wireguard-go"
    about = "as installed, one path, MTU 1420"
    programs = ("wireguard-go", "wg")
    device = "wgb"

    def open(self) -> None:
        """Start both ends, each with a /run of its own: its socket has a fixed place there."""
        keys = {role: new_private_key(os.urandom) for role in ("cl", "sv")}
        for role, other, address in (("sv", "cl", _FAR), ("cl", "sv", _OWN)):
            mount = 'mount -t tmpfs none "$(readlink -f /var/run)" && exec wireguard-go -f "$0"'
            process = self._spawn(role, ["unshare", "--mount", "sh", "-c", mount, self.device])
            self._wait_device(role)
            allowed, way = (_OWN, "") if role == "sv" else ("0.0.0.0/0", f"Endpoint = {SERVER}:{_PORT}\n")
            port = f"ListenPort = {_PORT}\n" if role == "sv" else ""
            text = f"[Interface]\nPrivateKey = {encode_key(keys[role])}\n{port}"
            text += f"[Peer]\nPublicKey = {encode_key(public_key(keys[other]))}\nAllowedIPs = {allowed}\n{way}"
            self._configure(role, process.pid, text)
            self._lab.ip(role, f"addr add {address}/24 dev {self.device}", f"link set {self.device} mtu 1420 up")
        self._be_gateway()
        self._lab.ip("cl", f"route add {_TARGETS} dev {self.device}")

    def _configure(self, role: str, pid: int, text: str) -> None:
        """Give it its keys as soon as its socket is there."""
        command = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "wg", "setconf", self.device, "/dev/stdin"]

        def is_told() -> bool:
            self._lab.run(role, command, given=text)
            return True

        self._wait(role, is_told, f"cannot be configured at {role}")


class OpenVpn(Contestant):
    """OpenVPN in user space, point to point over UDP, each end knowing the other's certificate by its fingerprint."""

    name = "openvpn"
    about = "as installed, one path, UDP, AES-256-GCM, in user space"
    programs = ("openvpn", "openssl")
    device = "ovb"

    def open(self) -> None:
        """Make certificates and start both ends."""
        prints = {role: self._certificate(role) for role in ("cl", "sv")}
        ends = {
            "sv": [f"ifconfig {_FAR} {_OWN}", "tls-server", "dh none", f"port {_PORT}"],
            "cl": [f"ifconfig {_OWN} {_FAR}", "tls-client", "nobind", f"remote {SERVER} {_PORT}"],
        }
        for role, other in (("sv", "cl"), ("cl", "sv")):
            lines = [
                *ends[role],
                f"dev {self.device}",
                "dev-type tun",
                "proto udp4",
                "disable-dco",
                "data-ciphers AES-256-GCM",
                f"cert {self._places / role}.crt",
                f"key {self._places / role}.key",
                f"<peer-fingerprint>\n{prints[other]}\n</peer-fingerprint>",
            ]
            config = self._places / f"{role}.ovpn"
            config.write_text("\n".join(lines) + "\n")
            self._spawn(role, ["openvpn", "--config", str(config)])
        self._be_gateway()
        self._wait_device("cl")
        self._wait("cl", self._is_up, "does not come up")
        self._lab.ip("cl", f"route add {_TARGETS} dev {self.device}")

    def _certificate(self, role: str) -> str:
        """Make a key and a certificate of its own; return the fingerprint."""
        base = self._places / role
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", f"{base}.key", "-out", f"{base}.crt", "-days", "2", "-subj", f"/CN={role}"]
        self._lab.run(role, [*request, *files])
        told = self._lab.run(role, ["openssl", "x509", "-in", f"{base}.crt", "-noout", "-fingerprint", "-sha256"])
        return told.strip().partition("=")[2]

    def _is_up(self) -> bool:
        return "Initialization Sequence Completed" in (self._places / "cl.log").read_text(errors="replace")


class Mptunnel(Contestant):
    """This program, as its users run it, over every path of the lab."""

    name = "mptunnel"
    about = "every packet over every path"
    device = "mpt0"

    def __init__(self, lab: Lab, places: Path, *words: str) -> None:
        super().__init__(lab, places)
        self._words_for_server = words
        self.tunnel = Tunnel(lab, places)

    def open(self) -> None:
        """Start the server and let the client join it."""
        self.tunnel.start(*self._words_for_server)
        self.processes = self.tunnel.processes


class Floor(Contestant):
    """The least that could do it (see `floor`): what Python, the kernel and the copies cost without our protocol."""

    name = "floor"
    about = "no protocol, every packet over every path: not a tunnel to use"
    device = "flb"

    def open(self) -> None:
        """Start both ends, the server first: the client says one word on each path, and says it once."""
        program = [sys.executable, "-m", "mptunnel.floor"]
        paths = [f"p{path}={self._lab.client_address(path)}" for path in self._lab.paths]
        ends = (("sv", _FAR, [str(_PORT)]), ("cl", _OWN, [str(_PORT), SERVER, *paths]))
        for role, address, words in ends:
            self._spawn(role, [*program, role, self.device, *words])
            self._wait_device(role)
            self._wait(role, partial(self._is_open, role), f"opens no socket at {role}")
            self._lab.ip(role, f"addr add {address}/24 dev {self.device}", f"link set {self.device} mtu 1420 up")
        self._be_gateway()
        self._lab.ip("cl", f"route add {_TARGETS} dev {self.device}")

    def _is_open(self, role: str) -> bool:
        return f":{_PORT}" in self._lab.run(role, ["ss", "-Huan"])


CONTESTANTS: Final[tuple[type[Contestant], ...]] = (Contestant, WireguardGo, OpenVpn, Mptunnel)
