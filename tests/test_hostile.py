"""A running server and datagrams that nobody should have sent: no answer, no state, no harm to the tunnel beside."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import noise
from mptunnel.config import decode_key
from mptunnel.lab import SERVER
from mptunnel.traffic import Datagrams
from tests.running import Maker, Tunnel, note, note_flows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns

MACS = 32  # bytes at the end of a handshake message
COUNTS = frozenset({"tx", "rx", "tx_bytes", "rx_bytes", "since", "first", "first_share", "missed"})
COUNTS |= {"rtt_ms", "jitter_ms", "loss_up", "loss_down", "lost_up", "lost_down", "traffic", "receipts", "session_age"}

# Prints the payload of all UDP datagrams from or to port 5000 that this machine gets or sends.
CAPTURE = """
import socket
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as s:
    s.bind(("pub", 3))
    print("ready", flush=True)
    while True:
        data = s.recv(65536)
        if data[0] == 0x45 and data[9] == 17 and 5000 in (data[20] << 8 | data[21], data[22] << 8 | data[23]):
            print(data[28:].hex(), flush=True)
"""

# Sends each line of a file ("SOURCE PORT HEX"; "-" is one of our own 16 sockets) to the server at a rate; prints how
# many answers came back to those sockets.
FLOOD = """
import random, socket, struct, sys, time
name, server, rate = sys.argv[1], sys.argv[2], float(sys.argv[3])
own = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(16)]
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for each in own:
    each.setblocking(False)
burst = int(rate / 200) + 1
answers, begun = 0, time.monotonic()
def listen():
    global answers
    for each in own:
        try:
            while each.recv(65536):
                answers += 1
        except BlockingIOError:
            pass
with open(name) as lines:
    for number, line in enumerate(lines):
        source, port, text = line.split(" ")
        data = bytes.fromhex(text)
        if source == "-":
            own[number % 16].sendto(data, (server, 5000))
        else:
            header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 64, 17, 0, *map(socket.inet_aton, (source, server)))
            raw.sendto(header + struct.pack("!HHHH", int(port), 5000, 8 + len(data), 0) + data, (server, 0))
        if number % burst == 0:
            listen()
            time.sleep(max(0.0, begun + number / rate - time.monotonic()))
time.sleep(0.5)
listen()
for each in (*own, raw):
    each.close()
print(answers)
"""


def capture(tunnel: Tunnel) -> list[bytes]:
    """Let a tunnel come up and carry something; return all its datagrams: every type that two of ours exchange."""
    sniffer = tunnel.lab.spawn("sv", [sys.executable, "-c", CAPTURE], stdout=subprocess.PIPE, text=True)
    assert sniffer.stdout
    sniffer.stdout.readline()
    tunnel.begin()
    Datagrams(tunnel.lab, 0.3, rate=300).finish()
    sniffer.kill()
    captured = {bytes.fromhex(line) for line in sniffer.stdout.read().split()}
    tunnel.lab.end(sniffer)
    assert {each[0] for each in captured} >= {1, 2, 4}
    return sorted(captured)


def mutations(genuine: list[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield what cannot be authentic: genuine datagrams changed in many ways, and pure noise."""
    by_type = [[each for each in genuine if each[0] == kind] for kind in (1, 2, 4)]
    by_type.append([bytes([3, 0, 0, 0]) + rng.randbytes(60)])  # cookie replies are rare
    while True:
        datagram = bytearray(rng.choice(rng.choice(by_type)))
        end = len(datagram) - (MACS if datagram[0] in (1, 2) else 0)  # mac1 does not cover mac2
        match rng.randrange(9):
            case 0 | 1 | 2:
                for _ in range(rng.choice((1, 1, 2, 8))):
                    datagram[rng.randrange(4, end)] ^= 1 << rng.randrange(8)
                if bytes(datagram) in genuine:
                    continue
            case 3 if datagram[0] == 4:  # of the session, but a counter that is not used yet
                datagram[8:16] = rng.choice((rng.randrange(1 << 20), rng.getrandbits(64))).to_bytes(8, "little")
            case 3:
                del datagram[rng.randrange(len(datagram)) :]
            case 4:
                datagram += rng.randbytes(rng.choice((1, 15, 16, 100, 3000)))
            case 5:
                datagram[0] = rng.randrange(256)
                datagram[8:end] = rng.randbytes(end - 8)
            case 6:
                datagram[1 + rng.randrange(3)] = rng.randrange(1, 256)
            case 7:
                other = rng.choice(genuine)
                at = rng.randrange(5, end)
                datagram[at:] = other[at:]
                if bytes(datagram) in genuine or datagram[:-16] in [each[:-16] for each in genuine if each[0] == 1]:
                    continue
            case 8:
                datagram = bytearray(rng.randbytes(rng.choice((0, 1, 31, 32, 64, 92, 148, 1400))))
        yield bytes(datagram)


def flood(tunnel: Tunnel, lines: list[str], rate: float) -> subprocess.Popen[Any]:
    path = tunnel.places / "flood"
    path.write_text("\n".join(lines) + "\n")
    argv = [sys.executable, "-c", FLOOD, str(path), SERVER, str(rate)]
    return tunnel.lab.spawn("inet", argv, stdout=subprocess.PIPE, stderr=None, text=True)


def answers_to(process: subprocess.Popen[Any]) -> int:
    return int(process.communicate(timeout=120)[0])


def state_of(tunnel: Tunnel) -> tuple[object, dict[str, bytes]]:
    """Return what a server knows of its peers, counters apart, and its files but the ticking timestamp."""

    def without_counts(value: object) -> object:
        if isinstance(value, dict):
            return {name: without_counts(each) for name, each in value.items() if name not in COUNTS}
        return [without_counts(each) for each in value] if isinstance(value, list) else value

    def content(path: Path) -> bytes:
        return path.read_bytes() if path.is_file() else b""

    files = {path.name: content(path) for path in (tunnel.places / "sv" / "state" / "server").iterdir()}
    del files["timestamp"]
    return without_counts(tunnel.status("sv")["peers"]), files


def drops(tunnel: Tunnel) -> dict[str, int]:
    known: dict[str, int] = tunnel.status("sv")["drops"]
    return known


def check_that_mutations_do_nothing(tunnel: Tunnel, count: int, rate: float) -> None:
    genuine = capture(tunnel)
    time.sleep(0.5)
    rng = random.Random(61)
    endpoints = [each["endpoint"].rsplit(":", 1) for each in tunnel.status("sv")["peers"][0]["paths"]]
    lines = []
    for _, datagram in zip(range(count), mutations(genuine, rng), strict=False):
        is_spoofed = rng.random() < 0.2 and len(datagram) < 1400
        source, port = rng.choice(endpoints) if is_spoofed else ("-", "0")
        lines.append(f"{source} {port} {datagram.hex()}")
    before, session_age, counted = state_of(tunnel), tunnel.status("sv")["peers"][0]["session_age"], drops(tunnel)
    beside = Datagrams(tunnel.lab, count / rate + 0.5, rate=300)
    process = flood(tunnel, lines, rate)
    flows = beside.finish()
    assert answers_to(process) == 0
    note_flows("beside a flood", *flows)
    for flow in flows:
        assert (flow.lost, flow.duplicated) == (0, 0)
    assert state_of(tunnel) == before
    assert tunnel.status("sv")["peers"][0]["session_age"] > session_age, "the same session"
    more = {kind: number - counted.get(kind, 0) for kind, number in drops(tunnel).items()}
    note(f"{count} mutated datagrams: {more}")
    for kind in ("malformed datagram", "wrong mac1", "unknown index", "not authentic"):
        assert more.get(kind, 0) > count / 100, kind
    assert sum(more.values()) >= count, "each is counted"


def test_mutated_datagrams_get_no_answer_and_change_nothing(make_tunnel: Maker) -> None:
    check_that_mutations_do_nothing(make_tunnel(seed=61), 20_000, 4000.0)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_datagrams_get_no_answer_and_change_nothing(make_tunnel: Maker) -> None:
    check_that_mutations_do_nothing(make_tunnel(seed=62), 100_000, 4000.0)


def test_replays_and_strangers_get_no_answer_and_change_nothing(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=63)
    genuine = capture(tunnel)
    time.sleep(5.0)  # as long as copies of an initiation are answered, for they may come by several paths
    server = decode_key(tunnel.status("sv")["public_key"])
    lines = [f"- 0 {datagram.hex()}" for datagram in genuine]
    for number in range(30):
        stranger = noise.StaticKey(random.Random(number).randbytes(32))
        remote = noise.Remote(stranger, server)
        made = noise.create_initiation(stranger, remote, number, bytes(12), random.Random(number).randbytes)
        lines.append(f"- 0 {made.datagram.hex()}")
    before, counted = state_of(tunnel), drops(tunnel)
    assert answers_to(flood(tunnel, lines, 100.0)) == 0
    assert state_of(tunnel) == before
    more = {kind: number - counted.get(kind, 0) for kind, number in drops(tunnel).items()}
    note(f"{len(lines)} replays and strangers: {more}")
    assert more["initiation replayed"] > 0
    assert more["duplicate"] > 0
    assert sum(more.values()) >= len(lines)
