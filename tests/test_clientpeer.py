"""A client as the server sees it: paths are bound by challenge only, and what is stolen makes nobody a path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.messages import (
    INITIATION,
    RESPONSE,
    TRANSPORT,
    WHOLE_SESSION,
    Capability,
    Challenge,
    Close,
    CloseReason,
    Control,
    Hello,
    Probe,
    Record,
    Use,
    decode_challenge_untrusted,
    decode_echo_untrusted,
    decode_hello_untrusted,
    decode_probe_untrusted,
)
from mptunnel.path import PathState
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    CLIENT_PUBLIC,
    PSK,
    SERVER_PUBLIC,
    TARGET,
    TUNNEL4,
    Simnet,
    Traffic,
    Wire,
    ipv4,
    stranger,
    unsealed,
)

if TYPE_CHECKING:
    from mptunnel.events import Endpoint

CLIENT = str(TUNNEL4[2])


def running(*wires: Wire, seconds: float = 3.0, **more: Any) -> Simnet:
    net = Simnet(*wires, **more)
    net.run(seconds)
    return net


def sealed(net: Simnet, plain: bytes) -> bytes:
    """What the client would send: authentic, with a counter of its own."""
    assert net.peer.current is not None
    return net.peer.current.seal(plain)


def probe(net: Simnet, path: int = 0, *, records: tuple[Record, ...] = (), **more: Any) -> bytes:
    incarnation = more.pop("incarnation", net.client.paths[path].incarnation if path in net.client.paths else 7)
    return sealed(net, Probe(path, incarnation, 9999, 250, 0, 1, 1, 0, records=records, **more).encode())


def deliver(net: Simnet, datagram: bytes, source: Endpoint) -> None:
    net.deliver(datagram, source)
    net.turn()


def steal(net: Simnet, kind: Control, number: int, thief: Endpoint) -> list[bytes]:
    """Let a thief have the next message of a kind on a wire: it arrives from the thief's address, and first."""
    stolen: list[bytes] = []

    def tap(side: str, wire: int, datagram: bytes) -> bytes | None:
        if side == "up" and wire == number and not stolen and datagram[0] == TRANSPORT:
            plain = net.plaintext("up", datagram)
            if plain and plain[0] == kind:
                stolen.append(datagram)
                net.after(0.0, lambda: net.deliver(datagram, thief))
        return datagram

    net.tap = tap
    return stolen


def endpoints(net: Simnet) -> dict[int, Any]:
    return {path.id: path.endpoint for path in net.guest.paths.values()}


def data_down(net: Simnet, number: int | None, since: float) -> int:
    """How many IP packets have gone down a wire."""
    sent = (net.plaintext("down", datagram) for _, datagram in net.sent(TRANSPORT, "down", number, since))
    return sum(bool(plain) and plain[0] >= 0x40 for plain in sent if plain is not None)


# -- binding ---------------------------------------------------------------------------------------------------------


def test_a_path_is_bound_by_a_probe_and_the_answer_to_a_challenge() -> None:
    net = running(Wire(), Wire())
    assert endpoints(net) == {0: net.source(0), 1: net.source(1)}
    assert len(net.controls("down", Control.CHALLENGE)) == 2
    assert len(net.controls("up", Control.RESPONSE)) == 2


def test_a_stolen_probe_makes_nobody_a_path_and_costs_the_true_one_nothing() -> None:
    net, thief = running(Wire()), stranger()
    stolen = steal(net, Control.PROBE, 0, thief)
    traffic = Traffic(net)
    traffic.run(3.0)
    assert stolen
    assert traffic.is_whole()
    assert endpoints(net) == {0: net.source(0)}
    answers = net.to_strangers()
    assert len(answers) == 1  # the challenge
    assert len(answers[0]) <= len(stolen[0])


def test_a_stolen_probe_is_answered_neither_by_data_nor_by_an_echo() -> None:
    net, thief = running(Wire()), stranger()
    steal(net, Control.PROBE, 0, thief)
    Traffic(net, rate=200).run(3.0)
    assert net.peer.current is not None
    plains = [unsealed(net.peer.current, datagram) for datagram in net.to_strangers(thief)]
    assert [plain[0] for plain in plains] == [Control.CHALLENGE]


def test_the_true_path_is_refreshed_within_one_interval_after_a_theft() -> None:
    net = running(Wire())
    Traffic(net, rate=10).start(10.0)
    net.run(1.0)
    steal(net, Control.PROBE, 0, stranger())
    before = net.guest.paths[0].refreshed_at
    net.run(0.25 + 0.25 + 0.04)
    assert net.guest.paths[0].refreshed_at > before


def test_stolen_data_is_delivered_once_and_moves_nothing() -> None:
    net, thief = running(Wire()), stranger()
    stolen: list[bytes] = []

    def tap(side: str, _: int, datagram: bytes) -> bytes | None:
        plain = net.plaintext("up", datagram) if side == "up" else None
        if plain and plain[0] >= 0x40:
            stolen.append(datagram)
            net.deliver(datagram, thief)
        return datagram

    net.tap = tap
    traffic = Traffic(net)
    traffic.run(3.0)
    assert len(stolen) == 300
    assert traffic.is_whole()
    assert net.to_strangers() == []
    assert endpoints(net) == {0: net.source(0)}


def test_a_stolen_initiation_gets_one_response_there_and_nothing_after_it() -> None:
    net, thief = Simnet(Wire()), stranger()
    _, initiation = net.sent(INITIATION, "up")[0]
    deliver(net, initiation, thief)
    traffic = Traffic(net)
    traffic.run(5.0)
    assert net.guest.is_multipath
    assert [datagram[0] for datagram in net.to_strangers(thief)] == [RESPONSE]
    assert traffic.is_whole(since=1000.5)


def test_the_first_hello_of_a_session_stolen_gets_no_data_and_at_most_three_times_its_size() -> None:
    net, thief = running(Wire()), stranger()
    net.restart_server()
    for _ in range(100):
        net.server_sends(ipv4(TARGET, CLIENT, bytes(1000)))  # much is waiting for the client
    stolen = steal(net, Control.HELLO, 0, thief)
    net.run(5.0)
    assert stolen
    assert sum(map(len, net.to_strangers(thief))) <= 3 * len(stolen[0])
    assert len(net.at_client) == 100  # and all of it reached the client


def test_a_capture_replayed_from_1000_sources_gets_not_a_byte_and_changes_nothing() -> None:
    net = running(Wire(), Wire())
    Traffic(net, rate=20).run(10.0)
    net.tap = None
    capture = [datagram for at, side, _, datagram in net.log if side == "up" and at < net.now - 1.0]
    inside, bound = len(net.at_server), endpoints(net)
    for number in range(1000):
        net.deliver(capture[number % len(capture)], stranger(number))
        net.turn()
    assert net.to_strangers() == []
    assert len(net.at_server) == inside
    assert endpoints(net) == bound


def test_a_response_from_another_address_than_the_candidates_binds_nothing() -> None:
    net, candidate, other = running(Wire()), stranger(1), stranger(2)
    deliver(net, probe(net), candidate)
    challenge = decode_challenge_untrusted(memoryview(opened_by_client(net, net.to_strangers(candidate)[0])))
    deliver(net, sealed(net, challenge.encode(Control.RESPONSE)), other)
    assert endpoints(net) == {0: net.source(0)}
    deliver(net, sealed(net, Challenge(0, challenge.incarnation, bytes(16)).encode(Control.RESPONSE)), candidate)
    assert endpoints(net) == {0: net.source(0)}
    deliver(net, sealed(net, Challenge(0, 1, challenge.token).encode(Control.RESPONSE)), candidate)
    assert endpoints(net) == {0: net.source(0)}
    deliver(net, sealed(net, challenge.encode(Control.RESPONSE)), candidate)
    assert endpoints(net) == {0: candidate}  # from there, it does


def opened_by_client(net: Simnet, datagram: bytes) -> bytes:
    plain = net.plaintext("down", datagram)
    assert plain is not None
    return plain


@pytest.mark.parametrize(("waits", "is_bound"), [(7.9, True), (8.01, False)])
def test_a_challenge_can_be_answered_for_8_s_only(waits: float, *, is_bound: bool) -> None:
    net, candidate = running(Wire()), stranger(1)
    net.wires[0].is_cut = True  # the true path does not replace the candidate meanwhile
    deliver(net, probe(net), candidate)
    challenge = decode_challenge_untrusted(memoryview(opened_by_client(net, net.to_strangers(candidate)[0])))
    net.run(waits)
    deliver(net, sealed(net, challenge.encode(Control.RESPONSE)), candidate)
    assert endpoints(net) == {0: candidate if is_bound else net.source(0)}


@pytest.mark.parametrize("delay", [1.7, 2.4])
def test_a_path_whose_round_trip_is_longer_than_a_challenge_serves_is_bound(delay: float) -> None:
    net = Simnet(Wire(delay=delay))
    traffic = Traffic(net, 10.0)
    traffic.run(30.0, rest=10.0)
    assert endpoints(net) == {0: net.source(0)}
    assert traffic.is_whole(since=net.now - 15.0)
    assert traffic.arrived("down")


def test_a_candidate_is_sent_the_same_bytes_for_3_s_and_then_others() -> None:
    net, candidate = running(Wire(), Wire()), stranger(1)
    net.wires[0].is_cut = net.wires[1].is_cut = True
    tokens = []
    for _ in range(16):
        deliver(net, probe(net, 1), candidate)
        tokens += [decode_challenge_untrusted(memoryview(opened_by_client(net, d))).token for d in net.to_strangers()]
        net.astray.clear()
        net.run(0.26)
    assert len(tokens) == 16
    assert len(set(tokens)) == 2
    assert len(set(tokens[:11])) == 1


def test_at_most_4_challenges_a_second_leave_for_one_path_however_many_candidates_come() -> None:
    net = running(Wire())
    for number in range(200):
        deliver(net, probe(net), stranger(number))
        net.run(0.01)
    assert 7 <= len(net.to_strangers()) <= 9


def test_closing_a_path_in_between_does_not_make_more_challenges() -> None:
    net = running(Wire())
    for number in range(50):
        deliver(net, probe(net, 5, incarnation=7), stranger(number))
        deliver(net, sealed(net, Close(5, CloseReason.INTERFACE_GONE, 0).encode()), net.source(0))
    assert len(net.to_strangers()) == 1


def test_an_older_probe_counts_for_nothing_even_if_it_was_never_seen() -> None:
    net, thief = running(Wire(), Wire()), stranger()
    kept = probe(net)
    net.run(1.0)  # newer ones have come
    deliver(net, kept, thief)
    assert net.to_strangers() == []
    assert net.server.drops["probe not newer"] == 1
    before = net.guest.paths[0].refreshed_at
    deliver(net, kept, net.source(0))
    assert net.guest.paths[0].refreshed_at == before


def test_a_probe_of_an_earlier_session_is_older_than_any_of_the_present_one() -> None:
    net, thief = running(Wire(), Wire()), stranger()
    kept = probe(net)
    net.run(165.0)  # idle, keys are renewed when a probe is due and the next one would come too late
    assert net.guest.previous is not None
    deliver(net, kept, thief)
    assert net.to_strangers() == []


def test_another_address_is_bound_within_an_interval_and_two_round_trips() -> None:
    net = running(Wire(delay=0.05), Wire(delay=0.05))
    Traffic(net, rate=10).start(5.0)
    net.run(1.0)
    net.flush_nat(0)
    net.run(0.25 + 2 * 0.1 + 0.05)
    assert endpoints(net)[0] == net.source(0)


def test_one_endpoint_is_one_path() -> None:
    net = running(Wire(), Wire())
    deliver(net, probe(net, 5), net.source(0))
    net.run(0.05)
    challenge = Challenge(5, 7, net.guest.paths[5].candidate.token(net.now, net.entropy))  # type: ignore[union-attr]
    deliver(net, sealed(net, challenge.encode(Control.RESPONSE)), net.source(0))
    assert endpoints(net)[5] == net.source(0)
    assert endpoints(net)[0] is None
    assert net.guest.paths[0].state is PathState.CANDIDATE
    assert net.guest.paths[0] not in net.guest._carriers(net.now)  # while it has no address it gets nothing
    assert net.guest.sources.get(net.source(0)) is net.guest.paths[5]


def test_a_silent_path_whose_endpoint_is_another_one_now_is_shown_no_life() -> None:
    net = running(Wire(), Wire())
    Traffic(net).start(20.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    net.run(4.0)
    assert net.guest.paths[0].state is PathState.LAPSED
    deliver(net, probe(net, 5), net.source(0))
    challenge = Challenge(5, 7, net.guest.paths[5].candidate.token(net.now, net.entropy))  # type: ignore[union-attr]
    deliver(net, sealed(net, challenge.encode(Control.RESPONSE)), net.source(0))
    assert endpoints(net)[0] is None
    net.run(2.0)
    assert endpoints(net)[0] is None


# -- freshness -------------------------------------------------------------------------------------------------------


def test_a_path_not_refreshed_for_3_s_gets_no_data_while_another_lives() -> None:
    net = running(Wire(), Wire(delay=0.06))
    Traffic(net).start(20.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    net.run(3.3)
    assert net.guest.paths[0].state is PathState.LAPSED
    since = net.now
    net.run(5.0)
    assert data_down(net, 0, since) == 0
    assert data_down(net, 1, since) == 500
    assert 18 <= len(net.controls("down", Control.ECHO, 0, since)) <= 21  # unasked, every 250 ms


def test_data_duplicates_and_forgeries_refresh_no_path() -> None:
    net = running(Wire(), Wire(delay=0.06))
    real = net.guest.paths[0]

    def no_control(side: str, wire: int, datagram: bytes) -> bytes | None:
        plain = net.plaintext("up", datagram) if side == "up" and wire == 0 else b""
        return None if plain and plain[0] < 0x10 else datagram

    net.tap = no_control
    net.guest.paths[1].number = 0  # nothing can be reported of it either
    Traffic(net).start(10.0)
    net.wires[0].cuts_down = True
    net.run(5.0)
    assert real.state is PathState.LAPSED
    assert real.rx > 500


def test_a_path_that_only_works_downwards_is_kept_by_what_the_other_paths_report() -> None:
    net = running(Wire(), Wire(delay=0.06))
    traffic = Traffic(net, rate=25)
    net.wires[0].cuts_up = True
    traffic.start(40.0)
    net.run(40.0)
    assert 0 in net.guest.paths
    assert data_down(net, 0, net.now - 20.0) > 0.8 * 500
    net.run(3.0)
    assert traffic.is_whole()


def test_half_of_one_path_and_the_other_half_of_another_make_a_whole_one() -> None:
    net = running(Wire(), Wire(delay=0.06))
    traffic = Traffic(net, rate=50)
    net.after(1.0, lambda: setattr(net.wires[0], "cuts_up", True))
    net.after(1.2, lambda: setattr(net.wires[1], "cuts_down", True))
    traffic.run(40.0)
    assert traffic.is_whole()


def test_a_record_refreshes_only_by_an_echo_number_not_reported_before_and_really_sent() -> None:
    net = running(Wire(), Wire())
    path = net.guest.paths[0]
    net.wires[0].is_cut = net.wires[1].is_cut = True
    net.run(2.0)
    before = path.refreshed_at
    for newest in (path.reported, path.number + 1, 2**32 - 1, 0):
        deliver(net, probe(net, 1, records=(Record(0, 0, newest),)), net.source(1))
        assert path.refreshed_at == before
    path.number += 1  # one more ECHO, and it was heard
    deliver(net, probe(net, 1, records=(Record(0, 0, path.number),)), net.source(1))
    assert path.refreshed_at == net.now


def test_an_idle_path_gets_16_kib_until_the_next_probe_and_loses_nothing() -> None:
    net = running(Wire())
    net.run(60.0)  # idle: 25 s between probes
    net.run(25.0 - (net.now - net.guest.paths[0].refreshed_at) + 10.0)
    assert net.guest.paths[0].state is PathState.IDLE
    since = net.now
    net.tap = lambda side, _, datagram: None if side == "up" else datagram  # the next probe does not come yet
    net.server_sends(*(ipv4(TARGET, CLIENT, bytes(1000) + bytes([number])) for number in range(100)))
    net.run(0.5)
    sent = sum(len(datagram) for _, datagram in net.sent(TRANSPORT, "down", 0, since))
    assert 16 * 1024 - 1100 <= sent <= 16 * 1024
    net.tap = None
    net.run(1.0)
    assert len(net.at_client) == 100  # the client has probed at once


def test_an_idle_path_of_two_is_bounded_too_while_the_other_one_is_fresh() -> None:
    net = running(Wire(), Wire())
    net.run(60.0)
    net.run(25.0 - (net.now - net.guest.paths[0].refreshed_at) + 10.0)
    assert net.guest.paths[0].state is PathState.IDLE
    since = net.now
    net.tap = lambda side, _, datagram: None if side == "up" else datagram
    deliver(net, probe(net, 1), net.source(1))
    net.server_sends(*(ipv4(TARGET, CLIENT, bytes(1000) + bytes([number])) for number in range(100)))
    net.run(0.5)
    assert sum(len(datagram) for _, datagram in net.sent(TRANSPORT, "down", 0, since)) <= 16 * 1024
    assert len(net.at_client) == 100


def test_a_tunnel_that_wakes_from_idleness_by_the_server_delivers_all() -> None:
    net = running(Wire(delay=0.05), Wire(delay=0.1))
    net.run(100.0)
    traffic = Traffic(net, rate=200, size=1000)
    traffic.run(2.0)
    assert traffic.is_whole()


def test_if_no_path_is_fresh_one_copy_goes_to_each_refreshed_in_the_last_15_s_and_then_none() -> None:
    net = running(Wire(), Wire(delay=0.06))
    Traffic(net, rate=20).start(60.0)
    net.run(1.0)
    net.wires[0].cuts_up = net.wires[1].cuts_up = True
    cut = net.now
    net.run(14.0)
    assert net.guest.paths[0].state is PathState.LAPSED
    assert data_down(net, 0, cut) >= 13 * 20
    assert data_down(net, 1, cut) >= 13 * 20
    net.run(2.0)
    since = net.now
    net.run(10.0)
    assert data_down(net, None, since) == 0


def test_a_path_silent_for_30_s_is_forgotten() -> None:
    net = running(Wire(), Wire())
    Traffic(net, rate=10).start(60.0)
    net.run(1.0)
    net.wires[0].is_cut = True
    net.run(29.0)
    assert 0 in net.guest.paths
    net.run(1.5)
    assert 0 not in net.guest.paths
    assert net.guest.sources.get(net.source(0)) is None


def test_an_idle_path_is_forgotten_after_twice_the_interval_it_announced() -> None:
    net = running(Wire())
    net.run(60.0)
    net.run(25.1 - (net.now - net.guest.paths[0].refreshed_at))
    net.wires[0].is_cut = True
    since = net.guest.paths[0].refreshed_at
    net.run(since + 54.9 - net.now)
    assert 0 in net.guest.paths
    net.run(0.2)
    assert 0 not in net.guest.paths


def test_unasked_echoes_begin_again_when_a_lapsed_tunnel_is_used_again() -> None:
    net = running(Wire())
    net.run(60.0)
    net.run(25.1 - (net.now - net.guest.paths[0].refreshed_at))
    net.wires[0].cuts_up = True
    net.run(31.0)
    assert net.guest.paths[0].state is PathState.LAPSED
    Traffic(net, rate=10).start(10.0)
    since = net.now
    net.run(5.0)
    assert len(net.controls("down", Control.ECHO, 0, since)) >= 8


def test_a_standby_path_gets_data_only_when_no_other_is_fresh() -> None:
    net = running(Wire(), Wire())
    net.client.paths[1].use = Use.STANDBY
    Traffic(net).start(30.0)
    net.run(1.0)
    since = net.now
    net.run(3.0)
    assert data_down(net, 1, since) == 0
    net.wires[0].is_cut = True
    net.run(3.5)
    since = net.now
    net.run(1.0)
    assert data_down(net, 1, since) == 100
    assert data_down(net, 0, since) == 0


def test_a_path_for_probes_only_gets_no_data() -> None:
    net = running(Wire(), Wire())
    net.client.paths[1].use = Use.PROBES
    Traffic(net).start(3.0)
    net.run(1.0)
    since = net.now
    net.run(1.0)
    assert data_down(net, 1, since) == 0
    assert net.guest.paths[1].state is PathState.FRESH


# -- HELLO and CLOSE -------------------------------------------------------------------------------------------------


def hello(net: Simnet, **change: Any) -> bytes:
    values: dict[str, Any] = {
        "is_answer": False, "version": 1, "oldest": 1, "capabilities": Capability.MULTIPATH,
        "instance": net.client._instance, "mtu": 1420, "mode": 0, "paths": 2, "serial": 3,
    }  # fmt: skip
    return sealed(net, Hello(**values | change).encode())


def test_two_machines_with_one_key_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    net, elsewhere = running(Wire()), stranger()
    own = net.client._instance
    deliver(net, hello(net, instance=own + 1), elsewhere)
    assert "one key" not in caplog.text, "a restart is none"
    for _ in range(3):
        deliver(net, hello(net, instance=own), net.source(0))
        deliver(net, hello(net, instance=own + 1), elsewhere)
    assert caplog.text.count("two machines with one key") == 1


def test_a_hello_is_answered_to_where_it_came_from_with_the_addresses_and_the_serial() -> None:
    net, somewhere = running(Wire()), stranger()
    deliver(net, hello(net, serial=77), somewhere)
    answers = [opened_by_client(net, datagram) for datagram in net.to_strangers(somewhere)]
    assert [plain[0] for plain in answers] == [Control.HELLO, Control.ADDRESS]
    answer = decode_hello_untrusted(memoryview(answers[0]))
    assert answer.is_answer
    assert answer.serial == 77
    assert answer.mtu == 1420
    assert sum(map(len, net.to_strangers())) <= 3 * 64


def test_a_client_is_taken_for_stock_until_it_says_hello() -> None:
    net = Simnet(Wire(), Wire())
    net.tap = lambda side, _, datagram: None if side == "up" and len(datagram) == 64 else datagram
    net.run(2.0)
    assert not net.guest.is_multipath
    assert net.server.drops["control message before HELLO"] > 0
    assert net.guest.paths == {}


def test_another_instance_resets_the_paths_and_the_same_one_does_not() -> None:
    net = running(Wire(), Wire())
    deliver(net, hello(net, serial=50), net.source(0))
    assert len(net.guest.paths) == 2
    deliver(net, hello(net, serial=51, instance=12345), net.source(0))
    assert net.guest.paths == {}
    assert net.guest.sources.get(net.source(1)) is None
    net.run(1.0)
    assert len(net.guest.paths) == 2  # the next probes bind them again


def test_another_instance_that_offers_no_paths_is_a_stock_peer() -> None:
    net = running(Wire(), Wire())
    deliver(net, hello(net, instance=12345, capabilities=Capability(0)), net.source(1))
    assert not net.guest.is_multipath
    deliver(net, sealed(net, ipv4(CLIENT, TARGET, b"x")), net.source(1))
    since = net.now
    net.server_sends(ipv4(TARGET, CLIENT, b"y"))
    assert data_down(net, 1, since) == 1
    assert data_down(net, 0, since) == 0


@pytest.mark.parametrize(("version", "oldest"), [(9, 2), (0, 0)])
def test_an_incompatible_version_is_said_once_and_gets_stock_behaviour(
    version: int, oldest: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = running(Wire(), Wire())
    for serial in range(5):
        deliver(net, hello(net, instance=5, version=version, oldest=oldest, serial=serial), net.source(0))
    assert not net.guest.is_multipath
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert f"version {oldest} to {version}" in said[0]
    assert "we speak 1" in said[0]


def test_a_later_version_that_understands_ours_is_welcome() -> None:
    net = running(Wire())
    deliver(net, hello(net, instance=5, version=7, oldest=1), net.source(0))
    assert net.guest.is_multipath


def test_a_hello_of_an_earlier_session_that_comes_late_changes_nothing() -> None:
    net = running(Wire(), Wire())
    late = hello(net, instance=999, mtu=1280)  # of a run that has ended since
    net.restart_client()
    net.run(3.0)
    assert net.guest.previous is not None
    bound = endpoints(net)
    deliver(net, late, net.source(1))
    assert endpoints(net) == bound
    assert net.guest.tunnel_mtu == 1420


def test_the_newest_hello_counts_not_the_last_to_arrive() -> None:
    net = running(Wire())
    older, newer = hello(net, mtu=1280, serial=8), hello(net, mtu=1400, serial=9)
    deliver(net, newer, net.source(0))
    deliver(net, older, net.source(0))
    assert net.guest.tunnel_mtu == 1400


def test_a_close_of_an_earlier_session_that_comes_late_changes_nothing() -> None:
    net = running(Wire(), Wire())
    late = sealed(net, Close(WHOLE_SESSION, 0).encode())
    net.restart_client()
    net.run(3.0)
    deliver(net, late, net.source(1))
    assert len(net.guest.paths) == 2


def test_a_goodbye_makes_the_server_forget_the_paths() -> None:
    net = running(Wire(), Wire())
    net.stop("client")
    net.is_client_awake = False
    net.run(0.2)
    assert net.guest.paths == {}
    net.server_sends(ipv4(TARGET, CLIENT, b"x"))
    assert data_down(net, None, net.now) == 0


def test_one_path_is_closed_by_its_incarnation_only() -> None:
    net = running(Wire(), Wire())
    incarnation = net.client.paths[1].incarnation
    deliver(net, sealed(net, Close(1, 2, incarnation + 1).encode()), net.source(0))
    assert set(net.guest.paths) == {0, 1}
    deliver(net, sealed(net, Close(1, 2, incarnation).encode()), net.source(0))
    assert set(net.guest.paths) == {0}


def test_what_a_hello_said_is_inherited_by_later_sessions() -> None:
    net = running(Wire(), Wire())
    net.tap = lambda side, _, datagram: (
        None if side == "up" and (net.plaintext("up", datagram) or b"-")[0] == Control.HELLO else datagram
    )
    traffic = Traffic(net, rate=5)
    traffic.run(122.0)
    assert net.guest.current is not None
    assert net.guest.current.serial == 2
    assert net.guest.is_multipath
    assert traffic.is_whole()


def test_a_client_that_says_hello_no_more_becomes_a_stock_peer() -> None:
    net = running(Wire())
    net.use_stock_client(BookPeer(CLIENT_KEY, SERVER_PUBLIC, PSK, endpoint=0, newer_than=2e9))
    traffic = Traffic(net, rate=10)
    traffic.run(130.0)
    assert not net.guest.is_multipath
    assert traffic.lost("down", since=1003.0 + 125.0) == 0  # the second session without HELLO, and 3 s


def test_a_path_says_what_it_saw_of_the_client() -> None:
    net = running(Wire(delay=0.05), Wire())
    Traffic(net).run(2.0)
    _, datagram = next(
        (at, d)
        for at, d in reversed(net.sent(TRANSPORT, "down", 0))
        if (net.plaintext("down", d) or b"-")[0] == Control.ECHO
    )
    echo = decode_echo_untrusted(memoryview(opened_by_client(net, datagram)))
    assert echo.port == net.wires[0].nat_port
    assert echo.address.endswith(bytes([192, 0, 2, 1]))
    assert [record.path for record in echo.records] == [1]
    assert net.client.paths[0].seen_as == ("192.0.2.1", 40000)


def test_an_echo_repeats_the_probe_it_answers() -> None:
    net = running(Wire())
    _, up = [(a, d) for a, d in net.sent(TRANSPORT, "up") if (net.plaintext("up", d) or b"-")[0] == Control.PROBE][-2]
    asked = decode_probe_untrusted(memoryview(net.plaintext("up", up) or b""))
    echoes = [net.plaintext("down", d) for _, d in net.sent(TRANSPORT, "down")]
    found = [decode_echo_untrusted(memoryview(e)) for e in echoes if e and e[0] == Control.ECHO]
    assert any(e.seq == asked.seq and e.probe_us == asked.sent_us and e.incarnation == asked.incarnation for e in found)


def test_more_than_256_probes_a_second_on_a_path_are_not_answered() -> None:
    net = running(Wire())
    net.run(1003.5 - net.now if net.now < 1003.5 else 0.0)
    net.now = float(int(net.now) + 1)
    since = net.now
    for _ in range(400):
        deliver(net, probe(net), net.source(0))
    assert len(net.controls("down", Control.ECHO, 0, since)) == 256


def test_the_server_never_starts_a_handshake_with_a_multipath_client() -> None:
    net = running(Wire(), Wire())
    net.is_client_awake = False
    for second in range(200):
        net.after(second, lambda: net.server_sends(ipv4(TARGET, CLIENT, b"x")))
    net.run(700.0)
    assert net.sent(INITIATION, "down") == []
    assert net.guest.current is None  # 540 s after the last handshake nothing is left of it


def test_inner_packets_with_another_source_are_dropped() -> None:
    net = running(Wire())
    before = len(net.at_server)
    for source in ("10.0.1.3", "10.0.1.1", TARGET, "0.0.0.0"):  # noqa: S104
        deliver(net, sealed(net, ipv4(source, TARGET, b"x")), net.source(0))
    assert len(net.at_server) == before
    assert net.server.drops["source not allowed"] == 4


def test_the_status_of_a_client_counts_its_paths() -> None:
    net = running(Wire(), Wire(delay=0.06))
    Traffic(net).run(5.0)
    status = net.server.status(net.now)["peers"][0]
    assert status["state"] == "up"
    assert status["multipath"]
    assert [path["state"] for path in status["paths"]] == ["fresh", "fresh"]
    assert status["paths"][0]["first_share"] == 1.0
    assert status["receipts"]["up"]["lost"] == 0
    assert status["traffic"]["up"]["packets"] == 500
    assert net.server._peers[CLIENT_PUBLIC].record.name == "sim"


# -- two uplinks behind one NAT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [0.02, 0.15, 0.4])
def test_two_uplinks_that_swap_their_outer_addresses_lose_nothing(slow: float) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=slow))
    net.run(2.0)
    traffic = Traffic(net, 200.0)
    traffic.start(12.0)
    for _ in range(3):
        net.run(2.0)
        one, other = net.wires
        one.nat_host, other.nat_host, one.nat_port, other.nat_port = (
            other.nat_host, one.nat_host, other.nat_port, one.nat_port,
        )  # fmt: skip
    net.run(9.0)
    assert not [to for _, to, _ in net.astray if to is None]
    assert endpoints(net) == {0: net.source(0), 1: net.source(1)}
    assert traffic.lost("up") == 0
    assert traffic.lost("down", since=net.now - 8.0) == 0


def test_a_probe_of_the_clients_former_run_that_comes_late_counts_for_nothing() -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.4))
    net.run(2.0)
    Traffic(net, 100.0).run(10.0)
    old = sealed(net, Probe(1, net.client.paths[1].incarnation, 9999, 250, 0, 1, 1, 1000).encode())
    former = net.guest._client_instance
    net.restart_client()
    while net.guest._client_instance == former:
        net.run(0.001)
    before = net.server.drops["probe not newer"]
    deliver(net, old, net.source(1))
    assert net.server.drops["probe not newer"] == before + 1
    net.run(1.0)
    Traffic(net, 100.0).run(4.0, rest=9.0)
    (status,) = net.server.status(net.now)["peers"]
    assert status["receipts"]["up"]["lost"] == 0
    assert net.client.status(net.now)["receipts"]["up"]["lost"] == 0
