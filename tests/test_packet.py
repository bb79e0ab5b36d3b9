"""IP packets: their bounds, their addresses, and the one answer we give ourselves."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mptunnel.errors import BadPacketError
from mptunnel.packet import (
    CSUM_START,
    GSO_NONE,
    NEEDS_CSUM,
    PLAIN,
    VNET,
    VNET_SIZE,
    checksum,
    destination,
    is_lone,
    no_route6,
    single,
    source,
    split,
    trim,
)

OWN = IPv6Address("fd00::1")


def ipv4(payload: bytes = b"", options: int = 0, sender: str = "10.0.1.2", receiver: str = "192.0.2.1") -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45 + options, 0, 20 + 4 * options + len(payload), 0, 0, 64, 17, 0)
    return head + IPv4Address(sender).packed + IPv4Address(receiver).packed + bytes(4 * options) + payload


def ipv6(payload: bytes = b"", kind: int = 17, sender: str = "fd00::2", receiver: str = "2001:db8::1") -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), kind, 64)
    return head + IPv6Address(sender).packed + IPv6Address(receiver).packed + payload


def plain_checksum(data: bytes) -> int:
    """Return the internet checksum as RFC 1071 describes it, word by word."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 10), st.integers(0, 40))
def test_the_padding_behind_a_packet_is_cut_off(payload: bytes, options: int, padding: int) -> None:
    for packet in (ipv4(payload, options), ipv6(payload)):
        assert trim(packet + bytes(padding)) == packet


@settings(deadline=None)
@given(st.binary(max_size=100))
@example(b"")
@example(b"\x45")
@example(b"\x60")
def test_any_bytes_are_a_packet_or_refused(junk: bytes) -> None:
    try:
        packet = trim(junk)
    except BadPacketError:
        return
    assert packet == junk[: len(packet)]
    assert len(source(packet)) == len(destination(packet)) in {4, 16}


def test_packets_that_lie_about_their_length_are_refused() -> None:
    whole4, whole6 = ipv4(b"payload"), ipv6(b"payload")
    for bad in (
        whole4[:-1], whole6[:-1], whole4[:19], whole6[:39],
        b"\x44" + whole4[1:],  # a header of 16 bytes
        b"\x4f" + whole4[1:],  # a header longer than the packet
        whole4[:2] + (19).to_bytes(2, "big") + whole4[4:],
        b"\x55" + whole4[1:], b"\x05" + whole4[1:], b"\x70" + whole6[1:], b"",
    ):  # fmt: skip
        with pytest.raises(BadPacketError):
            trim(bad)


@settings(deadline=None)
@given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.ip_addresses(v=6), st.ip_addresses(v=6))
def test_addresses_are_where_they_stand(
    from4: IPv4Address, to4: IPv4Address, from6: IPv6Address, to6: IPv6Address
) -> None:
    for packet, sender, receiver in (
        (ipv4(sender=str(from4), receiver=str(to4)), from4, to4),
        (ipv6(sender=str(from6), receiver=str(to6)), from6, to6),
    ):
        assert (source(packet), destination(packet)) == (sender.packed, receiver.packed)
        assert destination(b"\x60" + packet, 1) == receiver.packed


@settings(deadline=None)
@given(st.binary(max_size=200) | st.integers(0, 60).map(lambda n: b"\xff" * n) | st.integers(0, 60).map(bytes))
@example(bytes.fromhex("0001f203f4f5f6f7"))
def test_the_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    assert checksum(data) == plain_checksum(data)


def test_the_checksum_of_the_example_in_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF


@pytest.mark.parametrize("length", [0, 1, 8, 1192, 1193, 1232, 1380])
def test_no_route_is_answered_by_a_sound_icmpv6_error(length: int) -> None:
    packet = ipv6(bytes(range(256)) * 6, sender="fd00::2")[: 40 + length]
    answer = no_route6(packet, OWN)
    assert answer is not None
    version, size, kind, hops = struct.unpack_from(">IHBB", answer)
    assert (version >> 28, size, kind, hops) == (6, len(answer) - 40, 58, 64)
    assert (source(answer), destination(answer)) == (OWN.packed, IPv6Address("fd00::2").packed)
    body = answer[40:]
    assert body[:2] == bytes((1, 0))
    assert body[4:8] == bytes(4)
    assert body[8:] == packet[: 1280 - 48]
    assert len(answer) <= 1280
    assert trim(answer) == answer
    pseudo = OWN.packed + IPv6Address("fd00::2").packed + struct.pack(">II", len(body), 58)
    assert plain_checksum(pseudo + body) == 0  # a sum that contains its own checksum is all ones


def test_no_error_is_sent_about_errors_groups_and_nobody() -> None:
    unreachable, ping = bytes((1, 0)) + bytes(6), bytes((128, 0)) + bytes(6)
    assert no_route6(ipv6(unreachable, kind=58), OWN) is None
    assert no_route6(ipv6(bytes((127, 0)) + bytes(6), kind=58), OWN) is None
    assert no_route6(ipv6(ping, kind=58), OWN) is not None
    assert no_route6(ipv6(receiver="ff02::1"), OWN) is None
    assert no_route6(ipv6(sender="ff02::1"), OWN) is None
    assert no_route6(ipv6(sender="::"), OWN) is None
    assert no_route6(ipv6(), OWN) is not None


# -- frames that are not as nearly all are -----------------------------------------------------------------------------

TRUE6, HOP6, OWN6 = (IPv6Address(text).packed for text in ("2001:db8::9", "2001:db8::1", "fd00::2"))
TRUE4, HOP4, OWN4 = (IPv4Address(text).packed for text in ("192.0.2.9", "192.0.2.1", "10.0.1.2"))
ROUTING = bytes([6, 4, 43, 0, 0, 0, 0, 0]) + bytes(32)  # of 40 bytes; the packet goes on to the true destination
OPTIONS = bytes([6, 0, 1, 4, 0, 0, 0, 0])  # a destination option of padding
SOURCE_ROUTE = bytes([131, 7, 4]) + TRUE4 + b"\0"


def odd_frame(between: bytes, *, payload: bytes, size: int, version: int = 6, true: bytes = b"") -> bytes:
    """A frame of TCP behind extension headers or IPv4 options, as the kernel leaves it: summed for `true`."""
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 7, 9, 5 << 4, 0x10, 512, 0, 0)
    if version == 6:
        own, hop, start = OWN6, HOP6, 40 + len(between)
        first = 60 if between[:4] == OPTIONS[:4] else 43
        head = struct.pack(">IHBB", 6 << 28, len(between) + len(tcp) + len(payload), first, 64) + own + hop + between
        kind = 4
    else:
        own, hop, start = OWN4, HOP4, 20 + len(between)
        total = start + len(tcp) + len(payload)
        head = struct.pack(">BBHHHBBH", 0x40 | start // 4, 0, total, 5, 0, 64, 6, 0) + own + hop + between
        kind = 1
    whole = len(tcp) + len(payload)
    partial = pseudo(own + (true or hop), whole)
    tcp = tcp[:16] + partial.to_bytes(2, "big") + tcp[18:]
    vnet = VNET.pack(NEEDS_CSUM, kind if size else GSO_NONE, 0, size, start, 16)
    return vnet + head + tcp + payload


def pseudo(addresses: bytes, length: int) -> int:
    total: int = sum(struct.unpack(f">{len(addresses) // 2}H", addresses)) + 6 + length
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("takes_partial", [True, False])
@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize(
    ("version", "between", "true"),
    [(6, OPTIONS, HOP6), (6, ROUTING, TRUE6), (4, SOURCE_ROUTE, TRUE4)],
    ids=["options", "routing header", "source route"],
)
def test_what_a_receiver_would_not_recognize_leaves_with_a_whole_and_right_checksum(
    version: int, between: bytes, true: bytes, size: int, *, takes_partial: bool
) -> None:
    frame = odd_frame(between, payload=bytes(range(250)), size=size, version=version, true=true)
    start, own = (40 + len(between), OWN6) if version == 6 else (20 + len(between), OWN4)
    pieces = split(frame, takes_partial=takes_partial)
    assert b"".join(bytes(piece[start + 20 :]) for piece in pieces) == bytes(range(250))
    assert len(pieces) == (3 if size else 1)
    for piece in pieces:
        part = bytes(piece[start:])
        assert plain_checksum(struct.pack(">H", pseudo(own + true, len(part))) + part) == 0


@pytest.mark.parametrize("takes_partial", [True, False])
def test_a_sum_that_the_kernel_leaves_to_a_device_in_another_protocol_is_completed(*, takes_partial: bool) -> None:
    """GRE over IPv4 with a checksum of its own (RFC 2784): `ip tunnel add ... csum`."""
    gre = struct.pack(">HHI", 0x8000, 0x0800, 0) + bytes(range(84))
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(gre), 5, 0, 64, 47, 0) + OWN4 + HOP4
    frame = VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, 4) + head + gre
    assert not is_lone(frame)
    (packet,) = split(frame, takes_partial=takes_partial)
    assert bytes(packet[:20]) == head
    assert bytes(packet[24:26]) != bytes(2)
    assert plain_checksum(bytes(packet[20:])) == 0


def test_where_a_frame_says_that_its_sum_begins() -> None:
    assert VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, 16)[CSUM_START] == 20


def test_a_frame_of_many_small_segments_is_cut_in_time_and_one_of_absurdly_many_is_refused() -> None:
    frame = odd_frame(OPTIONS, payload=bytes(1360 * 48), size=48)
    pieces = split(frame, takes_partial=False)
    assert len(pieces) == 1360
    sequences = [struct.unpack_from(">I", piece, 40 + len(OPTIONS) + 4)[0] for piece in pieces]
    assert sequences == [7 + 48 * number for number in range(1360)]
    with pytest.raises(BadPacketError, match="segments"):
        split(odd_frame(OPTIONS, payload=bytes(60_000), size=1), takes_partial=False)


@pytest.mark.parametrize("words", [2, 3, 4])
def test_a_tcp_header_that_is_shorter_than_itself_is_refused(words: int) -> None:
    frame = bytearray(odd_frame(OPTIONS, payload=bytes(500), size=100))
    frame[VNET_SIZE + 40 + len(OPTIONS) + 12] = words << 4
    with pytest.raises(BadPacketError):
        split(bytes(frame), takes_partial=True)


def test_a_datagram_with_bytes_behind_it_is_handed_over_as_it_is() -> None:
    body = struct.pack(">HHHH", 1000, 2000, 12, 0) + b"data" + b"tail"
    packet = bytearray(ipv4(body))
    partial = pseudo(bytes(packet[12:20]), 0) - 6 + 17 + len(body)
    packet[26:28] = ((partial - 1) % 0xFFFF + 1).to_bytes(2, "big")
    assert single(bytes(packet))[0] == PLAIN
