"""Tokens and peers of a server, running or not."""

from __future__ import annotations

import contextlib
import os
import select
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import admin
from mptunnel.config import JoinToken, TokenState, encode_key, parse_wireguard, public_key
from mptunnel.control import ControlServer
from mptunnel.errors import ConfigError, HostError
from mptunnel.state import StateDir, hold_lock

if TYPE_CHECKING:
    from pathlib import Path

KEY = public_key(bytes([5]) * 32)


def offline(tmp_path: Path, verb: str, **arguments: object) -> Any:
    return admin.perform(tmp_path / "state", tmp_path / "run", verb, **arguments)


def add(tmp_path: Path, name: str = "van-7", key: bytes = KEY, *, psk: bool = False) -> Any:
    return offline(tmp_path, "peer-add", name=name, public_key=encode_key(key), psk=psk, stock=True)


def test_a_token_can_be_made_before_the_server_has_ever_run(tmp_path: Path) -> None:
    made = offline(tmp_path, "token-new", label="Anna", hours=2)
    state = StateDir(tmp_path / "state")
    token = JoinToken.decode(made["token"])
    (record,) = state.tokens()
    assert token.server_public == public_key(state.server_key().private_key)
    assert record.join_public == public_key(token.join_private())
    assert (record.ident, record.label, record.expires) == (made["ident"], "Anna", made["expires"])
    assert record.expires == pytest.approx(record.created + 7200)


def test_what_the_server_keeps_of_a_token_is_not_the_token(tmp_path: Path) -> None:
    made = offline(tmp_path, "token-new", label="", hours=1)
    kept = (tmp_path / "state" / "server" / "tokens").read_text()
    token = JoinToken.decode(made["token"])
    assert made["token"] not in kept
    assert encode_key(token.join_private()) not in kept


def test_a_token_is_listed_and_revoked_without_its_secret(tmp_path: Path) -> None:
    made = offline(tmp_path, "token-new", label="", hours=1)
    (shown,) = offline(tmp_path, "token-list")
    assert (shown["ident"], shown["state"]) == (made["ident"], "new")
    assert not {"join_psk", "join_public"} & set(shown)
    assert offline(tmp_path, "token-revoke", ident=made["ident"])["state"] == "revoked"
    assert StateDir(tmp_path / "state").tokens()[0].state is TokenState.REVOKED


def test_revoking_the_first_token_removes_its_file_and_no_other(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    first, second = (offline(tmp_path, "token-new", label="", hours=1) for _ in range(2))
    state.save("server/join-token", first["token"] + "\n")
    offline(tmp_path, "token-revoke", ident=second["ident"])
    assert state.text("server/join-token") == first["token"] + "\n"
    offline(tmp_path, "token-revoke", ident=first["ident"])
    assert state.text("server/join-token") is None


def test_too_many_tokens_and_odd_ones_change_nothing(tmp_path: Path) -> None:
    for _ in range(16):
        offline(tmp_path, "token-new", label="", hours=1)
    before = (tmp_path / "state" / "server" / "tokens").read_bytes()
    for arguments in ({"label": "", "hours": 1}, {"label": "a\n", "hours": 1}, {"label": ""}, {"label": 5, "hours": 1}):
        with pytest.raises(ConfigError):
            offline(tmp_path, "token-new", **arguments)
    assert (tmp_path / "state" / "server" / "tokens").read_bytes() == before


def test_a_peer_is_added_listed_and_removed(tmp_path: Path) -> None:
    made = add(tmp_path)
    state = StateDir(tmp_path / "state")
    network = state.network()
    assert network is not None
    assert (made["ipv4"], made["ipv6"]) == ("10.0.1.2", str(network.ipv6[2]))
    assert made["server_public_key"] == encode_key(public_key(state.server_key().private_key))
    (record,) = state.peers()
    assert (record.name, record.public_key, record.psk, record.stock) == ("van-7", KEY, bytes(32), True)
    (shown,) = offline(tmp_path, "peer-list")
    assert (shown["name"], shown["psk"]) == ("van-7", False)
    offline(tmp_path, "peer-remove", name="van-7")
    assert offline(tmp_path, "peer-list") == []
    assert state.peers()[0].removed is not None  # its address rests


def test_a_peers_psk_is_told_once_and_not_listed(tmp_path: Path) -> None:
    made = add(tmp_path, psk=True)
    (record,) = StateDir(tmp_path / "state").peers()
    assert made["psk"] == encode_key(record.psk) != encode_key(bytes(32))
    assert offline(tmp_path, "peer-list")[0]["psk"] is True


def test_keys_that_cannot_be_a_clients_are_refused(tmp_path: Path) -> None:
    add(tmp_path)
    own = public_key(StateDir(tmp_path / "state").server_key().private_key)
    for key, why in ((own, "the server's own key"), (bytes(32), "low order"), (KEY, "admitted already")):
        with pytest.raises(ConfigError, match=why):
            add(tmp_path, name="other", key=key)
    assert len(offline(tmp_path, "peer-list")) == 1


def test_the_stock_configuration_is_that_of_the_peer(tmp_path: Path) -> None:
    made = add(tmp_path, psk=True)
    file = parse_wireguard(admin.stock_configuration(made, bytes([5]) * 32, "host:5000"))
    assert public_key(file.private_key) == KEY
    assert encode_key(file.public_key) == made["server_public_key"]
    assert encode_key(file.psk) == made["psk"]
    assert [str(address) for address in file.addresses] == [f"{made['ipv4']}/32", f"{made['ipv6']}/128"]
    assert [str(address) for address in file.dns] == ["9.9.9.9", "149.112.112.112"]
    assert file.endpoint == ("host", 5000)
    own_dns = parse_wireguard(admin.stock_configuration(made | {"dns": ["8.8.8.8"]}, bytes([5]) * 32, "host:5000"))
    assert [str(address) for address in own_dns.dns] == ["8.8.8.8"]


def test_a_running_server_is_asked_and_its_files_are_left_alone(tmp_path: Path) -> None:
    def handler(verb: str, arguments: dict[str, Any]) -> object:
        return {"pid": os.getpid()} if verb == "status" else {"verb": verb, **arguments}

    def other(verb: str, _: dict[str, Any]) -> object:
        return {"pid": 1, "verb": verb}

    run = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        stack.enter_context(StateDir(tmp_path / "state").lock_server())
        stack.enter_context(hold_lock(run / "mpt1.lock"))
        client = stack.enter_context(contextlib.closing(ControlServer(run / "mpt0.sock", other)))
        server = stack.enter_context(contextlib.closing(ControlServer(run / "mpt1.sock", handler)))
        answer = stack.enter_context(ThreadPoolExecutor()).submit(offline, tmp_path, "token-revoke", ident="ab")
        while not answer.done():
            for each in (client, server):
                for fd in select.select(each.readers(), [], [], 0.005)[0]:
                    each.ready(fd, 0.0)
        assert answer.result() == {"verb": "token-revoke", "ident": "ab"}
    assert not (tmp_path / "state" / "server" / "tokens").exists()


def test_a_server_that_holds_its_state_and_does_not_listen_is_said_so(tmp_path: Path) -> None:
    with (
        StateDir(tmp_path / "state").lock_server(),
        pytest.raises(HostError, match=r"it listens at no socket in .*run"),
    ):
        offline(tmp_path, "token-list")
