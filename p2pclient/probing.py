"""The search for a peer where a router gives each destination another port, without socket or clock.

The side with such a router (symmetric NAT) opens mappings towards the address of the other one, and says so in what it publishes; the other one then sends
checks to the ports of that router that are likely. One that hits is let in, and the answer opens all the rest. Where both have such routers and both
allocate in sequence, each opens mappings towards one port that the other's router is about to give, and the two that fit each other meet.

By default a side sends MOST_PREDICTED datagrams. More, for a router that chooses ports at random, is probing: both must ask for it,
and it goes only to an IP address from which the server has seen the peer call.

A router that chooses in a block is crossed with another such, or with one in sequence, by using the block up: it has mappings towards one port of the
other router from all of its own ports, so whichever of them the other side guesses is open. That side sends to guesses from each of the next
ports of its sequence, or uses its own block up likewise.
"""

from __future__ import annotations

import collections
from typing import Deque, List, NamedTuple, Optional, Sequence, Tuple

from .addresses import Address, parse_candidate
from .candidates import Candidates, PeerCandidates, public_ipv4
from .prediction import BLOCK, RANDOM, SEQUENTIAL, Ports

DELAY = 0.4             # seconds that ordinary checks have first: one and a half round trips of distant players
UNKNOWN_DELAY = 2.0     # seconds that a kind of NAT has to become known before it is probed, which may use its ports up: a guest tells news once a second
INTERVAL = 0.01         # seconds between two datagrams of one side
LOOK_INTERVAL = 0.1     # seconds between two looks whether it can begin
MOST_PREDICTED = 24     # datagrams of one side, without probing
CROSSING = 12           # mappings of a router in sequence where both have such routers, each opened twice
PROBING_SOCKETS = 256   # mappings of one side in probing,
BLOCK_SOCKETS = 64      # in a block fewer where that will do: it may be all that a household has
PROBES = 1024           # datagrams of one side in probing
EASY = ("endpoint-independent", "none", "unknown")      # kinds of NAT that are not known to map by destination

TOLD_BY_STUN = ("endpoint-independent", "none", "symmetric")     # kinds that show that STUN answers, and not only within a private network

Step = Tuple[int, Address]      # a datagram: the number of the socket that it goes from, 0 for the endpoint's own, and where it goes


class Way(NamedTuple):
    """What one side does. sockets: mappings that it opens; aims: ports of the peer's router that it tries; rounds: datagrams of each; is_probing: it
    is more than is done without being asked for."""

    sockets: int = 0
    rounds: int = 1
    aims: int = 0
    is_probing: bool = False


OPENING = {SEQUENTIAL: Way(4, 3), BLOCK: Way(MOST_PREDICTED)}
AIMING = {SEQUENTIAL: Way(aims=MOST_PREDICTED), BLOCK: Way(aims=MOST_PREDICTED)}
PROBING_OPENING = {BLOCK: Way(BLOCK_SOCKETS, is_probing=True), RANDOM: Way(PROBING_SOCKETS, is_probing=True)}
PROBING_AIMING = {BLOCK: Way(aims=PROBES, is_probing=True), RANDOM: Way(aims=PROBES, is_probing=True)}
USING_UP = Way(PROBING_SOCKETS, 2, is_probing=True)     # a block
CROSSINGS = {(SEQUENTIAL, SEQUENTIAL): Way(CROSSING, 2), (SEQUENTIAL, BLOCK): Way(0, 2, MOST_PREDICTED, is_probing=True),
             (BLOCK, SEQUENTIAL): USING_UP, (BLOCK, BLOCK): USING_UP}      # by what this side's router does, and the peer's


class Methods(NamedTuple):
    """What a player has allowed."""

    prediction: bool = True
    probing: bool = False


def way_of(own: Candidates, peer: PeerCandidates, methods: Methods) -> Optional[Way]:
    """What this side can do to find the peer, or be found; None: nothing is needed, is known yet, or helps."""
    mine, theirs = hard_ports(own), hard_ports(peer)
    is_probing = methods.probing and peer.probing
    if mine and theirs:
        way = CROSSINGS.get((mine.kind, theirs.kind))
        return way if way and (is_probing if way.is_probing else methods.prediction) else None
    ports = mine if peer.nat in EASY else theirs if own.nat in EASY else None
    if ports is None:
        return None
    way = (PROBING_OPENING if mine else PROBING_AIMING).get(ports.kind) if is_probing else None
    return way or ((OPENING if mine else AIMING).get(ports.kind) if methods.prediction else None)


def begins_measured(way: Way, ports: Optional[Ports]) -> bool:
    """Whether the side with a symmetric router is measured anew first: where it helps to know its next ports, or its having opened mappings."""
    return not way.is_probing or ports is not None and ports.kind == SEQUENTIAL


def hard_ports(side: Candidates | PeerCandidates) -> Optional[Ports]:
    return side.ports if side.nat == "symmetric" else None


def steps_of(way: Way, own: Candidates, peer: PeerCandidates) -> List[Step]:
    """All datagrams of one side, in their order."""
    public = [address for address in public_ipv4(peer.addresses) if address != peer.relay]
    theirs = hard_ports(peer)
    if not public:
        return []
    if way.aims and theirs:
        return [(0, (public[0][0], port)) for port in theirs.likely(way.aims)] * way.rounds
    target = public[-1]
    if theirs:      # of a router in sequence its last mapping, so that others may have taken some ports in between; of a block any
        target = (public[0][0], (theirs.likely(CROSSING) or [target[1]])[-1])
    return [(number, target) for _ in range(way.rounds) for number in range(1, way.sockets + 1)]


def is_hopeless(own: Candidates, peer: PeerCandidates, methods: Methods) -> bool:
    """Whether it is certain that no check can get through: there is no relay, no network that both sides are in, and UDP is blocked at one of them, or
    neither router can be crossed."""
    public = public_ipv4(peer.addresses)
    has_ipv6 = any(address.startswith("[") for address in own.addresses)
    others = [address for address in peer.addresses if address not in public and (has_ipv6 or ":" not in address[0])]
    if own.relay or peer.relay or others:
        return False
    return is_blocked(own, peer) or bool(public) and is_closed(own, peer, public, methods)


def is_blocked(own: Candidates, peer: PeerCandidates) -> bool:
    """Whether UDP is blocked at one side, so that STUN does not answer it and it has no public IPv4 address. The silence alone proves nothing, as
    the server's port may be closed; but then STUN answers the other side neither, and it matters only where that has such an address."""
    mine, theirs = ((side.nat, public_ipv4(found)) for side, found in ((own, map(parse_candidate, own.addresses)), (peer, peer.addresses)))
    return any(nat == "no answer" and not public and (other in TOLD_BY_STUN or not other_public)
               for (nat, public), (other, other_public) in ((mine, theirs), (theirs, mine)))


def is_closed(own: Candidates, peer: PeerCandidates, public: Sequence[Address], methods: Methods) -> bool:
    """Whether the routers cannot be crossed: both kinds are known, at least one maps by destination, each side is to be reached at its router's public
    IPv4 address alone, and there is no way to find the port."""
    kinds = {own.nat, peer.nat}
    if "symmetric" not in kinds or not kinds <= {"symmetric", "endpoint-independent"} or way_of(own, peer, methods):
        return False
    is_measured = all(side.nat != "symmetric" or side.ports for side in (own, peer))      # who has another address tells no ports
    is_neighbour = own.mapped is not None and any(host == own.mapped[0] for host, _ in public)
    return own.is_closed and is_measured and not is_neighbour and (peer.nat == "symmetric" or len(public) == 1)


class PortSearch:
    """One side's search for one peer. It is told the time and what is known, and returns what to send.

    A side whose router is symmetric measures it anew first, opens its mappings, and publishes that as a new round; the other one begins when it hears of
    that round. In probing only one that goes in sequence is waited for. A host's rounds are for all its guests, so one that was there when the
    session began means nothing.
    """

    def __init__(self, is_guest: bool, methods: Methods, now: float) -> None:
        self.peer = PeerCandidates([])
        self.way: Optional[Way] = None          # once it has begun
        self._is_guest, self._methods = is_guest, methods
        self._began, self._begin_at, self._next = now, now + DELAY, now + DELAY
        self._baseline: Optional[int] = None    # the round of the peer's that means nothing
        self._measured: Optional[int] = None    # the round of our own that was the latest when this search had us measured
        self._steps: Deque[Step] = collections.deque()

    @property
    def due(self) -> float:
        """When tick() is to be called next, unless something is learnt before."""
        return self._next if self._steps or self.way is None else float("inf")

    @property
    def is_probing(self) -> bool:
        """Whether what it sends is more than is done without being asked for."""
        return self.way is not None and self.way.is_probing and bool(self._steps)

    def learn(self, peer: PeerCandidates, now: float) -> None:
        """Take what the peer tells of itself now."""
        self.peer = peer
        if self._baseline is None:
            self._baseline = peer.ports.round if peer.ports and self._is_guest else 0
        if self._peer_has_opened():
            self._begin_at = min(self._begin_at, now)

    def wants_measurement(self, own: Candidates, now: float) -> bool:
        """Whether our own NAT is to be measured now; told once."""
        if self.way or self._measured is not None or self._is_early(own, now) or own.ports is None or own.nat != "symmetric":
            return False
        way = way_of(own, self.peer, self._methods)
        if way is None or not begins_measured(way, own.ports):
            return False
        self._measured = own.ports.round
        return True

    def tick(self, own: Candidates, now: float) -> List[Step]:
        """Do what is due."""
        if self.way is None:
            self._next = max(self._begin_at, now + LOOK_INTERVAL)
            way = way_of(own, self.peer, self._methods)
            if way is None or self._is_early(own, now) or not self._is_ready(way, own):
                return []
            self.way = way
            self._steps.extend(steps_of(self.way, own, self.peer))
            self._next = now
        if now < self._next or not self._steps:
            return []
        self._next = max(self._next + INTERVAL, now + INTERVAL / 2)     # so that a thread that is late now and then keeps the rate
        return [self._steps.popleft()]

    def _is_early(self, own: Candidates, now: float) -> bool:
        """Whether something else has its time first: the ordinary checks, or where both probe the question of a kind of NAT."""
        is_probing = self._methods.probing and self.peer.probing
        return now < self._begin_at or is_probing and "unknown" in (own.nat, self.peer.nat) and now < self._began + UNKNOWN_DELAY

    def _is_ready(self, way: Way, own: Candidates) -> bool:
        """Whether all has happened that goes before."""
        is_measured = self._measured is not None and own.ports is not None and own.ports.round > self._measured
        if own.nat == "symmetric" and begins_measured(way, own.ports) and not is_measured:
            return False
        return self.peer.nat != "symmetric" or not begins_measured(way, self.peer.ports) or self._peer_has_opened()

    def _peer_has_opened(self) -> bool:
        return self.peer.ports is not None and self._baseline is not None and self.peer.ports.round > self._baseline
