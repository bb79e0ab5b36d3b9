"""Micro-benchmarks: what sealing, opening, dropping a duplicate, splitting and coalescing cost, one packet or many.

Packets of 1420 bytes of one TCP flow, in super-packets of 45 as the kernel makes them of a bulk transfer, and alone.
Each figure is the best of `ROUNDS` rounds: what disturbs a round only ever makes it slower.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mptunnel import packet
from mptunnel.noise import SessionKeys
from mptunnel.session import WINDOW, Session, sealed_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


LENGTH: Final = 1420  # of a packet
RUN: Final = 45  # packets of a super-packet
ROUNDS: Final = 5

_BATCHES: Final = 24  # of RUN packets in a round
_HEAD: Final = 52  # IPv4, TCP with timestamps
_SUM_OFFSET: Final = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation costs a packet, in us, where `count` packets come together."""

    name: str
    count: int
    microseconds: float

    @property
    def gbit(self) -> float:
        """Gbit/s of packets if nothing else had to be done."""
        return LENGTH * 8 / self.microseconds / 1e3


def measure() -> list[Cost]:
    """Return the cost of each operation, by the super-packet and one at a time."""
    return [cost for count in (RUN, 1) for cost in _measure(count)]


def super_packet(count: int) -> bytes:
    """Return a frame as the device gives it: `count` packets of one TCP flow, the checksum partial."""
    size = LENGTH - _HEAD
    length = _HEAD + count * size
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 7, 0x4000, 64, packet.TCP, 0, b"\x0a\0\1\2", b"\xcb\0\x71\2")
    tcp = struct.pack(">HHIIBBHHH12x", 40000, 80, 1, 1, 0x80, 0x10, 0xFFFF, 0, 0)
    head = packet.VNET.pack(packet.NEEDS_CSUM, packet.GSO_TCPV4, _HEAD, size, packet.IPV4_HEADER, _SUM_OFFSET)
    return head + ip + tcp + bytes(count * size)


def single_packet() -> bytes:
    """Return a frame of one such packet."""
    head = packet.VNET.pack(packet.NEEDS_CSUM, packet.GSO_NONE, 0, 0, packet.IPV4_HEADER, _SUM_OFFSET)
    return head + packet.split(super_packet(2), takes_partial=True)[0]


def _measure(count: int) -> list[Cost]:
    frame = super_packet(count) if count > 1 else single_packet()
    pieces = packet.split(frame, takes_partial=True)
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, spent in _round(frame, pieces, count, _BATCHES * RUN // count):
            best[name] = min(best.get(name, spent), spent)
    return [Cost(name, count, spent * 1e6) for name, spent in best.items()]


def _round(frame: bytes, pieces: list[bytes], count: int, batches: int) -> Iterator[tuple[str, float]]:
    """Yield each operation's name and the seconds that it took a packet."""
    sender, receiver = _sessions()
    size, now = sealed_size(LENGTH, LENGTH), time.monotonic()
    runs: list[bytes] = []
    operations: dict[str, Callable[[], object]] = {
        "seal": lambda: runs.extend(sender.seal_run(pieces, LENGTH) for _ in range(batches)),
        "open": lambda: [receiver.open(run, size, 0, now) for run in runs],
        "duplicate": lambda: [receiver.open(run, size, 1, now) for run in runs],
        "split": lambda: [packet.split(frame, takes_partial=True) for _ in range(batches)],
        "coalesce": lambda: [packet.coalesce(pieces, takes_udp=True) for _ in range(batches)],
    }
    for name, operation in operations.items():
        begin = time.perf_counter()
        operation()
        yield name, (time.perf_counter() - begin) / (batches * count)
    sender.close()
    receiver.close()


def _sessions() -> tuple[Session, Session]:
    """Return both ends of one handshake's keys."""
    up, down = os.urandom(32), os.urandom(32)
    now = time.monotonic()
    sender = Session(SessionKeys(up, down, 1, 2, is_initiator=True), 0, now, WINDOW)
    receiver = Session(SessionKeys(down, up, 2, 1, is_initiator=False), 0, now, WINDOW)
    return sender, receiver
