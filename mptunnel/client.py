"""The client: which paths to open, how the server is known, what the host is told.

**Paths.** Whenever the host's links have changed, every path's way out is worked out anew (`uplinks`). A path whose way
is new or different gets its rule and table by the script first, then a socket; its local port stays the same if the
kernel allows. A path whose socket cannot be opened is tried again every second.

**Mute paths.** A path that is open, carries neither way and has been so for a while is tried otherwise: by the other IP
version where server and interface have both, else from another local port, since a NAT may hold a dead mapping that
our own probes keep alive. One that was never heard has 5 s, one that was heard 30 s: most outages are shorter, and it
shall be found where it was. Each time it has twice as long, up to a minute, in idleness at least the time between two
probes; but only 5 s by a version that is not the one it was heard by. It is down all the while, which is told once.
Towards a server that is not known to take probes silence says nothing: there only a path that was never heard tries the
other version, while the tunnel is not up.

**Joining.** With a token and no record of the server, or one by another token, the client first talks to it as the
token's holder, says ENROL on every path, saves what it is given, and only then starts as itself. Without any answer for
15 s, or when refused, it goes on as the member that it was, or the run ends; without a token it never does.

**Host.** What the scripts have made is held against what stands there after every look at the host (`upkeep`).
The tunnel's addresses come from the server (ADDRESS) or, for a stock server, from its configuration; with
them the script sets up the device, and the routes follow. What goes to IPv6 while the server has none is answered
with "no route", so that applications turn to IPv4 at once instead of leaking.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final

from mptunnel import noise
from mptunnel.admission import Door
from mptunnel.alarm import Alarm
from mptunnel.config import (
    ClientSettings,
    DnsMode,
    ServerRecord,
    WireGuardFile,
    key_short,
    spelling,
)
from mptunnel.errors import BadPacketError, ConfigError, MptunnelError, RefusedError, UnreachableError
from mptunnel.events import (
    ClosePath,
    Endpoint,
    Notice,
    NoticeKind,
    OpenPath,
    Resolve,
    RunScript,
    SaveState,
    Stop,
)
from mptunnel.messages import Address, Capability, Close, CloseReason, Enrol, Enrolled, EnrolResult, Hello, Use
from mptunnel.packet import (
    IPV6_HEADER,
    MIN_MTU,
    VNET_SIZE,
    destination,
    is_lone,
    no_route6,
    split,
)
from mptunnel.path import PROBE_INTERVAL, ClientPath, PathState
from mptunnel.pathbook import PathBook
from mptunnel.pathdesk import VERBS, PathDesk
from mptunnel.plan import AllowedAddresses, Tunnel, kept_values, path_values, stock_tunnel, tunnel_values
from mptunnel.register import Reply
from mptunnel.role import INF, Role
from mptunnel.serverpeer import ServerPeer
from mptunnel.servers import Servers
from mptunnel.upkeep import TUNNEL, Upkeep
from mptunnel.uplinks import Uplinks, Way
from mptunnel.view import client_status

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from mptunnel.config import Fields, JoinToken, Link
    from mptunnel.events import Job
    from mptunnel.path import Path
    from mptunnel.peer import Peer
    from mptunnel.upkeep import Picture

    IPAddress = IPv4Address | IPv6Address

log = logging.getLogger(__name__)

JOIN_PATIENCE: Final = 15.0
REOPEN_AFTER: Final = 1.0
SILENT_AFTER: Final = 30.0  # then the server's next address is tried
LEAST_PATIENCE: Final = 5.0  # s: a path that is mute is tried otherwise, at first after so long
HEARD_PATIENCE: Final = 30.0  # where it was heard before
MOST_PATIENCE: Final = 60.0
OTHER_VERSION: Final = {4: 6, 6: 4}
YEAR: Final = 365.2425 * 86400  # s
LONG_AGO: Final = 1735689600  # s since 1970, the beginning of 2025: a clock that shows less was never set
WARN_AFTER: Final = 5.0  # a server that does not answer is worth a warning

_REFUSALS: dict[int, str] = {
    EnrolResult.USED: "the token was used already, by another client: if that was not you, it was stolen; "
    "see 'mptunnel peer list' on the server",
    EnrolResult.EXPIRED: "the token has expired",
    EnrolResult.REVOKED: "the token was taken back",
    EnrolResult.NO_ADDRESS: "the tunnel network has no address left; remove a client on the server ('mptunnel peer "
    "remove NAME'), its address is free a day later",
    EnrolResult.NAME_REFUSED: "the server does not take this host's name",
    EnrolResult.KEY_REFUSED: "the server does not take this client's key; remove the client's key file and try again",
}


@dataclass(slots=True)
class Membership:
    """How we know the server: its record, or a token to get one by."""

    record: ServerRecord
    private_key: bytes = field(repr=False)
    token: JoinToken | None = field(default=None, repr=False)
    name: str = "client"
    former: tuple[ServerRecord, ...] = ()  # that had the server's name before, which is another's once that is joined


@dataclass(slots=True)
class Trials:
    """How often a path has been tried otherwise since it lived last."""

    since: float  # when it lived last, or was tried otherwise
    turns: int = 0
    heard: int = 0  # the IP version by which it lived last; 0: it has not since the host gave it
    is_down: bool = False  # which has been told

    def patience(self, version: int, spacing: float) -> float:
        """Return for how many seconds it may be mute by an IP version; `spacing` is between two probes."""
        if self.heard and version != self.heard:
            return LEAST_PATIENCE
        least = HEARD_PATIENCE if self.heard else LEAST_PATIENCE
        grown = min(least * 2.0 ** min(self.turns, 8), MOST_PATIENCE)
        return max(grown, spacing) if self.heard and self.turns else grown


class Client(Role):
    """One server, several paths. `servers` are its addresses as its name resolved, none while it does not."""

    def __init__(
        self,
        settings: ClientSettings,
        membership: Membership,
        servers: Sequence[IPAddress],
        *,
        capabilities: Capability = Capability.MULTIPATH,
        reserved: int,
        kept: Sequence[tuple[IPAddress, IPAddress]],
        entropy: Callable[[int], bytes],
        rng: random.Random,
        now: float,
        wall: float,
        book: PathBook | None = None,
    ) -> None:
        token = membership.token
        key = token.join_private() if token else membership.private_key
        super().__init__(
            key,
            "client/timestamp",
            capabilities=capabilities,
            reserved=reserved,
            entropy=entropy,
            rng=rng,
            now=now,
            wall=wall,
        )
        self._settings = settings
        self._membership = membership
        self._servers = Servers(settings.server, servers, now, map(ip_address, membership.record.addresses))
        self._kept = tuple(kept)
        self._uplinks = Uplinks(settings.interfaces)
        self._ways: dict[int, Way] = {}  # of the paths that are open or being opened
        self._avoid: dict[int, int] = {}  # by path, the IP version that has not worked there
        self._trials: dict[int, Trials] = {}  # of the paths that were opened since the host has given or moved them
        self._try_at = INF  # when the next one of them may have been mute for too long
        self._links: tuple[Link, ...] = ()
        self._upkeep = Upkeep(settings.device) if settings.uses_our_script else None
        self._reopen_at: dict[int, float] = {}
        self._failures: dict[int, str] = {}  # why the socket of a path could not be opened, as was told
        self._missing: set[str] = set()
        self._former: dict[str, ClientPath] = {}  # uplinks that have left, by name
        self._holders: dict[int, ClientPath] = {}  # that are counted under each number, or were last
        self._mend_at = INF
        self.paths: dict[int, ClientPath] = {}
        self._desk = PathDesk(
            book or PathBook(), f"client/paths/{membership.record.file_name}", self._uplinks, self.paths
        )
        self._tunnel: Tunnel | None = None
        self._tunnel_mtu = MIN_MTU
        self._state = "connecting"
        self._outside: Resolve | None = None  # the server's name is being looked up outside the tunnel
        self._state_at = now
        self._has_warned = False
        self._joined: ServerRecord | None = None  # what is being saved
        self._join_until = now + JOIN_PATIENCE if token else INF
        self._join_failure: RefusedError | None = None  # why we gave up joining, if it is not that nobody answered
        self._peer = self._new_peer(now)

    def _new_peer(self, now: float) -> ServerPeer:
        settings, membership = self._settings, self._membership
        token, record = membership.token, membership.record
        psk = token.join_psk() if token else record.psk
        enrol = None
        if token is not None:
            own = noise.StaticKey(membership.private_key)
            proof = noise.prove_key(own, record.public_key, self.key.public)
            enrol = Enrol(own.public, membership.name.encode("ascii"), proof)
        peer = ServerPeer(
            self.identity,
            noise.Remote(self.key, record.public_key, psk),
            settings.server,
            now,
            paths=self.paths,
            instance=self._instance,
            clock_origin=self._clock_origin,
            mtu=settings.mtu,
            idle_probe=settings.idle_probe,
            is_ours=token is not None or record.said_hello or record.joined,
            is_stock=settings.wireguard is not None,
            enrol=enrol,
            allows=AllowedAddresses(settings.wireguard) if settings.wireguard else None,
            alarm=Alarm(settings.alarm_ms / 1e3, PROBE_INTERVAL) if settings.alarm_ms else None,
        )
        if settings.wireguard and settings.wireguard.keepalive:
            peer.timers.persistent = float(settings.wireguard.keepalive)
        return peer

    # -- what the loop tells ---------------------------------------------------------------------------

    def links_changed(self, links: Sequence[Link], now: float, picture: Picture | None = None) -> None:
        """This is how the host's links are now, and its rules and routes, if somebody has looked."""
        if self._settings.wireguard is not None and self._tunnel is None:
            self._adopt_wireguard(self._settings.wireguard)
        if tuple(links) != self._links:
            self._links = tuple(links)
            self._arrange(now)
            if self._kept and self._tunnel is not None:
                self._events.append(RunScript("keep", kept_values(self._tunnel, self._kept)))
        if self._upkeep is not None and picture is not None:
            self._upkeep.looked(self._links, picture)
            self._mend(now)

    def table_seen(self, now: float, *, is_there: bool) -> None:
        """Our nft table has just gone, or has come."""
        if self._upkeep is not None:
            self._upkeep.table_seen(now, is_there=is_there)
            self._mend_at = self._upkeep.next_deadline()

    def path_opened(self, number: int, port: int, now: float) -> None:
        """The socket of a path is open, on this local port."""
        path = self.paths.get(number)
        if path is None or number not in self._ways:
            self._events.append(ClosePath(number))
            return
        path.port = port
        trials = self._trials.get(number)
        if trials is None:
            trials = self._trials[number] = Trials(now)
            if self._state != "up":
                self._servers.path_opened(now)
        if not trials.is_down:
            self._failures.pop(number, None)
        self._try_at = now
        self._peer.path_opened(path, now, self.out, is_down=trials.is_down)
        self._after(self._peer, now)

    def path_failed(self, number: int, why: str, now: float) -> None:
        """The socket of a path could not be opened, or is broken."""
        path = self.paths.get(number)
        if path is None:
            return
        trials = self._trials.get(number)
        is_news = path.closed(now) and (trials is None or not trials.is_down)
        if is_news or self._failures.get(number) != why:
            self._failures[number] = why
            log.warning("path %s: %s; trying again every %.0f s", path.title, why, REOPEN_AFTER)
            self._peer.tell_path(path, now, why=why)
        path.errors[why] = path.errors.get(why, 0) + 1
        self._reopen_at[number] = now + REOPEN_AFTER
        self._peer.path_closed(now, self.out)
        self._after(self._peer, now)

    def not_sent(
        self, number: int, datagrams: int, size: int, why: str, now: float, *, is_counted: bool = True
    ) -> None:
        """The kernel refused datagrams on a path: that is its affair only. `is_counted`: they are in its `tx`."""
        path = self.paths.get(number)
        if path is None:
            return
        path.not_sent(datagrams if is_counted else 0, size if is_counted else 0, why)
        self._desk.carried(number, -datagrams, -size)
        if why == "EMSGSIZE":
            self._peer.too_big(path, now)

    def overrun(self, source: int, buffers: int) -> None:
        """See `Role.overrun`."""
        super().overrun(source, buffers)
        path = self.paths.get(source)
        if path is not None:
            path.overruns.buffers += buffers

    def queue_seen(self, number: int, truesize: int, now: float) -> bool:
        """So much of the kernel's memory is taken by what waits in the socket of a path.

        Returns whether it matters so much that it should be looked at before every sending.
        """
        path = self.paths.get(number)
        if path is None:
            return False
        was_limited, is_limited = path.is_limited(now), path.queue_seen(truesize, now)
        if is_limited and not was_limited:
            self._peer.look_again()
        return is_limited

    def send(self, frames: Sequence[bytes], now: float, inbox: list[bytes]) -> None:
        """Take frames from the device; answers of our own to some of them are appended to `inbox`."""
        tunnel, takes_partial = self._tunnel, self._peer.takes_partial
        has_no_ipv6 = tunnel is not None and not tunnel.ipv6_onward
        packets: list[bytes] = []
        for frame in frames:
            if has_no_ipv6 and self._answers_ipv6(frame, inbox):
                continue
            try:
                packets += split(frame, takes_partial=takes_partial)
            except BadPacketError:
                self.drops["malformed frame"] += 1
        if packets and self._membership.token is None:
            self._peer.send(packets, now, self.out)
            self._busy.add(self._peer)

    def send_one(self, frame: bytes, now: float) -> tuple[bytes, Sequence[tuple[Path, int]]] | None:
        """Seal the packet of a frame that came alone; return the datagram and the paths, None if `send` has to do it.

        It does for all that is not a plain IPv4 packet going where the one before it went (see `peer`).
        """
        peer = self._peer
        if now >= peer.short_until or not peer.takes_partial or self._meter is not None or not is_lone(frame):
            return None
        return peer.seal_one(frame[VNET_SIZE:], now)

    def next_deadline(self) -> float:
        """When `handle_timeout` is due; at once while handshakes wait."""
        if self._handshakes:
            return -INF
        due = self._peer.scheduled_at = self._peer.next_deadline()
        for other in (self._join_until, self._servers.next_deadline(), self._mend_at, self._try_at):
            due = min(due, other)
        for reopen_at in self._reopen_at.values():
            due = min(due, reopen_at)
        if self._state != "up" and not self._has_warned:
            due = min(due, self._state_at + WARN_AFTER)
        return min(due, self.ledger.due)

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        self._try_mute_paths(now)  # first: a probe from the socket that is to go would be wasted
        if now >= self._peer.scheduled_at:
            self._peer.handle_timeout(now, self.out)
            self._peer.renew_short_way(now)
            self._take_news(now)
        if now >= self._join_until:
            self._join_until = INF
            self._join_failed(self._join_failure or self._unreachable(), now)
        if any(at <= now for at in self._reopen_at.values()):
            self._arrange(now)
        if now >= self._servers.resolve_at and self._servers.asked(now):
            self._events.append(Resolve(self._settings.server, self._settings.port))
        if now >= self._servers.outside_at:
            self._ask_outside(now)
        if now >= self._mend_at:
            self._mend(now)
        self._review_state(now)

    def today_is(self, year: int, month: int, day: int, now: float) -> None:
        """The clock on the wall shows this local date at `now`."""
        save = self._desk.today_is(year, month, day, now)
        self._meter_if_wanted()
        if save is not None:
            self._events.append(save)

    def job_done(self, job: Job, result: object, now: float) -> None:
        """A job has ended; `result` is an exception if it failed."""
        failure = result if isinstance(result, Exception) else None
        if isinstance(job, RunScript):
            self._script_done(job, failure, now)
        elif isinstance(job, SaveState):
            self._saved(job, failure, now)
        elif isinstance(job, Resolve):
            if job is self._outside:
                self._outside = None
                self._ask_names(inside=True)
            if failure is None:
                self._resolved(tuple(result) if isinstance(result, tuple) else (), now)

    def close(self, now: float) -> None:
        """Say goodbye on every path, and leave the last timestamp on disk."""
        self._peer.close(CloseReason.STOP, now, self.out)
        self._save_last_timestamp()
        if self._desk.is_metering:
            self._events.append(self._desk.save(now))

    def _meter_if_wanted(self) -> None:
        self._meter = self._desk.carried if self._desk.is_metering else None

    # -- paths -----------------------------------------------------------------------------------------

    def _arrange(self, now: float) -> None:
        """Open, close and move paths as the links now are."""
        servers = self._servers.in_use()
        found = self._uplinks.find(self._links, servers, self._settings.device, self._avoid)
        for number, way in found.items():
            uplink = self._uplinks.by_id[number]
            path = self.paths.get(number)
            if path is not None and path.name != uplink.name:  # another uplink has taken its number
                self._close_path(path, now)
                self._avoid.pop(number, None)
                path = None
            if path is None:
                path = self.paths[number] = self._new_path(number, uplink.name, now)
                holder, self._holders[number] = self._holders.get(number, path), path
                if holder is not path:
                    self._peer.path_replaced(holder, now, self.out)
            if way is None:
                is_told = number in self._ways  # `_close_path` tells of those that were there
                self._close_path(path, now)
                if uplink.name not in self._missing:
                    self._missing.add(uplink.name)
                    if not is_told:
                        self._tell_missing(path, now)
            else:
                self._missing.discard(uplink.name)
                self._open_path(path, way, now)
        for number in self.paths.keys() - found.keys():  # taken off, or found without -i and without default route now
            path = self.paths[number]
            self._close_path(path, now, "leaves")
            self._former[path.name] = self.paths.pop(number)
        self._desk.apply(now)
        self._meter_if_wanted()
        self._after(self._peer, now)

    def _new_path(self, number: int, name: str, now: float) -> ClientPath:
        """Return a path that is new here, or the one that has left and comes back, with its port and its counts."""
        former = self._former.pop(name, None)
        path = former if former is not None and former.id == number else ClientPath(number, name, now)
        path.label = self._desk.label_of(name)
        return path

    def _tell_missing(self, path: ClientPath, now: float) -> None:
        uplink = self._uplinks.by_id[path.id]
        link = next((link for link in self._links if link.name == uplink.interface), None)
        if link is None:
            why = f"{uplink.interface or uplink.name} is not there"
            log.warning("%s", self._uplinks.advice(uplink, self._links))
        else:
            why = f"{link.name} {'has no address that reaches the server' if link.up else 'is down'}"
            log.info("path %s waits: %s", path.title, why)
        self._peer.tell_path(path, now, why=why)

    def _open_path(self, path: ClientPath, way: Way, now: float) -> None:
        before = self._ways.get(path.id)
        is_broken = path.id in self._reopen_at and self._reopen_at[path.id] <= now
        if before == way and not is_broken:
            return
        self._reopen_at.pop(path.id, None)
        if before is not None and before.address.version == way.address.version and before.address != way.address:
            self._trials.pop(path.id, None)
        self._ways[path.id] = way
        path.interface, path.address = way.interface, way.address
        if before is not None and (before.index, before.address, before.server) == (way.index, way.address, way.server):
            if path.is_open:
                self._route_path(path.id, way)  # another gateway
                return
        elif path.is_open:
            self._close_socket(path, now)
        self._route_path(path.id, way)

    def _close_socket(self, path: ClientPath, now: float) -> None:
        """Another socket is to take the place of a path's."""
        path.closed(now)
        self._peer.look_again()
        self._events.append(ClosePath(path.id))

    def _open_socket(self, path: ClientPath, way: Way) -> None:
        endpoint = (way.server, self._settings.port)
        self._events.append(OpenPath(path.id, way.interface, way.address, endpoint, path.port))

    def _route_path(self, number: int, way: Way) -> None:
        """Let the script make a path's rule and table, or make them anew."""
        if self._upkeep is not None:
            self._upkeep.path_asked(number, way)
        self._events.append(RunScript("path-up", path_values(number, way)))

    def _mend(self, now: float) -> None:
        """Make again what of ours others have removed."""
        if self._upkeep is None:
            return
        for number in self._upkeep.due(now):
            if number == TUNNEL and self._tunnel is not None:
                self._make_tunnel(self._tunnel)
            elif number in self._ways:
                self._route_path(number, self._ways[number])
        self._mend_at = self._upkeep.next_deadline()

    def _close_path(self, path: ClientPath, now: float, what: str = "waits") -> None:
        self._reopen_at.pop(path.id, None)
        self._failures.pop(path.id, None)
        self._trials.pop(path.id, None)
        if self._ways.pop(path.id, None) is None:
            return
        if path.is_open:
            self._peer.close(CloseReason.INTERFACE_GONE, now, self.out, path)
        if path.closed(now):
            why = f"{path.interface} is gone, down, has no address or is not wanted"
            log.info("path %s %s: %s", path.title, what, why)
            self._peer.tell_path(path, now, why=why)
        self._events.append(ClosePath(path.id))
        if self._upkeep is not None:
            self._upkeep.path_gone(path.id)
        self._events.append(RunScript("path-down", {"path": path.id}))
        self._peer.path_closed(now, self.out)

    def _script_done(self, job: RunScript, failure: Exception | None, now: float) -> None:
        if failure is not None:
            log.warning("%s: %s", job.verb, failure)
        if job.verb == "dns" and job.values["outside"] and self._outside is not None:
            self._events.append(self._outside)
        if self._upkeep is not None and job.verb in {"path-up", "up"}:
            self._upkeep.script_done(int(str(job.values.get("path", TUNNEL))))
        if job.verb != "path-up":
            return
        number = job.values["path"]
        way = self._ways.get(number) if isinstance(number, int) else None
        if way is None or job.values != path_values(way_number := int(str(number)), way):
            return  # it has changed meanwhile; another job is on its way
        path = self.paths[way_number]
        if not path.is_open:
            self._open_socket(path, way)

    # -- the server's addresses ------------------------------------------------------------------------

    def _resolved(self, addresses: Sequence[IPAddress], now: float) -> None:
        servers = self._servers
        known, in_use = set(servers.known), servers.in_use()
        new = servers.resolved(addresses, now, self._versions_up(now))
        if new:
            log.info("%s has new addresses: %s", self._settings.server, ", ".join(map(str, new)))
        if set(servers.known) != known:
            self._keep_addresses()
        if servers.in_use() != in_use:
            self._arrange(now)

    def _versions_up(self, now: float) -> set[int]:
        """Return the IP versions by which something is known to be carried; both where paths cannot be asked."""
        if self._state != "up":
            return set()
        if not self._peer.speaks:
            return {4, 6}
        return {path.address.version for path in self.paths.values() if path.address is not None and path.lives(now)}

    def _note_proofs(self) -> None:
        """What has come by a path has come from the address of the server that the path leads to."""
        is_news = False
        for path in self.paths.values():
            if path.is_open and path.was_heard and self._servers.proved(self._ways[path.id].server):
                is_news = True
        if is_news and self._membership.record.said_hello:  # else HELLO will see to it
            self._keep_addresses()

    def _keep_addresses(self) -> None:
        record, addresses = self._membership.record, tuple(map(str, self._servers.to_keep()))
        if record.addresses != addresses:
            record.addresses = addresses
            self._save_record(record)

    def _ask_outside(self, now: float) -> None:
        """Nothing answers, and the server may have moved: ask for its name those who were asked before the tunnel was.

        What we have changed of the host's name servers is taken back until the answer is there, and the question does
        not go into the tunnel.
        """
        if self._outside is not None:
            self._servers.still_asking(now)
            return
        self._servers.asked_outside(now)
        self._outside = Resolve(self._settings.server, self._settings.port)
        if self._tunnel is not None:
            self._ask_names(inside=False)
        else:
            self._events.append(self._outside)

    def _ask_names(self, *, inside: bool) -> None:
        """Let the script have names asked through the tunnel, or as they were before there was one."""
        if self._tunnel is not None:
            dns = self._tunnel.dns if inside else ()
            servers = tuple(self._servers.known)
            self._events.append(RunScript("dns", {"dns": dns, "servers": servers, "outside": not inside}))

    def _next_server(self, now: float) -> None:
        """Every path is silent: try the next address of each IP version."""
        self._servers.turn(now)
        self._arrange(now)

    def _review_state(self, now: float) -> None:
        """Say what the tunnel as a whole is: connecting, up or silent; and try what may help when it is not up."""
        state = self._whole_state(now)
        if state != self._state:
            if state == "up":
                self._servers.answered()
                log.info("tunnel up: %s", self._membership_name())
                self._events.append(self._peer.notice(NoticeKind.TUNNEL_UP, now))
            elif self._state == "up":
                self._servers.silent(now)
                log.warning("tunnel silent: no path reaches %s; trying for ever", self._membership_name())
                self._events.append(self._peer.notice(NoticeKind.TUNNEL_SILENT, now))
                self._has_warned = True
            self._state, self._state_at = state, now
            self._has_warned = self._has_warned and state != "up"
            return
        if state == "up":
            return
        if not self._has_warned and now >= self._state_at + WARN_AFTER:
            self._has_warned = True
            log.warning("%s; trying for ever", self._why_silent(now))
        if len(self._servers.known) > 1 and now - max(self._servers.turned_at, self._state_at) > SILENT_AFTER:
            self._next_server(now)

    def _try_mute_paths(self, now: float) -> None:
        """Let each path that has been mute for too long be tried otherwise; say when this is due again."""
        self._try_at = INF
        mute: list[ClientPath] = []
        for path in self.paths.values():
            way, trials = self._ways.get(path.id), self._trials.get(path.id)
            if way is None or trials is None or not (path.is_open or path.id in self._reopen_at):
                continue
            if not self._peer.speaks and (self._state == "up" or path.was_heard):
                continue
            version = way.address.version
            if path.lives(now):
                self._trials[path.id] = Trials(now, heard=version)
                self._failures.pop(path.id, None)
                continue
            is_idle = self._state == "up" and not (self._peer.in_use(now) and path.use is Use.DATA)
            patience = trials.patience(version, self._settings.idle_probe if is_idle else 0.0)
            due_at = max(trials.since, path.heard_at) + patience
            if due_at <= now:
                mute.append(path)
            else:
                self._try_at = min(self._try_at, due_at)
        if mute:
            self._try_otherwise(mute, now)

    def _try_otherwise(self, mute: Sequence[ClientPath], now: float) -> None:
        """Reopen paths by the other IP version or another address, those that have only one from another local port."""
        before, speaks = self._ways.copy(), self._peer.speaks
        up = self._versions_up(now)
        if up and any(before[path.id].address.version not in up for path in mute):
            self._servers.version_silent(now)
        for path in mute:
            trials = self._trials[path.id]
            trials.since, trials.turns = now, trials.turns + 1
            trials.is_down = trials.is_down or (speaks and path.state is PathState.DOWN)
            self._avoid[path.id] = before[path.id].address.version
            self._uplinks.by_id[path.id].source = None  # its network may be another one now (RFC 8978)
        self._arrange(now)
        for path in mute:
            way = self._ways.get(path.id)
            if speaks:
                path.port = 0  # any but the one it has
            if way != before[path.id]:
                log.debug("path %s mute: trying it by another address", path.title)
                continue
            self._avoid[path.id] = OTHER_VERSION[way.address.version]  # should that come, it must not move what lives
            if speaks and path.is_open:
                log.debug("path %s mute: trying another local port", path.title)
                self._close_socket(path, now)
                self._open_socket(path, way)

    def _whole_state(self, now: float) -> str:
        peer = self._peer
        if self._membership.token is not None:
            return "connecting"
        if (peer.current is None or not peer.current.is_alive(now)) and peer.is_missed:
            return "silent" if self._state in {"up", "silent"} else "connecting"
        if not peer.is_multipath:
            return "up"
        paths = self.paths.values()
        is_up = any(path.carries_up(now) for path in paths) and any(path.carries_down(now) for path in paths)
        if self._state == "up":  # one that has just been opened is not silent yet
            is_up = is_up or any(path.state is PathState.PROBING for path in paths)
        return "up" if is_up else ("silent" if self._state in {"up", "silent"} else "connecting")

    def _why_silent(self, now: float) -> str:
        if not self._servers.known:
            return f"the name {self._settings.server} does not resolve to an address"
        if not any(path.is_open for path in self.paths.values()):
            return "no path is there: every uplink is missing, down or without address"
        if self.identity.timestamps.last < LONG_AGO * 10**9:
            year = 1970 + int((now + self.identity.timestamps.offset) / YEAR)
            return (
                f"{self._membership_name()} does not answer, and this host's clock shows the year {year}: a server "
                "takes no handshake that is older than the last one it took; set the clock"
            )
        return (
            f"{self._membership_name()} does not answer on any path: is mptunnel running there, is UDP port "
            f"{self._settings.port} open in its firewall, and does it know our key ({key_short(self.key.public)})?"
        )

    def _unreachable(self) -> UnreachableError:
        return UnreachableError(
            f"no answer from {self._membership_name()} in {JOIN_PATIENCE:.0f} s on any path: is mptunnel running "
            f"there, is UDP port {self._settings.port} open in its firewall, and is the token that server's?"
        )

    def _membership_name(self) -> str:
        return spelling(self._settings.server, self._settings.port)

    # -- what the server says --------------------------------------------------------------------------

    def _after(self, peer: Peer, now: float) -> None:
        self._note_proofs()
        self._take_news(now)

    def _take_news(self, now: float) -> None:
        """Act on what the peer has to say."""
        news, self._peer.news = self._peer.news, []
        for item in news:
            match item:
                case Hello():
                    self._said_hello()
                case Address():
                    self._addressed(item)
                case Enrolled():
                    self._enrolled(item)
                case Close():
                    self._closed(item)
                case Notice():
                    self._events.append(item)
                    if item.kind is NoticeKind.PATH_DOWN:
                        self._try_at = now  # that is: say when
                case int():
                    self._mtu_changed(item, now)
        if self._state != "up":
            self._review_state(now)

    def _said_hello(self) -> None:
        record, addresses = self._membership.record, tuple(map(str, self._servers.to_keep()))
        if not record.said_hello or record.addresses != addresses:
            record.said_hello, record.addresses = True, addresses
            self._save_record(record)

    def _closed(self, close: Close) -> None:
        if close.reason == CloseReason.NOT_ADMITTED:
            log.warning("%s admits us no more: join it again with a new token", self._membership_name())
            self._membership.record.joined = False  # so that a new one is used
            self._membership.record.psk = noise.NO_PSK  # whoever admits us by hand says so, if there is to be another
            self._save_record(self._membership.record)
        else:
            log.warning("%s has stopped; waiting for it to come back", self._membership_name())

    def _mtu_changed(self, mtu: int, now: float) -> None:
        self._tunnel_mtu = mtu
        if self._tunnel is not None:
            self._events.append(RunScript("mtu", {"mtu": mtu}))
        self._peer.change_hello(now, self.out)

    def _addressed(self, address: Address) -> None:
        dns: tuple[IPAddress, ...] = ()
        if self._settings.dns_mode is DnsMode.AUTO and any(network.prefixlen == 0 for network in self._settings.routes):
            dns = tuple(address.dns)
        elif self._settings.dns_mode is DnsMode.FIXED:
            dns = self._settings.dns or ()
        tunnel = Tunnel(address.client4, address.server4, address.client6, address.server6, address.ipv6_onward, dns)
        self._set_up(tunnel)

    def _adopt_wireguard(self, file: WireGuardFile) -> None:
        """A stock server gives no addresses: they are in its configuration."""
        dns = file.dns if self._settings.dns_mode is DnsMode.AUTO else self._settings.dns or ()
        self._tunnel_mtu = self._settings.mtu
        self._set_up(stock_tunnel(file, dns))

    def _set_up(self, tunnel: Tunnel) -> None:
        if tunnel == self._tunnel:
            return
        self._tunnel = tunnel
        self._warn_of_clashes(tunnel)
        self._make_tunnel(tunnel)
        log.info("tunnel address %s", " and ".join(str(a) for a in (tunnel.address4, tunnel.address6) if a))

    def _warn_of_clashes(self, tunnel: Tunnel) -> None:
        """Warn once of each other interface whose addresses are the tunnel's too."""
        for link in self._links:
            if link.name == self._settings.device:
                continue
            own = [a.ip for a in link.addresses if a.ip in {tunnel.address4, tunnel.address6}]
            if own:
                log.warning(
                    "%s has the address %s, which is ours in the tunnel too: who connects to it there from beyond that "
                    "LAN is answered through the tunnel, which fails, and others in the LAN may be out of reach; start "
                    "the server with another --network before its first client joins, or give %s another address",
                    link.name, own[0], link.name,
                )  # fmt: skip
            elif tunnel.peer4 is not None and any(tunnel.peer4 in address.network for address in link.addresses):
                log.warning(
                    "%s is the server's address in the tunnel, so who has it at %s cannot be reached; "
                    "start the server with another --network", tunnel.peer4, link.name,
                )  # fmt: skip

    def _make_tunnel(self, tunnel: Tunnel) -> None:
        """Let the script give the device its addresses and routes, or give them anew."""
        if self._upkeep is not None:
            self._upkeep.tunnel_asked(tunnel, self._settings.routes)
        values = tunnel_values(tunnel, self._tunnel_mtu, self._settings.routes, tuple(self._servers.known), self._kept)
        self._events.append(RunScript("up", values))

    def _answers_ipv6(self, frame: bytes, inbox: list[bytes]) -> bool:
        """Whether a frame is an IPv6 packet for beyond the server, which could not pass it on; it is answered then."""
        if len(frame) < VNET_SIZE + IPV6_HEADER or frame[VNET_SIZE] >> 4 != 6:
            return False
        server = None if self._tunnel is None else self._tunnel.peer6
        if server is None or destination(frame, VNET_SIZE) == server.packed:
            return False
        self.drops["IPv6 that the server cannot pass on"] += 1
        answer = no_route6(frame[VNET_SIZE:], server)
        if answer is not None:
            inbox.append(answer)
        return True

    # -- joining ---------------------------------------------------------------------------------------

    def _enrolled(self, enrolled: Enrolled) -> None:
        if self._membership.token is None or self._joined is not None:
            return
        if enrolled.result == EnrolResult.TRY_AGAIN:
            if self._join_failure is None:
                log.warning("%s cannot save that we join; trying again", self._membership_name())
                why = "could not save that we join, for a minute; its log says why"
                self._join_failure = RefusedError(f"{self._membership_name()} {why}")
                self._join_until = self._started_at + 4 * JOIN_PATIENCE
            return
        self._join_until = INF
        if enrolled.result == EnrolResult.ADMITTED:
            record = self._membership.record
            record.psk = enrolled.psk
            record.joined = True
            record.joined_by = self._membership.token.ident
            self._joined = record
            self._save_record(record)
        else:
            why = _REFUSALS.get(enrolled.result, "for a reason that we do not know")
            self._join_failure = RefusedError(f"{self._membership_name()} refused us: {why}")
            self._join_until = -INF

    def _join_failed(self, error: MptunnelError, now: float) -> None:
        """End the run, or go on as the member that an earlier token has made us."""
        if self._membership.record.joined:
            log.warning("%s; going on as the member that this client was before", error)
            self._become_ourselves(now)
        else:
            self._events.append(Stop(error))

    def _saved(self, job: SaveState, failure: Exception | None, now: float) -> None:
        if failure is not None:
            log.warning("cannot save %s: %s; the tunnel goes on", job.name, failure)
        if job.name == self._file and isinstance(job.document, dict):
            self.identity.timestamps.reserved(job.document["reserved"])
        is_joined = isinstance(job.document, dict) and bool(job.document.get("joined"))
        if self._joined is not None and is_joined and job.name == _record_file(self._joined):
            if failure is not None:
                self._events.append(
                    Stop(ConfigError(f"cannot save that we joined: {failure}; make room and try again"))
                )
                return
            log.info("joined %s as %s", self._membership_name(), self._membership.name)
            for former in self._membership.former:
                former.forget(self._membership_name())
                self._save_record(former)
            self._become_ourselves(now)

    def _become_ourselves(self, now: float) -> None:
        """From now on with our own key."""
        self._joined = None
        self._membership.token = None
        self._peer.forget_keys()
        self.key = noise.StaticKey(self._membership.private_key)
        self.identity = self.identity.with_key(self.key)
        self._door = Door(self.key, self.identity.entropy)
        self._peer = self._new_peer(now)
        for path in self.paths.values():
            if path.is_open:
                self._peer.path_opened(path, now, self.out)

    def _save_record(self, record: ServerRecord) -> None:
        self._events.append(SaveState(_record_file(record), record.to_document()))

    # -- for the base ----------------------------------------------------------------------------------

    def _peer_with(self, public: bytes, now: float) -> Peer | None:
        return self._peer if public == self._membership.record.public_key else None

    def _seen_from(self, source: Any) -> Endpoint:
        way = self._ways.get(source)
        return Endpoint(str(way.server) if way else "::", self._settings.port, 0, b"")

    # -- control ---------------------------------------------------------------------------------------

    def control(self, verb: str, arguments: Fields, now: float) -> Reply:
        """Answer the command line. Raises ConfigError."""
        if verb in VERBS:
            result = self._desk.perform(verb, arguments)
            if verb == "paths-list":
                return Reply(result)
            self._arrange(now)
            save = self._desk.save(now)
            self._events.append(save)
            return Reply(result, save)
        match verb:
            case "status":
                return Reply(self.status(now))
            case "receipts-reset":
                self._peer.begin_receipts_afresh(now)
                return Reply(None)
        raise ConfigError(f"a client cannot be asked for {verb!a}; run that on the server")

    def status(self, now: float) -> dict[str, Any]:
        """The status object, format 1."""
        self.book()
        return client_status(
            self._state,
            now - self._started_at,
            self._membership_name(),
            self._membership.record.public_key,
            self._peer,
            self._ways.values(),
            self._tunnel,
            self._tunnel_mtu,
            self.drops,
            now,
        )


def _record_file(record: ServerRecord) -> str:
    return f"client/servers/{record.file_name}"
