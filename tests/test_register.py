"""The server's register: who is admitted, which address is whose, and the life of a token."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TYPE_CHECKING

import pytest

from mptunnel import noise
from mptunnel.config import JoinToken, Network, PeerRecord, TokenRecord, TokenState, new_token
from mptunnel.errors import ConfigError
from mptunnel.events import SaveState
from mptunnel.messages import Enrol, EnrolResult
from mptunnel.register import FIRST_TOKEN_HOURS, Register

if TYPE_CHECKING:
    from mptunnel.events import Event

NETWORK = Network(IPv4Network("10.0.1.0/24"), IPv6Network("fd00:1::/64"))
WALL = 1_800_000_000.0
OWN = noise.StaticKey(b"\x22" * 32)
KEY, OTHER = (noise.StaticKey(bytes([n]) * 32).public for n in (0x41, 0x42))
OWNERS = {owner.public: owner for owner in (noise.StaticKey(bytes([n]) * 32) for n in (0x41, 0x42))}
DAY = 86400.0


def register(
    peers: list[PeerRecord] | None = None, tokens: list[TokenRecord] | None = None, *, wall: float = WALL
) -> Register:
    return Register(NETWORK, peers or [], tokens or [], random.Random(1).randbytes, now=1000.0, wall=wall)


def peer(name: str, number: int, key: bytes, removed: float | None = None) -> PeerRecord:
    return PeerRecord(name, key, noise.NO_PSK, NETWORK.ipv4[number], NETWORK.ipv6[number], WALL, removed)


def with_token(hours: float = 1.0) -> tuple[Register, TokenRecord]:
    _, record = new_token(OWN.public, "", hours, WALL, random.Random(2).randbytes)
    return register(tokens=[record]), record


def enrol(
    reg: Register, token: TokenRecord, key: bytes = KEY, name: bytes = b"van", now: float = 1000.0
) -> EnrolResult:
    return reg.enrol(token.join_public, Enrol(key, name, proof(token, key)), OWN, now)[0]


def proof(token: TokenRecord, key: bytes = KEY) -> bytes:
    """Return what shows that the owner of `key` speaks; nothing for a key that nobody here owns."""
    owner = OWNERS.get(key)
    return bytes(32) if owner is None else noise.prove_key(owner, OWN.public, token.join_public)


def names(saves: list[Event]) -> list[str]:
    return [save.name for save in saves if isinstance(save, SaveState)]


# -- peers -----------------------------------------------------------------------------------------------------------


def test_a_client_is_found_by_both_its_addresses_until_it_is_removed() -> None:
    reg = register()
    record, save = reg.add("a", KEY, noise.NO_PSK, 1000.0, stock=False)
    assert save.name == "server/peers"
    assert record.ipv4 == IPv4Address("10.0.1.2")
    for packed in (record.ipv4.packed, record.ipv6.packed):
        assert reg.key_at(packed) == KEY
    reg.remove("a", 1001.0)
    for packed in (record.ipv4.packed, record.ipv6.packed):
        assert reg.key_at(packed) is None
    assert reg.key_at(b"nonsense") is None


def test_the_address_of_one_who_was_removed_rests_for_a_day() -> None:
    reg = register()
    reg.add("a", KEY, noise.NO_PSK, 1000.0, stock=False)
    reg.remove("a", 1000.0)
    record, _ = reg.add("b", OTHER, noise.NO_PSK, 1000.0 + DAY - 1, stock=False)
    assert record.ipv4 == IPv4Address("10.0.1.3")
    reg.remove("b", 1000.0 + DAY)
    record, _ = reg.add("c", b"\x43" * 32, noise.NO_PSK, 1000.0 + DAY + 1, stock=False)
    assert record.ipv4 == IPv4Address("10.0.1.2")


def test_one_who_comes_back_within_the_day_gets_the_old_address() -> None:
    reg = register([peer("old", 7, KEY, removed=WALL - 60)])
    record, _ = reg.add("new", KEY, noise.NO_PSK, 1000.0, stock=False)
    assert record.ipv4 == IPv4Address("10.0.1.7")
    assert reg.key_at(record.ipv4.packed) == KEY


def test_the_removed_are_kept_on_disk_while_their_address_rests() -> None:
    reg = register([peer("a", 2, KEY), peer("b", 3, OTHER)])
    _, save = reg.remove("a", 1000.0)
    assert isinstance(save.document, dict)
    assert [(p["name"], p["removed"]) for p in save.document["peers"]] == [("b", None), ("a", WALL)]


def test_a_name_or_key_is_given_once() -> None:
    reg = register([peer("a", 2, KEY)])
    with pytest.raises(ConfigError, match="peer a is there already"):
        reg.add("a", OTHER, noise.NO_PSK, 1000.0, stock=False)
    with pytest.raises(ConfigError, match="admitted already, as peer a"):
        reg.add("b", KEY, noise.NO_PSK, 1000.0, stock=False)
    with pytest.raises(ConfigError, match="no such peer"):
        reg.remove("b", 1000.0)
    assert names(reg.take_saves()) == []


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_peers_are_saved_before_tokens_and_the_answer_waits_for_the_tokens() -> None:
    reg, token = with_token()
    result, psk, save = reg.enrol(token.join_public, Enrol(KEY, b"van"), OWN, 1000.0)
    assert result is EnrolResult.ADMITTED
    assert psk == reg.records[KEY].psk != noise.NO_PSK
    saves = reg.take_saves()
    assert names(saves) == ["server/peers", "server/tokens"]
    assert saves[-1] is save
    assert reg.take_saves() == []


def test_a_token_is_bound_to_the_first_key_and_spent_when_that_has_shown_itself() -> None:
    reg, token = with_token()
    assert enrol(reg, token) is EnrolResult.ADMITTED
    assert (token.state, token.bound_to) == (TokenState.BOUND, KEY)
    assert enrol(reg, token, OTHER) is EnrolResult.USED
    assert enrol(reg, token) is EnrolResult.ADMITTED
    reg.confirmed(OTHER, 1001.0)
    assert token.state is TokenState.BOUND
    reg.take_saves()
    reg.confirmed(KEY, 1002.0)
    assert token.state.value == "spent"
    assert token.ended == WALL + 2.0
    assert names(reg.take_saves()) == ["server/tokens"]
    assert enrol(reg, token) is EnrolResult.USED
    reg.confirmed(KEY, 1003.0)
    assert reg.take_saves() == []  # nothing to save at every later session


def test_a_bound_token_whose_client_was_removed_lets_nobody_in() -> None:
    reg, token = with_token()
    enrol(reg, token)
    reg.remove("van", 1001.0)
    assert enrol(reg, token, now=1002.0) is EnrolResult.USED


def test_the_time_of_a_token_is_both_clocks() -> None:
    reg, token = with_token()
    assert enrol(reg, token, b"\x01" * 32, b"?", now=1000.0 + 3599.0) is EnrolResult.NAME_REFUSED
    reg.offset -= 10 * DAY  # the wall clock is set back
    assert enrol(reg, token, now=1000.0 + 3600.0) is EnrolResult.EXPIRED
    reg, token = with_token()
    reg.offset += 2 * 3600.0  # or forward
    assert enrol(reg, token) is EnrolResult.EXPIRED


def test_a_token_that_was_bound_in_time_does_not_expire() -> None:
    reg, token = with_token()
    enrol(reg, token)
    assert enrol(reg, token, now=1000.0 + 30 * DAY) is EnrolResult.ADMITTED


def test_a_token_nobody_knows_is_a_revoked_one() -> None:
    reg = register()
    assert reg.enrol(b"\x05" * 32, Enrol(KEY, b"van"), OWN, 1000.0) == (EnrolResult.REVOKED, noise.NO_PSK, None)
    assert reg.take_saves() == []


def test_a_client_that_was_admitted_before_keeps_its_address_when_it_joins_again() -> None:
    reg, token = with_token()
    reg.add("old", KEY, b"\x07" * 32, 1000.0, stock=False)
    result, psk, _ = reg.enrol(token.join_public, Enrol(KEY, b"van", proof(token)), OWN, 1001.0)
    assert result is EnrolResult.ADMITTED
    assert psk == b"\x07" * 32
    assert len(reg.records) == 1
    assert token.name == "old"


def test_whoever_names_the_key_of_an_admitted_client_without_having_it_is_not_told_its_preshared_key() -> None:
    reg, token = with_token()
    reg.add("old", KEY, b"\x07" * 32, 1000.0, stock=False)
    _, another = with_token()
    another.join_public = b"\x05" * 32
    for tried in (bytes(32), proof(another), proof(token, OTHER), bytes(31) + b"\1"):
        refused = (EnrolResult.KEY_REFUSED, noise.NO_PSK, None)
        assert reg.enrol(token.join_public, Enrol(KEY, b"van", tried), OWN, 1001.0) == refused
    assert token.state is TokenState.NEW


def test_nor_is_who_has_stolen_the_token_of_a_client_that_has_enrolled() -> None:
    reg, token = with_token()
    assert enrol(reg, token) is EnrolResult.ADMITTED
    assert reg.enrol(token.join_public, Enrol(KEY, b"van"), OWN, 1001.0)[:2] == (EnrolResult.KEY_REFUSED, noise.NO_PSK)
    assert enrol(reg, token) is EnrolResult.ADMITTED


def test_two_clients_of_one_name_are_told_apart_by_a_number() -> None:
    reg = register([peer("van", 2, OTHER), peer("van-2", 3, b"\x43" * 32)])
    _, token = with_token()
    reg._tokens.append(token)
    reg._expires_at[token.join_public] = 9e9
    enrol(reg, token)
    assert reg.records[KEY].name == "van-3"
    reg = register([peer("x" * 32, 2, OTHER)])
    reg._tokens.append(token2 := with_token()[1])
    reg._expires_at[token2.join_public] = 9e9
    enrol(reg, token2, name=b"x" * 32)
    assert reg.records[KEY].name == "x" * 28 + "-2"


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), OWN.public])
def test_a_key_that_cannot_be_a_clients_is_refused(key: bytes) -> None:
    reg, token = with_token()
    assert enrol(reg, token, key) is EnrolResult.KEY_REFUSED
    assert enrol(reg, token, token.join_public) is EnrolResult.KEY_REFUSED
    assert token.state is TokenState.NEW
    assert reg.take_saves() == []


def test_tombstones_answer_with_their_reason() -> None:
    for state, result in (
        (TokenState.SPENT, EnrolResult.USED),
        (TokenState.EXPIRED, EnrolResult.EXPIRED),
        (TokenState.REVOKED, EnrolResult.REVOKED),
    ):
        reg, token = with_token()
        token.state, token.ended, token.bound_to = state, WALL, KEY
        assert enrol(reg, token) is result
        assert reg.records == {}


def test_a_token_taken_back_lets_nobody_in() -> None:
    reg, token = with_token()
    reply = reg.revoke_token(token.ident, 1000.0)
    assert reply.result["state"] == "revoked"
    assert reply.after is not None
    assert enrol(reg, token) is EnrolResult.REVOKED


# -- the first token -------------------------------------------------------------------------------------------------


def test_a_server_with_neither_client_nor_open_token_makes_one_for_a_day() -> None:
    reg = register()
    text = reg.make_first_token(OWN.public, 1000.0)
    assert text is not None
    assert JoinToken.decode(text).server_public == OWN.public
    saves = {save.name: save.document for save in reg.take_saves() if isinstance(save, SaveState)}
    assert saves["server/join-token"] == text + "\n"
    assert saves["server/tokens"]["tokens"][0]["expires"] == WALL + FIRST_TOKEN_HOURS * 3600  # type: ignore[index]
    assert reg.make_first_token(OWN.public, 1001.0) is None


@pytest.mark.parametrize("end", ["spent", "revoked", "expired"])
def test_the_file_with_the_first_token_goes_when_the_token_does(end: str) -> None:
    reg = register()
    reg.make_first_token(OWN.public, 1000.0)
    token = reg._tokens[0]
    reg.take_saves()
    if end == "spent":
        enrol(reg, token)
        reg.confirmed(KEY, 1001.0)
    elif end == "revoked":
        reg.revoke_token(token.ident, 1001.0)
    else:
        reg.new_token(OWN.public, "another", 1.0, 1000.0 + 25 * 3600)
    removed = [save for save in reg.take_saves() if isinstance(save, SaveState) and save.name == "server/join-token"]
    assert [save.document for save in removed] == [None]


def test_a_server_that_has_clients_makes_no_token() -> None:
    assert register([peer("a", 2, KEY)]).make_first_token(OWN.public, 1000.0) is None
    reg, _ = with_token()
    assert reg.make_first_token(OWN.public, 1000.0) is None
    assert reg.make_first_token(OWN.public, 1000.0 + 2 * 3600) is not None  # that one has expired
