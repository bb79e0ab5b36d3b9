"""Tokens and peers of the server on this host: through it while it runs, else on its files under its lock.

Each verb has the same arguments and the same result either way (`control` carries them to a running server).
"""

from __future__ import annotations

import os
import time
from ipaddress import ip_address, ip_interface
from typing import TYPE_CHECKING, Any

from mptunnel import control, netlink
from mptunnel.config import (
    FALLBACK_DNS,
    NO_PSK,
    Fields,
    JoinToken,
    TokenRecord,
    add_peer,
    check_token_room,
    decode_key,
    encode_key,
    expire_tokens,
    forget_peers,
    free_network,
    new_network,
    new_token,
    peers_to_document,
    public_key,
    remove_peer,
    revoke_token,
    tokens_to_document,
    wireguard_text,
)
from mptunnel.errors import ConfigError, HostError, MptunnelError, NotAuthenticError
from mptunnel.noise import Remote, StaticKey
from mptunnel.state import LockedError, StateDir

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def perform(state_dir: Path, run_dir: Path, verb: str, **arguments: object) -> Any:
    """Return the result of a verb. Raises MptunnelError."""
    state = StateDir(state_dir)
    try:
        with state.lock_server():
            return _OFFLINE[verb](state, Fields(arguments, verb), time.time())
    except LockedError as held:
        return control.ask(_socket_of(held, run_dir), verb, **arguments)


def stock_configuration(made: Mapping[str, Any], private_key: bytes | None, endpoint: str) -> str:
    """Return the wg-quick configuration for a peer that `peer-add` made."""
    return wireguard_text(
        private_key,
        [ip_interface(made["ipv4"]), ip_interface(made["ipv6"])],
        [ip_address(text) for text in made.get("dns", ())] or FALLBACK_DNS,
        decode_key(made["server_public_key"]),
        decode_key(made["psk"]),
        endpoint,
    )


def _socket_of(held: LockedError, run_dir: Path) -> Path:
    """Return the socket of the server that holds the lock."""
    for path in control.find(run_dir):
        try:
            if control.ask(path, "status").get("pid") == held.pid:
                return path
        except MptunnelError:
            continue  # another instance, on its way up or down
    raise HostError(
        f"{held}; it listens at no socket in {run_dir}: if it is just starting try again, else see --run-dir"
    )


def _token_new(state: StateDir, arguments: Fields, now: float) -> dict[str, Any]:
    tokens = expire_tokens(state.tokens(), now)
    check_token_room(tokens)
    key = public_key(state.server_key().private_key)
    token, record = new_token(key, arguments.text("label"), arguments.number("hours"), now, os.urandom)
    state.save("server/tokens", tokens_to_document([*tokens, record]))
    return {"token": token.encode(), "ident": record.ident, "expires": record.expires}


def _token_list(state: StateDir, _: Fields, now: float) -> list[dict[str, Any]]:
    return [token.view() for token in expire_tokens(state.tokens(), now)]


def _token_revoke(state: StateDir, arguments: Fields, now: float) -> dict[str, Any]:
    tokens = expire_tokens(state.tokens(), now)
    token = revoke_token(tokens, arguments.text("ident"), now)
    state.save("server/tokens", tokens_to_document(tokens))
    if (text := state.text("server/join-token")) and _joins_by(text, token):
        state.save("server/join-token", None)
    return token.view()


def _peer_list(state: StateDir, _: Fields, __: float) -> list[dict[str, Any]]:
    return [peer.view() for peer in state.peers() if peer.removed is None]


def _peer_add(state: StateDir, arguments: Fields, now: float) -> dict[str, Any]:
    server = StaticKey(state.server_key().private_key)
    key = arguments.key("public_key")
    if key == server.public:
        raise ConfigError("this is the server's own key; give the client's, which 'mptunnel pubkey' prints there")
    try:
        Remote(server, key)
    except NotAuthenticError:
        raise ConfigError(f"public key {encode_key(key)} is of low order: no key pair has it") from None
    network = state.network()
    if network is None:
        network = new_network(free_network(netlink.snapshot()), os.urandom)
        state.save("server/network", network.to_document())
    peers = forget_peers(state.peers(), now)
    psk = os.urandom(len(NO_PSK)) if arguments.flag("psk") else NO_PSK
    peer = add_peer(peers, network, arguments.text("name"), key, psk, now, stock=arguments.flag("stock"))
    state.save("server/peers", peers_to_document(peers))
    return {**peer.view(), "psk": encode_key(psk), "server_public_key": encode_key(server.public), "port": None}


def _peer_remove(state: StateDir, arguments: Fields, now: float) -> dict[str, Any]:
    peers = forget_peers(state.peers(), now)
    peer = remove_peer(peers, arguments.text("name"), now)
    state.save("server/peers", peers_to_document(peers))
    return peer.view()


def _joins_by(text: str, token: TokenRecord) -> bool:
    """Whether this is the text of that token."""
    try:
        return public_key(JoinToken.decode(text).join_private()) == token.join_public
    except ConfigError:
        return False


_OFFLINE = {
    "token-new": _token_new,
    "token-list": _token_list,
    "token-revoke": _token_revoke,
    "peer-list": _peer_list,
    "peer-add": _peer_add,
    "peer-remove": _peer_remove,
}
