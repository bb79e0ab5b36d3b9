"""`status --watch`: the status as a live picture, about twice a second, until Ctrl-C.

The receipts are the headline. Below stands what goes through the tunnel up and down, then each path: its state, where
it goes, and per direction its rate, what it lost, how often it was first, and what it alone would have meant. A server
shows the same for each of its clients. Rates are differences of successive statuses. What does not run is said, and
waited for: the picture survives a restart of the program it watches.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mptunnel import control
from mptunnel.errors import ConfigError, MptunnelError, NotRunningError
from mptunnel.report import count, duration, milliseconds, path_state, receipts_line, share, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import TypeAlias

    from rich.console import RenderableType

    Object: TypeAlias = Mapping[str, Any]
    Place: TypeAlias = tuple[object, ...]

INTERVAL: Final = 0.5  # s between two pictures
RATE_SPAN: Final = 2.0  # s over which a rate is taken
WAYS: Final = ("up", "down")

_NONE: Final = "-"
_WIDTHS: Final = (6, 10, 10, 9, 9, 11, 13)  # of the columns below: 80 with the margin and what lies between them
_TUNNEL_HEAD: Final = ("", "rate", "packets", "bytes", "saved", "lost", "longest gap")
_PATH_HEAD: Final = ("", "rate", "datagrams", "bytes", "lost", "first", "alone: lost", "longest gap")
_PATH_WIDTHS: Final = (6, 10, 10, 8, 7, 6, 11, 11)
_COLOURS: Final = {
    "up": "green", "fresh": "green", "slow": "yellow", "idle": "green", "probing": "yellow", "candidate": "yellow",
    "connecting": "yellow", "down": "red", "lapsed": "red", "silent": "red", "waiting": "bright_black",
}  # fmt: skip


def watch_status(run_dir: Path, device: str | None, console: Console | None = None) -> None:
    """Show what runs until Ctrl-C. Raises ConfigError where there is no terminal."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        raise ConfigError("--watch draws on a terminal; for a file or a program use --json, or 'mptunnel events'")
    watched: dict[str, Rates] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is given back then, too
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(picture(run_dir, device, watched), refresh=True)
                time.sleep(INTERVAL)
    except KeyboardInterrupt:
        pass  # that is how it is ended
    finally:
        signal.signal(signal.SIGTERM, before)


def picture(run_dir: Path, device: str | None, watched: dict[str, Rates]) -> RenderableType:
    """Return the picture of now: of `device`, or of all that runs and of what was `watched` until it stopped."""
    found = {path.stem: path for path in control.find(run_dir, device)}
    for name in found if device is None else [device]:
        watched.setdefault(name, Rates())
    parts: list[RenderableType] = []
    for name, rates in watched.items():
        try:
            status = control.ask(run_dir / f"{name}.sock", "status")
            rates.take(status, time.monotonic())
            parts += [draw(status, rates), Text()]
        except NotRunningError:
            parts += [Text.assemble((name, "bold"), " is ", ("not running", "bold red"), "; waiting for it"), Text()]
        except MptunnelError as error:
            parts += [Text.assemble((name, "bold"), ": ", (str(error), "red")), Text()]
    return Group(*parts[:-1])


class Rates:
    """Bytes a second wherever a status counts bytes: the difference of its newest and its oldest in a while."""

    def __init__(self) -> None:
        self._pid: object = None
        self._seen: deque[tuple[float, dict[Place, int]]] = deque()

    def take(self, status: Object, now: float) -> None:
        """This is the status at `now`."""
        if status.get("pid") != self._pid:  # another run counts anew
            self._pid = status.get("pid")
            self._seen.clear()
        while len(self._seen) > 1 and self._seen[0][0] < now - RATE_SPAN:
            self._seen.popleft()
        self._seen.append((now, dict(_bytes_in(status))))

    def of(self, *place: object) -> float | None:
        """Return the rate there, None while it is not known."""
        if len(self._seen) < 2:
            return None
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        if place not in first or place not in last or last_at <= first_at:
            return None
        return max(0.0, (last[place] - first[place]) / (last_at - first_at))


def _bytes_in(status: Object) -> Iterator[tuple[Place, int]]:
    """Yield all that counts bytes, by owner ("" for a client itself), path (None for the tunnel) and way."""
    owners = [("", status)] if status.get("role") != "server" else [(p["name"], p) for p in status.get("peers", ())]
    for owner, one in owners:
        for way in WAYS:
            yield (owner, None, way), (one.get("traffic") or {}).get(way, {}).get("bytes", 0)
        for path in one.get("paths", ()):
            for way in WAYS:
                yield (owner, path["id"], way), path.get(f"{_side(status, way)}_bytes", 0)


def _side(status: Object, way: str) -> str:
    """Return what this side does with what goes `way`: a client sends up, a server receives it."""
    return "tx" if (way == "up") == (status.get("role") != "server") else "rx"


def draw(status: Object, rates: Rates) -> RenderableType:
    """Return the picture of one status."""
    server = status.get("server", {})
    if status.get("role") == "server":
        peers = status.get("peers", [])
        known = [peer for peer in peers if peer.get("state") != "never"]
        head = f"server on UDP port {status.get('port')}"
        here = sum(peer.get("state") == "up" for peer in known)
        parts: list[RenderableType] = [_title(status, head), Text(f"{here} of {len(peers)} clients up", "dim")]
        for peer in sorted(known, key=lambda peer: (peer.get("state") != "up", peer.get("name"))):
            name = Text.assemble(("▌ ", "blue"), (str(peer.get("name")), "bold"), " ", _state(peer))
            about = ", ".join(str(peer[each]) for each in ("ipv4", "ipv6") if peer.get(each))
            about += f", MTU {peer['mtu']}" if peer.get("mtu") else ""
            parts += [Text(), name, *_owner(status, peer, peer["name"], rates, about)]
        return Group(*parts)
    tunnel = status.get("tunnel", {})
    addresses = ", ".join(address for address in (tunnel.get("ipv4"), tunnel.get("ipv6")) if address)
    age = server.get("session_age")
    session = "no session" if age is None else f"session {duration(age)} old"
    about = f"address {addresses or 'not known yet'}, MTU {tunnel.get('mtu', _NONE)}, {session}"
    return Group(_title(status, f"client of {server.get('name') or _NONE}"), *_owner(status, status, "", rates, about))


def _title(status: Object, words: str) -> Text:
    device = (f"{status.get('device')} ", "bold")
    return Text.assemble(device, words, " ", _state(status), f" running for {duration(status.get('uptime', 0.0))}")


def _state(thing: Object) -> Text:
    state = str(thing.get("state", _NONE))
    return Text(state, f"bold {_COLOURS.get(state, 'default')}")


def _owner(status: Object, owner: Object, name: str, rates: Rates, about: str) -> Iterator[RenderableType]:
    """Yield receipts, tunnel and paths of a client, or of one of a server's clients."""
    receipts = owner.get("receipts") or {}
    yield Text(receipts_line(receipts), "bold")
    yield Text(about, "dim")
    yield Text()
    rows: list[tuple[str, ...]] = []
    for way in WAYS:
        traffic, receipt = (owner.get("traffic") or {}).get(way, {}), receipts.get(way)
        said = (_number(receipt, "saved"), _number(receipt, "lost"), _gap(receipt))
        counted = (count(traffic.get("packets", 0)), size(traffic.get("bytes", 0)))
        rows.append((way, _rate(rates.of(name, None, way)), *counted, *said))
    yield _table(_TUNNEL_HEAD, rows, _WIDTHS)
    for number, path in enumerate(owner.get("paths", ())):
        yield Text()
        yield from _path_words(path)
        rows = [_path_row(status, path, name, way, rates) for way in WAYS]
        yield _table(_PATH_HEAD if number == 0 else (), rows, _PATH_WIDTHS)


def _path_words(path: Object) -> Iterator[Text]:
    """Yield what there is to say of a path before its figures."""
    label = str(path.get("label") or path.get("interface") or path.get("name") or f"path {path.get('id', _NONE)}")
    since = path.get("since")
    words = [f"for {duration(since)}"] if since is not None else []
    if (rtt := path.get("rtt_ms")) is not None:
        words.append(f"round trip {milliseconds(rtt)}")
    if (jitter := path.get("jitter_ms")) is not None:
        words.append(f"jitter {milliseconds(jitter)}")
    if path.get("mtu"):
        words.append(f"MTU {path['mtu']}")
    colour = _COLOURS.get(str(path.get("state")), "default")
    head = Text.assemble(("● ", colour), (label, "bold"), " ", (path_state(path), f"bold {colour}"))
    yield head.append(" " + ", ".join(words))
    seen = f"seen by the server as {path['seen_as']}" if path.get("seen_as") else path.get("endpoint")
    errors = [f"{count(number)} x {name}" for name, number in sorted((path.get("errors") or {}).items()) if number]
    if where := ", ".join(filter(None, (path.get("address"), seen))):
        yield Text(f"  {where}", "dim")
    if errors:
        yield Text(f"  {', '.join(errors)}", "red")


def _path_row(status: Object, path: Object, owner: str, way: str, rates: Rates) -> tuple[str, ...]:
    """Return the figures of a path in one direction."""
    side, alone = _side(status, way), (path.get("alone") or {}).get(way)
    known = alone or ({"first_share": path.get("first_share")} if side == "rx" else {})  # what we receive we know
    return (
        way,
        _rate(rates.of(owner, path.get("id"), way)),
        count(path.get(side) or 0),
        size(path.get(f"{side}_bytes") or 0),
        share(path.get(f"loss_{way}")),
        share(known.get("first_share")),
        _number(alone, "lost"),
        _gap(alone),
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> Table:
    """Return rows under their heads, figures at the right edge."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=0)  # a margin
    for number, width in enumerate(widths):
        table.add_column(width=width, justify="right" if number else "left", no_wrap=True)
    if head:
        table.add_row("", *(Text(name, "dim") for name in head))
    for row in rows:
        table.add_row("", *(Text(cell, "" if cell != _NONE else "dim") for cell in row))
    return table


def _rate(value: float | None) -> str:
    return _NONE if value is None else f"{size(value)}/s"


def _number(of: Object | None, name: str) -> str:
    return _NONE if of is None or of.get(name) is None else count(of[name])


def _gap(of: Object | None) -> str:
    return _NONE if of is None else milliseconds(of.get("longest_gap_ms") or 0.0)
