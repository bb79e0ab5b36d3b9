"""Keys as people write them (base64, as `wg` does), and the join token.

Nothing here ever shows a secret: no message quotes what was typed, no repr prints it.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mptunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_SIZE: Final = 32
SEED_SIZE: Final = 16
NO_PSK: Final = bytes(KEY_SIZE)
TOKEN_PREFIX: Final = "mpt1"  # noqa: S105  # the word every token starts with, not a secret

_KEY_LETTERS = 44
_CHECKSUM_SIZE = 3
_TOKEN_SIZE = KEY_SIZE + SEED_SIZE + 1 + _CHECKSUM_SIZE
_TOKEN_LETTERS = len(TOKEN_PREFIX) + -(-_TOKEN_SIZE * 4 // 3)
_URL_ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_WRAPPING = "\"'`<>\u201c\u201d\u2018\u2019"  # what mail programs and shells leave around a pasted word


def decode_key(text: str, what: str = "key") -> bytes:
    """Return the 32 bytes of a key in base64, as strictly as `wg` reads it (wireguard-tools, encoding.c).

    Raises ConfigError; `what` names the key in its message.
    """
    letters = "".join(text.split())
    if letters.startswith(TOKEN_PREFIX) and len(letters) > _KEY_LETTERS:
        raise ConfigError(f"{what}: this is a join token, not a key; give it as --join")
    if len(letters) != _KEY_LETTERS:
        raise ConfigError(f"{what}: {len(letters)} characters, a key has {_KEY_LETTERS} ending in '='; copy it again")
    try:
        key = base64.b64decode(letters, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE or encode_key(key) != letters:
        raise ConfigError(f"{what}: not the base64 form of 32 bytes; copy it again")
    return key


def encode_key(key: bytes) -> str:
    """Return a key in base64, 44 characters."""
    return base64.b64encode(key).decode()


def key_short(key: bytes) -> str:
    """Return a public key's short form for logs, `abcd…wxyz` as WireGuard has it."""
    text = encode_key(key)
    return f"{text[:4]}…{text[-5:-1]}"


def new_private_key(entropy: Callable[[int], bytes]) -> bytes:
    """Return a private key, clamped as `wg genkey` does (RFC 7748, 5)."""
    key = bytearray(entropy(KEY_SIZE))
    key[0] &= 248
    key[31] = key[31] & 127 | 64
    return bytes(key)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of 32 private bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: PLC0415  # 30 ms

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A one-time identity: who holds it may enrol one key at the server whose public key it names.

    Text: `mpt1` + base64url(server public key, 32 | seed, 16 | flags, 1 | checksum, 3), 74 characters. Both ends derive
    the join key pair and its PSK from the seed; the server keeps no seed.
    """

    server_public: bytes
    seed: bytes = field(repr=False)
    flags: int = 0

    def encode(self) -> str:
        """Return the token's text."""
        body = self.server_public + self.seed + bytes([self.flags])
        return TOKEN_PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Parse a token as pasted: white space in it (a wrapped line) and quotes around it do not matter.

        Raises ConfigError saying what is wrong with it.
        """
        letters = "".join(text.split()).strip(_WRAPPING)
        _check_token_letters(letters)
        padded = letters.removeprefix(TOKEN_PREFIX) + "=" * (-(len(letters) - len(TOKEN_PREFIX)) % 4)
        body = base64.urlsafe_b64decode(padded)[:-_CHECKSUM_SIZE]
        token = cls(body[:KEY_SIZE], body[KEY_SIZE : KEY_SIZE + SEED_SIZE], body[-1])
        if token.encode() != letters:
            raise ConfigError(
                "join token: its checksum does not fit, so a letter was changed on the way; copy it again"
            )
        return token

    @property
    def ident(self) -> str:
        """The name it goes by on the server's command line and in its log, 8 hexadecimal digits."""
        return token_ident(public_key(self.join_private()))

    def join_private(self) -> bytes:
        """Return the private key of the join identity."""
        return hashlib.blake2s(b"mptunnel join key", key=self.seed).digest()

    def join_psk(self) -> bytes:
        """Return the preshared key of the join session."""
        return hashlib.blake2s(b"mptunnel join psk", key=self.seed).digest()


def token_ident(join_public: bytes) -> str:
    """Return the name of the token with this join key."""
    return hashlib.blake2s(join_public).hexdigest()[:8]


def _check_token_letters(letters: str) -> None:
    """Raise ConfigError unless this has the length and the letters of a token."""
    if not letters:
        raise ConfigError("join token: it is empty; 'mptunnel token new' on the server makes one")
    if letters[:3] == TOKEN_PREFIX[:3] and letters[3:4].isdigit() and letters[3] != TOKEN_PREFIX[3]:
        raise ConfigError(
            f"join token: of kind {letters[:4]}, this mptunnel reads {TOKEN_PREFIX}; update mptunnel here"
        )
    if not letters.startswith(TOKEN_PREFIX):
        raise ConfigError(
            f"join token: it does not start with {TOKEN_PREFIX}, so its beginning is missing; copy it again"
        )
    for position, letter in enumerate(letters, 1):
        if letter not in _URL_ALPHABET:
            raise ConfigError(f"join token: character {position} ({letter!a}) does not belong there; copy it again")
    if len(letters) < _TOKEN_LETTERS:
        raise ConfigError(
            f"join token: {len(letters)} characters, a whole one has {_TOKEN_LETTERS}: it was cut when pasted; "
            "put it in quotes or use --join -"
        )
    if len(letters) > _TOKEN_LETTERS:
        raise ConfigError(
            f"join token: {len(letters)} characters, a whole one has {_TOKEN_LETTERS}: more was pasted than the token"
        )


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2s(body).digest()[:_CHECKSUM_SIZE]
