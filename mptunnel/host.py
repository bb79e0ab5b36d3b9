"""The host's set-up: two shell scripts do it, this module tells them what, and takes it back after a crash.

A script gets a verb and its values as environment variables; nothing but addresses, numbers, interface names and paths
can become one, so no text from the network ever reaches a shell. It prints each command behind `[#]`, which is logged
at DEBUG (or shown under --dry-run, when it runs none). All of this blocks: the loop leaves it to its helper thread.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import subprocess
import sys
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mptunnel.config import instance_number, table_base
from mptunnel.errors import ConfigError, HostError, NotPermittedError
from mptunnel.state import LockedError, hold_lock, remove

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mptunnel.config import Settings

ROLES: Final = ("client", "server")

_SBIN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where ip and nft are; not on everybody's PATH
_SECONDS: Final = 60.0  # the longest a script may take; they need some 20 ms, and resolvectl may ask a bus
_COMMAND: Final = "[#] "
_WARNING: Final = "warning: "
_VERB: Final = re.compile(r"[a-z]+(-[a-z]+)*")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")
_RESOLV_CONF: Final = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")  # the first one without resolved's stub
_ADDRESSES: Final = (IPv4Address, IPv6Address, IPv4Interface, IPv6Interface, IPv4Network, IPv6Network)

_log = logging.getLogger(__name__)


def find_script(role: str, settings: Settings) -> Path | None:
    """Return the script of this role, None where the host is to be left alone (`--script none`)."""
    if settings.no_script:
        return None
    if settings.script is None:
        return _bundled(role)
    if not settings.script.is_file():
        raise ConfigError(f"--script {settings.script}: no such file")
    return settings.script.absolute()


def instance(run_dir: Path, device: str) -> dict[str, object]:
    """Return the values every verb of this instance gets."""
    return {"device": device, "saved": run_dir.absolute() / f"{device}.saved", "table": table_base(device)}


def environment(verb: str, values: Mapping[str, object]) -> dict[str, str]:
    """Return a script's whole environment; PATH is ours, with the directories of ip and nft behind it.

    Each value is an address, interface address or network of `ipaddress`, an int, a bool (1 or 0), an interface's
    name, a Path, None (empty), or a tuple of these, joined by spaces; a tuple in a tuple is joined by commas. Raises
    TypeError for anything else.
    """
    if not _VERB.fullmatch(verb):
        raise TypeError(f"{verb!a} is no verb")
    variables = {"PATH": search_path(), "LC_ALL": "C"}
    variables.update({f"MPT_{name.upper()}": _text(name, value, " ,") for name, value in values.items()})
    return variables


def search_path() -> str:
    """Return the PATH of what we run: ours, with the directories of ip and nft behind it."""
    path = os.environ.get("PATH", os.defpath).split(":")
    return ":".join([*path, *(each for each in _SBIN if each not in path)])


class Host:
    """The host as one instance changes it, through a script; without one (None) it changes nothing."""

    __slots__ = ("_dry_run", "_instance", "_log", "_script")

    def __init__(
        self,
        script: Path | None,
        instance: Mapping[str, object],
        *,
        dry_run: bool = False,
        log: logging.Logger = _log,
    ) -> None:
        self._script = script
        self._instance = instance
        self._dry_run = dry_run
        self._log = log

    def run(self, verb: str, values: Mapping[str, object]) -> None:
        """Run the script to its end. Raises HostError with what it said and the command that failed."""
        variables = environment(verb, {**self._instance, **values})
        if self._script is None:
            return
        if self._dry_run:
            variables["MPT_DRY_RUN"] = "1"
        done = _run(self._script, verb, variables)
        commands = [line for line in done.stdout.splitlines() if line.startswith(_COMMAND)]
        for command in commands:
            self._log.debug("%s", command)
        if self._dry_run:
            sys.stdout.write(done.stdout)
        said = [line for line in done.stderr.splitlines() if line]
        for line in said:
            if line.startswith(_WARNING):
                self._log.warning("%s", line.removeprefix(_WARNING))
        if done.returncode:
            raise _failure(f"{self._script.name} {verb}", done.returncode, said, commands)


def restore(run_dir: Path, device: str, script: Path | None = None) -> None:
    """Take back whatever a former run of this instance left, in either role. The caller holds the instance's lock.

    `script`: one of the user's own, which is asked first.
    """
    failures = []
    for path in (*filter(None, [script]), *map(_bundled, ROLES)):
        try:
            Host(path, instance(run_dir, device)).run("down", {})
        except HostError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def cleanup(run_dir: Path, device: str) -> None:
    """Take back whatever a killed run of this instance left. Raises LockedError where the instance runs."""
    with hold_lock(run_dir / f"{device}.lock"):
        restore(run_dir, device)
        remove(run_dir / f"{device}.sock")
    _log.info("%s: cleaned up", device)


def cleanup_all(run_dir: Path) -> list[str]:
    """Clean up after every instance that has left a trace in `run_dir`, and after mpt0; return those.

    Instances that run are left alone.
    """
    cleaned = []
    for device in sorted({"mpt0", *_traces(run_dir)}, key=instance_number):
        try:
            cleanup(run_dir, device)
        except LockedError as held:
            _log.info("%s runs%s and is left alone", device, f" (process {held.pid})" if held.pid else "")
        else:
            cleaned.append(device)
    return cleaned


def resolvers() -> tuple[IPv4Address | IPv6Address, ...]:
    """Return the host's upstream resolvers, those with global addresses, in order."""
    for name in _RESOLV_CONF:
        try:
            text = Path(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        return parse_resolvers(text)
    return ()


def parse_resolvers(text: str) -> tuple[IPv4Address | IPv6Address, ...]:
    """Return the global addresses among the name servers of a resolv.conf(5)."""
    found: dict[IPv4Address | IPv6Address, None] = {}
    for line in text.splitlines():
        match line.split():
            case ["nameserver", word, *_]:
                try:
                    address = ipaddress.ip_address(word)
                except ValueError:
                    continue
                if address.is_global and not address.is_multicast:
                    found[address] = None
    return tuple(found)


def _text(name: str, value: object, separators: str) -> str:
    """Return the text of one value; `separators` are those of the tuples that may still be inside."""
    if value is None:
        return ""
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, _ADDRESSES):
        text = str(value)
        if "%" not in text:  # a scope id can be any text
            return text
    elif isinstance(value, Path):
        if str(value).isprintable():
            return str(value)
    elif isinstance(value, str):
        if _INTERFACE.fullmatch(value):
            return value
    elif isinstance(value, tuple) and separators:
        return separators[0].join(_text(name, each, separators[1:]) for each in value)
    raise TypeError(f"{name}: {value!a} may not go into a script's environment")


def _run(script: Path, verb: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(script), verb] if os.access(script, os.X_OK) else ["/bin/sh", str(script), verb]
    try:
        return subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HostError(
            f"{script} {verb}: not done after {_SECONDS:.0f} s; run it by hand, as its head says, to see what hangs"
        ) from None
    except OSError as error:
        raise HostError(f"cannot run {script}: {os.strerror(error.errno or 0).lower()}; see --script") from None


def _failure(what: str, code: int, said: list[str], commands: list[str]) -> HostError:
    """Return the error for a script that failed: its last words, and its last command where they do not name it."""
    words = [line for line in said if not line.startswith(_WARNING)]
    why = words[-1] if words else f"exit code {code}, without a word"
    last = commands[-1].removeprefix(_COMMAND) if commands else ""
    if last and last not in why:
        why = f"{why}; last command: {last}"
    if "Operation not permitted" in why:
        return NotPermittedError(f"{what}: {why}; root can, or a process with CAP_NET_ADMIN")
    return HostError(f"{what}: {why}")


def _traces(run_dir: Path) -> list[str]:
    """Return the instances that have files in the run directory."""
    found = []
    for suffix in ("lock", "saved"):
        for path in run_dir.glob(f"mpt*.{suffix}"):
            try:
                instance_number(path.stem)
            except ConfigError:
                continue
            found.append(path.stem)
    return found


def _bundled(role: str) -> Path:
    """Return our script for this role: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for directory in (package / "scripts", package.parent / "scripts"):
        if (path := directory / f"{role}.sh").is_file():
            return path
    raise HostError(f"{role}.sh is missing from {package / 'scripts'}; install mptunnel again")
