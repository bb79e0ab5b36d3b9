"""What the subcommands of the command line have in common: groups of them, directories, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PLACES: Final = {
    "state_dir": "/var/lib/mptunnel",
    "run_dir": "/run/mptunnel",
}  # as in config, which --help does not import


class Commands(click.Group):
    """A group that says what it takes where nothing or something else was said."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse to be called without a command."""
        if not args:
            raise click.UsageError(f"which command? there are {', '.join(self.commands)}", ctx)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition."""
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of this name, or say what may have been meant."""
        if self.get_command(ctx, args[0]) is None:
            raise click.UsageError(_stray_word(ctx, args[0], self.commands), ctx)
        return super().resolve_command(ctx, args)


def _place(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path:
    """Return a directory: as given to the command, else to the program, else the default."""
    name = str(parameter.name)
    if not value and value is not None:
        raise click.BadParameter("a directory is expected, not an empty word", ctx, parameter)
    return Path(value or ctx.find_root().params.get(name) or PLACES[name]).absolute()


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --state-dir and --run-dir."""
    for name, default in PLACES.items():
        option = "--" + name.replace("_", "-")
        command = click.option(option, metavar="DIR", callback=_place, help=f"[default: {default}]")(command)
    return command


def json_text(value: object) -> str:
    """Return what `--json` prints."""
    import json  # noqa: PLC0415

    return json.dumps(value, indent=2)


def json_line(value: object) -> str:
    """Return it as one line of several."""
    import json  # noqa: PLC0415

    return json.dumps(value)


def _stray_word(ctx: click.Context, word: str, commands: Iterable[str]) -> str:
    """Say what may be wrong with a word that is no command."""
    from mptunnel.config import nearest  # noqa: PLC0415

    if (close := nearest(word, commands)) is not None:
        return f"no such command: {word}; did you mean {close}?"
    if ctx.params.get("join"):
        return f"unexpected word {word!a}: a token with spaces in it goes in quotes, or use --join -"
    if ctx.params.get("interface"):
        return f"unexpected word {word!a}: every interface has an -i of its own"
    if ctx.params.get("server"):
        return f"unexpected word {word!a}: -s takes no value, clients name this server behind their -c"
    return f"no such command: {word}"
