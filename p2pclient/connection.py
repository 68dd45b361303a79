"""A connection with one other player, as a game sees it."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING, Callable, Deque, Optional

from .addresses import text_of
from .checks import Session
from .stun import decode

if TYPE_CHECKING:
    from .endpoint import Endpoint

MAX_DATAGRAM = 1200     # bytes that every path carries unfragmented, headers and all
INBOX, INBOX_BYTES = 1024, 65536    # datagrams, and their bytes, that wait for recv(); older ones are dropped


class PeerLost(ConnectionError):
    """The connection has ended: the other player left or fell silent, or it was closed here."""


class Connection:
    """Datagrams to and from one other player. As with UDP some may be lost or overtaken; none is doubled or forged if authentic, and with a stock
    ICE agent none comes from a stranger who is not on the path. All methods may be called from any thread."""

    def __init__(self, endpoint: Endpoint, session: Session, lock: threading.RLock) -> None:
        self.session = session              # guarded by the endpoint's lock
        self.announced = False              # who waits for it to connect has been told
        self.owns_endpoint = False          # to close it is to close the endpoint
        self.closing: Callable[[], None] = lambda: None     # called when it is closed here
        self._endpoint = endpoint
        self._inbox: Deque[bytes] = collections.deque()
        self._inbox_bytes = 0
        self._changed = threading.Condition(lock)       # on the endpoint's lock: a datagram came, it connected, or it is over

    @property
    def session_id(self) -> str:
        return self.session.session_id

    @property
    def remote_address(self) -> str:
        """Where the other player is, "ip:port"; it may change while a connection lasts."""
        return text_of(self.session.selected) if self.session.selected else ""

    @property
    def local_address(self) -> str:
        """Where the other player sees this one, "ip:port"."""
        return text_of(self.session.local) if self.session.local else ""

    @property
    def rtt(self) -> float:
        """Round-trip time in seconds, as of the latest check."""
        return self.session.rtt or 0.0

    @property
    def connect_time(self) -> float:
        """Seconds from when this side knew the other's addresses until it was connected."""
        return (self.session.connected_at or self.session.began) - self.session.began

    @property
    def authentic(self) -> bool:
        """Whether each datagram is proven to be the other player's, and new. Not so with a stock ICE agent, which does not know how."""
        return self.session.channel.is_open

    def send(self, datagram: bytes) -> None:
        """Send up to 1200 bytes. PeerLost: it has ended. ValueError: too long, or a stock agent would read it as a STUN message."""
        if len(datagram) > MAX_DATAGRAM:
            raise ValueError(f"a datagram has at most {MAX_DATAGRAM} bytes, not {len(datagram)}")
        with self._changed:
            if self.session.over or not self.session.selected:
                raise PeerLost(self.session.over or "not connected")
            if not self.authentic and decode(datagram):
                raise ValueError("the datagram reads as a STUN message")
            self._endpoint.send(self.session.channel.seal(datagram), self.session.selected)

    def recv(self, timeout: Optional[float] = None) -> bytes:
        """The next datagram. TimeoutError after timeout seconds; PeerLost: it has ended, and all that came was read."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self.session.over, timeout)
            if self._inbox:
                datagram = self._inbox.popleft()
                self._inbox_bytes -= len(datagram)
                return datagram
            if self.session.over:
                raise PeerLost(self.session.over)
            raise TimeoutError(f"no datagram came for {timeout} seconds")

    def close(self) -> None:
        """Say good-bye and end."""
        self._endpoint.end(self)
        self.closing()
        if self.owns_endpoint:
            self._endpoint.close()

    def deliver(self, datagram: bytes) -> None:
        """Have recv() return a datagram. Needs the lock."""
        self._inbox.append(datagram)
        self._inbox_bytes += len(datagram)
        while len(self._inbox) > INBOX or self._inbox_bytes > INBOX_BYTES:
            self._inbox_bytes -= len(self._inbox.popleft())
        self._changed.notify()

    def notify(self) -> None:
        """Wake who waits: it has connected, or is over. Needs the lock."""
        self._changed.notify_all()

    def wait_for_selection(self) -> bool:
        """Wait until the session has connected or ended; whether it has connected. Needs the lock."""
        self._changed.wait_for(lambda: self.session.selected or self.session.over)
        return self.session.selected is not None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
