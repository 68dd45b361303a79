"""What servers that share a store survive: real servers, a real redis-server, and between them a relay that delays, mutes or leads elsewhere."""
import contextlib
import functools
import itertools
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from stage import HERE, ROOT, THERE, Connection, call, free_port, metric, poll, register, request, serving, wait_until

import p2pserver
from test_p2pserver import Direct, Store

redis = pytest.importorskip("redis", reason="the library redis is not here")
redis_registry = pytest.importorskip("redis_registry")
if not shutil.which("redis-server"):
    pytest.skip("redis-server is not here", allow_module_level=True)

MEETING = {"name": "castle", "peerId": "host", "addresses": HERE}


@pytest.fixture
def store(tmp_path):
    with running(tmp_path) as store:
        yield store


@contextlib.contextmanager
def running(directory):
    store = Store(directory)
    try:
        yield store
    finally:
        store.process.send_signal(signal.SIGCONT)
        store.redis.close()
        store.stop()


@contextlib.contextmanager
def sharing(url, count, *flags):
    """So many servers on one store."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving("--store", url, "--no-stun", *flags)) for _ in range(count)]


class Relay:
    """Stands before a store, at an address of its own. delay: seconds that each message of the store takes; is_mute: who is to be woken does not arrive."""

    def __init__(self, target):
        self.target, self.delay, self.is_mute, self.port = target, 0.0, False, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client):
        is_reader = False
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as store:
            while True:
                for source in select.select([client, store], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    is_reader = is_reader or source is client and b"XREAD" in data
                    if source is client:
                        store.sendall(data)
                    elif not (is_reader and self.is_mute):
                        time.sleep(self.delay)
                        client.sendall(data)

    def close(self):
        self._listener.close()


@pytest.fixture
def relay(store):
    relay = Relay(store.port)
    yield relay
    relay.close()


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def waiting(server, **fields):
    """The connection of a host whose poll waits for news."""
    call(server, "POST", "/games/register", {"name": "castle", "peerId": "host"})
    cursor = call(server, "POST", "/games/poll", MEETING).json["cursor"]
    connection = Connection(server, request("POST", "/games/poll", {**MEETING, "after": cursor, "wait": 25, **fields}))
    wait_until(lambda: metric(server, "waiting") == 1)
    return connection


def start(server, guest="guest"):
    return call(server, "POST", "/games/start", {"name": "castle", "peerId": guest, "addresses": THERE})


def status(server):
    return call(server, "GET", "/games").status


# ---- what it takes to start -----------------------------------------------------------------------------------------

def refusal(*command, **environment):
    """What a server that cannot start says, in one line."""
    done = subprocess.run([sys.executable, *command, "--port", "0"], capture_output=True, text=True, env=environment, timeout=20)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done
    return done.stderr


def test_without_the_library_or_the_store_the_server_says_so_in_one_line_without_the_password(store):
    server = ROOT / "p2pserver.py"
    block = f"import sys; sys.modules['redis'] = None; sys.argv[0] = {str(server)!r}; sys.path.insert(0, {str(ROOT)!r}); import p2pserver; p2pserver.main()"
    assert "pip install 'redis>=8.1,<9'" in refusal("-c", block, "--store", store.url)
    for url in (f"redis://:hush@127.0.0.1:{free_port()}/0", "redis://:hush@127.0.0.1:nonsense", "http://:hush@127.0.0.1/", f"redis://:hush@127.0.0.1:{store.port}"):
        line = refusal(server, P2P_STORE=url)
        assert "--store" in line and "hush" not in line


def test_without_a_store_the_library_is_not_loaded():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import p2pserver; p2pserver.open_server(p2pserver.Settings(port=0)); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'p2pserver'" in modules and "redis" not in modules


def test_servers_with_another_secret_than_the_stores_do_not_start(store, tmp_path):
    file = tmp_path / "secret"
    file.write_text("of the operator\n")
    with sharing(store.url, 1) as servers:
        register(servers[0], 1)
    assert "P2P_STORE_SECRET" in refusal(ROOT / "p2pserver.py", "--store", store.url, P2P_STORE_SECRET_FILE=str(file))
    store.redis.flushall()
    with serving("--store", store.url, env={"P2P_STORE_SECRET_FILE": str(file)}), serving("--store", store.url, env={"P2P_STORE_SECRET": "of the operator"}):
        assert store.redis.get("p2p:{lobby}:secret").endswith(b":"), "the store does not have it"
        assert "P2P_STORE_SECRET" in refusal(ROOT / "p2pserver.py", "--store", store.url)


def test_a_store_behind_tls_must_have_a_certificate_that_is_trusted(tmp_path):
    port, key, certificate = free_port(), tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=store",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    with subprocess.Popen(["redis-server", "--port", "0", "--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key,
                           "--tls-auth-clients", "no", "--save", "", "--dir", tmp_path], stdout=subprocess.DEVNULL) as store:
        try:
            wait_until(lambda: listens(port))
            assert "--store" in refusal(ROOT / "p2pserver.py", "--store", f"rediss://127.0.0.1:{port}/0")
            with sharing(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}", 1) as (server,):
                assert register(server, 1) == ["game 0"]
        finally:
            store.kill()


def test_what_the_store_has_is_what_the_documentation_says(store):
    with sharing(store.url, 1) as servers:
        register(servers[0], 1)
        call(servers[0], "POST", "/games/start", {"name": "game 0", "peerId": "a strong peerId", "addresses": THERE})
        kept = json.dumps([str(store.redis.get(key)) for key in store.redis.scan_iter(_type="string")])
    assert THERE[0] in kept and "session_key" in kept and "a strong peerId" not in kept


# ---- waking ---------------------------------------------------------------------------------------------------------

def test_a_start_at_one_server_wakes_its_host_at_another_and_nobody_else(store):
    with sharing(store.url, 2) as (first, second), waiting(first) as host:
        register(second, 1, prefix="other")
        with Connection(second, poll("other 0", Prefer="wait=20")) as other:
            assert start(second).status == 200
            assert [guest["addresses"] for guest in host.answer().json["guests"]] == [THERE]
            assert not select.select([other.socket], [], [], 0.1)[0]


def test_a_host_that_is_woken_is_asked_for_once(store):
    with sharing(store.url, 2) as (first, second), waiting(first) as host, store.redis.monitor() as monitor:
        assert start(second).status == 200
        assert len(host.answer().json["guests"]) == 1
        store.redis.set("the end", 1)
        commands = itertools.takewhile(lambda command: "the end" not in command, (command["command"] for command in monitor.listen()))
        assert sum("poll_game" in command for command in commands) == 1


def test_a_guest_that_is_woken_without_news_for_it_goes_on_waiting(store):
    with sharing(store.url, 2) as (first, second):
        call(first, "POST", "/games/register", {"name": "castle", "peerId": "host"})
        call(first, "POST", "/games/poll", MEETING)
        joining = {"name": "castle", "peerId": "guest", "addresses": THERE, "after": start(second).json["cursor"], "wait": 25}
        with Connection(second, request("POST", "/games/start", joining)) as guest:
            wait_until(lambda: metric(second, "waiting") == 1)
            call(first, "POST", "/games/poll", {**MEETING, "addresses": []})
            assert not select.select([guest.socket], [], [], 0.2)[0]
            wait_until(lambda: metric(second, "waiting") == 1)
            call(first, "POST", "/games/poll", {**MEETING, "addresses": THERE})
            assert guest.answer().json["addresses"] == THERE


@pytest.mark.parametrize("trouble", ["killed", "mute", "mute for a moment"])
def test_news_reach_a_host_also_when_the_subscription_is_cut(trouble, store, relay):
    with sharing(relay.url, 1) as (first,), sharing(store.url, 1) as (second,), waiting(first) as host:
        if trouble == "killed":
            store.redis.client_kill_filter(_id=next(client["id"] for client in store.redis.client_list() if client["cmd"] == "xread"))
        else:
            relay.is_mute = True
        start(second)
        if trouble != "killed":
            assert not select.select([host.socket], [], [], 0.1 if trouble == "mute for a moment" else 1.5)[0], "the message was not lost"
            relay.is_mute = False
        assert len(host.answer().json["guests"]) == 1


def test_a_poll_that_was_replaced_at_another_server_cannot_end_the_one_that_took_its_place(store, relay):
    first, second = [redis_registry.RedisRegistry(p2pserver.Settings(store=url)) for url in (relay.url, store.url)]
    with contextlib.closing(first), contextlib.closing(second):
        woken = threading.Event()
        Direct(first).register_game("castle", b"host")
        replaced = Direct(first).poll_game("castle", b"host", b"[]", wake=int).waiter
        relay.is_mute = True
        assert Direct(second).poll_game("castle", b"host", b"[]", wake=woken.set).waiter
        Direct(first).forget_waiter(replaced)
        Direct(first).start_game("castle", b"guest", b"[]")
        assert woken.wait(20)


def test_who_may_have_missed_something_is_asked_again_spread_over_a_second(store):
    with sharing(store.url, 1) as (server,):
        call(server, "GET", "/")
        names = register(server, 300)
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(Connection(server, poll(name, Prefer="wait=20")))
            wait_until(lambda: metric(server, "waiting") == 300)
            assert status(server) == 200, "all that was asked before is answered"
            store.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: status(server) == 503)
            store.process.send_signal(signal.SIGCONT)
            asked, began = [], time.monotonic()
            with store.redis.monitor() as monitor:
                for command in monitor.listen():
                    if "forget_waiter" in command["command"]:
                        asked.append(command["time"])
                    if len(asked) == 300 or time.monotonic() - began > 20:
                        break
            assert len(asked) == 300 and asked[-1] - asked[0] > 0.5
            assert max(sum(asked[0] + i / 10 <= when < asked[0] + (i + 1) / 10 for when in asked) for i in range(20)) < 150
            wait_until(lambda: metric(server, "waiting") == 300)


def at_once(registry, operation, arguments, **values):
    """What an operation gives for each of many arguments, all of which are on their way together."""
    asks, answered = [functools.partial(getattr(registry.for_request(), operation), *each, **values) for each in arguments], threading.Semaphore(0)
    for ask in asks:
        with pytest.raises(p2pserver.Later) as later:
            ask()
        later.value.send(answered.release)
    assert all(answered.acquire(timeout=20) for _ in asks)
    return [ask() for ask in asks]


def test_ten_thousand_who_wait_are_asked_again_spread_over_a_second_after_a_cut(store):
    settings = p2pserver.Settings(store=store.url, max_games_per_client=10_000)
    with contextlib.closing(redis_registry.RedisRegistry(settings)) as registry:
        hosts = [(f"game {i}", b"host") for i in range(10_000)]
        at_once(registry, "register_game", hosts)
        asked = []
        news = at_once(registry, "poll_game", hosts, addresses=b'["203.0.113.1:5000"]', wake=lambda: asked.append(time.monotonic()))
        assert all(each.waiter for each in news) and not asked
        store.process.send_signal(signal.SIGSTOP)
        with pytest.raises(p2pserver.Full):
            at_once(registry, "counts", [()])
        store.process.send_signal(signal.SIGCONT)
        wait_until(lambda: registry.expire_games() or len(asked) == 10_000)
        assert asked[-1] - asked[0] > 0.8
        assert max(sum(asked[0] + i / 10 <= when < asked[0] + (i + 1) / 10 for when in asked) for i in range(100)) < 2_500


# ---- a store that fails ---------------------------------------------------------------------------------------------

def test_a_slow_store_slows_only_the_requests_that_need_it(relay):
    with sharing(relay.url, 1) as (server,):
        relay.delay = 1.0
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(Connection(server, poll("nobody's"))) for _ in range(50)]
            assert call(server, "GET", "/").status == 200
            assert select.select([each.socket for each in busy], [], [], 0)[0] == [], "they wait for the store, and it does not"
            relay.delay = 0.05
            assert {each.answer().status for each in busy} == {404}


def test_each_call_that_the_store_does_not_answer_has_an_error_of_its_own(store):
    """One for all would keep the traceback of each that raised it, and with that its request."""
    with contextlib.closing(redis_registry.RedisRegistry(p2pserver.Settings(store=store.url))) as registry:
        store.stop()
        errors = []
        for _ in range(2):
            with pytest.raises(p2pserver.Full, match="does not answer") as error:
                at_once(registry, "counts", [()])
            errors.append(error.value)
        assert errors[0] is not errors[1]


def test_a_store_that_restarts_empty_is_told_as_503_and_then_all_goes_on(store):
    with sharing(store.url, 2) as servers, waiting(servers[0]) as host:
        cursor = call(servers[0], "POST", "/games/poll", {**MEETING, "name": "castle", "after": 0}).json["cursor"]
        host.answer()       # it was replaced
        with waiting(servers[0]) as host:
            store.stop()
            wait_until(lambda: status(servers[1]) == 503)
            refused = call(servers[0], "POST", "/games/register", {"name": "castle", "peerId": "host"})
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            store.start()
            assert host.answer().status == 404, "it is told to register again"
            wait_until(lambda: all(status(server) == 200 for server in servers))
            assert call(servers[1], "POST", "/games/register", {"name": "castle", "peerId": "host"}).status == 201
            assert call(servers[0], "POST", "/games/poll", {**MEETING, "after": 0}).json["cursor"] > cursor


def test_a_server_that_finds_the_store_empty_later_than_others_goes_by_their_secret(store):
    with serving("--store", store.url, "--no-stun") as late:
        late.process.send_signal(signal.SIGSTOP)
        store.stop()
        store.start()
        with serving("--store", store.url, "--no-stun") as other:
            late.process.send_signal(signal.SIGCONT)
            wait_until(lambda: status(late) == 200)
            assert call(late, "POST", "/games/register", {"name": "castle", "peerId": "host"}).status == 201
            assert call(other, "POST", "/games/poll", MEETING).status == 200


def test_a_server_that_ends_answers_polls_that_wait_also_when_the_store_takes_a_second(relay):
    with serving("--store", relay.url, "--no-stun") as server, waiting(server) as host:
        relay.delay = 1.0
        server.process.send_signal(signal.SIGTERM)
        assert host.answer().status == 200 and server.process.wait(10) == 0


def test_a_store_that_is_emptied_has_hosts_register_again_and_wakes_them_as_before(store):
    with sharing(store.url, 2) as (first, second), waiting(first) as host:
        for key in store.redis.scan_iter("p2p:*:wake:*"):
            store.redis.xadd(key, {"token": "of a clock that was ahead"}, id="9999999999999-0")
        store.redis.flushall()
        assert host.answer().status == 404
        wait_until(lambda: status(first) == status(second) == 200)
        with waiting(first) as host:
            assert start(second).status == 200
            assert [guest["addresses"] for guest in host.answer().json["guests"]] == [THERE]


def test_a_store_that_hangs_is_told_as_503_and_what_was_given_up_is_not_done_later(store):
    with sharing(store.url, 1) as (server,):
        register(server, 1)
        store.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert call(server, "DELETE", "/games/game%200", {"peerId": "host"}).status == 503
        assert time.monotonic() - began < 4
        began = time.monotonic()
        assert {status(server) for _ in range(20)} == {503}
        assert time.monotonic() - began < 1, "nobody waits for what does not answer"
        time.sleep(max(0.0, 5 - (time.monotonic() - began)))
        store.process.send_signal(signal.SIGCONT)
        wait_until(lambda: status(server) == 200)
        assert call(server, "GET", "/games/game%200").status == 200


def test_a_replica_that_is_promoted_takes_over_behind_the_same_address(store, relay, tmp_path):
    (tmp_path / "replica").mkdir()
    with running(tmp_path / "replica") as replica, sharing(relay.url, 1) as (server,):
        replica.redis.replicaof("127.0.0.1", store.port)
        wait_until(lambda: replica.redis.info("replication")["master_link_status"] == "up")
        register(server, 1)
        wait_until(lambda: replica.redis.exists("p2p:{lobby}:names"))
        replica.redis.replicaof("NO", "ONE")
        relay.target = replica.port
        store.redis.replicaof("127.0.0.1", free_port())     # from now on it refuses to write, and knows nothing new
        wait_until(lambda: status(server) == 200 and call(server, "POST", "/games/register", {"name": "new", "peerId": "host"}).status == 201)
        assert call(server, "GET", "/games/game%200").status == 200 and replica.redis.hexists("p2p:{lobby}:names", "new")
        wait_until(lambda: re.search("the store does not answer: Re(adOnly|sponse)Error", server.err))
        assert server.err.count("ERROR") < 5, "it does not go on asking the old one"


def test_scripts_that_are_flushed_are_loaded_again_without_anybody_noticing(store):
    with sharing(store.url, 1) as (server,):
        register(server, 1)
        for _ in range(5):
            store.redis.script_flush()
            assert status(server) == 200
        assert "ERROR" not in server.err


def test_a_store_at_its_maxmemory_still_serves_and_frees(store):
    with sharing(store.url, 1, "--max-memory", "1") as (server,):
        register(server, 5)
        store.redis.config_set("maxmemory", 1)
        assert call(server, "POST", "/games/poll", {**MEETING, "name": "game 1"}).status == 200
        assert call(server, "DELETE", "/games/game%200", {"peerId": "host"}).status == 204
        statuses = [call(server, "POST", "/games/register", {"name": f"more {i}", "peerId": "host", "info": {"x": "x" * 900}}).status for i in range(700)]
        assert set(statuses) == {201, 503}, "--max-memory is what bounds it"


def test_limits_hold_across_servers(store):
    with sharing(store.url.replace("redis", "valkey", 1), 2, "--max-games", "10") as servers:
        statuses = [call(server, "POST", "/games/register", {"name": f"{i} {server.port}", "peerId": "host"}).status for i in range(10) for server in servers]
        assert statuses.count(201) == 10 and statuses.count(503) == 10


# ---- operators ------------------------------------------------------------------------------------------------------

def test_an_operator_lists_and_deletes_games_as_the_documentation_says(store):
    commands = re.findall(r"^redis-cli (.+)$", (ROOT / "deploy" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    with sharing(store.url, 1) as (server,), waiting(server) as host:
        def run(command, gid=""):
            command = f"redis-cli -p {store.port} {command.replace('GID', gid)}"
            return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout.split()
        names = run(commands[0])
        assert names[0] == "castle"
        run(commands[1], names[1])
        assert host.answer().status == 404
        assert json.loads(call(server, "GET", "/games").body) == {"games": []}
