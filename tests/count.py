"""The receipts as somebody counts them who has seen every datagram on every wire: plainly, and after the fact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

SHORT = 0.001  # s: silences up to this are none
OUTAGE = 0.3  # s: longer ones that another wire bridges are outages
NEARLY = 0.005  # s that a silence may differ between where it was made and where it was seen
NOBODY = -1  # the wire of a copy that came before its path was bound: it brings the packet, and counts for no path
Key = tuple[bytes, int]  # session and counter


def account(order: Mapping[Key, int], came: Sequence[tuple[float, int, Key]], wires: int) -> dict[str, Any]:
    """Return what the receipts should say of a direction.

    `order` has the order in which packets were sealed, `came` each copy that arrived: when, by which wire, of which.
    """
    by: dict[Key, list[int]] = {}
    firsts: list[tuple[float, Key]] = []
    copies: list[list[tuple[float, Key]]] = [[] for _ in range(wires)]
    for at, wire, key in sorted(came, key=lambda each: each[0]):
        if key not in by:
            firsts.append((at, key))
        by.setdefault(key, []).append(wire)
        if wire != NOBODY:
            copies[wire].append((at, key))
    paths = []
    for wire in range(wires):
        gaps = find_gaps(order, copies[wire], by)
        outages = [length for length, is_bridged in gaps if is_bridged and length > OUTAGE]
        paths.append(
            {
                "first": sum(those[0] == wire for those in by.values()),
                "missed": sum(wire not in those for those in by.values()),
                "lost": sum(wire not in by.get(key, ()) for key in order),
                "longest_gap_ms": 1e3 * max((length for length, _ in gaps), default=0.0),
                "outages_bridged": len(outages),
                "bridged_s": sum(outages),
                "nearly_outages": sum(is_bridged and abs(length - OUTAGE) < NEARLY for length, is_bridged in gaps),
            }
        )
    return {
        "packets": len(order),
        "received": len(by),
        "lost": len(order) - len(by),
        "saved": sum(len({*those} - {NOBODY}) < wires for those in by.values()),
        "longest_gap_ms": 1e3 * max((length for length, _ in find_gaps(order, firsts, by)), default=0.0),
        "paths": paths,
    }


def find_gaps(
    order: Mapping[Key, int],
    arrivals: Sequence[tuple[float, Key]],
    by: Mapping[Key, Sequence[int]],
    others: Collection[Key] = (),
) -> list[tuple[float, bool]]:
    """Return the silences between arrivals in which a packet was due, and whether another wire brought one of them.

    `others` have come too, and end no silence.
    """
    here = {order[key] for _, key in arrivals} | {order[key] for key in others if key in order}
    anywhere = {order[key] for key in by}
    found, newest, before, silence = [], -1, arrivals[0][0], 0.0
    for at, key in arrivals:
        silence, before = max(silence, at - before), at
        if order[key] > newest:  # what was due, an old one does not show
            missing = set(range(newest + 1, order[key])) - here
            if missing and silence > SHORT:
                found.append((silence, bool(missing & anywhere)))
            newest, silence = order[key], 0.0
    return found
