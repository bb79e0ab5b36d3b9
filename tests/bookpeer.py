"""A WireGuard peer by the book, to try ours against: one endpoint, one copy, the five timers, nothing of mptunnel.

Built on `noise` and `session` alone; its rules are those of the reference implementation (device/timers.go,
device/send.go, device/receive.go). It stands at an end of a `Simnet` in place of a role.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from mptunnel import noise
from mptunnel.errors import BadPacketError, NotAuthenticError
from mptunnel.events import Event, Transmit
from mptunnel.messages import INITIATION, OVERHEAD, RESPONSE, TRANSPORT, TRANSPORT_HEADER
from mptunnel.packet import trim
from mptunnel.session import REJECT_AFTER_TIME, REKEY_AFTER_TIME, Session

REKEY_TIMEOUT, KEEPALIVE_TIMEOUT, JITTER = 5.0, 10.0, 0.333
MAX_RETRIES = 18
MTU = 1420


class BookPeer:
    """`endpoint` is where its peer is, as far as it knows: for a client the number of the one wire it uses."""

    def __init__(
        self,
        private: bytes,
        remote: bytes,
        psk: bytes,
        *,
        endpoint: Any = None,
        persistent: float = 0.0,
        seed: int = 5,
        newer_than: float = 1.7e9,
    ) -> None:
        self.drops: Counter[str] = Counter()
        self.key = noise.StaticKey(private)
        self.remote = noise.Remote(self.key, remote, psk)
        self.endpoint = endpoint
        self.foreign: list[bytes] = []  # authentic plaintexts that are no IP packets
        self.current: Session | None = None
        self.previous: Session | None = None
        self.next: Session | None = None
        self.sessions_made = 0
        self._initiation: noise.Initiation | None = None
        self._persistent = persistent
        self._rng = random.Random(seed)
        self._at: dict[str, float] = {}
        self._staged: list[bytes] = []
        self._out: list[Transmit] = []
        self._retries = 0
        self._handshake_sent_at = float("-inf")
        self._accepted = bytes(12)
        self._made_at = int(newer_than) * 10**9
        self._needs_another = False

    # -- for the simulated network ---------------------------------------------------------------------

    def transmits(self) -> list[Transmit]:
        out, self._out = self._out, []
        return out

    def events(self) -> list[Event]:
        return []

    def finish_turn(self, now: float) -> None:
        """It takes handshakes at once."""

    def wall_is(self, now: float, wall: float) -> None:
        """Its timestamps only count."""

    def next_deadline(self) -> float:
        return min(self._at.values(), default=float("inf"))

    def handle_timeout(self, now: float) -> None:
        for timer in [timer for timer, at in self._at.items() if at <= now]:
            del self._at[timer]
            match timer:
                case "retransmit" if self._retries > MAX_RETRIES:
                    self._staged.clear()
                    self._initiation = None
                case "retransmit":
                    self._retries += 1
                    self._initiate(now)
                case "silent":
                    self.initiate(now)
                case "keepalive" | "persistent":
                    self._transport(b"", now)
                    if timer == "keepalive" and self._needs_another:
                        self._needs_another = False
                        self._at["keepalive"] = now + KEEPALIVE_TIMEOUT

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, packets: list[bytes], now: float) -> None:
        for packet in packets:
            if self.current is None or now - self.current.created_at >= REJECT_AFTER_TIME:
                self._staged = [*self._staged, packet][-128:]
                self.initiate(now)
            else:
                self._transport(packet, now)

    def initiate(self, now: float) -> None:
        """Start a handshake, unless one was started (or answered) less than 5 s ago."""
        self._retries = 0
        if now - self._handshake_sent_at >= REKEY_TIMEOUT:
            self._initiate(now)

    def _initiate(self, now: float) -> None:
        if self.endpoint is None:
            return
        self._handshake_sent_at = now
        self._made_at += noise.TIMESTAMP_STEP
        self._initiation = noise.create_initiation(
            self.key, self.remote, self._index(), noise.tai64n(self._made_at), self._rng.randbytes
        )
        self._transmit(self._initiation.datagram, now)
        self._at["retransmit"] = now + REKEY_TIMEOUT + self._rng.uniform(0, JITTER)

    def _transport(self, packet: bytes, now: float) -> None:
        session = self.current
        if session is None or now - session.created_at >= REJECT_AFTER_TIME:
            self.initiate(now)
            return
        self._transmit(session.seal(packet, MTU), now)
        self._at.pop("keepalive", None)
        if packet:
            self._at.setdefault("silent", now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self._rng.uniform(0, JITTER))
        if session.is_initiator and now - session.created_at > REKEY_AFTER_TIME:
            self.initiate(now)

    def _transmit(self, datagram: bytes, now: float) -> None:
        if self.endpoint is not None:
            self._out.append(Transmit(self.endpoint, datagram, len(datagram)))
        if self._persistent:
            self._at["persistent"] = now + self._persistent

    def _index(self) -> int:
        return self._rng.getrandbits(32)

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, datagrams: bytes, size: int, source: Any, now: float, inbox: list[bytes]) -> None:
        message = bytes(datagrams)
        kind = int.from_bytes(message[:4], "little")
        try:
            if kind == INITIATION and len(message) == 148 and noise.mac1_is_valid(self.key, message):
                self._initiation_received(message, source, now)
            elif kind == RESPONSE and len(message) == 92 and noise.mac1_is_valid(self.key, message):
                self._response_received(message, source, now)
            elif kind == TRANSPORT and len(message) >= OVERHEAD:
                self._transport_received(message, source, now, inbox)
            else:
                self.drops["malformed"] += 1
        except NotAuthenticError:
            self.drops["not authentic"] += 1

    def _initiation_received(self, message: bytes, source: Any, now: float) -> None:
        product = self.remote.static_static
        consumed = noise.consume_initiation(
            self.key, message, lambda public: product if public == self.remote.public else None
        )
        if consumed.timestamp <= self._accepted:
            self.drops["replayed"] += 1
            return
        self._accepted = consumed.timestamp
        self.endpoint = source
        self._initiation = None
        response, keys = noise.create_response(self.remote, consumed, self._index(), self._rng.randbytes)
        self.next, self.previous = self._session(keys, now), None
        self._handshake_sent_at = now
        self._transmit(response, now)

    def _response_received(self, message: bytes, source: Any, now: float) -> None:
        initiation = self._initiation
        if initiation is None or int.from_bytes(message[8:12], "little") != initiation.index:
            self.drops["response not expected"] += 1
            return
        keys = noise.consume_response(self.key, self.remote, initiation, message)
        self._initiation = None
        if self.next is not None:
            self.previous, self.next = self.next, None
        else:
            self.previous = self.current
        self.current = self._session(keys, now)
        self.endpoint = source
        self._complete()
        if not self._flush(now):
            self._transport(b"", now)

    def _transport_received(self, message: bytes, source: Any, now: float, inbox: list[bytes]) -> None:
        _, index, _ = TRANSPORT_HEADER.unpack_from(message)
        session = next((s for s in (self.current, self.next, self.previous) if s and s.local_index == index), None)
        if session is None:
            self.drops["unknown index"] += 1
            return
        opened = session.open(message, len(message), None, now)
        if not opened.plain:
            self.drops["duplicate" if opened.repeated else "bad"] += 1
            return
        self.endpoint = source
        self._at.pop("silent", None)
        if session is self.next:
            self.previous, self.current, self.next = self.current, session, None
            self._complete()
            self._flush(now)
        plain = opened.plain[0]
        if not plain:
            return
        if "keepalive" in self._at:
            self._needs_another = True
        else:
            self._at["keepalive"] = now + KEEPALIVE_TIMEOUT
        try:
            inbox.append(trim(plain))
        except BadPacketError:
            self.foreign.append(plain)

    def _session(self, keys: noise.SessionKeys, now: float) -> Session:
        self.sessions_made += 1
        return Session(keys, self.sessions_made, now)

    def _complete(self) -> None:
        self._retries = 0
        self._at.pop("retransmit", None)

    def _flush(self, now: float) -> bool:
        staged, self._staged = self._staged, []
        for packet in staged:
            self._transport(packet, now)
        return bool(staged)
