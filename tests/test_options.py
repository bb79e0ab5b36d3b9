"""From what was given to settings, with the files that options name."""

from __future__ import annotations

import io
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.cli import cli
from mptunnel.config import ALL_ROUTES, DnsMode, JoinToken
from mptunnel.errors import ConfigError, NotPermittedError
from mptunnel.keys import encode_key
from mptunnel.options import client_settings, is_server, read_config, read_file, read_token, server_settings

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = JoinToken(bytes(range(32)), bytes(16))
KEY = encode_key(bytes([7]) * 32)
WIREGUARD = f"""\
[Interface]
PrivateKey = {encode_key(bytes([1]) * 32)}
Address = 10.2.0.2/32
DNS = 10.2.0.1
PostUp = reboot
[Peer]
PublicKey = {KEY}
AllowedIPs = 10.0.0.0/8
Endpoint = wg.example:51999
"""


class Labels(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"--{name}"


def client(**given: Any) -> Any:
    return client_settings({"client": "host"} | given, Labels())[0]


@pytest.fixture
def wireguard(tmp_path: Path) -> Path:
    path = tmp_path / "wg.conf"
    path.write_text(WIREGUARD)
    path.chmod(0o600)
    return path


def test_the_role_is_the_one_that_was_given() -> None:
    assert is_server({"server": True}, Labels())
    assert not is_server({"client": "x"}, Labels())
    assert not is_server({"wireguard": "file"}, Labels())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "say -s to be the server, or -c SERVER"),
        ({"server": True, "client": "x"}, "--server and --client exclude each other"),
        ({"server": True, "wireguard": "x"}, "--server and --wireguard exclude each other"),
        ({"server": True, "interface": ("x",)}, "--interface is for the client"),
        ({"server": True, "join": "x"}, "--join is for the client"),
        ({"client": "x", "lan": True}, "--lan is for the server"),
        ({"client": "x", "network": "x"}, "--network is for the server"),
    ],
)
def test_a_mixed_up_role_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        is_server(given, Labels())


def test_a_server_takes_what_it_is_told(tmp_path: Path) -> None:
    script = tmp_path / "my.sh"
    script.write_text("")
    settings = server_settings(
        {"tun": "mpt3", "port": 6000, "network": "10.9.0.0/24", "lan": True, "script": str(script), "state_dir": "x"}
    )
    assert (settings.device, settings.port, settings.lan) == ("mpt3", 6000, True)
    assert settings.network4 == IPv4Network("10.9.0.0/24")
    assert (settings.script, settings.no_script) == (script, False)
    assert settings.state_dir.is_absolute()
    assert server_settings({}).network4 is None


def test_no_script_at_all_is_a_script_called_none() -> None:
    settings = server_settings({"script": "none"})
    assert (settings.script, settings.no_script) == (None, True)


def test_a_script_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(ConfigError, match="give a file, or 'none'"):
            server_settings({"script": str(path)})


def test_a_client_takes_what_it_is_told() -> None:
    settings = client(
        client="Host:6000", interface=("wlan0", "10.0.0.2"), route=("192.0.2.0/24",), dns=("9.9.9.9",), server_key=KEY
    )
    assert (settings.server, settings.port) == ("Host", 6000)
    assert settings.interfaces == ("wlan0", "10.0.0.2")
    assert settings.routes == (IPv4Network("192.0.2.0/24"),)
    assert (settings.dns_mode, settings.dns) == (DnsMode.FIXED, (IPv4Address("9.9.9.9"),))
    assert settings.server_key == bytes([7]) * 32
    assert client().routes == (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
    assert client(idle_probe=5.0).idle_probe == 5.0
    assert (client().alarm_ms, client(alarm=100).alarm_ms) == (None, 100)


def test_the_program_for_events_must_be_one_that_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tell"
    program.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match=r"cannot be executed; chmod \+x"):
        server_settings({"on_event": str(program)})
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert client(on_event="tell").on_event == server_settings({"on_event": "tell"}).on_event == program
    assert client().on_event is None


def test_the_port_of_the_server_comes_from_its_name_or_from_its_option() -> None:
    assert client().port == 5000
    assert client(port=6000).port == 6000
    assert client(client="host:6000", port=6000).port == 6000
    with pytest.raises(ConfigError, match="name two ports"):
        client(client="host:6001", port=6000)


def test_a_token_and_a_key_of_different_servers_are_refused() -> None:
    token = TOKEN.encode()
    assert client(join=token, server_key=encode_key(TOKEN.server_public)).join == TOKEN
    with pytest.raises(ConfigError, match="different servers"):
        client(join=token, server_key=KEY)


def test_only_a_token_on_the_command_line_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"\n{TOKEN.encode()}\n")
    given = {"client": "host", "join": TOKEN.encode()}
    assert any("ps" in warning for warning in client_settings(given, {"join": "--join"})[1])
    assert not client_settings(given, {"join": "join in /etc/mptunnel.toml"})[1]
    given["join"] = f"@{tmp_path / 'token'}"
    settings, warnings = client_settings(given, {"join": "--join"})
    assert settings.join == TOKEN
    assert not warnings


def test_a_token_comes_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOKEN.encode()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text[:30]}\n  {text[30:]}\n"))
    assert read_token("-") == TOKEN
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match="nothing came on stdin"):
        read_token("-")


def test_a_terminal_is_asked_for_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO(f"{TOKEN.encode()}\nnot read any more\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert read_token("-") == TOKEN
    assert capsys.readouterr() == ("", "join token: ")


def test_a_wireguard_file_gives_server_routes_and_resolver(wireguard: Path) -> None:
    settings, warnings = client_settings({"wireguard": str(wireguard)}, Labels())
    assert (settings.server, settings.port) == ("wg.example", 51999)
    assert settings.routes == (IPv4Network("10.0.0.0/8"),)
    assert (settings.dns_mode, settings.dns) == (DnsMode.FIXED, (IPv4Address("10.2.0.1"),))
    assert warnings == [f"{wireguard}: line 5: PostUp is a shell command and is not run"]


def test_options_beside_a_wireguard_file_win(wireguard: Path) -> None:
    given = {"wireguard": str(wireguard), "client": "other", "route": ("all",), "dns": ("keep",)}
    settings, _ = client_settings(given, Labels())
    assert (settings.server, settings.port) == ("other", 51999)
    assert settings.routes == ALL_ROUTES
    assert settings.dns_mode is DnsMode.KEEP
    assert client_settings(given | {"port": 1}, Labels())[0].port == 1
    assert client_settings(given | {"client": "other:2"}, Labels())[0].port == 2


def test_a_wireguard_file_without_endpoint_or_dns(wireguard: Path) -> None:
    wireguard.write_text(WIREGUARD.replace("Endpoint", "# Endpoint").replace("DNS", "# DNS"))
    with pytest.raises(ConfigError, match="no Endpoint in the file; add -c"):
        client_settings({"wireguard": str(wireguard)}, Labels())
    settings, _ = client_settings({"wireguard": str(wireguard), "client": "host"}, Labels())
    assert (settings.port, settings.dns_mode) == (51820, DnsMode.KEEP)


@pytest.mark.parametrize(("mtu", "used", "warned"), [(1400, 1400, False), (1200, 1280, True)])
def test_the_mtu_of_a_wireguard_file_is_used_but_never_below_1280(
    mtu: int, used: int, *, warned: bool, wireguard: Path
) -> None:
    wireguard.write_text(WIREGUARD.replace("PostUp = reboot", f"MTU = {mtu}"))
    settings, warnings = client_settings({"wireguard": str(wireguard)}, Labels())
    assert settings.mtu == used
    assert bool(warnings) is warned
    assert client_settings({"wireguard": str(wireguard), "mtu": 1300}, Labels())[0].mtu == 1300


def test_a_wireguard_file_that_others_can_read_is_warned_of(wireguard: Path) -> None:
    wireguard.chmod(0o644)
    _, warnings = client_settings({"wireguard": str(wireguard)}, Labels())
    assert f"{wireguard}: others can read the private key in it; chmod 600 {wireguard}" in warnings


def test_a_wrong_wireguard_file_is_named_with_its_line(wireguard: Path) -> None:
    wireguard.write_text(WIREGUARD + "x\n")
    with pytest.raises(ConfigError, match=f"{wireguard}: line 10: "):
        client_settings({"wireguard": str(wireguard)}, Labels())


@pytest.mark.parametrize("name", ["join", "server_key"])
def test_a_wireguard_file_excludes_our_own_ways_of_joining(name: str, wireguard: Path) -> None:
    value = {"join": TOKEN.encode(), "server_key": KEY}[name]
    with pytest.raises(ConfigError, match=f"--wireguard and --{name} exclude each other"):
        client_settings({"wireguard": str(wireguard), name: value}, Labels())


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * ((1 << 20) + 1))
    for name, why in (("no", "no such file"), ("", "is a directory"), ("binary", "not text"), ("large", "more than")):
        with pytest.raises(ConfigError, match=f"cannot read join token {tmp_path / name}: .*{why}"):
            read_file(tmp_path / name, "join token")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(NotPermittedError, match="with sudo"):
        read_file(tmp_path / "x", "join token")


def config(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return read_config(path, cli.params)


def test_a_toml_file_has_the_long_names_of_the_options(tmp_path: Path) -> None:
    text = """
client = "host"
interface = ["wlan0", "wwan0"]
route = "all"
port = 6000
state-dir = "/s"
dry-run = true
idle-probe = 5
alarm = 100
on-event = "/x"
"""
    assert config(tmp_path / "c", text) == {
        "client": "host",
        "interface": ["wlan0", "wwan0"],
        "route": ["all"],
        "port": 6000,
        "state_dir": "/s",
        "dry_run": True,
        "idle_probe": 5,
        "alarm": 100,
        "on_event": "/x",
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("port 6000", r"c: expected '=' .*line 1"),
        ("prot = 1", r"c: 'prot' is not an option; did you mean port\?"),
        ("state_dir = 'x'", r"did you mean state-dir\?"),
        ("zzz = 1", "the keys are the long names of the options"),
        ("config = 'x'", "is not an option"),
        ("version = true", "is not an option"),
        ("port = '6000'", r"c: port: a whole number is expected"),
        ("port = true", r"c: port: a whole number is expected"),
        ("lan = 1", "c: lan: true or false is expected"),
        ("client = 1", "c: client: a text in quotes is expected"),
        ("interface = [1]", "c: interface: a text or a list of texts is expected"),
        ("idle-probe = 'x'", "c: idle-probe: a number is expected"),
        ("[client]", "c: client: a text in quotes is expected"),
    ],
)
def test_a_wrong_toml_file_is_refused_by_key_and_reason(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        config(tmp_path / "c", text)
