"""`mptunnel bench`: how fast the program is on this machine, beside what else is installed here, in one run.

All of it happens in a `lab` of direct veth pairs: a client with its uplinks behind NAT routers, a server, a target
host; no root is needed and nothing outside is touched. The tunnels run as real processes, the load (`load`) beside
them on the same processors. What can be measured:

* the contest: mptunnel over all paths against no tunnel, wireguard-go and OpenVPN over one;
* growth: how throughput and memory change as paths or connected clients become more;
* micro: the cost of sealing, opening, duplicates, splitting and coalescing by themselves;
* soak: memory under full load, for as long as is asked for.

Figures compare within a run only. With `runs` more than one every contestant has its turn in each, and the figures
are medians.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from mptunnel import __version__, crowd, micro
from mptunnel.contest import CONTESTANTS, Contestant, Floor, Mptunnel
from mptunnel.errors import ConfigError, HostError
from mptunnel.figures import (
    Figures,
    FoundRate,
    Metric,
    Trial,
    find_rate,
    is_flat,
    medians,
    number,
    percentile,
    ratios,
    table,
)
from mptunnel.lab import Lab, Unavailable, two_uplinks
from mptunnel.load import WARM_SECONDS, Generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KINDS: Final = ("throughput", "packet-rate", "latency", "memory")
STREAMS: Final = (1, 4)
SIZES: Final = (64, 1200)  # bytes of UDP payload
ECHO_RATE: Final = 1000
SOAK_STREAMS: Final = 2  # each way
SAMPLE_SECONDS: Final = 5.0

_SETTLE: Final = 0.5  # s after a tunnel is up: its MTU has been found by then
_READY_SECONDS: Final = 10.0
_MEMORY_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 0.5
_LEAST_SAMPLES: Final = 6
_QUIET: Final = 10.0  # percent of the processors

METRICS: Final = (
    *(
        Metric(f"tcp{streams}_{way}_mbit", f"TCP, {streams} stream{'s' * (streams > 1)}, {way}", "Mbit/s")
        for streams in STREAMS
        for way in ("up", "down")
    ),
    *(Metric(f"cpu_{way}_s_per_gbit", f"processor, 1 stream, {way}", "s/Gbit") for way in ("up", "down")),
    *(Metric(f"pps_{size}", f"datagrams of {size} bytes, up", "1/s") for size in SIZES),
    Metric("echo_p50_us", "echo at 1 kHz, median", "us"),
    Metric("echo_p99_us", "echo at 1 kHz, 99 %", "us"),
    Metric("added_p50_us", "of it added by the tunnel, median", "us"),
    Metric("added_p99_us", "of it added by the tunnel, 99 %", "us"),
    Metric("echo_lost", "echoes lost", "%"),
    Metric("memory_cl_mb", "memory, client, peak", "MB"),
    Metric("memory_sv_mb", "memory, server, peak", "MB"),
    Metric("others", "used by other programs meanwhile", "%"),
)
_WITHOUT_RATIO: Final = frozenset({"echo_lost", "others"})
_GROWTH: Final = {  # one TCP stream
    "tcp1_up_mbit": "up Mbit/s",
    "tcp1_down_mbit": "down Mbit/s",
    "cpu_up_s_per_gbit": "up s/Gbit",
    "cpu_down_s_per_gbit": "down s/Gbit",
    "memory_sv_mb": "server MB",
    "memory_idle_kb": "an idle client kB",
    "others": "others %",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. Several `paths`, `clients`, `micro` or `soak` ask for these tables in place of the contest."""

    paths: tuple[int, ...] = (2,)
    clients: tuple[int, ...] = ()
    only: tuple[str, ...] = KINDS
    against: bool = True  # False: mptunnel and no tunnel alone
    floor: bool = False  # also the least that could do it
    runs: int = 1
    quick: bool = False
    micro: bool = False
    soak: float = 0.0
    json: str = ""  # a file, or - for stdout

    @property
    def seconds(self) -> float:
        """Length of a transfer and of an echo."""
        return 0.5 if self.quick else 3.0

    @property
    def patience(self) -> float:
        """How long others may hold us up before each contestant, in s."""
        return 0.0 if self.quick else 20.0

    @property
    def trial_seconds(self) -> float:
        """Length of one try of a packet rate."""
        return 0.2 if self.quick else 0.5


def main(plan: Plan) -> int:
    """Measure what is asked for, print it, and return the exit code: 1 if a contestant failed or memory grew.

    Raises `Unavailable` where the kernel refuses namespaces, ConfigError where the JSON cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file = None if plan.json in {"", "-"} else stack.enter_context(_open(plan.json))  # before all the work
        answer: dict[str, Any] = {"format": 1, "version": __version__, "machine": machine(), "runs": plan.runs}
        texts = [_machine_text(answer["machine"], plan)]
        for name, measure, tell in _parts(plan):
            answer[name] = measure(plan)
            texts.append(tell(answer[name]))
        as_json = json.dumps(answer, indent=2) + "\n"
        sys.stdout.write(as_json if plan.json == "-" else "\n\n".join(texts) + "\n")
        if file is not None:
            file.write(as_json)
    return int(_has_failed(answer))


def _open(path: str) -> TextIO:
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {os.strerror(error.errno or 0).lower()}; name another --json"
        ) from None


def _parts(plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the measurement and the teller of each table."""
    if plan.micro:
        yield "micro", lambda _: [_cost(cost) for cost in micro.measure()], micro_text
    if len(plan.paths) > 1:
        yield "paths", grow_paths, lambda found: growth_text("paths", found)
    if plan.clients:
        yield "clients", grow_clients, lambda found: growth_text("clients", found)
    if plan.soak:
        yield "soak", soak, soak_text
    if not (plan.micro or plan.clients or plan.soak or len(plan.paths) > 1):
        yield "contest", hold_contest, contest_text


def _has_failed(answer: dict[str, Any]) -> bool:
    contestants = answer.get("contest", {}).get("contestants", {}).values()
    return any("error" in each for each in contestants) or not answer.get("soak", {}).get("is_flat", True)


def _say(text: str) -> None:
    """Tell on stderr what is going on; it takes a while."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# -- the contest -------------------------------------------------------------------------------------------------


def hold_contest(plan: Plan) -> dict[str, Any]:
    """Measure every contestant that is here, `runs` times, in turn."""
    found: dict[str, Any] = {}
    taking_part: list[type[Contestant]] = []
    kinds = [*CONTESTANTS]
    if plan.floor:
        kinds.insert(-1, Floor)  # beside mptunnel
    for kind in kinds:
        if kind.missing() and plan.against:
            found[kind.name] = {"about": kind.about, "missing": kind.missing()}
        elif plan.against or kind in {Contestant, Floor, Mptunnel}:
            found[kind.name] = {"about": kind.about, "runs": [], "limited": []}
            taking_part.append(kind)
    for run in range(plan.runs):
        for kind in list(taking_part):
            _say(f"run {run + 1} of {plan.runs}: {kind.name}")
            try:
                with Watch() as watch, _field(kind, plan.paths[0], plan) as field:
                    figures = field.measure(plan)
                found[kind.name]["runs"].append(figures | {"others": watch.others})
                found[kind.name]["limited"] = sorted({*found[kind.name]["limited"], *field.limited})
            except Unavailable:  # there is no lab for anybody
                raise
            except HostError as error:
                found[kind.name]["error"] = str(error).splitlines()[0]
                taking_part.remove(kind)
    return {"paths": plan.paths[0], "contestants": summed_up(found)}


def summed_up(found: dict[str, Any]) -> dict[str, Any]:
    """Add to each contestant the medians of its runs, what the tunnel adds to an echo, and mptunnel's ratio to it."""
    bare = medians(found[Contestant.name]["runs"])
    for name, each in found.items():
        figures = each["figures"] = medians(each.get("runs", ()))
        if name != Contestant.name:
            for part in ("p50", "p99"):
                if f"echo_{part}_us" in figures and f"echo_{part}_us" in bare:
                    figures[f"added_{part}_us"] = figures[f"echo_{part}_us"] - bare[f"echo_{part}_us"]
    ours = found[Mptunnel.name]["figures"]
    for name, each in found.items():
        if name != Mptunnel.name:
            compared = ratios(ours, each["figures"])
            each["ratios"] = {name: ratio for name, ratio in compared.items() if name not in _WITHOUT_RATIO}
    return found


@contextlib.contextmanager
def _field(kind: type[Contestant], paths: int, plan: Plan) -> Iterator[_Field]:
    """Open a lab, bring the contestant up in it, and end both."""
    with contextlib.ExitStack() as stack:
        places = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mptunnel-bench-")))
        wait_quiet(plan.patience)
        lab = stack.enter_context(Lab(two_uplinks(paths, direct=True)))  # ends first, and with it who writes there
        contestant = kind(lab, places)
        contestant.start()
        yield _Field(lab, contestant)


class Watch:
    """For the time of a `with`: the share of the processors that programs of others had, user mode only, in percent.

    All user time of the machine (proc(5): stat) less that of this process and of the children it has waited for; that
    a child's last tick is rounded can make it wrong by a little.
    """

    def __init__(self) -> None:
        self.others = 0.0
        self._begun = (0.0, 0.0)

    def __enter__(self) -> Self:
        self._begun = _user_seconds(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        used, spent = _user_seconds() - self._begun[0], time.monotonic() - self._begun[1]
        self.others = max(0.0, 100 * used / max(spent, 1e-9) / (os.cpu_count() or 1))


def _user_seconds() -> float:
    """Return the time that all programs but ours have had so far, in user mode."""
    user, nice = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:3])
    ours = os.times()
    return (user + nice) / os.sysconf("SC_CLK_TCK") - ours.user - ours.children_user


def wait_quiet(patience: float) -> float:
    """Wait until others leave the machine to us, or no longer; return how much they still use, in percent."""
    end, is_told = time.monotonic() + patience, False
    while (share := busy_share()) > _QUIET and time.monotonic() < end:
        if not is_told:
            _say(f"{share:.0f} % of the processors are in use: waiting up to {patience:.0f} s for less")
            is_told = True
    return share


def busy_share() -> float:
    """Return how much of the processors others use while we sleep, in percent."""
    with Watch() as watch:
        time.sleep(_LOOK_SECONDS)
    return watch.others


class _Field:
    """A contestant that is up, and the load at both ends of its tunnel."""

    def __init__(self, lab: Lab, contestant: Contestant) -> None:
        self.lab, self.contestant = lab, contestant
        self.near, self.far = Generator(lab, "cl"), Generator(lab, "inet")
        self.limited: list[str] = []
        self._wait_ready()

    def measure(self, plan: Plan) -> Figures:
        """Return all figures that are asked for."""
        figures: Figures = {}
        if "latency" in plan.only:
            figures |= self.latency(plan.seconds)
        if "throughput" in plan.only:
            figures |= self.throughput(plan.seconds, STREAMS)
        if "packet-rate" in plan.only:
            figures |= self.packet_rates(plan.trial_seconds)
        if "memory" in plan.only:
            if "throughput" not in plan.only:
                self.transfer(4, 0, min(plan.seconds, _MEMORY_SECONDS))
            figures |= self.memory()
        self.contestant.check()
        return figures

    def latency(self, seconds: float) -> Figures:
        """Return the round trip of a 1 kHz echo, in us, and how many did not come back, in percent."""
        self.far.begin("echo")
        self.near.begin("ping", rate=ECHO_RATE, size=SIZES[0], seconds=seconds)
        told = self.near.finish(seconds + _READY_SECONDS)
        self.far.stop()
        trips: list[float] = told["us"]
        if not trips:
            raise HostError(f"{self.contestant.name}: no echo came back")
        lost = 100 * (told["sent"] - len(trips)) / told["sent"]
        return {"echo_p50_us": percentile(trips, 50), "echo_p99_us": percentile(trips, 99), "echo_lost": lost}

    def throughput(self, seconds: float, streams: Sequence[int]) -> Figures:
        """Return TCP's rate each way, in Mbit/s, and for one stream what a Gbit costs both ends, in s of processor."""
        figures: Figures = {}
        for count in streams:
            for way in ("up", "down"):
                before = self.contestant.processor_seconds()
                told = self.transfer(count * (way == "up"), count * (way == "down"), seconds)[way]
                spent = self.contestant.processor_seconds() - before
                figures[f"tcp{count}_{way}_mbit"] = told["bytes"] * 8 / told["seconds"] / 1e6
                if count == 1 and self.contestant.processes and told["total"]:
                    figures[f"cpu_{way}_s_per_gbit"] = spent / (told["total"] * 8 / 1e9)
        return figures

    def transfer(self, up: int, down: int, seconds: float) -> dict[str, dict[str, Any]]:
        """Let so many streams run each way; return what was received at the target (`up`) and at the client."""
        self.far.begin("accept", streams=up + down, seconds=seconds)
        self.near.begin("connect", up=up, down=down, seconds=seconds)
        patience = seconds + WARM_SECONDS + _READY_SECONDS
        return {"down": self.near.finish(patience), "up": self.far.finish(patience)}

    def packet_rates(self, seconds: float) -> Figures:
        """Return the highest rate of datagrams of each size, client to target, at less than 1 % lost."""
        figures: Figures = {}
        for size in SIZES:
            found = self.packet_rate(size, seconds)
            figures[f"pps_{size}"] = found.rate
            if found.is_limited:
                self.limited.append(f"pps_{size}")
        return figures

    def packet_rate(self, size: int, seconds: float) -> FoundRate:
        """Search for one size."""

        def attempt(rate: float) -> Trial:
            self.far.begin("count")
            self.near.begin("emit", rate=rate, size=size, seconds=seconds)
            told = self.near.finish()
            return Trial(told["sent"], self.far.stop()["arrived"], told["seconds"])

        return find_rate(attempt)

    def memory(self) -> Figures:
        """Return the peak memory of each end so far, in MB."""
        return {f"memory_{role}_mb": held / 1e6 for role, held in self.contestant.memory("VmHWM").items()}

    def _wait_ready(self) -> None:
        """Wait until an echo comes back, then for the tunnel to settle."""
        self.far.begin("echo")
        end = time.monotonic() + _READY_SECONDS
        while True:
            self.near.begin("ping", rate=100, size=SIZES[0], seconds=0.05)
            if self.near.finish()["us"]:
                break
            self.contestant.check()
            if time.monotonic() > end:
                raise HostError(f"{self.contestant.name}: the target cannot be reached through it")
        self.far.stop()
        time.sleep(_SETTLE)


# -- growth, soak ------------------------------------------------------------------------------------------------


def grow_paths(plan: Plan) -> list[dict[str, Any]]:
    """Measure mptunnel over more and more paths."""
    runs: dict[int, list[Figures]] = {count: [] for count in plan.paths}
    for run in range(plan.runs):
        for count in plan.paths:
            _say(f"run {run + 1} of {plan.runs}: {count} path{'s' * (count > 1)}")
            with Watch() as watch, _field(Mptunnel, count, plan) as field:
                figures = field.throughput(plan.seconds, (1,)) | field.memory()
            runs[count].append(figures | {"others": watch.others})
    return [{"count": count, "figures": medians(runs[count])} for count in plan.paths]


def grow_clients(plan: Plan) -> list[dict[str, Any]]:
    """Measure one busy client among more and more connected ones."""
    runs: dict[int, list[Figures]] = {count: [] for count in plan.clients}
    for run in range(plan.runs):
        for count in plan.clients:
            _say(f"run {run + 1} of {plan.runs}: one busy client of {count}")
            with Watch() as watch:
                figures = _one_of(count, plan)
            runs[count].append(figures | {"others": watch.others})
    return [{"count": count, "figures": medians(runs[count])} for count in plan.clients]


def _one_of(count: int, plan: Plan) -> Figures:
    """Return the figures of one busy client among `count` connected ones."""
    with contextlib.ExitStack() as stack:
        places = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mptunnel-bench-")))
        wait_quiet(plan.patience)
        lab = stack.enter_context(Lab(two_uplinks(plan.paths[0], direct=True)))
        tickets = crowd.admit(places / "sv" / "state", count - 1)
        contestant = Mptunnel(lab, places, "--network", str(crowd.NETWORK))
        contestant.start()
        alone = contestant.memory()["sv"]
        crowd.gather(lab, tickets)
        figures = {"memory_idle_kb": (contestant.memory()["sv"] - alone) / (count - 1) / 1e3} if count > 1 else {}
        field = _Field(lab, contestant)
        return figures | field.throughput(plan.seconds, (1,)) | field.memory()


def soak(plan: Plan) -> dict[str, Any]:
    """Load the tunnel as heavily as goes, both ways at once, and look at its memory every 5 s."""
    samples: list[dict[str, float]] = []
    step = min(SAMPLE_SECONDS, plan.soak / _LEAST_SAMPLES)
    received = {"up": 0, "down": 0}
    with _field(Mptunnel, plan.paths[0], plan) as field:
        begun = time.monotonic()
        while (spent := time.monotonic() - begun) < plan.soak:
            told = field.transfer(SOAK_STREAMS, SOAK_STREAMS, min(step, plan.soak - spent))
            received = {way: received[way] + told[way]["total"] for way in received}
            held, at = field.contestant.memory(), time.monotonic() - begun
            samples.append({"at": round(at, 1), **{role: float(size) for role, size in held.items()}})
            _say(f"{at:6.1f} s   client {held['cl'] / 1e6:.1f} MB   server {held['sv'] / 1e6:.1f} MB")
        seconds = time.monotonic() - begun
        field.contestant.check()
    rates = {f"{way}_mbit": received[way] * 8 / seconds / 1e6 for way in received}
    flat = all(is_flat([sample[role] for sample in samples]) for role in ("cl", "sv"))
    return {"seconds": seconds, **rates, "samples": samples, "is_flat": flat}


# -- telling -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the figures depend on most."""
    count = len(os.sched_getaffinity(0))
    return {
        "processors": count,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "arch": platform.machine(),
    }


def _machine_text(known: dict[str, Any], plan: Plan) -> str:
    runs = f"medians of {plan.runs} runs" if plan.runs > 1 else "one run"
    quick = ", quick: rough figures" if plan.quick else ""
    return (
        f"mptunnel {__version__} on {known['processors']} processors ({known['arch']}), Linux {known['kernel']}, "
        f"Python {known['python']}; {runs}{quick}.\n"
        "Client, NAT routers, server, target and the load itself share these processors."
    )


def contest_text(found: dict[str, Any]) -> str:
    """Return the table: a line for each metric; beside each other contestant's figure mptunnel's ratio to it."""
    contestants = found["contestants"]
    present = [(name, each) for name, each in contestants.items() if each["figures"]]
    rows = []
    for metric in METRICS:
        if not any(metric.name in each["figures"] for _, each in present):
            continue
        row = [metric.words, metric.unit]
        for name, each in present:
            mark = ">" if metric.name in each.get("limited", ()) else ""
            row.append(mark + number(each["figures"].get(metric.name)))
            if name != Mptunnel.name:
                ratio = each.get("ratios", {}).get(metric.name)
                row.append("" if ratio is None else f"({number(ratio)})")
        rows.append(row)
    heads = [head for name, _ in present for head in ([name] if name == Mptunnel.name else [name, ""])]
    lines = [table(["", "", *heads], rows), "", "(): mptunnel's figure divided by this one"]
    if any(each.get("limited") for each in contestants.values()):
        lines.append(">: the sender of the datagrams, a Python process, could do no more beside it; the tunnel might")
    lines += [_about(name, each, found["paths"]) for name, each in contestants.items()]
    return "\n".join(lines)


def _about(name: str, each: dict[str, Any], paths: int) -> str:
    if "missing" in each:
        return f"{name}: not here: {' and '.join(each['missing'])} not installed"
    if "error" in each:
        return f"{name}: failed: {each['error']}"
    how = f"{paths} path{'s' * (paths > 1)}, " if name == Mptunnel.name else ""
    return f"{name}: {how}{each['about']}"


def growth_text(what: str, found: list[dict[str, Any]]) -> str:
    """Return the table: a line for each count, and the throughput as a share of the first line's."""
    columns = {name: heads for name, heads in _GROWTH.items() if any(name in each["figures"] for each in found)}
    rows = []
    for each in found:
        compared = ratios(each["figures"], found[0]["figures"])
        shares = [number(100 * compared[name], " %") for name in ("tcp1_up_mbit", "tcp1_down_mbit")]
        rows.append([str(each["count"]), *shares, *(number(each["figures"].get(name)) for name in columns)])
    return table([what, "up", "down", *columns.values()], rows)


def micro_text(found: list[dict[str, Any]]) -> str:
    """Return the table of the micro-benchmarks."""
    rows = [[f"{each['name']}, {each['count']} at once", number(each["us"]), number(each["gbit"])] for each in found]
    return table([f"packets of {micro.LENGTH} bytes", "us a packet", "Gbit/s"], rows)


def _cost(cost: micro.Cost) -> dict[str, Any]:
    return {"name": cost.name, "count": cost.count, "us": cost.microseconds, "gbit": cost.gbit}


def soak_text(found: dict[str, Any]) -> str:
    """Return where memory began, how high it went, where it ended, and the verdict."""
    rows = []
    for role, words in (("cl", "client"), ("sv", "server")):
        held = [sample[role] / 1e6 for sample in found["samples"]]
        rows.append([words, *(f"{value:.1f}" for value in (held[0], max(held), held[-1]))])
    verdict = "flat" if found["is_flat"] else "NOT flat"
    load = f"{found['seconds']:.0f} s of load, {found['up_mbit']:,.0f} Mbit/s up and {found['down_mbit']:,.0f} down"
    return f"{table(['memory, MB', 'start', 'peak', 'end'], rows)}\n\n{load} at once: {verdict}"
