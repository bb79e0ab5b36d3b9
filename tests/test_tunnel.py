"""The promise, on the whole core: while one path works nothing is lost, nothing comes twice, nothing is altered."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mptunnel.messages import TRANSPORT
from tests.simnet import WALL, Simnet, Traffic, Wire, counter_of

if TYPE_CHECKING:
    from collections.abc import Callable

Fault = tuple[str, "Callable[[Simnet, int], None]", "Callable[[Simnet, int], None]"]


def running(*wires: Wire, seed: int = 1) -> Simnet:
    net = Simnet(*wires, seed=seed)
    net.run(3.0)
    return net


def cut(net: Simnet, number: int, *, up: bool = True, down: bool = True) -> None:
    net.wires[number].cuts_up, net.wires[number].cuts_down = up, down


def mend(net: Simnet, number: int) -> None:
    cut(net, number, up=False, down=False)


def nothing(net: Simnet, number: int) -> None:
    """What needs no mending."""


def flap(net: Simnet, number: int) -> None:
    for turn in range(12):
        net.after(turn * 0.23, lambda: cut(net, number))
        net.after(turn * 0.23 + 0.11, lambda: mend(net, number))


def flap_link(net: Simnet, number: int) -> None:
    for turn in range(9):
        net.after(turn * 0.31, lambda: net.set_link(number, up=False))
        net.after(turn * 0.31 + 0.17, lambda: net.set_link(number, up=True))


FAULTS: dict[str, tuple[Callable[[Simnet, int], None], Callable[[Simnet, int], None]]] = {
    "a silent blackhole": (cut, mend),
    "nothing goes up": (lambda net, number: cut(net, number, down=False), mend),
    "nothing comes down": (lambda net, number: cut(net, number, up=False), mend),
    "link down and up": (
        lambda net, number: net.set_link(number, up=False),
        lambda net, number: net.set_link(number, up=True),
    ),
    "renumbered": (Simnet.renumber, nothing),
    "NAT mapping flushed": (Simnet.flush_nat, nothing),
    "flapping": (flap, mend),
    "a flapping link": (flap_link, lambda net, number: net.set_link(number, up=True)),
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_while_one_path_works(fault: str, victim: int) -> None:
    net = running()
    begin, end = FAULTS[fault]
    traffic = Traffic(net, rate=50)
    net.after(1.0, lambda: begin(net, victim))
    net.after(7.0, lambda: end(net, victim))
    net.after(9.5, lambda: cut(net, 1 - victim))  # 2.5 s later the victim carries everything alone
    traffic.run(13.0)
    assert traffic.is_whole()
    assert min(traffic.longest_gap("up"), traffic.longest_gap("down")) <= 0.04 + 0.02 + 0.005


def test_the_gap_of_a_sudden_death_is_the_skew_of_the_paths() -> None:
    net = running(Wire(delay=0.02), Wire(delay=0.06))
    traffic = Traffic(net, rate=1000)
    net.after(1.0, lambda: cut(net, 0))
    traffic.run(2.0)
    assert traffic.is_whole()
    for side in ("up", "down"):
        assert traffic.longest_gap(side) <= 0.04 + 0.001 + 1e-6


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 10_000),
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(sorted(FAULTS)), st.floats(0.05, 8.0)), min_size=1, max_size=4
    ),
)
def test_faults_of_one_path_at_a_time_lose_nothing(seed: int, plan: list[tuple[int, str, float]]) -> None:
    rng = random.Random(seed)
    wires = [Wire(delay=rng.uniform(0.005, 0.3), jitter=rng.choice([0, 0.1]), duplicate=0.2) for _ in range(2)]
    net = running(*wires, seed=seed)
    at = 0.5
    for victim, fault, lasting in plan:
        begin, end = FAULTS[fault]
        lasts = max(lasting, 3.0) if "flapping" in fault else lasting
        net.after(at, partial(begin, net, victim))
        net.after(at + lasts, partial(end, net, victim))
        at += lasts + 3.0
    traffic = Traffic(net, rate=20)
    traffic.run(at)
    assert traffic.is_whole()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000))
def test_no_packet_is_delivered_twice_or_altered_whatever_the_faults(seed: int) -> None:
    rng = random.Random(seed)
    net = Simnet(
        *(
            Wire(
                delay=rng.uniform(0.001, 0.7),
                jitter=rng.uniform(0, 0.5),
                duplicate=rng.random(),
                loss_up=rng.uniform(0, 0.5),
                loss_down=rng.uniform(0, 0.5),
            )
            for _ in range(rng.randint(1, 4))
        ),
        seed=seed,
    )
    kept: list[tuple[str, int, bytes]] = []

    def remember(side: str, number: int, datagram: bytes) -> bytes:
        kept.append((side, number, datagram))
        if rng.random() < 0.02:  # somebody on the path repeats what it has seen, perhaps altered
            side, number, old = rng.choice(kept)
            if rng.random() < 0.5:
                at = rng.randrange(len(old))
                old = old[:at] + bytes([old[at] ^ 1 << rng.randrange(8)]) + old[at + 1 :]
            net.after(rng.uniform(0, 3), lambda: net.put(side, number, old) if len(net.log) < 50_000 else None)
        return datagram

    net.tap = remember
    events: list[Callable[[], None]] = [
        lambda: cut(net, rng.randrange(len(net.wires)), up=rng.random() < 0.7, down=rng.random() < 0.7),
        lambda: mend(net, rng.randrange(len(net.wires))),
        lambda: net.flush_nat(rng.randrange(len(net.wires))),
        lambda: net.renumber(rng.randrange(len(net.wires))),
        lambda: net.set_link(rng.randrange(len(net.wires)), up=rng.random() < 0.6),
        lambda: net.set_wall(rng.choice([0.0, WALL, WALL + 3e8, WALL - 3e8])),
        net.restart_client,
        net.restart_server,
    ]
    net.run(90.0)
    for _ in range(10):
        net.after(rng.uniform(0, 40), rng.choice(events))
    traffic = Traffic(net, rate=15)
    traffic.run(40.0)
    traffic.arrived("up")
    traffic.arrived("down")


@pytest.mark.parametrize("skew", [0.0, 0.6])
def test_a_rekey_every_120_s_under_load_loses_nothing(skew: float) -> None:
    net = running(Wire(delay=0.02, loss_up=0.3, loss_down=0.3), Wire(delay=0.02 + skew))
    traffic = Traffic(net, rate=1)
    for rekey in (120.0, 240.0):
        net.run(rekey - 4.0 - (net.now - 1000.0))
        traffic = Traffic(net, rate=100)
        traffic.run(12.0)
        assert traffic.is_whole()  # what the fast path lost around a rekey came by the slow one, under the old keys
    assert net.peer.current is not None
    assert net.peer.current.serial == 3


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_what_is_lost_is_the_product_of_the_losses(loss: float) -> None:
    net = running(Wire(loss_up=loss, loss_down=loss), Wire(delay=0.03, loss_up=loss, loss_down=loss), seed=9)
    traffic = Traffic(net, rate=1000)
    traffic.run(5.0)
    expected = 5000 * loss * loss
    for side in ("up", "down"):
        assert abs(traffic.lost(side) - expected) < 4.5 * math.sqrt(expected)


def test_alternating_deaths_with_an_overlap_of_2_5_s_lose_nothing() -> None:
    net = running()
    traffic = Traffic(net, rate=50)
    for turn in range(12):
        net.after(1.0 + 5.5 * turn, partial(cut, net, turn % 2))
        net.after(4.0 + 5.5 * turn, partial(mend, net, turn % 2))
    traffic.run(70.0)
    assert traffic.is_whole()


def test_the_tunnel_comes_up_on_the_one_path_of_four_that_works() -> None:
    wires = [Wire(is_cut=True), Wire(cuts_up=True), Wire(delay=0.1), Wire(cuts_down=True)]
    net = Simnet(*wires)
    traffic = Traffic(net)
    traffic.run(3.0)
    assert traffic.is_whole(since=1000.5)


@pytest.mark.parametrize(("dead", "within"), [(1.0, 0.05), (10.0, 0.3), (200.0, 1.0)])
def test_after_all_paths_were_dead_traffic_flows_again_at_once(dead: float, within: float) -> None:
    net = running()
    for number in (0, 1):
        cut(net, number)
    traffic = Traffic(net, rate=20)
    traffic.start(dead + 10)
    net.run(dead)
    for number in (0, 1):
        mend(net, number)
    back = net.now
    net.run(14.0)
    for side in ("up", "down"):
        assert traffic.back_at(side, back) - back <= within + 0.06
        assert traffic.lost(side, since=back + within) == 0


@pytest.mark.parametrize("idle", [False, True])
def test_after_a_restart_of_the_server_traffic_flows_within_3_s(idle: bool) -> None:
    net = running()
    if not idle:
        Traffic(net, rate=50).run(2.0, rest=0)
    else:
        net.run(60.0)
    net.kill_server()
    net.run(0.5)
    net.start_server()
    begun = net.now
    traffic = Traffic(net, rate=50)
    traffic.run(20.0)
    for side in ("up", "down"):
        assert traffic.back_at(side, begun) - begun <= 3.0
        assert traffic.lost(side, since=begun + 3.0) == 0


def test_after_a_restart_of_the_server_the_paths_of_the_whole_client_are_back() -> None:
    net = running(Wire(), Wire(delay=0.06), Wire(delay=0.2))
    Traffic(net, rate=20).run(2.0, rest=0)
    net.restart_server()
    traffic = Traffic(net, rate=20)
    traffic.start(10.0)
    net.run(4.0)
    assert len([path for path in net.guest.paths.values() if path.endpoint is not None]) == 3


def test_after_a_restart_of_the_client_traffic_flows_within_1_s() -> None:
    net = running()
    Traffic(net, rate=50).run(2.0, rest=0)
    net.restart_client()
    begun = net.now
    traffic = Traffic(net, rate=50)
    traffic.run(20.0)
    for side in ("up", "down"):
        assert traffic.back_at(side, begun) - begun <= 1.0
        assert traffic.lost(side, since=begun + 1.0) == 0


def test_what_an_earlier_run_of_the_client_left_on_a_slow_path_does_not_disturb_the_next_one() -> None:
    net = running(Wire(delay=0.01), Wire(delay=0.6))
    Traffic(net, rate=50).run(3.0, rest=0)
    net.stop("client")
    net.restart_client()
    net.run(0.2)  # the fast path is up again, the old run's goodbye still under way on the slow one
    begun = net.now
    traffic = Traffic(net, rate=100)
    traffic.run(3.0)
    assert traffic.is_whole()
    assert traffic.longest_gap("down", since=begun) < 0.1


def test_a_clean_stop_of_the_server_is_noticed_at_once() -> None:
    net = running()
    net.stop("server")
    net.run(0.2)
    net.start_server()
    begun = net.now
    traffic = Traffic(net, rate=50)
    traffic.run(3.0)
    assert traffic.back_at("up", begun) - begun < 0.5


def test_a_client_started_with_all_links_down_comes_up_when_one_appears() -> None:
    net = Simnet(down=(0, 1))
    net.run(300.0)
    net.set_link(1, up=True)
    begun = net.now
    traffic = Traffic(net)
    traffic.run(2.0)
    assert traffic.is_whole(since=begun + 0.5)


def test_packets_that_wait_for_a_path_are_sent_when_one_opens() -> None:
    net = running()
    net.set_link(0, up=False)
    net.set_link(1, up=False)
    traffic = Traffic(net, rate=10)
    traffic.start(0.95)
    net.run(1.0)
    net.set_link(1, up=True)
    net.run(1.0)
    assert traffic.lost("up") == 0


def test_a_path_that_opens_for_a_moment_leaves_no_dead_handshake_behind() -> None:
    net = Simnet(Wire(cuts_down=True))  # the server answers, and is not heard
    net.run(100.0)
    net.set_link(0, up=False)
    net.run(60.0)
    net.set_link(0, up=True)
    net.run(60.0)  # what the server has taken meanwhile it will not take again
    mend(net, 0)
    net.run(40.0)
    assert net.peer.is_multipath


@pytest.mark.parametrize("wall", [0.0, WALL + 3.2e8, WALL - 3.2e8])
def test_the_wall_clock_may_jump_at_any_time(wall: float) -> None:
    net = running()
    traffic = Traffic(net, rate=4)
    net.after(30.0, lambda: net.set_wall(wall))
    net.after(200.0, lambda: net.set_wall(WALL))
    traffic.run(400.0)
    assert traffic.is_whole()


@pytest.mark.parametrize("wall", [0.0, WALL - 3.2e8])
def test_a_client_that_starts_with_its_clock_set_back_is_not_taken_for_a_replay(wall: float) -> None:
    net = running()
    net.set_wall(wall)
    net.restart_client()
    begun = net.now
    traffic = Traffic(net)
    traffic.run(3.0)
    assert traffic.is_whole(since=begun + 0.5)


def test_a_client_that_slept_for_ten_minutes_is_back_within_a_second_and_uses_no_old_key() -> None:
    net = running()
    Traffic(net, rate=20).run(2.0)
    net.is_client_awake = False
    net.run(600.0)
    net.is_client_awake = True
    woke = net.now
    traffic = Traffic(net, rate=20)
    traffic.run(5.0)
    for side in ("up", "down"):
        assert traffic.back_at(side, woke) - woke <= 1.0 + 0.04
    first = min(at for at, _ in net.sent(TRANSPORT, "up", since=woke))
    assert first - woke > 0.039  # a handshake came before it


def test_when_both_hosts_stood_still_for_ten_minutes_no_old_key_is_used() -> None:
    net = running()
    old = net.peer.current
    Traffic(net, rate=20).run(2.0, rest=0.0)
    net.now += 600.0  # CLOCK_BOOTTIME goes on in suspend
    woke = net.now
    assert old is not None
    traffic = Traffic(net, rate=20)
    traffic.run(5.0)
    for side in ("up", "down"):
        assert traffic.back_at(side, woke) - woke <= 1.0 + 0.04
    assert not [
        at
        for at, datagram in net.sent(TRANSPORT, "up", None, woke)
        if datagram[4:8] == old.remote_index.to_bytes(4, "little")
    ]


def test_a_counter_is_never_sealed_twice() -> None:
    net = Simnet(Wire(loss_up=0.2, loss_down=0.2), Wire(delay=0.3))
    for turn in range(6):
        net.after(20.0 * turn, lambda: net.flush_nat(0))
        net.after(20.0 * turn + 5, lambda: net.set_link(0, up=False))
        net.after(20.0 * turn + 6, lambda: net.set_link(0, up=True))
    Traffic(net, rate=30).run(130.0)
    sealed: dict[bytes, bytes] = {}
    for _, _, _, datagram in net.log:
        if counter_of(datagram) is not None:
            assert sealed.setdefault(datagram[:16], datagram) == datagram
    assert len(sealed) > 2 * 30 * 130
