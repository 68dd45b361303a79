#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests"]
# ///
"""List the games of a rendezvous server, join one, exchange messages with its host, and say what worked."""

import argparse
import json
import random
import signal
import statistics
import sys
import time

try:
    import p2pclient
    from p2pclient.commandline import add_peer_id_file, kept_peer_id, parse_server, seconds
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
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]), flush=True)


def choose(options, client):
    """The names of the games to join."""
    if options.game is not None:
        return [options.game]
    games = client.list_games()
    if not games:
        print(f"there are no games at {client.base_url}", flush=True)
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
            print(f"  the connection is lost: {end}", flush=True)
            break
        if passed is None:
            print(f"  {message}: no echo within {ECHO:g} s", flush=True)
            continue
        if not times:
            print(f"  first datagram both ways {1000 * (time.monotonic() - began):.0f} ms after the start", flush=True)
        times.append(passed)
        print(f"  {message}: round trip {1000 * passed:.2f} ms", flush=True)
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


def join(name, options, peer_id):
    """Join a game and talk. The round-trip times; None if no connection came about."""
    client = p2pclient.RendezvousClient(options.server, patience=PATIENCE)
    endpoint = p2pclient.Endpoint(client.stun_servers if options.stun is None else options.stun, client.on_loopback)
    print(f"joining {printable(name)}; {p2pclient.describe(endpoint.candidates)}", flush=True)
    began = time.monotonic()
    try:
        with p2pclient.join_game(client, name, endpoint=endpoint, peer_id=peer_id, report=lambda line: print("  " + line, flush=True)) as connection:
            print(f"  connected: {connection.local_address} to {connection.remote_address} in {1000 * connection.connect_time:.0f} ms", flush=True)
            return talk(connection, began, options)
    except (p2pclient.RendezvousError, p2pclient.ConnectFailed) as failure:
        print(f"  not connected: {printable(str(failure))}", flush=True)
        return None
    finally:
        endpoint.close()


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts what runs in its background with SIGINT ignored
    try:
        peer_id = kept_peer_id(options)
        chosen = choose(options, p2pclient.RendezvousClient(options.server, patience=PATIENCE))
        results = [join(name, options, peer_id) for name in chosen]
    except ValueError as error:
        print(f"simulate_guest: {error}", file=sys.stderr)
        return 2
    except p2pclient.RendezvousError as error:
        print(f"simulate_guest: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 1
    if not chosen:
        return 1
    connected = [times for times in results if times is not None]
    times = [each for result in connected for each in result]
    middle = f", median round trip {1000 * statistics.median(times):.2f} ms" if times else ""
    print(f"connected to {len(connected)} of {len(chosen)} games, {len(times)} of {len(chosen) * options.messages} messages came back{middle}", flush=True)
    return 0 if len(connected) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
