"""The server as its client sees it: handshakes over several paths, HELLO, probes, the tunnel's MTU, stock servers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import noise
from mptunnel.messages import (
    INITIATION,
    RESPONSE,
    TRANSPORT,
    WHOLE_SESSION,
    Capability,
    Challenge,
    Close,
    Control,
    Echo,
    Hello,
    Use,
    decode_probe_untrusted,
)
from mptunnel.path import MAX_SEQ, PathState
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    CLIENT_PUBLIC,
    PSK,
    SERVER_KEY,
    TARGET,
    TUNNEL4,
    Simnet,
    Traffic,
    Wire,
    ipv4,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENT = str(TUNNEL4[2])
PACKET = ipv4(CLIENT, TARGET, b"x" * 20)


def running(*wires: Wire, seconds: float = 3.0, **more: Any) -> Simnet:
    net = Simnet(*wires, **more)
    net.run(seconds)
    return net


def answer(net: Simnet, plain: bytes, number: int = 0) -> None:
    """Let the client receive what the server could have sent."""
    assert net.guest.current is not None
    datagram = net.guest.current.seal(plain)
    net.client.receive(datagram, len(datagram), number, net.now, [])
    net.turn()


def initiations(net: Simnet, number: int | None = None, since: float = 0.0) -> list[tuple[float, bytes]]:
    return [(at, datagram[:-16]) for at, datagram in net.sent(INITIATION, "up", number, since)]


def gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def drop(net: Simnet, side: str, *kinds: Control) -> None:
    """Lose control messages of these kinds, and nothing else."""

    def tap(way: str, _: int, datagram: bytes) -> bytes | None:
        plain = net.plaintext(side, datagram) if way == side else None
        return None if plain and plain[0] in kinds else datagram

    net.tap = tap


# -- handshakes ------------------------------------------------------------------------------------------------------


def test_the_initiation_goes_out_on_every_path_with_the_same_bytes() -> None:
    net = Simnet(Wire(), Wire(), Wire())
    sent = net.sent(INITIATION, "up")
    assert len(sent) == 3
    assert len({datagram for _, datagram in sent}) == 1


def test_while_packets_wait_the_same_bytes_are_repeated_every_250_ms_and_fresh_ones_made_every_5_s() -> None:
    net = Simnet(Wire(), Wire(), server_starts=False)
    Traffic(net, rate=10).start(60.0)
    net.run(60.0)
    for number in (0, 1):
        sent = initiations(net, number)
        fresh = {body: at for at, body in reversed(sent)}
        times = sorted(fresh.values())
        assert all(5.0 <= gap <= 5.333 for gap in gaps(times))
        assert all(gap <= 0.25 + 1e-6 for gap in gaps([at for at, _ in sent]))
        assert len(sent) > 20 * len(fresh)
        assert len(fresh) > 10


def test_with_nothing_waiting_it_becomes_patient_after_90_s_and_never_gives_up() -> None:
    net = Simnet(Wire(), server_starts=False)
    net.run(100.0)
    since = net.now
    net.run(3600.0)
    sent = initiations(net, 0, since)
    fresh = {body: at for at, body in reversed(sent)}
    assert len(sent) - len(fresh) <= 60  # repeated only from a new socket, which a mute path gets once a minute
    later = gaps(sorted(fresh.values()))[3:]
    assert all(25.0 <= gap <= 25.333 for gap in later)
    net.start_server()
    net.run(26.0)
    assert net.peer.is_multipath


def test_a_packet_ends_the_patience() -> None:
    net = Simnet(Wire(), server_starts=False)
    net.run(200.0)
    net.start_server()
    net.client_sends(PACKET)
    begun = net.now
    net.run(6.0)
    assert [packet for _, packet in net.at_server] == [PACKET]
    assert net.at_server[0][0] - begun < 0.3


@pytest.mark.parametrize("silence", [100.0, 140.0, 400.0])
def test_a_packet_hurries_a_patient_handshake_whose_response_was_lost(silence: float) -> None:
    net = Simnet(Wire())
    net.run(60.0)
    net.wires[0].is_cut = True
    net.run(silence)
    while not initiations(net, 0, net.now - 0.1):  # the next one arrives, its response does not
        net.run(0.05)
        net.wires[0].is_cut = False
        net.wires[0].cuts_down = True
    net.run(6.0)
    net.wires[0].cuts_down = False
    begun = net.now
    net.client_sends(PACKET)
    net.run(6.0)
    assert [packet for _, packet in net.at_server] == [PACKET]
    assert net.at_server[0][0] - begun < 5.5


def test_hello_that_went_unanswered_in_an_outage_is_said_again_when_that_ends() -> None:
    net = Simnet(Wire(delay=0.05, largest=1400), Wire(delay=0.3))
    net.run(120.0)
    traffic = Traffic(net, 50.0)
    traffic.start(60.0)
    net.run(3.0)
    net.kill_server()
    net.peer.change_hello(net.now, net.client.out)
    net.run(20.0)
    net.start_server()
    net.run(20.0)
    assert net.guest.is_multipath
    assert traffic.lost("up", since=net.now - 10.0, until=net.now - 1.0) == 0


def test_hello_that_went_unanswered_is_said_again_by_the_same_session() -> None:
    net = Simnet(Wire(), Wire())
    net.run(120.0)
    traffic = Traffic(net, 50.0)
    traffic.start(60.0)
    net.run(3.0)
    net.wires[0].is_cut = net.wires[1].is_cut = True
    net.peer.change_hello(net.now, net.client.out)
    net.run(12.0)
    net.wires[0].is_cut = net.wires[1].is_cut = False
    net.run(3.0)
    assert net.peer._hello_is_answered


def test_a_path_that_has_probed_too_often_for_its_numbers_begins_a_new_incarnation() -> None:
    net = Simnet(Wire(), Wire())
    traffic = Traffic(net, 50.0)
    traffic.start(8.0)
    net.run(2.0)
    for path, of_server in zip(net.client.paths.values(), net.guest.paths.values(), strict=True):
        path._seq, of_server.number = MAX_SEQ - 3, (1 << 32) - 6
    before = [path.incarnation for path in net.client.paths.values()]
    net.run(9.0)
    assert traffic.is_whole()
    assert [path.incarnation for path in net.client.paths.values()] != before
    assert [path.state for path in net.client.paths.values()] == [PathState.UP] * 2
    assert max(path.number for path in net.guest.paths.values()) < 100


@pytest.mark.parametrize("mtu", [0, 1, 600, 1279])
def test_a_server_cannot_make_the_tunnel_smaller_than_ipv6_takes(mtu: int) -> None:
    net = Simnet(Wire(), Wire())
    net.run(1.0)
    net.peer._hello_is_answered = False
    answer = Hello(
        is_answer=True,
        version=1,
        oldest=1,
        capabilities=Capability.MULTIPATH,
        instance=net.peer.server_instance or 0,
        mtu=mtu,
        mode=0,
        paths=2,
        serial=net.peer._hello_serial,
    )
    net.peer._hello_received(net.peer.current, answer, net.now, net.client.out)  # type: ignore[arg-type]
    assert net.peer.mtu == 1280


def test_refused_handshakes_are_not_taken_from_what_a_path_has_sent() -> None:
    net = Simnet(Wire(), Wire())
    net.run(1.0)
    before = net.client.paths[0].tx, net.client.paths[0].tx_bytes
    for _ in range(200):
        net.client.not_sent(0, 1, 148, "ENETUNREACH", net.now, is_counted=False)
    assert (net.client.paths[0].tx, net.client.paths[0].tx_bytes) == before
    assert net.client.paths[0].errors == {"ENETUNREACH": 200}


def test_no_initiation_follows_an_answered_one_within_a_second() -> None:
    net = Simnet(Wire(), Wire())
    drop(net, "down", Control.ECHO, Control.HELLO, Control.ADDRESS)
    net.client_sends(PACKET)
    net.run(9.0)  # deaf all the time
    fresh = {body: at for at, body in reversed(initiations(net))}
    assert len(fresh) > 4
    assert all(gap >= 1.0 for gap in gaps(sorted(fresh.values())))


def test_a_tunnel_in_use_that_hears_nothing_starts_a_handshake_after_750_ms() -> None:
    net = running(Wire(), Wire(delay=0.06))
    Traffic(net).start(5.0)
    net.run(1.0)
    net.kill_server()
    killed = net.now
    net.run(2.0)
    assert 0.75 <= initiations(net, since=killed)[0][0] - killed <= 0.75 + 0.25 + 0.12


def test_a_path_that_is_always_new_does_not_hide_that_the_server_is_gone() -> None:
    net = running(Wire(), Wire())
    Traffic(net, rate=20).start(10.0)
    net.run(1.0)
    net.restart_server()
    for turn in range(20):
        net.after(0.1 + 0.4 * turn, lambda: net.renumber(1))
    since = net.now
    net.run(3.0)
    assert initiations(net, since=since)
    assert net.guest.is_multipath


def test_the_old_session_stays_in_use_until_the_new_one_is_there() -> None:
    net = running(Wire(), Wire())
    for wire in net.wires:
        wire.cuts_down = True
    traffic = Traffic(net)
    traffic.run(10.0)
    assert initiations(net, since=1004.0)
    assert traffic.lost("up") == 0


def test_a_cookie_of_each_path_goes_into_mac2_of_the_next_repeat_there() -> None:
    net = Simnet(Wire(delay=0.01), Wire(delay=0.03))
    net.server._door._loaded_until = 1e9  # under load from the first
    net.client_sends(PACKET)
    net.run(1.0)
    assert net.server.drops["answered by a cookie"] >= 2
    first, second = ([d for _, d in net.sent(INITIATION, "up", number)] for number in (0, 1))
    assert first[0] == second[0]
    assert first[0][-16:] == bytes(16)
    assert first[1][:-16] == second[1][:-16] == first[0][:-16]  # the same initiation
    assert first[1][-16:] not in {bytes(16), second[1][-16:]}
    assert second[1][-16:] != bytes(16)
    assert net.at_server


def test_a_cookie_is_not_used_for_longer_than_115_s() -> None:
    net = Simnet(Wire(), server_starts=False)
    net.server._door._loaded_until = net.now + 0.2
    net.is_server_alive = True
    net.run(0.1)
    net.kill_server()
    Traffic(net, rate=1).start(130.0)
    net.run(130.0)
    used = [at - 1000.0 for at, datagram in net.sent(INITIATION, "up") if datagram[-16:] != bytes(16)]
    assert 100.0 < max(used) <= 115.0


def test_a_cookie_for_another_message_is_ignored() -> None:
    net = Simnet(Wire(), server_starts=False)
    initiation = net.peer.initiation
    assert initiation is not None
    other = bytes(reversed(initiation.datagram))
    reply = net.server._door.cookie_reply(initiation.datagram[:8] + other[8:], net.source(0), net.now)
    net.client.receive(reply, len(reply), 0, net.now, [])
    net.turn()
    assert net.client.drops["cookie not authentic"] == 1
    net.run(1.0)
    assert {datagram[-16:] for _, datagram in net.sent(INITIATION, "up")} == {bytes(16)}


def test_a_forged_response_changes_nothing() -> None:
    net = Simnet(Wire(), server_starts=False)
    net.run(1.0)
    initiation = net.peer.initiation
    assert initiation is not None
    body = (RESPONSE).to_bytes(4, "little") + bytes(4) + initiation.index.to_bytes(4, "little") + b"\x09" + bytes(47)
    forged = body + noise.mac(net.client.key.mac1_key, body) + bytes(16)  # who knows our public key can do that
    aside = frozenset({"_door", "_is_settled"})  # what floods may fill; whether the next deadline is known
    before = snapshot(net.client, aside)
    net.client.receive(forged, len(forged), 0, net.now, [])
    net.client.finish_turn(net.now)
    assert net.client.drops["response not authentic"] == 1
    assert snapshot(net.client, aside) == before


def test_only_the_first_copy_of_a_response_counts() -> None:
    net = Simnet(Wire(), Wire(delay=0.03), Wire(delay=0.04))
    net.run(1.0)
    assert len(net.sent(RESPONSE, "down")) == 3
    assert net.peer.current is not None
    assert net.peer.current.serial == 1
    assert net.client.drops["unknown index"] == 2


# -- HELLO -----------------------------------------------------------------------------------------------------------


def test_hello_is_the_first_datagram_under_every_session_on_each_path() -> None:
    net = Simnet(Wire(), Wire(delay=0.06))
    first: dict[tuple[bytes, int], int] = {}

    def tap(side: str, number: int, datagram: bytes) -> bytes:
        if side == "up" and datagram[0] == TRANSPORT:
            plain = net.plaintext("up", datagram)
            assert plain
            first.setdefault((datagram[4:8], number), plain[0])
        return datagram

    net.tap = tap
    Traffic(net, rate=1).run(250.0)
    assert len(first) == 3 * 2
    assert set(first.values()) == {Control.HELLO}


def test_hello_is_repeated_every_500_ms_until_it_is_answered() -> None:
    net = Simnet(Wire(), Wire(), mtu=1280)
    drop(net, "down", Control.HELLO)
    net.run(3.0)
    times = net.controls("up", Control.HELLO, 0)
    assert len(times) == 6
    assert all(gap == pytest.approx(0.5) for gap in gaps(times))
    net.tap = None
    net.run(2.0)
    assert len(net.controls("up", Control.HELLO, 0)) == 7


def test_hello_is_repeated_too_until_the_address_has_come() -> None:
    net = Simnet(Wire())
    drop(net, "down", Control.ADDRESS)
    net.run(1.2)
    assert not [verb for _, verb, _ in net.scripts if verb == "up"]
    net.tap = None
    net.run(1.0)
    assert [verb for _, verb, _ in net.scripts if verb == "up"]


def test_an_unknown_server_that_leaves_20_hellos_unanswered_is_a_stock_one() -> None:
    net = Simnet(Wire(), Wire(), said_hello=False)
    drop(net, "down", Control.HELLO)
    net.run(30.0)
    assert len(net.controls("up", Control.HELLO)) == 20
    assert net.peer.is_stock
    assert net.controls("up", Control.PROBE) == []


def test_a_server_taken_for_stock_by_mistake_is_asked_again_under_the_next_session() -> None:
    net = Simnet(Wire(), Wire())
    drop(net, "up", Control.HELLO)  # as if no path had worked just then
    net.run(12.0)
    assert net.peer.is_stock
    net.tap = None
    Traffic(net, rate=5).run(120.0)
    assert net.peer.is_multipath
    assert not net.peer.is_stock
    assert len(net.guest.paths) == 2


def test_an_answer_to_another_hello_does_not_count() -> None:
    net = Simnet(Wire())
    drop(net, "down", Control.HELLO)
    net.run(1.0)
    values: dict[str, Any] = {
        "is_answer": True, "version": 1, "oldest": 1, "capabilities": Capability.MULTIPATH,
        "instance": 5, "mtu": 1420, "mode": 0, "paths": 2, "serial": net.peer._hello_serial,
    }  # fmt: skip
    answer(net, Hello(**values | {"serial": 999}).encode())
    answer(net, Hello(**values | {"is_answer": False}).encode())
    assert not net.peer.is_multipath
    answer(net, Hello(**values).encode())
    assert net.peer.is_multipath


@pytest.mark.parametrize(("version", "oldest"), [(9, 2), (0, 0)])
def test_an_incompatible_server_is_named_with_both_versions_and_gets_one_path(
    version: int, oldest: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = Simnet(Wire(), Wire())
    drop(net, "down", Control.HELLO)
    net.run(1.0)
    hello = Hello(
        is_answer=True, version=version, oldest=oldest, capabilities=Capability.MULTIPATH, instance=5, mtu=1420,
        mode=0, paths=2, serial=net.peer._hello_serial,
    )  # fmt: skip
    answer(net, hello.encode())
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert f"version {oldest} to {version}" in said[0]
    since = net.now
    net.client_sends(PACKET)
    assert len([at for at, _ in net.sent(TRANSPORT, "up", None, since)]) == 1


def test_a_server_without_several_paths_gets_one() -> None:
    net = running(Wire(), Wire())
    net.restart_server()
    drop(net, "down", Control.HELLO)
    net.client_sends(PACKET)
    net.run(2.0)
    hello = Hello(
        is_answer=True, version=1, oldest=1, capabilities=Capability(0), instance=77, mtu=1420, mode=0, paths=0,
        serial=net.peer._hello_serial,
    )  # fmt: skip
    answer(net, hello.encode())
    assert not net.peer.is_multipath
    since = net.now
    net.client_sends(PACKET)
    assert len(net.sent(TRANSPORT, "up", None, since)) == 1


def test_before_hello_copies_go_only_to_a_server_that_is_known_to_take_them() -> None:
    known, unknown = Simnet(Wire(), Wire(), said_hello=True), Simnet(Wire(), Wire(), said_hello=False)
    for net, copies in ((known, 2), (unknown, 1)):
        drop(net, "down", Control.HELLO)
        net.client_sends(PACKET)
        net.run(1.0)
        since = net.now
        net.client_sends(PACKET)
        assert len(net.sent(TRANSPORT, "up", None, since)) == copies
        assert len({number for _, side, number, d in net.log if side == "up" and d[0] == INITIATION}) == copies


def test_another_instance_of_the_server_makes_the_paths_count_anew() -> None:
    net = running(Wire(), Wire())
    before = {path.incarnation for path in net.client.paths.values()}
    net.restart_server()
    Traffic(net, rate=10).run(4.0)
    assert not before & {path.incarnation for path in net.client.paths.values()}


def test_a_rekey_is_no_new_instance() -> None:
    net = running(Wire(), Wire())
    before = {path.incarnation for path in net.client.paths.values()}
    Traffic(net, rate=2).run(130.0)
    assert before == {path.incarnation for path in net.client.paths.values()}


# -- probes ----------------------------------------------------------------------------------------------------------


def test_in_use_a_probe_goes_out_every_250_ms_on_every_path_also_a_silent_one() -> None:
    net = running(Wire(), Wire(is_cut=True))
    Traffic(net, rate=10).start(20.0)
    net.run(3.0)
    since = net.now
    net.run(10.0)
    for number in (0, 1):
        times = net.controls("up", Control.PROBE, number, since)
        reopened = sum(at > since and event.path == number for at, event in net.opened)  # and probed at once
        assert reopened == (1 if number else 0)
        assert sum(gap == pytest.approx(0.25) for gap in gaps(times)) >= 39 - 2 * reopened
        assert 40 <= len(times) <= 40 + reopened


def test_an_idle_tunnel_is_probed_every_25_s_and_not_busily_after_each_rekey() -> None:
    net = running(Wire(), Wire())
    net.run(60.0)
    seen: list[float] = []

    def tap(side: str, number: int, datagram: bytes) -> bytes:
        if side == "up" and number == 0 and datagram[0] == TRANSPORT:
            seen.append(net.now)
        return datagram

    net.tap = tap
    net.run(1000.0)
    assert 40 <= len(seen) <= 40 + 8 * 4


def test_every_probe_says_when_the_next_one_comes() -> None:
    net = running(Wire())
    Traffic(net, rate=10).run(15.0, rest=0)
    net.run(70.0)
    announced: list[tuple[float, float]] = []
    for at, datagram in net.sent(TRANSPORT, "up", 0):
        plain = net.plaintext("up", datagram)
        if plain and plain[0] == Control.PROBE:
            announced.append((at, decode_probe_untrusted(memoryview(plain)).interval_ms / 1000))
    assert {interval for _, interval in announced} == {0.25, 25.0}
    for (at, interval), (following, _) in pairwise(announced):
        assert following - at <= interval + 1e-6


def test_a_probe_follows_every_32_kib_but_at_most_one_in_20_ms() -> None:
    net = running(Wire())
    for step in range(1000):
        net.after(0.002 * step, lambda: net.client_sends(ipv4(CLIENT, TARGET, bytes(1200))))
    since = net.now
    net.run(2.0)
    times = net.controls("up", Control.PROBE, 0, since)
    assert 1000 * 1240 / 32768 * 0.8 <= len(times) <= 1000 * 1240 / 32768 * 1.2 + 8
    for step in range(1000):
        net.after(0.0002 * step, lambda: net.client_sends(ipv4(CLIENT, TARGET, bytes(1200))))
    since = net.now
    net.run(0.2)
    times = net.controls("up", Control.PROBE, 0, since)
    assert 8 <= len(times) <= 11
    assert min(gaps(times)) >= 0.02 - 1e-6


def test_data_on_an_idle_tunnel_is_followed_by_probes_at_once() -> None:
    net = running(Wire(), Wire())
    net.run(100.0)
    since = net.now
    net.server_sends(ipv4(TARGET, CLIENT, b"x"))
    net.run(0.1)
    assert len(net.controls("up", Control.PROBE, 0, since)) == 1
    assert len(net.controls("up", Control.PROBE, 1, since)) == 1


def test_a_path_is_down_after_three_unanswered_probes_and_a_second_and_up_again_by_an_echo() -> None:
    net = running(Wire(), Wire())
    Traffic(net, rate=10).start(10.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    cut = net.now
    states = []
    for seconds, is_cut in ((0.9, True), (0.7, False), (0.35, False)):
        net.run(seconds)
        states.append(net.client.paths[0].state)
        net.wires[0].is_cut = is_cut
    assert states == [PathState.UP, PathState.DOWN, PathState.UP]
    assert net.client.paths[0].errors == {}
    assert net.now - cut == pytest.approx(1.95)


def test_a_silent_path_gets_copies_for_30_s_and_then_probes_only() -> None:
    net = running(Wire(), Wire())
    Traffic(net, rate=10).start(60.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    net.run(29.0)
    since = net.now
    net.run(0.9)
    assert len(net.sent(TRANSPORT, "up", 0, since)) >= 9 + 3
    net.run(2.0)
    since = net.now
    net.run(10.0)
    plains = [net.plaintext("up", datagram) for _, datagram in net.sent(TRANSPORT, "up", 0, since)]
    assert {plain[0] for plain in plains if plain} == {Control.PROBE}
    net.wires[1].is_cut = True
    net.run(32.0)
    since = net.now
    net.client_sends(PACKET)
    assert {number for at, side, number, _ in net.log if at >= since and side == "up"} == {0, 1}  # all are silent


def test_a_standby_path_carries_only_when_no_other_is_up() -> None:
    net = running(Wire(), Wire())
    net.client.paths[1].use = Use.STANDBY
    since = net.now
    net.client_sends(PACKET)
    assert len(net.sent(TRANSPORT, "up", 1, since)) == 0
    Traffic(net, rate=10).start(5.0)
    net.wires[0].is_cut = True
    net.run(3.0)
    since = net.now
    net.client_sends(PACKET)
    assert len(net.sent(TRANSPORT, "up", 1, since)) == 1


def test_a_standby_path_that_has_stepped_in_carries_a_download_after_a_pause() -> None:
    """The server may send 16 KiB to an idle client: then it waits for a probe that says that it is idle no more."""
    net = running(Wire(), Wire())
    net.client.paths[1].use = Use.STANDBY
    net.wires[0].is_cut = True
    Traffic(net, rate=10).start(5.0)
    net.run(60.0)
    assert not net.peer.in_use(net.now)
    traffic = Traffic(net, rate=200, size=1000, sides=("down",))
    traffic.run(2.0)
    assert traffic.lost("down") == 0
    net.wires[1].largest = 1400  # and it is shown again what it carries
    Traffic(net, rate=10).start(20.0)
    net.run(20.0)
    assert net.peer.tunnel_mtu < 1400


def test_a_challenge_for_another_path_or_incarnation_is_not_answered() -> None:
    net = running(Wire(), Wire())
    path = net.client.paths[0]
    since = net.now
    answer(net, Challenge(1, path.incarnation, bytes(16)).encode(Control.CHALLENGE), 0)
    answer(net, Challenge(0, path.incarnation ^ 1, bytes(16)).encode(Control.CHALLENGE), 0)
    assert net.controls("up", Control.RESPONSE, None, since) == []
    answer(net, Challenge(0, path.incarnation, bytes(16)).encode(Control.CHALLENGE), 0)
    assert len(net.controls("up", Control.RESPONSE, 0, since)) == 1


def test_an_echo_for_another_path_or_incarnation_counts_for_nothing() -> None:
    net = running(Wire(), Wire(is_cut=True))
    path = net.client.paths[1]
    for wrong in ({"path": 0}, {"incarnation": path.incarnation ^ 1}):
        values: dict[str, Any] = {"path": 1, "incarnation": path.incarnation} | wrong
        answer(net, Echo(seq=1, number=1, probe_us=0, sent_us=0, held_us=0, tx=1, rx=1, packets=0, rx_size=96,
                         port=1, address=bytes(16), **values).encode(), 1)  # fmt: skip
    assert path.state is not PathState.UP
    assert net.client.drops["echo for another path"] == 2


# -- CLOSE -----------------------------------------------------------------------------------------------------------


def test_a_goodbye_of_the_server_starts_a_handshake_at_once_and_is_told_once() -> None:
    net = running(Wire(), Wire())
    since = net.now
    net.stop("server")
    net.run(0.1)
    assert len({body for _, body in initiations(net, since=since)}) == 1


def test_a_goodbye_under_an_older_session_is_no_news() -> None:
    net = running(Wire())
    assert net.guest.current is not None
    late = net.guest.current.seal(Close(WHOLE_SESSION, 0).encode())
    Traffic(net, rate=5).run(125.0)
    since = net.now
    net.client.receive(late, len(late), 0, net.now, [])
    net.run(0.5)
    assert initiations(net, since=since) == []


# -- MTU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "mtu"), [(1500, 1420), (1452, 1420), (1451, 1400), (1380, 1340), (1312, 1280)])
def test_the_tunnel_takes_the_mtu_that_every_path_carries(largest: int, mtu: int) -> None:
    net = Simnet(Wire(), Wire(largest=largest))
    assert net.peer.tunnel_mtu == 1280
    Traffic(net, rate=10).run(30.0)
    assert net.client.paths[0].carries == 1420
    assert net.client.paths[1].carries == mtu
    assert net.peer.tunnel_mtu == mtu
    assert net.guest.tunnel_mtu == mtu
    assert net.client.paths[1].state is PathState.UP
    assert [s for s in net.scripts if s[1] == "mtu"][-1:] == ([("client", "mtu", {"mtu": mtu})])


def test_a_path_below_1280_carries_what_fits_and_does_not_count() -> None:
    net = Simnet(Wire(), Wire(largest=700))
    traffic = Traffic(net, rate=10)
    traffic.run(40.0)
    assert net.client.paths[1].carries == 0
    assert net.client.paths[1].state is PathState.UP
    assert net.peer.tunnel_mtu == 1420
    assert traffic.is_whole()


@pytest.mark.parametrize("rate", [50.0, 400.0])
def test_a_path_below_1280_is_given_what_it_may_carry_and_nothing_larger(rate: float) -> None:
    net = Simnet(Wire(), Wire(largest=1300))
    traffic = Traffic(net, rate, size=1300)
    traffic.run(40.0)
    assert traffic.is_whole()
    begun = net.now
    traffic.run(5.0)
    assert all(len(datagram) < 1312 for _, datagram in net.sent(TRANSPORT, "up", 1, begun))
    assert net.client.paths[1].cap.rate is None, "so what is lost there is no reason to give it less"
    begun = net.now
    traffic = Traffic(net, rate, size=600)
    traffic.run(5.0)
    for side in ("up", "down"):
        assert len(net.sent(TRANSPORT, side, 1, begun)) > 5.0 * rate
    net.wires[1].largest = 65535
    net.set_link(1, up=False)
    net.set_link(1, up=True)
    net.run(5.0)
    begun = net.now
    Traffic(net, rate, size=1300).run(5.0)
    for side in ("up", "down"):
        assert len([d for _, d in net.sent(TRANSPORT, side, 1, begun) if len(d) > 1312]) > 4.5 * rate


def test_a_path_that_was_small_for_a_while_is_asked_again_and_meanwhile_carries_all_if_it_must() -> None:
    net = Simnet(Wire(), Wire(largest=1250))
    traffic = Traffic(net, 50.0, size=1300)
    traffic.start(60.0)
    net.run(50.0)
    assert net.client.paths[1].is_small
    net.wires[1].largest = 65535
    net.wires[0].is_cut = True
    begun = net.now
    net.run(13.0)
    assert traffic.lost("up", since=begun + 1.0) == 0
    net.wires[0].is_cut = False
    traffic = Traffic(net, 50.0, size=1300)
    traffic.run(330.0)
    assert not net.client.paths[1].is_small
    assert net.client.paths[1].carries == 1420


def test_a_handshake_without_an_answer_calls_no_path_down_that_works() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    for _ in range(4):
        net.peer._turn_to_next_path(net.now)
    assert [path.state for path in net.client.paths.values()] == [PathState.UP] * 2


def test_a_server_made_anew_does_not_make_a_path_one_that_was_never_heard() -> None:
    net = Simnet(Wire(), Wire())
    traffic = Traffic(net, 50.0)
    traffic.start(8.0)
    net.run(3.0)
    net.restart_server()
    for _ in range(50):
        net.run(0.1)
        assert all(path.was_heard for path in net.client.paths.values())


def test_a_size_counts_only_if_the_echo_was_as_long_as_the_probe() -> None:
    net = Simnet(Wire())
    net.tap = lambda side, _, datagram: None if side == "down" and len(datagram) > 1400 else datagram
    net.run(1.0)
    path = net.client.paths[0]
    seq = next(seq for seq, (_, _, _, padded, _) in path._pending.items() if padded == 1420)
    values: dict[str, Any] = {
        "path": 0, "incarnation": path.incarnation, "seq": seq, "number": 99, "probe_us": 0, "sent_us": 0, "held_us": 0,
        "tx": 1, "rx": 1, "packets": 0, "rx_size": 1452, "port": 1, "address": bytes(16),
    }  # fmt: skip
    answer(net, Echo(**values).encode())
    assert path.carries == 0


def test_a_path_that_carries_less_downwards_is_found_out() -> None:
    net = Simnet(Wire())
    net.tap = lambda side, _, datagram: None if side == "down" and len(datagram) > 1380 else datagram
    Traffic(net, rate=10).run(30.0)
    assert net.peer.tunnel_mtu == 1340


def test_the_mtu_falls_at_once_and_rises_only_after_60_s() -> None:
    net = Simnet(Wire(), Wire(largest=1380), down=(1,))
    Traffic(net, rate=5).start(300.0)
    net.run(5.0)
    assert net.peer.tunnel_mtu == 1420
    net.set_link(1, up=True)
    net.run(12.0)
    assert net.peer.tunnel_mtu == 1340
    fallen = net.peer._mtu.changed_at
    net.set_link(1, up=False)
    net.run(fallen + 59.0 - net.now)
    assert net.peer.tunnel_mtu == 1340
    net.run(2.0)
    assert net.peer.tunnel_mtu == 1420


def test_on_the_only_path_the_mtu_falls_at_once_where_the_new_network_carries_less() -> None:
    net = Simnet(Wire())
    Traffic(net, rate=5).start(100.0)
    net.run(5.0)
    assert net.peer.tunnel_mtu == 1420
    net.set_link(0, up=False)
    net.run(1.0)
    net.wires[0].largest = 1380
    net.set_link(0, up=True)
    net.run(2.5)
    assert net.peer.tunnel_mtu == net.guest.tunnel_mtu == 1280
    net.run(70.0)
    assert net.peer.tunnel_mtu == 1340


def test_a_server_that_comes_back_with_a_smaller_mtu_is_given_no_more() -> None:
    net = Simnet()
    Traffic(net, rate=5).start(30.0)
    net.run(5.0)
    assert net.peer.tunnel_mtu == 1420
    net._mtu = 1380
    net.restart_server()
    net.run(5.0)
    assert net.peer.tunnel_mtu == net.guest.tunnel_mtu == 1380


def test_a_size_that_the_kernel_refuses_is_given_up_at_once() -> None:
    net = Simnet(Wire())
    Traffic(net, rate=5).start(30.0)
    net.run(5.0)

    def tap(side: str, number: int, datagram: bytes) -> bytes | None:
        if side == "up" and len(datagram) > 1380:
            net.client.not_sent(number, 1, len(datagram), "EMSGSIZE", net.now)
            return None
        return datagram

    net.tap = tap
    net.client_sends(ipv4(CLIENT, TARGET, bytes(1400)))
    net.run(1.5)
    assert net.peer.tunnel_mtu == 1340


def test_a_size_that_passes_no_more_is_given_up_within_seconds_and_found_anew_after_60() -> None:
    net = Simnet(Wire(), Wire())
    traffic = Traffic(net, rate=5)
    traffic.start(90.0)
    net.run(5.0)
    assert net.peer.tunnel_mtu == 1420
    net.tap = lambda _, __, datagram: None if len(datagram) > 1380 else datagram
    net.run(7.0)
    assert net.peer.tunnel_mtu == 1280
    assert {path.state for path in net.client.paths.values()} == {PathState.UP}
    net.run(70.0)
    assert net.peer.tunnel_mtu == 1340
    assert traffic.is_whole()


def test_loss_alone_does_not_lower_the_mtu() -> None:
    net = Simnet(Wire(loss_up=0.2, loss_down=0.2), Wire(loss_up=0.2, loss_down=0.2))
    Traffic(net, rate=5).run(120.0)
    assert net.peer.tunnel_mtu == 1420
    assert sum(s[1] == "mtu" for s in net.scripts) <= 1


def test_no_datagram_is_padded_beyond_the_tunnel_mtu() -> None:
    net = Simnet(Wire(largest=1332))
    Traffic(net, rate=5).run(20.0)
    assert net.peer.tunnel_mtu == 1300
    since, here, there = net.now, len(net.at_server), len(net.at_client)
    for length in range(1290, 1301):
        net.client_sends(ipv4(CLIENT, TARGET, bytes(length - 20)))
        net.server_sends(ipv4(TARGET, CLIENT, bytes(length - 20)))
    net.run(1.0)
    assert len(net.at_server) - here == len(net.at_client) - there == 11
    assert max(len(d) for at, _, _, d in net.log if at >= since) <= 1332


# -- stock servers ---------------------------------------------------------------------------------------------------


def stock(**more: Any) -> Simnet:
    server = BookPeer(SERVER_KEY, CLIENT_PUBLIC, PSK, **more)
    return Simnet(Wire(), Wire(), stock_server=server, said_hello=False)


def book(net: Simnet) -> BookPeer:
    assert isinstance(net.server_side, BookPeer)
    return net.server_side


def test_a_stock_server_gets_one_copy_on_one_path_and_loses_nothing() -> None:
    net = stock()
    traffic = Traffic(net, rate=5)
    traffic.run(400.0)
    assert traffic.is_whole()
    assert {number for _, side, number, _ in net.log if side == "up"} == {0}
    assert len(net.sent(TRANSPORT, "up")) < 400 * 5 + 4 * 20 + 50
    assert book(net).sessions_made == 4  # rekeyed every 120 s
    assert book(net).drops == {}


def test_a_stock_server_is_not_disturbed_by_hello_and_drops_it() -> None:
    net = stock()
    net.client_sends(PACKET)
    net.run(30.0)
    assert {plain[0] for plain in book(net).foreign} == {Control.HELLO}
    assert len(book(net).foreign) == 20


def test_a_stock_server_that_is_silent_is_called_by_wireguards_timers_without_repeats() -> None:
    net = Simnet(Wire(), Wire(), said_hello=False, server_starts=False)
    Traffic(net, rate=10).start(60.0)
    net.run(60.0)
    sent = initiations(net)
    assert len({body for _, body in sent}) == len(sent)
    assert all(5.0 <= gap <= 5.333 for gap in gaps([at for at, _ in sent]))
    assert {number for _, side, number, _ in net.log if side == "up"} == {0, 1}  # the next path with each of them


def test_a_stock_server_that_falls_silent_is_called_after_15_s() -> None:
    net = stock()
    net.client_sends(PACKET)
    net.run(30.0)
    net.is_server_alive = False
    since = net.now
    net.client_sends(PACKET)
    net.run(20.0)
    assert 15.0 <= initiations(net, since=since)[0][0] - since <= 15.333


def test_data_from_a_stock_server_is_answered_by_a_keepalive_after_10_s() -> None:
    net = stock()
    net.client_sends(PACKET)
    net.run(40.0)
    since = net.now
    net.server_sends(ipv4(TARGET, CLIENT, b"x"))
    net.run(15.0)
    sent = net.sent(TRANSPORT, "up", None, since)
    assert [len(datagram) for _, datagram in sent] == [32]
    assert sent[0][0] - since == pytest.approx(10.02)


def test_a_stock_server_may_start_the_handshake_itself() -> None:
    net = stock()
    net.client_sends(PACKET)
    net.run(30.0)
    before = net.peer.current
    book(net).initiate(net.now)
    net.turn()
    net.run(1.0)
    traffic = Traffic(net, rate=10)
    traffic.run(5.0)
    assert net.peer.current is not before
    assert traffic.is_whole()


def test_two_handshakes_that_cross_are_sorted_out() -> None:
    server = BookPeer(SERVER_KEY, CLIENT_PUBLIC, PSK, endpoint=None)
    net = Simnet(Wire(delay=0.05), stock_server=server, said_hello=False)
    book(net).endpoint = net.source(0)
    book(net).initiate(net.now)
    net.turn()
    net.run(30.0)
    traffic = Traffic(net, rate=10)
    traffic.run(5.0)
    assert traffic.is_whole()


def test_a_configured_stock_server_never_hears_of_us() -> None:
    net = stock()
    net.peer._stays_stock = True
    net.client_sends(PACKET)
    net.run(5.0)
    assert book(net).foreign == []
    assert CLIENT_KEY != SERVER_KEY


def test_the_server_cannot_make_the_client_send_elsewhere() -> None:
    net = running(Wire(), Wire())
    assert net.guest.current is not None
    datagram = net.guest.current.seal(ipv4(TARGET, CLIENT, b"x"))
    net.client.receive(datagram, len(datagram), 1, net.now, [])
    since = net.now
    net.client_sends(PACKET)
    assert {transmit for _, _, transmit, _ in net.log if _ is not None} <= {0, 1}
    assert len(net.sent(TRANSPORT, "up", 0, since)) == 1
