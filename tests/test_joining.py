"""Tokens on the real program: one use, what is refused and how that is told, and a kill at any moment of joining."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from mptunnel.config import NO_PSK, JoinToken, ServerRecord
from mptunnel.lab import SERVER
from tests.running import Maker, Tunnel, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.netns


def tokens(tunnel: Tunnel) -> dict[str, str]:
    """Return the state of each token of the server, by its name in lists."""
    return {each["ident"]: each["state"] for each in json.loads(tunnel.must("sv", "token", "list", "--json"))}


def leaves(tunnel: Tunnel, place: str) -> tuple[int, str]:
    """Wait until a client has ended by itself; return its exit code and the last line it said."""
    process = tunnel.running.pop(place)
    code = process.wait(20.0)
    return code, tunnel.log(place).splitlines()[-1]


def kill_when(process_id: int, has_come: Callable[[], bool], patience: float = 15.0) -> threading.Thread:
    """Watch from a thread for something to be there, and send SIGKILL in that very moment."""

    def watch() -> None:
        end = time.monotonic() + patience
        while not has_come() and time.monotonic() < end:
            pass
        os.kill(process_id, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_token_lets_one_client_in_and_the_same_line_runs_ever_after(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=41)
    line = ("--join", tunnel.token_file(tunnel.token("van")))
    tunnel.serve()
    tunnel.connect(*line)
    tunnel.wait_up()
    assert set(tokens(tunnel).values()) == {"spent"}
    tunnel.stop("cl")
    tunnel.connect(*line)
    tunnel.wait_up()
    assert "the token is not needed" in tunnel.log("cl")
    tunnel.stop("cl")
    tunnel.connect()
    tunnel.wait_up()


def test_a_second_key_on_a_token_is_refused_and_both_sides_say_so(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=42)
    line = ("--join", tunnel.token_file(tunnel.token()))
    tunnel.serve()
    tunnel.connect(*line)
    tunnel.wait_up()
    tunnel.connect(*line, "-t", "mpt1", place="cl-thief")
    code, said = leaves(tunnel, "cl-thief")
    assert code == 7
    assert "used already, by another client" in said
    assert "is refused: used" in tunnel.wait_log("sv", "warning: token")
    assert "1 received" in tunnel.lab.run("cl", ["ping", "-c1", "-W2", "203.0.113.2"]), "the first one is not harmed"
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


def test_a_token_that_was_taken_back_or_has_expired_is_refused(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=43)
    revoked = tunnel.token("revoked")
    (ident,) = tokens(tunnel)
    expired = tunnel.token("expired", "--hours", "0.0003")
    tunnel.serve()
    tunnel.must("sv", "token", "revoke", ident)
    wait_until(lambda: set(tokens(tunnel).values()) == {"revoked", "expired"}, "one token is revoked, one expired")
    for number, (token, words) in enumerate(((revoked, "was taken back"), (expired, "has expired"))):
        place = f"cl-{number}"
        tunnel.connect("--join", tunnel.token_file(token), "-t", f"mpt{number}", place=place)
        code, said = leaves(tunnel, place)
        assert (code, words in said) == (7, True), said
        time.sleep(1.0)  # at most one refusal a second is told
    log = tunnel.log("sv")
    assert "is refused: revoked" in log
    assert "is refused: expired" in log
    assert json.loads(tunnel.must("sv", "peer", "list", "--json")) == []


def test_who_was_removed_is_told_so_and_joins_again_by_a_new_token(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=40)
    tunnel.begin()
    (peer,) = json.loads(tunnel.must("sv", "peer", "list", "--json"))
    tunnel.must("sv", "peer", "remove", peer["name"])
    tunnel.wait_log("cl", "warning: 198.51.100.1:5000 admits us no more")
    tunnel.stop("cl")
    tunnel.connect("--join", tunnel.token_file(tunnel.token()))
    tunnel.wait_up()
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


def test_who_was_removed_while_away_joins_again_by_a_new_token(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=41)
    tunnel.begin()
    tunnel.stop("cl")
    (peer,) = json.loads(tunnel.must("sv", "peer", "list", "--json"))
    tunnel.must("sv", "peer", "remove", peer["name"])
    tunnel.connect("--join", tunnel.token_file(tunnel.token()))
    tunnel.wait_log("cl", "joining anew by this one")
    tunnel.wait_up()
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


def test_a_member_that_shows_a_token_which_is_refused_goes_on_as_it_was(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=42)
    tunnel.begin()
    tunnel.stop("cl")
    token = tunnel.token()
    tunnel.must("sv", "token", "revoke", JoinToken.decode(token).ident)
    tunnel.connect("--join", tunnel.token_file(token))
    assert "taken back; going on as the member" in tunnel.wait_log("cl", "warning: ")
    tunnel.wait_up()


def test_a_bare_server_leaves_a_token_in_a_file_until_it_is_spent(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=44)
    tunnel.serve()
    path = tunnel.places / "sv" / "state" / "server" / "join-token"
    assert "mptunnel -c SERVER --join" in tunnel.log("sv")
    assert str(path) in tunnel.log("sv")
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert text.strip() not in tunnel.log("sv"), "a log is no place for a token"
    tunnel.stop("sv")
    tunnel.serve()
    assert path.read_text() == text, "it stays good"
    tunnel.connect("--join", tunnel.token_file(text))
    tunnel.wait_up()
    wait_until(lambda: not path.exists(), "the token's file goes when it is spent")


@pytest.mark.slow
def test_whoever_cannot_reach_the_server_gives_up_joining_after_fifteen_seconds(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=45)
    before = tunnel.look("cl")
    token = tunnel.token()
    begun = time.monotonic()
    tunnel.connect("--join", tunnel.token_file(token))
    for text in (token[:-7], token.swapcase(), token + "A", ""):
        code, _, said = tunnel.do("cl-other", "-c", SERVER, "-t", "mpt1", "--join", "-", given=text)
        assert code == 2, text
        assert said.startswith("mptunnel: "), said
        assert said.count("\n") == 1, said
    assert not (tunnel.places / "cl-other").exists(), "a malformed token leaves no trace"
    code, said = leaves(tunnel, "cl")
    assert code == 6
    assert "no answer from 198.51.100.1:5000 in 15 s on any path" in said
    assert 14.0 < time.monotonic() - begun < 19.0
    assert tunnel.look("cl") == before


def changed(path: Path) -> Callable[[], bool]:
    """Return whether this file has become another one since now, or this directory has got one, as a question."""

    def inode() -> int:
        try:
            return next((each for each in path.iterdir() if each.name[0] != "."), path).stat().st_ino
        except NotADirectoryError:
            return path.stat().st_ino
        except FileNotFoundError:
            return 0

    before = inode()
    return lambda: inode() not in {before, 0} and not (path.is_dir() and inode() == path.stat().st_ino)


@pytest.mark.parametrize("file", ["sv/state/server/peers", "sv/state/server/tokens", "cl/state/client/servers"])
def test_a_server_killed_while_somebody_joins_lets_him_in_when_it_is_back(make_tunnel: Maker, file: str) -> None:
    tunnel = make_tunnel(seed=46)
    token = tunnel.token_file(tunnel.token())
    server = tunnel.serve()
    watch = kill_when(server.pid, changed(tunnel.places / file))
    tunnel.connect("--join", token)
    watch.join()
    server.wait()
    assert tunnel.running["cl"].poll() is None
    tunnel.serve()
    tunnel.wait_in()
    assert set(tokens(tunnel).values()) == {"spent"}
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


@pytest.mark.parametrize("file", ["key", "timestamp", "servers"])
def test_a_client_killed_while_it_joins_gets_in_by_the_same_line(make_tunnel: Maker, file: str) -> None:
    tunnel = make_tunnel(seed=47)
    line = ("--join", tunnel.token_file(tunnel.token()))
    tunnel.serve()
    client = tunnel.connect(*line)
    kill_when(client.pid, changed(tunnel.places / "cl" / "state" / "client" / file)).join()
    client.wait()
    tunnel.connect(*line)
    tunnel.wait_up()
    assert set(tokens(tunnel).values()) == {"spent"}
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


@pytest.mark.parametrize("file", ["peers", "tokens"])
def test_a_server_that_cannot_save_admits_nobody_until_it_can(make_tunnel: Maker, file: str) -> None:
    tunnel = make_tunnel(seed=48)
    token = tunnel.token_file(tunnel.token())
    server = tunnel.serve()
    obstacle = tunnel.places / "sv" / "state" / "server" / f".{file}.{server.pid}"  # where it would write first
    obstacle.mkdir()
    tunnel.connect("--join", token)
    assert f"cannot save server/{file}" in tunnel.wait_log("sv", "warning: ")
    tunnel.wait_log("cl", "cannot save that we join; trying again")
    assert "joined" not in tunnel.log("cl")
    obstacle.rmdir()
    tunnel.wait_up()
    tunnel.kill("sv")
    tunnel.serve()
    tunnel.wait_in()
    assert len(json.loads(tunnel.must("sv", "peer", "list", "--json"))) == 1


def test_a_client_that_cannot_save_its_membership_says_so_and_ends(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=49)
    token = tunnel.token()
    line = ("--join", tunnel.token_file(token))
    tunnel.serve()
    file = ServerRecord(JoinToken.decode(token).server_public, NO_PSK).file_name
    client = tunnel.connect(*line)
    obstacle = tunnel.places / "cl" / "state" / "client" / "servers" / f".{file}.{client.pid}"
    obstacle.mkdir(parents=True)
    code, said = leaves(tunnel, "cl")
    assert code == 2
    assert "cannot save that we joined" in said
    obstacle.rmdir()
    tunnel.connect(*line)
    tunnel.wait_up()
