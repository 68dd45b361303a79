#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests"]
# ///
"""List the games of a rendezvous server, join one, exchange messages with its host, and say what worked."""

import argparse
import contextlib
import json
import random
import statistics
import sys
import time

try:
    import p2pclient
    from p2pclient.commandline import SLOW, OutputLost, add_peer_id_file, add_search, complain, explain, kept_peer_id, parse_server, say, seconds
    from p2pclient.deadline import told_if_slow
    from p2pclient.diagnosis import without_stun
    from p2pclient.signals import end_by_signals
    from p2pclient.texts import printable
except ModuleNotFoundError as error:
    sys.exit(f"the module {error.name} is missing; python3 -m pip install {error.name} installs it")

PATIENCE = 3.0      # seconds for a server to answer
ECHO = 2.0          # seconds for a host to echo


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL", help="the rendezvous server (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--game", metavar="NAME", help="the game to join, listed or not (default: any that is listed)")
    which.add_argument("--all", action="store_true", help="join each listed game in turn")
    parser.add_argument("--messages", type=int, default=5, metavar="N", help="messages to exchange (default: %(default)s)")
    parser.add_argument("--interval", type=seconds, default=0.1, metavar="S", help="seconds between two messages (default: %(default)s)")
    parser.add_argument("--stun", type=parse_server, action="append", metavar="HOST:PORT",
                        help="a STUN server, repeatable; two tell the kind of the NAT (default: the rendezvous server)")
    add_search(parser)
    add_peer_id_file(parser, "guest")
    options = parser.parse_args()
    if options.messages < 1:
        parser.error("--messages must be at least 1")
    return options


def show(games):
    """The games as a table. What hosts have written is made safe for the terminal."""
    rows = [("NAME", "GUESTS", "READY", "INFO")]
    rows += [(printable(game.name), str(game.guests), "yes" if game.ready else "no",
              printable(json.dumps(game.info, ensure_ascii=False))) for game in games]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))


def choose(options, client):
    """The names of the games to join."""
    if options.game is not None:
        return [options.game]
    games = client.list_games()
    if not games:
        say(f"there are no games at {client.base_url}")
        return []
    show(games)
    ready = [game.name for game in games if game.ready] or [game.name for game in games]
    return [game.name for game in games] if options.all else [random.choice(ready)]


def talk(connection, began, options):
    """Exchange messages; the round-trip times in seconds of those that came back."""
    times = []
    for i in range(options.messages):
        message = f"message {i + 1} of {options.messages}"
        try:
            passed = echo(connection, message.encode())
        except p2pclient.PeerLost as end:
            say(f"  the connection is lost: {end}")
            break
        if passed is None:
            say(f"  {message}: no echo within {ECHO:g} s")
            continue
        if not times:
            say(f"  first datagram both ways {1000 * (time.monotonic() - began):.0f} ms after the start")
        times.append(passed)
        say(f"  {message}: round trip {1000 * passed:.2f} ms")
        if i + 1 < options.messages:
            time.sleep(options.interval)
    return times


def echo(connection, message):
    """Seconds until a message comes back, or None if it does not."""
    sent = time.monotonic()
    connection.send(message)
    try:
        while connection.recv(max(0.0, sent + ECHO - time.monotonic())) != message:
            pass        # the echo of an earlier message that was given up
    except TimeoutError:
        return None
    return time.monotonic() - sent


def open_endpoint(options):
    """The socket for all games that are joined in turn: STUN is asked once."""
    client = p2pclient.RendezvousClient(options.server)
    with told_if_slow(SLOW, say, f"no STUN server has answered for {SLOW:g} seconds; still waiting"):
        endpoint = p2pclient.Endpoint(client.stun_servers if options.stun is None else options.stun, client.on_loopback,
                                      prediction=options.prediction, probing=options.probing)
    if without_stun(endpoint.candidates):
        say(f"warning: {without_stun(endpoint.candidates)}")
    return endpoint


def join(name, endpoint, options, peer_id):
    """Join a game and talk. The round-trip times; None if no connection came about."""
    say(f"joining {printable(name)}; {p2pclient.describe(endpoint.candidates)}")
    client = p2pclient.RendezvousClient(options.server, patience=PATIENCE)
    began = time.monotonic()
    try:
        with p2pclient.join_game(client, name, endpoint=endpoint, peer_id=peer_id, report=lambda line: say("  " + line)) as connection:
            say(f"  connected: {connection.local_address} to {connection.remote_address} in {1000 * connection.connect_time:.0f} ms")
            return talk(connection, began, options)
    except (p2pclient.RendezvousError, p2pclient.ConnectFailed) as failure:
        reason = explain(failure, options.server) if isinstance(failure, p2pclient.RendezvousError) else str(failure)
        say(f"  not connected: {printable(reason)}")
        return None


def run(options):
    """List, choose and join. The exit status."""
    peer_id = kept_peer_id(options)
    with told_if_slow(SLOW, say, f"no answer for {SLOW:g} seconds from {printable(options.server)}; still waiting"):
        chosen = choose(options, p2pclient.RendezvousClient(options.server, patience=PATIENCE))
    if not chosen:
        return 1
    with contextlib.closing(open_endpoint(options)) as endpoint:
        results = [join(name, endpoint, options, peer_id) for name in chosen]
    connected = [times for times in results if times is not None]
    times = [each for result in connected for each in result]
    middle = f", median round trip {1000 * statistics.median(times):.2f} ms" if times else ""
    say(f"connected to {len(connected)} of {len(chosen)} games, {len(times)} of {len(chosen) * options.messages} messages came back{middle}")
    return 0 if len(connected) == len(chosen) else 1


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")
    end_by_signals()
    try:
        return run(options)
    except ValueError as error:
        complain(str(error))
        return 2
    except p2pclient.RendezvousError as error:
        complain(explain(error, options.server))
    except KeyboardInterrupt:
        with contextlib.suppress(OutputLost):
            say("interrupted")
    except OutputLost:
        pass
    return 1


if __name__ == "__main__":
    sys.exit(main())
