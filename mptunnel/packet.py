"""IP packets as they stand in a TUN device: what of a header a tunnel must read, and the answers it gives itself."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address
from typing import Final

from mptunnel.errors import BadPacketError

IPV4_HEADER: Final = 20
IPV6_HEADER: Final = 40
MIN_MTU: Final = 1280  # what IPv6 asks of every link (RFC 8200, 5)
MAX_PACKET: Final = 65535

_ICMPV6 = 58
_UNREACHABLE = 1
_NO_ROUTE = 0
_PSEUDO = struct.Struct(">16s16sII")

Buffer = bytes | memoryview


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


def checksum(data: Buffer) -> int:
    """Return the internet checksum of `data` (RFC 1071): a big-endian number modulo 2^16 - 1 is the same sum."""
    total = int.from_bytes(data, "big") << (8 if len(data) % 2 else 0)
    return 0xFFFF - total % 0xFFFF if total else 0xFFFF
