"""From what was given (command line, environment, TOML file) to settings; files named by options are read here.

`given` holds only what was given, by parameter name; `labels` how the user wrote it, for messages: `-c`,
`MPTUNNEL_CLIENT`, `client in FILE`.
"""

from __future__ import annotations

import os
import stat
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mptunnel.config import (
    ClientSettings,
    DnsMode,
    JoinToken,
    ServerSettings,
    WireGuardFile,
    decode_key,
    nearest,
    parse_dns,
    parse_interfaces,
    parse_mode,
    parse_network,
    parse_routes,
    parse_server,
    parse_wireguard,
)
from mptunnel.errors import ConfigError, NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import click

    Given = Mapping[str, Any]
    Labels = Mapping[str, str]

_CLIENT_ONLY = ("interface", "join", "server_key", "wireguard", "route", "dns", "idle_probe", "alarm")
_SERVER_ONLY = ("network", "lan")
_NOT_IN_FILE = frozenset({"config", "help", "version"})
_WIREGUARD_PORT: Final = 51820
_MIN_MTU: Final = 1280
_MAX_INPUT: Final = 1 << 20


def is_server(given: Given, labels: Labels) -> bool:
    """Return which role is meant. Raises ConfigError where none is, or both, or an option is the other role's."""
    clients = [name for name in ("client", "wireguard") if name in given]
    server = "server" in given
    if server and clients:
        raise ConfigError(
            f"{labels['server']} and {labels[clients[0]]} exclude each other: this machine is the server or a client"
        )
    if not server and not clients:
        raise ConfigError("say -s to be the server, or -c SERVER to be a client of one; see 'mptunnel --help'")
    strange = [name for name in (_CLIENT_ONLY if server else _SERVER_ONLY) if name in given]
    if strange:
        role = "client" if server else "server"
        raise ConfigError(f"{labels[strange[0]]} is for the {role}; leave it out here")
    return server


def server_settings(given: Given) -> ServerSettings:
    """Return the settings of a server. Raises ConfigError."""
    network = parse_network(given["network"]) if "network" in given else None
    return ServerSettings(**_common(given), network4=network, lan=bool(given.get("lan")))


def client_settings(given: Given, labels: Labels) -> tuple[ClientSettings, list[str]]:
    """Return the settings of a client, and what it should be warned of. Raises ConfigError."""
    warnings: list[str] = []
    file = _wireguard_file(given, warnings)
    server, port = _server(given, labels, file)
    join = _join_token(given, labels, warnings)
    server_key = decode_key(given["server_key"], labels["server_key"]) if "server_key" in given else None
    if join is not None and server_key not in {None, join.server_public}:
        raise ConfigError("--join and --server-key are of different servers; leave one of them out")
    if file is not None and (join is not None or server_key is not None):
        strange = labels["join" if join is not None else "server_key"]
        raise ConfigError(f"{labels['wireguard']} and {strange} exclude each other: the file names the server's key")
    common = _common(given)
    if port is not None:
        common["port"] = port
    if file is not None and file.mtu is not None and "mtu" not in given:
        common["mtu"] = max(file.mtu, _MIN_MTU)
    if "idle_probe" in given:
        common["idle_probe"] = given["idle_probe"]
    if "alarm" in given:
        common["alarm_ms"] = given["alarm"]
    dns_mode, dns = parse_dns(given.get("dns", ()))
    routes = parse_routes(given.get("route", ()))
    if file is not None and "dns" not in given:
        dns_mode, dns = (DnsMode.FIXED, file.dns) if file.dns else (DnsMode.KEEP, None)
    if file is not None and "route" not in given:
        routes = file.allowed_ips
    interfaces = parse_interfaces(given.get("interface", ()))
    settings = ClientSettings(
        **common,
        server=server,
        interfaces=interfaces,
        routes=routes,
        dns=dns,
        dns_mode=dns_mode,
        join=join,
        server_key=server_key,
        wireguard=file,
    )
    return settings, warnings


def read_config(path: Path, parameters: Iterable[click.Parameter]) -> dict[str, Any]:
    """Return the options of a TOML file by parameter name. Raises ConfigError naming the key that does not fit."""
    try:
        document = tomllib.loads(read_file(path, "configuration"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {str(error)[0].lower()}{str(error)[1:]}") from None
    known = {name: parameter for parameter in parameters if (name := _long_name(parameter)) not in _NOT_IN_FILE}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            close = nearest(key, known)
            hint = f"did you mean {close}?" if close else "the keys are the long names of the options"
            raise ConfigError(f"{path}: {key!a} is not an option; {hint}")
        parameter = known[key]
        values[parameter.name or key] = _toml_value(parameter, value, f"{path}: {key}")
    return values


def read_token(text: str) -> JoinToken:
    """Return the token given as itself, as @FILE, or as - for stdin. Raises ConfigError."""
    if text == "-":
        if sys.stdin.isatty():
            sys.stderr.write("join token: ")
            sys.stderr.flush()
            return JoinToken.decode(sys.stdin.readline())
        pasted = sys.stdin.read(_MAX_INPUT)
        if not pasted.strip():
            raise ConfigError("--join -: nothing came on stdin; the token is expected there")
        return JoinToken.decode(pasted)
    if text.startswith("@"):
        return JoinToken.decode(read_file(Path(text[1:]).expanduser(), "join token"))
    return JoinToken.decode(text)


def read_file(path: Path, what: str) -> str:
    """Return the text in a file the user named. Raises ConfigError or NotPermittedError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_INPUT + 1)
    except PermissionError:
        raise NotPermittedError(f"cannot read {what} {path}: permission denied; run it as root, with sudo") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot read {what} {path}: {why}; check the file's name") from None
    if len(data) > _MAX_INPUT:
        raise ConfigError(f"cannot read {what} {path}: more than {_MAX_INPUT} bytes; is it the right file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {what} {path}: it is not text; is it the right file?") from None


def _common(given: Given) -> dict[str, Any]:
    """Return the arguments of `Settings` that were given."""
    values: dict[str, Any] = {name: given[name] for name in ("port", "mtu", "dry_run", "offload") if name in given}
    if "tun" in given:
        values["device"] = given["tun"]
    if "mode" in given:
        values["mode"] = parse_mode(given["mode"])
    for name in ("state_dir", "run_dir"):
        if name in given:
            if not given[name]:
                raise ConfigError(f"--{name.replace('_', '-')}: a directory is expected, not an empty word")
            values[name] = Path(given[name]).absolute()
    if given.get("script") == "none":
        values["no_script"] = True
    elif "script" in given:
        values["script"] = _file("--script", Path(given["script"]), "give a file, or 'none'")
    if "on_event" in given:
        values["on_event"] = _program("--on-event", Path(given["on_event"]))
    return values


def _file(option: str, path: Path, advice: str) -> Path:
    """Return the absolute path of a file that an option names. Raises ConfigError, with advice, where there is none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{option} {path}: {(error.strerror or str(error)).lower()}; {advice}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{option} {path}: not a file; {advice}")
    return path.absolute()


def _program(option: str, path: Path) -> Path:
    """Return the absolute path of a program that an option names. Raises ConfigError where it cannot be run."""
    program = _file(option, path, "give a program's path")
    if not os.access(program, os.X_OK):
        raise ConfigError(f"{option} {path}: cannot be executed; chmod +x {path}")
    return program


def _server(given: Given, labels: Labels, file: WireGuardFile | None) -> tuple[str, int | None]:
    """Return host and port of the server; the port is None where the default holds."""
    endpoint = file.endpoint if file is not None else None
    if "client" not in given:
        if endpoint is None:
            raise ConfigError(f"{labels['wireguard']}: there is no Endpoint in the file; add -c SERVER:PORT")
        return endpoint
    host, port = parse_server(given["client"])
    if port is not None and given.get("port", port) != port:
        raise ConfigError(f"{labels['client']} {given['client']} and {labels['port']} {given['port']} name two ports")
    if port is None and "port" not in given and file is not None:
        port = endpoint[1] if endpoint else _WIREGUARD_PORT
    return host, port


def _join_token(given: Given, labels: Labels, warnings: list[str]) -> JoinToken | None:
    if "join" not in given:
        return None
    text = given["join"]
    if text != "-" and not text.startswith("@") and labels["join"].startswith("-"):
        warnings.append("the token on the command line can be seen by every user here (ps); better --join @FILE or -")
    return read_token(text)


def _wireguard_file(given: Given, warnings: list[str]) -> WireGuardFile | None:
    if "wireguard" not in given:
        return None
    path = Path(given["wireguard"])
    try:
        file = parse_wireguard(read_file(path, "WireGuard configuration"))
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from None
    if path.stat().st_mode & 0o077:
        warnings.append(f"{path}: others can read the private key in it; chmod 600 {path}")
    warnings += (f"{path}: {warning}" for warning in file.warnings)
    if file.mtu is not None and file.mtu < _MIN_MTU:
        warnings.append(f"{path}: MTU {file.mtu} is less than a tunnel can have; {_MIN_MTU} is used")
    return file


def _toml_value(parameter: click.Parameter, value: Any, where: str) -> Any:
    """Return the value as click takes it. Raises ConfigError where it is of another type."""
    if getattr(parameter, "is_flag", False):
        expected, fits = "true or false", isinstance(value, bool)
    elif getattr(parameter, "multiple", False):
        value = [value] if isinstance(value, str) else value
        expected = "a text or a list of texts"
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif parameter.type.name == "integer":
        expected, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif parameter.type.name == "float":
        expected, fits = "a number", isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        expected, fits = "a text in quotes", isinstance(value, str)
    if not fits:
        raise ConfigError(f"{where}: {expected} is expected")
    return value


def _long_name(parameter: click.Parameter) -> str:
    names: Sequence[str] = parameter.opts
    return next((name[2:] for name in names if name.startswith("--")), "")
