"""When nothing works for a while: all paths dead, a NAT that forgets, a server that dies, clocks that cannot be right.

On simulated wires, to the millisecond, from many moments of a tunnel's life; `test_restart` has it of real processes.
"""

from __future__ import annotations

import random

import pytest

from mptunnel.messages import INITIATION, RESPONSE
from mptunnel.session import REJECT_AFTER_TIME
from tests.running import note
from tests.simnet import CLIENT_PUBLIC, WALL, Simnet, Traffic, Wire
from tests.test_chaos import Stream, cut, mend

RATE = 50
EVERY = 1 / RATE  # s from one packet to the next
PROBE = 0.25  # s from one probe, or one repetition of a handshake, to the next
TEN_YEARS = 10 * 365.25 * 86400


def carrying(*wires: Wire, seed: int) -> tuple[Simnet, Stream]:
    """A tunnel that has carried packets for a while that is different with every seed."""
    net = Simnet(*wires, seed=seed)
    net.run(3.0)
    stream = Stream(net, RATE)
    net.run(random.Random(seed).uniform(1.0, 2.0))
    return net, stream


def first_sent_since(net: Simnet, stream: Stream, since: float) -> dict[str, float]:
    """How long after `since` the first packet came in that was sent after it; four seconds are looked at."""
    net.run(max(0.0, since + 4.0 - net.now))
    firsts = {}
    for way, came in (("up", net.at_server), ("down", net.at_client)):
        ats = [at for at, packet in came if stream.sent[int.from_bytes(packet[20:], "big")] >= since]
        firsts[way] = min(ats, default=float("inf")) - since
    return firsts


def gaps_from_now(net: Simnet, stream: Stream, seconds: float) -> dict[str, float]:
    """The longest silence each way in the seconds from now on."""
    stream.take()
    stream.gap = {"up": 0.0, "down": 0.0}
    net.run(seconds)
    stream.take()
    return {way: max(gap, net.now - stream.back_at[way]) for way, gap in stream.gap.items()}


# -- all paths dead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize(("dead", "seeds"), [(1.0, 6), (10.0, 4), (20.0, 2), (40.0, 2), (200.0, 2)])
def test_after_all_paths_were_dead_a_packet_is_through_within_a_probe_and_a_round_trip(
    dead: float, seeds: int, paths: int
) -> None:
    for seed in range(seeds):
        wires = [Wire(delay=0.020), Wire(delay=0.060)][:paths]
        net, stream = carrying(*wires, seed=seed)
        for number in range(paths):
            cut(net, number)
        net.run(dead)
        stream.take()
        for number in range(paths):
            mend(net, number)
        stream.stop_taking()
        trip = 2 * wires[0].delay
        within = PROBE + trip + EVERY
        if dead > REJECT_AFTER_TIME:
            within += 2 * trip  # a handshake, and where the client is has to be shown anew
        for way, first in first_sent_since(net, stream, net.now).items():
            assert first <= within, f"{way}, seed {seed}"


# -- what is lost at one end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.005, 0.020, 0.060, 0.250])
def test_a_nat_that_forgets_the_only_path_costs_a_probe_interval_and_two_round_trips_at_most(delay: float) -> None:
    for seed in range(8):
        net, stream = carrying(Wire(delay=delay), seed=seed)
        net.flush_nat(0)
        gaps = gaps_from_now(net, stream, 4.0)
        assert gaps["up"] <= EVERY + 1e-6, "the way up is not touched"
        assert gaps["down"] <= min(1.2, PROBE + 4 * delay + EVERY), f"seed {seed}"


def test_fifty_restarts_of_the_server_each_cost_less_than_three_seconds() -> None:
    net, stream = carrying(Wire(delay=0.020), Wire(delay=0.060), seed=7)
    rng, worst = random.Random(7), []
    for _ in range(50):
        net.run(rng.uniform(0.2, 9.0))
        net.kill_server()
        down = rng.uniform(0.0, 0.8)
        net.run(down)
        net.start_server()
        worst.append(max(gaps_from_now(net, stream, 4.0).values()))
        assert worst[-1] <= 3.0 + down
    stream.end()
    note(f"50 restarts of the server: longest silence {max(worst):.2f} s")
    assert stream.twice("up") == stream.twice("down") == 0


# -- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [TEN_YEARS, -TEN_YEARS, -WALL])
@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_wall_clock_that_jumps_on_one_side_is_not_noticed_and_keys_are_renewed(whose: str, ahead: float) -> None:
    net = Simnet(seed=5)
    net.run(3.0)

    def jump(by: float) -> None:
        if whose == "server":
            net.wall_offset += by
        net.client_ahead += by if whose == "client" else -by

    traffic = Traffic(net, rate=5)
    net.after(20.0, lambda: jump(ahead))
    net.after(200.0, lambda: jump(-ahead))
    traffic.run(390.0)
    assert traffic.is_whole()
    assert len({datagram for _, datagram in net.sent(INITIATION, "up")}) == 1 + 390 // 120
    assert net.peer.current is not None
    assert net.now - net.peer.current.created_at < 120.0 + 3.0


@pytest.mark.parametrize("boot_wall", [0.0, 100.0, 86400.0 * 365])
def test_a_client_without_a_clock_battery_is_let_in_because_its_disk_remembers(boot_wall: float) -> None:
    net = Simnet(seed=6)
    net.run(30.0)
    for _ in range(3):  # and again: what it writes now must not lead it back
        net.client_ahead = boot_wall - (net.now + net.wall_offset)
        net.restart_client()
        begun = net.now
        traffic = Traffic(net)
        traffic.run(3.0)
        assert traffic.is_whole(since=begun + 0.5)
        net.run(150.0)


def test_a_clock_in_the_past_and_a_lost_timestamp_file_last_until_the_clock_is_set() -> None:
    """The server has seen 2026 from this key and takes no older time: such a client can only wait, and does."""
    net = Simnet(seed=6)
    net.run(30.0)
    session = net.guest.current
    del net.saved["client/timestamp"]
    net.client_ahead = -(net.now + net.wall_offset)
    net.restart_client()
    net.run(60.0)
    assert net.server.drops["initiation replayed"] > 0
    assert net.sent(RESPONSE, "down", since=1004.0) == []
    assert net.guest.current is session, "nothing has changed for the server"
    net.client_ahead = 0.0  # NTP, by an uplink or by hand
    net.run(1.0)
    begun = net.now
    traffic = Traffic(net)
    traffic.run(10.0)
    assert traffic.is_whole(since=begun + 6.0)  # a fresh initiation every 5 s, and jitter


def test_a_restart_of_the_server_lets_in_whoever_lost_its_timestamp_file() -> None:
    net = Simnet(seed=6)
    net.run(30.0)
    del net.saved["client/timestamp"]
    net.client_ahead = -(net.now + net.wall_offset)
    net.restart_client()
    net.run(20.0)
    net.restart_server()
    begun = net.now
    traffic = Traffic(net)
    traffic.run(10.0)
    assert traffic.is_whole(since=begun + 6.0)


def test_a_server_that_slept_for_ten_minutes_uses_no_old_key_and_is_back_within_a_second() -> None:
    net = Simnet(seed=8)
    net.run(3.0)
    Traffic(net, rate=20).run(2.0)
    net.is_server_alive = False  # its clock goes on, and what comes meanwhile is lost
    traffic = Traffic(net, rate=20)
    traffic.start(610.0)
    net.run(600.0)
    net.is_server_alive = True
    woke, old = net.now, net.guest.current
    net.run(13.0)
    for way in ("up", "down"):
        assert traffic.back_at(way, woke) - woke <= 1.0 + 0.04
        assert traffic.lost(way, since=woke + 1.04) == 0
    assert old is not None
    assert net.server._peers[CLIENT_PUBLIC].current is not old
