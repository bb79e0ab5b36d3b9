"""TCP over two paths of which the fast one loses: no slower than over the better of them alone."""

from __future__ import annotations

import statistics
import time

import pytest

from mptunnel.traffic import Download, content_sha256, serve_web
from tests.running import Maker, Tunnel, note

pytestmark = pytest.mark.netns

FAST, SLOW, SKEW = 0.010, 0.050, 0.040  # s, one way
LOSS = 0.01
RATE = 1_500_000  # bytes per second of each path: far below what the wires carry
QUEUE = 150_000  # bytes
SETTLE = 1.5  # s
SLACK = 0.85  # of the better one: the spread of short transfers
WAYS = {"both": (), "the fast one alone": ("p2",), "the slow one alone": ("p1",)}
PLANS = [
    pytest.param(1_500_000, 3, id="short", marks=pytest.mark.slow),
    pytest.param(10_000_000, 7, id="long", marks=pytest.mark.slow),
]


def goodput(tunnel: Tunnel, size: int) -> float:
    """Return the bytes per second of a download."""
    download = Download(tunnel.lab, size)
    done = download.finish(patience=60.0)
    assert done.sha256 == content_sha256(size), done.error
    return size / (done.at - done.began)


@pytest.mark.parametrize(("size", "runs"), PLANS)
def test_tcp_over_a_fast_path_that_loses_and_a_slow_one_is_no_slower_than_over_the_better_one(
    make_tunnel: Maker, size: int, runs: int
) -> None:
    tunnel = make_tunnel(seed=49)
    tunnel.begin()
    serve_web(tunnel.lab)
    tunnel.lab.wire("p1").set(delay=FAST, loss=LOSS, rate=RATE, buffer=QUEUE)
    tunnel.lab.wire("p2").set(delay=SLOW, rate=RATE, buffer=QUEUE)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(runs):
        for name, dead in WAYS.items():  # in turns: what else this machine does meets all of them
            for wire in dead:
                tunnel.lab.wire(wire).cut()
            time.sleep(SETTLE)
            rates[name].append(goodput(tunnel, size))
            for wire in dead:
                tunnel.lab.wire(wire).mend()
            time.sleep(SETTLE / 2)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, median in medians.items():
        note(
            f"{name}: {median * 8e-6:.2f} Mbit/s, of {', '.join(f'{each * 8e-6:.2f}' for each in sorted(rates[name]))}"
        )
    assert medians["both"] >= SLACK * max(medians["the fast one alone"], medians["the slow one alone"])
