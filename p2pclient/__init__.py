"""p2pclient: what a game links against to offer games, find them, and talk to the other player directly.

The host:                                              A guest:

    client = RendezvousClient("http://server:8000")        client = RendezvousClient("http://server:8000")
    with HostedGame(client, "my game") as game:            with join_game(client, "my game") as connection:
        connection = game.accept()                             connection.send(b"hello")
        print(connection.recv())                               print(connection.recv(timeout=5))

Beneath these: RendezvousClient speaks to the server; an Endpoint is one UDP socket, for a router's mapping belongs to its
socket: it finds the socket's candidate addresses, punches holes, and carries the game's own datagrams. On the wire:

    Connectivity checks are STUN Binding requests as ICE has them (RFC 8445), answered in kind; to a stock ICE agent the ufrag of both
    sides is the sessionId, their password the sessionKey, the guest controls. checks.py has their attributes. One attribute of ours
    (P2P, 0xD7A2, which others ignore) tells a player's sessions apart, and makes replays useless: channel.py. A Binding indication
    with the same attributes says good-bye.
    Everything else on the socket is the game's, from addresses alone from which an authentic check has come. Where both sides send
    P2P each datagram has a sequence number and a tag of 16 bytes together before it (channel.py); a stock agent's is as it is.
    What is STUN is told by its first byte (RFC 7983), cookie and FINGERPRINT.
    Among the addresses that a player publishes is one object, {"p2p": {"pacing": 5, "nat": "symmetric", "attempt": "x1Y2z3a4"}}, which
    others ignore: milliseconds between two checks that it can bear (as RFC 8839's ice-pacing; 50 where there is none), the kind of its
    NAT in the words of Candidates (candidates.py), and a text that differs in each try of a guest, so that its host is told of it again.
    How a symmetric NAT allocates ports stands there too (prediction.py), and whether probing is wanted.

    Checks go out thus: never two of a socket within 5 ms; to addresses that were not heard every 50 ms, but for the second, after 10 ms;
    at once to one that was first heard, and to nominate. Each check of a guest nominates until one was answered. So two players
    are connected one and a half round trips after both know the other's addresses. After 7 seconds of silence both ask STUN and
    the server anew; after 40 the other player is lost.

The files, from leaf to root; none needs one below it:

    deadline.py     what is left of a budget of time, and what takes long
    addresses.py    addresses, and which of a peer's are usable
    stun.py         the codec of STUN
    sockets.py      UDP sockets, and what the operating system knows of ways
    farewells.py    good-byes that are said again
    pacing.py       what a session and all of a socket may send, and when
    channel.py      who the peer is, and datagrams made authentic
    checklist.py    a peer's addresses, and which of them is to be checked next
    prediction.py   how a symmetric NAT allocates ports, and which are likely next
    candidates.py   a socket's candidates and the kind of its NAT; which of a peer's are worth a check
    checks.py       the connectivity checks of one session, without socket or clock
    early.py        checks that come before the server has told of their session
    portmap.py      a public port from one's own router: PCP and NAT-PMP
    upnp.py         the same by UPnP
    background.py   a thread that keeps something for as long as a game is on offer
    turn.py         an address of a TURN server, without socket or clock
    relay.py        such an address kept for as long as a game is on offer
    forwarding.py   such a port kept for as long as a game is on offer
    whereabouts.py  a socket's candidates, kept up to date
    probing.py      the search for a peer behind a symmetric NAT, without socket or clock
    diagnosis.py    why there is no connection, in words
    texts.py        the log, and texts from the network and callbacks of the game, made harmless
    answers.py      what the server answers, checked field by field, and its refusals
    tcp.py          connections to the server, and the time that an answer may take
    transport.py    one HTTP call, with repetition and errors
    rendezvous.py   the calls to the server, and its answers
    attempts.py     by which try of a guest a host knows its session
    connection.py   a connection with one other player
    branches.py     further sockets, to measure a symmetric NAT and to search with
    endpoint.py     one UDP socket, its thread, and its connections
    repeater.py     a thread that calls the server again and again
    presence.py     what a guest keeps up at the server while it checks and plays
    games.py        HostedGame, join_game
    signals.py      the signals by which a program is told to end
    commandline.py  what the doctor and the simulators share
    __main__.py     the doctor: python -m p2pclient check

Threads: each Endpoint has one, which reads the socket and does what is due; each HostedGame has one, which polls, one that keeps
a port of the router, and one that keeps a relay where one is offered; each connection of a guest has one, which starts the game again, held by the
server until there is news. What becomes of these calls never ends a connection. All state of an Endpoint lies behind its one lock. Errors are
RendezvousError (the server), ConnectFailed and PeerLost (the other player). Only the HTTP part needs a library, requests.
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
from .endpoint import Endpoint  # noqa: E402
from .games import HostedGame, join_game  # noqa: E402
from .rendezvous import GameInfo, Guest, Poll, Registration, RendezvousClient, Start, new_peer_id  # noqa: E402
from .turn import TurnServer  # noqa: E402
from .whereabouts import KEEPALIVE  # noqa: E402

__all__ = ["KEEPALIVE", "ConnectFailed", "Connection", "Deadline", "Endpoint", "GameInfo", "Guest", "HostedGame", "PeerLost", "Poll", "Registration",
           "RendezvousClient", "RendezvousError", "Start", "TurnServer", "describe", "join_game", "new_peer_id"]
