"""ChaCha20-Poly1305 for a whole run of datagrams in one call: Intel's ipsec-mb, where it is installed.

On a processor with AVX-512 it needs a third to half of what the others need for each packet (see `aead`), and a run is
handed to it as a list of jobs, so that none of its packets costs a call. A call costs as much as a few packets: what
comes alone, or in a short run, does not go this way. Neither does anything on processors without AVX-512, where this
library is the slower one, and on the older ones with AVX-512, those without IFMA: there it seals in half the time, too,
but its instructions make the processor lower its clock, and all else takes a third longer.

The jobs are C structures (intel-ipsec-mb.h, version 1.3), so all of this is about being sure of them: the library must
say that it is of that version, the functions that it names must lie where the header says, the jobs as far apart, and
what it seals must be what OpenSSL seals. Else it is not used. A run that it does not take is for the other way.

Everything that it reads and writes lies in a place of our own, which never moves: so the jobs for datagrams of one size
are the same each time, and are written once. As many are made as a run has datagrams: the sizes of forged ones differ.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from hmac import compare_digest
from typing import Any, Final

from mptunnel.aead import CIPHER, KEY_SIZE, NO_DATA, OpenSsl
from mptunnel.messages import HEADER_SIZE, OVERHEAD, TAG_SIZE

LEAST: Final = 6  # packets that are worth a call
MOST: Final = 64
TOP: Final = (1 << 32) - MOST  # of the first counter: all are below 2^32, and no session lives to see that
NAME: Final = "ipsec-mb"

_LIBRARY: Final = "libIPSec_MB.so.1"
_SPACE: Final = 1 << 16  # for a run: no call of the kernel's takes or gives more
_WORD: Final = 8
_VERSION: Final = 0x103
_MAX_LAYOUTS: Final = 256
_LEAST_TO_OPEN: Final = 16  # datagrams that are worth a call to open, or
_LEAST_SIZE_TO_OPEN: Final = 8 << 10  # bytes of fewer

# intel-ipsec-mb.h: where IMB_MGR has these functions and its jobs, and the fields of an IMB_JOB
_GET_NEXT_BURST: Final = 952
_SUBMIT_BURST: Final = 960
_JOBS: Final = 1024
_SUFFIX: Final = "_avx512_t2"  # of the functions' names: for AVX-512 with IFMA and what came with it
_JOB: Final = struct.Struct(
    "<QQQ"  # keys to encrypt and decrypt, their size
    "QQQQQQ"  # source, destination; where to begin and how much: for the cipher, for the hash
    "QQQQ"  # IV and its size, tag and its size
    "QQ8x"  # additional data and its size
    "IIIII4x"  # status, cipher, direction, hash, order
    "48x"  # of the user's, of other algorithms
)
_QUEUE: Final = 256 * _JOB.size  # IMB_MAX_JOBS
_CIPHER: Final = 19  # IMB_CIPHER_CHACHA20_POLY1305
_HASH: Final = 29  # IMB_AUTH_CHACHA20_POLY1305
_ENCRYPT: Final = 1  # IMB_DIR_ENCRYPT
_DECRYPT: Final = 2
_ORDERS: Final = {_ENCRYPT: 1, _DECRYPT: 2}  # IMB_ORDER_CIPHER_HASH, IMB_ORDER_HASH_CIPHER
_CIPHER_LENGTH: Final = 6  # which of the fields, of eight bytes each
_HASH_LENGTH: Final = 8
_TAG: Final = 11

# The memory, from its beginning: the run; the plaintexts, one behind the other; eight zeros and the counters, so that
# an IV, four zeros and a counter, begins in the upper half of the counter before; the tags; a key for each direction.
_PLAIN: Final = _SPACE
_COUNTERS: Final = _PLAIN + _SPACE + _WORD
_TAGS: Final = _COUNTERS + MOST * _WORD
_KEYS: Final = {_ENCRYPT: _TAGS + MOST * TAG_SIZE, _DECRYPT: _TAGS + MOST * TAG_SIZE + KEY_SIZE}
_END: Final = _KEYS[_DECRYPT] + KEY_SIZE


class UnusableError(Exception):
    """The library is not what we know, or not for this processor."""


class Burst:
    """The library with the memory that it works in."""

    def __init__(self) -> None:
        """Load it. Raises UnusableError, or OSError if it is not there."""
        library = ctypes.PyDLL(_LIBRARY)  # keeps the interpreter's lock: a call is over in microseconds
        self._manager = _manager(library)
        self._get: Any = _function(library, self._manager, "get_next_burst", _GET_NEXT_BURST)
        self._submit: Any = _function(library, self._manager, "submit_burst", _SUBMIT_BURST)
        self._list = (ctypes.c_uint64 * MOST)()  # in which the library's functions pass addresses of jobs
        self._listed = memoryview(self._list).cast("B").cast("Q")
        self._at_list = ctypes.addressof(self._list)
        self._first_job = self._manager + _JOBS
        self._memory = (ctypes.c_uint64 * (_END // _WORD))()
        self._run = ctypes.addressof(self._memory)
        self._view = memoryview(self._memory).cast("B")
        self._keys = {_ENCRYPT: b"", _DECRYPT: b""}  # that lie there
        jobs = (ctypes.c_char * _QUEUE).from_address(self._first_job)
        self._jobs = memoryview(jobs).cast("B")
        self._fields = self._jobs.cast("Q")
        self._layouts: dict[tuple[int, int], bytes] = {}
        self._laid, self._laid_count = (0, 0, 0), 0  # jobs that are written: direction, size, place, and how many
        _check(self)

    def seal(self, key: bytes, run: bytes, size: int, counter: int) -> bytes | None:
        """Seal a run of datagrams, `size` bytes each, the last perhaps shorter: header, plaintext, room for the tag.

        None if the library does not take them.
        """
        if not self._do(key, _ENCRYPT, run, size, counter):
            return None
        return bytes(self._view[: len(run)])

    def open(self, key: bytes, run: bytes, size: int, counter: int) -> bytes | None:
        """Return the plaintexts of such a run, one behind the other.

        None if any of them is not authentic, or the library does not take them.
        """
        count = -(-len(run) // size)
        if count < _LEAST_TO_OPEN and len(run) < _LEAST_SIZE_TO_OPEN:
            return None
        if not self._do(key, _DECRYPT, run, size, counter) or not self._are_authentic(run, size):
            return None
        return bytes(self._view[_PLAIN : _PLAIN + len(run) - count * OVERHEAD])

    def forget(self) -> None:
        """Have no key any more."""
        for direction, at in _KEYS.items():
            self._keys[direction] = b""
            self._view[at : at + KEY_SIZE] = bytes(KEY_SIZE)

    def _do(self, key: bytes, direction: int, run: bytes, size: int, counter: int) -> bool:
        """Put the run into its place and seal it there, or open it: plaintexts, and the tags that it should have."""
        total = len(run)
        count = -(-total // size)
        last = total - (count - 1) * size
        if not LEAST <= count <= MOST or total > _SPACE or last < OVERHEAD or counter > TOP:
            return False
        if self._get(self._manager, count, self._at_list) != count:
            return False
        at, length = self._listed[0] - self._first_job, count * _JOB.size
        if self._listed[count - 1] - self._first_job != at + length - _JOB.size or at < 0 or at + length > _QUEUE:
            return False  # they do not lie in a row
        if self._laid != (direction, size, at) or self._laid_count < count:
            self._jobs[at : at + length] = self._layout(direction, size, count)[:length]
            self._laid, self._laid_count = (direction, size, at), count
        if last < size:
            self._laid_count = count - 1
            field = (at + length - _JOB.size) // _WORD
            self._fields[field + _CIPHER_LENGTH] = self._fields[field + _HASH_LENGTH] = last - OVERHEAD
            if direction == _ENCRYPT:
                self._fields[field + _TAG] = self._run + total - TAG_SIZE
        self._view[:total] = run
        if self._keys[direction] is not key:
            self._view[_KEYS[direction] : _KEYS[direction] + KEY_SIZE] = key
            self._keys[direction] = key
        _numbers(count).pack_into(self._memory, _COUNTERS, *range(counter, counter + count))
        return bool(self._submit(self._manager, count, self._at_list) == count)

    def _are_authentic(self, run: bytes, size: int) -> bool:
        """Whether the run, which lies there too, has the tags that it should have."""
        count = -(-len(run) // size)
        tags = b"".join(_tags(size, count - 1).unpack_from(run)) + run[-TAG_SIZE:]
        return compare_digest(tags, self._view[_TAGS : _TAGS + count * TAG_SIZE])

    def _layout(self, direction: int, size: int, count: int) -> bytes:
        """Return the jobs for at least `count` datagrams of one size."""
        made = self._layouts.get((direction, size), b"")
        if len(made) < count * _JOB.size:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            made = self._layouts[direction, size] = self._make_layout(direction, size, count)
        return made

    def _make_layout(self, direction: int, size: int, count: int) -> bytes:
        jobs, length, key = [], size - OVERHEAD, self._run + _KEYS[direction]
        for number in range(count):
            source = self._run + number * size + HEADER_SIZE
            target, tag = self._run + _PLAIN + number * length, self._run + _TAGS + number * TAG_SIZE
            if direction == _ENCRYPT:
                target, tag = source, source + length
            iv = self._run + _COUNTERS + number * _WORD - _WORD // 2
            fields = (
                key, key, KEY_SIZE, source, target, 0, length, 0, length, iv, 12, tag, TAG_SIZE,
                key, 0, 0, _CIPHER, direction, _HASH, _ORDERS[direction],
            )  # fmt: skip
            jobs.append(_JOB.pack(*fields))
        return b"".join(jobs)


def load() -> Burst | None:
    """Return the library, if it is there, is for this processor and does what it should."""
    try:
        return Burst()
    except (OSError, UnusableError):
        return None


def ciphers() -> str:
    """Say what seals and opens in this process."""
    return CIPHER.name if BURST is None else f"{CIPHER.name}, {NAME} for runs"


def _manager(library: Any) -> int:
    """Return the address of a manager for the best that this processor has."""
    try:
        version, make, start = library.imb_get_version, library.alloc_mb_mgr, library.init_mb_mgr_auto
    except AttributeError as error:
        raise UnusableError(str(error)) from None
    version.restype, make.restype, make.argtypes = ctypes.c_uint, ctypes.c_void_p, [ctypes.c_uint64]
    start.restype, start.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    if version() >> 8 != _VERSION:
        raise UnusableError(f"version {version():#x}")
    manager = make(0)
    if not manager:
        raise UnusableError("no memory")
    start(manager, None)
    return int(manager)


def _function(library: Any, manager: int, name: str, offset: int) -> Any:
    """Return one of the manager's functions, if it is the one that is expected there."""
    kind = ctypes.PYFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
    address = ctypes.c_void_p.from_address(manager + offset).value
    try:
        expected = ctypes.cast(getattr(library, name + _SUFFIX), ctypes.c_void_p).value
    except AttributeError as error:
        raise UnusableError(str(error)) from None
    if not address or address != expected:
        raise UnusableError(f"{name} is another one")
    return kind(address)


def _check(burst: Burst) -> None:
    """See that it seals like OpenSSL, opens that, and nothing that has been altered."""
    key, counter, size = bytes(range(KEY_SIZE)), 0x01020304, 600 + OVERHEAD
    cipher, head = OpenSsl(key), bytes(range(HEADER_SIZE))
    plain = [bytes((number,)) * 600 for number in range(_LEAST_TO_OPEN)] + [b"last"]
    nonces = OpenSsl.nonces(range(counter, counter + len(plain)))
    sealed = b"".join(head + cipher.encrypt(nonce, each, NO_DATA) for nonce, each in zip(nonces, plain, strict=True))
    if burst.seal(key, b"".join(head + each + bytes(TAG_SIZE) for each in plain), size, counter) != sealed:
        raise UnusableError("it seals otherwise")
    if burst.open(key, sealed, size, counter) != b"".join(plain):
        raise UnusableError("it does not open what was sealed")
    even = sealed[: size * _LEAST_TO_OPEN]
    for run, at in (
        (even, HEADER_SIZE),
        (even, len(even) - TAG_SIZE),
        (even, len(even) - 1),
        (sealed, len(sealed) - 1),
    ):
        altered = run[:at] + bytes((run[at] ^ 1,)) + run[at + 1 :]
        if burst.open(key, altered, size, counter) is not None:
            raise UnusableError("it opens what was altered")


@lru_cache(maxsize=MOST)
def _numbers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


@lru_cache(maxsize=256)
def _tags(size: int, count: int) -> struct.Struct:
    """Return what reads the tags of datagrams of one size."""
    return struct.Struct(f"{size - TAG_SIZE}x{TAG_SIZE}s" * count)


def switch_off() -> None:
    """Do without it; for a process whose sessions have not been imported yet."""
    global BURST  # noqa: PLW0603
    BURST = None


BURST: Burst | None = load()
