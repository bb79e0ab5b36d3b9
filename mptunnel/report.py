"""What `status`, `events`, `token list` and `peer list` print for people: from the status object (format 1) to text.

The receipts come first: what redundancy saved, what was lost on every path, the longest gap; and under the paths what
each of them alone would have meant.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from mptunnel.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeAlias

    Object: TypeAlias = Mapping[str, Any]

FORMAT: Final = 1
_NONE: Final = "-"
_DIRECTION_HEAD = ("tunnel", "packets", "bytes", "saved", "lost", "longest gap")
_PATH_HEAD = ("path", "state", "round trip", "lost up", "down", "first", "sent", "received", "")
_RIGHT = frozenset({"lost up", "down", "first", "sent", "received"})
_EVENT_PLACES = frozenset({"event", "time", "device", "peer", "path", "interface"})
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def status_text(status: Object) -> str:
    """Return a status as text. Raises ConfigError for one of another format."""
    if status.get("format") != FORMAT:
        raise ConfigError(
            f"status of format {status.get('format')}, this mptunnel reads format {FORMAT}; "
            "restart the program it comes from, or use --json"
        )
    lines = _server_lines(status) if status.get("role") == "server" else _client_lines(status)
    if drops := [f"{kind} {count(number)}" for kind, number in sorted(status.get("drops", {}).items()) if number]:
        lines.append("  dropped: " + ", ".join(drops))
    return "\n".join(lines)


def is_degraded(status: Object) -> bool:
    """Whether less than everything works: at a client any path, at a server a path of a peer that is here.

    A client of a stock server, which takes one path at a time, has all it can have with one that is up.
    """
    if status.get("role") == "server":
        here = (peer for peer in status.get("peers", []) if peer.get("state") == "up")
        return any(path.get("state") == "lapsed" for peer in here for path in peer.get("paths", []))
    paths = status.get("paths", [])
    enough = any if status.get("server", {}).get("multipath") is False else all  # a stock server takes one path
    return status.get("state") != "up" or not paths or not enough(path.get("state") == "up" for path in paths)


def receipts_line(receipts: Object | None) -> str:
    """Return the headline of both directions together."""
    known = [receipt for receipt in (receipts or {}).values() if receipt]
    if not known:
        return "no receipts yet"
    saved, lost = (sum(receipt.get(name, 0) for receipt in known) for name in ("saved", "lost"))
    gap = max(receipt.get("longest_gap_ms") or 0.0 for receipt in known)
    return (
        f"redundancy saved {packets(saved)}{_outages(known)}; lost on every path {count(lost)}; "
        f"longest gap {milliseconds(gap)}"
    )


def event_text(event: Object) -> str:
    """Return `12:03:04.567 path-down wlan0: 3 probes unanswered, last heard 1.2 s ago`, in local time."""
    seconds = float(event.get("time", 0.0))
    clock = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds * 1000) % 1000:03d}"
    path, interface = event.get("path", ""), event.get("interface", "")
    where = " ".join(
        filter(None, (str(event.get("peer", "")), path, f"({interface})" if interface not in {"", path} else ""))
    )
    said = [_event_word(name, value) for name, value in event.items() if name not in _EVENT_PLACES]
    return f"{clock} {event.get('event', _NONE)} {where}" + (f": {', '.join(said)}" if said else "")


def _event_word(name: str, value: Any) -> str:
    if name == "why":
        return str(value)
    if name.endswith("_ms"):
        return f"{name.removesuffix('_ms')} {milliseconds(value)}"
    return f"{name} {value}"


def tokens_text(tokens: Iterable[Object], now: float) -> str:
    """Return the tokens as a table; `now` is wall-clock time."""
    rows = [
        (token["ident"], token["state"], _token_time(token, now), token["name"] or _NONE, token["label"] or _NONE)
        for token in tokens
    ]
    return table(("token", "state", "time", "used by", "label"), rows) if rows else "no tokens"


def peers_text(peers: Iterable[Object], now: float) -> str:
    """Return the peers as a table; `now` is wall-clock time."""
    rows = [
        (
            peer["name"],
            peer["ipv4"],
            peer["ipv6"],
            peer["public_key"],
            f"{duration(now - peer['added'])} ago",
        )
        for peer in peers
    ]
    return table(("peer", "ipv4", "ipv6", "public key", "added"), rows) if rows else "no peers"


def paths_text(paths: Iterable[Object]) -> str:
    """Return a client's paths, as they were set at run time, as a table."""
    head = ("path", "uplink", "interface", "address", "state", "priority", "carried this month", "limit", "resets")
    rows = []
    for path in paths:
        metered = path["metered"]
        said = (_NONE, _NONE, _NONE)
        if metered:
            spent = " (spent)" if metered["spent"] else ""
            said = (size(metered["used"]) + spent, size(metered["limit"]), f"day {metered['reset_day']}")
        name = path["label"] or path["interface"] or str(path["id"])
        known = (path["interface"] or _NONE, path["address"] or _NONE, path["state"], path["priority"])
        rows.append((name, path["uplink"], *known, *said))
    return table(head, rows, frozenset(head[6:8])) if rows else "no paths"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[str] = frozenset()) -> str:
    """Return rows under their heads, columns two spaces apart; those in `right` stand at the right edge."""
    whole = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ).rstrip()
        for row in whole
    )


def count(number: float) -> str:
    """Return `1,234`."""
    return f"{number:,.0f}"


def packets(number: int) -> str:
    """Return `1 packet`, `1,234 packets`."""
    return f"{count(number)} packet{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """Return bytes as `999 B`, `1.2 MB`, `34 GB`."""
    value = float(number)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    digits = 1 if unit != "B" and value < 9.95 else 0
    return f"{value:.{digits}f} {unit}"


def milliseconds(value: float) -> str:
    """Return `0.4 ms`, `12 ms`, `3.2 s`."""
    if value >= 999.5:
        return f"{value / 1000:.1f} s"
    return f"{value:.{0 if value >= 9.95 or value == 0 else 1}f} ms"


def duration(seconds: float) -> str:
    """Return `12 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h" if hours_left else f"{days} d"
    if hours:
        return f"{hours} h {minutes_left} min" if minutes_left else f"{hours} h"
    return f"{minutes} min" if minutes else f"{rest} s"


def share(value: float | None) -> str:
    """Return a fraction of 1 as `0 %`, `0.25 %`, `12 %`."""
    if value is None:
        return _NONE
    percent = 100 * value
    if 0 < percent < 0.01:
        return "<0.01 %"
    digits = 0 if percent >= 9.95 or percent == 0 else 1 if percent >= 0.995 else 2
    return f"{percent:.{digits}f} %"


def _client_lines(status: Object) -> list[str]:
    server = status.get("server", {})
    tunnel = status.get("tunnel", {})
    addresses = [address for address in (tunnel.get("ipv4"), tunnel.get("ipv6")) if address]
    lines = [
        f"{status.get('device')}: client of {_server_name(server)}, {_state(status)}",
        f"  {receipts_line(status.get('receipts'))}",
        *_lately(status.get("receipts"), "  "),
        f"  address {', '.join(addresses) or 'not known yet'}, MTU {tunnel.get('mtu', _NONE)}"
        + _session(server.get("session_age")),
        *_direction_lines(status),
    ]
    if server.get("multipath") is False and status.get("state") == "up":
        lines.append("  the server is stock WireGuard: one path at a time carries everything")
    lines += _path_lines(status.get("paths", []), "  ")
    if status.get("state") == "connecting":
        lines.append("  no answer yet: does the server run, is its UDP port open, does it know this client's key?")
    elif status.get("state") == "silent":
        lines.append("  the server is silent on every path; the tunnel comes back by itself with the first that works")
    return lines


def _server_lines(status: Object) -> list[str]:
    network = status.get("network", {})
    networks = ", ".join(str(network[family]) for family in ("ipv4", "ipv6") if network.get(family))
    peers = status.get("peers", [])
    here = sum(peer.get("state") == "up" for peer in peers)
    lines = [
        f"{status.get('device')}: server on UDP port {status.get('port')}, {_state(status)}",
        f"  {here} of {len(peers)} peer{'' if len(peers) == 1 else 's'} up, network {networks or _NONE}",
        f"  public key {status.get('public_key', _NONE)}",
    ]
    for peer in sorted(peers, key=lambda peer: ({"up": 0, "silent": 1}.get(peer.get("state"), 2), peer.get("name"))):
        lines += ["", *_peer_lines(peer)]
    return lines


def _peer_lines(peer: Object) -> list[str]:
    """Return what there is to say of one of the server's peers."""
    addresses = ", ".join(str(peer[family]) for family in ("ipv4", "ipv6") if peer.get(family))
    state = {"never": "never seen yet"}.get(peer.get("state", ""), peer.get("state", _NONE))
    if peer.get("state") == "never":
        return [f"  {peer.get('name')}: {state}, {addresses}"]
    kind = "" if peer.get("multipath") else ", one path"
    return [
        f"  {peer.get('name')}: {state}{kind}, {addresses}{_mtu(peer)}{_session(peer.get('session_age'))}",
        *([f"    {receipts_line(peer.get('receipts'))}"] if peer.get("multipath") else []),
        *(_lately(peer.get("receipts"), "    ") if peer.get("multipath") else []),
        *_path_lines(peer.get("paths", []), "    "),
    ]


def _server_name(server: Object) -> str:
    name, address = server.get("name") or _NONE, server.get("address")
    return f"{name} ({address})" if address and address not in name else name


def _state(status: Object) -> str:
    """Return the state, and how long the program has run."""
    return f"{status.get('state')}, running for {duration(status.get('uptime', 0.0))}"


def _mtu(peer: Object) -> str:
    """Return `, MTU 1420` where it is known."""
    return f", MTU {peer['mtu']}" if peer.get("mtu") else ""


def _session(age: float | None) -> str:
    return "" if age is None else f", session {duration(age)} old"


def _direction_lines(status: Object) -> list[str]:
    """Return the table of what went up and down, and what the receipts say of it."""
    receipts = status.get("receipts") or {}
    rows = []
    for way in ("up", "down"):
        if traffic := status.get("traffic", {}).get(way):
            receipt = receipts.get(way)
            said = (
                (count(receipt.get("saved", 0)), count(receipt.get("lost", 0)), _gap(receipt))
                if receipt
                else (_NONE, _NONE, _NONE)
            )
            rows.append((way, count(traffic.get("packets", 0)), size(traffic.get("bytes", 0)), *said))
    text = table(_DIRECTION_HEAD, rows, frozenset(_DIRECTION_HEAD[1:])) if rows else ""
    return ["", *(f"  {line}" for line in text.splitlines())] if rows else []


def _lately(receipts: Object | None, indent: str) -> list[str]:
    """Return the headline's figures of the last minute and the last hour, if they are known."""
    parts = []
    for name in ("minute", "hour"):
        known = [window for receipt in (receipts or {}).values() if receipt and (window := receipt.get(name))]
        if known:
            saved, lost = (sum(window[figure] for window in known) for figure in ("saved", "lost"))
            gap = milliseconds(max(window["longest_gap_ms"] for window in known))
            parts.append(f"last {name} {count(saved)} saved, {count(lost)} lost, longest gap {gap}")
    return [indent + "; ".join(parts)] if parts else []


def _outages(known: Iterable[Object]) -> str:
    """Return ` and bridged 2 outages (7.9 s)`, if there were any."""
    number, seconds = (sum(receipt.get(name) or 0 for receipt in known) for name in ("outages_bridged", "bridged_s"))
    return f" and bridged {count(number)} outage{'' if number == 1 else 's'} ({_seconds(seconds)})" if number else ""


def _seconds(value: float) -> str:
    """Return `0.4 s`, `12 s`, `3 min`."""
    return f"{value:.1f} s" if value < 9.95 else duration(value)


def _gap(receipt: Object) -> str:
    return milliseconds(receipt.get("longest_gap_ms") or 0.0)


def _path_lines(paths: Sequence[Object], indent: str) -> list[str]:
    """Return the table of paths, and a line for each that had errors."""
    if not paths:
        return [f"{indent}no path"]
    text = table(_PATH_HEAD, [_path_row(path) for path in paths], _RIGHT)
    lines = ["", *(indent + line for line in text.splitlines())]
    for path in paths:
        lines += [f"{indent}{_path_name(path)} alone: {alone}"] if (alone := _alone(path)) else []
        errors = [f"{count(number)} x {name}" for name, number in sorted(path.get("errors", {}).items()) if number]
        lines += [f"{indent}{_path_name(path)}: {', '.join(errors)}"] if errors else []
    return lines


def _path_row(path: Object) -> tuple[str, ...]:
    since = path.get("since")
    return (
        _path_name(path),
        path_state(path) + ("" if since is None else f" {duration(since)}"),
        _round_trip(path.get("rtt_ms"), path.get("jitter_ms")),
        share(path.get("loss_up")),
        share(path.get("loss_down")),
        share(path.get("first_share")),
        size(path.get("tx_bytes", 0)),
        size(path.get("rx_bytes", 0)),
        _way(path),
    )


def path_state(path: Object) -> str:
    """Return the state of a path; of one that is down, also which way it still carries."""
    state, carries = str(path.get("state", _NONE)), path.get("carries") or ()
    return f"{state} (carries {' and '.join(carries)})" if state == "down" and carries else state


def _alone(path: Object) -> str:
    """Return what this path alone would have meant, as far as it is known."""
    ways = [(way, of) for way, of in (path.get("alone") or {}).items() if of]
    return "; ".join(f"{way} {count(of['lost'])} lost, longest gap {_gap(of)}" for way, of in ways)


def _path_name(path: Object) -> str:
    return str(path.get("label") or path.get("interface") or path.get("name") or path.get("id", _NONE))


def _round_trip(rtt: float | None, jitter: float | None) -> str:
    """Return `23 ms ±4`."""
    if rtt is None:
        return _NONE
    return milliseconds(rtt) + ("" if jitter is None else f" ±{jitter:.0f}")


def _way(path: Object) -> str:
    """Return where the path starts and how the other end sees it."""
    ends = [end for end in (path.get("address"), path.get("seen_as"), path.get("endpoint")) if end]
    return " seen as ".join(ends)


def _token_time(token: Object, now: float) -> str:
    """Return how long a new token is good, or how long ago another ended."""
    if token["state"] == "new":
        return f"{duration(token['expires'] - now)} left"
    ended = token["ended"]
    return _NONE if ended is None else f"{duration(now - ended)} ago"
