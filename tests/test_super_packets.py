"""Super-packets of the real kernel: split, put together again, and handed to another kernel."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel.packet import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, MAX_SEGMENTS
from tests.machines import Machine, machines
from tests.relay import MTU, Seen

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

BULK = [1, 1369, 65_001, 300_003, 40_000, 77_777]
FIN, PSH = 0x01, 0x08
WAYS = [(True, True), (False, True), (False, False)]

each_version = pytest.mark.parametrize("version", [4, 6])
each_way = pytest.mark.parametrize(
    ("partial", "together"), WAYS, ids=["partial checksums", "full checksums", "one by one"]
)


@pytest.fixture
def machine() -> Iterator[Machine]:
    for (made,) in machines(1):
        yield made


def carried(machine: Machine, **wish: Any) -> Seen:
    """Let the relay carry what is wished, and see that all arrived, nothing was refused and every sum right."""
    done = machine.run(sys.executable, "-W", "error", "-m", "tests.relay", json.dumps(wish))
    assert not done.returncode, done.stderr
    known = json.loads(done.stdout)
    seen = Seen(**known | {"kinds": {int(kind): count for kind, count in known["kinds"].items()}})
    assert (seen.is_whole, seen.refused, seen.bad_sums) == (True, 0, 0)
    return seen


@each_version
@each_way
def test_tcp_in_bulk_arrives_to_the_byte(machine: Machine, version: int, partial: bool, together: bool) -> None:
    seen = carried(machine, kind="tcp", version=version, writes=BULK, partial=partial, together=together)
    assert seen.kinds.get(GSO_TCPV4 if version == 4 else GSO_TCPV6, 0) >= 3
    assert seen.segments > 20
    assert seen.odd
    assert seen.differing == []
    assert (seen.written > 10 * MTU) or not together


@each_version
@each_way
def test_the_end_of_a_stream_is_on_the_last_segment_only(
    machine: Machine, version: int, partial: bool, together: bool
) -> None:
    wish = {"kind": "tcp", "version": version, "writes": [40_000, 41_001], "at_once": True}
    seen = carried(machine, **wish, partial=partial, together=together)
    assert seen.flags & (FIN | PSH) == FIN | PSH
    assert seen.differing == []


@each_version
def test_short_segments_arrive_to_the_byte(machine: Machine, version: int) -> None:
    wish = {"kind": "tcp", "version": version, "writes": BULK, "partial": False, "segment": 537}
    for together in (True, False):
        seen = carried(machine, **wish, together=together)
        assert seen.odd > 3
        assert seen.segments > MAX_SEGMENTS
        assert seen.differing == []


def test_headers_with_ip_options_arrive_to_the_byte(machine: Machine) -> None:
    wish = {"kind": "tcp", "version": 4, "writes": BULK, "options": "01010100"}
    for partial, together in WAYS:
        seen = carried(machine, **wish, partial=partial, together=together)
        assert seen.segments > 20
        assert seen.differing == []


@each_version
def test_a_segment_lost_in_the_middle_is_the_only_one_sent_again(machine: Machine, version: int) -> None:
    wish = {"kind": "tcp", "version": version, "writes": BULK, "partial": True, "together": True, "lost": 3}
    assert carried(machine, **wish).differing == []


@each_version
@each_way
def test_runs_of_datagrams_arrive_as_they_were_sent(
    machine: Machine, version: int, partial: bool, together: bool
) -> None:
    sizes = {"segment": 1001, "writes": [1002, 5 * 1001, 10 * 1001 + 333, 60 * 1001 + 1]}
    seen = carried(machine, kind="udp", version=version, partial=partial, together=together, **sizes)
    if not seen.takes_udp:
        pytest.skip("this kernel has no UDP super-packets at a TUN device (Linux 6.2)")
    assert seen.kinds == {GSO_UDP_L4: 4}
    assert seen.odd
    assert seen.segments == 61
    assert seen.differing == []
