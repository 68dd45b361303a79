"""The candidates of a socket, which are the addresses at which it may be reached, and the kind of the NAT before it."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

from .addresses import Address, Sending, is_loopback, plain, plain_ip, text_of
from .deadline import Deadline
from .sockets import is_readable, own_address_towards, resolve, send_to
from .stun import REQUEST, Message, decode, encode, mapped_address

MAX_CANDIDATES = 8          # of our own, and of a peer's that are checked
FIRST_RETRANSMISSION = 0.5  # seconds, doubling (RFC 8489 section 6.2.1)
STUN_PATIENCE = 3.5         # seconds: three transmissions; a player does not wait for RFC 8489's seven


@dataclass(frozen=True)
class Candidates:
    """The addresses at which a socket may be reached.

    addresses: "ip:port" and "[ipv6]:port", most wanted first, at most 8; mapped: the server-reflexive one, or None; seen: where
    each STUN server sees the socket; nat: "none", "endpoint-independent" or "symmetric" as RFC 4787 tells mappings apart (the latter
    maps by destination, so nobody can be told where to send), "unknown" with a single STUN server to ask, "no answer" if no
    STUN server answered, "not asked" if there is none.
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


def gather_candidates(sock: socket.socket, stun_servers: Sequence[Address] = (), loopback: bool = False) -> Candidates:
    """All candidates of a bound UDP socket that nobody else reads: its own addresses, and where STUN servers see it.

    It takes until every server has answered, 3.5 seconds at the most. Two servers tell what kind the NAT is.
    """
    servers = resolve(stun_servers, sock.family == socket.AF_INET6)
    return candidates_from(gather_addresses(sock, loopback, servers), ask_stun(sock, servers), bool(stun_servers))


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


class StunQuery:
    """One Binding request to each of some STUN servers, without socket or clock. seen: where those that have answered see us."""

    def __init__(self, servers: Iterable[Address]) -> None:
        self.seen: Dict[Address, Address] = {}
        self._waiting = {secrets.token_bytes(12): server for server in servers}

    @property
    def complete(self) -> bool:
        """Whether every server has answered."""
        return not self._waiting

    def requests(self) -> List[Sending]:
        """What to send, and to send again: to the servers that have not answered."""
        return [(encode(REQUEST, transaction), server) for transaction, server in self._waiting.items()]

    def awaits(self, transaction: bytes) -> bool:
        return transaction in self._waiting

    def receive(self, message: Message, source: Address) -> None:
        """Take an answer. It counts from the server that was asked."""
        address = mapped_address(message)
        if address and self._waiting.get(message.transaction) == source:
            del self._waiting[message.transaction]
            self.seen[source] = address


def ask_stun(sock: socket.socket, servers: Sequence[Address]) -> Dict[Address, Address]:
    """Where each STUN server sees the socket; those that do not answer are missing."""
    query = StunQuery(servers)
    deadline, interval, due = Deadline(STUN_PATIENCE), FIRST_RETRANSMISSION, Deadline(0)
    while not query.complete and deadline.left():
        if not due.left():
            for datagram, server in query.requests():
                send_to(sock, datagram, server)
            due, interval = Deadline(interval), 2 * interval
        if not is_readable(sock, min(due.left(), deadline.left())):
            continue
        with contextlib.suppress(OSError):
            datagram, source = sock.recvfrom(2048)
            message = decode(datagram)
            if message:
                query.receive(message, plain(source))
    return query.seen
