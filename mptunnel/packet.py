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
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Final

from librt.strings import BytesWriter, read_i64_be

from mptunnel.errors import BadPacketError

if TYPE_CHECKING:
    from mypy_extensions import i64, u8

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
MIN_MTU: Final = 1280  # what IPv6 asks of every link (RFC 8200, 5)

_ICMPV6: Final = 58
_UNREACHABLE: Final = 1
_NO_ROUTE: Final = 0
_PSEUDO: Final = struct.Struct(">16s16sII")
VNET: Final = struct.Struct("=BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset (native order)
VNET_SIZE: Final = VNET.size
PLAIN: Final = bytes(VNET_SIZE)
PLAIN_IPV4: Final = 0x45  # the first byte of a header without options
LEAST_FRAME: Final = VNET_SIZE + IPV4_HEADER
_PROTOCOL: Final = VNET_SIZE + 9
_LEAST: Final = {4: IPV4_HEADER, 6: IPV6_HEADER}  # length of a header, by version
NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_TYPE: Final = 1  # where a frame says it
CSUM_START: Final = 7 - struct.pack("=H", 1)[0]  # and where it says this, if it is below 256
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
_KINDS: Final = frozenset({GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4})
MAX_SEGMENTS: Final = 64
MOST_SEGMENTS: Final = 2048  # that are cut out of a frame; the kernel makes 1365, of 48 bytes each, at the most
MAX_LENGTH: Final = 65535

TCP: Final = 6
UDP: Final = 17
_FIN: Final = 0x01
_SYN: Final = 0x02
_RST: Final = 0x04
_PSH: Final = 0x08
_URG: Final = 0x20
_CWR: Final = 0x80
_TCP_FLAGS: Final = 13
_TCP_CHECK: Final = 16
_UDP_CHECK: Final = 6
_UDP_HEADER: Final = 8
_TCP_HEADER: Final = 20
_ENDS: Final = _FIN | _PSH
_NEVER: Final = _SYN | _RST | _URG | _CWR  # a packet with one of these stands alone

# Of a packet in IPv4 without options, by its protocol: least length, where its checksum is, header if that is partial.
_SINGLE4: Final = {
    TCP: (IPV4_HEADER + _TCP_HEADER, IPV4_HEADER + _TCP_CHECK, VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, _TCP_CHECK)),
    UDP: (IPV4_HEADER + _UDP_HEADER, IPV4_HEADER + _UDP_CHECK, VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, _UDP_CHECK)),
}
_NEVER_PARTIAL: Final = (MAX_LENGTH + 1, 0, PLAIN)

Frame = list[bytes]  # what one writev() gives the device: header, packet


def trim(plain: bytes) -> bytes:
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


def source(packet: bytes) -> bytes:
    """Return the packed source address of a packet that `trim` let through."""
    return packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]


def are_alike(packets: list[bytes]) -> bool:
    """Whether packets of one length, at least 40 bytes, pass or fail `trim` together and have one source."""
    first = packets[0]
    word, version = read_i64_be(first, 0), first[0] >> 4
    if version == 4:
        sender = read_i64_be(first, 12)
        for packet in packets:
            if (read_i64_be(packet, 0) ^ word) >> 32 & 0xFF00FFFF or (read_i64_be(packet, 12) ^ sender) >> 32:
                return False
        return True
    if version == 6:
        for packet in packets:
            if (read_i64_be(packet, 0) ^ word) >> 16 & 0xFF000000FFFF or not _are_same(packet, first, 8, 24):
                return False
        return True
    return False


def destination(data: bytes, at: int = 0) -> bytes:
    """Return the packed destination address of the packet that begins at `at`; less than that if it is shorter."""
    return data[at + 16 : at + 20] if data[at] >> 4 == 4 else data[at + 24 : at + 40]


def no_route6(packet: bytes, own: IPv6Address) -> bytes | None:
    """Return the ICMPv6 'no route to destination' from `own` that answers `packet` (RFC 4443, 3.1).

    None where none may be sent: for ICMPv6 errors, multicast and packets without a proper source.
    """
    sender, receiver = IPv6Address(source(packet)), IPv6Address(destination(packet))
    is_error = packet[6] == _ICMPV6 and len(packet) > IPV6_HEADER and packet[IPV6_HEADER] < 128
    if is_error or receiver.is_multicast or sender.is_multicast or sender.is_unspecified:
        return None
    quoted = packet[: MIN_MTU - IPV6_HEADER - 8]
    body = struct.pack(">BBHI", _UNREACHABLE, _NO_ROUTE, 0, 0) + quoted
    check = checksum(_PSEUDO.pack(own.packed, sender.packed, len(body), _ICMPV6) + body)
    header = struct.pack(">IHBB16s16s", 6 << 28, len(body), _ICMPV6, 64, own.packed, sender.packed)
    return header + body[:2] + check.to_bytes(2, "big") + body[4:]


# -- splitting -------------------------------------------------------------------------------------------


def split(frame: bytes, *, takes_partial: bool) -> list[bytes]:
    """Return the packets that a frame stands for.

    `takes_partial`: the receiver knows partial checksums. Raises BadPacketError for a frame that makes no sense.
    """
    length, at = len(frame) - VNET_SIZE, VNET_SIZE
    version = frame[at] >> 4 if length > 0 else 0
    least = _LEAST.get(version, MAX_LENGTH)
    if length < least:  # nor may it be taken for a control message over there
        raise BadPacketError(f"no IP packet in a frame of {len(frame)} bytes")
    flags, kind, _, size, start, offset = VNET.unpack_from(frame)
    is_plain = _is_plain(frame, start)
    takes_partial = takes_partial and is_plain
    if kind == GSO_NONE:
        packet = frame[at:]
        return [_completed(packet, start, offset) if flags & NEEDS_CSUM and not takes_partial else packet]
    kind &= ~GSO_ECN
    if kind not in _KINDS or not size or start < least or length < start + _UDP_HEADER:
        raise BadPacketError(f"super-packet of kind {kind} with segments of {size} bytes")
    is_tcp = kind != GSO_UDP_L4
    if is_tcp and length < start + _TCP_HEADER:
        raise BadPacketError(f"super-packet of {length} bytes, its TCP header at {start}")
    body = start + ((frame[at + start + 12] >> 4) * 4 if is_tcp else _UDP_HEADER)
    count = -(-(length - body) // size)
    if count < 1 or body < start + (_TCP_HEADER if is_tcp else _UDP_HEADER):
        raise BadPacketError(f"super-packet of {length} bytes without payload")
    if count > MOST_SEGMENTS:
        raise BadPacketError(f"super-packet of {count} segments")
    pieces = _cut(frame, start, body, size, count, TCP if is_tcp else UDP)
    if takes_partial:
        return pieces
    check = _TCP_CHECK if is_tcp else _UDP_CHECK
    if not is_plain:  # the addresses in the header may be a hop's, but the kernel has summed the true ones
        more = _U16.unpack_from(frame, at + start + check)[0] - length
        pieces = [_with_partial(piece, start + check, more + len(piece)) for piece in pieces]
    return [_completed(piece, start, check) for piece in pieces]


def is_lone(frame: bytes) -> bool:
    """Whether a frame is one IPv4 packet without options that a peer who knows partial checksums takes as it is."""
    if len(frame) < LEAST_FRAME or frame[GSO_TYPE] or frame[VNET_SIZE] != PLAIN_IPV4:
        return False
    return not frame[0] or (frame[CSUM_START] == IPV4_HEADER and frame[_PROTOCOL] in {TCP, UDP})  # see `_is_plain`


def _is_plain(frame: bytes, start: int) -> bool:
    """Whether TCP or UDP begins right behind the IP header: there a receiver recognizes a partial checksum.

    Other protocols have theirs elsewhere: GRE's is 4 bytes behind its beginning (RFC 2784, 2.1).
    Behind a routing header or a source route (RFC 8200, 4.4; RFC 791, 3.1) its addresses are not those of the header.
    """
    if frame[VNET_SIZE] == PLAIN_IPV4:
        return start == IPV4_HEADER and frame[VNET_SIZE + 9] in {TCP, UDP}
    return start == IPV6_HEADER and frame[VNET_SIZE] >> 4 == 6 and frame[VNET_SIZE + 6] in {TCP, UDP}


def _with_partial(piece: bytes, at: int, total: int) -> bytes:
    """Return a segment with this partial checksum, not folded yet."""
    own = bytearray(piece)
    _U16.pack_into(own, at, (total - 1) % 0xFFFF + 1)
    return bytes(own)


def _cut(frame: bytes, start: int, body: int, size: int, count: int, protocol: int) -> list[bytes]:
    """Return the segments of a super-packet whose header is `body` bytes long; their checksums are partial."""
    at = VNET_SIZE + body
    head = frame[VNET_SIZE:at]
    headers = _Headers(head, start, body, size, protocol)
    flags, last, pieces = head[start + _TCP_FLAGS] if protocol == TCP else 0, count - 1, []
    for number in range(count):
        payload = frame[at : at + size]
        at += size
        if number < 2 or number == last:
            headers.shape(len(payload), flags & (-1 if number == last else ~_ENDS) & (-1 if number == 0 else ~_CWR))
        pieces.append(headers.packet(number, payload))
    return pieces


class _Headers:
    """The headers of a super-packet's segments: how each follows from that of segment 0, with which `first` begins.

    TCP or UDP begins at `start`, the payload at `body`; a segment carries `size` bytes, the last one perhaps fewer.
    An IPv4 identification counts on, modulo 2^16, and its header's checksum with it; a TCP sequence number advances.
    """

    __slots__ = (
        "_addresses", "_body", "_check", "_first", "_ident", "_is_ipv4", "_is_tcp", "_length", "_own", "_rest",
        "_sequence", "_size", "_start",
    )  # fmt: skip

    def __init__(self, first: bytes, start: i64, body: i64, size: i64, protocol: int) -> None:
        self._first, self._start, self._body, self._size = first, start, body, size
        self._is_ipv4, self._is_tcp = first[0] >> 4 == 4, protocol == TCP
        self._check: i64 = _TCP_CHECK if self._is_tcp else _UDP_CHECK  # where it is, from `start`
        self._addresses: i64 = _sum_of_addresses(first) + protocol
        self._ident = read_i64_be(first, 0) >> 16 & 0xFFFF
        self._sequence = read_i64_be(first, start) & 0xFFFFFFFF
        self._length = read_i64_be(first, 0) >> 32 & 0xFFFF  # of IPv4
        self._rest = self._sum_of_the_rest(first) if self._is_ipv4 else 0
        self._own = BytesWriter()  # what was asked for last
        self._own.write(first[:body])

    def shape(self, payload: i64, flags: int) -> None:
        """Make them those of segments of `payload` bytes, with these TCP flags and with partial checksums."""
        own, start, length = self._own, self._start, self._body + payload
        if self._is_tcp:
            own[start + _TCP_FLAGS] = flags
        else:
            _put(own, start + 4, length - start)
        _put(own, start + self._check, _folded(self._addresses + length - start))
        if self._is_ipv4:
            self._rest += length - self._length
            self._length = length
            _put(own, 2, length)
        else:
            _put(own, 4, length - IPV6_HEADER)

    def header(self, number: i64) -> bytes:
        """Return the header of segment `number`, in the shape that was given last."""
        self._set(number)
        return self._own.getvalue()

    def packet(self, number: i64, payload: bytes) -> bytes:
        """Return segment `number`, whole."""
        own = self._own
        self._set(number)
        own.write(payload)
        whole = own.getvalue()
        own.truncate(self._body)
        return whole

    def has(self, packet: bytes, number: i64) -> bool:
        """Whether `packet`, as long as the first one, begins with the header of segment `number`, never shaped anew."""
        first, start, at = self._first, self._start, 0
        if self._is_ipv4:
            ident, word = (self._ident + number) & 0xFFFF, read_i64_be(packet, 4)
            if word >> 48 & 0xFFFF != ident or word & 0xFFFF != 0xFFFF - _folded(self._rest + ident):
                return False
            if (word ^ read_i64_be(first, 4)) >> 16 & 0xFFFFFFFF:  # what lies between these two
                return False
            if (read_i64_be(packet, 0) ^ read_i64_be(first, 0)) >> 32:
                return False
            at = 12
        if not self._is_tcp:
            return _are_same(packet, first, at, self._body)
        if read_i64_be(packet, start) & 0xFFFFFFFF != (self._sequence + number * self._size) & 0xFFFFFFFF:
            return False
        return _are_same(packet, first, at, start + 4) and _are_same(packet, first, start + 8, self._body)

    def is_next(self, packet: bytes, number: i64, *, is_full: bool) -> bool | None:
        """Whether `packet` is the last of a run, as its segment `number`; None if it does not belong to it.

        The last one may be shorter, and may bear FIN and PSH. `is_full`: no checksum of the run is partial.
        """
        first, start = self._first, self._start
        if not self._body < len(packet) <= len(first):
            return None
        flags = first[start + _TCP_FLAGS] | packet[start + _TCP_FLAGS] & _ENDS if self._is_tcp else 0
        self.shape(len(packet) - self._body, flags)
        expected, check = self.header(number), start + self._check
        if is_full:  # any but a partial one: those are not mixed
            own = packet[check : check + 2]
            if own == expected[check : check + 2] or not _check_is_fine(packet, TCP if self._is_tcp else UDP, start):
                return None
            expected = expected[:check] + own + expected[check + 2 :]
        if not packet.startswith(expected):
            return None
        return len(packet) < len(first) or flags & _ENDS != 0

    def together(self, packets: list[bytes]) -> Frame:
        """Return the super-packet of these segments, the first one among them; it has the flags of the last."""
        start, body, last = self._start, self._body, packets[-1]
        flags = last[start + _TCP_FLAGS] if self._is_tcp else 0
        self.shape(self._size * (len(packets) - 1) + len(last) - body, flags)
        kind = GSO_UDP_L4 if not self._is_tcp else GSO_TCPV4 if self._is_ipv4 else GSO_TCPV6
        frame: Frame = [VNET.pack(NEEDS_CSUM, kind, body, self._size, start, self._check), self.header(0)]
        for packet in packets:
            frame.append(packet[body:])
        return frame

    def _set(self, number: i64) -> None:
        own = self._own
        if self._is_ipv4:
            ident = (self._ident + number) & 0xFFFF
            _put(own, 4, ident)
            _put(own, 10, 0xFFFF - _folded(self._rest + ident))
        if self._is_tcp:
            at, sequence = self._start + 4, self._sequence + number * self._size
            _put(own, at, sequence >> 16 & 0xFFFF)
            _put(own, at + 2, sequence & 0xFFFF)

    def _sum_of_the_rest(self, first: bytes) -> i64:
        """Return the sum of an IPv4 header but for its identification and checksum."""
        total: i64 = -self._ident - (read_i64_be(first, 4) & 0xFFFF)
        for at in range(0, min((first[0] & 15) * 4, self._body) - 1, 2):
            total += first[at] << 8 | first[at + 1]
        return total


def _are_same(one: bytes, other: bytes, low: i64, high: i64) -> bool:
    """Whether two packets are the same from `low` to `high`, at least 8 bytes."""
    at = low
    while at < high - 8:
        if read_i64_be(one, at) != read_i64_be(other, at):
            return False
        at += 8
    return read_i64_be(one, high - 8) == read_i64_be(other, high - 8)


def _put(own: BytesWriter, at: i64, number: int) -> None:
    """Write a number of 16 bits."""
    high: u8 = number >> 8  # as an `int` it would be written by a call of the interpreter's
    low: u8 = number & 0xFF
    own[at] = high
    own[at + 1] = low


def complete(packet: bytes) -> bytes:
    """Return the packet with a full checksum, if it has a partial one."""
    found = _transport(packet)
    if found is None:
        return packet
    protocol, start = found
    check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    if _U16.unpack_from(packet, check)[0] != _pseudo_sum(packet, protocol, len(packet) - start):
        return packet
    return _completed(packet, start, check - start)


def _completed(packet: bytes, start: int, offset: int) -> bytes:
    """Add what the kernel left out: the sum from `start` to the end, the partial one in it included."""
    if len(packet) < start + offset + 2:
        raise BadPacketError(f"checksum at {start} + {offset} in {len(packet)} bytes")
    total = checksum(packet[start:]) or 0xFFFF
    return packet[: start + offset] + total.to_bytes(2, "big") + packet[start + offset + 2 :]


# -- putting together ------------------------------------------------------------------------------------


def coalesce(packets: list[bytes], *, takes_udp: bool) -> list[tuple[Frame, int]]:
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
        run = None
        if at + 1 < end and len(packets[at + 1]) <= len(packet) and (protocol == TCP or takes_udp):
            run = _run(packets, at, end, protocol, start)
        if run is not None:
            count, headers = run
            frames.append((headers.together(packets[at : at + count]), count))
            at += count
        else:
            frames.append(([_single_header(packet, protocol, start), packet], 1))
            at += 1
    return frames


def single(packet: bytes) -> Frame:
    """Return the frame of one packet."""
    length = len(packet)
    if length >= IPV4_HEADER and packet[0] == PLAIN_IPV4 and not (packet[6] & 0x3F or packet[7]):  # nearly all are so
        protocol = packet[9]
        least, check, needs_csum = _SINGLE4.get(protocol, _NEVER_PARTIAL)
        if length < least:
            return [PLAIN, packet]
        if protocol == UDP and packet[24] << 8 | packet[25] != length - IPV4_HEADER:
            return [PLAIN, packet]
        partial = _folded(_sum_of_addresses(packet) + protocol + length - IPV4_HEADER)
        return [needs_csum if packet[check] << 8 | packet[check + 1] == partial else PLAIN, packet]
    found = _transport(packet)
    return [PLAIN if found is None else _single_header(packet, *found), packet]


def _single_header(packet: bytes, protocol: int, start: int) -> bytes:
    offset = _TCP_CHECK if protocol == TCP else _UDP_CHECK
    if protocol == UDP and _U16.unpack_from(packet, start + 4)[0] != len(packet) - start:
        return PLAIN  # its sum is not over all of this
    (check,) = _U16.unpack_from(packet, start + offset)
    if check != _pseudo_sum(packet, protocol, len(packet) - start):
        return PLAIN
    return VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, start, offset)


def _transport(packet: bytes) -> tuple[int, int] | None:
    """Return protocol and offset of a whole TCP or UDP header; None for anything else, fragments included."""
    if packet[0] >> 4 == 4:
        protocol, start = packet[9], (packet[0] & 15) * 4
        if packet[6] & 0x3F or packet[7]:
            return None  # a fragment
    else:
        protocol, start = packet[6], IPV6_HEADER
    least = _TCP_HEADER if protocol == TCP else _UDP_HEADER if protocol == UDP else MAX_LENGTH
    return (protocol, start) if len(packet) >= start + least else None


def _run(packets: list[bytes], at: int, end: int, protocol: int, start: int) -> tuple[int, _Headers] | None:
    """Return how many packets from `at` on are one super-packet, and their headers; None if it is only this one."""
    first, follower = packets[at], packets[at + 1]
    if protocol == TCP:
        body = start + (first[start + 12] >> 4) * 4
        if first[start + _TCP_FLAGS] & (_NEVER | _ENDS) or body < start + _TCP_HEADER:
            return None
    else:
        body = start + _UDP_HEADER
        if _U16.unpack_from(first, start + 4)[0] != len(first) - start:
            return None
    length, size = len(first), len(first) - body
    if size <= 0 or not _check_is_fine(first, protocol, start):
        return None
    flow = 12 if first[0] >> 4 == 4 else 8  # addresses, and behind them ports
    if len(follower) <= body or not _are_same(follower, first, flow, start + 4):
        return None
    headers = _Headers(first, start, body, size, protocol)
    if not headers.has(first, 0):  # a wrong checksum of the IPv4 header: it would come back right
        return None
    check = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    is_full = first[check] << 8 | first[check + 1] != _pseudo_sum(first, protocol, length - start)
    number, limit = 1, min(end - at, MAX_SEGMENTS, (MAX_LENGTH - body) // size)
    while number < limit:
        packet = packets[at + number]
        if is_full or len(packet) != length or not headers.has(packet, number):
            ends = headers.is_next(packet, number, is_full=is_full)
            if ends is None:
                break
            if ends:
                return number + 1, headers
        number += 1
    return (number, headers) if number > 1 else None


def _check_is_fine(packet: bytes, protocol: int, start: int) -> bool:
    """Whether the checksum is partial, or full and right. No checksum (UDP, 0) cannot be put together again."""
    at = start + (_TCP_CHECK if protocol == TCP else _UDP_CHECK)
    check = packet[at] << 8 | packet[at + 1]
    pseudo = _pseudo_sum(packet, protocol, len(packet) - start)
    if check == pseudo:
        return check != 0
    if protocol == UDP and check == 0:
        return False
    return check == 0xFFFF - _sum_without(packet, start, check)  # the other form of 0 would not come back as it was


def _sum_without(packet: bytes, start: int, check: int) -> int:
    """Return the folded sum of pseudo-header and transport part, as if its checksum field were 0."""
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    total = _pseudo_sum(packet, protocol, len(packet) - start) + _raw_sum(packet[start:]) - check
    return total % 0xFFFF


# -- sums ------------------------------------------------------------------------------------------------


def checksum(data: bytes) -> int:
    """Return the internet checksum of `data` (RFC 1071): a big-endian number modulo 2^16 - 1 is the same sum."""
    return 0xFFFF - (_raw_sum(data) % 0xFFFF or (0xFFFF if any(data) else 0))


def _raw_sum(data: bytes) -> int:
    return int.from_bytes(data, "big") << (8 if len(data) % 2 else 0)


def _pseudo_sum(packet: bytes, protocol: int, length: int) -> int:
    """Return the folded, uncomplemented sum of the pseudo-header, as the kernel leaves it in a partial checksum."""
    return _folded(_sum_of_addresses(packet) + protocol + length)


def _sum_of_addresses(packet: bytes) -> i64:
    """Return the sum of the two addresses, not folded."""
    total: i64 = 0
    at: i64 = 12 if packet[0] >> 4 == 4 else 8
    end: i64 = 20 if packet[0] >> 4 == 4 else 40
    while at < end:
        word = read_i64_be(packet, at)
        total += (word >> 48 & 0xFFFF) + (word >> 32 & 0xFFFF) + (word >> 16 & 0xFFFF) + (word & 0xFFFF)
        at += 8
    return total


def _folded(total: i64) -> i64:
    """Fold a sum that is not zero: it becomes 0xFFFF, not 0."""
    return (total - 1) % 0xFFFF + 1


_U16: Final = struct.Struct(">H")
