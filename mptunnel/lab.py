"""A client with several uplinks, NAT routers, a server and a target host, in namespaces of their own; no root needed.

    cl --p1-- r1 (masquerade) ==p1==+== sv         cl     client; p1, p2 look like Ethernet uplinks, with a gateway
                                    |   |          r1, r2 each uplink's router: NAT, and nothing unasked comes in
    cl --p2-- r2 (masquerade) ==p2==+== inet       sv     server, one public address; inet the target behind it

`--` is a veth pair, `==` the network that `wires` plays: between router and server every packet of an uplink passes
that uplink's wire, where it can be lost, delayed, cut and so on, each direction for itself and the same way in every
run with the same seed. `inet` also answers without the server, by the uplink alone: the control of a comparison.

    with Lab(two_uplinks(seed=7)) as lab:
        server = lab.spawn("sv", [sys.executable, "-m", "mptunnel", "-s"])
        lab.wire("p1").set(delay=0.020, jitter=0.005)
        lab.wire("p1").up.set(loss=0.05)
        lab.wire("p1").cut()                    # silently; .mend() takes it back
        lab.link(1, up=False)                   # and True: with address and default route, as a DHCP client would
        lab.renumber(1)                         # the next address; lab.renumber(1, 2) is the first one again
        lab.flush_nat(1)                        # the server sees another port from now on

Everything is gone after the `with`, and also when this process dies. Nothing outside the namespaces is touched.

`two_uplinks(direct=True)` is for measuring speed: veth pairs in place of `==`, so that the kernel carries everything.
The wires cannot be set then, and there is no way to `inet` but through `sv` (which forwards only if it is told to).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from mptunnel.errors import HostError
from mptunnel.wires import WEATHER_NAMES, Counts

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVER: Final = "198.51.100.1"
TARGET: Final = "203.0.113.2"
SERVER6: Final = "2001:db8:5::1"
TARGET6: Final = "2001:db8:113::2"
FIRST_HOST: Final = 2  # last part of the client's address on each uplink

_TOOLS: Final = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}
_END_SECONDS: Final = 3.0  # a program's time between SIGTERM and SIGKILL

_ROUTER_RULES: Final = """
table inet lab {
    chain nat { type nat hook postrouting priority 100; meta nfproto ipv4 oifname "wan" masquerade fully-random; }
    chain input { type filter hook input priority 0; iifname "wan" ct state new drop; }
    chain forward { type filter hook forward priority 0; iifname "wan" ct state new drop; }
}
"""


class Unavailable(HostError):  # noqa: N818  reads as what it says: the lab is unavailable
    """The kernel does not let us make namespaces or devices; leaves with 5 where root would be let."""

    def __init__(self, message: str, *, would_root_help: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 5 if would_root_help else 1


@dataclass(frozen=True, slots=True)
class Topology:
    """What a lab looks like at its start."""

    paths: int = 2
    ipv6: bool = False  # outside too: global addresses, no NAT, gateway fe80::1
    seed: int = 1  # of all chance in the wires
    strict_rp_filter: bool = False  # rp_filter=1 at the client, else 2
    links_up: bool = True  # False: the client's links are down, without address and route
    direct: bool = False  # veth pairs in place of the wires; IPv4 only


def two_uplinks(
    paths: int = 2,
    *,
    ipv6: bool = False,
    seed: int = 1,
    strict_rp_filter: bool = False,
    links_up: bool = True,
    direct: bool = False,
) -> Topology:
    """Return the topology of this module's picture; `paths` may be 1 to 8."""
    return Topology(paths, ipv6, seed, strict_rp_filter, links_up, direct)


@dataclass(frozen=True, slots=True)
class WireCounts:
    """What became of a wire's packets, each way."""

    up: Counts
    down: Counts


class Direction:
    """One direction of a wire, or both as one."""

    def __init__(self, lab: Lab, wire: str, lanes: tuple[str, ...]) -> None:
        self._lab, self._wire, self._lanes = lab, wire, lanes

    def set(self, **weather: float | bool) -> None:
        """Change what happens here: any of the fields of `wires.Weather`; the others stay as they are."""
        if unknown := set(weather) - WEATHER_NAMES:
            raise TypeError(f"a wire has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(WEATHER_NAMES))}")
        self._lab.ask(verb="set", wire=self._wire, lanes=self._lanes, **weather)

    def cut(self) -> None:
        """From now on nothing sent here arrives, and nobody is told; what is on its way still arrives."""
        self.set(is_cut=True)

    def mend(self) -> None:
        """Undo `cut`."""
        self.set(is_cut=False)


class Wire(Direction):
    """What an uplink's packets pass between its router and the internet."""

    def __init__(self, lab: Lab, name: str) -> None:
        super().__init__(lab, name, ("up", "down"))
        self.name = name
        self.up = Direction(lab, name, ("up",))
        self.down = Direction(lab, name, ("down",))

    def counts(self) -> WireCounts:
        """Return what was counted since the lab began."""
        answer = self._lab.ask(verb="counts", wire=self.name)
        return WireCounts(Counts(**answer["up"]), Counts(**answer["down"]))

    def tape(self) -> tuple[list[Passage], list[Passage]]:
        """Return what passed up and down since the last call; the first one begins it. Times as `time.monotonic()`."""
        answer = self._lab.ask(verb="tape", wire=self.name)
        up, down = ([Passage(at, bytes.fromhex(head)) for at, head in answer[way]] for way in ("up", "down"))
        return up, down


@dataclass(frozen=True, slots=True)
class Passage:
    """A packet that was given to a wire: when it arrives at the other end (None: it does not), its first 48 bytes."""

    arrives_at: float | None
    head: bytes


@dataclass(slots=True)
class _Holder:
    """The process of `wires`, and how to get into its namespaces."""

    process: subprocess.Popen[bytes]
    namespaces: dict[str, str] = field(default_factory=dict)
    user: str | None = None


class Lab:
    """The machines of a topology, for the time of a `with`. Raises `Unavailable` where the kernel forbids it."""

    def __init__(self, topology: Topology | None = None) -> None:
        self.topology = topology or two_uplinks()
        self.paths = range(1, self.topology.paths + 1)
        self._hosts = dict.fromkeys(self.paths, FIRST_HOST)
        self._processes: list[subprocess.Popen[Any]] = []
        self._asking = threading.Lock()
        self._holder: _Holder | None = None

    def __enter__(self) -> Self:
        for tool, package in _TOOLS.items():
            if not shutil.which(tool, path=_path()):
                raise Unavailable(f"{tool}: not found; install {package}")
        self._holder = _hold(self.topology)
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*self._processes)
        if self._holder:
            process, self._holder = self._holder.process, None
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
            process.wait()

    # -- running programs

    def spawn(self, role: str, argv: list[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a program in a role's namespace. Ended with the lab at the latest, by SIGTERM, then SIGKILL.

        In a session of its own, with stdin, stdout and stderr on /dev/null unless `popen` says otherwise.
        """
        for stream in ("stdin", "stdout", "stderr"):
            popen.setdefault(stream, subprocess.DEVNULL)
        popen.setdefault("start_new_session", True)
        process: subprocess.Popen[Any] = subprocess.Popen(self.entry(role) + argv, **_with_our_paths(popen))
        self._processes.append(process)
        return process

    def run(self, role: str, argv: list[str], *, given: str = "", timeout: float = 30.0) -> str:
        """Run a program in a role's namespace to its end, with `given` on stdin, and return its stdout.

        Raises `HostError` with what it said where it fails.
        """
        done = subprocess.run(
            self.entry(role) + argv,
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **_with_our_paths({}),
        )
        if done.returncode:
            raise HostError(f"{role}: {' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
        return str(done.stdout)

    def entry(self, role: str) -> list[str]:
        """Return the command line that enters a role's namespace; a program and its arguments follow."""
        holder = self._held()
        user = [f"--user={holder.user}", "--preserve-credentials"] if holder.user else []
        return ["nsenter", *user, f"--net={holder.namespaces[role]}", "--"]

    def end(self, *processes: subprocess.Popen[Any]) -> None:
        """End programs begun by `spawn`: SIGTERM, and SIGKILL where that is not heard."""
        running = [each for each in processes if each.poll() is None]
        for each in running:
            each.send_signal(signal.SIGTERM)
        for each in running:
            try:
                each.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        for each in processes:
            for pipe in (each.stdin, each.stdout, each.stderr):
                if pipe:
                    pipe.close()
        self._processes = [each for each in self._processes if each not in processes]

    def ip(self, role: str, *lines: str) -> None:
        """Run lines of `ip` in a role's namespace, in one process."""
        self.run(role, ["ip", "-batch", "-"], given="\n".join(lines) + "\n")

    def sysctl(self, role: str, values: Mapping[str, int]) -> None:
        """Set values by their names under /proc/sys/net, as `ipv4/conf/all/rp_filter`."""
        self.run(role, ["sh", "-e"], given="".join(f"echo {values[name]} > /proc/sys/net/{name}\n" for name in values))

    # -- addresses

    def client_address(self, path: int) -> str:
        """Return the client's present IPv4 address on an uplink."""
        return f"192.168.{10 + path}.{self._hosts[path]}"

    def client_address6(self, path: int) -> str:
        """Return the client's present IPv6 address on an uplink."""
        return f"2001:db8:{10 + path}::{self._hosts[path]}"

    def gateway(self, path: int) -> str:
        """Return an uplink's IPv4 gateway; the IPv6 one is fe80::1 everywhere."""
        return f"192.168.{10 + path}.1"

    def public_address(self, path: int) -> str:
        """Return the address from which the internet sees an uplink (IPv4)."""
        return f"198.51.100.{10 + path}"

    # -- what happens to the uplinks

    def wire(self, name: str) -> Wire:
        """Return the wire of an uplink, by the name of the client's interface: p1, p2."""
        if self.topology.direct or name not in {f"p{path}" for path in self.paths}:
            raise KeyError(name)
        return Wire(self, name)

    def link(self, path: int, *, up: bool) -> None:
        """Take the client's interface down, or up with its address and default route, as a DHCP client would."""
        if up:
            self.ip("cl", f"link set p{path} up", *self._lease(path))
        else:
            self.ip("cl", f"link set p{path} down")

    def unplug(self, path: int) -> None:
        """Remove the client's interface, as pulling a USB stick does."""
        self.ip("cl", f"link delete p{path}")

    def plug(self, path: int) -> None:
        """Make the client's interface (again, with a new index); it is down and bare until `link(path, up=True)`."""
        router = f"r{path}"
        self.ip("cl", f"link add p{path} type veth peer name lan netns {self._held().namespaces[router]}")
        self.ip(
            router,
            *_up("lan"),
            f"addr add {self.gateway(path)}/24 dev lan",
            *self._if_ipv6("addr add fe80::1/64 dev lan", f"addr add 2001:db8:{10 + path}::1/64 dev lan"),
        )

    def carrier(self, path: int, *, up: bool) -> None:
        """Take the far end of the client's cable down or up: the client's interface stays up, without a carrier."""
        self.ip(f"r{path}", f"link set lan {'up' if up else 'down'}")

    def renumber(self, path: int, host: int | None = None) -> str:
        """Give the client another address of the uplink's network, as a new lease would; return it (IPv4).

        Without `host` (the address's last part) the next one.
        """
        old = self._addresses(path)
        self._hosts[path] = host or self._hosts[path] + 1
        self.ip("cl", *(f"addr del {each} dev p{path}" for each in old), *self._lease(path))
        return self.client_address(path)

    def flush_nat(self, path: int) -> None:
        """Let the uplink's router forget all connections: whoever sends next gets another port."""
        self.ask(verb="forget", role=f"r{path}")

    # -- the wires' process

    def ask(self, **request: Any) -> dict[str, Any]:
        """Put a request to the wires' process, and return its answer once it is done."""
        try:
            with self._asking:
                return _ask(self._held().process, request)
        except OSError as error:
            raise HostError(f"lab: {error.strerror}") from None

    def _held(self) -> _Holder:
        if self._holder is None:
            raise HostError("this lab is not open")
        return self._holder

    # -- building

    def _build(self) -> None:
        for role in ("cl", "sv", "inet"):
            self._prepare(role, forwards=False)
        if self.topology.direct:
            self._build_direct()
        else:
            self._build_wired()
        for path in self.paths:
            self._build_uplink(path)

    def _build_direct(self) -> None:
        """Server and target without wires; the server's address is on each uplink's veth."""
        self.ip(
            "sv",
            f"link add out type veth peer name net0 netns {self._held().namespaces['inet']}",
            *_up("out"),
            "addr add 203.0.113.1/24 dev out",
        )
        self.ip("inet", *_up("net0"), f"addr add {TARGET}/24 dev net0", "route add default via 203.0.113.1")

    def _build_wired(self) -> None:
        self.ip(
            "sv",
            f"link add out type veth peer name net0 netns {self._held().namespaces['inet']}",
            *_up("pub", "out"),
            f"addr add {SERVER}/24 dev pub",
            "addr add 203.0.113.1/24 dev out",
            "route add default dev pub",
            *self._if_ipv6(f"addr add {SERVER6}/64 dev pub", "addr add 2001:db8:113::1/64 dev out"),
            *self._if_ipv6("route add ::/0 dev pub"),
        )
        self.ip(
            "inet",
            *_up("net0", "isp"),
            f"addr add {TARGET}/24 dev net0",
            "route add 198.51.100.0/24 dev isp",
            *self._if_ipv6(f"addr add {TARGET6}/64 dev net0", "route add 2001:db8::/40 dev isp"),
        )

    def _prepare(self, role: str, *, forwards: bool) -> None:
        """Set what holds for the whole namespace, before its interfaces come."""
        strictness = 2 if role == "cl" else 0
        if role == "cl" and self.topology.strict_rp_filter:
            strictness = 1
        values = {f"ipv4/conf/{which}/rp_filter": strictness for which in ("all", "default")}
        values["ipv4/ip_forward"] = int(forwards)
        if Path("/proc/sys/net/ipv6").exists():
            values |= {f"ipv6/conf/{which}/accept_dad": 0 for which in ("all", "default")}
            values |= {f"ipv6/conf/all/{name}": int(forwards) for name in ("forwarding", "keep_addr_on_down")}
        self.sysctl(role, values)
        self.ip(role, "link set lo up")

    def _build_uplink(self, path: int) -> None:
        router = f"r{path}"
        self._prepare(router, forwards=True)
        if self.topology.direct:
            self.ip(
                "sv",
                f"link add w{path} type veth peer name wan netns {self._held().namespaces[router]}",
                *_up(f"w{path}"),
                f"addr add {SERVER}/32 dev w{path}",
                f"route add {self.public_address(path)}/32 dev w{path} src {SERVER}",
            )
        self.ip(
            router,
            *_up("wan"),
            f"addr add {self.public_address(path)}/32 dev wan",
            f"route add default via {SERVER} dev wan onlink" if self.topology.direct else "route add default dev wan",
            *self._if_ipv6("route add ::/0 dev wan"),
        )
        self.run(router, ["nft", "-f", "-"], given=_ROUTER_RULES)
        self.plug(path)
        if self.topology.links_up:
            self.link(path, up=True)

    def _if_ipv6(self, *lines: str) -> tuple[str, ...]:
        return lines if self.topology.ipv6 else ()

    def _addresses(self, path: int) -> tuple[str, ...]:
        return (f"{self.client_address(path)}/24", *self._if_ipv6(f"{self.client_address6(path)}/64"))

    def _lease(self, path: int) -> tuple[str, ...]:
        """Return the lines that give the client its addresses and default routes on an uplink."""
        by = f"dev p{path} metric {100 * path}"
        return (
            *(f"addr replace {each} dev p{path}" for each in self._addresses(path)),
            f"route replace default via {self.gateway(path)} {by}",
            *self._if_ipv6(f"route replace ::/0 via fe80::1 {by}"),
        )


def _up(*devices: str) -> tuple[str, ...]:
    """Return the lines that bring devices up, without link-local addresses (and the router solicitations of those)."""
    return tuple(f"link set {each} addrgenmode none txqueuelen 5000 up" for each in devices)


# -- the wires' process ------------------------------------------------------------------------------------------


def _hold(topology: Topology) -> _Holder:
    """Start the wires' process; as root without a user namespace where one is refused."""
    try:
        return _start(topology, is_rootless=True)
    except Unavailable:
        if os.geteuid():
            raise
        return _start(topology, is_rootless=False)


def _start(topology: Topology, *, is_rootless: bool) -> _Holder:
    process = subprocess.Popen(
        [sys.executable, "-m", "mptunnel.wires"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        **_with_our_paths({}),
    )
    try:
        answer = _ask(process, _plan(topology) | {"is_rootless": is_rootless})
    except OSError as error:
        process.communicate()
        raise _why_unavailable(error, is_rootless=is_rootless) from None
    return _Holder(process, answer["namespaces"], answer["user"])


def _plan(topology: Topology) -> dict[str, Any]:
    numbers = range(1, topology.paths + 1)
    roles = ["cl", "sv", "inet", *(f"r{n}" for n in numbers)]
    if topology.direct:
        return {"roles": roles, "ports": [], "seed": topology.seed}
    ports = [
        {"role": "sv", "name": "pub", "reach": [SERVER, "2001:db8:5::/64"], "wire": ""},
        {"role": "inet", "name": "isp", "reach": [TARGET, "2001:db8:113::/64"], "wire": ""},
    ]
    ports += [
        {
            "role": f"r{path}",
            "name": "wan",
            "reach": [f"198.51.100.{10 + path}", f"2001:db8:{10 + path}::/64"],
            "wire": f"p{path}",
        }
        for path in numbers
    ]
    return {"roles": roles, "ports": ports, "seed": topology.seed}


def _ask(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None:
        raise HostError("the wires' process has no pipes")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise HostError("the wires' process has ended; its last words are on stderr")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise OSError(answer["errno"], answer["error"])
    return answer


def _why_unavailable(error: OSError, *, is_rootless: bool) -> Unavailable:
    if "/dev/net/tun" in str(error.strerror):
        return Unavailable(f"{error.strerror}; try 'modprobe tun', in a container --device /dev/net/tun")
    if os.geteuid():
        message = f"this host does not let users make namespaces ({error.strerror}); run it as root, with sudo"
        return Unavailable(message, would_root_help=is_rootless)
    return Unavailable(
        f"cannot make network namespaces ({error.strerror}); a container needs --cap-add SYS_ADMIN --cap-add NET_ADMIN"
    )


def _with_our_paths(popen: dict[str, Any]) -> dict[str, Any]:
    """Let the program find sbin tools and, with `python -m`, this very package, wherever it was started."""
    environment = dict(popen.get("env") or os.environ)
    ours = [str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, ours))
    environment["PATH"] = _path(environment.get("PATH"))
    return popen | {"env": environment}


def _path(given: str | None = None) -> str:
    return os.pathsep.join(filter(None, [given or os.environ.get("PATH"), "/usr/sbin", "/sbin"]))
