"""A run sealed or opened in one call: the same bytes as one by one, and nothing opened that has been altered."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import example, given
from hypothesis import strategies as st

from mptunnel import burst, session
from mptunnel.burst import BURST, LEAST, MOST, NAME, Burst, UnusableError
from mptunnel.messages import HEADER_SIZE, OVERHEAD, TAG_SIZE
from mptunnel.noise import SessionKeys
from mptunnel.session import Session, read_counters, sealed_size

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY, OTHER_KEY = bytes(range(0x80, 0xA0)), bytes(32)
COUNTER = 2**31 - 3
HEAD = bytes(range(HEADER_SIZE))
TOP = 1420  # as `limit`

ENOUGH = 16  # datagrams that are worth a call to open, however short


def is_to_be_used() -> bool:
    """Whether this machine has the library and a processor for it; asked otherwise than the program does."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii").split())
    try:
        ctypes.CDLL("libIPSec_MB.so.1")
    except OSError:
        return False
    return {"avx512ifma", "vaes", "gfni", "vpclmulqdq"} <= flags


is_here = pytest.mark.skipif(not is_to_be_used(), reason="no ipsec-mb on this machine, or no AVX-512 with IFMA")


def used() -> Burst:
    assert BURST is not None
    return BURST


def one_by_one(plain: list[bytes], key: bytes = KEY, counter: int = COUNTER) -> bytes:
    cipher = ChaCha20Poly1305(key)
    nonces = [bytes(4) + number.to_bytes(8, "little") for number in range(counter, counter + len(plain))]
    return b"".join(HEAD + cipher.encrypt(nonce, each, None) for nonce, each in zip(nonces, plain, strict=True))


def restarted(plain: list[bytes], counter: int) -> bytes:
    """Return what a session to index 2 sends."""
    padded = [each.ljust(-(-len(each) // 16) * 16, b"\0") for each in plain]
    datagrams, at, sealed = [], 0, one_by_one(padded, counter=counter)
    for number, each in enumerate(padded):
        size = len(each) + OVERHEAD
        head = (4).to_bytes(4, "little") + (2).to_bytes(4, "little") + (counter + number).to_bytes(8, "little")
        datagrams.append(head + sealed[at + HEADER_SIZE : at + size])
        at += size
    return b"".join(datagrams)


def unsealed(plain: list[bytes]) -> bytes:
    return b"".join(HEAD + each + bytes(TAG_SIZE) for each in plain)


@st.composite
def plaintexts(draw: st.DrawFn) -> list[bytes]:
    """Draw what one run holds: all of one length, the last one perhaps shorter."""
    length = draw(st.integers(0, 1488))
    count = draw(st.integers(ENOUGH, min(MOST, 65535 // (length + OVERHEAD))))
    last = draw(st.integers(0, length))
    noise = draw(st.binary(min_size=64, max_size=64))
    return [(noise * 24)[number % 64 :][:size] for number, size in enumerate([length] * (count - 1) + [last])]


@is_here
def test_it_is_used_where_it_is() -> None:
    assert BURST is not None


@is_here
@given(plaintexts())
def test_a_run_is_sealed_and_opened_as_its_datagrams_are(plain: list[bytes]) -> None:
    sealed, size = one_by_one(plain), len(plain[0]) + OVERHEAD
    assert used().seal(KEY, unsealed(plain), size, COUNTER) == sealed
    assert used().open(KEY, sealed, size, COUNTER) == b"".join(plain)


@is_here
@given(plaintexts(), st.data())
def test_nothing_is_opened_if_one_of_its_datagrams_is_altered(plain: list[bytes], data: st.DataObject) -> None:
    sealed, size = one_by_one(plain), len(plain[0]) + OVERHEAD
    number = data.draw(st.integers(0, len(plain) - 1))
    at = number * size + data.draw(st.integers(HEADER_SIZE, OVERHEAD + len(plain[number]) - 1))
    altered = sealed[:at] + bytes((sealed[at] ^ data.draw(st.integers(1, 255)),)) + sealed[at + 1 :]
    assert used().open(KEY, altered, size, COUNTER) is None
    assert used().open(OTHER_KEY, sealed, size, COUNTER) is None
    assert used().open(KEY, sealed, size, COUNTER + 1) is None
    assert used().open(KEY, sealed, size, COUNTER) == b"".join(plain)


@is_here
@pytest.mark.parametrize(("length", "last"), [(64, 64), (64, 20), (63, 63), (1420, 1420), (1400, 1)])
def test_each_byte_of_each_tag_counts(length: int, last: int) -> None:
    plain = [b"x" * length] * (ENOUGH - 1) + [b"x" * last]
    size, sealed = length + OVERHEAD, one_by_one(plain)
    ends = [*range(size, ENOUGH * size, size), len(sealed)]
    for at in (end - back for end in ends for back in range(1, TAG_SIZE + 1)):
        assert used().open(KEY, sealed[:at] + bytes((sealed[at] ^ 0x80,)) + sealed[at + 1 :], size, COUNTER) is None
    assert used().open(KEY, sealed, size, COUNTER) is not None


@is_here
def test_runs_of_all_shapes_in_turn(pair: tuple[Session, Session]) -> None:
    """What was written for the last run must not show in this one."""
    sender, receiver = pair
    shapes = [(19, 112, 112), (19, 112, 60), (19, 112, 112), (25, 112, 112), (25, 96, 1), (17, 96, 96), (64, 96, 96)]
    for count, length, last in shapes * 2:
        plain = [bytes([number]) * length for number in range(count - 1)] + [b"z" * last]
        run = sender.seal_run(plain, 0)
        assert run == restarted(plain, sender.counter - count)
        opened = receiver.open(run, sealed_size(length, 0), None, 0.0)
        assert [each[: len(want)] for each, want in zip(opened.plain, plain, strict=True)] == plain


@is_here
def test_a_run_that_does_not_fit_is_for_the_other_way() -> None:
    plain = [b"x" * 100] * ENOUGH
    size = 100 + OVERHEAD
    for counter in (2**32 - 1, 2**40):
        assert used().seal(KEY, unsealed(plain), size, counter) is None
        assert used().open(KEY, one_by_one(plain, counter=counter), size, counter) is None
    assert used().open(KEY, one_by_one([b"x" * 2000] * 40), 2000 + OVERHEAD, COUNTER) is None
    assert used().seal(KEY, unsealed(plain[: LEAST - 1]), size, COUNTER) is None  # too few for a call
    assert used().seal(KEY, unsealed(plain[:LEAST]), size, COUNTER) == one_by_one(plain[:LEAST])
    assert used().open(KEY, one_by_one(plain[1:]), size, COUNTER) is None
    long = [b"x" * 1400] * LEAST
    assert used().open(KEY, one_by_one(long), 1400 + OVERHEAD, COUNTER) == b"".join(long)
    assert used().seal(KEY, unsealed([b""] * (MOST + 1)), OVERHEAD, COUNTER) is None
    assert used().open(KEY, one_by_one([*plain, plain[0]])[: -100 - 1], size, COUNTER) is None  # no tag at the end
    assert used().open(KEY, one_by_one(plain), size, COUNTER) == b"".join(plain)


@is_here
def test_no_key_stays_behind(pair: tuple[Session, Session]) -> None:
    sender, receiver = pair
    run = sender.seal_run([b"x" * 112] * ENOUGH, 0)
    assert receiver.open(run, 112 + OVERHEAD, None, 0.0).plain
    assert bytes(used()._memory).count(KEY) == 2
    receiver.close()
    assert KEY not in bytes(used()._memory)


# -- what it takes to be used ----------------------------------------------------------------------------


class SealsOtherwise(Burst):
    def seal(self, key: bytes, run: bytes, size: int, counter: int) -> bytes | None:
        return super().seal(key, run, size, counter + 1)


class OpensWhatWasAltered(Burst):
    def open(self, key: bytes, run: bytes, size: int, counter: int) -> bytes | None:
        return super().open(key, run, size, counter) or b""


class OpensNothing(Burst):
    def open(self, key: bytes, run: bytes, size: int, counter: int) -> bytes | None:
        return None


@is_here
@pytest.mark.interpreted
@pytest.mark.parametrize("kind", [SealsOtherwise, OpensWhatWasAltered, OpensNothing])
def test_what_does_otherwise_is_not_used(kind: type[Burst], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableError):
        kind()
    monkeypatch.setattr(burst, "Burst", kind)
    assert burst.load() is None


@is_here
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "value"),
    [("_LIBRARY", "libnothing.so.1"), ("_SUFFIX", "_avx2_t1"), ("_SUFFIX", "_of_later"), ("_GET_NEXT_BURST", 944)],
)
def test_another_library_or_another_processor_s_is_not_used(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert burst.load() is not None
    monkeypatch.setattr(burst, name, value)
    assert burst.load() is None


@pytest.mark.interpreted
@pytest.mark.parametrize("version", [0x20000, 0x10400, 0x10200])
def test_another_version_is_not_used(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: str) -> Any:
        return SimpleNamespace(
            imb_get_version=Function(version), alloc_mb_mgr=Function(1),
            init_mb_mgr_auto=Function(None),
        )  # fmt: skip

    monkeypatch.setattr(ctypes, "PyDLL", library)
    with pytest.raises(UnusableError, match=f"version {version:#x}"):
        Burst()
    monkeypatch.setattr(ctypes, "PyDLL", lambda _: SimpleNamespace())
    with pytest.raises(UnusableError, match="imb_get_version"):
        Burst()


class Function:
    """A function of a library, as ctypes has it."""

    def __init__(self, result: object) -> None:
        self.restype = self.argtypes = None
        self._result = result

    def __call__(self, *_: object) -> object:
        return self._result


@is_here
@pytest.mark.parametrize("wish", ["0", "1"])
def test_it_can_be_switched_off(wish: str) -> None:
    script = "from mptunnel import native; native.use(); from mptunnel import burst, session; print(burst.ciphers())"
    environment = os.environ | {"MPTUNNEL_BURST": wish}
    said = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert (NAME in said.stdout) == (wish == "1")


# -- a session with it and without ------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Session, Session]]:
    sender = Session(SessionKeys(KEY, OTHER_KEY, 1, 2, is_initiator=True), 0, 0.0)
    receiver = Session(SessionKeys(OTHER_KEY, KEY, 2, 1, is_initiator=False), 0, 0.0)
    yield sender, receiver
    sender.close()
    receiver.close()


@given(plaintexts(), st.sampled_from([0, TOP]))
@example([bytes(TOP)] * ENOUGH, TOP)  # full packets, which padding does not make longer
@pytest.mark.interpreted
def test_a_session_sends_the_same_with_it_and_without(plain: list[bytes], limit: int) -> None:
    plain = [each[:TOP] for each in plain]
    sent = []
    asked = []

    class Asked:
        def seal(self, *given: Any) -> bytes | None:
            asked.append(used().seal(*given) if BURST is not None else None)
            return asked[-1]

        def forget(self) -> None:
            pass

    for way in (Asked(), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "BURST", way)
            one = Session(SessionKeys(KEY, OTHER_KEY, 1, 2, is_initiator=True), 0, 0.0)
            sent.append((one.seal_run(plain, limit), one.counter))
            one.close()
    assert sent[0] == sent[1]
    assert len(asked) == 1
    assert asked[0] is not None or BURST is None, "a run that a session sends is one that is taken"


@pytest.mark.parametrize("first", [2**32 - MOST, 2**32 - 3, 2**63 - 3, 2**63, 2**64 - 50])
def test_counters_that_are_too_large_for_it(first: int, pair: tuple[Session, Session]) -> None:
    sender, _ = pair
    sender.counter = first
    plain = [b"x" * 112] * ENOUGH
    run = sender.seal_run(plain, 0)
    assert run == restarted(plain, first)
    assert read_counters(run, 112 + OVERHEAD) == tuple(range(first, first + ENOUGH))


def test_packets_of_several_sizes_are_sealed_one_by_one(pair: tuple[Session, Session]) -> None:
    sender, receiver = pair
    for odd in (b"x" * 200, b"x" * 60):  # in the middle of a run such a packet would shift the rest
        plain = [*[b"x" * 112] * ENOUGH, odd, b"x" * 112]
        run = sender.seal_run(plain, 0)
        at = 0
        for each in plain:
            size = sealed_size(len(each), 0)
            opened = receiver.open(run[at : at + size], size, None, 0.0)
            assert opened.plain == [each.ljust(size - OVERHEAD, b"\0")]
            at += size
        assert at == len(run)


def test_an_altered_datagram_costs_a_run_only_itself(pair: tuple[Session, Session]) -> None:
    sender, receiver = pair
    plain = [bytes([number]) * 112 for number in range(2 * ENOUGH)]
    run, size = sender.seal_run(plain, 0), 112 + OVERHEAD
    at = 3 * size + HEADER_SIZE
    opened = receiver.open(run[:at] + bytes((run[at] ^ 1,)) + run[at + 1 :], size, None, 0.0)
    assert opened.bad == 1
    assert opened.plain == [*plain[:3], *plain[4:]]
    assert list(opened.counters) == [number for number in read_counters(run, size) if number != 3]
    again = receiver.open(run, size, None, 0.0)  # the counter was not spent
    assert (again.plain, again.repeated) == ([plain[3]], 2 * ENOUGH - 1)
