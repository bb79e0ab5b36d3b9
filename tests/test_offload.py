"""Super-packets: what goes in comes out, to the byte, whatever the kernel or a peer hands us."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel import packet
from mptunnel.errors import BadPacketError
from mptunnel.packet import GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, TCP, UDP, VNET, VNET_SIZE, coalesce, complete, split

ADDRESSES = {
    4: (bytes([10, 0, 1, 2]), bytes([203, 0, 113, 2])),
    6: (bytes.fromhex("fd000001000000000000000000000002"), bytes.fromhex("20010db8000000000000000000000009")),
}


def plain_sum(data: bytes) -> int:
    """The internet checksum, word by word (RFC 1071, 4.1): an independent one."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(version: int, protocol: int, length: int) -> bytes:
    source, target = ADDRESSES[version]
    tail = struct.pack(">BBH", 0, protocol, length) if version == 4 else struct.pack(">IxxxB", length, protocol)
    return source + target + tail


def ip(version: int, protocol: int, ident: int, body: bytes) -> bytes:
    source, target = ADDRESSES[version]
    if version == 6:
        return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + source + target + body
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), ident & 0xFFFF, 0x4000, 64, protocol, 0) + source + target
    return head[:10] + struct.pack(">H", ~plain_sum(head) & 0xFFFF) + head[12:] + body


def tcp(version: int, payload: bytes, sequence: int, ident: int, flags: int, options: bytes, *, partial: bool) -> bytes:
    offset = (20 + len(options)) // 4 << 4
    head = struct.pack(">HHIIBBHHH", 1234, 80, sequence & 0xFFFFFFFF, 77, offset, flags, 500, 0, 0) + options
    return ip(version, TCP, ident, checked(version, TCP, head + payload, 16, partial=partial))


def udp(version: int, payload: bytes, ident: int, *, partial: bool) -> bytes:
    head = struct.pack(">HHHH", 1234, 53, 8 + len(payload), 0)
    return ip(version, UDP, ident, checked(version, UDP, head + payload, 6, partial=partial))


def checked(version: int, protocol: int, body: bytes, at: int, *, partial: bool) -> bytes:
    total = plain_sum(pseudo(version, protocol, len(body)) + (b"" if partial else body))
    field = total if partial else (~total & 0xFFFF) or 0xFFFF
    return body[:at] + struct.pack(">H", field) + body[at + 2 :]


@st.composite
def flows(draw: st.DrawFn) -> list[bytes]:
    """Packets of one flow, mostly consecutive, as split by a sender; with what breaks runs in between."""
    version, partial = draw(st.sampled_from((4, 6))), draw(st.booleans())
    is_tcp, size = draw(st.booleans()), draw(st.integers(1, 1400))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    options = draw(st.sampled_from((b"", b"\1\1\x08\x0a" + bytes(8), bytes(40))))
    sequence, ident, packets = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 65535)), []
    for _ in range(draw(st.integers(1, 12))):
        event = draw(
            st.sampled_from(("", "", "", "", "lost", "short", "push", "fin", "cwr", "ece", "foreign", "empty", "wrong"))
        )
        length = {"short": max(1, size // 2), "empty": 0}.get(event, size)
        payload = rng.randbytes(length)
        flags = 0x10 | {"push": 8, "fin": 1, "cwr": 0x80, "ece": 0x40}.get(event, 0)
        if event == "foreign":
            packets.append(ip(4, 1, 7, rng.randbytes(30)))
        if is_tcp:
            packets.append(tcp(version, payload, sequence, ident, flags, options, partial=partial))
        else:
            packets.append(udp(version, payload, ident, partial=partial))
        if event == "wrong" and version == 4:  # the checksum of the header, which must not come back right
            packets[-1] = packets[-1][:10] + bytes((packets[-1][10] ^ 1,)) + packets[-1][11:]
        sequence += length + (size if event == "lost" else 0)
        ident += 1 + (event == "lost")
    return packets


@settings(deadline=None, max_examples=300)
@given(st.lists(flows(), min_size=1, max_size=3), st.booleans())
def test_split_gives_back_what_coalesce_was_given(streams: list[list[bytes]], takes_udp: bool) -> None:
    packets = [each for stream in streams for each in stream]
    back: list[bytes] = []
    for frame, count in coalesce(packets, takes_udp=takes_udp):
        whole = b"".join(frame)
        has_partial = bool(whole[0] & NEEDS_CSUM)
        expected = packets[len(back) : len(back) + count]
        is_full = [complete(each) == each for each in expected]
        pieces = split(whole, takes_partial=not all(is_full) or not has_partial)
        assert len(pieces) == count
        back += map(bytes, pieces)
    assert back == packets


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("partial", [False, True])
def test_a_whole_transfer_is_one_frame(version: int, partial: bool) -> None:
    packets = [tcp(version, bytes([n]) * 1000, 5 + 1000 * n, 65530 + n, 0x10, b"", partial=partial) for n in range(20)]
    ((frame, count),) = coalesce(packets, takes_udp=False)
    assert count == 20
    assert len(b"".join(frame)) == VNET_SIZE + len(packets[0]) + 19 * 1000


@pytest.mark.parametrize("damage", [0, 5, 19])
def test_a_segment_with_a_wrong_checksum_is_not_made_right_by_coalescing(damage: int) -> None:
    packets = [tcp(4, bytes([n]) * 100, 100 * n, n, 0x10, b"", partial=False) for n in range(20)]
    bad = bytearray(packets[damage])
    bad[-1] ^= 1
    packets[damage] = bytes(bad)
    for frame, count in coalesce(packets, takes_udp=False):
        assert count == 1 or bytes(bad[40:]) not in b"".join(frame)


def test_udp_without_checksum_stays_so() -> None:
    packets = [udp(4, b"x" * 50, n, partial=False) for n in range(4)]
    packets = [each[:26] + b"\0\0" + each[28:] for each in packets]
    assert [count for _, count in coalesce(packets, takes_udp=True)] == [1, 1, 1, 1]


def test_what_the_kernel_left_out_is_what_anybody_would_compute() -> None:
    rng = random.Random(3)
    for version in (4, 6):
        for length in (0, 1, 7, 1000, 1373):
            payload = rng.randbytes(length)
            whole = tcp(version, payload, 9, 9, 0x18, b"", partial=False)
            assert complete(tcp(version, payload, 9, 9, 0x18, b"", partial=True)) == whole
            assert complete(whole) == whole
            assert complete(udp(version, payload, 9, partial=True)) == udp(version, payload, 9, partial=False)


def test_segments_for_a_stock_peer_bear_full_checksums() -> None:
    rng = random.Random(4)
    packets = [tcp(4, rng.randbytes(999), 1 + 999 * n, n, 0x10, b"", partial=True) for n in range(7)]
    ((frame, _),) = coalesce(packets, takes_udp=False)
    for piece in split(b"".join(frame), takes_partial=False):
        segment = bytes(piece)[20:]
        assert plain_sum(pseudo(4, TCP, len(segment)) + segment) == 0xFFFF


def test_congestion_window_reduced_is_on_the_first_segment_only_and_the_end_on_the_last() -> None:
    whole = tcp(4, bytes(3000), 1, 1, 0x10 | 0x80 | 0x08 | 0x01, b"", partial=True)
    frame = VNET.pack(NEEDS_CSUM, GSO_TCPV4 | packet.GSO_ECN, 40, 1000, 20, 16) + whole
    assert [piece[33] for piece in split(frame, takes_partial=True)] == [0x90, 0x10, 0x19]


@pytest.mark.parametrize("takes_partial", [True, False])
@pytest.mark.parametrize("packet", [b"\x45", b"\x40" + bytes(8) + b"\x11" + bytes(9), b"\x60" + bytes(38), b""])
def test_a_frame_without_a_whole_header_is_refused(packet: bytes, takes_partial: bool) -> None:
    with pytest.raises(BadPacketError):
        split(VNET.pack(0, 0, 0, 0, 0, 0) + packet, takes_partial=takes_partial)


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=200), st.sampled_from((0, 1, 4, 5, 0x81, 3, 77)), st.integers(0, 300), st.integers(0, 300))
def test_a_frame_that_makes_no_sense_is_refused_and_nothing_else(body: bytes, kind: int, size: int, start: int) -> None:
    frame = VNET.pack(NEEDS_CSUM, kind, 0, size, start, 16) + body
    try:
        split(frame, takes_partial=False)
    except BadPacketError:
        return
    assert body or kind == 0


def test_a_super_packet_of_udp_is_split_as_its_sender_meant() -> None:
    packets = [udp(4, bytes([n]) * 512, 40 + n, partial=True) for n in range(9)] + [udp(4, b"end", 49, partial=True)]
    ((frame, count),) = coalesce(packets, takes_udp=True)
    assert count == 10
    assert VNET.unpack_from(b"".join(frame))[1] == GSO_UDP_L4
    assert list(map(bytes, split(b"".join(frame), takes_partial=True))) == packets
