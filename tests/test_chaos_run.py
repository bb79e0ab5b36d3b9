"""Paths that die at random, on real wires between real processes: `test_chaos` compressed, and its long form."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from mptunnel.traffic import Datagrams
from tests.running import NEVER_STOOD_STILL, Maker, Tunnel, note, note_flows, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

DELAYS = {1: 0.020, 2: 0.060}


@dataclass(frozen=True)
class Plan:
    """How long it lasts, how many datagrams a second go each way, and what may happen."""

    seconds: float
    rate: int
    longest_death: float
    deaths: int  # at least
    overlap: float  # s in which both paths work before the other one dies


# A path that has just died again and again is held for its losses, and may need a second to get everything again.
SHORT, LONG = Plan(12.0, 500, 0.5, 8, 1.5), Plan(890.0, 1000, 0.6, 1000, 1.0)
PLANS = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]


def deaths(rng: random.Random, plan: Plan) -> Iterator[tuple[float, int, float]]:
    """Yield pause, path and length of one death after the other; a pause before the other path's death is longer."""
    last = 1
    while True:
        victim = last if rng.random() < 0.7 else 3 - last
        pause = rng.uniform(0.02, 0.3) + (plan.overlap if victim != last else 0.0)
        yield pause, victim, rng.uniform(0.02, plan.longest_death)
        last = victim


def kill(tunnel: Tunnel, path: int, seconds: float, rng: random.Random) -> None:
    """Let a path die in one of several ways, and live again."""
    wire = tunnel.lab.wire(f"p{path}")
    lanes = rng.choice((wire, wire, wire.up, wire.down))
    if rng.random() < 0.1:
        tunnel.lab.flush_nat(path)
    lanes.cut()
    time.sleep(seconds)
    lanes.mend()


@pytest.mark.parametrize("plan", PLANS)
def test_deaths_at_random_on_real_wires_lose_nothing(make_tunnel: Maker, plan: Plan) -> None:
    tunnel, rng = make_tunnel(seed=45), random.Random(45)
    tunnel.begin()
    for path, delay in DELAYS.items():
        tunnel.lab.wire(f"p{path}").set(delay=delay)
    time.sleep(0.6)
    datagrams = Datagrams(tunnel.lab, plan.seconds, rate=plan.rate)
    count, coming = 0, deaths(rng, plan)
    while time.monotonic() < datagrams.begun + plan.seconds - plan.longest_death - plan.overlap - 0.5:
        pause, victim, seconds = next(coming)
        time.sleep(pause)
        kill(tunnel, victim, seconds, rng)
        count += 1
    until(datagrams.begun + plan.seconds)
    flows = datagrams.finish()
    note_flows(f"{count} deaths", *flows)
    assert count >= plan.deaths
    for flow in flows:
        assert (flow.lost, flow.duplicated) == (0, 0)
        assert flow.longest_stall() < NEVER_STOOD_STILL
    assert tunnel.status()["receipts"]["down"]["lost"] == 0


@pytest.mark.parametrize("dead", [1.0, *(pytest.param(dead, marks=pytest.mark.slow) for dead in (10.0, 200.0))])
def test_after_all_paths_were_dead_real_packets_flow_again_at_once(make_tunnel: Maker, dead: float) -> None:
    tunnel = make_tunnel(seed=46)
    tunnel.begin()
    for path, delay in DELAYS.items():
        tunnel.lab.wire(f"p{path}").set(delay=delay)
    datagrams = Datagrams(tunnel.lab, dead + 3.0, rate=200)
    until(datagrams.begun + 1.0)
    for path in DELAYS:
        tunnel.lab.wire(f"p{path}").cut()
    until(datagrams.begun + 1.0 + dead)
    for path in DELAYS:
        tunnel.lab.wire(f"p{path}").mend()
    mended = time.monotonic()
    for name, flow in zip(("up", "down"), datagrams.finish(), strict=True):
        back = min(at / 1e9 for at in flow.arrived_at_ns if at / 1e9 > mended - dead / 2) - mended
        note(f"all paths dead for {dead:.0f} s, {name}: the first packet {back * 1e3:.0f} ms after their return")
        assert back < 0.25 + 2 * DELAYS[1] + NEVER_STOOD_STILL / 2
        assert flow.duplicated == 0
        assert not [at for _, at in flow.missing if at > mended + 0.5], "and it stays"


def test_a_nat_that_forgets_the_only_path_costs_little_over_a_probe_interval(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=47, paths=1)
    tunnel.begin()
    tunnel.lab.wire("p1").set(delay=DELAYS[1])
    datagrams = Datagrams(tunnel.lab, 6.0, rate=200)
    for turn in range(3):
        until(datagrams.begun + 1.0 + 1.7 * turn)
        tunnel.lab.flush_nat(1)
    up, down = datagrams.finish()
    note(f"three times a NAT that forgets: longest gap up {up.longest_gap():.3f} s, down {down.longest_gap():.3f} s")
    assert down.longest_gap() <= 1.2
    assert down.lost > 0, "it did forget"
    assert up.lost <= 1


@pytest.mark.parametrize(
    "times", [pytest.param(2, id="short", marks=pytest.mark.slow), pytest.param(50, id="long", marks=pytest.mark.slow)]
)
def test_each_of_many_kills_of_the_server_costs_less_than_three_seconds(make_tunnel: Maker, times: int) -> None:
    tunnel, rng = make_tunnel(seed=48), random.Random(48)
    tunnel.begin()
    gaps = []
    for _ in range(times):
        datagrams = Datagrams(tunnel.lab, 4.5, rate=100)
        until(datagrams.begun + rng.uniform(0.3, 1.0))
        tunnel.kill("sv")
        killed = time.monotonic()
        tunnel.start("sv", "-s")
        for flow in datagrams.finish():
            gaps.append(flow.longest_gap(after=killed))
            assert flow.duplicated == 0
        tunnel.wait_in()
    median = sorted(gaps)[times]
    note(f"server killed {times} times: longest silence {max(gaps):.2f} s, half of them under {median:.2f} s")
    assert max(gaps) < 3.0
