"""The simulated network itself: it does what it says, and the same seed gives the same life."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simnet import CLIENT_PUBLIC, TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4, snapshot, stranger

CLIENT = str(TUNNEL4[2])


def test_the_same_seed_gives_the_same_life_and_another_one_another() -> None:
    lives = []
    for seed in (1, 1, 2):
        net = Simnet(Wire(loss_up=0.1, jitter=0.05), Wire(duplicate=0.3), seed=seed)
        Traffic(net, rate=20).run(5.0)
        lives.append(net.log)
    assert lives[0] == lives[1]
    assert lives[0] != lives[2]


def test_time_jumps_from_one_thing_to_the_next() -> None:
    net = Simnet(Wire(delay=0.5))
    seen: list[float] = []
    net.after(7.0, lambda: seen.append(net.now))
    net.run(100.0)
    assert seen == [1007.0]
    assert net.now == 1100.0


@pytest.mark.interpreted
def test_a_wire_delays_loses_and_doubles_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Simnet(Wire(delay=0.25, loss_up=0.3, duplicate=0.5), seed=4)
    came: list[float] = []

    def noting(*arguments: Any) -> bool:
        if bytes(arguments[0]) == b"x":
            came.append(net.now)
        return True

    monkeypatch.setattr(net.server, "receive", noting)
    net.run(1.0)
    sent = net.wires[0].counts["up"]
    for _ in range(1000):
        net.put("up", 0, b"x")
    begun = net.now
    net.run(0.3)
    assert all(at - begun == pytest.approx(0.25) for at in came)
    assert 1000 * 0.7 * 1.5 * 0.9 < len(came) < 1000 * 0.7 * 1.5 * 1.1
    assert net.wires[0].counts["up"] - sent >= 1000


def test_what_is_sent_where_no_wire_leads_is_noted_and_gets_nowhere() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    initiation = next(datagram for _, _, _, datagram in net.log if datagram[0] == 1)
    net.deliver(initiation, stranger())
    net.turn()
    assert [datagram[0] for datagram in net.to_strangers(stranger())] == [2]
    net.flush_nat(0)
    net.server_sends(ipv4(TARGET, CLIENT, b"to the old port"))
    assert len(net.astray) == 2


def test_traffic_notices_what_came_twice_altered_or_never() -> None:
    for spoil, words in (("twice", "delivered twice"), ("altered", "altered")):
        net = Simnet(Wire())
        traffic = Traffic(net)
        traffic.run(1.0)
        assert traffic.is_whole()
        at, packet = net.at_server[-1]
        net.at_server.append((at, packet if spoil == "twice" else packet[:-1] + b"?"))
        with pytest.raises(AssertionError, match=words):
            traffic.arrived("up")
    net = Simnet(Wire())
    traffic = Traffic(net)
    traffic.run(1.0)
    net.at_client.pop(50)
    assert traffic.lost("down") == 1
    assert traffic.lost("up") == 0
    assert traffic.longest_gap("down") == pytest.approx(0.02)


@pytest.mark.interpreted
def test_a_snapshot_sees_every_change_and_only_changes() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    before = snapshot(net.server)
    assert snapshot(net.server) == before
    net.server.drops["something"] += 1
    assert snapshot(net.server) == before
    window = net.guest.current.window  # type: ignore[union-attr]
    window.mark(99_000)
    assert snapshot(net.server) != before
    before = snapshot(net.server)
    net.server._peers[CLIENT_PUBLIC].endpoint = stranger()
    assert snapshot(net.server) != before
