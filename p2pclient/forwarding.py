"""A port of one's own router that leads to a socket: asked for, renewed at half its life, and given back at the end."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, List, Optional, Union

from .background import Background
from .portmap import LIFETIME, Mapping, NatPmp, Pcp, Place, find_place
from .upnp import Upnp

LEAST_PAUSE = 15.0          # seconds between two times that the router is asked
ASK_AGAIN = 600.0           # seconds after which a router that has given nothing is asked again

Way = Union[Pcp, NatPmp, Upnp]


def ways(place: Place, port: int) -> List[Way]:
    """How a router may be asked, the quickest first."""
    return [Pcp(place, port), NatPmp(place, port), Upnp(place, port)]


class Forwarding(Background):
    """A thread that keeps a public port of the router for a UDP port of ours, if the router gives any. It takes no more than seconds for each time
    that the router is asked, whatever that answers, and never holds up anybody else.

    publish: takes the public address, "ip:port", or "" when there is none any more, and tells whether it is of use; report: takes a line.
    """

    def __init__(self, port: int, publish: Callable[[str], bool], report: Callable[[str], None]) -> None:
        super().__init__("forwarding")
        self._port, self._publish, self._report = port, publish, report
        self._place: Optional[Place] = None
        self._way: Optional[Way] = None         # by which the router has granted the mapping
        self._mapping: Optional[Mapping] = None
        self._expires = 0.0
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._woken.clear()
            self._rest(self._keep(), LEAST_PAUSE)
        if self._way and self._mapping:
            give_back(self._way, self._mapping)

    def _keep(self) -> float:
        """Ask for the mapping, or for more time for it. Seconds until the next time."""
        place = find_place()
        if place != self._place:
            self._place, self._way = place, None
            self._use(None)
        mapping = self._ask(place) if place else None
        if mapping:
            lifetime = min(mapping.lifetime, LIFETIME)
            self._expires = time.monotonic() + lifetime
            self._use(mapping)
            return max(LEAST_PAUSE, lifetime / 2)
        left = self._expires - time.monotonic()
        if self._mapping and left > 0:
            return max(LEAST_PAUSE, left / 2)
        self._way = None
        self._use(None)
        return ASK_AGAIN

    def _ask(self, place: Place) -> Optional[Mapping]:
        """Ask by each way, the one that worked before all others."""
        outside = self._mapping.port if self._mapping else self._port
        for way in [*([self._way] if self._way else []), *ways(place, self._port)]:
            mapping = None if self._ended.is_set() else ask(way, outside)
            if mapping:
                self._way = way
                return mapping
        return None

    def _use(self, mapping: Optional[Mapping]) -> None:
        """Publish a mapping, or that there is none."""
        before, self._mapping = self._mapping, mapping
        if mapping and self._way and (before is None or mapping.text != before.text):
            is_of_use = self._publish(mapping.text)
            self._report(f"the router forwards {mapping.text} to this game ({self._way.name})" if is_of_use else
                         f"the router says that it forwards {mapping.text} ({self._way.name}), but STUN sees another address: this is not published")
        elif before and not mapping:
            self._publish("")


def ask(way: Way, outside: int) -> Optional[Mapping]:
    """A mapping that others can reach. One that they cannot is given back at once."""
    try:
        mapping = way.ask(outside)
    except OSError:
        return None
    if mapping and not mapping.is_public:
        give_back(way, mapping)
        return None
    return mapping


def give_back(way: Way, mapping: Mapping) -> None:
    """As far as the router listens: it forgets the mapping by itself after its lifetime."""
    with contextlib.suppress(OSError):
        way.give_back(mapping.port)


def try_forwarding(port: int) -> Optional[str]:
    """For the doctor: ask for a port and give it back. What came, in words; None: this network offers none."""
    place = find_place()
    for way in ways(place, port) if place else []:
        mapping = ask(way, port)
        if mapping:
            give_back(way, mapping)
            return f"the router forwards {mapping.text} by {way.name}"
    return None
