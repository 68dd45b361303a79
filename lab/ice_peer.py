#!/usr/bin/env python3
"""Runs an ICE agent (package aioice, version 0.13.0) for comparison, or the exchange by which two agents meet.

usage: ice_peer.py exchange HOST PORT
       ice_peer.py agent controlling|controlled EXCHANGE_HOST EXCHANGE_PORT STUN_HOST STUN_PORT DEADLINE

The exchange is a TCP server for one pair of agents: it hands each the line that the other has sent, once it has both.

An agent gathers its candidates, swaps descriptions with its peer, connects, sends one datagram, waits for one, and
prints one line of JSON: whether it is connected, the seconds from when both agents had both descriptions to the
datagram received (null if that took longer than DEADLINE seconds), the selected pair of candidates, and the text of
the error, if any.
"""
import asyncio
import json
import sys
import time

import aioice


async def exchange(host, port):
    """Serves one pair of agents."""
    lines = [asyncio.get_running_loop().create_future() for _ in range(2)]
    done = [asyncio.Event() for _ in range(2)]
    free = iter(range(2))

    async def serve(reader, writer):
        mine = next(free)
        # Twice: first the descriptions, then an empty line each, sent when the peer's description has been applied.
        lines[mine].set_result(await reader.readline())
        writer.write(await lines[1 - mine])
        await reader.readline()
        done[mine].set()
        await done[1 - mine].wait()
        writer.write(b"\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, host, int(port))
    print("ready", flush=True)
    await server.serve_forever()


async def apply_description(connection, description):
    """Tells the connection what its peer has said: user name fragment, password and candidates."""
    connection.remote_username = description["username"]
    connection.remote_password = description["password"]
    for candidate in description["candidates"]:
        await connection.add_remote_candidate(aioice.Candidate.from_sdp(candidate))
    await connection.add_remote_candidate(None)


async def agent(role, exchange_host, exchange_port, stun_host, stun_port, deadline):
    """Runs one agent and returns the result to print."""
    connection = aioice.Connection(ice_controlling=role == "controlling", stun_server=(stun_host, int(stun_port)),
                                   use_ipv6=False)
    await connection.gather_candidates()
    reader, writer = await asyncio.open_connection(exchange_host, int(exchange_port))
    description = {"username": connection.local_username, "password": connection.local_password,
                   "candidates": [candidate.to_sdp() for candidate in connection.local_candidates]}
    writer.write(json.dumps(description).encode() + b"\n")
    await apply_description(connection, json.loads(await reader.readline()))
    writer.write(b"\n")
    await reader.readline()
    writer.close()
    start = time.monotonic()
    result = {"connected": False, "seconds": None, "pair": None, "error": None}
    try:
        async with asyncio.timeout(float(deadline)):
            await connection.connect()
            await connection.send(b"hello from the " + role.encode())
            await connection.recv()
        result["seconds"] = round(time.monotonic() - start, 4)
        result["connected"] = True
        pair = connection._nominated[1]
        result["pair"] = [f"{candidate.type} {candidate.host}:{candidate.port}"
                          for candidate in (pair.local_candidate, pair.remote_candidate)]
        # The peer may still wait for our datagram, and closing would refuse its last checks.
        await asyncio.sleep(0.2)
    except (ConnectionError, TimeoutError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    await connection.close()
    return result


def main(command, *arguments):
    if command == "exchange":
        asyncio.run(exchange(*arguments))
    else:
        print(json.dumps(asyncio.run(agent(*arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
