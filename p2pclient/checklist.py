"""A session's addresses of the peer, and which of them is to be checked next; without socket or clock."""

from __future__ import annotations

import collections
from typing import Deque, Iterable, List, NamedTuple, Optional

from .addresses import Address, Relayed
from .pacing import DEFAULT_PACING, LEAST_PACING, Pace, UnheardBudget

MAX_CHECKED = 16            # addresses of a peer
MAX_URGENT = 8              # addresses of a session that are checked at once when they are first heard
MAX_CHECKS = 100            # a session, so that nobody can have us flood a third party (RFC 8445 section 19.5.1)
RENEWAL_CHECKS = 40         # that a session has again when the peer was heard or has told new addresses
RENEWAL_TIME = 5.0          # seconds of quick checks after that
RELAY_DELAY = 1.0           # seconds that the direct ways have before a relay is checked,
RELAYED_TIME = 2.0          # and seconds in which they are still checked quickly once it is in use
RELAYED_INTERVAL = 5.0      # seconds between two of these checks from then on


class Check(NamedTuple):
    """A check that is under way. controlling: the role that it claimed."""
    address: Address
    sent_at: float
    nominates: bool
    controlling: bool


class Checklist:
    """remotes: the peer's addresses, likeliest first, at most MAX_CHECKED; heard: an authentic message came from there, so the game's datagrams
    may too; proven: our check to there was answered; relay: the remote that is the peer's relay; sent: checks so far, but for those of consent."""

    def __init__(self, pace: Pace, is_host: bool, now: float) -> None:
        self.remotes: List[Address] = []
        self.heard: set[Address] = set()
        self.proven: set[Address] = set()
        self.relay: Optional[Address] = None
        self.sent = 0
        self.pace, self.pacing = pace, DEFAULT_PACING
        self.budget = UnheardBudget(is_host)
        self.urgent: Deque[Address] = collections.deque()       # to be checked as soon as the pacing allows
        self.triggered: Deque[Address] = collections.deque()    # to be checked before the others
        self.last_check = self._last_turn = now - DEFAULT_PACING        # of any, and of one that is not for consent
        self.fast_until = now
        self._relay_at, self._has_tried_relay = now + RELAY_DELAY, False
        self._turn = 0                                          # counts the checks that were in no queue

    def add(self, addresses: Iterable[Address], now: float, pacing: float, seen_at: str, selected: Optional[Address]) -> None:
        """Learn addresses, as Session.add() says."""
        self.pacing = max(LEAST_PACING, pacing)
        self.budget.trusted.add(seen_at)
        is_renewal = self.sent > 0
        for address in list(addresses)[:MAX_CHECKED]:
            is_new = address not in self.remotes and (is_renewal or len(self.remotes) < MAX_CHECKED)
            if is_new and self.make_room(address, selected) and is_renewal:     # he has moved, so this one is likelier than the silent ones
                self.triggered.extend([address, address])
        if is_renewal:
            self.allow_more(now)

    def make_room(self, source: Address, selected: Optional[Address]) -> bool:
        """Have an address among the remotes: one that nobody listed is peer-reflexive (RFC 8445 section 7.3.1.3), and worth more than one that
        never answered."""
        if source in self.remotes:
            return True
        if len(self.remotes) >= MAX_CHECKED:
            silent = [remote for remote in self.remotes if remote not in self.heard | self.proven]
            if not silent and selected is None:
                return False
            evicted = silent[-1] if silent else next(remote for remote in self.remotes if remote != selected)
            self.remotes.remove(evicted)
            self.heard.discard(evicted)
            self.proven.discard(evicted)
        self.remotes.append(source)
        return True

    def hear(self, source: Address) -> bool:
        """Note that an authentic message came from an address; whether it is the first from there."""
        is_new = source not in self.heard
        self.heard.add(source)
        return is_new

    def is_relayed(self, address: Optional[Address]) -> bool:
        """Whether an address is reached by a relay, the peer's or ours."""
        return isinstance(address, Relayed) or address is not None and address == self.relay

    def next_while_relayed(self, now: float, connected_at: float) -> float:
        """When the direct ways are to be checked next while a relay is in use."""
        return self._last_turn + (DEFAULT_PACING if now - connected_at <= RELAYED_TIME else RELAYED_INTERVAL)

    def trigger(self, source: Address, is_newly_heard: bool) -> None:
        """Have an address checked before the others because the peer has checked us from there (RFC 8445 section 7.3.1.4)."""
        if source not in self.proven and source not in self.triggered and source not in self.urgent:
            (self.urgent if is_newly_heard and len(self.heard) <= MAX_URGENT else self.triggered).append(source)

    def next(self, now: float, nominee: Optional[Address], selected: Optional[Address]) -> Optional[Address]:
        """Which address to check now; None: none of them may be, and the turn is lost. nominee: still to be told that it is the one.
        While one by a relay is selected, it is the turn of the direct ones."""
        self.last_check = self._last_turn = now
        if self.relay and self.relay in self.remotes and now >= self._relay_at and not self._has_tried_relay:
            self._has_tried_relay = True
            self.triggered.append(self.relay)
        for queue in (self.urgent, self.triggered):
            while queue:
                address = queue.popleft()
                if self._may_check(address, now):
                    return address
        if nominee:
            return nominee
        for _ in range(len(self.remotes) + 1):
            address = self._in_turn(self._turn)
            self._turn += 1
            if self._may_check(address, now) and not (self.is_relayed(selected) and self.is_relayed(address)):
                return address
        return None

    def count(self, address: Address, now: float, cost: int) -> None:
        """A check goes to an address."""
        if not self._is_heard(address[0]):
            self.budget.count(address[0], now)
        self.last_check = self.pace.last = now
        self.sent += cost

    def may_probe(self, host: str, now: float, is_probing: bool) -> bool:
        """Whether a guess may go to an IP address; it counts if so. is_probing: there are many, so only to one from which the server has seen the peer call."""
        if is_probing:
            return host in self.budget.trusted
        allowed = self._is_heard(host) or self.budget.allows(host, now)
        if allowed:
            self.budget.count(host, now)
        return allowed

    @property
    def soonest(self) -> float:
        """When the pacing of socket and session allows the next check."""
        return max(self.pace.next, self.last_check + self.pacing)

    def allow_more(self, now: float) -> None:
        """The peer is there, or elsewhere: what was spent on silence is given back in part."""
        self.sent = min(self.sent, MAX_CHECKS - RENEWAL_CHECKS)
        self.fast_until = now + RENEWAL_TIME

    def _in_turn(self, turn: int) -> Address:
        """First the likeliest; second the likeliest of the other family, or the first again, as its router may be open now; then all in turn."""
        first = self.remotes[0]
        if turn == 1:
            return next((remote for remote in self.remotes if (":" in remote[0]) != (":" in first[0])), first)
        return self.remotes[max(0, turn - 1) % len(self.remotes)]

    def _may_check(self, address: Address, now: float) -> bool:
        if address == self.relay and now < self._relay_at:
            return False
        return self._is_heard(address[0]) or self.budget.allows(address[0], now)

    def _is_heard(self, host: str) -> bool:
        return any(heard == host for heard, _ in self.heard)
