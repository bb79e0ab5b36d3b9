"""The server's door: what is done with handshake messages of strangers before any product is computed for them.

A message whose mac1 is wrong is dropped without a word. More than 200 messages a second that cost a product (or more
in one turn than a turn takes) mean load, for one second at least: then a message without a valid mac2 gets a cookie
reply and nothing else, and one with it goes through a token bucket of its source (20 a second, 5 at once; IPv6 by
/64). A source that the bucket table (4,096 entries) has no room for is refused. Sources: WireGuard paper, 5.3; the
kernel's ratelimiter.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from mptunnel import noise
from mptunnel.messages import packed_host, parse_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from mptunnel.events import Endpoint

COSTLY_PER_SECOND: Final = 200
LOAD_LASTS: Final = 1.0
BUCKET_RATE: Final = 20.0
BUCKET_SIZE: Final = 5.0
MAX_BUCKETS: Final = 4096
_IPV6_SITE: Final = 8  # bytes: a /64


class Verdict(enum.Enum):
    """What to do with a handshake message."""

    TAKE = enum.auto()
    DROP = enum.auto()
    COOKIE = enum.auto()
    LIMITED = enum.auto()


class Door:
    """Decides on handshake messages; keeps nothing that a stranger can make grow without bound."""

    __slots__ = ("_buckets", "_cookies", "_costly", "_key", "_loaded_until", "_second")

    def __init__(self, key: noise.StaticKey, entropy: Callable[[int], bytes]) -> None:
        self._key = key
        self._cookies = noise.CookieMaker(key, entropy)
        self._second = 0
        self._costly = 0
        self._loaded_until = float("-inf")
        self._buckets: dict[bytes, tuple[float, float]] = {}

    def is_under_load(self, now: float) -> bool:
        """Whether cookies are asked for."""
        return now < self._loaded_until

    def crowded(self, now: float) -> None:
        """More handshakes came in one turn than a turn takes."""
        self._loaded_until = now + LOAD_LASTS

    def judge(self, message: bytes, source: Endpoint, now: float) -> Verdict:
        """Say what to do with an initiation or a response; taking it is counted as costly."""
        if not noise.mac1_is_valid(self._key, message):
            return Verdict.DROP
        if self.is_under_load(now):
            if not self._cookies.mac2_is_valid(message, _source_bytes(source), now):
                return Verdict.COOKIE
            if not self._bucket_allows(source, now):
                return Verdict.LIMITED
        if int(now) != self._second:
            self._second, self._costly = int(now), 0
        self._costly += 1
        if self._costly > COSTLY_PER_SECOND:
            self._loaded_until = now + LOAD_LASTS
        return Verdict.TAKE

    def cookie_reply(self, message: bytes, source: Endpoint, now: float) -> bytes:
        """Return the datagram that asks the sender to show that it receives at `source`."""
        return self._cookies.reply(message, _source_bytes(source), now)

    def _bucket_allows(self, source: Endpoint, now: float) -> bool:
        site = _site(source)
        tokens, since = self._buckets.get(site, (BUCKET_SIZE, now))
        tokens = min(BUCKET_SIZE, tokens + (now - since) * BUCKET_RATE)
        if site not in self._buckets and len(self._buckets) >= MAX_BUCKETS:
            full = [key for key, (left, at) in self._buckets.items() if left + (now - at) * BUCKET_RATE >= BUCKET_SIZE]
            for key in full:
                del self._buckets[key]
            if len(self._buckets) >= MAX_BUCKETS:
                return False
        is_allowed = tokens >= 1
        self._buckets[site] = (tokens - 1 if is_allowed else tokens, now)
        return is_allowed


def _source_bytes(source: Endpoint) -> bytes:
    return packed_host(source.host) + source.port.to_bytes(2, "big")


def _site(source: Endpoint) -> bytes:
    address = parse_address(source.plain_host)
    return address.packed if address.version == 4 else address.packed[:_IPV6_SITE]
