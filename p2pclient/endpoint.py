"""One UDP socket, its thread, and all connections over it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import selectors
import socket
import threading
import time
from typing import Any, Callable, Deque, Dict, Iterable, Optional, Sequence

from .addresses import Address, Sending, is_loopback, plain, text_of
from .candidates import StunQuery, candidates_from, gather_addresses, gather_candidates
from .checks import CONSENT_INTERVAL, Session, trim
from .connection import Connection, PeerLost
from .diagnosis import why_not
from .pacing import UnheardLimiter
from .rendezvous import Guest, Start
from .sockets import open_socket, resolve, send_to
from .stun import SUCCESS, USERNAME, Message, decode

log = logging.getLogger("p2pclient")

# Seconds between two questions to the STUN servers; routers should keep a mapping for two minutes (RFC 4787 REQ-5), and many do not.
KEEPALIVE = 15.0
MAX_SESSIONS = 64       # with guests at once, whatever the server says


class Endpoint:
    """One UDP socket with all its sessions. A host has one for all its guests; a guest has one for the game it joins.

    stun_servers: (host, port) each; loopback: whether peers may be on this very machine; sock: a bound UDP socket of one's own,
    which is then read by this alone; keepalive, consent_interval: seconds; report: takes a line for each thing that happens;
    moved: called when the candidates have changed, and not to block.
    The constructor asks the STUN servers, which takes 3.5 seconds if they do not answer.
    """

    def __init__(self, stun_servers: Sequence[Address] = (), loopback: bool = False, sock: Optional[socket.socket] = None,
                 keepalive: float = KEEPALIVE, consent_interval: float = CONSENT_INTERVAL, report: Callable[[str], None] = log.info,
                 moved: Callable[[], None] = lambda: None) -> None:
        self.socket = sock or open_socket()
        self.socket.setblocking(False)
        self.candidates = gather_candidates(self.socket, stun_servers, loopback)
        self._loopback, self._report, self._moved = loopback, report, moved
        self._stun_servers = resolve(stun_servers, self.socket.family == socket.AF_INET6)
        self._keepalive, self._next_keepalive = keepalive, time.monotonic() + keepalive
        self._consent_interval = consent_interval
        # The lock guards all below, and all sessions. Private methods need it.
        self._lock = threading.RLock()
        self._accepted = threading.Condition(self._lock)        # a guest has connected, or the endpoint is closed
        self._connections: Dict[str, Connection] = {}           # by sessionId, whether connected yet or not
        self._ended: collections.OrderedDict[str, Session] = collections.OrderedDict()  # sessions that are over
        self._backlog: Deque[Connection] = collections.deque()  # guests that accept() has not returned yet
        self._unheard = UnheardLimiter()
        self._query = StunQuery([])                             # to the STUN servers, until it is concluded
        self._closed = False
        self._waker, self._wakened = socket.socketpair()        # a byte through these ends the thread's waiting
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    def expect(self, guest: Guest) -> None:
        """Begin to connect with a guest that a poll told of; accept() returns it when that has worked. To do so again is to learn its
        new addresses."""
        with self._lock:
            if guest.session_id in self._connections or len(self._connections) < MAX_SESSIONS:
                self._begin(guest.session_id, guest.session_key, guest.addresses, controlling=False)

    def renew(self, start: Start) -> None:
        """Learn the new addresses of the host of a session that there is."""
        with self._lock:
            if start.session_id in self._connections:
                self._begin(start.session_id, start.session_key, start.addresses, controlling=True)

    def when_moved(self, moved: Callable[[], None]) -> None:
        """Call this when the candidates have changed, as the constructor's moved."""
        self._moved = moved

    def use_stun(self, servers: Sequence[Address], instead_of: Sequence[Address]) -> None:
        """Ask these STUN servers from now on, if those others were asked until now."""
        ipv6 = self.socket.family == socket.AF_INET6
        found, guessed = resolve(servers, ipv6), resolve(instead_of, ipv6)
        with self._lock:
            if self._stun_servers != guessed or found == guessed:
                return
            self._stun_servers, self._next_keepalive = found, time.monotonic()
            if not found and self.candidates.nat == "no answer":
                self.candidates = dataclasses.replace(self.candidates, nat="not asked")
        self._wake()

    def leave_loopback(self) -> bool:
        """Publish no loopback addresses from now on; False if there were none."""
        with self._lock:
            had, self._loopback = self._loopback, False
            self.candidates = self.candidates.without_loopback()
            return had

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
        connection = self._begin(start.session_id, start.session_key, start.addresses, controlling=True)
        with self._lock:
            if connection.wait_for_selection():
                return connection
            raise why_not(connection.session, self.candidates, start.addresses)

    def end(self, connection: Connection) -> None:
        """End one connection."""
        with self._lock:
            self._send(connection.session.goodbye())
            self._retire(connection)

    def close(self) -> None:
        """End all connections and close the socket."""
        with self._lock:
            for connection in list(self._connections.values()):
                self.end(connection)
            self._closed = True
            self._accepted.notify_all()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _begin(self, session_id: str, session_key: str, addresses: Iterable[Any], controlling: bool) -> Connection:
        with self._lock:
            now = time.monotonic()
            connection = self._connections.get(session_id)
            if connection is None:
                session = Session(session_id, session_key, controlling, now, self._consent_interval)
                connection = Connection(self, session, self._lock)
                if self._closed:
                    session.over = "the endpoint is closed"
                    return connection
                earlier = self._ended.get(session_id)
                if earlier:
                    session.follows(earlier)
                if earlier and not earlier.selected:    # who could not be reached has had his MAX_CHECKS
                    session.over = earlier.over
                    return connection
                self._connections[session_id] = connection
            connection.session.add((address for address in addresses if self._loopback or not is_loopback(address)), self.candidates.mapped)
            self._send_for(connection.session, connection.session.tick(now), now)
        self._wake()
        return connection

    def _retire(self, connection: Connection) -> None:
        """Forget a session that is over, and wake who waits for it."""
        if self._connections.pop(connection.session_id, None):
            self._ended[connection.session_id] = connection.session
            trim(self._ended)
        connection.notify()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def _send(self, sendings: Iterable[Sending]) -> None:
        for datagram, address in sendings:
            send_to(self.socket, datagram, address)

    def _send_for(self, session: Session, sendings: Iterable[Sending], now: float) -> None:
        """Send what a session has to send, but for checks too many to who has not been heard."""
        self._send(each for each in sendings if each[1] in session.heard or self._unheard.allows(each[1][0], now))

    def _run(self) -> None:
        """The thread: wait for datagrams until something is due, do it, and so on. However it ends, nobody waits for it for ever."""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.socket, selectors.EVENT_READ)
                selector.register(self._wakened, selectors.EVENT_READ)
                while not self._closed:
                    self._serve_once(selector)
        finally:
            with self._lock:
                self._closed = True
                for connection in list(self._connections.values()):
                    connection.session.over = connection.session.over or "the endpoint has failed"
                    self._retire(connection)
                self._accepted.notify_all()
            for each in (self.socket, self._waker, self._wakened):
                each.close()

    def _serve_once(self, selector: selectors.BaseSelector) -> None:
        """Do what is due, wait for what comes, and take it. Takes the lock itself, and waits without it."""
        with self._lock:
            pause = self._do_what_is_due(time.monotonic())
        readable = [key.fileobj for key, _ in selector.select(pause)]
        if self._wakened in readable:
            self._wakened.recv(4096)
        if self.socket in readable:
            self._read()

    def _do_what_is_due(self, now: float) -> float:
        """Seconds until the next thing is due."""
        if now >= self._next_keepalive:
            self._next_keepalive = now + self._keepalive
            self._ask_where_we_are()
        for connection in list(self._connections.values()):
            session = connection.session
            if session.due <= now:
                self._send_for(session, session.tick(now), now)
            self._notice(connection)
        return max(0.0, min([self._next_keepalive, *(connection.session.due for connection in self._connections.values())]) - now)

    def _read(self) -> None:
        """Take what has come, up to a hundred datagrams before others have their turn."""
        for _ in range(100):
            try:
                datagram, source = self.socket.recvfrom(65536)
            except BlockingIOError:
                return
            except OSError:     # some systems report here that an earlier datagram was refused
                continue
            with self._lock:
                self._take(datagram, plain(source))

    def _take(self, datagram: bytes, source: Address) -> None:
        message = decode(datagram)
        if message is None:
            for connection in reversed(self._connections.values()):     # of two sessions from one address the later one lives
                if source in connection.session.heard:
                    connection.deliver(datagram)
                    return
        elif self._query.awaits(message.transaction):
            self._query.receive(message, source)
            if self._query.complete:
                self._conclude_where_we_are()
        elif message.fingerprint:
            self._take_check(message, source)

    def _take_check(self, message: Message, source: Address) -> None:
        name = message.attributes.get(USERNAME, b"").decode("utf-8", "replace")
        if message.kind == SUCCESS:     # it bears no USERNAME (RFC 8445 section 7.3), the transaction tells whose it is
            candidates = [connection for connection in self._connections.values() if connection.session.awaits(message.transaction)]
        else:
            candidates = [self._connections[name]] if name in self._connections else []
        for connection in candidates:
            now = time.monotonic()
            self._send_for(connection.session, connection.session.receive(message, source, now), now)
            self._notice(connection)

    def _notice(self, connection: Connection) -> None:
        """Pass on what has become of a session."""
        session = connection.session
        if session.selected and not connection.announced:
            connection.announced = True
            connection.notify()
            if not session.controlling:
                self._backlog.append(connection)
                self._accepted.notify()
        if session.over:
            if not session.selected and not session.controlling:
                self._report(f"a guest could not be reached: {session.over}")
            self._retire(connection)

    def _ask_where_we_are(self) -> None:
        """Ask the STUN servers again: that keeps the router's mapping alive, and tells when it has changed."""
        if self._query.seen:
            self._conclude_where_we_are()
        self._query = StunQuery(self._stun_servers)
        self._send(self._query.requests())

    def _conclude_where_we_are(self) -> None:
        """All answers count together: one of them alone would make a NAT that has just forgotten us look symmetric."""
        before, own = self.candidates, gather_addresses(self.socket, self._loopback, self._stun_servers)
        self.candidates = candidates_from(own, self._query.seen, bool(self._stun_servers))
        self._query = StunQuery([])
        if self.candidates.mapped and self.candidates.mapped != before.mapped:
            self._report(f"the public address is now {text_of(self.candidates.mapped)}")
        if self.candidates.addresses != before.addresses:
            self._moved()
