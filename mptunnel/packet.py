"""IP packets as a TUN device passes them: what of a header a tunnel must read, super-packets, answers of our own.

With IFF_VNET_HDR a TUN device passes frames: a `virtio_net_hdr` and behind it a packet that may hold up to 64 KB of one
TCP or UDP flow, its checksum left to whoever sends it on. `split` makes of a frame the packets that it stands for, as
the kernel's own segmentation would: lengths, IPv4 identification and checksum, TCP sequence numbers; FIN and PSH on
the last, CWR on the first only. `coalesce` makes frames of packets, and only where `split` would give the very same
packets back: same flow, consecutive, same flags, no byte of the headers but those differing.

**Partial checksums** (`NEEDS_CSUM`). The TCP or UDP checksum field holds the sum of addresses, protocol and length
(the pseudo-header), not complemented, and the kernel adds the rest where a packet leaves by a real device.
Between two peers that both offer it a packet travels so: the seal protects its bytes better than the sum would. It is
known by its value, which costs no flag. Towards any other peer the sum is completed here.

Sources: linux/virtio_net.h; Documentation/networking/segmentation-offloads.rst; RFC 793, 768, 1071, 6864.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Final

from mptunnel.errors import BadPacketError

if TYPE_CHECKING:
    from collections.abc import Sequence

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
MIN_MTU: Final = 1280  # what IPv6 asks of every link (RFC 8200, 5)
MAX_PACKET: Final = 65535

_ICMPV6 = 58
_UNREACHABLE = 1
_NO_ROUTE = 0
_PSEUDO = struct.Struct(">16s16sII")
VNET: Final = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset (native order)
VNET_SIZE: Final = VNET.size
PLAIN: Final = bytes(VNET_SIZE)
NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
MAX_SEGMENTS: Final = 64
MAX_LENGTH: Final = 65535

TCP: Final = 6
UDP: Final = 17
_FIN, _SYN, _RST, _PSH, _URG, _CWR = 0x01, 0x02, 0x04, 0x08, 0x20, 0x80
_TCP_CHECK = 16
_UDP_CHECK = 6
_UDP_HEADER = 8
_TCP_HEADER = 20
_ENDS = _FIN | _PSH
_NEVER = _SYN | _RST | _URG | _CWR  # a packet with one of these stands alone

Buffer = bytes | bytearray | memoryview
Frame = list[Buffer]  # what one writev() gives the device: header, packet


def trim(plain: Buffer) -> Buffer:
    """Return the IP packet at the start of `plain`, without the padding behind it.

    Raises BadPacketError if there is no whole IPv4 or IPv6 packet (RFC 791, 3.1; RFC 8200, 3).
    """
    version = plain[0] >> 4 if plain else 0
    if version == 4 and len(plain) >= IPV4_HEADER:
        length = plain[2] << 8 | plain[3]
        least = (plain[0] & 15) * 4
    elif version == 6 and len(plain) >= IPV6_HEADER:
        length = (plain[4] << 8 | plain[5]) + IPV6_HEADER
        least = IPV6_HEADER
    else:
        raise BadPacketError(f"no IP packet in {len(plain)} bytes")
    if least < IPV4_HEADER or not least <= length <= len(plain):
        raise BadPacketError(f"IP packet of {length} bytes in {len(plain)}")
    return plain if length == len(plain) else plain[:length]


def source(packet: Buffer) -> bytes:
    """Return the packed source address of a packet that `trim` let through."""
    return bytes(packet[12:16] if packet[0] >> 4 == 4 else packet[8:24])


def destination(packet: Buffer) -> bytes:
    """Return the packed destination address of a packet that `trim` let through."""
    return bytes(packet[16:20] if packet[0] >> 4 == 4 else packet[24:40])


def no_route6(packet: Buffer, own: IPv6Address) -> bytes | None:
    """Return the ICMPv6 'no route to destination' from `own` that answers `packet` (RFC 4443, 3.1).

    None where none may be sent: for ICMPv6 errors, multicast and packets without a proper source.
    """
    sender, receiver = IPv6Address(source(packet)), IPv6Address(destination(packet))
    is_error = packet[6] == _ICMPV6 and len(packet) > IPV6_HEADER and packet[IPV6_HEADER] < 128
    if is_error or receiver.is_multicast or sender.is_multicast or sender.is_unspecified:
        return None
    quoted = bytes(packet[: MIN_MTU - IPV6_HEADER - 8])
    body = struct.pack(">BBHI", _UNREACHABLE, _NO_ROUTE, 0, 0) + quoted
    check = checksum(_PSEUDO.pack(own.packed, sender.packed, len(body), _ICMPV6) + body)
    header = struct.pack(">IHBB16s16s", 6 << 28, len(body), _ICMPV6, 64, own.packed, sender.packed)
    return header + body[:2] + check.to_bytes(2, "big") + body[4:]


# -- splitting -------------------------------------------------------------------------------------------


def split(frame: memoryview, *, takes_partial: bool) -> list[Buffer]:
    """Return the packets that a frame stands for; one that needs no work is a view of it.

    `takes_partial`: the receiver knows partial checksums. Raises BadPacketError for a frame that makes no sense.
    """
    flags, kind, _, size, start, offset = VNET.unpack_from(frame)
    packet = frame[VNET_SIZE:]
    if kind == GSO_NONE:
        if flags & NEEDS_CSUM and not takes_partial:
            return [_completed(packet, start, offset)]
        return [packet]
    kind &= ~GSO_ECN
    if kind not in {GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4} or not size or len(packet) < start + _UDP_HEADER:
        raise BadPacketError(f"super-packet of kind {kind} with segments of {size} bytes")
    is_tcp = kind != GSO_UDP_L4
    if is_tcp and len(packet) < start + _TCP_HEADER:
        raise BadPacketError(f"super-packet of {len(packet)} bytes, its TCP header at {start}")
    body = start + ((packet[start + 12] >> 4) * 4 if is_tcp else _UDP_HEADER)
    count = -(-(len(packet) - body) // size)
    if count < 1 or body < start + _UDP_HEADER:
        raise BadPacketError(f"super-packet of {len(packet)} bytes without payload")
    pieces = _split_tcp(packet, start, body, size, count) if is_tcp else _split_udp(packet, start, body, size, count)
    if takes_partial:
        return pieces
    return [_completed(piece, start, _TCP_CHECK if is_tcp else _UDP_CHECK) for piece in pieces]


def _split_tcp(packet: memoryview, start: int, body: int, size: int, count: int) -> list[Buffer]:
    head = bytearray(packet[:body])
    flags, protocol = head[start + 13], TCP
    (sequence,) = _U32.unpack_from(head, start + 4)
    length = len(packet)
    last = body + (count - 1) * size
    full = body + size - start  # of a segment's TCP part
    pieces: list[Buffer] = []
    heads = _heads(head, start)
    _U16.pack_into(head, start + _TCP_CHECK, _pseudo_sum(head, protocol, full))
    for number, at in enumerate(range(body, length, size)):
        if number == 0:
            head[start + 13] = flags & ~_ENDS if count > 1 else flags
        elif number == 1:
            head[start + 13] = flags & ~(_ENDS | _CWR)
        if at == last:
            if number:
                head[start + 13] = flags & ~_CWR
            _U16.pack_into(head, start + _TCP_CHECK, _pseudo_sum(head, protocol, body - start + length - at))
            heads.resize(body + length - at)
        elif not number:
            heads.resize(body + size)
        heads.number(number)
        _U32.pack_into(head, start + 4, (sequence + number * size) & 0xFFFFFFFF)
        pieces.append(b"".join((head, packet[at : at + size])))
    return pieces


def _split_udp(packet: memoryview, start: int, body: int, size: int, count: int) -> list[Buffer]:
    head = bytearray(packet[:body])
    length = len(packet)
    last = body + (count - 1) * size
    pieces: list[Buffer] = []
    heads = _heads(head, start)
    for number, at in enumerate(range(body, length, size)):
        if not number or at == last:
            udp = _UDP_HEADER + min(size, length - at)
            _U16.pack_into(head, start + 4, udp)
            _U16.pack_into(head, start + _UDP_CHECK, _pseudo_sum(head, UDP, udp))
            heads.resize(start + udp)
        heads.number(number)
        pieces.append(b"".join((head, packet[at : at + size])))
    return pieces


class _HeadsIPv4:
    """Changes length, identification and checksum of an IPv4 header in place."""

    __slots__ = ("_base", "_first", "_head", "_ihl")

    def __init__(self, head: bytearray) -> None:
        self._head = head
        self._ihl = (head[0] & 15) * 4
        (self._first,) = _U16.unpack_from(head, 4)
        self._base = 0

    def resize(self, length: int) -> None:
        head = self._head
        _U16.pack_into(head, 2, length)
        head[4:6] = head[10:12] = b"\0\0"
        self._base = int.from_bytes(head[: self._ihl], "big") % 0xFFFF

    def number(self, number: int) -> None:
        ident = (self._first + number) & 0xFFFF
        head = self._head
        _U16.pack_into(head, 4, ident)
        _U16.pack_into(head, 10, 0xFFFF - ((self._base + ident) % 0xFFFF or 0xFFFF))


class _HeadsIPv6:
    """Changes the length of an IPv6 header in place."""

    __slots__ = ("_head",)

    def __init__(self, head: bytearray) -> None:
        self._head = head

    def resize(self, length: int) -> None:
        _U16.pack_into(self._head, 4, length - IPV6_HEADER)

    def number(self, number: int) -> None:
        """There is no identification."""


def _heads(head: bytearray, start: int) -> _HeadsIPv4 | _HeadsIPv6:
    version = head[0] >> 4
    if version == 4 and start >= IPV4_HEADER:
        return _HeadsIPv4(head)
    if version == 6 and start >= IPV6_HEADER:
        return _HeadsIPv6(head)
    raise BadPacketError(f"super-packet of IP version {version}")


def complete(packet: Buffer) -> Buffer:
    """Return the packet with a full checksum, if it has a partial one."""
    found = _transport(packet)
    if found is None:
        return packet
    protocol, start = found
    check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    if _U16.unpack_from(packet, check)[0] != _pseudo_sum(packet, protocol, len(packet) - start):
        return packet
    return _completed(packet, start, check - start)


def _completed(packet: Buffer, start: int, offset: int) -> bytes:
    """Add what the kernel left out: the sum from `start` to the end, the partial one in it included."""
    if len(packet) < start + offset + 2:
        raise BadPacketError(f"checksum at {start} + {offset} in {len(packet)} bytes")
    whole = bytearray(packet)
    _U16.pack_into(whole, start + offset, checksum(whole[start:]) or 0xFFFF)
    return bytes(whole)


# -- putting together ------------------------------------------------------------------------------------


def coalesce(packets: Sequence[Buffer], *, takes_udp: bool) -> list[tuple[Frame, int]]:
    """Return frames for the device, in order, each with the number of packets that it stands for.

    `takes_udp`: the kernel knows UDP super-packets (Linux 6.2).
    """
    frames: list[tuple[Frame, int]] = []
    at, end = 0, len(packets)
    while at < end:
        packet = packets[at]
        found = _transport(packet)
        if found is None:
            frames.append(([PLAIN, packet], 1))
            at += 1
            continue
        protocol, start = found
        count = 1
        if at + 1 < end and len(packets[at + 1]) <= len(packet) and (protocol == TCP or takes_udp):
            count = _run(packets, at, end, protocol, start)
        if count > 1:
            frames.append((_super(packets[at : at + count], protocol, start), count))
        else:
            frames.append(([_single_header(packet, protocol, start), packet], 1))
        at += count
    return frames


def single(packet: Buffer) -> Frame:
    """Return the frame of one packet."""
    found = _transport(packet)
    return [PLAIN if found is None else _single_header(packet, *found), packet]


def _single_header(packet: Buffer, protocol: int, start: int) -> bytes:
    offset = _TCP_CHECK if protocol == TCP else _UDP_CHECK
    (check,) = _U16.unpack_from(packet, start + offset)
    if check != _pseudo_sum(packet, protocol, len(packet) - start):
        return PLAIN
    return VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, start, offset)


def _transport(packet: Buffer) -> tuple[int, int] | None:
    """Return protocol and offset of a whole TCP or UDP header; None for anything else, fragments included."""
    if packet[0] >> 4 == 4:
        protocol, start = packet[9], (packet[0] & 15) * 4
        if packet[6] & 0x3F or packet[7]:
            return None  # a fragment
    else:
        protocol, start = packet[6], IPV6_HEADER
    least = _TCP_HEADER if protocol == TCP else _UDP_HEADER if protocol == UDP else MAX_LENGTH
    return (protocol, start) if len(packet) >= start + least else None


def _run(packets: Sequence[Buffer], at: int, end: int, protocol: int, start: int) -> int:
    """Return how many packets from `at` on are one super-packet."""
    first = packets[at]
    if protocol == TCP:
        body = start + (first[start + 12] >> 4) * 4
        if first[start + 13] & (_NEVER | _ENDS) or body < start + _TCP_HEADER:
            return 1
    else:
        body = start + _UDP_HEADER
        if _U16.unpack_from(first, start + 4)[0] != len(first) - start:
            return 1
    size = len(first) - body
    if size <= 0 or not _check_is_fine(first, protocol, start):
        return 1
    expected = _Successor(bytes(first[:body]), protocol, start, size)
    length, number = len(first), 1
    limit = min(end - at, MAX_SEGMENTS, (MAX_LENGTH - body) // size)
    while number < limit:
        packet = packets[at + number]
        ends = expected.is_followed_by(packet, number, length)
        if ends is None:
            break
        number += 1
        if ends:
            break
    return number


class _Successor:
    """Recognizes the packet that `split` would put behind the ones so far."""

    __slots__ = ("_body", "_head", "_is_full", "_protocol", "_size", "_start", "_tail", "_values")

    def __init__(self, head: bytes, protocol: int, start: int, size: int) -> None:
        self._head = bytearray(head)
        self._protocol = protocol
        self._start = start
        self._body = len(head)
        self._size = size
        check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
        pseudo = _pseudo_sum(head, protocol, len(head) + size - start)
        self._is_full = _U16.unpack_from(head, check)[0] != pseudo
        self._values = _heads(self._head, start)
        self._values.resize(len(head) + size)
        self._tail = _U32.unpack_from(head, start + 4)[0] if protocol == TCP else 0

    def is_followed_by(self, packet: Buffer, number: int, length: int) -> bool | None:
        """Whether `packet` comes next and is the last one; None if it does not come next."""
        head, start, body = self._head, self._start, self._body
        is_short = len(packet) != length
        if len(packet) > length or len(packet) <= body:
            return None
        if is_short:
            self._values.resize(len(packet))
        self._values.number(number)
        is_last = is_short
        if self._protocol == TCP:
            _U32.pack_into(head, start + 4, (self._tail + number * self._size) & 0xFFFFFFFF)
            flags = packet[start + 13]
            if flags & _ENDS:
                is_last = True
                before, head[start + 13] = head[start + 13], flags
                if flags & ~_ENDS != before:
                    return None
            check = start + _TCP_CHECK
        else:
            _U16.pack_into(head, start + 4, len(packet) - start)
            check = start + _UDP_CHECK
        if self._is_full:
            head[check : check + 2] = packet[check : check + 2]
        elif is_short:
            _U16.pack_into(head, check, _pseudo_sum(head, self._protocol, len(packet) - start))
        if bytes(packet[:body]) != head:
            return None
        if self._is_full and not _check_is_fine(packet, self._protocol, start):
            return None
        return is_last


def _check_is_fine(packet: Buffer, protocol: int, start: int) -> bool:
    """Whether the checksum is partial, or full and right. No checksum (UDP, 0) cannot be put together again."""
    at = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    check = packet[at] << 8 | packet[at + 1]
    pseudo = _pseudo_sum(packet, protocol, len(packet) - start)
    if check == pseudo:
        return check != 0
    if protocol == UDP and check == 0:
        return False
    return check == 0xFFFF - _sum_without(packet, start, check)  # the other form of 0 would not come back as it was


def _sum_without(packet: Buffer, start: int, check: int) -> int:
    """Return the folded sum of pseudo-header and transport part, as if its checksum field were 0."""
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    total = _pseudo_sum(packet, protocol, len(packet) - start) + _raw_sum(packet[start:]) - check
    return total % 0xFFFF


def _super(packets: Sequence[Buffer], protocol: int, start: int) -> Frame:
    first, last = packets[0], packets[-1]
    is_tcp = protocol == TCP
    body = start + ((first[start + 12] >> 4) * 4 if is_tcp else _UDP_HEADER)
    head = bytearray(first[:body])
    payloads = [packet[body:] for packet in packets]
    length = body + (len(first) - body) * (len(packets) - 1) + len(last) - body
    if is_tcp:
        head[start + 13] = last[start + 13]
    else:
        _U16.pack_into(head, start + 4, length - start)
    offset = _TCP_CHECK if is_tcp else _UDP_CHECK
    _U16.pack_into(head, start + offset, _pseudo_sum(head, protocol, length - start))
    heads = _heads(head, start)
    heads.resize(length)
    heads.number(0)
    kind = GSO_UDP_L4 if not is_tcp else GSO_TCPV4 if head[0] >> 4 == 4 else GSO_TCPV6
    return [VNET.pack(NEEDS_CSUM, kind, body, len(first) - body, start, offset), head, *payloads]


# -- sums ------------------------------------------------------------------------------------------------


def checksum(data: Buffer) -> int:
    """Return the internet checksum of `data` (RFC 1071): a big-endian number modulo 2^16 - 1 is the same sum."""
    return 0xFFFF - (_raw_sum(data) % 0xFFFF or (0xFFFF if any(data) else 0))


def _raw_sum(data: Buffer) -> int:
    return int.from_bytes(data, "big") << (8 if len(data) % 2 else 0)


def _pseudo_sum(packet: Buffer, protocol: int, length: int) -> int:
    """Return the folded, uncomplemented sum of the pseudo-header, as the kernel leaves it in a partial checksum."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    return _fold(bytes(addresses), protocol, length)


@lru_cache(maxsize=4096)
def _fold(addresses: bytes, protocol: int, length: int) -> int:
    total = int.from_bytes(addresses, "big") % 0xFFFF + protocol + length
    return (total - 1) % 0xFFFF + 1  # 0xFFFF, not 0, as folding a sum that is not zero gives


_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
