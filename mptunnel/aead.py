"""ChaCha20-Poly1305 as type 4 uses it: no additional data, and a nonce that is a counter (paper, 5.4.6; RFC 8439, 2.8).

Two implementations of the same thing, which a `Session` uses without knowing which it has:

* AWS-LC, through the extension module of qh3. One function seals or opens, so a full packet costs half of what it costs
  with OpenSSL and a small one a quarter, and half where caches are cold, as a packet that comes alone finds them.
  That module is no public interface. So it is looked for, loaded without the QUIC library around it, and used only if
  it seals like the other one and refuses what has been altered;
* OpenSSL, through cryptography, which spends most of a call on setting it up. It is always there.

A nonce is what `nonce` and `nonces` return for a counter; its form is the implementation's own.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from importlib import machinery, util
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mypy_extensions import i64

    _Function = Callable[[Any, bytes, bytes], bytes]

KEY_SIZE: Final = 32
NO_DATA: Final = b""  # additional data, the last argument of `encrypt` and `decrypt`

_PREFIX: Final = bytes(4)
_LITTLE: Final = struct.Struct("<Q")


class Aead(Protocol):
    """One key. `encrypt(nonce, plain, NO_DATA)` and `decrypt(nonce, sealed, NO_DATA)` take and return bytes."""

    name: ClassVar[str]
    Forged: ClassVar[type[Exception]]  # raised by `decrypt` for what is not authentic
    encrypt: _Function
    decrypt: _Function

    def __init__(self, key: bytes) -> None: ...

    @staticmethod
    def nonce(counter: int) -> Any:
        """Return the nonce for a counter, 0 to 2^64 - 1."""

    @staticmethod
    def nonces(counters: Sequence[int]) -> Sequence[Any]:
        """Return a nonce for each counter."""


class OpenSsl:
    """OpenSSL's, with nonces of 12 bytes: four zeros, then the counter."""

    name: ClassVar[str] = "openssl"
    Forged: ClassVar[type[Exception]] = InvalidTag
    __slots__ = ("decrypt", "encrypt")

    def __init__(self, key: bytes) -> None:
        cipher = ChaCha20Poly1305(key)
        self.encrypt: _Function = cipher.encrypt
        self.decrypt: _Function = cipher.decrypt

    @staticmethod
    def nonce(counter: int) -> bytes:
        """Return the nonce for a counter."""
        return _PREFIX + _LITTLE.pack(counter)

    @staticmethod
    def nonces(counters: Sequence[int]) -> tuple[bytes, ...]:
        """Return a nonce for each counter."""
        write, read = _layouts("4xQ", "12s", len(counters))
        return read.unpack(write.pack(*counters))


class AwsLc:
    """AWS-LC's. Made for QUIC, it adds a number to an IV as big-endian; ours is little-endian, and the IV is 0."""

    name: ClassVar[str] = "aws-lc"
    Forged: ClassVar[type[Exception]]  # these two come with the module, see `load`
    Cipher: ClassVar[Any]
    __slots__ = ("decrypt", "encrypt")

    def __init__(self, key: bytes) -> None:
        cipher = self.Cipher(key, bytes(12))
        self.encrypt: _Function = cipher.encrypt
        self.decrypt: _Function = cipher.decrypt

    @staticmethod
    def nonce(counter: int) -> int:
        """Return the nonce for a counter."""
        high = counter >> 32
        if high > 0xFFFFFFFF:  # it would begin anew
            raise OverflowError(f"no nonce for {counter}")
        upper, lower = _swapped(counter & 0xFFFFFFFF), _swapped(high)
        if upper < 1 << 31:
            return upper << 32 | lower
        number: int = upper - (1 << 32) << 32 | lower  # what these bits are as an i64
        return number + (1 << 64)

    @staticmethod
    def nonces(counters: Sequence[int]) -> tuple[int, ...]:
        """Return a nonce for each counter."""
        write, read = _layouts("Q", "Q", len(counters))
        return read.unpack(write.pack(*counters))

    @classmethod
    def load(cls) -> bool:
        """Find the module; return whether it is there and does what it should."""
        package = util.find_spec("qh3")
        where = None if package is None else package.submodule_search_locations
        spec = machinery.PathFinder.find_spec("_hazmat", where) if where else None
        if spec is None or spec.loader is None:
            return False
        try:
            module = util.module_from_spec(spec)
            spec.loader.exec_module(module)
            cls.Cipher, cls.Forged = module.AeadChaCha20Poly1305, module.CryptoError
            return _agree(cls, OpenSsl)
        except (ImportError, AttributeError, TypeError, ValueError):  # another version of it
            return False


def _swapped(word: i64) -> i64:
    """Return a number of 32 bits with its bytes the other way round."""
    return (word & 0xFF) << 24 | (word & 0xFF00) << 8 | word >> 8 & 0xFF00 | word >> 24


def _agree(one: type[Aead], other: type[Aead]) -> bool:
    """Whether two implementations seal alike, and `one` opens that and nothing else."""
    key, plain, counter = bytes(range(KEY_SIZE)), bytes(range(200)), 0x0102030405060708
    sealed = other(key).encrypt(other.nonce(counter), plain, NO_DATA)
    tried, nonce = one(key), one.nonce(counter)
    if tried.encrypt(nonce, plain, NO_DATA) != sealed or tried.decrypt(nonce, sealed, NO_DATA) != plain:
        return False
    try:
        tried.decrypt(nonce, bytes((sealed[0] ^ 1,)) + sealed[1:], NO_DATA)
    except one.Forged:
        return True
    return False


@lru_cache(maxsize=512)
def _layouts(write: str, read: str, count: int) -> tuple[struct.Struct, struct.Struct]:
    """Return what writes `count` numbers, little-endian, and what reads them, big-endian."""
    return struct.Struct("<" + write * count), struct.Struct(">" + read * count)


CIPHER: Final[type[Aead]] = AwsLc if AwsLc.load() else OpenSsl
