#!/usr/bin/env python3
"""Measures whether a low TTL on the first checks helps where a router does more than drop what nobody inside has asked for.

usage: low_ttl.py [--rounds N]

Two peers behind port-restricted routers, 25 ms from the middle each, connect by p2pclient. One is told of the other at the same time, or
0.2 s later, as when its poll was under way. The first so many checks to each address have a TTL with which they open the own router, and end
in the middle. Prints how many of the rounds connected, and the median seconds from when the later one was told. See README.md for what came of it.
"""
import argparse
import concurrent.futures
import itertools
import json
import os
import socket
import statistics
import sys
import time

import natlab
import peer
from stage import PORT, Program, Stage

TTL = 2     # the own router takes one, and the middle the other
PREPARATION = 60
AT_ONCE = 3
# What a router does with a datagram that nobody inside has asked for, as rules of nftables.
ROUTERS = {
    "drops it": "",
    "rejects it (ICMP, as OpenWrt)": 'insert rule ip router to_router iifname "wan" meta l4proto udp reject',
    "takes it for its own (no firewall)": 'insert rule ip router to_router iifname "wan" meta l4proto udp accept',
    "blocks its sender for 5 s": """
add set ip router blocked { type ipv4_addr; flags dynamic,timeout; timeout 5s; }
insert rule ip router to_router iifname "wan" meta l4proto udp update @blocked { ip saddr } drop
add chain ip router blocking { type filter hook prerouting priority raw; }
add rule ip router blocking iifname "wan" meta l4proto udp ip saddr @blocked drop""",
}
DELAYS = (0, 0.2)
LOW_CHECKS = (0, 1, 6)


def attempt(rules, delay, low_checks):
    """Seconds from when the later peer was told until both were connected, or infinity."""
    with Stage() as stage:
        sites = [stage.site(name, nat="port-restricted", delay_ms=25) for name in ("host", "guest")]
        peers = [Program(site.machine(), os.path.join("lab", "low_ttl.py"), "peer", role, stage.server.address, PORT, str(low_checks))
                 for site, role in zip(sites, ("controlled", "controlling"))]
        for mine, other in (peers, peers[::-1]):
            other.say(mine.expect(".+", PREPARATION).string)
        for site in sites:
            stage._sh(site.router.netns, f"nft -f - <<'END'\n{rules}\nEND")
        for each in peers:
            each.expect("null", PREPARATION)
        peers[1].say("null")
        time.sleep(delay)
        peers[0].say("null")
        results = [json.loads(each.expect(r'^(\[|")', PREPARATION, after=2).string) for each in peers]
    if not all(isinstance(result, list) for result in results):
        return float("inf")
    return max(results[0][0], results[1][0] - delay)


def with_low_ttl(send, low_checks):
    """Endpoint.send, whose first checks to each address have a low TTL."""
    counts = {}

    def send_low(endpoint, datagram, address):
        counts[address] = counts.get(address, 0) + 1
        is_low = counts[address] <= low_checks
        if is_low:
            endpoint.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
        send(endpoint, datagram, address)
        if is_low:
            endpoint.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 64)

    return send_low


def connect(role, host, port, low_checks):
    """The peer's program; it ends when it is killed."""
    from p2pclient import endpoint
    endpoint.Endpoint.send = with_low_ttl(endpoint.Endpoint.send, int(low_checks))
    peer.main("ours", role, host, port)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="attempts for each figure (default: %(default)s)")
    rounds = parser.parse_args().rounds
    reason = natlab.check()
    if reason:
        sys.exit(f"the lab cannot run here: {reason}")
    cases = list(itertools.product(ROUTERS, DELAYS, LOW_CHECKS))
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        tries = {case: [pool.submit(attempt, ROUTERS[case[0]], *case[1:]) for _ in range(rounds)] for case in cases}
        print("| a router that | told | " + " | ".join(f"{number} low" for number in LOW_CHECKS) + " |\n" + "|---" * (2 + len(LOW_CHECKS)) + "|")
        for router, delay in itertools.product(ROUTERS, DELAYS):
            cells = []
            for number in LOW_CHECKS:
                seconds = [each.result() for each in tries[router, delay, number]]
                connected = [each for each in seconds if each < float("inf")]
                cells.append(f"{len(connected)} of {rounds}" + (f", {statistics.median(connected):.2f} s" if connected else ""))
            print(f"| {router} | {f'{delay} s later' if delay else 'at once'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    connect(*sys.argv[2:]) if sys.argv[1:2] == ["peer"] else main()
