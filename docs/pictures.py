#!/usr/bin/env python3
"""Draws the figures of bench/RESULTS.md and lab/README.md, as they stand there, as SVG beside the pages that quote them: make pictures.

Each picture has the figures that it shows in its metadata, as JSON, so that a test can tell whether it is of the present ones. Only what draws
needs matplotlib (pictures.txt); what reads the figures needs nothing.
"""

import itertools
import json
import pathlib
import re
import xml.etree.ElementTree

DOCS = pathlib.Path(__file__).resolve().parent
RESULTS, MATRIX = DOCS.parent / "bench" / "RESULTS.md", DOCS.parent / "lab" / "README.md"
LOADS = {"polls per second, 16 keep-alive connections": "16 keep-alive connections", "polls per second, a new connection each": "a new connection each"}
CEILING = "nginx, a constant answer"        # no rendezvous server, and so much faster that its bar is cut
TICKS = [factor * 10 ** power for power in (-3, -2, -1, 0, 1) for factor in (1, 2, 5)]     # seconds
COLOURS = ("#1f77b4", "#ff9f43", "#2ca02c", "#9467bd")
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def table(page, *head):
    """The rows of the first table in Markdown whose first cells are head, as lists of cells, its own first. ValueError: there is none."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for i, (line, rule) in enumerate(zip(lines, lines[1:])):
        if cells_of(line)[:len(head)] == list(head) and re.fullmatch("[-:| ]+", rule):
            below = itertools.takewhile(lambda row: row.startswith("|"), lines[i + 2:])
            return [cells_of(row) for row in (line, *below)]
    raise ValueError(f"{page.name} has no table {head!r}")


def cells_of(line):
    return [cell.strip().strip("*") for cell in line.split("|")[1:-1]]


def spread(text):
    """Median, least and greatest: of "5,544 (4,871 to 7,431)", or of a number alone."""
    numbers = [float(number.replace(",", "")) for number in re.findall(r"[0-9][0-9,.]*", text)]
    return numbers if len(numbers) == 3 else 3 * numbers[:1]


def polls():
    """Polls a second by load and server: median, least, greatest."""
    return {name: {row[0]: spread(row[1]) for row in table(RESULTS, head)[1:]} for head, name in LOADS.items()}


def memory():
    """Megabytes resident by server and number of hosts that wait: median, least, greatest."""
    head, *rows = table(RESULTS, "resident memory")
    by_name = {row[0]: row[1:] for row in rows}
    waiting = next(name for name in by_name if re.fullmatch("MB with [0-9,]+ hosts waiting", name))
    number = re.search("[0-9,]+", waiting)[0].replace(",", "")
    return {server: {"0": spread(by_name["MB idle, after the first answer"][i]), number: spread(by_name[waiting][i])} for i, server in enumerate(head[1:])}


def connect_times():
    """Seconds until two peers are connected, by agent and pair of NATs; null: not at all."""
    text = MATRIX.read_text(encoding="utf-8")
    head = re.search(r"^\| ([^|]*ours[^|]*) \|", text, re.MULTILINE)[1]
    agents = head.partition(" = ")[0].split(" / ")
    first, *rows = table(MATRIX, head)
    times = {agent: {} for agent in agents}
    for row in rows:
        for kind, cell in zip(first[1:], row[1:]):
            values = cell.partition(" = ")[0].split(" / ") if cell else []
            for agent, value in zip(agents, values):
                median = value.partition(" ")[0]       # the worst follows in brackets
                times[agent][f"{row[0]} – {kind}"] = float(median) if median[:1].isdigit() else None
    return times


def draw_polls(axes, figures):
    servers = list(next(iter(figures.values())))
    greatest_of = [(values[2], server) for load in figures.values() for server, values in load.items()]
    others = max(greatest for greatest, server in greatest_of if server != CEILING)
    limit = 1.15 * max(greatest for greatest, _ in greatest_of if greatest < 1.5 * others)
    for i, (load, by_server) in enumerate(figures.items()):
        medians = [by_server[server][0] for server in servers]
        errors = [[median - by_server[server][1] for server, median in zip(servers, medians)],
                  [by_server[server][2] - median for server, median in zip(servers, medians)]]
        places = [place + 0.4 * i for place in range(len(servers))]
        axes.barh(places, medians, 0.38, label=load, color=COLOURS[i], xerr=errors, error_kw={"ecolor": "#888", "elinewidth": 1})
        for place, server in zip(places, servers):
            median, _, greatest = by_server[server]
            end = min(greatest + 0.01 * limit, 0.93 * limit)
            axes.text(end, place, f"{median:,.0f}" + " →" * (median > limit), va="center", fontsize=8)
    axes.set(yticks=[place + 0.2 for place in range(len(servers))], yticklabels=servers, xlim=(0, limit),
             xlabel="polls a second; lines: least and greatest of the rounds")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.invert_yaxis()
    axes.legend(loc="center right")


def draw_memory(axes, figures):
    for (server, by_number), colour in zip(figures.items(), COLOURS):
        numbers, medians = [int(number) for number in by_number], [values[0] for values in by_number.values()]
        each = 1e6 * (medians[-1] - medians[0]) / numbers[-1]
        axes.plot(numbers, medians, marker="o", color=colour, label=f"{server}: {each:,.0f} bytes for each host with its game")
        for number, median, place, side in zip(numbers, medians, (-7, 7), ("right", "left")):
            axes.annotate(f"{median:g}", (number, median), textcoords="offset points", xytext=(place, 0), ha=side, va="center", fontsize=8)
    axes.set(xlabel="waiting hosts; measured at the dots", ylabel="MB resident", ylim=(0, None), xlim=(-0.06 * numbers[-1], 1.06 * numbers[-1]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower right")


def draw_connect_times(axes, figures):
    pairs = [pair for pair in next(iter(figures.values())) if any(times[pair] is not None for times in figures.values())]
    for (agent, times), colour, marker in zip(figures.items(), COLOURS, "oDs^"):
        found = [(times[pair], place) for place, pair in enumerate(pairs) if times[pair] is not None]
        axes.plot(*zip(*found), marker, color=colour, label=agent)
    axes.set(yticks=range(len(pairs)), yticklabels=pairs, xscale="log", xlabel="seconds until both are connected; pairs that cannot connect are left out")
    axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.4)
    axes.invert_yaxis()
    axes.legend()


PICTURES = {"polls.svg": (polls, draw_polls, (9, 6)), "memory.svg": (memory, draw_memory, (8, 4)),
            "connect.svg": (connect_times, draw_connect_times, (8, 5))}


def shown(name):
    """The figures that a picture shows."""
    return json.loads(xml.etree.ElementTree.parse(DOCS / name).getroot().find(f".//{DESCRIPTION}").text)


def draw_all():
    """Draw all pictures anew. The same figures give the same bytes."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"svg.hashsalt": "p2pserver", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    for name, (read, draw, size) in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes, read())
        figure.savefig(DOCS / name, metadata={"Description": json.dumps(read(), ensure_ascii=False), "Date": None, "Creator": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw_all()
