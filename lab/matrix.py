#!/usr/bin/env python3
"""Measures how long two peers take to connect through every pair of NAT kinds: ours (p2pclient) and aioice, in turns.

usage: matrix.py [--rounds N]       (the Python that runs it needs requests, and aioice: see requirements.txt)

The time is that of the slower peer, from when both have the other's addresses to a datagram received from it. Both kinds
of peers use our server for STUN. Prints the matrix, what delay and loss cost, and whether our targets hold; puts the former two
into README.md, and has the matrix drawn (make pictures).
"""
import argparse
import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys

import natlab
from stage import PORT, Program, Stage

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
BEGIN, END = "<!-- matrix.py writes from here -->\n", "<!-- to here -->\n"
AGENTS = ("ours", "aioice")
RELAYED = "relayed"     # ours, with a relay for the host; only for the pairs that have no direct way
PAIRS = list(itertools.combinations_with_replacement(natlab.KINDS, 2))
PLAIN, FAR, LOSSY = LINKS = "without delay", "50 ms each way", "10% loss on each uplink"
UPLINKS = {PLAIN: {}, FAR: {"delay_ms": 25}, LOSSY: {"loss": 10}}     # a way goes over two of them
PREPARATION = 60    # seconds, for peers to start and gather while others do
AT_ONCE = 4         # attempts of which only the outcome counts


def attempt(agent, pair, links=PLAIN):
    """Seconds until both were connected, or the errors of both peers as a text."""
    with Stage(turn=agent == RELAYED) as stage:
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


def with_relay(times, rounds):
    """Seconds of the pairs that do not connect otherwise when the host has a relay, in Markdown."""
    rows = [["host, guest", "with a relay"], ["---", "---"]]
    for pair in [pair for pair in PAIRS if (PLAIN, pair, "ours") not in times]:
        results = [attempt(RELAYED, pair) for _ in range(1 if "blocked" in pair else rounds)]
        rows.append([" with ".join(pair), text_of([result for result in results if not isinstance(result, str)])])
        print(f"{RELAYED} {rows[-1]}", flush=True)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each pair (default: %(default)s)")
    options = parser.parse_args()
    reason = natlab.check()
    if reason:
        sys.exit(f"the lab cannot run here: {reason}")
    times = measure(options.rounds)
    result = "\n".join((conditions(options.rounds), matrix(times), summary(times), with_relay(times, options.rounds)))
    print("\n" + result)
    for target, holds in targets(times):
        print(f"{'holds' if holds else 'FAILS'}: {target}")
    with open(README, encoding="utf-8") as file:
        before, _, rest = file.read().partition(BEGIN)
    with open(README, "w", encoding="utf-8") as file:
        file.write(before + BEGIN + result + END + rest.partition(END)[2])
    subprocess.run(["make", "-C", os.path.dirname(HERE), "pictures"], check=True)


if __name__ == "__main__":
    main()
