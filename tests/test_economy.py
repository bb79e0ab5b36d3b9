"""What an idle path costs on an IPv4 wire, everything that passes it in both directions; and what that leaves alone."""

from __future__ import annotations

import logging

import pytest

from mptunnel.config import ClientSettings
from mptunnel.messages import INITIATION, TRANSPORT, Control
from mptunnel.path import PROBE_INTERVAL, PathState
from mptunnel.serverpeer import IN_USE
from mptunnel.session import REJECT_AFTER_TIME
from tests.running import note
from tests.simnet import TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4

DAY = 86400.0
MONTH = 30  # days
OUTER = 28  # bytes of IPv4 and UDP header
UP = ipv4(str(TUNNEL4[2]), TARGET, b"up")
DOWN = ipv4(TARGET, str(TUNNEL4[2]), b"down")


def idle(paths: int, interval: float) -> Simnet:
    """A tunnel that has come up, has proved its sizes, and is used no more."""
    settings = ClientSettings(
        server="sim.example", interfaces=tuple(f"w{n}" for n in range(paths)), idle_probe=interval
    )
    net = Simnet(*(Wire() for _ in range(paths)), settings=settings)
    net.run(60.0)
    net.log.clear()
    return net


def carried(net: Simnet) -> list[int]:
    """Bytes that passed each path."""
    return [
        sum(len(datagram) + OUTER for _, _, wire, datagram in net.log if wire == number)
        for number in range(len(net.wires))
    ]


@pytest.mark.parametrize(
    "paths", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("interval", "limit"), [(25.0, 35.0), (300.0, 6.0)])
def test_an_idle_path_costs_little_in_a_month(
    paths: int, interval: float, limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    net = idle(paths, interval)
    caplog.clear()
    net.run(DAY)
    megabytes = [MONTH * each / 1e6 for each in carried(net)]
    note(f"{paths} paths, probes every {interval:g} s: {max(megabytes):.2f} MB a month and path")
    assert max(megabytes) < limit
    assert not caplog.messages  # nothing has gone down or silent in all that time
    assert net.client._whole_state(net.now) == "up"
    assert [path.state for path in net.client.paths.values()] == [PathState.UP] * paths


def test_the_tail_after_the_last_packet_is_ten_seconds_of_probes() -> None:
    net = idle(2, 25.0)
    net.run(5.0)
    net.log.clear()
    net.client_sends(UP)
    net.run(IN_USE + 5.0)
    probes = IN_USE / PROBE_INTERVAL
    note(f"a packet alone costs {max(carried(net))} bytes on each of two paths")
    assert max(carried(net)) < (probes + 3) * (124 + 140) + 3 * 1480  # and the path's size is shown once


@pytest.mark.parametrize("interval", [25.0, 300.0])
def test_a_path_that_dies_in_idleness_is_down_three_seconds_after_its_next_probe(interval: float) -> None:
    net = idle(2, interval)
    net.run(3 * interval)
    path = net.client.paths[1]
    net.run(path.probe_at + 1.0 - net.now)
    net.wires[1].is_cut = True
    net.run(interval - 1.5)
    assert path.is_up
    net.run(4.0 if interval < REJECT_AFTER_TIME else 6.0)  # new keys come first, and may have been asked for there
    assert path.state is PathState.DOWN
    assert net.client.paths[0].state is PathState.UP
    net.log.clear()
    net.run(4 * interval)
    assert 2 <= len(net.controls("up", Control.PROBE, 1)) <= 5, "and is asked as rarely as before, but for a trial"
    net.wires[1].is_cut = False
    net.run(2 * interval)
    assert path.is_up


@pytest.mark.parametrize("number", range(3))
def test_what_the_server_says_first_does_not_wait_though_an_idle_probe_was_lost(number: int) -> None:
    net = Simnet(Wire(delay=0.05))
    net.run(20.0)
    wire = net.wires[0]
    for _ in range(number):
        net.run(25.0)
    net.run(net.client.paths[0].probe_at - 0.01 - net.now)
    wire.is_cut = True
    net.run(0.5)
    wire.is_cut = False
    net.run(6.5)
    traffic = Traffic(net, 1.0, sides=("down",))
    traffic.start(0.5)
    net.run(2.0)
    assert traffic.arrived("down")
    assert traffic.is_whole()


def test_keys_are_renewed_in_idleness_by_one_path_each_in_its_turn() -> None:
    net = idle(2, 25.0)
    net.run(2000.0)
    by_path = [len(net.sent(INITIATION, "up", number)) for number in (0, 1)]
    assert sum(by_path) == 2000 // 150
    assert abs(by_path[0] - by_path[1]) <= 1


def test_a_renewal_that_is_not_answered_on_one_path_comes_by_the_others_a_second_later() -> None:
    net = idle(2, 25.0)
    for wire in net.wires:
        wire.loss_up = wire.loss_down = 0.0
    net.run(100.0)
    lost: list[tuple[float, int]] = []

    def tap(side: str, number: int, datagram: bytes) -> bytes | None:
        if side == "up" and datagram[0] == INITIATION and not lost:
            lost.append((net.now, number))
            return None
        return datagram

    net.tap = tap
    net.run(100.0)
    ((at, number),) = lost
    again = net.sent(INITIATION, "up", 1 - number, at)
    assert [round(when - at, 1) for when, _ in again] == [1.0]
    assert net.peer.current is not None
    assert net.peer.current.created_at < at + 1.2


def test_hello_is_said_before_the_first_packet_of_a_session_that_began_in_idleness() -> None:
    for net_sends in (Simnet.client_sends, Simnet.server_sends):
        net = idle(2, 25.0)
        net.run(200.0)
        assert not net.controls("up", Control.HELLO)
        begun = net.now
        net_sends(net, UP if net_sends is Simnet.client_sends else DOWN)
        net.run(1.0)
        hellos = net.controls("up", Control.HELLO, since=begun)
        assert len(hellos) == 2  # one on each path, answered at once
        if net_sends is Simnet.client_sends:
            first = net.sent(TRANSPORT, "up", 0, begun)[0][1]
            plain = net.plaintext("up", first)
            assert plain is not None
            assert plain[0] == Control.HELLO


def test_a_hello_that_is_lost_at_the_end_of_idleness_makes_nobody_a_stock_client() -> None:
    net = idle(1, 25.0)
    net.run(1000.0)
    net.tap = lambda side, _, datagram: None if side == "up" and is_hello(net, datagram) else datagram
    traffic = Traffic(net)
    traffic.run(1.2, rest=0.2)
    net.tap = None
    traffic.run(3.0)
    assert traffic.is_whole()
    assert net.guest.is_multipath
    assert len(net.guest.paths) == 1


def is_hello(net: Simnet, datagram: bytes) -> bool:
    plain = net.plaintext("up", datagram) if datagram[0] == TRANSPORT else None
    return plain is not None and plain[:1] == bytes([Control.HELLO])


def test_a_server_that_was_restarted_in_idleness_is_told_hello_after_its_silence() -> None:
    net = idle(2, 25.0)
    net.run(300.0)
    net.restart_server()
    net.run(60.0)
    assert net.guest.is_multipath
    assert [path.state for path in net.client.paths.values()] == [PathState.UP] * 2
    traffic = Traffic(net)
    traffic.run(1.0)
    assert traffic.is_whole()


@pytest.mark.parametrize("interval", [300.0, 3600.0])
def test_what_the_server_says_first_waits_for_the_next_probe_where_those_are_rare(interval: float) -> None:
    net = idle(2, interval)
    net.run(3 * interval + 200.0 - 60.0)
    begun = net.now
    net.server_sends(DOWN)
    net.run(interval)
    ((at, packet),) = net.at_client
    assert packet == DOWN
    note(f"probes every {interval:g} s: the server's first packet came after {at - begun:.1f} s")
    assert at - begun < interval
    net.at_client.clear()
    net.client_sends(UP)
    net.run(1.0)
    assert [packet for _, packet in net.at_server] == [UP]


def test_a_client_that_says_something_first_waits_for_one_handshake_at_most(caplog: pytest.LogCaptureFixture) -> None:
    net = idle(2, 300.0)
    net.run(250.0)
    caplog.clear()
    begun = net.now
    net.client_sends(UP)
    net.run(5.0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    ((at, _),) = net.at_server
    assert at - begun <= 3 * net.wires[0].delay + 1e-6  # initiation, response, packet
