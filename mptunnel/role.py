"""What client and server have in common: datagrams are sorted by what they are and given to the peer they are for.

Type 4 is found by index and taken at once. Handshake messages are collected, 64 at most in a turn, and taken after
the data, 8 in a turn: a flood of them costs the data nothing but their share of a turn. What fits nothing is counted
by kind in `drops` and changes nothing else.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

from mptunnel import noise
from mptunnel.admission import Door, Verdict
from mptunnel.errors import NotAuthenticError
from mptunnel.events import Event, SaveState, Transmit
from mptunnel.messages import (
    COOKIE_REPLY,
    COOKIE_REPLY_SIZE,
    HEADER_SIZE,
    INITIATION,
    INITIATION_SIZE,
    OVERHEAD,
    RESPONSE,
    RESPONSE_SIZE,
    TRANSPORT,
    Capability,
)
from mptunnel.peer import Identity, Peer
from mptunnel.session import read_header, same_headers

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from mptunnel.events import Endpoint

MAX_COLLECTED: Final = 64  # handshake messages in one turn
MAX_TAKEN: Final = 8
MAX_ANSWERED: Final = 4096
INF: Final = float("inf")
_NOBODY: Final = (None, None)
_HANDSHAKE_SIZES: Final = {INITIATION: INITIATION_SIZE, RESPONSE: RESPONSE_SIZE, COOKIE_REPLY: COOKIE_REPLY_SIZE}


class Role:
    """Sorts datagrams, collects what is to be sent and what is asked of the world. `file` is the timestamp's."""

    def __init__(
        self,
        private_key: bytes,
        file: str,
        *,
        capabilities: Capability,
        reserved: int,
        entropy: Callable[[int], bytes],
        rng: random.Random,
        now: float,
        wall: float,
    ) -> None:
        self.drops: Counter[str] = Counter()
        self.key = noise.StaticKey(private_key)
        self.identity = Identity(self.key, noise.Timestamps(reserved), entropy, rng, self.drops, capabilities)
        self.ledger = self.identity.ledger
        self._door = Door(self.key, entropy)
        self._file = file
        self._started_at = now
        self._instance = int.from_bytes(entropy(8), "little")
        self._clock_origin = int.from_bytes(entropy(6), "little")  # no probe tells how long this host is up
        self._handshakes: deque[tuple[bytes, Any]] = deque()
        self._answered: dict[bytes, Peer] = {}  # whose initiation with this ephemeral key we took
        self._busy: set[Peer] = set()  # those that have had something to do with data in this turn
        self.out: list[Transmit] = []  # what is to be sent; see `transmits`
        self._meter: Callable[[Any, int, int], None] | None = None  # told way, datagrams and bytes of all that goes by
        self._events: list[Event] = []
        self.wall_is(now, wall)

    def wall_is(self, now: float, wall: float) -> None:
        """The wall clock shows `wall` (s since 1970) at `now`."""
        timestamps = self.identity.timestamps
        timestamps.offset = wall - now
        reservation = timestamps.reservation(now)
        if reservation is not None:
            self._events.append(SaveState(self._file, {"format": 1, "reserved": reservation}))

    def transmits(self) -> list[Transmit]:
        """Take out what is to be sent."""
        out = self.out
        if not out:
            return []
        self.out = []
        if self._meter is not None:
            for each in out:
                self._meter(each.to, -(-len(each.data) // each.size), len(each.data))
        return out

    def overrun(self, source: Any, buffers: int) -> None:
        """The queue that the next datagrams from `source` waited in had no room for so many buffers before them.

        A super-packet is one buffer.
        """
        self.drops["receive queue full"] += buffers

    def events(self) -> list[Event]:
        """Take out what the world is asked for."""
        events = self._events
        if not events:
            return []
        self._events = []
        return events

    def receive(self, datagrams: bytes, size: int, source: Any, now: float, inbox: list[bytes]) -> bool:
        """Take datagrams of `size` bytes each (the last may be shorter) that came from one source.

        IP packets are appended to `inbox`. Returns whether that is all for now; else `finish_turn` is due in this turn.
        """
        if self._meter is not None:
            self._meter(source, -(-len(datagrams) // max(1, size)), len(datagrams))
        if len(datagrams) > size:
            for run in same_headers(datagrams, size):
                self._receive_run(run, size, source, now, inbox)
            return False
        if len(datagrams) >= OVERHEAD:
            kind, index, counter = read_header(datagrams)
            if kind == TRANSPORT:
                peer, session = self.identity.indices.owners.get(index, _NOBODY)
                if peer is None or session is None:
                    self.drops["unknown index"] += 1
                elif not peer.receive_one(session, counter, datagrams, source, now, inbox, self.out):
                    self._busy.add(peer)
                    return False
                return True
        self._collect(datagrams, source)
        return False

    def finish_turn(self, now: float) -> None:
        """All data of this turn has been taken: now what came of it for the peers, then some handshakes."""
        if self.ledger.owing:
            self._busy |= self.ledger.take()
        if self._busy:
            busy, self._busy = self._busy, set()
            for peer in busy:
                if peer.finish_turn(now):
                    self._after(peer, now)
        if not self._handshakes:
            return
        if len(self._handshakes) > MAX_TAKEN:
            self._door.crowded(now)
        for _ in range(min(MAX_TAKEN, len(self._handshakes))):
            message, source = self._handshakes.popleft()
            self._take_handshake(message, source, now)

    def book(self) -> None:
        """Enter in the books what has gone the short way: before anybody reads them."""
        for peer in self.ledger.owing:
            peer.book()

    def _receive_run(self, run: bytes, size: int, source: Any, now: float, inbox: list[bytes]) -> None:
        if len(run) > size and len(run) % size and len(run) % size < OVERHEAD:
            self.drops["malformed datagram"] += 1  # the short one at the end of a run
            run = run[: len(run) // size * size]
        if len(run) >= OVERHEAD and size >= OVERHEAD:
            kind, index, _ = read_header(run)
            if kind == TRANSPORT:
                peer, session = self.identity.indices.owners.get(index, _NOBODY)
                if peer is None or session is None:
                    self.drops["unknown index"] += -(-len(run) // size)
                elif peer.receive(session, run, size, source, now, inbox, self.out):
                    self._busy.add(peer)
                return
        for at in range(0, max(1, len(run)), size):
            self._collect(run[at : at + size], source)

    def _collect(self, datagram: bytes, source: Any) -> None:
        kind = int.from_bytes(datagram[:4], "little") if len(datagram) >= HEADER_SIZE else 0
        if _HANDSHAKE_SIZES.get(kind) != len(datagram):
            self.drops["malformed datagram"] += 1
        elif len(self._handshakes) >= MAX_COLLECTED:
            self.drops["handshake in a crowd"] += 1
        else:
            self._handshakes.append((datagram, source))

    def _take_handshake(self, message: bytes, source: Any, now: float) -> None:
        if message[0] == COOKIE_REPLY:
            self._cookie_received(message, source)
            return
        match self._door.judge(message, self._seen_from(source), now):
            case Verdict.DROP:
                self.drops["wrong mac1"] += 1
            case Verdict.LIMITED:
                self.drops["handshake over its source's rate"] += 1
            case Verdict.COOKIE:
                self.drops["answered by a cookie"] += 1
                self._transmit(source, self._door.cookie_reply(message, self._seen_from(source), now))
            case Verdict.TAKE if message[0] == INITIATION:
                self._initiation_received(message, source, now)
            case Verdict.TAKE:
                self._response_received(message, now)

    def _cookie_received(self, message: bytes, source: Any) -> None:
        owner = self.identity.indices.find(int.from_bytes(message[4:8], "little"))
        if owner is None:
            self.drops["unknown index"] += 1
        else:
            owner[0].cookie_received(message, source)

    def _initiation_received(self, message: bytes, source: Any, now: float) -> None:
        known = self._answered.get(_ephemeral(message))
        repeated = None if known is None else known.repeated_response(message, now)
        if known is not None and repeated is not None:
            self.drops["initiation repeated, answered"] += 1
            known.respond(repeated, source, now, self.out)
            return
        try:
            consumed = noise.consume_initiation(self.key, message, lambda public: self._product_with(public, now))
        except NotAuthenticError as error:
            self.drops[str(error)] += 1
            return
        peer = self._peer_with(consumed.public, now)
        if peer is None:
            return
        response = peer.accept_initiation(consumed, message, source, now)
        if response is not None:
            if len(self._answered) >= MAX_ANSWERED:
                del self._answered[next(iter(self._answered))]
            self._answered[_ephemeral(message)] = peer
            peer.respond(response, source, now, self.out)
        self._after(peer, now)

    def _response_received(self, message: bytes, now: float) -> None:
        owner = self.identity.indices.find(int.from_bytes(message[8:12], "little"))
        if owner is None or owner[1] is not None:
            self.drops["unknown index"] += 1
            return
        owner[0].response_received(message, now, self.out)
        self._after(owner[0], now)

    def _transmit(self, to: Any, datagram: bytes) -> None:
        self.out.append(Transmit(to, datagram, len(datagram)))

    def _product_with(self, public: bytes, now: float) -> bytes | None:
        """Return the static-static product with the peer of this key, None for a stranger."""
        peer = self._peer_with(public, now)
        return None if peer is None else peer.remote.static_static

    def _save_last_timestamp(self) -> None:
        """Leave on disk what was used, not what was reserved: the next start need not wait for the clock."""
        last = self.identity.timestamps.last
        self._events.append(SaveState(self._file, {"format": 1, "reserved": last}))

    def _forget_answers_of(self, peer: Peer) -> None:
        self._answered = {ephemeral: kept for ephemeral, kept in self._answered.items() if kept is not peer}

    def chains_came(self, now: float) -> None:
        """Hook: others have made nft chains on this host."""

    # -- what the roles know ---------------------------------------------------------------------------

    def _peer_with(self, public: bytes, now: float) -> Peer | None:
        """Return the peer that has this public key."""
        raise NotImplementedError

    def _seen_from(self, source: Any) -> Endpoint:
        """Return the address that a cookie is bound to."""
        raise NotImplementedError

    def _after(self, peer: Peer, now: float) -> None:
        """`peer` has just been busy: take its news, note its deadline."""
        raise NotImplementedError


def _ephemeral(initiation: bytes) -> bytes:
    """Return the initiator's ephemeral key. No constant `slice`: mypyc takes what indexes bytes for a number."""
    return initiation[8:40]
