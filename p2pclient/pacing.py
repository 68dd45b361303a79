"""What all sessions of a socket may send together, without a clock."""

from __future__ import annotations

import collections

from .checks import trim

UNHEARD_CHECKS = 100        # checks at once to one IP address that has not answered yet, over all sessions of a socket,
UNHEARD_INTERVAL = 0.05     # and seconds for one more: whoever lists a third party in many sessions gains nothing


class UnheardLimiter:
    """A token bucket for each IP address that has not been heard from."""

    def __init__(self) -> None:
        self._full_at: collections.OrderedDict[str, float] = collections.OrderedDict()      # when each has all its UNHEARD_CHECKS again

    def allows(self, host: str, now: float) -> bool:
        """Whether one more check may go to an IP address; it counts if so."""
        full_at = max(self._full_at.pop(host, 0.0), now) + UNHEARD_INTERVAL
        allowed = full_at <= now + UNHEARD_CHECKS * UNHEARD_INTERVAL
        self._full_at[host] = full_at if allowed else full_at - UNHEARD_INTERVAL
        trim(self._full_at)
        return allowed
