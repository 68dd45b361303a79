"""What a guest keeps up at the server while it checks and plays."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Callable, Optional

from .answers import RendezvousError
from .connection import Connection
from .deadline import Deadline
from .endpoint import Endpoint
from .rendezvous import RendezvousClient, Start
from .repeater import Repeater, pause_between

WAIT = 25.0             # seconds for which servers are asked to hold a call until there is news
CLOSE_TIME = 1.5        # seconds for the server to hear that somebody leaves
FAILED_PAUSE = 2.0      # seconds before a server is tried again that could not be reached
REFUSED_PAUSE = 10.0    # seconds before one is that has refused a call


class Presence:
    """A guest's session at the server. A thread starts the game again and again under the same peerId: so the guest stays known, its
    addresses are those that it has now, and new ones of the host are checked at once. What becomes of that never ends a connection.

    A restarted server has lost the session, and begins another one. While the connection works that one is left again, for the name may be a
    stranger's by now. When the host is silent it is the only way to find each other: the host knows by the attempt whose it is."""

    def __init__(self, client: RendezvousClient, endpoint: Endpoint, start: Start, peer_id: str) -> None:
        self._client, self._endpoint, self._peer_id = client, endpoint, peer_id
        self._name, self._own_session = start.name, start.session_id
        self._session_id = start.session_id                 # what the server calls it now
        self._cursor: Optional[int] = start.cursor
        self.connection: Optional[Connection] = None        # once there is one
        self._repeater = Repeater("guest", self._ask, self._failed)

    def begin(self) -> None:
        self._endpoint.moved = self._moved
        self._repeater.begin_anew()

    def close(self) -> None:
        """Leave the game, as far as the server can be told within two seconds."""
        if self._repeater.ended:        # the game is left, and the same peerId may have joined it again
            self._repeater.join(0.4)
            return
        self._repeater.end()
        deadline = Deadline(CLOSE_TIME)
        self._leave(deadline.left())
        while not self._repeater.join(0.4) and deadline.left():     # a start that has come to the server since then has begun a session
            self._leave(deadline.left())

    def _moved(self) -> None:
        """We have moved, or the host is silent: tell the server where we are, and hear where the host is."""
        self._cursor = None
        self._client.reconnect()
        self._repeater.begin_anew()

    def _leave(self, within: float) -> None:
        with contextlib.suppress(RendezvousError):      # 404: the host was faster
            self._client.leave_game(self._name, self._peer_id, within=within)

    def _ask(self, is_current: Callable[[], bool]) -> float:
        if self.connection and self.connection.session.over:
            self._repeater.end()
            self._leave(CLOSE_TIME)
            return 0.0
        after, began = self._cursor, time.monotonic()
        start = self._client.start_game(self._name, self._peer_id, self._endpoint.candidates.published, WAIT, after)
        if is_current() and start.session_id != self._session_id:
            if self.connection and self.connection.session.is_silent(time.monotonic()):
                self._session_id = start.session_id
            else:
                self._repeater.pause()
                self._leave(CLOSE_TIME)
        elif self._repeater.ended:      # this call has begun a session after we have left, or we have left a game that was renamed by then
            self._name = start.name
            self._leave(CLOSE_TIME)
        if not is_current():
            return 0.0
        self._name, has_news = start.name, start.cursor != after
        self._cursor = start.cursor
        if has_news and start.addresses:
            self._endpoint.renew(dataclasses.replace(start, session_id=self._own_session))
        pause = max(start.poll_after, start.expires_in / 3) if self.connection else start.poll_after
        return pause_between(start.waited, has_news, time.monotonic() - began, pause)

    def _failed(self, error: Exception) -> float:
        """A host or server that is gone may come back. A guest that was sent away has no place there any more."""
        status = error.status if isinstance(error, RendezvousError) else 0
        if status == 403:
            self._repeater.end()
        return pause_after(error) if self.connection else FAILED_PAUSE


def pause_after(error: Exception) -> float:
    """Seconds after a failed call until the next one, which may have cost the server's patience as a guess at a peerId does."""
    if not isinstance(error, RendezvousError):
        return FAILED_PAUSE
    return max(REFUSED_PAUSE if 400 <= error.status < 429 else FAILED_PAUSE, error.retry_after)
