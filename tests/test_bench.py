"""The benchmark: what is made of measurements, how it is told, how it is asked for; and, in a lab, a short one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mptunnel import bench, cli, crowd, micro, packet
from mptunnel.contest import CONTESTANTS, Contestant, Floor, Mptunnel, OpenVpn, WireguardGo
from mptunnel.errors import HostError
from mptunnel.figures import (
    FoundRate,
    Trial,
    find_rate,
    is_flat,
    medians,
    number,
    percentile,
    ratios,
    table,
)
from mptunnel.lab import Lab, Unavailable
from mptunnel.state import StateDir
from tests.running import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.running import Opener

CHECKOUT = Path(bench.__file__).parents[1]
PROGRAM = [sys.executable, "-m", "mptunnel", "bench"]


# -- figures


def test_the_median_of_each_figure_is_that_of_the_runs_that_have_it() -> None:
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 9.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}
    assert medians([]) == {}


def test_a_ratio_is_there_where_both_have_the_figure_and_it_is_not_zero() -> None:
    assert ratios({"a": 6.0, "b": 1.0, "c": 1.0}, {"a": 4.0, "c": 0.0}) == {"a": 1.5}


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (0, 1)])
def test_a_percentile_is_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile(list(range(1, 101)), percent) == value


def test_there_is_no_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 50))


def tunnel(most: float, sender: float = math.inf, calls: list[float] | None = None) -> Callable[[float], Trial]:
    """Return an attempt at a tunnel that carries `most` a second, by a sender that can send `sender` a second."""

    def attempt(rate: float) -> Trial:
        if calls is not None:
            calls.append(rate)
        sent = min(rate, sender)
        return Trial(round(sent), round(min(sent, most)), 1.0)

    return attempt


@pytest.mark.parametrize("most", [300, 5_000, 16_000, 39_000, 52_000, 1_000_000])
def test_the_search_comes_close_to_what_the_tunnel_carries(most: int) -> None:
    found = find_rate(tunnel(most))
    assert not found.is_limited
    assert most / 1.15 < found.rate <= most / 0.99


def test_the_search_says_where_the_sender_was_the_limit() -> None:
    assert find_rate(tunnel(1e6, sender=50_000)) == FoundRate(50_000, is_limited=True)


def test_one_bad_trial_is_forgiven() -> None:
    calls: list[float] = []
    good = tunnel(40_000, calls=calls)

    def attempt(rate: float) -> Trial:
        is_first, trial = not calls, good(rate)
        return Trial(trial.sent, 0, trial.seconds) if is_first else trial

    assert find_rate(attempt).rate > 40_000 / 1.15
    assert calls[0] == calls[1]


def test_the_search_ends_where_nothing_gets_through() -> None:
    calls: list[float] = []
    assert find_rate(tunnel(0, calls=calls)) == FoundRate(0.0, is_limited=False)
    assert len(calls) < 20


@pytest.mark.parametrize(
    ("samples", "flat"),
    [
        ([30e6, 40e6, 40e6, 40e6, 40e6, 40e6], True),
        ([10e6, 30e6, 40e6, 40e6, 39e6, 41e6], True),
        ([30e6, 32e6, 34e6, 36e6, 38e6, 40e6], False),
        ([400e6, 400e6, 400e6, 400e6, 405e6, 407e6], True),
        ([40e6, 40e6], False),
        ([], False),
    ],
)
def test_memory_is_flat_if_it_does_not_grow_after_the_first_third(samples: list[float], flat: bool) -> None:
    assert is_flat(samples) == flat


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.nan, "-"), (0, "0"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (-469.2, "-469")],
)
def test_numbers_have_three_digits_that_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_table_is_as_wide_as_it_has_to_be() -> None:
    assert table(["", "b"], [["long", "1"], ["x", "1,000"]]).splitlines() == [
        "          b",
        "-----------",
        "long      1",
        "x     1,000",
    ]


# -- what is told


def found() -> dict[str, Any]:
    """Return a contest of two runs, OpenVPN not installed, wireguard-go not willing."""
    return bench.summed_up(
        {
            "no tunnel": {"about": "bare", "runs": [{"pps_64": 100_000.0, "echo_p50_us": 50.0}], "limited": ["pps_64"]},
            "wireguard-go": {"about": "one path", "runs": [], "limited": [], "error": "refused"},
            "openvpn": {"about": "one path", "missing": ["openvpn"]},
            "mptunnel": {
                "about": "every packet over every path",
                "runs": [{"pps_64": 40_000.0, "echo_p50_us": 150.0}, {"pps_64": 60_000.0, "echo_p50_us": 250.0}],
                "limited": [],
            },
        }
    )


def test_what_a_tunnel_adds_is_the_difference_to_no_tunnel() -> None:
    contestants = found()
    assert contestants["mptunnel"]["figures"] == {"pps_64": 50_000, "echo_p50_us": 200, "added_p50_us": 150}
    assert "added_p50_us" not in contestants["no tunnel"]["figures"]


def test_what_is_no_figure_of_the_tunnel_has_no_ratio() -> None:
    runs = [{"others": 10.0, "echo_lost": 1.0, "pps_64": 1.0}]
    contestants = bench.summed_up({"no tunnel": {"runs": runs}, "mptunnel": {"runs": runs}})
    assert contestants["no tunnel"]["ratios"] == {"pps_64": 1.0}


def test_every_other_contestant_has_our_ratio_to_it() -> None:
    contestants = found()
    assert contestants["no tunnel"]["ratios"] == {"pps_64": 0.5, "echo_p50_us": 4}
    assert contestants["openvpn"]["ratios"] == {}
    assert "ratios" not in contestants["mptunnel"]


def test_the_contest_is_told_with_ratios_limits_and_who_was_not_there() -> None:
    lines = bench.contest_text({"paths": 3, "contestants": found()}).splitlines()
    assert lines[0].split() == ["no", "tunnel", "mptunnel"]
    assert " ".join(lines[2].split()) == "datagrams of 64 bytes, up 1/s >100,000 (0.50) 50,000"
    assert " ".join(lines[3].split()) == "echo at 1 kHz, median us 50.0 (4.00) 200"
    assert "wireguard-go: failed: refused" in lines
    assert "openvpn: not here: openvpn not installed" in lines
    assert "mptunnel: 3 paths, every packet over every path" in lines
    assert any(line.startswith(">:") for line in lines)


def test_growth_is_told_as_shares_of_the_first_line() -> None:
    figures = {"tcp1_up_mbit": 1000.0, "tcp1_down_mbit": 1200.0}
    more = {"tcp1_up_mbit": 800.0, "tcp1_down_mbit": 1200.0, "memory_idle_kb": 32.0}
    lines = bench.growth_text("paths", [{"count": 1, "figures": figures}, {"count": 2, "figures": more}]).splitlines()
    assert " ".join(lines[2].split()) == "1 100 % 100 % 1,000 1,200 -"
    assert " ".join(lines[3].split()) == "2 80.0 % 100 % 800 1,200 32.0"


def test_a_soak_is_told_with_start_peak_end_and_verdict() -> None:
    samples = [{"at": 5.0 * n, "cl": 1e6 * held, "sv": 40e6} for n, held in enumerate((30, 42, 41), 1)]
    told = bench.soak_text({"seconds": 15, "up_mbit": 500, "down_mbit": 400, "samples": samples, "is_flat": False})
    assert "client       30.0  42.0  41.0" in told
    assert told.endswith("NOT flat")


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mptunnel.contest._SBIN", "")
    assert [kind.missing() for kind in CONTESTANTS] == [[], list(WireguardGo.programs), list(OpenVpn.programs), []]


# -- micro


@pytest.mark.parametrize("frame", [micro.super_packet(micro.RUN), micro.single_packet()])
def test_the_micro_benchmarks_work_on_what_the_kernel_makes(frame: bytes) -> None:
    pieces = packet.split(frame, takes_partial=True)
    assert {len(piece) for piece in pieces} == {micro.LENGTH}
    ((parts, count),) = packet.coalesce(pieces, takes_udp=True)
    assert count == len(pieces)
    assert packet.split(b"".join(parts), takes_partial=True) == pieces


def test_every_operation_is_measured_by_the_run_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "ROUNDS", 1)
    monkeypatch.setattr(micro, "_BATCHES", 2)
    costs = micro.measure()
    names = ["seal", "open", "duplicate", "split", "coalesce"]
    assert [(cost.name, cost.count) for cost in costs] == [(name, count) for count in (45, 1) for name in names]
    assert all(cost.microseconds > 0 and cost.gbit > 0 for cost in costs)


def test_a_crowd_is_let_in_by_the_servers_own_files(tmp_path: Path) -> None:
    tickets = crowd.admit(tmp_path, 300)
    peers = StateDir(tmp_path).peers()
    assert len({ticket.private for ticket in tickets}) == len({peer.ipv4 for peer in peers}) == 300
    assert all(peer.ipv4 in crowd.NETWORK for peer in peers)


# -- the command line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--paths", "9"], "--paths: '9': numbers from 1 to 8"),
        (["--paths", "1,x"], "--paths: '1,x'"),
        (["--paths", ""], "--paths: ''"),
        (["--clients", "0"], "--clients: '0'"),
        (["--only", "speed"], "--only: 'speed': there are throughput, packet-rate, latency, memory"),
        (["--runs", "0"], "--runs"),
        (["--soak", "0"], "--soak"),
        (["--json", "/nowhere/at/all"], "cannot write /nowhere/at/all: no such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def plan_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bench.Plan:
    seen: list[bench.Plan] = []

    def note(plan: bench.Plan) -> int:
        seen.append(plan)
        return 0

    monkeypatch.setattr(bench, "main", note)
    assert cli.run(["bench", *words]) == 0
    return seen[0]


def test_the_options_are_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--paths 1,2,4 --clients 1,10 --only latency,memory --alone --floor --runs 5 --quick --soak 60 --json -"
    assert plan_of(words.split(), monkeypatch) == bench.Plan(
        paths=(1, 2, 4),
        clients=(1, 10),
        only=("latency", "memory"),
        against=False,
        floor=True,
        runs=5,
        quick=True,
        soak=60.0,
        json="-",
    )


def test_without_options_it_is_everything_over_two_paths_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of([], monkeypatch) == bench.Plan()
    assert bench.Plan().only == bench.KINDS


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (bench.Plan(), ["contest"]),
        (bench.Plan(paths=(3,)), ["contest"]),
        (bench.Plan(paths=(1, 2)), ["paths"]),
        (bench.Plan(clients=(1,), micro=True, soak=5), ["micro", "clients", "soak"]),
    ],
)
def test_a_table_that_is_asked_for_takes_the_place_of_the_contest(plan: bench.Plan, parts: list[str]) -> None:
    assert [name for name, _, _ in bench._parts(plan)] == parts


def test_the_exit_code_tells_of_a_failure() -> None:
    assert bench._has_failed({"contest": {"contestants": found()}})
    assert not bench._has_failed({"contest": {"contestants": {"mptunnel": {"figures": {}}}}, "soak": {"is_flat": True}})
    assert bench._has_failed({"soak": {"is_flat": False}})


def test_where_namespaces_are_refused_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Lab) -> Lab:
        raise Unavailable("refused; run it with sudo", would_root_help=True)

    monkeypatch.setattr(Lab, "__enter__", refuse)
    assert cli.run(["bench", "--quick"]) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "mptunnel: refused; run it with sudo"


def test_a_contestant_that_fails_does_not_end_the_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Lab) -> Lab:
        raise HostError("no such device\nand more")

    monkeypatch.setattr(Lab, "__enter__", refuse)
    contestants = bench.hold_contest(bench.Plan(quick=True, against=False, runs=2))["contestants"]
    assert {name: each["error"] for name, each in contestants.items()} == dict.fromkeys(
        ("no tunnel", "mptunnel"), "no such device"
    )


def test_a_busy_machine_is_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = [90.0, 50.0, 3.0]
    monkeypatch.setattr(bench, "busy_share", lambda: shares.pop(0))
    assert bench.wait_quiet(60.0) == 3.0
    assert len(capsys.readouterr().err.splitlines()) == 1
    shares.append(90.0)
    assert bench.wait_quiet(0.0) == 90.0


def test_what_others_use_is_told_apart_from_what_we_use(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    used = [50.0, 52.0]
    monkeypatch.setattr(bench, "_user_seconds", lambda: used.pop(0))
    with bench.Watch() as watch:
        clock[0] += 10.0
    assert watch.others == pytest.approx(100 * 2.0 / 10.0 / 4)


def test_our_childrens_time_is_not_that_of_others() -> None:
    def everybodys() -> float:
        return sum(map(int, Path("/proc/stat").read_text().split()[1:3])) / os.sysconf("SC_CLK_TCK")

    before = everybodys(), bench._user_seconds(), os.times().children_user
    subprocess.run([sys.executable, "-c", "for _ in range(10 ** 7): pass"], check=True)
    child = os.times().children_user - before[2]
    others = bench._user_seconds() - before[1]
    assert child > 0.1
    assert everybodys() - before[0] - others > child - 0.05


# -- in a lab


@pytest.mark.netns
@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=pytest.mark.slow if each in {WireguardGo, OpenVpn} else ()) for each in CONTESTANTS],
)
def test_every_contestant_carries_the_load(kind: type[Contestant], open_lab: Opener, tmp_path: Path) -> None:
    if kind.missing():
        pytest.skip(f"no {' and no '.join(kind.missing())} here")
    lab = open_lab(direct=True)
    contestant = kind(lab, tmp_path)
    contestant.start()
    field = bench._Field(lab, contestant)
    assert field.latency(0.1)["echo_p50_us"] > 0
    told = field.transfer(1, 1, 0.2)
    assert told["up"]["bytes"] > 0 < told["down"]["bytes"]
    field.far.begin("count")
    field.near.begin("emit", rate=1000, size=64, seconds=0.2)
    assert field.near.finish()["sent"] == 200
    arrived = field.far.stop()["arrived"]
    assert arrived == 200 or (arrived > 100 and kind in {WireguardGo, OpenVpn})  # those may lose some
    assert contestant.memory().keys() == contestant.processes.keys()
    assert (contestant.processor_seconds() > 0) == bool(contestant.processes)
    contestant.check()
    for process in contestant.processes.values():
        lab.end(process)
        with pytest.raises(HostError, match="has ended"):
            contestant.check()


@pytest.mark.netns
def test_the_floor_carries_an_echo_over_every_path(open_lab: Opener, tmp_path: Path) -> None:
    lab = open_lab(direct=True)
    floor = Floor(lab, tmp_path)
    floor.start()
    assert bench._Field(lab, floor).latency(0.3)["echo_p50_us"] > 0
    for path in lab.paths:
        (told,) = json.loads(lab.run("cl", ["ip", "-j", "-s", "link", "show", f"p{path}"]))
        assert min(told["stats64"][way]["packets"] for way in ("rx", "tx")) > 100


@pytest.mark.netns
def test_a_crowd_connects_by_both_paths_and_stays(
    open_lab: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "IDLE_SECONDS", 0.0)
    lab = open_lab(direct=True)
    tickets = crowd.admit(tmp_path / "sv" / "state", 5)
    contestant = Mptunnel(lab, tmp_path, "--network", str(crowd.NETWORK))
    contestant.start()
    crowd.gather(lab, tickets)
    peers = {each["name"]: each for each in contestant.tunnel.status("sv")["peers"]}
    idle = [peers[f"idle-{n}"] for n in range(5)]
    assert {(each["state"], len(each["paths"])) for each in idle} == {("up", 2)}


@pytest.mark.netns
def test_a_short_benchmark_gives_a_whole_json_object_and_leaves_nothing(open_lab: Opener, tmp_path: Path) -> None:
    open_lab()  # skips where there is none
    done = subprocess.run(
        [*PROGRAM, "--quick", "--alone", "--only", "latency,memory", "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=CHECKOUT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    contestants = answer["contest"]["contestants"]
    assert list(contestants) == ["no tunnel", "mptunnel"]
    assert contestants["no tunnel"]["figures"].keys() == {"echo_p50_us", "echo_p99_us", "echo_lost", "others"}
    ours = contestants["mptunnel"]["figures"]
    assert ours.keys() == {
        metric.name for metric in bench.METRICS if metric.name.startswith(("echo", "added", "mem", "oth"))
    }
    assert 0 < ours["added_p50_us"] < ours["echo_p50_us"] <= ours["echo_p99_us"]
    assert ours["memory_sv_mb"] > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.netns
def test_an_interrupt_ends_it_cleanly(open_lab: Opener, tmp_path: Path) -> None:
    open_lab()
    process = subprocess.Popen(
        [*PROGRAM, "--alone", "--quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr
    assert process.stderr.readline().startswith("run 1 of 1: no tunnel")
    wait_until(lambda: list(tmp_path.glob("mptunnel-bench-*")), "it has begun")
    time.sleep(1.5)  # into the midst of it
    process.send_signal(signal.SIGINT)
    answered, said = process.communicate(timeout=30)
    assert (process.returncode, answered, said.strip()) == (cli.INTERRUPTED, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.netns
def test_a_direct_lab_leads_to_the_target_only_through_a_server_that_forwards(open_lab: Opener) -> None:
    lab = open_lab(direct=True)
    command = ["ping", "-c1", "-W1", "-I", "p2", "203.0.113.2"]
    with pytest.raises(HostError):
        lab.run("cl", command)
    lab.sysctl("sv", {"ipv4/ip_forward": 1})
    assert "1 received" in lab.run("cl", command)
    with pytest.raises(KeyError):
        lab.wire("p1")
