"""By which try of a guest a host knows its session."""

from __future__ import annotations

import collections
from typing import Collection

from .candidates import about_peer
from .pacing import trim
from .rendezvous import Guest


class Attempts:
    """latest: the last attempt (Candidates.attempt) of each guest, by sessionId."""

    def __init__(self) -> None:
        self.latest: collections.OrderedDict[str, str] = collections.OrderedDict()

    def note(self, session_id: str, attempt: str) -> None:
        self.latest[session_id] = attempt
        trim(self.latest)

    def of(self, session_id: str) -> str:
        """"" if there is none."""
        return self.latest.get(session_id, "")

    def session_of(self, guest: Guest, session_ids: Collection[str]) -> str:
        """Under which of these sessionIds we know a guest, else its own: a restarted server gives it another one, but the attempt is the same."""
        attempt = about_peer(guest.addresses)[2]
        known = [name for name in session_ids if attempt and self.of(name) == attempt]
        return guest.session_id if guest.session_id in session_ids or not known else known[0]
