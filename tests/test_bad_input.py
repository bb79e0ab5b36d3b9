"""What a user gets for what cannot work: one line that says what to do, an exit code, and a host left alone."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mptunnel.lab import SERVER, TARGET

if TYPE_CHECKING:
    from pathlib import Path

    from tests.running import Maker, Tunnel

pytestmark = pytest.mark.netns

HOLD_PORT = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 5000))
    print("ready", flush=True)
    time.sleep(60)
"""
# Runs a program in a mount namespace where /dev/net is an empty directory.
WITHOUT_TUN = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /dev/net; exec "$@"', "sh"]
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]


def refused(tunnel: Tunnel, place: str, *words: str, through: list[str] | None = None) -> tuple[int, str]:
    """Run a program that has to end by itself, having changed nothing; return its exit code and the line it said."""
    before = tunnel.look(place)
    command = [*(through or []), *tunnel.command(place, *words)]
    process = tunnel.lab.spawn(place, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=20)[1]
    assert said.count("\n") == 1, said
    assert said.startswith("mptunnel: "), said
    assert tunnel.look(place) == before
    return process.returncode, said.removeprefix("mptunnel: ").strip()


def server_key(tunnel: Tunnel) -> Path:
    tunnel.token()
    return tunnel.places / "sv" / "state" / "server" / "key"


def test_what_is_not_there_is_named_and_taken_up_when_it_appears(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(paths=3, seed=71)
    tunnel.lab.unplug(3)
    token = tunnel.token_file(tunnel.token())
    tunnel.serve()
    tunnel.connect("--join", token, uplinks=["-i", "192.168.11.2", "-i", "192.168.12.9", "-i", "p3"])
    tunnel.wait_up("p1")
    said = tunnel.wait_log("cl", "-i 192.168.12.9 is not there")
    assert "warning: " in said
    assert "did you mean 192.168.12.2?" in said
    assert "-i p3 is not there; see 'ip -brief address'. It is taken up when it appears" in tunnel.log("cl")
    assert "1 received" in tunnel.lab.run("cl", ["ping", "-c1", "-W2", TARGET])
    tunnel.lab.renumber(2, 9)
    tunnel.wait_up("p2")
    tunnel.lab.plug(3)
    tunnel.lab.link(3, up=True)
    tunnel.wait_up("p1", "p2", "p3")


def test_an_address_on_two_interfaces_is_refused_with_the_cure(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=72)
    tunnel.lab.ip("cl", f"addr add {tunnel.lab.client_address(1)}/24 dev p2")
    joined = ("--join", tunnel.token_file(tunnel.token()))
    code, said = refused(tunnel, "cl", "-c", SERVER, *tunnel.uplinks, *joined)
    assert code == 2
    assert "name the interface: -i p1" in said


def test_without_a_tun_device_or_privilege_one_line_says_what_to_run(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=73)
    joined = ("-c", SERVER, "--join", tunnel.token_file(tunnel.token()))
    for place, words in (("sv", ["-s"]), ("cl", [*joined])):
        code, said = refused(tunnel, place, *words, through=WITHOUT_TUN)
        assert (code, "modprobe tun" in said) == (1, True), said
        code, said = refused(tunnel, place, *words, through=WITHOUT_PRIVILEGE)
        assert (code, "--cap-add NET_ADMIN" in said) == (5, True), said


def test_a_port_in_use_is_refused(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=74)
    holder = tunnel.lab.spawn("sv", [sys.executable, "-c", HOLD_PORT], stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    code, said = refused(tunnel, "sv", "-s")
    assert code == 2
    assert "UDP port 5000: it is in use" in said


def test_a_second_instance_of_one_device_is_refused(make_tunnel: Maker) -> None:
    tunnel = make_tunnel(seed=75)
    server = tunnel.serve()
    code, said = refused(tunnel, "sv", "-s")
    assert code == 2
    assert f"mpt0 is in use by process {server.pid}" in said
    code, said = refused(tunnel, "sv", "-s", "-t", "mpt1", "-p", "5001")
    assert code == 2
    assert f"server is in use by process {server.pid}" in said
    assert server.poll() is None


@pytest.mark.parametrize("how", ["readable by others", "torn", "of a later version", "a link"])
def test_a_key_that_cannot_be_trusted_is_refused(make_tunnel: Maker, how: str) -> None:
    tunnel = make_tunnel(seed=76)
    key = server_key(tunnel)
    match how:
        case "readable by others":
            key.chmod(0o640)
        case "torn":
            key.write_text(key.read_text()[:20])
        case "of a later version":
            key.write_text(key.read_text().replace('"format": 1', '"format": 2'))
        case "a link":
            key.rename(key.with_name("elsewhere"))
            key.symlink_to("elsewhere")
    code, said = refused(tunnel, "sv", "-s")
    assert code == 2
    assert str(key) in said


def test_a_configuration_that_makes_no_sense_is_refused(make_tunnel: Maker, tmp_path: Path) -> None:
    tunnel = make_tunnel(seed=77)
    file = tmp_path / "mptunnel.toml"
    file.write_text("prot = 5001\nserver = true\n")
    for words, what in (
        (["--config", str(file)], "did you mean port?"),
        (["-s", "-c", SERVER], "exclude each other"),
        (["-c", SERVER], "--join TOKEN"),
        (["-s", "-t", "tun0"], "mpt"),
        (["-s", "--network", "10.0.1.0/33"], "10.0.1.0/33"),
        (["-c", SERVER, *[word for n in range(9) for word in ("-i", f"p{n}")]], "8"),
    ):
        code, said = refused(tunnel, "sv", *words)
        assert (code, what in said) == (2, True), said
