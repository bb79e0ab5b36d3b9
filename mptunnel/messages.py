"""Every layout on the wire: WireGuard's four messages, and the control messages that travel inside type 4.

All integers are little-endian; IP addresses are in network order, IPv4 as ::ffff:a.b.c.d where 16 bytes are given.
A control message is the plaintext of a type 4 datagram whose first byte is below 0x10: an IP packet begins with
0x45 or 0x60, so the two cannot be taken for one another, and a stock peer drops what it does not know. Fields are
only ever appended; a receiver asks for the length of version 1 and ignores what follows, padding included. What they
say is in named tuples: a frozen dataclass of fifteen fields takes ten times as long to make.
"""

from __future__ import annotations

import enum
import struct
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from mptunnel.errors import BadPacketError

# -- WireGuard's messages (protocol paper, 5.4) ------------------------------------------------------------

INITIATION: Final = 1
RESPONSE: Final = 2
COOKIE_REPLY: Final = 3
TRANSPORT: Final = 4

INITIATION_SIZE: Final = 148
RESPONSE_SIZE: Final = 92
COOKIE_REPLY_SIZE: Final = 64
MACS_SIZE: Final = 32  # mac1 and mac2 end an initiation and a response
MAC_SIZE: Final = 16
HEADER_SIZE: Final = 16  # type, receiver index, counter
TAG_SIZE: Final = 16
OVERHEAD: Final = HEADER_SIZE + TAG_SIZE
PADDING: Final = 16

TRANSPORT_HEADER: Final = struct.Struct("<IIQ")  # type, receiver index, counter
HANDSHAKE_HEADER: Final = struct.Struct("<II")  # type, sender index

# -- control messages --------------------------------------------------------------------------------------

MAX_PATHS: Final = 8
WHOLE_SESSION: Final = 255
PROTOCOL_VERSION: Final = 1
_MOD32: Final = 1 << 32

# type path flags n incarnation seq interval sent tx rx packets echoed rtt queue rx_size 0
_PROBE: Final = struct.Struct("<BBBBIIIQIIIIIIHH")
# type path flags n incarnation seq number probe sent held tx rx packets rx_size port address
_ECHO: Final = struct.Struct("<BBBBIIIQQIIIIHH16s")
_RECORD: Final = struct.Struct("<BBHI")  # path 0 age newest
_CHALLENGE: Final = struct.Struct("<BBBBI16s")  # type path 0 0 incarnation token
_HELLO: Final = struct.Struct("<BBBBIQHBBI8x")  # type flags version oldest capabilities instance mtu mode paths serial
_ADDRESS: Final = struct.Struct(
    "<BBBB4s4sHBB16s16s"
)  # type flags prefix4 prefix6 client4 server4 mtu dns routes client6 server6
_ENROL: Final = struct.Struct("<BBBBI32s32s")  # type flags length version 0 public_key name
_PROOF: Final = struct.Struct("<32s")  # behind an ENROL
_ENROLLED: Final = struct.Struct("<BBHI32s32s")  # type result 0 0 public_key psk
_CLOSE: Final = struct.Struct("<BBBBI")  # type path reason 0 incarnation
_RECEIPT: Final = struct.Struct("<BBBBIIIIII")  # type paths flags n packets received lost saved gap recent
_PATH_RECEIPT: Final = struct.Struct("<BBHIIIIIII")  # path 0 bridged given lost first missed gap recent bridged_ms


class Control(enum.IntEnum):
    """First byte of a control message."""

    PROBE = 0x01
    ECHO = 0x02
    CHALLENGE = 0x03
    RESPONSE = 0x04
    HELLO = 0x05
    ADDRESS = 0x06
    FEC = 0x07
    ENROL = 0x08
    ENROLLED = 0x09
    CLOSE = 0x0A
    RECEIPT = 0x0B


class Use(enum.IntEnum):
    """What a client wants a path for (bits 0 and 1 of a probe's flags)."""

    DATA = 0
    STANDBY = 1
    PROBES = 2


class Capability(enum.IntFlag):
    """What a HELLO offers; used only where both sides offer it."""

    MULTIPATH = 1
    PARTIAL_CHECKSUMS = 2
    FEC = 4
    MODES = 8


class EnrolResult(enum.IntEnum):
    """The server's answer to an ENROL."""

    ADMITTED = 0
    USED = 1
    EXPIRED = 2
    REVOKED = 3
    NO_ADDRESS = 4
    NAME_REFUSED = 5
    KEY_REFUSED = 6
    TRY_AGAIN = 7


class CloseReason(enum.IntEnum):
    """Why a side closes a path or the session."""

    STOP = 0
    RESTART = 1
    INTERFACE_GONE = 2
    TAKEN_OFF = 3
    NOT_ADMITTED = 4


_USES: Final = (*Use, Use.PROBES)  # by bits 0 and 1
PROBE_ECHO_AT_SIZE: Final = 4  # flag bit 2
ECHO_UNASKED: Final = 1  # flag bit 0
HELLO_ANSWER: Final = 1  # flag bit 0
ADDRESS_IPV4_ONWARD: Final = 1
ADDRESS_IPV6_ONWARD: Final = 2
GAP_UNITS: Final = 10_000  # a second, in the unit of a RECEIPT's gaps; the longest that can be said is 119 hours
NO_NEWS: Final = 0xFFFF  # a record's age when it is 65,535 ms or longer


class Record(NamedTuple):
    """What one side heard on another path last: the number of an ECHO (or seq of a PROBE) and its age in ms."""

    path: int
    age_ms: int
    newest: int


class Probe(NamedTuple):
    """Client to server: this path is here, and so much went over it. Counts are sent modulo 2^32."""

    path: int
    incarnation: int
    seq: int
    interval_ms: int
    sent_us: int
    tx: int
    rx: int
    packets: int
    echoed: int = 0
    rtt_us: int = 0
    queue_us: int = 0
    rx_size: int = 0
    use: Use = Use.DATA
    is_sized: bool = False
    records: tuple[Record, ...] = ()

    def encode(self, size: int = 0) -> bytes:
        """Return the plaintext, zero-padded to `size` bytes or the next multiple of 16."""
        flags = self.use | (PROBE_ECHO_AT_SIZE if self.is_sized else 0)
        fixed = _PROBE.pack(
            Control.PROBE,
            self.path,
            flags,
            len(self.records),
            self.incarnation,
            self.seq % _MOD32,
            self.interval_ms,
            self.sent_us,
            self.tx % _MOD32,
            self.rx % _MOD32,
            self.packets % _MOD32,
            self.echoed % _MOD32,
            min(self.rtt_us, _MOD32 - 1),
            min(self.queue_us, _MOD32 - 1),
            self.rx_size,
            0,
        )
        return _padded(fixed + _encode_records(self.records), size)


def decode_probe_untrusted(body: memoryview) -> Probe:
    """Parse a PROBE. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _PROBE.size, "probe")
    (_, path, flags, n, incarnation, seq, interval, sent, tx, rx, packets, echoed, rtt, queue, rx_size, _) = (
        _PROBE.unpack_from(body)
    )
    _check_path(path, "probe")
    use = _USES[flags & 3]
    records = _decode_records(body, _PROBE.size, n)
    return Probe(
        path,
        incarnation,
        seq,
        interval,
        sent,
        tx,
        rx,
        packets,
        echoed,
        rtt,
        queue,
        rx_size,
        use,
        bool(flags & PROBE_ECHO_AT_SIZE),
        records,
    )


class Echo(NamedTuple):
    """Server to client on a bound path: the answer to a PROBE, or (seq, probe and held 0) an unasked sign of life."""

    path: int
    incarnation: int
    seq: int
    number: int
    probe_us: int
    sent_us: int
    held_us: int
    tx: int
    rx: int
    packets: int
    rx_size: int
    port: int
    address: bytes
    is_unasked: bool = False
    records: tuple[Record, ...] = ()

    def encode(self, size: int = 0) -> bytes:
        """Return the plaintext, zero-padded to `size` bytes or the next multiple of 16."""
        fixed = _ECHO.pack(
            Control.ECHO,
            self.path,
            ECHO_UNASKED if self.is_unasked else 0,
            len(self.records),
            self.incarnation,
            self.seq % _MOD32,
            self.number % _MOD32,
            self.probe_us,
            self.sent_us,
            min(self.held_us, _MOD32 - 1),
            self.tx % _MOD32,
            self.rx % _MOD32,
            self.packets % _MOD32,
            self.rx_size,
            self.port,
            self.address,
        )
        return _padded(fixed + _encode_records(self.records), size)


def decode_echo_untrusted(body: memoryview) -> Echo:
    """Parse an ECHO. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _ECHO.size, "echo")
    (_, path, flags, n, incarnation, seq, number, probe, sent, held, tx, rx, packets, rx_size, port, address) = (
        _ECHO.unpack_from(body)
    )
    _check_path(path, "echo")
    records = _decode_records(body, _ECHO.size, n)
    return Echo(
        path,
        incarnation,
        seq,
        number,
        probe,
        sent,
        held,
        tx,
        rx,
        packets,
        rx_size,
        port,
        address,
        bool(flags & ECHO_UNASKED),
        records,
    )


class Challenge(NamedTuple):
    """16 random bytes to an address that claims a path (CHALLENGE), and the same bytes back from there (RESPONSE)."""

    path: int
    incarnation: int
    token: bytes

    def encode(self, kind: Control) -> bytes:
        """Return the plaintext of a CHALLENGE or a RESPONSE, as `kind` says."""
        return _padded(_CHALLENGE.pack(kind, self.path, 0, 0, self.incarnation, self.token))


def decode_challenge_untrusted(body: memoryview) -> Challenge:
    """Parse a CHALLENGE or a RESPONSE. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _CHALLENGE.size, "challenge")
    _, path, _, _, incarnation, token = _CHALLENGE.unpack_from(body)
    _check_path(path, "challenge")
    return Challenge(path, incarnation, token)


class Hello(NamedTuple):
    """The first message under a session: who speaks, which version, what is offered. `mtu` 0 means 1280."""

    is_answer: bool
    version: int
    oldest: int
    capabilities: Capability
    instance: int
    mtu: int
    mode: int
    paths: int
    serial: int

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _padded(
            _HELLO.pack(
                Control.HELLO,
                HELLO_ANSWER if self.is_answer else 0,
                self.version,
                self.oldest,
                self.capabilities,
                self.instance,
                self.mtu,
                self.mode,
                self.paths,
                self.serial,
            )
        )


def decode_hello_untrusted(body: memoryview) -> Hello:
    """Parse a HELLO; unknown capabilities are dropped. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _HELLO.size, "hello")
    _, flags, version, oldest, capabilities, instance, mtu, mode, paths, serial = _HELLO.unpack_from(body)
    known = Capability(capabilities & sum(Capability))
    return Hello(bool(flags & HELLO_ANSWER), version, oldest, known, instance, mtu, mode, paths, serial)


class Address(NamedTuple):
    """What the server gives a client: its addresses in the tunnel, the largest MTU, resolvers."""

    ipv4_onward: bool
    ipv6_onward: bool
    prefix4: int
    prefix6: int
    client4: IPv4Address | None
    server4: IPv4Address | None
    client6: IPv6Address | None
    server6: IPv6Address | None
    mtu: int
    dns: tuple[IPv4Address | IPv6Address, ...] = ()

    def encode(self) -> bytes:
        """Return the plaintext."""
        flags = (ADDRESS_IPV4_ONWARD if self.ipv4_onward else 0) | (ADDRESS_IPV6_ONWARD if self.ipv6_onward else 0)
        fixed = _ADDRESS.pack(
            Control.ADDRESS,
            flags,
            self.prefix4,
            self.prefix6,
            _packed(self.client4, 4),
            _packed(self.server4, 4),
            self.mtu,
            len(self.dns),
            0,
            _packed(self.client6, 16),
            _packed(self.server6, 16),
        )
        return _padded(fixed + b"".join(pack_address(a) for a in self.dns))


def decode_address_untrusted(body: memoryview) -> Address:
    """Parse an ADDRESS; routes are for a later version. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _ADDRESS.size, "address")
    _, flags, prefix4, prefix6, client4, server4, mtu, dns, _, client6, server6 = _ADDRESS.unpack_from(body)
    _need(body, _ADDRESS.size + 16 * dns, "address")
    if prefix4 > 32 or prefix6 > 128:
        raise BadPacketError(f"address with prefixes of {prefix4} and {prefix6} bits")
    resolvers = tuple(
        unpack_address(bytes(body[_ADDRESS.size + 16 * i : _ADDRESS.size + 16 * i + 16])) for i in range(dns)
    )
    return Address(
        bool(flags & ADDRESS_IPV4_ONWARD),
        bool(flags & ADDRESS_IPV6_ONWARD),
        prefix4,
        prefix6,
        _address4(client4),
        _address4(server4),
        _address6(client6),
        _address6(server6),
        mtu,
        resolvers,
    )


class Enrol(NamedTuple):
    """A client's real public key and its name, sent in the join session; the server checks the name's letters.

    `proof`: that the client has the private key too (see `noise.prove_key`); zeros: not given.
    """

    public_key: bytes
    name: bytes
    proof: bytes = bytes(32)

    def encode(self) -> bytes:
        """Return the plaintext."""
        fixed = _ENROL.pack(Control.ENROL, 0, len(self.name), PROTOCOL_VERSION, 0, self.public_key, self.name)
        return _padded(fixed + self.proof)


def decode_enrol_untrusted(body: memoryview) -> Enrol:
    """Parse an ENROL. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _ENROL.size, "enrol")
    _, _, length, _, _, public_key, name = _ENROL.unpack_from(body)
    if length > len(name):
        raise BadPacketError(f"enrol with a name of {length} bytes, at most {len(name)} are possible")
    (proof,) = _PROOF.unpack_from(body, _ENROL.size) if len(body) >= _ENROL.size + _PROOF.size else (bytes(32),)
    return Enrol(public_key, name[:length], proof)


class Enrolled(NamedTuple):
    """The server's answer: admitted (with a preshared key) or why not. An unknown result means refused."""

    result: int
    public_key: bytes
    psk: bytes

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _padded(_ENROLLED.pack(Control.ENROLLED, self.result, 0, 0, self.public_key, self.psk))


def decode_enrolled_untrusted(body: memoryview) -> Enrolled:
    """Parse an ENROLLED. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _ENROLLED.size, "enrolled")
    _, result, _, _, public_key, psk = _ENROLLED.unpack_from(body)
    return Enrolled(result, public_key, psk)


class Close(NamedTuple):
    """A path (or, `path` 255, the whole session) ends now and on purpose."""

    path: int
    reason: int
    incarnation: int = 0

    def encode(self) -> bytes:
        """Return the plaintext."""
        return _padded(_CLOSE.pack(Control.CLOSE, self.path, self.reason, 0, self.incarnation))


def decode_close_untrusted(body: memoryview) -> Close:
    """Parse a CLOSE. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _CLOSE.size, "close")
    _, path, reason, _, incarnation = _CLOSE.unpack_from(body)
    if path != WHOLE_SESSION:
        _check_path(path, "close")
    return Close(path, reason, incarnation)


class PathReceipt(NamedTuple):
    """One path's part of a RECEIPT: what it brought, what it cost, and what it alone would have meant.

    `given` and `lost` are type 4 datagrams by the counts of both ends, `first` and `missed` IP packets: those that it
    brought first, and those that only others brought. `gap` is its longest silence in which packets were due, `recent`
    the longest of the last minute (s); `bridged` counts those that other paths bridged, `bridged_ms` is how long they
    were together.
    """

    path: int
    given: int = 0
    lost: int = 0
    first: int = 0
    missed: int = 0
    gap: float = 0.0
    recent: float = 0.0
    bridged: int = 0
    bridged_ms: int = 0


class Receipt(NamedTuple):
    """The receiver's account of one direction since it has known the sender's `instance`; counts are modulo 2^32.

    `paths` has a bit for each path that copies are expected on; gaps are in s.
    """

    packets: int = 0
    received: int = 0
    lost: int = 0
    saved: int = 0
    gap: float = 0.0
    recent: float = 0.0
    paths: int = 0
    records: tuple[PathReceipt, ...] = ()

    def encode(self) -> bytes:
        """Return the plaintext: at most 288 bytes."""
        return _padded(
            _RECEIPT.pack(
                Control.RECEIPT,
                self.paths,
                0,
                len(self.records),
                self.packets % _MOD32,
                self.received % _MOD32,
                self.lost % _MOD32,
                self.saved % _MOD32,
                _gap_units(self.gap),
                _gap_units(self.recent),
            )
            + b"".join(map(_encode_path_receipt, self.records))
        )


def decode_receipt_untrusted(body: memoryview) -> Receipt:
    """Parse a RECEIPT. Raises BadPacketError on malformed input, and nothing else."""
    _need(body, _RECEIPT.size, "receipt")
    _, paths, _, n, packets, received, lost, saved, gap, recent = _RECEIPT.unpack_from(body)
    _need(body, _RECEIPT.size + n * _PATH_RECEIPT.size, "receipt")
    records = []
    for number in range(n):
        path, _, bridged, given, path_lost, first, missed, path_gap, path_recent, bridged_ms = (
            _PATH_RECEIPT.unpack_from(body, _RECEIPT.size + number * _PATH_RECEIPT.size)
        )
        if path < MAX_PATHS:
            gaps = (path_gap / GAP_UNITS, path_recent / GAP_UNITS)
            records.append(PathReceipt(path, given, path_lost, first, missed, *gaps, bridged, bridged_ms))
    return Receipt(packets, received, lost, saved, gap / GAP_UNITS, recent / GAP_UNITS, paths, tuple(records))


def pack_address(address: IPv4Address | IPv6Address) -> bytes:
    """Return the 16 bytes of an address; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    return address.packed if isinstance(address, IPv6Address) else b"\0" * 10 + b"\xff\xff" + address.packed


def unpack_address(packed: bytes) -> IPv4Address | IPv6Address:
    """Return the address of 16 bytes, an IPv4 one where it is mapped."""
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


@lru_cache(maxsize=1024)  # every ECHO has one, and nearly always the same
def address_text(packed: bytes) -> str:
    """Return the address of 16 bytes as people write it."""
    return str(unpack_address(packed))


@lru_cache(maxsize=1024)
def packed_host(host: str) -> bytes:
    """Return the 16 bytes of an address that the kernel wrote as `host`."""
    return pack_address(parse_address(host))


@lru_cache(maxsize=1024)
def parse_address(text: str) -> IPv4Address | IPv6Address:
    """Return the address that the kernel wrote as `text`; a scope behind it is dropped."""
    return IPv6Address(text.partition("%")[0]) if ":" in text else IPv4Address(text)


def _need(body: memoryview, size: int, what: str) -> None:
    if len(body) < size:
        raise BadPacketError(f"{what} of {len(body)} bytes, at least {size} expected")


def _check_path(path: int, what: str) -> None:
    if path >= MAX_PATHS:
        raise BadPacketError(f"{what} for path {path}, there are {MAX_PATHS} at most")


def _padded(plain: bytes, size: int = 0) -> bytes:
    return plain.ljust(max(size, -(-len(plain) // PADDING) * PADDING), b"\0")


def seconds_between(from_us: int, to_us: int) -> float:
    """Return how long it is from one us of a PROBE or ECHO to another, which may be of another clock (modulo 2^64)."""
    return ((to_us - from_us + (1 << 63)) % (1 << 64) - (1 << 63)) / 1e6


def _encode_records(records: tuple[Record, ...]) -> bytes:
    return b"".join(_RECORD.pack(r.path, 0, min(r.age_ms, NO_NEWS), r.newest % _MOD32) for r in records)


def _decode_records(body: memoryview, at: int, n: int) -> tuple[Record, ...]:
    _need(body, at + n * _RECORD.size, "message with records")
    found = (_RECORD.unpack_from(body, at + i * _RECORD.size) for i in range(n))
    return tuple(Record(path, age, newest) for path, _, age, newest in found if path < MAX_PATHS)


def _gap_units(gap: float) -> int:
    return min(round(gap * GAP_UNITS), _MOD32 - 1)


def _encode_path_receipt(of: PathReceipt) -> bytes:
    return _PATH_RECEIPT.pack(
        of.path,
        0,
        of.bridged % (1 << 16),
        of.given % _MOD32,
        of.lost % _MOD32,
        of.first % _MOD32,
        of.missed % _MOD32,
        _gap_units(of.gap),
        _gap_units(of.recent),
        of.bridged_ms % _MOD32,
    )


def _packed(address: IPv4Address | IPv6Address | None, size: int) -> bytes:
    return b"\0" * size if address is None else address.packed


def _address4(packed: bytes) -> IPv4Address | None:
    return IPv4Address(packed) if any(packed) else None


def _address6(packed: bytes) -> IPv6Address | None:
    return IPv6Address(packed) if any(packed) else None
