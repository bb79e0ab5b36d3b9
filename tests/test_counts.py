"""What a peer owes beyond delivery: sizes that pass, counts that are true, limits that hold."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from mptunnel.messages import INITIATION, Capability, Challenge, Control, Hello
from mptunnel.mtu import MTU_STEPS
from mptunnel.noise import CookieMaker, StaticKey
from mptunnel.path import MAX_ANSWERS, PathState
from tests.simnet import CLIENT_KEY, CLIENT_PUBLIC, TARGET, Simnet, Traffic, Wire, ipv4, stranger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mptunnel.events import Transmit

CLIENT = "10.0.1.2"


def up(payload: bytes = b"x") -> bytes:
    return ipv4(CLIENT, TARGET, payload)


def down(payload: bytes = b"x") -> bytes:
    return ipv4(TARGET, CLIENT, payload)


def turns(net: Simnet, seconds: float, packets: int = 3) -> Iterator[None]:
    """Let `packets` go each way every 50 ms, and stop by after each time."""
    for _ in range(round(seconds * 20)):
        net.client_sends(*[up()] * packets)
        net.server_sends(*[down()] * packets)
        net.run(0.05)
        yield


def busy(net: Simnet, seconds: float, packets: int = 3) -> None:
    for _ in turns(net, seconds, packets):
        pass


# -- MTU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtu", MTU_STEPS)
def test_a_path_carries_what_passes_to_the_byte_and_is_never_called_down_for_what_does_not(mtu: int) -> None:
    net = Simnet(Wire(largest=mtu + 32), Wire(delay=0.06))
    net.run(2.0)
    since = [path.since for path in net.peer.paths.values()]
    busy(net, 3.0 + 2.5 * MTU_STEPS.index(mtu), packets=1)  # each step down takes five tries
    assert [path.carries for path in net.peer.paths.values()] == [mtu, 1420]
    assert [path.since for path in net.peer.paths.values()] == since
    assert net.peer.tunnel_mtu == net.guest.tunnel_mtu == mtu
    net.run(1.0)
    lost = dict(net.wires[0].counts)
    full = bytes(mtu - 20)
    net.client_sends(up(full), up(full[:-7]), up(full[:-1]))
    net.server_sends(down(full), down(full[:-7]), down(full[:-1]))
    net.run(1.0)
    assert (net.wires[0].counts["lost_up"], net.wires[0].counts["lost_down"]) == (lost["lost_up"], lost["lost_down"])


def test_a_path_that_does_not_even_carry_1280_stays_up_for_what_it_carries() -> None:
    net = Simnet(Wire(largest=1300), Wire(delay=0.06))
    net.run(2.0)
    since = net.peer.paths[0].since
    busy(net, 30.0, packets=1)
    path = net.peer.paths[0]
    assert (path.state, path.since, path.carries) == (PathState.UP, since, 0)
    assert net.peer.tunnel_mtu == 1420


# -- what is counted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_each_path_says_exactly_what_its_wire_lost(seed: int) -> None:
    net = Simnet(Wire(delay=0.02), Wire(delay=0.06), Wire(delay=0.3), seed=seed)
    net.run(3.0)
    for wire in net.wires:
        wire.loss_up, wire.loss_down = 0.2, 0.1
    busy(net, 6.0)
    for wire in net.wires:
        wire.loss_up = wire.loss_down = 0.0
    busy(net, 2.0)
    for number, wire in enumerate(net.wires):
        path, theirs = net.peer.paths[number], net.guest.paths[number]
        assert path.loss_up.lost == theirs.loss_up.lost == wire.counts["lost_up"] > 20
        assert path.loss_down.lost == wire.counts["lost_down"] > 10


def test_a_path_that_was_dead_until_the_server_forgot_it_says_what_it_lost() -> None:
    net = Simnet()
    net.run(3.0)
    busy(net, 3.0)
    net.wires[0].is_cut = True
    busy(net, 40.0, packets=1)
    assert 0 not in net.guest.paths
    net.wires[0].is_cut = False
    busy(net, 4.0)
    path = net.peer.paths[0]
    assert path.state is PathState.UP
    # It had to forget what came since the last ECHO; and the probes of a socket that was never heard count nowhere.
    assert -20 <= path.loss_up.lost - net.wires[0].counts["lost_up"] <= 18
    assert (path.loss_up.recent(), path.loss_down.recent()) == (0.0, 0.0)
    assert path.echoed <= net.guest.paths[0].number


def test_an_address_that_changes_under_a_busy_path_is_no_loss_upwards() -> None:
    net = Simnet(Wire(delay=0.1), Wire(delay=0.1))
    net.run(3.0)
    busy(net, 3.0, packets=20)
    net.flush_nat(0)
    busy(net, 3.0, packets=20)
    assert (net.peer.paths[0].loss_up.lost, net.guest.paths[0].loss_up.lost) == (0, 0)
    assert net.peer.paths[0].loss_down.lost == net.wires[0].counts["lost_down"] or net.astray


def test_receipts_see_no_loss_and_no_gap_in_a_rekey() -> None:
    net = Simnet()
    net.run(3.0)
    serial = net.guest.current.serial if net.guest.current else 0
    for _ in turns(net, 130.0, packets=2):
        assert (net.guest.receipts.lost, net.peer.receipts.lost) == (0, 0)
    assert net.guest.current is not None
    assert net.guest.current.serial > serial
    assert (net.guest.receipts.longest_gap, net.peer.receipts.longest_gap) == (0.0, 0.0)


# -- whatever a peer says ----------------------------------------------------------------------------------


def plaintexts(seed: int, count: int) -> Iterator[bytes]:
    """Yield what a peer of ill will may seal: any bytes, often shaped like something that is known."""
    rng = random.Random(seed)
    for _ in range(count):
        body = rng.randbytes(rng.choice((0, 1, 2, 3, 7, 15, 16, 19, 20, 39, 40, 64, 72, 200)))
        shape = rng.randrange(4)
        if shape == 0 and body:
            body = bytes((rng.randrange(16), rng.randrange(9))) + body[2:]
        elif shape == 1:
            body = b"\x45\0" + len(body).to_bytes(2, "big") + body[4:]
        elif shape == 2:
            body = rng.choice((up, down))(body)[: rng.randrange(1, 40)]
            body = body[:2] + len(body).to_bytes(2, "big") + body[4:] if len(body) > 3 else body
        yield body


@pytest.mark.parametrize("seed", range(2))
def test_whatever_an_admitted_peer_seals_the_other_lives_and_serves_on(seed: int) -> None:
    net = Simnet()
    net.run(3.0)
    for side, sender in (("up", net.peer), ("down", net.guest)):
        for plain in plaintexts(seed, 1500):
            session = sender.current
            assert session is not None
            good = up(b"good") if side == "up" else down(b"good")
            first, second = session.seal(good, len(good)), session.seal(plain, len(plain))
            alone = session.seal(plain, len(plain))
            runs = [first + second, alone] if len(second) <= len(first) else [first, second, alone]
            inbox: list[bytes] = []
            for run in runs:
                size = min(len(run), len(first)) if run.startswith(first) else len(run)
                if side == "up":
                    net.server.receive(run, size, net.source(0), net.now, inbox)
                else:
                    net.client.receive(run, size, 0, net.now, inbox)
            assert bytes(inbox[0]) == good
            assert all(len(packet) >= 20 for packet in inbox)
    net.restart_client()
    net.run(3.0)
    before = len(net.at_server)
    net.client_sends(up(b"still there"))
    net.run(1.0)
    assert len(net.at_server) == before + 1


def test_no_more_than_256_hellos_and_challenges_are_answered_in_a_second() -> None:
    net = Simnet()
    net.run(3.0)
    net.run(1.0 - net.now % 1.0)
    ours, theirs = net.peer.current, net.guest.current
    assert ours is not None
    assert theirs is not None
    hello = Hello(False, 1, 1, Capability.MULTIPATH, net.client._instance, 1280, 0, 2, 9).encode()
    for source in (net.source(0), stranger()):
        for _ in range(MAX_ANSWERS + 50):
            datagram = ours.seal(hello)
            net.server.receive(datagram, len(datagram), source, net.now, [])
        assert len(net.server.transmits()) <= 2 * MAX_ANSWERS
    challenge = Challenge(0, net.peer.paths[0].incarnation, bytes(16)).encode(Control.CHALLENGE)
    for _ in range(MAX_ANSWERS + 50):
        datagram = theirs.seal(challenge)
        net.client.receive(datagram, len(datagram), 0, net.now, [])
    assert len(net.client.transmits()) == MAX_ANSWERS


# -- handshakes with a stock peer --------------------------------------------------------------------------


def test_a_stock_peer_that_does_not_answer_is_called_20_times_and_then_no_more() -> None:
    net = Simnet(down=(0, 1))
    guest = net.server._peer_of(CLIENT_PUBLIC, net.now)
    assert guest is not None
    guest.endpoint = stranger()
    out: list[Transmit] = []
    guest.send([down()], net.now, out)
    times = [net.now]
    while (now := guest.next_deadline()) < net.now + 200.0:
        before = len(out)
        guest.handle_timeout(now, out)
        times += [now] * (len(out) - before)
    assert len(out) == 20
    assert all(transmit.data[0] == INITIATION for transmit in out)
    assert all(5.0 <= later - earlier <= 5.334 for earlier, later in pairwise(times))
    assert len({bytes(transmit.data[8:40]) for transmit in out}) == 20


def test_whoever_has_answered_an_initiation_does_not_call_for_5_s() -> None:
    net = Simnet(Wire(cuts_down=True))
    net.run(0.1)  # the server has answered, and its answer is lost
    net.server_sends(down())
    net.run(4.0)
    assert not net.sent(1, "down")
    assert not [datagram for datagram in net.to_strangers() if datagram[0] == INITIATION]


def test_a_datagram_too_big_for_a_path_that_is_closed_keeps_nobody_busy() -> None:
    net = Simnet()
    net.run(3.0)
    net.set_link(0, up=False)
    net.client.not_sent(0, 1, 1452, "EMSGSIZE", net.now)
    net.peer.paths[0].received(40, 64_000, 1452)
    net.client.handle_timeout(net.now + 1.0)
    assert net.client.next_deadline() > net.now + 1.0


def test_forged_cookies_from_anywhere_do_not_pile_up() -> None:
    net = Simnet(down=(0, 1))
    guest = net.server._peer_of(CLIENT_PUBLIC, net.now)
    assert guest is not None
    guest.endpoint = stranger()
    out: list[Transmit] = []
    guest.send([down()], net.now, out)
    initiation = bytes(out[0].data)
    maker = CookieMaker(StaticKey(CLIENT_KEY), random.Random(1).randbytes)  # it takes no more than a public key
    for number in range(500):
        guest.cookie_received(maker.reply(initiation, bytes((number % 256,)), 0.0), stranger(number))
    assert len(guest._cookies) <= 16
    assert not net.server.drops["cookie not authentic"]


# -- what our own receive queue has no room for ------------------------------------------------------------


def overrunning(net: Simnet, side: str, rng: random.Random, lost: Counter[int]) -> None:
    """From now on the queue of `side` has no room for a datagram now and then, also for several in a row."""
    deliver = net._deliver
    untold: Counter[int] = Counter()  # by socket; the kernel tells with the next that fits

    def queued(where: str, number: int, datagram: bytes) -> None:
        if where != side:
            deliver(where, number, datagram)
            return
        sock = 0 if side == "up" else number  # the server has one
        if rng.random() < (0.7 if untold[sock] else 0.05):
            untold[sock] += 1
            lost[number] += 1
            return
        if untold[sock]:
            if side == "up":
                net.server.overrun(net.source(number), untold.pop(sock))
            else:
                net.client.overrun(number, untold.pop(sock))
        deliver(where, number, datagram)

    net._deliver = queued  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("side", ["up", "down"])
def test_what_our_own_queue_has_no_room_for_is_no_loss_of_a_path(side: str) -> None:
    net, lost = Simnet(), Counter[int]()
    busy(net, 2.0)
    overrunning(net, side, random.Random(7), lost)
    busy(net, 20.0)
    assert min(lost.values()) > 50
    role = net.server if side == "up" else net.client
    assert sum(lost.values()) - 5 <= role.drops["receive queue full"] <= sum(lost.values())
    for path in (*net.peer.paths.values(), *net.guest.paths.values()):
        assert (path.loss_up.lost, path.loss_down.lost) == (0, 0)


def test_what_a_path_loses_beside_an_overrun_is_its_own() -> None:
    """One path loses a tenth, and there is an overrun once in a second."""
    net = Simnet(Wire(), Wire(loss_up=0.1))
    busy(net, 2.0)
    before = net.guest.paths[1].loss_up.lost
    for _ in turns(net, 20.0):
        if round(net.now * 20) % 20 == 0:
            net.server.overrun(net.source(0), 1)
    assert net.guest.paths[0].loss_up.lost == 0
    assert net.guest.paths[1].loss_up.lost - before > 0.06 * 20 * 60


def test_an_address_that_changes_while_nothing_is_sent_is_no_gain_downwards() -> None:
    net = Simnet()
    net.run(30.0)
    for _ in range(5):
        net.flush_nat(0)
        net.run(30.0)
    assert len(net.controls("down", Control.CHALLENGE, 0)) > 5
    assert (net.peer.paths[0].loss_down.lost, net.guest.paths[0].loss_down.lost) == (0, 0)


def test_an_uplink_that_is_heard_but_never_answers_its_challenges_is_not_forgotten_all_the_time() -> None:
    net = Simnet(Wire(), Wire(cuts_down=True))
    Traffic(net, rate=10).start(100.0)
    net.run(20.0)
    path = net.guest.paths[1]
    net.run(80.0)
    assert net.guest.paths[1] is path
    net.wires[1].is_cut = True
    net.run(100.0)
    assert 1 not in net.guest.paths
