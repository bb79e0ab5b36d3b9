"""ChaCha20-Poly1305: both implementations seal what others seal, and open nothing that has been altered."""

from __future__ import annotations

import struct
from importlib import machinery, util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.aead import CIPHER, KEY_SIZE, NO_DATA, AwsLc, OpenSsl

if TYPE_CHECKING:
    from mptunnel.aead import Aead

HAS_BOTH = AwsLc.load()
KEY = bytes(range(0x80, 0xA0))
each = pytest.mark.parametrize(
    "aead",
    [pytest.param(AwsLc, marks=pytest.mark.skipif(not HAS_BOTH, reason="no qh3 on this machine")), OpenSsl],
)


def test_the_faster_one_is_used_where_it_is() -> None:
    assert CIPHER is (AwsLc if HAS_BOTH else OpenSsl)


@each
@given(st.integers(0, 2**64 - 1), st.binary(max_size=1500))
def test_the_nonce_is_four_zeros_and_the_counter_as_little_endian(aead: type[Aead], counter: int, plain: bytes) -> None:
    sealed = aead(KEY).encrypt(aead.nonce(counter), plain, NO_DATA)
    assert sealed == ChaCha20Poly1305(KEY).encrypt(bytes(4) + counter.to_bytes(8, "little"), plain, None)
    assert aead(KEY).decrypt(aead.nonce(counter), sealed, NO_DATA) == plain


@each
def test_many_nonces_are_those_of_each_counter(aead: type[Aead]) -> None:
    for counters in (range(5, 50), (3, 9, 2**64 - 1), ()):
        assert list(aead.nonces(counters)) == [aead.nonce(counter) for counter in counters]


@each
def test_there_is_no_nonce_beyond_the_last_one(aead: type[Aead]) -> None:
    for counter in (2**64, 2**64 + 1, 2**80):
        with pytest.raises((OverflowError, struct.error)):
            aead.nonce(counter)


@each
def test_whatever_has_been_altered_is_forged(aead: type[Aead]) -> None:
    sealed = aead(KEY).encrypt(aead.nonce(1), b"secret", NO_DATA)
    altered = [sealed[:at] + bytes((sealed[at] ^ 1,)) + sealed[at + 1 :] for at in range(len(sealed))]
    for bad in (*altered, sealed[:-1], sealed + b"\0", sealed[:15], b""):
        with pytest.raises(aead.Forged):
            aead(KEY).decrypt(aead.nonce(1), bad, NO_DATA)
    for other, counter in ((bytes(KEY_SIZE), 1), (KEY, 2)):
        with pytest.raises(aead.Forged):
            aead(other).decrypt(aead.nonce(counter), sealed, NO_DATA)


class Credulous:
    """Seals as it should, and takes whatever comes."""

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def encrypt(self, number: int, plain: bytes, data: bytes) -> bytes:
        return self._cipher.encrypt(bytes(4) + number.to_bytes(8, "big"), plain, data)

    def decrypt(self, number: int, sealed: bytes, data: bytes) -> bytes:
        try:
            return self._cipher.decrypt(bytes(4) + number.to_bytes(8, "big"), sealed, data)
        except InvalidTag:
            return b""


class Honest(Credulous):
    def decrypt(self, number: int, sealed: bytes, data: bytes) -> bytes:
        return self._cipher.decrypt(bytes(4) + number.to_bytes(8, "big"), sealed, data)


class OtherNonce(Honest):
    def encrypt(self, number: int, plain: bytes, data: bytes) -> bytes:
        return self._cipher.encrypt(number.to_bytes(12, "little"), plain, data)


class OtherArguments(Honest):
    def encrypt(self, number: int, plain: bytes) -> bytes:  # type: ignore[override]
        return plain


@pytest.mark.parametrize(
    ("module", "is_taken"),
    [
        ({"AeadChaCha20Poly1305": Honest, "CryptoError": InvalidTag}, True),
        ({"AeadChaCha20Poly1305": Credulous, "CryptoError": InvalidTag}, False),
        ({"AeadChaCha20Poly1305": OtherNonce, "CryptoError": InvalidTag}, False),
        ({"AeadChaCha20Poly1305": OtherArguments, "CryptoError": InvalidTag}, False),
        ({"AeadChaCha20Poly1305": Honest}, False),
        ({}, False),
        (None, False),
    ],
)
@pytest.mark.interpreted
def test_another_module_of_that_name_is_used_only_if_it_does_the_same(
    module: dict[str, Any] | None, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Candidate(AwsLc):
        pass

    loader = SimpleNamespace(exec_module=lambda _: None)
    package = None if module is None else SimpleNamespace(submodule_search_locations=["somewhere"])
    monkeypatch.setattr(util, "find_spec", lambda _: package)
    monkeypatch.setattr(machinery.PathFinder, "find_spec", lambda *_: SimpleNamespace(loader=loader))
    monkeypatch.setattr(util, "module_from_spec", lambda _: SimpleNamespace(**(module or {})))
    assert Candidate.load() is is_taken
