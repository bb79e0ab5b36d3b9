"""Paths that carry one way only: as long as one carries up and one down, the tunnel lives, and renews its keys.

On simulated wires. The server answers a handshake, HELLO and probes also by the other paths where the one they came by
does not carry back, and the client learns of each path by what comes on the others.
"""

from __future__ import annotations

from functools import partial

import pytest

from mptunnel.events import NoticeKind
from mptunnel.messages import INITIATION, RESPONSE, Control
from mptunnel.path import HALF_LIVES_FOR
from tests.simnet import Simnet, Traffic, Wire, stranger
from tests.test_tunnel import cut, mend, running

LONG = 400.0  # s: keys are renewed three times, and live for 180 s
each_way = pytest.mark.parametrize("up", [0, 1])  # which wire carries up; the other one carries down


def halve(net: Simnet, up: int) -> None:
    cut(net, up, up=False)
    cut(net, 1 - up, down=False)


def serial(net: Simnet) -> int:
    assert net.peer.current is not None
    return net.peer.current.serial


def carries(net: Simnet) -> list[list[str]]:
    reply = net.client.control("status", {}, net.now)  # type: ignore[arg-type]
    return [path["carries"] for path in reply.result["paths"]]


@each_way
def test_one_path_up_and_another_one_down_are_a_tunnel_for_as_long_as_it_takes(up: int) -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    traffic = Traffic(net, rate=25)
    net.after(5.0, lambda: halve(net, up))
    before = serial(net)
    traffic.run(LONG)
    assert traffic.is_whole()
    assert 3 <= serial(net) - before <= 4
    assert net.told("client", NoticeKind.TUNNEL_SILENT) == []
    assert net.peer.is_multipath
    assert net.guest.is_multipath
    assert carries(net) == ([["up"], ["down"]] if up == 0 else [["down"], ["up"]])


@each_way
def test_what_works_both_ways_again_is_up_after_a_probe(up: int) -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    traffic = Traffic(net, rate=25)
    net.after(2.0, lambda: halve(net, up))
    for number in range(2):
        net.after(60.0, partial(mend, net, number))
    traffic.start(70.0)
    net.run(60.0 + 0.25 + 0.12 + 0.01)
    assert all(path.is_up for path in net.client.paths.values())
    assert carries(net) == [["up", "down"]] * 2
    net.run(12.0)
    assert traffic.is_whole()


@each_way
def test_an_idle_tunnel_of_two_halves_is_there_when_it_is_needed(up: int) -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    Traffic(net, rate=25).run(2.0)
    halve(net, up)
    begun = net.now
    net.run(900.0)
    since = net.now
    assert len(net.sent(INITIATION, "up", since=begun)) <= 20
    assert len(net.told("client", NoticeKind.TUNNEL_SILENT, since=begun)) <= 1  # until what is left is found out
    traffic = Traffic(net, rate=25)
    traffic.run(5.0)
    assert traffic.lost("up") == 0
    assert traffic.lost("down", since=since + 0.25) == 0


def test_when_the_last_way_down_dies_too_that_is_told_and_new_keys_are_asked_for() -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    traffic = Traffic(net, rate=25)
    net.after(2.0, lambda: halve(net, 0))
    net.after(20.0, lambda: cut(net, 1))
    traffic.start(40.0)
    net.run(20.0)
    died = net.now
    net.run(HALF_LIVES_FOR + 1.0)
    assert len(net.told("client", NoticeKind.TUNNEL_SILENT, since=died)) == 1
    assert net.sent(INITIATION, "up", since=died)


def test_where_every_path_carries_both_ways_each_copy_of_a_handshake_has_one_answer() -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    begun = net.now
    Traffic(net, rate=25).run(130.0)
    assert len(net.sent(INITIATION, "up", since=begun)) == len(net.sent(RESPONSE, "down", since=begun)) == 2
    answers = net.controls("down", Control.HELLO, since=begun)
    assert len(answers) == len(net.controls("up", Control.HELLO, since=begun))


@each_way
def test_a_stolen_handshake_is_answered_to_nobody_but_its_thief(up: int) -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    Traffic(net, rate=25).start(200.0)
    halve(net, up)
    begun = net.now
    while not net.sent(RESPONSE, "down", since=begun):
        net.run(0.1)
    answered, stolen = len(net.sent(RESPONSE, "down")), net.sent(INITIATION, "up", since=begun)[0][1]
    for number in range(5):
        net.deliver(stolen, stranger(number))
        net.turn()
    assert len(net.sent(RESPONSE, "down")) == answered
    assert [len(answer) < len(stolen) for answer in net.to_strangers()] == [True] * 5
