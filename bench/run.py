#!/usr/bin/env python3
"""p2pserver side by side with the same API on the frameworks that people would use instead.

    python3 bench/run.py            everything, 5 rounds: about 12 minutes; writes bench/RESULTS.md
    python3 bench/run.py --quick    everything in one short round, as a trial; prints only

Installs what it needs under bench/ (and wrk, from Debian), checks that every server answers the API rightly, measures, and
prints the report. All traffic stays on the loopback interface. Exits with 1 if anything could not be measured; a target that
is missed is a result, not an error.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn

import client
import servers
from check import check_api
from install import install, machine, versions
from report import TARGETS, Sample, Section, percentile, ratios, render, table
from servers import BY_KEY, HERE, NGINX, SERVERS, Failure, Running

RESULTS = HERE / "RESULTS.md"
CONNECTIONS = 16        # of wrk
HOSTS = 16              # games that the load of the comparison polls: a host for each connection
GAMES = 10_000          # of a large server
WAITING = 1_000         # hosts in the measurement of latency
BUSY = ", so SOMETHING ELSE WAS RUNNING: rates and times are worse than they should be, ratios less sure"
WARM_UP = 1             # seconds of load before the first round: just-in-time compilers and caches


class Bench:
    """What all measurements share: how long to measure, and where to put what they found."""

    def __init__(self, rounds: int, seconds: int, starts: int, boots: int) -> None:
        self.rounds, self.seconds, self.starts, self.boots = rounds, seconds, starts, boots
        self.figures: Dict[str, float] = {}     # by the name that TARGETS gives them
        self.errors: List[str] = []

    @property
    def often(self) -> str:
        return f"{self.rounds} rounds" if self.rounds > 1 else "1 round"

    def say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


# ---- load -----------------------------------------------------------------------------------------------------------

class Load(NamedTuple):
    """What wrk found: answers a second, the server's processor time for each (microseconds), and how many lists were not 304."""

    rate: float
    cpu: float
    lists_changed: int


def load(server: Running, kind: str, games: int, seconds: int, close: bool = False, etag: str = "") -> Load:
    """wrk with 16 connections in one thread. Failure: an answer was an error, or none came."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", str(HERE / "load.lua"),
               f"http://{client.LOOPBACK}:{server.port}", "--", kind, str(games), "close" if close else "keep", etag]
    before = server.cpu()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
    spent = server.cpu() - before
    if done.returncode or not done.stdout.strip().endswith("}"):
        raise Failure(f"wrk failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    errors = {name: found[name] for name in ("refused", "connect", "read", "write", "timeout") if found[name]}
    if errors or not found["requests"]:
        raise Failure(f"{found['requests']} answers to {kind} came with the errors {errors}")
    return Load(found["requests"] / found["duration"] * 1e6, spent / found["requests"] * 1e6, found["lists_changed"])


# ---- measurements ---------------------------------------------------------------------------------------------------
# Each takes the Bench, sets its figures and returns its section.

MODES = {"keep": f"{CONNECTIONS} keep-alive connections", "close": "a new connection each"}


def measure_throughput(bench: Bench) -> Section:
    """polls per second of every server"""
    found: Dict[str, Dict[str, List[Load]]] = {mode: {server.key: [] for server in SERVERS} for mode in MODES}
    failed: Dict[str, str] = {}

    def measure(key: str, mode: str, seconds: int) -> None:
        server = up[key]
        try:
            if not server.server.constant:
                client.register(server.port, HOSTS)     # those who were not polled for a minute are gone
            found[mode][key].append(load(server, "poll", HOSTS, seconds, close=mode == "close"))
        except (Failure, OSError) as error:
            failed[key] = f"{mode}: {error}"

    with contextlib.ExitStack() as stack:
        up: Dict[str, Running] = {}
        for server in SERVERS:
            if server.key == "nginx" and not NGINX.exists():
                continue
            try:
                up[server.key] = stack.enter_context(servers.running(server))
                if not server.constant:
                    check_api(server, up[server.key].port)
            except Failure as failure:
                failed[server.key] = str(failure)
        for mode in MODES:
            for key in up:
                if key not in failed:
                    measure(key, mode, WARM_UP)
                    found[mode][key].clear()
        for i in range(bench.rounds):
            bench.say(f"throughput, round {i + 1} of {bench.rounds}")
            order = list(up)[i % len(up):] + list(up)[:i % len(up)]
            for mode in MODES:
                for key in order:
                    if key not in failed:
                        measure(key, mode, bench.seconds)
    bench.errors += [f"{BY_KEY[key].label}: {failure}" for key, failure in failed.items()]
    return Section("Polls per second", (
        f"`wrk -t1 -c{CONNECTIONS}` for {bench.seconds} s, {bench.often} in each of which all servers are measured in turn. {HOSTS} games are polled "
        "in turn; every answer is counted, and one that is no success is an error. Given are the median and the least and greatest of the rounds, how many "
        "times as fast p2pserver is (median of the rounds' ratios), and the microseconds of processor that the server itself spends on a poll (median). "
        "The peers do less: their games do not expire, nothing is sealed, limited or looked into beyond the types of fields, and they send no CORS header."
    ), [throughput_table(bench, found[mode], mode, failed) for mode in MODES] + [settings_table()])


def throughput_table(bench: Bench, found: Dict[str, List[Load]], mode: str, failed: Dict[str, str]) -> str:
    """One mode of connecting, a row for each server. Sets the figures of the ratios."""
    rates = {key: Sample(each.rate for each in loads) for key, loads in found.items() if key not in failed and loads}
    rows = []
    for server in SERVERS:
        if server.key in failed:
            rows.append([server.label, "ERROR", "", ""])
        elif server.key in rates:
            ratio = ""
            if "p2pserver" in rates:
                bench.figures[f"throughput {mode} {server.key}"] = ratios(rates["p2pserver"], rates[server.key]).median
                ratio = f"{bench.figures[f'throughput {mode} {server.key}']:.2f}"
            rows.append([server.label, rates[server.key].show(), ratio, Sample(each.cpu for each in found[server.key]).show(spread=False)])
    return table((f"polls per second, {MODES[mode]}", "median (spread)", "p2pserver is x", "µs of processor"), rows)


def settings_table() -> str:
    return table(("server", "one process each, requests not logged, set to"), [[server.label, server.settings] for server in SERVERS])


def drive(server: Running, what: str, hosts: int, starts: int) -> Dict[str, Any]:
    """Run driver.py against a server. Failure: what it says."""
    command = [sys.executable, str(HERE / "driver.py"), what, "--port", str(server.port), "--pid", str(server.pid),
               "--hosts", str(hosts), "--starts", str(starts)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        raise Failure(f"the driver of waiting hosts ({what}) did not end within 180 s") from None
    if done.returncode:
        raise Failure((done.stderr or done.stdout).strip().splitlines()[-1] if done.stderr or done.stdout else f"the driver ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def measure_latency(bench: Bench) -> Section:
    """how soon a waiting host learns of its guest"""
    found: Dict[str, Dict[str, Sample]] = {kind: {"median": Sample(), "p99": Sample(), "worst": Sample()} for kind in ("open", "new")}
    spurious = 0
    for i in range(bench.rounds):
        bench.say(f"latency, round {i + 1} of {bench.rounds}")
        with servers.running(servers.large_p2pserver()) as server:
            drove = drive(server, "latency", WAITING, bench.starts)
        spurious += drove["spurious"]
        for kind, samples in found.items():
            samples["median"].append(percentile(drove[kind], 0.5))
            samples["p99"].append(percentile(drove[kind], 0.99))
            samples["worst"].append(max(drove[kind]))
    bench.figures["latency median"] = found["open"]["median"].median
    bench.figures["latency p99"] = found["open"]["p99"].median
    if spurious:
        bench.errors.append(f"latency: {spurious} waiting polls were answered without a guest and before their time")
    names = {"open": "start over an open connection", "new": "start over a new connection, connecting included"}
    rows = [[names[kind], *(samples[name].show(2) for name in ("median", "p99", "worst"))] for kind, samples in found.items()]
    return Section("A guest reaches the waiting host", (
        f"{WAITING:,} hosts wait in long polls (`Prefer: wait=25`), each on its own connection, in one process of Python. In each of {bench.often} "
        f"{bench.starts:,} starts over an open connection and as many over new ones go to random hosts, one at a time. Measured from sending the start (or "
        "from connecting) until the host has read and parsed the answer with its guest's addresses: both ends on this machine, the driver's own time "
        "included. The target looks at the first row. Only p2pserver has this: the others' figure is their poll interval, 1,000 ms on average where hosts "
        f"poll every 2 s. Waiting polls answered early and without a guest: {spurious}."
    ), [table(("milliseconds", "median", "99th percentile", "worst"), rows)])


def measure_crowd(bench: Bench) -> Section:
    """10,000 hosts waiting at once"""
    found = []
    for i in range(bench.rounds):
        bench.say(f"crowd, round {i + 1} of {bench.rounds}")
        with servers.running(servers.large_p2pserver()) as server:
            found.append(drive(server, "crowd", GAMES, 0))

    def sample(value: Callable[[Dict[str, Any]], float]) -> Sample:
        return Sample(value(each) for each in found)

    def step(before: str, after: str) -> Sample:
        return sample(lambda each: (each[after] - each[before]) / GAMES)

    kernel = sample(lambda each: (each["kernel"]["Slab"] / 2 + each["kernel"]["KernelStack"] + each["kernel"]["PageTables"]) / GAMES)
    bench.figures["crowd served"] = min(each["served"] for each in found)
    bench.figures["crowd resident"] = sample(lambda each: each["waiting"] / 1e6).median
    bench.figures["crowd idle"] = sample(lambda each: each["idle"]).median
    bench.figures["crowd host"], bench.figures["crowd kernel"] = step("idle", "after").median, kernel.median
    bench.figures["crowd start"] = sample(lambda each: 1000 * each["cpu_ms"] / GAMES).median
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = table(("resident memory", "MB", "bytes for each host since the row above"), [
        ["idle, after the first answer", sample(lambda each: each["idle"] / 1e6).show(1), ""],
        [f"{GAMES:,} games registered and polled once", sample(lambda each: each["registered"] / 1e6).show(1), step("idle", "registered").show()],
        [f"{GAMES:,} hosts waiting", sample(lambda each: each["waiting"] / 1e6).show(1), step("registered", "waiting").show()],
        ["after each got a guest", sample(lambda each: each["after"] / 1e6).show(1), step("waiting", "after").show()],
    ])
    facts = table(("what", "median (spread)"), [
        ["hosts served, of 10,000", sample(lambda each: each["served"]).show()],
        ["waiting polls answered early and without a guest", sample(lambda each: each["spurious"]).show()],
        ["bytes that a waiting host costs, with its game", step("idle", "waiting").show()],
        ["bytes of the kernel's for each waiting host, about", kernel.show()],
        ["threads of the server while they wait", sample(lambda each: each["threads"]).show()],
        ["seconds until all were connected and held", sample(lambda each: each["hold_ms"] / 1000).show(2)],
        ["seconds until all were served, the starts one after another", sample(lambda each: each["serve_ms"] / 1000).show(2)],
        ["microseconds of the server's processor for a start and its host's answer", sample(lambda each: 1000 * each["cpu_ms"] / GAMES).show()],
    ])
    return Section(f"{GAMES:,} hosts waiting at once", (
        f"Each on its own connection, from ten source addresses in 127.0.0.0/8; VmRSS of the one process in {bench.often}, MB of 10^6 bytes. Waiting "
        "is read when the server has become idle with all polls held; then every game gets one guest. The kernel's share (sockets, descriptors) is not "
        "resident memory of the process: it is estimated as half of what slab grew by (the other half is the driver's ends of the same connections), with "
        f"stacks of threads and page tables. Files that a process may open here: {soft:,} ({hard:,} at most)."
    ), [memory, facts])


def measure_games(bench: Bench) -> Section:
    """what many games cost a poll"""
    cases = {
        "10 games, all polled in turn": (10, 10),       # registered, polled
        f"{GAMES:,} games, all polled in turn": (GAMES, GAMES),
        f"{GAMES:,} games, 10 of them polled": (GAMES, 10),
    }
    found: Dict[str, List[Load]] = {case: [] for case in cases}
    with servers.running(servers.large_p2pserver()) as few, servers.running(servers.large_p2pserver()) as many:
        for i in range(bench.rounds):
            bench.say(f"games, round {i + 1} of {bench.rounds}")
            for case in list(cases)[::-1 if i % 2 else 1]:
                registered, polled = cases[case]
                server = few if registered == 10 else many
                client.register(server.port, registered, poll=True)
                load(server, "poll", polled, WARM_UP)
                found[case].append(load(server, "poll", polled, bench.seconds))
    rates = {case: Sample(each.rate for each in loads) for case, loads in found.items()}
    base, turn, _ = rates.values()
    bench.figures["games time"] = ratios(base, turn).median
    bench.figures["games poll"] = Sample(each.cpu for each in list(found.values())[1]).median
    rows = [[case, rates[case].show(), ratios(base, rates[case]).show(2), Sample(each.cpu for each in found[case]).show()] for case in cases]
    return Section(f"Polls with {GAMES:,} games", (
        f"Two p2pservers, one with 10 games and one with {GAMES:,}, `wrk -t1 -c{CONNECTIONS}` keep-alive for {bench.seconds} s in turn, {bench.often}. "
        "Every host publishes addresses of its own. The target looks at all games polled in turn, which no cache of a few favours; the last row tells what the "
        "number of games costs by itself."
    ), [table(("p2pserver with", "polls per second", "time against the first", "µs of processor"), rows)])


@contextlib.contextmanager
def changing(server: Running) -> Iterator[None]:
    """Meanwhile the list changes once a second: a game comes, a second later it goes."""
    done = threading.Event()
    failed: List[str] = []

    def change() -> None:
        body: Dict[str, Any] = {"name": "here and gone", "peerId": "the-secret-of-the-fickle"}
        there = False
        try:
            while not done.wait(1.0):
                with client.Client(server.port) as fickle:
                    answer = fickle.request(*(("DELETE", "/games/here%20and%20gone") if there else ("POST", "/games/register")), body)
                if answer.status != (204 if there else 201):
                    raise Failure(f"the list could not be changed: {answer.status}")
                there = not there
            if there:
                with client.Client(server.port) as fickle:
                    fickle.request("DELETE", "/games/here%20and%20gone", body)
        except (OSError, Failure) as error:
            failed.append(str(error))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failed:
        raise Failure(failed[0])


def measure_list(bench: Bench) -> Section:
    """what the list costs"""
    kinds = ("a poll", "`GET /games`, nothing else", "`GET /games` among polls that change nothing", "`GET /games` among polls, one change a second")
    wall, cpu = ({kind: Sample() for kind in kinds} for _ in range(2))      # microseconds
    rebuilt = Sample()
    with servers.running(servers.large_p2pserver()) as server:
        for i in range(bench.rounds):
            bench.say(f"list, round {i + 1} of {bench.rounds}")
            client.register(server.port, GAMES, poll=True)
            load(server, "poll", GAMES, WARM_UP)
            with client.Client(server.port) as reader:
                answer = reader.request("GET", "/games")
                etag = answer.headers.get("etag", "")
                again = reader.request("GET", "/games", headers={"If-None-Match": etag})
            if len(answer.json["games"]) != GAMES or again.status != 304:
                raise Failure(f"GET /games lists {len(answer.json['games'])} games, where {GAMES} are; with its own ETag it answers {again.status}")
            polls = load(server, "poll", GAMES, bench.seconds)
            lists = load(server, "list", GAMES, bench.seconds, etag=etag)
            mixed = load(server, "mix", GAMES, bench.seconds, etag=etag)
            if lists.lists_changed or mixed.lists_changed:
                raise Failure(f"GET /games with a matching ETag was answered with the whole list {lists.lists_changed + mixed.lists_changed} times")
            with changing(server):
                moving = load(server, "mix", GAMES, max(3, bench.seconds), etag=etag)
            rebuilt.append(moving.lists_changed)
            for samples, of in ((wall, lambda load: 1e6 / load.rate), (cpu, lambda load: load.cpu)):
                # Half of a mix are polls: what they leave of its time are the lists.
                for kind, time_each in zip(kinds, (of(polls), of(lists), 2 * of(mixed) - of(polls), 2 * of(moving) - of(polls))):
                    samples[kind].append(time_each)
    times = {kind: ratios(wall[kind], wall["a poll"]) for kind in kinds}
    bench.figures["list time"], bench.figures["list time among polls"] = (times[kind].median for kind in kinds[1:3])
    rows = [[kind, wall[kind].show(1), times[kind].show(2), cpu[kind].show(1)] for kind in kinds]
    return Section(f"`GET /games` with {GAMES:,} games", (
        f"`wrk -t1 -c{CONNECTIONS}` keep-alive for {bench.seconds} s each in turn, {bench.often}, with `If-None-Match` and the newest ETag; all "
        "games are polled in turn. Microseconds are the inverse of the rate. Among polls: polls and lists in turn at full rate, and the list's time is what "
        "is left of a pair after the poll's. With one change a second each of these clients fetches the whole list once after each change, which is in the "
        f"time: {rebuilt.show()} such answers in a round."
    ), [table(("p2pserver", "µs each", "time against a poll", "µs of processor"), rows)])


def measure_start(bench: Bench) -> Section:
    """start of process to first answer"""
    chosen = [server for server in SERVERS if server.key != "nginx" or NGINX.exists()]
    times: Dict[str, Sample] = {server.key: Sample() for server in chosen}
    memory: Dict[str, Sample] = {server.key: Sample() for server in chosen}
    failed: Dict[str, str] = {}
    for i in range(bench.boots):
        bench.say(f"start, round {i + 1} of {bench.boots}")
        for server in chosen:
            try:
                with servers.running(server) as started:
                    times[server.key].append(1000 * started.started)
                    memory[server.key].append(started.resident())
            except Failure as failure:
                failed[server.key] = str(failure)
    bench.errors += [f"{BY_KEY[key].label}: {failure}" for key, failure in failed.items()]
    if "p2pserver" not in failed:
        bench.figures["start time"] = times["p2pserver"].median
        bench.figures["start resident"] = memory["p2pserver"].median
    rows = [[server.label, "ERROR", ""] if server.key in failed else [server.label, times[server.key].show(), memory[server.key].show(1)] for server in chosen]
    return Section("Start and idle memory", (
        f"{bench.boots} starts of each server in turn, from before its process is made until the answer to `GET /games` is read, tried every millisecond; "
        "files are in the system's cache. Then VmRSS, MB of 10^6 bytes, for servers of several processes (gunicorn, nginx) their sum."
    ), [table(("server", "ms to the first answer", "MB resident"), rows)])


MACHINES = (256, 512, 1024, 4096)       # MB of memory
SHARE = 0.6                             # of it for the server and its connections; the rest is the system's
LOAD = 0.5                              # of one core, so that bursts find room
POLL_EVERY, GUEST_EVERY = 25, 60        # seconds: --max-wait, and a guest for each host


def capacity(figures: Dict[str, float]) -> Section:
    """How many waiting hosts machines can hold, as the measurements let expect."""
    host, kernel, idle = figures["crowd host"], figures["crowd kernel"], figures["crowd idle"]
    work = figures["games poll"] / POLL_EVERY + figures["crowd start"] / GUEST_EVERY
    by_processor = LOAD * 1e6 / work

    def hundreds(count: float) -> str:
        return f"{count // 100 * 100:,.0f}"

    rows = []
    for megabytes in MACHINES:
        by_memory = (megabytes * 1e6 * SHARE - idle) / (host + kernel)
        rows.append([f"1 core, {megabytes:,} MB", hundreds(by_memory), hundreds(by_processor), hundreds(min(by_memory, by_processor))])
    return Section("What a machine can hold", (
        f"Computed, not measured, from the figures above. By memory: {SHARE:.0%} of it less the {idle / 1e6:.1f} MB of the idle server, by {host:,.0f} bytes "
        f"for each waiting host with its game, connection and guest, and {kernel:,.0f} of the kernel's. By processor: {LOAD:.0%} of one core like the measured "
        f"one, where each host polls every {POLL_EVERY} s ({figures['games poll']:,.0f} µs) and gets a guest every {GUEST_EVERY} s "
        f"({figures['crowd start']:,.0f} µs for the start and the host's answer). More cores do not help one process."
    ), [table(("machine", "hosts by memory", "hosts by processor", "waiting hosts"), rows)])


MEASUREMENTS: Dict[str, Callable[[Bench], Section]] = {
    "throughput": measure_throughput,
    "latency": measure_latency,
    "crowd": measure_crowd,
    "games": measure_games,
    "list": measure_list,
    "start": measure_start,
}


# ---- command line ---------------------------------------------------------------------------------------------------

def facts(bench: Bench, busy: float) -> List[str]:
    """What a reader must know of the run, a sentence each."""
    found = versions()
    used = sorted({package for server in SERVERS for package in server.packages})
    flags = servers.p2pserver_flags(servers.ALWAYS), servers.p2pserver_flags(servers.FOR_MANY)
    return [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) + f", {bench.often} of {bench.seconds} s each",
        "Machine: " + ", ".join(machine()) + f"; load average at the beginning {busy:.2f}" + (BUSY if busy > 0.5 else ""),
        f"p2pserver {found['p2pserver'] or '(not from git)'}, Python {found['python']} for it and all of Python; wrk {found['wrk']}",
        "Peers: " + ", ".join(f"{package} {found[package]}" for package in used if found.get(package)),
        f"Flags of p2pserver: {' '.join(flags[0]) or 'none'}; where it has {GAMES:,} games or waiting hosts also: {' '.join(flags[1]) or 'none'}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every measurement (default: 5)")
    parser.add_argument("--seconds", type=int, default=3, help="seconds of load in each (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of a second")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="these measurements alone: " + ",".join(MEASUREMENTS))
    parser.add_argument("--out", type=pathlib.Path, help="where to write the report (default: bench/RESULTS.md for a whole run, else nowhere)")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := [name for name in given.only if name not in MEASUREMENTS]:
        parser.error(f"there is no measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    if given.rounds < 1 or given.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    if given.quick:
        given.rounds, given.seconds = 1, 1
    whole = not given.quick and set(given.only) == set(MEASUREMENTS)
    given.out = given.out or (RESULTS if whole else None)
    return given


def alone() -> None:
    """Two benchmarks at once would measure each other. Failure: another one runs from this folder; the lock ends with this process."""
    folder = os.open(HERE, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Failure("another benchmark is running from this folder") from None


def stop_on_signal(number: int, frame: Any) -> NoReturn:
    """Leave through every `with`, so that no server stays."""
    raise KeyboardInterrupt


def main() -> int:
    given = parse()
    signal.signal(signal.SIGTERM, stop_on_signal)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))    # servers inherit it
    busy = os.getloadavg()[0]
    try:
        alone()
        install()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    bench = Bench(given.rounds, given.seconds, starts=200 if given.quick else 1000, boots=3 if given.quick else max(10, given.rounds))
    known, sections = facts(bench, busy), []
    for name, measure in MEASUREMENTS.items():
        if name in given.only:
            try:
                sections.append(measure(bench))
            except (Failure, OSError, subprocess.SubprocessError, ValueError, KeyError) as failure:
                bench.errors.append(f"{name} ({measure.__doc__}): {failure or type(failure).__name__}")
                bench.say(bench.errors[-1].partition("\n")[0])
    if {"crowd host", "games poll"} <= bench.figures.keys():
        sections.append(capacity(bench.figures))
    report = render(known, given.only, bench.figures, sections, bench.errors)
    print(report)
    if given.out:
        given.out.write_text(report)
    measurable = [target for target in TARGETS if target.figure.split()[0] in given.only]
    return 1 if bench.errors or any(target.figure not in bench.figures for target in measurable) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
