"""Which server a client belongs to: known by its key, never guessed."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from mptunnel.config import ClientSettings, JoinToken, ServerRecord, public_key
from mptunnel.errors import ConfigError
from mptunnel.membership import NAME_LETTERS, find_membership, host_name
from mptunnel.noise import NO_PSK
from mptunnel.state import StateDir

if TYPE_CHECKING:
    from pathlib import Path

LOG = logging.getLogger(__name__)
KEY, OTHER = (public_key(bytes([n]) * 32) for n in (1, 2))


def known(state: StateDir, key: bytes, *spellings: str, joined: bool = True) -> None:
    record = ServerRecord(key, os.urandom(32), spellings=spellings, joined=joined)
    state.save(f"client/servers/{record.file_name}", record.to_document())


def asks(server: str, **more: object) -> ClientSettings:
    return ClientSettings(server=server, **more)  # type: ignore[arg-type]


def test_a_server_is_found_by_every_spelling_that_was_used(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known(state, KEY, "vpn.example:5000", "192.0.2.1:5000")
    known(state, OTHER, "else.example:5000")
    for name in ("vpn.example", "VPN.example", "192.0.2.1"):
        _, membership = find_membership(asks(name), state, LOG)
        assert (membership.record.public_key, membership.token) == (KEY, None)


def test_an_unknown_server_is_an_error_that_names_the_known_one_and_both_cures(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known(state, KEY, "vpn.example:5000")
    with pytest.raises(ConfigError, match=r"vpn\.exampel .*only vpn\.example:5000.*--join TOKEN.*--server-key KEY"):
        find_membership(asks("vpn.exampel"), state, LOG)


def test_two_servers_of_one_spelling_are_told_apart_by_key_only(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known(state, KEY, "vpn.example:5000")
    known(state, OTHER, "vpn.example:5000")
    with pytest.raises(ConfigError, match="2 servers"):
        find_membership(asks("vpn.example"), state, LOG)
    _, membership = find_membership(asks("vpn.example", server_key=OTHER), state, LOG)
    assert membership.record.public_key == OTHER


def test_naming_the_key_records_the_spelling_for_the_bare_command(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    find_membership(asks("new.example", server_key=KEY), state, LOG)
    _, membership = find_membership(asks("new.example"), state, LOG)
    assert (membership.record.public_key, membership.record.psk) == (KEY, NO_PSK)


def test_a_token_is_used_once_and_then_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, token = StateDir(tmp_path), JoinToken(KEY, bytes(16))
    _, membership = find_membership(asks("vpn.example", join=token), state, LOG)
    assert membership.token is token
    known(state, KEY, "vpn.example:5000")
    with caplog.at_level(logging.INFO):
        _, membership = find_membership(asks("vpn.example", join=token), state, LOG)
    assert membership.token is None
    assert "member of that server already" in caplog.text


def test_another_token_than_the_one_that_this_client_joined_by_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, old, new = StateDir(tmp_path), JoinToken(KEY, bytes(16)), JoinToken(KEY, bytes(range(16)))
    record = ServerRecord(KEY, os.urandom(32), spellings=("vpn.example:5000",), joined=True, joined_by=old.ident)
    state.save(f"client/servers/{record.file_name}", record.to_document())
    with caplog.at_level(logging.INFO):
        _, membership = find_membership(asks("vpn.example", join=new), state, LOG)
    assert (membership.token, membership.record) == (new, record)
    assert f"by token {old.ident}: joining anew" in caplog.text
    _, membership = find_membership(asks("vpn.example", join=old), state, LOG)
    assert membership.token is None


def test_a_record_of_an_earlier_version_says_nothing_of_the_token(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    record = ServerRecord(KEY, os.urandom(32), joined=True, joined_by="01234567")
    document = record.to_document()
    del document["joined_by"]
    assert ServerRecord.from_document(document).joined_by == ""
    state.save(f"client/servers/{record.file_name}", document)
    _, membership = find_membership(asks("vpn.example", join=JoinToken(KEY, bytes(16))), state, LOG)
    assert membership.token is None


def test_a_host_name_is_made_fit_for_a_peers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in {"van-7.fleet.example": "van-7", "büro": "b-ro", "": "client", "x" * 70: "x" * 32}.items():
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        assert host_name() == expected
        assert NAME_LETTERS.issuperset(host_name())


def test_a_server_that_is_named_by_its_key_takes_the_name_over(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known(state, KEY, "vpn.example:5000", "192.0.2.1:5000")
    find_membership(asks("vpn.example", server_key=OTHER), state, LOG)
    for name, key in (("vpn.example", OTHER), ("192.0.2.1", KEY)):
        _, membership = find_membership(asks(name), state, LOG)
        assert membership.record.public_key == key


def test_a_token_takes_the_name_over_only_once_it_has_let_us_in(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    known(state, KEY, "vpn.example:5000")
    _, membership = find_membership(asks("vpn.example", join=JoinToken(OTHER, bytes(16))), state, LOG)
    assert [record.public_key for record in membership.former] == [KEY]
    _, membership = find_membership(asks("vpn.example"), state, LOG)
    assert membership.record.public_key == KEY, "it was refused"
