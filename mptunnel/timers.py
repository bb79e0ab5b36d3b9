"""Deadlines of one peer, WireGuard's and ours. Callers say what has just happened; only this file knows durations.

WireGuard's (paper, 6; reference implementation):

* RETRANSMIT: 5 s and up to 333 ms after an initiation; stopped by its response. A server that calls a stock peer gives
  it up after 90 s, a client never does.
* KEEPALIVE: 10 s after data came in, unless we send something before; then an empty datagram is sent.
* NEW_HANDSHAKE: 15 s after data went out, unless anything comes in before; then the peer is silent, and a handshake
  is started.
* ZERO_KEYS: 540 s after the last session was made; then all keys are forgotten.
* PERSISTENT: as configured, after anything authentic in either direction; then an empty datagram is sent.

Ours, on a client towards a server that speaks our control messages:

* REPEAT: 250 ms after an initiation while packets wait; the same bytes again on every path.
* HELLO: 500 ms after a HELLO until it is answered.
* ENROL: 500 ms after an ENROL until it is answered.

Ours, on a server:

* ROUTE: when the host is told of a client's tunnel MTU, at most once a second.
* SETTLE (both roles): when the receipts may count what was sent two seconds ago.
* RECEIPT (both roles): a second after a RECEIPT, if something has been settled since; else it is repeated three times.

When a path's next probe or unasked ECHO is due the path itself knows.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from mptunnel.session import KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_TIMEOUT

if TYPE_CHECKING:
    import random

INF: Final = float("inf")
JITTER: Final = 0.333
REKEY_ATTEMPT_TIME: Final = 90.0
MAX_ATTEMPTS: Final = 20  # initiations, then it is given up (reference implementation: the first and 19 retries)
REPEAT_INTERVAL: Final = 0.25
HELLO_INTERVAL: Final = 0.5
ENROL_INTERVAL: Final = 0.5
PATIENT_INTERVAL: Final = 25.0


class Timer(enum.IntEnum):  # whose hash is a number's: it is looked up for every packet
    """What is due."""

    RETRANSMIT = enum.auto()
    KEEPALIVE = enum.auto()
    NEW_HANDSHAKE = enum.auto()
    ZERO_KEYS = enum.auto()
    PERSISTENT = enum.auto()
    REPEAT = enum.auto()
    HELLO = enum.auto()
    ENROL = enum.auto()
    SETTLE = enum.auto()
    ROUTE = enum.auto()
    RECEIPT = enum.auto()


class PeerTimers:
    """Deadlines of one peer. Call the method that names what has just happened."""

    __slots__ = ("_at", "_jitter", "_needs_another_keepalive", "_rng", "persistent")

    def __init__(self, rng: random.Random) -> None:
        self._at: dict[Timer, float] = {}
        self._jitter = rng.uniform(0, JITTER)  # of the next handshake; another one for each
        self._needs_another_keepalive = False
        self._rng = rng
        self.persistent = 0.0  # seconds; 0: off

    def next_deadline(self) -> float:
        """When something is due next; infinity if nothing is."""
        return min(self._at.values()) if self._at else INF

    def expired(self, now: float) -> list[Timer]:
        """Take out what is due at `now`, in the order it became due."""
        due = sorted((at, timer.value, timer) for timer, at in self._at.items() if at <= now)
        for _, _, timer in due:
            del self._at[timer]
        return [timer for _, _, timer in due]

    def is_armed(self, timer: Timer) -> bool:
        """Whether `timer` runs."""
        return timer in self._at

    def at(self, timer: Timer, when: float) -> None:
        """Let `timer` expire at `when`; infinity stops it."""
        if when == INF:
            self._at.pop(timer, None)
        else:
            self._at[timer] = when

    def at_the_latest(self, timer: Timer, when: float) -> None:
        """Let `timer` expire at `when`, or when it would have done before that."""
        if when < self._at.get(timer, INF):
            self._at[timer] = when

    def stop(self, timer: Timer) -> None:
        """Stop `timer`."""
        self._at.pop(timer, None)

    # -- what has happened -----------------------------------------------------------------------------

    def initiation_sent(self, now: float, patience: float = 0.0) -> None:
        """Expect the response in `patience` seconds, 5 by default."""
        self._jitter = self._rng.uniform(0, JITTER)
        self._at[Timer.RETRANSMIT] = now + (patience or REKEY_TIMEOUT) + self._jitter

    def keys_derived(self, now: float) -> None:
        """There are new keys, which the initiator has still to confirm: until then a call of ours is repeated."""
        self._at[Timer.ZERO_KEYS] = now + 3 * REJECT_AFTER_TIME

    def handshake_confirmed(self) -> None:
        """Both sides have the new keys."""
        self._at.pop(Timer.RETRANSMIT, None)
        self._at.pop(Timer.REPEAT, None)

    def handshake_done(self, now: float) -> None:
        """Our initiation was answered: there are new keys, and both sides have them."""
        self.keys_derived(now)
        self.handshake_confirmed()

    def handshake_given_up(self, now: float) -> None:
        """The peer did not answer for 90 s."""
        self._at.pop(Timer.KEEPALIVE, None)
        self._at.setdefault(Timer.ZERO_KEYS, now + 3 * REJECT_AFTER_TIME)

    def data_sent(self, now: float) -> None:
        """An IP packet went out: something must come in within 15 s."""
        if Timer.NEW_HANDSHAKE not in self._at:
            self._at[Timer.NEW_HANDSHAKE] = now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self._jitter

    def data_received(self, now: float) -> None:
        """An IP packet came in: something must go out within 10 s."""
        if Timer.KEEPALIVE in self._at:
            self._needs_another_keepalive = True
        else:
            self._at[Timer.KEEPALIVE] = now + KEEPALIVE_TIMEOUT

    def anything_sent(self, now: float) -> None:
        """An authenticated datagram went out."""
        self._at.pop(Timer.KEEPALIVE, None)
        if self.persistent:
            self._at[Timer.PERSISTENT] = now + self.persistent

    def anything_received(self, now: float) -> None:
        """An authentic datagram came in."""
        self._at.pop(Timer.NEW_HANDSHAKE, None)
        if self.persistent:
            self._at[Timer.PERSISTENT] = now + self.persistent

    def packet_sent(self, now: float) -> float:
        """A single IP packet went out, in a datagram of its own; return when something must have come in."""
        self.anything_sent(now)
        self.data_sent(now)
        return self._at[Timer.NEW_HANDSHAKE]

    def packet_received(self, now: float) -> float:
        """A single IP packet came in; return when it must be answered."""
        self.anything_received(now)
        self.data_received(now)
        return self._at[Timer.KEEPALIVE]

    def keepalive_sent(self, now: float) -> None:
        """The passive keepalive went out; data came in meanwhile too, so another may be owed."""
        if self._needs_another_keepalive:
            self._needs_another_keepalive = False
            self._at[Timer.KEEPALIVE] = now + KEEPALIVE_TIMEOUT

    def keys_zeroed(self) -> None:
        """There is nobody to talk to any more."""
        for timer in (Timer.KEEPALIVE, Timer.NEW_HANDSHAKE, Timer.PERSISTENT, Timer.HELLO):
            self._at.pop(timer, None)
