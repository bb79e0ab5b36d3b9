"""Keys and join tokens as people type and paste them."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.errors import ConfigError
from mptunnel.keys import JoinToken, decode_key, encode_key, key_short, new_private_key, public_key

SERVER = bytes(range(32))
SEED = bytes(range(100, 116))
TOKEN = JoinToken(SERVER, SEED)


@given(st.binary(min_size=32, max_size=32))
def test_a_key_comes_back_from_its_text(key: bytes) -> None:
    assert decode_key(encode_key(key)) == key


def test_a_key_may_carry_the_white_space_it_was_pasted_with() -> None:
    assert decode_key(f"  {encode_key(SERVER)}\n") == SERVER


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "0 characters"),
        (encode_key(SERVER)[:-1], "43 characters"),
        (encode_key(SERVER).rstrip("=") + "A", "base64"),
        ("!" * 43 + "=", "base64"),
        ("ä" * 44, "base64"),
        (encode_key(SERVER)[:42] + "9=", "base64"),  # the last letter has bits behind the 32nd byte
        (TOKEN.encode(), "--join"),
    ],
)
def test_a_malformed_key_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        decode_key(text, "public key")


def test_no_message_quotes_a_key() -> None:
    secret = encode_key(SERVER)[:42] + "9="
    with pytest.raises(ConfigError) as caught:
        decode_key(secret)
    assert secret[:8] not in str(caught.value)


def test_the_short_form_has_the_first_and_last_four_letters() -> None:
    text = encode_key(SERVER)
    assert key_short(SERVER) == f"{text[:4]}…{text[39:43]}"


def test_a_new_private_key_is_clamped() -> None:
    for filling in (b"\x00", b"\xff"):
        key = new_private_key(lambda size, filling=filling: filling * size)  # type: ignore[misc]
        assert key[0] & 7 == 0
        assert key[31] & 0xC0 == 0x40


def test_the_public_key_is_that_of_the_standard() -> None:
    # RFC 7748, 6.1: Alice
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    assert public_key(private).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"


def test_a_token_has_74_letters_and_comes_back() -> None:
    text = TOKEN.encode()
    assert len(text) == 74
    assert text.startswith("mpt1")
    assert JoinToken.decode(text) == TOKEN


def test_the_secrets_of_a_token_are_the_keyed_hashes_of_its_seed() -> None:
    assert TOKEN.join_private() == hashlib.blake2s(b"mptunnel join key", key=SEED).digest()
    assert TOKEN.join_psk() == hashlib.blake2s(b"mptunnel join psk", key=SEED).digest()
    assert TOKEN.join_private() != TOKEN.join_psk()


def test_a_token_does_not_show_its_seed() -> None:
    assert repr(SEED) not in repr(TOKEN)
    assert "seed" not in repr(TOKEN)


def test_a_token_may_be_wrapped_and_quoted() -> None:
    text = TOKEN.encode()
    assert JoinToken.decode(f'"{text[:40]}\n   {text[40:]} "\r\n') == TOKEN
    assert JoinToken.decode(f"\u201c{text}\u201d") == TOKEN


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        (TOKEN.encode()[:-1], "73 characters, a whole one has 74"),
        (TOKEN.encode()[:30], "cut when pasted"),
        (TOKEN.encode() + "A", "more was pasted"),
        (TOKEN.encode()[1:], "does not start with mpt1"),
        ("mpt2" + TOKEN.encode()[4:], "of kind mpt2"),
        (TOKEN.encode()[:20] + "!" + TOKEN.encode()[21:], r"character 21 \('!'\)"),
        ("mpt1\u2026", r"character 5 \('\\u2026'\)"),
        ("mpt1" + TOKEN.encode()[4:].lower(), "checksum"),
        (encode_key(SERVER), "does not start with mpt1"),
    ],
)
def test_a_malformed_token_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        JoinToken.decode(text)


def test_every_changed_letter_is_noticed() -> None:
    text = TOKEN.encode()
    rng = random.Random(5)
    for position in range(4, len(text)):
        letter = rng.choice([c for c in "ABCabc019-_" if c != text[position]])
        with pytest.raises(ConfigError):
            JoinToken.decode(text[:position] + letter + text[position + 1 :])


@given(st.text())
def test_any_text_raises_only_our_error(text: str) -> None:
    for decode in (decode_key, JoinToken.decode):
        with pytest.raises(ConfigError):
            decode(text)
        with pytest.raises(ConfigError):
            decode("mpt1" + text)
