#!/usr/bin/env python3
"""Hosts that wait in long polls, and guests that start: one process, one thread, one connection for each host.

    python driver.py latency --port N --pid PID --hosts 1000 --starts 1000
        Guests start one at a time with random hosts. How long from sending the start until the host holds the guest's addresses?
    python driver.py crowd --port N --pid PID --hosts 10000
        All hosts wait at once, then each gets one guest. What does the server's memory do, and are all served?

PID is the server's, whose memory and processor time are read in /proc. Prints one line of JSON; times in it are in milliseconds,
memory in bytes. Exits with 1 and a sentence if the server has no long poll, or answers anything wrongly.
"""

import argparse
import gc
import json
import random
import resource
import selectors
import socket
import sys
import time
from typing import Any, Dict, List, Optional

import client
import servers
from servers import Failure

WAIT = 25               # seconds that a poll asks to be held
HOSTS_PER_ADDRESS = 1000    # hosts that share a source address: each address has ports for some 28,000 connections
PAUSE = 0.002           # seconds between two starts, for the host to be waiting again
SETTLE_LIMIT = 15.0     # seconds that the server may take to hold all polls
SERVE_LIMIT = 30.0      # seconds that the hosts may take to be served
EARLY = 1.0             # seconds: a poll answered that much before its deadline without a guest was woken for nothing


class Host:
    """A host on its connection, waiting most of the time."""

    __slots__ = ("body", "socket", "received", "sent_at", "guests")

    def __init__(self, i: int, port: int) -> None:
        self.body = client.game(i)
        self.socket = client.Client(port, source=f"127.0.0.{1 + i // HOSTS_PER_ADDRESS}").socket
        self.received = b""
        self.sent_at = 0.0
        self.guests: List[Any] = []     # the addresses of each guest that came

    def wait(self) -> None:
        """Send a poll that asks to be held."""
        self.sent_at = time.perf_counter()
        self.socket.sendall(client.request_bytes("POST", "/games/poll", self.body, {"Prefer": f"wait={WAIT}"}))

    def read(self) -> Optional[client.Answer]:
        """An answer, once it has come as a whole."""
        more = self.socket.recv(65536)
        if not more:
            raise Failure(f"the connection of {self.body['name']} was closed while it waited")
        self.received += more
        complete = client.read_answer(self.received)
        if not complete:
            return None
        answer, self.received = complete
        if answer.status != 200:
            raise Failure(f"a waiting poll was answered with {answer.status}: {answer.body.decode(errors='replace')[:200]}")
        if "preference-applied" not in answer.headers:
            raise Failure("a poll with Prefer: wait was answered without Preference-Applied: the server has no long poll, or no room for this one")
        return answer


class Crowd:
    """The hosts. again: whether a host that got a guest waits anew."""

    def __init__(self, port: int, count: int, again: bool) -> None:
        self.again = again
        self.renewed = 0        # polls that reached their deadline and were sent anew
        self.spurious = 0       # polls answered early without a guest
        self._selector = selectors.DefaultSelector()
        self.hosts = [Host(i, port) for i in range(count)]
        for host in self.hosts:
            self._selector.register(host.socket, selectors.EVENT_READ, host)

    def wait(self) -> None:
        for host in self.hosts:
            host.wait()

    def take_answers(self, timeout: float) -> int:
        """Take what has come within timeout (seconds). How many hosts got a guest."""
        served = 0
        for key, _ in self._selector.select(timeout):
            host = key.data
            answer = host.read()
            if answer is None:
                continue
            polled = answer.json
            host.body["after"] = polled["cursor"]
            host.guests += [guest["addresses"] for guest in polled["guests"]]
            if polled["guests"]:
                served += 1
            elif time.perf_counter() - host.sent_at < WAIT - EARLY:
                self.spurious += 1
            else:
                self.renewed += 1
            if self.again or not polled["guests"]:
                host.wait()
        return served


def start(name: str, i: int) -> Dict[str, Any]:
    """What the i-th guest sends: nobody else has its addresses."""
    return {"name": name, "peerId": f"the-secret-of-guest-{i:06d}", "addresses": [f"198.51.100.{i % 250 + 1}:{1024 + i % 60000}", f"guest {i}"]}


def settle(crowd: Crowd, pid: int) -> None:
    """Wait until the server holds all polls: it has nothing left to do. Failure: that takes too long."""
    deadline = time.perf_counter() + SETTLE_LIMIT
    while time.perf_counter() < deadline:
        before = servers.cpu(pid)
        pause = time.perf_counter() + 0.3
        while time.perf_counter() < pause:
            crowd.take_answers(0.05)
        if servers.cpu(pid) - before <= 0.02:
            return
    raise Failure(f"the server was still busy {SETTLE_LIMIT:g} s after the last poll was sent")


def check_start(answer: client.Answer, body: Dict[str, Any]) -> None:
    if answer.status != 200 or not answer.json["addresses"]:
        raise Failure(f"the start of {body['peerId']} was answered with {answer.status}: {answer.body.decode(errors='replace')[:200]}")


def measure_latency(port: int, pid: int, count: int, starts: int) -> Dict[str, Any]:
    """Guests one at a time: the first half over one open connection, the other half each over a new one, connecting included."""
    client.register(port, count)
    crowd = Crowd(port, count, again=True)
    crowd.wait()
    settle(crowd, pid)
    random.seed(1)
    times: Dict[str, List[float]] = {"open": [], "new": []}
    with client.Client(port) as guest:
        for i in range(2 * starts):
            host = random.choice(crowd.hosts)
            body = start(host.body["name"], i)
            request = client.request_bytes("POST", "/games/start", body)
            wanted = len(host.guests)
            begin = time.perf_counter()
            connection = guest if i < starts else client.Client(port)
            connection.socket.sendall(request)
            while len(host.guests) == wanted:
                crowd.take_answers(1.0)
                if time.perf_counter() - begin > SERVE_LIMIT:
                    raise Failure(f"a waiting host did not learn of its guest within {SERVE_LIMIT:g} s")
            times["open" if i < starts else "new"].append(1000 * (time.perf_counter() - begin))
            if host.guests[-1] != body["addresses"]:
                raise Failure("a waiting host was given other addresses than its guest's")
            check_start(connection.read(), body)
            if connection is not guest:
                connection.socket.close()
            pause = time.perf_counter() + PAUSE
            while time.perf_counter() < pause:
                crowd.take_answers(PAUSE / 4)
    return {"open": times["open"], "new": times["new"], "spurious": crowd.spurious, "renewed": crowd.renewed, "threads": servers.threads(pid)}


def measure_crowd(port: int, pid: int, count: int, starts: int) -> Dict[str, Any]:
    """All wait, then each gets a guest."""
    kernel = [servers.kernel_memory()]
    idle = servers.resident(pid)
    client.register(port, count, poll=True)
    registered = servers.resident(pid)
    begin = time.perf_counter()
    crowd = Crowd(port, count, again=False)
    crowd.wait()
    settle(crowd, pid)
    waiting, threads, held = servers.resident(pid), servers.threads(pid), time.perf_counter() - begin
    kernel.append(servers.kernel_memory())
    begin = time.perf_counter()
    busy = servers.cpu(pid)
    with client.Client(port) as guest:
        for i, host in enumerate(crowd.hosts):
            body = start(host.body["name"], i)
            check_start(guest.request("POST", "/games/start", body), body)
            if i % 50 == 49:
                crowd.take_answers(0)
    deadline = time.perf_counter() + SERVE_LIMIT
    while not all(host.guests for host in crowd.hosts) and time.perf_counter() < deadline:
        crowd.take_answers(0.5)
    seconds = time.perf_counter() - begin
    served = sum(host.guests == [start(host.body["name"], i)["addresses"]] for i, host in enumerate(crowd.hosts))
    return {"idle": idle, "registered": registered, "waiting": waiting, "after": servers.resident(pid), "served": served, "threads": threads,
            "spurious": crowd.spurious, "renewed": crowd.renewed, "hold_ms": 1000 * held, "serve_ms": 1000 * seconds,
            "cpu_ms": 1000 * (servers.cpu(pid) - busy), "kernel": {name: kernel[1][name] - kernel[0][name] for name in kernel[0]}}


def probe(port: int) -> None:
    """Failure: the server has no long poll."""
    client.register(port, 1)
    begin = time.perf_counter()
    with client.Client(port) as host:
        answer = host.request("POST", "/games/poll", client.game(0), {"Prefer": "wait=1"})
    if "preference-applied" not in answer.headers:
        raise Failure("the server has no long poll: it answered a poll with Prefer: wait=1 without Preference-Applied")
    if time.perf_counter() - begin < 0.9:
        raise Failure("the server says Preference-Applied, but answered a poll with Prefer: wait=1 at once, where no guest was")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "crowd"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--starts", type=int, default=1000)
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()    # a collection over 10,000 hosts would be measured as the server's
    try:
        if hard < given.hosts + 100:
            raise Failure(f"{given.hosts} hosts need as many files open at once, and the limit here is {hard} (ulimit -Hn)")
        probe(given.port)
        measure = measure_latency if given.what == "latency" else measure_crowd
        print(json.dumps(measure(given.port, given.pid, given.hosts, given.starts)))
    except (Failure, OSError, KeyError, ValueError) as error:
        print(f"{type(error).__name__}: {error}" if not isinstance(error, (Failure, socket.timeout)) else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
