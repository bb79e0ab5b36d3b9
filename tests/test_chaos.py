"""Paths that die at random, all day long: on simulated wires, where a thousand deaths take seconds, and on real ones.

The short forms run in CI; the long ones, at the full rate and length, are behind `make soak`.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.running import note
from tests.simnet import TARGET, TUNNEL4, Simnet, Wire, ipv4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLIENT = str(TUNNEL4[2])
HEAD = 20  # bytes of an IPv4 header
LONGEST = 0.060  # s, one way
OVERLAP = 1.0  # s in which both paths work before the other one dies
RATES = [pytest.param(50, id="short"), pytest.param(1000, id="long", marks=pytest.mark.slow)]


class Stream:
    """`rate` numbered packets a second each way, for as long as it is let; it keeps count, and no packet."""

    def __init__(self, net: Simnet, rate: int) -> None:
        self._net, self._interval = net, 1.0 / rate
        self._is_on = self._takes = True
        self.sent: list[float] = []
        self.arrived = {"up": bytearray(), "down": bytearray()}
        self.back_at = {"up": net.now, "down": net.now}  # the newest arrival
        self.gap = {"up": 0.0, "down": 0.0}
        net.at(net.now, self._send)
        net.at(net.now, self._count)

    def end(self) -> None:
        """Send no more, and wait for what is under way."""
        self._is_on = False
        self._net.run(1.0)
        self.take()

    def lost(self, way: str, since: float = 0.0) -> list[float]:
        """When those were sent that never arrived."""
        return [at for at, came in zip(self.sent, self.arrived[way], strict=True) if not came and at >= since]

    def twice(self, way: str) -> int:
        """How many arrived more than once."""
        return sum(came > 1 for came in self.arrived[way])

    def _send(self) -> None:
        net = self._net
        number = len(self.sent).to_bytes(4, "big")
        self.sent.append(net.now)
        for flags in self.arrived.values():
            flags.append(0)
        net.client_sends(ipv4(CLIENT, TARGET, number))
        net.server_sends(ipv4(TARGET, CLIENT, number))
        if self._is_on:
            net.after(self._interval, self._send)

    def stop_taking(self) -> None:
        """Leave what arrives from now on where it is."""
        self._takes = False

    def _count(self) -> None:
        if self._takes:
            self.take()
        if self._is_on:
            self._net.after(1.0, self._count)

    def take(self) -> None:
        """Count what has arrived, and let the net forget what it has written down."""
        for way, came in (("up", self._net.at_server), ("down", self._net.at_client)):
            flags = self.arrived[way]
            for at, packet in came:
                flags[int.from_bytes(packet[HEAD:], "big")] += 1
                self.gap[way] = max(self.gap[way], at - self.back_at[way])
                self.back_at[way] = at
            came.clear()
        self._net.log.clear()


def pair(seed: int) -> Simnet:
    """Two uplinks of 20 and 60 ms, and a tunnel over both."""
    net = Simnet(Wire(delay=0.020), Wire(delay=LONGEST), seed=seed)
    net.run(3.0)
    return net


def cut(net: Simnet, number: int) -> None:
    net.wires[number].is_cut = True


def mend(net: Simnet, number: int) -> None:
    net.wires[number].is_cut = False


def half(net: Simnet, number: int) -> None:
    """One direction dies; which one is chance."""
    wire = net.wires[number]
    wire.cuts_up = net.rng.random() < 0.5
    wire.cuts_down = not wire.cuts_up


def whole(net: Simnet, number: int) -> None:
    net.wires[number].cuts_up = net.wires[number].cuts_down = False


def unplug(net: Simnet, number: int) -> None:
    net.set_link(number, up=False)


def plug(net: Simnet, number: int) -> None:
    net.set_link(number, up=True)


def renumber(net: Simnet, number: int) -> None:
    cut(net, number)
    net.renumber(number)


DEATHS: list[tuple[Callable[[Simnet, int], None], Callable[[Simnet, int], None]]] = [
    (cut, mend), (half, whole), (unplug, plug), (renumber, mend),
]  # fmt: skip


def lengths(rng: random.Random) -> Iterator[float]:
    """Yield for how long a path is dead: mostly for moments, now and then beyond every limit that a path has."""
    while True:
        yield rng.uniform(0.02, 0.5) if rng.random() < 0.97 else rng.choice((1.5, 3.5, 12.0, 32.0))


def check_whole(stream: Stream, what: str) -> None:
    """Nothing was lost and nothing came twice."""
    for way in ("up", "down"):
        lost = stream.lost(way)
        gap = stream.gap[way] * 1e3
        note(f"{what}, {way}: {len(stream.sent)} sent, {len(lost)} lost, longest gap {gap:.1f} ms")
        assert not lost, f"lost {way}, of those sent at {lost[:5]}"
        assert stream.twice(way) == 0


@pytest.mark.parametrize("rate", RATES)
def test_a_thousand_deaths_at_random_lose_nothing(rate: int) -> None:
    net, rng = pair(41), random.Random(41)
    stream, dead_for, last = Stream(net, rate), lengths(rng), 0
    for _ in range(1000):
        victim = rng.randrange(2)
        net.run(rng.uniform(0.0, 0.3) if victim == last else OVERLAP + rng.uniform(0.0, 0.3))
        begin, end = rng.choice(DEATHS)
        begin(net, victim)
        net.run(next(dead_for))
        end(net, victim)
        last = victim
    stream.end()
    check_whole(stream, "1000 deaths")
    assert max(stream.gap.values()) <= LONGEST + 1 / rate + 0.005


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_five_hundred_flaps_of_one_path_lose_nothing(victim: int, rate: int) -> None:
    net, rng = pair(42), random.Random(42)
    stream, at = Stream(net, rate), 0.5
    for _ in range(500):
        begin, end = rng.choice(DEATHS)
        dead = rng.uniform(0.05, 2.0)
        net.after(at, partial(begin, net, victim))
        net.after(at + dead, partial(end, net, victim))
        at += dead + rng.uniform(0.05, 1.0)
    net.run(at)
    stream.end()
    check_whole(stream, "500 flaps")


@pytest.mark.parametrize("rate", RATES)
def test_two_hundred_handovers_with_a_second_of_overlap_lose_nothing(rate: int) -> None:
    net, rng = pair(43), random.Random(43)
    stream, dead_for = Stream(net, rate), lengths(rng)
    for turn in range(200):
        begin, end = rng.choice(DEATHS)
        begin(net, turn % 2)
        net.run(next(dead_for) if turn % 4 < 2 else rng.uniform(1.0, 5.0))
        end(net, turn % 2)
        net.run(OVERLAP)
    stream.end()
    check_whole(stream, "200 handovers")


def test_a_moment_without_any_path_is_seen_to_lose_something() -> None:
    net = pair(44)
    stream = Stream(net, 50)
    for change in (cut, mend):
        net.run(0.5)
        for number in (0, 1):
            change(net, number)
    stream.end()
    for way in ("up", "down"):
        assert len(stream.lost(way)) == pytest.approx(25, abs=1)
