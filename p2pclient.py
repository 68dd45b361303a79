#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests"]
# ///
"""p2pclient: what a game links against to offer games, find them, and talk to the other player directly.

The host:                                              A guest:

    client = RendezvousClient("http://server:8000")        client = RendezvousClient("http://server:8000")
    with HostedGame(client, "my game") as game:            with join_game(client, "my game") as connection:
        connection = game.accept()                             connection.send(b"hello")
        print(connection.recv())                               print(connection.recv(timeout=5))

Beneath these: RendezvousClient speaks to the server; an Endpoint is one UDP socket, for a router's mapping belongs to its
socket: it finds the socket's candidate addresses, punches holes, and carries the game's own datagrams. On the wire:

    Connectivity checks are STUN Binding requests as in ICE (RFC 8445): USERNAME is the sessionId, MESSAGE-INTEGRITY is keyed with
    the sessionKey, ICE-CONTROLLING comes from the guest and ICE-CONTROLLED from the host, USE-CANDIDATE nominates, FINGERPRINT
    ends it. They are answered in kind. A Binding indication with the same attributes says good-bye.
    Everything else on the socket is the game's, as it is: what is STUN is told by its first byte (RFC 7983), cookie and
    FINGERPRINT. It is taken only from addresses from which an authentic check has come.

Threads: each Endpoint has one, which reads the socket and does what is due; each HostedGame has one, which polls. All state
of an Endpoint lies behind its one lock. Errors are RendezvousError (the server), ConnectFailed and PeerLost (the other player).
Only the HTTP part needs a library, requests.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
import unicodedata
import urllib.parse
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

try:
    import requests
except ModuleNotFoundError:
    if __name__ == "__main__":
        sys.exit("the module requests is missing; python3 -m pip install requests installs it")
    raise

log = logging.getLogger("p2pclient")

Address = Tuple[str, int]       # IP address, port; an IPv4-mapped IPv6 address is written as IPv4


# ---- the rendezvous server ------------------------------------------------------------------------------------------

class RendezvousError(Exception):
    """The server refused a call, or could not be reached (status 0). errors: the faults of the request by field; retry_after: seconds that
    the server asks to wait."""

    def __init__(self, status: int, detail: str, errors: Optional[Dict[str, str]] = None, retry_after: float = 0) -> None:
        super().__init__(f"{detail} ({status})" if status else detail)
        self.status, self.detail, self.errors, self.retry_after = status, detail, errors or {}, retry_after


@dataclass(frozen=True)
class Registration:
    """A game is offered. created: it is new; expires_in, poll_after: seconds."""

    name: str
    created: bool
    expires_in: float
    poll_after: float


@dataclass(frozen=True)
class Guest:
    """A guest as its host learns of it."""

    session_id: str
    session_key: str = field(repr=False)
    addresses: List[Any]


@dataclass(frozen=True)
class Poll:
    """The guests that came or moved. cursor: what to pass as after next time; gone: sessions of the replies that are gone; waited: the
    server holds polls that want to wait, so the next one can follow at once."""

    name: str
    guests: List[Guest]
    cursor: int
    expires_in: float
    poll_after: float
    gone: List[str]
    waited: bool = False


@dataclass(frozen=True)
class Start:
    """A guest's session with a game; addresses is empty while the host has none for it; waited: as in Poll."""

    name: str
    session_id: str
    session_key: str = field(repr=False)
    addresses: List[Any]
    cursor: int
    expires_in: float
    poll_after: float
    waited: bool = False


class Reply(NamedTuple):
    """Status and body of an answer, and whether it says that the server let the call wait."""

    status: int
    body: Any
    waited: bool


@dataclass(frozen=True)
class GameInfo:
    """What anybody may know of a game. ready: a guest that starts it gets the host's addresses at once."""

    name: str
    info: Dict[str, Any]
    guests: int
    ready: bool


def new_peer_id() -> str:
    """A secret that makes its owner the host of a game, or one guest of it: 192 random bits."""
    return secrets.token_urlsafe(24)


class RendezvousClient:
    """Calls to one server, from any thread.

    base_url: http://host:port; session: a requests.Session of one's own; timeout: seconds for one try; patience: seconds for
    which a call is repeated when the server does not answer or says 429 or 503: every call here is safe to repeat.
    All methods raise RendezvousError. ValueError: base_url is no HTTP URL.
    """

    def __init__(self, base_url: str, session: Optional[requests.Session] = None, timeout: float = 10.0, patience: float = 10.0) -> None:
        if "://" not in base_url:
            base_url = "http://" + base_url
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not the URL of a server, such as http://example.net:8000")
        self.base_url = base_url.rstrip("/")
        self.stun_server: Address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        self._session = session or requests.Session()
        self._timeout, self._patience = timeout, patience
        # What this client registered, so that it can do so again when a restarted server has forgotten it.
        self._registered: Dict[str, Dict[str, Any]] = {}

    @property
    def on_loopback(self) -> bool:
        """Whether the server is on this very machine, called over loopback: then loopback addresses lead to the peers too."""
        found = resolve([self.stun_server])
        return bool(found) and all(plain_ip(host).is_loopback for host, _ in found)

    def register_game(self, name: str, peer_id: str, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None) -> Registration:
        """Offer a game, or keep one's own alive."""
        body = without_none(name=name, peerId=peer_id, info=info, listed=listed)
        status, answer, _ = self._call("POST", "/games/register", body)
        self._registered[answer["name"]] = {**body, "name": answer["name"]}
        return Registration(answer["name"], status == 201, answer["expiresIn"], answer["pollAfter"])

    def poll_game(self, name: str, peer_id: str, addresses: Sequence[Any], after: Optional[int] = None,
                  replies: Optional[Mapping[str, Sequence[Any]]] = None, wait: float = 0) -> Poll:
        """Publish addresses and learn of guests. A game of ours that the server has forgotten is registered again first.

        wait: seconds for which the server may hold the poll until there is news.
        """
        name = unicodedata.normalize("NFC", name)       # as the server does
        body = without_none(name=name, peerId=peer_id, addresses=list(addresses), after=after, replies=replies)
        try:
            _, answer, waited = self._call("POST", "/games/poll", body, wait)
        except RendezvousError as error:
            if error.status != 404 or name not in self._registered:
                raise
            self._call("POST", "/games/register", self._registered[name])
            body.pop("after", None)
            _, answer, waited = self._call("POST", "/games/poll", body)
        guests = [Guest(guest["sessionId"], guest["sessionKey"], guest["addresses"]) for guest in answer["guests"]]
        return Poll(answer["name"], guests, answer["cursor"], answer["expiresIn"], answer["pollAfter"], answer.get("gone", []), waited)

    def start_game(self, name: str, peer_id: str, addresses: Sequence[Any], wait: float = 0) -> Start:
        """Join a game as a guest, or say that one is still there: to do it again is the same session.

        wait: seconds for which the server may hold the call until the host has addresses.
        """
        _, answer, waited = self._call("POST", "/games/start", {"name": name, "peerId": peer_id, "addresses": list(addresses)}, wait)
        return Start(answer["name"], answer["sessionId"], answer["sessionKey"], answer["addresses"], answer["cursor"],
                     answer["expiresIn"], answer["pollAfter"], waited)

    def list_games(self) -> List[GameInfo]:
        """The listed games, oldest first."""
        return [game_info(game) for game in self._call("GET", "/games").body["games"]]

    def get_game(self, name: str) -> GameInfo:
        """One game, listed or not."""
        return game_info(self._call("GET", game_path(name)).body)

    def update_game(self, name: str, peer_id: str, new_name: Optional[str] = None, info: Optional[Dict[str, Any]] = None,
                    listed: Optional[bool] = None) -> GameInfo:
        """Rename or describe one's own game."""
        body = without_none(peerId=peer_id, name=new_name, info=info, listed=listed)
        # A poll of another thread that the renaming overtakes must not register the old name again.
        name = unicodedata.normalize("NFC", name)
        registered = self._registered.pop(name, None)
        try:
            try:
                answer = self._call("PATCH", game_path(name), body).body
            except RepeatedNotFound:    # a first try whose answer was lost may have renamed it: only its owner may update the new name
                answer = self._call("PATCH", game_path(new_name or name), body).body
        except RendezvousError:
            if registered:
                self._registered[name] = registered
            raise
        game = game_info(answer)
        if registered:
            self._registered[game.name] = {**registered, **body, "name": game.name}
        return game

    def delete_game(self, name: str, peer_id: str) -> None:
        """End one's own game."""
        self._registered.pop(unicodedata.normalize("NFC", name), None)
        with contextlib.suppress(RepeatedNotFound):     # a first try whose answer was lost has done it
            self._call("DELETE", game_path(name), {"peerId": peer_id})

    def health(self) -> Dict[str, Any]:
        """What the server says of itself: status, version, games, guests."""
        answer: Dict[str, Any] = self._call("GET", "/healthz").body
        return answer

    def _call(self, method: str, path: str, body: Optional[Dict[str, Any]] = None, wait: float = 0) -> Reply:
        """The answer to a call that is repeated while patience lasts. The server may hold it for wait seconds (RFC 7240 section 4.3)."""
        patience: Optional[Deadline] = None     # from the first failure on: before that the server may have held the call
        pause, repeated = 0.1, False
        headers = {"Prefer": f"wait={int(wait)}"} if wait >= 1 else {}
        while True:
            try:
                response = self._session.request(method, self.base_url + path, json=body, headers=headers, timeout=self._timeout + wait,
                                                 allow_redirects=False)
            except (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL) as error:
                raise RendezvousError(0, f"this cannot be sent: {error}") from None
            except requests.RequestException as error:
                failure = RendezvousError(0, f"cannot reach {self.base_url}: {plain_reason(error)}")
                repeated = True
            else:
                if response.status_code < 300:
                    return Reply(response.status_code, json_of(response), "Preference-Applied" in response.headers)
                failure = refusal(response, repeated)
                if response.status_code not in (429, 503):
                    raise failure
            patience = patience or Deadline(self._patience)
            rest = max(pause, failure.retry_after)
            if rest > patience.left():
                raise failure
            time.sleep(rest)
            pause = min(2 * pause, 2.0)


class RepeatedNotFound(RendezvousError):
    """404 to a call that was repeated because its answer was lost: the first try may have done it."""


class Deadline:
    """A budget of seconds for several steps; None is without end."""

    def __init__(self, seconds: Optional[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return 1e9 if self._end is None else max(0.0, self._end - time.monotonic())


def without_none(**fields: Any) -> Dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def game_path(name: str) -> str:
    return "/games/" + urllib.parse.quote(name, safe="")


def game_info(answer: Mapping[str, Any]) -> GameInfo:
    return GameInfo(answer["name"], answer["info"], answer["guests"], answer["ready"])


def number(text: str) -> float:
    """Seconds of a Retry-After; 0 if it is a date or missing, which leaves the pause to us."""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def plain_reason(error: BaseException) -> str:
    """What the innermost cause of a failed call says: requests wraps it several times over."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Body(Dict[str, Any]):
    """A JSON object of a server. RendezvousError: it has not the member that is asked for, so it is of another kind of server."""

    def __missing__(self, name: str) -> Any:
        raise RendezvousError(0, f"this is no rendezvous server: its answer has no {name}")


def json_of(response: requests.Response) -> Body:
    try:
        return Body(response.json() if response.content else {})
    except (ValueError, TypeError):
        raise RendezvousError(response.status_code, f"{response.url} does not answer as a rendezvous server does") from None


def refusal(response: requests.Response, repeated: bool) -> RendezvousError:
    """The error that a problem document stands for (RFC 9457), or any other answer that is no success."""
    try:
        problem = response.json()
        detail, errors = str(problem["detail"]), problem.get("errors")
    except (ValueError, KeyError, TypeError):
        detail, errors = f"{response.url} answers {response.reason}", None
    kind = RepeatedNotFound if repeated and response.status_code == 404 else RendezvousError
    return kind(response.status_code, detail, errors, number(response.headers.get("Retry-After", "")))


# ---- STUN -----------------------------------------------------------------------------------------------------------
# The codec of RFC 8489 as far as Binding goes, apart from any socket.

COOKIE = 0x2112A442
REQUEST, INDICATION, SUCCESS = 0x0001, 0x0011, 0x0101       # Binding, by class
USERNAME, MESSAGE_INTEGRITY, XOR_MAPPED_ADDRESS, USE_CANDIDATE = 0x0006, 0x0008, 0x0020, 0x0025
FINGERPRINT, ICE_CONTROLLED, ICE_CONTROLLING = 0x8028, 0x8029, 0x802A


class Message(NamedTuple):
    """A STUN message. attributes: the first of each kind up to MESSAGE-INTEGRITY, as what follows that is not protected;
    signed: the bytes that MESSAGE-INTEGRITY covers, or nothing; fingerprint: it has one, and it is right."""

    kind: int
    transaction: bytes
    attributes: Dict[int, bytes]
    signed: bytes
    fingerprint: bool


def encode(kind: int, transaction: bytes, attributes: Iterable[Tuple[int, bytes]] = (), key: Optional[str] = None) -> bytes:
    """A STUN message with FINGERPRINT, and with MESSAGE-INTEGRITY if there is a key."""
    body = b"".join(attribute(*each) for each in attributes)
    if key is not None:
        body += attribute(MESSAGE_INTEGRITY, integrity(head(kind, len(body) + 24, transaction) + body, key))
    message = head(kind, len(body) + 8, transaction) + body
    return message + attribute(FINGERPRINT, fingerprint(message))


def decode(datagram: bytes) -> Optional[Message]:
    """The message, or None for what is not STUN: wrong first bits, cookie or lengths, a wrong FINGERPRINT."""
    if len(datagram) < 20 or len(datagram) % 4 or datagram[0] > 3:      # RFC 7983: 0 to 3 is STUN
        return None
    kind, length, cookie = struct.unpack_from(">HHI", datagram)
    if length != len(datagram) - 20 or cookie != COOKIE:
        return None
    transaction, signed, position = datagram[8:20], b"", 20
    attributes: Dict[int, bytes] = {}
    while position < len(datagram):
        name, size = struct.unpack_from(">HH", datagram, position)
        value = datagram[position + 4:position + 4 + size]
        if len(value) < size:
            return None
        if name == FINGERPRINT:
            right = position + 8 == len(datagram) and value == fingerprint(datagram[:position])
            return Message(kind, transaction, attributes, signed, True) if right else None
        if not signed:
            attributes.setdefault(name, value)
            if name == MESSAGE_INTEGRITY:
                signed = head(kind, position + 4, transaction) + datagram[20:position]
        position += 4 + size + -size % 4
    return Message(kind, transaction, attributes, signed, False)


def authentic(message: Message, key: str) -> bool:
    """Whether who sent it knows the key."""
    return bool(message.signed) and hmac.compare_digest(message.attributes[MESSAGE_INTEGRITY], integrity(message.signed, key))


def head(kind: int, length: int, transaction: bytes) -> bytes:
    return struct.pack(">HHI", kind, length, COOKIE) + transaction


def attribute(name: int, value: bytes) -> bytes:
    return struct.pack(">HH", name, len(value)) + value + bytes(-len(value) % 4)


def integrity(signed: bytes, key: str) -> bytes:
    """RFC 8489 section 14.5: HMAC-SHA1 over the message so far, its length counting MESSAGE-INTEGRITY already."""
    return hmac.new(key.encode("utf-8"), signed, hashlib.sha1).digest()


def fingerprint(message: bytes) -> bytes:
    """RFC 8489 section 14.7, over the message so far, its length counting FINGERPRINT already."""
    return struct.pack(">I", zlib.crc32(message) ^ 0x5354554E)


def pack_address(address: Address, transaction: bytes) -> bytes:
    """The value of XOR-MAPPED-ADDRESS (RFC 8489 section 14.2)."""
    ip = plain_ip(address[0])
    mask = struct.pack(">I", COOKIE) + transaction
    return struct.pack(">HH", 1 if ip.version == 4 else 2, address[1] ^ COOKIE >> 16) + bytes(a ^ b for a, b in zip(ip.packed, mask))


def unpack_address(value: bytes, transaction: bytes) -> Optional[Address]:
    """The address in an XOR-MAPPED-ADDRESS, or None if it is malformed."""
    if len(value) not in (8, 20) or value[1] != (1 if len(value) == 8 else 2):
        return None
    mask = struct.pack(">I", COOKIE) + transaction
    ip = ipaddress.ip_address(bytes(a ^ b for a, b in zip(value[4:], mask)))
    return str(ip), struct.unpack(">H", value[2:4])[0] ^ COOKIE >> 16


# ---- candidates -----------------------------------------------------------------------------------------------------

MAX_CANDIDATES = 8          # of our own, and of a peer's that are checked
FIRST_RETRANSMISSION = 0.5  # seconds, doubling (RFC 8489 section 6.2.1)
STUN_PATIENCE = 3.5         # seconds: three transmissions; a player does not wait for RFC 8489's seven


@dataclass(frozen=True)
class Candidates:
    """The addresses at which a socket may be reached.

    addresses: "ip:port" and "[ipv6]:port", most wanted first, at most 8; mapped: the server-reflexive one, or None; seen: where
    each STUN server sees the socket; nat: "none", "endpoint-independent" or "symmetric" as RFC 4787 tells mappings apart (the latter maps by destination, so
    nobody can be told where to send), "unknown" with a single STUN server to ask, "no answer" if no STUN server answered,
    "not asked" if there is none.
    """

    addresses: List[str]
    mapped: Optional[Address] = None
    nat: str = "not asked"
    seen: Mapping[Address, Address] = field(default_factory=dict)

    def without_loopback(self) -> Candidates:
        """For a server that sees us come from elsewhere: something between us and it, such as Docker, forwards its port to this machine."""
        return dataclasses.replace(self, addresses=[each for each in self.addresses if not is_loopback(each)])

    @property
    def published(self) -> List[Any]:
        """What to tell the server. That a NAT is symmetric, or UDP blocked, is worth knowing to a peer who cannot get through."""
        return [*self.addresses, {"nat": self.nat}] if self.nat in ("symmetric", "no answer") else list(self.addresses)


def open_socket(port: int = 0) -> socket.socket:
    """A UDP socket for both IPv6 and IPv4, or for IPv4 alone where the machine has no IPv6."""
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("::", port))
            return sock
        except OSError:
            sock.close()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    return sock


def plain_ip(text: str) -> Any:
    """The IP address; an IPv4-mapped IPv6 address is the IPv4 one. ValueError if it is none."""
    ip = ipaddress.ip_address(text)
    return getattr(ip, "ipv4_mapped", None) or ip


def plain(address: Any) -> Address:
    """What recvfrom gives, as an Address."""
    return address[0][7:] if address[0].startswith("::ffff:") else address[0], address[1]


def text_of(address: Address) -> str:
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def parse_candidate(text: Any) -> Optional[Address]:
    """The address that a candidate stands for; None if it is of another form, or not to be sent to whoever asks for it:
    multicast, broadcast and unspecified addresses and ports below 1024 (RFC 8445 section 19.5.1)."""
    host, _, port = str(text).rpartition(":")
    if "%" in host or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1024 <= int(port) <= 65535):
        return None     # a zone (%) means something to one machine alone
    try:
        ip = plain_ip(host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host)
    except ValueError:
        return None
    return None if ip.is_multicast or ip.is_unspecified or str(ip) == "255.255.255.255" else (str(ip), int(port))


def send_to(sock: socket.socket, datagram: bytes, address: Address) -> None:
    """Send if there is a way; that there is none shows in the answer that does not come."""
    if sock.family == socket.AF_INET6 and ":" not in address[0]:
        address = ("::ffff:" + address[0], address[1])
    with contextlib.suppress(OSError):
        sock.sendto(datagram, address)


def resolve(servers: Sequence[Address], ipv6: bool = True) -> List[Address]:
    """The IP addresses of servers, all of each; none of those whose name is unknown."""
    found: List[Address] = []
    for host, port in servers:
        with contextlib.suppress(OSError):
            found += [plain(each[4]) for each in socket.getaddrinfo(host, port, 0 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)]
    return [address for address in dict.fromkeys(found) if own_address_towards(address)]


def own_address_towards(address: Address) -> Optional[str]:
    """From which of its addresses this machine reaches another, or None if there is no way. Connecting a UDP socket sends nothing, but has
    the system choose."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
    return None


def gather_addresses(sock: socket.socket, loopback: bool = False, towards: Sequence[Address] = ()) -> List[str]:
    """The candidates of a bound UDP socket that need no help from outside.

    They are the addresses from which this machine reaches the world, and those towards (the rendezvous server); loopback:
    whether to add 127.0.0.1 and ::1, for peers on this very machine.
    """
    ipv6 = sock.family == socket.AF_INET6
    # The first two destinations are of the documentation ranges (RFC 3849, RFC 5737): any behind the default route would do.
    hosts = [host for host in map(own_address_towards, (("2001:db8::1", 9), ("192.0.2.1", 9), *towards)) if host]
    usable = [host for host in dict.fromkeys(hosts) if (ipv6 or ":" not in host) and "%" not in host]
    usable = [host for host in usable if not plain_ip(host).is_loopback and not plain_ip(host).is_link_local]
    if loopback:
        usable = ["127.0.0.1", *(["::1"] if ipv6 else []), *usable]
    return [text_of((host, sock.getsockname()[1])) for host in usable]


def gather_candidates(sock: socket.socket, stun_servers: Sequence[Address] = (), loopback: bool = False) -> Candidates:
    """All candidates of a bound UDP socket that nobody else reads: its own addresses, and where STUN servers see it.

    It takes until every server has answered, 3.5 seconds at the most. Two servers tell what kind the NAT is.
    """
    servers = resolve(stun_servers, sock.family == socket.AF_INET6)
    return candidates_from(gather_addresses(sock, loopback, servers), ask_stun(sock, servers), bool(stun_servers))


def candidates_from(own: List[str], seen: Mapping[Address, Address], asked: bool) -> Candidates:
    """Put together what is known of a socket: its own addresses, and at which STUN servers saw it."""
    mapped = sorted(set(seen.values()), key=lambda address: ":" in address[0])       # IPv4 first: it is where the NATs are
    texts = list(dict.fromkeys(own + [text_of(address) for address in mapped]))[:MAX_CANDIDATES]
    if not mapped:
        nat = "no answer" if asked else "not asked"
    elif len({":" in address[0] for address in mapped}) < len(mapped):      # more than one of a family
        nat = "symmetric"
    elif all(text_of(address) in own for address in mapped):
        nat = "none"
    else:
        nat = "endpoint-independent" if len(seen) > len(mapped) else "unknown"
    return Candidates(texts, mapped[0] if mapped else None, nat, seen)


def ask_stun(sock: socket.socket, servers: Sequence[Address]) -> Dict[Address, Address]:
    """Where each STUN server sees the socket; those that do not answer are missing. An answer counts from the server that was asked."""
    transactions = {secrets.token_bytes(12): server for server in servers}
    seen: Dict[Address, Address] = {}
    deadline, interval, due = Deadline(STUN_PATIENCE), FIRST_RETRANSMISSION, Deadline(0)
    while len(seen) < len(servers) and deadline.left():
        if not due.left():
            for transaction, server in transactions.items():
                if server not in seen:
                    send_to(sock, encode(REQUEST, transaction), server)
            due, interval = Deadline(interval), 2 * interval
        if not is_readable(sock, min(due.left(), deadline.left())):
            continue
        with contextlib.suppress(OSError):
            datagram, source = sock.recvfrom(2048)
            message = decode(datagram)
            address = mapped_address(message) if message and transactions.get(message.transaction) == plain(source) else None
            if address:
                seen[plain(source)] = address
    return seen


def is_readable(sock: socket.socket, seconds: float) -> bool:
    """Whether something has come within seconds. select() itself would not do: games may have a thousand descriptors."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def mapped_address(message: Message) -> Optional[Address]:
    """The address that a Binding success tells."""
    if message.kind != SUCCESS or XOR_MAPPED_ADDRESS not in message.attributes:
        return None
    address = unpack_address(message.attributes[XOR_MAPPED_ADDRESS], message.transaction)
    return address and parse_candidate(text_of(address))


# ---- sessions -------------------------------------------------------------------------------------------------------

CHECK_INTERVAL = 0.05       # seconds between two checks of a session (RFC 8445 section 14.2)
FAST_ROUNDS = 3             # rounds over all addresses, and FAST_CHECKS at least, before it slows down
FAST_CHECKS = 20
SLOW_INTERVAL = 0.17        # seconds: what is left of MAX_CHECKS then lasts for CHECK_TIME
MAX_CHECKS = 100            # a session, so that nobody can have us flood a third party (RFC 8445 section 19.5.1)
CHECK_TIME = 15.0           # seconds until a session that has not connected is given up
FIRST_MOMENTS = 0.3         # seconds in which a guest still prefers a better address
CONSENT_INTERVAL = 5.0      # seconds, times 0.8 to 1.2 (RFC 7675 section 5.1)
CONSENT_TIME = 30.0         # seconds of silence after which the peer is lost (RFC 7675 section 5.1)
STALE_TIME = 10.0           # seconds of silence after which its other addresses are tried again
UNHEARD_CHECKS = 100        # checks at once to one IP address that has not answered yet, over all sessions of a socket,
UNHEARD_INTERVAL = 0.05     # and seconds for one more: whoever lists a third party in many sessions gains nothing
REMEMBERED = 1024           # requests and transactions of a session that are remembered

NO_WAY = "no check got through in both directions"

Sending = Tuple[bytes, Address]


class Session:
    """The checks between one host and one guest. It has no socket and no clock: it is told the time and what came, and returns what to send.

    The guest controls: the address that first answered its check is the one, which it tells the host by nominating it.
    The host follows as soon as its own check to that address was answered. So both know that both directions work.
    """

    def __init__(self, session_id: str, session_key: str, controlling: bool, now: float, consent_interval: float = CONSENT_INTERVAL) -> None:
        self.session_id, self.controlling = session_id, controlling
        self._key = session_key
        self._consent_interval = consent_interval
        self.began = now
        self.remotes: List[Address] = []                # to be checked, most wanted first, MAX_CANDIDATES at most
        self.heard: set[Address] = set()                # an authentic message came from there: so may the game's datagrams
        self.selected: Optional[Address] = None         # where the peer is
        self.local: Optional[Address] = None            # where it sees us
        self.connected_at: Optional[float] = None
        self.rtt: Optional[float] = None                # seconds, of the latest answered check
        self.sent = 0                                   # checks so far, but for those of consent
        self.over = ""                                  # why the session has ended
        self.due = now                                  # when tick() is to be called next
        self._proven: set[Address] = set()              # our check to there was answered
        self._nominated: Optional[Address] = None       # by the guest
        self._confirmed = not controlling               # the host has answered a nomination
        self._triggered: Deque[Address] = collections.deque()
        self._turn = 0                                  # whose turn it is to be checked; below 0 it is the likely one's
        self._last_check = now - CHECK_INTERVAL
        self._last_answer = now                         # when the selected address last answered
        self._next_consent = now
        # Checks that are under way: where they went, when, and whether they nominate.
        self._pending: collections.OrderedDict[bytes, Tuple[Address, float, bool]] = collections.OrderedDict()
        self._requests: collections.OrderedDict[bytes, Address] = collections.OrderedDict()   # that came, by transaction

    def add(self, candidates: Iterable[Any], mapped: Optional[Address] = None) -> None:
        """Learn the peer's addresses from the server. mapped: our own public one: who shares it is a neighbour, whom to try at its first
        address first; everybody else is likely to be where STUN sees him, which is listed last."""
        for address in filter(None, map(parse_candidate, candidates)):
            if address not in self.remotes and len(self.remotes) < MAX_CANDIDATES:
                self.remotes.append(address)
        if not self.sent and mapped and all(host != mapped[0] for host, _ in self.remotes):
            self._turn = -2     # the first check opens our router, and the second may find his open

    def tick(self, now: float) -> List[Sending]:
        """Do what is due."""
        if self.over:
            return []
        if self.selected is None and now - self.began >= CHECK_TIME:
            self.over = NO_WAY
            return []
        if self.selected is not None and now - self._last_answer >= CONSENT_TIME:
            self.over = f"the other player has been silent for {now - self._last_answer:.0f} seconds"
            return []
        sendings = self._consent(now) + self._paced(now)
        self.due = min(self._next_consent if self.selected else self.began + CHECK_TIME, self._next_check(now))
        return sendings

    def receive(self, message: Message, source: Address, now: float) -> List[Sending]:
        """Take a message whose USERNAME or transaction is this session's. What is not authentic changes nothing."""
        if self.over or not authentic(message, self._key):
            return []
        if message.kind == SUCCESS:
            return self._answered(message, source, now)
        # A request or indication of our own role is our own, sent back to us.
        if (ICE_CONTROLLED if self.controlling else ICE_CONTROLLING) not in message.attributes:
            return []
        # Each is good from one address: a copy from another is a replay.
        if self._requests.setdefault(message.transaction, source) != source:
            return []
        trim(self._requests)
        if message.kind == INDICATION:
            self.over = "the other player has left" if source in self.heard else ""
            return []
        return self._requested(message, source, now) if message.kind == REQUEST else []

    def awaits(self, transaction: bytes) -> bool:
        """Whether a check with this transaction is under way."""
        return transaction in self._pending

    def follows(self, earlier: Session) -> None:
        """Go on remembering what came in an earlier session of the same name, so that it cannot be replayed."""
        self._requests = earlier._requests

    def goodbye(self) -> List[Sending]:
        """End the session; the peer is told, if it is there."""
        self.over = self.over or "closed"
        return [(self._encode(INDICATION, secrets.token_bytes(12)), self.selected)] if self.selected else []

    def _requested(self, message: Message, source: Address, now: float) -> List[Sending]:
        answer = encode(SUCCESS, message.transaction, [(XOR_MAPPED_ADDRESS, pack_address(source, message.transaction))], self._key)
        if not self._make_room(source):
            return [(answer, source)]
        self.heard.add(source)
        if USE_CANDIDATE in message.attributes and not self.controlling:
            self._nominated = source
            self._follow(now)
        if source not in self._proven and source not in self._triggered:
            self._triggered.append(source)      # RFC 8445 section 7.3.1.4
        return [(answer, source), *self.tick(now)]

    def _make_room(self, source: Address) -> bool:
        """Have a source among the remotes: one that nobody listed is peer-reflexive (RFC 8445 section 7.3.1.3), and worth more than one that never answered."""
        if source not in self.remotes:
            if len(self.remotes) >= MAX_CANDIDATES:
                silent = [remote for remote in self.remotes if remote not in self.heard and remote not in self._proven]
                if not silent:
                    return False
                self.remotes.remove(silent[-1])
            self.remotes.append(source)
        return True

    def _answered(self, message: Message, source: Address, now: float) -> List[Sending]:
        address, sent_at, nominated = self._pending.get(message.transaction, (None, 0.0, False))
        if address != source or source not in self.remotes:     # RFC 8445 section 7.2.5.2.1: an answer comes from where the check went
            return []
        del self._pending[message.transaction]
        self.rtt, self.local = now - sent_at, mapped_address(message)
        self.heard.add(source)
        newly_proven = source not in self._proven
        self._proven.add(source)
        if source == self.selected:
            self._last_answer = now
            self._confirmed = self._confirmed or nominated
        elif self.controlling and self._is_better(source, newly_proven, now):
            self._select(source, now)
            return self.tick(now)       # which nominates it in its turn
        else:
            self._follow(now)
        return []

    def _is_better(self, address: Address, newly_proven: bool, now: float) -> bool:
        """Whether a guest takes this address: the first, a more wanted one in the first moments, any when the old one went silent."""
        if self.selected is None or self.connected_at is None:
            return True
        if now - self.connected_at <= FIRST_MOMENTS:
            return newly_proven and self.remotes.index(address) < self.remotes.index(self.selected)
        return now - self._last_answer > 1.2 * self._consent_interval

    def _follow(self, now: float) -> None:
        """A host goes where the guest has nominated, once it has proof of its own."""
        if self._nominated in self._proven and self._nominated != self.selected:
            self._select(self._nominated, now)

    def _select(self, address: Optional[Address], now: float) -> None:
        self.selected, self._confirmed, self._last_answer = address, not self.controlling, now
        self._next_consent = now + self._consent_interval
        if self.connected_at is None:
            self.connected_at = now

    def _consent(self, now: float) -> List[Sending]:
        if self.selected is None or now < self._next_consent:
            return []
        self._next_consent = now + self._consent_interval * (0.8 + 0.4 * secrets.randbelow(1000) / 1000)
        return self._check(self.selected, now, cost=0)      # given by the one who is asked, for as long as the game lasts

    def _paced(self, now: float) -> List[Sending]:
        """The next check, if one is due."""
        if now < self._next_check(now):
            return []
        address = self._triggered.popleft() if self._triggered else self._next_in_turn()
        return self._check(address, now)

    def _next_in_turn(self) -> Address:
        if self.selected and not self._confirmed:
            return self.selected
        self._turn += 1
        return self.remotes[-1 if self._turn <= 0 else (self._turn - 1) % len(self.remotes)]

    def _next_check(self, now: float) -> float:
        """When the next check may go out: never more than one for each interval and session, never more than MAX_CHECKS."""
        if self.sent >= MAX_CHECKS or not self.remotes:
            return float("inf")
        if self._triggered or self.selected and not self._confirmed or self._in_first_moments(now):
            return self._last_check + CHECK_INTERVAL
        if self.selected:
            return max(self._last_check + 1.0, self._last_answer + STALE_TIME)
        return self._last_check + (CHECK_INTERVAL if self.sent < max(FAST_CHECKS, FAST_ROUNDS * len(self.remotes)) else SLOW_INTERVAL)

    def _in_first_moments(self, now: float) -> bool:
        """Whether a guest still looks for a better address than the one that answered first."""
        return (self.controlling and self.selected is not None and self.connected_at is not None and now - self.connected_at <= FIRST_MOMENTS
                and any(remote not in self._proven for remote in self.remotes[:self.remotes.index(self.selected)]))

    def _check(self, address: Address, now: float, cost: int = 1) -> List[Sending]:
        transaction, nominate = secrets.token_bytes(12), self.controlling and address == self.selected
        self._pending[transaction] = address, now, nominate
        trim(self._pending)
        self._last_check = now
        self.sent += cost
        return [(self._encode(REQUEST, transaction, nominate), address)]

    def _encode(self, kind: int, transaction: bytes, nominate: bool = False) -> bytes:
        role = (ICE_CONTROLLING if self.controlling else ICE_CONTROLLED, bytes(8))
        attributes = [(USERNAME, self.session_id.encode("utf-8")), role] + ([(USE_CANDIDATE, b"")] if nominate else [])
        return encode(kind, transaction, attributes, self._key)


def trim(memory: collections.OrderedDict[Any, Any]) -> None:
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


# ---- connections ----------------------------------------------------------------------------------------------------

KEEPALIVE = 15.0        # seconds between two questions to the STUN servers; routers should keep a mapping for two minutes (RFC 4787 REQ-5), and many do not
MAX_DATAGRAM = 1200     # bytes that every path carries unfragmented, headers and all
INBOX = 1024            # datagrams that wait for recv(); older ones are dropped


class ConnectFailed(Exception):
    """No way to the other player was found. reason: what was seen; advice: what would help."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}. {advice}".strip(" ") if advice else reason)
        self.reason, self.advice = reason, advice


class PeerLost(ConnectionError):
    """The connection has ended: the other player left or fell silent, or it was closed here."""


class Connection:
    """Datagrams to and from one other player. As with UDP some may be lost, doubled or overtaken; none comes from a stranger who
    is not on the path. All methods may be called from any thread."""

    def __init__(self, endpoint: Endpoint, session: Session, lock: threading.RLock) -> None:
        self._endpoint, self._session = endpoint, session
        self._inbox: Deque[bytes] = collections.deque(maxlen=INBOX)
        self._announced = False                         # who waits for it to connect has been told
        self._changed = threading.Condition(lock)       # on the endpoint's lock: a datagram came, it connected, or it is over
        self._owns_endpoint = False

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def remote_address(self) -> str:
        """Where the other player is, "ip:port"; it may change while a connection lasts."""
        return text_of(self._session.selected) if self._session.selected else ""

    @property
    def local_address(self) -> str:
        """Where the other player sees this one, "ip:port"."""
        return text_of(self._session.local) if self._session.local else ""

    @property
    def rtt(self) -> float:
        """Round-trip time in seconds, as of the latest check."""
        return self._session.rtt or 0.0

    @property
    def connect_time(self) -> float:
        """Seconds from when this side knew the other's addresses until it was connected."""
        return (self._session.connected_at or self._session.began) - self._session.began

    def send(self, datagram: bytes) -> None:
        """Send up to 1200 bytes. PeerLost: it has ended. ValueError: too long, or it reads as a STUN message."""
        if len(datagram) > MAX_DATAGRAM:
            raise ValueError(f"a datagram has at most {MAX_DATAGRAM} bytes, not {len(datagram)}")
        if decode(datagram):
            raise ValueError("the datagram reads as a STUN message")
        with self._changed:
            if self._session.over or not self._session.selected:
                raise PeerLost(self._session.over or "not connected")
            send_to(self._endpoint.socket, datagram, self._session.selected)

    def recv(self, timeout: Optional[float] = None) -> bytes:
        """The next datagram. TimeoutError after timeout seconds; PeerLost: it has ended, and all that came was read."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._session.over, timeout)
            if self._inbox:
                return self._inbox.popleft()
            if self._session.over:
                raise PeerLost(self._session.over)
            raise TimeoutError(f"no datagram came for {timeout} seconds")

    def close(self) -> None:
        """Say good-bye and end."""
        self._endpoint.end(self)
        if self._owns_endpoint:
            self._endpoint.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
        self._unheard: collections.OrderedDict[str, float] = collections.OrderedDict()  # IP addresses, and when each has all its UNHEARD_CHECKS again
        self._asked: Dict[bytes, Address] = {}                  # STUN servers, by the transaction that asks them
        self._seen: Dict[Address, Address] = {}                 # where they see us, as far as they have answered this time
        self._closed = False
        self._waker, self._wakened = socket.socketpair()        # a byte through these ends the thread's waiting
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._thread.start()

    def expect(self, guest: Guest) -> None:
        """Begin to connect with a guest that a poll told of; accept() returns it when that has worked. To do so again is to learn its new addresses."""
        self._begin(guest.session_id, guest.session_key, guest.addresses, controlling=False)

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
            session = connection._session
            connection._changed.wait_for(lambda: session.selected or session.over)
            if session.selected:
                return connection
            raise why_not(session, self.candidates, start.addresses)

    def end(self, connection: Connection) -> None:
        """End one connection."""
        with self._lock:
            self._send(connection._session.goodbye())
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
            connection._session.add((address for address in addresses if self._loopback or not is_loopback(address)), self.candidates.mapped)
            self._send_for(connection._session, connection._session.tick(now), now)
        self._wake()
        return connection

    def _retire(self, connection: Connection) -> None:
        """Forget a session that is over, and wake who waits for it."""
        if self._connections.pop(connection.session_id, None):
            self._ended[connection.session_id] = connection._session
            trim(self._ended)
        connection._changed.notify_all()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b".")

    def _send(self, sendings: Iterable[Sending]) -> None:
        for datagram, address in sendings:
            send_to(self.socket, datagram, address)

    def _send_for(self, session: Session, sendings: Iterable[Sending], now: float) -> None:
        """Send what a session has to send, but for checks too many to who has not been heard."""
        self._send(each for each in sendings if each[1] in session.heard or self._may_bother(each[1][0], now))

    def _may_bother(self, host: str, now: float) -> bool:
        """A token bucket for each IP address."""
        full_at = max(self._unheard.pop(host, 0.0), now) + UNHEARD_INTERVAL
        allowed = full_at <= now + UNHEARD_CHECKS * UNHEARD_INTERVAL
        self._unheard[host] = full_at if allowed else full_at - UNHEARD_INTERVAL
        trim(self._unheard)
        return allowed

    def _run(self) -> None:
        """The thread: wait for datagrams until something is due, do it, and so on. However it ends, nobody waits for it for ever."""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.socket, selectors.EVENT_READ)
                selector.register(self._wakened, selectors.EVENT_READ)
                while not self._closed:
                    with self._lock:
                        pause = self._do_what_is_due(time.monotonic())
                    readable = [key.fileobj for key, _ in selector.select(pause)]
                    if self._wakened in readable:
                        self._wakened.recv(4096)
                    if self.socket in readable:
                        self._read()
        finally:
            with self._lock:
                self._closed = True
                for connection in list(self._connections.values()):
                    connection._session.over = connection._session.over or "the endpoint has failed"
                    self._retire(connection)
                self._accepted.notify_all()
            for each in (self.socket, self._waker, self._wakened):
                each.close()

    def _do_what_is_due(self, now: float) -> float:
        """Seconds until the next thing is due."""
        if now >= self._next_keepalive:
            self._next_keepalive = now + self._keepalive
            self._ask_where_we_are()
        for connection in list(self._connections.values()):
            session = connection._session
            if session.due <= now:
                self._send_for(session, session.tick(now), now)
            self._notice(connection)
        return max(0.0, min([self._next_keepalive, *(connection._session.due for connection in self._connections.values())]) - now)

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
                if source in connection._session.heard:
                    connection._inbox.append(datagram)
                    connection._changed.notify()
                    return
        elif message.transaction in self._asked:
            self._learn_where_we_are(message, source)
        elif message.fingerprint:
            self._take_check(message, source)

    def _take_check(self, message: Message, source: Address) -> None:
        name = message.attributes.get(USERNAME, b"").decode("utf-8", "replace")
        if message.kind == SUCCESS:     # it bears no USERNAME (RFC 8445 section 7.3), the transaction tells whose it is
            candidates = [connection for connection in self._connections.values() if connection._session.awaits(message.transaction)]
        else:
            candidates = [self._connections[name]] if name in self._connections else []
        for connection in candidates:
            now = time.monotonic()
            self._send_for(connection._session, connection._session.receive(message, source, now), now)
            self._notice(connection)

    def _notice(self, connection: Connection) -> None:
        """Pass on what has become of a session."""
        session = connection._session
        if session.selected and not connection._announced:
            connection._announced = True
            connection._changed.notify_all()
            if not session.controlling:
                self._backlog.append(connection)
                self._accepted.notify()
        if session.over:
            if not session.selected and not session.controlling:
                self._report(f"a guest could not be reached: {session.over}")
            self._retire(connection)

    def _ask_where_we_are(self) -> None:
        """Ask the STUN servers again: that keeps the router's mapping alive, and tells when it has changed."""
        if self._seen:
            self._conclude_where_we_are()
        self._asked = {secrets.token_bytes(12): server for server in self._stun_servers}
        self._send((encode(REQUEST, transaction), server) for transaction, server in self._asked.items())

    def _learn_where_we_are(self, message: Message, source: Address) -> None:
        address = mapped_address(message)
        if address and self._asked[message.transaction] == source:
            del self._asked[message.transaction]
            self._seen[source] = address
            if not self._asked:
                self._conclude_where_we_are()

    def _conclude_where_we_are(self) -> None:
        """All answers count together: one of them alone would make a NAT that has just forgotten us look symmetric."""
        before, own = self.candidates, gather_addresses(self.socket, self._loopback, self._stun_servers)
        self.candidates = candidates_from(own, self._seen, True)
        self._seen = {}
        if self.candidates.mapped and self.candidates.mapped != before.mapped:
            self._report(f"the public address is now {text_of(self.candidates.mapped)}")
        if self.candidates.addresses != before.addresses:
            self._moved()


def is_loopback(candidate: Any) -> bool:
    address = parse_candidate(candidate)
    return address is not None and bool(plain_ip(address[0]).is_loopback)


RELAY = "What would help: a port forwarded on the router of one of you, IPv6 on both sides, or a relay (TURN)."


def why_not(session: Session, own: Candidates, published: Iterable[Any]) -> ConnectFailed:
    """Why a guest did not reach its host, as far as can be told from what was seen."""
    told = [each.get("nat") for each in published if isinstance(each, dict)]
    yours, hosts = own.nat == "symmetric", "symmetric" in told
    advice = "What would help: a port forwarded on the router of one of you, IPv6 on both sides, or a relay (TURN)."
    if session.over != NO_WAY:
        reason, advice = session.over, ""
    elif own.nat == "no answer":
        reason = "no UDP datagram comes back to you, not even from the STUN server"
        advice = "A firewall or router seems to block UDP: try another network, or a relay (TURN)."
    elif "no answer" in told:
        reason = "the host never answered, nor does any STUN server answer it"
        advice = "Its firewall or router seems to block UDP: it might try another network, or a relay (TURN)."
    elif yours and hosts:
        reason = "both routers give each destination another port (symmetric NAT), so neither of you can be told where to send"
    elif yours or hosts:
        whose, others = ("your", "the host's") if yours else ("the host's", "your")
        reason = f"{whose} router gives each destination another port (symmetric NAT), and {others} router lets in only ports it knows"
    elif session.heard:
        reason = "the host's datagrams came, but yours did not arrive"
    else:
        reason = "the host never answered"
        advice = f"It may be gone, or its network may block UDP. {advice}"
    evidence = f"{session.sent} checks to {', '.join(map(text_of, session.remotes)) or 'no usable address'}; heard from {len(session.heard)} of these"
    return ConnectFailed(f"{reason} ({evidence})", advice)


# ---- games ----------------------------------------------------------------------------------------------------------

FAILED_PAUSE = 2.0  # seconds before a host tries a server again that does not serve it
RETURN_TIME = 3 * FAILED_PAUSE      # seconds that a guest gives its host to come back after a restart of the server
WAIT = 25.0     # seconds for which servers are asked to hold a call until there is news


class HostedGame:
    """A game on offer, and the guests that connect to it. A thread polls, held by the server until there is news, or at its pace if it
    does not hold polls, and connects who comes.

    client: for this game alone; stun_servers: (host, port) each, the rendezvous server itself if not given; keepalive: seconds;
    report: takes a line for each thing that happens. RendezvousError from the constructor: the name is taken, or so.
    """

    def __init__(self, client: RendezvousClient, name: str, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None,
                 stun_servers: Optional[Sequence[Address]] = None, keepalive: float = KEEPALIVE,
                 report: Callable[[str], None] = log.info) -> None:
        self._peer_id = new_peer_id()
        self._client, self._report = client, report
        self._closed = threading.Event()
        self._generation = 0        # of the thread that polls; an earlier one ends when it notices
        self.name = client.register_game(name, self._peer_id, info, listed).name
        try:
            self.endpoint = Endpoint(default_stun(client, stun_servers), client.on_loopback, keepalive=keepalive, report=report, moved=self._poll_anew)
        except BaseException:       # Ctrl-C while it gathers
            with contextlib.suppress(RendezvousError):
                client.delete_game(self.name, self._peer_id)
            raise
        self._poll_anew()

    def accept(self, timeout: Optional[float] = None) -> Connection:
        """The next guest that has connected. TimeoutError; PeerLost: the game is closed."""
        return self.endpoint.accept(timeout)

    def update(self, new_name: Optional[str] = None, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None) -> None:
        """Rename or describe the game. RendezvousError."""
        self.name = self._client.update_game(self.name, self._peer_id, new_name, info, listed).name

    def close(self) -> None:
        """End the game: it is deleted at the server, and its connections are closed."""
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(RendezvousError):
                self._client.delete_game(self.name, self._peer_id)      # which answers the poll that the server holds
        self._thread.join(5.0)
        self.endpoint.close()

    def __enter__(self) -> HostedGame:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _poll_anew(self) -> None:
        """Poll in a new thread. When our addresses have changed the server is to know at once, and the answer to the poll that it holds may
        never come: a router that forgot the mappings of UDP has forgotten our connection to the server too."""
        self._generation += 1
        self._thread = threading.Thread(target=self._run, args=(self._generation,), name="host", daemon=True)
        self._thread.start()

    def _run(self, generation: int) -> None:
        cursor, reachable, pause = None, True, 2.0
        while not self._closed.is_set() and generation == self._generation:
            began, name = time.monotonic(), self.name
            try:
                poll = self._client.poll_game(name, self._peer_id, self.endpoint.candidates.published, after=cursor, wait=WAIT)
            except RendezvousError as error:
                pause = max(FAILED_PAUSE, error.retry_after)
                if self._closed.is_set() or generation != self._generation:
                    return
                if self.name != name:       # it was renamed meanwhile
                    continue
                if "addresses" in error.errors and self.endpoint.leave_loopback():
                    pause = 0.0
                    continue
                if error.status in (400, 403, 409):     # the name is somebody else's now, or we are not understood
                    self._report(f"the game is lost: {error}")
                    self._closed.set()
                    self.endpoint.close()
                    return
                if reachable:
                    self._report(f"{error}; trying again")
                reachable = False
            else:
                if not reachable:
                    self._report("the server is back")
                reachable, cursor, self.name = True, poll.cursor, poll.name if self.name == name else self.name
                for guest in poll.guests:
                    self.endpoint.expect(guest)
                # Who was held can ask again at once, unless the server holds polls in name only.
                held = poll.waited and (poll.guests or time.monotonic() - began > 1)
                pause = 0.0 if held else poll.poll_after
            self._closed.wait(pause)


def join_game(client: RendezvousClient, name: str, stun_servers: Optional[Sequence[Address]] = None, timeout: float = 30.0,
              endpoint: Optional[Endpoint] = None) -> Connection:
    """Connect with the host of a game. Seconds of timeout are for the host to publish addresses; the checks then have 15.

    RendezvousError: no such game, or so; ConnectFailed says why there is no way.
    """
    own = endpoint or Endpoint(default_stun(client, stun_servers), client.on_loopback)
    try:
        peer_id, deadline = new_peer_id(), Deadline(timeout)
        try:
            start = client.start_game(name, peer_id, own.candidates.published, min(WAIT, timeout))
        except RendezvousError as error:
            if "addresses" not in error.errors or not own.leave_loopback():
                raise
            start = client.start_game(name, peer_id, own.candidates.published, min(WAIT, timeout))
        while not start.addresses:
            pause = 0.0 if start.waited else start.poll_after
            if pause >= deadline.left():
                raise ConnectFailed("the host has published no address", "It is registered, but does not poll: it may just have crashed.")
            time.sleep(pause)
            start = start_again(client, start.name, peer_id, own.candidates.published, min(WAIT, deadline.left()))
        connection = connect_or_explain(client, own, start)
        connection._owns_endpoint = endpoint is None
        return connection
    except BaseException:
        if endpoint is None:
            own.close()
        raise


def start_again(client: RendezvousClient, name: str, peer_id: str, addresses: Sequence[str], wait: float) -> Start:
    """A start of a game that was there before. A server that was restarted may not have it yet: its host comes back within seconds."""
    deadline = Deadline(RETURN_TIME)
    while True:
        try:
            return client.start_game(name, peer_id, addresses, wait)
        except RendezvousError as error:
            if error.status != 404 or not deadline.left():
                raise
        time.sleep(0.5)


def connect_or_explain(client: RendezvousClient, endpoint: Endpoint, start: Start) -> Connection:
    try:
        return endpoint.connect(start)
    except ConnectFailed as failure:
        with contextlib.suppress(RendezvousError):
            client.get_game(start.name)
            raise
        raise ConnectFailed("the host is gone: its game is no longer offered") from failure


def default_stun(client: RendezvousClient, stun_servers: Optional[Sequence[Address]]) -> Sequence[Address]:
    return [client.stun_server] if stun_servers is None else stun_servers


# ---- command line ---------------------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """A name from the network, safe for a terminal: what does not print (newlines, escapes, changes of direction) is written as an escape."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii") for character in text)


NAT_KINDS = {
    "none": "there is no NAT",
    "endpoint-independent": "the NAT keeps one port for all destinations: good",
    "symmetric": "the NAT gives each destination another port (symmetric): only hosts and guests with an easier one can connect with you",
    "unknown": "there is a NAT; with a second --stun server its kind can be told",
    "no answer": "no STUN server answers",
    "not asked": "no STUN server was asked",
}


def seconds(text: str) -> float:
    """A number of seconds. For argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def describe(candidates: Candidates) -> str:
    """Candidates and NAT kind in a line."""
    return f"candidates {', '.join(candidates.addresses) or 'none'}; {NAT_KINDS[candidates.nat]}"


def parse_server(text: str) -> Address:
    """HOST:PORT, [IPV6]:PORT or HOST with STUN's port 3478. For argparse."""
    parts = urllib.parse.urlsplit("//" + text)
    try:
        port = parts.port or 3478
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return parts.hostname, port


def check_server(base_url: str, stun_servers: Optional[Sequence[Address]] = None, report: Callable[[str], None] = print) -> bool:
    """Try each thing that a game needs from a server and from this machine's network, and report each in a line. Whether all is well."""
    client = RendezvousClient(base_url, patience=2.0)
    began = time.monotonic()
    try:
        health = client.health()
    except RendezvousError as error:
        report(f"FAILED  HTTP: {error}. Is the server started, the port open (TCP), the URL right?")
        return False
    report(f"ok      HTTP: p2pserver {health['version']} at {client.base_url} answers in {1000 * (time.monotonic() - began):.0f} ms")
    servers = default_stun(client, stun_servers)
    endpoint = Endpoint(servers, client.on_loopback)
    found = endpoint.candidates
    if found.mapped:
        report(f"ok      STUN: you are seen at {text_of(found.mapped)}")
    else:
        report(f"FAILED  STUN: no answer from {', '.join(map(text_of, servers))}. "
               "Is that port open for UDP, STUN not on another one (--stun), UDP not blocked here?")
    report(f"{'ok     ' if found.nat not in ('symmetric', 'no answer') else 'FAILED '} NAT: {describe(found)}")
    try:
        with HostedGame(client, f"check {secrets.token_hex(4)}", listed=False, stun_servers=servers) as game, \
                join_game(RendezvousClient(base_url), game.name, endpoint=endpoint) as connection:
            connection.send(b"hello")
            game.accept(5.0).recv(5.0)
            report(f"ok      CONNECTION: a host and a guest met and talked over {connection.remote_address}, round trip {1000 * connection.rtt:.1f} ms")
    except (RendezvousError, ConnectFailed, ConnectionError, TimeoutError) as error:
        report(f"FAILED  CONNECTION: {error}")
        return False
    finally:
        endpoint.close()
    return found.mapped is not None


def main(arguments: Optional[List[str]] = None) -> int:
    """Exit status 0: all is well; 1: something is not; 2: bad usage."""
    parser = argparse.ArgumentParser(prog="p2pclient", description="The client side of p2pserver; as a program, a doctor.")
    check = parser.add_subparsers(required=True, metavar="check").add_parser("check", help="try whether games can use a server from here")
    check.add_argument("--server", default="http://localhost:8000", metavar="URL", help="the rendezvous server (default: %(default)s)")
    check.add_argument("--stun", type=parse_server, action="append", metavar="HOST:PORT", help="a STUN server, repeatable (default: the rendezvous server)")
    options = parser.parse_args(arguments)
    try:
        return 0 if check_server(options.server, options.stun) else 1
    except KeyboardInterrupt:
        return 1
    except ValueError as error:
        parser.error(f"--server {error}")


if __name__ == "__main__":
    sys.exit(main())
