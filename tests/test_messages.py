"""Layouts on the wire: what is encoded is what is decoded, and nothing else is let in."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel import messages
from mptunnel.errors import BadPacketError
from mptunnel.messages import (
    GAP_UNITS,
    MAX_PATHS,
    OVERHEAD,
    PADDING,
    WHOLE_SESSION,
    Address,
    Capability,
    Challenge,
    Close,
    Control,
    Echo,
    Enrol,
    Enrolled,
    Hello,
    PathReceipt,
    Probe,
    Receipt,
    Record,
    Use,
)

if TYPE_CHECKING:
    from collections.abc import Callable

U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
U32, U64 = st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFFFFFFFFFF)
PATH = st.integers(0, MAX_PATHS - 1)
IPV4 = st.integers(1, 0xFFFFFFFF).map(IPv4Address)
IPV6 = st.integers(1 << 64, (1 << 128) - 1).map(IPv6Address)  # neither zero nor a mapped IPv4 address
RECORDS = st.lists(st.builds(Record, PATH, U16, U32), max_size=MAX_PATHS - 1).map(tuple)
PROBES = st.builds(
    Probe, PATH, U32, U32, U32, U64, U32, U32, U32, U32, U32, U32, U16, st.sampled_from(Use), st.booleans(), RECORDS
)
ECHOS = st.builds(
    Echo, PATH, U32, U32, U32, U64, U64, U32, U32, U32, U32, U16, U16, st.binary(min_size=16, max_size=16),
    st.booleans(), RECORDS,
)  # fmt: skip
CHALLENGES = st.builds(Challenge, PATH, U32, st.binary(min_size=16, max_size=16))
HELLOS = st.builds(Hello, st.booleans(), U8, U8, st.integers(0, sum(Capability)).map(Capability), U64, U16, U8, U8, U32)
ADDRESSES = st.builds(
    Address, st.booleans(), st.booleans(), st.integers(0, 32), st.integers(0, 128), st.none() | IPV4, st.none() | IPV4,
    st.none() | IPV6, st.none() | IPV6, U16, st.lists(IPV4 | IPV6, max_size=4).map(tuple),
)  # fmt: skip
KEYS = st.binary(min_size=32, max_size=32)
ENROLS = st.builds(Enrol, KEYS, st.binary(max_size=32), KEYS)
ENROLLEDS = st.builds(Enrolled, U8, KEYS, KEYS)
GAPS = U32.map(lambda units: units / GAP_UNITS)
RECEIPTS = st.builds(
    Receipt, U32, U32, U32, U32, GAPS, GAPS, U8,
    st.lists(st.builds(PathReceipt, PATH, U32, U32, U32, U32, GAPS, GAPS, U16, U32), max_size=MAX_PATHS).map(tuple),
)  # fmt: skip
CLOSES = st.builds(Close, PATH | st.just(WHOLE_SESSION), U8, U32)

# name: (messages, encode, decode, first bytes, least length)
LAYOUTS: dict[str, tuple[Any, Callable[[Any], bytes], Callable[[memoryview], Any], int, int]] = {
    "probe": (PROBES, Probe.encode, messages.decode_probe_untrusted, 0x01, 52),
    "echo": (ECHOS, Echo.encode, messages.decode_echo_untrusted, 0x02, 68),
    "challenge": (
        CHALLENGES, lambda c: c.encode(Control.CHALLENGE), messages.decode_challenge_untrusted, 0x03, 24,
    ),
    "response": (CHALLENGES, lambda c: c.encode(Control.RESPONSE), messages.decode_challenge_untrusted, 0x04, 24),
    "hello": (HELLOS, Hello.encode, messages.decode_hello_untrusted, 0x05, 32),
    "address": (ADDRESSES, Address.encode, messages.decode_address_untrusted, 0x06, 48),
    "enrol": (ENROLS, Enrol.encode, messages.decode_enrol_untrusted, 0x08, 72),
    "enrolled": (ENROLLEDS, Enrolled.encode, messages.decode_enrolled_untrusted, 0x09, 72),
    "close": (CLOSES, Close.encode, messages.decode_close_untrusted, 0x0A, 8),
    "receipt": (RECEIPTS, Receipt.encode, messages.decode_receipt_untrusted, 0x0B, 28),
}  # fmt: skip
each_layout = pytest.mark.parametrize("name", LAYOUTS)


@each_layout
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_is_encoded_is_decoded(name: str, data: st.DataObject) -> None:
    values, encode, decode, first, least = LAYOUTS[name]
    message = data.draw(values)
    plain = encode(message)
    assert plain[0] == first < 0x10
    assert len(plain) >= least
    assert len(plain) % PADDING == 0
    assert decode(memoryview(plain)) == message


@each_layout
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_a_later_version_appends_is_ignored(name: str, data: st.DataObject) -> None:
    values, encode, decode, _, _ = LAYOUTS[name]
    message = data.draw(values)
    assert decode(memoryview(encode(message) + data.draw(st.binary(max_size=64)))) == message


@each_layout
@settings(deadline=None, max_examples=120)
@given(st.data())
def test_any_bytes_are_decoded_or_refused_as_a_bad_packet(name: str, data: st.DataObject) -> None:
    values, encode, decode, first, _ = LAYOUTS[name]
    if data.draw(st.booleans()):
        body = bytes((first,)) + data.draw(st.binary(max_size=160))
    else:
        mutable = bytearray(encode(data.draw(values)))
        for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(mutable) - 1), U8), max_size=6)):
            mutable[at] = byte
        body = bytes(mutable[: data.draw(st.integers(0, len(mutable)))])
    try:
        decoded = decode(memoryview(body))
    except BadPacketError:
        return
    assert decoded is not None


@each_layout
def test_less_than_the_fixed_fields_is_refused(name: str) -> None:
    _, _, decode, first, least = LAYOUTS[name]
    for length in range(least):
        with pytest.raises(BadPacketError):
            decode(memoryview(bytes((first,)).ljust(length, b"\0")[:length]))
    decode(memoryview(bytes((first,)).ljust(least, b"\0")))


@pytest.mark.parametrize(
    ("name", "at", "size"), [("probe", 52, 8), ("echo", 68, 8), ("address", 48, 16), ("receipt", 28, 32)]
)
def test_fewer_items_than_announced_are_refused(name: str, at: int, size: int) -> None:
    _, _, decode, first, _ = LAYOUTS[name]
    count_at = 14 if name == "address" else 3
    for count in (1, 7, 255):
        body = bytearray(at + count * size)
        body[0], body[count_at] = first, count
        decode(memoryview(bytes(body)))
        with pytest.raises(BadPacketError):
            decode(memoryview(bytes(body[:-1])))


@pytest.mark.parametrize("name", ["probe", "echo", "challenge", "response", "close"])
def test_there_are_eight_paths(name: str) -> None:
    _, _, decode, first, _ = LAYOUTS[name]
    for path in range(256):
        body = memoryview(bytes((first, path)).ljust(80, b"\0"))
        if path < 8 or (name == "close" and path == WHOLE_SESSION):
            assert decode(body).path == path
        else:
            with pytest.raises(BadPacketError):
                decode(body)


# -- layouts, byte by byte (wire.md, 1) --------------------------------------------------------------------


def fields(plain: bytes, *expected: tuple[int, bytes]) -> None:
    """Check that `plain` has these bytes at these offsets, and zeros everywhere else."""
    rest = bytearray(plain)
    for at, value in expected:
        assert plain[at : at + len(value)] == value, f"at {at}"
        rest[at : at + len(value)] = bytes(len(value))
    assert not any(rest)


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def test_the_layout_of_a_probe() -> None:
    probe = Probe(
        3, 0x11121314, 0x21222324, 250, 0x3132333435363738, 0x41424344, 0x51525354, 0x61626364, 0x71727374,
        0x81828384, 0x91929394, 0xA1A2, Use.STANDBY, is_sized=True, records=(Record(5, 0xB1B2, 0xC1C2C3C4),),
    )  # fmt: skip
    fields(
        probe.encode(), (0, b"\x01\x03\x05\x01"), (4, u32(0x11121314)), (8, u32(0x21222324)), (12, u32(250)),
        (16, u64(0x3132333435363738)), (24, u32(0x41424344)), (28, u32(0x51525354)), (32, u32(0x61626364)),
        (36, u32(0x71727374)), (40, u32(0x81828384)), (44, u32(0x91929394)), (48, u16(0xA1A2)),
        (52, b"\x05"), (54, u16(0xB1B2)), (56, u32(0xC1C2C3C4)),
    )  # fmt: skip
    assert len(probe.encode()) == 64
    assert len(probe.encode(1420)) == 1420


def test_the_layout_of_an_echo() -> None:
    address = bytes.fromhex("00000000000000000000ffffc0000201")
    echo = Echo(
        2, 0x11121314, 0x21222324, 0x31323334, 0x4142434445464748, 0x5152535455565758, 0x61626364, 0x71727374,
        0x81828384, 0x91929394, 0xA1A2, 0xB1B2, address, is_unasked=True, records=(Record(1, 2, 3), Record(4, 5, 6)),
    )  # fmt: skip
    fields(
        echo.encode(), (0, b"\x02\x02\x01\x02"), (4, u32(0x11121314)), (8, u32(0x21222324)), (12, u32(0x31323334)),
        (16, u64(0x4142434445464748)), (24, u64(0x5152535455565758)), (32, u32(0x61626364)), (36, u32(0x71727374)),
        (40, u32(0x81828384)), (44, u32(0x91929394)), (48, u16(0xA1A2)), (50, u16(0xB1B2)), (52, address),
        (68, b"\x01\0\x02\0\x03\0\0\0"), (76, b"\x04\0\x05\0\x06\0\0\0"),
    )  # fmt: skip


def test_the_layout_of_a_challenge_and_its_response() -> None:
    challenge = Challenge(7, 0x11121314, bytes(range(16)))
    for kind in (Control.CHALLENGE, Control.RESPONSE):
        fields(
            challenge.encode(kind), (0, bytes((kind, 7))), (4, u32(0x11121314)), (8, bytes(range(16)))
        )  # fmt: skip


def test_the_layout_of_a_hello() -> None:
    hello = Hello(True, 1, 1, Capability.MULTIPATH | Capability.MODES, 0x2122232425262728, 1420, 3, 2, 0x31323334)
    fields(
        hello.encode(), (0, b"\x05\x01\x01\x01"), (4, u32(9)), (8, u64(0x2122232425262728)), (16, u16(1420)),
        (18, b"\x03\x02"), (20, u32(0x31323334)),
    )  # fmt: skip
    assert len(hello.encode()) == 32


def test_the_layout_of_an_address() -> None:
    client6, server6 = IPv6Address("fd00::2"), IPv6Address("fd00::1")
    dns = (IPv4Address("9.9.9.9"), IPv6Address("2620:fe::fe"))
    address = Address(True, True, 24, 64, IPv4Address("10.0.1.2"), IPv4Address("10.0.1.1"), client6, server6, 1420, dns)
    fields(
        address.encode(), (0, bytes((6, 3, 24, 64))), (4, b"\x0a\0\x01\x02\x0a\0\x01\x01"), (12, u16(1420)),
        (14, b"\x02\0"), (16, client6.packed), (32, server6.packed),
        (48, bytes.fromhex("00000000000000000000ffff09090909")), (64, dns[1].packed),
    )  # fmt: skip


def test_the_layouts_of_joining_and_of_close() -> None:
    key, psk = bytes(range(32)), bytes(range(32, 64))
    fields(Enrol(key, b"laptop").encode(), (0, b"\x08\0\x06\x01"), (8, key), (40, b"laptop"))
    fields(Enrol(key, b"laptop", psk).encode(), (0, b"\x08\0\x06\x01"), (8, key), (40, b"laptop"), (72, psk))
    fields(Enrolled(2, key, psk).encode(), (0, b"\x09\x02"), (8, key), (40, psk))
    fields(Close(5, 3, 0x11121314).encode(), (0, b"\x0a\x05\x03\0"), (4, u32(0x11121314)))


def test_the_layout_of_a_receipt() -> None:
    of = PathReceipt(5, 0x11121314, 0x21222324, 0x31323334, 0x41424344, 1.2345, 0.0001, 0x5152, 0x61626364)
    receipt = Receipt(0x11111111, 0x22222222, 0x33333333, 0x44444444, 0.5, 119 * 3600.0, 0xA5, (of,))
    fields(
        receipt.encode(), (0, b"\x0b\xa5\x00\x01"), (4, u32(0x11111111)), (8, u32(0x22222222)), (12, u32(0x33333333)),
        (16, u32(0x44444444)), (20, u32(5000)), (24, u32(119 * 36_000_000)), (28, b"\x05"), (30, u16(0x5152)),
        (32, u32(0x11121314)), (36, u32(0x21222324)), (40, u32(0x31323334)), (44, u32(0x41424344)), (48, u32(12345)),
        (52, u32(1)), (56, u32(0x61626364)),
    )  # fmt: skip


def test_a_receipt_of_eight_paths_is_one_small_datagram() -> None:
    receipt = Receipt(records=tuple(PathReceipt(path) for path in range(MAX_PATHS)))
    assert len(receipt.encode()) + OVERHEAD == 320
    assert len(Receipt(records=receipt.records[:2]).encode()) + OVERHEAD + 28 == 156


def test_what_a_receipt_cannot_say_goes_round_and_a_gap_stops_at_119_hours() -> None:
    many = (1 << 32) + 5
    of = PathReceipt(0, many, many, many, many, 1e9, 1e9, (1 << 16) + 7, many)
    said = messages.decode_receipt_untrusted(memoryview(Receipt(many, many, many, many, 1e9, 1e9, 1, (of,)).encode()))
    assert (said.packets, said.received, said.lost, said.saved) == (5, 5, 5, 5)
    assert said.gap == said.recent == said.records[0].gap == said.records[0].recent > 119 * 3600
    assert said.records[0].bridged == 7
    assert said.records[0].given == said.records[0].lost == said.records[0].first == said.records[0].bridged_ms == 5


def test_what_a_receipt_says_of_paths_that_cannot_be_is_skipped() -> None:
    body = bytearray(Receipt(records=(PathReceipt(1), PathReceipt(2))).encode())
    body[28] = 8
    assert messages.decode_receipt_untrusted(memoryview(bytes(body))).records == (PathReceipt(2),)


def test_sizes_on_an_ipv4_wire_are_those_of_the_document() -> None:
    on_the_wire = 28 + OVERHEAD
    record = (Record(1, 0, 0),)
    assert on_the_wire + len(Probe(0, 1, 1, 250, 0, 0, 0, 0, records=record).encode()) == 124
    assert on_the_wire + len(Echo(0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, bytes(16), records=record).encode()) == 140
    assert on_the_wire + len(Challenge(0, 1, bytes(16)).encode(Control.CHALLENGE)) == 92
    assert on_the_wire + len(Hello(False, 1, 1, Capability(1), 1, 1280, 0, 2, 1).encode()) == 92
    dns = (IPv4Address("9.9.9.9"), IPv4Address("149.112.112.112"))
    assert on_the_wire + len(Address(True, False, 24, 64, None, None, None, None, 1420, dns).encode()) == 140


def test_sizes_of_wireguard_are_those_of_the_paper() -> None:
    assert (messages.INITIATION_SIZE, messages.RESPONSE_SIZE, messages.COOKIE_REPLY_SIZE) == (148, 92, 64)
    assert (messages.HEADER_SIZE, messages.OVERHEAD) == (16, 32)
    assert messages.TRANSPORT_HEADER.pack(4, 0x55667788, 1).hex() == "04000000887766550100000000000000"


# -- odd values --------------------------------------------------------------------------------------------


def test_counts_are_sent_modulo_2_to_the_32_and_times_at_most() -> None:
    many = (1 << 32) + 5
    probe = messages.decode_probe_untrusted(
        memoryview(Probe(0, 1, 1, 1, 0, many, many + 1, many + 2, rtt_us=many, queue_us=many).encode())
    )
    assert (probe.tx, probe.rx, probe.packets, probe.rtt_us, probe.queue_us) == (5, 6, 7, many - 6, many - 6)
    echo = messages.decode_echo_untrusted(
        memoryview(Echo(0, 1, 1, 1, 0, 0, many, many, many + 1, many + 2, 0, 0, bytes(16)).encode())
    )
    assert (echo.held_us, echo.tx, echo.rx, echo.packets) == (many - 6, 5, 6, 7)


def test_a_record_as_old_as_can_be_said_or_older_is_no_news() -> None:
    probe = Probe(0, 1, 1, 1, 0, 0, 0, 0, records=(Record(1, 70_000, 4),))
    assert messages.decode_probe_untrusted(memoryview(probe.encode())).records == (Record(1, messages.NO_NEWS, 4),)


def test_records_of_paths_that_cannot_be_are_skipped() -> None:
    body = bytearray(Probe(0, 1, 1, 1, 0, 0, 0, 0, records=(Record(1, 2, 3), Record(2, 3, 4))).encode())
    body[52] = 8
    assert messages.decode_probe_untrusted(memoryview(bytes(body))).records == (Record(2, 3, 4),)


def test_unknown_flags_and_capabilities_are_ignored() -> None:
    probe = bytearray(Probe(0, 1, 1, 1, 0, 0, 0, 0).encode())
    for flags, use, is_sized in [(0xF8, Use.DATA, False), (0x03, Use.PROBES, False), (0xFD, Use.STANDBY, True)]:
        probe[2] = flags
        decoded = messages.decode_probe_untrusted(memoryview(bytes(probe)))
        assert (decoded.use, decoded.is_sized) == (use, is_sized)
    hello = bytearray(Hello(False, 1, 1, Capability.MULTIPATH, 1, 1280, 0, 2, 1).encode())
    hello[1], hello[7] = 0xFE, 0xFF
    decoded_hello = messages.decode_hello_untrusted(memoryview(bytes(hello)))
    assert (decoded_hello.is_answer, decoded_hello.capabilities) == (False, Capability.MULTIPATH)


def test_a_name_longer_than_its_field_and_prefixes_longer_than_addresses_are_refused() -> None:
    enrol = bytearray(Enrol(bytes(32), b"n" * 32).encode())
    assert messages.decode_enrol_untrusted(memoryview(bytes(enrol))).name == b"n" * 32
    of_version_1 = memoryview(Enrol(bytes(32), b"van", b"\7" * 32).encode()[:72])
    assert messages.decode_enrol_untrusted(of_version_1) == Enrol(bytes(32), b"van", bytes(32))
    enrol[2] = 33
    with pytest.raises(BadPacketError):
        messages.decode_enrol_untrusted(memoryview(bytes(enrol)))
    for prefix4, prefix6 in [(33, 64), (24, 129)]:
        address = bytearray(Address(True, True, 24, 64, None, None, None, None, 1420).encode())
        address[2], address[3] = prefix4, prefix6
        with pytest.raises(BadPacketError):
            messages.decode_address_untrusted(memoryview(bytes(address)))


@settings(deadline=None)
@given(IPV4 | IPV6)
def test_an_address_is_packed_and_unpacked(address: IPv4Address | IPv6Address) -> None:
    packed = messages.pack_address(address)
    assert len(packed) == 16
    assert messages.unpack_address(packed) == address
    assert messages.address_text(packed) == str(address)


def test_an_address_is_read_as_the_kernel_writes_it() -> None:
    assert messages.parse_address("192.0.2.1") == IPv4Address("192.0.2.1")
    assert messages.parse_address("fe80::1%eth0") == IPv6Address("fe80::1")
    mapped = messages.parse_address("::ffff:192.0.2.1")
    assert messages.pack_address(mapped) == messages.pack_address(IPv4Address("192.0.2.1"))


def test_the_layouts_are_the_formats_of_the_document() -> None:
    formats = {
        "_PROBE": "<BBBBIIIQIIIIIIHH", "_ECHO": "<BBBBIIIQQIIIIHH16s", "_RECORD": "<BBHI", "_CHALLENGE": "<BBBBI16s",
        "_HELLO": "<BBBBIQHBBI8x", "_ADDRESS": "<BBBB4s4sHBB16s16s", "_ENROL": "<BBBBI32s32s", "_CLOSE": "<BBBBI",
        "_RECEIPT": "<BBBBIIIIII", "_PATH_RECEIPT": "<BBHIIIIIII",
    }  # fmt: skip
    for name, layout in formats.items():
        assert getattr(messages, name).format == struct.Struct(layout).format
