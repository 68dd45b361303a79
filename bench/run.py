#!/usr/bin/env python3
"""p2pserver side by side with the same API on the frameworks that people would use instead.

    python3 bench/run.py            everything, 5 rounds: about 20 minutes; writes bench/RESULTS.md
    python3 bench/run.py --quick    everything in one short round, as a trial; prints only
    python3 bench/run.py --quick --rounds 5 --servers p2pserver,p2pserver-0.1.0
                                    this p2pserver beside the release 0.1.0 in everything, in less than 5 minutes

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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Set

import client
import servers
from check import check_api
from install import install, machine, versions
from report import Pair, Sample, Section, percentile, ratios, render, table, targets_of
from servers import BY_KEY, HERE, SERVERS, Failure, Running, Server

RESULTS = HERE / "RESULTS.md"
CONNECTIONS = 16        # of wrk
HOSTS = 16              # games that the load of the comparison polls: a host for each connection
GAMES = 10_000          # of a large server
WAITING = 1_000         # hosts in the measurement of latency
BUSY = ", so SOMETHING ELSE WAS RUNNING: rates and times are worse than they should be, ratios less sure"
WARM_UP = 1             # seconds of load before the first round: just-in-time compilers and caches
BASELINE_KEY = f"p2pserver-{servers.BASELINE}"
UNMEASURED = (Failure, OSError, subprocess.SubprocessError, ValueError, KeyError)      # what a measurement that fails may raise


def how_often(rounds: int) -> str:
    return f"{rounds} rounds" if rounds > 1 else "1 round"


class Bench:
    """What all measurements share: what to measure and for how long, and where to put what they found."""

    def __init__(self, chosen: Sequence[Server], rounds: int, seconds: int, starts: int, crowds: int, boots: int) -> None:
        self.servers = chosen
        self.p2pservers = [server for server in chosen if server.file]
        self.rounds, self.seconds = rounds, seconds
        self.starts, self.crowds, self.boots = starts, crowds, boots    # starts in a round of latency; rounds of crowd and start
        self.figures: Dict[str, float] = {}     # of the p2pserver of today, by the name that TARGETS gives them
        self.pairs: List[Pair] = []
        self.errors: List[str] = []
        self.failed: Dict[str, Set[str]] = {}   # by measurement, the keys of the servers that it could not measure

    @property
    def often(self) -> str:
        return how_often(self.rounds)

    def say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def failing(self, measurement: str, server: Server) -> Iterator[None]:
        """What goes wrong with one server is no reason to leave the others unmeasured."""
        try:
            yield
        except UNMEASURED as failure:
            self.failed.setdefault(measurement, set()).add(server.key)
            self.errors.append(f"{server.label}, {measurement}: {failure or type(failure).__name__}")
            self.say(self.errors[-1].partition("\n")[0])

    def keep_up(self, stack: contextlib.ExitStack, measurement: str, server: Server) -> Optional[Running]:
        """Start a server that runs as long as the stack. None: it does not start. That it ends too early is noted when the stack closes."""
        with self.failing(measurement, server):
            stack.enter_context(self.failing(measurement, server))
            return stack.enter_context(servers.running(server))
        return None

    def in_turn(self, measurement: str, rounds: int, chosen: Sequence[Server], *steps: Callable[[Server, int], None]) -> List[Server]:
        """Take each step with each server before the next step, in rounds, in each of which another server is the first.

        A step gets the server and the number of the round. Returns the servers with which nothing went wrong.
        """
        failed = self.failed.setdefault(measurement, set())
        for i in range(rounds):
            self.say(f"{measurement}, round {i + 1} of {rounds}")
            for step in steps:
                for k in range(len(chosen)):
                    server = chosen[(i + k) % len(chosen)]
                    if server.key not in failed:
                        with self.failing(measurement, server):
                            step(server, i)
        return [server for server in chosen if server.key not in failed]

    def pair(self, what: str, by_key: Dict[str, Sample], decimals: int = 0, more: bool = False) -> None:
        """Compare the two p2pservers in this, if it was measured of both."""
        if {"p2pserver", BASELINE_KEY} <= by_key.keys():
            self.pairs.append(Pair(what, by_key["p2pserver"], by_key[BASELINE_KEY], decimals, more))


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
    found: Dict[str, Dict[str, List[Load]]] = {mode: {server.key: [] for server in bench.servers} for mode in MODES}
    failed = bench.failed.setdefault("throughput", set())

    def measure(key: str, mode: str, seconds: int) -> None:
        server = up[key]
        with bench.failing("throughput", server.server):
            if not server.server.constant:
                client.register(server.port, HOSTS)     # those who were not polled for a minute are gone
            found[mode][key].append(load(server, "poll", HOSTS, seconds, close=mode == "close"))

    with contextlib.ExitStack() as stack:
        up: Dict[str, Running] = {}
        for server in bench.servers:
            running = bench.keep_up(stack, "throughput", server)
            if running:
                up[server.key] = running
                if not server.constant:
                    with bench.failing("throughput", server):
                        check_api(server, running.port)
        for mode in MODES:
            for key in up:
                if key not in failed:
                    measure(key, mode, WARM_UP)
                    found[mode][key].clear()
        for i in range(bench.rounds):
            bench.say(f"throughput, round {i + 1} of {bench.rounds}")
            turn = i % max(1, len(up))
            order = list(up)[turn:] + list(up)[:turn]
            for mode in MODES:
                for key in order:
                    if key not in failed:
                        measure(key, mode, bench.seconds)
    return Section("Polls per second", (
        f"`wrk -t1 -c{CONNECTIONS}` for {bench.seconds} s, {bench.often} in each of which all servers are measured in turn. {HOSTS} games are polled "
        "in turn; every answer is counted, and one that is no success is an error. Given are the median and the least and greatest of the rounds, how many "
        "times as fast p2pserver is (median of the rounds' ratios), and the microseconds of processor that the server itself spends on a poll (median). "
        "The peers do less: their games do not expire, nothing is sealed, limited or looked into beyond the types of fields, and they send no CORS header."
    ), [throughput_table(bench, found[mode], mode, failed) for mode in MODES] + [settings_table(bench)])


def throughput_table(bench: Bench, found: Dict[str, List[Load]], mode: str, failed: Set[str]) -> str:
    """One mode of connecting, a row for each server. Sets the figures of the ratios."""
    rates = {key: Sample(each.rate for each in loads) for key, loads in found.items() if key not in failed and loads}
    cpu = {key: Sample(each.cpu for each in found[key]) for key in rates}
    bench.pair(f"polls per second, {MODES[mode]}", rates, more=True)
    bench.pair(f"µs of processor for such a poll, {MODES[mode]}", cpu, 1)
    rows = []
    for server in bench.servers:
        if server.key in failed:
            rows.append([server.label, "ERROR", "", ""])
        elif server.key in rates:
            ratio = ""
            if "p2pserver" in rates:
                bench.figures[f"throughput {mode} {server.key}"] = ratios(rates["p2pserver"], rates[server.key]).median
                ratio = f"{bench.figures[f'throughput {mode} {server.key}']:.2f}"
            rows.append([server.label, rates[server.key].show(), ratio, cpu[server.key].show(spread=False)])
    return table((f"polls per second, {MODES[mode]}", "median (spread)", "p2pserver is x", "µs of processor"), rows)


def settings_table(bench: Bench) -> str:
    return table(("server", "one process each, requests not logged, set to"), [[server.label, server.settings] for server in bench.servers])


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
    kinds = {"open": "start over an open connection", "new": "start over a new connection, connecting included"}
    found: Dict[str, List[Dict[str, Any]]] = {server.key: [] for server in bench.p2pservers}

    def measure(server: Server, _: int) -> None:
        with servers.running(servers.large(server)) as running:
            found[server.key].append(drive(running, "latency", WAITING, bench.starts))

    good = bench.in_turn("latency", bench.rounds, bench.p2pservers, measure)
    spurious = 0
    rows = []
    samples: Dict[str, Dict[str, Dict[str, Sample]]] = {kind: {"median": {}, "p99": {}, "worst": {}} for kind in kinds}
    for server in good:
        drove = found[server.key]
        if early := sum(each["spurious"] for each in drove):
            bench.errors.append(f"{server.label}, latency: {early} waiting polls were answered without a guest and before their time")
            spurious += early
        for kind, of in samples.items():
            of["median"][server.key] = Sample(percentile(each[kind], 0.5) for each in drove)
            of["p99"][server.key] = Sample(percentile(each[kind], 0.99) for each in drove)
            of["worst"][server.key] = Sample(max(each[kind]) for each in drove)
            rows.append([f"{server.label}: {kinds[kind]}", *(by_key[server.key].show(2) for by_key in of.values())])
    if "p2pserver" in samples["open"]["median"]:
        bench.figures["latency median"] = samples["open"]["median"]["p2pserver"].median
        bench.figures["latency p99"] = samples["open"]["p99"]["p2pserver"].median
    for kind, what in (("open", "start to the waiting host"), ("new", "the same over a new connection")):
        bench.pair(f"{what}, median, ms", samples[kind]["median"], 3)
        bench.pair(f"{what}, 99th percentile, ms", samples[kind]["p99"], 3)
    return Section("A guest reaches the waiting host", (
        f"{WAITING:,} hosts wait in long polls (`Prefer: wait=25`), each on its own connection, in one process of Python. In each of {bench.often} "
        f"{bench.starts:,} starts over an open connection and as many over new ones go to random hosts, one at a time. Measured from sending the start (or "
        "from connecting) until the host has read and parsed the answer with its guest's addresses: both ends on this machine, the driver's own time "
        "included. The target looks at the first row. Only p2pserver has this: the others' figure is their poll interval, 1,000 ms on average where hosts "
        f"poll every 2 s. Waiting polls answered early and without a guest: {spurious}."
    ), [table(("milliseconds", "median", "99th percentile", "worst"), rows)])


def measure_crowd(bench: Bench) -> Section:
    """10,000 hosts waiting at once"""
    found: Dict[str, List[Dict[str, Any]]] = {server.key: [] for server in bench.p2pservers}

    def measure(server: Server, _: int) -> None:
        with servers.running(servers.large(server)) as running:
            found[server.key].append(drive(running, "crowd", GAMES, 0))

    good = bench.in_turn("crowd", bench.crowds, bench.p2pservers, measure)

    def sample(value: Callable[[Dict[str, Any]], float]) -> Dict[str, Sample]:
        return {server.key: Sample(value(each) for each in found[server.key]) for server in good}

    def step(before: str, after: str) -> Dict[str, Sample]:
        return sample(lambda each: (each[after] - each[before]) / GAMES)

    def megabytes(when: str) -> Dict[str, Sample]:
        return sample(lambda each: each[when] / 1e6)

    # What is measured, by what it is called: decimals, and for each server a figure of each round.
    memory = {
        "MB idle, after the first answer": (1, megabytes("idle")),
        f"MB with {GAMES:,} games registered and polled once": (1, megabytes("registered")),
        "bytes that a game added": (0, step("idle", "registered")),
        f"MB with {GAMES:,} hosts waiting": (1, megabytes("waiting")),
        "bytes that a waiting host added": (0, step("registered", "waiting")),
        "MB after each got a guest": (1, megabytes("after")),
        "bytes that a guest added": (0, step("waiting", "after")),
        "bytes that a waiting host costs, with its game": (0, step("idle", "waiting")),
        "bytes of the kernel's for each waiting host, about": (0, sample(lambda each: (
            each["kernel"]["Slab"] / 2 + each["kernel"]["KernelStack"] + each["kernel"]["PageTables"]) / GAMES)),
    }
    facts = {
        "hosts served, of 10,000": (0, sample(lambda each: each["served"])),
        "waiting polls answered early and without a guest": (0, sample(lambda each: each["spurious"])),
        "threads of the server while they wait": (0, sample(lambda each: each["threads"])),
        "seconds until all were connected and held": (2, sample(lambda each: each["hold_ms"] / 1000)),
        "seconds until all were served, the starts one after another": (2, sample(lambda each: each["serve_ms"] / 1000)),
        "microseconds of the server's processor for a start and its host's answer": (0, sample(lambda each: 1000 * each["cpu_ms"] / GAMES)),
    }
    decimals, waiting = memory[f"MB with {GAMES:,} hosts waiting"]
    start = facts["microseconds of the server's processor for a start and its host's answer"][1]
    if "p2pserver" in waiting:
        bench.figures["crowd served"] = min(each["served"] for each in found["p2pserver"])
        bench.figures["crowd resident"] = waiting["p2pserver"].median
        bench.figures["crowd idle"] = 1e6 * megabytes("idle")["p2pserver"].median
        bench.figures["crowd host"] = step("idle", "after")["p2pserver"].median
        bench.figures["crowd kernel"] = memory["bytes of the kernel's for each waiting host, about"][1]["p2pserver"].median
        bench.figures["crowd start"] = start["p2pserver"].median
    bench.pair("hosts served, of 10,000 waiting", facts["hosts served, of 10,000"][1], more=True)
    bench.pair(f"MB resident with {GAMES:,} hosts waiting", waiting, decimals)
    bench.pair("bytes that a waiting host costs, with its game", step("idle", "waiting"))
    bench.pair(f"seconds until {GAMES:,} hosts were connected and held", facts["seconds until all were connected and held"][1], 2)
    bench.pair(f"seconds until {GAMES:,} hosts were served", facts["seconds until all were served, the starts one after another"][1], 2)
    bench.pair("µs of processor for a start and its host's answer", start)

    def rows(of: Dict[str, Any]) -> List[List[str]]:
        return [[what, *(by_key[server.key].show(decimals) for server in good)] for what, (decimals, by_key) in of.items()]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    labels = [server.label for server in good]
    return Section(f"{GAMES:,} hosts waiting at once", (
        "Each on its own connection, from ten source addresses in 127.0.0.0/8; VmRSS of the one process in "
        f"{how_often(bench.crowds)}, MB of 10^6 bytes. Waiting is read when the server has become idle with all polls held; then every game gets one guest. "
        "What one added is for each of the hosts. The kernel's share (sockets, descriptors) is not resident memory of the process: it is estimated as half of "
        "what slab grew by (the other half is the driver's ends of the same connections), with stacks of threads and page tables. Files that a process may "
        f"open here: {soft:,} ({hard:,} at most)."
    ), [table(("resident memory", *labels), rows(memory)), table(("what", *labels), rows(facts))])


def measure_games(bench: Bench) -> Section:
    """what many games cost a poll"""
    cases = {
        "10 games, all polled in turn": (10, 10),       # registered, polled
        f"{GAMES:,} games, all polled in turn": (GAMES, GAMES),
        f"{GAMES:,} games, 10 of them polled": (GAMES, 10),
    }
    found: Dict[str, Dict[str, List[Load]]] = {server.key: {case: [] for case in cases} for server in bench.p2pservers}

    def fill(server: Server, _: int) -> None:
        for running, games in zip(up[server.key], (10, GAMES)):
            client.register(running.port, games, poll=True)
            load(running, "poll", games, WARM_UP)

    def measure(turn: int) -> Callable[[Server, int], None]:
        """The step for one of the cases: the first in every other round, the last in the others."""
        def step(server: Server, i: int) -> None:
            case = list(cases)[::-1 if i % 2 else 1][turn]
            registered, polled = cases[case]
            running = up[server.key][registered != 10]
            found[server.key][case].append(load(running, "poll", polled, bench.seconds))
        return step

    with contextlib.ExitStack() as stack:
        up = {}
        for server in bench.p2pservers:
            few, many = (bench.keep_up(stack, "games", servers.large(server)) for _ in range(2))
            if few and many:
                up[server.key] = few, many
        ready = bench.in_turn("games, filling", 1, [server for server in bench.p2pservers if server.key in up], fill)
        good = bench.in_turn("games", bench.rounds, ready, *(measure(turn) for turn in range(len(cases))))
    tables = []
    rates: Dict[str, Dict[str, Sample]] = {case: {} for case in cases}
    cpu: Dict[str, Dict[str, Sample]] = {case: {} for case in cases}
    few_polled, many_polled, _ = cases
    for server in good:
        for case, loads in found[server.key].items():
            rates[case][server.key] = Sample(each.rate for each in loads)
            cpu[case][server.key] = Sample(each.cpu for each in loads)
        times = {case: ratios(rates[few_polled][server.key], rates[case][server.key]) for case in cases}
        rows = [[case, rates[case][server.key].show(), times[case].show(2), cpu[case][server.key].show()] for case in cases]
        tables.append(table((f"{server.label} with", "polls per second", "time against the first", "µs of processor"), rows))
        if server.key == "p2pserver":
            bench.figures["games time"] = times[many_polled].median
            bench.figures["games poll"] = cpu[many_polled]["p2pserver"].median
    bench.pair(f"polls per second among {GAMES:,} games", rates[many_polled], more=True)
    bench.pair(f"µs of processor for a poll among {GAMES:,} games", cpu[many_polled], 1)
    return Section(f"Polls with {GAMES:,} games", (
        f"Of each p2pserver two, one with 10 games and one with {GAMES:,}, `wrk -t1 -c{CONNECTIONS}` keep-alive for {bench.seconds} s in turn, {bench.often}. "
        "Every host publishes addresses of its own. The target looks at all games polled in turn, which no cache of a few favours; the last row tells what the "
        "number of games costs by itself."
    ), tables)


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
    wall, cpu = ({kind: {server.key: Sample() for server in bench.p2pservers} for kind in kinds} for _ in range(2))      # microseconds
    both = {kind: {server.key: Sample() for server in bench.p2pservers} for kind in kinds[2:]}      # microseconds for a poll and a list
    rebuilt = {server.key: Sample() for server in bench.p2pservers}

    def fill(server: Server, _: int) -> None:
        client.register(up[server.key].port, GAMES, poll=True)
        load(up[server.key], "poll", GAMES, WARM_UP)

    def newest(running: Running) -> str:
        """The ETag of the list, which is what it should be."""
        with client.Client(running.port) as reader:
            answer = reader.request("GET", "/games")
            etag = answer.headers.get("etag", "")
            again = reader.request("GET", "/games", headers={"If-None-Match": etag})
        if len(answer.json["games"]) != GAMES or again.status != 304:
            raise Failure(f"GET /games lists {len(answer.json['games'])} games, where {GAMES} are; with its own ETag it answers {again.status}")
        return etag

    def note(server: Server, kind: str, of: Load) -> None:
        for samples, time_each in ((wall, 1e6 / of.rate), (cpu, of.cpu)):
            # Half of a mix are polls: what they leave of its time are the lists.
            samples[kind][server.key].append(2 * time_each - samples["a poll"][server.key][-1] if kind in both else time_each)
        if kind in both:
            both[kind][server.key].append(2e6 / of.rate)

    def measure(kind: str, what: str) -> Callable[[Server, int], None]:
        def step(server: Server, _: int) -> None:
            running = up[server.key]
            of = load(running, what, GAMES, bench.seconds, etag=newest(running))
            if of.lists_changed:
                raise Failure(f"GET /games with a matching ETag was answered with the whole list {of.lists_changed} times")
            note(server, kind, of)
        return step

    def measure_moving(server: Server, _: int) -> None:
        running = up[server.key]
        etag = newest(running)
        with changing(running):
            of = load(running, "mix", GAMES, max(3, bench.seconds), etag=etag)
        rebuilt[server.key].append(of.lists_changed)
        note(server, kinds[3], of)

    with contextlib.ExitStack() as stack:
        up = {server.key: running for server in bench.p2pservers if (running := bench.keep_up(stack, "list", servers.large(server)))}
        ready = bench.in_turn("list, filling", 1, [server for server in bench.p2pservers if server.key in up], fill)
        steps = measure(kinds[1], "list"), measure(kinds[0], "poll"), measure(kinds[2], "mix"), measure_moving    # poll beside mix, which it is taken from
        good = bench.in_turn("list", bench.rounds, ready, *steps)
    tables = []
    for server in good:
        times = {kind: ratios(wall[kind][server.key], wall["a poll"][server.key]) for kind in kinds}
        if server.key == "p2pserver":
            bench.figures["list time"], bench.figures["list time among polls"] = (times[kind].median for kind in kinds[1:3])
        rows = [[kind, wall[kind][server.key].show(1), times[kind].show(2), cpu[kind][server.key].show(1)] for kind in kinds]
        tables.append(table((server.label, "µs each", "time against a poll", "µs of processor"), rows))
    keys = [server.key for server in good]
    bench.pair(f"µs for {kinds[1]}", {key: wall[kinds[1]][key] for key in keys}, 1)
    bench.pair(f"µs of processor for {kinds[1]}", {key: cpu[kinds[1]][key] for key in keys}, 1)
    bench.pair("µs for a poll and a `GET /games` that has not changed", {key: both[kinds[2]][key] for key in keys}, 1)
    bench.pair("µs for the same with one change a second", {key: both[kinds[3]][key] for key in keys}, 1)
    return Section(f"`GET /games` with {GAMES:,} games", (
        f"`wrk -t1 -c{CONNECTIONS}` keep-alive for {bench.seconds} s each in turn, {bench.often}, with `If-None-Match` and the newest ETag; all "
        "games are polled in turn. Microseconds are the inverse of the rate. Among polls: polls and lists in turn at full rate, and the list's time is what "
        "is left of a pair after the poll's. With one change a second each of these clients fetches the whole list once after each change, which is in the "
        f"time: {', '.join(f'{rebuilt[server.key].show()} ({server.label})' for server in good)} such answers in a round."
    ), tables)


def measure_start(bench: Bench) -> Section:
    """start of process to first answer"""
    times: Dict[str, Sample] = {server.key: Sample() for server in bench.servers}
    memory: Dict[str, Sample] = {server.key: Sample() for server in bench.servers}

    def measure(server: Server, _: int) -> None:
        with servers.running(server) as started:
            resident = started.resident()
        times[server.key].append(1000 * started.started)
        memory[server.key].append(resident)

    good = {server.key for server in bench.in_turn("start", bench.boots, bench.servers, measure)}
    if "p2pserver" in good:
        bench.figures["start time"] = times["p2pserver"].median
        bench.figures["start resident"] = memory["p2pserver"].median
    bench.pair("ms from start to the first answer", {key: times[key] for key in good})
    bench.pair("MB resident, idle", {key: memory[key] for key in good}, 1)
    rows = [[server.label, times[server.key].show(), memory[server.key].show(1)] if server.key in good else [server.label, "ERROR", ""]
            for server in bench.servers]
    return Section("Start and idle memory", (
        f"{bench.boots} starts of each server in turn, from before its process is made until the answer to `GET /games` is read, tried every millisecond; "
        "files are in the system's cache. Then VmRSS, MB of 10^6 bytes, for servers of several processes (gunicorn, nginx) their sum."
    ), [table(("server", "ms to the first answer", "MB resident"), rows)])


def beside(bench: Bench) -> Section:
    """What the p2pserver of today is beside the release that it is compared with."""
    return Section(f"Beside p2pserver {servers.BASELINE}", (
        "All that was measured of both in the same rounds. Better is the ratio of the two, round by round, the right way round for each figure: above 1 the "
        "p2pserver of today is faster, or needs less."
    ), [table(("median (spread)", "p2pserver", f"p2pserver {servers.BASELINE}", "x better"), [pair.row() for pair in bench.pairs])])


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
FOR_ALL = ("throughput", "start")       # of every server; the others are of p2pservers


# ---- command line ---------------------------------------------------------------------------------------------------

def facts(bench: Bench, busy: float, missing: Dict[str, str]) -> List[str]:
    """What a reader must know of the run, a sentence each."""
    found = versions()
    used = sorted({package for server in bench.servers for package in server.packages})
    known = [
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()) + f", {bench.often} of {bench.seconds} s each",
        "Machine: " + ", ".join(machine()) + f"; load average at the beginning {busy:.2f}" + (BUSY if busy > 0.5 else ""),
        f"p2pserver {found['p2pserver'] or '(not from git)'}, Python {found['python']} for it and all of Python; wrk {found['wrk']}",
    ]
    if used:
        known.append("Peers: " + ", ".join(f"{package} {found[package]}" for package in used if found.get(package)))
    for server in bench.p2pservers:
        with bench.failing("flags", server):
            always, many = (" ".join(servers.p2pserver_flags(server.file, flags)) or "none" for flags in (servers.ALWAYS, servers.FOR_MANY))
            known.append(f"Flags of {server.label}: {always}; where it has {GAMES:,} games or waiting hosts also: {many}")
    return known + [f"Left out is {BY_KEY[key].label}: {why}" for key, why in missing.items()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds of every measurement (default: 5; with --quick 1)")
    parser.add_argument("--seconds", type=int, help="seconds of load in each (default: 3; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="few and short rounds, fewer starts, one crowd")
    parser.add_argument("--servers", help="these servers alone, of which the p2pservers alone are in all measurements: " + ",".join(BY_KEY))
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help="these measurements alone: " + ",".join(MEASUREMENTS))
    parser.add_argument("--out", type=pathlib.Path, help="where to write the report (default: bench/RESULTS.md for a whole run, else nowhere)")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := [name for name in given.only if name not in MEASUREMENTS]:
        parser.error(f"there is no measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    given.named = given.servers.split(",") if given.servers else []
    if unknown := [name for name in given.named if name not in BY_KEY]:
        parser.error(f"there is no server {', '.join(unknown)}; there are {', '.join(BY_KEY)}")
    given.servers = [server for server in SERVERS if server.key in (given.named or BY_KEY)]
    if not any(server.file for server in given.servers):
        given.only = [name for name in given.only if name in FOR_ALL]
        if not given.only:
            parser.error(f"without a p2pserver there are only {', '.join(FOR_ALL)} to be measured")
    given.rounds = given.rounds if given.rounds is not None else 1 if given.quick else 5
    given.seconds = given.seconds if given.seconds is not None else 1 if given.quick else 3
    if given.rounds < 1 or given.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    whole = not given.quick and set(given.only) == set(MEASUREMENTS) and len(given.servers) == len(SERVERS)
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
        missing = install(given.servers)
        if named := [why for key, why in missing.items() if key in given.named]:
            raise Failure("; ".join(named))
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    for why in missing.values():
        print(why, file=sys.stderr)
    chosen = [server for server in given.servers if server.key not in missing]
    bench = Bench(chosen, given.rounds, given.seconds, starts=200 if given.quick else 1000,
                  crowds=1 if given.quick else given.rounds, boots=max(3 if given.quick else 10, given.rounds))
    known, sections = facts(bench, busy, missing), []
    for name, measure in MEASUREMENTS.items():
        if name in given.only:
            try:
                sections.append(measure(bench))
            except UNMEASURED as failure:
                bench.errors.append(f"{name} ({measure.__doc__}): {failure or type(failure).__name__}")
                bench.say(bench.errors[-1].partition("\n")[0])
    if {"crowd host", "games poll"} <= bench.figures.keys():
        sections.append(capacity(bench.figures))
    if bench.pairs:
        sections.insert(0, beside(bench))
    targets = targets_of(given.only, (server.key for server in chosen))
    report = render(known, targets, bench.figures, sections, bench.errors)
    print(report)
    if given.out:
        given.out.write_text(report)
    return 1 if bench.errors or any(target.figure not in bench.figures for target in targets) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
