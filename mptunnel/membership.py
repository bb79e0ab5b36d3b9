"""Which server a client belongs to, by the command line and the state directory.

A server is known by its public key. `-c X` finds it by the spellings that were used before; `--server-key` names it
outright, a token brings it, a wg-quick file describes a stock one. A server that we know nothing of is an error with
the two cures; nothing is guessed, and nothing is sent to whoever answers.
"""

from __future__ import annotations

import socket
import string
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from mptunnel import noise
from mptunnel.client import Membership
from mptunnel.config import JoinToken, ServerRecord, server_argument, spelling
from mptunnel.errors import ConfigError

if TYPE_CHECKING:
    from logging import Logger

    from mptunnel.config import ClientSettings
    from mptunnel.state import StateDir

NAME_LETTERS: Final = frozenset(string.ascii_letters + string.digits + "._-")
MAX_NAME: Final = 32


def find_membership(settings: ClientSettings, state: StateDir, log: Logger) -> tuple[ClientSettings, Membership]:
    """Return the settings with the server filled in, and how we know it. Raises ConfigError."""
    if settings.wireguard is not None:
        return _of_stock_server(settings)
    known = state.servers()
    record, token = _find_record(settings, known, log)
    if not settings.server:
        raise ConfigError("no server is given; say -c SERVER")
    name = spelling(settings.server, settings.port)
    if name not in record.spellings:
        record.spellings = (*record.spellings, name)
        if record in known or settings.server_key is not None:
            state.save(f"client/servers/{record.file_name}", record.to_document())
    former = tuple(other for other in known if other is not record and name in other.spellings)
    if settings.server_key is not None:  # from now on the name is that of this server
        for other in former:
            other.forget(name)
            state.save(f"client/servers/{other.file_name}", other.to_document())
    return settings, Membership(record, state.client_key().private_key, token, host_name(), former)


def _of_stock_server(settings: ClientSettings) -> tuple[ClientSettings, Membership]:
    file = settings.wireguard
    assert file is not None  # noqa: S101  the caller has looked
    if not settings.server:
        if file.endpoint is None:
            raise ConfigError("the WireGuard file names no Endpoint; say -c SERVER[:PORT]")
        settings = replace(settings, server=file.endpoint[0], port=file.endpoint[1])
    record = ServerRecord(file.public_key, file.psk)
    return settings, Membership(record, file.private_key)


def _find_record(
    settings: ClientSettings, known: list[ServerRecord], log: Logger
) -> tuple[ServerRecord, JoinToken | None]:
    by_key = {record.public_key: record for record in known}
    token = settings.join
    if token is not None:
        record = by_key.get(token.server_public) or ServerRecord(token.server_public, noise.NO_PSK)
        if not record.joined:
            return record, token
        if record.joined_by and record.joined_by != token.ident:
            log.info("this client is a member of that server by token %s: joining anew by this one", record.joined_by)
            return record, token
        log.info(
            "this client is a member of that server already: the token is not needed and not used "
            "(to join it anew, remove client/servers/%s from the state directory)", record.file_name
        )  # fmt: skip
        return record, None
    if settings.server_key is not None:
        return by_key.get(settings.server_key) or ServerRecord(settings.server_key, noise.NO_PSK), None
    name = spelling(settings.server, settings.port)
    found = [record for record in known if name in record.spellings]
    if len(found) == 1:
        return found[0], None
    raise ConfigError(_unknown(settings, known, len(found)))


def _unknown(settings: ClientSettings, known: list[ServerRecord], found: int) -> str:
    """Say that we do not know the server, and the two cures."""
    what = server_argument(settings.server, settings.port)
    cures = "join it with --join TOKEN ('mptunnel token new' there makes one), or name its key with --server-key KEY"
    if found > 1:
        return f"{found} servers were reached as {what}: say which with --server-key KEY"
    if len(known) == 1 and known[0].spellings:
        return f"server {what} is not known here, only {known[0].spellings[0]} is: {cures}"
    return f"server {what} is not known here: {cures}"


def host_name() -> str:
    """Return this host's name as a peer's name may be."""
    name = socket.gethostname().partition(".")[0]
    letters = "".join(letter if letter in NAME_LETTERS else "-" for letter in name)[:MAX_NAME]
    return letters.strip("-") or "client"
