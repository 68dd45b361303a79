"""One UDP socket, its thread, and all connections over it."""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
import threading
import time
from typing import Any, Callable, Deque, Dict, Iterable, Optional, Sequence, Set

from .addresses import Address, Relayed, Sending, parse_candidate
from .attempts import Attempts
from .branches import Branches
from .candidates import Candidates, read_published
from .checks import BEGUN_ANEW, CONSENT_INTERVAL, Session
from .connection import MAX_DATAGRAM, Connection, PeerLost
from .diagnosis import why_not
from .early import EarlyChecks
from .farewells import Farewells
from .pacing import Pace, UnheardLimiter, trim
from .probing import Methods
from .rendezvous import Guest, Start
from .sockets import open_socket, plain_source, send_to
from .stun import ERROR, SUCCESS, USERNAME, Message, decode
from .texts import harmless, log
from .whereabouts import KEEPALIVE, Whereabouts

MAX_SESSIONS = 64           # with guests at once, whatever the server says
LAST_FAREWELLS = 0.04       # seconds in which all good-byes are repeated when the endpoint is closed
CALL_INTERVAL = 3.0         # seconds between two calls of moved() while a peer is silent
LONGEST_PAUSE = 0.5         # seconds after which the thread looks who is silent
SUSPENSION = 1.0            # seconds more than that in which the thread did not run


class Endpoint:
    """One UDP socket with all its sessions. A host has one for all its guests; a guest has one for the game it joins, and may have it long before.

    stun_servers: (host, port) each; loopback: whether peers may be on this very machine; sock: a bound UDP socket of one's own, which is then read
    by this alone; keepalive, consent_interval: seconds; report: takes a line for each thing that happens, and is not to block; public_address:
    "ip:port" that is forwarded to the socket by a router; moved: called in the endpoint's thread, and not to block, when the candidates have changed,
    and every few seconds while a peer is silent: then tell the server our candidates, and expect() or renew() what it tells of the peer's. It may
    be set later. What moved and report raise is logged. prediction, probing: how a peer behind a symmetric NAT is searched for (probing.py).
    The constructor asks the STUN servers, which takes 3.5 seconds if they do not answer. ValueError: public_address is none.
    """

    def __init__(self, stun_servers: Sequence[Address] = (), loopback: bool = False, sock: Optional[socket.socket] = None,
                 keepalive: float = KEEPALIVE, consent_interval: float = CONSENT_INTERVAL, report: Callable[[str], None] = log.info,
                 moved: Callable[[], None] = lambda: None, public_address: str = "", prediction: bool = True, probing: bool = False) -> None:
        if public_address and parse_candidate(public_address) is None:
            raise ValueError(f"{public_address!r} is not an address such as 203.0.113.7:5000")
        self.moved, self._stun_servers, report = moved, list(stun_servers), harmless(report)
        self.socket = sock or open_socket()
        self.socket.setblocking(False)
        self._whereabouts = Whereabouts(self.socket, stun_servers, loopback, keepalive, [public_address] if public_address else [], report, time.monotonic,
                                        probing)
        self._report, self._consent_interval = report, consent_interval
        self.send_relayed: Callable[[bytes, Address], None] = lambda datagram, peer: None       # by a relay, if there is one
        # The lock guards all below, and all sessions. Private methods need it.
        self._lock = threading.RLock()
        self._accepted = threading.Condition(self._lock)        # a guest has connected, or the endpoint is closed
        self._connections: Dict[str, Connection] = {}           # by sessionId, whether connected yet or not
        self._ended: collections.OrderedDict[str, Session] = collections.OrderedDict()  # sessions that are over
        self._backlog: Deque[Connection] = collections.deque()  # guests that accept() has not returned yet
        self._attempts, self._early, self._farewells, self._unheard, self._pace = Attempts(), EarlyChecks(), Farewells(), UnheardLimiter(), Pace()
        self._next_call, self._must_call = 0.0, False           # of moved(), for who is silent
        self._expected, self._closed = time.monotonic(), False  # when the thread is to run again at the latest; it is not to run any more
        self._waker, self._wakened = socket.socketpair()        # a byte through these ends the thread's waiting
        self._selector = selectors.DefaultSelector()
        for each in (self.socket, self._wakened):
            self._selector.register(each, selectors.EVENT_READ)
        self._branches = Branches(self._selector, self._whereabouts, self._unheard, Methods(prediction, probing))
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def candidates(self) -> Candidates:
        """The present ones."""
        return self._whereabouts.candidates

    def expect(self, guest: Guest) -> None:
        """Begin to connect with a guest that a poll told of, or learn its new addresses; accept() returns it when that has worked."""
        with self._lock:
            session_id = self._attempts.session_of(guest, self._connections)
            if session_id in self._connections or len(self._connections) < MAX_SESSIONS:
                self._begin(session_id, guest.session_key, guest.addresses, is_guest=False, seen_at=guest.seen_at)

    def renew(self, start: Start) -> None:
        """Learn the host's present addresses, in a session that goes on."""
        with self._lock:
            if start.session_id in self._connections:
                self._begin(start.session_id, start.session_key, start.addresses, is_guest=True, seen_at=start.seen_at)

    def use_stun(self, servers: Sequence[Address], instead_of: Sequence[Address], is_back: bool = False) -> None:
        """Ask these STUN servers, if it was those until now. May take seconds: it looks up new names, lost ones, and all if the server is_back."""
        wanted = list(servers) if self._stun_servers == list(instead_of) else self._stun_servers
        if is_back or wanted != self._stun_servers or not self._whereabouts.servers:
            self._stun_servers, found = wanted, self._whereabouts.look_up(wanted)
            with self._lock:
                self._whereabouts.use_stun(found, bool(wanted), time.monotonic())
            self._wake()

    def forward(self, address: str, is_relay: bool = False) -> bool:
        """Publish an address that the router says it forwards to the socket, or a relay's, or with "" none any more. Whether it is published."""
        with self._lock:
            is_published = self._whereabouts.forward(address, is_relay)
        self._wake()
        return is_published

    def guest_hosts(self) -> Set[str]:
        """The IP addresses from which guests may come."""
        with self._lock:
            return {host for connection in self._connections.values() for host in connection.session.hosts}

    def take_relayed(self, datagram: bytes, source: Relayed) -> None:
        """Take what has come by way of the relay."""
        with self._lock:
            self._take(datagram, source)
        self._wake()

    def leave_loopback(self) -> bool:
        """Publish no loopback addresses from now on; False if there were none."""
        with self._lock:
            return self._whereabouts.leave_loopback()

    def accept(self, timeout: Optional[float] = None) -> Connection:
        """The next guest that has connected. TimeoutError; PeerLost: the endpoint is closed."""
        with self._accepted:
            self._accepted.wait_for(lambda: self._backlog or self._closed, timeout)
            if self._backlog:
                return self._backlog.popleft()
            if self._closed:
                raise PeerLost("the endpoint is closed")
            raise TimeoutError(f"no guest connected for {timeout} seconds")

    def connect(self, start: Start) -> Connection:
        """Connect with the host that a start told of, within 15 seconds. ConnectFailed says why not."""
        connection = self._begin(start.session_id, start.session_key, start.addresses, is_guest=True, seen_at=start.seen_at)
        with self._lock:
            self._branches.be_patient(start.session_id, start.poll_after)
            if connection.wait_for_selection():
                return connection
            raise why_not(connection.session, self.candidates, start.addresses)

    def end(self, connection: Connection) -> None:
        """End one connection. Its good-bye is repeated, as it may be lost."""
        with self._lock:
            goodbye = [] if connection.session.over else connection.session.goodbye()
            self._send(goodbye)
            self._farewells.add(goodbye, time.monotonic())
            self._retire(connection)
        self._wake()

    def send(self, datagram: bytes, address: Address) -> None:
        """Send as it is. For Connection."""
        if isinstance(address, Relayed):
            self.send_relayed(datagram, address)
        else:
            send_to(self._branches.routes.get(address, self.socket), datagram, address, self._whereabouts.nat64)

    def close(self) -> None:
        """End all connections and close the socket."""
        with self._lock:
            for connection in list(self._connections.values()):
                self.end(connection)
            farewells = self._farewells.left()
        for sending in farewells:
            time.sleep(LAST_FAREWELLS / len(farewells))
            self._send([sending])
        self._closed = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _begin(self, session_id: str, session_key: str, published: Iterable[Any], is_guest: bool, seen_at: str = "") -> Connection:
        """Begin a session, or tell one of its peer's new addresses. One that has ended is not begun anew for what a guest had told by then."""
        with self._lock:
            now = time.monotonic()
            peer = read_published(published, self.candidates, self._whereabouts.loopback)
            connection, earlier = self._connections.get(session_id), self._ended.get(session_id)
            if connection is None:
                session = earlier.again(now) if earlier else Session(session_id, session_key, is_guest, now, self._consent_interval, self._pace)
                connection = Connection(self, session, self._lock)
                if self._closed:
                    session.over = "the endpoint is closed"
                is_known = earlier is not None and set(peer.addresses) <= set(earlier.remotes) and peer.attempt == self._attempts.of(session_id)
                if self._closed or is_known and not is_guest:
                    return connection
                self._connections[session_id] = connection
                self._whereabouts.ask_soon(now)     # a router may have forgotten us since the last keep-alive
            self._attempts.note(session_id, peer.attempt)
            connection.session.add(peer.addresses, now, peer.pacing, seen_at, peer.relay)
            self._branches.learn(connection.session, session_key, peer, now)
            for message, source in self._early.take(session_id, now):
                self._receive(connection, message, source, now)
            self._send_for(connection.session, connection.session.tick(now), now)
        self._wake()
        return connection

    def _begin_anew(self, earlier: Session, now: float) -> Connection:
        """A connection with the same guest, who has lost the earlier one."""
        return self._connections.setdefault(earlier.session_id, Connection(self, earlier.again(now, earlier.remotes), self._lock))

    def _retire(self, connection: Connection) -> None:
        """Forget a session that is over, and wake who waits for it."""
        name, session = connection.session_id, connection.session
        if self._connections.get(name) is connection:
            del self._connections[name]
            self._ended[name] = session
            trim(self._ended)
            if session.is_guest:
                self._whereabouts.begin_attempt()
            elif session.over == BEGUN_ANEW and not self._closed:
                self._begin_anew(session, time.monotonic())
        connection.notify()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def _send(self, sendings: Iterable[Sending]) -> None:
        for datagram, address in sendings:
            self.send(datagram, address)

    def _send_for(self, session: Session, sendings: Iterable[Sending], now: float) -> None:
        """Send what a session has to send, but for checks too many to who has not been heard."""
        self._send(each for each in sendings if each[1] in session.heard or self._unheard.allows(each[1][0], now))

    def _run(self) -> None:
        """The thread: wait for datagrams until something is due, do it, and so on. However it ends, nobody waits for it for ever."""
        try:
            while not self._closed:
                self._serve_once()
        finally:
            with self._lock:
                self._closed = True
                for connection in list(self._connections.values()):
                    connection.session.over = connection.session.over or "the endpoint has failed"
                    self._retire(connection)
                self._accepted.notify_all()
                self._branches.close()
            for each in (self.socket, self._waker, self._wakened, self._selector):
                each.close()

    def _serve_once(self) -> None:
        """Do what is due, wait for what comes, and take it. Takes the lock itself, and waits without it."""
        with self._lock:
            now = time.monotonic()
            if now - self._expected >= SUSPENSION:      # this program was stopped: nobody could be heard meanwhile, and we may be elsewhere
                for connection in self._connections.values():
                    connection.session.forgive(now - self._expected, now)
                self._whereabouts.ask_soon(now)
            pause = self._do_what_is_due(now)
            self._expected = time.monotonic() + pause
        for key, _ in self._selector.select(pause):
            if key.fileobj is self._wakened:
                self._wakened.recv(4096)
            elif isinstance(key.fileobj, socket.socket):
                self._read(key.fileobj)

    def _do_what_is_due(self, now: float) -> float:
        """Seconds until the next thing is due."""
        self._send(self._farewells.take(now))
        if now >= self._next_call and any(connection.session.is_silent(now) for connection in self._connections.values()):
            self._next_call, self._must_call = now + CALL_INTERVAL, True
            self._whereabouts.ask_soon(now)
        self._send(self._whereabouts.tick(now))
        branches_due = self._branches.tick(self._connections, bool(self._farewells), self.socket, now)
        self._tell_if_moved()
        for connection in list(self._connections.values()):
            if connection.session.due <= now:
                self._send_for(connection.session, connection.session.tick(now), now)
            self._notice(connection)
        dues = [connection.session.due for connection in self._connections.values()]
        return max(0.0, min(*dues, self._farewells.due, self._whereabouts.due, branches_due, now + LONGEST_PAUSE) - now)

    def _tell_if_moved(self) -> None:
        """Call moved() if the candidates have changed, or if a peer is silent and STUN has been asked."""
        if self._whereabouts.is_news or self._must_call and not self._whereabouts.is_asking:
            self._whereabouts.is_news = self._must_call = False
            harmless(self.moved)()

    def _read(self, sock: socket.socket) -> None:
        """Take what has come, up to a hundred datagrams before others have their turn."""
        for _ in range(100):
            try:
                datagram, address = sock.recvfrom(2048)
            except BlockingIOError:
                return
            except OSError:     # some systems report here that an earlier datagram was refused
                continue
            source = plain_source(address, self._whereabouts.nat64)
            with self._lock:
                if sock is not self.socket:
                    self._branches.receive(sock, datagram, source)
                self._take(datagram, source)

    def _take(self, datagram: bytes, source: Address) -> None:
        now, message = time.monotonic(), decode(datagram)
        if message is None:
            self._take_content(datagram, source, now)
        elif self._whereabouts.awaits(message.transaction):
            self._whereabouts.receive(message, source, now)
        elif message.fingerprint:
            self._take_check(message, source, now)

    def _take_content(self, datagram: bytes, source: Address, now: float) -> None:
        """Something of the game's; of two sessions from one address it is the later one's, unless its tag says otherwise."""
        for connection in reversed(self._connections.values()):
            if source in connection.session.heard:
                content = connection.session.open(datagram, now)
                if content is not None and len(content) <= MAX_DATAGRAM:
                    connection.deliver(content)
                if content is not None:
                    return

    def _take_check(self, message: Message, source: Address, now: float) -> None:
        name = message.attributes.get(USERNAME, b"").decode("utf-8", "replace").partition(":")[0]
        if message.kind in (SUCCESS, ERROR):     # it bears no USERNAME (RFC 8445 section 7.3), the transaction tells whose it is
            for connection in list(self._connections.values()):
                if connection.session.awaits(message.transaction):
                    self._receive(connection, message, source, now)
        elif name in self._connections:
            self._receive(self._connections[name], message, source, now)
        elif name not in self._ended:
            self._early.keep(name, message, source, now)
        elif not self._ended[name].is_guest and self._ended[name].is_from_anew(message):
            self._receive(self._begin_anew(self._ended[name], now), message, source, now)
        else:
            self._send(self._ended[name].receive(message, source, now))

    def _receive(self, connection: Connection, message: Message, source: Address, now: float) -> None:
        self._send_for(connection.session, connection.session.receive(message, source, now), now)
        self._notice(connection)

    def _notice(self, connection: Connection) -> None:
        """Pass on what has become of a session."""
        session = connection.session
        if session.selected and not connection.announced:
            connection.announced = True
            connection.notify()
            if not session.is_guest:
                self._backlog.append(connection)
                self._accepted.notify()
        if session.over:
            if not session.selected and not session.is_guest:
                self._report(f"a guest could not be reached: {session.over}")
            self._retire(connection)
