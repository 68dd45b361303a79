"""The tests of what is in this folder: real nginx, Caddy, HAProxy and p2pserver processes, in front of each other on loopback.

The configurations are the files beside this one; only addresses, paths of certificates and times are put in their place.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import ipaddress
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

import p2pclient
import p2pserver
from p2pclient import addresses, candidates

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
WAIT = 20       # seconds after which a thing that must happen counts as one that does not
HOST, GUEST = "the host's secret", "the guest's secret"
HERS, HIS = ["203.0.113.1:5000", "[2001:db8::1]:5000"], ["203.0.113.2:6000"]
OPTION = {option.variable: option for option in p2pserver.OPTIONS}
DEFAULTS = p2pserver.Settings()
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"      # where nginx is, and not everybody looks
INSIDE_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
{user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    keepalive_timeout 2s;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
BEFORE_CADDY = """{
	admin off
	auto_https disable_redirects
	skip_install_trust
	servers {
		timeouts {
			idle 2s
		}
	}
}
"""


# ---- processes ------------------------------------------------------------------------------------------------------

def program(name):
    found = shutil.which(name, path=PATH)
    assert found, f"{name} is not installed; make deploy-test says what is needed"
    return found


def wait_until(condition, seconds=WAIT):
    """What condition() gives once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return found


def free_port():
    """A port that is free for TCP and UDP, and not one of those that the system gives to outgoing connections, or it could be gone again."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return port


def put(text, *changes):
    """The text with each (old, new) replaced; there is no such change if old is not in it."""
    for old, new in changes:
        assert old in text, f"{old!r} is no longer there"
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def started(command, port, folder, before=None, **more):
    """A process that listens on that port of 127.0.0.1 once it is there. It calls before() in the beginning."""
    log = folder / f"{pathlib.Path(command[0]).name}-{port}.log"
    variables = {key: value for key, value in os.environ.items() if key != "PORT" and not key.startswith("P2P_")}
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env={**variables, **more}, stdout=output, stderr=output, preexec_fn=before)

    def listens():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), WAIT).close()
            return True

    try:
        wait_until(listens)
        yield process
    finally:
        process.terminate()     # so that nginx takes its workers along
        try:
            process.wait(WAIT)
        finally:
            process.kill()
            process.wait()


def server_on(port, folder, *flags):
    return started([sys.executable, ROOT / "p2pserver.py", "--host", "127.0.0.1", "--port", port, "--trusted-proxies", "127.0.0.1,::1", *flags], port, folder)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The path of a certificate for 127.0.0.1 with its key in the same file."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    subprocess.run([program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", "/CN=p2p", "-keyout", path.with_name("key.pem"), "-out", path,
                    "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"], check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_name("key.pem").read_text())
    return path


def nginx(folder, port, upstream, certificate, *changes):
    """The command that runs nginx with our site on that port, and its environment."""
    site = put((HERE / "nginx.conf").read_text(), ("server 127.0.0.1:8000", f"server 127.0.0.1:{upstream}"), ("keepalive_timeout 60s", "keepalive_timeout 2s"),
               ("listen 443", f"listen 127.0.0.1:{port}"), ("listen 80", f"listen 127.0.0.1:{free_port()}"), ("listen [::]:443 ssl http2;", ""),
               ("listen [::]:80;", ""), ("/etc/letsencrypt/live/p2p.example.org/fullchain.pem", str(certificate)),
               ("/etc/letsencrypt/live/p2p.example.org/privkey.pem", str(certificate)), *changes)
    (folder / "site.conf").write_text(site)
    # Its workers would be another user, who does not get at the folder.
    (folder / "nginx.conf").write_text(INSIDE_NGINX.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
    return [program("nginx"), "-e", "stderr", "-p", folder, "-c", folder / "nginx.conf"], {}


def caddy(folder, port, upstream, certificate, *changes):
    """The command that runs Caddy with our site on that port, and its environment."""
    site = put((HERE / "Caddyfile").read_text(), ("keepalive 60s", "keepalive 2s"),
               ("\t# Prometheus", f"\tbind 127.0.0.1\n\ttls {certificate} {certificate}\n\t# Prometheus"), *changes)
    (folder / "Caddyfile").write_text(BEFORE_CADDY + site)
    return ([program("caddy"), "run", "--config", folder / "Caddyfile", "--adapter", "caddyfile"],
            {"P2P_DOMAIN": f"https://127.0.0.1:{port}", "P2P_UPSTREAM": f"127.0.0.1:{upstream}", "HOME": str(folder), "XDG_DATA_HOME": str(folder)})


def haproxy(folder, port, upstream, certificate, *changes):
    """The command that runs HAProxy with our configuration on that port, and its environment."""
    text = put((HERE / "haproxy.cfg").read_text(), ("server p2pserver 127.0.0.1:8000", f"server p2pserver 127.0.0.1:{upstream}"),
               ("http-keep-alive 60s", "http-keep-alive 2s"), ("bind :443,:::443 v6only", f"bind 127.0.0.1:{port}"),
               ("bind :80,:::80 v6only", f"bind 127.0.0.1:{free_port()}"), ("/etc/haproxy/certs/p2p.example.org.pem", str(certificate)),
               ("log /dev/log", "log stdout format raw"), ("maxconn 50000", "maxconn 500"), ("    user haproxy\n    group haproxy\n", ""), *changes)
    (folder / "haproxy.cfg").write_text(text)
    return [program("haproxy"), "-db", "-f", folder / "haproxy.cfg"], {}


class From(requests.adapters.HTTPAdapter):
    """Connections that come from an address of one's own."""

    def __init__(self, address):
        self.address = address
        super().__init__()

    def init_poolmanager(self, *arguments, **options):
        super().init_poolmanager(*arguments, source_address=(self.address, 0), **options)


class Front:
    """A proxy with a server behind it, as clients see it."""

    def __init__(self, port, upstream, certificate):
        self.port, self.upstream, self.certificate = port, upstream, certificate
        self.url = f"https://127.0.0.1:{port}"

    def session(self, address="127.0.0.2"):
        session = requests.Session()
        session.trust_env, session.verify = False, str(self.certificate)
        session.mount("https://", From(address))
        return session

    def call(self, method, path, json=None, address="127.0.0.2", **options):
        """The answer to a request from that address on a connection of its own."""
        with self.session(address) as session:
            return session.request(method, self.url + path, json=json, timeout=2 * WAIT, **options)

    def poll(self, name, wait=0, **more):
        return self.call("POST", "/games/poll", {"name": name, "peerId": HOST, "addresses": HERS, **more}, headers={"Prefer": f"wait={wait}"} if wait else {})

    def offer(self, name):
        answer = self.call("POST", "/games/register", {"name": name, "peerId": HOST})
        assert answer.status_code == 201, answer.text
        return answer

    def start(self, name, peer=GUEST):
        return self.call("POST", "/games/start", {"name": name, "peerId": peer, "addresses": HIS})

    def send(self, text):
        """A connection of TLS on which that has been sent."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        connection = context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), WAIT, ("127.0.0.2", 0)), server_hostname="127.0.0.1")
        connection.sendall(text.encode())
        return connection

    def waiting(self):
        """How many polls the server holds, as it says itself to who asks it without the proxy."""
        return number("p2pserver_waiting", requests.get(f"http://127.0.0.1:{self.upstream}/metrics", timeout=WAIT).text)


def number(name, text):
    return int(re.search(rf"^{name} (\d+)$", text, re.MULTILINE)[1])


@contextlib.contextmanager
def fronted(proxy, folder, certificate, *flags, changes=(), upstream=0):
    """A Front of a proxy and, unless the test itself has something to do with the port upstream, a server."""
    with contextlib.ExitStack() as stack:
        front = Front(free_port(), upstream or free_port(), certificate)
        if not upstream:
            stack.enter_context(server_on(front.upstream, folder, *flags))
        command, variables = proxy(folder, front.port, front.upstream, certificate, *changes)
        stack.enter_context(started(command, front.port, folder, **variables))
        yield front


ALL = pytest.mark.parametrize("proxy", [nginx, caddy, haproxy], ids=["nginx", "caddy", "haproxy"])


@pytest.fixture(scope="module", params=[nginx, caddy, haproxy], ids=["nginx", "caddy", "haproxy"])
def front(request, tmp_path_factory, certificate):
    """A proxy and a server for all tests that need none of their own."""
    with fronted(request.param, tmp_path_factory.mktemp("front"), certificate, "--rate", "0") as front:
        yield front


@pytest.fixture
def name(request):
    """A game's name that no other test uses."""
    return "game of " + re.sub(r"\W+", " ", request.node.name).strip()[:50].strip()


# ---- through a proxy ------------------------------------------------------------------------------------------------

def test_a_host_and_a_guest_exchange_their_addresses_through_it_and_ask_stun_past_it(front, name):
    host, guest = (p2pclient.RendezvousClient(front.url, front.session(address)) for address in ("127.0.0.2", "127.0.0.3"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        server = ("127.0.0.1", front.upstream)
        assert candidates.ask_stun(sock, [server]) == {server: sock.getsockname()}
    host.register_game(name, HOST, info={"map": "castle"})
    host.poll_game(name, HOST, HERS)
    [game] = [game for game in guest.list_games() if game.name == name]
    assert (game.info, game.ready) == ({"map": "castle"}, True)
    started = guest.start_game(name, GUEST, HIS)
    [found] = host.poll_game(name, HOST, HERS).guests
    assert (list(started.addresses), list(found.addresses)) == (HERS, HIS)
    assert (found.session_id, found.session_key) == (started.session_id, started.session_key)
    host.delete_game(name, HOST)
    assert front.call("GET", "/games/" + urllib.parse.quote(name)).status_code == 404


def test_a_poll_is_held_until_a_guest_starts(front, name):
    front.offer(name)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        held = pool.submit(front.poll, name, 25)
        wait_until(lambda: front.waiting() == 1)
        session = front.start(name).json()["sessionId"]
        answer = held.result(WAIT)
    assert time.monotonic() - began < 20
    assert [guest["sessionId"] for guest in answer.json()["guests"]] == [session]
    assert answer.headers["Preference-Applied"] == "wait=25"


def test_a_start_is_held_until_the_host_has_addresses(front, name):
    front.offer(name)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        held = pool.submit(front.call, "POST", "/games/start", {"name": name, "peerId": GUEST, "addresses": HIS, "wait": 25})
        wait_until(lambda: front.waiting() == 1)
        front.poll(name)
        answer = held.result(WAIT)
    assert (answer.status_code, answer.json()["addresses"], answer.headers["Preference-Applied"]) == (200, HERS, "wait=25")


def test_a_poll_may_be_held_longer_than_connections_are_kept(front, name):
    """Which is 2 seconds in these tests, on both sides of the proxy."""
    front.offer(name)
    began = time.monotonic()
    answer = front.poll(name, 5)
    assert time.monotonic() - began >= 5
    assert (answer.status_code, answer.json()["guests"], answer.headers["Preference-Applied"]) == (200, [], "wait=5")


def poll_over_http_2(front, name, wait, *more):
    """The command that does it."""
    return [program("curl"), "--silent", "--show-error", "--cacert", front.certificate, "--http2", "--include", "--header", f"Prefer: wait={wait}",
            "--json", json.dumps({"name": name, "peerId": HOST, "addresses": HERS}), f"{front.url}/games/poll", *more]


def test_a_poll_is_held_over_http_2_as_well(front, name):
    front.offer(name)
    got = subprocess.run(poll_over_http_2(front, name, 3), capture_output=True, text=True, timeout=WAIT)
    assert got.stdout.startswith("HTTP/2 200"), got.stdout + got.stderr
    assert "preference-applied: wait=3" in got.stdout and '"guests":[]' in got.stdout


def test_who_hangs_up_gives_up_the_poll_over_http_2_as_well(front, name):
    front.offer(name)
    with subprocess.Popen(poll_over_http_2(front, name, 25), stdout=subprocess.DEVNULL) as polling:
        wait_until(lambda: front.waiting() == 1)
        polling.kill()
    wait_until(lambda: front.waiting() == 0, 10)


def test_who_hangs_up_gives_up_the_poll(front, name):
    front.offer(name)
    body = json.dumps({"name": name, "peerId": HOST, "addresses": HERS, "wait": 25})
    connection = front.send(f"POST /games/poll HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}")
    wait_until(lambda: front.waiting() == 1)
    connection.close()
    wait_until(lambda: front.waiting() == 0, 10)


@pytest.mark.parametrize("title", ["100% \"sure\" & so on?", "a#b;c=d,+e f", "Zoë's 城 🎮", "%41 stays", "a\\b", "...", "x~y!$'()*", "[::1]:5", "a:b@c"])
def test_every_name_of_a_game_comes_through_in_a_path(front, title):
    path = "/games/" + urllib.parse.quote(title, safe="")
    assert front.offer(title).headers["Location"] == path
    assert front.call("GET", path).json()["name"] == title
    assert front.call("PATCH", path, {"peerId": HOST, "info": {"level": 2}}).json()["info"] == {"level": 2}
    assert front.call("DELETE", path, headers={"Authorization": f"Bearer {HOST}"}).status_code == 204


def test_a_list_that_is_known_is_not_sent_again(front, name):
    front.offer(name)
    first = front.call("GET", "/games")
    assert first.status_code == 200
    again = front.call("GET", "/games", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_body_of_the_most_that_is_allowed_comes_through(front, name):
    filling = {"name": name, "peerId": HOST, "filling": ""}
    filling["filling"] = "x" * (DEFAULTS.max_body - len(json.dumps(filling)))
    answer = front.call("POST", "/games/register", data=json.dumps(filling), headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text


def test_the_server_itself_says_what_is_wrong_with_a_request(front, name):
    answer = front.call("POST", "/games/register", data=" " * (DEFAULTS.max_body + 1), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (413, "application/problem+json")
    answer = front.call("POST", "/games/poll", {"name": name, "peerId": HOST, "addresses": []})
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")


def test_a_much_larger_body_is_refused_too(front):
    for _ in range(5):
        assert front.call("POST", "/games/register", data=" " * 300_000, headers={"Content-Type": "application/json"}).status_code == 413


@pytest.mark.parametrize("target", ["/metrics", "/metrics?x=1", "//metrics", "/./metrics", "/x/../metrics", "/%6detrics", "/METRICS", "/metrics/",
                                    "https://127.0.0.1/metrics", "/metrics#x", "/metrics;x"])
@pytest.mark.parametrize("more", ["", "X-Forwarded-For: 127.0.0.1\r\n", "Forwarded: for=127.0.0.1\r\n"], ids=["plain", "x-forwarded-for", "forwarded"])
def test_metrics_are_not_for_who_comes_through_the_proxy(front, target, more):
    with front.send(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}Connection: close\r\n\r\n") as connection:
        answer = connection.makefile("rb").read().decode()
    assert re.match(r"HTTP/1.1 (301|308|400|403|404) ", answer) and "p2pserver_games" not in answer


@pytest.mark.parametrize("proxy, file, line", [(nginx, "site.conf", r"listen (127\.0\.0\.1:\d+);"), (haproxy, "haproxy.cfg", r"bind (127\.0\.0\.1:\d+)\n")],
                         ids=["nginx", "haproxy"])
def test_it_sends_who_comes_without_tls_to_https_with_the_same_method(proxy, file, line, tmp_path, certificate):
    with fronted(proxy, tmp_path, certificate):
        plain = re.search(line, (tmp_path / file).read_text())[1]
        answer = requests.post(f"http://{plain}/games/start?x=%20", json={}, allow_redirects=False, timeout=WAIT)
        assert (answer.status_code, answer.headers["Location"]) == (308, "https://p2p.example.org/games/start?x=%20")


# ---- whom limits count ----------------------------------------------------------------------------------------------

FORGED = (
    {"X-Forwarded-For": "198.51.100.{}"}, {"X-Forwarded-For": "127.0.0.1, 198.51.100.{}"}, {"Forwarded": "for=198.51.100.{}"},
    {"X-Forwarded-For": "198.51.100.{}", "Forwarded": "for=198.51.100.{}"}, {"x_forwarded_for": "198.51.100.{}"}, {"X-Real-IP": "198.51.100.{}"},
    {"Connection": "X-Forwarded-For"},
)


@ALL
@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.1"], ids=["a stranger", "one with the address of a trusted proxy"])
def test_each_client_behind_the_proxy_has_limits_of_its_own_and_cannot_pass_for_another(proxy, address, tmp_path, certificate):
    with fronted(proxy, tmp_path, certificate, "--rate", "0.01", "--burst", "10") as front:
        first = [front.call("GET", "/games", address=address).status_code for _ in range(12)]
        assert first == [200] * 10 + [429] * 2
        for i, forged in enumerate(FORGED):
            headers = {field: value.format(i) for field, value in forged.items()}
            assert front.call("GET", "/games", address=address, headers=headers).status_code == 429, headers
        answer = front.call("GET", "/games", address=address)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
        # Nobody can use up what is another's.
        for _ in range(12):
            front.call("GET", "/games", address=address, headers={"X-Forwarded-For": "127.0.0.3", "Forwarded": "for=127.0.0.3"})
        assert [front.call("GET", "/games", address="127.0.0.3").status_code for _ in range(10)] == [200] * 10
        assert front.call("GET", "/games", address="127.0.0.3").status_code == 429


@ALL
def test_each_client_behind_the_proxy_has_games_of_its_own(proxy, tmp_path, certificate):
    with fronted(proxy, tmp_path, certificate, "--max-games-per-client", "1") as front:
        statuses = [front.call("POST", "/games/register", {"name": f"game {i}", "peerId": HOST}, address=address).status_code
                    for i, address in enumerate(["127.0.0.2", "127.0.0.2", "127.0.0.3"])]
        assert statuses == [201, 429, 201]


@ALL
def test_the_log_names_the_client_and_not_the_proxy(proxy, tmp_path, certificate):
    with fronted(proxy, tmp_path, certificate, "--access-log", "--log-format", "json") as front:
        front.call("GET", "/healthz", address="127.0.0.7", headers={"X-Forwarded-For": "198.51.100.1"})
        [log] = tmp_path.glob(f"python*-{front.upstream}.log")
        assert wait_until(lambda: re.search('"client": "([^"]*)", "method": "GET", "path": "/healthz"', log.read_text()))[1] == "127.0.0.7"


def test_nginx_limits_the_requests_that_one_client_has_at_once(tmp_path, certificate):
    with fronted(nginx, tmp_path, certificate, changes=[("limit_conn p2pserver_clients 256", "limit_conn p2pserver_clients 2")]) as front, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        for i in range(2):
            front.offer(f"game {i}")
        held = [pool.submit(front.poll, f"game {i}", 25) for i in range(2)]
        wait_until(lambda: front.waiting() == 2)
        assert front.call("GET", "/healthz", address="127.0.0.2").status_code == 429
        assert front.call("GET", "/healthz", address="127.0.0.3").status_code == 200
        for i in range(2):
            front.call("DELETE", f"/games/game%20{i}", {"peerId": HOST}, address="127.0.0.3")
        assert [each.result(WAIT).status_code for each in held] == [404, 404]


@pytest.mark.parametrize("first, second, other", [("2001:db8:1:200::1", "2001:db8:1:2ff:ffff::1", "2001:db8:1:300::1"),
                                                  ("2001:db8:a0a:a0a::a0a", "2001:db8:a0a:aff::1", "2001:db8:a0a:b0a::a0a")], ids=["usual", "with line feeds"])
def test_nginx_takes_an_ipv6_56_for_one_client(first, second, other, tmp_path, certificate):
    """The addresses are nginx' own word of who connects, which its module realip sets here."""
    changes = [("limit_conn p2pserver_clients 256;", "limit_conn p2pserver_clients 2; set_real_ip_from 127.0.0.1; real_ip_header X-Test;")]
    with fronted(nginx, tmp_path, certificate, changes=changes) as front, concurrent.futures.ThreadPoolExecutor() as pool:
        def call(address, *request):
            return front.call(*request, address="127.0.0.1", headers={"X-Test": address})

        held = []
        for i, address in enumerate((first, second)):
            front.offer(f"game {i}")
            held.append(pool.submit(call, address, "POST", "/games/poll", {"name": f"game {i}", "peerId": HOST, "addresses": HERS, "wait": 25}))
        wait_until(lambda: front.waiting() == 2)
        assert [call(address, "GET", "/healthz").status_code for address in (first, second, other, "203.0.113.1")] == [429, 429, 200, 200]
        for i in range(2):
            call(other, "DELETE", f"/games/game%20{i}", {"peerId": HOST})
        assert [each.result(WAIT).status_code for each in held] == [404, 404]


# ---- faults ---------------------------------------------------------------------------------------------------------

@ALL
def test_without_a_server_it_says_502_and_works_again_as_soon_as_there_is_one(proxy, tmp_path, certificate, name):
    with fronted(proxy, tmp_path, certificate, upstream=free_port()) as front:
        for _ in range(2):
            with server_on(front.upstream, tmp_path) as server, concurrent.futures.ThreadPoolExecutor() as pool:
                front.offer(name)       # at once, and not after a while in which the server counts as lost
                held = pool.submit(front.poll, name, 25)
                wait_until(lambda: front.waiting() == 1)
                server.send_signal(signal.SIGTERM)
                assert held.result(WAIT).status_code == 200, "a server that stops answers what it holds, through the proxy too"
                server.wait(WAIT)
            for _ in range(3):
                assert front.call("GET", "/healthz").status_code == (503 if proxy is haproxy else 502)


def test_haproxy_does_not_send_twice_what_might_have_been_done(tmp_path, certificate):
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor() as pool, \
            fronted(haproxy, tmp_path, certificate, upstream=listener.getsockname()[1]) as front:
        listener.settimeout(WAIT)
        asked = pool.submit(front.call, "POST", "/games/start", {"name": "x", "peerId": GUEST})
        connection, _ = listener.accept()
        assert connection.recv(65536).startswith(b"POST")
        connection.close()
        assert asked.result(WAIT).status_code == 502
        listener.settimeout(0.5)
        with pytest.raises(socket.timeout):
            listener.accept()


def test_haproxy_hands_the_challenge_of_a_certificate_to_certbot(tmp_path, certificate):
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor() as pool, \
            fronted(haproxy, tmp_path, certificate, changes=[("127.0.0.1:8402", f"127.0.0.1:{listener.getsockname()[1]}")]):
        listener.settimeout(WAIT)
        plain = re.search(r"bind (127\.0\.0\.1:\d+)\n", (tmp_path / "haproxy.cfg").read_text())[1]
        asked = pool.submit(requests.get, f"http://{plain}/.well-known/acme-challenge/token", timeout=WAIT)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(65536).startswith(b"GET /.well-known/acme-challenge/token ")
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\ntoken")
        assert asked.result(WAIT).text == "token"


@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "caddy"])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_what_might_have_been_done_is_not_sent_twice(proxy, tmp_path, certificate, method):
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor() as pool, \
            fronted(proxy, tmp_path, certificate, upstream=listener.getsockname()[1]) as front:
        listener.settimeout(WAIT)
        first = pool.submit(front.call, "GET", "/healthz")
        connection, _ = listener.accept()
        connection.settimeout(WAIT)
        head = connection.recv(65536)
        assert head.startswith(b"GET /healthz") and b"connection: close" not in head.lower()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert first.result(WAIT).status_code == 200
        # The next one comes on the connection that was kept, which ends before there is an answer.
        second = pool.submit(front.call, method, "/games/x", {"peerId": HOST})
        assert connection.recv(65536).startswith(method.encode())
        connection.close()
        assert second.result(WAIT).status_code == 502
        listener.settimeout(0.5)
        with pytest.raises(socket.timeout):
            listener.accept()


# ---- Prometheus -----------------------------------------------------------------------------------------------------

def test_prometheus_own_parser_reads_the_metrics(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with server_on(port, tmp_path), requests.Session() as session:
        session.trust_env = False
        game = {"name": "castle", "peerId": HOST}
        assert [session.post(f"{url}/games/register", json=game, timeout=WAIT).status_code for _ in range(2)] == [201, 200]
        families = {family.name: family for family in text_string_to_metric_families(session.get(f"{url}/metrics", timeout=WAIT).text)}
    kinds = {name: family.type for name, family in families.items()}
    assert (kinds["p2pserver_games"], kinds["p2pserver_requests"]) == ("gauge", "counter"), "the parser takes _total off"
    assert all(name.startswith("p2pserver_") and kind in ("gauge", "counter") for name, kind in kinds.items())
    samples = {(sample.name, *sample.labels.values()): sample.value for family in families.values() for sample in family.samples}
    assert (samples["p2pserver_games",], samples["p2pserver_guests",]) == (1, 0) and samples["p2pserver_stored_bytes",] > 0
    assert (samples["p2pserver_requests_total", "register_game", "201"], samples["p2pserver_requests_total", "register_game", "200"]) == (1, 1)


# ---- systemd --------------------------------------------------------------------------------------------------------

UNIT = (HERE / "p2pserver.service").read_text()


def values(setting):
    """What the unit says of a setting, line by line."""
    return re.findall(rf"^{setting}=(.*)$", UNIT, re.MULTILINE)


@pytest.mark.parametrize("unit", [UNIT, re.sub("^#(?=[A-Z][A-Za-z]+=)", "", UNIT, flags=re.MULTILINE)], ids=["as it is", "with the lines for TLS"])
def test_systemd_finds_no_fault_with_the_unit(unit, tmp_path):
    (tmp_path / "p2pserver.service").write_text(unit)
    found = subprocess.run([program("systemd-analyze"), "verify", tmp_path / "p2pserver.service"], capture_output=True, text=True, timeout=WAIT)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_systemd_takes_the_unit_for_well_confined():
    found = subprocess.run([program("systemd-analyze"), "security", "--offline=true", "--threshold=15", HERE / "p2pserver.service"],
                           capture_output=True, text=True, timeout=WAIT)
    assert found.returncode == 0, found.stdout      # 1.5 of 10 at the most; what is left is that it talks to the network


def system_calls(group):
    """The names of all system calls in a group of systemd's, as @system-service."""
    said = subprocess.run([program("systemd-analyze"), "syscall-filter", group], capture_output=True, text=True, check=True, timeout=WAIT).stdout
    names = {line.strip() for line in said.splitlines()[1:] if line.strip() and not line.strip().startswith("#")}
    return {call for name in names for call in (system_calls(name) if name.startswith("@") else [name])}


def confinement():
    """What confines the calling process for good to the system calls, families of sockets, memory and capabilities that the unit leaves
    it, as systemd would. Where the kernel does not know of the like for memory (before Linux 6.3), that is left out."""
    seccomp, libc = ctypes.CDLL("libseccomp.so.2", use_errno=True), ctypes.CDLL(None, use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    allowed, denied = values("SystemCallFilter")
    assert denied.startswith("~") and not allowed.startswith("~")
    names = {call for group in allowed.split() for call in system_calls(group)} - {call for group in denied[1:].split() for call in system_calls(group)}
    [families] = values("RestrictAddressFamilies")

    class Comparison(ctypes.Structure):
        _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("value", ctypes.c_uint64), ("other", ctypes.c_uint64)]

    permit, fail, equal = 0x7FFF0000, 0x00050000 | errno.EPERM, 4       # the names that seccomp.h has for them are longer
    context = ctypes.c_void_p(seccomp.seccomp_init(fail))
    numbers = {name: seccomp.seccomp_syscall_resolve_name(name.encode()) for name in names}
    for name, call in numbers.items():
        cases = [Comparison(0, equal, getattr(socket, family), 0) for family in families.split()] if name == "socket" else [None]
        for case in cases if call >= 0 else []:     # others are of other machines
            assert seccomp.seccomp_rule_add_array(context, permit, call, 0 if case is None else 1, case and ctypes.byref(case)) == 0, name

    def confine():
        libc.prctl(65, 1, 0, 0, 0)      # PR_SET_MDWE: no memory that can be written and executed
        for capability in range(64 if os.geteuid() == 0 else 0):
            libc.prctl(24, capability, 0, 0, 0)     # PR_CAPBSET_DROP
        if seccomp.seccomp_load(context):
            raise OSError("the filter of system calls was not loaded")

    return confine


@pytest.mark.parametrize("code", ["socket.socket(socket.AF_UNIX)", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "os.chroot('/')", "os.nice(1)",
                                  "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)"])
def test_the_confinement_of_these_tests_confines(code):
    tried = subprocess.run([sys.executable, "-c", f"import mmap, os, socket; {code}"], preexec_fn=confinement(), capture_output=True, text=True, timeout=WAIT)
    assert "PermissionError" in tried.stderr


def test_the_server_does_all_that_it_does_within_what_the_unit_leaves_it(tmp_path, certificate):
    own, port = tmp_path / "certificate.pem", free_port()
    shutil.copy(certificate, own)
    [command] = values("ExecStart")
    command = put(command, ("/usr/bin/python3", sys.executable), ("/opt/p2pserver", str(ROOT))).split()
    with started(command, port, tmp_path, confinement(), P2P_PORT=str(port), P2P_TLS_CERT=str(own), P2P_LOG_FORMAT="json", P2P_RATE="0") as server:
        status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
        assert "Seccomp:\t2\n" in status and "CapEff:\t0000000000000000\n" in status
        log = next(tmp_path.glob("*.log"))
        front = Front(port, port, certificate)
        front.offer("a game")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            held = pool.submit(front.poll, "a game", 25)
            wait_until(lambda: [each for each in front.call("GET", "/metrics").text.splitlines() if each == "p2pserver_waiting 1"])
            assert front.start("a game").status_code == 200
            assert len(held.result(WAIT).json()["guests"]) == 1
            assert {answer.status_code for answer in pool.map(lambda _: front.call("GET", "/games"), range(50))} == {200}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            assert candidates.ask_stun(sock, [("127.0.0.1", port)]) == {("127.0.0.1", port): sock.getsockname()}
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: "loaded anew" in log.read_text())
        assert front.call("GET", "/healthz").status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT) == 0
        assert not re.search("Traceback|not permitted", log.read_text())


# ---- what the files say of each other -------------------------------------------------------------------------------

FILES = [path for path in sorted(HERE.iterdir()) if path.is_file() and path.suffix != ".py"]
COMPOSE = {name: yaml.safe_load((HERE / name).read_text()) for name in ("compose.yaml", "compose-caddy.yaml", "compose-cluster.yaml", "compose-turn.yaml")}
ALONE, WITH_CADDY, CLUSTER, WITH_TURN = (file["services"] for file in COMPOSE.values())


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_flags_that_are_mentioned_exist_and_have_the_defaults_that_are_said(path):
    text = path.read_text()
    for variable in re.findall(r"\bP2P_[A-Z_]+", text):
        assert variable in OPTION or variable in ("P2P_DOMAIN", "P2P_UPSTREAM", "P2P_STORE_SECRET", "P2P_STORE_SECRET_FILE")
    for flag, number in re.findall(r"--([a-z]+(?:-[a-z]+)+) (?:is )?(\d+)\b(?!\.)", text):
        assert getattr(DEFAULTS, flag.replace("-", "_")) == int(number), flag


def test_nginx_waits_longer_than_polls_are_held_and_keeps_connections_shorter_than_the_server():
    seconds = dict(re.findall(r"(proxy_read_timeout|keepalive_timeout) (\d+)s;", (HERE / "nginx.conf").read_text()))
    assert int(seconds["proxy_read_timeout"]) > DEFAULTS.max_wait + 10
    assert int(seconds["keepalive_timeout"]) < DEFAULTS.idle_timeout


def test_caddy_keeps_connections_shorter_than_the_server():
    assert int(re.search(r"keepalive (\d+)s", (HERE / "Caddyfile").read_text())[1]) < DEFAULTS.idle_timeout


def test_the_caddyfile_is_as_caddy_would_write_it():
    formatted = subprocess.run([program("caddy"), "fmt", HERE / "Caddyfile"], capture_output=True, text=True, timeout=WAIT).stdout
    assert formatted == (HERE / "Caddyfile").read_text()


@pytest.mark.parametrize("services", [ALONE, WITH_CADDY, CLUSTER, WITH_TURN], ids=COMPOSE)
def test_containers_have_no_more_rights_than_they_need(services):
    for name, service in services.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "caddy" else [])


def megabytes(text):
    return int(re.fullmatch(r"(\d+)[mM]", text)[1]) * 1024 ** 2 // 1000 ** 2


def test_the_memory_limits_leave_room_for_all_that_the_servers_own_limits_allow():
    """Which are its games, connections that have sent as much as each may before it is parsed, and 100 MB of the process."""
    most = DEFAULTS.max_memory + DEFAULTS.max_connections * (p2pserver.MAX_HEAD + p2pserver.READ_SIZE) // 1_000_000 + 100
    servers = [ALONE["p2pserver"], WITH_CADDY["p2pserver"], WITH_TURN["p2pserver"], CLUSTER["p2p1"]]
    limits = [*values("MemoryMax"), *(server["mem_limit"] for server in servers)]
    assert len(limits) == 5 and all(megabytes(limit) > most for limit in limits) and WITH_CADDY["caddy"]["mem_limit"]


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_dockerfile_needs_no_buildkit_and_everybody_may_read_the_server():
    """COPY --chmod, RUN --mount and here-documents are BuildKit's alone."""
    steps = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    assert not [line for line in steps if re.search(r"^(COPY|ADD) .*--(chmod|link|parents|exclude)|^RUN --|<<|\\$", line)]
    assert {line.split()[0] for line in steps} <= {"FROM", "ARG", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    file = re.search(r"^COPY p2pserver.py (\S+)$", DOCKERFILE, re.MULTILINE)[1]
    assert steps.index(f"RUN chmod 0444 {file}") < steps.index("USER 65534:65534") and steps[-1] == f'ENTRYPOINT ["python", "{file}"]'


@pytest.mark.parametrize("environment", [
    {"P2P_PORT": "{port}", "P2P_HOST": "127.0.0.5"}, {"PORT": "{port}", "P2P_HOST": "::1"}, {"P2P_PORT": "{port}", "PORT": "1"}, {"P2P_PORT": "{port}"},
    {"P2P_PORT": "tcp://10.0.0.1:8000", "PORT": "{port}"}, {"P2P_PORT": "{port}", "P2P_HOST": "0.0.0.0"}, {"P2P_PORT": "{port}", "P2P_HOST": "::"},
    {"P2P_PORT": "{port}", "P2P_TLS_CERT": "{certificate}"}, {"P2P_PORT": "{port}", "P2P_TLS_CERT": "{certificate}", "P2P_HOST": "127.0.0.5"}], ids=str)
def test_the_health_check_of_the_dockerfile_follows_address_port_and_tls(environment, tmp_path, certificate):
    check = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    port = free_port()
    inside = {name: value.format(port=port, certificate=certificate) for name, value in environment.items()}
    outside = {key: value for key, value in os.environ.items() if key != "PORT" and not key.startswith("P2P_")}

    def status():
        return subprocess.run([sys.executable, *check[1:]], env={**outside, **inside}, capture_output=True, timeout=WAIT).returncode

    assert check[0] == "python" and status() != 0, "nothing listens there yet"
    with subprocess.Popen([sys.executable, ROOT / "p2pserver.py"], env={**outside, **inside}, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert f":{port}/" in server.stdout.readline()
            assert status() == 0
        finally:
            server.kill()


@pytest.mark.parametrize("services", [ALONE, WITH_CADDY], ids=["compose.yaml", "compose-caddy.yaml"])
def test_the_server_of_the_compose_files_starts_from_the_dockerfile_with_settings_that_exist(services):
    service = services["p2pserver"]
    assert (HERE / service["build"] / "Dockerfile").samefile(ROOT / "Dockerfile")
    settings = p2pserver.parse_settings([], service["environment"])
    inside = {port.split(":")[1] for port in service["ports"]}
    exposed = set(re.search("^EXPOSE (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1].split())
    assert settings.port == DEFAULTS.port and {f"{settings.port}/udp", f"{settings.port + 1}/udp"} <= inside <= exposed
    assert service["ulimits"]["nofile"] > settings.max_connections


def in_this_shell(text, **variables):
    """What Compose makes of a text: a variable, or one that must be there."""
    return re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda found: variables[found[1]], text)


@contextlib.contextmanager
def with_relay(folder):
    """A game of the server of compose-turn.yaml, which has coturn beside it, on loopback; and coturn's log."""
    port, turn_port, log = free_port(), free_port(), folder / "turnserver.log"
    variables = {"TURN_HOST": "127.0.0.1", "P2P_TURN_SECRET": "the secret"}
    settings = {name: put(in_this_shell(text, **variables), *([("3478", str(turn_port))] if name == "P2P_TURN_URL" else []))
                for name, text in WITH_TURN["p2pserver"]["environment"].items()}
    arguments = [put(in_this_shell(text, **variables), *([("3478", str(turn_port))] if "listening-port" in text else []))
                 for text in WITH_TURN["turn"]["command"]]
    coturn = [program(*WITH_TURN["turn"]["entrypoint"]), *arguments, "--listening-ip=127.0.0.1", f"--userdb={folder / 'db'}", "--verbose"]
    with log.open("w") as output, subprocess.Popen(coturn, stdout=output, stderr=output, cwd=folder) as process, \
            started([sys.executable, ROOT / "p2pserver.py", "--host", "127.0.0.1", "--port", port], port, folder, **settings):
        try:
            with p2pclient.HostedGame(p2pclient.RendezvousClient(f"http://127.0.0.1:{port}"), "castle") as game:
                yield game, log
        finally:
            process.terminate()


def test_coturn_takes_the_arguments_of_compose_turn_and_gives_a_host_of_its_server_a_relay_with_no_way_into_private_networks(tmp_path):
    with with_relay(tmp_path) as (game, log):
        relay = wait_until(lambda: game.endpoint.candidates.relay)
        ports = [int(re.search(rf"--{name}-port=(\d+)", " ".join(WITH_TURN["turn"]["command"]))[1]) for name in ("min", "max")]
        assert ports[0] <= int(relay.rpartition(":")[2]) <= ports[1]
        inside = ["10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.31.255.254", "192.168.255.254", "240.0.0.1"]
        for number, host in enumerate([*inside, "198.51.100.1"]):
            game.endpoint.expect(p2pclient.Guest(f"session {number}", "key", [], host))
        wait_until(lambda: log.read_text().count("CREATE_PERMISSION processed, error 403") == len(inside))
        wait_until(lambda: "peer 198.51.100.1 lifetime updated" in log.read_text())
        assert not re.search(r"(?i)unrecognized|unknown option|invalid", log.read_text())


def test_every_private_network_is_denied_to_the_relay_of_compose_turn():
    denied = [tuple(map(ipaddress.ip_address, each[len("--denied-peer-ip="):].split("-"))) for each in WITH_TURN["turn"]["command"] if "denied" in each]
    special = map(ipaddress.ip_network, ("127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "::1", "fe80::/10"))
    for network in [*(network for network, _ in addresses.PRIVATE), *special]:
        assert any(first.version == network.version and first <= network[0] and network[-1] <= last for first, last in denied), network


def test_behind_caddy_the_server_is_reached_by_nobody_else_and_believes_nobody_else():
    server, proxy = WITH_CADDY["p2pserver"], WITH_CADDY["caddy"]
    assert [port for port in server["ports"] if not port.endswith("/udp")] == []
    [network] = proxy["networks"]
    assert server["networks"] == [network]
    assert server["environment"]["P2P_TRUSTED_PROXIES"] == proxy["networks"][network]["ipv4_address"]
    [subnet] = COMPOSE["compose-caddy.yaml"]["networks"][network]["ipam"]["config"]
    address = ipaddress.ip_address(proxy["networks"][network]["ipv4_address"])
    assert address in ipaddress.ip_network(subnet["subnet"]) and address not in ipaddress.ip_network(subnet["ip_range"])
    assert proxy["environment"]["P2P_UPSTREAM"] == f"p2pserver:{DEFAULTS.port}"
    for volume in proxy["volumes"]:
        source = volume.split(":")[0]
        assert (HERE / source).is_file() if source.startswith(".") else source in COMPOSE["compose-caddy.yaml"]["volumes"]
