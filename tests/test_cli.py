"""The command line as its user meets it: roles, errors of one line, exit codes, commands."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from ipaddress import IPv4Address, ip_interface
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import mptunnel
from mptunnel import cli, commands
from mptunnel.config import (
    ClientSettings,
    Gateway,
    JoinToken,
    Link,
    ServerSettings,
    encode_key,
    parse_wireguard,
    public_key,
)
from mptunnel.control import Listening
from mptunnel.errors import NotRunningError, RefusedError
from mptunnel.state import StateDir
from tests.answers import answering
from tests.running import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Runs = list[Any]

TOKEN = JoinToken(bytes(range(32)), bytes(16)).encode()
CHECKOUT = Path(mptunnel.__file__).parent.parent
CLIENT_STATUS = {"format": 1, "role": "client", "device": "mpt0", "state": "up", "paths": [{"id": 0, "state": "up"}]}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MPTUNNEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Stand in for the loop; return what it was asked to run."""
    asked: Runs = []

    monkeypatch.setitem(
        sys.modules, "mptunnel.program", SimpleNamespace(run_server=asked.append, run_client=asked.append)
    )
    monkeypatch.setattr(cli, "_has_net_admin", lambda: True)
    return asked


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a module of ours by a few functions."""

    def replace(name: str, **functions: Any) -> None:
        module = SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"mptunnel.{name}", module)
        monkeypatch.setattr(mptunnel, name, module, raising=False)

    return replace


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]


def listening(path: Path, answers: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Answer on a control socket."""
    return answering(path, lambda verb, _: answers[verb])


def _links(process: int) -> list[str]:
    """What a process's descriptors are."""
    found = []
    for each in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(each.readlink()))
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run what has to fail; return exit code and the one line it says."""
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("mptunnel: ")
    return code, err


def test_s_runs_the_server_and_nothing_else(runs: Runs) -> None:
    assert cli.run(["-s"]) == 0
    assert runs == [ServerSettings()]


def test_c_runs_the_client_over_the_given_interfaces(runs: Runs) -> None:
    assert cli.run(["-c", "Vpn.example:6000", "-i", "10.0.0.2", "-i", "wlan0", "-v"]) == 0
    assert runs == [ClientSettings(server="Vpn.example", port=6000, interfaces=("10.0.0.2", "wlan0"))]
    assert logging.getLogger("mptunnel").level == logging.DEBUG


def test_an_ipv6_server_needs_no_brackets(runs: Runs) -> None:
    assert cli.run(["-c", "2001:db8::1"]) == 0
    assert cli.run(["-c", "[2001:db8::1]:6000"]) == 0
    assert [(settings.server, settings.port) for settings in runs] == [("2001:db8::1", 5000), ("2001:db8::1", 6000)]


def test_the_defaults_in_the_help_are_the_settings_own() -> None:
    settings = ServerSettings()
    assert {name: Path(place) for name, place in commands.PLACES.items()} == {
        "state_dir": settings.state_dir,
        "run_dir": settings.run_dir,
    }


def test_command_line_beats_environment_beats_file(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mptunnel.toml"
    file.write_text('server = true\nport = 6001\nmtu = 1301\nnetwork = "10.1.0.0/24"\n')
    monkeypatch.setenv("MPTUNNEL_CONFIG", str(file))
    monkeypatch.setenv("MPTUNNEL_PORT", "6002")
    monkeypatch.setenv("MPTUNNEL_MTU", "1302")
    assert cli.run(["--mtu", "1303"]) == 0
    settings = runs[0]
    assert (settings.port, settings.mtu, str(settings.network4)) == (6002, 1303, "10.1.0.0/24")


def test_offload_is_on_unless_it_is_switched_off_in_any_of_three_ways(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mptunnel.toml"
    file.write_text("offload = false\n")
    for arguments in (["-s"], ["-s", "--no-offload"], ["-c", "host", "--no-offload"], ["-s", "--config", str(file)]):
        assert cli.run(arguments) == 0
    monkeypatch.setenv("MPTUNNEL_OFFLOAD", "0")
    for arguments in (["-s"], ["-c", "host"], ["-s", "--offload"]):
        assert cli.run(arguments) == 0
    assert [settings.offload for settings in runs] == [True, False, False, False, False, False, True]


def test_interfaces_in_the_environment_are_separated_by_spaces(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPTUNNEL_CLIENT", "host")
    monkeypatch.setenv("MPTUNNEL_INTERFACE", "wlan0 10.0.0.2")
    assert cli.run([]) == 0
    assert runs[0].interfaces == ("wlan0", "10.0.0.2")


def test_a_token_is_never_taken_from_the_environment(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPTUNNEL_JOIN", TOKEN)
    assert cli.run(["-c", "host"]) == 0
    assert runs[0].join is None


def test_a_token_on_the_command_line_is_taken_with_a_warning(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-c", "host", "--join", TOKEN]) == 0
    assert runs[0].join == JoinToken.decode(TOKEN)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: the token on the command line can be seen" in err
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "say -s to be the server, or -c SERVER"),
        (["-s", "-c", "x"], "-s and -c exclude each other"),
        (["-s", "-i", "x"], "-i is for the client"),
        (["-c", "x", "--lan"], "--lan is for the server"),
        (["-c"], "option '-c' requires an argument"),
        (["-c", ""], "server '': neither a host's name nor an address"),
        (["-c", "x:70000"], "port '70000' is not a number from 1 to 65535"),
        (["-s", "-p", "70000"], "port 70000 is not a number"),
        (["-s", "-p", "0"], "port 0 is not a number"),
        (["-c", "x", "--idle-probe", "0"], "idle probe interval 0 s"),
        (["-c", "x", "--alarm", "5"], "gap alarm after 5 ms is not from 10 to 60000 ms"),
        (["-s", "--alarm", "100"], "--alarm is for the client"),
        (["-s", "--on-event", "/nowhere"], "--on-event /nowhere: no such file or directory"),
        (["-c", "x", "--on-event", "/etc"], "--on-event /etc: not a file"),
        (["-s", "-p", "x"], "-p: 'x' is not a valid integer"),
        (["-s", "-t", "tun0"], "mpt0 to mpt31"),
        (["-s", "-v", "-q"], "-v and -q exclude each other"),
        (["-s", "host"], "-s takes no value"),
        (["-c", "x", "-i", "a", "b"], "every interface has an -i of its own"),
        (["-c", "x", "--join", TOKEN[:40], TOKEN[40:]], "goes in quotes"),
        (["-c", "x", "--join", TOKEN[:40]], "40 characters, a whole one has 74"),
        (["-c", "x", "--join", TOKEN.replace("A", "B", 1)], "checksum"),
        (["-c", "x", *(f"-ieth{n}" for n in range(9))], "9 times -i"),
        (["-c", "x", "--mode", "backup"], "not built yet"),
        (["-c", "x", "--server-key", "abc"], "--server-key: 3 characters"),
        (["-c", "x", "--config", "/nonexistent/c"], "cannot read configuration /nonexistent/c"),
        (["--colour"], "no such option"),
        (["sttus"], "did you mean status?"),
        (["token"], "there are new, list, revoke"),
        (["peer", "ad"], "did you mean add?"),
        (["peer", "add"], "missing argument 'NAME'"),
        (["-s", "status"], "-s does not go with the command 'status'"),
        (["status", "-t", "eth0"], "mpt0 to mpt31"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], why: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, *arguments)
    assert code == 2
    assert why in line
    assert runs == []


def test_an_error_names_where_the_value_came_from(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPTUNNEL_PORT", "x")
    assert "MPTUNNEL_PORT: 'x' is not a valid integer" in refused(capsys, "-s")[1]
    monkeypatch.delenv("MPTUNNEL_PORT")
    monkeypatch.setenv("MPTUNNEL_CLIENT", "host")
    assert "-s and MPTUNNEL_CLIENT exclude each other" in refused(capsys, "-s")[1]
    monkeypatch.delenv("MPTUNNEL_CLIENT")
    file = tmp_path / "c"
    file.write_text("interface = 'wlan0'\n")
    assert f"interface in {file} is for the client" in refused(capsys, "-s", "--config", str(file))[1]
    assert runs == []


def test_an_error_of_the_run_gives_its_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    def refuse(*_: object) -> None:
        raise RefusedError("the server has no address left")

    monkeypatch.setitem(sys.modules, "mptunnel.program", SimpleNamespace(run_client=refuse))
    assert refused(capsys, "-c", "host") == (7, "mptunnel: the server has no address left\n")
    assert runs == []


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mptunnel.program", SimpleNamespace(run_server=interrupt))
    assert cli.run(["-s"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert runs == []


def test_without_privilege_the_line_to_run_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    monkeypatch.setattr(cli, "_has_net_admin", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["/opt/my venv/bin/mptunnel"])
    monkeypatch.setenv("MPTUNNEL_MTU", "1300")
    code, line = refused(capsys, "-c", "host", "-i", "wlan0")
    assert code == 5
    assert line.endswith("run: sudo MPTUNNEL_MTU=1300 '/opt/my venv/bin/mptunnel' -c host -i wlan0\n")
    monkeypatch.setattr(sys, "argv", ["/src/mptunnel/__main__.py"])
    assert f"{sys.executable} -m mptunnel cleanup mpt1" in refused(capsys, "cleanup", "mpt1")[1]
    assert runs == []
    assert cli.run(["-s", "--dry-run"]) == 0  # changes nothing, so needs nothing
    assert len(runs) == 1


def test_nobody_is_asked_for_a_token_before_the_privilege_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    monkeypatch.setattr(cli, "_has_net_admin", lambda: False)
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(capsys, "-c", "host", "--join", "-")[0] == 5
    assert runs == []


def test_root_without_the_capability_is_told_about_containers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    monkeypatch.setattr(cli, "_has_net_admin", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, line = refused(capsys, "-s")
    assert code == 5
    assert "--cap-add NET_ADMIN" in line
    assert runs == []


@pytest.mark.parametrize(("mask", "expected"), [("0000000000001000", True), ("ffffffffffffefff", False), ("0", False)])
def test_the_capability_is_read_from_the_kernel(mask: str, monkeypatch: pytest.MonkeyPatch, *, expected: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"Name:\tx\nCapEff:\t{mask}\n")
    assert cli._has_net_admin() is expected


def test_help_imports_nothing_that_takes_long() -> None:
    heavy = ("cryptography", "rich", "asyncio", "json", "logging", "mptunnel.program", "mptunnel.config", "tomllib")
    script = (
        "import sys; from mptunnel.cli import run; assert run(['--help']) == 0;"
        f"sys.stderr.write(' '.join(name for name in {heavy!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_help_shows_every_option_in_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert [
        text.index(f"\n{section}:\n") for section in ("Role", "Client", "Server", "Both", "Talk", "Commands")
    ] == sorted(text.index(f"\n{section}:\n") for section in ("Role", "Client", "Server", "Both", "Talk", "Commands"))
    for parameter in cli.cli.params:
        assert max(parameter.opts, key=len) in text
    assert "  sudo mptunnel -s  " in text


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"mptunnel {mptunnel.__version__}\n"


def test_a_reader_who_has_gone_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mptunnel", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=CHECKOUT, check=False
    )
    os.close(write)
    assert done.stderr == b""


def test_status_without_a_program_is_3(capsys: pytest.CaptureFixture[str], places: list[str]) -> None:
    code, line = refused(capsys, "status", *places)
    assert code == 3
    assert "start it with -s or -c" in line


def test_status_prints_text_or_json(capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path) -> None:
    with listening(tmp_path / "run" / "mpt0.sock", {"status": CLIENT_STATUS}):
        assert cli.run(["status", *places]) == 0
        assert capsys.readouterr().out.startswith("mpt0: client of")
        assert cli.run([*places, "status", "--json"]) == 0  # the places may also stand before the command
        assert json.loads(capsys.readouterr().out) == CLIENT_STATUS


def test_status_with_reset_shows_the_receipts_once_more_and_begins_them_afresh(
    capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path
) -> None:
    asked: list[str] = []

    class Noting(dict[str, Any]):
        def __getitem__(self, verb: str) -> Any:
            asked.append(verb)
            return super().__getitem__(verb)

    with listening(tmp_path / "run" / "mpt0.sock", Noting({"status": CLIENT_STATUS, "receipts-reset": None})):
        assert cli.run(["status", "--reset", *places]) == 0
    assert asked == ["status", "receipts-reset"]
    assert capsys.readouterr().out.startswith("mpt0: client of")


def test_status_shows_all_instances_or_the_chosen_one(
    capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path
) -> None:
    other = CLIENT_STATUS | {"device": "mpt1"}
    with (
        listening(tmp_path / "run" / "mpt0.sock", {"status": CLIENT_STATUS}),
        listening(tmp_path / "run" / "mpt1.sock", {"status": other}),
    ):
        assert cli.run(["status", *places]) == 0
        out = capsys.readouterr().out
        assert "mpt0: client" in out
        assert "\n\nmpt1: client" in out
        assert cli.run(["status", "-t", "mpt1", *places]) == 0
        assert "mpt0" not in capsys.readouterr().out
        code, line = refused(capsys, "-t", "mpt2", "status", *places)
        assert code == 3
        assert "no mptunnel runs as mpt2; what runs is mpt0, mpt1" in line


@pytest.mark.parametrize(("state", "code"), [("up", 0), ("down", 4)])
def test_status_tells_by_exit_code_whether_all_is_well(
    state: str, code: int, places: list[str], tmp_path: Path
) -> None:
    status = CLIENT_STATUS | {"paths": [{"id": 0, "state": state}]}
    with listening(tmp_path / "run" / "mpt0.sock", {"status": status}):
        assert cli.run(["status", "--exit-code", *places]) == code
        assert cli.run(["status", *places]) == 0


def test_events_are_printed_as_they_come_until_the_program_stops(
    capsys: pytest.CaptureFixture[str], places: list[str], stand_in: Callable[..., None]
) -> None:
    code, line = refused(capsys, "events", *places)
    assert code == 3
    assert "start it with -s or -c" in line
    told = [
        {"event": "path-down", "time": 0.25, "device": "mpt0", "peer": "vpn", "path": "wlan0", "why": "silent"},
        {"event": "gap", "time": 1.0, "device": "mpt0", "peer": "vpn", "silent_ms": 100.2},
    ]

    def listen(path: Path) -> Iterator[dict[str, Any]]:
        assert path.name == "mpt0.sock"
        yield from told
        raise NotRunningError("mpt0 has stopped")

    stand_in("control", listen=listen, find=lambda run_dir, _: [run_dir / "mpt0.sock"])
    assert cli.run(["events", *places]) == 3
    out, err = capsys.readouterr()
    assert [line.partition(" ")[2] for line in out.splitlines()] == [
        "path-down vpn wlan0: silent",
        "gap vpn: silent 100 ms",
    ]
    assert err == "mptunnel: mpt0 has stopped\n"
    assert cli.run(["events", "--json", *places]) == 3
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == told


def test_events_of_several_instances_want_a_choice(
    capsys: pytest.CaptureFixture[str], places: list[str], stand_in: Callable[..., None]
) -> None:
    stand_in("control", find=lambda run_dir, _: [run_dir / "mpt0.sock", run_dir / "mpt1.sock"])
    code, line = refused(capsys, "events", *places)
    assert code == 2
    assert "several run (mpt0, mpt1): choose one by -t" in line


def test_ctrl_c_ends_the_events_without_a_word(places: list[str], tmp_path: Path) -> None:
    with listening(tmp_path / "run" / "mpt0.sock", {"events": Listening({})}):
        command = [sys.executable, "-m", "mptunnel", "events", *places]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: "socket:" in "".join(_links(process.pid)), "it listens")
        process.send_signal(signal.SIGINT)
        assert b"".join(process.communicate(timeout=20)).strip() == b""
        assert process.returncode == 130


def test_watching_is_for_people_at_a_terminal(
    capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path
) -> None:
    assert "start it with -s or -c" in refused(capsys, "status", "--watch", *places)[1]
    with listening(tmp_path / "run" / "mpt0.sock", {"status": CLIENT_STATUS}):
        code, line = refused(capsys, "status", "--watch", *places)
        assert code == 2
        assert "--watch draws on a terminal" in line
        assert "reset first" in refused(capsys, "status", "--watch", "--reset", *places)[1]
        assert "--json and --exit-code are for programs" in refused(capsys, "status", "--watch", "--json", *places)[1]


def test_a_new_token_stands_alone_on_stdout(capsys: pytest.CaptureFixture[str], places: list[str]) -> None:
    assert cli.run(["token", "new", "Anna's phone", "--hours", "2", *places]) == 0
    out, err = capsys.readouterr()
    JoinToken.decode(out)
    assert out.count("\n") == 1
    assert "good for 2 h" in err
    assert out.strip() not in err


def test_tokens_are_listed_and_revoked(capsys: pytest.CaptureFixture[str], places: list[str]) -> None:
    cli.run(["token", "new", *places])
    capsys.readouterr()
    assert cli.run(["token", "list", "--json", *places]) == 0
    (token,) = json.loads(capsys.readouterr().out)
    assert cli.run(["token", "revoke", token["ident"], *places]) == 0
    assert cli.run(["token", "list", *places]) == 0
    assert "revoked" in capsys.readouterr().out
    assert refused(capsys, "token", "revoke", token["ident"], *places)[0] == 2


def test_a_peer_without_a_key_gets_a_stock_configuration(
    capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path
) -> None:
    assert cli.run(["peer", "add", "phone", "--psk", "--endpoint", "VPN.example", *places]) == 0
    out, err = capsys.readouterr()
    file = parse_wireguard(out)
    (record,) = StateDir(tmp_path / "state").peers()
    assert public_key(file.private_key) == record.public_key
    assert (file.psk, record.stock) == (record.psk, True)
    assert file.endpoint == ("vpn.example", 5000)
    assert "phone is let in" in err
    assert encode_key(file.private_key) not in (tmp_path / "state" / "server" / "peers").read_text()


def test_a_peer_with_its_own_key_keeps_it(
    capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path
) -> None:
    key = encode_key(public_key(bytes([9]) * 32))
    assert cli.run(["peer", "add", "van", "--public-key", key, "--endpoint", "h:1", *places]) == 0
    out, err = capsys.readouterr()
    (record,) = StateDir(tmp_path / "state").peers()
    assert (encode_key(record.public_key), record.stock) == (key, False)
    assert "\nPrivateKey" not in out
    server = encode_key(public_key(StateDir(tmp_path / "state").server_key().private_key))
    assert f"--server-key {server}" in err
    assert cli.run(["peer", "list", *places]) == 0
    assert "van" in capsys.readouterr().out
    assert cli.run(["peer", "remove", "van", *places]) == 0
    assert cli.run(["peer", "list", "--json", *places]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("address", "endpoint", "note"),
    [
        ("8.8.4.4/24", "8.8.4.4:5000", False),
        ("2001:4860::5/64", "[2001:4860::5]:5000", False),
        ("10.0.0.2/8", "SERVER:5000", True),
    ],
)
def test_the_endpoint_is_this_hosts_global_address_or_a_word_to_replace(
    address: str,
    endpoint: str,
    capsys: pytest.CaptureFixture[str],
    places: list[str],
    stand_in: Callable[..., None],
    *,
    note: bool,
) -> None:
    way = Gateway(IPv4Address("8.8.4.1"), 0)
    link = Link("eth0", 1, "", True, (ip_interface(address),), way, way, 1500)
    stand_in("netlink", snapshot=lambda: (link,))
    assert cli.run(["peer", "add", "phone", *places]) == 0
    out, err = capsys.readouterr()
    assert f"Endpoint = {endpoint}\n" in out
    assert ("place of SERVER" in err) is note


def test_a_wrong_peer_changes_nothing(capsys: pytest.CaptureFixture[str], places: list[str], tmp_path: Path) -> None:
    for arguments in (["a b"], ["phone", "--public-key", "x"], ["phone", "--endpoint", "a:b"]):
        assert refused(capsys, "peer", "add", *arguments, *places)[0] == 2
    assert not (tmp_path / "state").exists()


def test_genkey_and_pubkey_are_those_of_wg(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    assert cli.run(["genkey"]) == 0
    private = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(private))
    assert cli.run(["pubkey", *places]) == 0
    # RFC 7748, 6.1: Alice
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    monkeypatch.setattr(sys, "stdin", io.StringIO(encode_key(alice)))
    capsys.readouterr()
    assert cli.run(["pubkey", *places]) == 0
    assert capsys.readouterr().out == "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("nonsense"))
    assert refused(capsys, "pubkey", *places)[0] == 2


def test_pubkey_without_input_is_this_clients_and_stays_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, places: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert cli.run(["pubkey", *places]) == 0
    key = encode_key(public_key(StateDir(tmp_path / "state").client_key().private_key))
    assert capsys.readouterr().out == f"{key}\n{key}\n"


def test_cleanup_takes_one_instance_or_all(
    monkeypatch: pytest.MonkeyPatch, stand_in: Callable[..., None], places: list[str], tmp_path: Path
) -> None:
    done: list[Any] = []
    stand_in("host", cleanup=lambda *a: done.append(a), cleanup_all=lambda *a: done.append(a))
    monkeypatch.setattr(cli, "_has_net_admin", lambda: True)
    assert cli.run(["cleanup", "mpt3", *places]) == 0
    assert cli.run(["cleanup", *places]) == 0
    assert done == [(tmp_path / "run", "mpt3"), (tmp_path / "run",)]
    assert cli.run(["cleanup", "eth0", *places]) == 2
    assert len(done) == 2


@pytest.mark.parametrize(("arguments", "live"), [(["--live"], True), (["--no-live"], False), ([], False)])
def test_the_demos_exit_code_is_the_programs(
    arguments: list[str], stand_in: Callable[..., None], *, live: bool
) -> None:
    asked = []

    def main(*, live: bool) -> int:
        asked.append(live)
        return 1

    stand_in("demo", main=main)
    assert cli.run(["demo", *arguments]) == 1
    assert asked == [live]


@pytest.mark.parametrize(
    ("verbosity", "said"),
    [(-1, "warning: careful\n"), (0, "path up\nwarning: careful\n"), (1, "why\npath up\nwarning: careful\n")],
)
def test_the_log_is_lower_case_on_stderr_and_as_loud_as_asked(
    verbosity: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    cli._set_up_logging(verbosity)
    log = logging.getLogger("mptunnel.path")
    log.debug("why")
    log.info("path %s", "up")
    log.warning("careful")
    assert capsys.readouterr() == ("", said)


def test_the_log_bears_the_time_where_nobody_else_notes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    cli._set_up_logging(0)
    logging.getLogger("mptunnel").info("path up")
    err = capsys.readouterr().err
    assert err.startswith("20")
    assert err.endswith(" path up\n")


def test_an_empty_directory_is_a_mistake_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-s", "--state-dir", ""], ["token", "list", "--state-dir", ""], ["status", "--run-dir", ""]):
        assert cli.run(words) == 2
        assert "a directory is expected" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_in_a_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mptunnel", "genkey"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "mptunnel: cannot write: no space left on device\n"
    assert "Traceback" not in done.stderr


def test_a_name_that_does_not_resolve_has_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-c", "nosuch.invalid", "-i", "lo", "--dry-run"]) == 2
    assert "does not resolve" in capsys.readouterr().err
