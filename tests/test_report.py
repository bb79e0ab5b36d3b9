"""What people read: the status, the tokens, the peers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mptunnel.errors import ConfigError
from mptunnel.report import (
    duration,
    event_text,
    is_degraded,
    milliseconds,
    packets,
    peers_text,
    receipts_line,
    share,
    size,
    status_text,
    table,
    tokens_text,
)

UP = {"packets": 120482, "received": 120482, "saved": 1111, "lost": 0, "longest_gap_ms": 12.3}
UP |= {"outages_bridged": 2, "bridged_s": 7.9}
DOWN = {"packets": 99120, "received": 99117, "saved": 123, "lost": 3, "longest_gap_ms": 8.2}
ALONE = {"lost": 1060, "longest_gap_ms": 7512.3}
WLAN = {
    "id": 0,
    "name": "wlan0",
    "interface": "wlan0",
    "address": "192.168.1.5",
    "seen_as": "203.0.113.7:41822",
    "state": "up",
    "since": 8000.0,
    "rtt_ms": 23.4,
    "jitter_ms": 4.1,
    "loss_up": 0.001,
    "loss_down": 0.0253,
    "first": 73494,
    "first_share": 0.61,
    "tx": 120482,
    "rx": 99120,
    "tx_bytes": 99_000_000,
    "rx_bytes": 1_200_000_000,
    "mtu": 1420,
    "errors": {},
    "alone": {"up": ALONE, "down": ALONE | {"lost": 3, "longest_gap_ms": 8.2}},
}
GONE = dict.fromkeys(WLAN) | {
    "id": 1,
    "name": "10.64.3.9",
    "state": "waiting",
    "tx_bytes": 0,
    "rx_bytes": 0,
    "errors": {"ENODEV": 2},
    "alone": {"up": None, "down": ALONE},
}
CLIENT: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "role": "client",
    "device": "mpt0",
    "pid": 1,
    "uptime": 183712.3,
    "state": "up",
    "server": {
        "name": "vpn.example.org:5000",
        "address": "198.51.100.1",
        "public_key": "",
        "multipath": True,
        "session_age": 45.2,
    },
    "tunnel": {"ipv4": "10.0.1.2", "ipv6": "fd12::2", "mtu": 1420},
    "traffic": {"up": {"packets": 120482, "bytes": 99_000_000}, "down": {"packets": 99117, "bytes": 1_200_000_000}},
    "receipts": {"up": UP, "down": DOWN},
    "paths": [WLAN, GONE],
    "drops": {"replay": 1200, "mac": 0},
}
SERVER: dict[str, Any] = {
    "format": 1,
    "role": "server",
    "device": "mpt1",
    "uptime": 59.0,
    "state": "up",
    "public_key": "KEY=",
    "port": 5000,
    "network": {"ipv4": "10.0.1.0/24", "ipv6": "fd12::/64"},
    "peers": [
        {"name": "phone", "ipv4": "10.0.1.3", "ipv6": "fd12::3", "state": "never", "multipath": False, "paths": []},
        {
            "name": "van-7",
            "ipv4": "10.0.1.2",
            "ipv6": "fd12::2",
            "state": "up",
            "multipath": True,
            "session_age": 4.0,
            "receipts": {"up": UP, "down": None},
            "paths": [{"id": 0, "endpoint": "203.0.113.7:41822", "state": "fresh", "rtt_ms": 0.4}],
        },
    ],
    "drops": {},
}


def test_a_clients_status_reads_like_this() -> None:
    assert status_text(CLIENT) == (
        """\
mpt0: client of vpn.example.org:5000 (198.51.100.1), up, running for 2 d 3 h
  redundancy saved 1,234 packets and bridged 2 outages (7.9 s); lost on every path 3; longest gap 12 ms
  address 10.0.1.2, fd12::2, MTU 1420, session 45 s old

  tunnel  packets   bytes  saved  lost  longest gap
  up      120,482   99 MB  1,111     0        12 ms
  down     99,117  1.2 GB    123     3       8.2 ms

  path       state          round trip  lost up   down  first   sent  received
  wlan0      up 2 h 13 min  23 ms ±4     0.10 %  2.5 %   61 %  99 MB    1.2 GB  192.168.1.5 seen as 203.0.113.7:41822
  10.64.3.9  waiting        -                 -      -      -    0 B       0 B
  wlan0 alone: up 1,060 lost, longest gap 7.5 s; down 3 lost, longest gap 8.2 ms
  10.64.3.9 alone: down 1,060 lost, longest gap 7.5 s
  10.64.3.9: 2 x ENODEV
  dropped: replay 1,200"""
    )


def test_a_servers_status_reads_like_this() -> None:
    assert status_text(SERVER) == (
        """\
mpt1: server on UDP port 5000, up, running for 59 s
  1 of 2 peers up, network 10.0.1.0/24, fd12::/64
  public key KEY=

  van-7: up, 10.0.1.2, fd12::2, session 4 s old
    redundancy saved 1,111 packets and bridged 2 outages (7.9 s); lost on every path 0; longest gap 12 ms

    path  state  round trip  lost up  down  first  sent  received
    0     fresh  0.4 ms            -     -      -   0 B       0 B  203.0.113.7:41822

  phone: never seen yet, 10.0.1.3, fd12::3"""
    )


@pytest.mark.parametrize(("state", "words"), [("connecting", "UDP port open"), ("silent", "silent on every path")])
def test_a_tunnel_that_is_not_up_says_what_to_look_at(state: str, words: str) -> None:
    assert words in status_text(CLIENT | {"state": state})
    assert words not in status_text(CLIENT)


def test_a_stock_server_and_a_stock_peer_are_said_to_be() -> None:
    stock = CLIENT | {"server": CLIENT["server"] | {"multipath": False}}
    assert "stock WireGuard" in status_text(stock)
    peer = SERVER["peers"][1] | {"multipath": False}
    assert "van-7: up, one path, 10.0.1.2" in status_text(SERVER | {"peers": [peer]})


def test_a_status_with_nothing_in_it_yet_can_be_read() -> None:
    assert "no receipts yet" in status_text({"format": 1, "role": "client", "device": "mpt0", "state": "connecting"})
    assert "0 of 0 peers up" in status_text({"format": 1, "role": "server", "device": "mpt0", "state": "up"})


def test_a_status_of_another_format_is_refused_with_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"format 2, this mptunnel reads format 1; .*--json"):
        status_text(CLIENT | {"format": 2})


def test_the_headline_adds_both_directions_and_takes_the_longest_gap() -> None:
    one = UP | {"saved": 1, "lost": 0, "outages_bridged": 0}
    assert receipts_line({"up": one, "down": None}).startswith("redundancy saved 1 packet;")
    once = one | {"outages_bridged": 1, "bridged_s": 75.0}
    assert receipts_line({"up": once}).startswith("redundancy saved 1 packet and bridged 1 outage (1 min);")
    assert receipts_line({"up": UP, "down": DOWN}).endswith("lost on every path 3; longest gap 12 ms")
    assert receipts_line({"up": None, "down": None}) == receipts_line(None) == "no receipts yet"


def test_what_was_lately_stands_under_the_headline() -> None:
    minute, hour = {"saved": 5, "lost": 0, "longest_gap_ms": 0.0}, {"saved": 1000, "lost": 2, "longest_gap_ms": 40.0}
    up, down = (UP | {"minute": minute, "hour": hour}, DOWN | {"minute": minute, "hour": hour | {"longest_gap_ms": 50}})
    lines = status_text(CLIENT | {"receipts": {"up": up, "down": down}}).splitlines()
    assert lines[2] == (
        "  last minute 10 saved, 0 lost, longest gap 0 ms; last hour 2,000 saved, 4 lost, longest gap 50 ms"
    )
    peer = SERVER["peers"][1] | {"receipts": {"up": up, "down": None}}
    assert "    last minute 5 saved, 0 lost, longest gap 0 ms; last" in status_text(SERVER | {"peers": [peer]})


@pytest.mark.parametrize("state", ["waiting", "probing", "slow", "down"])
def test_a_client_with_any_path_that_is_not_up_is_degraded(state: str) -> None:
    whole = CLIENT | {"paths": [WLAN, WLAN]}
    assert not is_degraded(whole)
    assert is_degraded(CLIENT | {"paths": [WLAN, WLAN | {"state": state}]})
    assert is_degraded(whole | {"state": "silent"})
    assert is_degraded(whole | {"paths": []})


def test_a_server_is_degraded_by_a_lapsed_path_of_a_peer_that_is_there() -> None:
    assert not is_degraded(SERVER)
    lapsed = copy.deepcopy(SERVER)
    lapsed["peers"][1]["paths"][0]["state"] = "lapsed"
    assert is_degraded(lapsed)
    lapsed["peers"][1]["state"] = "silent"
    assert not is_degraded(lapsed)


def test_tokens_are_a_table() -> None:
    entry = {"ident": "0123abcd", "state": "new", "label": "", "name": "", "created": 0, "expires": 5400, "ended": None}
    spent = entry | {"ident": "ffff0000", "state": "spent", "label": "for Anna", "name": "van-7", "ended": 300}
    assert tokens_text([entry, spent], now=2100) == (
        """\
token     state  time         used by  label
0123abcd  new    55 min left  -        -
ffff0000  spent  30 min ago   van-7    for Anna"""
    )
    assert tokens_text([], now=0) == "no tokens"


def test_peers_are_a_table() -> None:
    peer = {"name": "van-7", "ipv4": "10.0.1.2", "ipv6": "fd12::2", "public_key": "KEY=", "added": 0}
    assert peers_text([peer], now=90000) == (
        """\
peer   ipv4      ipv6     public key  added
van-7  10.0.1.2  fd12::2  KEY=        1 d 1 h ago"""
    )
    assert peers_text([], now=0) == "no peers"


def test_columns_stand_under_their_heads() -> None:
    assert table(("a", "number"), [("xyz", "1")], frozenset({"number"})) == "a    number\nxyz       1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9949, "9.9 kB"),
        (9950, "10 kB"),
        (999_600, "1.0 MB"),
        (3e18, "3000 PB"),
    ],
)
def test_sizes_have_two_or_three_digits(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 ms"), (0.44, "0.4 ms"), (9.95, "10 ms"), (999.4, "999 ms"), (1234, "1.2 s")]
)
def test_times_have_two_or_three_digits(value: float, text: str) -> None:
    assert milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86400, "1 d"),
        (86400 * 2 + 3600 * 3 + 59, "2 d 3 h"),
    ],
)
def test_durations_have_their_two_largest_units(value: float, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 %"),
        (0.00001, "<0.01 %"),
        (0.0025, "0.25 %"),
        (0.05, "5.0 %"),
        (0.25, "25 %"),
        (1.0, "100 %"),
    ],
)
def test_shares_are_percent(value: float | None, text: str) -> None:
    assert share(value) == text


def test_one_packet_is_one_packet() -> None:
    assert (packets(1), packets(0), packets(1234)) == ("1 packet", "0 packets", "1,234 packets")


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "path-down", "peer": "vpn", "path": "wlan0", "interface": "wlan0", "why": "3 probes unanswered"},
            "path-down vpn wlan0: 3 probes unanswered",
        ),
        (
            {"event": "path-up", "peer": "vpn", "path": "10.0.0.2", "interface": "eth0", "rtt_ms": 23.41},
            "path-up vpn 10.0.0.2 (eth0): rtt 23 ms",
        ),
        (
            {"event": "path-up", "peer": "van", "path": "0", "endpoint": "192.0.2.1:4"},
            "path-up van 0: endpoint 192.0.2.1:4",
        ),
        ({"event": "gap-over", "peer": "vpn", "lasted_ms": 1234.5}, "gap-over vpn: lasted 1.2 s"),
        ({"event": "tunnel-up", "peer": "vpn"}, "tunnel-up vpn"),
    ],
)
def test_an_event_is_one_line(event: dict[str, Any], text: str) -> None:
    line = event_text({"time": 1000.0625, "device": "mpt0", **event})
    assert line.partition(" ")[0].endswith(":40.062")
    assert line.partition(" ")[2] == text
