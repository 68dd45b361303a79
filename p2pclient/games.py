"""Games: to offer one, and to join one."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Callable, Dict, Optional, Sequence

from .addresses import Address
from .answers import RendezvousError
from .connection import Connection
from .deadline import Deadline
from .diagnosis import ConnectFailed
from .endpoint import KEEPALIVE, Endpoint, log
from .rendezvous import Poll, RendezvousClient, Start, new_peer_id

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
        self._reachable = True      # the latest poll was answered
        self._generation = 0        # of the thread that polls; an earlier one ends when it notices
        self.name = client.register_game(name, self._peer_id, info, listed).name
        try:
            self.endpoint = Endpoint(default_stun(client, stun_servers), client.on_loopback, keepalive=keepalive, report=report,
                                     moved=self._poll_anew)
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
        cursor = None
        while self._is_current(generation):
            began, name = time.monotonic(), self.name
            try:
                poll = self._client.poll_game(name, self._peer_id, self.endpoint.candidates.published, after=cursor, wait=WAIT)
            except RendezvousError as error:
                pause = self._refused(error, name) if self._is_current(generation) else 0.0
            else:
                cursor, pause = poll.cursor, self._answered(poll, name, time.monotonic() - began)
            self._closed.wait(pause)

    def _is_current(self, generation: int) -> bool:
        return not self._closed.is_set() and generation == self._generation

    def _answered(self, poll: Poll, name: str, passed: float) -> float:
        """Take the answer to a poll of name that took passed seconds. Seconds until the next one."""
        if not self._reachable:
            self._report("the server is back")
        self._reachable = True
        if self.name == name:
            self.name = poll.name
        for guest in poll.guests:
            self.endpoint.expect(guest)
        # Who was held can ask again at once, unless the server holds polls in name only.
        held = poll.waited and (poll.guests or passed > 1)
        return 0.0 if held else poll.poll_after

    def _refused(self, error: RendezvousError, name: str) -> float:
        """Take the failure of a poll of name. Seconds until the next one."""
        renamed_meanwhile = self.name != name
        if renamed_meanwhile or refused_for_loopback(error, self.endpoint):
            return 0.0
        if error.status in (400, 403, 409):     # the name is somebody else's now, or we are not understood
            self._report(f"the game is lost: {error}")
            self._closed.set()
            self.endpoint.close()
            return 0.0
        if self._reachable:
            self._report(f"{error}; trying again")
        self._reachable = False
        return max(FAILED_PAUSE, error.retry_after)


def join_game(client: RendezvousClient, name: str, stun_servers: Optional[Sequence[Address]] = None, timeout: float = 30.0,
              endpoint: Optional[Endpoint] = None) -> Connection:
    """Connect with the host of a game. Seconds of timeout are for the host to publish addresses; the checks then have 15.

    endpoint: one's own, which stays open when the connection is closed.
    RendezvousError: no such game, or so; ConnectFailed says why there is no way.
    """
    own = endpoint or Endpoint(default_stun(client, stun_servers), client.on_loopback)
    try:
        start = start_with_addresses(client, name, own, timeout)
        connection = connect_or_explain(client, own, start)
        connection.owns_endpoint = endpoint is None
        return connection
    except BaseException:
        if endpoint is None:
            own.close()
        raise


def start_with_addresses(client: RendezvousClient, name: str, endpoint: Endpoint, timeout: float) -> Start:
    """Start a game until its host has addresses. ConnectFailed: it publishes none in time; RendezvousError."""
    peer_id, deadline = new_peer_id(), Deadline(timeout)
    start = start_game(client, name, peer_id, endpoint, timeout, patience=0.0)
    while not start.addresses:
        pause = 0.0 if start.waited else start.poll_after
        if pause >= deadline.left():
            raise ConnectFailed("the host has published no address", "It is registered, but does not poll: it may just have crashed.")
        time.sleep(pause)
        # A server that was restarted may not have the game yet: its host comes back within seconds.
        start = start_game(client, start.name, peer_id, endpoint, deadline.left(), patience=RETURN_TIME)
    return start


def start_game(client: RendezvousClient, name: str, peer_id: str, endpoint: Endpoint, wait: float, patience: float) -> Start:
    """One start, repeated if the server refuses it for loopback addresses, and for patience seconds while it has no such game."""
    deadline = Deadline(patience)
    while True:
        try:
            return client.start_game(name, peer_id, endpoint.candidates.published, min(WAIT, wait))
        except RendezvousError as error:
            if refused_for_loopback(error, endpoint):
                continue
            if error.status != 404 or not deadline.left():
                raise
        time.sleep(0.5)


def refused_for_loopback(error: RendezvousError, endpoint: Endpoint) -> bool:
    """Whether a call may have failed for the endpoint's loopback addresses: it publishes them no more then."""
    return "addresses" in error.errors and endpoint.leave_loopback()


def connect_or_explain(client: RendezvousClient, endpoint: Endpoint, start: Start) -> Connection:
    """Connect with the host. ConnectFailed: its game is gone, or what the endpoint saw."""
    try:
        return endpoint.connect(start)
    except ConnectFailed as failure:
        with contextlib.suppress(RendezvousError):
            client.get_game(start.name)
            raise
        raise ConnectFailed("the host is gone: its game is no longer offered") from failure


def default_stun(client: RendezvousClient, stun_servers: Optional[Sequence[Address]]) -> Sequence[Address]:
    return [client.stun_server] if stun_servers is None else stun_servers
