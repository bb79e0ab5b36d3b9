"""What the host module lets into a script's environment, how it runs one, and what it takes back."""

from __future__ import annotations

import logging
import os
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path

import pytest

from mptunnel import host
from mptunnel.config import ClientSettings, ServerSettings
from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.host import Host, cleanup, cleanup_all, environment, find_script, instance, parse_resolvers, restore
from mptunnel.state import LockedError, hold_lock

NOTHING = instance(Path("/run/mptunnel"), "mpt3")


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def test_values_become_text_and_nothing_else_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/opt/bin:/sbin")
    monkeypatch.setenv("LD_PRELOAD", "evil.so")
    values = {
        "path": 3,
        "shared": True,
        "lan": False,
        "interface": "wlan0.7@if3",
        "address": IPv4Address("192.0.2.1"),
        "address4": ip_interface("10.0.1.1/24"),
        "network6": ip_network("fd00::/64"),
        "gateway": None,
        "dns": (),
        "routes": (IPv4Network("0.0.0.0/0"), ip_network("::/0")),
        "keep": ((ip_address("10.0.0.1"), ip_address("8.8.8.8")), (ip_address("fd00::1"), ip_address("fd00::2"))),
        "saved": Path("/run/mptunnel/mpt0.saved"),
    }
    assert environment("path-up", values) == {
        "PATH": "/opt/bin:/sbin:/usr/local/sbin:/usr/sbin",
        "LC_ALL": "C",
        "MPT_PATH": "3",
        "MPT_SHARED": "1",
        "MPT_LAN": "0",
        "MPT_INTERFACE": "wlan0.7@if3",
        "MPT_ADDRESS": "192.0.2.1",
        "MPT_ADDRESS4": "10.0.1.1/24",
        "MPT_NETWORK6": "fd00::/64",
        "MPT_GATEWAY": "",
        "MPT_DNS": "",
        "MPT_ROUTES": "0.0.0.0/0 ::/0",
        "MPT_KEEP": "10.0.0.1,8.8.8.8 fd00::1,fd00::2",
        "MPT_SAVED": "/run/mptunnel/mpt0.saved",
    }


@pytest.mark.parametrize(
    "value",
    [
        "eth0; rm -rf /",
        "$(reboot)",
        "a name of more than 15",
        "",
        "eth0\n",
        IPv6Address("fe80::1%eth0;reboot"),
        Path("/tmp/a\nb"),  # noqa: S108
        b"eth0",
        1.5,
        ["eth0"],
        (("eth0", ("eth1", "eth2")),),
    ],
)
def test_any_other_value_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        environment("up", {"interface": value})


@pytest.mark.parametrize("verb", ["", "up; reboot", "UP", "-x", "up-"])
def test_any_other_verb_is_refused(verb: str) -> None:
    with pytest.raises(TypeError):
        environment(verb, {})


def test_the_instance_has_its_tables_and_its_saved_file() -> None:
    assert instance(Path("/run/mptunnel"), "mpt3") == {
        "device": "mpt3",
        "saved": Path("/run/mptunnel/mpt3.saved"),
        "table": 5248,
    }


def test_a_script_gets_verb_and_values_and_its_commands_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = script(tmp_path / "s.sh", "#!/bin/sh\necho \"[#] ip $1 $MPT_DEVICE $MPT_MTU\"; echo 'warning: no nft' >&2\n")
    with caplog.at_level(logging.DEBUG):
        Host(path, NOTHING).run("mtu", {"mtu": 1300})
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "[#] ip mtu mpt3 1300"),
        ("WARNING", "no nft"),
    ]


def test_a_script_without_execute_permission_runs_too(tmp_path: Path) -> None:
    path = script(tmp_path / "s.sh", f"echo $1 >{tmp_path}/ran\n", 0o644)
    Host(path, NOTHING).run("down", {})
    assert (tmp_path / "ran").read_text() == "down\n"


def test_a_failure_tells_what_the_script_said_and_the_command_that_failed(tmp_path: Path) -> None:
    said = "echo '[#] ip route add x'; echo 'warning: odd' >&2; echo 'File exists' >&2; exit 1"
    with pytest.raises(HostError) as caught:
        Host(script(tmp_path / "s.sh", said), NOTHING).run("up", {})
    assert str(caught.value) == "s.sh up: File exists; last command: ip route add x"
    assert caught.value.exit_code == 1
    with pytest.raises(HostError, match=r"s\.sh up: exit code 7, without a word"):
        Host(script(tmp_path / "s.sh", "exit 7"), NOTHING).run("up", {})
    with pytest.raises(NotPermittedError, match="CAP_NET_ADMIN"):
        Host(script(tmp_path / "s.sh", "echo 'x: Operation not permitted' >&2; exit 1"), NOTHING).run("up", {})
    with pytest.raises(HostError, match=r"cannot run .*no such file"):
        Host(script(tmp_path / "s.sh", "#!/nowhere/sh\n"), NOTHING).run("up", {})


def test_a_script_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_SECONDS", 0.05)
    with pytest.raises(HostError, match="not done after"):
        Host(script(tmp_path / "s.sh", "exec sleep 60"), NOTHING).run("up", {})


def test_a_script_reads_nothing_from_our_terminal_and_inherits_no_descriptor(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    text = f"#!/bin/sh\nls -l /proc/self/fd >{tmp_path}/fds; cat >{tmp_path}/stdin\n"
    Host(script(tmp_path / "s.sh", text), NOTHING).run("up", {})
    os.close(write)
    os.close(read)
    assert "/dev/null" in (tmp_path / "fds").read_text()
    assert f" {write} -> " not in (tmp_path / "fds").read_text()
    assert (tmp_path / "stdin").read_text() == ""


def test_dry_run_shows_the_commands_and_tells_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path / "s.sh", '#!/bin/sh\necho "[#] dry $MPT_DRY_RUN"\n')
    Host(path, NOTHING, dry_run=True).run("up", {})
    assert capsys.readouterr().out == "[#] dry 1\n"
    Host(path, NOTHING).run("up", {})
    assert capsys.readouterr().out == ""


def test_without_a_script_nothing_runs_but_values_are_checked() -> None:
    nobody = Host(None, NOTHING)
    nobody.run("up", {"mtu": 1420})
    with pytest.raises(TypeError):
        nobody.run("up", {"mtu": 1420.0})


def test_the_bundled_script_is_found_and_a_given_one_must_be_there(tmp_path: Path) -> None:
    for role, settings in (("client", ClientSettings()), ("server", ServerSettings())):
        found = find_script(role, settings)
        assert found is not None
        assert found.name == f"{role}.sh"
        assert os.access(found, os.X_OK)
    assert find_script("client", ClientSettings(no_script=True)) is None
    mine = script(tmp_path / "mine", "")
    assert find_script("client", ClientSettings(script=mine)) == mine
    with pytest.raises(ConfigError, match="no such file"):
        find_script("client", ClientSettings(script=tmp_path / "gone"))


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled scripts are replaced by ones that note their name, verb and device."""
    for role in host.ROLES:
        script(tmp_path / f"{role}.sh", f'#!/bin/sh\necho "{role} $1 $MPT_DEVICE" >>{tmp_path}/notes\n')
    monkeypatch.setattr(host, "_bundled", lambda role: tmp_path / f"{role}.sh")
    return tmp_path / "notes"


def test_cleanup_runs_down_of_both_scripts_and_removes_the_socket(notes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "mpt4.sock").touch()
    cleanup(run_dir, "mpt4")
    assert notes.read_text() == "client down mpt4\nserver down mpt4\n"
    assert not (run_dir / "mpt4.sock").exists()


def test_a_script_of_the_users_own_is_asked_to_restore_too(notes: Path, tmp_path: Path) -> None:
    mine = script(tmp_path / "mine", f'echo "mine $1 $MPT_DEVICE" >>{notes}')
    restore(tmp_path / "run", "mpt0", mine)
    assert notes.read_text() == "mine down mpt0\nclient down mpt0\nserver down mpt0\n"


def test_cleanup_leaves_an_instance_that_runs_alone(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with hold_lock(tmp_path / "run" / "mpt0.lock"):
        with pytest.raises(LockedError, match=str(os.getpid())):
            cleanup(tmp_path / "run", "mpt0")
        assert cleanup_all(tmp_path / "run") == []
    assert caplog.messages == [f"mpt0 runs (process {os.getpid()}) and is left alone"]
    assert not notes.exists()
    assert cleanup_all(tmp_path / "run") == ["mpt0"]


def test_cleanup_of_all_finds_every_instance_that_left_a_trace(notes: Path, tmp_path: Path) -> None:
    assert cleanup_all(tmp_path / "run") == ["mpt0"]
    for name in ("mpt10.lock", "mpt2.saved", "mpt2.lock", "mpt99.lock", "mptx.saved", "other.lock", "mpt7.sock"):
        (tmp_path / "run" / name).touch()
    notes.unlink()
    assert cleanup_all(tmp_path / "run") == ["mpt0", "mpt2", "mpt10"]
    assert notes.read_text().split("\n")[2:4] == ["client down mpt2", "server down mpt2"]


def test_when_one_down_fails_the_other_still_runs_and_the_failure_is_told(notes: Path, tmp_path: Path) -> None:
    script(tmp_path / "client.sh", "echo 'oh no' >&2; exit 1")
    with pytest.raises(HostError, match=r"client\.sh down: oh no"):
        cleanup(tmp_path / "run", "mpt0")
    assert notes.read_text() == "server down mpt0\n"


def test_resolvers_are_the_global_ones_in_order() -> None:
    text = """
    # nameserver 1.2.3.4
    nameserver 127.0.0.53
    nameserver 9.9.9.9
    nameserver 192.168.1.1
    nameserver fe80::1%eth0
    nameserver 2620:fe::fe
    nameserver 9.9.9.9
    nameserver nonsense
    nameserver
    search example.org
    nameserver 100.64.0.1
    nameserver 8.8.8.8 trailing
    """
    assert [str(address) for address in parse_resolvers(text)] == ["9.9.9.9", "2620:fe::fe", "8.8.8.8"]


def test_resolvers_come_from_the_first_file_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two").write_text("nameserver 8.8.4.4\n")
    (tmp_path / "three").write_text("nameserver 1.1.1.1\n")
    monkeypatch.setattr(host, "_RESOLV_CONF", [str(tmp_path / name) for name in ("one", "two", "three")])
    assert host.resolvers() == (IPv4Address("8.8.4.4"),)
    monkeypatch.setattr(host, "_RESOLV_CONF", [str(tmp_path / "one")])
    assert host.resolvers() == ()
