"""How much a slow, bloated or lossy path is given, and how old what it delivers gets."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mptunnel.cap import FREE_AFTER, FULL, LEAST_RATE, Cap, Delay, SendQueue
from mptunnel.events import NoticeKind
from mptunnel.scheduler import allot
from tests.simnet import TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mptunnel.clientpeer import ClientPeer

FAST = 12.5e6  # bytes/s: 100 Mbit/s
SLOW = 250e3  # 2 Mbit/s
SIZE = 1200  # bytes of a packet's payload
SIDES = ("up", "down")


def offered(net: Simnet, mbit: float, seconds: float) -> Traffic:
    """Let both sides speak, and return after that time."""
    traffic = Traffic(net, mbit * 1e6 / 8 / (SIZE + 56), SIZE - 28)
    traffic.start(seconds)
    return traffic


def lateness(wire: Wire, side: str, since: float, until: float = float("inf")) -> list[float]:
    """Return, in order, by how much the datagrams of a time took longer than the wire itself."""
    return sorted(took - wire.delay for at, took, way in wire.took if way == side and since <= at < until)


def guest(net: Simnet) -> ClientPeer:
    return net.guest


# -- a path with a deep buffer, beside a fast one ------------------------------------------------------------


@pytest.mark.parametrize(("mbit", "slow_delay"), [(8.0, 0.02), (8.0, 0.15), (3.0, 0.06)])
def test_copies_on_a_bloated_path_are_young_and_after_the_fast_paths_death_too(mbit: float, slow_delay: float) -> None:
    fast, slow = Wire(delay=0.02, rate=FAST), Wire(delay=slow_delay, rate=SLOW, buffer=SLOW)
    net = Simnet(fast, slow)
    net.run(2.0)
    begun = net.now
    traffic = offered(net, mbit, 12.0)
    net.run(11.5)
    for side in SIDES:
        late = lateness(slow, side, begun + 3.0)
        assert late[int(0.95 * len(late))] < 0.100, side
        assert len(late) * (SIZE + 88) / 8.5 > 0.75 * SLOW, "the path is used for what it can carry"
        assert traffic.lost(side, until=net.now - 1.0) == 0
    cut = net.now
    fast.is_cut = True
    net.run(2.0)
    for side in SIDES:
        first = min((at, took) for at, took, way in slow.took if way == side and at >= cut)
        assert first[1] - slow_delay < 0.060
        assert traffic.back_at(side, cut) - cut < slow_delay + 0.5


def test_two_seconds_of_queue_both_ways_are_seen_by_the_other_path() -> None:
    slow = Wire(delay=0.06, rate=SLOW, buffer=2 * SLOW)
    net = Simnet(Wire(delay=0.02, rate=FAST), slow)
    net.run(2.0)
    begun = net.now
    offered(net, 8.0, 10.0)
    net.run(10.0)
    for side, settled in (("up", 3.0), ("down", 5.0)):
        late = lateness(slow, side, begun + settled)
        assert late[int(0.95 * len(late))] < 0.100, side
        assert late[-1] < 0.2, side
        assert len(late) * (SIZE + 88) / (10 - settled) > 0.75 * SLOW, side


@pytest.mark.parametrize("mbit", [pytest.param(8.0, marks=pytest.mark.slow), 3.0])
def test_a_very_slow_path_is_held_all_the_time(mbit: float) -> None:
    rate = 62_500.0
    slow = Wire(delay=0.06, rate=rate, buffer=rate)
    net = Simnet(Wire(delay=0.02, rate=FAST), slow)
    net.run(2.0)
    begun = net.now
    offered(net, mbit, 25.0)
    net.run(25.0)
    for side in SIDES:
        late = lateness(slow, side, begun + 7.0)
        assert late[int(0.95 * len(late))] < 0.120
        assert late[-1] < 0.3, "it was never given everything again"
        assert len(late) * (SIZE + 88) / 18 > 0.75 * rate


def test_a_path_with_jitter_and_room_gets_everything() -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06, jitter=0.04))
    net.run(2.0)
    before = net.client.paths[1].withheld
    traffic = offered(net, 8.0, 10.0)
    net.run(13.0)
    assert traffic.is_whole()
    assert net.client.paths[1].withheld == before == 0
    assert guest(net).paths[1].withheld == 0


@pytest.mark.parametrize(("mbit", "jitter"), [(0.5, 0.08), (0.8, 0.08)])
def test_jitter_is_no_queue_on_a_path_with_little_room_either(mbit: float, jitter: float) -> None:
    rate = 3e6 / 8
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06, jitter=jitter, rate=rate, buffer=rate))
    net.run(2.0)
    traffic = offered(net, mbit, 30.0)
    net.run(33.0)
    assert traffic.is_whole()
    for side in (net.client, guest(net)):
        assert side.paths[1].withheld < 0.05 * side.paths[0].tx_bytes


def test_what_is_off_the_line_is_jitter_and_a_queue_that_grows_is_none() -> None:
    steady, shaky = Delay(), Delay()
    for number in range(100):
        steady.count(5.0 + number * 0.1, number * 0.1)
        shaky.count(5.0 + number % 2 * 0.03, number * 0.1)
    assert steady.jitter == pytest.approx(0.0, abs=1e-9)
    assert shaky.jitter == pytest.approx(0.06, rel=0.01)


def test_a_path_that_is_throttled_to_little_more_than_the_least_rate_drains_all_the_same() -> None:
    slow = Wire(delay=0.06, rate=9000.0, buffer=40_000.0)
    net = Simnet(Wire(delay=0.02, rate=FAST), slow)
    net.run(2.0)
    begun = net.now
    offered(net, 0.5, 80.0)
    net.run(80.0)
    for side in SIDES:
        late = lateness(slow, side, begun + 60.0)
        assert late[int(0.95 * len(late))] < 2.0, side  # of 4.4, and a datagram takes 0.14


def test_a_path_that_has_faded_is_let_go_also_if_what_is_sent_comes_in_bursts() -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06, rate=6e6, buffer=150e3))
    net.run(2.0)
    path, frame = net.client.paths[1], [ipv4(str(TUNNEL4[2]), TARGET, bytes(1372))] * 20
    rates = []
    for number in range(600):
        net.wires[1].rate = 300e3 if 60 <= number < 180 else 6e6
        net.client_sends(*frame)
        net.run(0.035)
        rates.append(path.cap.rate)
    assert any(rates), "it was held"
    assert not any(rates[-100:])


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_a_lossy_path_gets_everything(loss: float) -> None:
    net = Simnet(Wire(delay=0.02, loss_up=loss, loss_down=loss), Wire(delay=0.06, loss_up=loss, loss_down=loss))
    net.run(2.0)
    offered(net, 8.0, 10.0)
    net.run(13.0)
    for paths in (net.client.paths, guest(net).paths):
        assert [paths[number].withheld for number in (0, 1)] == [0, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_path_that_loses_most_of_what_it_gets_is_held_and_the_other_gets_everything(way: str, seed: int) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06), seed=seed)
    net.run(2.0)
    setattr(net.wires[1], f"loss_{way}", 0.7)
    traffic = offered(net, 8.0, 10.0)
    net.run(13.0)
    assert traffic.is_whole()
    for side, paths in (("up", net.client.paths), ("down", guest(net).paths)):
        assert paths[0].withheld == 0
        assert (paths[1].withheld > 100_000) == (side == way)


def test_a_restarted_server_has_another_clock_and_that_is_no_queue() -> None:
    net = Simnet(Wire(delay=0.0005), Wire(delay=0.02))
    net.run(3.0)
    Traffic(net, 500.0).start(30.0)
    for _ in range(6):
        net.run(4.0)
        net.kill_server()
        net.run(0.3)
        net.start_server()
    net.run(4.0)
    assert net.told("client", NoticeKind.PATH_SLOW) == []
    assert [path.withheld for path in net.client.paths.values()] == [0, 0]


@pytest.mark.parametrize(
    ("side", "cut", "pause"), [("down", 0.39, 0.12), ("down", 0.5, 0.15), ("down", 0.2, 0.06), ("up", 0.3, 0.06)]
)
def test_a_path_that_dies_again_and_again_in_one_direction_takes_over_a_second_later(
    side: str, cut: float, pause: float
) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06), seed=5)
    net.run(3.0)
    traffic = Traffic(net, 1000.0, 172)
    traffic.start(6.0)
    at = 1.0
    for _ in range(5):
        net.after(at, lambda: setattr(net.wires[1], f"cuts_{side}", True))
        net.after(at + cut, lambda: setattr(net.wires[1], f"cuts_{side}", False))
        at += cut + pause
    net.after(at + 1.0 - pause, lambda: setattr(net.wires[0], "is_cut", True))
    net.run(10.0)
    assert traffic.is_whole()


def test_where_all_paths_lose_most_none_is_held() -> None:
    net = Simnet(*(Wire(delay=delay, loss_up=0.6, loss_down=0.6) for delay in (0.02, 0.06)))
    net.run(5.0)
    offered(net, 4.0, 10.0)
    net.run(13.0)
    held = [path.withheld for path in net.client.paths.values()]
    assert min(held) == 0


def test_a_path_that_was_cut_gets_everything_again_at_once() -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06))
    net.run(2.0)
    traffic = offered(net, 8.0, 30.0)
    chance = random.Random(5)
    for _ in range(20):
        net.run(0.5 + chance.random() / 2)
        net.wires[1].is_cut = True
        net.run(chance.random())
        net.wires[1].is_cut = False
    net.run(20.0)
    assert traffic.is_whole()
    assert net.client.paths[1].withheld == 0
    assert guest(net).paths[1].withheld == 0


def test_slow_is_a_state_that_is_told_and_ends_when_the_load_does() -> None:
    net = Simnet(Wire(delay=0.02, rate=FAST), Wire(delay=0.06, rate=SLOW, buffer=SLOW))
    net.run(2.0)
    offered(net, 8.0, 6.0)
    net.run(5.0)
    path = net.client.paths[1]
    assert path.status()["state"] == "slow"
    assert path.status()["held_kbit"] == pytest.approx(2000, rel=0.5)
    not_given = net.client.paths[0].tx_bytes - path.tx_bytes
    assert path.status()["withheld_bytes"] == pytest.approx(not_given, rel=0.01)
    net.run(10.0)
    assert path.status()["state"] == "up"
    assert path.status()["held_kbit"] is None
    told = [notice.kind for _, side, notice in net.notices if side == "client" and notice.path == path.name]
    assert told[-2:] == [NoticeKind.PATH_SLOW, NoticeKind.PATH_UP]


def test_a_path_that_is_slow_downwards_only_is_told_so_at_both_ends() -> None:
    net = Simnet(Wire(delay=0.02, rate=FAST), Wire(delay=0.06, rate=SLOW, buffer=SLOW))
    net.run(2.0)
    traffic = Traffic(net, 800.0, SIZE - 28, sides=("down",))
    traffic.start(8.0)
    net.run(6.0)
    path, served = net.client.paths[1], guest(net).paths[1]
    (status,) = net.server.status(net.now)["peers"]
    assert path.withheld == 0 < served.withheld
    assert path.status()["state"] == status["paths"][1]["state"] == "slow"
    assert net.client.paths[0].status()["state"] == "up"
    assert status["paths"][0]["state"] == "fresh"
    net.run(10.0)
    (status,) = net.server.status(net.now)["peers"]
    assert path.status()["state"] == "up"
    assert status["paths"][1]["state"] != "slow"
    for side, name in (("client", path.name), ("server", "1")):
        told = [notice.kind for _, at, notice in net.notices if at == side and notice.path == name]
        assert told[-2:] == [NoticeKind.PATH_SLOW, NoticeKind.PATH_UP], side
        other = [notice.kind for _, at, notice in net.notices if at == side and notice.path in {"w0", "0"}]
        assert NoticeKind.PATH_SLOW not in other, side


@pytest.mark.slow
def test_a_link_that_recovers_gets_everything_again() -> None:
    slow = Wire(delay=0.06, rate=SLOW, buffer=SLOW)
    net = Simnet(Wire(delay=0.02, rate=FAST), slow)
    net.run(2.0)
    traffic = offered(net, 8.0, 40.0)
    net.run(8.0)
    slow.rate = FAST
    net.run(25.0)
    before = net.client.paths[1].withheld, guest(net).paths[1].withheld
    net.run(8.0)
    assert (net.client.paths[1].withheld, guest(net).paths[1].withheld) == before
    assert traffic.is_whole(net.now - 8.0)


@pytest.mark.parametrize("mbit", [0.05, 8.0])
def test_a_path_that_has_become_longer_is_not_taken_for_a_bloated_one(mbit: float) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.02))
    net.run(2.0)
    traffic = offered(net, mbit, 20.0)
    net.run(2.0)
    net.wires[1].delay = 0.12
    net.run(4.0)
    before = net.client.paths[1].withheld, guest(net).paths[1].withheld
    net.run(17.0)
    assert (net.client.paths[1].withheld, guest(net).paths[1].withheld) == before
    assert traffic.is_whole()


@pytest.mark.parametrize("dead", [0.4, 2.0])
@pytest.mark.parametrize(("delays", "rate", "size"), [((0.0125, 0.045), 400.0, 1000), ((0.02, 0.06), 500.0, 200)])
def test_paths_that_have_become_longer_together_are_not_held_when_one_of_them_dies(
    delays: tuple[float, float], rate: float, size: int, dead: float
) -> None:
    net = Simnet(Wire(delay=0.001), Wire(delay=0.001))
    net.run(2.0)
    for wire, delay in zip(net.wires, delays, strict=True):
        wire.delay = delay
    traffic = Traffic(net, rate, size)
    traffic.start(9.0)
    for at, is_cut in ((4.0, True), (4.0 + dead, False), (5.0 + dead, True), (6.0 + dead, False)):
        net.after(at, partial(setattr, net.wires[0], "is_cut", is_cut))
    net.run(12.0)
    assert traffic.is_whole()
    for paths in (net.client.paths, net.guest.paths):
        assert [path.withheld for path in paths.values()] == [0, 0]


def test_an_idle_path_that_has_become_longer_gets_everything_from_the_first_packet_on() -> None:
    net = Simnet(Wire(), Wire())
    net.run(2.0)
    net.wires[1].delay = 0.12
    net.run(2.0)
    traffic = offered(net, 8.0, 5.0)
    net.run(8.0)
    assert traffic.is_whole()
    assert net.client.paths[1].withheld == guest(net).paths[1].withheld == 0


def test_the_only_path_is_never_held() -> None:
    net = Simnet(Wire(delay=0.06, rate=SLOW, buffer=SLOW))
    net.run(2.0)
    offered(net, 8.0, 5.0)
    net.run(6.0)
    assert net.client.paths[0].withheld == guest(net).paths[0].withheld == 0


# -- the parts -----------------------------------------------------------------------------------------------


def test_jitter_is_no_queue_and_a_queue_is_what_the_least_sample_says() -> None:
    delay = Delay()
    for number in range(30):
        delay.count(5.0 + (number % 3) * 0.05, number * 0.02)
    assert delay.queue(0.6) == pytest.approx(0.0)
    for number in range(30, 60):
        delay.count(5.1 + (number % 3) * 0.05, number * 0.02)
    assert delay.queue(1.2) == pytest.approx(0.1)
    assert delay.newest() == pytest.approx(0.2)


def test_a_route_that_has_become_longer_is_no_queue_for_ever() -> None:
    delay = Delay()
    for number in range(1000):
        delay.count(5.0 if number < 100 else 5.5, number * 0.1)
    assert delay.queue(100.0) == pytest.approx(0.0)


def test_two_samples_are_not_enough_to_say_that_something_stands() -> None:
    delay = Delay()
    delay.count(5.0, 0.0)
    delay.count(6.0, 10.0)
    delay.count(6.0, 10.02)
    assert delay.queue(10.02) == 0.0


def held(queue: float = 0.4, rate: float = 100_000.0) -> Cap:
    """Return a cap that was told of a queue while so many bytes a second arrived."""
    cap = Cap()
    for number in range(20):
        given = number * 10
        cap.feedback(number * 0.05, given, int(given * rate / 200), given, queue, number * 0.05, is_worst=False)
    return cap


def test_counts_that_wrap_go_on() -> None:
    cap, wrap = Cap(), 1 << 32
    for number in range(40):
        given = wrap - 100 + number * 10
        cap.feedback(number * 0.05, given, number * 5000, given % wrap, 0.4, number * 0.05, is_worst=False)
    assert cap.delivered_rate() == pytest.approx(100_000, rel=0.01)
    assert cap.rate is not None


def arrivals(cap: Cap, times: Sequence[float], queue: float, rate: float = 100_000.0) -> None:
    """Let other paths tell what had arrived at these times, so many bytes a second."""
    for at in times:
        cap.arrived(at, round(at * rate / 1000), round(at * rate), queue, at)


def test_what_other_paths_tell_holds_a_path_whose_own_feedback_is_old() -> None:
    cap = Cap()
    arrivals(cap, [1.0, 1.5], 0.2)
    assert cap.delivered_rate() == pytest.approx(100_000)
    assert 30_000 < (cap.rate or 0.0) < 50_000
    arrivals(cap, [2.0], 0.2)
    for number in range(10):  # what had come half a second ago: half of what was given
        at = 1.0 + number * 0.06
        cap.feedback(at, number * 6, number * 6000, number * 3, 0.2, 2.0 + number * 0.01, is_worst=False)
    assert cap.delivered_rate() == pytest.approx(50_000, rel=0.1)
    arrivals(cap, [2.2], 0.2)
    assert 15_000 < (cap.rate or 0.0) < 25_000


def test_what_other_paths_tell_is_nothing_beside_feedback_as_new_and_after_an_outage() -> None:
    cap = held(0.0)
    arrivals(cap, [0.1, 0.5, 0.99], 0.2, 1.0)
    assert cap.rate is None
    assert cap.delivered_rate() == pytest.approx(100_000, rel=0.1)
    arrivals(cap, [20.0, 20.1], 0.2)
    assert cap.rate is None, "two within 0.1 s say nothing of a rate"
    arrivals(cap, [19.5, 20.05], 0.2)
    assert cap.delivered_rate() == pytest.approx(100_000, rel=0.1), "what comes late is no news"
    arrivals(cap, [20.3], 0.2, 50_000.0)
    assert cap.rate is None, "nor is what counts less than before"


@pytest.mark.parametrize(("longer", "jitter"), [(0.1, 0.05), (0.3, 0.0), (0.5, 0.05)])
def test_a_longer_route_is_a_new_floor_after_some_seconds(longer: float, jitter: float) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06, jitter=jitter), seed=3)
    net.run(2.0)
    offered(net, 0.8, 30.0)
    net.run(5.0)
    net.wires[1].delay += longer
    net.run(15.0)
    before = net.client.paths[1].withheld, guest(net).paths[1].withheld
    net.run(8.0)
    assert (net.client.paths[1].withheld, guest(net).paths[1].withheld) == before


def test_the_longer_the_queue_the_less_a_path_is_given() -> None:
    rates = [held(queue).rate or 0.0 for queue in (0.06, 0.1, 0.2, 0.3, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 80_000
    assert rates[-1] == pytest.approx(10_000)
    assert held(1.0, 20_000.0).rate == LEAST_RATE


def test_a_bucket_gives_the_rate_and_never_much_at_once() -> None:
    cap = held(0.2)
    assert cap.rate is not None
    given, now = 0, 1.0
    for _ in range(1000):
        now += 0.01
        room = cap.room(64_000, now)
        assert room is not None
        assert room <= max(FULL, 0.02 * cap.rate)
        cap.spend(max(0, room))
        given += max(0, room)
    assert given == pytest.approx(10 * cap.rate, rel=0.02)


def test_a_path_that_is_not_at_its_limit_is_held_no_more() -> None:
    cap = held(0.2)
    for number in range(20, 80):
        cap.feedback(number * 0.05, number * 10, number * 100, number * 10, 0.0, number * 0.05, is_worst=False)
    assert FREE_AFTER < 60 * 0.05
    assert cap.rate is None
    assert cap.room(1 << 20, 5.0) is None


def test_feedback_that_comes_late_or_after_an_outage_says_nothing_of_a_rate() -> None:
    cap = Cap()
    for number in range(20):
        cap.feedback(number * 0.05, number * 10, number * 1000, number * 10, 0.0, number * 0.05, is_worst=True)
    before = cap.delivered_rate()
    cap.feedback(0.5, 100, 10_000, 100, 0.5, 1.0, is_worst=True)
    assert cap.delivered_rate() == before
    cap.feedback(9.0, 9_000, 900_000, 200, 0.0, 9.0, is_worst=True)
    assert cap.delivered_rate() is None
    assert cap.rate is None


def test_a_burst_in_the_send_queue_is_no_standing_queue() -> None:
    queue = SendQueue()
    queue.seen(200_000, 0.0, 1.0)
    queue.seen(100_000, 0.0, 1.015)
    queue.seen(4_000, 0.0, 1.03)
    assert not queue.is_limited(1.03)
    for number in range(5):
        queue.seen(100_000, 0.0, 2.0 + number * 0.01)
    assert queue.is_limited(2.05)
    assert not queue.is_limited(2.05 + FREE_AFTER)
    assert queue.limit(1e6) == 50_000
    assert queue.limit(100.0) == 2 * FULL


class Carrier:
    """A path that is limited, with this delay."""

    def __init__(self, delay: float, *, limited: bool) -> None:
        self.room: int | None = 7
        self._delay, self._limited = delay, limited

    def is_limited(self, now: float) -> bool:
        return now >= 0 and self._limited

    def delay(self, now: float) -> float:
        return now * 0 + self._delay

    def allot(self, count: int, size: int, now: float) -> None:
        self.room = (count * size // 2 if now >= 0 else 0) if self._limited else None


def test_the_path_with_the_least_delay_takes_anything_and_without_limits_all_do() -> None:
    near, far, free = Carrier(0.02, limited=True), Carrier(0.06, limited=True), Carrier(0.9, limited=False)
    allot([far, near, free], 2, 500, 1.0)
    assert (near.room, far.room, free.room) == (None, 500, None)
    carriers = [Carrier(1.0, limited=False), Carrier(2.0, limited=False)]
    allot(carriers, 1, 1000, 1.0)
    assert [carrier.room for carrier in carriers] == [None, None]


@pytest.mark.parametrize("phase", [0.0, 0.05, 0.125, 0.175])
def test_late_echoes_before_an_outage_are_no_queue_however_often_the_client_tells_of_the_last(phase: float) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06))
    net.run(2.0)
    traffic = Traffic(net, 1000.0, 200)
    traffic.start(4.5)
    net.run(3.0 + phase)
    path, wire = net.guest.paths[1], net.wires[1]
    wire.delay += 0.06
    net.run(0.24)
    wire.delay -= 0.06
    for is_cut, seconds in ((True, 0.3), (False, 0.2), (True, 0.3), (False, 1.0)):
        wire.is_cut = is_cut
        for _ in range(round(seconds / 0.02)):
            net.run(0.02)
            assert path.cap.rate is None
    net.run(1.0)
    assert traffic.is_whole()
