"""What of ours must stand on the host: what is missing is seen, and nobody is fought without end."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from mptunnel.config import ALL_ROUTES, Link
from mptunnel.netlink import parse_picture
from mptunnel.plan import Tunnel
from mptunnel.upkeep import (
    FIRST_SPACING,
    LONGEST_SPACING,
    PEACE_AFTER,
    TABLE_SETTLES,
    TUNNEL,
    Picture,
    Route,
    Rule,
    Upkeep,
)
from mptunnel.uplinks import Way

if TYPE_CHECKING:
    from collections.abc import Iterable

WAY = Way("wan1", 2, ip_address("192.0.2.2"), ip_address("198.51.100.1"), ip_address("192.0.2.254"))
RULE = Rule(4, 5201, "192.0.2.2", "198.51.100.1", "5201")
ROUTE = Route(4, "5201", ip_network("0.0.0.0/0"), "wan1", "192.0.2.254")
TUNNEL_SET = Tunnel(
    IPv4Address("10.0.1.2"),
    IPv4Address("10.0.1.1"),
    IPv6Address("fd00:1::2"),
    IPv6Address("fd00:1::1"),
    ipv6_onward=False,
)
IN4 = [Route(4, "main", ip_network(net), "mpt0") for net in ("0.0.0.0/1", "128.0.0.0/1", "10.0.1.1/32")]
IN6 = [Route(6, "main", ip_network(net), "mpt0") for net in ("::/1", "8000::/1", "fd00:1::1/128")]
KEPT = Rule(4, 5208, "192.0.2.2", "203.0.113.7", "5208")
KEPT_ROUTE = Route(4, "5208", ip_network("0.0.0.0/0"), "wan1", "192.0.2.254")


def device(*addresses: str) -> list[Link]:
    return [Link("mpt0", 9, "tun", True, tuple(map(ip_interface, addresses)), None, None, 1420)]


BOTH = device("10.0.1.2/32", "fd00:1::2/128")


def picture(rules: Iterable[Rule] = (), routes: Iterable[Route] = ()) -> Picture:
    return Picture(frozenset(rules), frozenset(routes))


def with_path() -> Upkeep:
    upkeep = Upkeep("mpt0")
    upkeep.path_asked(1, WAY)
    upkeep.script_done(1)
    return upkeep


def with_tunnel() -> Upkeep:
    upkeep = Upkeep("mpt0")
    upkeep.tunnel_asked(TUNNEL_SET, ALL_ROUTES)
    upkeep.script_done(TUNNEL)
    return upkeep


def test_a_path_is_a_rule_and_a_route_by_its_gateway() -> None:
    upkeep = with_path()
    upkeep.looked((), picture([RULE], [ROUTE]))
    assert (upkeep.due(1.0), upkeep.next_deadline()) == ([], float("inf"))
    for rules, routes in (
        ([], [ROUTE]),
        ([RULE], []),
        ([RULE], [Route(4, "5201", ROUTE.target, "wan2", "192.0.2.254")]),
        ([RULE], [Route(4, "5201", ROUTE.target, "wan1")]),
        ([Rule(4, 5201, "192.0.2.3", "198.51.100.1", "5201")], [ROUTE]),
        ([Rule(4, 5201, "192.0.2.2", "198.51.100.1", "5201", "fwmark 1")], [ROUTE]),
    ):
        upkeep = with_path()
        upkeep.looked((), picture(rules, routes))
        assert upkeep.due(1.0) == [1]


def test_a_path_by_a_clat_has_a_rule_for_what_that_makes_too() -> None:
    rules = [
        {"priority": 5201, "src": "192.0.0.1", "dst": "198.51.100.1", "table": "5201"},
        {"priority": 5201, "src": "all", "iif": "clat", "table": "5201"},
    ]
    routes = [
        {"dst": "default", "dev": "clat", "table": "5201"},
        {"dst": "default", "gateway": "fe80::1", "dev": "wwan0", "table": "5201"},
    ]
    whole = parse_picture({4: rules[:1], 6: rules[1:]}, {4: routes[:1], 6: routes[1:]})
    way = Way(
        "clat", 3, ip_address("192.0.0.1"), WAY.server, None, carrier="wwan0", carrier_gateway=ip_address("fe80::1")
    )
    for missing in (None, *whole.rules, *whole.routes):
        upkeep = Upkeep("mpt0")
        upkeep.path_asked(1, way)
        upkeep.script_done(1)
        upkeep.looked((), Picture(whole.rules - {missing}, whole.routes - {missing}))
        assert upkeep.due(1.0) == ([] if missing is None else [1])


def test_nothing_is_missed_while_its_script_runs_nor_before_somebody_has_looked_after_that() -> None:
    upkeep = Upkeep("mpt0")
    upkeep.path_asked(1, WAY)
    upkeep.looked((), picture())
    assert upkeep.due(1.0) == []
    upkeep.script_done(1)
    assert upkeep.due(1.0) == []
    upkeep.looked((), picture())
    assert upkeep.due(1.0) == [1]
    upkeep.path_gone(1)
    assert upkeep.due(1000.0) == []


def test_the_tunnel_is_its_addresses_and_its_routes() -> None:
    upkeep = with_tunnel()
    upkeep.looked(BOTH, picture([], IN4 + IN6))
    assert upkeep.due(1.0) == []
    for links, routes in (
        (BOTH, IN4[1:] + IN6),
        (BOTH, IN4 + IN6[:2]),
        (device("10.0.1.2/32"), IN4 + IN6),
        ([], IN4 + IN6),
    ):
        upkeep = with_tunnel()
        upkeep.looked(BOTH, picture([], IN4 + IN6))
        upkeep.looked(links, picture([], routes))
        assert upkeep.due(1.0) == [TUNNEL]


def test_two_that_lead_everything_do_not_fight_for_it(caplog: pytest.LogCaptureFixture) -> None:
    upkeep = with_tunnel()
    upkeep.looked(BOTH, picture(routes=[*IN4, *IN6]))
    anothers = [Route(each.version, "main", each.target, "mpt1") for each in (*IN4[:2], *IN6[:2])]
    for _ in range(3):
        upkeep.looked(BOTH, picture(routes=[IN4[2], IN6[2], *anothers]))
        assert upkeep.due(2000.0) == []
    assert caplog.messages == ["mpt1 leads what goes by mpt0: both are to carry the same networks"]
    upkeep.looked(BOTH, picture(routes=[IN4[2], IN6[2]]))
    assert upkeep.due(2001.0) == [TUNNEL], "the other one has gone"


def test_ipv6_that_was_never_there_is_not_missed() -> None:
    upkeep = with_tunnel()
    upkeep.looked(device("10.0.1.2/32"), picture([], IN4))
    assert upkeep.due(1.0) == []


def test_kept_connections_are_missed_once_they_were_seen() -> None:
    upkeep = with_tunnel()
    upkeep.looked(BOTH, picture([], IN4))
    assert upkeep.due(1.0) == []
    upkeep.looked(BOTH, picture([KEPT], [*IN4, KEPT_ROUTE]))
    assert upkeep.due(1.0) == []
    for rules, routes in (([], [*IN4, KEPT_ROUTE]), ([KEPT], IN4)):
        upkeep = with_tunnel()
        upkeep.looked(BOTH, picture([KEPT], [*IN4, KEPT_ROUTE]))
        upkeep.looked(BOTH, picture(rules, routes))
        assert upkeep.due(1.0) == [TUNNEL]


def test_rules_by_which_questions_leave_past_the_tunnel_for_a_while_are_not_missed_afterwards() -> None:
    rules: list[dict[str, object]] = [
        {"priority": 5208, "src": "all", "ipproto": protocol, "dport": 53, "table": "5208"}
        for protocol in ("udp", "tcp")
    ]
    questions = parse_picture({4: rules}, {}).rules
    assert len(questions) == 2
    upkeep = with_tunnel()
    for _ in range(3):
        for others in questions, ():
            upkeep.looked(BOTH, picture([KEPT, *others], [*IN4, KEPT_ROUTE]))
            assert upkeep.due(1.0) == []
    upkeep.looked(BOTH, picture(questions, [*IN4, KEPT_ROUTE]))
    assert upkeep.due(1.0) == [TUNNEL]


def test_who_goes_on_removing_is_answered_ever_more_slowly_and_told_of_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    upkeep, now, waits = with_path(), 100.0, []
    for _ in range(14):
        upkeep.looked((), picture())
        before, now = now, max(now, upkeep.next_deadline())
        waits.append(now - before)
        assert upkeep.due(now) == [1]
        assert upkeep.due(now) == []
    assert waits == [0.0, *(min(LONGEST_SPACING, FIRST_SPACING * 2**n) for n in range(13))]
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    upkeep.looked((), picture([RULE], [ROUTE]))
    upkeep.looked((), picture())
    assert upkeep.due(now + PEACE_AFTER + 1.0) == [1]
    upkeep.looked((), picture())
    assert upkeep.next_deadline() == now + PEACE_AFTER + 1.0 + FIRST_SPACING


def test_the_picture_has_what_can_be_ours_and_no_more() -> None:
    rules: dict[int, list[dict[str, object]]] = {
        4: [
            {"priority": 0, "src": "all", "table": "local"},
            {"priority": 52, "src": "all", "table": "52"},
            {"priority": 5201, "src": "192.0.2.2", "dst": "198.51.100.1", "table": "5201", "protocol": "kernel"},
            {"priority": 5208, "src": "192.0.2.2", "ipproto": "tcp", "sport": 22, "table": "5208"},
        ],
        6: [],
    }
    routes: dict[int, list[dict[str, object]]] = {
        4: [
            {"dst": "default", "gateway": "192.0.2.254", "dev": "wan1"},
            {"dst": "default", "gateway": "192.0.2.254", "dev": "wan1", "table": "5201", "protocol": "kernel"},
            {"dst": "0.0.0.0/1", "dev": "mpt0", "scope": "link"},
            {"type": "local", "dst": "10.0.1.2", "dev": "mpt0", "table": "local"},
            {"type": "unreachable", "dst": "default", "table": "5200"},
        ],
        6: [{"dst": "default", "via": {"host": "fe80::1"}, "dev": "wan1", "table": "5202"}],
    }
    found = parse_picture(rules, routes)
    assert found.rules == {RULE, Rule(4, 5208, "192.0.2.2", "all", "5208", "ipproto tcp sport 22")}
    assert found.routes == {ROUTE, IN4[0], Route(6, "5202", ip_network("::/0"), "wan1", "fe80::1")}


# -- the nft table ---------------------------------------------------------------------------------------------------


def with_gateway() -> Upkeep:
    upkeep = Upkeep("mpt0")
    upkeep.gateway_asked()
    upkeep.script_done(TUNNEL)
    return upkeep


def test_a_table_that_goes_is_made_again_after_a_moment_by_server_and_client() -> None:
    for upkeep in (with_gateway(), with_tunnel()):
        assert upkeep.next_deadline() == float("inf")
        upkeep.table_seen(100.0, is_there=False)
        assert upkeep.next_deadline() == 100.0 + TABLE_SETTLES
        assert upkeep.due(100.0) == []
        assert upkeep.due(100.0 + TABLE_SETTLES) == [TUNNEL]


def test_a_table_that_is_replaced_is_nobodys_business() -> None:
    upkeep = with_gateway()
    upkeep.table_seen(100.0, is_there=False)
    upkeep.table_seen(100.0, is_there=True)
    assert upkeep.next_deadline() == float("inf")
    assert upkeep.due(200.0) == []


def test_nothing_is_made_again_while_the_script_is_at_it() -> None:
    upkeep = with_gateway()
    upkeep.gateway_asked()
    upkeep.table_seen(100.0, is_there=False)
    assert upkeep.due(101.0) == []
    upkeep.script_done(TUNNEL)
    assert upkeep.due(101.0) == [TUNNEL]


def test_who_goes_on_removing_the_table_is_fought_ever_more_slowly_and_told_of_twice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    upkeep, now, times = with_gateway(), 100.0, []
    while now < 1000.0:
        if upkeep.due(now):
            times.append(now)
            upkeep.gateway_asked()
            upkeep.table_seen(now, is_there=True)
            upkeep.script_done(TUNNEL)
        upkeep.table_seen(now, is_there=False)
        now = max(now + 0.01, upkeep.next_deadline())
    spacings = [later - earlier for earlier, later in pairwise(times)]
    assert spacings[0] == pytest.approx(FIRST_SPACING, abs=0.02)
    assert spacings[-1] == pytest.approx(LONGEST_SPACING, abs=0.02)
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    assert "firewall rules" in caplog.text
    assert "networkd" not in caplog.text
