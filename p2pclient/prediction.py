"""How a symmetric NAT allocates ports, as far as a few mappings tell that were made one after another, and which ports are likely next.
Without socket or clock.

A NAT that maps by destination (RFC 4787 section 4.1) gives each new destination another port. Many take the next one, or one a fixed step further; carriers
give each subscriber a block (RFC 7422) and choose in it; others choose among all.
"""

from __future__ import annotations

import collections
import secrets
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

LEAST_SAMPLES = 4           # mappings from which anything can be told
MOST_STEPS = 16             # of the usual step between two mappings of ours, where others behind the router make some of their own meanwhile
MOST_STEP = 1024
MOST_BLOCK = 4096           # ports in a block; the ports of more look random
PORTS = range(1024, 65536)

SEQUENTIAL, BLOCK, RANDOM = "sequential", "block", "random"


class Ports(NamedTuple):
    """The ports that a symmetric NAT gives to new mappings. kind: SEQUENTIAL, from start (the latest) in steps of step; BLOCK, from start up to and with end;
    RANDOM. round: how often its owner has opened mappings for peers to find."""

    kind: str
    start: int = 0
    step: int = 0
    end: int = 0
    round: int = 0

    @property
    def published(self) -> Dict[str, int]:
        """As a peer is told it."""
        known = {SEQUENTIAL: {"last": self.start, "step": self.step}, BLOCK: {"low": self.start, "high": self.end}}.get(self.kind, {})
        return {**known, "round": self.round}

    @classmethod
    def of(cls, published: Any) -> Optional[Ports]:
        """What a peer has told; None if it is nothing, or odd."""
        if not isinstance(published, dict) or not is_whole(published.get("round"), range(65536)):
            return None
        told = {name: value for name, value in published.items() if is_whole(value, range(-MOST_STEP, 65536))}
        start, step, end = told.get("last", told.get("low", 0)), told.get("step", 0), told.get("high", 0)
        if told.keys() == {"last", "step", "round"} and start in PORTS and 0 < abs(step) <= MOST_STEP:
            return cls(SEQUENTIAL, start, step, round=published["round"])
        if told.keys() == {"low", "high", "round"} and start in PORTS and end in PORTS and 0 <= end - start < MOST_BLOCK:
            return cls(BLOCK, start, end=end, round=published["round"])
        return cls(RANDOM, round=published["round"]) if published.keys() == {"round"} else None

    def likely(self, count: int) -> List[int]:
        """At most so many ports that the next mappings may have, each once, the likeliest first."""
        if self.kind == SEQUENTIAL:
            return [port for port in (self.start + self.step * number for number in range(1, count + 1)) if port in PORTS]
        among = range(self.start, self.end + 1) if self.kind == BLOCK else PORTS
        return secrets.SystemRandom().sample(among, min(count, len(among)))

    def describe(self) -> str:
        """In a few words."""
        if self.kind == SEQUENTIAL:
            return "sequential ports" if abs(self.step) == 1 else f"ports in steps of {self.step}"
        return f"random ports of a block of about {self.end - self.start + 1}" if self.kind == BLOCK else "random ports"


def is_whole(value: Any, among: range) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in among


def learn(samples: Sequence[int]) -> Optional[Ports]:
    """What the ports of mappings that were made in this order tell; None if they are too few."""
    if len(samples) < LEAST_SAMPLES:
        return None
    steps = [later - earlier for earlier, later in zip(samples, samples[1:])]
    step, count = collections.Counter(steps).most_common(1)[0]
    regular = [each for each in steps if step and each % step == 0 and 1 <= each // step <= MOST_STEPS]
    # One step may go astray: where the range is used up, it begins again.
    if 0 < abs(step) <= MOST_STEP and 2 * count >= len(steps) and len(regular) >= len(steps) - 1:
        return Ports(SEQUENTIAL, samples[-1], step)
    low, high = min(samples), max(samples)
    return Ports(BLOCK, low, end=high) if high - low < MOST_BLOCK else Ports(RANDOM)
