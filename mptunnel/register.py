"""The server's register: who is admitted, where they live in the tunnel, and which tokens let somebody in.

**Joining.** A token is a one-time static identity. new -> bound: its holder enrolled a key; peers and tokens are saved,
in this order, before the answer goes out, and the same key gets the same answer again. bound -> spent: that key has
completed a handshake. A second key on a bound token is refused and logged: a stolen token shows. A key that is admitted
already is answered only if whoever names it proves to have it, for the answer holds its preshared key. What is spent,
expired or revoked stays as a tombstone that answers with the reason (`records.expire_tokens` says how long).

A token expires by the wall clock and by ours, which nobody can set back.
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from mptunnel import noise
from mptunnel.config import (
    Network,
    PeerRecord,
    TokenRecord,
    TokenState,
    add_peer,
    check_name,
    check_token_room,
    expire_tokens,
    forget_peers,
    key_short,
    new_token,
    peers_to_document,
    remove_peer,
    revoke_token,
    tokens_to_document,
)
from mptunnel.errors import ConfigError, NotAuthenticError
from mptunnel.events import SaveState
from mptunnel.messages import Enrol, EnrolResult

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from mptunnel.events import Event

log = logging.getLogger(__name__)

FIRST_TOKEN_HOURS: Final = 24.0
_TOMBSTONES: Final = {
    TokenState.SPENT: EnrolResult.USED,
    TokenState.EXPIRED: EnrolResult.EXPIRED,
    TokenState.REVOKED: EnrolResult.REVOKED,
}


@dataclass(slots=True)
class Reply:
    """The answer to a control request; where `after` is given it holds only once that has been saved."""

    result: Any
    after: SaveState | None = None


class Register:
    """Peers and tokens of a server. `offset` is what must be added to `now` to get the wall clock's time."""

    def __init__(
        self,
        network: Network,
        peers: list[PeerRecord],
        tokens: list[TokenRecord],
        entropy: Callable[[int], bytes],
        *,
        now: float,
        wall: float,
    ) -> None:
        self.network = network
        self.records = {record.public_key: record for record in peers if record.removed is None}
        self.offset = wall - now
        self.first_token = b""  # join key of the token in the file `join-token`
        self._removed = [record for record in peers if record.removed is not None]
        self._tokens = tokens
        self._entropy = entropy
        self.saves: list[Event] = []  # what must be saved; see `take_saves`
        self._key_at: dict[bytes, bytes] = {}
        self._expires_at = {token.join_public: now + token.expires - wall for token in tokens}
        for record in self.records.values():
            self._index(record)

    def save_again(self, names: Collection[str]) -> None:
        """Save these files as they should be now, since that could not be done."""
        if "server/peers" in names:
            self._save_peers()
        if "server/tokens" in names:
            self._save_tokens()

    def take_saves(self) -> list[Event]:
        """Take out what must be saved."""
        saves, self.saves = self.saves, []
        return saves

    def key_at(self, address: bytes) -> bytes | None:
        """Return the public key of the client that has this packed address."""
        return self._key_at.get(address)

    # -- peers -----------------------------------------------------------------------------------------

    def add(self, name: str, public: bytes, psk: bytes, now: float, *, stock: bool) -> tuple[PeerRecord, SaveState]:
        """Admit a client. Raises ConfigError."""
        return self._add(name, public, psk, now, stock=stock), self._save_peers()

    def remove(self, name: str, now: float) -> tuple[PeerRecord, SaveState]:
        """Admit a client no more; its addresses rest for a day. Raises ConfigError."""
        record = remove_peer(self.records.values(), name, now + self.offset)
        del self.records[record.public_key]
        self._removed = forget_peers([*self._removed, record], now + self.offset)
        for packed in (record.ipv4.packed, record.ipv6.packed):
            self._key_at.pop(packed, None)
        return record, self._save_peers()

    def _add(self, name: str, public: bytes, psk: bytes, now: float, *, stock: bool) -> PeerRecord:
        peers = [*self.records.values(), *self._removed]
        record = add_peer(peers, self.network, name, public, psk, now + self.offset, stock=stock)
        self._removed = [peer for peer in peers if peer.removed is not None]
        self.records[public] = record
        self._index(record)
        return record

    def _index(self, record: PeerRecord) -> None:
        self._key_at[record.ipv4.packed] = record.public_key
        self._key_at[record.ipv6.packed] = record.public_key

    # -- tokens ----------------------------------------------------------------------------------------

    def token_of(self, join_public: bytes) -> TokenRecord | None:
        """Return the token, or tombstone, with this join key."""
        return next((token for token in self._tokens if token.join_public == join_public), None)

    def token_views(self, now: float) -> list[dict[str, Any]]:
        """What `token list` shows."""
        self._expire(now)
        return [token.view() for token in self._tokens]

    def new_token(self, server_public: bytes, label: str, hours: float, now: float) -> Reply:
        """Make a token. Raises ConfigError."""
        self._expire(now)
        check_token_room(self._tokens)
        token, record = new_token(server_public, label, hours, now + self.offset, self._entropy)
        self._tokens.append(record)
        self._expires_at[record.join_public] = now + hours * 3600
        result = {"token": token.encode(), "ident": record.ident, "expires": record.expires}
        return Reply(result, self._save_tokens())

    def make_first_token(self, server_public: bytes, now: float) -> str | None:
        """Make the token that the first client joins by, if there is neither a client nor an open token."""
        self._expire(now)
        if self.records or any(token.state.is_open for token in self._tokens):
            return None
        text: str = self.new_token(server_public, "first client", FIRST_TOKEN_HOURS, now).result["token"]
        self.first_token = self._tokens[-1].join_public
        self._save("server/join-token", text + "\n")
        return text

    def revoke_token(self, ident: str, now: float) -> Reply:
        """Take a token back. Raises ConfigError."""
        self._expire(now)
        record = revoke_token(self._tokens, ident, now + self.offset)
        return Reply(record.view(), self._save_tokens())

    def enrol(
        self, join_public: bytes, enrol: Enrol, own: noise.StaticKey, now: float
    ) -> tuple[EnrolResult, bytes, SaveState | None]:
        """Decide on an ENROL under a token: the result, the PSK, and the save that must come before the answer."""
        self._expire(now)
        token = self.token_of(join_public)
        if token is None:
            return EnrolResult.REVOKED, noise.NO_PSK, None
        result = self._decide(token, enrol, own, now)
        if result is not EnrolResult.ADMITTED:
            return result, noise.NO_PSK, None
        self._save_peers()
        return result, self.records[enrol.public_key].psk, self._save_tokens()

    def confirmed(self, public: bytes, now: float) -> None:
        """This key has completed a handshake: the token that let it in is spent."""
        for token in self._tokens:
            if token.state is TokenState.BOUND and token.bound_to == public:
                token.state, token.ended = TokenState.SPENT, now + self.offset
                self._save_tokens()

    def _decide(self, token: TokenRecord, enrol: Enrol, own: noise.StaticKey, now: float) -> EnrolResult:
        if token.state in _TOMBSTONES:
            return _TOMBSTONES[token.state]
        known = self.records.get(enrol.public_key)
        is_bound = token.state is TokenState.BOUND
        if is_bound and (known is None or token.bound_to != enrol.public_key):
            return EnrolResult.USED
        if known is not None and not _is_proven(enrol, token, own):
            return EnrolResult.KEY_REFUSED
        if is_bound:
            return EnrolResult.ADMITTED
        try:
            name = check_name(enrol.name.decode("ascii"))
        except (ConfigError, UnicodeDecodeError):
            return EnrolResult.NAME_REFUSED
        if known is None:
            if not self._is_good_key(enrol.public_key, own):
                return EnrolResult.KEY_REFUSED
            try:
                psk = self._entropy(noise.KEY_SIZE)
                known = self._add(self._free_name(name), enrol.public_key, psk, now, stock=False)
            except ConfigError:
                return EnrolResult.NO_ADDRESS
        token.state, token.bound_to, token.name = TokenState.BOUND, enrol.public_key, known.name
        log.info("token %s: %s joins as %s, %s", token.ident, key_short(enrol.public_key), known.name, known.ipv4)
        return EnrolResult.ADMITTED

    def _is_good_key(self, public: bytes, own: noise.StaticKey) -> bool:
        """Whether a key can be a client's: not ours, not a token's, not of low order."""
        try:
            noise.Remote(own, public)
        except NotAuthenticError:
            return False
        return public != own.public and self.token_of(public) is None

    def _free_name(self, name: str) -> str:
        taken = {record.name for record in self.records.values()}
        numbered = (f"{name[:28]}-{number}" for number in count(2))
        return name if name not in taken else next(free for free in numbered if free not in taken)

    def _expire(self, now: float) -> None:
        wall = now + self.offset
        for token in self._tokens:
            if token.state is TokenState.NEW and now >= self._expires_at[token.join_public]:
                token.state, token.ended = TokenState.EXPIRED, wall
        self._tokens = expire_tokens(self._tokens, wall)

    # -- saving ----------------------------------------------------------------------------------------

    def _save_peers(self) -> SaveState:
        return self._save("server/peers", peers_to_document([*self.records.values(), *self._removed]))

    def _save_tokens(self) -> SaveState:
        first = self.token_of(self.first_token)
        if self.first_token and (first is None or not first.state.is_open):
            self.first_token = b""
            self._save("server/join-token", None)
        return self._save("server/tokens", tokens_to_document(self._tokens))

    def _save(self, name: str, document: Mapping[str, Any] | str | None) -> SaveState:
        event = SaveState(name, document)
        self.saves.append(event)
        return event


def _is_proven(enrol: Enrol, token: TokenRecord, own: noise.StaticKey) -> bool:
    """Whether an ENROL was made by the owner of the key that it names, for this token."""
    try:
        return hmac.compare_digest(enrol.proof, noise.prove_key(own, enrol.public_key, token.join_public))
    except NotAuthenticError:
        return False
