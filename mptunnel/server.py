"""The server: which client a packet is for, who is let in, and what the command line may ask.

Packets from the device are found by destination. Peers come to life when they first knock: a thousand records cost
nothing. One heap of (deadline, peer) says whose turn it is; nothing walks all peers in a turn. Who is admitted is the
`Register`'s affair; an ENROLLED goes out only after the register's files have been saved. If the nft table of the
gateway goes, the script makes it again (see `upkeep`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from mptunnel import __version__, noise
from mptunnel.clientpeer import ClientPeer, JoinPeer
from mptunnel.config import JoinToken, encode_key, key_short
from mptunnel.errors import BadPacketError, ConfigError, NotAuthenticError
from mptunnel.events import Notice, RunScript, SaveState
from mptunnel.messages import Address, Capability, CloseReason, Enrol, Enrolled, EnrolResult
from mptunnel.packet import (
    MIN_MTU,
    VNET_SIZE,
    destination,
    is_lone,
    split,
)
from mptunnel.register import Register, Reply
from mptunnel.role import INF, Role
from mptunnel.upkeep import TUNNEL, Upkeep

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from mptunnel.config import Fields, Network, PeerRecord, TokenRecord
    from mptunnel.events import Endpoint, Event
    from mptunnel.path import Path
    from mptunnel.peer import Peer
    from mptunnel.session import Session

log = logging.getLogger(__name__)

MAX_RESOLVERS: Final = 2
_DESTINATION: Final = VNET_SIZE + 16  # of an IPv4 packet, in its frame
REGISTER_FILES: Final = frozenset({"server/peers", "server/tokens"})
SAVE_AGAIN: Final = 10.0  # s after that could not be done: a restart would bring back who was removed
ADMIT_AFTER: Final = 1.0  # s after another firewall has made chains: it may still be making them
ADMIT_SPACING: Final = 5.0
MAX_REFUSED: Final = 256  # endpoints remembered
REFUSAL_SPACING: Final = 1.0  # a thief of a token must not fill the log


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server gives every client besides an address."""

    mtu: int
    ipv4_onward: bool
    ipv6_onward: bool
    dns: tuple[IPv4Address | IPv6Address, ...] = ()


class Server(Role):
    """Many clients on one port. Records are the server's own from now on; what changes is asked to be saved."""

    def __init__(
        self,
        private_key: bytes,
        network: Network,
        peers: list[PeerRecord],
        tokens: list[TokenRecord],
        offer: Offer,
        *,
        capabilities: Capability = Capability.MULTIPATH,
        reserved: int,
        port: int,
        entropy: Callable[[int], bytes],
        rng: random.Random,
        now: float,
        wall: float,
        device: str = "mpt0",
        setup: RunScript | None = None,
    ) -> None:
        """`setup` is how the script has made the gateway of `device`, if that is to be kept up."""
        self.register = Register(network, peers, tokens, entropy, now=now, wall=wall)
        super().__init__(
            private_key,
            "server/timestamp",
            capabilities=capabilities,
            reserved=reserved,
            entropy=entropy,
            rng=rng,
            now=now,
            wall=wall,
        )
        self.network = network
        self.port = port
        self._offer = offer
        self._peers: dict[bytes, ClientPeer] = {}
        self._refused: dict[Endpoint, ClientPeer] = {}  # whose they are that the kernel sent nothing to
        self._peer_at: dict[bytes, ClientPeer] = {}  # by packed address, once something has gone there
        self._joiners: dict[bytes, JoinPeer] = {}
        self._heap: list[tuple[float, int, Peer]] = []
        self._order = count()
        self._unsaved: dict[int, tuple[JoinPeer, Session | None, Enrolled, Endpoint]] = {}
        self._binding: set[bytes] = set()  # tokens whose binding is being saved
        self._are_peers_unsaved = False  # the last attempt failed
        self._refusal_told_at = -INF
        self._setup = setup
        self._mend_at = INF
        self._admit_at, self._admitted_at = INF, -INF
        self._failed: set[str] = set()  # files of the register that could not be saved
        self._save_again_at = INF
        self._upkeep = Upkeep(device)
        if setup is not None:
            self._upkeep.gateway_asked()
            self._upkeep.script_done(TUNNEL)

    # -- what the loop tells ---------------------------------------------------------------------------

    def wall_is(self, now: float, wall: float) -> None:
        """See `Role.wall_is`; tokens expire by the wall clock too."""
        super().wall_is(now, wall)
        self.register.offset = wall - now

    def table_seen(self, now: float, *, is_there: bool) -> None:
        """Our nft table has just gone, or has come."""
        self._upkeep.table_seen(now, is_there=is_there)
        self._mend_at = self._upkeep.next_deadline()

    def chains_came(self, now: float) -> None:
        """A firewall that has been started, or has read its rules again, may drop what we forward."""
        if self._setup is not None and self._admit_at == INF:
            self._admit_at = max(now + ADMIT_AFTER, self._admitted_at + ADMIT_SPACING)

    def send(self, frames: Sequence[bytes], now: float) -> None:
        """Take frames from the device; what consecutive ones hold for one client goes there as a batch."""
        batch: list[bytes] = []
        peer: ClientPeer | None = None
        for frame in frames:
            address = destination(frame, VNET_SIZE) if len(frame) > VNET_SIZE else b""
            to = self._peer_at.get(address) or self._peer_to(address, now)
            if to is not peer and batch and peer is not None:
                peer.send(batch, now, self.out)
                self._busy.add(peer)
                batch = []
            peer = to
            if peer is None:
                self.drops["packet to nobody"] += 1
                continue
            try:
                batch += split(frame, takes_partial=peer.takes_partial)
            except BadPacketError:
                self.drops["malformed frame"] += 1
        if batch and peer is not None:
            peer.send(batch, now, self.out)
            self._busy.add(peer)

    def send_one(self, frame: bytes, now: float) -> tuple[bytes, Sequence[tuple[Path, Endpoint]]] | None:
        """Seal the packet of a frame that came alone; return the datagram and the paths, None if `send` has to do it.

        It does for all that is not a plain IPv4 packet going where the one before it went (see `peer`).
        """
        if not is_lone(frame):
            return None
        peer = self._peer_at.get(frame[_DESTINATION : _DESTINATION + 4])
        if peer is None or now >= peer.short_until or not peer.takes_partial:
            return None
        return peer.seal_one(frame[VNET_SIZE:], now)

    def next_deadline(self) -> float:
        """When `handle_timeout` is due; at once while handshakes wait."""
        if self._handshakes:
            return -INF
        due = min(self.ledger.due, self._mend_at, self._admit_at, self._save_again_at)
        return min(self._heap[0][0], due) if self._heap else due

    def handle_timeout(self, now: float) -> None:
        """Do what is due; what becomes due by that is done in the next turn, so that a turn always ends."""
        due: list[Peer] = []
        while self._heap and self._heap[0][0] <= now:
            at, _, peer = heappop(self._heap)
            if at == peer.scheduled_at:
                peer.scheduled_at = INF
                due.append(peer)
        for peer in due:
            peer.handle_timeout(now, self.out)
            peer.renew_short_way(now)
            self._after(peer, now)
        if now >= self._mend_at:
            self._mend(now)
        if now >= self._save_again_at:
            self._save_again_at = INF
            self.register.save_again(self._failed)
        if now >= self._admit_at:
            self._admit_at, self._admitted_at = INF, now
            if self._mend_at == INF:  # else `up` does it, once the rules of the gateway are there again
                self._events.append(RunScript("admit", {}))

    def _mend(self, now: float) -> None:
        """Make the gateway again, whose nft table others have removed."""
        if self._setup is not None and self._upkeep.due(now):
            self._upkeep.gateway_asked()
            self._events.append(self._setup)
        self._mend_at = self._upkeep.next_deadline()

    def offer_is(self, offer: Offer, now: float) -> None:
        """The host can give clients this now; those that are here hear of it where it has changed."""
        if offer == self._offer:
            return
        self._offer = offer
        going = " and ".join(name for name, goes in (("IPv4", offer.ipv4_onward), ("IPv6", offer.ipv6_onward)) if goes)
        log.info("to the internet go: %s; resolvers: %s", going or "nothing", ", ".join(map(str, offer.dns)) or "none")
        for peer in self._peers.values():
            peer.address_is(self._address_of(peer.record), now, self.out)
            self._after(peer, now)

    def overrun(self, source: Endpoint, buffers: int) -> None:
        """See `Role.overrun`; which client's they were is not known."""
        super().overrun(source, buffers)
        self.identity.overruns.buffers += buffers

    def not_sent(self, to: Endpoint, datagrams: int, size: int, why: str, *, is_counted: bool = True) -> None:
        """The kernel refused datagrams: that is the affair of the path they were for, if it has counted them."""
        self.drops[f"not sent: {why}"] += datagrams
        peer = self._refused.get(to)
        if peer is None or to not in peer.sources:
            peer = next((each for each in self._peers.values() if to in each.sources), None)
            if peer is None:
                return
            if len(self._refused) >= MAX_REFUSED:
                self._refused.clear()
            self._refused[to] = peer
        peer.sources[to].not_sent(datagrams if is_counted else 0, size if is_counted else 0, why)

    def events(self) -> list[Event]:
        """Take out what the world is asked for."""
        if not self._events and not self.register.saves:  # nearly always
            return []
        return self.register.take_saves() + super().events()

    def job_done(self, job: Event, result: object, now: float) -> None:
        """A job has ended; `result` is an exception if it failed."""
        if isinstance(job, RunScript) and job.verb == "up":
            if isinstance(result, Exception):
                log.warning("cannot put back the gateway: %s", result)
            self._upkeep.script_done(TUNNEL)
            self._mend_at = self._upkeep.next_deadline()
        if isinstance(job, RunScript) and job.verb == "admit" and isinstance(result, Exception):
            log.warning("another firewall may drop what is forwarded: %s", result)
        if not isinstance(job, SaveState):
            return
        failed = isinstance(result, Exception)
        if failed:
            log.warning("cannot save %s: %s; the tunnel goes on, but a restart would not know of it", job.name, result)
        if job.name == self._file and isinstance(job.document, dict):
            self.identity.timestamps.reserved(job.document["reserved"])
        if job.name in REGISTER_FILES:
            (self._failed.add if failed else self._failed.discard)(job.name)
            self._save_again_at = now + SAVE_AGAIN if self._failed else INF
        if job.name == "server/peers":
            self._are_peers_unsaved = failed
        if id(job) in self._unsaved:  # the tokens, which are saved right after the peers
            joiner, session, enrolled, source = self._unsaved.pop(id(job))
            self._binding.discard(joiner.remote.public)
            answer = Enrolled(EnrolResult.TRY_AGAIN, enrolled.public_key, noise.NO_PSK)
            if not (failed or self._are_peers_unsaved):
                answer = enrolled
            if joiner.current is session:  # else whoever asked asks again, and nobody else may read it
                joiner.answer(answer, source, now, self.out)

    def close(self, now: float) -> None:
        """Say goodbye on every path, and leave the last timestamp on disk."""
        for peer in self._peers.values():
            peer.close(CloseReason.STOP, now, self.out)
        self._save_last_timestamp()

    # -- peers -----------------------------------------------------------------------------------------

    def _peer_to(self, address: bytes, now: float) -> ClientPeer | None:
        public = self.register.key_at(address)
        peer = None if public is None else self._peer_of(public, now)
        if peer is not None:
            self._peer_at[address] = peer
        return peer

    def _peer_with(self, public: bytes, now: float) -> Peer | None:
        return self._peer_of(public, now) or self._joiner_of(public, now)

    def _peer_of(self, public: bytes, now: float) -> ClientPeer | None:
        peer = self._peers.get(public)
        if peer is None and (record := self.register.records.get(public)) is not None:
            try:
                remote = noise.Remote(self.key, public, record.psk)
            except NotAuthenticError:
                return None
            peer = self._peers[public] = ClientPeer(
                self.identity,
                remote,
                record,
                now,
                instance=self._instance,
                clock_origin=self._clock_origin,
                address=self._address_of(record),
                mtu=self._offer.mtu,
            )
        return peer

    def _joiner_of(self, public: bytes, now: float) -> JoinPeer | None:
        joiner = self._joiners.get(public)
        if joiner is None and (token := self.register.token_of(public)) is not None:
            remote = noise.Remote(self.key, public, token.join_psk)
            joiner = self._joiners[public] = JoinPeer(self.identity, remote, f"token {token.ident}", now)
        return joiner

    def _address_of(self, record: PeerRecord) -> Address:
        ipv4, ipv6 = self.network.ipv4, self.network.ipv6
        return Address(
            ipv4_onward=self._offer.ipv4_onward,
            ipv6_onward=self._offer.ipv6_onward,
            prefix4=ipv4.prefixlen,
            prefix6=ipv6.prefixlen,
            client4=record.ipv4,
            server4=ipv4[1],
            client6=record.ipv6,
            server6=ipv6[1],
            mtu=self._offer.mtu,
            dns=self._offer.dns[:MAX_RESOLVERS],
        )

    def _seen_from(self, source: Endpoint) -> Endpoint:
        return source

    def _after(self, peer: Peer, now: float) -> None:
        if isinstance(peer, ClientPeer):
            news, peer.news = peer.news, []
            for item in news:
                if item is None:
                    self.register.confirmed(peer.record.public_key, now)
                elif isinstance(item, Notice):
                    self._events.append(item)
                else:
                    self._route_with_mtu(peer, item or MIN_MTU)
        elif isinstance(peer, JoinPeer):
            asked, peer.news = peer.news, []
            for enrol, source in asked:
                self._enrol(peer, enrol, source, now)
        self._attend(peer)

    def _attend(self, peer: Peer) -> None:
        """See to it that `peer` is called at its next deadline."""
        at = peer.next_deadline()
        if at < peer.scheduled_at:
            peer.scheduled_at = at
            heappush(self._heap, (at, next(self._order), peer))

    def _route_with_mtu(self, peer: ClientPeer, mtu: int) -> None:
        mtu = min(max(mtu, MIN_MTU), self._offer.mtu)
        for address in (peer.record.ipv4, peer.record.ipv6):
            self._events.append(RunScript("peer-up", {"peer": address, "mtu": mtu}))

    # -- joining and administration --------------------------------------------------------------------

    def _enrol(self, joiner: JoinPeer, enrol: Enrol, source: Endpoint, now: float) -> None:
        public = joiner.remote.public
        if public in self._binding:
            return  # its answer goes out when the save is done
        result, psk, save = self.register.enrol(public, enrol, self.key, now)
        enrolled = Enrolled(result, enrol.public_key, psk)
        if save is None:
            self.drops["ENROL refused"] += 1
            if now - self._refusal_told_at >= REFUSAL_SPACING:
                self._refusal_told_at = now
                key = key_short(enrol.public_key)
                log.warning("%s: key %s from %s is refused: %s", joiner.name, key, source, result.name.lower())
            joiner.answer(enrolled, source, now, self.out)
        else:
            self._binding.add(public)
            self._unsaved[id(save)] = (joiner, joiner.current, enrolled, source)

    def make_first_token(self, now: float) -> str | None:
        """Return a new token if there is neither a client nor an open token; `join-token` keeps it while it is good."""
        return self.register.make_first_token(self.key.public, now)

    def take_token_file(self, text: str) -> str | None:
        """Return the token of the file `join-token`, if it is still good; the file goes when the token does."""
        try:
            token = JoinToken.decode(text.strip())
            record = self.register.token_of(noise.StaticKey(token.join_private()).public)
        except ConfigError:
            return None
        if record is None or not record.state.is_open:
            return None
        self.register.first_token = record.join_public
        return text.strip()

    def control(self, verb: str, arguments: Fields, now: float) -> Reply:
        """Do what the command line asks. Raises ConfigError."""
        match verb:
            case "status":
                return Reply(self.status(now))
            case "receipts-reset":
                for peer in self._peers.values():
                    peer.begin_receipts_afresh(now)
                return Reply(None)
            case "token-new":
                return self.register.new_token(self.key.public, arguments.text("label"), arguments.number("hours"), now)
            case "token-list":
                return Reply(self.register.token_views(now))
            case "token-revoke":
                return self.register.revoke_token(arguments.text("ident"), now)
            case "peer-list":
                return Reply([record.view() for record in self.register.records.values()])
            case "peer-add":
                return self._add_client(arguments, now)
            case "peer-remove":
                return self._remove_client(arguments.text("name"), now)
        raise ConfigError(f"a server cannot be asked for {verb!a}")

    def _add_client(self, arguments: Fields, now: float) -> Reply:
        public = arguments.key("public_key")
        if public == self.key.public:
            raise ConfigError("this is the server's own key; give the client's, which 'mptunnel pubkey' prints there")
        try:
            noise.Remote(self.key, public)
        except NotAuthenticError:
            raise ConfigError(f"public key {encode_key(public)} is of low order: no key pair has it") from None
        psk = self.identity.entropy(noise.KEY_SIZE) if arguments.flag("psk") else noise.NO_PSK
        record, save = self.register.add(arguments.text("name"), public, psk, now, stock=arguments.flag("stock"))
        more = {"psk": encode_key(psk), "server_public_key": encode_key(self.key.public), "port": self.port}
        return Reply({**record.view(), **more}, save)

    def _remove_client(self, name: str, now: float) -> Reply:
        record, save = self.register.remove(name, now)
        peer = self._peers.pop(record.public_key, None)
        self._peer_at.clear()
        self._refused.clear()
        if peer is not None:
            peer.close(CloseReason.NOT_ADMITTED, now, self.out)
            peer.gone("it is removed", now)
            self._after(peer, now)
            peer.forget_keys()
            peer.endpoint = None  # a stock peer that was being called must not be let in by its answer
            peer.scheduled_at = INF  # its place in the heap is void
            self._forget_answers_of(peer)
        for address in (record.ipv4, record.ipv6):
            self._events.append(RunScript("peer-down", {"peer": address}))
        log.info("%s is removed", name)
        return Reply(record.view(), save)

    def status(self, now: float) -> dict[str, Any]:
        """The status object, format 1."""
        self.book()
        return {
            "format": 1,
            "version": __version__,
            "role": "server",
            "state": "up",
            "uptime": round(now - self._started_at, 1),
            "public_key": encode_key(self.key.public),
            "port": self.port,
            "network": {"ipv4": str(self.network.ipv4), "ipv6": str(self.network.ipv6)},
            "under_load": self._door.is_under_load(now),
            "peers": [self._peer_status(record, now) for record in self.register.records.values()],
            "drops": dict(self.drops),
        }

    def _peer_status(self, record: PeerRecord, now: float) -> dict[str, Any]:
        peer = self._peers.get(record.public_key)
        idle = {"state": "never", "multipath": False, "session_age": None, "paths": []}
        return {**record.view(), **(idle if peer is None else peer.status(now))}
