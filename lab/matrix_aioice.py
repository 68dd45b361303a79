#!/usr/bin/env python3
"""Connects two ICE agents (aioice) through every pair of NAT kinds and prints what came of it.

usage: matrix_aioice.py [KIND KIND]     (without arguments all pairs; with two, controlling and controlled, that pair)

One line per attempt: the kinds, the seconds of both agents, their selected pairs; at the end the whole matrix with
the slower agent's seconds, or "-" where no connection came about.
"""
import itertools
import json
import os
import subprocess
import sys

import natlab

HERE = os.path.dirname(os.path.abspath(__file__))
DEADLINE = 10  # seconds for one attempt
STUN_PORT, EXCHANGE_PORT = 3478, 3479


def start(machine, script, *arguments):
    """Starts one of the scripts beside this one on a machine."""
    return machine.popen([sys.executable, os.path.join(HERE, script), *arguments], stdout=subprocess.PIPE, text=True)


def connect(kinds):
    """Runs one attempt; returns the result of the controlling and that of the controlled agent (see ice_peer.py)."""
    with natlab.Lab() as lab:
        machines = [lab.site(name, nat=kind).machine() for name, kind in zip(("host", "guest"), kinds)]
        address = lab.server.address
        for service in (start(lab.server, "stun_stub.py", address, STUN_PORT),
                        start(lab.server, "ice_peer.py", "exchange", address, EXCHANGE_PORT)):
            with service.stdout:
                service.stdout.readline()
        agents = [start(machine, "ice_peer.py", "agent", role, address, EXCHANGE_PORT, address, STUN_PORT, DEADLINE)
                  for machine, role in zip(machines, ("controlling", "controlled"))]
        # Gathering candidates without an answer from the STUN server comes on top of the deadline.
        return [json.loads(agent.communicate(timeout=DEADLINE + 20)[0]) for agent in agents]


def main(arguments):
    pairs = [tuple(arguments)] if arguments else itertools.combinations_with_replacement(natlab.KINDS, 2)
    slower = {}
    for pair in pairs:
        results = connect(pair)
        connected = all(result["connected"] for result in results)
        slower[pair] = f"{max(result['seconds'] for result in results):.3f}" if connected else "-"
        details = [" -> ".join(result["pair"]) if result["connected"] else result["error"] for result in results]
        print(f"{pair[0]:>15} {pair[1]:15} {[result['seconds'] for result in results]} {details}", flush=True)
    if not arguments:
        print(f"\n{'':15}" + "".join(f"{kind:>16}" for kind in natlab.KINDS))
        for row in natlab.KINDS:
            print(f"{row:15}" + "".join(f"{slower.get((row, column), ''):>16}" for column in natlab.KINDS))


if __name__ == "__main__":
    main(sys.argv[1:])
