"""Many idle clients for a benchmark: the real `Client` with real sockets, hundreds of them in one process.

They know the server already (`admit` writes them into its state before it starts), take both uplinks of the lab's
client, and have no device: nothing is sent through them. What they cost the server is what idle clients cost it;
what they cost themselves is one process (`python -m mptunnel.crowd`), not as many.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any, Final

from mptunnel import config, netlink, udp
from mptunnel.client import Client, Membership
from mptunnel.errors import HostError
from mptunnel.events import ClosePath, OpenPath, Resolve, RunScript, SaveState, Stop
from mptunnel.lab import SERVER
from mptunnel.noise import NO_PSK
from mptunnel.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mptunnel.config import Link
    from mptunnel.lab import Lab

NETWORK: Final = IPv4Network("10.64.0.0/16")  # room for all of them
IDLE_SECONDS: Final = 11.0  # a tunnel probes as if it were in use for 10 s from its beginning

_IN_ONE: Final = 400  # clients of a process: two sockets each, and select() takes no descriptor from 1024 on
_PACE: Final = 0.04  # s between two that begin: each probes 8 times a second at first
_PATIENCE: Final = 30.0  # for all of them, and for each as long as the pace once more
_READS: Final = 16
_STDIN: Final = 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a client of the crowd needs to be let in."""

    private: bytes = field(repr=False)
    server: bytes


def admit(state_dir: Path, count: int) -> list[Ticket]:
    """Write `count` new clients into the state of a server that does not run yet."""
    state = StateDir(state_dir)
    with state.lock_server():
        server = config.public_key(state.server_key().private_key)
        network, now = config.new_network(NETWORK, os.urandom), time.time()
        peers: list[config.PeerRecord] = []
        tickets = []
        for number in range(count):
            private = config.new_private_key(os.urandom)
            config.add_peer(peers, network, f"idle-{number}", config.public_key(private), NO_PSK, now, stock=False)
            tickets.append(Ticket(private, server))
        state.save("server/network", network.to_document())
        state.save("server/peers", config.peers_to_document(peers))
    return tickets


def gather(lab: Lab, tickets: Sequence[Ticket]) -> None:
    """Start the crowd at the lab's client, and return when all are connected and idle. Raises `HostError`."""
    names = [f"p{path}" for path in lab.paths]
    crowds = [tickets[at : at + _IN_ONE] for at in range(0, len(tickets), _IN_ONE)]
    for crowd in crowds:
        argv = [sys.executable, "-m", "mptunnel.crowd"]
        process = lab.spawn("cl", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None)
        assert process.stdin  # noqa: S101  it has pipes
        assert process.stdout  # noqa: S101
        keys = [ticket.private.hex() for ticket in crowd]
        process.stdin.write(
            json.dumps({"keys": keys, "server": crowd[0].server.hex(), "paths": names}).encode() + b"\n"
        )
        process.stdin.flush()
        patience = _PATIENCE + 2 * _PACE * len(crowd)
        if not select.select([process.stdout], [], [], patience)[0] or not process.stdout.readline():
            raise HostError(f"{len(crowd)} idle clients are not all connected after {patience:.0f} s")
    if crowds:
        time.sleep(IDLE_SECONDS)


class _Idler:
    """One client: its sockets, and what it asks of the world."""

    def __init__(self, private: bytes, server: bytes, paths: Sequence[str], links: tuple[Link, ...]) -> None:
        now = _now()
        settings = config.ClientSettings(server=SERVER, interfaces=tuple(paths), no_script=True)
        record = config.ServerRecord(server, NO_PSK, said_hello=True, joined=True)
        self._client = Client(
            settings,
            Membership(record, private),
            (IPv4Address(SERVER),),
            reserved=0,
            kept=(),
            entropy=os.urandom,
            rng=random.Random(),  # noqa: S311  jitter only
            now=now,
            wall=time.time(),
        )
        self._sockets: dict[int, udp.PathSocket] = {}
        self._inbox: list[Any] = []
        self._client.links_changed(links, now)
        self.drain(now)

    @property
    def is_up(self) -> bool:
        """Whether all its paths are up."""
        paths = list(self._client.paths.values())
        return bool(paths) and all(path.state.name == "UP" for path in paths)

    def sockets(self) -> dict[int, int]:
        """Return the path of each descriptor."""
        return {sock.fileno(): path for path, sock in self._sockets.items()}

    def due(self) -> float:
        """When it wants to be called again."""
        return self._client.next_deadline()

    def receive(self, path: int, now: float) -> None:
        """Take what waits at a path's socket."""
        sock = self._sockets.get(path)
        with contextlib.suppress(OSError):  # no more, or an ICMP message
            for _ in range(_READS if sock else 0):
                assert sock  # noqa: S101
                self._client.receive(*sock.receive(), now, self._inbox)
        self._inbox.clear()

    def drain(self, now: float) -> None:
        """Do what is due and what it asks for."""
        self._client.finish_turn(now)
        if self._client.next_deadline() <= now:
            self._client.handle_timeout(now)
        while True:
            for transmit in self._client.transmits():
                if transmit.to in self._sockets:
                    self._sockets[transmit.to].send(transmit.data, transmit.size)
            events = self._client.events()
            if not events:
                return
            for event in events:
                match event:
                    case OpenPath():
                        sock = self._sockets[event.path] = udp.PathSocket(event)
                        self._client.path_opened(event.path, sock.port, now)
                    case ClosePath():
                        self._sockets.pop(event.path).close()
                    case RunScript() | SaveState() | Resolve():  # it has no host to set up and nothing to keep
                        self._client.job_done(event, None, now)
                    case Stop():
                        raise event.error


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    """Be a crowd: keys on stdin, a line on stdout when all are up; until stdin ends."""
    logging.getLogger("mptunnel").addHandler(logging.NullHandler())  # what a client says of its way up
    gc.disable()
    request = json.loads(sys.stdin.readline())
    links, server = netlink.snapshot(), bytes.fromhex(request["server"])
    waiting = [bytes.fromhex(key) for key in request["keys"]]
    crowd: list[_Idler] = []
    due: list[float] = []  # of each, in the same order
    where: dict[int, tuple[int, int]] = {}  # descriptor -> number in the crowd, path
    next_at, is_told = _now(), False
    while True:
        if waiting and _now() >= next_at:
            crowd.append(_Idler(waiting.pop(), server, request["paths"], links))
            where |= {fd: (len(crowd) - 1, path) for fd, path in crowd[-1].sockets().items()}
            due.append(crowd[-1].due())
            next_at = max(next_at + _PACE, _now())
        wake = min([*due, next_at] if waiting else due)
        ready, _, _ = select.select([_STDIN, *where], [], [], min(1.0, max(0.0, wake - _now())))
        if _STDIN in ready:
            return
        now = _now()
        busy = {which for which, at in enumerate(due) if at <= now}
        for fd in ready:
            which, path = where[fd]
            crowd[which].receive(path, now)
            busy.add(which)
        for which in busy:
            crowd[which].drain(now)
            due[which] = crowd[which].due()
        if not (is_told or waiting) and all(each.is_up for each in crowd):
            is_told = True
            sys.stdout.write("up\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
