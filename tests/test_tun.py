"""The device in a namespace of its own: by python-pytun and by the ioctl, with offload and without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mptunnel.lab import Lab, Unavailable, two_uplinks

pytestmark = pytest.mark.netns

SCRIPT = """
import os, select, socket, struct, subprocess, sys
by_ioctl, offload = sys.argv[1] == "ioctl", sys.argv[2] == "offload"
if by_ioctl:
    sys.modules["pytun"] = None
from mptunnel.errors import ConfigError
from mptunnel.packet import VNET, VNET_SIZE, complete, split
from mptunnel.tun import Tun
tun = Tun("mpt7", 1420, offload=offload)
assert (tun._device is None) == by_ioctl
assert not os.get_inheritable(tun.fileno()) and not os.get_blocking(tun.fileno())
for line in ("addr add 10.9.0.1/24 dev mpt7", "link set mpt7 mtu 1420 up"):
    subprocess.run(["ip", *line.split()], check=True)
try:
    Tun("mpt7", 1420)
    raise SystemExit("a second one was made")
except ConfigError as error:
    assert "-t" in str(error)
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.bind(("10.9.0.1", 4000))
def read():
    while True:
        assert select.select([tun.fileno()], [], [], 10)[0]
        for frame in tun.read():
            for packet in split(frame, takes_partial=False):
                if packet[0] == 0x45 and packet[9] == 17:
                    return bytes(packet)
sent = [bytes([n]) * 300 for n in range(5)]
packets = []
for each in sent:
    out.sendto(each, ("10.9.0.2", 5000))
    packets.append(read())
assert [p[28:] for p in packets] == sent
def turned(p):  # the same packet as an answer, its checksum still right
    return p[:12] + p[16:20] + p[12:16] + p[22:24] + p[20:22] + p[24:]
inbound = [turned(p) for p in packets]
assert tun.write(inbound) == 0
out.settimeout(10)
assert [out.recv(2000) for _ in sent] == sent
assert tun.write([bytes(20)]) == 1
out.close()
tun.close()
print("fine", tun.takes_tcp)
"""


@pytest.mark.parametrize("way", ["pytun", "ioctl"])
@pytest.mark.parametrize("offload", ["offload", "plain"])
def test_packets_pass_both_ways_however_the_device_was_made(way: str, offload: str) -> None:
    try:
        lab = Lab(two_uplinks())
        with lab:
            said = lab.run("inet", [sys.executable, "-W", "error", "-c", SCRIPT, way, offload])
    except Unavailable as error:
        pytest.skip(str(error))
    assert said.split() == ["fine", str(offload == "offload")]


def test_without_privilege_the_error_says_what_to_run() -> None:
    code = "from mptunnel.tun import Tun; Tun('mpt8', 1420)"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--", sys.executable, "-c", code]
        if __import__("os").geteuid() == 0
        else [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    assert "not permitted; run it as root" in done.stderr
