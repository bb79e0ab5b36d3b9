"""Transport keys in use: the counter that is never used twice, and the window that lets nothing in twice.

`ReplayWindow` is also the duplicate filter of the tunnel. It keeps two bytes for each of the last 2^17 counters: who
delivered it first, and a bit for each path that delivered it at all. The first says whether a copy may be dropped
before it is decrypted; the second is what the receipts are made of. The check only reads; a counter is marked after
its tag has been verified (RFC 6479). Consecutive counters, which is how a run of datagrams comes in, are looked up and
marked by slices: a run of duplicates costs little more than one.

A `Session` seals a packet once; the same bytes then go out on every path. A counter is spent even if nothing could
be sent with it.
"""

from __future__ import annotations

import enum
import mmap
import struct
from functools import lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Final

from librt.strings import BytesWriter, read_i64_le, write_i64_le

from mptunnel.aead import CIPHER, NO_DATA
from mptunnel.burst import BURST, LEAST, TOP
from mptunnel.messages import HEADER_SIZE, OVERHEAD, PADDING, TAG_SIZE, TRANSPORT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mypy_extensions import i64

    from mptunnel.noise import SessionKeys

WINDOW: Final = 1 << 17
NARROW_WINDOW: Final = 1 << 13  # for a peer that sends one copy only
REKEY_AFTER_MESSAGES: Final = 1 << 60
REJECT_AFTER_MESSAGES: Final = (1 << 64) - (1 << 13) - 1
REKEY_AFTER_TIME: Final = 120.0
REJECT_AFTER_TIME: Final = 180.0
KEEPALIVE_TIMEOUT: Final = 10.0
REKEY_TIMEOUT: Final = 5.0
MAX_SEGMENTS: Final = 64  # what one UDP_SEGMENT call takes on every kernel (linux/udp.h)
MAX_RUN: Final = 65507  # bytes of one IPv4 UDP payload
CONTROL: Final = 1  # in the window: delivered, and sealed for one path only
NO_PATH: Final = 2  # delivered, but by no path that is bound
FIRST_PATH: Final = 3  # delivered first by path 0, and so on

_LOOK_AHEAD: Final = 4 * 64  # packets of one size that are cut into runs together
_MASK: Final = WINDOW - 1
_START: Final = struct.Struct("<II")  # of a datagram: type and reserved zeros, index
_SIGN: Final = 1 << 63  # a counter from here on is written as the negative number that has the same bits
_ZEROS: Final = bytes(PADDING)
_run: Final = BytesWriter()  # that is being sealed; one for all, since it keeps the size that it has grown to
_nonce: Final = CIPHER.nonce
_nonces: Final = CIPHER.nonces
_Forged: Final = CIPHER.Forged


class Refused(enum.IntEnum):
    """Why a datagram that came alone brought nothing."""

    REPEATED = enum.auto()  # another path, or this one, has delivered it
    CREDITED = enum.auto()  # another path has delivered it, and it is news that this one did too
    LATE = enum.auto()  # it is below the window, so nobody knows
    BAD = enum.auto()  # it is not authentic
    EXPIRED = enum.auto()  # its key is too old


class ReplayWindow:
    """The last 2^17 counters: which of them came in, by which path first, by which paths at all."""

    __slots__ = ("_first", "_paths", "top", "width")

    def __init__(self, width: int = NARROW_WINDOW) -> None:
        self._first = mmap.mmap(-1, WINDOW)  # untouched pages cost nothing, so it is full size at once
        self._paths = mmap.mmap(-1, WINDOW)
        self.top = -1
        self.width = width

    def refuses(self, counter: int, path: int | None) -> Refused | None:
        """Return why a counter up to `top` is not wanted, None if it is; a seen one is credited to the path, once."""
        if counter <= self.top - self.width:
            return Refused.LATE
        at = counter & _MASK
        if not self._first[at]:
            return None
        if path is None or self._paths[at] >> path & 1:
            return Refused.REPEATED
        self._paths[at] |= 1 << path
        return Refused.CREDITED

    def mark(self, counter: int, path: int | None = None) -> None:
        """Remember an authenticated counter, and the path that brought it first."""
        if counter > self.top:
            if counter > self.top + 1:
                self._forget(self.top + 1, counter - 1)
            self.top = counter
        at = counter & _MASK
        self._first[at] = NO_PATH if path is None else FIRST_PATH + path
        self._paths[at] = 0 if path is None else 1 << path

    def mark_run(self, first: int, count: int, path: int | None = None) -> None:
        """Mark `count` consecutive authenticated counters at once; all of them are fresh."""
        last = first + count - 1
        if last > self.top:
            if first > self.top + 1:
                self._forget(self.top + 1, first - 1)
            self.top = last
        who = bytes((NO_PATH if path is None else FIRST_PATH + path,)) * count
        bit = bytes((0 if path is None else 1 << path,)) * count
        at = 0
        for low, high in _spans(first, count):
            self._first[low:high] = who[at : at + high - low]
            self._paths[low:high] = bit[at : at + high - low]
            at += high - low

    def seen_run(self, first: int, count: int) -> bool:
        """Whether all of `count` consecutive counters have come in already and are within the window."""
        if first + count - 1 > self.top or first <= self.top - self.width:
            return False
        return all(self._first.find(b"\0", low, high) < 0 for low, high in _spans(first, count))

    def credit_run(self, first: int, count: int, path: int) -> int:
        """Note that `path` delivered these seen counters too; return for how many of them that is news."""
        news = 0
        for low, high in _spans(first, count):
            before = int.from_bytes(self._paths[low:high], "little")
            bits = int.from_bytes(bytes((1 << path,)) * (high - low), "little")
            news += (bits & ~before).bit_count()
            self._paths[low:high] = (before | bits).to_bytes(high - low, "little")
        return news

    def mark_control(self, counter: int) -> None:
        """Note that a marked counter was a control message: no other path was given a copy of it."""
        self._first[counter & _MASK] = CONTROL

    def deliveries(self, first: int, last: int) -> tuple[bytes, bytes]:
        """Return, for counters `first` to `last` inclusive, who was first (0: nobody) and the bits of all paths."""
        spans = _spans(first, last - first + 1)
        return (
            b"".join(self._first[low:high] for low, high in spans),
            b"".join(self._paths[low:high] for low, high in spans),
        )

    def close(self) -> None:
        """Give the memory back."""
        self._first.close()
        self._paths.close()

    def _forget(self, first: int, last: int) -> None:
        first = max(first, last - _MASK)
        for low, high in _spans(first, last - first + 1):
            self._first[low:high] = bytes(high - low)
            self._paths[low:high] = bytes(high - low)


class Opened:
    """What came of a run of datagrams: the plaintexts, and how many were new, repeated or not authentic.

    `counters` are those of `plain`, in the same order; `low` and `high` are the first and the last that is credited.
    """

    __slots__ = ("bad", "counters", "credited", "expired", "high", "late", "low", "plain", "repeated")

    def __init__(self) -> None:
        self.plain: list[bytes] = []
        self.counters: Sequence[int] = ()
        self.repeated = 0
        self.credited = 0  # of the repeated ones: news for the path they came by
        self.low = self.high = 0
        self.bad = 0
        self.late = 0
        self.expired = 0


class Session:
    """The keys of one handshake; `serial` orders the sessions of a peer."""

    __slots__ = (
        "_keys", "_open", "_seal", "_start", "counter", "created_at", "is_initiator", "local_index", "remote_index",
        "serial", "settled", "window",
    )  # fmt: skip

    def __init__(self, keys: SessionKeys, serial: int, now: float, width: int = NARROW_WINDOW) -> None:
        self._seal = CIPHER(keys.send).encrypt
        self._open = CIPHER(keys.receive).decrypt
        self._keys = keys
        self.local_index = keys.local_index
        self.remote_index = keys.remote_index
        self._start = _START.pack(TRANSPORT, keys.remote_index)  # of every datagram
        self.is_initiator = keys.is_initiator
        self.created_at = now
        self.serial = serial
        self.counter = 0
        self.settled = -1  # receipts: counters up to here have been accounted for
        self.window = ReplayWindow(width)

    def is_alive(self, now: float) -> bool:
        """Whether these keys may still be used (paper, 6.2)."""
        return now - self.created_at < REJECT_AFTER_TIME and self.counter < REJECT_AFTER_MESSAGES

    def wants_successor(self, now: float) -> bool:
        """Whether whoever sends under these keys should start a handshake: only the initiator does so by age."""
        return self.counter > REKEY_AFTER_MESSAGES or (self.is_initiator and now - self.created_at > REKEY_AFTER_TIME)

    def is_near_its_end(self, now: float) -> bool:
        """Whether an initiator that only receives should start a handshake too (165 s; once a session)."""
        return self.is_initiator and now - self.created_at > REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT

    def seal(self, packet: bytes, limit: int = 0) -> bytes:
        """Seal one packet into a datagram of its own. Padding goes to a multiple of 16, but not beyond `limit`."""
        counter, datagram = self.counter, _run
        self.counter = counter + 1
        if lacking := _lacking(len(packet), limit):
            packet += _ZEROS[:lacking]
        datagram.truncate(0)
        self._write_header(datagram, counter)
        datagram.write(self._seal(_nonce(counter), packet, NO_DATA))
        return datagram.getvalue()

    def seal_run(self, packets: list[bytes], limit: int) -> bytes:
        """Seal packets into datagrams, one behind the other; every path gets these same bytes.

        They are padded like that of `seal`.
        """
        counter = self.counter
        if len(packets) >= LEAST and BURST is not None and counter <= TOP:
            size = sealed_size(len(packets[0]), limit)
            unsealed = self._unsealed(packets, size, limit)
            together = BURST.seal(self._keys.send, unsealed, size, counter) if unsealed else None
            if together is not None:
                self.counter = counter + len(packets)
                return together
        plain = _padded(packets, limit)
        self.counter = counter + len(plain)
        nonces = _nonces(range(counter, self.counter))
        run = _run
        run.truncate(0)
        for sealed in map(self._seal, nonces, plain, repeat(NO_DATA)):  # each is copied while it is in the cache
            self._write_header(run, counter)
            run.write(sealed)
            counter += 1
        return run.getvalue()

    def _write_header(self, datagrams: BytesWriter, counter: int) -> None:
        datagrams.write(self._start)
        write_i64_le(datagrams, counter if counter < _SIGN else counter - 2 * _SIGN)

    def _unsealed(self, packets: list[bytes], size: int, limit: int) -> bytes:
        """Return what `seal_run` returns, but for sealing it; nothing if not all of them have this size then."""
        run, counter = _run, self.counter
        left, length = len(packets), -1
        tail = b""
        run.truncate(0)
        for packet in packets:
            left -= 1
            if len(packet) != length:
                length = len(packet)
                now = sealed_size(length, limit)
                if now > size or (now < size and left):
                    return b""
                tail = bytes(now - OVERHEAD - length + TAG_SIZE)
            self._write_header(run, counter)
            run.write(packet)
            run.write(tail)
            counter += 1
        return run.getvalue()

    def open(self, run: bytes, size: int, path: int | None, now: float) -> Opened:
        """Open a run of type 4 datagrams of `size` bytes each (the last may be shorter) that bear our index.

        A copy of what has come in already is dropped for the price of looking at its counter. `path` is the bound
        path they came by, None if there is none; it is credited with every counter once.
        """
        opened = Opened()
        count = -(-len(run) // size)
        if not self.is_alive(now):
            opened.expired = count
            return opened
        first = _first_of_consecutive(run, size) if count > 1 else -1
        if first >= 0 and self.window.seen_run(first, count):
            opened.repeated = count
            if path is not None:
                opened.credited = self.window.credit_run(first, count, path)
                opened.low, opened.high = first, first + count - 1
        elif first > self.window.top:
            self._open_fresh_run(run, size, first, count, path, opened)
        else:
            self._open_singly(run, size, path, opened)
        return opened

    def open_one(self, datagram: bytes, counter: int, path: int | None, now: float) -> bytes | Refused:
        """Open a type 4 datagram that came alone, under this counter: what `open` does, the short way."""
        if now - self.created_at >= REJECT_AFTER_TIME or self.counter >= REJECT_AFTER_MESSAGES:
            return Refused.EXPIRED
        window = self.window
        if counter <= window.top and (refused := window.refuses(counter, path)) is not None:
            return refused
        try:
            plain = self._open(_nonce(counter), datagram[HEADER_SIZE:], NO_DATA)
        except _Forged:
            return Refused.BAD
        if counter >= REJECT_AFTER_MESSAGES:
            return Refused.BAD
        window.mark(counter, path)
        return plain

    def close(self) -> None:
        """Forget everything; the keys go with the object."""
        self.window.close()
        if BURST is not None:
            BURST.forget()

    def _open_fresh_run(self, run: bytes, size: int, first: int, count: int, path: int | None, opened: Opened) -> None:
        counters, opens, plain, at = range(first, first + count), self._open, opened.plain, 0
        if BURST is not None:
            together = BURST.open(self._keys.receive, run, size, first)
            if together is not None:
                opened.plain = _pieces(together, size - OVERHEAD, count)
                opened.counters = counters
                self.window.mark_run(first, count, path)
                return
        try:
            for nonce in _nonces(counters):
                plain.append(opens(nonce, run[at + HEADER_SIZE : at + size], NO_DATA))
                at += size
        except _Forged:  # one of them is not authentic: find out which
            opened.plain = []
            self._open_singly(run, size, path, opened)
            return
        opened.counters = counters
        self.window.mark_run(first, count, path)

    def _open_singly(self, run: bytes, size: int, path: int | None, opened: Opened) -> None:
        window, fresh = self.window, []
        for number, counter in enumerate(read_counters(run, size)):
            refused = window.refuses(counter, path) if counter <= window.top else None
            if refused is not None:
                if refused is Refused.LATE:
                    opened.late += 1
                    continue
                opened.repeated += 1
                if refused is Refused.CREDITED:
                    opened.low = min(opened.low, counter) if opened.credited else counter
                    opened.high = max(opened.high, counter)
                    opened.credited += 1
                continue
            at = number * size
            try:
                plain = self._open(_nonce(counter), run[at + HEADER_SIZE : at + size], NO_DATA)
            except _Forged:
                opened.bad += 1
                continue
            if counter >= REJECT_AFTER_MESSAGES:
                opened.bad += 1
                continue
            window.mark(counter, path)
            opened.plain.append(plain)
            fresh.append(counter)
        opened.counters = fresh


def sealed_size(length: int, limit: int) -> int:
    """Return the bytes that a packet of `length` takes on the wire, padded but not beyond `limit`."""
    return length + _lacking(length, limit) + OVERHEAD


def runs(packets: list[bytes], limit: int) -> Iterable[tuple[list[bytes], int]]:
    """Return the packets in runs that one call can send, each with the size of its datagrams.

    All of a run are sealed to one size, but for the last one, which may be shorter. `limit` is that of `seal`.
    """
    count = len(packets)
    if not count or not _are_even(packets):
        return _runs(packets, [*map(len, packets)], limit)
    size = sealed_size(len(packets[0]), limit)  # as a rule they are the pieces of one frame
    each = _per_call(count, size)
    if each == count:
        return [(packets, size)]
    return [(packets[at : at + each], size) for at in range(0, count, each)]


def _runs(packets: list[bytes], lengths: list[int], limit: int) -> Iterator[tuple[list[bytes], int]]:
    sealed = {length: sealed_size(length, limit) for length in set(lengths)}
    sizes = [*map(sealed.__getitem__, lengths)]
    at = 0
    while at < len(packets):
        size = sizes[at]
        ahead = sizes[at : at + _LOOK_AHEAD]
        alike = len(ahead)
        if ahead.count(size) < alike:
            alike = next(number for number, other in enumerate(ahead) if other != size)
        count = _per_call(alike, size)
        if count == alike < min(len(ahead), MAX_SEGMENTS) and ahead[count] < size <= MAX_RUN // (count + 1):
            count += 1
        yield packets[at : at + count], size
        at += count


def _per_call(count: int, size: int) -> int:
    """Return how many of `count` datagrams of one size go with a call: about as many with each, not all and a rest."""
    calls = -(-count // max(1, min(MAX_SEGMENTS, MAX_RUN // size)))
    return -(-count // calls)


def read_header(datagram: bytes) -> tuple[int, int, int]:
    """Return type (with the reserved zeros), index and counter of a datagram of at least 16 bytes, as type 4 has them.

    (paper, 5.4.6)
    """
    word = read_i64_le(datagram, 0)
    counter: int = read_i64_le(datagram, 8)
    return word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF, counter if counter >= 0 else counter + 2 * _SIGN


def read_counters(datagrams: bytes, size: int) -> tuple[int, ...]:
    """Return the counters of a run of type 4 datagrams of `size` bytes each, the last perhaps shorter."""
    length = len(datagrams)
    if length <= size:
        return (read_header(datagrams)[2],)
    return _counters(size, -(-length // size)).unpack_from(datagrams)


def same_headers(datagrams: bytes, size: i64) -> list[bytes]:
    """Return runs of consecutive datagrams that have the same type and index; as a rule that is all of them at once.

    All of them are `size` bytes long, at least 8, but for the last one, which is a run of its own if it is below that.
    """
    found = []
    start: i64 = 0
    at, end = size, len(datagrams) - 8
    while at < len(datagrams):
        if at > end or read_i64_le(datagrams, at) != read_i64_le(datagrams, start):
            found.append(datagrams[start:at])
            start = at
        at += size
    found.append(datagrams[start:] if start else datagrams)
    return found


@lru_cache(maxsize=1024)
def _counters(size: int, count: int) -> struct.Struct:
    return struct.Struct("<" + f"8xQ{size - HEADER_SIZE}x" * (count - 1) + "8xQ")


def _first_of_consecutive(run: bytes, size: i64) -> i64:
    """Return the first counter of a run if they count on, from one datagram to the next; else -1."""
    first = expected = read_i64_le(run, 8)
    at = 8 + size
    while at < len(run):
        expected += 1
        if read_i64_le(run, at) != expected:
            return -1
        at += size
    return first if 0 <= first < REKEY_AFTER_MESSAGES else -1  # what is beyond is looked at one by one


def _spans(first: int, count: int) -> list[tuple[int, int]]:
    """Return the one or two slices of the ring that hold `count` consecutive counters."""
    low = first & _MASK
    high = low + count
    return [(low, high)] if high <= WINDOW else [(low, WINDOW), (0, high - WINDOW)]


def _lacking(length: int, limit: int) -> int:
    """Return how many zeros a packet of `length` bytes is padded by."""
    lacking = -length % PADDING
    return max(0, limit - length) if length + lacking > limit > 0 else lacking


def _padded(packets: list[bytes], limit: int) -> list[bytes]:
    length: i64 = -1
    lacking, padded = 0, []
    for packet in packets:
        if len(packet) != length:
            length = len(packet)
            lacking = _lacking(length, limit)
        padded.append(packet + _ZEROS[:lacking] if lacking else packet)
    return padded


def _pieces(together: bytes, size: i64, count: i64) -> list[bytes]:
    pieces = []
    at: i64 = 0
    for _ in range(count):
        pieces.append(together[at : at + size])
        at += size
    return pieces


def _are_even(packets: list[bytes]) -> bool:
    length = len(packets[0])
    for packet in packets:  # noqa: SIM110  a comprehension is a call a packet when it is compiled
        if len(packet) != length:
            return False
    return True


assert TAG_SIZE == OVERHEAD - HEADER_SIZE  # noqa: S101
