"""Two uplinks behind NATs, and what happens to one of them or to both: nothing is lost, nothing comes twice."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.traffic import Datagrams, Download, content_sha256, serve_web
from tests.running import NEVER_STOOD_STILL, Maker, Tunnel, note, note_flows, until, wait_until

if TYPE_CHECKING:
    from mptunnel.traffic import Flow

pytestmark = pytest.mark.netns

DELAYS = {"p1": 0.020, "p2": 0.060}  # one way
SKEW = 0.040
AGAIN = 2.5  # s: after this path 1 alone carries everything
RUNS, ATTEMPTS = 5, 12
QUIET = 0.010  # s: where the sender itself was held up for longer, a gap says nothing of the tunnel
RATE = 400_000  # bytes per second of the transfer beside the datagrams


def blackhole(tunnel: Tunnel, seconds: float) -> None:
    tunnel.lab.wire("p1").cut()
    time.sleep(seconds)
    tunnel.lab.wire("p1").mend()


def link_down(tunnel: Tunnel, seconds: float) -> None:
    tunnel.lab.link(1, up=False)
    time.sleep(seconds)
    tunnel.lab.link(1, up=True)


def renumber(tunnel: Tunnel, _: float) -> None:
    tunnel.lab.renumber(1)


def nat_flush(tunnel: Tunnel, _: float) -> None:
    tunnel.lab.flush_nat(1)


EVENTS = {"blackhole": blackhole, "link down": link_down, "renumbering": renumber, "NAT flush": nat_flush}


def with_skew(make_tunnel: Maker, **topology: Any) -> Tunnel:
    tunnel = make_tunnel(**topology)
    tunnel.begin()
    for name, delay in DELAYS.items():
        tunnel.lab.wire(name).set(delay=delay)
    time.sleep(0.6)  # the paths learn their delays
    return tunnel


def live_through(tunnel: Tunnel, event: str, away: float, alone: float) -> tuple[Flow, Flow]:
    """Let the event happen to path 1, and then leave it alone in the world, with traffic all the time."""
    before = 0.5
    seconds = before + away + AGAIN + alone + 0.3
    size = int(RATE * (seconds - 1.0))
    datagrams = Datagrams(tunnel.lab, seconds)
    transfer = Download(tunnel.lab, size, rate=RATE)
    until(datagrams.begun + before)
    EVENTS[event](tunnel, away)
    time.sleep(AGAIN)
    tunnel.lab.wire("p2").cut()
    flows, done = datagrams.finish(), transfer.finish()
    tunnel.lab.wire("p2").mend()
    note_flows(event, *flows)
    note(f"{event}, transfer: longest stall {done.longest_stall() * 1e3:.0f} ms")
    assert done.sha256 == content_sha256(size), done.error
    assert done.longest_stall() < 2 * NEVER_STOOD_STILL
    for flow in flows:
        assert (flow.lost, flow.duplicated) == (0, 0)
    return flows


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_is_lost_whatever_happens_to_a_path(make_tunnel: Maker, event: str) -> None:
    tunnel = with_skew(make_tunnel, seed=21, strict_rp_filter=event == "link down")
    serve_web(tunnel.lab)
    for flow in live_through(tunnel, event, away=1.0, alone=0.6):
        assert flow.longest_stall() < NEVER_STOOD_STILL


@pytest.mark.slow
@pytest.mark.parametrize("event", EVENTS)
def test_no_gap_is_longer_than_the_skew_of_the_paths(make_tunnel: Maker, event: str) -> None:
    tunnel = with_skew(make_tunnel, seed=22, strict_rp_filter=True)
    serve_web(tunnel.lab)
    gaps: list[float] = []
    for _ in range(ATTEMPTS):
        flows = live_through(tunnel, event, away=4.0, alone=2.5)
        if all(flow.longest_send_gap() < QUIET for flow in flows):
            gaps.append(max(flow.longest_stall() for flow in flows))
        if len(gaps) == RUNS:
            break
        tunnel.wait_up()
    else:
        pytest.skip(f"other programs kept this machine busy: only {len(gaps)} of {ATTEMPTS} runs can be judged")
    note(f"{event}: longest gaps in ms {', '.join(f'{gap * 1e3:.1f}' for gap in sorted(gaps))}")
    assert sorted(gaps)[RUNS - 2] <= SKEW + 0.005
    assert max(gaps) <= SKEW + 0.020


@pytest.mark.parametrize("loss", [pytest.param(0.05, marks=pytest.mark.slow), 0.20])
def test_chance_has_to_hit_both_paths(make_tunnel: Maker, loss: float) -> None:
    """What is lost in the end is the product of both losses, and the receipts know the number."""
    tunnel = make_tunnel(seed=23)
    tunnel.begin()
    before = tunnel.status()["receipts"]["down"]["lost"]
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).set(loss=loss, delay=0.005)
    flows = Datagrams(tunnel.lab, 4.0, rate=1500).finish()
    note_flows(f"{loss:.0%} on each path", *flows)
    sent, lost = sum(flow.sent for flow in flows), sum(flow.lost for flow in flows)
    expected = sent * loss**2
    note(f"{loss:.0%} on each path: {lost} of {sent} lost, {lost / sent:.2%}; expected {expected:.0f}")
    assert abs(lost - expected) < 5 * expected**0.5
    for name in ("p1", "p2"):
        tunnel.lab.wire(name).set(loss=0.0)

    def is_settled() -> bool:
        return bool(tunnel.status()["receipts"]["down"]["lost"] - before == flows[1].lost)

    wait_until(is_settled, f"the receipts of the client say {flows[1].lost}", 6.0)
