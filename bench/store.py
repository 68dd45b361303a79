"""What a store costs, beside the registry in memory: polls a second and processor for each, with one server and two; 10,000 hosts that wait at
two servers; the time from a start at one server to the waiting host at the other; bytes of the store for each game and guest.

It needs wrk, redis-server and the library redis, and prints a table. On a shared machine only the ratios mean something.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List

import client
import redis
from servers import cpu, free_port, stop

HERE = pathlib.Path(__file__).parent
ROOM = ["--log-level", "warning", "--rate", "0", "--no-stun", "--host", "127.0.0.1", "--max-games", "20000", "--max-games-per-client", "20000",
        "--max-connections-per-client", "20000", "--max-guests", "2000", "--max-guests-per-client", "2000", "--game-ttl", "3600", "--guest-ttl", "3600"]
WAITING = 10_000
GAMES = 1_000       # that are polled in turn, and weighed


@contextlib.contextmanager
def process(port: int, *command: Any) -> Iterator[Any]:
    """A process that listens on that port of loopback."""
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as running:
        try:
            while running.poll() is None:
                with contextlib.suppress(OSError), client.Client(port):
                    break
                time.sleep(0.05)
            yield running
        finally:
            stop(running)


@contextlib.contextmanager
def cluster(count: int, store: str = "") -> Iterator[List[Any]]:
    """So many servers, each with its port."""
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(count):
            port = free_port()
            command = [sys.executable, HERE.parent / "p2pserver.py", "--port", port, *ROOM, *(["--store", store] if store else [])]
            servers.append((port, stack.enter_context(process(port, *command))))
        yield servers


def polls(servers: List[Any], seconds: int, connections: int, store: int) -> Dict[str, float]:
    """Polls a second of all servers together, and the microseconds of processor that a poll costs in them and in the store."""
    client.register(servers[0][0], GAMES)
    pids = [server.pid for _, server in servers]
    before, stored = sum(map(cpu, pids)), cpu(store)
    wrks = [subprocess.Popen(["wrk", "-t1", f"-c{connections // len(servers)}", f"-d{seconds}s", "-s", HERE / "load.lua", f"http://127.0.0.1:{port}",
                              "--", "poll", str(GAMES)], stdout=subprocess.PIPE, text=True) for port, _ in servers]
    count = sum(json.loads(wrk.communicate()[0].strip().splitlines()[-1])["requests"] for wrk in wrks)
    used = {"µs of servers": sum(map(cpu, pids)) - before, "µs of store": cpu(store) - stored}
    return {"polls a second": count / seconds, **{what: 1e6 * each / count for what, each in used.items()}}


def count_waiting(port: int) -> int:
    with client.Client(port) as monitor:
        return int(monitor.request("GET", "/metrics").body.partition(b"\np2pserver_waiting ")[2].split()[0])


def waiting(servers: List[Any]) -> List[float]:
    """Milliseconds from a start at one server to the answer of the host that waits at the other, among 10,000 that wait at both."""
    ports = [port for port, _ in servers]
    client.register(ports[0], WAITING)
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(client.Client(ports[i % len(ports)])) for i in range(WAITING)]
        for i, host in enumerate(hosts):
            host.socket.sendall(client.request_bytes("POST", "/games/poll", {**client.game(i), "wait": 25}, {"Prefer": "wait=25"}))
        while sum(map(count_waiting, ports)) < WAITING:
            time.sleep(0.1)
        times = []
        for i in range(0, WAITING, WAITING // 200):
            with client.Client(ports[(i + 1) % len(ports)]) as guest:
                began = time.perf_counter()
                body = {"name": client.game(i)["name"], "peerId": "guest", "addresses": ["203.0.113.1:5000"]}
                guest.socket.sendall(client.request_bytes("POST", "/games/start", body))
                assert hosts[i].read().json["guests"]
                times.append(1000 * (time.perf_counter() - began))
    return times


def weigh(port: int, store: Any) -> List[float]:
    """Bytes of the store for a game with an address, and for a guest."""
    memory = [store.info("memory")["used_memory"]]
    client.register(port, GAMES, poll=True)
    memory.append(store.info("memory")["used_memory"])
    with client.Client(port) as guests:
        for i in range(GAMES):
            guests.request("POST", "/games/start", {"name": client.game(0)["name"], "peerId": f"guest {i}", "addresses": [f"203.0.113.{i % 250}:5000"]})
    memory.append(store.info("memory")["used_memory"])
    return [(after - before) / GAMES for before, after in zip(memory, memory[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3, help="for each rate (default: %(default)s)")
    seconds = parser.parse_args().seconds
    port = free_port()
    with process(port, "redis-server", "--port", port, "--save", "") as running, redis.Redis(port=port) as store:
        url = f"redis://127.0.0.1:{port}/0"
        for connections in (16, 128):
            for name, count, where in (("memory, 1 server", 1, ""), ("store, 1 server", 1, url), ("store, 2 servers", 2, url)):
                store.flushall()
                with cluster(count, where) as servers:
                    figures = polls(servers, seconds, connections, running.pid)
                print(f"{name:18} {connections:4} connections  " + "  ".join(f"{figure:7.0f} {what}" for what, figure in figures.items()), flush=True)
        for name, count, where in (("memory, 1 server", 1, ""), ("store, 2 servers", 2, url)):
            store.flushall()
            with cluster(count, where) as servers:
                times = sorted(waiting(servers))
            figures = f"{statistics.median(times):.2f} ms, 99th percentile {times[-2]:.2f} ms"
            print(f"{name:18} {WAITING} hosts waiting  from a start to its host {figures}", flush=True)
        store.flushall()
        with cluster(1, url) as servers:
            print("bytes of the store: {:.0f} a game, {:.0f} a guest".format(*weigh(servers[0][0], store)))


if __name__ == "__main__":
    main()
