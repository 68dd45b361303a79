"""The doctor: python -m p2pclient check."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from typing import Callable, List, Optional, Sequence

from .addresses import Address, text_of
from .answers import RendezvousError
from .candidates import Candidates
from .commandline import explain, parse_server
from .deadline import Deadline
from .diagnosis import ConnectFailed, describe_nat, describe_prediction
from .endpoint import Endpoint
from .forwarding import try_forwarding
from .games import HostedGame, default_stun, join_game
from .relay import try_relay
from .rendezvous import RendezvousClient, new_peer_id
from .texts import printable

NO_SERVER = ". Is the server started, the port open (TCP), the URL right?"
NO_RELAY = "none is offered by this server (--turn-url): only needed where the NATs of both sides are hard"
NO_PORT = "no router here forwards ports by itself (PCP, NAT-PMP, UPnP): only needed where the NAT is symmetric"

MEASURING_TIME = 2.0    # seconds


def check_server(base_url: str, stun_servers: Optional[Sequence[Address]] = None, report: Callable[[str], None] = print) -> bool:
    """Try each thing that a game needs from a server and from this machine's network, and report each in a line. Whether all is well."""
    def say(is_well: bool, line: str) -> bool:
        report(f"{'ok     ' if is_well else 'FAILED '} {printable(line)}")
        return is_well

    client = RendezvousClient(base_url, patience=2.0)
    name, peer_id = f"check {secrets.token_hex(4)}", new_peer_id()
    began = time.monotonic()
    try:
        health = client.health()
        say(True, f"HTTP: p2pserver {health['version']} at {client.base_url} answers in {1000 * (time.monotonic() - began):.0f} ms")
        turn = client.register_game(name, peer_id, listed=False).turn       # which tells where it answers STUN, too
    except RendezvousError as error:
        return say(False, f"HTTP: {explain(error, base_url, NO_SERVER)}")
    servers = default_stun(client, stun_servers)
    endpoint = Endpoint(servers, client.on_loopback)
    found = endpoint.candidates
    check_network(endpoint, servers, client.on_loopback, say)
    works, line = try_relay(turn, found, client.on_loopback, endpoint.send) if turn else (True, NO_RELAY)
    if turn or not client.on_loopback:
        say(works, f"RELAY: {line}")
    try:
        with HostedGame(client, name, listed=False, stun_servers=servers, peer_id=peer_id, port_mapping=False, relay=False) as game, \
                join_game(RendezvousClient(base_url), game.name, endpoint=endpoint) as connection:
            connection.send(b"hello")
            game.accept(5.0).recv(5.0)
            say(True, f"CONNECTION: a host and a guest met and talked over {connection.remote_address}, round trip {1000 * connection.rtt:.1f} ms")
    except (RendezvousError, ConnectFailed, ConnectionError, TimeoutError) as error:
        return say(False, f"CONNECTION: {error}")
    finally:
        endpoint.close()
    return found.mapped is not None and works


def check_network(endpoint: Endpoint, servers: Sequence[Address], is_own: bool, say: Callable[[bool, str], bool]) -> None:
    """Report what STUN and the router tell. is_own: the server is on this very machine, so no router is between."""
    found = measured(endpoint)
    if found.mapped:
        say(True, f"STUN: you are seen at {text_of(found.mapped)}")
    elif servers:
        say(False, f"STUN: no answer from {', '.join(map(text_of, servers))}. Is that port open for UDP, UDP not blocked here?")
    else:
        say(False, "STUN: this server answers none, so nobody behind a router can be found. Name a STUN server (--stun).")
    say(found.nat not in ("symmetric", "no answer", "not asked"), f"NAT: {describe_nat(found)}")
    if found.nat == "symmetric":
        say(True, f"PREDICTION: {describe_prediction(found)}")
    if not is_own:
        say(True, f"PORTS: {try_forwarding(endpoint.socket.getsockname()[1]) or NO_PORT}")


def measured(endpoint: Endpoint) -> Candidates:
    """The candidates, once the kind of the NAT is certain, and how a symmetric one allocates ports, if that can be told within two seconds."""
    end = Deadline(MEASURING_TIME)
    while not endpoint.candidates.is_measured and end.left():
        time.sleep(0.05)
    return endpoint.candidates


def main(arguments: Optional[List[str]] = None) -> int:
    """Exit status 0: all is well; 1: something is not; 2: bad usage."""
    parser = argparse.ArgumentParser(prog="python -m p2pclient", description="The client side of p2pserver; as a program, a doctor.")
    check = parser.add_subparsers(required=True, metavar="check").add_parser("check", help="try whether games can use a server from here")
    check.add_argument("--server", default="http://localhost:8000", metavar="URL", help="the rendezvous server (default: %(default)s)")
    check.add_argument("--stun", type=parse_server, action="append", metavar="HOST:PORT",
                       help="a STUN server, repeatable (default: the rendezvous server)")
    options = parser.parse_args(arguments)
    try:
        return 0 if check_server(options.server, options.stun) else 1
    except KeyboardInterrupt:
        return 1
    except ValueError as error:
        parser.error(f"--server {error}")


if __name__ == "__main__":
    sys.exit(main())
