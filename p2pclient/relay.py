"""A relay for the guests who cannot be reached directly: a TURN allocation kept for as long as a game is on offer."""

from __future__ import annotations

import socket
import threading
import time
from typing import Callable, Iterable, Optional, Protocol, Set, Tuple

from .addresses import Address, Relayed, parse_candidate, text_of
from .background import Background
from .candidates import Candidates, read_published
from .deadline import Deadline
from .sockets import Nat64, find_nat64, open_socket, plain_source, resolve, send_to
from .turn import Allocation, TurnServer, send_indication

LOOK_INTERVAL = 0.25        # seconds between two looks at which guests there are, and whether we are to end
LEAST_PAUSE, MOST_PAUSE = 5.0, 300.0    # seconds until a server that has given nothing is asked again, doubling
TRIAL_TIME = 5.0            # seconds that the doctor gives a server


class Peers(Protocol):
    """What a relay needs of an Endpoint."""

    @property
    def candidates(self) -> Candidates: ...

    def guest_hosts(self) -> Set[str]:
        """The IP addresses from which guests may come."""

    def forward(self, address: str, is_relay: bool) -> bool:
        """Publish the relayed address, or with "" none any more."""

    def take_relayed(self, datagram: bytes, source: Relayed) -> None:
        """Take a datagram from a guest."""


class Relay(Background):
    """A thread that keeps a relayed address, if the server gives any. It never holds up anybody else, whatever that server does.

    server: gives the TURN server to ask, or None, and may block; it is told whether its earlier credentials were refused. loopback: whether the TURN
    server may be on this very machine; report: takes a line.
    """

    def __init__(self, peers: Peers, server: Callable[[bool], Optional[TurnServer]], loopback: bool, report: Callable[[str], None]) -> None:
        super().__init__("relay")
        self._peers, self._server, self._loopback, self._report = peers, server, loopback, report
        self._way: Optional[Tuple[socket.socket, Address, Optional[Nat64]]] = None      # to the server, while there is an allocation
        self._is_refused = False
        self._said = ""
        self._thread.start()

    def send(self, datagram: bytes, peer: Address) -> None:
        """Send by way of the relay, if there is one. From any thread; does not block."""
        way = self._way
        if way:
            send_to(way[0], send_indication(datagram, peer), way[1], way[2])

    def _run(self) -> None:
        pause = LEAST_PAUSE
        while not self._ended.is_set():
            self._woken.clear()
            pause = LEAST_PAUSE if self._try() else min(2 * pause, MOST_PAUSE)
            self._rest(pause, LEAST_PAUSE)

    def _try(self) -> bool:
        """Ask the server for a relay, and keep it while that works. Whether there was one."""
        try:
            server, nat64 = self._server(self._is_refused), find_nat64()
            return server is not None and any(self._keep(server, address, nat64) for address in self._usable(server, nat64))
        except Exception as error:      # the rendezvous server, of which it is asked, may be away, or there are too many open files
            self._say(f"no relay: {error}")
            return False

    def _usable(self, server: TurnServer, nat64: Optional[Nat64]) -> Iterable[Address]:
        """The server's addresses, by the same rules as for a peer's: none in a private network that this machine is not in."""
        found = resolve([server.address], nat64=nat64)
        usable = [address for address in found if read_published([text_of(address)], self._peers.candidates, self._loopback).addresses]
        if not usable:
            self._say(f"no relay: the TURN server {text_of(server.address)} has no address that may be used from here")
        return usable

    def _keep(self, server: TurnServer, address: Address, nat64: Optional[Nat64]) -> bool:
        """Take an allocation, and keep it until it is over. Whether there was one."""
        allocation = Allocation(*server.credentials, time.monotonic())
        with open_socket() as sock:
            try:
                self._serve(allocation, sock, address, nat64)
            finally:
                self._way = None
                if allocation.address:
                    self._peers.forward("", True)
        self._is_refused = allocation.is_refused
        if not self._ended.is_set():
            self._say(f"no relay: {allocation.over} ({text_of(address)})")
        return allocation.address is not None

    def _serve(self, allocation: Allocation, sock: socket.socket, address: Address, nat64: Optional[Nat64]) -> None:
        next_look = 0.0
        while not allocation.over:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + LOOK_INTERVAL
                self._look(allocation, now)
            for datagram in allocation.tick(now):
                send_to(sock, datagram, address, nat64)
            self._read(allocation, sock, min(next_look, allocation.due) - now, address, nat64)
            if allocation.address and not self._way:
                self._way = sock, address, nat64
                self._peers.forward(text_of(allocation.address), True)
                self._say(f"a relay stands by at {text_of(allocation.address)}")

    def _look(self, allocation: Allocation, now: float) -> None:
        allocation.permit(self._peers.guest_hosts(), now)
        if self._ended.is_set():
            allocation.release(now)
        elif self._woken.is_set():
            self._woken.clear()
            allocation.refresh_soon(now)

    def _read(self, allocation: Allocation, sock: socket.socket, seconds: float, server: Address, nat64: Optional[Nat64]) -> None:
        """Take the next datagram of the server's, if one comes in time."""
        sock.settimeout(max(0.001, seconds))
        try:
            datagram, source = sock.recvfrom(2048)
        except OSError:     # none came; some systems also report here that an earlier datagram was refused
            return
        content = allocation.receive(datagram, time.monotonic()) if plain_source(source, nat64) == server else None
        if content:
            self._peers.take_relayed(*content)

    def _say(self, line: str) -> None:
        """Report what is news."""
        if line != self._said:
            self._said = line
            self._report(line)


class Trial:
    """What is no Endpoint, but takes what is sent to a relay from this machine. address: of the relay, or None; came: it has worked."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.address: Optional[Address] = None
        self.came = threading.Event()
        self.line = ""

    def guest_hosts(self) -> Set[str]:
        return {address[0] for address in map(parse_candidate, self.candidates.addresses) if address}

    def forward(self, address: str, is_relay: bool) -> bool:
        self.address = parse_candidate(address)
        return self.address is not None

    def take_relayed(self, datagram: bytes, source: Relayed) -> None:
        self.came.set()

    def report(self, line: str) -> None:
        self.line = line


def try_relay(server: TurnServer, candidates: Candidates, loopback: bool, send: Callable[[bytes, Address], None]) -> Tuple[bool, str]:
    """For the doctor: whether a relay carries what send() sends to it from one of these candidates, and what was seen, in words."""
    trial, deadline = Trial(candidates), Deadline(TRIAL_TIME)
    relay = Relay(trial, lambda is_refused: server, loopback, trial.report)
    while deadline.left() and not trial.came.wait(0.1) and (trial.address or not trial.line):
        if trial.address:
            send(b"hello", trial.address)
    works, line = trial.came.is_set(), trial.line or "the TURN server is silent"
    line += " and works" if works else "; nothing came through it" if trial.address else ""
    relay.end()
    relay.join()
    return works, line
