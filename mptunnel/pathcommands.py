"""The commands `mptunnel paths ...`: each asks the running client (see `pathdesk`), and says what holds now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mptunnel.commands import Commands, json_text, places

if TYPE_CHECKING:
    from pathlib import Path


@click.group(cls=Commands)
@click.option("-t", "--tun", metavar="mptN", help="Of this instance. Without: of the only client that runs.")
def paths(tun: str | None) -> None:
    """Show and change the paths of a running client.

    PATH is a path's label, the name or address it was added by, its interface, or its number. What is set here holds
    after a restart too, for the same server; but every uplink that the command line names by -i is a path again then.
    """
    del tun


def _ask_client(verb: str, run_dir: Path, /, **arguments: object) -> Any:
    from mptunnel import control  # noqa: PLC0415

    ctx = click.get_current_context()
    given = [each.params.get("tun") for each in (ctx.parent, ctx.find_root()) if each is not None]
    return control.ask_client(run_dir, next(filter(None, given), None), verb, **arguments)


@paths.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@places
def paths_list(*, as_json: bool, state_dir: Path, run_dir: Path) -> None:
    """Show the paths, what they are for, and what metered ones have carried this month."""
    from mptunnel import report  # noqa: PLC0415

    del state_dir
    found = _ask_client("paths-list", run_dir)
    click.echo(json_text(found) if as_json else report.paths_text(found))


@paths.command("add")
@click.argument("uplink", metavar="NAME|ADDR")
@places
def paths_add(uplink: str, state_dir: Path, run_dir: Path) -> None:
    """Use one more interface, which need not be there yet; also one that was removed."""
    del state_dir
    made = _ask_client("paths-add", run_dir, uplink=uplink)
    click.echo(f"path {made['id']} is {made['uplink']}", err=True)


@paths.command("remove")
@click.argument("path")
@places
def paths_remove(path: str, state_dir: Path, run_dir: Path) -> None:
    """Use an interface no longer. Without -i it is not found again either, until it is added."""
    del state_dir
    gone = _ask_client("paths-remove", run_dir, path=path)
    click.echo(f"path {gone['id']}, {gone['uplink']}, is no longer used", err=True)


@paths.command("name")
@click.argument("path")
@click.argument("label")
@places
def paths_name(path: str, label: str, state_dir: Path, run_dir: Path) -> None:
    """Show a path by a LABEL of yours; '' takes it back."""
    del state_dir
    said = _ask_client("paths-name", run_dir, path=path, label=label)
    click.echo(f"path {said['id']}, {said['uplink']}, is {label or 'shown by its interface'} now", err=True)


@paths.command("priority")
@click.argument("path")
@click.argument("priority", metavar="data|standby")
@places
def paths_priority(path: str, priority: str, state_dir: Path, run_dir: Path) -> None:
    """Let a path carry everything (data), or only while no path for data works (standby)."""
    del state_dir
    said = _ask_client("paths-priority", run_dir, path=path, priority=priority)
    click.echo(f"path {said['id']}, {said['uplink']}, is for {said['priority']} now", err=True)


@paths.command("metered")
@click.argument("path")
@click.argument("limit", metavar="LIMIT|off")
@click.option("--reset-day", type=int, default=1, show_default=True, help="Day of the month, 1 to 28, local time.")
@places
def paths_metered(path: str, limit: str, reset_day: int, state_dir: Path, run_dir: Path) -> None:
    """Let a path stand by once it has carried so much in a month (5GB, 750MB).

    Counted are this tunnel's datagrams over the interface, both directions, with IP and UDP headers, from now on. What
    the interface carries otherwise is not known here.
    """
    del state_dir
    said = _ask_client("paths-metered", run_dir, path=path, limit=limit, reset_day=reset_day)
    what = "is not metered" if said["metered"] is None else f"stands by after {limit} a month, from day {reset_day} on"
    click.echo(f"path {said['id']}, {said['uplink']}, {what}", err=True)
