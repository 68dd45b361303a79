"""Who the peer is, and the game's datagrams made authentic: two sessions know each other by nonces that each draws anew.

A P2P attribute (0xD7A2, comprehension-optional) of a check or good-bye has 24 bytes: the nonce of who sends it (8 random bytes), the nonce that it
believes to be the peer's (zeros while it knows none), and a sequence number (8 bytes, big-endian) that counts its checks, good-byes
and datagrams together. That of an answer has the 8 bytes of the answerer's nonce alone. Who sends none is a stock ICE agent.

A nonce is proven to be that of a peer who is there now by what could not be made before ours was known: an answer to a check of ours, a check that echoes
our nonce, a datagram with the right tag. All before is an offer.

A datagram of the game is on the wire: one byte 0xD0, a sequence number of 7 bytes (big-endian), a tag of 8 bytes, and what the game sent. The tag is
BLAKE2s over the first 8 bytes and the content, with digest_size 8 and a key of 32 bytes, which is

    HMAC-SHA256(sessionKey, "p2p datagrams from " + ("guest" or "host") + guest's nonce + host's nonce)

so that each direction and each connection has its own. Nothing is encrypted. The first byte tells it from STUN (RFC 7983).
With a stock agent a datagram is what the game sent, and nothing else.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import secrets
import struct
from typing import NamedTuple, Optional

from . import stun
from .pacing import trim

FIRST_BYTE = 0xD0
OVERHEAD = 16       # bytes before the game's own
WINDOW = 1024       # sequence numbers behind the highest that may still come
MAX_OFFERS = 4      # nonces that are remembered until one is proven
NO_NONCE = bytes(8)


class Mark(NamedTuple):
    """A P2P attribute of a check: the nonce of who sent it, the nonce that it believes to be the receiver's, and its sequence number."""

    nonce: bytes
    echo: bytes
    sequence: int

    @classmethod
    def of(cls, message: stun.Message) -> Optional[Mark]:
        value = message.attributes.get(stun.P2P, b"")
        return cls(value[:8], value[8:16], int.from_bytes(value[16:], "big")) if len(value) == 24 else None


class ReplayWindow:
    """Which sequence numbers have come (RFC 4303 section 3.4.3)."""

    def __init__(self) -> None:
        self._highest, self._seen = -1, 0       # bit n of seen: the number n below the highest has come

    def accept(self, number: int) -> bool:
        """Whether a number comes for the first time; it counts as come then."""
        if number > self._highest:
            self._seen = (self._seen << min(number - self._highest, WINDOW) | 1) & (1 << WINDOW) - 1
            self._highest = number
            return True
        behind = self._highest - number
        if behind >= WINDOW or self._seen >> behind & 1:
            return False
        self._seen |= 1 << behind
        return True


class Direction:
    """What comes from one session of the peer's: its key and what has come already; and the key of what goes there."""

    def __init__(self, session_key: str, is_guest: bool, nonce: bytes, peer_nonce: bytes) -> None:
        self.window = ReplayWindow()
        nonces = nonce + peer_nonce if is_guest else peer_nonce + nonce
        guests, hosts = (hmac.new(session_key.encode("utf-8"), b"p2p datagrams from " + side + nonces, hashlib.sha256).digest()
                         for side in (b"guest", b"host"))
        self._sending, self._receiving = (guests, hosts) if is_guest else (hosts, guests)

    def seal(self, sequence: int, content: bytes) -> bytes:
        head = struct.pack(">Q", FIRST_BYTE << 56 | sequence)
        return head + tag(head + content, self._sending) + content

    def open(self, datagram: bytes) -> Optional[bytes]:
        if len(datagram) < OVERHEAD or datagram[0] != FIRST_BYTE:
            return None
        head, content = datagram[:8], datagram[OVERHEAD:]
        if not hmac.compare_digest(datagram[8:OVERHEAD], tag(head + content, self._receiving)):
            return None
        return content if self.window.accept(int.from_bytes(head[1:], "big")) else None


class Channel:
    """One session's side of it. nonce: this session's own; peer_nonce: the proven one of the peer's, or None."""

    def __init__(self, session_key: str, is_guest: bool) -> None:
        self.nonce = secrets.token_bytes(8)
        self.peer_nonce: Optional[bytes] = None
        self._key, self._is_guest = session_key, is_guest
        self._sequence = 0
        self._peers: collections.OrderedDict[bytes, Direction] = collections.OrderedDict()     # by nonce: the proven one, or the offers

    @property
    def is_open(self) -> bool:
        """Whether the peer is proven to be one of our like, so that datagrams are authentic."""
        return self.peer_nonce is not None

    def knows(self, nonce: bytes) -> bool:
        return nonce in self._peers

    def mark(self, echo: Optional[bytes] = None) -> bytes:
        """The P2P attribute of a new check or good-bye. echo: the nonce of the peer's, if not the one that is known."""
        self._sequence += 1
        return self.nonce + (echo or next(reversed(self._peers), NO_NONCE)) + struct.pack(">Q", self._sequence)

    def is_fresh(self, mark: Optional[Mark]) -> bool:
        """Whether an authentic check comes for the first time, as far as its mark tells; a stock agent's has none."""
        if mark is None:
            return True
        if mark.echo == self.nonce:
            self.confirm(mark.nonce)
        return self._with(mark.nonce).window.accept(mark.sequence)

    def confirm(self, nonce: bytes) -> None:
        """The peer's session of this nonce is there now. The first one stays."""
        if self.peer_nonce is None:
            self.peer_nonce, proven = nonce, self._with(nonce)
            self._peers.clear()
            self._peers[nonce] = proven

    def seal(self, content: bytes) -> bytes:
        """The datagram for what the game sends."""
        if self.peer_nonce is None:
            return content
        self._sequence += 1
        return self._peers[self.peer_nonce].seal(self._sequence, content)

    def open(self, datagram: bytes) -> Optional[bytes]:
        """What the game of the peer sent; None for a forgery and a replay. A stock agent's is taken as it is."""
        if not self._peers:
            return datagram
        for nonce, peer in self._peers.items():
            content = peer.open(datagram)
            if content is not None:
                self.confirm(nonce)
                return content
        return None

    def _with(self, nonce: bytes) -> Direction:
        if nonce not in self._peers:
            self._peers[nonce] = Direction(self._key, self._is_guest, self.nonce, nonce)
            trim(self._peers, MAX_OFFERS)
        return self._peers[nonce]


def tag(content: bytes, key: bytes) -> bytes:
    return hashlib.blake2s(content, digest_size=8, key=key).digest()
