"""The two scripts on machines of their own: what they set up works, and all of it can be taken back, exactly."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.machines import CLIENT, DEVICE, PATH, PATH6, PEER, SCRIPTS, SERVER, Setup, furnished

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.netns

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


def live(setup: Setup, role: str, device: str = "mpt0") -> None:
    for verb, values in LIVES[role]:
        setup.do(role, verb, values, device)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    yield from furnished(tmp_path)


@pytest.mark.parametrize("role", LIVES)
def test_after_down_the_host_is_exactly_what_it_was(setup: Setup, role: str) -> None:
    before = setup.machine.look()
    live(setup, role)
    assert setup.machine.look() != before
    setup.do(role, "down")
    assert setup.machine.look() == before
    assert not (setup.run_dir / "mpt0.saved").exists()


@pytest.mark.parametrize("role", LIVES)
def test_up_twice_and_down_twice_are_like_once_and_down_alone_is_harmless(setup: Setup, role: str) -> None:
    before = setup.machine.look()
    setup.do(role, "down")
    assert setup.machine.look() == before
    live(setup, role)
    once, saved = setup.machine.look(), (setup.run_dir / "mpt0.saved").read_text()
    again = setup.do(role, *LIVES[role][0])
    assert not re.findall(r"(?:addr|route|rule) (?:del|flush) (?!table 5208).*", again), (
        "something was away for a moment"
    )
    live(setup, role)
    assert (setup.machine.look(), (setup.run_dir / "mpt0.saved").read_text()) == (once, saved)
    setup.do(role, "down")
    setup.do(role, "down")
    assert setup.machine.look() == before


@pytest.mark.parametrize("role", LIVES)
def test_after_a_kill_and_cleanup_the_host_is_exactly_what_it_was(setup: Setup, role: str) -> None:
    setup.machine.sh("ip link del mpt0")
    before = setup.machine.look()
    device = setup.machine.tun()  # goes with its process, as the program's does
    live(setup, role)
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
    assert failures >= (5 if how == "exit 1" else step - 4)  # two in one pipe may count as one


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
    live(setup, "server")
    served = setup.machine.look()
    live(setup, "client", "mpt1")
    assert "5217:" in setup.machine.sh("ip rule"), "table and priority are 5200 + 16 x instance + path"
    setup.do("client", "down", device="mpt1")
    assert setup.machine.look() == served
    setup.do("server", "down")
    assert setup.machine.look() == before


def test_two_clients_on_one_interface_both_keep_it_loose_until_the_last_goes(setup: Setup) -> None:
    before = setup.machine.look()
    for device in "mpt0", "mpt1":
        setup.do("client", "path-up", PATH, device)
    setup.do("client", "down", device="mpt0")
    assert setup.value("ipv4/conf/lte/rp_filter") == "2"
    setup.do("client", "down", device="mpt1")
    assert setup.machine.look() == before


def test_what_somebody_has_changed_meanwhile_stays_as_he_made_it(setup: Setup) -> None:
    live(setup, "client")
    assert setup.value("ipv4/conf/lte/rp_filter") == "2"
    setup.machine.sh("echo 0 >/proc/sys/net/ipv4/conf/lte/rp_filter")
    setup.do("client", "down")
    assert setup.value("ipv4/conf/lte/rp_filter") == "0"
    setup.machine.sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
    live(setup, "server")
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


def test_a_saved_file_of_another_boot_is_no_reason_to_leave_a_value(setup: Setup) -> None:
    before = setup.machine.look()
    live(setup, "client")
    (setup.run_dir / "mpt1.saved").write_text("old\n/proc/sys/net/ipv4/conf/lte/rp_filter 0 2\n")
    setup.do("client", "down")
    assert setup.machine.look() == before


def test_down_without_up_leaves_a_device_of_somebody_else_alone(setup: Setup) -> None:
    setup.machine.sh("ip link set mpt0 up; ip addr add 10.9.0.1/24 dev mpt0")
    before = setup.machine.look()
    for role in LIVES:
        setup.do(role, "down")
    assert setup.machine.look() == before


def test_two_instances_do_not_change_values_at_the_same_time(setup: Setup) -> None:
    setup.run_dir.mkdir()
    with (setup.run_dir / "saved.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = {
            **PATH,
            "MPT_DEVICE": "mpt0",
            "MPT_SAVED": str(setup.run_dir / "mpt0.saved"),
            "PATH": os.environ["PATH"],
        }
        command = [*setup.machine.enter, str(SCRIPTS["client"]), "path-up"]
        with subprocess.Popen(command, env=path, stdout=subprocess.DEVNULL) as script:
            with pytest.raises(subprocess.TimeoutExpired):
                script.wait(0.5)
            assert setup.value("ipv4/conf/lte/rp_filter") == "1"
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert script.wait(10) == 0
    assert setup.value("ipv4/conf/lte/rp_filter") == "2"


def test_a_signal_to_everybody_does_not_stop_a_script_half_way(setup: Setup, tmp_path: Path) -> None:
    wrapper = tmp_path / "ip"
    wrapper.write_text(f'#!/bin/sh\nkill -TERM $MPT_KILL\nkill -INT $MPT_KILL\nexec {shutil.which("ip")} "$@"\n')
    wrapper.chmod(0o755)
    env = {**CLIENT, "MPT_DEVICE": "mpt0", "MPT_SAVED": str(setup.run_dir / "mpt0.saved")}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = setup.machine.run("sh", "-c", f'export MPT_KILL=$$; exec "{SCRIPTS["client"]}" up', env=env)
    assert (done.returncode, done.stderr) == (0, "")


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
        '#!/bin/sh\ncase " $* " in *" -6 "*) echo "Address family not supported by protocol" >&2; exit 2 ;; esac\n'
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


@pytest.mark.parametrize("role", LIVES)
def test_the_device_gets_no_address_of_the_kernels_own(setup: Setup, role: str) -> None:
    setup.machine.sh("ip link del mpt0; echo 0 >/proc/sys/net/ipv6/conf/default/addr_gen_mode")
    for name in "mpt0", "control":
        setup.machine.tun(name)
    setup.machine.sh("ip link set control up")
    setup.do(role, *LIVES[role][0])
    assert "fe80::" in setup.machine.sh("ip addr show dev control"), "nothing is shown"
    assert "fe80::" not in setup.machine.sh("ip addr show dev mpt0")


def test_without_nft_the_client_works_with_one_warning_and_the_server_says_what_to_install(
    setup: Setup, tmp_path: Path
) -> None:
    bin_dir = tmp_path / "bin"  # with all that the scripts need
    bin_dir.mkdir()
    for tool in ("awk", "cat", "flock", "grep", "ip", "mkdir", "readlink", "rm", "sed", "sh"):
        (bin_dir / tool).symlink_to(str(shutil.which(tool)))
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
