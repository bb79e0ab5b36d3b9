"""Paths at run time: added, taken off, named; standing by, metered; and what that means on the wires."""

from __future__ import annotations

from typing import Any

import pytest

from mptunnel.config import ClientSettings, Fields
from mptunnel.errors import ConfigError
from mptunnel.messages import TRANSPORT, Control, Use
from mptunnel.path import DOUBT_AFTER, PathState
from mptunnel.pathbook import BELIEF, PathBook
from tests.simnet import TARGET, TUNNEL4, Simnet, Traffic, Wire, ipv4

OUTER = 28  # bytes of IPv4 and UDP header
UP = ipv4(str(TUNNEL4[2]), TARGET, b"up")


def ask(net: Simnet, verb: str, **arguments: object) -> Any:
    reply = net.client.control(verb, Fields(arguments, verb), net.now)
    net._drain()
    return reply.result


def running(*wires: Wire, **more: Any) -> Simnet:
    net = Simnet(*(wires or (Wire(), Wire())), **more)
    net.run(1.0)
    return net


def data(net: Simnet, side: str, number: int, since: float) -> int:
    """How many datagrams with IP packets entered a wire."""
    sent = (net.plaintext(side, datagram) for _, datagram in net.sent(TRANSPORT, side, number, since))
    return sum(1 for plain in sent if plain and plain[0] >= 0x10)


def told_use(net: Simnet) -> Use:
    """What the server has been told that path 1 is for."""
    return net.guest.paths[1].use


def standing_by() -> Simnet:
    """Path 1 stands by."""
    net = running()
    ask(net, "paths-priority", path="w1", priority="standby")
    net.run(1.0)
    return net


def test_a_path_that_stands_by_carries_nothing_in_either_direction() -> None:
    net = running()
    net.run(20.0)
    ask(net, "paths-priority", path="w1", priority="standby")
    net.run(0.1)
    assert told_use(net) is Use.STANDBY  # at once, also in idleness
    begun = net.now
    traffic = Traffic(net)
    traffic.run(30.0)
    assert traffic.is_whole()
    assert data(net, "up", 0, begun) == data(net, "down", 0, begun) == 3000
    assert data(net, "up", 1, begun) == data(net, "down", 1, begun) == 0
    assert told_use(net) is Use.STANDBY
    assert len(net.controls("up", Control.PROBE, 1, begun)) <= 2  # as in idleness, every 25 s
    assert net.client.paths[1].state is PathState.UP


def test_it_steps_in_soon_after_the_last_path_for_data_fell_silent_and_stands_by_again_when_that_is_back() -> None:
    net = standing_by()
    traffic = Traffic(net)
    traffic.start(12.0)
    net.run(3.0)
    net.wires[0].is_cut = True
    cut = net.now
    net.run(3.0)
    assert told_use(net) is Use.DATA
    for side in ("up", "down"):
        back = traffic.back_at(side, cut)
        assert back - cut < DOUBT_AFTER + 0.25 + 4 * net.wires[1].delay  # a probe's interval, and its way
    net.wires[0].is_cut = False
    net.run(1.0)
    begun = net.now
    net.run(8.0)
    assert told_use(net) is Use.STANDBY
    assert data(net, "up", 1, begun) == data(net, "down", 1, begun) == 0
    assert not traffic.lost("up", begun)
    assert not traffic.lost("down", begun)


def test_a_server_that_is_restarted_is_noticed_though_a_path_stands_by() -> None:
    net = standing_by()
    traffic = Traffic(net)
    traffic.start(8.0)
    net.run(2.0)
    net.restart_server()
    begun = net.now
    net.run(6.0)
    assert max(traffic.back_at("up", begun), traffic.back_at("down", begun)) - begun < 3.0
    net.run(3.0)
    assert told_use(net) is Use.STANDBY


def test_bytes_are_those_of_the_wire_and_the_limit_makes_a_path_stand_by() -> None:
    net = running()
    net.client.today_is(2027, 3, 15, net.now)
    since = net.now
    ask(net, "paths-metered", path="1", limit="200kB", reset_day=3)
    traffic = Traffic(net, size=400)
    traffic.run(1.0)
    (entry,) = [each for each in ask(net, "paths-list") if each["id"] == 1]
    passed = [len(d) + OUTER for at, _, wire, d in net.log if wire == 1 and at >= since]
    assert entry["metered"] == {"limit": 200_000, "used": sum(passed), "reset_day": 3, "spent": False}
    traffic.run(2.0)
    net.client.today_is(2027, 3, 15, net.now)
    net.run(0.5)
    begun = net.now
    traffic.run(2.0)
    assert data(net, "up", 1, begun) == data(net, "down", 1, begun) == 0
    net.wires[0].is_cut = True  # until everything else is dead
    net.run(1.0)
    traffic = Traffic(net)
    traffic.run(1.0)
    assert traffic.is_whole()
    net.wires[0].is_cut = False
    for _ in range(2):
        net.client.today_is(2027, 4, 3, net.now)
        net.run(BELIEF)
    net.client.today_is(2027, 4, 3, net.now)
    begun = net.now
    Traffic(net).run(1.0)
    assert data(net, "up", 1, begun) == 100


def test_what_was_set_and_carried_is_on_the_disk_after_a_clean_stop() -> None:
    net = running()
    net.client.today_is(2027, 3, 15, net.now)
    ask(net, "paths-name", path="w1", label="stick")
    ask(net, "paths-priority", path="stick", priority="standby")
    ask(net, "paths-metered", path="w0", limit="5GB", reset_day=3)
    Traffic(net).run(1.0)
    before = ask(net, "paths-list")
    net.stop("client")
    name = next(name for name in net.saved if name.startswith("client/paths/"))
    book = PathBook.from_document(net.saved[name])
    assert book.used("w0") >= before[0]["metered"]["used"] > 0
    assert (book.of("w1").label, book.of("w1").use) == ("stick", Use.STANDBY)
    assert book.of("w0").limit == 5 * 10**9


def test_what_was_carried_is_on_the_disk_after_a_kill_but_for_the_last_minute() -> None:
    net = running()
    net.client.today_is(2027, 3, 15, net.now)
    ask(net, "paths-metered", path="w0", limit="5GB", reset_day=3)
    traffic = Traffic(net, size=1000)
    traffic.start(200.0)
    for _ in range(200):
        net.run(1.0)
        net.client.today_is(2027, 3, 15, net.now)
    used = ask(net, "paths-list")[0]["metered"]["used"]
    name = next(name for name in net.saved if name.startswith("client/paths/"))
    kept = PathBook.from_document(net.saved[name]).used("w0")
    assert 0.65 * used < kept < used


def test_an_uplink_is_added_and_taken_off_while_the_tunnel_runs() -> None:
    settings = ClientSettings(server="sim.example", interfaces=("w0",))
    net = running(Wire(), Wire(), settings=settings)
    assert set(net.client.paths) == {0}
    assert ask(net, "paths-add", uplink="w1") == {"id": 1, "uplink": "w1"}
    net.run(1.0)
    assert {number for number, path in net.guest.paths.items() if path.endpoint} == {0, 1}
    traffic = Traffic(net)
    traffic.start(2.0)
    net.run(1.0)
    assert ask(net, "paths-remove", path="w0")["uplink"] == "w0"
    net.run(3.0)
    assert traffic.is_whole()
    assert set(net.client.paths) == set(net.guest.paths) == {1}
    with pytest.raises(ConfigError, match="w1 is the only path"):
        ask(net, "paths-remove", path="w1")


def alone(net: Simnet, at: str) -> list[dict[str, Any]]:
    """What one end says of path 1 alone, of both directions."""
    status = net.client.status(net.now) if at == "client" else net.server.status(net.now)["peers"][0]
    return [path["alone"][side] for path in status["paths"] if path["id"] == 1 for side in ("up", "down")]


@pytest.mark.parametrize("server_is_told", [True, False])
def test_who_gets_the_number_of_another_has_nothing_of_its_receipts(*, server_is_told: bool) -> None:
    net = running(Wire(), Wire(), Wire(), settings=ClientSettings(server="sim.example", interfaces=("w0", "w1")))
    for number in range(2, 8):  # a number that nobody had would be taken first
        ask(net, "paths-add", uplink=f"x{number}")
        ask(net, "paths-remove", path=f"x{number}")
    traffic = Traffic(net)
    traffic.start(20.0)
    net.run(1.0)
    net.wires[1].is_cut = True
    net.run(5.0)
    net.wires[1].is_cut = False
    net.run(4.0)
    for said in (*alone(net, "client"), *alone(net, "server")):
        assert said["missed"] >= 500
        assert said["longest_gap_ms"] > 4900
    ask(net, "paths-remove", path="w1")
    net.run(3.0)
    net.wires[0].is_cut = not server_is_told
    assert ask(net, "paths-add", uplink="w2") == {"id": 1, "uplink": "w2"}
    net.run(0.01)
    net.wires[0].is_cut = False
    net.run(12.0)
    assert net.client.paths[1].state is PathState.UP
    up, down = alone(net, "server")
    assert (up["missed"] < 300) == server_is_told
    for said in (*alone(net, "client"), down):
        assert 0 <= said["minute"]["missed"] <= said["missed"] < 300  # it counts from the oldest mark of 2 s on
    for said in (*alone(net, "client"), up, down) if server_is_told else alone(net, "client")[1:]:
        assert said["longest_gap_ms"] < 2100
        assert said["minute"]["longest_gap_ms"] < 2100


def test_an_uplink_that_was_found_and_taken_off_is_not_found_again_until_it_is_added() -> None:
    net = running(settings=ClientSettings(server="sim.example"))
    assert set(net.client.paths) == {0, 1}
    ask(net, "paths-remove", path="w1")
    net.client.links_changed([], net.now)
    net.client.links_changed(net.links(), net.now)
    assert [path.name for path in net.client.paths.values()] == ["w0"]
    ask(net, "paths-add", uplink="w1")
    net.run(1.0)
    assert [path.state for path in net.client.paths.values()] == [PathState.UP] * 2


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("paths-add", {"uplink": "w1"}, "w1 is a path already"),
        ("paths-add", {"uplink": "a b"}, "neither an address nor an interface"),
        ("paths-remove", {"path": "w9"}, "there is no such path"),
        ("paths-name", {"path": "w0", "label": "w1"}, "another path goes by it already"),
        ("paths-name", {"path": "w0", "label": "1"}, "not only digits"),
        ("paths-priority", {"path": "w0", "priority": "high"}, "data or standby is expected"),
        ("paths-metered", {"path": "w0", "limit": "x", "reset_day": 1}, "a size such as 5GB"),
        ("paths-metered", {"path": "w0", "limit": "5GB", "reset_day": 31}, "a day from 1 to 28"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(verb: str, arguments: dict[str, object], words: str) -> None:
    net = running()
    before = ask(net, "paths-list")
    with pytest.raises(ConfigError, match=words):
        ask(net, verb, **arguments)
    assert ask(net, "paths-list") == before


def test_a_path_goes_by_its_label_in_events_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    net = running()
    ask(net, "paths-name", path="w1", label="truck-roof")
    caplog.set_level("INFO")
    net.wires[1].is_cut = True
    net.run(40.0)
    told = [(notice.path, notice.interface) for _, side, notice in net.notices if side == "client"]
    assert told[-1] == ("truck-roof", "w1")
    assert "path truck-roof down" in caplog.text
