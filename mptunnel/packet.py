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
from operator import add, eq, itemgetter
from typing import TYPE_CHECKING, Final

from mptunnel.errors import BadPacketError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
MIN_MTU: Final = 1280  # what IPv6 asks of every link (RFC 8200, 5)

_ICMPV6 = 58
_UNREACHABLE = 1
_NO_ROUTE = 0
_PSEUDO = struct.Struct(">16s16sII")
VNET: Final = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset (native order)
VNET_SIZE: Final = VNET.size
PLAIN: Final = bytes(VNET_SIZE)
PLAIN_IPV4: Final = 0x45  # the first byte of a header without options
LEAST_FRAME: Final = VNET_SIZE + IPV4_HEADER
_PROTOCOL: Final = VNET_SIZE + 9
_ALIKE = {4: struct.Struct(">BxH8x4s"), 6: struct.Struct(">B3xH2x16s")}
_VERSIONS: Final = frozenset({4, 6})
NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_TYPE: Final = 1  # where a frame says it
CSUM_START: Final = 7 - struct.pack("=H", 1)[0]  # and where it says this, if it is below 256
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
_KINDS = frozenset({GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4})
MAX_SEGMENTS: Final = 64
MOST_SEGMENTS: Final = 2048  # that are cut out of a frame; the kernel makes 1365, of 48 bytes each, at the most
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

# Of a packet in IPv4 without options, by its protocol: least length, where its checksum is, header if that is partial.
_SINGLE4 = {
    TCP: (IPV4_HEADER + _TCP_HEADER, IPV4_HEADER + _TCP_CHECK, VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, _TCP_CHECK)),
    UDP: (IPV4_HEADER + _UDP_HEADER, IPV4_HEADER + _UDP_CHECK, VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, _UDP_CHECK)),
}
_NEVER_PARTIAL = (MAX_LENGTH + 1, 0, PLAIN)

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


def source_and_length(packet: Buffer) -> Callable[[Buffer], tuple[object, ...]] | None:
    """Return what reads version, header length, length and source of packets like this one, at least 40 bytes long.

    Packets of one length that agree in these pass or fail `trim` together, and have one source. None if it is no IP.
    """
    layout = _ALIKE.get(packet[0] >> 4)
    return None if layout is None else layout.unpack_from


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
    if not packet or packet[0] >> 4 not in _VERSIONS:  # it must not be taken for a control message over there
        raise BadPacketError(f"no IP packet in a frame of {len(frame)} bytes")
    is_plain = _is_plain(packet, start)
    takes_partial = takes_partial and is_plain
    if kind == GSO_NONE:
        if flags & NEEDS_CSUM and not takes_partial:
            return [_completed(packet, start, offset)]
        return [packet]
    kind &= ~GSO_ECN
    least = IPV4_HEADER if packet and packet[0] >> 4 == 4 else IPV6_HEADER
    if kind not in _KINDS or not size or start < least or len(packet) < start + _UDP_HEADER:
        raise BadPacketError(f"super-packet of kind {kind} with segments of {size} bytes")
    is_tcp = kind != GSO_UDP_L4
    if is_tcp and len(packet) < start + _TCP_HEADER:
        raise BadPacketError(f"super-packet of {len(packet)} bytes, its TCP header at {start}")
    body = start + ((packet[start + 12] >> 4) * 4 if is_tcp else _UDP_HEADER)
    count = -(-(len(packet) - body) // size)
    if count < 1 or body < start + (_TCP_HEADER if is_tcp else _UDP_HEADER):
        raise BadPacketError(f"super-packet of {len(packet)} bytes without payload")
    if count > MOST_SEGMENTS:
        raise BadPacketError(f"super-packet of {count} segments")
    pieces = _split_tcp(packet, start, body, size, count) if is_tcp else _split_udp(packet, start, body, size, count)
    if takes_partial:
        return pieces
    check = _TCP_CHECK if is_tcp else _UDP_CHECK
    if not is_plain:  # the addresses in the header may be a hop's, but the kernel has summed the true ones
        more = _U16.unpack_from(packet, start + check)[0] - len(packet)
        pieces = [_with_partial(piece, start + check, more + len(piece)) for piece in pieces]
    return [_completed(piece, start, check) for piece in pieces]


def is_lone(frame: memoryview) -> bool:
    """Whether a frame is one IPv4 packet without options that a peer who knows partial checksums takes as it is."""
    if len(frame) < LEAST_FRAME or frame[GSO_TYPE] or frame[VNET_SIZE] != PLAIN_IPV4:
        return False
    return not frame[0] or (frame[CSUM_START] == IPV4_HEADER and frame[_PROTOCOL] in {TCP, UDP})  # see `_is_plain`


def _is_plain(packet: memoryview, start: int) -> bool:
    """Whether TCP or UDP begins right behind the IP header: there a receiver recognizes a partial checksum.

    Other protocols have theirs elsewhere: GRE's is 4 bytes behind its beginning (RFC 2784, 2.1).
    Behind a routing header or a source route (RFC 8200, 4.4; RFC 791, 3.1) its addresses are not those of the header.
    """
    if packet[0] == PLAIN_IPV4:
        return start == IPV4_HEADER and packet[9] in {TCP, UDP}
    return start == IPV6_HEADER and packet[0] >> 4 == 6 and packet[6] in {TCP, UDP}


def _with_partial(piece: Buffer, at: int, total: int) -> bytes:
    """Return a segment with this partial checksum, not folded yet."""
    own = bytearray(piece)
    _U16.pack_into(own, at, (total - 1) % 0xFFFF + 1)
    return bytes(own)


def _split_tcp(packet: memoryview, start: int, body: int, size: int, count: int) -> list[Buffer]:
    head = bytearray(packet[:body])
    flags = head[start + 13]
    last = body + (count - 1) * size
    if count == 1:
        return [_tcp_segment(head, packet[body:], start, 0, size, flags)]
    pieces: list[Buffer] = []
    if flags & _CWR:
        pieces.append(_tcp_segment(head, packet[body : body + size], start, 0, size, flags & ~_ENDS))
    ends_alike = len(packet) - last == size and not flags & _ENDS
    alike = range(len(pieces), count if ends_alike else count - 1)
    if alike:
        own = _tcp_head(head, start, size, flags & ~(_ENDS | _CWR))
        for few in _few(alike):
            headers = _headers(own, start, TCP, size, few)
            pieces += _join(headers, body, packet, body + few.start * size, size)
    if not ends_alike:
        pieces.append(_tcp_segment(head, packet[last:], start, count - 1, size, flags & ~_CWR))
    return pieces


def _tcp_segment(head: bytearray, payload: memoryview, start: int, number: int, size: int, flags: int) -> bytes:
    """Return segment `number` of a super-packet with this header, whole."""
    own = _tcp_head(head, start, len(payload), flags)
    return _header(own, start, TCP, size, number) + payload


def _tcp_head(head: bytearray, start: int, size: int, flags: int) -> bytearray:
    """Return the header of a segment with `size` bytes of payload; its number is still that of the first."""
    own = bytearray(head)
    own[start + 13] = flags
    _U16.pack_into(own, start + _TCP_CHECK, _pseudo_sum(own, TCP, len(own) + size - start))
    _resize(own, len(own) + size)
    return own


def _split_udp(packet: memoryview, start: int, body: int, size: int, count: int) -> list[Buffer]:
    head = bytearray(packet[:body])
    last = body + (count - 1) * size
    own = _udp_head(head, start, size)
    pieces: list[Buffer] = []
    for few in _few(range(count - 1)):
        pieces += _join(_headers(own, start, UDP, size, few), body, packet, body + few.start * size, size)
    own = _udp_head(head, start, len(packet) - last)
    _renumber(own, count - 1)
    pieces.append(b"".join((own, packet[last:])))
    return pieces


def _few(numbers: range) -> Iterable[range]:
    """Return the numbers in ranges that one long number does well for: what that takes grows with its square."""
    if len(numbers) <= MAX_SEGMENTS:
        return (numbers,)
    return [numbers[at : at + MAX_SEGMENTS] for at in range(0, len(numbers), MAX_SEGMENTS)]


def _join(headers: bytes, length: int, packet: memoryview, at: int, size: int) -> Iterable[bytes]:
    """Return packets of these headers, `length` bytes each, and of the payloads of `size` bytes from `at` on."""
    count = len(headers) // length
    return map(add, _array(length, count).unpack(headers), _array(size, count).unpack_from(packet, at))


def _udp_head(head: bytearray, start: int, size: int) -> bytearray:
    own = bytearray(head)
    _U16.pack_into(own, start + 4, _UDP_HEADER + size)
    _U16.pack_into(own, start + _UDP_CHECK, _pseudo_sum(own, UDP, _UDP_HEADER + size))
    _resize(own, len(own) + size)
    return own


def _resize(head: bytearray, length: int) -> None:
    """Write the length of the whole packet into an IP header."""
    version = head[0] >> 4
    if version == 4:
        _U16.pack_into(head, 2, length)
        _renumber(head, 0)
    elif version == 6:
        _U16.pack_into(head, 4, length - IPV6_HEADER)
    else:
        raise BadPacketError(f"super-packet of IP version {version}")


def _renumber(head: bytearray, number: int) -> None:
    """Advance an IPv4 header's identification, and write its checksum anew. IPv6 has neither."""
    if head[0] >> 4 == 4:
        ident = (_U16.unpack_from(head, 4)[0] + number) & 0xFFFF
        _U16.pack_into(head, 4, ident)
        head[10:12] = b"\0\0"
        _U16.pack_into(head, 10, checksum(head[: (head[0] & 15) * 4]))


def _headers(head: bytearray, start: int, protocol: int, size: int, numbers: range) -> bytes:
    """Return the headers of the segments of these consecutive numbers, one behind the other, given that of segment 0.

    Taken as one long number, they are the header repeated plus a number that depends on the layout only: a field that
    counts on does so by the same amount from each header to the next, as long as it does not wrap.
    """
    first, count = _header(head, start, protocol, size, numbers.start), len(numbers)
    is_ipv4, is_tcp = head[0] >> 4 == 4, protocol == TCP
    ident, check = (_U16.unpack_from(first, 4)[0], _U16.unpack_from(first, 10)[0]) if is_ipv4 else (0, 0xFFFF)
    sequence = _U32.unpack_from(first, start + 4)[0] if is_tcp else 0
    if ident + count > 0xFFFF or check <= count or sequence + count * size > 0xFFFFFFFF:
        return b"".join(_header(head, start, protocol, size, number) for number in numbers)
    growth = _growth(len(head), count, start if is_tcp else 0, size if is_tcp else 0, is_ipv4=is_ipv4)
    return (int.from_bytes(first * count, "big") + growth).to_bytes(len(head) * count, "big")


@lru_cache(maxsize=1024)
def _growth(length: int, count: int, start: int, step: int, *, is_ipv4: bool) -> int:
    """Return what `count` headers of `length` bytes, as one number, have more than the first one repeated."""
    each = step << (length - start - 8) * 8  # the sequence number ends 8 bytes behind `start`
    if is_ipv4:
        each += (1 << (length - 6) * 8) - (1 << (length - 12) * 8)  # the identification up, the checksum down
    return sum(number * each << (count - 1 - number) * length * 8 for number in range(count))


def _header(head: bytearray, start: int, protocol: int, size: int, number: int) -> bytes:
    """Return the header of one segment, given that of segment 0."""
    own = bytearray(head)
    if protocol == TCP:
        sequence = _U32.unpack_from(head, start + 4)[0] + number * size
        _U32.pack_into(own, start + 4, sequence & 0xFFFFFFFF)
    _renumber(own, number)
    return bytes(own)


@lru_cache(maxsize=1024)
def _array(size: int, count: int) -> struct.Struct:
    return struct.Struct(f"{size}s" * count)


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
    length = len(packet)
    if length >= IPV4_HEADER and packet[0] == PLAIN_IPV4 and not (packet[6] & 0x3F or packet[7]):  # nearly all are so
        protocol = packet[9]
        least, check, needs_csum = _SINGLE4.get(protocol, _NEVER_PARTIAL)
        if length < least:
            return [PLAIN, packet]
        if protocol == UDP and packet[24] << 8 | packet[25] != length - IPV4_HEADER:
            return [PLAIN, packet]
        rest = int.from_bytes(packet[12:20], "big") + protocol + length - IPV4_HEADER
        return [needs_csum if packet[check] << 8 | packet[check + 1] == (rest - 1) % 0xFFFF + 1 else PLAIN, packet]
    found = _transport(packet)
    return [PLAIN if found is None else _single_header(packet, *found), packet]


def _single_header(packet: Buffer, protocol: int, start: int) -> bytes:
    offset = _TCP_CHECK if protocol == TCP else _UDP_CHECK
    if protocol == UDP and _U16.unpack_from(packet, start + 4)[0] != len(packet) - start:
        return PLAIN  # its sum is not over all of this
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
    head = bytearray(first[:body])
    length, number = len(first), 1
    limit = min(end - at, MAX_SEGMENTS, (MAX_LENGTH - body) // size)
    check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    is_full = first[check] << 8 | first[check + 1] != _pseudo_sum(first, protocol, length - start)
    flow = slice(12 if first[0] >> 4 == 4 else 8, start + 4)  # addresses and ports
    if packets[at + 1][flow] != first[flow]:
        return 1
    if not is_full:
        headers = _headers(head, start, protocol, size, range(1, limit))
        number += _alike(packets[at + 1 : at + limit], length, body, headers)
    while number < limit:
        expected = bytearray(_header(head, start, protocol, size, number))
        ends = _is_next(packets[at + number], expected, body, start, protocol, is_full=is_full, length=length)
        if ends is None:
            break
        number += 1
        if ends:
            break
    return number


def _alike(packets: Sequence[Buffer], length: int, body: int, headers: bytes) -> int:
    """Return how many of the first packets are of this length and begin with these headers, each with its own."""
    fits = [*map(length.__eq__, map(len, packets))]
    if False in fits:
        packets = packets[: fits.index(False)]
    heads = [*map(itemgetter(slice(body)), packets)]
    if b"".join(heads) == headers[: body * len(heads)]:
        return len(heads)
    same = map(eq, heads, _array(body, len(headers) // body).unpack(headers))
    return [*same].index(False)


def _is_next(
    packet: Buffer, expected: bytearray, body: int, start: int, protocol: int, *, is_full: bool, length: int
) -> bool | None:
    """Whether `packet`, expected to begin so, is the last of a run; None if it does not belong to it.

    The last one may be shorter, and may bear FIN and PSH.
    """
    if not body < len(packet) <= length:
        return None
    is_last = len(packet) < length
    if is_last:
        if protocol == UDP:
            _U16.pack_into(expected, start + 4, len(packet) - start)
        _resize(expected, len(packet))
    if protocol == TCP and packet[start + 13] & _ENDS:
        is_last = True
        expected[start + 13] |= packet[start + 13] & _ENDS
    check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    _U16.pack_into(expected, check, _pseudo_sum(expected, protocol, len(packet) - start))
    if is_full:  # any but a partial one: those are not mixed
        own = packet[check : check + 2]
        expected[check : check + 2] = own if own != expected[check : check + 2] else b"\0\0"
    if packet[:body] != expected or (is_full and not _check_is_fine(packet, protocol, start)):
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
    payloads = map(itemgetter(slice(body, None)), packets)
    length = body + (len(first) - body) * (len(packets) - 1) + len(last) - body
    if is_tcp:
        head[start + 13] = last[start + 13]
    else:
        _U16.pack_into(head, start + 4, length - start)
    offset = _TCP_CHECK if is_tcp else _UDP_CHECK
    _U16.pack_into(head, start + offset, _pseudo_sum(head, protocol, length - start))
    _resize(head, length)
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
