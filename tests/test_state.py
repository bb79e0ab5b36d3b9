"""The state directory: what is written is whole, what is read is trusted, and locks hold."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mptunnel
from mptunnel.config import DEFAULT_NETWORK
from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.records import (
    Network,
    PeerRecord,
    ServerRecord,
    Timestamp,
    new_network,
    peers_to_document,
    tokens_to_document,
)
from mptunnel.state import LockedError, StateDir, hold_lock, read_document, remove, write_document, write_text

CHECKOUT = Path(mptunnel.__file__).parent.parent
HOLD = "import sys; from pathlib import Path; from mptunnel.state import hold_lock; l = hold_lock(Path(sys.argv[1])); "


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_document_comes_back_and_is_private_in_private_directories(tmp_path: Path) -> None:
    path = tmp_path / "state" / "server" / "key"
    before = os.umask(0)
    try:
        write_document(path, {"format": 1})
    finally:
        os.umask(before)
    assert read_document(path, secret=True) == {"format": 1}
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_document(tmp_path / "no" / "key", secret=True) is None


def test_writing_leaves_no_other_file_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peers"
    write_document(path, {"old": 1})

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(HostError, match=r"cannot write .*peers: no space left on device"):
        write_document(path, {"new": 1})
    monkeypatch.undo()
    assert read_document(path, secret=True) == {"old": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["peers"]


def test_file_and_directory_are_on_the_disk_before_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync, replace = os.fsync, os.replace

    def note(fd: int) -> None:
        synced.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def note_replace(old: Path, new: Path) -> None:
        synced.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "a", "x")
    assert synced == ["file", "rename", "directory"]


@pytest.mark.parametrize("content", ["", "{", '{"format": 1', "[]", "null", "\x00" * 100, "[" * 100_000])
def test_a_torn_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "peers"
    write_text(path, content)
    with pytest.raises(ConfigError, match=f"cannot read {path}: it is torn"):
        read_document(path, secret=True)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601])
def test_a_secret_that_others_can_reach_is_refused_with_the_cure(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_document(path, {})
    path.chmod(bits)
    with pytest.raises(ConfigError, match=f"readable by others; chmod 600 {path}"):
        read_document(path, secret=True)
    assert read_document(path, secret=False) == {}


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    write_document(tmp_path / "real", {})
    (tmp_path / "key").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="symbolic link"):
        read_document(tmp_path / "key", secret=True)


def test_writing_replaces_a_symbolic_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    write_text(tmp_path / "real", "real")
    (tmp_path / "key").symlink_to(tmp_path / "real")
    write_text(tmp_path / "key", "new")
    assert (tmp_path / "real").read_text() == "real"
    assert not (tmp_path / "key").is_symlink()


def test_another_users_file_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_document(tmp_path / "key", {})
    owner = (tmp_path / "key").stat().st_uid
    if owner == 0:
        os.chown(tmp_path / "key", 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {owner}"):
        read_document(tmp_path / "key", secret=True)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_plain_file_is_refused_and_does_not_block(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "key")
    with pytest.raises(ConfigError, match="not a plain file"):
        read_document(tmp_path / "key", secret=False)


def test_a_file_we_may_not_open_says_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for call in (
        lambda: read_document(tmp_path / "key", secret=True),
        lambda: write_text(tmp_path / "key", ""),
        lambda: hold_lock(tmp_path / "lock"),
    ):
        with pytest.raises(NotPermittedError, match=r"permission denied; run it as root, with sudo"):
            call()


def test_a_state_directory_that_is_a_file_is_the_users_error(tmp_path: Path) -> None:
    write_text(tmp_path / "state", "")
    with pytest.raises(ConfigError, match="not a directory; check --state-dir"):
        StateDir(tmp_path / "state").save("server/peers", {})
    with pytest.raises(ConfigError, match="not a directory; check --state-dir"):
        StateDir(tmp_path / "state").peers()


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    remove(tmp_path / "a")
    remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_keys_are_made_once_and_stay(tmp_path: Path) -> None:
    here = StateDir(tmp_path / "state")
    server, client = here.server_key(), here.client_key()
    assert server.private_key != client.private_key
    assert StateDir(tmp_path / "state").server_key() == server
    assert StateDir(tmp_path / "state").client_key() == client
    assert mode(tmp_path / "state" / "client" / "key") == 0o600


def test_the_second_of_two_makers_takes_the_firsts_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = StateDir(tmp_path)
    first = here.server_key()
    load, calls = StateDir._load, []

    def load_late(self: StateDir, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return None if len(calls) == 1 else load(self, *arguments, **keywords)

    monkeypatch.setattr(StateDir, "_load", load_late)
    assert here.server_key() == first
    assert [path.name for path in (tmp_path / "server").iterdir()] == ["key"]


def test_everything_saved_is_found_again(tmp_path: Path) -> None:
    here = StateDir(tmp_path)
    assert (here.network(), here.peers(), here.tokens(), here.timestamp("client"), here.servers()) == (
        None,
        [],
        [],
        None,
        [],
    )
    network = new_network(DEFAULT_NETWORK, os.urandom)
    peer = PeerRecord("a", bytes(32), bytes(32), network.ipv4[2], network.ipv6[2], 1.0)
    servers = [ServerRecord(bytes([n]) * 32, bytes(32)) for n in (1, 2)]
    here.save("server/network", network.to_document())
    here.save("server/peers", peers_to_document([peer]))
    here.save("server/tokens", tokens_to_document([]))
    here.save("client/timestamp", Timestamp(5).to_document())
    for server in servers:
        here.save(f"client/servers/{server.file_name}", server.to_document())
    assert here.network() == network
    assert isinstance(here.network(), Network)
    assert here.peers() == [peer]
    assert here.timestamp("client") == Timestamp(5)
    assert here.timestamp("server") is None
    assert sorted(record.public_key for record in here.servers()) == [server.public_key for server in servers]


def test_a_text_is_saved_and_none_removes_it(tmp_path: Path) -> None:
    here = StateDir(tmp_path)
    assert here.text("server/join-token") is None
    here.save("server/join-token", "mpt1\n")
    assert here.text("server/join-token") == "mpt1\n"
    here.save("server/join-token", None)
    assert here.text("server/join-token") is None


def test_a_file_half_written_by_a_killed_process_is_no_server(tmp_path: Path) -> None:
    here = StateDir(tmp_path)
    here.save("client/servers/abc", ServerRecord(bytes(32), bytes(32)).to_document())
    (tmp_path / "client" / "servers" / ".def.123").write_text("{")
    assert len(here.servers()) == 1


def test_a_newer_or_damaged_record_is_named_with_its_file(tmp_path: Path) -> None:
    here = StateDir(tmp_path)
    here.save("server/peers", {"format": 2, "peers": []})
    with pytest.raises(ConfigError, match=r"server/peers: peers: format 2, this mptunnel reads format 1"):
        here.peers()
    here.save("server/key", {"format": 1, "private_key": "short"})
    with pytest.raises(ConfigError, match=r"server/key: key: private_key: 5 characters"):
        here.server_key()
    assert json.loads((tmp_path / "server" / "key").read_text())["private_key"] == "short"


def test_a_lock_is_held_by_one_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "mpt0.lock"
    with hold_lock(path):
        with pytest.raises(LockedError, match=rf"mpt0 is in use by process {os.getpid()}; .* -t") as caught:
            hold_lock(path)
        assert caught.value.pid == os.getpid()
        assert caught.value.exit_code == 2
    hold_lock(path).close()


def test_the_servers_lock_speaks_of_the_state_directory(tmp_path: Path) -> None:
    here = StateDir(tmp_path / "state")
    with here.lock_server(), pytest.raises(LockedError, match=r"state/server is in use by .* --state-dir"):
        here.lock_server()
    assert mode(tmp_path / "state") == 0o700


def test_the_run_directory_can_be_read_by_all(tmp_path: Path) -> None:
    hold_lock(tmp_path / "run" / "mpt0.lock").close()
    assert mode(tmp_path / "run") & 0o700 == 0o700
    assert mode(tmp_path / "run" / "mpt0.lock") == 0o600


def test_a_lock_dies_with_its_process_and_is_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "mpt0.lock"
    # the holder starts a program of its own, says so, and dies by force
    script = HOLD + (
        "import os, subprocess; p = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL);"
        "print(p.pid, flush=True); input(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(LockedError) as caught:
                hold_lock(path)
            assert caught.value.pid == holder.pid
            holder.communicate("\n")
            hold_lock(path).close()
        finally:
            os.kill(child, 9)


def test_a_lock_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mpt0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        hold_lock(tmp_path / "mpt0.lock")
    assert not (tmp_path / "elsewhere").exists()


def test_closing_a_lock_twice_closes_nothing_else(tmp_path: Path) -> None:
    held = hold_lock(tmp_path / "mpt0.lock")
    fd = held.fileno()
    held.close()
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == fd
    held.close()
    os.fstat(other)
    os.close(other)
