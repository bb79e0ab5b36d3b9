"""The two scripts on machines of their own: what they set up works, and all of it can be taken back, exactly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.machines import ROOT, Machine, machines, source_of, target_of, udp

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

SCRIPTS = {role: ROOT / "scripts" / f"{role}.sh" for role in ("client", "server")}

# A host that is not empty: addresses, default routes, rules, tables and nft of others, among our own numbers too.
FOREIGN = """
ip link add wifi type veth peer name wifi-far; ip link set wifi-far up; ip link set wifi up
ip link add lte type veth peer name lte-far; ip link set lte-far up; ip link set lte up
ip addr add 10.1.0.2/24 dev wifi; ip addr add 2001:db8:1::2/64 dev wifi
ip addr add 10.2.0.2/24 dev lte; ip addr add 2001:db8:2::2/64 dev lte
ip route add default via 10.1.0.1 dev wifi metric 100; ip route add default via 10.2.0.1 dev lte metric 600
ip -6 route add default via 2001:db8:1::1 dev wifi metric 100
ip rule add from 10.2.0.2 lookup 102; ip route add default via 10.2.0.1 dev lte table 102
ip -6 rule add from 2001:db8:2::2 lookup 102; ip -6 route add default via 2001:db8:2::1 dev lte table 102
ip rule add priority 5201 to 192.0.2.0/24 lookup 103; ip rule add priority 5300 to 192.0.2.0/24 lookup 5201
ip rule add priority 52 fwmark 52 lookup 52
nft add table inet mine; nft add chain inet mine forward '{ type filter hook forward priority 5; policy drop; }'
nft add rule inet mine forward ct state established accept comment '"mptunnel mpt01"'
nft add table ip mptunnel_mpt; nft add chain ip mptunnel_mpt mptunnel_mpt0
echo 1 >/proc/sys/net/ipv4/conf/wifi/forwarding; echo 0 >/proc/sys/net/ipv4/conf/all/accept_redirects
echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 1 >/proc/sys/net/ipv4/conf/lte/rp_filter
echo 0 >/proc/sys/net/ipv6/conf/lte/accept_ra
"""
DEVICE = "ip tuntap add {0} mode tun; ip link set {0} mtu 1420 txqueuelen 2000 addrgenmode none up; ip link set {0} down"

CLIENT = {
    "MPT_MTU": "1420",
    "MPT_ADDRESS4": "10.0.1.2",
    "MPT_PEER4": "10.0.1.1",
    "MPT_ADDRESS6": "fd00:1::2",
    "MPT_PEER6": "fd00:1::1",
    "MPT_ROUTES": "0.0.0.0/0 ::/0",
    "MPT_DNS": "9.9.9.9 149.112.112.112 2620:fe::fe",
    "MPT_SERVERS": "198.51.100.1 2001:db8:9::9",
    "MPT_KEEP": "10.1.0.2,203.0.113.7 10.2.0.2,203.0.113.7 2001:db8:1::2,2001:db8:77::1",
}
PATH = {
    "MPT_PATH": "1",
    "MPT_INTERFACE": "lte",
    "MPT_ADDRESS": "10.2.0.2",
    "MPT_GATEWAY": "10.2.0.1",
    "MPT_SERVER": "198.51.100.1",
    "MPT_SHARED": "1",
}
PATH6 = {
    "MPT_PATH": "2",
    "MPT_INTERFACE": "wifi",
    "MPT_ADDRESS": "2001:db8:1::2",
    "MPT_GATEWAY": "fe80::1",
    "MPT_SERVER": "2001:db8:9::9",
}
SERVER = {
    "MPT_MTU": "1420",
    "MPT_ADDRESS4": "10.0.1.1/24",
    "MPT_ADDRESS6": "fd00:1::1/64",
    "MPT_NETWORK4": "10.0.1.0/24",
    "MPT_NETWORK6": "fd00:1::/64",
    "MPT_PORT": "5000",
    "MPT_DNS": "9.9.9.9 10.1.0.53",
}
PEER = {"MPT_PEER": "10.0.1.2 fd00:1::2", "MPT_MTU": "1300"}
# What a whole life of each role does, before `down`.
LIVES = {
    "client": [
        ("up", CLIENT),
        ("path-up", PATH),
        ("path-up", PATH6),
        ("path-up", {**PATH, "MPT_PATH": "0"}),
        ("path-down", {"MPT_PATH": "0"}),
        ("mtu", {"MPT_MTU": "1300"}),
        ("keep", {}),
        ("dns", {"MPT_DNS": "1.1.1.1"}),
        ("mtu", {"MPT_MTU": "1420"}),
    ],
    "server": [("up", SERVER), ("peer-up", PEER), ("peer-up", {**PEER, "MPT_MTU": "1280"}), ("peer-down", PEER)],
}


class Setup:
    """A machine with the scripts of one run directory."""

    def __init__(self, machine: Machine, run_dir: Path) -> None:
        self.machine, self.run_dir = machine, run_dir

    def script(
        self, role: str, verb: str, values: dict[str, str] | None = None, device: str = "mpt0", **more: str
    ) -> subprocess.CompletedProcess[str]:
        saved = str(self.run_dir / f"{device}.saved")
        env = {"MPT_DEVICE": device, "MPT_SAVED": saved, **(values or {}), **more}
        return self.machine.run(str(SCRIPTS[role]), verb, env=env)

    def do(self, role: str, verb: str, values: dict[str, str] | None = None, device: str = "mpt0") -> str:
        """Run a verb that has to work, without a word on stderr, and return what it printed."""
        done = self.script(role, verb, values, device)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def live(self, role: str, device: str = "mpt0") -> None:
        for verb, values in LIVES[role]:
            self.do(role, verb, values, device)

    def value(self, name: str) -> str:
        return self.machine.sh(f"cat /proc/sys/net/{name}").strip()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    for made in machines(1):
        made[0].sh(FOREIGN + DEVICE.format("mpt0"))
        yield Setup(made[0], tmp_path / "run")


@pytest.mark.parametrize("role", LIVES)
def test_after_down_the_host_is_exactly_what_it_was(setup: Setup, role: str) -> None:
    before = setup.machine.look()
    setup.live(role)
    assert setup.machine.look() != before
    setup.do(role, "down")
    assert setup.machine.look() == before
    assert not (setup.run_dir / "mpt0.saved").exists()


@pytest.mark.parametrize("role", LIVES)
def test_up_twice_and_down_twice_are_like_once_and_down_alone_is_harmless(setup: Setup, role: str) -> None:
    before = setup.machine.look()
    setup.do(role, "down")
    assert setup.machine.look() == before
    setup.live(role)
    once, saved = setup.machine.look(), (setup.run_dir / "mpt0.saved").read_text()
    setup.live(role)
    assert (setup.machine.look(), (setup.run_dir / "mpt0.saved").read_text()) == (once, saved)
    setup.do(role, "down")
    setup.do(role, "down")
    assert setup.machine.look() == before


@pytest.mark.parametrize("role", LIVES)
def test_after_a_kill_and_cleanup_the_host_is_exactly_what_it_was(setup: Setup, role: str) -> None:
    setup.machine.sh("ip link del mpt0")
    before = setup.machine.look()
    device = setup.machine.tun()  # goes with its process, as the program's does
    setup.live(role)
    device.end()
    assert setup.machine.look() != before, "a kill leaves nothing behind: then this test shows nothing"
    code = f"from pathlib import Path; from mptunnel import host; host.cleanup(Path({str(setup.run_dir)!r}), 'mpt0')"
    done = setup.machine.run(sys.executable, "-c", code)
    assert not done.returncode, done.stderr
    assert setup.machine.look() == before


@pytest.mark.parametrize("how", ["exit 1", "kill -9 $MPT_KILL; exit 1"], ids=["fails", "is killed"])
@pytest.mark.parametrize("role", LIVES)
def test_down_clears_up_behind_a_script_that_ends_at_any_step(
    setup: Setup, tmp_path: Path, role: str, how: str
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in ("ip", "nft", "cat", "grep"):
        wrapper = bin_dir / tool
        wrapper.write_text(
            f'#!/bin/sh\necho >>"$MPT_COUNT"; [ "$(wc -l <"$MPT_COUNT")" -ne "$MPT_STEP" ] || {{ {how}; }}\n'
            f'exec {shutil.which(tool)} "$@"\n'
        )
        wrapper.chmod(0o755)
    counter = tmp_path / "count"
    env = {"MPT_DEVICE": "mpt0", "MPT_SAVED": str(setup.run_dir / "mpt0.saved"), "MPT_COUNT": str(counter)}
    env |= {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    before = setup.machine.look()
    failures = step = 0
    for step in count(1):
        counter.write_text("")
        command = f'export MPT_KILL=$$; exec "{SCRIPTS[role]}" up'
        values = CLIENT if role == "client" else SERVER
        done = setup.machine.run("sh", "-c", command, env={**env, **values, "MPT_STEP": str(step)})
        failures += bool(done.returncode)
        setup.do(role, "down")
        assert setup.machine.look() == before, f"step {step}: {done.stdout}"
        if counter.read_text().count("\n") < step:
            break
    assert step > 10
    assert failures >= (5 if how == "exit 1" else step - 1)


def test_a_failure_names_the_command_and_what_the_kernel_said(setup: Setup) -> None:
    done = setup.script("client", "path-up", {**PATH, "MPT_INTERFACE": "nope"})
    assert done.returncode == 1
    command = "ip -4 route replace default via 10.2.0.1 onlink dev nope table 5201 proto kernel"
    assert done.stderr.splitlines()[-1] == f'{command}: Cannot find device "nope"'
    assert setup.script("server", "upp").stderr.startswith("no such verb: upp")


def test_a_second_server_keeps_forwarding_until_it_goes_too(setup: Setup) -> None:
    setup.machine.sh(DEVICE.format("mpt1"))
    other = {**SERVER, "MPT_ADDRESS4": "10.0.2.1/24", "MPT_NETWORK4": "10.0.2.0/24", "MPT_ADDRESS6": "fd00:2::1/64"}
    other["MPT_NETWORK6"] = "fd00:2::/64"
    before = setup.machine.look()
    for first, second in (("mpt0", "mpt1"), ("mpt1", "mpt0")):
        setup.do("server", "up", SERVER, "mpt0")
        alone = setup.machine.look()
        setup.do("server", "up", other, "mpt1")
        if first == "mpt1":
            setup.do("server", "down", device=first)
            assert setup.machine.look() == alone
        else:
            setup.do("server", "down", device=first)
            names = ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/wifi/accept_ra")
            assert [setup.value(name) for name in names] == ["1", "1", "2"]
            rules = setup.machine.sh("nft list ruleset")
            assert 'comment "mptunnel mpt1"' in rules
            assert "table inet mptunnel_mpt1" in rules
            assert 'comment "mptunnel mpt0"' not in rules
        setup.do("server", "down", device=second)
        assert setup.machine.look() == before


def test_a_client_beside_a_server_restores_nothing_of_the_other(setup: Setup) -> None:
    setup.machine.sh(DEVICE.format("mpt1"))
    before = setup.machine.look()
    setup.live("server")
    served = setup.machine.look()
    setup.live("client", "mpt1")
    assert "5217:" in setup.machine.sh("ip rule"), "table and priority are 5200 + 16 x instance + path"
    setup.do("client", "down", device="mpt1")
    assert setup.machine.look() == served
    setup.do("server", "down")
    assert setup.machine.look() == before


def test_what_somebody_has_changed_meanwhile_stays_as_he_made_it(setup: Setup) -> None:
    setup.live("client")
    assert setup.value("ipv4/conf/lte/rp_filter") == "2"
    setup.machine.sh("echo 0 >/proc/sys/net/ipv4/conf/lte/rp_filter")
    setup.do("client", "down")
    assert setup.value("ipv4/conf/lte/rp_filter") == "0"
    setup.machine.sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
    setup.live("server")
    setup.do("server", "down")
    assert setup.value("ipv4/ip_forward") == "1"


def test_a_saved_file_of_another_boot_or_namespace_restores_nothing(setup: Setup) -> None:
    setup.do("server", "up", SERVER)
    saved = setup.run_dir / "mpt0.saved"
    head, _, rest = saved.read_text().partition("\n")
    assert re.fullmatch(r"[0-9a-f-]{36} net:\[\d+\]", head)
    saved.write_text(f"{head.replace('net', 'old')}\n{rest}")
    setup.do("server", "down")
    assert setup.value("ipv4/ip_forward") == "1"
    assert not saved.exists()


@pytest.mark.parametrize("role", LIVES)
def test_dry_run_prints_the_commands_and_runs_none(setup: Setup, role: str) -> None:
    setup.machine.sh("ip link del mpt0")
    before = setup.machine.look()
    for verb, values in [*LIVES[role], ("down", {})]:
        done = setup.script(role, verb, values, MPT_DRY_RUN="1")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout or verb in {"keep", "down", "dns"}
        assert all(line.startswith("[#] ") for line in done.stdout.splitlines())
        if verb == "up":
            assert "[#] ip -4 link set dev mpt0 up" in done.stdout
    assert setup.machine.look() == before
    assert not setup.run_dir.exists()


@pytest.mark.parametrize("role", LIVES)
def test_ipv6_switched_off_is_no_failure(setup: Setup, role: str) -> None:
    setup.machine.sh("for all in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$all; done")
    before = setup.machine.look()
    for verb, values in LIVES[role]:
        if values is not PATH6:
            setup.do(role, verb, values)
    assert "fd00:1::" not in setup.machine.sh("ip addr")
    assert setup.machine.sh("ip -4 addr show dev mpt0")
    setup.do(role, "down")
    assert setup.machine.look() == before


@pytest.mark.parametrize("role", LIVES)
def test_a_kernel_without_ipv6_is_no_failure(setup: Setup, tmp_path: Path, role: str) -> None:
    """The directory of IPv6 in /proc/sys is hidden, and an `ip` without IPv6 refuses every word of it."""
    (tmp_path / "empty").mkdir()
    stub = tmp_path / "bin" / "ip"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\ncase " $* " in *" -6 "*) echo "RTNETLINK answers: Address family not supported" >&2; exit 2 ;; esac\n'
        f'exec {shutil.which("ip")} "$@"\n'
    )
    stub.chmod(0o755)
    life = [(verb, values) for verb, values in LIVES[role] if values is not PATH6]
    lines = [f"mount --bind {tmp_path}/empty /proc/sys/net/ipv6", f"PATH={stub.parent}:$PATH"]
    for verb, values in [*life, ("down", {})]:
        given = " ".join(f"{name}='{value}'" for name, value in values.items())
        lines.append(f"env {given} {SCRIPTS[role]} {verb}")
    before = setup.machine.look()
    env = {"MPT_DEVICE": "mpt0", "MPT_SAVED": str(setup.run_dir / "mpt0.saved")}
    done = setup.machine.run("unshare", "--mount", "sh", "-ec", "\n".join(lines), env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[#] ip -4 link set dev mpt0 up" in done.stdout
    assert setup.machine.look() == before


def test_without_nft_the_client_works_with_one_warning_and_the_server_says_what_to_install(
    setup: Setup, tmp_path: Path
) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for directory in os.environ["PATH"].split(":"):
        for tool in Path(directory).glob("*"):
            if tool.name not in {"nft", *(path.name for path in bin_dir.iterdir())}:
                (bin_dir / tool.name).symlink_to(tool)
    before = setup.machine.look()
    done = setup.script("client", "up", CLIENT, PATH=str(bin_dir))
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: nft: not found")
    assert "dev mpt0" in setup.machine.sh("ip route get 203.0.113.9")
    done = setup.script("client", "down", PATH=str(bin_dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert setup.machine.look() == before
    done = setup.script("server", "up", SERVER, PATH=str(bin_dir))
    assert (done.returncode, done.stderr) == (1, "nft: not found; install nftables\n")
    assert setup.machine.look() == before


def test_both_scripts_share_their_helpers_to_the_letter_and_pass_shellcheck() -> None:
    parts = [re.split(r"^# -- .*$", path.read_text(), flags=re.MULTILINE) for path in SCRIPTS.values()]
    assert [len(part) for part in parts] == [3, 3]
    assert parts[0][1] == parts[1][1]
    checker = shutil.which("shellcheck")
    if checker is None and "CI" not in os.environ:
        pytest.skip("shellcheck is not installed")
    assert checker is not None
    done = subprocess.run([checker, "-s", "sh", *SCRIPTS.values()], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_every_variable_a_script_reads_is_described_in_its_head() -> None:
    for path in SCRIPTS.values():
        head, _, body = path.read_text().partition("\n# -- the same")
        assert set(re.findall(r"MPT_[A-Z]\w+", body)) == set(re.findall(r"MPT_[A-Z]\w+", head))
