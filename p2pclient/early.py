"""Checks that come before the server has told of their session (RFC 8445 section 7.3)."""

from __future__ import annotations

import collections
from typing import List, Tuple

from .addresses import Address
from .pacing import trim
from .stun import Message

EARLY_TIME = 2.0        # seconds for which they are kept
EARLY_CHECKS = 64       # that are kept at most, of all sessions together
EARLY_SIZE = 512        # bytes of a check that is kept, before its MESSAGE-INTEGRITY


class EarlyChecks:
    """Unauthenticated yet, so there are few. All of a session are kept, for each is good from where it came first: its copies are replays."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[Tuple[str, bytes], Tuple[Message, Address, float]] = collections.OrderedDict()

    def keep(self, session_id: str, message: Message, source: Address, now: float) -> None:
        if len(message.signed) <= EARLY_SIZE:
            self._kept.setdefault((session_id, message.transaction), (message, source, now))
            trim(self._kept, EARLY_CHECKS)

    def take(self, session_id: str, now: float) -> List[Tuple[Message, Address]]:
        """What has come for a session lately, earliest first. It is kept no longer."""
        mine = {key: self._kept.pop(key) for key in list(self._kept) if key[0] == session_id}
        return [(message, source) for message, source, came_at in mine.values() if now - came_at <= EARLY_TIME]
