#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests"]
# ///
"""Offer games at a rendezvous server, and echo what each guest says, until Ctrl-C."""

import argparse
import json
import random
import signal
import sys
import threading
import time

try:
    import p2pclient
    from p2pclient.commandline import add_peer_id_file, kept_peer_id, parse_server, seconds
    from p2pclient.texts import printable
except ModuleNotFoundError as error:
    sys.exit(f"the module {error.name} is missing; python3 -m pip install {error.name} installs it")

WHOSE = ("Ada", "Bruno", "Chidi", "Dagny", "Emeka", "Freya", "Goro", "Hana", "Ines", "Jonas", "Kaya", "Lena", "Mateo", "Nora", "Olu", "Priya")
WHAT = ("castle", "dungeon", "island", "arena", "railway", "harbour", "orchard", "labyrinth", "lighthouse", "canyon", "glacier", "bazaar")

PATIENCE = 3.0      # seconds for a server to answer


def json_object(text):
    """An object, strictly. For argparse."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    if not isinstance(value, dict):
        raise ValueError
    return value


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL", help="the rendezvous server (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="games to offer (default: %(default)s)")
    parser.add_argument("--name", metavar="PREFIX", help="name the games PREFIX 1, PREFIX 2 ... (default: names of people and places)")
    parser.add_argument("--info", type=json_object, metavar="JSON", help="what lobbies show of each game, an object")
    parser.add_argument("--stun", type=parse_server, action="append", metavar="HOST:PORT",
                        help="a STUN server, repeatable; two tell the kind of the NAT (default: the rendezvous server)")
    parser.add_argument("--keepalive", type=seconds, default=p2pclient.KEEPALIVE, metavar="S",
                        help="seconds between keep-alives (default: %(default)s)")
    parser.add_argument("--duration", type=seconds, metavar="S", help="end after so many seconds")
    parser.add_argument("--once", action="store_true", help="each game ends when its first guest has left")
    parser.add_argument("--no-port-mapping", action="store_false", dest="port_mapping", help="do not ask the router to forward a port to each game")
    add_peer_id_file(parser, "host")
    options = parser.parse_args()
    if options.hosts < 1:
        parser.error("--hosts must be at least 1")
    if options.keepalive < 1:
        parser.error("--keepalive must be at least 1")
    return options


def names(prefix):
    """Distinct names without end: the second round of each is numbered."""
    firsts = [prefix] if prefix else [f"{who}'s {what}" for who in WHOSE for what in WHAT]
    random.shuffle(firsts)
    number = 1
    while True:
        for first in firsts:
            yield f"{first} {number}" if prefix or number > 1 else first
        number += 1


def say(name, text):
    print(f"[{printable(name)}] {printable(text)}", flush=True)


def offer(options, name, peer_id):
    """Register a game; None if the name is taken."""
    client = p2pclient.RendezvousClient(options.server, patience=PATIENCE)
    try:
        game = p2pclient.HostedGame(client, name, options.info, stun_servers=options.stun, keepalive=options.keepalive,
                                    report=lambda line: say(name, line), peer_id=peer_id, port_mapping=options.port_mapping)
    except p2pclient.RendezvousError as error:
        if error.status == 409:
            say(name, "this name is taken, trying another")
            return None
        raise
    say(name, f"registered; {p2pclient.describe(game.endpoint.candidates)}")
    return game


def echo(name, connection):
    """Send back what a guest says until it leaves."""
    guest = f"guest {connection.session_id[:8]}"
    say(name, f"{guest} connected: {connection.local_address} to {connection.remote_address}, {1000 * connection.connect_time:.0f} ms after it was known, "
              f"round trip {1000 * connection.rtt:.1f} ms")
    echoed = 0
    try:
        while True:
            connection.send(connection.recv())
            echoed += 1
    except p2pclient.PeerLost as end:
        say(name, f"{guest}: {end}; {echoed} messages echoed, round trip {1000 * connection.rtt:.1f} ms")
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


def interrupt(number, frame):
    raise KeyboardInterrupt


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):      # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, interrupt)
    games, candidates = [], names(options.name)
    status = 0
    try:
        peer_id = kept_peer_id(options)
        while len(games) < options.hosts:
            game = offer(options, next(candidates), peer_id)
            if game:
                games.append(game)
        threads = [threading.Thread(target=serve, args=(game, options.once), daemon=True) for game in games]
        for thread in threads:
            thread.start()
        print(f"{len(games)} games are on offer at {options.server}; Ctrl-C ends them", flush=True)
        end = p2pclient.Deadline(options.duration)
        while end.left() and any(thread.is_alive() for thread in threads):
            time.sleep(min(0.2, end.left()))
    except KeyboardInterrupt:
        pass
    except (p2pclient.RendezvousError, ValueError) as error:
        print(f"simulate_hosts: {printable(str(error))}", file=sys.stderr)
        status = 2 if isinstance(error, ValueError) else 1
    for number in (signal.SIGINT, signal.SIGTERM):      # the next one does not wait for the server to hear of it
        signal.signal(number, signal.SIG_DFL)
    closing = [threading.Thread(target=game.close) for game in games]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    if games:
        print(f"{len(games)} games are no longer on offer", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
