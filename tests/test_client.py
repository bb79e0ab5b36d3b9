"""The client: paths that come and go, joining with every crash in between, what the host and the user are told."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, ip_address
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.client import Client, Membership
from mptunnel.config import (
    ClientSettings,
    DnsMode,
    Fields,
    Gateway,
    JoinToken,
    Link,
    ServerRecord,
    TokenRecord,
    TokenState,
    new_token,
    parse_wireguard,
    peers_from_document,
    tokens_from_document,
    wireguard_text,
)
from mptunnel.errors import ConfigError, RefusedError, UnreachableError
from mptunnel.events import ClosePath, Notice, NoticeKind, OpenPath, Resolve, RunScript, SaveState
from mptunnel.messages import INITIATION, TRANSPORT, Control
from mptunnel.packet import PLAIN
from mptunnel.path import PathState
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    CLIENT_PUBLIC,
    PSK,
    SERVER_ADDRESS,
    SERVER_KEY,
    SERVER_PUBLIC,
    TARGET,
    TUNNEL4,
    TUNNEL6,
    WALL,
    Simnet,
    Traffic,
    Wire,
    ipv4,
    ipv6,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mptunnel.events import Event, Job

CLIENT = str(TUNNEL4[2])
UP = ipv4(CLIENT, TARGET, b"x")
DNS = (IPv4Address("9.9.9.9"),)


def token_for(server: bytes = SERVER_PUBLIC, seed: int = 8, hours: float = 1.0) -> tuple[JoinToken, TokenRecord]:
    return new_token(server, "test", hours, WALL, random.Random(seed).randbytes)


def joining(*wires: Wire, **more: Any) -> Simnet:
    token, record = token_for()
    return Simnet(*wires, admitted=False, said_hello=False, token=token, tokens=[record], **more)


def joined(net: Simnet) -> bool:
    files = [document for name, document in net.saved.items() if name.startswith("client/servers/")]
    return bool(files) and files[0]["joined"] and net.client._membership.token is None


def stop_of(net: Simnet) -> Exception:
    (stop,) = net.stopped
    return stop.error


# -- joining ---------------------------------------------------------------------------------------------------------


def test_a_client_with_a_token_joins_and_runs_as_itself_at_once() -> None:
    net = joining()
    traffic = Traffic(net)
    net.run(0.5)
    assert joined(net)
    traffic.run(3.0)
    assert traffic.is_whole()
    (peer,) = peers_from_document(net.saved["server/peers"])
    assert (peer.name, peer.public_key) == ("sim", CLIENT_PUBLIC)
    (token,) = tokens_from_document(net.saved["server/tokens"])
    assert token.state is TokenState.SPENT
    (record,) = [ServerRecord.from_document(d) for n, d in net.saved.items() if n.startswith("client/servers/")]
    assert (record.public_key, record.psk, record.said_hello) == (SERVER_PUBLIC, peer.psk, True)
    assert net.stopped == []


def test_once_joined_the_bare_command_is_enough() -> None:
    net = joining()
    net.run(1.0)
    net.token = None
    net.restart_client()
    traffic = Traffic(net)
    net.run(0.5)
    traffic.run(2.0)
    assert traffic.is_whole()
    assert len(peers_from_document(net.saved["server/peers"])) == 1


def test_joining_works_on_the_one_path_that_works_and_through_loss() -> None:
    net = joining(Wire(is_cut=True), Wire(loss_up=0.5, loss_down=0.5), Wire(cuts_down=True), seed=3)
    net.run(14.0)
    assert joined(net)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_crash_at_any_moment_of_joining_is_completed_by_the_same_command(side: str) -> None:
    """Kill after each single thing that is done or sent, with the saves before it done and those after it lost."""
    for step in range(40):
        net = joining(Wire(delay=0.01))
        net.held = []
        for _ in range(step):  # saves are done one at a time
            if net.held:
                job = net.held.pop(0)
                net._save(job, None)
                net.turn()
            else:
                net.run(0.005)
        if side == "client":
            net.restart_client()
        else:
            net.restart_server()
        net.release()  # the other side goes on
        net.held = None
        net.run(8.0)
        assert joined(net), step
        assert net.peer.is_multipath, step
        assert len(peers_from_document(net.saved["server/peers"])) == 1, step
        assert tokens_from_document(net.saved["server/tokens"])[0].state is TokenState.SPENT, step
        assert net.stopped == [], step


def test_enrolled_is_believed_only_when_it_is_saved_here_too() -> None:
    net = joining(Wire())
    net.run(0.05)
    net.failing = {"client/servers/" + ServerRecord(SERVER_PUBLIC, b"").file_name}
    net.run(2.0)
    assert isinstance(stop_of(net), ConfigError)
    assert "cannot save that we joined" in str(stop_of(net))
    assert net.client._membership.token is not None


def test_without_any_answer_for_15_s_joining_ends_with_exit_code_6() -> None:
    net = joining(server_starts=False)
    net.run(14.9)
    assert net.stopped == []
    net.run(60.0)
    error = stop_of(net)
    assert isinstance(error, UnreachableError)
    assert error.exit_code == 6
    assert "sim.example:5000" in str(error)


def test_without_a_token_it_never_ends() -> None:
    net = Simnet(Wire(), server_starts=False)
    net.run(3600.0)
    assert net.stopped == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda record: setattr(record, "state", TokenState.REVOKED), "taken back"),
        (lambda record: setattr(record, "expires", WALL - 1), "expired"),
        (lambda record: setattr(record, "state", TokenState.SPENT), "used already"),
    ],
)
def test_a_refusal_ends_with_exit_code_7_and_says_why(spoil: Callable[[TokenRecord], None], words: str) -> None:
    token, record = token_for()
    record.ended = WALL
    spoil(record)
    net = Simnet(Wire(), admitted=False, said_hello=False, token=token, tokens=[record])
    net.run(2.0)
    error = stop_of(net)
    assert isinstance(error, RefusedError)
    assert error.exit_code == 7
    assert words in str(error)


def test_a_stolen_token_shows_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    token, record = token_for()
    net = Simnet(Wire(), admitted=False, said_hello=False, token=token, tokens=[record])
    net.server.register._tokens[0].state = TokenState.BOUND
    net.server.register._tokens[0].bound_to = b"\x41" * 32
    net.run(2.0)
    assert "stolen" in str(stop_of(net))
    assert "is refused: used" in caplog.text


def test_a_server_that_cannot_save_is_tried_again_for_a_minute() -> None:
    net = joining(Wire())
    net.failing = {"server/tokens"}
    net.run(30.0)
    assert net.stopped == []
    net.failing = set()
    net.run(6.0)
    assert joined(net)
    net = joining(Wire())
    net.failing = {"server/tokens"}
    net.run(61.0)
    assert isinstance(stop_of(net), RefusedError)
    assert "could not save" in str(stop_of(net))


def test_no_data_is_sent_under_a_token() -> None:
    net = joining(Wire())
    net.held = []
    net.client_sends(UP)
    net.run(5.0)
    net.client_sends(UP)
    assert net.at_server == []
    assert net.peer.packets_sent == 0


def test_a_token_of_another_server_gets_no_answer() -> None:
    token, record = token_for(server=b"\x09" + bytes(31))
    net = Simnet(Wire(), admitted=False, said_hello=False, tokens=[record])
    net.token = token
    net.new_client(ServerRecord(token.server_public, bytes(32)), token)
    net.run(16.0)
    assert isinstance(stop_of(net), UnreachableError)


# -- paths -----------------------------------------------------------------------------------------------------------


def link(name: str, *addresses: str, up: bool = True, index: int = 2, gateway: str | None = "192.168.0.1") -> Link:
    found = tuple(IPv6Interface(a) if ":" in a else IPv4Interface(a) for a in addresses)
    via = Gateway(IPv4Address(gateway), 100) if gateway else None
    return Link(name, index, "", up, found, via, None, 1500)


def client_of(*names: str, servers: tuple[str, ...] = ("198.51.100.1",), **settings: Any) -> Client:
    rng = random.Random(2)
    addresses = [IPv6Address(text) if ":" in text else IPv4Address(text) for text in servers]
    return Client(
        ClientSettings(server="sim.example", interfaces=names, **settings),
        Membership(ServerRecord(SERVER_PUBLIC, PSK, said_hello=True), CLIENT_KEY),
        addresses, reserved=0, kept=(), entropy=rng.randbytes, rng=rng, now=1000.0, wall=WALL,
    )  # fmt: skip


def done(client: Client, events: list[Event], now: float = 1000.0) -> list[Event]:
    """Do what is asked; return what that led to."""
    for event in events:
        match event:
            case OpenPath():
                client.path_opened(event.path, event.port or 40000 + event.path, now)
            case RunScript() | SaveState():
                client.job_done(event, None, now)
    return client.events()


def settled(client: Client, now: float = 1000.0) -> list[Event]:
    """Do all that is asked, and what that leads to; return all of it but what is saved and told."""
    found: list[Event] = []
    events = client.events()
    while events:
        found += events
        events = done(client, events, now)
    return [event for event in found if not isinstance(event, SaveState | Notice)]


def test_a_path_gets_its_rule_first_and_then_its_socket() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    (rule,) = [event for event in client.events() if isinstance(event, RunScript)]
    assert rule.verb == "path-up"
    assert rule.values["interface"] == "wan1"
    assert rule.values["gateway"] == IPv4Address("192.168.0.1")
    (opening,) = done(client, [rule])
    assert opening == OpenPath(0, "wan1", IPv4Address("192.168.0.2"), (SERVER_ADDRESS, 5000), 0)


def test_a_renumbered_path_gets_a_new_socket_on_the_same_local_port() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    settled(client)
    before = client.paths[0].incarnation
    client.links_changed([link("wan1", "192.168.0.77/24")], 1001.0)
    close, rule, opening = settled(client)
    assert close == ClosePath(0)
    assert isinstance(rule, RunScript)
    assert opening == OpenPath(0, "wan1", IPv4Address("192.168.0.77"), (SERVER_ADDRESS, 5000), 40000)
    assert client.paths[0].incarnation != before


def test_another_gateway_changes_the_rule_and_keeps_the_socket() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    settled(client)
    client.links_changed([link("wan1", "192.168.0.2/24", gateway="192.168.0.254")], 1001.0)
    (rule,) = settled(client)
    assert isinstance(rule, RunScript)
    assert rule.values["gateway"] == IPv4Address("192.168.0.254")


def test_links_that_did_not_change_ask_for_nothing() -> None:
    client = client_of("wan1")
    links = [link("wan1", "192.168.0.2/24")]
    client.links_changed(links, 1000.0)
    settled(client)
    client.links_changed(list(links), 1001.0)
    client.links_changed([*links, link("docker0", "172.17.0.1/16", gateway=None)], 1002.0)
    assert client.events() == []


def test_a_path_that_goes_takes_its_rule_with_it_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    settled(client)
    client.links_changed([link("wan1", "192.168.0.2/24", up=False)], 1001.0)
    events = settled(client)
    assert events == [ClosePath(0), RunScript("path-down", {"path": 0})]
    assert client.paths[0].state is PathState.WAITING
    client.links_changed([], 1002.0)
    assert client.events() == []
    assert len([r for r in caplog.records if "path wan1 waits" in r.getMessage()]) == 1
    client.links_changed([link("wan1", "192.168.0.2/24", index=9)], 1003.0)
    assert [type(event) for event in settled(client)] == [RunScript, OpenPath]


def test_an_uplink_that_is_not_there_is_named_with_the_nearest_and_taken_up_when_it_appears(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = client_of("wan1", "wwan0")
    client.links_changed([link("wan2", "192.168.0.2/24"), link("wwan0", "192.168.1.2/24", index=3)], 1000.0)
    assert "-i wan1 is not there; did you mean wan2?" in caplog.text
    settled(client)
    assert not client.paths[0].is_open
    assert client.paths[1].is_open
    client.links_changed([link("wan1", "192.168.0.2/24"), link("wwan0", "192.168.1.2/24", index=3)], 1001.0)
    settled(client)
    assert client.paths[0].is_open


def test_a_socket_that_cannot_be_opened_is_tried_again_every_second_and_the_other_path_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    traffic = Traffic(net)
    traffic.start(4.0)
    net.open.pop(0)
    net.client.path_failed(0, "ENODEV", net.now)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "path w0: ENODEV; trying again every 1 s"
    ]
    net.run(0.99)
    assert 0 not in net.open
    net.run(0.2)
    assert 0 in net.open
    assert net.client.paths[0].errors == {"ENODEV": 1}
    net.run(6.0)
    assert traffic.is_whole()


def test_an_error_on_one_path_is_that_paths_affair_only() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)

    def tap(side: str, number: int, datagram: bytes) -> bytes | None:
        if side == "up" and number == 0:
            net.client.not_sent(0, 1, len(datagram), "ENETUNREACH", net.now)
            return None
        return datagram

    net.tap = tap
    traffic = Traffic(net)
    traffic.run(3.0)
    assert traffic.is_whole()
    assert net.client.paths[0].errors["ENETUNREACH"] > 300
    assert net.client.paths[1].errors == {}


def test_a_path_reported_open_after_its_interface_has_gone_is_closed_again() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    opening = done(client, client.events())
    client.links_changed([], 1000.5)
    client.events()
    client.path_opened(0, 40000, 1001.0)
    assert client.events() == [ClosePath(0)]
    assert isinstance(opening[0], OpenPath)
    assert not client.paths[0].is_open


def test_an_uplink_that_takes_the_number_of_one_that_has_gone_leaves_no_socket_open() -> None:
    client = client_of()
    first = [link(f"e{n}", f"192.168.{n}.2/24", index=n + 2) for n in range(8)]
    client.links_changed(first, 1000.0)
    settled(client)
    client.links_changed([*first[1:], link("new", "192.168.9.2/24", index=20)], 1001.0)
    events = settled(client)
    assert ClosePath(0) in events
    assert [event.interface for event in events if isinstance(event, OpenPath)] == ["new"]
    assert client.paths[0].name == "new"


def test_a_server_known_by_both_families_is_tried_by_the_other_one_where_the_first_is_mute() -> None:
    client = client_of("wan1", servers=("198.51.100.1", "2001:db8::1"))
    both = Link(
        "wan1", 2, "", True, (IPv4Interface("192.168.0.2/24"), IPv6Interface("2001:db8:1::2/64")),
        Gateway(IPv4Address("192.168.0.1"), 100), Gateway(IPv6Address("fe80::1"), 100), 1500,
    )  # fmt: skip
    client.links_changed([both], 1000.0)
    settled(client)
    assert client.paths[0].address == IPv4Address("192.168.0.2")
    now = 1000.0
    while now < 1006.0:
        now = client.next_deadline()
        client.handle_timeout(now)
        settled(client, now)
    assert client.paths[0].address == IPv6Address("2001:db8:1::2")


@pytest.mark.interpreted
def test_a_mute_path_tries_the_other_version_though_the_tunnel_is_up_and_ever_more_rarely() -> None:
    client = client_of("wan1", "wan2", servers=("198.51.100.1", "2001:db8::1"))
    both = [
        Link(
            name, 2 + n, "", True, (IPv4Interface(f"192.168.{n}.2/24"), IPv6Interface(f"2001:db8:{n}::2/64")),
            Gateway(IPv4Address(f"192.168.{n}.1"), 100), Gateway(IPv6Address("fe80::1"), 100), 1500,
        )
        for n, name in enumerate(("wan1", "wan2"))
    ]  # fmt: skip
    client._peer.is_ours = True
    client._whole_state = lambda now: "up"  # type: ignore[method-assign]  # noqa: ARG005
    client.links_changed(both, 1000.0)
    opened: list[tuple[float, int, int]] = []
    now = 1000.0
    while now < 1200.0:
        new = [event for event in settled(client, now) if isinstance(event, OpenPath)]
        opened += [(now, event.path, event.address.version) for event in new]
        client.paths[0].state = PathState.UP
        now += 0.25
        client.handle_timeout(now)
    assert [version for _, path, version in opened if path == 0] == [4]
    times = [at for at, path, _ in opened if path == 1]
    assert [version for _, path, version in opened if path == 1] == [4, 6, 4, 6, 4, 6, 4][: len(times)]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits == [pytest.approx(wait, abs=0.6) for wait in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0)]


def test_a_socket_that_goes_on_failing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    now, tries, notices = 1000.0, 0, []
    while now < 1030.0:
        events = client.events()
        notices += [event for event in events if isinstance(event, Notice)]
        for event in events:
            if isinstance(event, RunScript):
                client.job_done(event, None, now)
            elif isinstance(event, OpenPath):
                tries += 1
                client.path_failed(event.path, "ENETUNREACH" if now < 1020.0 else "EPERM", now)
        now += 0.1
        client.handle_timeout(now)
    assert tries > 25
    told = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert told == [f"path wan1: {why}; trying again every 1 s" for why in ("ENETUNREACH", "EPERM")]
    assert len([notice for notice in notices if notice.kind is NoticeKind.PATH_WAITING]) == 2


def test_the_next_address_of_the_server_is_tried_when_every_path_was_silent_for_30_s() -> None:
    client = client_of("wan1", servers=("198.51.100.1", "198.51.100.2"))
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    opened = []
    now = 1000.0
    while now < 1070.0:
        opened += [event for event in settled(client, now) if isinstance(event, OpenPath)]
        now = client.next_deadline()
        client.handle_timeout(now)
    assert tried(opened) == ["198.51.100.1", "198.51.100.2", "198.51.100.1"]


def test_the_name_is_looked_up_every_hour_and_a_new_address_is_kept() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    settled(client)
    client._servers.answered()  # else it would be looked up sooner
    asked: list[Resolve] = []
    now = 1000.0
    while not asked:
        now = client.next_deadline()
        client.handle_timeout(now)
        asked = [event for event in client.events() if isinstance(event, Resolve)]
    assert now == 1000.0 + 3600.0
    client.job_done(asked[0], (SERVER_ADDRESS, IPv4Address("198.51.100.9")), now)
    saves = [event for event in client.events() if isinstance(event, SaveState)]
    assert isinstance(saves[-1].document, dict)
    assert saves[-1].document["addresses"] == ["198.51.100.1", "198.51.100.9"]
    client.job_done(asked[0], OSError("no such name"), now)
    assert client.events() == []


def test_a_name_that_does_not_resolve_at_start_is_asked_again_every_2_s() -> None:
    client = client_of("wan1", servers=())
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    settled(client)
    client.handle_timeout(1002.0)
    (asked,) = [event for event in client.events() if isinstance(event, Resolve)]
    client.job_done(asked, (SERVER_ADDRESS,), 1002.1)
    assert [event.server[0] for event in settled(client, 1002.1) if isinstance(event, OpenPath)] == [SERVER_ADDRESS]


def tried(opened: list[OpenPath]) -> list[str]:
    """Return the server's addresses, one after the other."""
    return [server for server, _ in groupby(str(event.server[0]) for event in opened)]


def lived(client: Client, now: float, until: float, *named: str) -> tuple[list[float], list[OpenPath]]:
    """Let time pass; return when the server's name was looked up, which gave what is `named`, and what was opened."""
    answer = tuple(map(ip_address, named)) or (SERVER_ADDRESS,)
    asked: list[float] = []
    opened: list[OpenPath] = []
    while now < until:
        for event in settled(client, now):
            if isinstance(event, Resolve):
                asked.append(now)
                client.job_done(event, answer, now)
            elif isinstance(event, OpenPath):
                opened.append(event)
        now = client.next_deadline()
        if now < until:
            client.handle_timeout(now)
    return asked, opened


def test_a_server_that_is_silent_is_looked_up_ever_more_rarely_for_it_may_have_moved() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    asked, opened = lived(client, 1000.0, 2200.0)
    assert asked == [1005.0, 1065.0, 1185.0, 1425.0, 1725.0, 2025.0]
    assert tried(opened) == [str(SERVER_ADDRESS)]


def test_a_server_that_moved_while_the_client_was_offline_is_found_in_the_first_seconds_on_line() -> None:
    client = client_of("wan1")
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    lived(client, 1000.0, 1100.0)
    client.links_changed([], 1100.0)
    asked, _ = lived(client, 1100.0, 10000.0)
    assert max(later - earlier for earlier, later in pairwise(asked)) == pytest.approx(300.0)
    client.links_changed([link("wan1", "192.168.7.2/24")], 10000.0)
    asked, opened = lived(client, 10000.0, 10100.0, "198.51.100.77")
    assert asked[:2] == [10005.0, 10065.0]
    assert tried(opened) == [str(SERVER_ADDRESS), "198.51.100.77"]


def test_only_a_path_that_the_host_has_given_or_moved_is_a_reason_to_look_the_server_up_sooner() -> None:
    client = client_of("wan1", servers=("198.51.100.1", "198.51.100.2"))
    client.links_changed([link("wan1", "192.168.0.2/24")], 1000.0)
    asked, opened = lived(client, 1000.0, 1100.0, "198.51.100.1", "198.51.100.2")
    assert len(tried(opened)) == 4  # the addresses in turn
    assert asked == [1005.0, 1065.0]
    client.links_changed([link("wan1", "192.168.7.2/24")], 1100.0)
    asked, _ = lived(client, 1100.0, 1110.0)
    assert asked == [1105.0]


def test_a_lookup_that_was_begun_offline_and_hangs_is_followed_by_another_one_as_soon_as_it_has_failed() -> None:
    client = client_of("wan1")
    client.links_changed([], 1000.0)
    client.handle_timeout(1030.0)
    (hanging,) = [event for event in client.events() if isinstance(event, Resolve)]
    client.links_changed([link("wan1", "192.168.0.2/24")], 1031.0)
    assert lived(client, 1031.0, 1048.0)[0] == []
    client.job_done(hanging, OSError("timed out"), 1048.0)
    (at,) = lived(client, 1048.0, 1060.0)[0]
    assert at <= 1053.0


MOVED, PORTAL, OTHER_PORTAL = (IPv4Address(f"198.51.100.{n}") for n in (77, 200, 201))


def kept_addresses(net: Simnet) -> list[str]:
    (addresses,) = [document["addresses"] for name, document in net.saved.items() if name.startswith("client/servers/")]
    return list(addresses)


def in_use(net: Simnet) -> set[Any]:
    return {way.server for way in net.client._ways.values()}


def test_where_the_server_was_before_it_moved_is_forgotten_as_soon_as_it_answers_where_it_is() -> None:
    net = Simnet()
    net.run(5.0)
    net.named, net.server_at = (MOVED,), {MOVED}
    net.run(60.0)
    assert net.client._state == "up"
    assert net.client._servers.known == [MOVED]
    assert kept_addresses(net) == [str(MOVED)]
    net.server_at = set()
    for _ in range(20):
        net.run(10.0)
        assert in_use(net) == {MOVED}


def behind_a_portal() -> Simnet:
    """Return a network whose server has gone, and whose client tries what a captive portal names."""
    net = Simnet()
    net.run(5.0)
    net.server_at = set()
    net.named = (PORTAL,)
    net.run(40.0)
    assert in_use(net) == {PORTAL}
    return net


def test_what_a_captive_portal_names_is_tried_but_the_server_stays_known_and_is_turned_back_to() -> None:
    net = behind_a_portal()
    assert kept_addresses(net) == [str(SERVER_ADDRESS), str(PORTAL)]
    net.named = (OTHER_PORTAL,)
    net.run(100.0)
    assert kept_addresses(net) == [str(SERVER_ADDRESS), str(OTHER_PORTAL)]
    net.server_at = {SERVER_ADDRESS}  # and still nobody names it
    net.run(35.0)
    assert net.client._state == "up"
    assert in_use(net) == {SERVER_ADDRESS}
    net.restart_client()
    net.run(35.0)
    assert net.client._state == "up"
    assert in_use(net) == {SERVER_ADDRESS}


def test_an_address_that_an_answer_takes_back_is_left_at_once_for_the_one_that_has_proved_itself() -> None:
    net = behind_a_portal()
    net.client.job_done(Resolve("sim.example", 5000), (), net.now)  # no answer
    assert in_use(net) == {PORTAL}
    net.client.job_done(Resolve("sim.example", 5000), (OTHER_PORTAL, SERVER_ADDRESS), net.now)
    assert in_use(net) == {SERVER_ADDRESS}


def test_an_answer_while_the_tunnel_is_up_moves_nothing() -> None:
    net = Simnet()
    net.run(5.0)
    incarnation = net.client.paths[0].incarnation
    net.client.job_done(Resolve("sim.example", 5000), (PORTAL,), net.now)
    net.run(5.0)
    assert net.client.paths[0].incarnation == incarnation
    assert net.client._servers.known == [SERVER_ADDRESS, PORTAL]
    net.client.job_done(Resolve("sim.example", 5000), (SERVER_ADDRESS,), net.now)
    assert net.client._servers.known == [SERVER_ADDRESS]


SERVER6, MOVED6 = IPv6Address("2001:db8:99::1"), IPv6Address("2001:db8:99::77")


@pytest.mark.parametrize("is_known_before", [False, True])
def test_an_ip_version_of_the_server_that_moves_is_followed_while_the_other_one_keeps_the_tunnel_up(
    is_known_before: bool,
) -> None:
    net = Simnet(Wire(), Wire(versions=(6,)), named=(SERVER_ADDRESS, SERVER6))
    net.run(5.0)
    assert [path.is_up for path in net.client.paths.values()] == [True, True]
    incarnation = net.client.paths[0].incarnation
    net.named = (SERVER_ADDRESS, MOVED6)
    if is_known_before:
        net.client.job_done(Resolve("sim.example", 5000), net.named, net.now)
        net.run(5.0)
        assert in_use(net) == {SERVER_ADDRESS, SERVER6}  # it answers
    net.server_at = {*net.named}
    net.run(30.0)
    assert not net.client.paths[1].is_up
    assert net.client._state == "up"
    net.run(400.0)
    assert in_use(net) == {SERVER_ADDRESS, MOVED6}
    assert net.client.paths[1].is_up
    assert net.client.paths[0].incarnation == incarnation


@pytest.mark.interpreted
def test_names_are_asked_as_they_were_before_the_tunnel_while_a_silent_server_is_looked_up() -> None:
    net = Simnet(
        settings=ClientSettings(server="sim.example", interfaces=("w0", "w1"), dns_mode=DnsMode.FIXED, dns=DNS)
    )
    net.run(5.0)
    for wire in net.wires:
        wire.is_cut = True
    net.scripts.clear()
    looked_up: list[Any] = []
    done, moved = net.client.job_done, IPv4Address("198.51.100.77")

    def answer(job: Job, result: object, now: float) -> None:
        if isinstance(job, Resolve):
            looked_up.append((now, net.scripts[-1][2]["dns"], net.scripts[-1][2]["outside"]))
            result = (moved,)
        done(job, result, now)

    net.client.job_done = answer  # type: ignore[method-assign]
    net.run(40.0)
    ((silent_at, _),) = net.told("client", NoticeKind.TUNNEL_SILENT)
    assert looked_up == [(pytest.approx(silent_at + 30.0, abs=0.01), (), True)]
    said = [(values["dns"], values["outside"]) for _, verb, values in net.scripts if verb == "dns"]
    assert said == [((), True), (DNS, False)]
    assert {way.server for way in net.client._ways.values()} == {moved}


def test_a_server_that_is_named_by_its_address_is_not_looked_up() -> None:
    net = Simnet(settings=ClientSettings(server="198.51.100.1", interfaces=("w0", "w1")))
    net.run(5.0)
    for wire in net.wires:
        wire.is_cut = True
    net.run(200.0)
    assert [verb for _, verb, _ in net.scripts if verb == "dns"] == []
    assert net.client._servers.outside_at == float("inf")


# -- mute paths ------------------------------------------------------------------------------------------------------


def opened_on(net: Simnet, number: int, since: float = 0.0) -> list[tuple[float, int]]:
    """When the sockets of a path were opened, and of which IP version."""
    return [(at, event.address.version) for at, event in net.opened if event.path == number and at >= since]


def dual(*wires: Wire, **more: Any) -> Simnet:
    return Simnet(*wires, named=(SERVER_ADDRESS, SERVER6), **more)


@pytest.mark.parametrize("is_in_use", [True, False])
def test_a_path_that_dies_by_one_ip_version_goes_on_by_the_other_one_and_back(is_in_use: bool) -> None:
    net = dual(Wire(versions=(4, 6)), Wire())
    net.run(5.0)
    if is_in_use:
        Traffic(net, rate=5).start(200.0)
    incarnation, since = net.client.paths[1].incarnation, net.now
    for mute in (4, 6):
        net.wires[0].mute = {mute}
        net.run(35.0 if is_in_use else 60.0)  # idle, it is found out with the next probe
        assert net.client.paths[0].is_up
        assert net.client._ways[0].address.version == 10 - mute
    told = net.told("client", NoticeKind.PATH_DOWN, NoticeKind.PATH_UP, NoticeKind.PATH_WAITING, since=since)
    assert [values["event"] for _, values in told] == ["path-down", "path-up"] * 2
    assert net.client.paths[1].incarnation == incarnation


def test_a_dead_nat_mapping_is_left_for_another_local_port() -> None:
    net = Simnet(Wire(), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(100.0)
    ports, incarnation, since = dict(net.open), net.client.paths[1].incarnation, net.now
    net.wires[0].dead_ports = {ports[0]}
    net.run(28.0)
    assert net.open[0] == ports[0], "an outage of less is waited for where it began"
    net.run(8.0)
    assert net.client.paths[0].is_up
    assert net.open[0] != ports[0]
    assert (net.open[1], net.client.paths[1].incarnation) == (ports[1], incarnation)
    ((_, version),) = opened_on(net, 0, since)
    assert version == 4


def test_a_mute_path_gives_up_an_address_for_an_equal_one() -> None:
    """A router that crashed and announces another prefix does not take the former one back (RFC 8978)."""
    net = Simnet(Wire(), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(100.0)
    link, path = net.links()[0], net.client.paths[0]
    old, new = link.addresses[0], IPv4Interface("192.168.0.77/24")
    net.client.links_changed((replace(link, addresses=(new, old)), net.links()[1]), net.now)
    net.run(1.0)
    assert path.address == old.ip, "which works"
    net.wires[0].is_cut = True
    net.run(35.0)
    assert path.address == new.ip


def test_both_ip_versions_are_tried_before_another_local_port() -> None:
    net = dual(Wire(versions=(4, 6)), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(100.0)
    port, since = net.open[0], net.now
    net.wires[0].mute, net.wires[0].dead_ports = {6}, {port}
    net.run(40.0)
    assert net.client.paths[0].is_up
    assert net.open[0] != port
    assert [version for _, version in opened_on(net, 0, since)] == [6, 4]


def test_a_path_that_stays_dead_is_tried_ever_more_rarely_and_told_down_once() -> None:
    net = dual(Wire(versions=(4, 6)), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(900.0)
    since = net.now
    net.wires[0].is_cut = True
    net.run(600.0)
    opened = opened_on(net, 0, since)
    assert [version for _, version in opened] == [6, 4] * (len(opened) // 2)
    waits = [later - earlier for (earlier, _), (later, _) in pairwise(opened)]
    assert waits[0::2] == pytest.approx([5.0] * len(waits[0::2]), abs=0.3)  # by the version that was never heard
    assert waits[1::2] == pytest.approx([60.0] * len(waits[1::2]), abs=0.3)
    assert [values["event"] for _, values in net.told("client", since=since)] == ["path-down"]
    assert len(opened_on(net, 1)) == 1
    assert len(net.sent(TRANSPORT, "up", 0, net.now - 60.0)) < 300  # probes, no data
    net.wires[0].is_cut, net.wires[0].mute = False, {6}
    net.run(6.0)
    assert net.client.paths[0].is_up


def test_an_idle_dead_path_costs_no_more_than_its_probes() -> None:
    net = dual(
        Wire(versions=(4, 6)),
        Wire(),
        settings=ClientSettings(server="sim.example", interfaces=("w0", "w1"), idle_probe=300.0),
    )
    net.run(60.0)
    net.wires[0].is_cut = True
    net.run(700.0)
    since = net.now
    net.run(6000.0)
    assert len(opened_on(net, 0, since)) == pytest.approx(40, abs=2)
    assert len(net.sent(TRANSPORT, "up", 0, since)) <= 80


def test_while_the_server_is_away_paths_are_reopened_no_more_often_than_that_and_it_is_found_at_once() -> None:
    net = Simnet()
    net.run(5.0)
    since = net.now
    net.kill_server()
    net.run(1200.0)
    for number in (0, 1):
        waits = [later - earlier for (earlier, _), (later, _) in pairwise(opened_on(net, number, since))]
        assert min(waits[4:]) >= 60.0
    net.start_server()
    Traffic(net, rate=5).start(10.0)
    net.run(6.0)
    assert [path.is_up for path in net.client.paths.values()] == [True, True]


def test_a_version_that_no_socket_can_be_opened_by_is_left_again_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = dual(Wire(versions=(4, 6), refuses={6}), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(300.0)
    net.wires[0].is_cut = True
    net.run(200.0)
    assert net.client.paths[0].errors["ENETUNREACH"] > 5
    assert len([r for r in caplog.records if "trying again" in r.getMessage()]) == 1
    net.wires[0].is_cut = False
    net.run(8.0)
    assert net.client.paths[0].is_up


def test_a_half_of_a_tunnel_that_carries_one_way_only_is_not_tried_otherwise() -> None:
    net = Simnet()
    net.run(5.0)
    Traffic(net, rate=5).start(300.0)
    net.wires[0].cuts_up = net.wires[1].cuts_down = True
    net.run(200.0)
    assert net.client._state == "up"
    assert len(net.opened) == 2


def test_an_ip_version_that_comes_does_not_move_a_path_that_lives() -> None:
    net = dual(Wire(versions=(6,)), Wire())
    net.run(5.0)
    Traffic(net, rate=5).start(300.0)
    net.wires[0].is_cut = True
    net.run(60.0)
    net.wires[0].is_cut = False
    net.run(60.0)
    assert net.client.paths[0].is_up
    incarnation = net.client.paths[0].incarnation
    net.wires[0].versions = (4, 6)
    net.client.links_changed(net.links(), net.now)
    net.run(5.0)
    assert net.client.paths[0].incarnation == incarnation


def test_the_sockets_towards_a_stock_server_stay_whatever_is_silent() -> None:
    text = wireguard_text(CLIENT_KEY, [IPv4Interface("10.0.1.2/32")], [], SERVER_PUBLIC, PSK, "sim.example:5000")
    settings = ClientSettings(server="sim.example", interfaces=("w0", "w1"), wireguard=parse_wireguard(text))
    server = BookPeer(SERVER_KEY, CLIENT_PUBLIC, PSK)
    net = dual(Wire(versions=(4, 6)), Wire(versions=(4, 6)), stock_server=server, said_hello=False, settings=settings)
    traffic = Traffic(net, rate=1)
    traffic.start(600.0)
    net.run(100.0)
    net.wires[0].is_cut = True
    net.run(500.0)
    assert len(net.opened) == 2
    assert traffic.lost("up", since=net.now - 60.0, until=net.now - 1.0) == 0


# -- the host --------------------------------------------------------------------------------------------------------


def test_the_device_is_set_up_once_with_what_the_server_gives() -> None:
    net = Simnet(Wire(), Wire())
    Traffic(net, rate=5).run(130.0)
    ups = [values for side, verb, values in net.scripts if verb == "up"]
    assert len(ups) == 1
    assert ups[0]["address4"] == TUNNEL4[2]
    assert ups[0]["peer4"] == TUNNEL4[1]
    assert ups[0]["address6"] == TUNNEL6[2]
    assert ups[0]["servers"] == (SERVER_ADDRESS,)
    assert ups[0]["mtu"] == 1280


def test_a_lan_that_has_given_us_our_address_in_the_tunnel_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Simnet(Wire(), Wire())
    net.wires[1].address = CLIENT
    net.client.links_changed([*net.links(), link("mpt0", f"{CLIENT}/32", gateway=None)], net.now)
    net.run(5.0)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith(f"w1 has the address {CLIENT}, which is ours in the tunnel too: ")
    assert "--network before its first client joins, or give w1 another address" in said


def test_after_a_change_the_script_is_told_again_which_connections_are_kept_and_what_is_the_tunnels_own() -> None:
    net = Simnet(Wire(), Wire())
    net.client._kept = ((IPv4Address("192.168.0.2"), IPv4Address("203.0.113.7")),)
    net.run(1.0)
    net.set_link(0, up=False)
    (values,) = [values for _, verb, values in net.scripts if verb == "keep"]
    assert values == {"keep": net.client._kept, "address4": TUNNEL4[2], "address6": TUNNEL6[2]}


@pytest.mark.parametrize(
    ("settings", "dns"),
    [
        ({}, ("192.0.2.53",)),
        ({"routes": (IPv4Network("10.9.0.0/16"),)}, ()),
        ({"dns_mode": DnsMode.KEEP}, ()),
        ({"dns_mode": DnsMode.FIXED, "dns": (IPv4Address("9.9.9.9"),)}, ("9.9.9.9",)),
    ],
)
def test_the_resolvers_are_those_offered_those_kept_or_those_given(
    settings: dict[str, Any], dns: tuple[str, ...]
) -> None:
    net = Simnet(Wire(), settings=ClientSettings(server="sim.example", interfaces=("w0",), **settings))
    net.server._offer = type(net.server._offer)(1420, True, False, (IPv4Address("192.0.2.53"),))
    net.run(1.0)
    (values,) = [values for _, verb, values in net.scripts if verb == "up"]
    assert tuple(map(str, values["dns"])) == dns


def test_ipv6_that_the_server_cannot_pass_on_is_answered_at_once() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    beyond = ipv6(TUNNEL6[2].packed, IPv6Address("2001:db8::9").packed, bytes(20))
    inside = ipv6(TUNNEL6[2].packed, TUNNEL6[1].packed, bytes(20))
    net.client_sends(beyond, inside, UP)
    net.run(0.1)
    assert [packet for _, packet in net.at_server] == [inside, UP]
    ((_, answer),) = net.at_client
    assert answer[6] == 58
    assert answer[40:42] == b"\x01\x00"
    assert answer[8:24] == TUNNEL6[1].packed
    assert net.client.drops["IPv6 that the server cannot pass on"] == 1


def test_what_is_no_ip_packet_is_not_sent() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    since = net.now
    inbox: list[bytes] = []
    net.client.send([PLAIN + b"\x01" + bytes(60), PLAIN + bytes(20), PLAIN, PLAIN + b"\x60", b""], net.now, inbox)
    net.turn()
    assert net.sent(TRANSPORT, "up", None, since) == []
    assert inbox == []
    assert net.client.drops["malformed frame"] == 5


def test_each_change_of_state_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = Simnet(Wire(), Wire())
    Traffic(net, rate=5).start(200.0)
    net.run(10.0)
    for wire in net.wires:
        wire.is_cut = True
    net.run(100.0)
    for wire in net.wires:
        wire.is_cut = False
    net.run(10.0)
    said = [r.getMessage().split(":")[0] for r in caplog.records if r.getMessage().startswith("tunnel ")]
    assert [words for words in said if "MTU" not in words and "address" not in words] == [
        "tunnel up", "tunnel silent", "tunnel up",
    ]  # fmt: skip
    assert net.client.status(net.now)["state"] == "up"


@pytest.mark.parametrize(
    ("wires", "down", "words"),
    [([Wire(is_cut=True)], (), "does not answer on any path"), ([Wire()], (0,), "no path is there")],
)
def test_a_server_that_does_not_answer_is_warned_of_once(
    wires: list[Wire], down: tuple[int, ...], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = Simnet(*wires, down=down)
    net.run(600.0)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([text for text in said if words in text]) == 1


def test_a_clock_that_was_never_set_is_named_as_the_likely_cause(caplog: pytest.LogCaptureFixture) -> None:
    net = Simnet(Wire(is_cut=True), wall=86400.0)
    net.run(60.0)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([text for text in said if "this host's clock shows the year 1970" in text]) == 1


def test_a_clean_stop_says_goodbye_on_every_path() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    since = net.now
    net.stop("client")
    assert len(net.controls("up", Control.CLOSE, 0, since)) == len(net.controls("up", Control.CLOSE, 1, since)) == 1


def test_only_the_status_can_be_asked_of_a_client() -> None:
    net = Simnet(Wire(), Wire(delay=0.06))
    Traffic(net).run(3.0)
    status = net.client.control("status", Fields({}, "status"), net.now).result
    assert status["format"] == 1
    assert status["role"] == "client"
    assert status["state"] == "up"
    assert status["server"]["name"] == "sim.example:5000"
    assert status["server"]["multipath"]
    assert status["tunnel"] == {"ipv4": CLIENT, "ipv6": str(TUNNEL6[2]), "mtu": 1420}
    assert [path["state"] for path in status["paths"]] == ["up", "up"]
    assert [path["name"] for path in status["paths"]] == ["w0", "w1"]
    assert status["paths"][0]["rtt_ms"] == pytest.approx(40.0)
    assert status["paths"][0]["seen_as"] == "192.0.2.1:40000"
    assert status["receipts"]["down"]["lost"] == 0
    for verb in ("token-new", "peer-remove", "stop"):
        with pytest.raises(ConfigError, match="run that on the server"):
            net.client.control(verb, Fields({}, verb), net.now)


# -- a stock server by its configuration -----------------------------------------------------------------------------


def test_a_wg_quick_file_makes_a_client_of_a_stock_server() -> None:
    text = wireguard_text(
        CLIENT_KEY, [IPv4Interface("10.0.1.2/32")], [IPv4Address("9.9.9.9")], SERVER_PUBLIC, PSK, "sim.example:5000"
    )
    text = text.replace("0.0.0.0/0", "203.0.113.0/24").replace(", ::/0", "")
    file = parse_wireguard(text)
    settings = ClientSettings(server="sim.example", interfaces=("w0", "w1"), routes=file.allowed_ips, wireguard=file)
    server = BookPeer(SERVER_KEY, CLIENT_PUBLIC, PSK)
    net = Simnet(Wire(), Wire(), stock_server=server, said_hello=False, settings=settings)
    (values,) = [values for _, verb, values in net.scripts if verb == "up"]
    assert values["address4"] == IPv4Address("10.0.1.2")
    assert values["routes"] == tuple(file.allowed_ips)
    traffic = Traffic(net, rate=10)
    traffic.run(60.0)
    assert traffic.is_whole()
    assert server.foreign == []  # nothing of ours was said
    before = len(net.at_client)
    net.server_sends(ipv4("8.8.8.8", CLIENT, b"not allowed"), ipv4(TARGET, CLIENT, b"allowed"))
    net.run(0.1)
    assert len(net.at_client) == before + 1
    assert net.client.drops["source not allowed"] == 1
    assert len(net.sent(INITIATION, "up")) == 1
    assert net.stopped == []


@pytest.mark.parametrize("number", [0, 1])
def test_towards_a_stock_server_a_path_stands_by_too_until_the_other_one_is_silent(number: int) -> None:
    text = wireguard_text(CLIENT_KEY, [IPv4Interface("10.0.1.2/32")], [], SERVER_PUBLIC, PSK, "sim.example:5000")
    settings = ClientSettings(server="sim.example", interfaces=("w0", "w1"), wireguard=parse_wireguard(text))
    server = BookPeer(SERVER_KEY, CLIENT_PUBLIC, PSK)
    net = Simnet(Wire(), Wire(), stock_server=server, said_hello=False, settings=settings)
    said = Fields({"path": f"w{number}", "priority": "standby"}, "paths-priority")
    net.client.control("paths-priority", said, net.now)
    net.run(1.0)
    traffic = Traffic(net, rate=10)
    traffic.start(120.0)
    begun = net.now
    net.run(30.0)
    assert not net.sent(TRANSPORT, "up", number, begun + 0.2)
    net.wires[1 - number].is_cut = True
    net.run(40.0)
    assert len(net.sent(TRANSPORT, "up", number, net.now - 10.0)) >= 100
    assert traffic.lost("up", since=net.now - 10.0, until=net.now - 1.0) == 0
