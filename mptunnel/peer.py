"""One remote party: IP packets in, datagrams out, and the other way round; sessions, handshakes, WireGuard's timers.

**Keys.** There are at most three sessions: `previous`, `current` and `next` (paper, 6.1). We send under `current` only;
what arrives under any of them is taken while it is younger than 180 s. An initiator's new session is current at
once, and its first datagram confirms it; a responder's is `next` until something authentic comes in under it. So a
replayed initiation never becomes a session that is used.

**Sending.** Without a session packets are staged (128, the oldest yields) and a handshake is started. With one, the
packets of a batch are sealed once, in runs of one size, and the scheduler says which paths get how much of a run.

**Receiving.** A run of datagrams with one index from one source is opened as a whole; only what is new and authentic
gets any further. Then, once for the batch: confirm, timers, credit of the path; then each plaintext: empty is a
keepalive, a first byte below 0x10 a control message (its subclass knows which), else an IP packet, which must come
from an address that the peer may use.

**The short way.** With cold caches what takes long is deciding. So a packet that comes alone, less than 50 ms after
another one, goes by the paths which that one went by, and is taken without asking what that one had to be asked.
Anything but such packets (a control message, a deadline, a session, a path) ends this. What has gone the short way, and
copies that came alone, are entered in the books together: after 4 KiB, 20 ms late at the most, and before anything that
does not go the short way looks at them. That is when it is decided anew whether the next packets go the short way,
so that none of them has to wait for it; but one in a second is looked at closely.

A stock peer has one endpoint, the source of its newest authentic datagram, and gets one copy. Everything about
several paths is in the two subclasses, `ServerPeer` and `ClientPeer`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from mptunnel import messages, noise
from mptunnel.errors import BadPacketError, NotAuthenticError
from mptunnel.events import Notice, Transmit
from mptunnel.history import Told
from mptunnel.messages import MAC_SIZE, MACS_SIZE, Capability
from mptunnel.packet import IPV4_HEADER, IPV6_HEADER, PLAIN_IPV4, are_alike, complete, trim
from mptunnel.packet import source as packet_source
from mptunnel.path import Overruns
from mptunnel.receipts import SETTLE_AFTER, Receipts
from mptunnel.session import NARROW_WINDOW, REKEY_TIMEOUT, WINDOW, Refused, Session, runs, sealed_size
from mptunnel.timers import INF, MAX_ATTEMPTS, REKEY_ATTEMPT_TIME, PeerTimers, Timer

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Container, Mapping

    from mptunnel.events import NoticeKind
    from mptunnel.path import Path

log = logging.getLogger(__name__)

MAX_STAGED: Final = 128
STAGED_FOR: Final = 10.0  # s: what has waited longer is of no use to anybody, and may do harm
MAX_COOKIES: Final = 16
INITIATION_SPACING: Final = 0.02  # at most one accepted initiation per peer in this time
SHORT_WAY: Final = 0.05  # s for which single packets are treated like the one before, unless something happens
CLOSE_LOOK: Final = 1.0  # s after which one of them is looked at closely
BOOKED_WITHIN: Final = 0.02  # s
WORTH_BOOKING: Final = 4096  # bytes of them that are entered in the books at the next opportunity
MAX_UNBOOKED: Final = 65536  # and at once
A_COPY: Final = -1  # in an entry: the length of a packet that is there already
ANSWER_LIFETIME: Final = 5.0  # how long a byte-identical initiation gets the same response

LOWEST_PACKET: Final = 0x10  # a lower first byte is a control message's

_DROPS: Final = {
    Refused.REPEATED: "duplicate",
    Refused.LATE: "below the window",
    Refused.BAD: "not authentic",
    Refused.EXPIRED: "key too old",
}

Owner = tuple["Peer", Session | None]
# Ways out (none: it came in), session, counter, path it came by, size of the datagram, length of the packet, when.
Entry = tuple[Sequence[tuple["Path", Any]], Session, int, "Path | None", int, int, float]


class Ledger:
    """Who has something that went the short way and is not in the books yet, and by when it must be."""

    __slots__ = ("due", "owing")

    def __init__(self) -> None:
        self.owing: set[Peer] = set()
        self.due = INF

    def take(self) -> set[Peer]:
        """Take out those whose `finish_turn` is to be called."""
        owing, self.owing, self.due = self.owing, set(), INF
        return owing


class IndexTable:
    """Session indices: which peer, and which of its sessions (None: a handshake), a received index belongs to."""

    __slots__ = ("_entropy", "owners")

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self._entropy = entropy
        self.owners: dict[int, Owner] = {}

    def __len__(self) -> int:
        return len(self.owners)

    def new(self, peer: Peer) -> int:
        """Return a random index that nobody uses, for a handshake of `peer`."""
        while (index := int.from_bytes(self._entropy(4), "little")) in self.owners:
            pass
        self.owners[index] = (peer, None)
        return index

    def settle(self, peer: Peer, session: Session) -> None:
        """The handshake of this index has become a session."""
        self.owners[session.local_index] = (peer, session)

    def drop(self, index: int) -> None:
        """Forget an index."""
        self.owners.pop(index, None)

    def find(self, index: int) -> Owner | None:
        """Return whose index this is."""
        return self.owners.get(index)


class Identity:
    """What all peers of one program share: our key, the index table, timestamps, randomness, counted drops."""

    __slots__ = ("capabilities", "drops", "entropy", "indices", "key", "ledger", "overruns", "rng", "timestamps")

    def __init__(
        self,
        key: noise.StaticKey,
        timestamps: noise.Timestamps,
        entropy: Callable[[int], bytes],
        rng: random.Random,
        drops: Counter[str],
        capabilities: Capability = Capability.MULTIPATH,
    ) -> None:
        self.capabilities = capabilities  # what our HELLOs offer
        self.key = key
        self.timestamps = timestamps
        self.entropy = entropy
        self.rng = rng
        self.indices = IndexTable(entropy)
        self.drops = drops
        self.ledger = Ledger()
        self.overruns = Overruns()  # of the socket that all of them come by

    def with_key(self, key: noise.StaticKey) -> Identity:
        """Return the same for another key of ours, with an index table of its own."""
        identity = Identity(key, self.timestamps, self.entropy, self.rng, self.drops, self.capabilities)
        identity.ledger, identity.overruns = self.ledger, self.overruns
        return identity


class Peer:
    """One remote party. `name` is for the log; `mtu` is the size that padding does not exceed."""

    def __init__(self, identity: Identity, remote: noise.Remote, name: str, mtu: int, now: float) -> None:
        self.identity = identity
        self.remote = remote
        self.name = name
        self.mtu = mtu
        self.tunnel_mtu = 0  # what the tunnel carries now, once that is known: padding does not go beyond it
        self.timers = PeerTimers(identity.rng)
        self.previous: Session | None = None
        self.current: Session | None = None
        self.next: Session | None = None
        self.initiation: noise.Initiation | None = None
        self.receipts = Receipts()  # of what comes in
        self.told = Told()  # of what we send, by what the other end says
        self.is_multipath = False
        self.takes_partial = False  # it knows partial checksums, by its newest HELLO
        self.window = NARROW_WINDOW
        self.endpoint: Any = None  # of a stock peer
        self.sources: Mapping[Any, Path] = {}  # the path that is bound to where a datagram comes from
        self.allowed: Container[bytes] | None = frozenset()  # packed addresses its packets may come from; None: any
        self.packets_sent = self.bytes_sent = 0
        self.packets_received = self.bytes_received = 0
        self.data_at = -INF  # when an IP packet went either way last
        self.heard_at = -INF  # when anything authentic came in last
        self.scheduled_at = INF  # for the role that keeps many peers in one heap
        self._staged: deque[tuple[float, bytes]] = deque(maxlen=MAX_STAGED)  # since when it waits, and the packet
        self._cookies: dict[Any, tuple[bytes, float]] = {}
        self._attempts = 0
        self._initiated_at = -INF
        self._accepted_at = -INF
        self._timestamp = bytes(12)
        self._answered: tuple[bytes, bytes, float] = (b"", b"", -INF)
        self._serial = 0
        self._first_session_at = INF
        self._was_renewed_at_its_end = False
        self._ways: Sequence[tuple[Path, Any]] = ()  # that the last single packet went
        self.short_until = -INF  # when they must be decided anew
        self._unbooked: list[Entry] = []  # what went the short way, in the order in which it did
        self._has_news = False  # whether anything else has happened since it was asked last
        self._takes_short_until = -INF  # when what comes in must be looked at anew
        self._sent_alone_at = self._came_alone_at = -INF  # what has gone the short way last, as far as it is booked
        self._sends_looked_at = self._takes_looked_at = -INF  # when a single packet was looked at closely
        self._looked_under: Session | None = None  # and under which session the latter came

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, packets: list[bytes], now: float, out: list[Transmit]) -> None:
        """Seal IP packets and append what goes on the wire to `out`, or stage them until there is a session."""
        if now < self.short_until and len(packets) == 1:
            datagram, ways = self.seal_one(packets[0], now)
            out += [Transmit(to, datagram, len(datagram)) for _, to in ways]
        else:
            self.book()
            self._has_news = True
            self._send_batch(packets, now, out)

    def seal_one(self, packet: bytes, now: float) -> tuple[bytes, Sequence[tuple[Path, Any]]]:
        """Seal a packet that goes the short way, before `short_until`; return the datagram and where it goes."""
        session = self.current
        assert session is not None  # noqa: S101  see `look_again`
        datagram = session.seal(packet, self.tunnel_mtu or self.mtu)
        size = len(datagram)
        self._unbooked.append((self._ways, session, 0, None, size, len(packet), now))
        waiting = len(self._unbooked)
        if waiting == 1 or waiting * size > WORTH_BOOKING:
            self._owe(waiting * size, now)
        return datagram, self._ways

    def _send_batch(self, packets: list[bytes], now: float, out: list[Transmit]) -> None:
        """Do what `send` does, the long way."""
        session = self.current
        self.data_at = now
        if session is None or not session.is_alive(now):
            self._stage(packets, now)
            self._want_handshake(now, out)
            return
        if self._staged:
            self._flush(now, out)  # what waits goes first, or nothing does
        self._send_runs(session, packets, now, out)
        self.timers.data_sent(now)
        if self._wants_successor(session, now):
            self._want_handshake(now, out)

    def _send_runs(self, session: Session, packets: list[bytes], now: float, out: list[Transmit]) -> None:
        """Send packets in order: where one has to wait, all behind it do."""
        for run, size in runs(packets, self.tunnel_mtu or self.mtu):
            if self._staged:
                self._stage(run, now)
            else:
                self._send_run(session, run, size, now, out)

    def _send_run(self, session: Session, run: list[bytes], size: int, now: float, out: list[Transmit]) -> None:
        """Seal packets into datagrams of `size` bytes, the last one perhaps shorter, and give them to the paths."""
        count = len(run)
        chosen = self._choose(count, size, now)
        if not chosen:
            self._stage(run, now)
            return
        rest: list[bytes] = []
        most = max([given for _, _, given in chosen])
        if most < count:  # nobody takes the rest of the run with this call
            count, run, rest = most, run[:most], run[most:]
        limit = self.tunnel_mtu or self.mtu
        data = session.seal(run[0], limit) if count == 1 else session.seal_run(run, limit)
        self.packets_sent += count
        for packet in run:
            self.bytes_sent += len(packet)
        for path, to, given in chosen:
            part = data if given == count else memoryview(data)[: given * size]
            out.append(Transmit(to, part, size))
            if path is not None:
                path.sent(given, len(part))
        self.timers.anything_sent(now)
        if rest:
            self._send_runs(session, rest, now, out)
        elif count == 1:
            self._ways = self._free_ways(now)
            self.short_until = now + SHORT_WAY if self._ways else -INF
            self._sends_looked_at = self._sent_alone_at = now

    # -- the short way ---------------------------------------------------------------------------------

    def finish_turn(self, now: float) -> bool:
        """Count what has gone the short way; return whether there is news, or a deadline before `scheduled_at`."""
        self.book()
        self.renew_short_way(now)
        has_news, self._has_news = self._has_news, False
        return has_news

    def book(self) -> None:
        """Enter in the books what has gone the short way: it goes on first, and is counted when there is time."""
        for ways, session, counter, path, size, length, now in self._unbooked:
            if ways:
                due = self._book_sent(ways, size, length, now)
            elif length != A_COPY:
                due = self._book_received(session, counter, path, size, length, now)
            else:
                due = self._book_copy(session, counter, path, size, now)
            if due < self.scheduled_at:
                self._has_news = True
        self._unbooked.clear()

    def _owe(self, size: int, now: float) -> None:
        """There are some `size` bytes that are not in the books: the first in a while, or many."""
        ledger = self.identity.ledger
        ledger.owing.add(self)
        if size > MAX_UNBOOKED:
            ledger.due = -INF
        else:
            ledger.due = min(ledger.due, now if size > WORTH_BOOKING else now + BOOKED_WITHIN)

    def _book_sent(self, ways: Sequence[tuple[Path, Any]], size: int, length: int, now: float) -> float:
        """A packet of `length` bytes went out in datagrams of `size` bytes; return the deadline that this sets."""
        self.data_at = self._sent_alone_at = now
        self.packets_sent += 1
        self.bytes_sent += length
        for path, _ in ways:
            path.sent(1, size)
        return self.timers.packet_sent(now)

    def _book_received(
        self, session: Session, counter: int, path: Path | None, size: int, length: int, now: float
    ) -> float:
        """A packet of `length` bytes came in a datagram of `size` bytes; return the deadline that this sets."""
        self.heard_at = self.data_at = self._came_alone_at = now
        self.packets_received += 1
        self.bytes_received += length
        if path is not None:
            path.received(1, size, size)
        self.receipts.arrived(session, (counter,), now, None if path is None else path.id)
        return self.timers.packet_received(now)

    def _book_copy(self, session: Session, counter: int, path: Path | None, size: int, now: float) -> float:
        """A datagram of `size` bytes came that another path had delivered; it sets no deadline."""
        self.identity.drops["duplicate"] += 1
        if path is not None:
            path.received(1, size, 0)  # a copy seen before proves no size
            self.receipts.gaps.came((path.id,), session, counter, counter, now)
        return INF

    def look_again(self) -> None:
        """Something has happened: nothing goes the short way before it has been looked at again."""
        self.short_until = self._takes_short_until = -INF

    def renew_short_way(self, now: float) -> None:
        """Let packets that come alone go on the short way, if they went it lately and nothing is against it."""
        session = self.current
        if session is None or not self.is_multipath:
            return
        if not self._staged and now - self._sent_alone_at < SHORT_WAY and now - self._sends_looked_at < CLOSE_LOOK:
            ways = self._free_ways(now)
            if ways and session.is_alive(now) and not self._wants_successor(session, now):
                self._ways, self.short_until = ways, now + SHORT_WAY
        if (
            now - self._came_alone_at < SHORT_WAY
            and now - self._takes_looked_at < CLOSE_LOOK
            and session is self._looked_under
        ):
            self._takes_short_until = now + SHORT_WAY

    def _stage(self, packets: list[bytes], now: float) -> None:
        lost = len(self._staged) + len(packets) - MAX_STAGED
        if lost > 0:
            self.identity.drops["staged too long"] += lost
        whole = map(complete, packets) if self.takes_partial else packets  # who knows to whom they will go
        self._staged.extend((now, packet) for packet in whole)
        self.look_again()

    def _flush(self, now: float, out: list[Transmit]) -> None:
        """Send what waits, but for what has waited too long to be of use; what cannot be sent goes on waiting."""
        if not self._staged:
            return
        patience = self._staged_for()
        waiting = [each for each in self._staged if now - each[0] < patience]
        if len(waiting) < len(self._staged):
            self.identity.drops["staged too long"] += len(self._staged) - len(waiting)
        if waiting and not self._has_way(sealed_size(len(waiting[0][1]), self.tunnel_mtu or self.mtu), now):
            self._staged = deque(waiting, MAX_STAGED)
            return
        self._staged.clear()
        if waiting:
            self.book()
            self._has_news = True
            self._send_batch([packet for _, packet in waiting], now, out)
            left = len(self._staged)  # the last ones, in order
            self._staged.clear()
            self._staged.extend(waiting[len(waiting) - left :])

    def _send_control(self, plain: bytes, to: Any, path: Path | None, now: float, out: list[Transmit]) -> None:
        """Seal one control message (or a keepalive, if it is empty) for one way out."""
        session = self.current
        if session is None or not session.is_alive(now) or to is None:
            return
        datagram = session.seal(plain, len(plain))  # padded by its encoder, perhaps to a size under test
        out.append(Transmit(to, datagram, len(datagram)))
        if path is not None:
            path.sent(1, len(datagram))
        self.timers.anything_sent(now)
        if self._wants_successor(session, now):
            self._want_handshake(now, out)

    # -- receiving -------------------------------------------------------------------------------------

    def receive(
        self,
        session: Session,
        datagrams: bytes,
        size: int,
        source: Any,
        now: float,
        inbox: list[bytes],
        out: list[Transmit],
    ) -> bool:
        """Take a run of type 4 datagrams under `session` from `source`; append IP packets to `inbox`.

        Returns whether anything new and authentic was among them.
        """
        self.book()
        path, data_before = self.sources.get(source), self.data_at
        opened = session.open(datagrams, size, None if path is None else path.id, now)
        new = len(opened.plain)
        if opened.bad or opened.late or opened.expired:
            self._count_drops(opened.bad, opened.late, opened.expired)
        if opened.repeated:
            self.identity.drops["duplicate"] += opened.repeated
        if path is not None and (new or opened.credited):
            longest = min(size, len(datagrams)) if new else 0  # a copy seen before proves no size
            path.received(new + opened.credited, len(datagrams), longest)
            if opened.credited:
                self.receipts.gaps.came((path.id,), session, opened.low, opened.high, now)
        if not new:
            return False
        self._has_news = True
        self._authenticated(session, source, now, out)
        alike = self._take_alike(opened.plain, inbox) if new > 1 else 0
        data = list(opened.counters[:alike])
        controls: list[tuple[int, bytes]] = []
        for counter, plain in zip(opened.counters[alike:], opened.plain[alike:], strict=True):
            if len(plain) and plain[0] >= LOWEST_PACKET:
                self._take_packet(plain, counter, data, inbox)
            else:
                session.window.mark_control(counter)
                if plain:
                    controls.append((counter, plain))
        if data:
            self._data_received(session, data, path, now)
        for counter, plain in controls:
            self._take_control(session, counter, plain, source, now, out)
        was_quiet_for = now - data_before if data else None
        self._has_taken(session, source, len(datagrams), now, out, was_quiet_for=was_quiet_for)
        return True

    def receive_one(
        self,
        session: Session,
        counter: int,
        datagram: bytes,
        source: Any,
        now: float,
        inbox: list[bytes],
        out: list[Transmit],
    ) -> bool:
        """Take a datagram that came alone: what `receive` does, without what is only worth its while for many.

        Returns whether it took the short way, or brought nothing; else `finish_turn` is due in this turn.
        """
        path, size = self.sources.get(source), len(datagram)
        number = None if path is None else path.id
        plain = session.open_one(datagram, counter, number, now)
        if isinstance(plain, Refused):
            if plain is not Refused.CREDITED:
                self.identity.drops[_DROPS[plain]] += 1
                return True
            self._unbooked.append(((), session, counter, path, size, A_COPY, now))
            waiting = len(self._unbooked)
            if waiting == 1 or waiting * size > WORTH_BOOKING:
                self._owe(waiting * size, now)
            return True
        if now < self._takes_short_until and session is self.current and len(plain) >= IPV4_HEADER:
            least, length, its_source = IPV4_HEADER, 0, b""
            if plain[0] == PLAIN_IPV4:
                length, its_source = plain[2] << 8 | plain[3], plain[12:16]
            elif plain[0] >> 4 == 6:
                least, length, its_source = IPV6_HEADER, (plain[4] << 8 | plain[5]) + IPV6_HEADER, plain[8:24]
            if least <= length <= len(plain) and (self.allowed is None or its_source in self.allowed):
                inbox.append(plain if length == len(plain) else plain[:length])
                self._unbooked.append(((), session, counter, path, size, length, now))
                waiting = len(self._unbooked)
                if waiting == 1 or waiting * size > WORTH_BOOKING:
                    self._owe(waiting * size, now)
                return True
        self.book()
        self._has_news = True
        if path is not None:
            path.received(1, size, size)
        self._take_one(session, counter, plain, source, path, size, now, inbox, out)
        return False

    def _take_one(
        self,
        session: Session,
        counter: int,
        plain: bytes,
        source: Any,
        path: Path | None,
        size: int,
        now: float,
        inbox: list[bytes],
        out: list[Transmit],
    ) -> None:
        """Take the plaintext of a datagram of `size` bytes that came alone, whatever it is."""
        was_quiet_for = None
        self._authenticated(session, source, now, out)
        if len(plain) and plain[0] >= LOWEST_PACKET:
            data: list[int] = []
            self._take_packet(plain, counter, data, inbox)
            if data:
                was_quiet_for = now - self.data_at
                self._data_received(session, data, path, now)
                if self.is_multipath and session is self.current:
                    self._takes_short_until = now + SHORT_WAY
                    self._takes_looked_at = self._came_alone_at = now
                    self._looked_under = session
        else:
            session.window.mark_control(counter)
            if plain:
                self._take_control(session, counter, plain, source, now, out)
        self._has_taken(session, source, size, now, out, was_quiet_for=was_quiet_for)

    def _data_received(self, session: Session, counters: list[int], path: Path | None, now: float) -> None:
        self.packets_received += len(counters)
        self.data_at = now
        self.receipts.arrived(session, counters, now, None if path is None else path.id)
        self.timers.data_received(now)

    def _take_control(
        self, session: Session, counter: int, plain: bytes, source: Any, now: float, out: list[Transmit]
    ) -> None:
        self.look_again()
        try:
            self._control(session, counter, plain, source, now, out)
        except BadPacketError:
            self.identity.drops["malformed control message"] += 1

    def _take_alike(self, plain: list[bytes], inbox: list[bytes]) -> int:
        """Take the packets of a run, but for its last one, if what a packet is judged by is the same in all.

        Returns how many were taken. They are of one length: only the last of a run may be shorter.
        """
        first, bulk = plain[0], plain[:-1]
        if len(first) < IPV6_HEADER:
            return 0
        if not are_alike(bulk):
            return 0
        try:
            length = len(trim(first))
        except BadPacketError:
            return 0
        if self.allowed is not None and packet_source(first) not in self.allowed:
            return 0
        inbox += bulk if length == len(first) else [packet[:length] for packet in bulk]
        self.bytes_received += length * len(bulk)
        return len(bulk)

    def _take_packet(self, plain: bytes, counter: int, data: list[int], inbox: list[bytes]) -> None:
        if plain[0] == PLAIN_IPV4 and len(plain) >= IPV4_HEADER and plain[2] << 8 | plain[3] == len(plain):
            packet, its_source = plain, plain[12:16]  # nearly all are so: nothing to trim
        else:
            try:
                packet = trim(plain)
            except BadPacketError:
                self.identity.drops["malformed IP packet"] += 1
                return
            its_source = packet_source(packet)
        if self.allowed is not None and its_source not in self.allowed:
            self.identity.drops["source not allowed"] += 1
            return
        inbox.append(packet)
        data.append(counter)
        self.bytes_received += len(packet)

    def _count_drops(self, bad: int, late: int, expired: int) -> None:
        for refused, count in ((Refused.BAD, bad), (Refused.LATE, late), (Refused.EXPIRED, expired)):
            if count:
                self.identity.drops[_DROPS[refused]] += count

    def _authenticated(self, session: Session, source: Any, now: float, out: list[Transmit]) -> None:
        self.heard_at = now
        self.timers.anything_received(now)
        if not self.is_multipath:
            self._learn_endpoint(source)
        if session is self.next:
            self._drop(self.previous)
            self.previous, self.current, self.next = self.current, session, None
            self.timers.handshake_confirmed()
            self._confirmed(now, out)
        elif (
            session.is_initiator
            and session is self.current
            and session.is_near_its_end(now)
            and not self._was_renewed_at_its_end
        ):
            self._was_renewed_at_its_end = True
            self._want_handshake(now, out)

    # -- handshake -------------------------------------------------------------------------------------

    def accept_initiation(self, consumed: noise.Consumed, message: bytes, source: Any, now: float) -> bytes | None:
        """Return the response to an initiation that opened; None if it is a replay or comes too soon."""
        if self._is_replayed(consumed.timestamp):
            self.identity.drops["initiation replayed"] += 1
            return None
        if now - self._accepted_at < INITIATION_SPACING:
            self.identity.drops["initiation too soon"] += 1
            return None
        self._remember(consumed.timestamp)
        self._accepted_at = self._initiated_at = now  # a response counts: one handshake in 5 s is enough
        self._forget_initiation()
        index = self.identity.indices.new(self)
        response, keys = noise.create_response(self.remote, consumed, index, self.identity.entropy)
        self._drop(self.next)
        self._drop(self.previous)
        self.previous = None
        self.next = self._new_session(keys, now)
        self.timers.keys_derived(now)
        if not self.is_multipath:
            self._learn_endpoint(source)
        self._answered = (message[:-MACS_SIZE], response, now + ANSWER_LIFETIME)
        return response

    def _is_replayed(self, timestamp: bytes) -> bool:
        """Whether an initiation with this timestamp, or a later one, was accepted before (paper, 5.1)."""
        return timestamp <= self._timestamp

    def _remember(self, timestamp: bytes) -> None:
        self._timestamp = timestamp

    def repeated_response(self, message: bytes, now: float) -> bytes | None:
        """Return the response again, if `message` is a copy of the initiation accepted less than 5 s ago."""
        body, response, until = self._answered
        return response if now < until and body == message[:-MACS_SIZE] else None

    def respond(self, response: bytes, source: Any, now: float, out: list[Transmit]) -> None:
        """Send a response to who initiated from `source`."""
        ways = self._answer_ways(source)
        out += [Transmit(way, self._with_mac2(response, self._way_of(way), now), len(response)) for way in ways]

    def response_received(self, message: bytes, now: float, out: list[Transmit]) -> None:
        """Finish our handshake; a response that does not fit is counted, and we go on waiting."""
        initiation = self.initiation
        if initiation is None:
            self.identity.drops["response not expected"] += 1
            return
        try:
            keys = noise.consume_response(self.identity.key, self.remote, initiation, message)
        except NotAuthenticError:
            self.identity.drops["response not authentic"] += 1
            return
        self.initiation = None
        self._attempts = 0
        session = self._new_session(keys, now)
        if self.next is not None:
            self._drop(self.current)
            self._drop(self.previous)
            self.previous, self.next = self.next, None
        else:
            self._drop(self.previous)
            self.previous = self.current
        self.current = session
        self.heard_at = now
        self.timers.handshake_done(now)
        self.timers.anything_received(now)
        self._confirmed(now, out)

    def cookie_received(self, message: bytes, source: Any) -> None:
        """Keep a cookie for mac2 of the next initiation or response to `source`."""
        initiation, sent = self.initiation, self._answered[1]
        if initiation is not None and message[4:8] == initiation.index.to_bytes(4, "little"):
            sent = initiation.datagram
        try:
            cookie = noise.open_cookie(self.remote, message, sent[-MACS_SIZE:-MAC_SIZE])
        except NotAuthenticError:
            self.identity.drops["cookie not authentic"] += 1
            return
        if len(self._cookies) >= MAX_COOKIES:
            self._cookies.clear()  # who sees our initiation and knows the peer's key can make as many as it likes
        self._cookies[self._way_of(source)] = (cookie, self._initiated_at)
        self.cookie_at(source)

    def cookie_at(self, source: Any) -> None:
        """Hook: a cookie has come from `source`; the next repeat carries it."""

    def _want_handshake(self, now: float, out: list[Transmit]) -> None:
        """Start a handshake, unless one is under way; if it is too soon after the last one, later."""
        if self.initiation is not None:
            return
        earliest = self._next_handshake_at()
        if now >= earliest:
            self._attempts = 0
            self._initiate(now, out)
        elif self.current is None or not self.current.is_alive(now):
            self.timers.at_the_latest(Timer.RETRANSMIT, earliest)

    def _initiate(self, now: float, out: list[Transmit]) -> None:
        """Send a new initiation on every way there is."""
        ways = self._handshake_ways(now)
        self._forget_initiation()
        if not ways:
            return  # whoever finds a way again starts anew
        index = self.identity.indices.new(self)
        timestamp = self.identity.timestamps.next(now)
        self.initiation = noise.create_initiation(
            self.identity.key, self.remote, index, timestamp, self.identity.entropy
        )
        self._initiated_at = now
        self._attempts += 1
        self.timers.initiation_sent(now, self._patience(now))
        self._repeat(ways, now, out)

    def _repeat(self, ways: Sequence[Any], now: float, out: list[Transmit]) -> None:
        """Send the initiation that waits on these ways: the same bytes, mac2 apart."""
        if self.initiation is None:
            return
        for way in ways:
            datagram = self._with_mac2(self.initiation.datagram, way, now)
            out.append(Transmit(way, datagram, len(datagram)))
        self.timers.anything_sent(now)

    def _with_mac2(self, datagram: bytes, way: Any, now: float) -> bytes:
        """Return a handshake message as it goes one way: with mac2, if we have a cookie from there."""
        cookie, got_at = self._cookies.get(way, (b"", -INF))
        return noise.with_mac2(datagram, cookie) if cookie and now - got_at < noise.COOKIE_USABLE else datagram

    def _forget_initiation(self) -> None:
        if self.initiation is not None:
            self.identity.indices.drop(self.initiation.index)
            self.initiation = None

    def _new_session(self, keys: noise.SessionKeys, now: float) -> Session:
        self._serial += 1
        self._first_session_at = min(self._first_session_at, now)
        self.look_again()
        self._was_renewed_at_its_end = False
        session = Session(keys, self._serial, now, self.window)
        self.identity.indices.settle(self, session)
        return session

    def _widen(self) -> None:
        """The peer sends copies: what comes late is wanted."""
        self.window = WINDOW
        for session in (self.previous, self.current, self.next):
            if session is not None:
                session.window.width = WINDOW

    def _drop(self, session: Session | None) -> None:
        if session is not None:
            self.book()
            self.look_again()
            self.identity.indices.drop(session.local_index)
            self.receipts.retire(session, self._paths_in_use())
            session.close()

    def forget_keys(self) -> None:
        """Drop every session and handshake at once."""
        self._forget_sessions()
        self._forget_initiation()

    def _forget_sessions(self) -> None:
        for session in (self.previous, self.current, self.next):
            self._drop(session)
        self.previous = self.current = self.next = None
        self.timers.keys_zeroed()

    # -- time ------------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `handle_timeout` is due."""
        self.book()
        return self.timers.next_deadline()

    def handle_timeout(self, now: float, out: list[Transmit]) -> None:
        """Do what is due."""
        self.book()
        self.look_again()
        for timer in self.timers.expired(now):
            self._expired(timer, now, out)

    def _expired(self, timer: Timer, now: float, out: list[Transmit]) -> None:
        match timer:
            case Timer.RETRANSMIT:
                self._retransmit(now, out)
            case Timer.KEEPALIVE:
                self._send_keepalive(now, out)
                self.timers.keepalive_sent(now)
            case Timer.PERSISTENT:
                self._send_keepalive(now, out)
            case Timer.NEW_HANDSHAKE:
                log.debug("%s has been silent for 15 s: new handshake", self.name)
                self._want_handshake(now, out)
            case Timer.ZERO_KEYS:
                self._forget_sessions()  # a handshake that is under way has nothing of them
            case Timer.SETTLE:
                self._settle_at(self.receipts.settle(self._paths_in_use(), now, self._paths_standing_by()))
                if self.is_multipath:
                    self.timers.at_the_latest(Timer.RECEIPT, self.receipts.due(now))
            case Timer.RECEIPT:
                self._send_receipt(now, out)
            case _:
                pass

    def _retransmit(self, now: float, out: list[Transmit]) -> None:
        if self._attempts < MAX_ATTEMPTS:
            self._initiate(now, out)
            return
        log.info("%s did not answer %d handshakes: waiting for traffic", self.name, self._attempts)
        self._forget_initiation()
        self._staged.clear()
        self.timers.handshake_given_up(now)

    def _send_keepalive(self, now: float, out: list[Transmit]) -> None:
        if self.current is None or not self.current.is_alive(now):
            self._want_handshake(now, out)
            return
        for path, to, _ in self._choose(1, 32, now):
            self._send_control(b"", to, path, now, out)

    def _send_receipt(self, now: float, out: list[Transmit]) -> None:
        """Tell a peer of ours what has come in, by every path that lives."""
        ways = self._receipt_ways(now) if self.is_multipath and self.current is not None else ()
        if not ways:
            return  # when something comes again, it is due again
        plain = self.receipts.say(self._datagrams_received(), now)
        for path, to in ways:
            self._send_control(plain, to, path, now, out)
        self.timers.at(Timer.RECEIPT, self.receipts.due(now))

    def _receipt_received(self, session: Session, counter: int, plain: bytes, now: float) -> bool:
        """Take a RECEIPT; return whether it is the newest."""
        receipt = messages.decode_receipt_untrusted(memoryview(plain))
        sealed = self.packets_sent if now > self._first_session_at + SETTLE_AFTER else 0  # that are accounted for there
        return self.told.take(receipt, (session.serial, counter), now, sealed)

    def _forget_receipts(self, path: int) -> None:
        """Another path has got this number: what was counted by it is none of its business."""
        self.receipts.forget(path)
        self.told.forget(path)

    def begin_receipts_afresh(self, now: float) -> None:
        """Show from now on what comes on top of what there is."""
        self.book()
        self.receipts.begin_afresh(now)
        self.told.begin_afresh()

    def _settle_at(self, when: float) -> None:
        self.timers.at(Timer.SETTLE, when)

    def sent(self) -> dict[str, int]:
        """IP packets that we have sealed, and their bytes."""
        return {"packets": self.packets_sent, "bytes": self.bytes_sent}

    def received(self) -> dict[str, int]:
        """IP packets that came in, and their bytes."""
        return {"packets": self.packets_received, "bytes": self.bytes_received}

    def notice(
        self, kind: NoticeKind, now: float, path: str = "", interface: str = "", **values: str | float
    ) -> Notice:
        """Return word of what happens to this peer now, for those outside who listen."""
        return Notice(kind, now + self.identity.timestamps.offset, self.name, path, interface, values)

    # -- what a peer of ours does differently ----------------------------------------------------------

    def _choose(self, count: int, size: int, now: float) -> Sequence[tuple[Path | None, Any, int]]:
        """Which ways get how many leading datagrams of a run. A stock peer: its endpoint, all."""
        return [] if self.endpoint is None else [(None, self.endpoint, count)]

    def _staged_for(self) -> float:
        """How long a packet may wait and still be of use, in s."""
        return STAGED_FOR if self.is_multipath else REKEY_ATTEMPT_TIME  # so long a stock peer may take

    def _has_way(self, size: int, now: float) -> bool:
        """Whether a datagram of this size could go anywhere now."""
        return self.endpoint is not None

    def _free_ways(self, now: float) -> Sequence[tuple[Path, Any]]:
        """All ways that a packet goes now, if none of them is limited in what it takes; else none."""
        return []

    def _handshake_ways(self, now: float) -> list[Any]:
        return [] if self.endpoint is None else [self.endpoint]

    def _way_of(self, source: Any) -> Any:
        """What `to` leads to `source`."""
        return source

    def _answer_ways(self, source: Any) -> Sequence[Any]:
        """Return where the answer to a handshake or HELLO goes that came from `source`."""
        return [source]

    def _receipt_ways(self, now: float) -> Sequence[tuple[Path, Any]]:
        """The paths that a RECEIPT goes by, and where to."""
        return ()

    def _datagrams_received(self) -> dict[int, tuple[int, int]]:
        """How many datagrams were given to each path towards us, and how many of them it has lost."""
        return {}

    def _paths_in_use(self) -> int:
        """A bit for each path that copies are expected on."""
        return 0

    def _paths_standing_by(self) -> int:
        """A bit for each path that is there and is given no copies, as the user or a limit wants it."""
        return 0

    def _learn_endpoint(self, source: Any) -> None:
        self.endpoint = source

    def _has_taken(
        self, session: Session, source: Any, size: int, now: float, out: list[Transmit], *, was_quiet_for: float | None
    ) -> None:
        """Hook: `size` bytes of datagrams from `source` brought something new, not the short way.

        `was_quiet_for`: so many seconds after the last IP packet they brought another; None if they brought none.
        """

    def _wants_successor(self, session: Session, now: float) -> bool:
        """Whether what has just been sent under `session` is a reason for new keys."""
        return session.wants_successor(now)

    def _next_handshake_at(self) -> float:
        """When a fresh initiation may be sent at the earliest."""
        return self._initiated_at + REKEY_TIMEOUT

    def _patience(self, now: float) -> float:
        """How long to wait for a response; 0: as WireGuard does."""
        return 0.0

    def _confirmed(self, now: float, out: list[Transmit]) -> None:
        """There is a new current session that both sides have."""
        raise NotImplementedError

    def _control(
        self, session: Session, counter: int, plain: bytes, source: Any, now: float, out: list[Transmit]
    ) -> None:
        raise NotImplementedError
