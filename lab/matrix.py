#!/usr/bin/env python3
"""Measures how long two peers take to connect through every pair of NAT kinds: ours (p2pclient) and aioice, in turns.

usage: matrix.py [--rounds N] [--hard] [--pair HOST/GUEST] [--column NAME]       (the Python that runs it needs requests, and aioice: see requirements.txt)

The time is that of the slower peer, from when both have the other's addresses to a datagram received from it. Both kinds
of peers use our server for STUN. Prints the matrix, what delay and loss cost, and whether our targets hold; puts the former two
into README.md, and has the matrix drawn (make pictures).

With --hard it measures instead the pairs of which one router gives each destination another port, by real hosts and guests that meet
through the server, by the ways of COLUMNS; --pair and --column choose some (repeatable), and leave README.md as it is. Prints how many of the
rounds connected, the median time and the datagrams that left each LAN: all of UDP, questions to STUN and the game's own among them.
"""
import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import natlab
from stage import PORT, Program, Stage

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
BEGIN, END = "<!-- matrix.py writes from here -->\n", "<!-- to here -->\n"
AGENTS = ("ours", "aioice")
PAIRS = list(itertools.combinations_with_replacement(natlab.KINDS, 2))
PLAIN, FAR, LOSSY = LINKS = "without delay", "50 ms each way", "10% loss on each uplink"
UPLINKS = {PLAIN: {}, FAR: {"delay_ms": 25}, LOSSY: {"loss": 10}}     # a way goes over two of them
HARD_BEGIN, HARD_END = "<!-- matrix.py --hard writes from here -->\n", "<!-- to here, of the hard pairs -->\n"
EASY = "port-restricted"
HARD_PAIRS = [pair for kind in ("sequential", "step", "block", "big-block", "symmetric") for pair in ((kind, EASY), (EASY, kind))] + [
    ("sequential", "sequential"), ("sequential", "step"), ("block", "sequential"), ("block", "block"), ("symmetric", "sequential"),
    ("symmetric", "symmetric")]
# What both programs are told, and what the host says when it is ready: that its router forwards a port, or that it has a relay.
OFFERED, MAPPED, RELAYED = "on offer", "the router forwards", "a relay stands by"
COLUMNS = {"ICE's pairs": (["--no-prediction"], OFFERED), "with prediction": ([], OFFERED), "with probing": (["--probing"], OFFERED),
           "with a mapped host": ([], MAPPED), "with a relay": (["--no-prediction"], RELAYED)}
MAPPED_ADDRESS = "11.0.0.1"     # miniupnpd takes documentation addresses for private ones
PREPARATION = 60    # seconds, for peers to start and gather while others do
AT_ONCE = 4         # attempts of which only the outcome counts


def attempt(agent, pair, links=PLAIN):
    """Seconds until both were connected, or the errors of both peers as a text."""
    with Stage() as stage:
        machines = [stage.site(name, nat=kind, **UPLINKS[links]).machine() for name, kind in zip(("host", "guest"), pair)]
        peers = [Program(machine, os.path.join(HERE, "peer.py"), agent, role, stage.server.address, PORT)
                 for machine, role in zip(machines, ("controlled", "controlling"))]
        for mine, other in (peers, peers[::-1]):
            other.say(mine.expect(".+", PREPARATION).string)
        for peer in peers:
            peer.expect("null", PREPARATION)
        for peer in peers:
            peer.say("null")
        results = [json.loads(peer.expect(r'^(\[|")', PREPARATION, after=2).string) for peer in peers]
    if all(isinstance(result, list) for result in results):
        return max(seconds for seconds, _ in results)
    return " / ".join(str(result) for result in results)


def measure(rounds):
    """The list of seconds by links, pair and agent, infinite where a try failed; only of pairs that connect at all."""
    cells = list(itertools.product(PAIRS, AGENTS))
    # What does not connect takes long to give up, so find these out first, several at once, and measure the others one by one.
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        first = dict(zip(cells, pool.map(lambda cell: attempt(cell[1], cell[0]), cells)))
    for (pair, agent), result in first.items():
        if isinstance(result, str):
            print(f"{agent:6} does not connect {' with '.join(pair)}: {result}", flush=True)
    times = {}
    for number, links, (pair, agent) in itertools.product(range(rounds), LINKS, cells):
        if not isinstance(first[pair, agent], str):
            result = attempt(agent, pair, links)
            said = result if isinstance(result, str) else f"{result:.3f} s"
            print(f"round {number + 1}: {agent:6} {' with '.join(pair)}, {links}: {said}", flush=True)
            times.setdefault((links, pair, agent), []).append(float("inf") if isinstance(result, str) else result)
    return times


def meet(pair, column):
    """Seconds until both sides of a pair were connected, infinite if they were not; the datagrams that left the LANs of host and guest."""
    options, ready = COLUMNS[column]
    with Stage(turn=ready == RELAYED) as stage:
        sites = [stage.site(name, nat=kind, public_address=MAPPED_ADDRESS if ready == MAPPED and name == "host" else None)
                 for name, kind in zip(("host", "guest"), pair)]
        if ready == MAPPED:
            sites[0].router.map_ports("pcp")
        host = stage.host(sites[0].machine(), *options)
        host.expect(ready, PREPARATION)
        time.sleep(2)       # in which it tells the server
        guest = stage.guest(sites[1].machine(), "--messages", "1", *options)
        guest.wait()
        seconds = float("inf")
        with contextlib.suppress(AssertionError):       # one of the two does not say it
            seconds = max(int(program.expect(pattern)[1]) for program, pattern in (
                (guest, r"connected: .* in (\d+) ms"), (host, r"connected: .*, (\d+) ms after it was known"))) / 1000
        return (seconds, *[site.router.counters()["out"] for site in sites])


def measure_hard(pairs, columns, rounds):
    """What meet() gives, by pair and column."""
    cells = [cell for _ in range(rounds) for cell in itertools.product(pairs, columns)]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for (pair, column), result in zip(cells, pool.map(lambda cell: meet(*cell), cells)):
            print(f"{' with '.join(pair)}, {column}: {result[0]:.3f} s, datagrams of the host's LAN {result[1]}, of the guest's {result[2]}", flush=True)
            results.setdefault((pair, column), []).append(result)
    return results


def hard_table(results, columns):
    """How many of the rounds connected, the median and worst seconds of these, and the median datagrams of host and guest, in Markdown."""
    rows = [["host with guest", *columns], ["---"] * (1 + len(columns))]
    for pair in dict.fromkeys(pair for pair, _ in results):
        cells = []
        for column in columns:
            found = results[pair, column]
            connected = [seconds for seconds, _, _ in found if seconds != float("inf")]
            datagrams = "/".join(f"{statistics.median(each):.0f}" for each in list(zip(*found))[1:])
            cells.append(f"{len(connected)} of {len(found)}" + (f", {text_of(connected)}" if connected else "") + f"; {datagrams}")
        rows.append([f"**{pair[0]}** with **{pair[1]}**", *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def write_between(begin, end, text):
    """Put a text into README.md in place of what stands between two lines."""
    with open(README, encoding="utf-8") as file:
        before, _, rest = file.read().partition(begin)
    with open(README, "w", encoding="utf-8") as file:
        file.write(before + begin + text + end + rest.partition(end)[2])


def text_of(seconds):
    """The median of some seconds, and the worst; a dash for none."""
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})" if seconds else "–"


def matrix(times):
    """Medians and worst of each pair, over links without delay, in Markdown."""
    rows = [["ours / aioice", *natlab.KINDS], ["---"] * (1 + len(natlab.KINDS))]
    for row in natlab.KINDS:
        cells = [" / ".join(text_of(times.get((PLAIN, (row, column), agent))) for agent in AGENTS) if (row, column) in PAIRS else ""
                 for column in natlab.KINDS]
        rows.append([f"**{row}**", *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def over_all_pairs(times, links, agent):
    """The seconds of all pairs together."""
    return [each for key, seconds in times.items() if (key[0], key[2]) == (links, agent) for each in seconds]


def summary(times):
    """What delay and loss cost, over all pairs that connect, in Markdown."""
    rows = [["links", *(f"{agent} {what}" for agent in AGENTS for what in ("connected", "median (worst)"))], ["---"] * (1 + 2 * len(AGENTS))]
    for links in LINKS:
        cells = [links]
        for agent in AGENTS:
            seconds = over_all_pairs(times, links, agent)
            connected = [each for each in seconds if each != float("inf")]
            cells += [f"{len(connected)} of {len(seconds)}", text_of(connected)]
        rows.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def targets(times):
    """Each of our targets, and whether it holds. Nobody can be told a symmetric router's port, so its peer must hear from it and ask who is there
    before it sends: two round trips instead of one and a half."""
    ours = {(links, pair): seconds for (links, pair, agent), seconds in times.items() if agent == "ours"}
    far = {kind: [statistics.median(seconds) for (links, pair), seconds in ours.items() if links == FAR and ("symmetric" in pair) == kind]
           for kind in (False, True)}
    plain = [seconds for (links, _), seconds in ours.items() if links == PLAIN]
    lossy = over_all_pairs(times, LOSSY, "ours")
    yield "each pair connects within 20 ms at the median", max(map(statistics.median, plain)) < 0.020
    yield "and within 60 ms at worst", max(map(max, plain)) < 0.060
    yield "over 50 ms each way each pair connects within 170 ms at the median", max(far[False]) < 0.170
    yield "and within 220 ms if one of its routers is symmetric", max(far[True]) < 0.220
    yield "over 10% loss all pairs together connect within 150 ms at the median", statistics.median(lossy) < 0.150
    yield "and always", max(lossy) < float("inf")


def conditions(rounds):
    """Where and with what it was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("aioice", "requests"))
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (f"Seconds, medians (and the worst) of {rounds} rounds in which the two took turns, {datetime.date.today()}; Linux {platform.release()}, "
            f"{os.cpu_count()} CPUs, load {load}, Python {platform.python_version()}, {versions}. A dash: no connection.\n")


def hard_conditions(rounds):
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (f"Of {rounds} rounds, {AT_ONCE} at once, those that connected; the median seconds (and the worst); the median datagrams that left the "
            f"LANs of host and guest. {datetime.date.today()}; {os.cpu_count()} CPUs, load {load}.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each pair (default: %(default)s)")
    parser.add_argument("--hard", action="store_true", help="measure the pairs with a symmetric router, by all ways that there are")
    parser.add_argument("--pair", action="append", metavar="HOST/GUEST", help="with --hard: this pair, such as port-restricted/sequential")
    parser.add_argument("--column", action="append", choices=COLUMNS, help="with --hard: this way")
    options = parser.parse_args()
    reason = natlab.check()
    if reason:
        sys.exit(f"the lab cannot run here: {reason}")
    if options.hard:
        pairs = [tuple(pair.split("/")) for pair in options.pair] if options.pair else HARD_PAIRS
        columns = options.column or list(COLUMNS)
        result = hard_table(measure_hard(pairs, columns, options.rounds), columns)
        print("\n" + result)
        if not options.pair and not options.column:
            write_between(HARD_BEGIN, HARD_END, hard_conditions(options.rounds) + "\n" + result)
        return
    times = measure(options.rounds)
    result = "\n".join((conditions(options.rounds), matrix(times), summary(times)))
    print("\n" + result)
    for target, holds in targets(times):
        print(f"{'holds' if holds else 'FAILS'}: {target}")
    write_between(BEGIN, END, result)
    subprocess.run(["make", "-C", os.path.dirname(HERE), "pictures"], check=True)


if __name__ == "__main__":
    main()
