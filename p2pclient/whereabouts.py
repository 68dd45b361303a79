"""An endpoint's own addresses, kept up to date: STUN is asked again and again, and the interfaces are looked at."""

from __future__ import annotations

import dataclasses
import secrets
import socket
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from .addresses import Address, Sending, text_of
from .candidates import OTHERS_RESEND, StunQuery, ask_stun, candidates_from, gather_addresses, public_ipv4
from .prediction import Ports
from .sockets import find_nat64, resolve
from .stun import Message

# Seconds between two questions to the STUN servers; routers should keep a mapping for two minutes (RFC 4787 REQ-5), and many do not.
KEEPALIVE = 15.0
LEAST_KEEPALIVE = 5.0       # when a router has turned out to forget sooner
LOOK_INTERVAL = 3.0         # seconds between two looks at the interfaces
RESEND, GIVE_UP = 0.5, 1.0  # seconds after which a question is sent again, and counts with the answers that it has
ASK_AGAIN = 1.0             # seconds after which a question that nobody has answered is put again, doubling up to the keep-alive


class Whereabouts:
    """The candidates of a socket. It is told the time and what came, and returns what to send.

    The constructor asks the STUN servers, which takes 3.5 seconds if they do not answer. servers: their IP addresses; candidates: as of now; is_news:
    these have changed since somebody set this to False; report: takes a line when the public address has changed.
    """

    def __init__(self, sock: socket.socket, stun_servers: Sequence[Address], loopback: bool, keepalive: float, public: Sequence[str],
                 report: Callable[[str], None], now: Callable[[], float], probing: bool = False) -> None:
        self.nat64 = find_nat64()
        self.loopback, self.is_news, self.is_asking = loopback, False, False
        self._socket, self._public, self._report = sock, public, report
        self._forwarded = ""                               # what the router says that it forwards to the socket
        self._relay = ""                                   # where a relay stands by for it
        self._maps_by_destination: Dict[str, bool] = {}    # whether the NAT at a public IP address does, as a second socket has shown
        self._asked = bool(stun_servers)
        self.servers = self.look_up(stun_servers)
        self._own = gather_addresses(sock, loopback, self.servers)
        self._query = StunQuery([])
        self.candidates = dataclasses.replace(candidates_from(self._own, ask_stun(sock, self.servers, self.nat64), self._asked, public), probing=probing)
        self.begin_attempt()
        self._keepalive, self._pause = keepalive, ASK_AGAIN
        self._asked_at = now()
        self._own_then = self._own                          # our own addresses when STUN answered last
        self._next_look = self._asked_at + LOOK_INTERVAL
        answers = len(self.candidates.seen)
        self._next_question = self._asked_at + (keepalive if answers == len(self.servers) else ASK_AGAIN if not answers else 0.0)
        self._resend_at = float("inf")

    @property
    def due(self) -> float:
        """When tick() is to be called next."""
        question = self._asked_at + GIVE_UP if self.is_asking else self._next_question if self.servers else float("inf")
        return min(self._next_look, question, self._resend_at)

    def leave_loopback(self) -> bool:
        """Publish no loopback addresses from now on; False if there were none."""
        had, self.loopback = self.loopback, False
        self._own = gather_addresses(self._socket, False, self.servers)
        self.candidates = self.candidates.without_loopback()
        return had

    def look_up(self, servers: Sequence[Address]) -> List[Address]:
        """The IP addresses of STUN servers. Asks DNS, which may take seconds."""
        return resolve(servers, self._socket.family == socket.AF_INET6, self.nat64)

    def use_stun(self, found: List[Address], is_any: bool, now: float) -> None:
        """Ask the servers at these IP addresses from the next tick() on. is_any: there are servers, and if none is found, those of before are asked;
        if there are none, no answer of others that were only guessed means nothing."""
        self.servers = (found or self.servers) if is_any else []
        self._asked, self._next_question = is_any, now
        self.is_asking, self._resend_at = False, float("inf")
        if not is_any and self.candidates.nat == "no answer":
            self.candidates = dataclasses.replace(self.candidates, nat="not asked")

    def forward(self, address: str, is_relay: bool = False) -> bool:
        """Publish an address that the router says it forwards to the socket, or one at which a relay stands by, or with "" none any more. Whether it is
        published: a router's not while STUN sees us elsewhere, for then it is behind another router, or somebody else's."""
        if is_relay:
            self._relay = address
        else:
            self._forwarded = address
        self._update(self.candidates.seen)
        return address in self.candidates.published

    def begin_attempt(self) -> None:
        """What is published from now on is news."""
        ports = self.candidates.ports
        self.candidates = dataclasses.replace(self.candidates, attempt=secrets.token_urlsafe(6), ports=ports and ports._replace(round=0))

    def learn_ports(self, measured: Optional[Ports]) -> None:
        """Publish how the NAT allocates ports, in a new round if it was known; None: this time it could not be told."""
        before = self.candidates.ports
        ports = measured or before
        if ports:
            self.candidates = dataclasses.replace(self.candidates, ports=ports._replace(round=before.round + 1 if before else 0))
            self.is_news = True

    def learn_kind(self, maps_by_destination: bool) -> None:
        """Take what a second socket has shown of the NAT, and publish it if it is another kind than it seemed."""
        before = self.candidates
        if before.mapped:
            self._maps_by_destination[before.mapped[0]] = maps_by_destination
            self._update(before.seen)
            self.is_news = self.is_news or self.candidates.nat != before.nat

    def ask_soon(self, now: float) -> None:
        """Have STUN asked and the interfaces looked at with the next tick(), but not more than once a second."""
        if now - self._asked_at >= GIVE_UP:
            self._next_question = self._next_look = now

    def tick(self, now: float) -> List[Sending]:
        """Do what is due."""
        if now >= self._next_look:
            self._next_look = now + LOOK_INTERVAL
            self._look(now)
        if self.is_asking and now >= self._asked_at + GIVE_UP:
            self._conclude(now)
        if not self.is_asking and self.servers and now >= self._next_question:
            self._query, self.is_asking = StunQuery(self.servers), True
            self._asked_at, self._resend_at = now, now + RESEND
            return self._query.requests()
        if now >= self._resend_at:
            self._resend_at = 2 * now - self._asked_at      # twice as long after the question
            return self._query.requests()
        return []

    def awaits(self, transaction: bytes) -> bool:
        return self.is_asking and self._query.awaits(transaction)

    def receive(self, message: Message, source: Address, now: float) -> None:
        """Take the answer of a STUN server. All count together: one of them alone would make a NAT that has just forgotten us look symmetric."""
        self._query.receive(message, source)
        if self._query.complete:
            self._conclude(now)
        elif source in self._query.seen:
            self._resend_at = now + OTHERS_RESEND

    def _look(self, now: float) -> None:
        try:
            own = gather_addresses(self._socket, self.loopback, self.servers)
        except OSError:     # there are too many open files: nothing can be told now
            return
        if own != self._own:
            self._own, self._next_question = own, now
            self._update(self.candidates.seen)

    def _conclude(self, now: float) -> None:
        self.is_asking, self._resend_at = False, float("inf")
        if not self._query.seen:
            self._next_question = now + self._pause
            self._pause = min(2 * self._pause, self._keepalive)
            return
        before = self.candidates.mapped
        is_as_before = self._query.seen.items() <= self.candidates.seen.items()     # then so it is at a server whose answer is lost
        self._update(self.candidates.seen if is_as_before else self._query.seen)
        if before and self.candidates.mapped != before:
            self._report(f"the public address is now {text_of(self.candidates.mapped or before)}")
            if self._own == self._own_then:     # it is the router that has forgotten us, not we that have moved
                self._keepalive = max(min(LEAST_KEEPALIVE, self._keepalive), self._keepalive / 2)
        self._own_then = self._own
        self._pause, self._next_question = ASK_AGAIN, now + self._keepalive

    def _update(self, seen: Mapping[Address, Address]) -> None:
        before = self.candidates
        outside = [host for host, _ in public_ipv4(seen.values())]
        is_ours = self._forwarded and (not outside or self._forwarded.partition(":")[0] in outside)
        public = [*self._public, self._forwarded] if is_ours else self._public
        found = candidates_from(self._own, seen, self._asked, public)
        maps_by_destination = self._maps_by_destination.get(found.mapped[0]) if found.mapped else None
        nat = "symmetric" if found.nat == "endpoint-independent" and maps_by_destination else found.nat
        self.candidates = dataclasses.replace(found, nat=nat, attempt=before.attempt, ports=before.ports, probing=before.probing, relay=self._relay,
                                              is_certain=maps_by_destination is not None)
        self.is_news = self.is_news or (self.candidates.addresses, self._relay) != (before.addresses, before.relay)
