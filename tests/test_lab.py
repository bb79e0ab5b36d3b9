"""The lab itself: what its wires, routers and links do to packets, and that nothing of it stays behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mptunnel import lab as lab_module
from mptunnel.errors import HostError
from mptunnel.lab import SERVER, SERVER6, TARGET, Lab, Topology, Unavailable, two_uplinks

pytestmark = pytest.mark.netns

Opener = Callable[..., Lab]

# What a program in a namespace runs: answers each datagram with the address it came from.
ECHO = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", 9))
    print("ready", flush=True)
    while True:
        _, source = s.recvfrom(99)
        s.sendto(f"{source[0].removeprefix('::ffff:')} {source[1]}".encode(), source)
"""
# A client of it that keeps its socket: one question a line of stdin, prints the answer or "nothing".
ASK = """
import socket, sys
device, address, seconds = sys.argv[1:]
with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    s.bind(("", 5555))
    s.settimeout(float(seconds))
    for _ in sys.stdin:
        try:
            s.sendto(b"?", (address, 9))
            print(s.recv(99).decode(), flush=True)
        except OSError:
            print("nothing", flush=True)
"""


@pytest.fixture
def open_lab() -> Iterator[Opener]:
    with contextlib.ExitStack() as stack:

        def opener(**topology: Any) -> Lab:
            try:
                return stack.enter_context(Lab(two_uplinks(**topology)))
            except Unavailable as error:
                if "CI" in os.environ:
                    raise
                pytest.skip(str(error))

        yield opener


class Asker:
    """A client's socket on one uplink, and the server's answers to it: the address it was seen with."""

    def __init__(self, lab: Lab, device: str = "p1", address: str = SERVER, seconds: float = 0.3) -> None:
        self.echo = lab.spawn("sv", [sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
        assert self.echo.stdout
        assert self.echo.stdout.readline()
        argv = [sys.executable, "-c", ASK, device, address, str(seconds)]
        self.process = lab.spawn("cl", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return str(self.process.stdout.readline().decode()).strip()


def test_every_uplink_leads_to_the_server_through_its_own_nat(open_lab: Opener) -> None:
    lab = open_lab()
    for path in lab.paths:
        asker = Asker(lab, f"p{path}")
        address, port = asker.ask().split()
        assert address == lab.public_address(path)
        assert port != "5555", "masquerading is fully random"
        lab.end(asker.echo)


def test_there_may_be_more_uplinks_than_two(open_lab: Opener) -> None:
    lab = open_lab(paths=4)
    assert Asker(lab, "p4").ask().startswith(lab.public_address(4))


def test_the_target_answers_by_the_uplink_alone(open_lab: Opener) -> None:
    lab = open_lab()
    assert "1 received" in lab.run("cl", ["ping", "-c1", "-W1", "-I", "p2", TARGET])
    counts = lab.wire("p2").counts()
    assert (counts.up.packets, counts.down.packets) == (1, 1)


def test_the_server_reaches_the_target_without_a_wire(open_lab: Opener) -> None:
    assert "1 received" in open_lab().run("sv", ["ping", "-c1", "-W1", TARGET])


def test_the_server_forwards_nothing_of_itself(open_lab: Opener) -> None:
    lab = open_lab()
    assert lab.run("sv", ["cat", "/proc/sys/net/ipv4/ip_forward"]).strip() == "0"


def test_ipv6_outside_has_global_addresses_and_a_link_local_gateway(open_lab: Opener) -> None:
    lab = open_lab(ipv6=True)
    assert "via fe80::1" in lab.run("cl", ["ip", "-6", "route", "show", "default"])
    asker = Asker(lab, "p2", SERVER6)
    assert asker.ask().split()[0] == lab.client_address6(2) == "2001:db8:12::2"
    lab.renumber(2)
    assert asker.ask().split()[0] == lab.client_address6(2) == "2001:db8:12::3"


def test_nothing_unasked_comes_in_through_the_nat(open_lab: Opener) -> None:
    lab = open_lab()
    asker = Asker(lab)
    _, port = asker.ask().split()
    knock = f"import socket; socket.socket(2, 2).sendto(b'knock', ('{lab.public_address(1)}', {port}))"
    lab.run("inet", [sys.executable, "-c", knock])  # another source than the one that was asked
    lab.run("sv", [sys.executable, "-c", knock])  # the same address, another port
    assert lab.wire("p1").counts().down.packets == 3, "the knocks have reached the router"
    assert asker.ask().split()[1] == port, "and its client heard nothing but the answer"


def test_a_cut_wire_is_silent_and_a_mended_one_works(open_lab: Opener) -> None:
    lab = open_lab()
    asker = Asker(lab)
    seen = asker.ask()
    lab.wire("p1").cut()
    assert asker.ask() == "nothing"
    assert "state UP" in lab.run("cl", ["ip", "link", "show", "p1"]), "nobody is told"
    lab.wire("p1").mend()
    assert asker.ask() == seen


def test_one_direction_may_be_cut_alone(open_lab: Opener) -> None:
    lab = open_lab()
    asker = Asker(lab)
    lab.wire("p1").down.cut()
    assert asker.ask() == "nothing"
    counts = lab.wire("p1").counts()
    assert (counts.up.delivered, counts.up.cut, counts.down.cut) == (1, 0, 1)


def test_a_delay_is_kept_to_the_millisecond(open_lab: Opener) -> None:
    lab = open_lab()
    lab.wire("p1").set(delay=0.050)
    lab.run("cl", ["ping", "-c1", "-W1", SERVER])  # ARP
    times = lab.run("cl", ["ping", "-c5", "-i0.02", "-W1", SERVER]).split("time=")[1:]
    assert 100.0 <= sorted(float(each.split()[0]) for each in times)[2] < 102.0


def test_the_same_seed_gives_the_same_losses_on_real_packets(open_lab: Opener) -> None:
    received = []
    for seed in (5, 5, 6):
        lab = open_lab(seed=seed)
        lab.wire("p1").up.set(loss=0.5)
        said = lab.run("cl", ["sh", "-c", f"ping -c40 -i0.005 -W0.2 {SERVER} || true"])
        received.append([line.split("icmp_seq=")[1].split()[0] for line in said.splitlines() if "icmp_seq=" in line])
    assert received[0] == received[1]
    assert received[0] != received[2]
    assert 8 < len(received[0]) < 32


def test_a_link_that_comes_back_has_its_address_and_default_route(open_lab: Opener) -> None:
    lab = open_lab()
    asker = Asker(lab)
    asker.ask()
    before = lab.run("cl", ["ip", "route"])
    lab.link(1, up=False)
    assert asker.ask() == "nothing"
    assert "dev p1" not in lab.run("cl", ["ip", "route"])
    lab.link(1, up=True)
    assert sorted(lab.run("cl", ["ip", "route"]).split("\n")) == sorted(before.split("\n"))
    assert asker.ask() != "nothing"


def test_a_cable_may_be_pulled_at_the_far_end(open_lab: Opener) -> None:
    lab = open_lab()
    lab.carrier(1, up=False)
    assert "NO-CARRIER" in lab.run("cl", ["ip", "link", "show", "p1"])
    lab.carrier(1, up=True)
    assert Asker(lab).ask() != "nothing"


def test_an_interface_that_is_plugged_in_again_is_another_one(open_lab: Opener) -> None:
    lab = open_lab(ipv6=True)
    before = lab.run("cl", ["ip", "-o", "link", "show", "p1"]).split(":")[0]
    lab.unplug(1)
    assert "p1" not in lab.run("cl", ["ip", "link"])
    lab.plug(1)
    assert lab.run("cl", ["ip", "-o", "link", "show", "p1"]).split(":")[0] != before
    lab.link(1, up=True)
    assert Asker(lab, "p1", SERVER6).ask() != "nothing"


def test_all_links_may_be_down_at_the_start(open_lab: Opener) -> None:
    lab = open_lab(links_up=False)
    assert "192.168" not in lab.run("cl", ["ip", "addr"])
    assert not lab.run("cl", ["ip", "route"])
    lab.link(2, up=True)
    assert Asker(lab, "p2").ask().startswith(lab.public_address(2))


def test_renumbering_changes_the_address_and_back(open_lab: Opener) -> None:
    lab = open_lab()
    before = lab.run("cl", ["ip", "route"])
    assert lab.renumber(1) == "192.168.11.3" == lab.client_address(1)
    assert "192.168.11.2" not in lab.run("cl", ["ip", "addr"])
    assert Asker(lab).ask() != "nothing"
    assert lab.renumber(1, 2) == "192.168.11.2"
    assert sorted(lab.run("cl", ["ip", "route"]).split("\n")) == sorted(before.split("\n"))


def test_a_flushed_nat_maps_the_same_socket_to_another_port(open_lab: Opener) -> None:
    lab = open_lab()
    asker = Asker(lab)
    first = asker.ask()
    assert asker.ask() == first
    lab.flush_nat(1)
    second = asker.ask()
    assert second.split()[0] == first.split()[0]
    assert second != first


@pytest.mark.parametrize(("is_strict", "answer"), [(True, "nothing"), (False, "198.51.100.12")])
def test_strict_reverse_path_filtering_drops_what_comes_by_the_lesser_route(
    open_lab: Opener, is_strict: bool, answer: str
) -> None:
    lab = open_lab(strict_rp_filter=is_strict)
    assert Asker(lab, "p2").ask().split()[0] == answer


def test_wires_and_knobs_that_do_not_exist_are_refused(open_lab: Opener) -> None:
    lab = open_lab()
    with pytest.raises(KeyError):
        lab.wire("p3")
    with pytest.raises(TypeError, match=r"a wire has no speed; it has .*delay"):
        lab.wire("p1").set(speed=3)


def test_a_failing_command_says_where_and_why(open_lab: Opener) -> None:
    with pytest.raises(HostError, match=r"sv: ip link show nowhere: .*does not exist"):
        open_lab().run("sv", ["ip", "link", "show", "nowhere"])


def test_nothing_of_a_lab_is_seen_outside_or_stays_behind(open_lab: Opener) -> None:
    open_lab()  # skips where there are none
    before = socket.if_nameindex()
    with Lab() as lab:
        daemon = lab.spawn("cl", ["sh", "-c", "setsid sleep 600 & echo $!; exec sleep 600"], stdout=subprocess.PIPE)
        assert daemon.stdout
        orphan = int(daemon.stdout.readline())
        assert socket.if_nameindex() == before
    assert not is_running(orphan)
    assert daemon.returncode == -signal.SIGTERM


def test_everything_ends_when_the_process_that_opened_the_lab_is_killed(open_lab: Opener) -> None:
    open_lab()  # skips where there are none
    script = """
import sys, time
from mptunnel.lab import Lab
with Lab() as lab:
    print(lab.spawn("cl", ["sleep", "600"]).pid, lab._holder.process.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(lab_module.__file__).parents[1]
    ) as owner:
        assert owner.stdout
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert all(map(is_running, pids))
        owner.kill()
    end = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def refuse(monkeypatch: pytest.MonkeyPatch, uid: int, *reasons: str) -> list[bool]:
    """Let the wires' process be refused for these reasons, one a try; return the tries (rootless or not)."""
    tries: list[bool] = []

    def start(_: Topology, *, is_rootless: bool) -> lab_module._Holder:
        tries.append(is_rootless)
        raise lab_module._why_unavailable(OSError(1, reasons[len(tries) - 1]), is_rootless=is_rootless)

    monkeypatch.setattr(lab_module, "_start", start)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return tries


def test_a_user_who_may_not_make_namespaces_is_told_of_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = refuse(monkeypatch, 1000, "/proc/self/uid_map: Operation not permitted")
    with pytest.raises(Unavailable, match=r"uid_map.*sudo") as raised, Lab():
        pass
    assert raised.value.exit_code == 5
    assert tries == [True]


def test_root_tries_again_without_a_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = refuse(monkeypatch, 0, "unshare: No space left on device", "unshare: Operation not permitted")
    with pytest.raises(Unavailable, match="container") as raised, Lab():
        pass
    assert raised.value.exit_code == 1
    assert tries == [True, False]


def test_a_missing_tun_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 1000, "/dev/net/tun: No such file or directory")
    with pytest.raises(Unavailable, match="modprobe tun") as raised, Lab():
        pass
    assert raised.value.exit_code == 1


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool, **_: None if tool == "nft" else tool)
    with pytest.raises(Unavailable, match="nft: not found; install nftables"), Lab():
        pass
