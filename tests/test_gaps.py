"""The receipts of a simulated tunnel against an independent count of what its wires did."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.gaps import OUTAGE
from tests.simnet import Simnet, Traffic, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE = 700  # of the data: no control message is of this size
SHORT = 0.02  # s: silences up to this are none
SIDES = ("up", "down")
CLIENT = "10.0.1.2"
Key = tuple[bytes, int]  # session and counter


@dataclass
class Weather:
    """What happens to one direction of a wire: chance, and times in which nothing passes."""

    loss: float = 0.0
    jitter: float = 0.0  # that lets one overtake another
    cuts: list[tuple[float, float]] = field(default_factory=list)


class Count:
    """The account of one who sees every datagram and knows nothing of the program: data is told by its size."""

    def __init__(self, net: Simnet, seed: int) -> None:
        self.net = net
        self.rng = random.Random(seed)
        self.weather = {(side, number): Weather() for side in SIDES for number in range(len(net.wires))}
        self.order: dict[str, dict[Key, int]] = {side: {} for side in SIDES}  # in which they were sealed
        self.came: dict[str, list[tuple[float, int, Key]]] = {side: [] for side in SIDES}  # when, and by which wire
        self._delays = [wire.delay for wire in net.wires]
        net.tap = self._pass

    def set(self, **weather: float) -> None:
        """Let every direction of every wire have this weather."""
        for each in self.weather.values():
            for name, value in weather.items():
                setattr(each, name, value)

    def _pass(self, side: str, number: int, datagram: bytes) -> bytes | None:
        weather, wire, now = self.weather[side, number], self.net.wires[number], self.net.now
        is_data = datagram[0] == 4 and SIZE <= len(datagram) < SIZE + 100
        key = (datagram[4:8], int.from_bytes(datagram[8:16], "little"))
        if is_data:
            self.order[side].setdefault(key, len(self.order[side]))
        wire.delay = self._delays[number] + self.rng.random() * weather.jitter
        if any(begin <= now < end for begin, end in weather.cuts) or self.rng.random() < weather.loss:
            wire.counts[f"lost_{side}"] += 1
            return None
        if is_data and not self.net.down[number]:
            self.came[side].append((now + wire.delay, number, key))
        return datagram

    def account(self, side: str) -> dict[str, Any]:
        """What the receipts should say of a direction."""
        order, wires = self.order[side], range(len(self.net.wires))
        by: dict[Key, list[int]] = {}
        firsts: list[tuple[float, Key]] = []
        copies: list[list[tuple[float, Key]]] = [[] for _ in wires]
        for at, number, key in sorted(self.came[side], key=lambda each: each[0]):
            if key not in by:
                firsts.append((at, key))
            by.setdefault(key, []).append(number)
            copies[number].append((at, key))
        paths = []
        for wire in wires:
            gaps = self._gaps(order, copies[wire], by)
            outages = [length for length, is_bridged in gaps if is_bridged and length > OUTAGE]
            paths.append(
                {
                    "first": sum(numbers[0] == wire for numbers in by.values()),
                    "missed": sum(wire not in numbers for numbers in by.values()),
                    "lost": sum(wire not in by.get(key, ()) for key in order),
                    "longest_gap_ms": 1e3 * max((length for length, _ in gaps), default=0.0),
                    "outages_bridged": len(outages),
                    "bridged_s": sum(outages),
                }
            )
        return {
            "packets": len(order),
            "received": len(by),
            "lost": len(order) - len(by),
            "saved": sum(len({*numbers}) < len(wires) for numbers in by.values()),
            "longest_gap_ms": 1e3 * max((length for length, _ in self._gaps(order, firsts, by)), default=0.0),
            "paths": paths,
        }

    @staticmethod
    def _gaps(
        order: dict[Key, int], arrivals: Sequence[tuple[float, Key]], by: dict[Key, list[int]]
    ) -> list[tuple[float, bool]]:
        """Return the silences between arrivals in which a packet was due, and whether another wire brought one."""
        here = {order[key] for _, key in arrivals}
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


def started(*delays: float, seed: int = 1) -> tuple[Simnet, Count]:
    """Return a tunnel that has been up for a while, and the count that goes with it."""
    net = Simnet(*(Wire(delay=delay) for delay in delays), seed=seed)
    count = Count(net, seed)
    net.run(3.0)
    return net, count


def speak(net: Simnet, seconds: float, rate: float = 100.0) -> None:
    """Let both sides speak at this rate."""
    traffic = Traffic(net, rate, size=SIZE - 56)
    traffic.start(seconds)
    net.run(seconds)


def speak_through(net: Simnet, count: Count, seconds: float, rate: float = 100.0, **weather: float) -> None:
    """Let both sides speak; from one second after the beginning to one before the end there is this weather."""
    net.after(1.0, lambda: count.set(**weather))
    net.after(seconds - 1.0, lambda: count.set(**dict.fromkeys(weather, 0.0)))
    speak(net, seconds, rate)


def said(net: Simnet, side: str, at: str) -> dict[str, Any]:
    """Return what one end says of a direction."""
    if at == "client":
        status = net.client.status(net.now)
    else:
        (status,) = net.server.status(net.now)["peers"]
    by_id = {path["id"]: path["alone"][side] for path in status["paths"]}
    return {**status["receipts"][side], "paths": [by_id[number] for number in range(len(net.wires))]}


def check(net: Simnet, count: Count, *, is_told: bool = True) -> None:
    """Compare what both ends say of both directions with the count."""
    net.run(12.0)  # everything is settled, and said
    for side in SIDES:
        expected = count.account(side)
        for at in ("client", "server") if is_told else ({"up": "server", "down": "client"}[side],):
            got = said(net, side, at)
            for name in ("packets", "received", "lost", "saved"):
                assert got[name] == expected[name], f"{at} says {name} {side}"
            assert got["longest_gap_ms"] == pytest.approx(expected["longest_gap_ms"], abs=0.1), f"{at}, {side}"
            for alone, truth in zip(got["paths"], expected["paths"], strict=True):
                for name in ("first", "missed", "lost", "outages_bridged"):
                    assert alone[name] == truth[name], f"{at} says {name} {side}"
                assert alone["longest_gap_ms"] == pytest.approx(truth["longest_gap_ms"], abs=0.1), f"{at}, {side}"
                assert alone["bridged_s"] == pytest.approx(truth["bridged_s"], abs=0.002), f"{at}, {side}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delays", [(0.02, 0.06), (0.02, 0.06, 0.3, 0.02)])
def test_both_ends_say_of_both_directions_what_the_wires_have_done(delays: tuple[float, ...], seed: int) -> None:
    net, count = started(*delays, seed=seed)
    speak_through(net, count, 10.0, loss=0.3)
    check(net, count)
    for side in SIDES:
        account = count.account(side)
        assert account["saved"] > 200
        assert all(path["longest_gap_ms"] > 40 for path in account["paths"])


def test_a_long_cut_of_one_path_is_a_gap_of_that_path_alone_and_an_outage_bridged() -> None:
    net, count = started(0.02, 0.06)
    for side in SIDES:
        count.weather[side, 0].cuts = [(net.now + 2.0, net.now + 9.5)]
        count.weather[side, 1].cuts = [(net.now + 11.0, net.now + 11.4)]
    speak(net, 14.0)
    check(net, count)
    for side in SIDES:
        whole = said(net, side, "client")
        assert (whole["lost"], whole["longest_gap_ms"], whole["outages_bridged"]) == (0, 0.0, 2)
        longest, short = (path["longest_gap_ms"] for path in whole["paths"])
        assert 7500 < longest < 7800  # the server waits for a probe before it gives anything to this path again
        assert short == pytest.approx(410, abs=0.1)


def test_when_all_paths_are_cut_at_once_the_gap_is_real_and_nobody_bridged_it() -> None:
    net, count = started(0.02, 0.06)
    for weather in count.weather.values():
        weather.cuts = [(net.now + 2.0, net.now + 3.0)]
    speak(net, 6.0)
    check(net, count)
    whole = said(net, "up", "server")
    assert whole["longest_gap_ms"] == pytest.approx(1010, abs=0.1)
    assert whole["lost"] == 100


def test_one_direction_of_a_path_has_outages_of_its_own() -> None:
    net, count = started(0.02, 0.06)
    count.weather["up", 0].cuts = [(net.now + 2.0, net.now + 3.0)]
    speak(net, 5.0)
    check(net, count)
    assert said(net, "up", "client")["outages_bridged"] == 1
    assert said(net, "down", "client")["outages_bridged"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_packets_that_overtake_each_other_make_no_gap_and_hide_none(seed: int) -> None:
    net, count = started(0.02, 0.06, seed=seed)
    speak_through(net, count, 8.0, rate=400.0, loss=0.2, jitter=0.03)
    check(net, count)


def test_a_change_of_session_in_the_middle_of_losses_changes_nothing_in_the_account() -> None:
    net, count = started(0.02, 0.06)
    serial = net.guest.current.serial if net.guest.current else 0
    speak_through(net, count, 135.0, rate=40.0, loss=0.2)
    assert net.guest.current is not None
    assert net.guest.current.serial > serial
    check(net, count)


def test_a_path_that_is_gone_for_a_while_loses_what_it_was_not_given() -> None:
    net, count = started(0.02, 0.06)
    for side in SIDES:
        count.weather[side, 0].cuts = [(net.now + 1.9, net.now + 7.0)]  # nothing is on its way when it goes
    net.after(2.0, lambda: net.set_link(0, up=False))
    net.after(7.0, lambda: net.set_link(0, up=True))
    speak(net, 12.0)
    check(net, count)
    for side in SIDES:
        alone = said(net, side, "client")["paths"][0]
        assert alone["longest_gap_ms"] > 5000
        assert alone["missed"] > 490
