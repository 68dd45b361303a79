"""Further UDP sockets of an endpoint, where its router or that of a peer gives each destination another port: to measure how it allocates them, and to open
mappings towards a peer."""

from __future__ import annotations

import contextlib
import selectors
import socket
from typing import Callable, Collection, Dict, List, Mapping, Optional, Tuple

from .addresses import Address
from .candidates import PeerCandidates, StunQuery
from .checks import NO_WAY, Session
from .connection import Connection
from .pacing import UnheardLimiter
from .prediction import Ports, learn
from .probing import PROBES, Methods, PortSearch, is_hopeless
from .sockets import open_socket, send_to
from .stun import authentic, decode
from .whereabouts import Whereabouts

SAMPLES, KIND_SAMPLES = 8, 2    # mappings by which a symmetric NAT is measured, and one that seems to be endpoint-independent
RESEND, GIVE_UP = 0.3, 0.8      # seconds after which what was not answered is asked again, and counts without
LOOK_INTERVAL = 0.05    # seconds between two looks whether a measurement is over
ASK_AGAIN = 10.0        # seconds after which a NAT is measured again if that has told nothing
# Seconds without any sign of the peer after which a guest gives up where that is certain to be in vain, and of the server's pause between two polls up to
# which the host has heard of us by then.
HOPELESS_TIME, USUAL_POLL_AFTER = 2.7, 2.0

MEASURING = ""          # whose the sockets are that measure; those of a session have its sessionId


class Measurement:
    """One question each to STUN servers from some new sockets, each of which makes one new mapping, in this order."""

    def __init__(self, sockets: List[socket.socket], servers: List[Address], now: float) -> None:
        self.asked_at, self._resend_at = now, now + RESEND
        self._queries = [(sock, StunQuery([server])) for sock in sockets for server in servers]

    def requests(self) -> List[Tuple[socket.socket, bytes, Address]]:
        return [(sock, datagram, server) for sock, query in self._queries for datagram, server in query.requests()]

    def again(self, now: float) -> List[Tuple[socket.socket, bytes, Address]]:
        """What is to be sent again now."""
        if now < self._resend_at:
            return []
        self._resend_at = float("inf")
        return self.requests()

    def receive(self, datagram: bytes, source: Address) -> None:
        message = decode(datagram)
        for _, query in self._queries:
            if message and query.awaits(message.transaction):
                query.receive(message, source)

    def is_over(self, now: float) -> bool:
        return now >= self.asked_at + GIVE_UP or all(query.complete for _, query in self._queries)

    def maps_by_destination(self) -> Optional[bool]:
        """Whether a socket is seen at different addresses by two servers; None: not both have answered."""
        seen: Dict[socket.socket, List[Address]] = {}
        for sock, query in self._queries:
            seen.setdefault(sock, []).extend(query.seen.values())
        twice = [len(set(each)) > 1 for each in seen.values() if len(each) > 1]
        return any(twice) if twice else None

    def ports(self) -> Optional[Ports]:
        """How the NAT allocates ports, as far as the answers tell. One that is missing leaves a gap."""
        return learn([port for _, query in self._queries for _, port in query.seen.values()])


class Branches:
    """The searches for peers of one endpoint, and their sockets. All but the constructor needs the endpoint's lock; sockets are opened and closed by its thread
    alone.

    routes: through which socket a peer is reached, by its address, where that is not the endpoint's own.
    """

    def __init__(self, selector: selectors.BaseSelector, whereabouts: Whereabouts, unheard: UnheardLimiter, methods: Methods) -> None:
        self.routes: Dict[Address, socket.socket] = {}
        self._selector, self._whereabouts, self._unheard, self._methods = selector, whereabouts, unheard, methods
        self._probed = UnheardLimiter(PROBES)
        self._sockets: Dict[Tuple[str, int], socket.socket] = {}    # by owner and number
        self._owners: Dict[socket.socket, str] = {}
        self._searches: Dict[str, PortSearch] = {}
        self._keys: Dict[str, str] = {}
        self._patient: set[str] = set()         # sessions whose host may hear of us late
        self._measurement: Optional[Measurement] = None
        self._next_measurement = 0.0

    def learn(self, session: Session, key: str, peer: PeerCandidates, now: float) -> None:
        """Take what a peer tells of itself, when its session begins or goes on."""
        if not session.is_direct:
            self._keys[session.session_id] = key
            self._searches.setdefault(session.session_id, PortSearch(session.is_guest, self._methods, now)).learn(peer, now)

    def be_patient(self, session_id: str, poll_after: float) -> None:
        """The server has told how often it is polled."""
        if poll_after > USUAL_POLL_AFTER:
            self._patient.add(session_id)

    def receive(self, sock: socket.socket, datagram: bytes, source: Address) -> None:
        """Something has come to one of these sockets: if it is authentic, its peer is reached from there from now on."""
        owner = self._owners.get(sock)
        if owner == MEASURING and self._measurement:
            self._measurement.receive(datagram, source)
        message = decode(datagram) if owner else None
        if owner and message and authentic(message, self._keys[owner]):
            self.routes.setdefault(source, sock)

    def tick(self, connections: Mapping[str, Connection], is_saying_goodbye: bool, own_socket: socket.socket, now: float) -> float:
        """Do what is due. When it is due again."""
        own = self._whereabouts.candidates
        for name, search in list(self._searches.items()):
            session = connections[name].session if name in connections else None
            if session is None or session.is_direct or session.over:
                self._end_search(name)
            elif self._is_in_vain(session, search, now):
                session.over = NO_WAY
        wanted = [search.wants_measurement(own, now) for search in self._searches.values()]
        if any(wanted) or not own.is_measured:
            self._measure(now)
        self._go_on_measuring(now)
        dues = self._search_all(connections, own_socket, now)
        dues += [connections[name].session.began + HOPELESS_TIME for name in self._searches]
        if not is_saying_goodbye:
            self._close(lambda owner: owner != MEASURING and owner not in connections)
        return min([now + LOOK_INTERVAL if self._measurement else float("inf"), *[due for due in dues if due > now]])

    def close(self) -> None:
        """Close all sockets. Ends the use of this object."""
        self._close(lambda owner: True)

    def _is_in_vain(self, session: Session, search: PortSearch, now: float) -> bool:
        is_time = session.is_guest and now - session.began >= HOPELESS_TIME and session.session_id not in self._patient
        return is_time and not session.heard and is_hopeless(self._whereabouts.candidates, search.peer, self._methods)

    def _search_all(self, connections: Mapping[str, Connection], own_socket: socket.socket, now: float) -> List[float]:
        """Send what the searches have to send. When they are due again. Of those that probe one has its turn at a time."""
        dues, is_probing = [], False
        for name, search in self._searches.items():
            if search.is_probing and is_probing:
                continue
            is_probing = is_probing or search.is_probing
            for number, address in search.tick(self._whereabouts.candidates, now):
                self._send(connections[name].session, search, number, address, own_socket, now)
            dues.append(search.due)
        return dues

    def _send(self, session: Session, search: PortSearch, number: int, address: Address, own_socket: socket.socket, now: float) -> None:
        limiter = self._probed if search.is_probing else self._unheard
        with contextlib.suppress(OSError):      # there are too many open files
            sock = self._socket_of(session.session_id, number) if number else own_socket
            for datagram, _ in session.probe(address, now, search.is_probing):
                if limiter.allows(address[0], now):
                    send_to(sock, datagram, address, self._whereabouts.nat64)

    def _measure(self, now: float) -> None:
        """Begin to measure our NAT, unless that is under way."""
        own = self._whereabouts.candidates
        samples, servers = SAMPLES if own.nat == "symmetric" else KIND_SAMPLES, [server for server in own.seen if ":" not in server[0]][:2]
        if self._measurement or not servers or now < self._next_measurement:
            return
        sockets: List[socket.socket] = []
        with contextlib.suppress(OSError):
            sockets = [self._socket_of(MEASURING, number) for number in range(samples // len(servers))]
        self._measurement = Measurement(sockets, servers, now)
        self._send_all(self._measurement.requests())

    def _go_on_measuring(self, now: float) -> None:
        if self._measurement and self._measurement.is_over(now):
            before, maps_by_destination = self._whereabouts.candidates, self._measurement.maps_by_destination()
            if maps_by_destination is not None:
                self._whereabouts.learn_kind(maps_by_destination)
            if maps_by_destination is not False:
                self._whereabouts.learn_ports(self._measurement.ports())
            self._measurement, self._next_measurement = None, now + (ASK_AGAIN if self._whereabouts.candidates == before else 0.0)
            self._close(lambda owner: owner == MEASURING)
        elif self._measurement:
            self._send_all(self._measurement.again(now))

    def _send_all(self, requests: List[Tuple[socket.socket, bytes, Address]]) -> None:
        for sock, datagram, server in requests:
            send_to(sock, datagram, server, self._whereabouts.nat64)

    def _socket_of(self, owner: str, number: int) -> socket.socket:
        """A socket by its number; a new one when it is asked for first. OSError."""
        if (owner, number) not in self._sockets:
            sock = self._sockets[owner, number] = open_socket()
            sock.setblocking(False)
            self._owners[sock] = owner
            self._selector.register(sock, selectors.EVENT_READ)
        return self._sockets[owner, number]

    def _end_search(self, name: str) -> None:
        """Keep only the sockets by which the peer is reached."""
        del self._searches[name]
        self._patient.discard(name)
        used = set(self.routes.values())
        self._close(lambda owner: owner == name, used)

    def _close(self, is_unused: Callable[[str], bool], but: Collection[socket.socket] = ()) -> None:
        """Close the sockets of some owners."""
        for key, sock in [each for each in self._sockets.items() if is_unused(each[0][0]) and each[1] not in but]:
            del self._sockets[key], self._owners[sock]
            self._selector.unregister(sock)
            sock.close()
        self.routes = {address: sock for address, sock in self.routes.items() if sock in self._owners}
        self._keys = {name: key for name, key in self._keys.items() if name in self._searches or name in self._owners.values()}
