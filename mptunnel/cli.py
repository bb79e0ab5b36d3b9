"""The command line: `-s` and `-c` run the program in the foreground, subcommands do the rest.

Answers go to stdout, talk to stderr. An error is one line and an exit code: 0 done, 1 failed, 2 usage or configuration,
3 not running, 4 degraded, 5 not permitted, 6 server unreachable on every path, 7 refused by the server. Options come
from the command line, else from MPTUNNEL_... in the environment, else from --config FILE. Whatever takes long to import
is imported where it is used: `mptunnel --help` has to be quick.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from click.core import ParameterSource

from mptunnel import __version__
from mptunnel.commands import PLACES, Commands, json_line, json_text, places
from mptunnel.errors import MptunnelError, NotPermittedError, NotRunningError
from mptunnel.pathcommands import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PROGRAM: Final = "mptunnel"
INTERRUPTED: Final = 130
DEGRADED: Final = 4

_INHERITED = frozenset({"state_dir", "run_dir", "tun", "config", "verbose", "quiet"})
_MAX_INPUT = 1 << 20
_CAP_NET_ADMIN = 12
_EXAMPLES = """\b
Examples:
  sudo mptunnel -s                             a server; prints the line for its first client
  sudo mptunnel -c vpn.example.org --join -    join it by a token, over every uplink there is
  sudo mptunnel -c vpn.example.org             from then on
  sudo mptunnel -c vpn.example.org -i wlan0 -i 10.64.3.9
                                               two paths, one named, one by its address
  mptunnel demo                                see it work, without root and without a server

Options can also stand in a file given by --config (TOML: port = 6000, interface = ["wlan0", "wwan0"]), and all
but --join in the environment (MPTUNNEL_PORT=6000, MPTUNNEL_INTERFACE="wlan0 wwan0").
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code; what the user has to know of is said in one line on stderr."""
    try:
        code = cli.main(list(arguments), PROGRAM, standalone_mode=False, obj=tuple(arguments))
        sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"{PROGRAM}: {_usage_line(error)}", err=True)
        return error.exit_code
    except MptunnelError as error:
        click.echo(f"{PROGRAM}: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it flushes
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        click.echo(f"{PROGRAM}: cannot write: no space left on device", err=True)
        return 1
    return code if isinstance(code, int) else 0


class _Option(click.Option):
    """An option of a section of the help; from the environment too, unless it says otherwise."""

    def __init__(self, *arguments: Any, section: str, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.section = section


class _Program(Commands):
    """The program itself: its help has sections, and it runs without a command too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, then the commands."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                section = parameter.section if isinstance(parameter, _Option) else "Talk"
                sections.setdefault(section, []).append(row)
        width = max(len(words) for rows in sections.values() for words, _ in rows)
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(words.ljust(width), text) for words, text in rows])
        self.format_commands(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take no command for an answer."""
        return click.Group.parse_args(self, ctx, args)


def _load_file(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Take the defaults of all options from the TOML file."""
    del parameter
    if value is not None:
        from mptunnel.options import read_config  # noqa: PLC0415

        ctx.default_map = read_config(Path(value), ctx.command.params)
    return value


def _option(section: str, *names: str, **keywords: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=_Option, section=section, **keywords)


@click.group(
    cls=_Program,
    invoke_without_command=True,
    context_settings={
        "auto_envvar_prefix": "MPTUNNEL",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog=_EXAMPLES,
    options_metavar="-s | -c SERVER [-i INTERFACE]... [OPTIONS]",
    subcommand_metavar="| COMMAND",
)
@_option("Role", "-s", "--server", is_flag=True, help="Be the server: let clients in, pass their packets on.")
@_option("Role", "-c", "--client", metavar="SERVER[:PORT]", help="Be a client of this server.")
@_option(
    "Client",
    "-i",
    "--interface",
    multiple=True,
    metavar="ADDR|NAME",
    help="A path: the interface of this name, or the one that holds this address. Once for each, at most 8. "
    "Without: every uplink with a default route.",
)
@_option(
    "Client",
    "--join",
    metavar="TOKEN|@FILE|-",
    allow_from_autoenv=False,
    help="Enrol by a one-time token of 'mptunnel token new', then run. @FILE and - (stdin) keep it out of 'ps'.",
)
@_option("Client", "--server-key", metavar="KEY", help="The server's public key, where it was exchanged by hand.")
@_option(
    "Client", "--wireguard", metavar="FILE", help="The server is a stock WireGuard, described by this wg-quick file."
)
@_option(
    "Client",
    "--route",
    multiple=True,
    metavar="all|none|CIDR",
    help="What goes through the tunnel: everything (default; with --wireguard its AllowedIPs), nothing but the "
    "server, or networks, once for each.",
)
@_option(
    "Client",
    "--dns",
    multiple=True,
    metavar="auto|keep|ADDR",
    help="Resolver: the one the server offers (default where everything goes through the tunnel), the present one, or "
    "these. With --wireguard: that of the file.",
)
@_option("Client", "--idle-probe", type=float, metavar="SECONDS", help="Probe idle paths so often. [default: 25]")
@_option(
    "Client",
    "--alarm",
    type=int,
    metavar="MS",
    help="Tell at once when nothing has come from the server for so long; paths are probed every third of it.",
)
@_option(
    "Server",
    "--network",
    metavar="CIDR",
    help="The tunnel's IPv4 network. [default: as before; at first 10.0.1.0/24, or another where this host is in that]",
)
@_option(
    "Server", "--lan", is_flag=True, help="Let clients reach private networks and this machine, not only the internet."
)
@_option(
    "Both",
    "-p",
    "--port",
    type=int,
    metavar="PORT",
    help="UDP port of the server; at a client the one for servers named without. [default: 5000]",
)
@_option("Both", "-t", "--tun", metavar="mptN", help="The tunnel's device, one for each instance. [default: mpt0]")
@_option("Both", "--mtu", type=int, metavar="BYTES", help="Largest packet inside the tunnel. [default: 1420]")
@_option("Both", "--mode", metavar="MODE", help="Which paths carry a packet: redundant, all of them (default).")
@_option("Both", "--script", metavar="FILE|none", help="Set the host up by this script, or not at all.")
@_option("Both", "--on-event", metavar="PROGRAM", help="Run this for each event, which it finds in its environment.")
@_option("Both", "--state-dir", metavar="DIR", help=f"Keys, peers, tokens. [default: {PLACES['state_dir']}]")
@_option("Both", "--run-dir", metavar="DIR", help=f"Locks, control sockets. [default: {PLACES['run_dir']}]")
@_option(
    "Both", "--config", metavar="FILE", is_eager=True, callback=_load_file, help="Take options from this TOML file."
)
@_option("Both", "--offload/--no-offload", default=None, help="Let the kernel carry runs of packets (default: on).")
@_option("Both", "--dry-run", is_flag=True, help="Print what would be done to the host, and do none of it.")
@_option("Talk", "-v", "--verbose", is_flag=True, help="Tell every decision.")
@_option("Talk", "-q", "--quiet", is_flag=True, help="Only warnings and errors.")
@click.version_option(__version__, "-V", "--version", message="mptunnel %(version)s", cls=_Option, section="Talk")
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Run a redundant multipath tunnel: every packet over every path, the first copy wins."""
    said = {name: value for name, value in options.items() if value is not None and value != ()}
    given = {name: value for name, value in said.items() if value is not False or name == "offload"}  # --no-offload
    labels = {parameter.name or "": _label(ctx, parameter) for parameter in ctx.command.params}
    if "verbose" in given and "quiet" in given:
        raise click.UsageError(f"{labels['verbose']} and {labels['quiet']} exclude each other", ctx)
    _set_up_logging(bool(given.get("verbose")) - bool(given.get("quiet")))
    if ctx.invoked_subcommand is None:
        _run_role(ctx, given, labels)
        return
    for name in given:
        if name not in _INHERITED and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{labels[name]} does not go with the command '{ctx.invoked_subcommand}'", ctx)


def _prepare_for_speed() -> None:
    """Before the first of the hot modules is imported: have them compiled, and memory kept for packets."""
    from mptunnel import native  # noqa: PLC0415

    native.use()
    native.keep_memory()


def _run_role(ctx: click.Context, given: dict[str, Any], labels: dict[str, str]) -> None:
    """Be the server or a client until the clean stop."""
    import logging  # noqa: PLC0415

    _prepare_for_speed()
    from mptunnel import options  # noqa: PLC0415

    if options.is_server(given, labels):
        server = options.server_settings(given)
        _require_net_admin(ctx, dry_run=server.dry_run)
        from mptunnel.program import run_server  # noqa: PLC0415

        run_server(server)
    else:
        if given.get("join") == "-":  # before somebody pastes a token for nothing
            _require_net_admin(ctx, dry_run="dry_run" in given)
        client, warnings = options.client_settings(given, labels)
        for warning in warnings:
            logging.getLogger(PROGRAM).warning("%s", warning)
        _require_net_admin(ctx, dry_run=client.dry_run)
        from mptunnel.program import run_client  # noqa: PLC0415

        run_client(client)


@cli.command()
@click.option("-t", "--tun", metavar="mptN", help="Only this instance. Without: all that run.")
@click.option("--json", "as_json", is_flag=True, help="The whole status, as JSON.")
@click.option("--exit-code", is_flag=True, help="Leave with 4 where the tunnel, or a path of it, is not 'up'.")
@click.option("--reset", is_flag=True, help="Then begin the receipts afresh, for whoever looks at this end.")
@click.option("--watch", is_flag=True, help="Keep showing it, live, until Ctrl-C.")
@places
@click.pass_context
def status(
    ctx: click.Context,
    tun: str | None,
    *,
    as_json: bool,
    exit_code: bool,
    reset: bool,
    watch: bool,
    state_dir: Path,
    run_dir: Path,
) -> None:
    """Show paths and what redundancy saved."""
    from mptunnel import control, report  # noqa: PLC0415

    del state_dir
    if watch and (as_json or exit_code):
        raise click.UsageError("--watch is for people, --json and --exit-code are for programs", ctx)
    if watch and reset:
        raise click.UsageError("--watch goes on showing; reset first, with 'mptunnel status --reset'", ctx)
    tun = _instance(ctx, tun)
    sockets = _sockets(run_dir, tun)
    if watch:
        from mptunnel.watch import watch_status  # noqa: PLC0415

        watch_status(run_dir, tun)
        return
    found = [control.ask(path, "status") for path in sockets]
    texts = [json_text(one) if as_json else report.status_text(one) for one in found]
    click.echo(("\n" if as_json else "\n\n").join(texts))
    if reset:
        for path in sockets:
            control.ask(path, "receipts-reset")
    if exit_code and any(map(report.is_degraded, found)):
        ctx.exit(DEGRADED)


@cli.command()
@click.option("-t", "--tun", metavar="mptN", help="This instance, where several run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@places
@click.pass_context
def events(ctx: click.Context, tun: str | None, *, as_json: bool, state_dir: Path, run_dir: Path) -> None:
    """Show what happens to paths and tunnel, as it happens."""
    from mptunnel import control, report  # noqa: PLC0415

    del state_dir
    sockets = _sockets(run_dir, _instance(ctx, tun))
    if len(sockets) > 1:
        raise click.UsageError(f"several run ({', '.join(path.stem for path in sockets)}): choose one by -t", ctx)
    for event in control.listen(sockets[0]):
        click.echo(json_line(event) if as_json else report.event_text(event))


@cli.group(cls=Commands)
def token() -> None:
    """Make, show and revoke join tokens (server)."""


@token.command("new")
@click.argument("label", default="")
@click.option("--hours", type=float, default=1.0, show_default=True, help="How long it can be used.")
@places
def token_new(label: str, hours: float, state_dir: Path, run_dir: Path) -> None:
    """Make a token and print it. LABEL is a note of yours, shown by the list."""
    from mptunnel import admin  # noqa: PLC0415

    made = admin.perform(state_dir, run_dir, "token-new", label=label, hours=hours)
    click.echo(made["token"])
    click.echo(f"token {made['ident']}: good for {hours:g} h and one client, which runs", err=True)
    click.echo("    sudo mptunnel -c SERVER[:PORT] --join -        and pastes the token there", err=True)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@places
def token_list(*, as_json: bool, state_dir: Path, run_dir: Path) -> None:
    """Show all tokens: open ones, and for 30 days what became of the others."""
    from mptunnel import admin, report  # noqa: PLC0415

    tokens = admin.perform(state_dir, run_dir, "token-list")
    click.echo(json_text(tokens) if as_json else report.tokens_text(tokens, time.time()))


@token.command("revoke")
@click.argument("ident")
@places
def token_revoke(ident: str, state_dir: Path, run_dir: Path) -> None:
    """Take a token back, so that nobody can join by it."""
    from mptunnel import admin  # noqa: PLC0415

    revoked = admin.perform(state_dir, run_dir, "token-revoke", ident=ident)
    click.echo(f"token {revoked['ident']} revoked", err=True)


@cli.group(cls=Commands)
def peer() -> None:
    """Add, show and remove clients (server)."""


@peer.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@places
def peer_list(*, as_json: bool, state_dir: Path, run_dir: Path) -> None:
    """Show the clients that are let in."""
    from mptunnel import admin, report  # noqa: PLC0415

    peers = admin.perform(state_dir, run_dir, "peer-list")
    click.echo(json_text(peers) if as_json else report.peers_text(peers, time.time()))


@peer.command("add")
@click.argument("name")
@click.option("--public-key", metavar="KEY", help="The client's key ('mptunnel pubkey' there). Without: one is made.")
@click.option("--psk", is_flag=True, help="Add a preshared key.")
@click.option("--endpoint", metavar="HOST[:PORT]", help="Where the client finds this server.")
@places
def peer_add(
    name: str, public_key: str | None, endpoint: str | None, *, psk: bool, state_dir: Path, run_dir: Path
) -> None:
    """Let a client in by hand and print a stock WireGuard configuration for it (for a phone, a router)."""
    from mptunnel import admin, config  # noqa: PLC0415

    config.check_name(name)
    where = None if endpoint is None else config.parse_server(endpoint)
    private = None if public_key else config.new_private_key(os.urandom)
    key = config.decode_key(public_key, "--public-key") if public_key else config.public_key(private or b"")
    made = admin.perform(
        state_dir,
        run_dir,
        "peer-add",
        name=name,
        public_key=config.encode_key(key),
        psk=psk,
        stock=private is not None,
    )
    click.echo(admin.stock_configuration(made, private, _endpoint(where, made.get("port"))), nl=False)
    click.echo(f"peer {name} is let in, as {made['ipv4']} and {made['ipv6']}", err=True)
    if private is None and not psk:
        server = config.server_argument("SERVER", made.get("port") or config.DEFAULT_PORT)
        click.echo(
            f"    a client of ours runs: sudo mptunnel -c {server} --server-key {made['server_public_key']}", err=True
        )


@peer.command("remove")
@click.argument("name")
@places
def peer_remove(name: str, state_dir: Path, run_dir: Path) -> None:
    """Let a client in no longer, at once."""
    from mptunnel import admin  # noqa: PLC0415

    removed = admin.perform(state_dir, run_dir, "peer-remove", name=name)
    click.echo(f"peer {removed['name']} is no longer let in", err=True)


cli.add_command(paths)


@cli.command()
def genkey() -> None:
    """Print a new private key, as 'wg genkey' does."""
    from mptunnel.config import encode_key, new_private_key  # noqa: PLC0415

    click.echo(encode_key(new_private_key(os.urandom)))


@cli.command()
@places
def pubkey(state_dir: Path, run_dir: Path) -> None:
    """Print a public key.

    That of the private key on stdin, as 'wg pubkey' does; without one that of this machine as a client.
    """
    from mptunnel.config import decode_key, encode_key, public_key  # noqa: PLC0415
    from mptunnel.state import StateDir  # noqa: PLC0415

    del run_dir
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read(_MAX_INPUT)
    private = decode_key(text, "private key on stdin") if text.strip() else StateDir(state_dir).client_key().private_key
    click.echo(encode_key(public_key(private)))


@cli.command()
@click.option("--live/--no-live", default=None, help="A moving picture, or lines. [default: by the terminal]")
@click.pass_context
def demo(ctx: click.Context, *, live: bool | None) -> None:
    """Watch a tunnel lose nothing.

    Client, two bad uplinks and server are made on this machine, in namespaces of their own; root is not needed.
    """
    from mptunnel import demo as program  # noqa: PLC0415

    ctx.exit(program.main(live=sys.stdout.isatty() if live is None else live))


def _counts(most: int) -> Callable[..., tuple[int, ...]]:
    """Return what reads numbers with commas in between, each from 1 to `most`."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
        words = [] if value is None else value.split(",")
        if any(not word.isascii() or not word.isdigit() or not 1 <= int(word) <= most for word in words):
            raise click.BadParameter(f"{value!a}: numbers from 1 to {most} with commas in between", ctx, parameter)
        return tuple(map(int, words))

    return read


def _kinds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return the kinds of measurement that were asked for; all without any."""
    kinds = ("throughput", "packet-rate", "latency", "memory")
    words = kinds if value is None else tuple(value.split(","))
    if unknown := [word for word in words if word not in kinds]:
        raise click.BadParameter(f"{unknown[0]!a}: there are {', '.join(kinds)}", ctx, parameter)
    return words


@cli.command()
@click.option(
    "--paths",
    default="2",
    show_default=True,
    callback=_counts(8),
    metavar="N[,N...]",
    help="Paths of mptunnel. Several: a table of how it grows.",
)
@click.option(
    "--clients", callback=_counts(2000), metavar="N[,N...]", help="A table of one busy client among N connected ones."
)
@click.option(
    "--only",
    callback=_kinds,
    metavar="KIND[,KIND...]",
    help="Of throughput, packet-rate, latency and memory. [default: all]",
)
@click.option("--against/--alone", default=True, help="With what else is installed, or without. [default: with]")
@click.option("--floor", is_flag=True, help="With the least that could do it in Python: no protocol, only the copies.")
@click.option(
    "--runs", type=click.IntRange(1, 99), default=1, show_default=True, help="Figures are medians of so many."
)
@click.option("--quick", is_flag=True, help="A few seconds for each: rough figures.")
@click.option("--micro", is_flag=True, help="A table of what seal, open, split and the like cost by themselves.")
@click.option("--soak", type=click.FloatRange(5, 86400), metavar="SECONDS", help="Full load so long: is memory flat?")
@click.option(
    "--json", "as_json", default="", metavar="FILE|-", help="All figures as JSON, too; -: only that, on stdout."
)
@click.pass_context
def bench(ctx: click.Context, /, *, soak: float | None, as_json: str, **options: Any) -> None:
    """Measure speed and cost on this machine.

    Beside no tunnel, wireguard-go and OpenVPN where they are installed; in namespaces of their own, without root.
    """
    _prepare_for_speed()
    from mptunnel import bench as program  # noqa: PLC0415

    ctx.exit(program.main(program.Plan(**options, soak=soak or 0.0, json=as_json)))


@cli.command()
@click.argument("device", required=False, metavar="[mptN]")
@places
@click.pass_context
def cleanup(ctx: click.Context, device: str | None, state_dir: Path, run_dir: Path) -> None:
    """Take back what a killed mptunnel left.

    Of the instance mptN, or of all. What still runs is not touched.
    """
    from mptunnel import config, host  # noqa: PLC0415

    del state_dir
    device = device or ctx.find_root().params.get("tun")
    if device is not None:
        config.instance_number(device)
    _require_net_admin(ctx, dry_run=False)
    if device is None:
        host.cleanup_all(run_dir)
    else:
        host.cleanup(run_dir, device)


def _endpoint(where: tuple[str, int | None] | None, port: int | None) -> str:
    """Return HOST:PORT for a stock configuration: as given, else this host's global address, else a word and a note."""
    from mptunnel import config, netlink  # noqa: PLC0415

    if port is None and (where is None or where[1] is None):
        click.echo(f"note: no server runs, so its port is taken for {config.DEFAULT_PORT}; see --endpoint", err=True)
    if where is not None:
        return config.spelling(where[0], where[1] or port or config.DEFAULT_PORT)
    try:
        address = config.public_address(netlink.snapshot())
    except MptunnelError:
        address = None
    if address is None:
        click.echo("note: put this server's name or address in the place of SERVER, or use --endpoint", err=True)
        return f"SERVER:{port or config.DEFAULT_PORT}"
    return config.spelling(str(address), port or config.DEFAULT_PORT)


def _instance(ctx: click.Context, tun: str | None) -> str | None:
    """Return the instance that a command is about, None where none was named. Raises ConfigError."""
    from mptunnel.config import instance_number  # noqa: PLC0415

    tun = tun or ctx.find_root().params.get("tun")
    if tun:
        instance_number(tun)
    return tun


def _sockets(run_dir: Path, tun: str | None) -> list[Path]:
    """Return the control sockets of what runs. Raises NotRunningError where nothing does."""
    from mptunnel import control  # noqa: PLC0415

    sockets = control.find(run_dir, tun)
    if not sockets:
        raise NotRunningError(_not_running(tun, run_dir, control.find(run_dir)))
    return sockets


def _not_running(tun: str | None, run_dir: Path, others: Iterable[Path]) -> str:
    running = ", ".join(path.stem for path in others)
    if tun and running:
        return f"no mptunnel runs as {tun}; what runs is {running}"
    return f"no mptunnel runs{f' as {tun}' if tun else ''} (no socket in {run_dir} answers); start it with -s or -c"


def _label(ctx: click.Context, parameter: click.Parameter) -> str:
    """Return how the user wrote an option: `-p`, `MPTUNNEL_PORT`, `port in FILE`."""
    source = ctx.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return f"{ctx.auto_envvar_prefix}_{parameter.name}".upper()
    if source is ParameterSource.DEFAULT_MAP:
        return f"{max(parameter.opts, key=len).lstrip('-')} in {ctx.params.get('config')}"
    return parameter.opts[0]


def _usage_line(error: click.ClickException) -> str:
    """Return click's complaint as one line with a cure."""
    ctx = getattr(error, "ctx", None)
    message = error.format_message().replace("\n", " ").rstrip(".")
    if isinstance(error, click.BadParameter) and ctx is not None and isinstance(error.param, click.Option):
        message = f"{_label(ctx, error.param)}: {error.message.rstrip('.')}"
    elif message[:1].isupper():
        message = message[0].lower() + message[1:]
    return f"{message}; see '{PROGRAM if ctx is None else ctx.command_path} --help'"


def _require_net_admin(ctx: click.Context, *, dry_run: bool) -> None:
    """Raise NotPermittedError with the line to run unless the kernel will let us set up the host."""
    if dry_run or _has_net_admin():
        return
    if os.geteuid() == 0:
        raise NotPermittedError(
            "root here lacks CAP_NET_ADMIN; in a container add --cap-add NET_ADMIN --device /dev/net/tun"
        )
    program = Path(sys.argv[0])
    command = [sys.executable, "-m", PROGRAM] if program.name == "__main__.py" else [str(program.absolute())]
    environment = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MPTUNNEL_")]
    line = shlex.join(["sudo", *environment, *command, *ctx.find_root().obj])
    raise NotPermittedError(f"this needs root, to set up device and routes; run: {line}")


def _has_net_admin() -> bool:
    """Whether the process has the capability, in its own user namespace."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return os.geteuid() == 0
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> _CAP_NET_ADMIN & 1)


def _set_up_logging(verbosity: int) -> None:
    """Log to stderr: lower-case words before warnings and errors, the time where nobody else writes it down."""
    import logging  # noqa: PLC0415

    class Format(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            return f"{stamp and self.formatTime(record) + ' '}{level}{super().format(record)}"

    stamp = "" if sys.stderr.isatty() or "JOURNAL_STREAM" in os.environ else "time"
    handler = logging.StreamHandler()
    handler.setFormatter(Format())
    logger = logging.getLogger(PROGRAM)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
