"""p2pclient: what a game links against to offer games, find them, and talk to the other player directly.

The host:                                              A guest:

    client = RendezvousClient("http://server:8000")        client = RendezvousClient("http://server:8000")
    with HostedGame(client, "my game") as game:            with join_game(client, "my game") as connection:
        connection = game.accept()                             connection.send(b"hello")
        print(connection.recv())                               print(connection.recv(timeout=5))

Beneath these: RendezvousClient speaks to the server; an Endpoint is one UDP socket, for a router's mapping belongs to its
socket: it finds the socket's candidate addresses, punches holes, and carries the game's own datagrams. On the wire:

    Connectivity checks are STUN Binding requests as in ICE (RFC 8445): USERNAME is the sessionId, MESSAGE-INTEGRITY is keyed with
    the sessionKey, ICE-CONTROLLING comes from the guest and ICE-CONTROLLED from the host, USE-CANDIDATE nominates, FINGERPRINT
    ends it. They are answered in kind. A Binding indication with the same attributes says good-bye.
    Everything else on the socket is the game's, as it is: what is STUN is told by its first byte (RFC 7983), cookie and
    FINGERPRINT. It is taken only from addresses from which an authentic check has come.

The files, from leaf to root; none needs one below it:

    deadline.py     what is left of a budget of time
    addresses.py    addresses, and which of a peer's are usable
    stun.py         the codec of STUN
    sockets.py      UDP sockets, and what the operating system knows of ways
    candidates.py   a socket's candidates, and the kind of its NAT
    checks.py       the connectivity checks of one session, without socket or clock
    pacing.py       what all sessions of a socket may send together
    diagnosis.py    why there is no connection, in words
    texts.py        texts from the network, made harmless
    answers.py      what the server answers, checked field by field, and its refusals
    tcp.py          connections to the server, and the time that an answer may take
    transport.py    one HTTP call, with repetition and errors
    rendezvous.py   the calls to the server, and its answers
    connection.py   a connection with one other player
    endpoint.py     one UDP socket, its thread, and its connections
    repeater.py     a thread that calls the server again and again
    presence.py     what a guest keeps up at the server while it checks and plays
    games.py        HostedGame, join_game
    commandline.py  what the doctor and the simulators share
    __main__.py     the doctor: python -m p2pclient check

Threads: each Endpoint has one, which reads the socket and does what is due; each HostedGame has one, which polls, and each
connection of a guest one, which starts the game again, held by the server until there is news. What becomes of these calls never
ends a connection. All state of an Endpoint lies behind its one lock. Errors are RendezvousError (the server), ConnectFailed and
PeerLost (the other player). Only the HTTP part needs a library, requests.
"""

import sys


def require_requests() -> None:
    """SystemExit with one line where the doctor is begun without the library requests; a game gets the usual ModuleNotFoundError."""
    try:
        import requests  # noqa: F401
    except ModuleNotFoundError:
        if sys.argv[:1] == ["-m"]:      # as python -m p2pclient: Python is just looking for __main__.py
            sys.exit("the module requests is missing; python3 -m pip install requests installs it")
        raise


require_requests()

from .answers import RendezvousError  # noqa: E402
from .connection import Connection, PeerLost  # noqa: E402
from .deadline import Deadline  # noqa: E402
from .diagnosis import ConnectFailed, describe  # noqa: E402
from .endpoint import KEEPALIVE, Endpoint  # noqa: E402
from .games import HostedGame, join_game  # noqa: E402
from .rendezvous import GameInfo, Guest, Poll, Registration, RendezvousClient, Start, new_peer_id  # noqa: E402

__all__ = ["KEEPALIVE", "ConnectFailed", "Connection", "Deadline", "Endpoint", "GameInfo", "Guest", "HostedGame", "PeerLost", "Poll", "Registration",
           "RendezvousClient", "RendezvousError", "Start", "describe", "join_game", "new_peer_id"]
