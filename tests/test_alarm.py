"""The gap alarm and what is told outside of paths and clients: by simulated time, to the millisecond."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from mptunnel.alarm import Alarm
from mptunnel.config import ClientSettings, parse_wireguard
from mptunnel.errors import ConfigError
from mptunnel.events import Notice, NoticeKind
from mptunnel.messages import Control, Probe, decode_probe_untrusted
from mptunnel.path import PathState
from tests.simnet import CLIENT_PUBLIC, TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4

GAP, OVER = NoticeKind.GAP, NoticeKind.GAP_OVER
CLIENT = str(TUNNEL4[2])


def watched(alarm_ms: int | None, *wires: Wire, seconds: float = 3.0, **more: Any) -> Simnet:
    """Return a network whose client has a gap alarm, after some seconds."""
    wires = wires or (Wire(), Wire(delay=0.06))
    settings = ClientSettings(
        server="sim.example", interfaces=tuple(f"w{n}" for n in range(len(wires))), alarm_ms=alarm_ms
    )
    net = Simnet(*wires, settings=settings, **more)
    net.run(seconds)
    return net


def cut(net: Simnet, *sides: str) -> None:
    for wire in net.wires:
        wire.cuts_up, wire.cuts_down = "up" in sides, "down" in sides


def probes(net: Simnet, number: int, since: float) -> list[tuple[float, Probe]]:
    sent = ((at, net.plaintext("up", datagram)) for at, datagram in net.sent(4, "up", number, since))
    return [(at, decode_probe_untrusted(memoryview(p))) for at, p in sent if p and p[0] == Control.PROBE]


def arrivals(net: Simnet) -> list[float]:
    """Note from now on when something new and authentic comes in at the client."""
    times: list[float] = []
    receive = net.client.receive

    def noting(datagrams: bytes, size: int, source: Any, now: float, inbox: list[bytes]) -> bool:
        before = net.peer.heard_at
        net.peer.heard_at = -1.0
        is_all = receive(datagrams, size, source, now, inbox)
        net.peer.next_deadline()  # now it is in the books
        if net.peer.heard_at == now:
            times.append(now)
        else:
            net.peer.heard_at = before
        return is_all

    net.client.receive = noting  # type: ignore[method-assign]
    return times


# -- the alarm by itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "interval"), [(0.01, 0.005), (0.015, 0.005), (0.1, 0.1 / 3), (60.0, 0.25)])
def test_probes_go_out_three_times_in_it_at_least_5_ms_apart_and_never_slower_than_usual(
    after: float, interval: float
) -> None:
    assert Alarm(after, 0.25).interval == pytest.approx(interval)


def test_it_is_armed_by_the_first_answer_raised_once_and_over_with_its_length() -> None:
    alarm = Alarm(0.1, 0.25)
    assert not alarm.raised(0.0, 50.0)
    assert alarm.answered(50.0) is None
    assert alarm.due_at(50.0) == pytest.approx(50.1)
    assert not alarm.raised(50.0, 50.0999)
    assert alarm.raised(50.0, 50.1)
    assert not alarm.raised(50.0, 51.0)
    assert alarm.due_at(50.0) == float("inf")
    assert alarm.answered(52.0) == 2.0
    assert alarm.answered(52.1) is None
    assert alarm.raised(52.1, 52.3)


# -- in the tunnel -------------------------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("alarm_ms", [15, 100, 1000])
@pytest.mark.parametrize("sides", [("up",), ("down",), ("up", "down")])
@pytest.mark.parametrize("is_in_use", [True, False])
def test_it_comes_within_its_time_and_10_ms_whichever_direction_has_died_and_whether_or_not_data_flows(
    alarm_ms: int, sides: tuple[str, ...], is_in_use: bool
) -> None:
    net = watched(alarm_ms, seconds=12.0)
    if is_in_use:
        Traffic(net, rate=100).start(20.0)
    net.run(5.0)
    times = arrivals(net)
    net.run(1.0)
    assert not net.told("client", GAP)
    cut(net, *sides)
    net.run(3.0)
    if sides == ("up",) and is_in_use:
        assert not net.told("client", GAP), "what the application sends down still comes"
        return
    ((at, gap),) = net.told("client", GAP)
    last = max(time for time in times if time <= at)
    assert at - last == pytest.approx(alarm_ms / 1e3, abs=1e-6)
    assert gap["silent_ms"] == pytest.approx(alarm_ms, abs=1.0)
    assert gap["peer"] == "sim.example"
    assert gap["time"] == pytest.approx(at + net.wall_offset, abs=1e-3)
    cut(net)
    mended_at = net.now
    net.run(5.0)
    ((back_at, over),) = net.told("client", OVER)
    assert over["lasted_ms"] == pytest.approx((back_at - last) * 1e3, abs=0.1)
    assert back_at - mended_at < 0.25 + 0.04 + alarm_ms / 3e3, "the next probe, by the faster path"
    assert len(net.told("client", GAP)) == 1


@pytest.mark.parametrize(("alarm_ms", "seconds"), [(15, 30.0), (100, 240.0)])
def test_sound_paths_never_raise_it_in_use_or_not(alarm_ms: int, seconds: float) -> None:
    net = watched(alarm_ms, Wire(jitter=0.004), Wire(delay=0.3, jitter=0.004), seconds=2.0)
    Traffic(net, rate=20).start(10.0)
    net.run(seconds)  # rekeys too
    assert not net.told("client", GAP, OVER)
    assert (net.peer._serial > 1) == (seconds > 120.0)


@pytest.mark.interpreted
@pytest.mark.parametrize(("alarm_ms", "seconds"), [(15, 20.0), pytest.param(100, 600.0, marks=pytest.mark.slow)])
def test_under_loss_it_is_raised_for_every_silence_that_long_and_for_no_other(alarm_ms: int, seconds: float) -> None:
    net = watched(alarm_ms, Wire(loss_up=0.2, loss_down=0.2), Wire(delay=0.06, loss_up=0.2, loss_down=0.2))
    times = arrivals(net)
    net.log.clear()
    begun = net.now
    net.run(seconds)
    silences = [early for early, late in pairwise(times) if late - early > alarm_ms / 1e3]
    raised = [at - alarm_ms / 1e3 for at, _ in net.told("client", GAP, since=begun + alarm_ms / 1e3)]
    assert len(silences) > 5
    assert raised == pytest.approx([early for early in silences if early > begun], abs=0.001)
    assert len(net.told("client", OVER)) == len(net.told("client", GAP))
    assert not net.told("client", NoticeKind.TUNNEL_SILENT, NoticeKind.PATH_DOWN)


def test_no_alarm_is_raised_where_none_is_asked_for() -> None:
    net = watched(None)
    cut(net, "up", "down")
    net.run(60.0)
    assert not net.told("client", GAP)
    assert net.told("client", NoticeKind.TUNNEL_SILENT)


def test_a_long_round_trip_is_no_gap_at_the_beginning_nor_after_a_restart_of_the_server() -> None:
    net = watched(100, Wire(delay=0.4), seconds=10.0)
    assert not net.told("client", GAP)
    net.restart_server()
    net.run(20.0)
    assert len(net.told("client", GAP)) == len(net.told("client", OVER)) == 1


def test_a_server_that_has_stopped_and_interfaces_that_have_gone_are_gaps_too() -> None:
    net = watched(100)
    net.stop("server")
    net.run(2.0)
    assert len(net.told("client", GAP)) == 1
    net.start_server()
    net.run(3.0)
    assert len(net.told("client", OVER)) == 1
    for number in range(2):
        net.set_link(number, up=False)
    net.run(2.0)
    assert len(net.told("client", GAP)) == 2
    net.set_link(1, up=True)
    net.run(3.0)
    assert len(net.told("client", OVER)) == 2


def test_unasked_echoes_do_not_end_a_gap() -> None:
    net = watched(100, Wire())
    Traffic(net, rate=50).run(1.0)
    cut(net, "up")
    net.run(8.0)
    assert len(net.controls("down", Control.ECHO, since=net.now - 3.0)) > 5
    assert len(net.told("client", GAP)) == 1
    assert not net.told("client", OVER)


def test_a_path_of_which_only_the_way_down_lives_stays_fresh_also_while_no_data_flows() -> None:
    net = watched(100, seconds=15.0)
    net.wires[1].cuts_up = True
    net.run(10.0)
    assert net.guest.paths[1].state is PathState.FRESH
    assert not net.told("client", GAP)


# -- what it costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alarm_ms", "interval_ms"), [(15, 5), (100, 33), (3000, 250)])
def test_each_path_is_probed_three_times_in_it_in_use_or_not_and_each_probe_says_so(
    alarm_ms: int, interval_ms: int
) -> None:
    net = watched(alarm_ms, seconds=12.0)
    net.log.clear()
    begun = net.now
    net.run(10.0)
    for number in range(2):
        sent = probes(net, number, begun)
        assert {probe.interval_ms for _, probe in sent} == {interval_ms}
        assert len(sent) == pytest.approx(10_000 / interval_ms, rel=0.02)
        echoes = net.controls("down", Control.ECHO, number, begun)
        assert len(echoes) == pytest.approx(len(sent), abs=20), "the server answers each"


def test_the_fastest_alarm_costs_less_than_26_kilobytes_a_second_up_and_29_down_on_each_path() -> None:
    net = watched(15, seconds=12.0)
    net.log.clear()
    net.run(10.0)
    for number in range(2):
        for side, most in (("up", 26_000), ("down", 29_000)):
            size = sum(len(datagram) + 28 for _, way, wire, datagram in net.log if (way, wire) == (side, number))
            assert 0.9 * most < size / 10 < most


def test_fast_probes_on_a_long_path_do_not_make_its_size_fall_nor_leave_it_down() -> None:
    net = watched(15, Wire(delay=0.9), Wire(delay=0.5, loss_up=0.2, loss_down=0.2), seconds=70.0)
    assert {path.carries for path in net.peer.paths.values()} == {1420}
    assert net.peer.tunnel_mtu == 1420
    assert {path.state for path in net.peer.paths.values()} == {PathState.UP}
    assert not net.told("client", NoticeKind.PATH_DOWN, since=1005.0)
    lossy = net.peer.paths[1]
    assert lossy.loss_down.recent() == pytest.approx(0.2, abs=0.05)
    assert net.guest.paths[1].loss_down.recent() == pytest.approx(0.2, abs=0.05)
    assert len(lossy.loss_up._recent) < 130


@pytest.mark.parametrize("alarm_ms", [9, 60_001])
def test_an_alarm_that_cannot_be_is_refused(alarm_ms: int) -> None:
    with pytest.raises(ConfigError, match="not from 10 to 60000 ms"):
        ClientSettings(server="x", alarm_ms=alarm_ms)


def test_a_stock_server_answers_no_probe_so_there_is_no_alarm_with_one() -> None:
    key = "YAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
    text = f"[Interface]\nPrivateKey={key}\nAddress=10.0.0.2/32\n[Peer]\nPublicKey={key}\nAllowedIPs=0.0.0.0/0\n"
    with pytest.raises(ConfigError, match="stock WireGuard"):
        ClientSettings(server="x", wireguard=parse_wireguard(text), alarm_ms=100)


# -- notices of paths and clients ----------------------------------------------------------------------------


def kinds(net: Simnet, side: str, since: float = 0.0) -> Counter[tuple[object, object]]:
    return Counter((told["event"], told.get("path", "")) for _, told in net.told(side, since=since))


def test_the_client_tells_of_the_tunnel_and_of_each_path() -> None:
    net = watched(None)
    assert kinds(net, "client") == {("path-up", "w0"): 1, ("path-up", "w1"): 1, ("tunnel-up", ""): 1}
    up = next(told for _, told in net.told("client", NoticeKind.PATH_UP) if told["path"] == "w1")
    assert up["interface"] == "w1"
    assert up["rtt_ms"] == pytest.approx(120, abs=1)
    Traffic(net).start(30.0)
    begun = net.now
    net.set_link(0, up=False)
    net.run(2.0)
    assert kinds(net, "client", begun) == {("path-waiting", "w0"): 1}
    net.wires[1].is_cut = True
    net.run(3.0)
    begun = net.now
    net.set_link(0, up=True)
    net.wires[1].is_cut = False
    net.run(3.0)
    assert kinds(net, "client") == {
        ("path-up", "w0"): 2, ("path-up", "w1"): 2, ("tunnel-up", ""): 2, ("path-waiting", "w0"): 1,
        ("path-down", "w1"): 1, ("tunnel-silent", ""): 1,
    }  # fmt: skip


def test_a_tunnel_to_a_server_that_was_not_known_is_not_told_silent_before_its_first_probe_is_answered() -> None:
    net = watched(100, Wire(delay=0.2, jitter=0.1), Wire(delay=0.3), said_hello=False)
    assert [told["event"] for _, told in net.told("client")].count("tunnel-up") == 1
    assert not net.told("client", NoticeKind.TUNNEL_SILENT)


def test_the_server_tells_of_each_client_and_its_paths() -> None:
    net = watched(None)
    assert kinds(net, "server") == {("client-up", ""): 1, ("path-up", "0"): 1, ("path-up", "1"): 1}
    assert {told["peer"] for _, told in net.told("server")} == {"sim"}
    assert net.told("server", NoticeKind.PATH_UP)[0][1]["endpoint"] == "192.0.2.1:40000"
    Traffic(net).start(60.0)
    net.run(1.0)
    begun = net.now
    net.wires[0].is_cut = True
    net.run(5.0)
    assert kinds(net, "server", begun) == {("path-down", "0"): 1}
    net.wires[1].is_cut = True
    net.run(5.0)
    assert kinds(net, "server", begun) == {("path-down", "0"): 1, ("path-down", "1"): 1, ("client-gone", ""): 1}
    begun = net.now
    net.wires[1].is_cut = False
    net.run(5.0)
    assert kinds(net, "server", begun) == {("client-up", ""): 1, ("path-up", "1"): 1}
    begun = net.now
    net.stop("client")
    net.is_client_awake = False
    net.run(1.0)
    assert kinds(net, "server", begun) == {("client-gone", ""): 1}


def test_a_path_that_moves_is_told_with_its_new_address() -> None:
    net = watched(None)
    begun = net.now
    net.renumber(0)
    net.run(2.0)
    moved = [told["endpoint"] for _, told in net.told("server", NoticeKind.PATH_UP, since=begun)]
    assert moved == [str(net.source(0))]
    assert not net.told("server", NoticeKind.CLIENT_GONE)


def test_a_client_that_is_removed_is_told_gone_once() -> None:
    net = watched(None)
    begun = net.now
    net.server._remove_client("sim", net.now)
    net.run(60.0)
    assert CLIENT_PUBLIC not in net.server._peers
    assert kinds(net, "server", begun) == {("client-gone", ""): 1}


def test_an_idle_client_is_neither_gone_nor_are_its_paths_down() -> None:
    net = watched(None)
    net.run(1800.0)
    assert kinds(net, "server") == {("client-up", ""): 1, ("path-up", "0"): 1, ("path-up", "1"): 1}


def test_data_that_is_sent_at_the_moment_a_path_lapses_does_not_keep_that_from_being_told() -> None:
    net = watched(None)
    Traffic(net).start(3.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    path = net.guest.paths[0]
    while path.state is not PathState.LAPSED:
        net.run(0.001)
        net.server_sends(ipv4(TARGET, CLIENT, b"x"))  # looks at the paths' states, too
    net.run(0.1)
    assert [told["path"] for _, told in net.told("server", NoticeKind.PATH_DOWN)] == ["0"]


def test_a_notice_as_it_is_told_has_no_empty_places() -> None:
    notice = Notice(NoticeKind.GAP, 12.34567, "vpn", values={"silent_ms": 100.0})
    assert notice.document() == {"event": "gap", "time": 12.346, "peer": "vpn", "silent_ms": 100.0}
    notice = Notice(NoticeKind.PATH_DOWN, 1.0, "vpn", "wlan0", "wlan0", {"why": "x"})
    assert notice.document() == {
        "event": "path-down", "time": 1.0, "peer": "vpn", "path": "wlan0", "interface": "wlan0", "why": "x",
    }  # fmt: skip
