"""What is kept on disk: keys, the tunnel network, peers, tokens, servers known; and what may be done with them.

Each record turns into a JSON document and back. A document carries `format`; one that a newer program wrote is refused
by both numbers. The operations (admit, remove, new token, revoke, expire) are the same for a running server and for
the command line working on the files of a stopped one. Times are wall-clock seconds.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

from mptunnel.errors import ConfigError
from mptunnel.keys import NO_PSK, SEED_SIZE, JoinToken, decode_key, encode_key, public_key, token_ident

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Document: TypeAlias = dict[str, Any]

_T = TypeVar("_T")

FORMAT: Final = 1
MAX_OPEN_TOKENS: Final = 16
MAX_TOMBSTONES: Final = 64
TOMBSTONE_AGE: Final = 30 * 86400.0
ADDRESS_REST: Final = 86400.0  # a removed peer's address is not given to another for so long
MAX_HOURS: Final = 8760.0

_NAME_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@dataclass(slots=True)
class ServerKey:
    """`server/key`: the server's identity."""

    private_key: bytes = field(repr=False)

    def to_document(self) -> Document:
        """Return the file's content."""
        return {"format": FORMAT, "private_key": encode_key(self.private_key)}

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Raise ConfigError where the document is not a key's."""
        return cls(Fields(document, "key").check_format().key("private_key"))


class ClientKey(ServerKey):
    """`client/key`: the identity of this client, the same towards every server."""

    __slots__ = ()


@dataclass(slots=True)
class Network:
    """`server/network`: the addresses inside the tunnel. The server has the first one of each family."""

    ipv4: IPv4Network
    ipv6: IPv6Network

    @property
    def server4(self) -> IPv4Address:
        """The server's own IPv4 address."""
        return self.ipv4[1]

    @property
    def server6(self) -> IPv6Address:
        """The server's own IPv6 address."""
        return self.ipv6[1]

    def to_document(self) -> Document:
        """Return the file's content."""
        return {"format": FORMAT, "ipv4": str(self.ipv4), "ipv6": str(self.ipv6)}

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Raise ConfigError where the document is not a network's."""
        fields = Fields(document, "network").check_format()
        return cls(fields.value("ipv4", IPv4Network), fields.value("ipv6", IPv6Network))


@dataclass(slots=True)
class PeerRecord:
    """A client that is let in, or was (`removed` is set) and whose address still rests."""

    name: str
    public_key: bytes
    psk: bytes = field(repr=False)  # 32 zeros: none
    ipv4: IPv4Address
    ipv6: IPv6Address
    added: float
    removed: float | None = None
    stock: bool = False

    def view(self) -> Document:
        """Return what `peer list` shows: everything but the secret."""
        document = self.to_document()
        document["psk"] = self.psk != NO_PSK
        return document

    def to_document(self) -> Document:
        """Return the peer's entry in `server/peers`."""
        return {
            "name": self.name,
            "public_key": encode_key(self.public_key),
            "psk": encode_key(self.psk),
            "ipv4": str(self.ipv4),
            "ipv6": str(self.ipv6),
            "added": self.added,
            "removed": self.removed,
            "stock": self.stock,
        }


class TokenState(enum.Enum):
    """The life of a token: NEW -> BOUND (to the first key that enrols) -> SPENT; the last three are its tombstones."""

    NEW = "new"
    BOUND = "bound"
    SPENT = "spent"
    EXPIRED = "expired"
    REVOKED = "revoked"

    @property
    def is_open(self) -> bool:
        """Whether somebody can still join by it."""
        return self in {TokenState.NEW, TokenState.BOUND}


@dataclass(slots=True)
class TokenRecord:
    """What the server keeps of a token: enough to answer its handshake, not enough to join with."""

    join_public: bytes
    join_psk: bytes = field(repr=False)
    label: str
    created: float
    expires: float
    state: TokenState = TokenState.NEW
    bound_to: bytes | None = None
    name: str = ""
    ended: float | None = None

    @property
    def ident(self) -> str:
        """The name it goes by on the command line, 8 hexadecimal digits."""
        return token_ident(self.join_public)

    def view(self) -> Document:
        """Return what `token list` shows: everything but the secret."""
        document = {"ident": self.ident, **self.to_document()}
        del document["join_psk"], document["join_public"]
        return document

    def to_document(self) -> Document:
        """Return the token's entry in `server/tokens`."""
        return {
            "join_public": encode_key(self.join_public),
            "join_psk": encode_key(self.join_psk),
            "label": self.label,
            "created": self.created,
            "expires": self.expires,
            "state": self.state.value,
            "bound_to": None if self.bound_to is None else encode_key(self.bound_to),
            "name": self.name,
            "ended": self.ended,
        }


@dataclass(slots=True)
class ServerRecord:
    """`client/servers/<file_name>`: what a client knows of one server."""

    public_key: bytes
    psk: bytes = field(repr=False)
    spellings: tuple[str, ...] = ()  # every `-c` it was reached by: "host:port", lower case
    addresses: tuple[str, ...] = ()  # that its name leads to, those that have answered first
    said_hello: bool = False
    joined: bool = False
    joined_by: str = ""  # the ident of the token, if it is known

    @property
    def file_name(self) -> str:
        """The first 16 hexadecimal digits of BLAKE2s-256 of its public key."""
        return hashlib.blake2s(self.public_key).hexdigest()[:16]

    def forget(self, spelling: str) -> None:
        """Another server is reached by this name now."""
        self.spellings = tuple(each for each in self.spellings if each != spelling)

    def to_document(self) -> Document:
        """Return the file's content."""
        return {
            "format": FORMAT,
            "public_key": encode_key(self.public_key),
            "psk": encode_key(self.psk),
            "spellings": list(self.spellings),
            "addresses": list(self.addresses),
            "said_hello": self.said_hello,
            "joined": self.joined,
            "joined_by": self.joined_by,
        }

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Raise ConfigError where the document is not a server's."""
        fields = Fields(document, "server").check_format()
        return cls(
            public_key=fields.key("public_key"),
            psk=fields.key("psk"),
            spellings=fields.texts("spellings"),
            addresses=tuple(str(address) for address in map(fields.address, fields.texts("addresses"))),
            said_hello=fields.flag("said_hello"),
            joined=fields.flag("joined"),
            joined_by=fields.text("joined_by", ""),
        )


@dataclass(slots=True)
class Timestamp:
    """`<role>/timestamp`: no initiation's timestamp up to `reserved` (nanoseconds, TAI64N's scale) is used again."""

    reserved: int

    def to_document(self) -> Document:
        """Return the file's content."""
        return {"format": FORMAT, "reserved": self.reserved}

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Raise ConfigError where the document is not a timestamp's."""
        return cls(Fields(document, "timestamp").check_format().whole("reserved"))


def peers_to_document(peers: Iterable[PeerRecord]) -> Document:
    """Return the content of `server/peers`."""
    return {"format": FORMAT, "peers": [peer.to_document() for peer in peers]}


def peers_from_document(document: Document) -> list[PeerRecord]:
    """Raise ConfigError naming the entry and the field that is wrong."""
    return [
        PeerRecord(
            name=check_name(fields.text("name")),
            public_key=fields.key("public_key"),
            psk=fields.key("psk"),
            ipv4=fields.value("ipv4", IPv4Address),
            ipv6=fields.value("ipv6", IPv6Address),
            added=fields.number("added"),
            removed=fields.number_or_none("removed"),
            stock=fields.flag("stock"),
        )
        for fields in Fields(document, "peers").check_format().entries("peers")
    ]


def tokens_to_document(tokens: Iterable[TokenRecord]) -> Document:
    """Return the content of `server/tokens`."""
    return {"format": FORMAT, "tokens": [token.to_document() for token in tokens]}


def tokens_from_document(document: Document) -> list[TokenRecord]:
    """Raise ConfigError naming the entry and the field that is wrong."""
    return [
        TokenRecord(
            join_public=fields.key("join_public"),
            join_psk=fields.key("join_psk"),
            label=fields.text("label"),
            created=fields.number("created"),
            expires=fields.number("expires"),
            state=fields.value("state", TokenState),
            bound_to=fields.key_or_none("bound_to"),
            name=fields.text("name"),
            ended=fields.number_or_none("ended"),
        )
        for fields in Fields(document, "tokens").check_format().entries("tokens")
    ]


def new_network(ipv4: IPv4Network, entropy: Callable[[int], bytes]) -> Network:
    """Return the network of a new server: `ipv4`, and a random ULA /64 (RFC 4193)."""
    prefix = int.from_bytes(b"\xfd" + entropy(5), "big") << 80
    return Network(ipv4, IPv6Network((prefix, 64)))


def new_token(
    server_public: bytes, label: str, hours: float, now: float, entropy: Callable[[int], bytes]
) -> tuple[JoinToken, TokenRecord]:
    """Return a token that is good for `hours`, and what the server keeps of it. Raises ConfigError."""
    if not 0 < hours <= MAX_HOURS:
        raise ConfigError(f"a token of {hours:g} h cannot be made: more than 0 and at most {MAX_HOURS:g} h")
    if len(label) > 64 or not label.isprintable():
        raise ConfigError(f"label {label[:64]!a}: at most 64 printable characters are taken")
    token = JoinToken(server_public, entropy(SEED_SIZE))
    record = TokenRecord(public_key(token.join_private()), token.join_psk(), label, now, now + hours * 3600)
    return token, record


def check_token_room(tokens: Iterable[TokenRecord]) -> None:
    """Raise ConfigError where one more open token would be too many."""
    count = sum(token.state.is_open for token in tokens)
    if count >= MAX_OPEN_TOKENS:
        raise ConfigError(f"{count} tokens are open, no more can be; take one back with 'mptunnel token revoke'")


def expire_tokens(tokens: Iterable[TokenRecord], now: float) -> list[TokenRecord]:
    """Mark NEW tokens past their time EXPIRED, in place; return all but the tombstones that are too old or too many.

    A bound token does not expire: its holder is admitted and only has to come back.
    """
    tombstones = []
    kept = []
    for token in tokens:
        if token.state is TokenState.NEW and token.expires <= now:
            token.state, token.ended = TokenState.EXPIRED, token.expires
        if token.state.is_open:
            kept.append(token)
        elif (token.ended or 0.0) > now - TOMBSTONE_AGE:
            tombstones.append(token)
    tombstones.sort(key=lambda token: token.ended or 0.0, reverse=True)
    return sorted((*kept, *tombstones[:MAX_TOMBSTONES]), key=lambda token: token.created)


def revoke_token(tokens: Iterable[TokenRecord], ident: str, now: float) -> TokenRecord:
    """Mark the open token REVOKED, in place, and return it; a unique beginning of its ident will do.

    Raises ConfigError.
    """
    found = [token for token in tokens if token.ident.startswith(ident.lower())] if ident else []
    if len(found) != 1:
        why = (
            f"{len(found)} tokens begin so; give all 8 digits" if found else "no such token; see 'mptunnel token list'"
        )
        raise ConfigError(f"token {ident!a}: {why}")
    token = found[0]
    if not token.state.is_open:
        raise ConfigError(f"token {token.ident} is {token.state.value} already; nobody can join by it")
    token.state, token.ended = TokenState.REVOKED, now
    return token


def check_name(name: str) -> str:
    """Return a peer's name as it is. Raises ConfigError unless it is 1 to 32 of A-Z a-z 0-9 . _ -."""
    if not 1 <= len(name) <= 32 or not _NAME_LETTERS.issuperset(name):
        raise ConfigError(f"name {name[:40]!a}: 1 to 32 letters, digits, dots, underscores and hyphens are taken")
    return name


def add_peer(
    peers: list[PeerRecord], network: Network, name: str, key: bytes, psk: bytes, now: float, *, stock: bool
) -> PeerRecord:
    """Append a new peer with addresses of its own to `peers` and return it. Raises ConfigError.

    A key that was removed and comes back gets its old addresses while they rest.
    """
    check_name(name)
    if any(peer.name == name and peer.removed is None for peer in peers):
        raise ConfigError(f"peer {name} is there already; choose another name, or first 'mptunnel peer remove {name}'")
    known = next((peer for peer in peers if peer.public_key == key), None)
    if known is not None and known.removed is None:
        raise ConfigError(f"this key is admitted already, as peer {known.name}; every client needs a key of its own")
    if known is not None and _holds_address(known, now) and known.ipv4 in network.ipv4:
        ipv4, ipv6 = known.ipv4, known.ipv6
    else:
        ipv4, ipv6 = allocate(network, peers, now)
    if known is not None:
        peers.remove(known)
    peers.append(PeerRecord(name, key, psk, ipv4, ipv6, now, stock=stock))
    return peers[-1]


def remove_peer(peers: Iterable[PeerRecord], name: str, now: float) -> PeerRecord:
    """Mark the peer of this name removed, in place, and return it. Raises ConfigError."""
    names = []
    for peer in peers:
        if peer.removed is None:
            if peer.name == name:
                peer.removed = now
                return peer
            names.append(peer.name)
    close = nearest(name, names)
    hint = f"did you mean {close}?" if close else "see 'mptunnel peer list'"
    raise ConfigError(f"peer {name!a}: no such peer; {hint}")


def forget_peers(peers: Iterable[PeerRecord], now: float) -> list[PeerRecord]:
    """Return the peers without those whose address has rested long enough."""
    return [peer for peer in peers if _holds_address(peer, now)]


def allocate(network: Network, peers: Sequence[PeerRecord], now: float) -> tuple[IPv4Address, IPv6Address]:
    """Return the lowest pair of addresses that nobody holds; both have the same host number.

    Raises ConfigError when the network is full.
    """
    base4, base6 = int(network.ipv4.network_address), int(network.ipv6.network_address)
    holders = [peer for peer in peers if _holds_address(peer, now)]
    taken = {int(peer.ipv4) - base4 for peer in holders} | {int(peer.ipv6) - base6 for peer in holders}
    for number in range(2, network.ipv4.num_addresses - 1):
        if number not in taken:
            return network.ipv4[number], network.ipv6[number]
    raise ConfigError(
        f"network {network.ipv4} has no address left for {len(holders)} peers and one more; remove one, whose address "
        "is free after a day (a larger --network can be had when all clients have been removed)"
    )


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that was probably meant, or None."""
    from difflib import get_close_matches  # noqa: PLC0415  # only when something went wrong

    found = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def _holds_address(peer: PeerRecord, now: float) -> bool:
    return peer.removed is None or peer.removed + ADDRESS_REST > now


class Fields:
    """Typed access to a document, or to a request's arguments; every error names the place and the field."""

    __slots__ = ("_document", "_where")

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise ConfigError(f"{where}: an object is expected")
        self._document = document
        self._where = where

    def check_format(self) -> Self:
        """Return the same, if it is of the format we read."""
        found = self.value_of("format", int, "a number")
        if found != FORMAT:
            raise ConfigError(
                f"{self._where}: format {found}, this mptunnel reads format {FORMAT}; update mptunnel here"
            )
        return self

    def value_of(self, name: str, kind: type | tuple[type, ...], what: str) -> Any:
        """Return the field, which has to be of `kind`; `what` says so in words."""
        if name not in self._document:
            raise ConfigError(f"{self._where}: {name!a} is missing")
        value = self._document[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self._where}: {name!a} is not {what}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; `default` if there is none, as an earlier version wrote it."""
        if default is not None and name not in self._document:
            return default
        return str(self.value_of(name, str, "a text"))

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self.value_of(name, list, "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self._where}: {name!a} is not a list of texts")
        return tuple(values)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return bool(self.value_of(name, bool, "true or false"))

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number, 0 or more; `default` if there is none, as an earlier version wrote it."""
        if default is not None and name not in self._document:
            return default
        value = int(self.value_of(name, int, "a whole number"))
        if value < 0:
            raise ConfigError(f"{self._where}: {name!a} is below zero")
        return value

    def number(self, name: str) -> float:
        """Return a number."""
        return float(self.value_of(name, (int, float), "a number"))

    def number_or_none(self, name: str) -> float | None:
        """Return a number, or None for null."""
        value = self.value_of(name, (int, float, type(None)), "a number or null")
        return None if value is None else float(value)

    def key(self, name: str) -> bytes:
        """Return the 32 bytes of a key."""
        return decode_key(self.text(name), f"{self._where}: {name}")

    def key_or_none(self, name: str) -> bytes | None:
        """Return the 32 bytes of a key, or None for null."""
        value = self.value_of(name, (str, type(None)), "a key or null")
        return None if value is None else decode_key(value, f"{self._where}: {name}")

    def address(self, text: str) -> IPv4Address | IPv6Address:
        """Return the address of this text."""
        try:
            return ipaddress.ip_address(text)
        except ValueError:
            raise ConfigError(f"{self._where}: {text!a} is not an address") from None

    def value(self, name: str, kind: Callable[[str], _T]) -> _T:
        """Return what `kind` makes of a text."""
        text = self.text(name)
        try:
            return kind(text)
        except ValueError:
            raise ConfigError(f"{self._where}: {name} {text!a} is not valid") from None

    def entries(self, name: str) -> list[Fields]:
        """Return a list of objects."""
        values = self.value_of(name, list, "a list")
        return [Fields(value, f"{self._where}: entry {number}") for number, value in enumerate(values, 1)]
