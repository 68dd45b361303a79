"""The connectivity checks of one session, after ICE (RFC 8445), without socket or clock.

docs/WIRE.md has the messages. A good-bye counts if its P2P has the nonces of both sides. A stock agent's check has no P2P, and then its answer
has none; for its own role in a check it may get 487 (RFC 8445 section 7.3.1.1), and it gets no good-byes.
"""

from __future__ import annotations

import collections
import secrets
import struct
from typing import Iterable, List, Optional, Set, Tuple

from . import stun
from .addresses import Address, Sending
from .channel import NO_NONCE, Channel, Mark
from .checklist import MAX_CHECKS, Check, Checklist
from .pacing import DEFAULT_PACING, Pace, trim

CHECK_INTERVAL = 0.05       # seconds between two checks of a session to who has not been heard (RFC 8445 section 14.2),
SECOND_INTERVAL = 0.01      # but for the second: the first opens our router, and the second may find the peer's open
FAST_ROUNDS = 3             # rounds over all addresses, and FAST_CHECKS at least, before it slows down
FAST_CHECKS = 20
SLOW_INTERVAL = 0.17        # seconds: what is left of MAX_CHECKS then lasts for CHECK_TIME
CHECK_TIME = 15.0           # seconds until a session that has not connected is given up
FIRST_MOMENTS = 0.3         # seconds in which a guest still prefers a better address
CONSENT_INTERVAL = 5.0      # seconds, times 0.8 to 1.2 (RFC 7675 section 5.1)
CONSENT_TIME = 40.0         # seconds of silence after which the peer is lost; RFC 7675 section 5.1 has 30, too few to find each other again
SILENT_TIME = 7.0           # seconds of silence after which all its addresses are tried again,
SILENT_INTERVAL = 0.5       # and seconds between these checks
UNHEARD_TIME = 2.0          # seconds in which a host is expected to answer
PEER_REFLEXIVE = struct.pack(">I", (110 << 24) + (65535 << 8) + 255)        # RFC 8445 section 5.1.2.1

NO_WAY = "no check got through in both directions"
LEFT = "the other player has left"
BEGUN_ANEW = "the other player has begun anew"


class Session:
    """The checks between one host and one guest. It has no socket and no clock: it is told the time and what came, and returns what to send.

    The guest controls: the address that first answered its check is the one, which it tells the host by nominating it. The host follows as
    soon as its own check to that address was answered. So both know that both directions work. remotes, heard: as in Checklist.
    """

    def __init__(self, session_id: str, session_key: str, controlling: bool, now: float, consent_interval: float = CONSENT_INTERVAL,
                 pace: Optional[Pace] = None) -> None:
        self.session_id, self.is_guest, self.controlling = session_id, controlling, controlling
        self._key, self._consent_interval = session_key, consent_interval
        self.began = now
        self._list = Checklist(pace or Pace(), is_host=not controlling, now=now)
        self.remotes, self.heard = self._list.remotes, self._list.heard
        self.selected: Optional[Address] = None         # where the peer is
        self.local: Optional[Address] = None            # where it sees us
        self.connected_at: Optional[float] = None
        self.rtt: Optional[float] = None                # seconds, of the latest answered check
        self.over = ""                                  # why the session has ended
        self.due = now                                  # when tick() is to be called next
        self.channel = Channel(session_key, controlling)
        self._tie_breaker = secrets.token_bytes(8)
        self._nominated: Optional[Tuple[Address, Mark]] = None      # by the guest
        self._last_nomination: Optional[Address] = None             # of ours
        self._confirmed = not controlling               # the host has answered a nomination
        self._last_answer = self._last_heard = now      # when the selected address last answered, and when anything authentic came
        self._next_consent = now
        self._pending: collections.OrderedDict[bytes, Check] = collections.OrderedDict()
        self._requests: collections.OrderedDict[bytes, Address] = collections.OrderedDict()   # that came, by transaction

    @property
    def hosts(self) -> Set[str]:
        """The IP addresses from which the peer may come."""
        return {address[0] for address in self.remotes} | self._list.budget.trusted - {""}

    @property
    def is_direct(self) -> bool:
        """Whether the peer is reached, and not by a relay."""
        return self.selected is not None and not self._list.is_relayed(self.selected)

    @property
    def sent(self) -> int:
        """Checks so far, but for those of consent."""
        return self._list.sent

    def add(self, addresses: Iterable[Address], now: float, pacing: float = DEFAULT_PACING, seen_at: str = "",
            relay: Optional[Address] = None) -> None:
        """Learn the peer's addresses, likeliest first, and its pacing. Once checks are under way they are later ones of a peer that has moved.
        seen_at: the IP address from which the server is called by it; relay: the one of them that is a relay's."""
        self._list.relay = relay or self._list.relay
        self._list.add(addresses, now, pacing, seen_at, self.selected)

    def tick(self, now: float) -> List[Sending]:
        """Do what is due."""
        if self.selected is None and now - self.began >= CHECK_TIME:
            self.over = self.over or NO_WAY
        if self.selected is not None and now - self._last_answer >= CONSENT_TIME:
            self.over = self.over or f"the other player has been silent for {now - self._last_answer:.0f} seconds"
        if self.over:
            return []
        sendings = self._consent(now) or self._paced(now)
        end = min(max(self._next_consent, self._list.pace.next), self._last_answer + CONSENT_TIME) if self.selected else self.began + CHECK_TIME
        self.due = min(end, self._next_check(now))
        return sendings

    def receive(self, message: stun.Message, source: Address, now: float) -> List[Sending]:
        """Take a message whose USERNAME or transaction is this session's. What is not authentic changes nothing."""
        if not stun.authentic(message, self._key):
            return []
        if message.kind in (stun.SUCCESS, stun.ERROR):
            return self._answered(message, source, now)
        if message.kind not in (stun.REQUEST, stun.INDICATION):
            return []
        mark = Mark.of(message)
        same_role = message.attributes.get(stun.ICE_CONTROLLING if self.controlling else stun.ICE_CONTROLLED)
        other_role = message.attributes.get(stun.ICE_CONTROLLED if self.controlling else stun.ICE_CONTROLLING)
        # What is of our own role and ours is our own, sent back to us; among our like the roles are never in conflict.
        if other_role is None and (same_role in (None, self._tie_breaker) or mark):
            return []
        # Each is good from one address: a copy from another is a replay.
        is_new = message.transaction not in self._requests
        if self._requests.setdefault(message.transaction, source) != source:
            return []
        trim(self._requests)
        if self.over:
            return self._remind(message, mark, source)
        if message.kind == stun.INDICATION:
            self._take_goodbye(mark, source)
            return []
        if other_role is None and self._keeps_role(same_role or b""):
            return [(stun.encode(stun.ERROR, message.transaction, [stun.error_code(stun.ROLE_CONFLICT, "Role Conflict")], self._key), source)]
        return self._requested(message, mark, source, is_new, now)

    def awaits(self, transaction: bytes) -> bool:
        """Whether a check with this transaction is under way."""
        return transaction in self._pending

    def is_from_anew(self, message: stun.Message) -> bool:
        """Whether a message that comes after the end is an authentic check, not a replay, of a later session of the peer's: it has begun anew."""
        mark = Mark.of(message)
        role = stun.ICE_CONTROLLED if self.is_guest else stun.ICE_CONTROLLING
        if message.kind != stun.REQUEST or mark is None or role not in message.attributes or message.transaction in self._requests:
            return False
        return not self.channel.knows(mark.nonce) and stun.authentic(message, self._key)

    def again(self, now: float, remotes: Iterable[Address] = ()) -> Session:
        """A new session with the same peer. It goes on remembering what came in this one and what went to third parties: nothing is
        replayed or allowed anew."""
        session = Session(self.session_id, self._key, self.is_guest, now, self._consent_interval, self._list.pace)
        session._requests = self._requests
        session._list.budget.follows(self._list.budget)
        session.add(remotes, now, self._list.pacing)
        return session

    def is_silent(self, now: float) -> bool:
        """Whether it is time to ask the server for the peer's present addresses."""
        if self.selected is None:
            return self.is_guest and now - self.began >= UNHEARD_TIME
        return now - max(self._last_answer, self._last_heard) >= SILENT_TIME

    def forgive(self, seconds: float, now: float) -> None:
        """Seconds in which we did not run do not count as the peer's silence."""
        self.began += seconds
        self._last_answer, self._last_heard = min(now, self._last_answer + seconds), min(now, self._last_heard + seconds)
        self._next_consent = self.due = now

    def open(self, datagram: bytes, now: float) -> Optional[bytes]:
        """What the peer's game sent, in a datagram from an address that was heard; None if it is not authentic though it should be."""
        content = self.channel.open(datagram)
        if content is not None:
            self._last_heard = now
        return content

    def probe(self, address: Address, now: float, is_probing: bool) -> List[Sending]:
        """A check to a port that may be the peer's, beside the list; what hits is answered with a check from there. is_probing: as Checklist.may_probe()."""
        if self.over or self.is_direct or not self._list.may_probe(address[0], now, is_probing):
            return []
        return [(self._encode(stun.REQUEST, secrets.token_bytes(12), self.controlling), address)]

    def goodbye(self) -> List[Sending]:
        """End the session; the peer is told, if it is there and understands."""
        self.over = self.over or "closed"
        return [(self._encode(stun.INDICATION, secrets.token_bytes(12)), self.selected)] if self.selected and self.channel.is_open else []

    def _requested(self, message: stun.Message, mark: Optional[Mark], source: Address, is_new: bool, now: float) -> List[Sending]:
        if self.channel.is_open and (mark is None or mark.nonce != self.channel.peer_nonce):
            return self._doubt(mark, source, now)
        mapped = stun.pack_address(source, message.transaction)
        attributes = [(stun.XOR_MAPPED_ADDRESS, mapped)] + ([(stun.P2P, self.channel.nonce)] if mark else [])
        answer = stun.encode(stun.SUCCESS, message.transaction, attributes, self._key)
        if not is_new or not self.channel.is_fresh(mark) or not self._list.make_room(source, self.selected):
            return [(answer, source)]
        is_newly_heard = self._list.hear(source)
        self._last_heard = now
        if stun.USE_CANDIDATE in message.attributes and not self.controlling:
            self._nominate(source, mark or Mark(NO_NONCE, NO_NONCE, 0))
            self._follow(now)
        self._list.trigger(source, is_newly_heard)
        return [(answer, source), *self.tick(now)]

    def _doubt(self, mark: Optional[Mark], source: Address, now: float) -> List[Sending]:
        """A check of another session of the peer's than the proven one is a replay, or it has begun anew: a check of ours tells."""
        if mark and source not in self._list.triggered and self._list.make_room(source, self.selected):
            self._list.triggered.append(source)
        return self.tick(now)

    def _take_goodbye(self, mark: Optional[Mark], source: Address) -> None:
        if mark and mark.echo == self.channel.nonce and source in self.heard and self.channel.peer_nonce in (None, mark.nonce):
            self.over = LEFT

    def _remind(self, message: stun.Message, mark: Optional[Mark], source: Address) -> List[Sending]:
        """Who still checks a connection that has ended may have missed the good-bye."""
        if message.kind != stun.REQUEST or mark is None or self.connected_at is None:
            return []
        return [(self._encode(stun.INDICATION, secrets.token_bytes(12), echo=mark.nonce), source)]

    def _answered(self, message: stun.Message, source: Address, now: float) -> List[Sending]:
        check = self._pending.get(message.transaction)
        # RFC 8445 section 7.2.5.2.1: an answer comes from where the check went.
        if self.over or check is None or check.address != source or source not in self.remotes:
            return []
        del self._pending[message.transaction]
        if message.kind == stun.ERROR:
            return self._refused(message, check, now)
        nonce = message.attributes.get(stun.P2P, NO_NONCE)[:8]
        if self.channel.is_open and nonce != self.channel.peer_nonce:
            self.over = BEGUN_ANEW if nonce != NO_NONCE else ""
            self.remotes.sort(key=lambda remote: remote != source)
            return []
        if nonce != NO_NONCE:
            self.channel.confirm(nonce)
        self.heard.add(source)
        self._last_heard = now
        is_newly_proven = source not in self._list.proven
        self._list.proven.add(source)
        if source == self.selected:
            if now - self._last_answer >= SILENT_TIME:
                self._list.allow_more(now)
            self._last_answer = now
            self._confirmed = self._confirmed or check.nominates
        elif self.controlling and self._is_better(source, is_newly_proven, now):
            self._select(source, now)
            if check.nominates and self._last_nomination == source:
                self._confirmed = True      # the check that was answered has nominated it, and none has nominated another since
            else:
                self._list.urgent.appendleft(source)
        else:
            self._follow(now)
        if self.selected in (None, source):
            self.rtt, self.local = now - check.sent_at, stun.mapped_address(message)
        return self.tick(now)

    def _refused(self, message: stun.Message, check: Check, now: float) -> List[Sending]:
        """An error answer: in a conflict of roles, take the other one and check again (RFC 8445 section 7.2.5.1)."""
        if stun.error_number(message) != stun.ROLE_CONFLICT or self.channel.is_open:
            return []
        if check.controlling == self.controlling:
            self._switch_role()
        self._list.triggered.append(check.address)
        return self.tick(now)

    def _keeps_role(self, tie_breaker: bytes) -> bool:
        """Settle a conflict of roles (RFC 8445 section 7.3.1.1); whether it is the peer that has to change."""
        keeps = self.controlling == (self._tie_breaker >= tie_breaker)
        if not keeps:
            self._switch_role()
        return keeps

    def _switch_role(self) -> None:
        self.controlling = not self.controlling
        self._confirmed, self._nominated = not self.controlling, None

    def _is_better(self, address: Address, is_newly_proven: bool, now: float) -> bool:
        """Whether a guest takes this address: the first, a direct one for a relay's, a better one in the first moments, any when the old one went silent."""
        if self.selected is None or self.connected_at is None:
            return True
        is_silent, is_relayed = now - self._last_answer > 1.2 * self._consent_interval, self._list.is_relayed(self.selected)
        if is_relayed != self._list.is_relayed(address):
            return is_relayed or is_silent
        if now - self.connected_at <= FIRST_MOMENTS and self.selected in self.remotes:
            return is_newly_proven and self.remotes.index(address) < self.remotes.index(self.selected)
        return is_silent

    def _nominate(self, address: Address, mark: Mark) -> None:
        """The guest has nominated an address. Of two nominations of one session the later one counts, whichever comes first."""
        if self._nominated is None or self._nominated[1].nonce != mark.nonce or self._nominated[1].sequence <= mark.sequence:
            self._nominated = address, mark

    def _follow(self, now: float) -> None:
        """A host goes where the guest has nominated, once it has proof of its own that this very guest is there."""
        if self._nominated is None:
            return
        address, mark = self._nominated
        if address in self._list.proven and address != self.selected and mark.nonce == (self.channel.peer_nonce or NO_NONCE):
            self._select(address, now)

    def _select(self, address: Address, now: float) -> None:
        self.selected, self._confirmed, self._last_answer = address, not self.controlling, now
        self._next_consent = now + self._consent_interval
        if self.connected_at is None:
            self.connected_at = now

    def _consent(self, now: float) -> List[Sending]:
        if self.selected is None or now < max(self._next_consent, self._list.pace.next):
            return []
        self._next_consent = now + self._consent_interval * (0.8 + 0.4 * secrets.randbelow(1000) / 1000)
        return self._check(self.selected, now, cost=0)      # given by the one who is asked, for as long as the game lasts

    def _paced(self, now: float) -> List[Sending]:
        """The next check, if one is due."""
        address = self._list.next(now, None if self._confirmed else self.selected, self.selected) if now >= self._next_check(now) else None
        return self._check(address, now) if address else []

    def _next_check(self, now: float) -> float:
        """When the next check may go out: as the pacing of socket and session says, and never more than MAX_CHECKS."""
        if self.sent >= MAX_CHECKS or not self.remotes:
            return float("inf")
        return self._list.soonest if self._list.urgent else max(self._list.soonest, self._next_ordinary(now))

    def _next_ordinary(self, now: float) -> float:
        """When a check may go out that is not urgent, as far as this session goes."""
        if self.sent == 1 and not self._list.triggered and self.selected is None:
            return self._list.last_check + SECOND_INTERVAL
        if self._list.triggered or self.selected and not self._confirmed or self._in_first_moments(now):
            return self._list.last_check + CHECK_INTERVAL
        if self.selected:
            interval = SLOW_INTERVAL if now < self._list.fast_until else SILENT_INTERVAL
            silent = max(self._list.last_check + interval, self._last_answer + SILENT_TIME)
            return min(silent, self._list.next_while_relayed(now, self.connected_at or now)) if self._list.is_relayed(self.selected) else silent
        return self._list.last_check + (CHECK_INTERVAL if self.sent < max(FAST_CHECKS, FAST_ROUNDS * len(self.remotes)) else SLOW_INTERVAL)

    def _in_first_moments(self, now: float) -> bool:
        """Whether a guest still looks for a better address than the one that answered first."""
        return (self.controlling and self.selected in self.remotes and self.connected_at is not None and now - self.connected_at <= FIRST_MOMENTS
                and any(remote not in self._list.proven for remote in self.remotes[:self.remotes.index(self.selected)]))

    def _check(self, address: Address, now: float, cost: int = 1) -> List[Sending]:
        transaction, nominates = secrets.token_bytes(12), self.controlling and self.selected in (None, address)
        if nominates:
            self._last_nomination = address
        self._pending[transaction] = Check(address, now, nominates, self.controlling)
        trim(self._pending)
        self._list.count(address, now, cost)
        return [(self._encode(stun.REQUEST, transaction, nominates), address)]

    def _encode(self, kind: int, transaction: bytes, nominates: bool = False, echo: Optional[bytes] = None) -> bytes:
        attributes = [(stun.USERNAME, f"{self.session_id}:{self.session_id}".encode()),
                      (stun.ICE_CONTROLLING if self.controlling else stun.ICE_CONTROLLED, self._tie_breaker),
                      *([(stun.PRIORITY, PEER_REFLEXIVE)] if kind == stun.REQUEST else []), *([(stun.USE_CANDIDATE, b"")] if nominates else []),
                      (stun.P2P, self.channel.mark(echo))]
        return stun.encode(kind, transaction, attributes, self._key)
