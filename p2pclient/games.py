"""Games: to offer one, and to join one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import time
from typing import Any, Callable, Dict, Optional, Sequence

from .addresses import Address
from .answers import RendezvousError
from .connection import Connection
from .deadline import Deadline, begin, told_if_slow
from .diagnosis import ConnectFailed
from .endpoint import Endpoint
from .forwarding import Forwarding
from .presence import CLOSE_TIME, FAILED_PAUSE, WAIT, Presence, pause_after
from .relay import Relay
from .rendezvous import Poll, RendezvousClient, Start, new_peer_id
from .repeater import Repeater, pause_between
from .texts import harmless, line_of, log
from .transport import MARGIN
from .turn import TurnServer
from .whereabouts import KEEPALIVE

RETURN_TIME = 3 * FAILED_PAUSE      # seconds that a guest gives its host to come back after a restart of the server
STUN_TIME = 0.5         # seconds of STUN's silence after which a guest has the rendezvous server tell whether it answers STUN at all
UNHEARD_TIME = 3.0      # seconds after which a guest is told what it waits for
REFUSED = (400, 403, 404, 409)      # the name is somebody else's now, or we are not understood


class HostedGame:
    """A game on offer, and the guests that connect to it. A thread polls, held by the server until there is news, or at its pace if it
    does not hold polls, and connects who comes. What becomes of the offer never ends a connection.

    client: for this game alone; stun_servers: (host, port) each, the rendezvous server itself if not given; keepalive: seconds;
    report: takes a line for each thing that happens; peer_id: who has kept the one of an earlier run has its game again; port_mapping: whether
    the router is asked, in the background, to forward a port to the game (PCP, NAT-PMP or UPnP); not with a server on this very machine;
    prediction, probing: as in Endpoint; relay: whether a relay is kept ready, in the background, for guests who cannot be reached directly; turn:
    the TURN server to take it from, instead of the one that the rendezvous server hands its hosts, if any.
    RendezvousError from the constructor: the name is taken, or so.
    """

    def __init__(self, client: RendezvousClient, name: str, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None,
                 stun_servers: Optional[Sequence[Address]] = None, keepalive: float = KEEPALIVE,
                 report: Callable[[str], None] = log.info, peer_id: Optional[str] = None, port_mapping: bool = True,
                 prediction: bool = True, probing: bool = False, relay: bool = True, turn: Optional[TurnServer] = None) -> None:
        self.name, self._peer_id = name, peer_id or new_peer_id()
        self._client, self._say = client, harmless(report)
        self._cursor: Optional[int] = None
        self._trouble = ""          # why the latest poll failed, in a word
        self._repeater = Repeater("host", self._poll, self._failed)
        self._forwarding: Optional[Forwarding] = None
        self._relay: Optional[Relay] = None
        self._told_turn: Optional[TurnServer] = None        # by the rendezvous server
        begin_gathering = functools.partial(gather, client, stun_servers, keepalive=keepalive, report=report, prediction=prediction, probing=probing)
        gathering = begin_gathering()
        try:
            registration = client.register_game(name, self._peer_id, info, listed)
            self.name, self._told_turn = registration.name, registration.turn
            if stun_servers is None and registration.stun_ports == []:      # nobody answers where STUN was thought to be
                gathering.add_done_callback(close_gathered)
                gathering = begin_gathering()
            self.endpoint = gathering.result()
            use_told_stun(client, self.endpoint)
            on_loopback = client.on_loopback
        except BaseException as error:      # Ctrl-C while it gathers or looks names up, too
            gathering.add_done_callback(close_gathered)
            if not isinstance(error, RendezvousError):
                self._delete()
            raise
        self.endpoint.moved = self._moved
        self._repeater.begin_anew()
        if port_mapping and not on_loopback:
            self._forwarding = Forwarding(self.endpoint.socket.getsockname()[1], self.endpoint.forward, self._say)
        if relay and (turn or self._told_turn):
            self._relay = Relay(self.endpoint, (lambda is_refused: turn) if turn else self._turn, on_loopback, self._say)
            self.endpoint.send_relayed = self._relay.send

    def accept(self, timeout: Optional[float] = None) -> Connection:
        """The next guest that has connected. TimeoutError; PeerLost: the game is closed."""
        return self.endpoint.accept(timeout)

    def update(self, new_name: Optional[str] = None, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None) -> None:
        """Rename or describe the game. RendezvousError."""
        self.name = self._client.update_game(self.name, self._peer_id, new_name, info, listed).name

    def close(self) -> None:
        """End the game: its connections are closed, and it is deleted at the server, as far as that can be told within two seconds; the router
        forwards no port to it any more, and a relay is given back."""
        if self._forwarding:
            self._forwarding.end()
        deadline = Deadline(CLOSE_TIME)
        if not self._repeater.ended:
            self._repeater.end()
            self._delete()      # which answers the poll that the server holds
        self._repeater.join(max(0.4, deadline.left()))      # a poll that has registered the game again has to delete it again
        self.endpoint.close()
        if self._relay:     # which has sent the last good-byes
            self._relay.end()
            self._relay.join()
        if self._forwarding:
            self._forwarding.join()

    def __enter__(self) -> HostedGame:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _delete(self) -> None:
        with contextlib.suppress(RendezvousError):
            self._client.delete_game(self.name, self._peer_id, within=CLOSE_TIME)

    def _moved(self) -> None:
        """We have moved, or a guest is silent: tell the server where we are, and hear where all guests are."""
        self._cursor = None
        if self._forwarding:
            self._forwarding.ask_soon()
        if self._relay:
            self._relay.ask_soon()
        self._client.reconnect()
        self._repeater.begin_anew()

    def _turn(self, is_refused: bool) -> Optional[TurnServer]:
        """The TURN server that the rendezvous server hands us, with new credentials where the old ones are old or were refused."""
        if is_refused or not self._told_turn or not self._told_turn.fresh.left():
            self._told_turn = self._client.renew_turn(self.name)
        return self._told_turn

    def _poll(self, is_current: Callable[[], bool]) -> float:
        """Poll once. Seconds until the next time."""
        began, name, after = time.monotonic(), self.name, self._cursor
        wait = 0.0 if self._trouble else WAIT       # that all is well again is to be known at once
        try:
            poll = self._client.poll_game(name, self._peer_id, self.endpoint.candidates.published, after=after, wait=wait)
        except RendezvousError as error:
            if self.name != name or refused_for_loopback(error, self.endpoint):     # it was renamed meanwhile
                return 0.0
            raise
        return self._answered(poll, name, time.monotonic() - began) if is_current() else 0.0

    def _answered(self, poll: Poll, name: str, passed: float) -> float:
        """Take the answer to a poll of name that took passed seconds. Seconds until the next one."""
        if self._trouble:
            self._say("the game is offered again" if self._trouble == "refused" else "the server is back")
            use_told_stun(self._client, self.endpoint, is_back=True)
        self._trouble, self._cursor = "", poll.cursor
        if self.name == name:
            self.name = poll.name
        for guest in poll.guests:
            self.endpoint.expect(guest)
        return pause_between(poll.waited, bool(poll.guests or poll.left), passed, poll.poll_after)

    def _failed(self, error: Exception) -> float:
        """Take the failure of a poll, of whatever kind. Seconds until the next one."""
        refused = isinstance(error, RendezvousError) and error.status in REFUSED
        trouble = "refused" if refused else type(error).__name__
        if self._trouble != trouble:
            self._say(f"the game is no longer offered: {error}; connections go on; trying again" if refused else
                      f"{error}; trying again" if isinstance(error, RendezvousError) else f"{trouble}: {line_of(error)}; trying again")
        self._trouble = trouble
        return pause_after(error)


def join_game(client: RendezvousClient, name: str, stun_servers: Optional[Sequence[Address]] = None, timeout: float = 30.0,
              endpoint: Optional[Endpoint] = None, peer_id: Optional[str] = None, report: Callable[[str], None] = log.info,
              prediction: bool = True, probing: bool = False) -> Connection:
    """Connect with the host of a game. Seconds of timeout are for all that the server is needed for until the host has published addresses;
    the checks then have 15. Who gives up leaves the game, for which the server has 1.5 more.

    endpoint: one's own, which stays open when the connection is closed. It is for one game at a time, and its moved is ours meanwhile. peer_id: who
    comes back with the one of before has the same session; report: takes a line when the host or the server is slow to answer;
    prediction, probing: as in Endpoint, without one's own.
    RendezvousError: no such game, or so; ConnectFailed says why there is no way.
    """
    deadline, peer_id = Deadline(timeout), peer_id or new_peer_id()
    begin_gathering = functools.partial(gather, client, stun_servers, prediction=prediction, probing=probing)
    gathering = begin_gathering() if endpoint is None else None
    own, presence = endpoint, None
    try:
        client.connect(deadline.left())
        if gathering and stun_servers is None and is_without_stun(client, name, peer_id, gathering, deadline):
            gathering.add_done_callback(close_gathered)
            gathering = begin_gathering()
        own = gathered(gathering, deadline) if gathering else endpoint
        assert own
        with told_if_slow(UNHEARD_TIME, report, f"no address of the host for {UNHEARD_TIME:g} seconds: the host or the server is silent; still waiting"):
            start = start_with_addresses(client, name, own, peer_id, deadline)
        use_told_stun(client, own)
        presence = Presence(client, own, start, peer_id)
        presence.begin()
        presence.connection = connection = connect_or_explain(client, own, start, report)
        connection.owns_endpoint, connection.closing = endpoint is None, presence.close
        return connection
    except BaseException as error:      # Ctrl-C while the server holds the start, too
        if presence:
            presence.close()
        elif not isinstance(error, RendezvousError):
            with contextlib.suppress(RendezvousError):
                client.leave_game(name, peer_id, within=CLOSE_TIME)
        if gathering:
            gathering.add_done_callback(close_gathered)
        raise


def gather(client: RendezvousClient, stun_servers: Optional[Sequence[Address]], **options: Any) -> concurrent.futures.Future[Endpoint]:
    """An Endpoint to come: it asks STUN servers while its caller asks the rendezvous server."""
    return begin("gather", lambda: Endpoint(default_stun(client, stun_servers), client.on_loopback, **options))


def gathered(gathering: concurrent.futures.Future[Endpoint], deadline: Deadline) -> Endpoint:
    try:
        return gathering.result(deadline.left())
    except concurrent.futures.TimeoutError:
        raise ConnectFailed("there was no time to ask the STUN servers") from None


def close_gathered(gathering: concurrent.futures.Future[Endpoint]) -> None:
    if not gathering.exception():
        gathering.result().close()


def is_without_stun(client: RendezvousClient, name: str, peer_id: str, gathering: concurrent.futures.Future[Endpoint], deadline: Deadline) -> bool:
    """Whether the rendezvous server tells that nobody answers STUN there. It is asked, by a first start, where STUN is silent. RendezvousError."""
    if concurrent.futures.wait([gathering], min(STUN_TIME, deadline.left())).done or deadline.left() < MARGIN:
        return False
    return client.start_game(name, peer_id, [], within=deadline.left()).stun_ports == []


def use_told_stun(client: RendezvousClient, endpoint: Endpoint, is_back: bool = False) -> None:
    """By now the server has told where it answers STUN, if at all: an endpoint that has asked where it was thought to be asks there."""
    endpoint.use_stun(client.stun_servers, instead_of=client.likely_stun, is_back=is_back)


def start_with_addresses(client: RendezvousClient, name: str, endpoint: Endpoint, peer_id: str, deadline: Deadline) -> Start:
    """Start a game until its host has addresses. ConnectFailed: it publishes none in time; RendezvousError."""
    start = start_game(client, name, peer_id, endpoint, deadline, patience=0.0)
    while not start.addresses:
        pause = 0.0 if start.waited else min(start.poll_after, deadline.left() / 4)     # so that it asks a few times in any case
        if pause + MARGIN >= deadline.left():
            raise ConnectFailed("the host has published no address", "It is registered, but does not poll: it may just have crashed.")
        time.sleep(pause)
        # A server that was restarted may not have the game yet: its host comes back within seconds.
        start = start_game(client, start.name, peer_id, endpoint, deadline, patience=RETURN_TIME)
    return start


def start_game(client: RendezvousClient, name: str, peer_id: str, endpoint: Endpoint, deadline: Deadline, patience: float) -> Start:
    """One start, repeated if the server refuses it for loopback addresses, and for patience seconds while it has no such game."""
    returning = Deadline(patience)
    while True:
        try:
            return client.start_game(name, peer_id, endpoint.candidates.published, min(WAIT, deadline.left()), within=deadline.left())
        except RendezvousError as error:
            if refused_for_loopback(error, endpoint):
                continue
            if error.status != 404 or min(returning.left(), deadline.left()) < 0.5:
                raise
        time.sleep(0.5)


def refused_for_loopback(error: RendezvousError, endpoint: Endpoint) -> bool:
    """Whether a call may have failed for the endpoint's loopback addresses: it publishes them no more then."""
    return "addresses" in error.errors and endpoint.leave_loopback()


def connect_or_explain(client: RendezvousClient, endpoint: Endpoint, start: Start, report: Callable[[str], None]) -> Connection:
    """Connect with the host. ConnectFailed: its game is gone, or what the endpoint saw."""
    line = f"the host has not answered for {UNHEARD_TIME:g} seconds: it may be gone, or hard to reach; still trying"
    try:
        with told_if_slow(UNHEARD_TIME, report, line):
            return endpoint.connect(start)
    except ConnectFailed as failure:
        try:
            client.get_game(start.name, within=CLOSE_TIME)
        except RendezvousError as error:
            if error.status == 404:
                raise ConnectFailed("the host is gone: its game is no longer offered") from failure
        raise


def default_stun(client: RendezvousClient, stun_servers: Optional[Sequence[Address]]) -> Sequence[Address]:
    return client.stun_servers if stun_servers is None else stun_servers
