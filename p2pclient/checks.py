"""The connectivity checks of one session, after ICE (RFC 8445), without socket or clock."""

from __future__ import annotations

import collections
import secrets
from typing import Any, Deque, Iterable, List, Optional, Tuple

from . import stun
from .addresses import Address, Sending, parse_candidate
from .candidates import MAX_CANDIDATES

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
REMEMBERED = 1024           # requests and transactions of a session that are remembered

NO_WAY = "no check got through in both directions"


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

    def receive(self, message: stun.Message, source: Address, now: float) -> List[Sending]:
        """Take a message whose USERNAME or transaction is this session's. What is not authentic changes nothing."""
        if self.over or not stun.authentic(message, self._key):
            return []
        if message.kind == stun.SUCCESS:
            return self._answered(message, source, now)
        # A request or indication of our own role is our own, sent back to us.
        if (stun.ICE_CONTROLLED if self.controlling else stun.ICE_CONTROLLING) not in message.attributes:
            return []
        # Each is good from one address: a copy from another is a replay.
        if self._requests.setdefault(message.transaction, source) != source:
            return []
        trim(self._requests)
        if message.kind == stun.INDICATION:
            self.over = "the other player has left" if source in self.heard else ""
            return []
        return self._requested(message, source, now) if message.kind == stun.REQUEST else []

    def awaits(self, transaction: bytes) -> bool:
        """Whether a check with this transaction is under way."""
        return transaction in self._pending

    def follows(self, earlier: Session) -> None:
        """Go on remembering what came in an earlier session of the same name, so that it cannot be replayed."""
        self._requests = earlier._requests

    def goodbye(self) -> List[Sending]:
        """End the session; the peer is told, if it is there."""
        self.over = self.over or "closed"
        return [(self._encode(stun.INDICATION, secrets.token_bytes(12)), self.selected)] if self.selected else []

    def _requested(self, message: stun.Message, source: Address, now: float) -> List[Sending]:
        mapped = stun.pack_address(source, message.transaction)
        answer = stun.encode(stun.SUCCESS, message.transaction, [(stun.XOR_MAPPED_ADDRESS, mapped)], self._key)
        if not self._make_room(source):
            return [(answer, source)]
        self.heard.add(source)
        if stun.USE_CANDIDATE in message.attributes and not self.controlling:
            self._nominated = source
            self._follow(now)
        if source not in self._proven and source not in self._triggered:
            self._triggered.append(source)      # RFC 8445 section 7.3.1.4
        return [(answer, source), *self.tick(now)]

    def _make_room(self, source: Address) -> bool:
        """Have a source among the remotes: one that nobody listed is peer-reflexive (RFC 8445 section 7.3.1.3), and worth more than one
        that never answered."""
        if source not in self.remotes:
            if len(self.remotes) >= MAX_CANDIDATES:
                silent = [remote for remote in self.remotes if remote not in self.heard and remote not in self._proven]
                if not silent:
                    return False
                self.remotes.remove(silent[-1])
            self.remotes.append(source)
        return True

    def _answered(self, message: stun.Message, source: Address, now: float) -> List[Sending]:
        address, sent_at, nominated = self._pending.get(message.transaction, (None, 0.0, False))
        if address != source or source not in self.remotes:     # RFC 8445 section 7.2.5.2.1: an answer comes from where the check went
            return []
        del self._pending[message.transaction]
        self.rtt, self.local = now - sent_at, stun.mapped_address(message)
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
        return [(self._encode(stun.REQUEST, transaction, nominate), address)]

    def _encode(self, kind: int, transaction: bytes, nominate: bool = False) -> bytes:
        role = (stun.ICE_CONTROLLING if self.controlling else stun.ICE_CONTROLLED, bytes(8))
        attributes = [(stun.USERNAME, self.session_id.encode("utf-8")), role] + ([(stun.USE_CANDIDATE, b"")] if nominate else [])
        return stun.encode(kind, transaction, attributes, self._key)


def trim(memory: collections.OrderedDict[Any, Any]) -> None:
    """Forget the oldest beyond REMEMBERED."""
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
