"""Targets, tables and the report: what the measurements hand over as figures becomes Markdown here."""

import math
import statistics
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence


class Target(NamedTuple):
    """A row of the table of targets: the figure that it looks at, and the limit that the figure keeps."""

    figure: str
    what: str
    limit: float
    unit: str = "x"
    at_least: bool = False
    strict: bool = False        # the limit itself misses

    def met(self, value: float) -> bool:
        if value == self.limit:
            return not self.strict
        return (value > self.limit) == self.at_least

    @property
    def rule(self) -> str:
        return f"{'at least' if self.at_least else 'under' if self.strict else 'at most'} {self.limit:,g} {self.unit}"


def show_value(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if unit == "hosts" else f"{value:,.2f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


KEPT, NEW = "polls per second, 16 keep-alive connections, against ", "polls per second, a new connection each, against "

# In the order of the measurements, whose name is the first part of a figure's.
TARGETS = (
    Target("throughput keep aiohttp", KEPT + "aiohttp", 1.1, at_least=True),
    Target("throughput keep express", KEPT + "Express", 2, at_least=True),
    Target("throughput keep fastapi", KEPT + "FastAPI on uvicorn", 2.5, at_least=True),
    Target("throughput keep gunicorn", KEPT + "Flask on gunicorn gthread", 6, at_least=True),
    Target("throughput close aiohttp", NEW + "aiohttp", 1.1, at_least=True),
    Target("throughput close asgi", NEW + "bare ASGI on uvicorn", 1, at_least=True),
    Target("latency median", "start to the waiting host holding the guest's addresses, 1,000 hosts waiting, median", 1.5, "ms", strict=True),
    Target("latency p99", "the same, 99th percentile", 10, "ms", strict=True),
    Target("crowd served", "10,000 hosts waiting at once in one process, served when their guest comes", 10000, "hosts", at_least=True),
    Target("crowd resident", "resident memory with 10,000 hosts waiting", 250, "MB", strict=True),
    Target("games time", "time of a poll with 10,000 games registered against 10", 1.1),
    Target("list time", "`GET /games` with 10,000 games and a matching ETag, time against a poll", 1),
    Target("list time among polls", "the same among polls at full rate, which change nothing", 1),
    Target("start time", "start of process to first answer", 150, "ms", strict=True),
    Target("start resident", "resident memory idle", 24, "MB", strict=True),
)


def targets_of(measured: Iterable[str], compared: Iterable[str]) -> List[Target]:
    """The targets that a run of these measurements with these servers can tell of. They are all of p2pserver; some are against another."""
    measurements, keys = set(measured), set(compared)

    def told(target: Target) -> bool:
        measurement, *of = target.figure.split()
        return measurement in measurements and "p2pserver" in keys and (measurement != "throughput" or of[-1] in keys)

    return [target for target in TARGETS if told(target)]


class Section(NamedTuple):
    """What one measurement found: how it was taken, and tables in Markdown."""

    title: str
    how: str
    tables: List[str]


class Sample(List[float]):
    """One figure of each round."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    def show(self, decimals: int = 0, spread: bool = True) -> str:
        """The median, and the least and the greatest."""
        text = f"{self.median:,.{decimals}f}"
        return f"{text} ({min(self):,.{decimals}f} to {max(self):,.{decimals}f})" if spread and len(self) > 1 else text


def ratios(these: Sequence[float], those: Sequence[float]) -> Sample:
    """Round by round: what made one round slow was there for both."""
    return Sample(this / that if that else math.nan for this, that in zip(these, those))


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of them (0 to 1) does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, aligned for those who read it as text: the first column to the left, the others to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" if i else "-" * (width + 2) for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def verdict(target: Target, value: Optional[float]) -> List[str]:
    if value is None:
        return [target.what, target.rule, "", "NOT MEASURED"]
    return [target.what, target.rule, show_value(value, target.unit), "met" if target.met(value) else "MISSED"]


def targets_table(targets: Iterable[Target], figures: Dict[str, float]) -> str:
    """Targets, each with what was found."""
    return table(("target", "asked", "measured", "verdict"), [verdict(target, figures.get(target.figure)) for target in targets])


class Pair(NamedTuple):
    """A row of the comparison of two p2pservers: what was measured in the same rounds of both, and whether more is better."""

    what: str
    this: Sample
    that: Sample
    decimals: int = 0
    more: bool = False

    def row(self) -> List[str]:
        better = ratios(self.this, self.that) if self.more else ratios(self.that, self.this)
        return [self.what, self.this.show(self.decimals), self.that.show(self.decimals), better.show(2)]


def render(facts: Sequence[str], targets: Sequence[Target], figures: Dict[str, float], sections: Sequence[Section], errors: Sequence[str]) -> str:
    """The whole report in Markdown."""
    parts = ["# Results of `make bench`", "\n".join(f"- {fact}" for fact in facts)]
    if errors:
        # What a server printed comes after the first line of its error.
        parts += ["## Errors", "\n".join("- " + error.replace("\n", "\n      ") for error in errors)]
    if targets:
        parts += ["## Targets", "Written by `bench/run.py` from the figures below; ratios are medians of the rounds' ratios.", targets_table(targets, figures)]
    for section in sections:
        parts += [f"## {section.title}", section.how, *section.tables]
    return "\n\n".join(parts) + "\n"
