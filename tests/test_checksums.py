"""What comes out of the tunnel at either end: right checksums on a real cable, super-packets where offload is on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from mptunnel.lab import SERVER, TARGET
from mptunnel.traffic import Datagrams, Download, content_sha256, serve_web
from tests.cables import (
    DATAGRAMS_IN_A_RUN,
    Capture,
    add_lan,
    lay_cable_to_target,
    lay_direct_path,
    require_tcpdump,
    send_runs,
    send_wrong,
    take_uploads,
    upload,
)
from tests.running import Maker, Tunnel, note, wait_until
from tests.stock import DEVICE, Phone, ping, require_tools

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.netns

MTU = 1420
SIZE = 2_000_000
PACKETS = SIZE // MTU
RUNS = 50
ON, OFF = "--offload", "--no-offload"


@pytest.fixture
def tunnel(make_tunnel: Maker) -> Tunnel:
    tunnel = make_tunnel(seed=61)
    require_tcpdump()
    lay_cable_to_target(tunnel.lab)
    serve_web(tunnel.lab)
    take_uploads(tunnel.lab)
    for role in ("sv", "cl"):  # else a packet with a wrong checksum would not be masqueraded
        tunnel.lab.sysctl(role, {"netfilter/nf_conntrack_checksum": 0})
    return tunnel


def connect(tunnel: Tunnel, server: str, client: str) -> None:
    """Start both with a LAN behind the client; see that they use what they were told to.

    Over three paths: two on which every datagram comes by itself, and one that carries whole runs.
    """
    add_lan(tunnel.lab)
    token = tunnel.token_file(tunnel.token())
    tunnel.serve(server)
    tunnel.connect("--join", token, client, uplinks=[*tunnel.uplinks, "-i", lay_direct_path(tunnel.lab)])
    tunnel.wait_up()
    for place, wish in (("sv", server), ("cl", client)):
        used = tunnel.status(place)["offload"]
        assert (used["tcp_super_packets"], used["udp_segment"], used["udp_gro"]) == (wish == ON,) * 3


def exchange(tunnel: Tunnel, *roles: str) -> None:
    """Let each role send and receive by TCP and UDP; all that TCP carries arrives as it was."""
    lab = tunnel.lab
    datagrams = [Datagrams(lab, 1.0, rate=300, size=701, near=role) for role in roles]
    for role in roles:
        upload(lab, role, SIZE)
        send_runs(lab, role, RUNS)
        done = Download(lab, SIZE, role=role).finish()
        assert done.sha256 == content_sha256(SIZE), done.error
    for flow in (flow for each in datagrams for flow in each.finish()):
        assert flow.duplicated == 0
        assert flow.lost < flow.sent / 10  # the bulk beside them may fill a queue


def check(captures: Iterable[Capture], least: list[int]) -> None:
    """End captures; hold the number of right checksums and of wrong ones to it."""
    for capture, enough in zip(captures, least, strict=True):
        capture.finish()
        good, wrong = capture.verdict()
        note(f"{good} right checksums, {len(wrong)} wrong ones")
        assert wrong == []
        assert good > enough
        assert max(capture.sizes()) <= MTU


@pytest.mark.parametrize(
    ("server", "client"),
    [
        (ON, ON),
        pytest.param(ON, OFF, marks=pytest.mark.slow),
        pytest.param(OFF, ON, marks=pytest.mark.slow),
        (OFF, OFF),
    ],
)
def test_a_real_cable_at_either_end_sees_only_right_checksums(tunnel: Tunnel, server: str, client: str) -> None:
    connect(tunnel, server, client)
    captures = [Capture(tunnel, "inet", "net0"), Capture(tunnel, "lan", "eth0")]
    exchange(tunnel, "cl", "lan")
    check(captures, [2 * (PACKETS + RUNS * DATAGRAMS_IN_A_RUN + 300), PACKETS + 300])


def test_a_stock_client_and_the_target_see_only_right_checksums(tunnel: Tunnel) -> None:
    require_tools()
    tunnel.serve(ON)
    Phone(tunnel, tunnel.must("sv", "peer", "add", "phone", "--endpoint", SERVER))
    wait_until(lambda: ping(tunnel.lab, "cl", TARGET), "the phone is in")
    captures = [Capture(tunnel, "inet", "net0"), Capture(tunnel, "cl", DEVICE)]
    exchange(tunnel, "cl")
    check(captures, [PACKETS + RUNS * DATAGRAMS_IN_A_RUN + 300, PACKETS + 300])


@pytest.mark.parametrize("offload", [ON, OFF])
def test_a_wrong_checksum_arrives_wrong_and_tcpdump_says_so(tunnel: Tunnel, offload: str) -> None:
    connect(tunnel, offload, offload)
    capture = Capture(tunnel, "inet", "net0")
    send_wrong(tunnel.lab, "cl")
    upload(tunnel.lab, "cl", 1000)  # so that it has arrived
    capture.finish()
    assert len(capture.verdict()[1]) == 1


@pytest.mark.parametrize("offload", [ON, OFF])
def test_forwarded_traffic_passes_the_devices_as_super_packets(tunnel: Tunnel, offload: str) -> None:
    connect(tunnel, offload, offload)
    ways = [(role, way) for role in ("cl", "sv") for way in ("in", "out")]
    captures = [Capture(tunnel, role, "mpt0", way=way) for role, way in ways]
    upload(tunnel.lab, "lan", SIZE)
    done = Download(tunnel.lab, SIZE, role="lan").finish()
    assert done.sha256 == content_sha256(SIZE), done.error
    shares = {}
    for (role, way), capture in zip(ways, captures, strict=True):
        capture.finish()
        sizes = capture.sizes()
        long = [size for size in sizes if size > MTU]
        shares[role, way] = sum(long) / sum(sizes)
        note(f"{role} mpt0 {way}: {len(sizes)} packets, {len(long)} longer than the MTU, longest {max(sizes)}")
    if offload == ON:
        assert min(shares.values()) > 0.1
    else:
        assert set(shares.values()) == {0.0}


def test_the_program_runs_with_the_offload_that_the_tests_were_told(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=62)
    tunnel.begin()
    is_on = os.environ.get("MPTUNNEL_OFFLOAD") != "0"
    for place in ("sv", "cl"):
        assert tunnel.status(place)["offload"]["udp_segment"] is is_on
