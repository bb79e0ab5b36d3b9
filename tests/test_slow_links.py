"""A slow link with a deep buffer beside a fast one, on real wires between real processes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mptunnel.traffic import Datagrams
from tests.running import Maker, Tunnel, note, note_flows, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mptunnel.lab import Passage
    from mptunnel.traffic import Flow

pytestmark = pytest.mark.netns

FAST, SLOW = 12.5e6, 250e3  # bytes/s: 100 and 2 Mbit/s
DELAYS = {"p1": 0.020, "p2": 0.060}
RATE, SIZE = 833, 1200  # 8 Mbit/s each way
SEALED = slice(28, 44)  # behind IPv4 and UDP: type, index and counter


def bloated(make_tunnel: Maker, **topology: int) -> Tunnel:
    """Return a tunnel over a fast path, and a slow one that buffers a second."""
    tunnel = make_tunnel(**topology)
    for name, rate in (("p1", FAST), ("p2", SLOW)):
        tunnel.lab.wire(name).set(delay=DELAYS[name], rate=rate, buffer=int(rate))
    tunnel.begin()
    time.sleep(1.0)
    return tunnel


def lateness(fast: Sequence[Passage], slow: Sequence[Passage]) -> list[float]:
    """Return, sorted, by how much the copies on the slow wire were later than those on the fast one and the skew."""
    first = {each.head[SEALED]: each.arrives_at for each in fast if each.arrives_at is not None}
    skew = DELAYS["p2"] - DELAYS["p1"]
    return sorted(
        each.arrives_at - first[each.head[SEALED]] - skew
        for each in slow
        if each.arrives_at is not None and each.head[SEALED] in first
    )


def first_after(flow: Flow, moment: float) -> float:
    """Return how long after the sending of the first datagram since then anything sent since then arrived."""
    since = [
        (sent / 1e9, arrived / 1e9)
        for sent, arrived in zip(flow.sent_at_ns, flow.arrived_at_ns, strict=True)
        if sent / 1e9 >= moment
    ]
    return min(arrived for _, arrived in since if arrived) - since[0][0]


def test_what_a_bloated_path_delivers_is_young_and_it_takes_over_at_once(make_tunnel: Maker) -> None:
    tunnel = bloated(make_tunnel, seed=401)
    wires = [tunnel.lab.wire(name) for name in DELAYS]
    datagrams = Datagrams(tunnel.lab, 12.7, rate=RATE, size=SIZE)
    for wire in wires:
        wire.tape()
    until(datagrams.begun + 3.0)
    for way, fast, slow in zip(("up", "down"), *(wire.tape() for wire in wires), strict=True):
        note(f"{way}: the peak at the onset is {lateness(fast, slow)[-1] * 1e3:.0f} ms")
    until(datagrams.begun + 10.5)
    for way, fast, slow in zip(("up", "down"), *(wire.tape() for wire in wires), strict=True):
        late = lateness(fast, slow)
        at_95 = late[int(0.95 * len(late))]
        note(f"{way}: {len(late)} copies in 7.5 s, 95 % of them less than {at_95 * 1e3:.0f} ms late")
        assert len(late) > 0.6 * 7.5 * SLOW / (SIZE + 88)
        assert at_95 < 0.100
    assert tunnel.paths()["p2"]["state"] == "slow"
    until(datagrams.begun + 11.5)  # asking for that took half of the processors from the wires
    tunnel.lab.wire("p1").cut()
    cut = time.monotonic()
    flows = datagrams.finish()
    note_flows("a bloated path alone", *flows)
    note(f"first by it: {', '.join(f'{first_after(flow, cut) * 1e3:.0f} ms' for flow in flows)} after its sending")
    for flow in flows:
        assert not [number for number, at in flow.missing if at < cut - 0.5]
        assert first_after(flow, cut) < DELAYS["p2"] + 0.060


def test_a_path_that_stalls_does_not_delay_the_other(make_tunnel: Maker) -> None:
    tunnel = bloated(make_tunnel, seed=402)
    tunnel.lab.wire("p2").set(rate=FAST, buffer=int(FAST))
    delays: list[list[float]] = []
    for rate in (FAST, 1.0):
        tunnel.lab.wire("p2").set(rate=rate)
        flows = Datagrams(tunnel.lab, 4.0, rate=RATE, size=SIZE).finish()
        note_flows(f"path 2 at {rate:.0f} bytes/s", *flows)
        assert [flow.lost for flow in flows] == [0, 0]
        delays += [flow.delays() for flow in flows]
    before, after = [max(each[int(0.99 * len(each))] for each in pair) for pair in (delays[:2], delays[2:])]
    note(f"99 % within {before * 1e3:.1f} ms before, {after * 1e3:.1f} ms while path 2 stands")
    assert after < before + 0.010
