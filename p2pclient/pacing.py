"""How fast a socket may send checks, over all its sessions; without a clock."""

from __future__ import annotations

import collections
from typing import Any, Tuple

DEFAULT_PACING = 0.05       # seconds between two checks of a session where the peer publishes no other (RFC 8445 section 14.2)
LEAST_PACING = 0.005        # seconds between two checks of a socket, and what we publish: the least that RFC 8445 section 14.2 allows
UNHEARD_CHECKS = 100        # checks at once to one IP address that has not answered yet, over all sessions of a socket,
UNHEARD_INTERVAL = 0.05     # and seconds for one more: whoever lists a third party in many sessions gains nothing
REMEMBERED = 1024           # entries of each memory that strangers can fill


class Pace:
    """When a socket last sent a check. All its sessions share one."""

    def __init__(self) -> None:
        self.last = float("-inf")

    @property
    def next(self) -> float:
        """When the socket may send its next check."""
        return self.last + LEAST_PACING


class UnheardLimiter:
    """A token bucket for each IP address that has not been heard from. most: datagrams at once; then one in UNHEARD_INTERVAL."""

    def __init__(self, most: int = UNHEARD_CHECKS) -> None:
        self._most = most
        self._full_at: collections.OrderedDict[str, float] = collections.OrderedDict()      # when each has all its UNHEARD_CHECKS again

    def allows(self, host: str, now: float) -> bool:
        """Whether one more check may go to an IP address; it counts if so."""
        full_at = max(self._full_at.pop(host, 0.0), now) + UNHEARD_INTERVAL
        allowed = full_at <= now + self._most * UNHEARD_INTERVAL
        self._full_at[host] = full_at if allowed else full_at - UNHEARD_INTERVAL
        trim(self._full_at)
        return allowed


def trim(memory: collections.OrderedDict[Any, Any], most: int = REMEMBERED) -> None:
    """Forget the oldest entries beyond so many."""
    while len(memory) > most:
        memory.popitem(last=False)


class UnheardBudget:
    """How much one session may send to each IP address that has not been heard from, for as long as it lasts.

    What a host may send is little, spread over the time of the checks, unless it is the address that the server saw the guest call from:
    the guest may have listed anybody's. A guest asked for what it does itself, and may send UNHEARD_CHECKS.
    """

    GAPS = (0.0, 0.05, 1.0, 3.0, 5.0)   # seconds before each datagram of a host to one such address; there are no more

    def __init__(self, is_host: bool) -> None:
        self.trusted: set[str] = set()      # IP addresses that are the peer's own
        self._is_host = is_host
        self._sent: collections.OrderedDict[str, Tuple[int, float]] = collections.OrderedDict()     # how many to an IP address, and when the latest

    def allows(self, host: str, now: float) -> bool:
        count, latest = self._sent.get(host, (0, 0.0))
        if not self._is_host or host in self.trusted:
            return count < UNHEARD_CHECKS
        return count < len(self.GAPS) and now >= latest + self.GAPS[count]

    def count(self, host: str, now: float) -> None:
        """One more has been sent."""
        self._sent[host] = self._sent.get(host, (0, 0.0))[0] + 1, now
        trim(self._sent)

    def follows(self, earlier: UnheardBudget) -> None:
        """Take over what an earlier session of the same name knew, and what it has sent to addresses that may be anybody's."""
        self.trusted |= earlier.trusted
        if self._is_host:
            self._sent.update((host, sent) for host, sent in earlier._sent.items() if host not in earlier.trusted)
