#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests"]
# ///
"""Offer games at a rendezvous server, and echo what each guest says, until Ctrl-C."""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time

try:
    import p2pclient
    from p2pclient.commandline import SLOW, OutputLost, add_peer_id_file, add_search, complain, explain, kept_peer_id, output_lost, parse_server, say, seconds
    from p2pclient.deadline import told_if_slow
    from p2pclient.diagnosis import without_stun
    from p2pclient.signals import end_by_signals
    from p2pclient.texts import printable
    from p2pclient.turn import parse_turn_url
except ModuleNotFoundError as error:
    sys.exit(f"the module {error.name} is missing; python3 -m pip install {error.name} installs it")

WHOSE = ("Ada", "Bruno", "Chidi", "Dagny", "Emeka", "Freya", "Goro", "Hana", "Ines", "Jonas", "Kaya", "Lena", "Mateo", "Nora", "Olu", "Priya")
WHAT = ("castle", "dungeon", "island", "arena", "railway", "harbour", "orchard", "labyrinth", "lighthouse", "canyon", "glacier", "bazaar")

PATIENCE = 3.0      # seconds for a server to answer
STUN_TIME = 1.0     # seconds for a STUN server of which the rendezvous server has just told
AT_ONCE = 16        # hosts that gather candidates


def json_object(text):
    """An object, strictly. For argparse."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    if not isinstance(value, dict):
        raise ValueError
    return value


def parse_turn(url):
    """The address in a URL such as turn:turn.example.net:3478. For argparse."""
    address = parse_turn_url(url)
    if address is None:
        raise ValueError
    return address


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL", help="the rendezvous server (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="games to offer (default: %(default)s)")
    parser.add_argument("--name", metavar="PREFIX", help="name the games PREFIX 1, PREFIX 2 ..., a single one PREFIX (default: names of people and places)")
    parser.add_argument("--info", type=json_object, metavar="JSON", help="what lobbies show of each game, an object")
    parser.add_argument("--stun", type=parse_server, action="append", metavar="HOST:PORT",
                        help="a STUN server, repeatable; two tell the kind of the NAT (default: the rendezvous server)")
    parser.add_argument("--keepalive", type=seconds, default=p2pclient.KEEPALIVE, metavar="S",
                        help="seconds between keep-alives (default: %(default)s)")
    parser.add_argument("--duration", type=seconds, metavar="S", help="end after so many seconds")
    parser.add_argument("--once", action="store_true", help="each game ends when its first guest has left")
    parser.add_argument("--no-port-mapping", action="store_false", dest="port_mapping", help="do not ask the router to forward a port to each game")
    add_search(parser)
    parser.add_argument("--no-relay", action="store_false", dest="relay", help="keep no relay, whoever offers one")
    parser.add_argument("--turn", type=parse_turn, metavar="turn:HOST:PORT", help="a TURN server to relay (default: the one that the rendezvous server offers)")
    parser.add_argument("--turn-user", default="", metavar="NAME:PASSWORD", help="who it knows us as")
    parser.add_argument("--turn-secret", default=os.environ.get("P2P_TURN_SECRET", ""), metavar="SECRET",
                        help="the secret by which it knows us (coturn: static-auth-secret; default: P2P_TURN_SECRET in the environment)")
    add_peer_id_file(parser, "host")
    options = parser.parse_args()
    if options.hosts < 1:
        parser.error("--hosts must be at least 1")
    if options.keepalive < 1:
        parser.error("--keepalive must be at least 1")
    name, colon, password = options.turn_user.partition(":")
    if options.turn and not colon and not options.turn_secret:
        parser.error("--turn needs --turn-user NAME:PASSWORD, or --turn-secret")
    options.turn = options.turn and p2pclient.TurnServer(options.turn, name, password, "" if colon else options.turn_secret)
    return options


def names(prefix, hosts):
    """Distinct names without end: the second round of each is numbered, and with a prefix for several hosts the first as well."""
    firsts = [prefix] if prefix else [f"{who}'s {what}" for who in WHOSE for what in WHAT]
    random.shuffle(firsts)
    for number in itertools.count(1):
        for first in firsts:
            yield f"{first} {number}" if number > 1 or prefix and hosts > 1 else first


def tell(name, text):
    say(f"[{printable(name)}] {printable(text)}")


def in_words(games):
    return "1 game is" if len(games) == 1 else f"{len(games)} games are"


def offer(options, name, peer_id):
    """Register a game; None if the name is taken."""
    client = p2pclient.RendezvousClient(options.server, patience=PATIENCE)
    try:
        game = p2pclient.HostedGame(client, name, options.info, stun_servers=options.stun, keepalive=options.keepalive,
                                    report=lambda line: tell(name, line), peer_id=peer_id, port_mapping=options.port_mapping,
                                    prediction=options.prediction, probing=options.probing, relay=options.relay, turn=options.turn)
    except p2pclient.RendezvousError as error:
        if error.status == 409:
            tell(name, "this name is taken, trying another")
            return None
        raise
    tell(name, f"registered; {p2pclient.describe(game.endpoint.candidates)}")
    return game


def offer_all(options, peer_id, games):
    """Offer as many games as are asked for, several at a time, and add each to games. RendezvousError: the server wants no more, or is not there."""
    def offer_one(name):
        if not failures and not output_lost.is_set():
            try:
                games.extend(filter(None, [offer(options, name, peer_id)]))
            except p2pclient.RendezvousError as error:
                failures.append(error)

    failures, candidates = [], names(options.name, options.hosts)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool, \
            told_if_slow(SLOW, say, f"no answer for {SLOW:g} seconds from {printable(options.server)}, or from STUN; still waiting"):
        try:
            while len(games) < options.hosts and not failures and not output_lost.is_set():
                list(pool.map(offer_one, itertools.islice(candidates, options.hosts - len(games))))
        except KeyboardInterrupt:
            failures.append(None)       # those that have not begun do not begin
            raise
    if failures:
        raise failures[0]


def echo(name, connection):
    """Send back what a guest says until it leaves."""
    guest = f"guest {connection.session_id[:8]}"
    tell(name, f"{guest} connected: {connection.local_address} to {connection.remote_address}, {1000 * connection.connect_time:.0f} ms after it was known, "
              f"round trip {1000 * connection.rtt:.1f} ms")
    echoed = 0
    try:
        while True:
            connection.send(connection.recv())
            echoed += 1
    except p2pclient.PeerLost as end:
        tell(name, f"{guest}: {end}; {echoed} messages echoed, round trip {1000 * connection.rtt:.1f} ms")
    connection.close()


def serve(game, once):
    """Echo to each guest in a thread of its own, until the game is closed or, once, the first has left."""
    try:
        while True:
            connection = game.accept()
            thread = threading.Thread(target=echo, args=(game.name, connection), daemon=True)
            thread.start()
            if once:
                thread.join()
                game.close()
    except p2pclient.PeerLost:
        pass


def run(options, games):
    """Offer games, which are added to games, and serve their guests until it is time to end. The exit status."""
    status = 0
    try:
        offer_all(options, kept_peer_id(options), games)
    except p2pclient.RendezvousError as error:
        complain((f"{in_words(games)} on offer, not {options.hosts}: " if games else "") + explain(error, options.server))
        status = 1
    if not games:
        return status
    warn_without_stun(games[0].endpoint)
    threads = [threading.Thread(target=serve, args=(game, options.once), daemon=True) for game in games]
    for thread in threads:
        thread.start()
    say(f"{in_words(games)} on offer at {options.server}; Ctrl-C ends {'it' if len(games) == 1 else 'them'}")
    end = p2pclient.Deadline(options.duration)
    while end.left() and not output_lost.is_set() and any(thread.is_alive() for thread in threads):
        time.sleep(min(0.2, end.left()))
    return status


def warn_without_stun(endpoint):
    """Say once what it means if no STUN server answers. One at another port than was guessed has a second."""
    end = p2pclient.Deadline(STUN_TIME)
    while end.left() and endpoint.candidates.nat == "no answer":
        time.sleep(0.05)
    if without_stun(endpoint.candidates):
        say(f"warning: {without_stun(endpoint.candidates)}")


def close_all(games):
    """Delete all games at once."""
    closing = [threading.Thread(target=game.close) for game in games]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    if games:
        say(f"{in_words(games)} no longer on offer")


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")
    end_by_signals()
    games, status = [], 0
    try:
        status = run(options, games)
    except (KeyboardInterrupt, OutputLost):
        pass
    except ValueError as error:
        complain(str(error))
        status = 2
    for number in (signal.SIGINT, signal.SIGTERM):      # the next one does not wait for the server to hear of it
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OutputLost):
        close_all(games)
    return 1 if output_lost.is_set() else status


if __name__ == "__main__":
    sys.exit(main())
