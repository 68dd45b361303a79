"""A TURN allocation (RFC 8656) over UDP with long-term credentials (RFC 8489 section 9.2), without socket or clock."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Tuple

from .addresses import Address, Relayed, parse_candidate, text_of
from .deadline import Deadline
from .stun import INDICATION, Message, authentic, decode, encode, error_number, pack_address, unpack_address

ALLOCATE, REFRESH, CREATE_PERMISSION, SEND, DATA_INDICATION = 0x0003, 0x0004, 0x0008, 0x0016, 0x0017
SUCCESS, ERROR = 0x0100, 0x0110     # what an answer's kind adds to its request's
USERNAME, LIFETIME, XOR_PEER_ADDRESS, DATA, REALM, NONCE = 0x0006, 0x000D, 0x0012, 0x0013, 0x0014, 0x0015
XOR_RELAYED_ADDRESS, REQUESTED_TRANSPORT = 0x0016, 0x0019
UDP = b"\x11\0\0\0"
UNAUTHORIZED, STALE_NONCE = 401, 438

PORT = 3478
CREDENTIALS_LIFE = 86400        # seconds of credentials that we make of a shared secret
RETRANSMISSIONS = (0.5, 1.0, 2.0)   # seconds until a request goes out again, and at last fails; RFC 8489 section 6.2.1 has seven
MAX_CHALLENGES = 3              # nonces in a row that one request is tried with
MAX_TEXT = 763                  # bytes of REALM and NONCE (RFC 8489 sections 14.9 and 14.10)
LEAST_LIFE, MOST_LIFE = 10, 3600    # seconds of an allocation, whatever the server says
PERMISSION_RENEWAL = 200.0      # seconds after which one that lasts for 300 is asked for again (RFC 8656 section 9)
PERMISSIONS_AT_ONCE = 16        # requests for them that are under way
REFRESH_AGAIN = 5.0             # seconds between two tries to refresh
KEEPALIVE = 15.0                # seconds between two indications that keep the router's mapping


@dataclass(frozen=True)
class TurnServer:
    """A TURN server, and how to be let in: by username and password, or by a secret that is shared with it (see ephemeral()).

    fresh: until when new credentials need not be asked for.
    """

    address: Address
    username: str = ""
    password: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    fresh: Deadline = field(default_factory=lambda: Deadline(None), repr=False, compare=False)

    @property
    def credentials(self) -> Tuple[str, str]:
        return ephemeral(self.secret, CREDENTIALS_LIFE) if self.secret else (self.username, self.password)


def ephemeral(secret: str, life: int) -> Tuple[str, str]:
    """Username and password that a server with the same secret takes for life seconds, as coturn's REST scheme has it (draft-uberti-behave-turn-rest)."""
    username = f"{int(time.time()) + life}:{secrets.token_hex(4)}"
    return username, base64.b64encode(hmac.new(secret.encode("utf-8"), username.encode("ascii"), hashlib.sha1).digest()).decode("ascii")


def parse_turn_url(url: str) -> Optional[Address]:
    """Host and port of a URL such as turn:turn.example.net:3478 or turn:[2001:db8::1]?transport=udp (RFC 7065); None for what is no TURN over UDP."""
    found = re.fullmatch(r"turn:(?:\[([0-9a-fA-F:.]+)\]|([^\s:/?#@\[\]]+))(?::([0-9]{1,5}))?(?:\?transport=udp)?", url)
    port = int(found[3] or PORT) if found else 0
    return (found[1] or found[2], port) if found and 0 < port <= 65535 else None


def send_indication(datagram: bytes, peer: Address) -> bytes:
    """What has the server send a datagram from the relayed address to a peer (RFC 8656 section 11)."""
    transaction = secrets.token_bytes(12)
    return encode(SEND, transaction, [(XOR_PEER_ADDRESS, pack_address(peer, transaction)), (DATA, datagram)])


@dataclass
class Request:
    """A request that is under way. host: whose permission it is about; sent: how often; due: when it goes out again, or fails."""

    kind: int
    body: List[Tuple[int, bytes]]
    host: str
    due: float
    sent: int = 0
    challenges: int = 0


class Allocation:
    """What one server relays for one socket. It is told the time and what came, and returns what to send to the server.

    address: the relayed one, once there is one; over: why there is none any more; is_refused: it is for the credentials.
    """

    def __init__(self, username: str, password: str, now: float) -> None:
        self.address: Optional[Address] = None
        self.over, self.is_refused = "", False
        self._username, self._password = username.encode("utf-8"), password.encode("utf-8")
        self._realm = self._nonce = self._key = b""
        self._requests: Dict[bytes, Request] = {}
        self._permitted: Dict[str, float] = {}      # IP addresses that may send to us, and when that is to be asked for again
        self._expires = self._next_refresh = self._next_keepalive = float("inf")
        self._refreshed = self._released = float("-inf")
        self._begin(ALLOCATE, [(REQUESTED_TRANSPORT, UDP)], now)

    def tick(self, now: float) -> List[bytes]:
        """Do what is due."""
        if now >= self._expires:
            self.over = self.over or "the TURN server did not prolong the relay"
        if now >= self._next_refresh and not self.over:
            self._next_refresh, self._refreshed = now + REFRESH_AGAIN, now
            self._begin(REFRESH, [], now)
        datagrams = [datagram for transaction in list(self._requests) for datagram in self._send(transaction, now)]
        if now >= self._next_keepalive:
            self._next_keepalive = now + KEEPALIVE
            datagrams.append(encode(INDICATION, secrets.token_bytes(12)))
        return datagrams

    @property
    def due(self) -> float:
        """When tick() is to be called next."""
        return min([request.due for request in self._requests.values()] + [self._next_refresh, self._next_keepalive, self._expires])

    def receive(self, datagram: bytes, now: float) -> Optional[Tuple[bytes, Relayed]]:
        """Take what came from the server: what a peer has sent, and the peer; None if it is for us alone, or nonsense."""
        message = decode(datagram)
        if message is None:
            return None
        if message.kind == DATA_INDICATION:
            return self._content(message)
        request = self._requests.get(message.transaction)
        if request and message.kind == request.kind | SUCCESS and authentic(message, self._key):
            del self._requests[message.transaction]
            self._grant(request, message, now)
        elif request and message.kind == request.kind | ERROR:
            del self._requests[message.transaction]
            self._take_error(request, message, now)
        return None

    def permit(self, hosts: Iterable[str], now: float) -> None:
        """Have these IP addresses, and no others, let in from now on: with the next tick(). It sends them nothing. Only IPv4 is relayed."""
        wanted = {host for host in hosts if ":" not in host}
        self._permitted = {host: due for host, due in self._permitted.items() if host in wanted}
        under_way = {request.host for request in self._requests.values() if request.host}
        for host in sorted(wanted - under_way) if self.address else []:
            if now >= self._permitted.get(host, 0.0) and len(self._requests) < PERMISSIONS_AT_ONCE:
                self._begin(CREATE_PERMISSION, [], now, host)

    def refresh_soon(self, now: float) -> None:
        """Ask with the next tick() whether the allocation is still there, as we may have moved, or the server begun anew."""
        if self.address and now - self._refreshed >= REFRESH_AGAIN:
            self._next_refresh = now

    def release(self, now: float) -> None:
        """Give it back, with the next tick(). It is over when the server has answered, or not answered in time."""
        if not self.address:
            self.over = self.over or "ended"
        elif self._released < 0:
            self._released, self._next_refresh = now, float("inf")
            self._begin(REFRESH, [(LIFETIME, bytes(4))], now)

    def _begin(self, kind: int, body: List[Tuple[int, bytes]], now: float, host: str = "", challenges: int = 0) -> None:
        self._requests[secrets.token_bytes(12)] = Request(kind, body, host, now, 0, challenges)

    def _send(self, transaction: bytes, now: float) -> List[bytes]:
        """A request, if it is due; no more if it has failed."""
        request = self._requests[transaction]
        if now < request.due:
            return []
        if request.sent == len(RETRANSMISSIONS):
            del self._requests[transaction]
            if request.kind == ALLOCATE or self._released >= 0:
                self.over = self.over or "the TURN server does not answer"
            return []
        request.due, request.sent = now + RETRANSMISSIONS[request.sent], request.sent + 1
        body = request.body + ([(XOR_PEER_ADDRESS, pack_address((request.host, 0), transaction))] if request.host else [])
        if not self._key:
            return [encode(request.kind, transaction, body)]
        body += [(USERNAME, self._username), (REALM, self._realm), (NONCE, self._nonce)]
        return [encode(request.kind, transaction, body, self._key)]

    def _content(self, message: Message) -> Optional[Tuple[bytes, Relayed]]:
        """What a peer sent that we have let in."""
        peer = unpack_address(message.attributes.get(XOR_PEER_ADDRESS, b""), message.transaction)
        usable = peer and parse_candidate(text_of(peer))
        if not usable or usable[0] not in self._permitted or DATA not in message.attributes:
            return None
        return message.attributes[DATA], Relayed(usable)

    def _grant(self, request: Request, message: Message, now: float) -> None:
        """An answer that is a success, and the server's own."""
        if request.kind == CREATE_PERMISSION:
            self._permitted[request.host] = now + PERMISSION_RENEWAL
            return
        if self._released >= 0:
            self.over = "ended" if request.body else self.over
            return
        if request.kind == ALLOCATE:
            relayed = unpack_address(message.attributes.get(XOR_RELAYED_ADDRESS, b""), message.transaction)
            self.address = parse_candidate(text_of(relayed)) if relayed else None
            self._next_keepalive, self._refreshed = now + KEEPALIVE, now
            if self.address is None:
                self.over = "the TURN server gives no address that can be sent to"
        life = max(LEAST_LIFE, min(MOST_LIFE, int.from_bytes(message.attributes.get(LIFETIME, b"")[:4], "big")))
        self._expires, self._next_refresh = now + life, now + life / 2

    def _take_error(self, request: Request, message: Message, now: float) -> None:
        """A challenge is answered, and stale nonces are replaced (RFC 8489 section 9.2.5); all else is a refusal."""
        number, realm, nonce = error_number(message), message.attributes.get(REALM, self._realm), message.attributes.get(NONCE, b"")
        is_challenge = number == STALE_NONCE or number == UNAUTHORIZED and not self._key
        is_sound = 0 < len(nonce) <= MAX_TEXT and len(realm) <= MAX_TEXT and request.challenges < MAX_CHALLENGES
        if is_challenge and is_sound:
            self._realm, self._nonce = realm, nonce
            self._key = hashlib.md5(b":".join((self._username, realm, self._password)), usedforsecurity=False).digest()
            self._begin(request.kind, request.body, now, request.host, request.challenges + 1)
        elif request.kind == CREATE_PERMISSION and number not in (UNAUTHORIZED, 437, 441):
            self._permitted[request.host] = now + PERMISSION_RENEWAL        # it is forbidden, and would be again
        else:
            self.is_refused = number in (UNAUTHORIZED, 441)
            self.over = f"the TURN server refuses (error {number})"
