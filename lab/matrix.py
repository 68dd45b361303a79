#!/usr/bin/env python3
"""Measures how long two peers take to connect through every pair of NAT kinds: ours (p2pclient) and aioice, in turns.

usage: matrix.py [--rounds N]       (the Python that runs it needs requests, and aioice: see requirements.txt)

The time is that of the slower peer, from when both have the other's addresses to a datagram received from it. Both kinds
of peers use our server for STUN. Prints the matrix of medians, puts it into README.md, and draws it (make pictures).
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
PAIRS = list(itertools.combinations_with_replacement(natlab.KINDS, 2))


def attempt(agent, pair):
    """Seconds until both were connected, or the errors of both peers as a text."""
    with Stage() as stage:
        machines = [stage.site(name, nat=kind).machine() for name, kind in zip(("host", "guest"), pair)]
        peers = [Program(machine, os.path.join(HERE, "peer.py"), agent, role, stage.server.address, PORT)
                 for machine, role in zip(machines, ("controlled", "controlling"))]
        for mine, other in (peers, peers[::-1]):
            other.say(mine.expect(".+", 10).string)
        for peer in peers:
            peer.expect("null")
        for peer in peers:
            peer.say("null")
        for peer in peers:
            peer.wait()
        results = [json.loads(peer.lines[-1]) for peer in peers]
    if all(isinstance(result, list) for result in results):
        return max(seconds for seconds, _ in results)
    return " / ".join(str(result) for result in results)


def measure(rounds):
    """The list of seconds by agent and pair; it is empty where no connection came about."""
    cells = list(itertools.product(PAIRS, AGENTS))
    # What does not connect takes long to give up, so find these out first, many at once, and measure the others one by one.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first = dict(zip(cells, pool.map(lambda cell: attempt(cell[1], cell[0]), cells)))
    times = {cell: [] for cell in cells}
    for (pair, agent), result in first.items():
        if isinstance(result, str):
            print(f"{agent:6} does not connect {' with '.join(pair)}: {result}", flush=True)
    for number in range(rounds):
        for pair, agent in cells:
            if not isinstance(first[pair, agent], str):
                result = attempt(agent, pair)
                print(f"round {number + 1}: {agent:6} {' with '.join(pair)}: {result if isinstance(result, str) else f'{result:.3f} s'}", flush=True)
                times[pair, agent].append(float("inf") if isinstance(result, str) else result)
    return times


def table(times):
    """The medians in Markdown."""
    rows = [["ours / aioice = ratio", *natlab.KINDS], ["---"] * (1 + len(natlab.KINDS))]
    for row in natlab.KINDS:
        cells = []
        for column in natlab.KINDS:
            pair = (row, column)
            medians = [statistics.median(times[pair, agent]) if times.get((pair, agent)) else None for agent in AGENTS]
            texts = ["–" if median is None else f"{median:.3f}" for median in medians]
            ratio = f" = {medians[0] / medians[1]:.2f}" if None not in medians else ""
            cells.append(" / ".join(texts) + ratio if pair in PAIRS else "")
        rows.append([f"**{row}**", *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def conditions(rounds):
    """Where and with what it was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("aioice", "requests"))
    return (f"Seconds, medians of {rounds} rounds in which the two took turns, {datetime.date.today()}; Linux {platform.release()}, {os.cpu_count()} CPUs, "
            f"Python {platform.python_version()}, {versions}; links without loss or delay. A dash: no connection.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each pair (default: %(default)s)")
    options = parser.parse_args()
    reason = natlab.check()
    if reason:
        sys.exit(f"the lab cannot run here: {reason}")
    times = measure(options.rounds)
    result = conditions(options.rounds) + "\n" + table(times)
    print("\n" + result)
    with open(README, encoding="utf-8") as file:
        before, _, rest = file.read().partition(BEGIN)
    with open(README, "w", encoding="utf-8") as file:
        file.write(before + BEGIN + result + END + rest.partition(END)[2])
    subprocess.run(["make", "-C", os.path.dirname(HERE), "pictures"], check=True)


if __name__ == "__main__":
    main()
