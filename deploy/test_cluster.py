"""Two servers that share a store behind HAProxy, as compose-cluster.yaml and haproxy-cluster.cfg have them: the real programs, without Docker."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
import yaml

import p2pserver
from p2pclient import RendezvousClient
from test_p2pserver import WAIT, Store, wait_until

pytest.importorskip("redis", reason="the library redis is not here")
PROGRAMS = [shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin") for name in ("haproxy", "redis-server")]
if not all(PROGRAMS):
    pytest.skip("haproxy and redis-server are not both here", allow_module_level=True)

HERE = pathlib.Path(__file__).parent
SERVICES = yaml.safe_load((HERE / "compose-cluster.yaml").read_text())["services"]
PAIRS = 200
FLAGS = ["--rate", "0", "--max-games-per-client", "10000", "--host", "127.0.0.1", "--no-stun"]      # all clients are one


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Cluster:
    """Two servers, the store, and HAProxy, whose url is that of all."""

    def __init__(self, folder):
        self.folder, self.store, self.ports, self.servers = folder, Store(folder), [free_port(), free_port()], [None, None]
        for i in range(2):
            self.start(i)
        port = free_port()
        text = (HERE / "haproxy-cluster.cfg").read_text()
        for old, new in (("bind :8000", f"bind 127.0.0.1:{port}"), ("p2p1:8000", f"127.0.0.1:{self.ports[0]}"), ("p2p2:8000", f"127.0.0.1:{self.ports[1]}"),
                         ("maxconn 50000", "maxconn 5000")):
            assert old in text
            text = text.replace(old, new)
        (folder / "haproxy-cluster.cfg").write_text(text)
        self.proxy = subprocess.Popen([PROGRAMS[0], "-db", "-f", folder / "haproxy-cluster.cfg"], stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        wait_until(lambda: self.answers(port))

    def start(self, i):
        settings = {**SERVICES[f"p2p{i + 1}"]["environment"], "P2P_STORE": self.store.url, "P2P_TRUSTED_PROXIES": "127.0.0.1", "P2P_PORT": str(self.ports[i])}
        with open(self.folder / f"{i}.log", "a") as log:
            self.servers[i] = subprocess.Popen([sys.executable, HERE.parent / "p2pserver.py", *FLAGS], stdout=log, stderr=log,
                                               env={name: str(value) for name, value in settings.items()})
        wait_until(lambda: self.answers(self.ports[i]))

    def answers(self, port):
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=WAIT).status_code == 200
        return False

    def restart(self, i, number=signal.SIGTERM):
        self.servers[i].send_signal(number)
        self.servers[i].wait(WAIT)
        self.start(i)

    def waiting(self, i):
        return int(re.search(r"^p2pserver_waiting (\d+)", requests.get(f"http://127.0.0.1:{self.ports[i]}/metrics", timeout=WAIT).text, re.MULTILINE)[1])

    def close(self):
        for process in (self.proxy, *self.servers):
            process.kill()
            process.wait()
        self.store.redis.close()
        self.store.stop()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def host(url, name, ready, met):
    """A host as ours are: it waits for its guest, and then is done. RendezvousError: what the client does not cover."""
    gives_up_at = time.monotonic() + 1.5 * WAIT
    client = RendezvousClient(url)
    client.register_game(name, f"host of {name}")
    cursor = client.poll_game(name, f"host of {name}", ["203.0.113.1:5000"]).cursor
    ready.release()
    while time.monotonic() < gives_up_at:
        poll = client.poll_game(name, f"host of {name}", ["203.0.113.1:5000"], after=cursor, wait=20)
        if poll.guests:
            met[name] = poll.guests[0].session_id
            return
        cursor = poll.cursor


def guest(url, name):
    client = RendezvousClient(url)
    start = client.start_game(name, f"guest of {name}", ["203.0.113.2:6000"], wait=10)
    assert start.addresses == ["203.0.113.1:5000"]
    return start.session_id


@pytest.mark.parametrize("trouble", ["kill -9 of one", "a rolling restart"])
def test_every_pair_meets_whatever_happens_to_one_server(trouble, cluster):
    names, met, ready = [f"game {i}" for i in range(PAIRS)], {}, threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(2 * PAIRS) as pool:
        hosts = [pool.submit(host, cluster.url, name, ready, met) for name in names]
        for _ in names:
            assert ready.acquire(timeout=WAIT)
        wait_until(lambda: min(cluster.waiting(0), cluster.waiting(1)) > PAIRS // 4 and cluster.waiting(0) + cluster.waiting(1) == PAIRS)
        guests = [pool.submit(guest, cluster.url, name) for name in names[:PAIRS // 2]]
        if trouble == "kill -9 of one":
            cluster.restart(0, signal.SIGKILL)
        else:
            for i in range(2):
                cluster.restart(i)
        games = {game.name for game in RendezvousClient(cluster.url).list_games()}
        assert games == set(names), "no game is lost"
        guests += [pool.submit(guest, cluster.url, name) for name in names[PAIRS // 2:]]
        assert [each.result(2 * WAIT) for each in guests] == [(each.result(2 * WAIT), met[name])[1] for each, name in zip(hosts, names)]


def test_hosts_register_again_by_themselves_when_the_store_restarts_empty(cluster):
    names, met, ready = [f"game {i}" for i in range(50)], {}, threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        hosts = [pool.submit(host, cluster.url, name, ready, met) for name in names]
        for _ in names:
            assert ready.acquire(timeout=WAIT)
        cluster.store.stop()
        time.sleep(1)
        cluster.store.start()
        wait_until(lambda: {game.name for game in RendezvousClient(cluster.url).list_games()} == set(names))
        sessions = [guest(cluster.url, name) for name in names]
        assert [(each.result(WAIT), met[name])[1] for each, name in zip(hosts, names)] == sessions


def test_the_servers_of_the_compose_file_start_with_settings_that_exist_behind_its_proxy():
    for name in ("p2p1", "p2p2"):
        service = SERVICES[name]
        settings = p2pserver.parse_settings([], {key: str(value) for key, value in service["environment"].items()})
        assert service["build"]["args"] == {"STORE": "yes"} and settings.store == "valkey://valkey:6379/0"
        first = settings.stun_port or settings.port
        assert service["ports"] == [f"{port}:{port}/udp" for port in (first, first + 1)]
        assert settings.trusted_proxies == SERVICES["haproxy"]["networks"]["inside"]["ipv4_address"]
    assert int(re.search(r"timeout server (\d+)s", (HERE / "haproxy-cluster.cfg").read_text())[1]) > p2pserver.Settings().max_wait + 10
