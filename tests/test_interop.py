"""The real program and Debian's wireguard-go, each as client of the other, with real traffic.

Nobody waits here for WireGuard's two minutes: a stock peer handshakes anew when it is configured again, and our
program is run with a smaller constant where it is its turn. The last test waits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.lab import SERVER, SERVER6, TARGET, TARGET6
from mptunnel.traffic import Datagrams, serve_web
from tests.running import Maker, Tunnel, wait_until
from tests.stock import (
    COOKIE,
    DATA,
    DEVICE,
    INITIATION,
    KEEPALIVE,
    PORT,
    RESPONSE,
    Flood,
    Phone,
    Provider,
    Watch,
    check_traffic,
    now,
    ping,
    require_tools,
    start_changed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mptunnel.traffic import Flow

pytestmark = pytest.mark.netns

OURS = 5000  # the port of our server
STOCK4, STOCK6 = f"{SERVER}:{PORT}", f"[{SERVER6}]:{PORT}"
BY_TWO = ("-i", "p1", "-i", "p2", "--dns", "keep")
SOCKET = Path(f"/var/run/wireguard/{DEVICE}.sock")

# Constants of our program made small: a rekey after 1 s of use; HELLO every 100 ms; silence noticed after 2.5 s.
HASTY_REKEY = {"session.REKEY_AFTER_TIME": 1.0, "serverpeer.REKEY_TIMEOUT": 1.0}
HASTY_HELLO = {"serverpeer.HELLO_INTERVAL": 0.1}
HASTY_RETRY = {"timers.REKEY_TIMEOUT": 1.0}
HASTY_DOUBT = {"timers.KEEPALIVE_TIMEOUT": 0.5, "timers.REKEY_TIMEOUT": 2.0, "peer.REKEY_TIMEOUT": 2.0}

outside = pytest.mark.parametrize(("outside", "with_psk"), [(4, True), (6, False)], ids=["4-psk", "6"])


@pytest.fixture
def tunnel(make_tunnel: Maker) -> Iterator[Tunnel]:
    require_tools()
    yield make_tunnel(ipv6=True)
    assert not SOCKET.exists(), "nothing of it is seen outside"


def nearly_all_arrived(flow: Flow) -> bool:
    """Whether no more was lost than while keys are made anew: how long that takes is the machine's affair."""
    return flow.lost <= 0.25 * flow.sent and flow.duplicated == 0 and flow.arrived_at_ns[-1] > 0


# -- a phone: wireguard-go as client of our server ---------------------------------------------------------------


def phone_of(tunnel: Tunnel, *words: str, outside: str = SERVER) -> Phone:
    """Let a phone in at our server and set it up; it has completed its handshake."""
    phone = Phone(tunnel, tunnel.must("sv", "peer", "add", "phone", "--endpoint", outside, *words))
    wait_until(phone.handshakes, "the phone's handshake")
    return phone


def as_peer(tunnel: Tunnel) -> dict[str, Any]:
    """Return what our server says of the phone."""
    (peer,) = tunnel.status("sv")["peers"]
    known: dict[str, Any] = peer
    return known


@outside
def test_a_phone_is_carried_by_our_server(tunnel: Tunnel, outside: int, with_psk: bool) -> None:
    server = SERVER if outside == 4 else SERVER6
    watch = Watch(tunnel, OURS)
    tunnel.serve()
    phone_of(tunnel, *(["--psk"] if with_psk else []), outside=server)
    serve_web(tunnel.lab)
    check_traffic(tunnel.lab, "inet", TARGET, TARGET6)
    peer = as_peer(tunnel)
    assert (peer["state"], peer["multipath"], peer["psk"], peer["paths"]) == ("up", False, with_psk, [])
    data = watch.seen(DATA)
    assert len({(each.index, each.counter) for each in data}) == len(data) > 2000, "one copy of each"
    assert {each.source[0] for each in watch.down()} == {server}, "answers come from the address that was asked"


def test_a_phone_may_handshake_anew_at_any_time(tunnel: Tunnel) -> None:
    tunnel.serve()
    phone = phone_of(tunnel)
    datagrams = Datagrams(tunnel.lab, 2.0, rate=200)
    for _ in range(3):
        before = phone.handshakes()
        phone.configure()  # all its keys are gone
        wait_until(lambda: phone.handshakes() > before, "another handshake")  # noqa: B023  asked at once
        time.sleep(0.05)  # one in 20 ms is taken, as WireGuard has it; what is refused is repeated after 5 s
    assert all(map(nearly_all_arrived, datagrams.finish()))


def test_our_server_calls_a_phone_that_has_fallen_silent(tunnel: Tunnel) -> None:
    start_changed(tunnel, "sv", HASTY_DOUBT, "-s")
    wait_until(lambda: tunnel.status("sv"), "the server listens")
    phone = phone_of(tunnel)
    phone.set_peer(phone.server_key, "remove")
    phone.set_peer(phone.server_key, "allowed-ips", "0.0.0.0/0")  # and has forgotten where the server is
    assert not ping(tunnel.lab, "sv", "10.0.1.2")
    wait_until(lambda: ping(tunnel.lab, "sv", "10.0.1.2"), "the phone answers")
    assert (phone.answers(), phone.handshakes()) == (1, 1)


def test_a_phone_may_roam(tunnel: Tunnel) -> None:
    tunnel.serve()
    phone = phone_of(tunnel)
    datagrams = Datagrams(tunnel.lab, 2.0, rate=100)
    seen = [as_peer(tunnel)["endpoint"]]

    def flush() -> None:
        tunnel.lab.flush_nat(1)

    def change_port() -> None:
        phone.wg("set", DEVICE, "listen-port", "40000")

    def change_network() -> None:
        phone.go_by(2)
        tunnel.lab.link(1, up=False)
        phone.forget_source()  # else it may go on with the one that it has lost, for 15 s

    for move in (flush, change_port, change_network):
        move()
        wait_until(lambda: as_peer(tunnel)["endpoint"] != seen[-1], "the phone is seen elsewhere")
        seen.append(as_peer(tunnel)["endpoint"])
    assert [each.split(":")[0] for each in seen] == [tunnel.lab.public_address(path) for path in (1, 1, 1, 2)]
    assert all(map(nearly_all_arrived, datagrams.finish()))  # it has one way at a time: while it moves, it loses
    assert phone.handshakes() == 1


def test_a_phone_is_reached_by_what_its_keepalives_show(tunnel: Tunnel) -> None:
    tunnel.serve()
    phone = phone_of(tunnel)
    watch = Watch(tunnel, OURS)
    phone.set_peer(phone.server_key, "persistent-keepalive", "off")
    phone.set_peer(phone.server_key, "persistent-keepalive", "1")
    begun = now()
    wait_until(lambda: len(watch.up(DATA)) >= 2, "keepalives")
    assert now() - begun > 0.9
    before = as_peer(tunnel)["endpoint"]
    tunnel.lab.flush_nat(1)
    wait_until(lambda: as_peer(tunnel)["endpoint"] != before, "a keepalive from the new port")
    assert {each.size for each in watch.up(DATA)} == {KEEPALIVE}
    assert ping(tunnel.lab, "sv", "10.0.1.2")


def test_a_phone_comes_through_with_a_cookie_while_our_server_is_under_load(tunnel: Tunnel) -> None:
    tunnel.serve()
    watch = Watch(tunnel, OURS)
    Flood(tunnel.lab, "sv", tunnel.status("sv")["public_key"], OURS, burst=20)
    wait_until(lambda: tunnel.status("sv")["under_load"], "load")
    phone_of(tunnel)
    assert [(each.kind, each.has_mac2) for each in watch.seen(INITIATION, COOKIE, RESPONSE)] == [
        (INITIATION, False),
        (COOKIE, True),
        (INITIATION, True),
        (RESPONSE, False),
    ]
    assert tunnel.status("sv")["under_load"]
    assert ping(tunnel.lab, "cl", TARGET)


def test_our_server_comes_through_with_a_cookie_while_a_phone_is_under_load(tunnel: Tunnel) -> None:
    tunnel.serve()
    phone = phone_of(tunnel)
    watch = Watch(tunnel, OURS)
    Flood(tunnel.lab, "cl", as_peer(tunnel)["public_key"], PORT, burst=600)
    wait_until(lambda: "Sending cookie response" in phone.log(), "load")
    phone.configure()
    wait_until(lambda: phone.handshakes() == 2, "a response that the phone takes")
    assert [(each.kind, each.has_mac2) for each in watch.seen(INITIATION, COOKIE, RESPONSE)] == [
        (INITIATION, False),
        (RESPONSE, False),
        (COOKIE, True),
        (INITIATION, False),
        (RESPONSE, True),
    ]


# -- a provider: our client of wireguard-go ----------------------------------------------------------------------


def go_through(tunnel: Tunnel, file: str, *words: str, change: dict[str, float] | None = None) -> None:
    """Start our client with a provider's file, and wait for the tunnel."""
    start_changed(tunnel, "cl", change or {}, "--wireguard", file, *words)
    wait_until(lambda: tunnel.status().get("state") == "up", "the tunnel is up")
    wait_until(lambda: ping(tunnel.lab, "cl", Provider.ADDRESSES[0]), "the provider answers")


def to_provider(tunnel: Tunnel, seconds: float, rate: int = 100) -> Datagrams:
    return Datagrams(tunnel.lab, seconds, rate=rate, address=Provider.ADDRESSES[0], far="sv")


def seen_at(provider: Provider) -> str:
    """Return the address where a provider sees us."""
    endpoint: str = provider.peer()["endpoint"]
    return endpoint.rpartition(":")[0]


@outside
def test_a_stock_server_carries_our_client_and_gets_one_copy(tunnel: Tunnel, outside: int, with_psk: bool) -> None:
    provider = Provider(tunnel)
    watch = Watch(tunnel, PORT)
    go_through(tunnel, provider.configuration(STOCK4 if outside == 4 else STOCK6, with_psk=with_psk), *BY_TWO)
    serve_web(tunnel.lab, "sv")
    check_traffic(tunnel.lab, "sv", *provider.ADDRESSES)
    data = watch.seen(DATA)
    assert len({(each.index, each.counter) for each in data}) == len(data) > 2000, "one copy of each"
    seen = tunnel.lab.public_address(1) if outside == 4 else tunnel.lab.client_address6(1)
    assert {each.source[0] for each in watch.up()} == {seen}, "by one path"
    assert tunnel.status()["server"]["multipath"] is False


def test_our_client_rekeys_with_a_stock_server_without_a_loss(tunnel: Tunnel) -> None:
    provider = Provider(tunnel)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO, change=HASTY_REKEY)
    before = provider.answers()
    flows = to_provider(tunnel, 3.0, rate=200).finish()
    assert provider.answers() - before >= 2
    assert [(flow.lost, flow.duplicated) for flow in flows] == [(0, 0), (0, 0)]


def test_a_stock_server_may_call_our_client(tunnel: Tunnel) -> None:
    provider = Provider(tunnel)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO)
    endpoint = provider.peer()["endpoint"]
    provider.set_peer(provider.client_key, "remove")  # and all its keys
    provider.admit(provider.client_key)
    provider.set_peer(provider.client_key, "endpoint", endpoint, "persistent-keepalive", "1")
    wait_until(provider.handshakes, "our response")
    flows = to_provider(tunnel, 1.0).finish()
    assert [(flow.lost, flow.duplicated) for flow in flows] == [(0, 0), (0, 0)]
    assert (provider.handshakes(), provider.answers()) == (1, 1)


def test_our_client_comes_through_with_a_cookie_while_a_stock_server_is_under_load(tunnel: Tunnel) -> None:
    provider = Provider(tunnel)
    watch = Watch(tunnel, PORT)
    Flood(tunnel.lab, "sv", provider.public, PORT, burst=600)
    wait_until(lambda: "Sending cookie response" in provider.log(), "load")
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO, change=HASTY_RETRY)
    assert [(each.kind, each.has_mac2) for each in watch.seen(INITIATION, COOKIE, RESPONSE)] == [
        (INITIATION, False),
        (COOKIE, True),
        (INITIATION, True),
        (RESPONSE, False),
    ]


def test_the_command_line_goes_before_the_file_of_a_stock_server(tunnel: Tunnel) -> None:
    provider = Provider(tunnel)
    more = ("--route", f"{provider.ADDRESSES[0]}/32", "--mtu", "1300")
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO, *more)
    device = tunnel.lab.run("cl", ["sh", "-c", "ip link show mpt0; ip route show dev mpt0; ip -6 route show dev mpt0"])
    assert " mtu 1300 " in device
    assert "10.9.0.1 scope link" in device
    assert "10.9.0.0/24" not in device
    assert "fd09::/64" not in device


def test_our_client_keeps_a_stock_tunnel_alive_as_its_file_says(tunnel: Tunnel) -> None:
    provider = Provider(tunnel)
    watch = Watch(tunnel, PORT)
    go_through(tunnel, provider.configuration(STOCK4, more="PersistentKeepalive = 1"), *BY_TWO)
    begun = now()
    wait_until(lambda: len(watch.up(DATA, since=begun)) >= 2, "keepalives")
    assert now() - begun > 0.9
    before = provider.peer()["endpoint"]
    tunnel.lab.flush_nat(1)
    wait_until(lambda: provider.peer()["endpoint"] != before, "a keepalive from the new port")
    assert {each.size for each in watch.up(DATA, since=begun)} == {KEEPALIVE}
    assert ping(tunnel.lab, "sv", "10.9.0.2")


def test_a_stock_server_is_told_at_once_where_we_are(tunnel: Tunnel) -> None:
    lab = tunnel.lab
    provider = Provider(tunnel)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO)
    first, second = (lab.public_address(path) for path in (1, 2))
    assert seen_at(provider) == first
    lab.link(1, up=False)
    wait_until(lambda: seen_at(provider) == second, "the second path is used, though nothing is sent", 5.0)
    assert ping(lab, "sv", "10.9.0.2")
    lab.link(1, up=True)
    before = provider.peer()["endpoint"]
    lab.renumber(2)
    wait_until(lambda: provider.peer()["endpoint"] != before, "the new address is shown, though nothing is sent", 5.0)
    assert ping(lab, "sv", "10.9.0.2")
    assert provider.answers() == 1


def test_with_a_stock_server_the_second_path_takes_over_when_the_first_one_goes(tunnel: Tunnel) -> None:
    lab = tunnel.lab
    provider = Provider(tunnel)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO)
    datagrams = to_provider(tunnel, 1.5)
    lab.link(1, up=False)
    wait_until(lambda: seen_at(provider) == lab.public_address(2), "the second path is used")
    assert all(map(nearly_all_arrived, datagrams.finish()))


def test_with_a_stock_server_the_second_path_is_tried_when_the_first_one_dies_silently(tunnel: Tunnel) -> None:
    lab = tunnel.lab
    provider = Provider(tunnel)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO, change=HASTY_DOUBT)
    datagrams = to_provider(tunnel, 4.0)
    lab.wire("p1").cut()
    begun = now()
    wait_until(lambda: seen_at(provider) == lab.public_address(2), "the second path is used")
    assert now() - begun < 4.3, "once the silence is noticed, the first thing sent goes by the other path"
    _, down = datagrams.finish()
    assert down.longest_gap() < 4.3
    assert provider.answers() == 1, "the session goes on"


def test_our_hellos_do_not_disturb_a_stock_server(tunnel: Tunnel) -> None:
    lab = tunnel.lab
    provider = Provider(tunnel)
    provider.admit(tunnel.must("cl", "pubkey").strip())
    watch = Watch(tunnel, PORT)
    start_changed(tunnel, "cl", HASTY_HELLO, "-c", STOCK4, "--server-key", provider.public, *BY_TWO)
    wait_until(lambda: tunnel.status().get("state") == "up", "the tunnel is up")
    lab.ip("cl", f"addr add 10.9.0.2/32 peer {provider.ADDRESSES[0]} dev mpt0", "link set mpt0 up")
    datagrams = to_provider(tunnel, 3.0)
    tunnel.wait_log("cl", "taking it for a stock WireGuard server")
    flows = datagrams.finish()
    assert [(flow.lost, flow.duplicated) for flow in flows] == [(0, 0), (0, 0)]
    assert tunnel.status()["server"]["multipath"] is False
    assert len([each for each in watch.up(DATA) if each.size == 64]) == 20, "HELLO"
    assert {each.source[0] for each in watch.up()} == {lab.public_address(1)}, "by one path"
    assert provider.answers() == 1


# -- the long form -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_real_rekeys_in_each_role_lose_nothing(tunnel: Tunnel) -> None:
    provider, at_ours, at_stock = Provider(tunnel), Watch(tunnel, OURS), Watch(tunnel, PORT)
    go_through(tunnel, provider.configuration(STOCK4), *BY_TWO)
    tunnel.serve()
    phone = phone_of(tunnel)
    both = [Datagrams(tunnel.lab, 250.0, rate=50), to_provider(tunnel, 250.0, rate=50)]
    flows = [flow for datagrams in both for flow in datagrams.finish()]
    assert [(flow.lost, flow.duplicated) for flow in flows] == [(0, 0)] * 4
    assert (phone.handshakes(), provider.answers()) == (3, 3)
    assert [len(watch.up(INITIATION)) for watch in (at_ours, at_stock)] == [3, 3], "none had to be repeated"
