"""What games and guests weigh in the server's memory, beside what they count against --max-memory.

Prints bytes of resident memory (VmRSS, so Linux only) for each, and the resident memory that a server full of them to --max-memory
takes. Each is measured in a server of its own, which is filled over HTTP and asked for its /metrics.
"""

import argparse
import json
import pathlib
import re
import sys

import servers
from client import Client

CASES = {
    "small": "with one address",
    "large": "as large as --max-body lets it be, of text",
    "nested": "as large as --max-body lets it be, of nested empty arrays",
}
COUNT = 2000    # of each that are measured
FIRST = 100     # that are there before: what the server needs but once is not measured
REMEMBERED = 10_000     # bodies, which the server keeps in any case (MAX_KNOWN_BODIES): they are there before, too
ENVELOPE = 200  # bytes of a body that are not its addresses
ROOM = {"--rate": "0", "--game-ttl": "3600", "--guest-ttl": "3600", "--max-games": "10000", "--max-games-per-client": "10000",
        "--max-guests": "10000", "--max-guests-per-client": "10000", "--max-memory": "1024"}


def addresses(case, i, size):
    """Addresses of at most size bytes of JSON, different for each i."""
    if case == "nested":
        value = [{"a": [[]] * (size // 16 // 3 - 4)}] * 16
    elif case == "large":
        value = [f"{i:08d}" + "x" * 500] * min(15, size // 1024) + [{"sdp": f"{i:08d}" + "x" * (size - 520 * min(15, size // 1024) - 100)}]
    else:
        value = [f"203.0.113.{i % 250}:{i % 60000 + 1024}"]
    assert len(json.dumps(value, separators=(",", ":"))) <= size
    return value


class Filled:
    """A server that is being filled over one connection."""

    def __init__(self, running, client):
        self.running, self.client = running, client
        self.call("register", {"name": "the game", "peerId": "the host"})
        for i in range(REMEMBERED):
            self.call("poll", {"name": f"no {i}", "peerId": f"host {i}", "addresses": addresses("small", i, 100)}, (404,))

    def call(self, operation, body, statuses=(200, 201, 202)):
        answer = self.client.request("POST", "/games/" + operation, body)
        if answer.status not in statuses:
            raise servers.Failure(f"{operation} was answered with {answer.status}: {answer.body.decode(errors='replace')[:300]}")

    def add_game(self, case, i, size):
        name = {"name": f"game {i}", "peerId": f"host {i}"}
        self.call("register", {**name, "info": {"text": f"{i:08d}" + "x" * (0 if case == "small" else 1000)}})
        self.call("poll", {**name, "addresses": addresses(case, i, size)})

    def add_guest(self, case, i, size):
        self.call("start", {"name": "the game", "peerId": f"guest {i}", "addresses": addresses(case, i, size)})

    def weigh(self):
        """Bytes of resident memory, and bytes that count."""
        stored = re.search(rb"^p2pserver_stored_bytes (\d+)", self.client.request("GET", "/metrics").body, re.MULTILINE)
        if not stored:
            raise servers.Failure("/metrics does not tell p2pserver_stored_bytes")
        return servers.resident(self.running.pid), int(stored[1])


def measure(file, case, what, max_body):
    """Bytes that each of COUNT games or guests takes, and what each counts."""
    flags = [text for flag in {**ROOM, "--max-body": str(max_body)}.items() for text in flag]
    server = servers.Server("memory", "p2pserver", lambda port: [sys.executable, str(file), "--port", str(port), "--no-stun", *flags])
    with servers.running(server) as running, Client(running.port) as client:
        filled = Filled(running, client)
        add = filled.add_game if what == "game" else filled.add_guest
        for i in range(FIRST):
            add(case, i, max_body - ENVELOPE)
        before = filled.weigh()
        for i in range(FIRST, FIRST + COUNT):
            add(case, i, max_body - ENVELOPE)
        return [(after - first) / COUNT for first, after in zip(before, filled.weigh())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-body", type=int, default=16384, help="as the server's (default: 16384, as there)")
    parser.add_argument("--max-memory", type=int, default=256, help="as the server's (default: 256, as there)")
    parser.add_argument("--file", type=pathlib.Path, default=servers.P2PSERVER, help="another p2pserver.py, to compare with")
    given = parser.parse_args()
    if not 2048 <= given.max_body <= 65536:
        parser.error("--max-body must be from 2048 to 65536")
    try:
        for case, meaning in CASES.items():
            for what in ("game", "guest"):
                size, counted = measure(given.file.resolve(), case, what, given.max_body)
                print(f"{size:10,.0f} bytes, counted as {counted:8,.0f}: a {what} {meaning}; {given.max_memory} MB of them are "
                      f"{given.max_memory * size / counted:,.0f} MB resident", flush=True)
    except (servers.Failure, OSError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
