"""The calls to the rendezvous server, and what it answers."""

from __future__ import annotations

import contextlib
import secrets
import threading
import unicodedata
import urllib.parse
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

import requests

from .addresses import Address, plain_ip
from .answers import Body, RendezvousError, RepeatedNotFound
from .deadline import Deadline
from .sockets import resolve
from .transport import Transport
from .turn import TurnServer, parse_turn_url


@dataclass(frozen=True)
class Registration:
    """A game is offered. created: it is new; expires_in, poll_after: seconds; stun_ports: where the server answers STUN, None: it does not tell;
    turn: a relay that it hands the host, or None."""

    name: str
    created: bool
    expires_in: float
    poll_after: float
    stun_ports: Optional[List[int]] = None
    turn: Optional[TurnServer] = None


@dataclass(frozen=True)
class Guest:
    """A guest as its host learns of it. seen_at: the IP address from which the server saw it call; "" if it does not tell."""

    session_id: str
    session_key: str = field(repr=False)
    addresses: List[Any]
    seen_at: str = ""


@dataclass(frozen=True)
class Poll:
    """The guests that came or moved. cursor: what to pass as after next time; gone: sessions of the replies that are gone; waited: the
    server holds polls that want to wait, so the next one can follow at once; left: sessions that have ended since after."""

    name: str
    guests: List[Guest]
    cursor: int
    expires_in: float
    poll_after: float
    gone: List[str]
    waited: bool = False
    left: List[str] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """A guest's session with a game; addresses is empty while the host has none for it; cursor, waited: as in Poll; stun_ports: as in
    Registration; seen_at: the IP address from which the server saw the host call, if the host publishes it; "" if it does not tell."""

    name: str
    session_id: str
    session_key: str = field(repr=False)
    addresses: List[Any]
    cursor: int
    expires_in: float
    poll_after: float
    waited: bool = False
    stun_ports: Optional[List[int]] = None
    seen_at: str = ""


@dataclass(frozen=True)
class GameInfo:
    """What anybody may know of a game. ready: a guest that starts it gets the host's addresses at once."""

    name: str
    info: Dict[str, Any]
    guests: int
    ready: bool


def new_peer_id() -> str:
    """A secret that makes its owner the host of a game, or one guest of it: 192 random bits."""
    return secrets.token_urlsafe(24)


class RendezvousClient:
    """Calls to one server, from any thread.

    base_url: http://host:port; session: a requests.Session of one's own, which then makes the connections and times single reads only;
    timeout: seconds for one try, beside those that the server may hold it; patience: seconds for which a call is repeated when the server
    does not answer or says 429, 502, 503 or 504: every call here is safe to repeat. within: seconds for all of a call, tries and pauses.
    All methods raise RendezvousError. ValueError: base_url is no HTTP URL.
    """

    def __init__(self, base_url: str, session: Optional[requests.Session] = None, timeout: float = 10.0, patience: float = 10.0) -> None:
        self._transport = Transport(base_url, session, timeout, patience)
        self.base_url = self._transport.base_url
        self.stun_server = self._transport.address      # at the same port, over UDP, unless the server says otherwise
        host, port = self.stun_server
        self.likely_stun = [(host, each) for each in (port, port + 1) if each < 65536]      # where it answers if nothing is said at its start
        self.stun_ports: Optional[List[int]] = None     # what it said
        # What this client registered, so that it can do so again when a restarted server has forgotten it.
        self._registered: Dict[str, Dict[str, Any]] = {}
        self._registering = threading.Lock()            # held by who registers a game again, and by who renames one

    @property
    def on_loopback(self) -> bool:
        """Whether the server is on this very machine, called over loopback: then loopback addresses lead to the peers too."""
        found = resolve([self.stun_server])
        return bool(found) and all(plain_ip(host).is_loopback for host, _ in found)

    @property
    def stun_servers(self) -> List[Address]:
        """Where the server answers STUN, as far as it has told: at the port of HTTP and the next one otherwise."""
        return self.likely_stun if self.stun_ports is None else [(self.stun_server[0], port) for port in self.stun_ports]

    def connect(self, within: Optional[float] = None) -> None:
        """Make a connection before the first call needs it: whoever has something else to do meanwhile saves a round trip."""
        self._transport.connect(within)

    def reconnect(self) -> None:
        """Have further calls use new connections: a router that has forgotten us answers on none of those that there are."""
        self._transport.reconnect()

    def register_game(self, name: str, peer_id: str, info: Optional[Dict[str, Any]] = None, listed: Optional[bool] = None) -> Registration:
        """Offer a game, or keep one's own alive."""
        body = without_none(name=name, peerId=peer_id, info=info, listed=listed)
        status, answer, _ = self._transport.call("POST", "/games/register", body)
        registration = Registration(answer.text("name"), status == 201, answer.seconds("expiresIn"), answer.seconds("pollAfter"), answer.ports("stun"),
                                    turn_server(answer))
        self._registered[registration.name] = {**body, "name": registration.name}
        self.stun_ports = registration.stun_ports
        return registration

    def renew_turn(self, name: str) -> Optional[TurnServer]:
        """New credentials for the relay: by registering a game of ours again, which changes nothing else of it."""
        answer = self._register_again(normal(name))
        return None if answer is None else turn_server(answer)

    def poll_game(self, name: str, peer_id: str, addresses: Sequence[Any], after: Optional[int] = None,
                  replies: Optional[Mapping[str, Sequence[Any]]] = None, wait: float = 0, dismiss: Optional[Sequence[str]] = None) -> Poll:
        """Publish addresses and learn of guests. A game of ours that the server has forgotten is registered again first.

        wait: seconds for which the server may hold the poll until there is news; dismiss: sessions of guests that are sent away for good.
        """
        name = normal(name)
        body = without_none(name=name, peerId=peer_id, addresses=list(addresses), after=after, replies=replies, dismiss=dismiss)
        try:
            _, answer, waited = self._transport.call("POST", "/games/poll", body, wait)
        except RendezvousError as error:
            if error.status != 404 or self._register_again(name) is None:
                raise
            body.pop("after", None)
            _, answer, waited = self._transport.call("POST", "/games/poll", body)
        present = answer.text("name")
        if present != name:     # its owner has renamed it by another client
            with self._registering:
                self._keep_registered(name, name=present)
        guests = [Guest(guest.identifier("sessionId"), guest.identifier("sessionKey"), guest.members("addresses"), guest.ip("from"))
                  for guest in answer.objects("guests")]
        return Poll(present, guests, answer.whole("cursor"), answer.seconds("expiresIn"), answer.seconds("pollAfter"),
                    answer.texts("gone"), waited, answer.texts("left"))

    def start_game(self, name: str, peer_id: str, addresses: Sequence[Any], wait: float = 0, after: Optional[int] = None,
                   within: Optional[float] = None) -> Start:
        """Join a game as a guest, or say that one is still there: to do it again is the same session.

        wait: seconds for which the server may hold the call until the host has addresses, or, with after, the cursor of an earlier answer,
        other ones than in that answer.
        """
        body = without_none(name=name, peerId=peer_id, addresses=list(addresses), after=after)
        _, answer, waited = self._transport.call("POST", "/games/start", body, wait, within)
        self.stun_ports = answer.ports("stun")
        return Start(answer.text("name"), answer.identifier("sessionId"), answer.identifier("sessionKey"), answer.members("addresses"),
                     answer.whole("cursor"), answer.seconds("expiresIn"), answer.seconds("pollAfter"), waited, self.stun_ports,
                     answer.ip("from"))

    def leave_game(self, name: str, peer_id: str, within: Optional[float] = None) -> None:
        """Leave a game as a guest, whose place is free then."""
        with contextlib.suppress(RepeatedNotFound):     # a first try whose answer was lost has done it
            self._transport.call("POST", "/games/leave", {"name": name, "peerId": peer_id}, within=within)

    def list_games(self) -> List[GameInfo]:
        """The listed games, oldest first."""
        return [game_info(game) for game in self._transport.call("GET", "/games").body.objects("games")]

    def get_game(self, name: str, within: Optional[float] = None) -> GameInfo:
        """One game, listed or not."""
        return game_info(self._transport.call("GET", game_path(name), within=within).body)

    def update_game(self, name: str, peer_id: str, new_name: Optional[str] = None, info: Optional[Dict[str, Any]] = None,
                    listed: Optional[bool] = None) -> GameInfo:
        """Rename or describe one's own game."""
        body = without_none(peerId=peer_id, name=new_name, info=info, listed=listed)
        with self._registering:     # a poll of another thread that the renaming overtakes must not register the old name again
            try:
                answer = self._transport.call("PATCH", game_path(name), body).body
            except RepeatedNotFound:    # a first try whose answer was lost may have renamed it: only its owner may update the new name
                answer = self._transport.call("PATCH", game_path(new_name or name), body).body
            game = game_info(answer)
            self._keep_registered(normal(name), **{**body, "name": game.name})
        return game

    def delete_game(self, name: str, peer_id: str, within: Optional[float] = None) -> None:
        """End one's own game."""
        self._registered.pop(normal(name), None)
        with contextlib.suppress(RepeatedNotFound):     # a first try whose answer was lost has done it
            self._transport.call("DELETE", game_path(name), {"peerId": peer_id}, within=within)

    def _keep_registered(self, former: str, **changes: Any) -> None:
        """Remember a game of ours under its present name, which is among the changes. _registering is held."""
        registered = self._registered.pop(former, None)
        if registered:
            self._registered[changes["name"]] = {**registered, **changes}

    def _register_again(self, name: str) -> Optional[Body]:
        """The answer to another registration of a game of ours; None if it is not ours. A game that is deleted meanwhile is deleted again, for this
        may have come to the server later."""
        with self._registering:
            registered = self._registered.get(name)
            answer = self._transport.call("POST", "/games/register", registered).body if registered else None
        if registered and name not in self._registered:
            with contextlib.suppress(RendezvousError):
                self.delete_game(name, registered["peerId"])
        return answer

    def health(self) -> Dict[str, Any]:
        """What the server says of itself: status, version, games, guests."""
        answer = self._transport.call("GET", "/healthz").body
        answer.text("version")
        return answer


def without_none(**fields: Any) -> Dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def turn_server(answer: Body) -> Optional[TurnServer]:
    """The relay in the answer to a registration; None if there is none that can be used over UDP. RendezvousError: it is malformed."""
    if "turn" not in answer:
        return None
    turn = Body(answer.mapping("turn"))
    address = next(filter(None, map(parse_turn_url, turn.texts("urls"))), None)
    username, password = turn.text("username"), turn.text("credential")
    return TurnServer(address, username, password, fresh=Deadline(turn.seconds("ttl_seconds") / 2)) if address else None


def normal(name: str) -> str:
    """A name as the server has it."""
    return unicodedata.normalize("NFC", name)


def game_path(name: str) -> str:
    return "/games/" + urllib.parse.quote(name, safe="", errors="replace")


def game_info(answer: Body) -> GameInfo:
    return GameInfo(answer.text("name"), answer.mapping("info"), answer.whole("guests"), answer.flag("ready"))
