"""What is kept on disk, and what is done with peers and tokens."""

from __future__ import annotations

import json
import random
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptunnel.config import DEFAULT_NETWORK
from mptunnel.errors import ConfigError
from mptunnel.keys import NO_PSK, encode_key, public_key
from mptunnel.records import (
    ADDRESS_REST,
    MAX_OPEN_TOKENS,
    MAX_TOMBSTONES,
    TOMBSTONE_AGE,
    ClientKey,
    Document,
    Network,
    PeerRecord,
    ServerKey,
    ServerRecord,
    Timestamp,
    TokenRecord,
    TokenState,
    add_peer,
    allocate,
    check_name,
    check_token_room,
    expire_tokens,
    forget_peers,
    nearest,
    new_network,
    new_token,
    peers_from_document,
    peers_to_document,
    remove_peer,
    revoke_token,
    tokens_from_document,
    tokens_to_document,
)

NOW = 1_700_000_000.0
NETWORK = Network(IPv4Network("10.0.1.0/24"), IPv6Network("fd12:3456:789a::/64"))
SMALL = Network(IPv4Network("10.0.1.0/29"), NETWORK.ipv6)
RNG = random.Random(1)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def token(number: int, state: TokenState = TokenState.NEW, *, ended: float | None = None) -> TokenRecord:
    return TokenRecord(key(number), key(9), f"label {number}", NOW + number, NOW + 3600, state, ended=ended)


def peers(count: int) -> list[PeerRecord]:
    found: list[PeerRecord] = []
    for number in range(count):
        add_peer(found, NETWORK, f"peer{number}", key(number + 1), NO_PSK, NOW, stock=False)
    return found


RECORDS: list[Any] = [
    ServerKey(key(1)),
    ClientKey(key(2)),
    NETWORK,
    Timestamp(1_700_000_000_123_456_789),
    ServerRecord(key(3), key(4), ("vpn.example.org:5000", "[2001:db8::1]:5000"), ("198.51.100.1",), True, True),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_json(record: Any) -> None:
    assert type(record).from_document(json.loads(json.dumps(record.to_document()))) == record


def test_peers_and_tokens_come_back_from_json() -> None:
    some = peers(3)
    some[1].removed = NOW + 5
    assert peers_from_document(json.loads(json.dumps(peers_to_document(some)))) == some
    tokens = [token(1), token(2, TokenState.BOUND), token(3, TokenState.SPENT, ended=NOW)]
    tokens[1].bound_to, tokens[1].name = key(7), "van-7"
    assert tokens_from_document(json.loads(json.dumps(tokens_to_document(tokens)))) == tokens


@pytest.mark.parametrize("record", [*RECORDS, peers(1)[0], token(1)], ids=lambda record: type(record).__name__)
def test_no_record_shows_a_secret(record: Any) -> None:
    for name in ("private_key", "psk", "join_psk"):
        if hasattr(record, name):
            assert repr(getattr(record, name)) not in repr(record)
    if hasattr(record, "view"):
        assert encode_key(key(9)) not in json.dumps(record.view())


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_document_of_another_format_is_refused_by_both_numbers(record: Any) -> None:
    document = record.to_document() | {"format": 2}
    with pytest.raises(ConfigError, match=r"format 2, this mptunnel reads format 1"):
        type(record).from_document(document)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ipv4": "10.0.0.300"}, r"peers: entry 1: ipv4 '10.0.0.300' is not valid"),
        ({"public_key": "x"}, r"peers: entry 1: public_key: 1 characters"),
        ({"name": "a b"}, r"name 'a b'"),
        ({"added": "yesterday"}, r"'added' is not a number"),
        ({"added": True}, r"'added' is not a number"),
        ({"stock": 1}, r"'stock' is not true or false"),
        ({"psk": None}, r"'psk' is not a text"),
    ],
)
def test_a_wrong_field_is_named(change: Document, why: str) -> None:
    document = peers_to_document(peers(1))
    document["peers"][0] |= change
    with pytest.raises(ConfigError, match=why):
        peers_from_document(document)


def test_a_missing_field_is_named() -> None:
    document = tokens_to_document([token(1)])
    del document["tokens"][0]["expires"]
    with pytest.raises(ConfigError, match="tokens: entry 1: 'expires' is missing"):
        tokens_from_document(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([record.to_document() for record in RECORDS] + [peers_to_document(peers(1))]), st.data())
def test_any_damaged_document_raises_only_our_error(document: Document, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(document)))
    damaged = document | {name: data.draw(JSON)}
    for parse in (*(type(record).from_document for record in RECORDS), peers_from_document, tokens_from_document):
        try:
            parse(damaged)
        except ConfigError:
            continue


def test_a_server_is_filed_under_16_digits_of_its_keys_hash() -> None:
    name = ServerRecord(key(3), NO_PSK).file_name
    assert len(name) == 16
    assert int(name, 16) >= 0
    assert name != ServerRecord(key(4), NO_PSK).file_name


def test_a_new_network_is_the_default_and_a_random_ula() -> None:
    network = new_network(DEFAULT_NETWORK, RNG.randbytes)
    assert network.ipv4 == NETWORK.ipv4
    assert network.ipv6.prefixlen == 64
    assert network.ipv6.subnet_of(IPv6Network("fd00::/8"))
    assert network.ipv6 != new_network(DEFAULT_NETWORK, RNG.randbytes).ipv6
    assert (network.server4, network.server6) == (network.ipv4[1], network.ipv6[1])
    assert new_network(SMALL.ipv4, RNG.randbytes).ipv4 == SMALL.ipv4


def test_the_first_peer_gets_the_address_behind_the_servers() -> None:
    assert allocate(NETWORK, [], NOW) == (IPv4Address("10.0.1.2"), IPv6Address("fd12:3456:789a::2"))


def test_the_lowest_free_address_is_given_and_a_removed_one_rests_a_day() -> None:
    some = peers(3)
    remove_peer(some, "peer1", NOW)
    assert allocate(NETWORK, some, NOW + ADDRESS_REST - 1)[0] == IPv4Address("10.0.1.5")
    assert allocate(NETWORK, some, NOW + ADDRESS_REST)[0] == IPv4Address("10.0.1.3")
    assert len(forget_peers(some, NOW + ADDRESS_REST - 1)) == 3
    assert len(forget_peers(some, NOW + ADDRESS_REST)) == 2


def test_a_full_network_is_said_so_and_never_gives_the_broadcast_address() -> None:
    some: list[PeerRecord] = []
    for number in range(5):
        add_peer(some, SMALL, f"peer{number}", key(number), NO_PSK, NOW, stock=False)
    assert some[-1].ipv4 == IPv4Address("10.0.1.6")
    with pytest.raises(ConfigError, match=r"10\.0\.1\.0/29 has no address left"):
        allocate(SMALL, some, NOW)


def test_a_name_and_a_key_are_admitted_once() -> None:
    some = peers(1)
    with pytest.raises(ConfigError, match="peer0 is there already"):
        add_peer(some, NETWORK, "peer0", key(50), NO_PSK, NOW, stock=False)
    with pytest.raises(ConfigError, match="as peer peer0"):
        add_peer(some, NETWORK, "other", key(1), NO_PSK, NOW, stock=False)
    assert len(some) == 1


def test_a_bad_name_is_refused_also_for_the_first_peer() -> None:
    with pytest.raises(ConfigError, match="1 to 32 letters"):
        add_peer([], NETWORK, "a/b", key(1), NO_PSK, NOW, stock=False)


@pytest.mark.parametrize("name", ["", "a" * 33, "a b", "ä", "a\n", "../x"])
def test_names_are_short_and_plain(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name)


def test_a_removed_key_that_returns_gets_its_addresses_back_while_they_rest() -> None:
    some = peers(3)
    before = remove_peer(some, "peer0", NOW)
    back = add_peer(some, NETWORK, "peer0", before.public_key, NO_PSK, NOW + 60, stock=False)
    assert (back.ipv4, back.ipv6, back.removed) == (before.ipv4, before.ipv6, None)
    assert len(some) == 3


def test_a_removed_key_does_not_take_an_address_that_was_given_on() -> None:
    some = peers(1)
    remove_peer(some, "peer0", NOW)
    later = NOW + ADDRESS_REST + 1
    other = add_peer(some, NETWORK, "other", key(60), NO_PSK, later, stock=False)
    back = add_peer(some, NETWORK, "peer0", key(1), NO_PSK, later, stock=False)
    assert other.ipv4 == IPv4Address("10.0.1.2")
    assert back.ipv4 == IPv4Address("10.0.1.3")


def test_removing_a_stranger_names_the_nearest_peer() -> None:
    with pytest.raises(ConfigError, match="did you mean peer1"):
        remove_peer(peers(2)[1:], "peer11", NOW)
    with pytest.raises(ConfigError, match="peer list"):
        remove_peer([], "x", NOW)


def test_a_new_token_and_its_record_belong_together() -> None:
    made, record = new_token(key(1), "Anna's phone", 2, NOW, RNG.randbytes)
    assert record.join_public == public_key(made.join_private())
    assert record.join_psk == made.join_psk()
    assert (record.created, record.expires, record.state) == (NOW, NOW + 7200, TokenState.NEW)
    assert made.server_public == key(1)
    assert len(record.ident) == 8


@pytest.mark.parametrize(
    ("label", "hours"), [("a\nb", 1), ("x" * 65, 1), ("", 0), ("", -1), ("", 9000), ("", float("nan"))]
)
def test_a_token_with_an_odd_label_or_life_is_not_made(label: str, hours: float) -> None:
    with pytest.raises(ConfigError):
        new_token(key(1), label, hours, NOW, RNG.randbytes)


def test_sixteen_tokens_are_open_at_most() -> None:
    tokens = [token(n) for n in range(MAX_OPEN_TOKENS - 1)] + [token(99, TokenState.SPENT, ended=NOW)]
    check_token_room(tokens)
    with pytest.raises(ConfigError, match="16 tokens are open"):
        check_token_room([*tokens, token(50, TokenState.BOUND)])


def test_a_new_token_expires_and_a_bound_one_does_not() -> None:
    tokens = [token(1), token(2, TokenState.BOUND)]
    assert [t.state for t in expire_tokens(tokens, NOW + 3599)] == [TokenState.NEW, TokenState.BOUND]
    kept = expire_tokens(tokens, NOW + 3600)
    assert [(t.state, t.ended) for t in kept] == [(TokenState.EXPIRED, NOW + 3600), (TokenState.BOUND, None)]


def test_tombstones_are_kept_for_thirty_days_and_only_the_newest() -> None:
    stones = [token(n, TokenState.SPENT, ended=NOW + n) for n in range(MAX_TOMBSTONES + 5)]
    kept = expire_tokens([*stones, token(200)], NOW + 100)
    assert len(kept) == MAX_TOMBSTONES + 1
    assert {t.ended for t in stones[:5]}.isdisjoint({t.ended for t in kept})
    assert expire_tokens([token(1, TokenState.REVOKED, ended=NOW)], NOW + TOMBSTONE_AGE) == []
    assert len(expire_tokens([token(1, TokenState.REVOKED, ended=NOW)], NOW + TOMBSTONE_AGE - 1)) == 1


def test_a_token_is_revoked_by_its_ident_or_a_unique_beginning() -> None:
    tokens = [token(n) for n in range(1, 9)]
    for target in tokens[:2]:
        assert revoke_token(tokens, target.ident.upper()[:6], NOW + 1) is target
        assert (target.state, target.ended) == (TokenState.REVOKED, NOW + 1)


def test_revoking_what_is_not_open_or_not_there_says_so() -> None:
    spent = token(1, TokenState.SPENT, ended=NOW)
    with pytest.raises(ConfigError, match="is spent already"):
        revoke_token([spent], spent.ident, NOW)
    for ident in ("", "zzzz"):
        with pytest.raises(ConfigError, match="no such token"):
            revoke_token([token(1)], ident, NOW)
    with pytest.raises(ConfigError, match="2 tokens begin so"):
        revoke_token([token(1), token(1)], token(1).ident, NOW)


def test_the_nearest_word_is_found() -> None:
    assert nearest("wlan", ["eth0", "wlan0"]) == "wlan0"
    assert nearest("xyz", ["eth0", "wlan0"]) is None
