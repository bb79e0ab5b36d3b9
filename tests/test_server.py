"""The server: many clients on one port, who is let in, and what the command line may ask."""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import admin
from mptunnel.clientpeer import ClientPeer
from mptunnel.config import (
    Fields,
    JoinToken,
    Network,
    PeerRecord,
    TokenState,
    encode_key,
    new_token,
    peers_from_document,
    tokens_from_document,
)
from mptunnel.errors import ConfigError
from mptunnel.events import RunScript, SaveState
from mptunnel.messages import (
    INITIATION,
    TRANSPORT,
    Capability,
    Control,
    Enrol,
    Enrolled,
    EnrolResult,
    Hello,
    decode_enrolled_untrusted,
)
from mptunnel.noise import NO_PSK, StaticKey, prove_key
from mptunnel.packet import PLAIN
from mptunnel.server import Offer, Server
from tests.bookpeer import BookPeer
from tests.simnet import (
    CLIENT_KEY,
    CLIENT_PUBLIC,
    PSK,
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
    snapshot,
    stranger,
    unsealed,
)

if TYPE_CHECKING:
    from mptunnel.events import Endpoint
    from mptunnel.register import Reply

CLIENT = str(TUNNEL4[2])
LOW_ORDER = bytes(32)


def private(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def many(number: int) -> tuple[Server, list[BookPeer]]:
    """A server with many stock clients, each with a session since some moment before START."""
    records = [
        PeerRecord(f"c{n}", StaticKey(private(n)).public, PSK, Network4[n], Network6[n], WALL)
        for n in range(2, number + 2)
    ]
    rng = random.Random(1)
    server = Server(
        SERVER_KEY, Network(Network4, Network6), records, [], Offer(1420, True, False), reserved=0, port=5000,
        entropy=rng.randbytes, rng=rng, now=1000.0, wall=WALL,
    )  # fmt: skip
    clients = [BookPeer(private(n), SERVER_PUBLIC, PSK, endpoint=0, seed=n) for n in range(2, number + 2)]
    for n, client in enumerate(clients):
        now = START - 10.0 + n * 0.01  # no more than the door lets in
        client.initiate(now)
        exchange(server, client, stranger(n), now)
    return server, clients


START = 1010.0
Network4 = type(TUNNEL4)("10.0.0.0/16")
Network6 = TUNNEL6


def exchange(server: Server, client: BookPeer, source: Endpoint, now: float) -> list[bytes]:
    """Carry everything between them, at once; return what came out of the server."""
    inbox: list[bytes] = []
    for _ in range(6):
        for transmit in client.transmits():
            server.receive(bytes(transmit.data), len(transmit.data), source, now, inbox)
        server.finish_turn(now)
        for transmit in server.transmits():
            assert transmit.to == source
            client.receive(bytes(transmit.data), len(transmit.data), 0, now, [])
    return [bytes(packet) for packet in inbox]


def opened(client: BookPeer, datagram: bytes) -> bytes:
    assert client.current is not None
    return unsealed(client.current, datagram)


def test_a_client_that_has_just_come_has_its_full_mtu_at_once_for_what_connects_then_keeps_what_it_finds() -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06))
    net.run(0.5)
    assert [values["mtu"] for _, verb, values in net.scripts if verb == "peer-up"][-1] == 1420


# -- the gateway -----------------------------------------------------------------------------------------------------


def test_a_gateway_whose_nft_table_others_remove_is_made_again_and_again_if_that_fails() -> None:
    setup = RunScript("up", {"port": 5000})
    server = Server(
        SERVER_KEY, Network(TUNNEL4, TUNNEL6), [], [], Offer(1420, True, False), reserved=0, port=5000,
        entropy=random.Random(5).randbytes, rng=random.Random(6), now=1000.0, wall=WALL, setup=setup,
    )  # fmt: skip
    server.events()
    assert server.next_deadline() == float("inf")
    server.table_seen(1001.0, is_there=False)
    for failure in (ConfigError("nft: busy"), None):
        due = server.next_deadline()
        assert 1001.0 < due < 1002.0
        server.handle_timeout(due)
        assert server.events() == [setup]
        assert server.next_deadline() == float("inf"), "while the script runs"
        if failure is None:
            server.table_seen(due, is_there=True)
        server.job_done(setup, failure, due + 0.01)
    assert server.next_deadline() == float("inf")


def test_a_gateway_that_is_somebody_elses_affair_is_left_alone() -> None:
    net = Simnet()
    net.server.table_seen(net.now, is_there=False)
    net.run(10.0)
    assert [verb for side, verb, _ in net.scripts if side == "server" and verb == "up"] == []


# -- many clients ----------------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_a_turn_with_a_thousand_clients_busies_only_those_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    server, clients = many(1000)
    assert len(server._peers) == 1000
    server.handle_timeout(START + 1.0)
    calls: Counter[int] = Counter()
    for name in ("next_deadline", "handle_timeout", "send", "receive", "receive_one", "status"):
        plain = getattr(ClientPeer, name)

        def counted(self: ClientPeer, *args: Any, plain: Any = plain) -> Any:
            calls[id(self)] += 1
            return plain(self, *args)

        monkeypatch.setattr(ClientPeer, name, counted)
    client = clients[500]
    now = START + 2.0
    client.send([ipv4(str(Network4[502]), TARGET, b"x")], now)
    assert len(exchange(server, client, stranger(500), now)) == 1
    server.send([PLAIN + ipv4(TARGET, str(Network4[502]), b"x")], now)
    server.finish_turn(now)
    server.next_deadline()
    server.handle_timeout(now)
    server.transmits()
    server.events()
    assert set(calls) == {id(server._peers[StaticKey(private(502)).public])}
    assert sum(calls.values()) < 12


def test_every_client_gets_its_turn_when_it_is_due() -> None:
    server, clients = many(100)
    for n, client in enumerate(clients):
        client.send([ipv4(str(Network4[n + 2]), TARGET, b"x")], START)
        exchange(server, client, stranger(n), START)
    now = START
    kept_alive = set()
    while now < START + 11.0:
        now = max(now, server.next_deadline())
        server.handle_timeout(now)
        kept_alive |= {transmit.to for transmit in server.transmits()}
    assert len(kept_alive) == 100  # the keepalive that each is owed 10 s after its packet


def test_an_idle_client_costs_the_server_little_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    many(50)
    before = resident()
    kept = many(400)
    assert (resident() - before) / 400 < 100_000  # with the test's own side of it
    assert len(kept[1]) == 400


def test_a_busy_server_keeps_no_more_deadlines_than_it_needs() -> None:
    net = Simnet(Wire(), Wire(delay=0.06))
    traffic = Traffic(net, rate=20)
    traffic.start(30.0)
    for _ in range(30):
        net.run(1.0)
        assert len(net.server._heap) < 30


def test_a_thousand_records_cost_nothing_until_their_clients_knock() -> None:
    records = [
        PeerRecord(f"c{n}", n.to_bytes(32, "big"), NO_PSK, Network4[n], Network6[n], WALL) for n in range(2, 1002)
    ]
    rng = random.Random(1)
    server = Server(
        SERVER_KEY, Network(Network4, Network6), records, [], Offer(1420, True, False), reserved=0, port=5000,
        entropy=rng.randbytes, rng=rng, now=1000.0, wall=WALL,
    )  # fmt: skip
    assert server._peers == {}
    server.send([PLAIN + ipv4(TARGET, str(Network4[500]), b"x")], 1000.0)
    assert len(server._peers) == 1


def test_packets_find_their_client_by_either_address_and_others_are_dropped() -> None:
    server, _ = many(2)
    server.transmits()
    to_first, to_second = str(Network4[2]), str(Network4[3])
    frames = [ipv4(TARGET, to_first, b"1"), ipv4(TARGET, to_first, b"2"), ipv4(TARGET, to_second, b"3")]
    frames += [ipv6(bytes(16), Network6[3].packed, b"4"), ipv4(TARGET, "10.0.9.9", b"5"), b"\x45", b"\x00" * 40]
    server.send([PLAIN + packet for packet in frames], START)
    sent = [(transmit.to, len(transmit.data) // transmit.size) for transmit in server.transmits()]
    assert sent == [(stranger(0), 2), (stranger(1), 1), (stranger(1), 1)]
    assert server.drops["packet to nobody"] == 3


def test_a_client_cannot_speak_for_another() -> None:
    server, clients = many(2)
    clients[0].send([ipv4(str(Network4[3]), TARGET, b"x")], START)
    assert exchange(server, clients[0], stranger(0), START) == []
    assert server.drops["source not allowed"] == 1


def test_what_the_kernel_refuses_is_counted_on_the_path_it_was_for() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    path = net.guest.sources.get(net.source(1))
    assert path is not None
    tx = path.tx
    net.server.not_sent(net.source(1), 3, 300, "ENOBUFS")
    net.server.not_sent(stranger(), 1, 100, "ENOBUFS")
    net.server.not_sent(net.source(1), 2, 200, "ENOBUFS")
    assert path.errors == {"ENOBUFS": 2}
    assert path.tx == tx - 5
    assert net.server.drops["not sent: ENOBUFS"] == 6
    net.flush_nat(1)
    net.run(3.0)
    net.server.not_sent(net.source(1), 1, 100, "ENOBUFS")  # the same path, elsewhere
    assert path.errors == {"ENOBUFS": 3}


# -- HELLO's consequences on the host --------------------------------------------------------------------------------


def test_each_client_has_its_own_route_with_its_own_mtu() -> None:
    net = Simnet(Wire(), Wire(largest=1380))
    Traffic(net, rate=5).run(20.0)
    routes = {str(values["peer"]): values["mtu"] for side, verb, values in net.scripts if verb == "peer-up"}
    assert routes == {CLIENT: 1340, str(TUNNEL6[2]): 1340}


# -- removing --------------------------------------------------------------------------------------------------------


def control(server: Server, verb: str, now: float = 1000.0, **arguments: object) -> Reply:
    return server.control(verb, Fields(arguments, verb), now)


def test_a_client_that_is_removed_is_out_at_once() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    kept = net.peer.current.seal(ipv4(CLIENT, TARGET, b"x"))  # type: ignore[union-attr]
    initiation = net.sent(INITIATION, "up")[0][1]
    control(net.server, "peer-remove", net.now, name="sim")
    net.turn()
    net.run(0.001)
    assert len(net.server.identity.indices) == 0
    net.deliver(kept, net.source(0))
    net.deliver(initiation, net.source(0))
    net.turn()
    since = net.now
    net.client_sends(ipv4(CLIENT, TARGET, b"y"))
    net.server_sends(ipv4(TARGET, CLIENT, b"z"))
    net.run(30.0)
    assert net.at_server == []
    assert net.sent(2, "down", None, since) == []
    assert net.sent(TRANSPORT, "down", None, since) == []
    assert [verb for side, verb, _ in net.scripts if side == "server"][-2:] == ["peer-down", "peer-down"]


def test_a_client_that_is_removed_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    net = Simnet(Wire())
    net.run(3.0)
    control(net.server, "peer-remove", net.now, name="sim")
    net.turn()
    net.run(0.1)
    assert "admits us no more" in caplog.text


def test_a_stock_client_removed_while_it_is_being_called_is_not_let_in_by_its_answer() -> None:
    net = Simnet(Wire(), stock_client=BookPeer(CLIENT_KEY, SERVER_PUBLIC, PSK, endpoint=0))
    net.client_sends(ipv4(CLIENT, TARGET, b"x"))
    net.run(1.0)
    net.is_client_awake = False
    net.server_sends(ipv4(TARGET, CLIENT, b"y"))
    net.run(20.0)
    assert net.sent(INITIATION, "down")
    control(net.server, "peer-remove", net.now, name="sim")
    since, inside = net.now, len(net.at_server)
    net.is_client_awake = True
    net.run(60.0)
    net.client_sends(ipv4(CLIENT, TARGET, b"x"))
    net.run(60.0)
    assert net.sent(INITIATION, "down", None, since) == []
    assert len(net.at_server) == inside
    assert len(net.server.identity.indices) == 0


# -- joining ---------------------------------------------------------------------------------------------------------


def joining() -> tuple[Simnet, JoinToken, BookPeer]:
    """A server with one token, and a holder of it that has a session."""
    rng = random.Random(8)
    token, record = new_token(SERVER_PUBLIC, "test", 1.0, WALL, rng.randbytes)
    holder = BookPeer(token.join_private(), SERVER_PUBLIC, token.join_psk(), endpoint=0)
    net = Simnet(Wire(delay=0.001), admitted=False, tokens=[record], stock_client=holder)
    holder.initiate(net.now)
    net.turn()
    net.run(0.1)
    assert holder.current is not None
    return net, token, holder


def ask(net: Simnet, holder: BookPeer, key: bytes, name: bytes = b"van-7") -> list[Enrolled]:
    """Say ENROL; return the answers."""
    assert holder.current is not None
    seen = len(holder.foreign)
    owner = OWNERS.get(key)
    proof = bytes(32) if owner is None else prove_key(owner, SERVER_PUBLIC, holder.key.public)
    net.deliver(holder.current.seal(Enrol(key, name, proof).encode()), net.source(0))
    net.turn()
    net.run(0.1)
    found = holder.foreign[seen:]
    assert {plain[0] for plain in found} <= {Control.ENROLLED}
    return [decode_enrolled_untrusted(memoryview(plain)) for plain in found]


OWNERS = {owner.public: owner for owner in (StaticKey(b"\x41" * 32), StaticKey(b"\x42" * 32))}
KEY, OTHER = OWNERS


def test_a_token_lets_one_key_in_and_the_answer_comes_after_the_saves() -> None:
    net, _, holder = joining()
    net.held = []
    assert ask(net, holder, KEY) == []
    assert ask(net, holder, KEY) == []  # asked again meanwhile
    assert [job.name for job in net.held] == ["server/peers", "server/tokens"]
    net.release()
    net.run(0.1)
    answers = [decode_enrolled_untrusted(memoryview(plain)) for plain in holder.foreign]
    assert [answer.result for answer in answers] == [EnrolResult.ADMITTED]
    assert answers[0].public_key == KEY
    assert answers[0].psk != NO_PSK
    (peer,) = peers_from_document(net.saved["server/peers"])
    assert (peer.name, peer.public_key, peer.psk, peer.stock) == ("van-7", KEY, answers[0].psk, False)
    (token,) = tokens_from_document(net.saved["server/tokens"])
    assert (token.state, token.bound_to, token.name) == (TokenState.BOUND, KEY, "van-7")


def test_the_same_key_gets_the_same_answer_again() -> None:
    net, _, holder = joining()
    first, second = ask(net, holder, KEY), ask(net, holder, KEY)
    assert first == second
    assert len(net.server.register.records) == 1


def test_of_two_holders_of_a_token_the_second_neither_gets_in_nor_sees_what_the_first_is_given() -> None:
    net, token, holder = joining()
    net.held = []
    ask(net, holder, KEY)
    thief = BookPeer(token.join_private(), SERVER_PUBLIC, token.join_psk(), endpoint=0, newer_than=2e9, seed=6)
    net.use_stock_client(thief)
    thief.initiate(net.now)
    net.turn()
    net.run(0.1)
    assert ask(net, thief, OTHER) == []
    since = net.now
    net.release()
    net.run(0.1)
    assert holder.current is not None
    net.deliver(
        holder.current.seal(Enrol(KEY, b"van-7").encode()), net.source(0)
    )  # under the session before the thief's
    net.turn()
    net.run(0.1)
    net.release()
    net.run(0.1)
    assert net.sent(TRANSPORT, "down", None, since) == []
    assert thief.foreign == []
    net.held = None
    (answer,) = ask(net, thief, OTHER)
    assert answer.result == EnrolResult.USED


def test_a_thief_whose_clock_is_far_ahead_cannot_keep_the_owner_from_hearing_of_it() -> None:
    net, token, _ = joining()
    answers = []
    for newer_than, key in ((4e9, OTHER), (1e9, KEY)):
        holder = BookPeer(token.join_private(), SERVER_PUBLIC, token.join_psk(), endpoint=0, newer_than=newer_than)
        net.use_stock_client(holder)
        holder.initiate(net.now)
        net.turn()
        net.run(0.1)
        answers += [answer.result for answer in ask(net, holder, key)]
    assert answers == [EnrolResult.ADMITTED, EnrolResult.USED]
    assert net.server.drops["initiation replayed"] == 0
    replayed = [datagram for _, datagram in net.sent(INITIATION, "up")][-1]
    net.run(6.0)
    net.deliver(replayed, net.source(0))
    net.turn()
    assert net.server.drops["initiation replayed"] == 1


def test_a_second_key_is_refused_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    net, _, holder = joining()
    ask(net, holder, KEY)
    (answer,) = ask(net, holder, OTHER)
    assert answer.result == EnrolResult.USED
    assert answer.psk == NO_PSK
    assert [r.levelno for r in caplog.records if "is refused: used" in r.getMessage()] == [logging.WARNING]
    assert OTHER not in net.server.register.records


@pytest.mark.parametrize("failing", ["server/peers", "server/tokens"])
def test_if_either_file_cannot_be_saved_the_client_is_to_try_again(failing: str) -> None:
    net, _, holder = joining()
    net.failing = {failing}
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.TRY_AGAIN
    assert answer.psk == NO_PSK
    net.failing = set()
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.ADMITTED
    assert peers_from_document(net.saved["server/peers"])[0].public_key == KEY


def test_what_could_not_be_saved_is_saved_as_soon_as_it_can_be() -> None:
    net = Simnet(Wire())
    net.run(1.0)
    net.failing = {"server/peers", "server/tokens"}
    net.server.control("peer-remove", Fields({"name": "sim"}, "peer-remove"), net.now)
    net.run(25.0)
    (peer,) = peers_from_document(net.saved["server/peers"])
    assert peer.removed is None
    net.failing = set()
    net.run(11.0)
    (peer,) = peers_from_document(net.saved["server/peers"])
    assert peer.removed is not None
    net.run(60.0)
    assert net.server._save_again_at == float("inf")


def test_a_join_session_carries_nothing_but_enrol() -> None:
    net, _, holder = joining()
    assert holder.current is not None
    for plain in (
        ipv4(CLIENT, TARGET, b"x"),
        *(bytes([kind]) + bytes(79) for kind in range(1, 8)),
        b"\x0a" + bytes(15),
    ):
        net.deliver(holder.current.seal(plain), net.source(0))
        net.turn()
    net.run(30.0)
    assert net.at_server == []
    assert holder.foreign == []
    assert net.server._peers == {}
    assert net.server.register.records == {}


def test_the_holder_of_a_token_is_never_called_nor_kept_alive() -> None:
    net, _, _ = joining()
    since = net.now
    net.run(600.0)
    assert [entry for entry in net.log if entry[0] > since and entry[1] == "down"] == []
    assert len(net.server.identity.indices) == 0


@pytest.mark.parametrize(
    ("key", "name", "result"),
    [
        (KEY, b"", EnrolResult.NAME_REFUSED),
        (KEY, b"a b", EnrolResult.NAME_REFUSED),
        (KEY, b"\xff\xfe", EnrolResult.NAME_REFUSED),
        (KEY, b"new\nline", EnrolResult.NAME_REFUSED),
        (LOW_ORDER, b"x", EnrolResult.KEY_REFUSED),
        (SERVER_PUBLIC, b"x", EnrolResult.KEY_REFUSED),
    ],
)
def test_a_name_or_key_that_cannot_be_is_refused_and_the_token_stays_good(
    key: bytes, name: bytes, result: EnrolResult
) -> None:
    net, _, holder = joining()
    (answer,) = ask(net, holder, key, name)
    assert answer.result == result
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.ADMITTED


def test_a_token_is_spent_when_its_key_has_shown_itself_and_refuses_from_then_on() -> None:
    net, _, holder = joining()
    (answer,) = ask(net, holder, KEY)
    member = BookPeer(b"\x41" * 32, SERVER_PUBLIC, answer.psk, endpoint=0)
    net.use_stock_client(member)
    member.send([ipv4(CLIENT, TARGET, b"x")], net.now)
    net.turn()
    net.run(0.1)
    assert len(net.at_server) == 1
    (token,) = tokens_from_document(net.saved["server/tokens"])
    assert token.state is TokenState.SPENT
    net.use_stock_client(holder)
    for key in (KEY, OTHER):
        (answer,) = ask(net, holder, key)
        assert (answer.result, answer.psk) == (EnrolResult.USED, NO_PSK)


def test_an_initiation_alone_spends_no_token() -> None:
    net, _, holder = joining()
    (answer,) = ask(net, holder, KEY)
    member = BookPeer(b"\x41" * 32, SERVER_PUBLIC, answer.psk, endpoint=0)
    net.use_stock_client(member)
    net.tap = lambda _side, _number, datagram: None if datagram[0] == TRANSPORT else datagram
    member.send([ipv4(CLIENT, TARGET, b"x")], net.now)
    net.turn()
    net.run(0.1)
    assert tokens_from_document(net.saved["server/tokens"])[0].state is TokenState.BOUND


def test_revoked_and_expired_tokens_answer_with_the_reason() -> None:
    net, _, holder = joining()
    control(net.server, "token-revoke", net.now, ident=net.server.register._tokens[0].ident)
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.REVOKED
    net, _, holder = joining()
    net.run(3601.0)
    holder.initiate(net.now)
    net.turn()
    net.run(0.1)
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.EXPIRED


def test_a_token_expires_by_our_own_clock_though_the_wall_clock_was_set_back() -> None:
    net, _, holder = joining()
    net.set_wall(WALL - 86400.0)
    net.run(3601.0)
    holder.initiate(net.now)
    net.turn()
    net.run(0.1)
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.EXPIRED


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_server_killed_between_any_two_saves_is_completed_by_a_retry(done: int) -> None:
    net, token, holder = joining()
    net.held = []
    ask(net, holder, KEY)
    for job in net.held[:done]:
        net.saved[job.name] = job.document
    net.held = None
    net.restart_server()
    again = BookPeer(token.join_private(), SERVER_PUBLIC, token.join_psk(), endpoint=0, newer_than=2e9)
    net.use_stock_client(again)
    again.initiate(net.now)
    net.turn()
    net.run(0.1)
    (answer,) = ask(net, again, KEY)
    assert answer.result == EnrolResult.ADMITTED
    (peer,) = peers_from_document(net.saved["server/peers"])
    assert (peer.public_key, peer.psk) == (KEY, answer.psk)
    (token_record,) = tokens_from_document(net.saved["server/tokens"])
    assert token_record.bound_to == KEY


def test_a_network_without_an_address_left_says_so() -> None:
    net, _, holder = joining()
    net.server.register.network = Network(type(TUNNEL4)("10.0.1.0/30"), TUNNEL6)
    net.server.register.records[OTHER] = PeerRecord("full", OTHER, NO_PSK, TUNNEL4[2], TUNNEL6[2], WALL)
    (answer,) = ask(net, holder, KEY)
    assert answer.result == EnrolResult.NO_ADDRESS


def test_a_bare_server_makes_one_token_and_its_file_goes_when_it_is_spent_also_after_a_restart() -> None:
    net = Simnet(Wire(delay=0.001), admitted=False, stock_client=BookPeer(CLIENT_KEY, SERVER_PUBLIC, PSK, endpoint=0))
    text = net.server.make_first_token(net.now)
    assert text is not None
    net.turn()
    assert net.saved["server/join-token"] == text + "\n"
    net.restart_server()
    assert net.server.make_first_token(net.now) is None
    assert net.server.take_token_file(net.saved["server/join-token"]) == text
    assert net.server.take_token_file("nonsense") is None
    token = JoinToken.decode(text)
    holder = BookPeer(token.join_private(), SERVER_PUBLIC, token.join_psk(), endpoint=0)
    net.use_stock_client(holder)
    holder.initiate(net.now)
    net.turn()
    net.run(0.1)
    (answer,) = ask(net, holder, KEY)
    member = BookPeer(b"\x41" * 32, SERVER_PUBLIC, answer.psk, endpoint=0)
    net.use_stock_client(member)
    member.send([ipv4(CLIENT, TARGET, b"x")], net.now)
    net.turn()
    net.run(0.1)
    assert net.saved["server/join-token"] is None
    assert net.server.take_token_file(text) is None


# -- control ---------------------------------------------------------------------------------------------------------


class Pair:
    """A running server and a state directory, asked the same things."""

    def __init__(self, tmp_path: Path) -> None:
        rng = random.Random(3)
        self.server = Server(
            SERVER_KEY, Network(TUNNEL4, TUNNEL6), [], [], Offer(1420, True, False), reserved=0, port=5000,
            entropy=rng.randbytes, rng=rng, now=1000.0, wall=WALL,
        )  # fmt: skip
        self._path = tmp_path
        self.now = 1000.0

    def ask(self, verb: str, **arguments: object) -> tuple[Any, Any]:
        """Return both answers, or both errors' words."""
        self.now += 1.0
        found: list[Any] = []
        for where in ("running", "offline"):
            try:
                if where == "running":
                    found.append(control(self.server, verb, self.now, **arguments).result)
                else:
                    found.append(admin.perform(self._path / "state", self._path / "run", verb, **arguments))
            except ConfigError as error:
                found.append(str(error))
        return found[0], found[1]


VARIES = {
    "psk",
    "server_public_key",
    "port",
    "added",
    "removed",
    "ipv6",
    "created",
    "expires",
    "ended",
    "token",
    "ident",
}


def plain(answer: Any) -> Any:
    """An answer without what chance, the time or the keys of the two decide, but with its kind."""
    if isinstance(answer, list):
        return [plain(each) for each in answer]
    if isinstance(answer, dict):
        return {name: None if value is None else type(value) if name in VARIES else value
                for name, value in answer.items() if name != "port"}  # fmt: skip
    return answer


def test_a_running_server_answers_every_verb_as_the_files_of_a_stopped_one_do(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    key, other = encode_key(KEY), encode_key(OTHER)
    asked: list[tuple[str, dict[str, object]]] = [
        ("peer-list", {}),
        ("peer-add", {"name": "van-7", "public_key": key, "psk": False, "stock": True}),
        ("peer-add", {"name": "van-7", "public_key": other, "psk": False, "stock": False}),
        ("peer-add", {"name": "van-8", "public_key": key, "psk": False, "stock": False}),
        ("peer-add", {"name": "van-8", "public_key": other, "psk": True, "stock": False}),
        ("peer-add", {"name": "no good", "public_key": other, "psk": True, "stock": False}),
        ("peer-add", {"name": "low", "public_key": encode_key(LOW_ORDER), "psk": False, "stock": False}),
        ("peer-add", {"name": "low", "public_key": "xyz", "psk": False, "stock": False}),
        ("peer-add", {"name": "low"}),
        ("peer-list", {}),
        ("peer-remove", {"name": "van-9"}),
        ("peer-remove", {"name": "van-7"}),
        ("peer-remove", {"name": "van-7"}),
        ("peer-list", {}),
        ("peer-add", {"name": "van-9", "public_key": key, "psk": False, "stock": False}),
        ("token-list", {}),
        ("token-new", {"label": "Anna", "hours": 2}),
        ("token-new", {"label": "x" * 65, "hours": 2}),
        ("token-new", {"label": "x", "hours": 0}),
        ("token-new", {"label": "x", "hours": "many"}),
        ("token-list", {}),
        ("token-revoke", {"ident": ""}),
        ("token-revoke", {"ident": "zzz"}),
    ]
    for verb, arguments in asked:
        running, offline = pair.ask(verb, **arguments)
        assert plain(running) == plain(offline), verb
    own = [
        {"name": "own", "public_key": encode_key(SERVER_PUBLIC), "psk": False, "stock": False},
        {"name": "own", "public_key": admin.perform(tmp_path / "state", tmp_path / "run", "peer-add", name="x",
         public_key=encode_key(CLIENT_PUBLIC), psk=False, stock=True)["server_public_key"], "psk": False,
         "stock": False},
    ]  # fmt: skip
    assert "own key" in pair.ask("peer-add", **own[0])[0]
    assert "own key" in pair.ask("peer-add", **own[1])[1]


def test_at_most_16_tokens_are_open_running_or_not(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    for _ in range(16):
        running, offline = pair.ask("token-new", label="", hours=1)
        assert "token" in running
        assert "token" in offline
    running, offline = pair.ask("token-new", label="", hours=1)
    assert running == offline
    assert "no more" in running


def test_what_the_command_line_changes_holds_only_after_its_save() -> None:
    net = Simnet(Wire())
    reply = control(net.server, "token-new", net.now, label="x", hours=1)
    assert reply.after is not None
    assert reply.after.name == "server/tokens"
    assert reply.after in net.server.events()
    assert control(net.server, "peer-list", net.now).after is None
    assert control(net.server, "peer-remove", net.now, name="sim").after in net.server.events()


def test_a_verb_that_is_not_known_changes_nothing() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    before = snapshot(net.server)
    with pytest.raises(ConfigError, match="cannot be asked for 'stop'"):
        control(net.server, "stop", net.now)
    with pytest.raises(ConfigError, match="'name' is missing"):
        control(net.server, "peer-remove", net.now)
    assert snapshot(net.server) == before


def test_nothing_secret_is_told() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    control(net.server, "token-new", net.now, label="x", hours=1)
    for verb in ("status", "peer-list", "token-list"):
        told = str(control(net.server, verb, net.now).result)
        for secret in (SERVER_KEY, PSK, net.server.register._tokens[0].join_psk):
            assert encode_key(secret) not in told
            assert secret.hex() not in told


def test_a_clean_stop_says_goodbye_on_every_path_and_leaves_the_last_timestamp() -> None:
    net = Simnet(Wire(), Wire())
    net.run(3.0)
    since = net.now
    net.server.close(net.now)
    events = net.server.events()
    assert [event.name for event in events if isinstance(event, SaveState)] == ["server/timestamp"]
    assert [event for event in events if isinstance(event, RunScript)] == []
    net.server._events = events
    net.turn()
    assert len(net.controls("down", Control.CLOSE, None, since)) == 2


def test_a_client_that_changes_its_mtu_all_the_time_does_not_keep_the_host_busy() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    assert net.peer.current is not None
    net.scripts.clear()
    for number in range(1000):
        plain = Hello(
            is_answer=False, version=1, oldest=1, capabilities=Capability.MULTIPATH, instance=net.client._instance,
            mtu=1280 + number % 100, mode=0, paths=1, serial=number + 9,
        ).encode()  # fmt: skip
        net.deliver(net.peer.current.seal(plain), net.source(0))
        net.turn()
        net.run(0.003)
    net.run(3.0)
    routes = [values["mtu"] for _, verb, values in net.scripts if verb == "peer-up"]
    assert len(routes) <= 2 * 5
    assert routes[-1] == 1280 + 999 % 100  # and the last word counts


def test_a_route_is_never_smaller_than_ipv6_needs() -> None:
    net = Simnet(Wire())
    net.run(3.0)
    assert net.peer.current is not None
    for mtu in (0, 1, 576):
        plain = Hello(
            is_answer=False, version=1, oldest=1, capabilities=Capability.MULTIPATH, instance=net.client._instance,
            mtu=mtu, mode=0, paths=1, serial=9 + mtu,
        ).encode()  # fmt: skip
        net.deliver(net.peer.current.seal(plain), net.source(0))
        net.turn()
        net.run(2.0)
    assert min(values["mtu"] for _, verb, values in net.scripts if verb == "peer-up") == 1280


def test_a_thief_of_a_token_fills_neither_the_log_nor_the_wire(caplog: pytest.LogCaptureFixture) -> None:
    net, _, holder = joining()
    ask(net, holder, KEY)
    assert holder.current is not None
    since = net.now
    for number in range(1000):
        net.deliver(holder.current.seal(Enrol(private(number), b"x").encode()), net.source(0))
        net.turn()
    net.run(0.1)
    assert len([r for r in caplog.records if "is refused" in r.getMessage()]) == 1
    assert len(net.sent(TRANSPORT, "down", None, since)) <= 256
    assert net.server.drops["ENROL refused"] <= 256


def test_what_the_host_can_give_later_its_clients_are_told_when_it_can() -> None:
    net = Simnet()
    net.run(3.0)
    before = net.server._offer
    better = replace(before, ipv6_onward=not before.ipv6_onward, dns=(ip_address("192.0.2.53"),))
    net.server.offer_is(better, net.now)
    net.run(0.2)
    addresses = net.controls("down", Control.ADDRESS, None, net.now - 0.2)
    assert len(addresses) == 2
    tunnel = net.client._tunnel
    assert tunnel is not None
    assert (tunnel.ipv6_onward, tunnel.dns) == (better.ipv6_onward, better.dns)
    net.server.offer_is(better, net.now)
    net.run(0.2)
    assert net.controls("down", Control.ADDRESS, None, net.now - 0.2) == []
