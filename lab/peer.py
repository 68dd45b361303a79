#!/usr/bin/env python3
"""One of two peers that connect while matrix.py measures: with our p2pclient, also with a relay for the
controlled one, or with aioice, which is an ICE agent.

usage: peer.py ours|relayed|aioice controlling|controlled STUN_HOST STUN_PORT

What it says and hears is a line of JSON each. It says how it can be reached, hears the same of its peer, says null when it
is ready, hears null as the signal to start, connects, sends a datagram again and again, for some are lost, waits for one,
and says the seconds from the signal to that datagram and the address of its peer; or the text of the error. It goes on
sending until it is killed, for its peer may still wait.
"""
import asyncio
import json
import os
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HELLO = b"hello"
INTERVAL = 0.01     # seconds between two datagrams
PATIENCE = 15   # seconds; what p2pclient has


def say(value):
    print(json.dumps(value), flush=True)


def hear():
    return json.loads(sys.stdin.readline())


def ours(controlling, stun_server, has_relay=False):
    import p2pclient

    endpoint = p2pclient.Endpoint([stun_server])
    if has_relay:
        take_relay(endpoint, stun_server[0])
    say(endpoint.candidates.published)
    session = {"session_id": "0123456789abcdef", "session_key": "a key that only the two know", "addresses": hear()}
    say(None)
    hear()
    start = time.monotonic()
    if controlling:
        connection = endpoint.connect(p2pclient.Start(name="", cursor=0, expires_in=60, poll_after=1, **session))
    else:
        endpoint.expect(p2pclient.Guest(**session))
        connection = endpoint.accept(PATIENCE)
    threading.Thread(target=greet, args=(connection,), daemon=True).start()
    connection.recv(PATIENCE)
    say((time.monotonic() - start, connection.remote_address))


def take_relay(endpoint, host):
    from stage import TURN_PORT, TURN_SECRET

    from p2pclient.relay import Relay
    from p2pclient.turn import TurnServer

    relay = Relay(endpoint, lambda is_refused: TurnServer((host, TURN_PORT), secret=TURN_SECRET), False, lambda line: None)
    endpoint.send_relayed = relay.send
    while not endpoint.candidates.relay:
        time.sleep(0.01)


def greet(connection):
    while True:
        connection.send(HELLO)
        time.sleep(INTERVAL)


async def aioice(controlling, stun_server):
    import aioice

    connection = aioice.Connection(ice_controlling=controlling, stun_server=stun_server, use_ipv6=False)
    await connection.gather_candidates()
    say([connection.local_username, connection.local_password, [candidate.to_sdp() for candidate in connection.local_candidates]])
    connection.remote_username, connection.remote_password, candidates = hear()
    for candidate in candidates:
        await connection.add_remote_candidate(aioice.Candidate.from_sdp(candidate))
    await connection.add_remote_candidate(None)
    say(None)
    hear()
    start = time.monotonic()
    await asyncio.wait_for(connection.connect(), PATIENCE)
    greeting = asyncio.create_task(aioice_greet(connection))
    await asyncio.wait_for(connection.recv(), PATIENCE)
    remote = connection._nominated[1].remote_candidate
    say((time.monotonic() - start, f"{remote.host}:{remote.port}"))
    await greeting


async def aioice_greet(connection):
    while True:
        await connection.send(HELLO)
        await asyncio.sleep(INTERVAL)


def main(agent, role, host, port):
    arguments = role == "controlling", (host, int(port))
    try:
        asyncio.run(aioice(*arguments)) if agent == "aioice" else ours(*arguments, agent == "relayed" and role == "controlled")
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
