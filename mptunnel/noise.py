"""The handshake: Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s as WireGuard uses it, its MACs and its cookies.

Nothing is remembered here of a message that does not prove itself: the functions return what they have worked out,
and the caller writes it down only after the last check. Each step bears its Noise token as a comment. What can be
computed once per key (key objects, the static-static product, label keys, the first hash) is, in `StaticKey` and
`Remote`: a responder then spends four X25519 products on a handshake and some 50 us on a stranger's.
Source: WireGuard paper, 5.4; Noise specification revision 34, IKpsk2.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from mptunnel.errors import NotAuthenticError
from mptunnel.messages import (
    COOKIE_REPLY,
    HANDSHAKE_HEADER,
    INITIATION,
    INITIATION_SIZE,
    MAC_SIZE,
    MACS_SIZE,
    RESPONSE,
    RESPONSE_SIZE,
)

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_SIZE: Final = 32
NO_PSK: Final = bytes(KEY_SIZE)
NO_MAC: Final = bytes(MAC_SIZE)
COOKIE_LIFETIME: Final = 120.0  # the server's secret; a client stops using a cookie 5 s earlier
COOKIE_USABLE: Final = 115.0

_CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
_IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
_CHAIN_0 = hashlib.blake2s(_CONSTRUCTION).digest()
_HASH_0 = hashlib.blake2s(_CHAIN_0 + _IDENTIFIER).digest()
_NONCE_0 = bytes(12)
_PROOF_LABEL = b"mptunnel enrol"
_BODY_1 = struct.Struct("<II32s48s28s")  # type, sender, ephemeral, static, timestamp
_BODY_2 = struct.Struct("<III32s16s")  # type, sender, receiver, ephemeral, empty
_REPLY = struct.Struct("<II24s32s")  # type, receiver, nonce, cookie
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")


class StaticKey:
    """Our long-term key pair, with everything about it that is the same for all peers."""

    __slots__ = ("cookie_key", "hash_responder", "mac1_key", "private", "public")

    def __init__(self, private: bytes) -> None:
        self.private = X25519PrivateKey.from_private_bytes(private)
        self.public = self.private.public_key().public_bytes_raw()
        self.hash_responder = _hash(_HASH_0 + self.public)
        self.mac1_key = _hash(b"mac1----" + self.public)
        self.cookie_key = _hash(b"cookie--" + self.public)


class Remote:
    """A peer's public key and our preshared key with it; raises NotAuthenticError for a low-order public key."""

    __slots__ = ("cookie_key", "hash_responder", "mac1_key", "psk", "public", "public_key", "static_static")

    def __init__(self, own: StaticKey, public: bytes, psk: bytes = NO_PSK) -> None:
        self.public = public
        self.psk = psk
        self.public_key = X25519PublicKey.from_public_bytes(public)
        self.static_static = _dh(own.private, self.public_key)
        self.hash_responder = _hash(_HASH_0 + public)
        self.mac1_key = _hash(b"mac1----" + public)
        self.cookie_key = _hash(b"cookie--" + public)


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The transport keys of one handshake, from our point of view, and both indices."""

    send: bytes = field(repr=False)
    receive: bytes = field(repr=False)
    local_index: int
    remote_index: int
    is_initiator: bool


@dataclass(slots=True)
class Initiation:
    """An initiation of ours that waits for its response. `datagram` is complete but for mac2."""

    datagram: bytes
    index: int
    chain: bytes = field(repr=False)
    hash: bytes = field(repr=False)
    ephemeral: X25519PrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Consumed:
    """An initiation that opened: who sent it, when it says it was made, and what the response needs."""

    public: bytes
    timestamp: bytes
    remote_index: int
    chain: bytes = field(repr=False)
    hash: bytes = field(repr=False)
    ephemeral: X25519PublicKey = field(repr=False)


def create_initiation(
    own: StaticKey, remote: Remote, index: int, timestamp: bytes, entropy: Callable[[int], bytes]
) -> Initiation:
    """Make message 1 for `remote`, with mac1 and 16 zero bytes of mac2 (paper, 5.4.2)."""
    ephemeral = X25519PrivateKey.from_private_bytes(entropy(KEY_SIZE))
    public = ephemeral.public_key().public_bytes_raw()
    chain = _kdf1(_CHAIN_0, public)  # e
    digest = _hash(remote.hash_responder + public)
    chain, key = _kdf2(chain, _dh(ephemeral, remote.public_key))  # es
    static = ChaCha20Poly1305(key).encrypt(_NONCE_0, own.public, digest)  # s
    digest = _hash(digest + static)
    chain, key = _kdf2(chain, remote.static_static)  # ss
    sealed_time = ChaCha20Poly1305(key).encrypt(_NONCE_0, timestamp, digest)  # {t}
    digest = _hash(digest + sealed_time)
    body = _BODY_1.pack(INITIATION, index, public, static, sealed_time)
    return Initiation(body + mac(remote.mac1_key, body) + NO_MAC, index, chain, digest, ephemeral)


def prove_key(own: StaticKey, other_public: bytes, join_public: bytes) -> bytes:
    """Return 32 bytes that only the owners of two static keys can make, for the holder of one join token.

    Raises NotAuthenticError for a public key of low order.
    """
    product = _dh(own.private, X25519PublicKey.from_public_bytes(other_public))
    return hashlib.blake2s(_PROOF_LABEL + join_public, key=product).digest()


def consume_initiation(own: StaticKey, message: bytes, static_static: Callable[[bytes], bytes | None]) -> Consumed:
    """Open message 1. `static_static` maps a public key to our product with it, None for a stranger.

    Raises NotAuthenticError; nothing has been stored then. mac1 is the caller's to check first.
    """
    _, index, public, static, sealed_time = _BODY_1.unpack_from(message)
    ephemeral = X25519PublicKey.from_public_bytes(public)
    chain = _kdf1(_CHAIN_0, public)  # e
    digest = _hash(own.hash_responder + public)
    chain, key = _kdf2(chain, _dh(own.private, ephemeral))  # es
    peer = _open(key, static, digest)  # s
    digest = _hash(digest + static)
    product = static_static(peer)
    if product is None:
        raise NotAuthenticError("initiation of a stranger")
    chain, key = _kdf2(chain, product)  # ss
    timestamp = _open(key, sealed_time, digest)  # {t}
    digest = _hash(digest + sealed_time)
    return Consumed(peer, timestamp, index, chain, digest, ephemeral)


def create_response(
    remote: Remote, consumed: Consumed, index: int, entropy: Callable[[int], bytes]
) -> tuple[bytes, SessionKeys]:
    """Make message 2 (with mac1 and zero mac2) and the keys it leads to (paper, 5.4.3)."""
    ephemeral = X25519PrivateKey.from_private_bytes(entropy(KEY_SIZE))
    public = ephemeral.public_key().public_bytes_raw()
    chain = _kdf1(consumed.chain, public)  # e
    digest = _hash(consumed.hash + public)
    chain = _kdf1(chain, _dh(ephemeral, consumed.ephemeral))  # ee
    chain = _kdf1(chain, _dh(ephemeral, remote.public_key))  # se
    chain, tau, key = _kdf3(chain, remote.psk)  # psk
    digest = _hash(digest + tau)
    empty = ChaCha20Poly1305(key).encrypt(_NONCE_0, b"", digest)  # {}
    body = _BODY_2.pack(RESPONSE, index, consumed.remote_index, public, empty)
    receive, send = _kdf2(chain, b"")
    keys = SessionKeys(send, receive, index, consumed.remote_index, is_initiator=False)
    return body + mac(remote.mac1_key, body) + NO_MAC, keys


def consume_response(own: StaticKey, remote: Remote, initiation: Initiation, message: bytes) -> SessionKeys:
    """Open message 2 and derive the keys. Raises NotAuthenticError; the initiation goes on waiting then."""
    _, index, _, public, empty = _BODY_2.unpack_from(message)
    ephemeral = X25519PublicKey.from_public_bytes(public)
    chain = _kdf1(initiation.chain, public)  # e
    digest = _hash(initiation.hash + public)
    chain = _kdf1(chain, _dh(initiation.ephemeral, ephemeral))  # ee
    chain = _kdf1(chain, _dh(own.private, ephemeral))  # se
    chain, tau, key = _kdf3(chain, remote.psk)  # psk
    digest = _hash(digest + tau)
    _open(key, empty, digest)  # {}
    send, receive = _kdf2(chain, b"")
    return SessionKeys(send, receive, initiation.index, index, is_initiator=True)


# -- MACs and cookies (paper, 5.4.4, 5.4.7) ----------------------------------------------------------------


def mac(key: bytes, data: bytes) -> bytes:
    """Keyed BLAKE2s with 16 bytes of output."""
    return hashlib.blake2s(data, key=key, digest_size=MAC_SIZE).digest()


def mac1_is_valid(own: StaticKey, message: bytes) -> bool:
    """Whether the sender of a handshake message knows our public key."""
    return hmac.compare_digest(mac(own.mac1_key, message[:-MACS_SIZE]), message[-MACS_SIZE:-MAC_SIZE])


def with_mac2(datagram: bytes, cookie: bytes) -> bytes:
    """Return a handshake datagram with its mac2 filled in for `cookie`."""
    return datagram[:-MAC_SIZE] + mac(cookie, datagram[:-MAC_SIZE])


def open_cookie(remote: Remote, message: bytes, mac1: bytes) -> bytes:
    """Return the cookie of a reply to the message that bore `mac1`. Raises NotAuthenticError."""
    _, _, nonce, sealed = _REPLY.unpack_from(message)
    return _open(hchacha20(remote.cookie_key, nonce[:16]), sealed, mac1, bytes(4) + nonce[16:])


class CookieMaker:
    """The server under load: says whether a mac2 is ours, and makes replies. Stateless but for a secret of 120 s."""

    __slots__ = ("_entropy", "_expires_at", "_key", "_nonce", "_secret", "_static")

    def __init__(self, own: StaticKey, entropy: Callable[[int], bytes]) -> None:
        self._static = own
        self._entropy = entropy
        self._expires_at = float("-inf")
        self._secret = self._nonce = self._key = b""

    def mac2_is_valid(self, message: bytes, source: bytes, now: float) -> bool:
        """Whether the sender has shown that it receives at `source` (its address and port as bytes)."""
        expected = mac(self._cookie(source, now), message[:-MAC_SIZE])
        return hmac.compare_digest(expected, message[-MAC_SIZE:])

    def reply(self, message: bytes, source: bytes, now: float) -> bytes:
        """Return the 64 bytes that answer a message whose mac2 does not convince."""
        cookie = self._cookie(source, now)
        tail = self._entropy(8)
        sealed = ChaCha20Poly1305(self._key).encrypt(bytes(4) + tail, cookie, message[-MACS_SIZE:-MAC_SIZE])
        _, sender = HANDSHAKE_HEADER.unpack_from(message)
        return _REPLY.pack(COOKIE_REPLY, sender, self._nonce + tail, sealed)

    def _cookie(self, source: bytes, now: float) -> bytes:
        if now >= self._expires_at:
            self._secret = self._entropy(KEY_SIZE)
            self._nonce = self._entropy(16)  # first part of the nonce: one HChaCha20 a period is enough
            self._key = hchacha20(self._static.cookie_key, self._nonce)
            self._expires_at = now + COOKIE_LIFETIME
        return mac(self._secret, source)


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """HChaCha20 of a 16-byte nonce (draft-irtf-cfrg-xchacha-03, 2.2), out of one ordinary ChaCha20 block.

    The block is the permuted state plus the initial one; what we want is the former, first and last row.
    """
    stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
    words = struct.unpack("<16I", stream)
    first = ((w - c) % 2**32 for w, c in zip(words[:4], _SIGMA, strict=True))
    last = ((w - c) % 2**32 for w, c in zip(words[12:], struct.unpack("<4I", nonce), strict=True))
    return struct.pack("<8I", *first, *last)


# -- timestamps (paper, 5.4.2; TAI64N) ---------------------------------------------------------------------

TAI64_EPOCH: Final = 0x400000000000000A
TIMESTAMP_STEP: Final = 1 << 24  # ns: so coarse that they do not show our clock's quality
RESERVATION: Final = 300 * 10**9  # ns: how far ahead the file on disk promises
_TAI64N = struct.Struct(">QI")


def tai64n(nanoseconds: int) -> bytes:
    """Return the 12 bytes of a time in ns since 1970."""
    return _TAI64N.pack(TAI64_EPOCH + nanoseconds // 10**9, nanoseconds % 10**9)


class Timestamps:
    """Times for initiations that never go back, whatever the wall clock does, also not over a restart.

    `reserved` (ns) is what the disk holds: no time up to it will be used again by a later run. A fresh time is the
    wall clock's, but always above the last one and never above the reservation, which is renewed in time.
    `offset` is what must be added to `now` to get the wall clock's time (s since 1970).
    """

    __slots__ = ("_asked", "_last", "_reserved", "offset")

    def __init__(self, reserved: int) -> None:
        self._last = -(-reserved // TIMESTAMP_STEP) * TIMESTAMP_STEP
        self._reserved = reserved
        self._asked = reserved
        self.offset = 0.0

    @property
    def last(self) -> int:
        """The last time used, ns: what a clean stop leaves on disk."""
        return self._last

    def reservation(self, now: float) -> int | None:
        """What to write to disk next (ns), if it is due."""
        floor = max(self._last, int((now + self.offset) * 1e9))
        if self._asked - floor > RESERVATION // 2:
            return None
        self._asked = floor + RESERVATION
        return self._asked

    def reserved(self, until: int) -> None:
        """The disk now holds `until`, or cannot be written: then the clock is all there is."""
        self._reserved = until

    def next(self, now: float) -> bytes:
        """Return a time above all earlier ones, as TAI64N."""
        clock = int((now + self.offset) * 1e9) // TIMESTAMP_STEP * TIMESTAMP_STEP
        step = self._last + TIMESTAMP_STEP
        self._last = max(step, min(clock, self._reserved // TIMESTAMP_STEP * TIMESTAMP_STEP))
        return tai64n(self._last)


# -- primitives --------------------------------------------------------------------------------------------


def _dh(private: X25519PrivateKey, public: X25519PublicKey) -> bytes:
    try:
        return private.exchange(public)
    except ValueError as error:  # an all-zero product: a point of low order
        raise NotAuthenticError("public key of low order") from error


def _open(key: bytes, sealed: bytes, digest: bytes, nonce: bytes = _NONCE_0) -> bytes:
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, digest)
    except InvalidTag as error:
        raise NotAuthenticError("handshake field does not open") from error


def _hash(data: bytes) -> bytes:
    return hashlib.blake2s(data).digest()


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "blake2s")


def _kdf1(chain: bytes, data: bytes) -> bytes:
    return _hmac(_hmac(chain, data), b"\x01")


def _kdf2(chain: bytes, data: bytes) -> tuple[bytes, bytes]:
    secret = _hmac(chain, data)
    first = _hmac(secret, b"\x01")
    return first, _hmac(secret, first + b"\x02")


def _kdf3(chain: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    secret = _hmac(chain, data)
    first = _hmac(secret, b"\x01")
    second = _hmac(secret, first + b"\x02")
    return first, second, _hmac(secret, second + b"\x03")


assert _BODY_1.size == INITIATION_SIZE - MACS_SIZE  # noqa: S101  the layouts are the paper's
assert _BODY_2.size == RESPONSE_SIZE - MACS_SIZE  # noqa: S101
