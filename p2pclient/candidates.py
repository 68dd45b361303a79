"""The candidates of a socket, which are the addresses at which it may be reached, and the kind of the NAT before it; and those of a peer."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from .addresses import Address, Sending, is_loopback, parse_candidate, plain_ip, private_network, text_of
from .checklist import MAX_CHECKED
from .deadline import Deadline
from .pacing import DEFAULT_PACING, LEAST_PACING
from .prediction import Ports
from .sockets import SOMEWHERE, Nat64, interface_addresses, is_readable, own_address_towards, plain_source, send_to
from .stun import REQUEST, Message, decode, encode, mapped_address

MAX_CANDIDATES = 8          # of our own
FIRST_RETRANSMISSION, LAST_RETRANSMISSION = 0.5, 1.0    # seconds, doubling from the one to the other (RFC 8489 section 6.2.1 doubles six times)
STUN_PATIENCE = 3.5         # seconds: four transmissions; a player does not wait for RFC 8489's seven
# Once a server has answered, the others are asked again after twice the time that it took, within these bounds in seconds; and they have three times
# that in all, so that one that is down holds nobody up.
LEAST_RESEND, OTHERS_RESEND = 0.02, 0.1


@dataclass(frozen=True)
class Candidates:
    """The addresses at which a socket may be reached.

    addresses: "ip:port" and "[ipv6]:port", most wanted first, at most 8; mapped: the server-reflexive one, or None; seen: where
    each STUN server sees the socket; nat: "none", "endpoint-independent" or "symmetric" as RFC 4787 tells mappings apart (the latter
    maps by destination, so nobody can be told where to send), "unknown" with a single STUN server to ask or one behind our own router,
    "no answer" if no STUN server answered, "not asked" if there is none. attempt: another text for each try of a guest, so that what it
    publishes is news to its host even if its addresses are not, and its host knows it when a restarted server has lost the session. ports: how a
    symmetric NAT allocates them, once that is known; probing: whether this player has asked for it. relay: where a relay stands by, "ip:port", or "".
    is_certain: a second socket has shown that it is no chance if the two servers see one port; it is among few where a router chooses in a block.
    """

    addresses: List[str]
    mapped: Optional[Address] = None
    nat: str = "not asked"
    seen: Mapping[Address, Address] = field(default_factory=dict)
    attempt: str = ""
    ports: Optional[Ports] = None
    probing: bool = False
    relay: str = ""
    is_certain: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether further sockets have shown what they can: how a symmetric NAT allocates ports, and that an endpoint-independent one is no chance."""
        return {"symmetric": self.ports is not None, "endpoint-independent": self.is_certain}.get(self.nat, True)

    @property
    def is_closed(self) -> bool:
        """Whether the world of IPv4 reaches us directly where STUN has seen us, and nowhere else: no port is forwarded."""
        seen = set(self.seen.values())
        return all(address in seen for address in public_ipv4(map(parse_candidate, self.addresses)))

    def without_loopback(self) -> Candidates:
        """For a server that sees us come from elsewhere: something between us and it, such as Docker, forwards its port to this machine."""
        return dataclasses.replace(self, addresses=[each for each in self.addresses if not is_loopback(each)])

    @property
    def published(self) -> List[Any]:
        """What to tell the server: the addresses, and what a peer may know beside, which others ignore: {"p2p": {"pacing": milliseconds between
        two of our checks, as RFC 8839's ice-pacing, "nat", "attempt", "ports", "probing" and "relay": as above}}. Who can be reached otherwise
        tells no ports."""
        about: Dict[str, Any] = {"pacing": round(1000 * LEAST_PACING), "nat": self.nat}
        about.update({name: text for name, text in (("attempt", self.attempt), ("relay", self.relay)) if text})
        if self.ports and self.nat == "symmetric" and self.is_closed:
            about["ports"] = self.ports.published
        if self.probing:
            about["probing"] = True
        return [*self.addresses, *filter(None, [self.relay]), {"p2p": about}]


@dataclass(frozen=True)
class PeerCandidates:
    """What a peer has published, as far as it is of use. addresses: to be checked, likeliest first, at most 16; pacing: in seconds; nat: as in
    Candidates, or ""; attempt, ports, probing: likewise; relay: the one of these addresses that is a relay's, the last of all."""

    addresses: List[Address]
    pacing: float = DEFAULT_PACING
    nat: str = ""
    attempt: str = ""
    ports: Optional[Ports] = None
    probing: bool = False
    relay: Optional[Address] = None


def read_published(published: Iterable[Any], own: Candidates, loopback: bool) -> PeerCandidates:
    """Take what a peer has published. Left out are loopback addresses unless loopback, and those in private networks that this machine is not in."""
    published = list(published)
    hosts = [address[0] for address in map(parse_candidate, own.addresses) if address]
    networks = set(map(private_network, hosts))
    found = [address for address in map(parse_candidate, published) if address and (loopback or not plain_ip(address[0]).is_loopback)]
    usable = [address for address in dict.fromkeys(found) if private_network(address[0]) in ("", *networks)]
    # Who shares our public address is a neighbour, whose private address is the best; so may be anybody as long as we do not know ours.
    is_neighbour = own.mapped is None or any(address[0] == own.mapped[0] for address in usable)
    has_ipv6 = any(":" in host and not private_network(host) for host in hosts)
    about = told_beside(published)
    relay = parse_candidate(about.get("relay"))

    def unlikelihood(address: Address) -> int:
        if address == relay:
            return 6
        if plain_ip(address[0]).is_loopback:
            return 0
        if private_network(address[0]):
            return 1 if is_neighbour else 4
        return 3 if ":" not in address[0] else 2 if has_ipv6 else 5

    likeliest = sorted(usable, key=unlikelihood)[:MAX_CHECKED]
    ports, probing = Ports.of(about.get("ports")), about.get("probing") is True
    return PeerCandidates(likeliest, *about_peer(published), ports, probing, relay if relay in likeliest else None)


def told_beside(published: Iterable[Any]) -> Dict[str, Any]:
    """The object among the addresses in which a peer tells of itself; empty if there is none."""
    return next((each["p2p"] for each in published if isinstance(each, dict) and isinstance(each.get("p2p"), dict)), {})


def public_ipv4(found: Iterable[Optional[Address]]) -> List[Address]:
    """Those of some addresses to which a NAT of IPv4 leads."""
    return [address for address in found if address and ":" not in address[0] and not private_network(address[0]) and not plain_ip(address[0]).is_loopback]


def about_peer(published: Sequence[Any]) -> Tuple[float, str, str]:
    """Pacing in seconds, kind of NAT and attempt, as a peer has published them; what is missing or odd is as if it had said nothing."""
    about = told_beside(published)
    pacing, nat, attempt = (about.get(name) for name in ("pacing", "nat", "attempt"))
    if not isinstance(pacing, (int, float)) or isinstance(pacing, bool) or not 0 < pacing <= 1000:
        pacing = 1000 * DEFAULT_PACING
    return pacing / 1000, nat if isinstance(nat, str) else "", attempt[:64] if isinstance(attempt, str) else ""


def gather_addresses(sock: socket.socket, loopback: bool = False, towards: Sequence[Address] = ()) -> List[str]:
    """The candidates of a bound UDP socket that need no help from outside, most wanted first.

    They are the addresses from which this machine reaches the world and those towards (the rendezvous server), then those of its other
    interfaces; of both the global IPv6 ones first. loopback: whether to add 127.0.0.1 and ::1, for peers on this very machine.
    """
    ipv6 = sock.family == socket.AF_INET6
    ways = [host for host in map(own_address_towards, (*SOMEWHERE, *towards)) if host]
    others = sorted(interface_addresses(), key=lambda host: ":" not in host or bool(private_network(host)))
    usable = [host for host in dict.fromkeys(ways + others) if (ipv6 or ":" not in host) and "%" not in host]
    usable = [host for host in usable if not plain_ip(host).is_loopback and not plain_ip(host).is_link_local]
    if loopback:
        usable = ["127.0.0.1", *(["::1"] if ipv6 else []), *usable]
    return [text_of((host, sock.getsockname()[1])) for host in usable]


def candidates_from(own: Sequence[str], seen: Mapping[Address, Address], asked: bool, public: Sequence[str] = ()) -> Candidates:
    """Put together what is known of a socket: its own addresses, at which STUN servers saw it, and those that are forwarded to it."""
    mapped = sorted(set(seen.values()), key=lambda address: (":" in address[0], address))      # IPv4 first: it is where the NATs are
    outside = list(dict.fromkeys([*public, *map(text_of, mapped)]))[:MAX_CANDIDATES // 2]
    texts = list(dict.fromkeys([*own[:MAX_CANDIDATES - len(outside)], *outside]))
    return Candidates(texts, mapped[0] if mapped else None, nat_kind(own, seen) if mapped else "no answer" if asked else "not asked", seen)


def nat_kind(own: Sequence[str], seen: Mapping[Address, Address]) -> str:
    """What STUN's answers tell of the NAT. Servers that are reached from different addresses of ours say nothing of each other's."""
    if any(private_network(mapped[0]) for mapped in seen.values()):
        return "unknown"        # that server is behind the same router
    if all(text_of(mapped) in own for mapped in seen.values()):
        return "none"
    groups: Dict[Any, List[Address]] = {}
    for server, mapped in seen.items():
        groups.setdefault((":" in mapped[0], own_address_towards(server)), []).append(mapped)
    if any(len(set(group)) > 1 for group in groups.values()):
        return "symmetric"
    return "endpoint-independent" if any(len(group) > 1 for group in groups.values()) else "unknown"


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


def ask_stun(sock: socket.socket, servers: Sequence[Address], nat64: Optional[Nat64] = None) -> Dict[Address, Address]:
    """Where each STUN server sees the socket; those that do not answer are missing."""
    query = StunQuery(servers)
    deadline, interval, due, began = Deadline(STUN_PATIENCE), FIRST_RETRANSMISSION, Deadline(0), time.monotonic()
    while not query.complete and deadline.left():
        if not due.left():
            for datagram, server in query.requests():
                send_to(sock, datagram, server, nat64)
            due, interval = Deadline(interval), min(2 * interval, LAST_RETRANSMISSION)
        if not is_readable(sock, min(due.left(), deadline.left())):
            continue
        with contextlib.suppress(OSError):
            datagram, source = sock.recvfrom(2048)
            message, before = decode(datagram), len(query.seen)
            if message:
                query.receive(message, plain_source(source, nat64))
            if len(query.seen) > before:
                interval = min(max(2 * (time.monotonic() - began), LEAST_RESEND), OTHERS_RESEND)
                deadline, due = Deadline(min(deadline.left(), 3 * interval)), Deadline(interval)
    return query.seen
