"""The tests of p2pserver: pure ones of its parts first, then the whole over real sockets. Traffic goes to loopback only.

The sections follow the server's. The only doubles are the clock and the source of ids, both arguments of Registry.
"""

from __future__ import annotations

import ast
import base64
import concurrent.futures
import contextlib
import datetime
import functools
import gc
import hmac
import itertools
import json
import logging
import os
import pathlib
import random
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import unicodedata
import urllib.parse
import weakref
from typing import NamedTuple

import pytest
import requests

try:
    import redis

    import redis_registry
except ImportError:
    redis = None

import p2pserver
from p2pserver import NO_ADDRESSES, Conflict, Forbidden, Full, NotFound, Problem, Registry, Scope, Settings

ROOT = pathlib.Path(p2pserver.__file__).parent
WAIT = 20       # seconds after which a thing that must happen counts as one that does not
HOST, GUEST, OTHER = "the host's secret", "the guest's secret", "somebody else's secret"
HERE, THERE = ["203.0.113.1:5000", "[2001:db8::1]:5000"], ["203.0.113.2:6000"]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


class Api:
    """A running server as its clients see it: the operations by name, each returns the requests.Response."""

    def __init__(self, server, port=None):
        self.server, self.port = server, port or server.server_port
        self.session = requests.Session()
        self.session.trust_env = False      # no proxy of the environment

    def call(self, method, path, json=None, **options):
        return self.session.request(method, f"http://127.0.0.1:{self.port}{path}", json=json, timeout=WAIT, **options)

    def register_game(self, name, peer=HOST, **more):
        return self.call("POST", "/games/register", {"name": name, "peerId": peer, **more})

    def poll_game(self, name, peer=HOST, addresses=HERE, **more):
        return self.call("POST", "/games/poll", {"name": name, "peerId": peer, "addresses": addresses, **more})

    def start_game(self, name, peer=GUEST, addresses=THERE, **more):
        return self.call("POST", "/games/start", {"name": name, "peerId": peer, "addresses": addresses, **more})

    def list_games(self, **headers):
        return self.call("GET", "/games", headers=headers)

    def get_game(self, name):
        return self.call("GET", path_of(name))

    def update_game(self, name, peer=HOST, method="PATCH", /, **changes):
        return self.call(method, path_of(name), {"peerId": peer, **changes})

    def delete_game(self, name, peer=HOST):
        return self.call("DELETE", path_of(name), {"peerId": peer})

    def delete_by_header(self, name, authorization):
        return self.call("DELETE", path_of(name), headers={"Authorization": authorization.encode()})


class Polled(NamedTuple):
    guests: list
    cursor: int
    gone: list


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes


class Raw:
    """A connection on which a test says each byte itself."""

    def __init__(self, api, data=b"", source=None):
        self.socket = socket.create_connection(("127.0.0.1", api.port), WAIT, source_address=source and (source, 0))
        self.stream = self.socket.makefile("rb")
        self.send = self.socket.sendall
        self.send(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stream.close()
        self.socket.close()

    def answer(self, head=False):
        """The next answer; head: it is one to HEAD, which has no body."""
        line, *fields = itertools.takewhile(b"\r\n".__ne__, iter(self.stream.readline, b""))
        assert line.startswith(b"HTTP/1.1 ") and all(field.endswith(b"\r\n") for field in fields)
        headers = {name.lower(): value for name, value in (field.decode("latin-1").strip().split(": ", 1) for field in fields)}
        return Reply(int(line.split()[1]), headers, b"" if head else self.stream.read(int(headers.get("content-length", 0))))

    def is_closed(self):
        return self.stream.read() == b""


GET, POST, END = b"GET /healthz HTTP/1.1\r\nHost: h\r\n", b"POST /games/register HTTP/1.1\r\nHost: h\r\n", b"\r\n"
LIST = b"GET /games HTTP/1.1\r\nHost: h\r\n"      # which counts against the rate, as GET does not


NO_LIMITS_FOR_CLIENTS = {"rate": 0.0, "max_games_per_client": 10_000, "max_guests_per_client": 10_000}      # all tests are one client


@contextlib.contextmanager
def serving(clock=None, new_id=p2pserver.new_session_id, **values):
    """The Api of a server on a free port of loopback, which is stopped in the end."""
    settings = Settings(**{"host": "127.0.0.1", "port": 0, "no_stun": True, **NO_LIMITS_FOR_CLIENTS, **values})
    server = p2pserver.Server(settings, Registry(settings, clock, new_id)) if clock else p2pserver.open_server(settings)
    server.start()
    api = Api(server)
    try:
        yield api
    finally:
        api.session.close()
        if not server.stopping:
            server.stop(grace=0.1)


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture(scope="module")
def api():
    """A server for all tests that need none of their own. Its time stands still: no slow machine loses a game."""
    with serving(Clock()) as api:
        yield api


@pytest.fixture
def serve():
    """Start a server with settings of one's own: serve(max_games=1) returns its Api."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **values: stack.enter_context(serving(*args, **values))


class Gate:
    """A source of ids that holds up a start, and with it the registry's lock, until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(WAIT)
        return p2pserver.new_session_id()


@pytest.fixture
def gate(serve):
    """It is open in the end, before the servers are stopped."""
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def clock():
    return Clock()


class Store:
    """A redis-server on a free port of loopback."""

    def __init__(self, directory):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.redis = redis.Redis(port=self.port)
        self.process, self.directory = None, directory
        self.start()

    def start(self):
        self.process = subprocess.Popen(["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.directory)],
                                        stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self):
        with contextlib.suppress(redis.RedisError):
            return self.redis.ping()
        return False

    def stop(self):
        self.process.kill()
        self.process.wait()


class Direct:
    """A registry in a store whose answers are waited for, so that it is called as the one in memory is."""

    def __init__(self, registry):
        self.registry, self.events = registry, registry.events

    def __getattr__(self, name):
        return functools.partial(self.call, getattr(self.registry.for_request(), name))

    def expire_games(self):
        self.counts()       # each call does that

    def forget_waiter(self, waiter):
        self.registry.forget_waiter(waiter)
        self.counts()       # it is done by then

    def call(self, method, *args, **values):
        try:
            return self.wait_for(method, *args, **values)
        finally:
            self.wait_for(self.registry.for_request().counts)       # whom the call wakes is woken by then

    def wait_for(self, method, *args, **values):
        try:
            return method(*args, **values)
        except p2pserver.Later as later:
            there = threading.Event()
            later.send(there.set)
            assert there.wait(WAIT)
            return method(*args, **values)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An empty store for all tests that leave it as it is."""
    if redis is None or not shutil.which("redis-server"):
        pytest.skip("the library redis and redis-server are not both here; make store-test brings both")
    store = Store(tmp_path_factory.mktemp("store"))
    yield store
    store.redis.close()
    store.stop()


@pytest.fixture(params=["memory", "redis"])
def make_registry(request, clock):
    """Make an empty registry of each kind with settings of one's own: make_registry(max_games=1)."""
    if request.param == "memory":
        yield lambda **values: Registry(Settings(**values), clock)
        return
    store = request.getfixturevalue("store")
    store.redis.flushall()
    with contextlib.ExitStack() as stack:
        def make(**values):
            registry = redis_registry.RedisRegistry(Settings(store=store.url, **values), clock)
            stack.callback(registry.close)
            return Direct(registry)
        yield make


@pytest.fixture
def registry(make_registry):
    return make_registry(max_games=5, max_guests=3)


NUMBERS = itertools.count(1)


@pytest.fixture
def name():
    """A game's name that no other test uses."""
    return f"game {next(NUMBERS)}"


@pytest.fixture
def lines(api):
    """What the server logs at any level, each entry as it would be written."""
    wait_until(lambda: not api.server.registry.events)
    api.call("GET", "/healthz")     # what went before has been logged once this is answered
    entries, handler, level = [], logging.Handler(), p2pserver.log.level
    handler.setFormatter(p2pserver.TextFormatter())
    handler.emit = lambda record: entries.extend(
        line.split(" ", 2)[2] for line in handler.format(record).split("\n" if hasattr(record, "lines") else "\0"))
    p2pserver.log.setLevel(logging.DEBUG)
    p2pserver.log.addHandler(handler)
    yield entries
    p2pserver.log.removeHandler(handler)
    p2pserver.log.setLevel(level)


@pytest.fixture
def hasty_threads():
    """Threads begun meanwhile may lose their turn at every line of the server, and do at every fourth or so."""
    chance = random.Random(1)

    def trace(frame, event, argument):
        if frame.f_code.co_filename != p2pserver.__file__:
            return None
        if chance.random() < 0.25:
            time.sleep(0)
        return trace

    threading.settrace(trace)
    yield
    threading.settrace(None)


def path_of(name):
    return "/games/" + urllib.parse.quote(name, safe="")


def wait_until(condition, seconds=WAIT):
    """What condition() gives once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
    return found


def in_threads(count, work):
    """The results of work(0), work(1), ..., which all begin at once."""
    barrier = threading.Barrier(count)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda i: barrier.wait(WAIT) * 0 or work(i), range(count)))


def reachable(thing):
    """All objects that something holds, itself included, save code and modules."""
    seen, queue = {}, [thing]
    while queue:
        thing = queue.pop()
        if id(thing) not in seen and not isinstance(thing, (type, types.ModuleType, types.FunctionType, types.MethodType)):
            seen[id(thing)] = thing
            queue += gc.get_referents(thing)
    return list(seen.values())


def nested(levels, innermost):
    return functools.reduce(lambda inner, _: [inner], range(levels), innermost)


def brief(value):
    return ascii(value)[:50]


def rows(table):
    """A dict of cases by name, for parametrize."""
    return [pytest.param(*case, id=name) for name, case in table.items()]


# ---- options --------------------------------------------------------------------------------------------------------

def parse(*flags, **environment):
    return p2pserver.parse_settings(list(flags), environment)


@pytest.mark.parametrize("option", p2pserver.OPTIONS, ids=lambda option: option.name)
def test_each_option_can_be_given_as_flag_and_in_the_environment(option):
    value = {"poll_after": 3599, "no_stun": True, "access_log": True, "log_level": "debug", "log_format": "json", "host": "x", "cors_origin": "https://x",
             "trusted_proxies": "10.0.0.0/8, ::1", "metrics_from": "192.0.2.1", "tls_cert": "Zertifikat für.pem", "tls_key": "x",
             "store": "redis://:pässword@host", "turn_url": "turn:t:3478,turns:[2001:db8::1]:5349", "turn_secret": "a secret"}.get(option.name, option.high)
    text = "1" if value is True else str(value)
    roomy = {"P2P_GAME_TTL": "86400", "P2P_GUEST_TTL": "86400", "P2P_IDLE_TIMEOUT": "3600", "P2P_POLL_AFTER": "1", "P2P_TLS_CERT": "x",
             **({"P2P_TURN_URL": "turn:t", "P2P_TURN_SECRET": "s"} if option.name.startswith("turn") else {})}
    flags = [option.flag] if option.default is False else [option.flag, text]
    assert getattr(parse(*flags, **roomy), option.name) == getattr(parse(**{**roomy, option.variable: text}), option.name) == value


def test_on_windows_the_server_has_no_more_connections_than_its_select_takes(monkeypatch):
    """512 sockets (https://docs.python.org/3/library/asyncio-platforms.html): MAX_REFUSALS connections more than these are told so."""
    monkeypatch.setattr(os, "name", "nt")
    [most] = [option.default for option in runpy.run_path(str(SERVER))["OPTIONS"] if option.name == "max_connections"]
    assert most + p2pserver.MAX_REFUSALS <= 500


def test_the_defaults_are_those_of_the_contract():
    settings = parse()
    assert (settings.host, settings.port, settings.game_ttl, settings.guest_ttl, settings.poll_after) == ("", 8000, 60, 60, 2)
    assert (settings.max_games, settings.max_guests, settings.max_body, settings.cors_origin) == (10000, 64, 16384, "*")
    assert (settings.log_level, settings.access_log, settings.no_stun) == ("info", False, False)


@pytest.mark.parametrize("flags, environment, port", rows({
    "the table": ([], {}, 8000),
    "PORT": ([], {"PORT": "1"}, 1),
    "P2P_PORT before PORT": ([], {"PORT": "1", "P2P_PORT": "2"}, 2),
    "PORT, as P2P_PORT is Kubernetes'": ([], {"PORT": "1", "P2P_PORT": "tcp://10.0.0.1:8000"}, 1),
    "the table, as P2P_PORT is Kubernetes'": ([], {"P2P_PORT": "tcp://10.0.0.1:8000"}, 8000),
    "the flag before both": (["--port=3"], {"PORT": "1", "P2P_PORT": "2"}, 3),
    "a flag of zero, which is not none": (["--port", "0"], {"P2P_PORT": "2"}, 0),
}))
def test_the_port_is_taken_from(flags, environment, port):
    assert parse(*flags, **environment).port == port


KUBERNETES = {"P2P_PORT": "tcp://10.0.0.1:8000", "P2P_PORT_8000_TCP": "tcp://10.0.0.1:8000", "P2P_PORT_8000_TCP_ADDR": "10.0.0.1",
              "P2P_SERVICE_HOST": "10.0.0.1", "P2P_SERVICE_PORT": "8000"}


@pytest.mark.parametrize("environment, ignored", rows({
    "a slip of the keyboard": ({"P2P_GAME_TLL": "9", "P2P_GAME_TTL": "9"}, {"P2P_GAME_TLL": "P2P_GAME_TTL"}),
    "what is like no option": ({"P2P_X": "9"}, {"P2P_X": "P2P_"}),
    "Kubernetes' for a service named p2p": (KUBERNETES, {**dict.fromkeys(KUBERNETES, "Kubernetes"), "P2P_SERVICE_HOST": "P2P_", "P2P_SERVICE_PORT": "P2P_",
                                                         "P2P_PORT_8000_TCP_ADDR": "P2P_"}),
    "others' variables": ({"PORT": "1", "P2PSERVER": "1", "p2p_x": "1"}, {}),
}))
def test_a_variable_that_looks_like_an_options_and_is_none_is_ignored_with_advice(environment, ignored):
    found = p2pserver.ignored_variables(environment)
    assert found.keys() == ignored.keys() and all(words in found[name] for name, words in ignored.items())
    assert parse(**environment).port == int(environment.get("PORT", 8000))


@pytest.mark.parametrize("flags, environment, words", rows({
    "letters for a number": (["--port", "http"], {}, "argument --port: invalid int value: 'http'"),
    "a fraction for a whole number": (["--max-games", "1.5"], {}, "argument --max-games: invalid int value: '1.5'"),
    "too large": (["--port", "65536"], {}, "--port (P2P_PORT) must be from 0 to 65535, not 65536"),
    "too small": (["--game-ttl", "0"], {}, "--game-ttl (P2P_GAME_TTL) must be from 1 to 86400, not 0"),
    "not a number": (["--game-ttl", "nan"], {}, "--game-ttl (P2P_GAME_TTL) must be from 1 to 86400, not nan"),
    "infinite": (["--poll-after", "inf"], {}, "--poll-after (P2P_POLL_AFTER) must be from 0.1 to 3600, not inf"),
    "large bounds, which are told exactly": (["--max-body", "1"], {}, "--max-body (P2P_MAX_BODY) must be from 1024 to 16777216"),
    "no such level": (["--log-level", "loud"], {}, "must match debug|info|warning|error (least level of what is logged), not 'loud'"),
    **{f"the origin {brief(origin)}": (["--cors-origin", f"https://a,{origin}"], {}, f"without a slash at the end, not 'https://a,{origin}'") for origin in (
        "https://b/", "https://b/game", "b", "b:8000", "//b", "https://", "https://b:", "https://b:x", "https://b:443", "http://b:80", "https://B", "HTTPS://b",
        "https://*.b", "*", "https://u@b", "https://b?x", "https://b#x", "https://b https://c", "")},
    "a line break in a header field": (["--cors-origin", "x\r\ny: z"], {}, "--cors-origin (P2P_CORS_ORIGIN) must match [ -~]* (origins whose"),
    "P2P_PORT": ([], {"P2P_PORT": "http"}, "argument --port: invalid int value: 'http'"),
    "PORT": ([], {"PORT": "70000"}, "--port (P2P_PORT) must be from 0 to 65535, not 70000"),
    "a switch's variable": ([], {"P2P_NO_STUN": "yes"}, "argument --no-stun: invalid int value: 'yes'"),
    "a switch that is neither on nor off": ([], {"P2P_NO_STUN": "2"}, "--no-stun (P2P_NO_STUN) must be from 0 to 1, not 2"),
    "a name for a proxy's address": (["--trusted-proxies", "10.0.0.1, proxy"], {}, "--trusted-proxies (P2P_TRUSTED_PROXIES) must match"),
    "half an address": (["--metrics-from", "10.0.1"], {}, "'10.0.1' does not appear to be an IPv4 or IPv6 network"),
    "a variable that there is no choice of": ([], {"P2P_LOG_FORMAT": "xml"}, "--log-format (P2P_LOG_FORMAT) must match text|json (lines"),
    "a key without its certificate": (["--tls-key", "key.pem"], {}, "--tls-key needs --tls-cert"),
    "a relay without its secret": (["--turn-url", "turn:turn.example.net"], {}, "--turn-url and --turn-secret (P2P_TURN_SECRET) need each other"),
    "a secret without its relay": ([], {"P2P_TURN_SECRET": "s"}, "--turn-url and --turn-secret (P2P_TURN_SECRET) need each other"),
    "a relay of another kind": (["--turn-url", "https://turn.example.net", "--turn-secret", "s"], {}, "as turn:turn.example.net:3478, with commas"),
    "a relay that is no end of a list": (["--turn-url", "turn:a,", "--turn-secret", "s"], {}, "--turn-url (P2P_TURN_URL) must match"),
    "an unknown flag": (["--portt", "1"], {}, "--portt"),
    "an abbreviated flag": (["--cors", "x"], {}, "--cors"),
    "a stray word": (["serve"], {}, "serve"),
    "poll_after and game_ttl": (["--game-ttl", "2"], {}, "--poll-after must be less than --game-ttl"),
    "poll_after and guest_ttl": (["--guest-ttl", "2"], {}, "--poll-after must be less than --game-ttl, --guest-ttl and --idle-timeout"),
    "poll_after and idle_timeout": (["--poll-after", "59", "--idle-timeout", "59"], {}, "--poll-after must be less than"),
}))
def test_a_bad_command_line_is_refused_in_one_line_that_names_the_fault(flags, environment, words, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(*flags, **environment)
    out, err = capsys.readouterr()
    assert (refused.value.code, out, err.count("\n")) == (2, "", 1) and words in err


def test_a_store_with_a_line_break_is_not_told_as_it_may_hold_a_password():
    assert parse("--store", "redis://:secret@host\n/0").store == "redis://:secret@host\n/0"


def test_help_names_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as shown:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert shown.value.code == 0
    assert all(option.flag in text and (option.default in ("", False) or f"(default: {option.default})" in text) for option in p2pserver.OPTIONS)


@pytest.mark.parametrize("values, words", rows({
    "an option that there is not": ({"max_gamez": 1}, "max_gamez"),
    "a value out of bounds": ({"max_games": 0}, "max-games"),
    "two that do not go together": ({"poll_after": 60}, "--poll-after must be less than --game-ttl"),
    "a text for a number": ({"port": "8000"}, "--port"),
    "a text for a flag": ({"no_stun": "false"}, "--no-stun"),
    "a fraction for a whole number": ({"max_guests": 2.5}, "--max-guests"),
}))
def test_settings_refuse(values, words):
    with pytest.raises(ValueError, match=words):
        Settings(**values)


# ---- fields (validation) --------------------------------------------------------------------------------------------

NAMES = ("a", "Snow 雪 🎲", "x" * 64, "e\u0301" * 64, "a b", "...", "Register", "polls", "%2F", "<name>", "a' 200 'b", '"\\n', "{} %s", "🧑‍🚀",
         "👩🏽\u200d🚀 👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈❤\ufe0f", "1\ufe0f\u20e3", "\ue000\U0010ffff")
# What is not drawn, or joins nothing: "castle" with any of these would pass for "castle".
UNSEEN = ("castle\u200b", "cas\u00adtle", "\u202egnp.exe", "x\u2066y", "a\ufeffb", "\U000e0041",
          "a\u200db", "a\u200d🚀", "🚀\u200d", "a\u200cb", "a\ufe0f", "a\ufe00", "1\ufe0f",
          "\u3164", "a\u115f", "a\u1160", "\u2800", "a\uffa0", "a\u034fb", "a\u180e", "a\U000e0100")
NOT_STRINGS = (None, True, 1, 1.5, [], {}, ["x"])
LOOPBACK = ("127.0.0.1:5000", "127.9.9.9:5000", "[::1]:5000", "[::ffff:127.0.0.1]:5000", "[0:0:0:0:0:0:0:1]:5000", "[::1%lo]:5000")
LARGEST = {"k": "x" * (1024 - len('{"k":""}'))}
FIELDS = {      # by name: the check, what passes, what does not
    "name": (p2pserver.check_name, NAMES, (
        "", "x" * 65, "x" * 300, "e\u0301" * 65, "a/b", "/", ".", "..", "register", "poll", "start", "leave",
        " a", "a ", "\u00a0a", "a\u3000", "a\nb", "a\0", "\x1b[2J",
        "\x7f", "a\u0085b", "a\u2028b", "a\u2029b", "\ud800", "a\udfff", *UNSEEN, *NOT_STRINGS)),
    "peerId": (p2pserver.check_peer_id, ("x", "x" * 128, "two words", " ", "é雪🎲", "\"'\\"), (
        "", "x" * 129, "a\nb", "\0", "\x7f", "\u202e", "\ud800", *NOT_STRINGS)),
    "addresses": (p2pserver.check_addresses, (
        [], ["203.0.113.1:1"], ["[2001:db8::1]:65535"], ["[fe80::1%eth0]:5000"], ["192.168.0.1:5000"], ["x"] * 16, ["x" * 512],
        ["localhost:80", "", "é\n", "255.255.255.255"], ["candidate:1 1 udp 2122 192.0.2.1 5000 typ host"], [{}, {"sdp": [{"type": "offer"}, 1, None]}], {}), (
        ["x"] * 17, *NOT_STRINGS[:4], {"1": "x"}, "x:1")),
    "replies": (p2pserver.check_replies, ({}, {"s": []}, {"s": {}}, {"s": ["203.0.113.1:1", {}], "t": ["x"]}), (
        None, [], "x", {"s": "203.0.113.1:1"}, {"s": ["0.0.0.0:1"]}, {"s": ["x"] * 17}, {"s": ["127.0.0.1:1"]}, {"s": None}, {"s": [], "t": [1]})),
    "dismiss": (p2pserver.check_dismiss, ([], {}, ["s"], ["s"] * 64), (None, "s", {"s": []}, [1], [None], ["s"] * 65)),
    "info": (p2pserver.check_info, ({}, LARGEST, {"players": 1, "map": "é", "x": nested(15, 0)}), (
        None, [], "x", 1, {"k": LARGEST["k"] + "x"}, {"k": LARGEST["k"][:-1] + "é"}, {"k": "雪" * 400}, {"x": nested(16, 0)})),
    "listed": (p2pserver.check_flag, (True, False), (0, 1, "true", None, [], {})),
    "after": (p2pserver.check_whole_number, (0, 1, 2 ** 53 - 1, 25.0, -0.0, 1.7956255424844e+15), (
        -1, 2 ** 53, True, 1.5, -1.0, float(2 ** 53), 1e300, "1", None, [], 10 ** 200)),
}


def fields(which):
    return [pytest.param(row[0], value, id=f"{field}-{brief(value)}") for field, row in FIELDS.items() for value in row[which]]


@pytest.mark.parametrize("check, value", fields(1))
def test_validation_lets_through(check, value):
    check(value, Scope())


@pytest.mark.parametrize("check, value", fields(2))
def test_validation_refuses(check, value):
    with pytest.raises(ValueError, match="must"):
        check(value, Scope())


def test_an_empty_object_for_addresses_is_handed_on_as_an_empty_array():
    assert p2pserver.check_addresses({}, Scope()) == b"[]" and p2pserver.check_replies({"s": {}}, Scope()) == {"s": b"[]"}


@pytest.mark.parametrize("address, words", [
    *((text, "unspecified, multicast or broadcast") for text in (
        "0.0.0.0:5000", "[::]:5000", "[::ffff:0.0.0.0]:5000", "224.0.0.1:5000", "239.1.2.3:5000", "[ff02::1]:5000", "[::ffff:224.0.0.1]:5000",
        "255.255.255.255:5000", "[::ffff:255.255.255.255]:5000")),
    *((text, "port from 1 to 65535") for text in ("203.0.113.1:0", "[2001:db8::1]:0", "203.0.113.1:65536", "203.0.113.1:000", "203.0.113.1:" + "9" * 400)),
    *((text, "loopback") for text in LOOPBACK),
    *((text, "must be an IP address") for text in ("256.0.0.1:5000", "[1::2::3]:5000", "[1:2:3]:5000", "999.1.1.1:1")),
    *((value, "a string of at most 512 characters, or an object, which may be larger") for value in (None, 5000, True, ["203.0.113.1", 5000])),
    ("x" * 513, "at most 512 characters"),
    ({"x": nested(16, 0)}, "16 levels"),
], ids=brief)
def test_an_address_must_not_be(address, words):
    with pytest.raises(ValueError, match=r"^\[1\] .*" + words):     # its place in the list
        p2pserver.check_addresses(["x", address], Scope(is_local=False))


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_client_on_the_servers_machine_may_give_a_loopback_address(address):
    assert json.loads(p2pserver.check_addresses([address], Scope(is_local=True))) == [address]


def test_every_fault_of_a_body_is_named_at_once():
    with pytest.raises(Problem) as refused:
        p2pserver.validate({"name": "", "addresses": [1, "x", "1.2.3.4:0"], "after": "x", "more": 1}, {
            **p2pserver.OWNER, "addresses": p2pserver.MEETING["addresses"], "info": p2pserver.SHOWN["info"], "after": p2pserver.MEETING["after"]}, Scope())
    assert set(refused.value.errors) == {"name", "addresses", "peerId", "after"} and all(field in refused.value.detail for field in refused.value.errors)
    assert re.fullmatch(r"\[0\] must be .*; \[2\] must have .*", refused.value.errors["addresses"])
    assert refused.value.errors["peerId"].startswith("is missing: it must be") and refused.value.errors["name"].startswith("must be")


def test_of_a_name_that_is_far_too_long_only_the_beginning_is_normalised():
    """To normalise it all takes a time that grows with its square, where each character is a mark on the one before."""
    class Name(str):
        def __getitem__(self, part):
            parts.append(part)
            return super().__getitem__(part)

    parts = []
    with pytest.raises(ValueError):
        p2pserver.check_name(Name("\u0315\u0300" * 4000), Scope(True, 64))
    assert parts == [slice(None, 257)]


# ---- registry -------------------------------------------------------------------------------------------------------

# To a registry the digest of a peerId is just some bytes.
BY_HOST, BY_GUEST, BY_OTHER = b"digest of the host", b"digest of the guest", b"digest of somebody else"


def polled(registry, name="g", by=BY_HOST, addresses=b'["here"]', after=None, replies=None):
    """Guests, cursor, and who is gone."""
    news = registry.poll_game(name, by, addresses, after, replies)
    return Polled(news.peers, news.cursor, news.gone)


def started(registry, name="g", by=BY_GUEST, addresses=b'["there"]'):
    """The session, and the cursor of the host's addresses."""
    news = registry.start_game(name, by, addresses)
    return news.peers[0], news.cursor


def listed(registry):
    return json.loads(registry.list_games()[1])["games"]


def view(name="g", info=None, guests=0, ready=False):
    """What anybody may know of a game."""
    return {"name": name, "info": info or {}, "guests": guests, "ready": ready}


def games_and_guests(registry):
    counts = registry.counts()
    return counts["games"], counts["guests"]


def test_registering_again_keeps_all_that_is_not_given_and_changes_what_is(registry):
    registry.register_game("g", BY_HOST, info=b'{"map":"ice"}', listed=False)
    polled(registry)
    before = started(registry)
    registry.register_game("g", BY_HOST)
    assert listed(registry) == [] and json.loads(registry.get_game("g")) == view("g", {"map": "ice"}, 1, True) and started(registry) == before
    registry.register_game("g", BY_HOST, info=b"{}", listed=True)
    assert listed(registry) == [view("g", {}, 1, True)]


def test_a_full_registry_takes_no_new_game_but_keeps_serving_the_old(registry, clock):
    for i in range(5):
        registry.register_game(f"g{i}", BY_HOST)
    with pytest.raises(Full):
        registry.register_game("one more", BY_HOST)
    assert registry.register_game("g0", BY_HOST) is False
    clock.tick(60)
    assert registry.register_game("one more", BY_HOST) is True


def test_each_poll_gives_all_guests_in_the_order_they_came(registry):
    registry.register_game("g", BY_HOST)
    sessions = [started(registry, by=peer, addresses=b"[%s]" % peer)[0]._replace(addresses=b"[%s]" % peer) for peer in (b"1", b"2")]
    assert polled(registry).guests == polled(registry).guests == sessions


def test_a_poll_after_a_cursor_gives_only_those_that_came_or_moved_since(registry):
    registry.register_game("g", BY_HOST)
    started(registry, by=b"1")
    cursor = polled(registry).cursor
    started(registry, by=b"1")     # it is still there, nothing more
    assert polled(registry, after=cursor) == ([], cursor, [])
    came, _ = started(registry, by=b"2")
    assert polled(registry, after=cursor).guests == polled(registry, after=cursor).guests == [came._replace(addresses=b'["there"]')]
    cursor = polled(registry).cursor
    moved, _ = started(registry, by=b"1", addresses=b'["elsewhere"]')
    assert polled(registry, after=cursor).guests == [moved._replace(addresses=b'["elsewhere"]')]


def test_the_cursor_grows_with_each_guest_and_never_shrinks(registry, clock):
    registry.register_game("g", BY_HOST)
    cursors = [polled(registry).cursor, *((started(registry, by=peer), polled(registry).cursor)[1] for peer in (b"1", b"2", b"3"))]
    assert cursors == sorted(set(cursors))
    clock.tick(59)
    polled(registry)
    clock.tick(1)
    assert games_and_guests(registry) == (1, 0) and polled(registry).cursor >= cursors[-1]


@pytest.mark.parametrize("first, kept", [(0, 10 ** 9), (10 ** 9, 7)], ids=["below", "above"])
def test_a_cursor_of_an_earlier_run_hides_no_guest_where_this_runs_are(first, kept, clock):
    registry = Registry(Settings(), clock, cursor=first)
    registry.register_game("g", BY_HOST)
    started(registry)
    assert len(polled(registry, after=kept).guests) == 1 and polled(registry).cursor > first


def test_a_cursor_of_an_earlier_game_of_the_same_name_hides_no_guest(registry):
    registry.register_game("g", BY_HOST)
    started(registry)
    cursor = polled(registry).cursor
    registry.delete_game("g", BY_HOST)
    registry.register_game("g", BY_HOST)
    started(registry)
    assert len(polled(registry, after=cursor).guests) == 1


def test_each_host_and_guest_pair_has_one_session_however_often_it_starts(registry):
    for game in "gh":
        registry.register_game(game, BY_HOST)
    sessions = [started(registry, game, peer)[0] for game in "gh" for peer in (b"1", b"2") * 2]
    assert len({session.session_id for session in sessions} | {session.session_key for session in sessions}) == 8
    assert games_and_guests(registry) == (2, 4) and len(polled(registry).guests) == 2


def test_a_guest_gets_the_hosts_addresses_and_a_cursor_that_grows_only_when_they_change(registry):
    registry.register_game("g", BY_HOST)
    seen = [started(registry)]
    for addresses in (b'["here"]', b'["here"]', b'["moved"]', NO_ADDRESSES):
        polled(registry, addresses=addresses)
        seen.append(started(registry))
    assert [session.addresses for session, _ in seen] == [NO_ADDRESSES, b'["here"]', b'["here"]', b'["moved"]', NO_ADDRESSES]
    cursors = [cursor for _, cursor in seen]
    assert cursors[0] < cursors[1] == cursors[2] < cursors[3] < cursors[4]


def test_a_full_game_takes_no_new_guest_but_keeps_serving_the_old(registry, clock):
    registry.register_game("g", BY_HOST)
    for peer in (b"1", b"2", b"3", b"1"):
        started(registry, by=peer)
    with pytest.raises(Full):
        started(registry, by=b"4")
    clock.tick(59)
    polled(registry)
    clock.tick(1)
    assert started(registry, by=b"4")


def test_a_reply_goes_to_one_guest_alone_and_stands_in_place_of_the_general_addresses(registry):
    registry.register_game("g", BY_HOST)
    session, _ = started(registry, by=b"1")
    started(registry, by=b"2")
    assert polled(registry, replies={session.session_id: b'["for you"]'}).gone == []
    polled(registry, addresses=b'["moved"]')
    assert [started(registry, by=peer)[0].addresses for peer in (b"1", b"2")] == [b'["for you"]', b'["moved"]']


def test_the_cursor_of_a_start_grows_with_a_new_reply_only(registry):
    registry.register_game("g", BY_HOST)
    seen = [started(registry)]
    for i, reply in enumerate((b'["a"]', b'["a"]', b'["b"]', NO_ADDRESSES)):
        polled(registry, replies={seen[0][0].session_id: reply}, addresses=b'["for all %d"]' % i)
        seen.append(started(registry))
    assert [session.addresses for session, _ in seen] == [NO_ADDRESSES, b'["a"]', b'["a"]', b'["b"]', NO_ADDRESSES]
    cursors = [cursor for _, cursor in seen]
    assert cursors[0] < cursors[1] == cursors[2] < cursors[3] < cursors[4]


def test_replies_to_sessions_that_are_gone_are_listed_and_the_others_delivered(registry, clock):
    registry.register_game("g", BY_HOST)
    late, _ = started(registry, by=b"1")
    clock.tick(30)
    polled(registry)
    session, _ = started(registry, by=b"2")
    clock.tick(30)
    assert polled(registry, replies={late.session_id: b'["x"]', session.session_id: b'["y"]', "never": NO_ADDRESSES}).gone == [late.session_id, "never"]
    assert started(registry, by=b"2")[0].addresses == b'["y"]'


def test_a_reply_does_not_reach_another_hosts_guest(registry):
    registry.register_game("g", BY_HOST)
    registry.register_game("h", BY_OTHER)
    before = started(registry)
    assert polled(registry, "h", BY_OTHER, replies={before[0].session_id: b'["evil"]'}).gone == [before[0].session_id]
    assert started(registry) == before


def test_a_second_offer_is_not_answered_by_the_reply_to_the_first(registry):
    registry.register_game("g", BY_HOST)
    session, _ = started(registry, addresses=b'["first"]')
    cursor = polled(registry, addresses=NO_ADDRESSES).cursor
    polled(registry, addresses=NO_ADDRESSES, after=cursor, replies={session.session_id: b'["to first"]'})
    assert started(registry, addresses=b'["first"]')[0].addresses == b'["to first"]'
    assert started(registry, addresses=b'["second"]')[0].addresses == NO_ADDRESSES

    late = polled(registry, addresses=NO_ADDRESSES, after=cursor, replies={session.session_id: b'["to first, late"]'})
    assert [guest.addresses for guest in late.guests] == [b'["second"]'] and late.gone == []
    assert started(registry, addresses=b'["second"]')[0].addresses == NO_ADDRESSES
    polled(registry, addresses=NO_ADDRESSES, after=late.cursor, replies={session.session_id: b'["to second"]'})
    assert started(registry, addresses=b'["second"]')[0].addresses == b'["to second"]'


def test_a_reply_in_a_poll_without_after_is_taken_as_it_is(registry):
    registry.register_game("g", BY_HOST)
    session, _ = started(registry)
    polled(registry, replies={session.session_id: b'["for you"]'})
    assert started(registry)[0].addresses == b'["for you"]'


def test_a_guest_that_leaves_makes_room_at_once_and_comes_back_with_a_new_session(registry):
    registry.register_game("g", BY_HOST)
    first = started(registry, by=b"1")[0]
    for peer in (b"2", b"3"):
        started(registry, by=peer)
    with pytest.raises(Full):
        started(registry, by=b"4")
    registry.leave_game("g", b"1")
    assert started(registry, by=b"4") and listed(registry) == [view(guests=3)]
    registry.leave_game("g", b"4")
    assert started(registry, by=b"1")[0].session_id != first.session_id


@pytest.mark.parametrize("name, by", [("h", BY_GUEST), ("g", BY_OTHER), ("g", BY_HOST)], ids=["no such game", "no guest of it", "its host"])
def test_who_is_no_guest_cannot_leave(registry, name, by):
    registry.register_game("g", BY_HOST)
    session = started(registry)
    with pytest.raises(NotFound):
        registry.leave_game(name, by)
    assert started(registry) == session


def test_a_poll_after_a_cursor_tells_which_sessions_left_expired_or_were_dismissed_since(registry, clock):
    registry.register_game("g", BY_HOST)
    late = started(registry, by=b"1")[0].session_id
    cursor = registry.poll_game("g", BY_HOST).cursor
    clock.tick(30)
    registry.poll_game("g", BY_HOST)
    gone, sent_away = [started(registry, by=peer)[0].session_id for peer in (b"2", b"3")]
    registry.leave_game("g", b"2")
    clock.tick(30)
    news = registry.poll_game("g", BY_HOST, after=cursor, dismiss=[sent_away, "never"])
    assert (news.left, news.peers) == ([gone, late, sent_away], [])
    assert registry.poll_game("g", BY_HOST, after=cursor).left == news.left, "an answer may have been lost"
    assert registry.poll_game("g", BY_HOST, after=news.cursor).left == [] and registry.poll_game("g", BY_HOST).left == []


def test_an_ended_session_is_told_until_the_host_shows_by_its_cursor_that_it_knows(registry):
    registry.register_game("g", BY_HOST)
    sessions = [started(registry, by=peer)[0].session_id for peer in (b"1", b"2")]
    cursor = registry.poll_game("g", BY_HOST).cursor
    registry.leave_game("g", b"1")
    lost = registry.poll_game("g", BY_HOST, after=cursor)
    registry.leave_game("g", b"2")
    assert registry.poll_game("g", BY_HOST, after=cursor).left == sessions and registry.poll_game("g", BY_HOST, after=lost.cursor).left == sessions[1:]


def test_a_registry_keeps_of_ended_sessions_what_the_host_does_not_know_yet_and_256_at_most(registry):
    registry.register_game("g", BY_HOST)
    cursor = registry.poll_game("g", BY_HOST).cursor
    sessions = []
    for _ in range(300):
        sessions.append(started(registry)[0].session_id)
        registry.leave_game("g", BY_GUEST)
    most = registry.counts()["stored_bytes"]
    assert registry.poll_game("g", BY_HOST, after=cursor).left == sessions[-256:]
    registry.poll_game("g", BY_HOST)
    started(registry)
    registry.leave_game("g", BY_GUEST)
    assert registry.counts()["stored_bytes"] < most - 40_000


def test_a_guest_that_was_dismissed_is_told_so_as_long_as_the_game_lasts(registry, clock):
    registry.register_game("g", BY_HOST)
    session, other = started(registry)[0], started(registry, by=BY_OTHER)
    registry.poll_game("g", BY_HOST, dismiss=[session.session_id])
    for _ in range(2):
        with pytest.raises(Forbidden, match="the host of the game 'g' has sent you away"):
            started(registry)
        registry.update_game("g", BY_HOST, info=b'{"a":1}')
    assert started(registry, by=BY_OTHER) == other
    registry.delete_game("g", BY_HOST)
    registry.register_game("g", BY_HOST)
    assert started(registry)


def test_a_game_remembers_the_last_256_guests_that_its_host_has_dismissed(registry):
    registry.register_game("g", BY_HOST)
    peers = [b"%d" % i for i in range(257)]
    for peer in peers:
        registry.poll_game("g", BY_HOST, dismiss=[started(registry, by=peer)[0].session_id])
    assert started(registry, by=peers[0])
    for peer in (peers[1], peers[256]):
        with pytest.raises(Forbidden):
            started(registry, by=peer)


def test_a_host_cannot_dismiss_the_guest_of_another_game(registry):
    registry.register_game("g", BY_HOST)
    registry.register_game("h", BY_OTHER)
    session = started(registry)
    registry.poll_game("h", BY_OTHER, dismiss=[session[0].session_id])
    assert started(registry) == session


def test_a_host_is_told_from_where_its_guest_called_last(registry):
    registry.register_game("g", BY_HOST)
    for address in ("192.0.2.1", "192.0.2.2", ""):
        registry.start_game("g", BY_GUEST, TWO, seen_at=address)
    assert [guest.seen_at for guest in registry.poll_game("g", BY_HOST).peers] == ["192.0.2.2"]


def test_a_guest_is_told_from_where_its_host_called_last_if_the_host_publishes_that_address(registry):
    registry.register_game("g", BY_HOST)
    told = []
    for address, published in (("192.0.2.1", b'["192.0.2.1:5000"]'), ("192.0.2.2", None), ("", b'["192.0.2.2:5000"]'), ("92.0.2.2", b'["192.0.2.2:5000"]')):
        registry.poll_game("g", BY_HOST, published, seen_at=address)
        told.append(registry.start_game("g", BY_GUEST, TWO).peers[0].seen_at)
    assert told == ["192.0.2.1", "", "192.0.2.2", ""]


def test_the_list_is_oldest_first_also_after_a_rename(registry):
    for game in ("b", "c", "a"):
        registry.register_game(game, BY_HOST)
    registry.update_game("b", BY_HOST, name="z")
    assert [game["name"] for game in listed(registry)] == ["z", "c", "a"]


def test_a_game_is_ready_while_its_host_has_addresses(registry):
    registry.register_game("g", BY_HOST)
    seen = [registry.get_game("g")]
    for addresses in (NO_ADDRESSES, b'["here"]', NO_ADDRESSES):
        polled(registry, addresses=addresses)
        seen.append(registry.get_game("g"))
    assert [json.loads(game)["ready"] for game in seen] == [False, False, True, False]


def test_a_game_is_ready_also_when_its_host_serves_each_guest_by_replies(registry):
    registry.register_game("g", BY_HOST)
    seen = []
    for addresses, replies in ((NO_ADDRESSES, None), (NO_ADDRESSES, {}), (NO_ADDRESSES, None), (b'["here"]', None), (NO_ADDRESSES, None)):
        polled(registry, addresses=addresses, replies=replies)
        seen.append(listed(registry)[0]["ready"])
    assert seen == [False, True, True, True, False]


def test_a_rename_keeps_guests_addresses_and_sessions_and_frees_the_old_name(registry):
    registry.register_game("g", BY_HOST, info=b'{"map":"ice"}')
    polled(registry)
    before = started(registry)
    assert json.loads(registry.update_game("g", BY_HOST, name="h")) == view("h", {"map": "ice"}, 1, True)
    assert started(registry, "h") == before and len(polled(registry, "h").guests) == 1
    assert registry.register_game("g", BY_OTHER) is True


def test_a_rename_to_a_taken_name_changes_nothing(registry):
    registry.register_game("g", BY_HOST)
    registry.register_game("h", BY_HOST)
    before = registry.list_games()
    with pytest.raises(Conflict):
        registry.update_game("g", BY_HOST, name="h", info=b'{"map":"ice"}', listed=False)
    assert registry.list_games() == before


@pytest.mark.parametrize("call", rows({
    "poll": (polled,),
    "start": (started,),
    "get": (lambda registry: registry.get_game("g"),),
    "update": (lambda registry: registry.update_game("g", BY_HOST, name="h"),),
    "delete": (lambda registry: registry.delete_game("g", BY_HOST),),
}))
def test_a_game_that_is_not_there_or_no_more_is_not_found_by(call, registry, clock):
    with pytest.raises(NotFound):
        call(registry)
    registry.register_game("g", BY_HOST)
    clock.tick(60)
    with pytest.raises(NotFound):
        call(registry)


@pytest.mark.parametrize("call, lives", rows({
    "register": (lambda registry: registry.register_game("g", BY_HOST), 1),
    "poll": (polled, 1),
    "start": (started, 0),
    "update": (lambda registry: registry.update_game("g", BY_HOST, info=b"{}"), 0),
    "get and list": (lambda registry: (registry.get_game("g"), registry.list_games()), 0),
    "register by another": (lambda registry: pytest.raises(Conflict, registry.register_game, "g", BY_OTHER), 0),
    "poll by another": (lambda registry: pytest.raises(Forbidden, polled, registry, by=BY_OTHER), 0),
}))
def test_which_calls_keep_a_game_alive(call, lives, registry, clock):
    registry.register_game("g", BY_HOST)
    clock.tick(59)
    call(registry)
    clock.tick(1)
    assert registry.counts()["games"] == lives
    clock.tick(58)
    assert registry.counts()["games"] == lives
    clock.tick(1)
    assert games_and_guests(registry) == (0, 0)


def test_a_guest_lives_by_its_own_starts_and_comes_back_with_a_new_session(registry, clock):
    registry.register_game("g", BY_HOST)
    old, _ = started(registry)
    cursor = polled(registry).cursor
    for _ in range(3):
        clock.tick(30)
        started(registry, by=b"2")
        polled(registry)
    assert [guest.session_id == old.session_id for guest in polled(registry).guests] == [False] and games_and_guests(registry) == (1, 1)
    new, _ = started(registry)
    assert new.session_id != old.session_id and new.session_id in [guest.session_id for guest in polled(registry, after=cursor).guests]


def test_what_is_overdue_is_gone_also_where_older_ones_live_on(registry, clock):
    for game in "gh":
        registry.register_game(game, BY_HOST)
        started(registry, by=game.encode())
    clock.tick(59)
    polled(registry)
    started(registry, by=b"g")
    clock.tick(1)
    assert games_and_guests(registry) == (1, 1)


def test_each_lease_is_the_settings(make_registry, clock):
    registry = make_registry(game_ttl=10, guest_ttl=5)
    registry.register_game("g", BY_HOST)
    started(registry)
    assert [(clock.tick(5), games_and_guests(registry))[1] for _ in range(2)] == [(1, 0), (0, 0)]


def test_a_deleted_game_is_gone_with_its_guests(registry):
    registry.register_game("g", BY_HOST)
    started(registry)
    registry.delete_game("g", BY_HOST)
    assert games_and_guests(registry) == (0, 0) and listed(registry) == []


def test_expiry_compares_no_more_times_however_many_games_there_are(clock):
    compared = []

    class Time(float):
        def __add__(self, other):
            return Time(float(self) + other)

    for how in ("__gt__", "__ge__", "__lt__", "__le__"):
        setattr(Time, how, lambda self, other, how=how: compared.append(how) or getattr(float, how)(self, other))
    clock.now = Time(clock.now)
    registry = Registry(Settings(max_games_per_client=500), clock)
    for i in range(500):
        registry.register_game(f"g{i}", BY_HOST)
        started(registry, f"g{i}")
    compared.clear()
    polled(registry, "g250")
    assert 0 < len(compared) <= 4


def test_what_happens_to_games_is_one_event_each(registry, clock):
    registry.register_game("g", BY_HOST)
    registry.register_game("g", BY_HOST)
    for addresses in (NO_ADDRESSES, b'["here"]', b'["here"]', b'["moved"]'):
        polled(registry, addresses=addresses)
        started(registry, addresses=addresses)
    registry.update_game("g", BY_HOST, name="h")
    registry.update_game("h", BY_HOST, name="h", info=b'{"map":"ice"}')
    registry.delete_game("h", BY_HOST)
    registry.register_game("i", BY_HOST)
    clock.tick(60)
    registry.expire_games()
    assert [f"{operation} {name}" for operation, name, *_ in registry.events] == [
        "register_game g", "start_game g", "poll_game g", "update_game g", "delete_game h", "register_game i", "expire_game i"]


class Unequalled(bytes):
    """A digest that must not be compared byte by byte, for that takes longer the more of them are right."""

    __hash__ = bytes.__hash__

    def __eq__(self, other):
        raise AssertionError("compared in a time that tells where the first difference is")

    __ne__ = __eq__


def test_owners_are_compared_in_a_time_that_does_not_depend_on_the_secret(registry):
    owner, stranger = Unequalled(registry.peer_digest(HOST)), Unequalled(registry.peer_digest(OTHER))
    registry.register_game("castle", owner)
    assert registry.register_game("castle", Unequalled(registry.peer_digest(HOST))) is False
    for error, call in ((Conflict, lambda: registry.register_game("castle", stranger)),
                        (Forbidden, lambda: registry.poll_game("castle", stranger)),
                        (Forbidden, lambda: registry.update_game("castle", stranger, name="fortress")),
                        (Forbidden, lambda: registry.delete_game("castle", stranger)),
                        (Conflict, lambda: registry.start_game("castle", Unequalled(registry.peer_digest(HOST)), NO_ADDRESSES))):
        with pytest.raises(error):
            call()


def test_a_registry_keeps_no_peer_id_nor_what_another_would_keep_for_it(clock):
    kept = []
    for _ in range(2):
        registry = Registry(Settings(), clock)
        registry.register_game("g", registry.peer_digest(HOST), b"kept")
        started(registry, by=registry.peer_digest(GUEST), addresses=b"kept, too")
        assert registry.peer_digest(HOST) == registry.peer_digest(HOST) != registry.peer_digest(GUEST)
        kept.append({thing if isinstance(thing, bytes) else thing.encode() for thing in reachable(registry) if isinstance(thing, (str, bytes))})
    assert b"kept" in kept[0] and b"kept, too" in kept[0] and not [text for text in kept[0] if HOST.encode() in text or GUEST.encode() in text]
    assert not [text for text in kept[0] & kept[1] if not text.isascii()], "no digest is the same in both"


def test_ids_are_128_random_bits():
    ids = {p2pserver.new_session_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(re.fullmatch("[0-9a-f]{32}", text) for text in ids)


def test_no_guest_is_lost_or_double_when_31_threads_start_and_one_polls_by_cursor(hasty_threads):
    registry = Registry(Settings(max_guests_per_client=31))
    registry.register_game("g", BY_HOST)
    seen, cursors = {}, [0]

    def work(i):
        if i:
            return {started(registry, by=b"guest %d" % i, addresses=b"[%d]" % move)[0].session_id for move in range(5)}
        deadline = time.monotonic() + WAIT
        while len(seen) < 31 or set(seen.values()) != {b"[4]"}:
            assert time.monotonic() < deadline
            answer = polled(registry, after=cursors[-1])
            seen.update((guest.session_id, guest.addresses) for guest in answer.guests)
            cursors.append(answer.cursor)
        return set(seen)

    met, *given = in_threads(32, work)
    assert all(len(ids) == 1 for ids in given) and set().union(*given) == met and cursors == sorted(cursors)


def test_each_name_has_one_owner_and_limits_hold_when_32_threads_press_against_them(hasty_threads):
    registry = Registry(Settings(max_games=4, max_guests=7))
    registry.register_game("g", BY_HOST)

    def work(i):
        won = 0
        for n in range(5):
            with contextlib.suppress(Conflict, Full):
                won += registry.register_game(f"g{n}", b"host %d" % i)
        with contextlib.suppress(Full):
            started(registry, by=b"guest %d" % i)
        return won

    assert sum(in_threads(32, work)) == 3 and games_and_guests(registry) == (4, 7)


# ---- registry: who waits --------------------------------------------------------------------------------------------

ONE, TWO = b'["203.0.113.1:5000"]', b'["203.0.113.2:6000"]'


class Wake:
    """What a registry calls when there may be news for one who waits."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1


@pytest.fixture
def wakes():
    return [Wake() for _ in range(3)]


@pytest.fixture
def waiting(registry, wakes):
    """A registry in which the hosts of two games wait for guests."""
    for name, wake in zip(("castle", "island"), wakes):
        registry.register_game(name, BY_HOST)
        assert registry.poll_game(name, BY_HOST, ONE, wake=wake).waiter
    return registry


def poll_again(registry, waiter):
    """What a poll that waits is answered once it has been woken."""
    registry.forget_waiter(waiter)
    return registry.poll_game(waiter.name, waiter.digest, None, waiter.after)


def start_again(registry, waiter):
    registry.forget_waiter(waiter)
    return registry.start_game(waiter.name, waiter.digest)


def test_a_start_wakes_the_host_of_its_game_and_nobody_else(waiting, wakes):
    waiting.start_game("castle", BY_GUEST, TWO)
    assert [wake.calls for wake in wakes] == [1, 0, 0]


def test_a_poll_that_is_asked_again_gives_the_guest_that_came(registry, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    session = registry.start_game("castle", BY_GUEST, TWO).peers[0]
    assert poll_again(registry, waiter).peers == [session._replace(addresses=TWO)]


def test_a_poll_with_news_does_not_wait(waiting, wakes):
    waiting.start_game("castle", BY_GUEST, TWO)
    news = waiting.poll_game("castle", BY_HOST, ONE, wake=wakes[2])
    assert news.waiter is None and len(news.peers) == 1
    assert waiting.poll_game("castle", BY_HOST, ONE, after=news.cursor, wake=wakes[2]).waiter


def test_the_same_start_again_wakes_nobody_and_a_moved_guest_does(waiting, wakes):
    waiting.start_game("castle", BY_GUEST, TWO)
    cursor = waiting.poll_game("castle", BY_HOST, ONE).cursor
    waiting.poll_game("castle", BY_HOST, ONE, after=cursor, wake=wakes[2])
    waiting.start_game("castle", BY_GUEST, TWO)
    assert wakes[2].calls == 0
    waiting.start_game("castle", BY_GUEST, ONE)
    assert wakes[2].calls == 1


def test_a_second_poll_of_a_host_replaces_the_first(waiting, wakes):
    first = waiting.poll_game("castle", BY_HOST, ONE, wake=wakes[2]).waiter
    assert first and [wake.calls for wake in wakes] == [1, 0, 0]
    waiting.poll_game("castle", BY_HOST, ONE)
    assert first.is_busy and [wake.calls for wake in wakes] == [1, 0, 1]


def test_a_poll_of_somebody_else_wakes_nobody(waiting, wakes):
    with pytest.raises(Forbidden):
        waiting.poll_game("castle", BY_OTHER, ONE, wake=wakes[2])
    assert [wake.calls for wake in wakes] == [0, 0, 0]


def test_the_end_of_a_game_wakes_its_host_and_its_guest_who_then_learn_of_it(registry, wakes):
    registry.register_game("castle", BY_HOST)
    guest = registry.start_game("castle", BY_GUEST, TWO, wake=wakes[1]).waiter
    host = registry.poll_game("castle", BY_HOST, NO_ADDRESSES, registry.poll_game("castle", BY_HOST).cursor, wake=wakes[0]).waiter
    registry.delete_game("castle", BY_HOST)
    assert [wake.calls for wake in wakes] == [1, 1, 0]
    with pytest.raises(NotFound):
        poll_again(registry, host)
    registry.register_game("castle", BY_HOST)
    with pytest.raises(NotFound):
        start_again(registry, guest)        # another game of the same name is not the one that was started


def test_a_rename_wakes_the_host_who_then_learns_the_new_name(registry, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    registry.update_game("castle", BY_HOST, name="fortress")
    assert wakes[0].calls == 1 and poll_again(registry, waiter).name == "fortress"


def test_a_host_whose_poll_waits_is_alive_and_one_that_hung_up_is_not(registry, clock, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    clock.tick(1000)
    assert registry.get_game("castle")
    registry.forget_waiter(waiter)
    clock.tick(61)
    with pytest.raises(NotFound):
        registry.get_game("castle")
    assert wakes[0].calls == 0


def test_a_start_waits_until_the_host_has_addresses(registry, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.start_game("castle", BY_GUEST, TWO, wake=wakes[0]).waiter
    registry.poll_game("castle", BY_HOST, NO_ADDRESSES)
    assert wakes[0].calls == 0
    registry.poll_game("castle", BY_HOST, ONE)
    assert wakes[0].calls == 1 and start_again(registry, waiter).peers[0].addresses == ONE


def test_a_start_that_gets_addresses_does_not_wait(waiting, wakes):
    assert waiting.start_game("castle", BY_GUEST, TWO, wake=wakes[2]).waiter is None


def test_a_reply_wakes_the_guest_it_is_for_and_no_other(registry, wakes):
    registry.register_game("castle", BY_HOST)
    sessions = [registry.start_game("castle", peer, TWO, wake=wake).peers[0] for peer, wake in ((BY_GUEST, wakes[0]), (BY_OTHER, wakes[1]))]
    registry.poll_game("castle", BY_HOST, NO_ADDRESSES, replies={sessions[1].session_id: ONE})
    assert [wake.calls for wake in wakes] == [0, 1, 0]


def test_a_start_after_a_cursor_waits_for_what_is_newer(registry, wakes):
    registry.register_game("castle", BY_HOST)
    registry.poll_game("castle", BY_HOST, ONE)
    known = registry.start_game("castle", BY_GUEST, TWO)
    first = registry.start_game("castle", BY_GUEST, TWO, after=known.cursor, wake=wakes[0]).waiter
    registry.start_game("castle", BY_OTHER, TWO)
    second = registry.start_game("castle", BY_OTHER, TWO, after=known.cursor, wake=wakes[1]).waiter
    assert (first.after, second.after) == (known.cursor, known.cursor)
    registry.poll_game("castle", BY_HOST, ONE, replies={known.peers[0].session_id: TWO})
    assert [wake.calls for wake in wakes] == [1, 0, 0]
    news = registry.start_game(first.name, first.digest, after=first.after)
    assert news.peers[0].addresses == TWO and news.cursor > known.cursor
    assert registry.start_game("castle", BY_GUEST, TWO, after=2 ** 50, wake=wakes[2]).waiter is None, "a cursor of another run hides nothing"


def test_a_guest_whose_session_is_new_learns_of_it_at_once_also_with_the_cursor_of_the_one_before(registry, clock, wakes):
    """Which it has left, or which has expired. Until then it could not talk to the host, who knows the new session already."""
    registry.register_game("castle", BY_HOST)
    registry.poll_game("castle", BY_HOST, ONE)
    known = registry.start_game("castle", BY_GUEST, TWO)
    for end in (lambda: registry.leave_game("castle", BY_GUEST), lambda: clock.tick(59) or registry.poll_game("castle", BY_HOST) and clock.tick(2)):
        end()
        again = registry.start_game("castle", BY_GUEST, TWO, after=known.cursor, wake=wakes[0])
        assert again.waiter is None and again.peers[0].addresses == ONE and again.peers[0].session_id != known.peers[0].session_id


def test_the_end_of_a_session_wakes_its_host(registry, clock, wakes):
    registry.register_game("castle", BY_HOST)
    for wake, end in zip(wakes, (lambda: registry.leave_game("castle", BY_GUEST), lambda: clock.tick(61))):
        session = registry.start_game("castle", BY_GUEST, TWO).peers[0].session_id
        waiter = registry.poll_game("castle", BY_HOST, ONE, after=registry.poll_game("castle", BY_HOST).cursor, wake=wake).waiter
        end()
        registry.expire_games()
        assert wake.calls == 1 and poll_again(registry, waiter).left == [session]
        assert registry.poll_game("castle", BY_HOST, ONE, after=waiter.after, wake=wake).waiter is None


def test_a_guest_whose_start_waits_is_told_at_once_that_it_is_dismissed(registry, wakes):
    registry.register_game("castle", BY_HOST)
    news = registry.start_game("castle", BY_GUEST, TWO, wake=wakes[0])
    registry.poll_game("castle", BY_HOST, NO_ADDRESSES, dismiss=[news.peers[0].session_id])
    assert wakes[0].calls == 1
    with pytest.raises(Forbidden):
        start_again(registry, news.waiter)


@pytest.mark.parametrize("more, is_busy", [({}, True), ({"replies": {"x": ONE}}, False), ({"addresses": TWO}, False), ({"dismiss": ["x"]}, False)])
def test_a_poll_that_replaces_another_to_say_something_is_no_overload(registry, wakes, more, is_busy):
    registry.register_game("castle", BY_HOST)
    first = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    assert registry.poll_game("castle", BY_HOST, wake=wakes[1], **{"addresses": ONE, **more}).waiter or "replies" in more
    assert (first.is_over, first.is_busy) == (True, is_busy)


@pytest.mark.parametrize("addresses, is_busy", [(TWO, True), (ONE, False)], ids=["the same", "others"])
def test_a_start_that_replaces_another_to_send_addresses_is_no_overload(registry, wakes, addresses, is_busy):
    registry.register_game("castle", BY_HOST)
    first = registry.start_game("castle", BY_GUEST, TWO, wake=wakes[0]).waiter
    assert registry.start_game("castle", BY_GUEST, addresses, wake=wakes[1]).waiter
    assert (first.is_over, first.is_busy) == (True, is_busy)


@pytest.mark.parametrize("end", rows({
    "end": (lambda registry: registry.delete_game("castle", BY_HOST),), "rename": (lambda registry: registry.update_game("castle", BY_HOST, name="fortress"),),
}))
def test_a_start_that_waits_is_woken_by_its_games(registry, wakes, end):
    registry.register_game("castle", BY_HOST)
    registry.start_game("castle", BY_GUEST, TWO, wake=wakes[0])
    end(registry)
    assert wakes[0].calls == 1


def test_a_guest_of_a_game_that_expired_is_told_so(registry, clock, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.start_game("castle", BY_GUEST, TWO, wake=wakes[0]).waiter
    clock.tick(61)
    registry.expire_games()
    assert wakes[0].calls == 1
    with pytest.raises(NotFound):
        start_again(registry, waiter)


def test_there_are_at_most_max_waiting_waiters_and_each_end_makes_room(make_registry, wakes):
    registry = make_registry(max_waiting=1)
    for name in ("castle", "island"):
        registry.register_game(name, BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    assert registry.poll_game("island", BY_HOST, ONE, wake=wakes[1]).waiter is None
    registry.forget_waiter(waiter)
    registry.forget_waiter(waiter)      # once is enough
    waiter = registry.poll_game("island", BY_HOST, ONE, wake=wakes[1]).waiter
    assert waiter and registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter is None
    poll_again(registry, waiter)
    assert registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    registry.delete_game("castle", BY_HOST)
    assert registry.poll_game("island", BY_HOST, ONE, wake=wakes[1]).waiter


@pytest.mark.parametrize("begin, again", [
    (lambda registry, wake: registry.poll_game("castle", BY_HOST, ONE, wake=wake), poll_again),
    (lambda registry, wake: registry.start_game("castle", BY_GUEST, TWO, wake=wake), start_again),
], ids=["poll", "start"])
def test_one_that_was_replaced_does_not_replace_in_turn_when_it_is_asked_again(registry, wakes, begin, again):
    registry.register_game("castle", BY_HOST)
    first = begin(registry, wakes[0]).waiter
    assert begin(registry, wakes[1]).waiter and first.is_busy
    again(registry, first)
    assert [wake.calls for wake in wakes] == [1, 0, 0] and registry.counts()["waiting"] == 1


@pytest.mark.parametrize("ends", [lambda registry, waiter: None, lambda registry, waiter: registry.update_game("castle", BY_HOST, name="castle"),
                                  lambda registry, waiter: registry.start_game("castle", BY_GUEST, TWO)], ids=["at the deadline", "asked", "woken"])
def test_a_poll_may_wait_for_longer_than_the_ttl_of_its_game(registry, clock, wakes, ends):
    registry.register_game("castle", BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    clock.tick(60)
    ends(registry, waiter)
    assert poll_again(registry, waiter).name == "castle"
    clock.tick(59)
    assert registry.get_game("castle")
    clock.tick(1)
    assert registry.counts()["games"] == 0


@pytest.mark.parametrize("change", [
    lambda registry: registry.register_game("island", BY_HOST),
    lambda registry: registry.register_game("castle", BY_HOST, info=b'{"a":1}'),
    lambda registry: registry.start_game("castle", BY_GUEST, TWO),
    lambda registry: registry.poll_game("castle", BY_HOST, ONE),
    lambda registry: registry.update_game("castle", BY_HOST, name="fortress"),
    lambda registry: registry.update_game("castle", BY_HOST, info=b'{"a":1}'),
    lambda registry: registry.update_game("castle", BY_HOST, listed=False),
    lambda registry: registry.delete_game("castle", BY_HOST),
], ids=["register", "register again", "start", "first addresses", "rename", "info", "unlist", "delete"])
def test_the_version_of_the_list_grows_with(registry, change):
    registry.register_game("castle", BY_HOST)
    (version, before), _ = registry.list_games(), change(registry)
    assert registry.list_games()[0] > version and registry.list_games()[1] != before


@pytest.mark.parametrize("what", ["game", "guest"])
def test_the_version_of_the_list_grows_when_it_expires_a(registry, clock, what):
    registry.register_game("castle", BY_HOST)
    registry.start_game("castle", BY_GUEST, TWO)
    clock.tick(50)
    if what == "guest":
        registry.poll_game("castle", BY_HOST, NO_ADDRESSES)
    version, _ = registry.list_games()
    clock.tick(11)
    assert registry.list_games()[0] > version


def test_the_version_of_the_list_stays_with_polls_and_starts_that_change_nothing(registry):
    registry.register_game("castle", BY_HOST)
    registry.poll_game("castle", BY_HOST, ONE)
    registry.start_game("castle", BY_GUEST, TWO)
    before = registry.list_games()
    registry.poll_game("castle", BY_HOST, ONE)
    registry.poll_game("castle", BY_HOST, TWO)
    registry.start_game("castle", BY_GUEST, TWO)
    registry.register_game("castle", BY_HOST)
    assert registry.list_games() == before


def test_the_version_of_the_list_stays_when_a_game_ends_that_is_not_listed(registry):
    registry.register_game("castle", BY_HOST)
    registry.register_game("island", BY_HOST, listed=False)
    before = registry.list_games()
    registry.delete_game("island", BY_HOST)
    assert registry.list_games() == before


# ---- registry: in a store -------------------------------------------------------------------------------------------

def outcome(registry, operation, *args, **values):
    """What a call gives, without what is random, or another version in each registry: those become their ranks later."""
    try:
        result = getattr(registry, operation)(*args, **values)
    except Problem as problem:
        return type(problem).__name__, problem.detail, problem.limit
    return result


class Twin:
    """A registry, and what in it stands for sessions and cursors that its twin calls otherwise."""

    def __init__(self, registry):
        self.registry, self.sessions, self.cursors, self.ids = registry, [], {}, iter(range(10 ** 9))
        self.waiters, self.woken = {}, []

    def do(self, operation, game, number, wakes=False, after=None, sessions=(), replied=None, **values):
        """A call in terms of numbers: of cursors and sessions that earlier calls gave."""
        if after is not None:
            values["after"] = self.cursors.get((game, after), 0)
        if replied is not None:
            values["replies"] = {self.sessions[i % len(self.sessions)]: text for i, text in replied.items()} if self.sessions else {}
        if sessions:
            values["dismiss"] = [self.sessions[i % len(self.sessions)] for i in sessions] if self.sessions else []
        if wakes:
            values["wake"] = functools.partial(self.woken.append, number)
        news = outcome(self.registry, operation, game, **values)
        if not isinstance(news, p2pserver.News):
            return news if operation != "list_games" else news[1]
        for session in news.peers:
            if session.session_id not in self.sessions:
                self.sessions.append(session.session_id)
        self.cursors[game, number] = news.cursor
        if news.waiter:
            self.waiters[number] = news.waiter
        known = {cursor: i for i, cursor in enumerate(sorted({cursor for (name, _), cursor in self.cursors.items() if name == game}))}
        return (news.name, [(self.sessions.index(peer.session_id), peer.addresses, peer.seen_at) for peer in news.peers], bool(news.waiter),
                sorted(map(self.sessions.index, news.left)), list(map(self.sessions.index, news.gone)), news.cursor == 0 or known[news.cursor])

    def ask_again(self, number):
        """What a poll or start that waits is answered when it is asked again."""
        waiter = self.waiters.pop(number)
        self.registry.forget_waiter(waiter)
        host = waiter.digest.startswith(b"host")
        call = self.registry.poll_game if host else self.registry.start_game
        try:
            news = call(waiter.name, waiter.digest, None, waiter.after)
        except Problem as problem:
            return type(problem).__name__
        return waiter.is_over, waiter.is_busy, news.name, len(news.peers), len(news.left), [peer.addresses for peer in news.peers]


ADDRESSES = [NO_ADDRESSES, ONE, TWO, b'["\xc3\xbc 1", {"candidate":"x"}]']


def at_random(chance, number):
    """An operation with its arguments."""
    game, host, guest = f"g\u00fc {chance.randrange(6)}", b"host %d" % chance.randrange(3), b"guest %d" % chance.randrange(6)
    after, wakes = chance.choice([None, number - 1, number - 3, number - 9]), chance.random() < 0.5
    info, listed = chance.choice([None, b"{}", b'{"map":"ice/\xc3\xbc"}']), chance.choice([None, None, True, False])
    client = b"client %d" % chance.randrange(4)
    return chance.choice([
        ("register_game", game, {"digest": host, "client": client, "info": info, "listed": listed}),
        ("poll_game", game, {"digest": host, "addresses": chance.choice([*ADDRESSES, b'["192.0.2.1:5000"]']), "after": after, "wakes": wakes,
                             "seen_at": chance.choice(["", "192.0.2.1", "192.0.2.2"])}),
        ("poll_game", game, {"digest": host, "addresses": chance.choice(ADDRESSES), "after": after, "wakes": wakes,
                             "replied": {chance.randrange(40): chance.choice(ADDRESSES) for _ in range(chance.randrange(4))}}),
        ("poll_game", game, {"digest": host, "addresses": ONE, "after": after, "sessions": [chance.randrange(40)]}),
        *[("start_game", game, {"digest": guest, "addresses": chance.choice(ADDRESSES), "after": after, "wakes": wakes, "client": client,
                                "seen_at": chance.choice(["", "192.0.2.1"])})] * 3,
        ("leave_game", game, {"digest": guest}),
        ("get_game", game, {}),
        ("update_game", game, {"digest": host, "name": chance.choice([None, f"g\u00fc {chance.randrange(6)}"]), "info": info, "listed": listed}),
        ("delete_game", game, {"digest": host}) if chance.random() < 0.3 else ("get_game", game, {}),
    ])


@pytest.mark.parametrize("seed", range(10))
def test_operations_at_random_have_the_same_outcomes_in_memory_and_in_a_store(seed, store, clock):
    store.redis.flushall()
    limits = {"max_games": 5, "max_guests": 4, "max_games_per_client": 3, "max_guests_per_client": 2, "store": store.url}
    with contextlib.closing(redis_registry.RedisRegistry(Settings(**limits), clock)) as stored:
        compare(clock, random.Random(seed), [Twin(Registry(Settings(**limits), clock)), Twin(Direct(stored))])
    assert {key.decode().rpartition("}:")[2].partition(":")[0] for key in store.redis.scan_iter()} <= {"cursor", "secret", "list", "stored", "wake"}


def test_a_request_under_a_condition_has_the_outcome_of_both_operations_where_the_registry_answers_later(store):
    store.redis.flushall()
    with serving(store=store.url) as api, contextlib.closing(api.server.registry):
        assert api.call("PATCH", "/games/castle", {"peerId": HOST}, headers={"If-Match": "*"}).status_code == 404
        assert api.call("POST", "/games/register", {"name": "castle", "peerId": HOST}).status_code == 201
        tag = api.call("GET", "/games").headers["ETag"]
        assert [api.call("GET", "/games", headers={name: tag}).status_code for name in ("If-None-Match", "If-Match")] == [304, 200]
        assert api.call("PATCH", "/games/castle", {"peerId": HOST, "info": {"map": 1}}, headers={"If-Match": '"no"'}).status_code == 412
        assert api.call("PATCH", "/games/castle", {"peerId": HOST, "info": {"map": 2}}, headers={"If-Match": "*"}).json()["info"] == {"map": 2}
        assert api.call("DELETE", "/games/castle", {"peerId": HOST}, headers={"If-Match": "*"}).status_code == 204


def test_a_request_asks_only_once_to_be_woken_however_long_the_store_takes(store):
    with serving(store=store.url) as api, contextlib.closing(api.server.registry), Raw(api) as raw:
        store.redis.client_pause(400)
        raw.send(LIST + END)
        counts = []
        while not select.select([raw.socket], [], [], 0.02)[0]:
            counts.append(len([each for each in gc.get_objects() if isinstance(each, functools.partial) and each.func == api.server.wake]))
        assert raw.answer().status == 200 and len(counts) > 3 and max(counts) == 1


def test_a_connection_that_waits_keeps_no_answer_of_the_store(store):
    store.redis.flushall()
    with serving(store=store.url) as api, contextlib.closing(api.server.registry):
        api.register_game("castle")
        with Raw(api, poll("castle", WAIT_20)) as raw:
            wait_until(lambda: [each for each in api.server.connections if each.waiter])
            assert [each.registry is api.server.registry for each in api.server.connections if each.waiter] == [True]
            api.start_game("castle")
            assert raw.answer().status == 200


def compare(clock, chance, twins):
    """Do 600 operations with both, and at the end have all expire."""
    for number in range(600):
        clock.tick(chance.choice([0, 0, 0.5, 1, 5, 20]))
        operation, game, values = at_random(chance, number)
        first, second = [twin.do(operation, game, number, **values) for twin in twins]
        assert first == second, (number, operation, game, values)
        assert sorted(twins[0].woken) == sorted(twins[1].woken), (number, operation, game, values)
        for woken in sorted(set(twins[0].woken) & set(twins[0].waiters)):
            assert twins[0].ask_again(woken) == twins[1].ask_again(woken), number
        first, second = [(listed(twin.registry), {**twin.registry.counts(), "stored_bytes": 0}, sorted(twin.registry.events)) for twin in twins]
        assert first == second, (number, operation, game, values)
    clock.tick(2000)
    for twin in twins:
        for waiter in twin.waiters.values():
            twin.registry.forget_waiter(waiter)
    clock.tick(2000)
    assert [set(twin.registry.counts().values()) for twin in twins] == [{0}, {0}]


# ---- clients and rate limiter ---------------------------------------------------------------------------------------

def key_of(address):
    return p2pserver.client_of(address).key


def test_a_client_has_its_burst_at_once_and_then_its_rate(clock):
    limiter = p2pserver.RateLimiter(4.0, 50, clock)
    counts = [[clock.tick(seconds) or limiter.acquire(b"me") for seconds in [pause] + [0] * 99].count(0) for pause in (0, 0.125, 0.125, 1, 2, 1000)]
    assert counts == [50, 0, 1, 4, 8, 50]


def test_a_client_without_a_token_is_told_when_there_is_one(clock):
    limiter = p2pserver.RateLimiter(4.0, 10, clock)
    assert [limiter.acquire(b"me") for _ in range(10)] == [0] * 10
    pause = limiter.acquire(b"me")
    clock.tick(pause - 0.01)
    assert 0 < pause <= 0.25 and limiter.acquire(b"me") == limiter.pause(b"me") == pytest.approx(0.01)
    clock.tick(0.01)
    assert limiter.pause(b"me") == limiter.acquire(b"me") == 0 < limiter.pause(b"me"), "to look costs nothing"


def test_a_charge_takes_more_tokens_than_there_are(clock):
    limiter = p2pserver.RateLimiter(1.0, 10, clock)
    limiter.charge(b"me", 19)
    assert limiter.acquire(b"me") == pytest.approx(10) and limiter.acquire(b"you") == 0


def test_no_charge_is_lost_when_8_threads_take_tokens():
    """To look at the clock gives the others a turn."""
    limiter = p2pserver.RateLimiter(1.0, 10, lambda: time.sleep(0.001) or 0.0)
    in_threads(8, lambda i: [limiter.charge(b"me", 1) for _ in range(10)])
    assert limiter.pause(b"me") == pytest.approx(8 * 10 - 10 + 1)


def test_a_rate_of_zero_limits_nobody(clock):
    limiter = p2pserver.RateLimiter(0, 50, clock)
    limiter.charge(b"me", 1000)
    assert not any(limiter.acquire(b"me") for _ in range(1000))


@pytest.mark.parametrize("flooder, neighbours, are_one", rows({
    "IPv4 addresses": ("203.0.113.1", "203.0.113.{}", False),
    "IPv4-mapped addresses": ("::ffff:203.0.113.1", "::ffff:203.0.113.{}", False),
    "/56s": ("2001:db8::1", "2001:db8:0:{}00::1", False),
    "/64s of one /56": ("2001:db8::1", "2001:db8:0:f{}::1", True),
    "an IPv4 address and its IPv4-mapped one": ("203.0.113.1", "::ffff:203.0.113.1", True),
}))
def test_whether_one_client_are(flooder, neighbours, are_one, clock):
    """One of eight neighbours with a bucket of its own will do: two clients may share one by chance."""
    limiter = p2pserver.RateLimiter(5.0, 50, clock)
    while not limiter.acquire(key_of(flooder)):
        pass
    assert all(limiter.acquire(key_of(neighbours.format(i))) for i in range(2, 10)) is are_one


def test_200_000_forged_sources_take_no_memory(clock):
    limiter = p2pserver.RateLimiter(5.0, 50, clock)
    before = sum(map(sys.getsizeof, reachable(limiter)))
    for i in range(200_000):
        limiter.acquire(i.to_bytes(4, "big"))
    assert sum(map(sys.getsizeof, reachable(limiter))) < before + 10_000


def test_which_clients_share_a_bucket_is_known_to_one_process_alone():
    """Or a stranger could choose an address that uses up somebody else's. Python keys its hash of bytes anew for each process, unless PYTHONHASHSEED
    in the environment takes that away."""
    code = "import p2pserver; limiter = p2pserver.RateLimiter(1, 1); [limiter.charge(bytes([10, 0, 0, i]), 1) for i in range(20)]; " \
           "print([i for i, full_at in enumerate(limiter._full_at) if full_at])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    first, second = (subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True).stdout for _ in range(2))
    assert first.count(b",") > 10 and first != second


# ---- STUN -----------------------------------------------------------------------------------------------------------

COOKIE, TRANSACTION, SOURCE = 0x2112A442, b"transaction!", ("203.0.113.7", 40000)
MAPPED = 0x0020
# RFC 5769: a request with SOFTWARE, PRIORITY, ICE-CONTROLLED, USERNAME, MESSAGE-INTEGRITY and FINGERPRINT (2.1), and its answers (2.2, 2.3).
RFC5769_1 = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932ff9b151263b36"
    "000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf")
RFC5769_2 = bytes.fromhex("0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
                          "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96")
RFC5769_3 = bytes.fromhex("010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
                          "00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c")


def attribute(kind, value=b"", length=None):
    return struct.pack(">HH", kind, len(value) if length is None else length) + value + bytes(-len(value) % 4)


def stun(*attributes, kind=1, cookie=COOKIE, length=None):
    body = b"".join(attributes)
    return struct.pack(">HHI", kind, len(body) if length is None else length, cookie) + TRANSACTION + body


def taken_apart(answer, cookie=COOKIE):
    """The kind and the attributes of an answer, as a list of (kind, value); its head is checked."""
    kind, *head = struct.unpack_from(">HHI", answer)
    assert head == [len(answer) - 20, cookie] and len(answer) % 4 == 0
    attributes, rest = [], answer[20:]
    while rest:
        each, length = struct.unpack_from(">HH", rest)
        attributes.append((each, rest[4:4 + length]))
        rest = rest[4 + length + -length % 4:]
    return kind, attributes


def mapped(answer):
    """The (address, port) that a success gives."""
    kind, attributes = taken_apart(answer)
    assert kind == 0x0101 and attributes[0][0] == MAPPED
    family, port = struct.unpack_from(">xBH", attributes[0][1])
    packed = bytes(a ^ b for a, b in zip(attributes[0][1][4:], answer[4:20]))
    return socket.inet_ntop({1: socket.AF_INET, 2: socket.AF_INET6}[family], packed), port ^ COOKIE >> 16


REQUEST = stun()
SILENT = {
    "nothing": b"",
    "nineteen bytes": REQUEST[:19],
    "CHANGE-REQUEST without the cookie": stun(attribute(0x0003, b"\0\0\0\6"), cookie=0),
    "an attribute that nobody knows without the cookie": stun(attribute(0x7FFF), cookie=0x2112A443),
    "a length that is too small": stun(attribute(0x8022, b"test"), length=4),
    "a length that is too large": stun(length=4),
    "a length that ends within a word": stun(length=2) + b"\0\0",
    "an attribute that overruns": stun(attribute(0x8022, b"test", length=5)),
    "an attribute that overruns by far": stun(attribute(0x8022, b"test", length=0xFFFF)),
    "a last attribute without its value": stun(attribute(0x8022, length=4)),
    "more than 1280 bytes": stun(attribute(0x8022, bytes(1260))),
    "more than 16 attributes": stun(*[attribute(0x8022)] * 17),
    "an Allocate request": stun(kind=0x0003),
    "a Shared Secret request": stun(kind=0x0002),
    "a Binding indication": stun(kind=0x0011),
    "a Binding success": stun(kind=0x0101),
    "a Binding error": stun(kind=0x0111),
    "one of the first two bits set": stun(kind=0x4001),
    "RFC 5769 2.2": RFC5769_2,
    "RFC 5769 2.3": RFC5769_3,
    "a request of HTTP": GET + END,
    "a query of DNS": bytes.fromhex("000101000001000000000000") + b"\7example\3org\0\0\1\0\1",
}


@pytest.mark.parametrize("datagram", SILENT.values(), ids=SILENT)
def test_stun_is_silent_to(datagram):
    assert p2pserver.stun_answer(datagram, SOURCE) is None


@pytest.mark.parametrize("datagram", [REQUEST, RFC5769_1, stun(attribute(0x8022, bytes(1256))), stun(*[attribute(0x8022)] * 16), stun(b"\x80\x22\0\1Axyz")],
                         ids=["a bare request", "RFC 5769 2.1", "1280 bytes", "16 attributes", "padding of other than zeros"])
def test_stun_answers(datagram):
    answer = p2pserver.stun_answer(datagram, SOURCE)
    assert mapped(answer) == SOURCE and answer[4:20] == datagram[4:20]


@pytest.mark.parametrize("source, value", rows({
    "IPv4": (("203.0.113.7", 40000), "0001 9c40 cb007107"),
    "IPv6": (("2001:db8::1", 40000, 0, 0), "0002 9c40 20010db8000000000000000000000001"),
    "IPv4-mapped IPv6": (("::ffff:203.0.113.7", 40000, 0, 0), "0001 9c40 cb007107"),
}))
@pytest.mark.parametrize("more", [[], [attribute(0x8022, b"nice")], [attribute(0x0006, b"user"), attribute(0x0024, b"1234")], [attribute(0x0008, bytes(20))]],
                         ids=["alone", "SOFTWARE", "USERNAME and PRIORITY", "MESSAGE-INTEGRITY"])
@pytest.mark.parametrize("cookie", [0, 0x2112A443, 0x42A41221])
def test_stun_answers_a_request_without_the_cookie_with_mapped_address_and_its_16_bytes_of_transaction(cookie, more, source, value):
    """RFC 8489 section 11."""
    request = stun(*more, cookie=cookie)
    answer = p2pserver.stun_answer(request, source)
    assert taken_apart(answer, cookie) == (0x0101, [(0x0001, bytes.fromhex(value))]) and answer[4:20] == request[4:20]


@pytest.mark.parametrize("integrity", [attribute(0x0008, bytes(20)), attribute(0x001C, bytes(32))], ids=["MESSAGE-INTEGRITY", "MESSAGE-INTEGRITY-SHA256"])
def test_an_unknown_attribute_is_ignored_after_and_not_before(integrity):
    """RFC 8489 sections 14.5 and 14.6."""
    assert mapped(p2pserver.stun_answer(stun(integrity, attribute(0x7FFF)), SOURCE)) == SOURCE
    assert taken_apart(p2pserver.stun_answer(stun(attribute(0x7FFE), integrity, attribute(0x7FFF)), SOURCE))[1][1] == (0x000A, b"\x7f\xfe")
    assert p2pserver.stun_answer(stun(attribute(0x7FFE), integrity, cookie=0), SOURCE) is None


@pytest.mark.parametrize("request_", [stun(attribute(0x8022, b"client")), RFC5769_1], ids=["SOFTWARE", "FINGERPRINT"])
def test_an_answer_of_stun_has_the_address_and_nothing_else(request_):
    """RFC 8489 section 12: a server for STUN alone has no use for FINGERPRINT."""
    assert [kind for kind, _ in taken_apart(p2pserver.stun_answer(request_, SOURCE))[1]] == [MAPPED]


@pytest.mark.parametrize("answer, source", [(RFC5769_2, "192.0.2.1"), (RFC5769_3, "2001:db8:1234:5678:11:2233:4455:6677")], ids=["2.2", "2.3"])
def test_stun_maps_an_address_as_rfc_5769_does(answer, source):
    assert dict(taken_apart(p2pserver.stun_answer(RFC5769_1, (source, 32853)))[1])[MAPPED] == dict(taken_apart(answer)[1])[MAPPED]


@pytest.mark.parametrize("source, address", rows({
    "IPv4": (("198.51.100.1", 1), ("198.51.100.1", 1)),
    "IPv6": (("2001:db8::1", 65535, 0, 0), ("2001:db8::1", 65535)),
    "IPv4-mapped IPv6": (("::ffff:198.51.100.1", 5000, 0, 0), ("198.51.100.1", 5000)),
    "IPv6 with an interface": (("fe80::1%lo", 5000, 0, 1), ("fe80::1", 5000)),
}))
def test_stun_tells_a_source_its_address(source, address):
    assert mapped(p2pserver.stun_answer(REQUEST, source)) == address


@pytest.mark.parametrize("attributes, unknown", rows({
    "an attribute that nobody knows": ([attribute(0x7FFF)], [0x7FFF]),
    "several, in their order": ([attribute(0x0031, b"12345"), attribute(0x8022, b"x"), attribute(0x0030)], [0x0031, 0x0030]),
    "one among ICE's": ([attribute(0x0006, b"user"), attribute(0x7000), attribute(0x0024, b"1234")], [0x7000]),
    "CHANGE-REQUEST": ([attribute(0x0003, b"\0\0\0\6")], [0x0003]),
    "RESPONSE-ADDRESS": ([attribute(0x0002, b"\0\1\x13\x88\xcb\0\x71\x09")], [0x0002]),
    "NONCE and REALM": ([attribute(0x0015, b"nonce"), attribute(0x0014, b"realm")], [0x0015, 0x0014]),
}))
def test_stun_answers_420_and_no_address_to(attributes, unknown):
    kind, answered = taken_apart(p2pserver.stun_answer(stun(*attributes), SOURCE))
    assert kind == 0x0111 and [each for each, _ in answered] == [0x0009, 0x000A]
    assert answered[0][1][:4] == b"\0\0\4\x14" and answered[1][1] == struct.pack(f">{len(unknown)}H", *unknown)


@pytest.mark.parametrize("source", [("203.0.113.1", 4000), ("2001:db8::1", 4000)], ids=["IPv4", "IPv6"])
def test_an_answer_of_stun_is_at_most_32_bytes_longer_than_its_request(source):
    """So a forged source is not flooded with more than its forger sends himself."""
    requests = [stun(*[attribute(0x7000)] * count) for count in range(17)]
    assert max(len(p2pserver.stun_answer(request, source)) - len(request) for request in requests) == 32


def test_what_a_forged_source_gets_of_stun_is_as_the_threat_model_says():
    """Bytes of UDP, and with the 28 of the heads of IPv4 and UDP; the most for each byte that the forger sends."""
    requests = [stun(cookie=0), *[stun(*[attribute(0x7000)] * count) for count in range(17)]]
    sizes = [(len(p2pserver.stun_answer(request, (source, 1))), len(request)) for request in requests for source in ("203.0.113.1", "2001:db8::1")]
    most, rate, burst = max(sizes)[0], Settings().stun_rate, p2pserver.STUN_BURST
    said = (f"{most} bytes at the most; one address gets {burst} at once and then `--stun-rate` {rate:g} a second, of each of the two ports",
            f"{2 * most * burst // 1000} KB at once and then {2 * most * rate / 1000:.1f} KB a second, "
            f"{2 * (most + 28) * burst // 1000} KB and {2 * (most + 28) * rate / 1000:.1f} KB with the heads",
            f"at most {max(answer / request for answer, request in sizes):.1f}, with these heads "
            f"{max((answer + 28) / (request + 28) for answer, request in sizes):.1f},")
    threats = (ROOT / "docs" / "SECURITY.md").read_text()
    assert all(words in threats for words in said), said


@pytest.mark.parametrize("kind, value", rows({
    "USERNAME": (0x0006, b"a:b"), "MESSAGE-INTEGRITY": (0x0008, bytes(20)), "MESSAGE-INTEGRITY-SHA256": (0x001C, bytes(32)), "PRIORITY": (0x0024, b"1234"),
    "USE-CANDIDATE": (0x0025, b""), "FINGERPRINT": (0x8028, b"1234"),
    "ICE-CONTROLLED": (0x8029, bytes(8)), "ICE-CONTROLLING": (0x802A, bytes(8)), "one that may be ignored": (0xFFFF, b"x"),
}))
def test_stun_ignores(kind, value):
    assert mapped(p2pserver.stun_answer(stun(attribute(kind, value)), SOURCE)) == SOURCE


def test_a_request_cut_anywhere_is_not_answered():
    assert {p2pserver.stun_answer(RFC5769_1[:end], SOURCE) for end in range(len(RFC5769_1))} == {None}


def test_no_junk_makes_stun_fail():
    chance = random.Random(5389)
    for _ in range(5000):
        junk = bytearray(chance.choice((REQUEST, RFC5769_1, stun(attribute(0x8022, b"x")), bytes(40))) + bytes(chance.randrange(3) * 4))
        for _ in range(chance.randrange(4)):
            junk[chance.randrange(len(junk))] = chance.randrange(256)
        junk[2:4] = struct.pack(">H", len(junk) - 20)
        answer = p2pserver.stun_answer(bytes(junk), SOURCE)
        assert answer is None or taken_apart(answer, int.from_bytes(junk[4:8], "big"))[0] in (0x0101, 0x0111)


@contextlib.contextmanager
def udp(port, to="127.0.0.1", source=None):
    """A UDP socket with ask(datagram, ...): send them all, and return the first answer and the address that it came from."""
    with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT)
        sock.bind((source or ("::1" if ":" in to else "127.0.0.1"), 0))

        def ask(*datagrams):
            for datagram in datagrams:
                sock.sendto(datagram, (to, port))
            answer, address = sock.recvfrom(2048)
            return answer, address[:2]

        yield types.SimpleNamespace(ask=ask, socket=sock, address=sock.getsockname()[:2])


def require(address):
    """Skip the test where the machine does not have that address."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {address}: {error}")


@pytest.mark.parametrize("host, asked", [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("::1", "::1"), ("", "127.0.0.1"),
                                         ("", "127.0.0.2"), ("", "::1")], ids=lambda text: text or "all")
def test_the_stun_socket_on_one_host_answers_from_the_address_that_was_asked(host, asked, serve):
    require(asked)
    port = serve(host=host, no_stun=False).port
    with udp(port, asked) as client:
        answer, sender = client.ask(REQUEST)
        assert sender == (asked, port) and mapped(answer) == client.address


def test_the_stun_socket_is_silent_to_junk_and_serves_on(serve):
    with udp(serve(no_stun=False).port) as client:
        answer, _ = client.ask(*SILENT.values(), RFC5769_1)
        assert answer[8:20] == RFC5769_1[8:20]


def test_a_school_behind_one_address_gets_all_its_answers_by_default(clock):
    """120 players that ask every 15 s, all in the same moment, and with them, every minute, 120 newcomers with three requests each."""
    limiter = p2pserver.RateLimiter(Settings().stun_rate, p2pserver.STUN_BURST, clock)
    for moment in range(40):
        requests = 120 + (0 if moment % 4 else 360)
        assert [limiter.acquire(b"the school") for _ in range(requests)] == [0] * requests, moment
        clock.tick(15)


def test_newcomers_of_a_school_are_answered_by_the_stun_socket(serve):
    ports = serve(no_stun=False).server.stun_ports
    with contextlib.ExitStack() as stack:
        for player in [stack.enter_context(udp(port)) for port in ports for _ in range(120)]:
            assert [mapped(player.ask(REQUEST)[0]) for _ in range(3)] == [player.address] * 3
    assert len(ports) == 2


def test_a_flooding_source_gets_its_burst_from_the_stun_socket_and_others_are_served(serve, monkeypatch):
    require("127.0.0.3")
    monkeypatch.setattr(p2pserver, "STUN_BURST", 50)    # 500 answers are more than a socket keeps for who does not read them
    port = serve(no_stun=False, stun_rate=0.001).port
    with udp(port) as flooder, contextlib.ExitStack() as stack:
        flooder.ask(*[REQUEST] * 100)
        others = [stack.enter_context(udp(port, source=f"127.0.0.{i}")).socket for i in range(3, 7)]
        for other in others:
            other.sendto(REQUEST, ("127.0.0.1", port))
        assert select.select(others, [], [], WAIT)[0]   # by then the flood has been dealt with
        flooder.socket.setblocking(False)
        answers = [flooder.socket.recv(2048) for _ in range(49)]    # beside the one that ask took
        assert all(mapped(answer) == flooder.address for answer in answers)
        with pytest.raises(BlockingIOError):
            flooder.socket.recv(2048)


# ---- endpoints: the REST contract, row by row -----------------------------------------------------------------------

def test_register_answers_201_with_location_and_200_to_the_owner_again(api, name):
    first, again = api.register_game(name), api.register_game(name)
    assert (first.status_code, first.headers["Location"], again.status_code) == (201, path_of(name), 200)
    assert first.json() == again.json() == {"name": name, "stun": [], "expiresIn": 60, "pollAfter": 2}


@pytest.mark.parametrize("name", ["a b", "Blåbær 雪 🎲", "%41?#&+=;:@", "<name>", "'\"\\", "...", "a..b", "~-_."], ids=brief)
def test_location_leads_to_the_game_also_with_the_name(name, serve):
    api = serve()
    location = api.register_game(name).headers["Location"]
    assert re.fullmatch(r"/games/([A-Za-z0-9_.~-]|%[0-9A-F]{2})+", location) and urllib.parse.unquote(location[7:]) == name
    with Raw(api, f"GET {location} HTTP/1.0\r\n\r\n".encode()) as raw:
        assert json.loads(raw.answer().body)["name"] == name


def test_poll_answers_the_guests_and_their_sessions(api, name):
    api.register_game(name)
    guest, answer = api.start_game(name).json(), api.poll_game(name)
    body = answer.json()
    session = {"sessionId": guest["sessionId"], "sessionKey": guest["sessionKey"], "addresses": THERE, "from": "127.0.0.1"}
    assert answer.status_code == 200 and isinstance(body.pop("cursor"), int)
    assert body == {"name": name, "guests": [session], "left": [], "gone": [], "expiresIn": 60, "pollAfter": 2}


def test_poll_with_replies_says_which_sessions_are_gone(api, name):
    api.register_game(name)
    session = api.start_game(name).json()["sessionId"]
    body = api.poll_game(name, replies={session: ["for you"], "no such": []}).json()
    assert set(body) == {"name", "guests", "cursor", "left", "gone", "expiresIn", "pollAfter"} and body["gone"] == ["no such"]
    assert api.poll_game(name, replies={}).json()["gone"] == []


def test_start_answers_202_while_the_host_has_no_addresses_and_then_200(api, name):
    api.register_game(name)
    first = api.start_game(name)
    api.poll_game(name)
    then = api.start_game(name)
    before, after = first.json(), then.json()
    assert (first.status_code, before["addresses"], then.status_code, after["addresses"]) == (202, [], 200, HERE)
    assert set(before) == {"name", "sessionId", "sessionKey", "addresses", "cursor", "stun", "expiresIn", "pollAfter"} and after["cursor"] > before["cursor"]
    assert {**before, "addresses": HERE, "cursor": after["cursor"]} == after and (after["name"], after["expiresIn"], after["pollAfter"]) == (name, 60, 2)


def test_a_guest_leaves_and_its_host_learns_of_it(api, name):
    api.register_game(name)
    session = api.start_game(name).json()["sessionId"]
    cursor = api.poll_game(name).json()["cursor"]
    answer = api.call("POST", "/games/leave", {"name": name, "peerId": GUEST})
    assert (answer.status_code, answer.content) == (204, b"") and api.get_game(name).json()["guests"] == 0
    news = api.poll_game(name, after=cursor).json()
    assert (news["left"], news["guests"]) == ([session], []) and api.poll_game(name).json()["left"] == []
    assert api.poll_game(name, after=news["cursor"]).json()["left"] == []
    again = api.call("POST", "/games/leave", {"name": name, "peerId": GUEST})
    assert again.status_code == 404 and "no session" in again.json()["detail"]


def test_seventeen_join_from_one_address_in_a_minute_when_sixteen_have_left(api, name):
    api.register_game(name)
    for i in range(17):
        assert api.start_game(name, f"guest {i}").status_code == 202
        assert i == 16 or api.call("POST", "/games/leave", {"name": name, "peerId": f"guest {i}"}).status_code == 204


def test_a_guest_that_its_host_dismisses_gets_403_and_another_peer_id_does_not(api, name):
    api.register_game(name)
    session = api.start_game(name).json()["sessionId"]
    assert api.poll_game(name, dismiss=[session]).json()["guests"] == []
    refused = api.start_game(name)
    assert refused.status_code == 403 and "sent you away" in refused.json()["detail"] and api.start_game(name, OTHER).status_code == 200


def test_a_start_with_after_waits_for_a_further_candidate(serve):
    api = serve()
    api.register_game("castle")
    api.poll_game("castle")
    known = api.start_game("castle").json()
    with Raw(api, post(b"/games/start", {"name": "castle", "peerId": GUEST, "addresses": THERE, "after": known["cursor"], "wait": 20})) as raw:
        wait_until(lambda: waiters(api) == 1)
        api.poll_game("castle", replies={known["sessionId"]: ["one more"]})
        body = json.loads(raw.answer().body)
    assert body["addresses"] == ["one more"] and body["cursor"] > known["cursor"] and body["sessionId"] == known["sessionId"]


def test_a_start_with_after_that_finds_no_place_to_wait_is_asked_for_patience(serve):
    api = serve(max_waiting=0)
    api.register_game("castle")
    api.poll_game("castle")
    known = api.start_game("castle", wait=20).json()
    again = api.start_game("castle", after=known["cursor"], wait=20).json()
    assert (known["pollAfter"], again["pollAfter"], again["addresses"]) == (2, 10, HERE)


def test_a_start_that_finds_no_place_to_wait_after_its_reply_has_gone_is_told_so(serve):
    api = serve(max_waiting=0)
    api.register_game("g")
    api.poll_game("g")
    session = api.start_game("g").json()["sessionId"]
    api.poll_game("g", replies={session: ["for you"]})
    cursor = api.start_game("g").json()["cursor"]
    moved = api.start_game("g", addresses=[], after=cursor, wait=5)
    assert moved.json()["addresses"] == HERE and moved.json()["cursor"] < cursor
    assert moved.json()["pollAfter"] == 10 and "Preference-Applied" not in moved.headers


def test_a_poll_that_is_replaced_to_send_replies_may_be_followed_as_usual(serve):
    api = serve()
    api.register_game("castle")
    api.start_game("castle")
    body = api.poll_game("castle").json()
    with Raw(api, post(b"/games/poll", {"name": "castle", "peerId": HOST, "addresses": HERE, "after": body["cursor"], "wait": 20})) as raw:
        wait_until(lambda: waiters(api) == 1)
        api.poll_game("castle", after=body["cursor"], replies={body["guests"][0]["sessionId"]: ["for you"]})
        assert json.loads(raw.answer().body)["pollAfter"] == 2


def test_a_poll_answers_twelve_guests_with_audio_and_video_at_once(serve):
    api = serve()
    api.register_game("castle")
    sessions = [api.start_game("castle", f"guest {i}").json()["sessionId"] for i in range(12)]
    answer = [{"type": "answer", "sdp": "x" * 5000}]      # three of these are in 16 KB
    assert api.poll_game("castle", replies=dict.fromkeys(sessions, answer)).json()["gone"] == []
    assert api.start_game("castle", "guest 11").json()["addresses"] == answer


@pytest.mark.parametrize("target, size", [
    *((target, 65536) for target in ("/games/poll", "/games/poll/", "/games/poll?x", "http://castle.example/games/poll")),
    *((target, 16384) for target in ("/games/start", "/games/poll%20x", "/games/poll/x", "/games?/games/poll", "/games/poll^")),
])
def test_the_body_of_a_poll_however_its_target_is_written_may_be_four_times_as_large(target, size, serve):
    api = serve()
    for length, is_read in (size, True), (size + 1, False):
        with Raw(api, b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (target.encode(), length) + b" " * length) as raw:
            assert (raw.answer().status != 413) is is_read


def test_register_and_start_tell_on_which_ports_stun_is_answered(serve):
    api = serve(no_stun=False)
    ports = [stun.server_address[1] for stun in api.server.stuns]
    assert api.register_game("castle").json()["stun"] == ports == api.start_game("castle").json()["stun"]
    assert len(set(ports)) == 2 and ports[0] == api.server.server_port
    for port in ports:
        with udp(port) as client:
            assert mapped(client.ask(REQUEST)[0]) == client.address


def test_a_second_port_for_stun_that_is_taken_or_does_not_exist_leaves_the_first_and_a_warning(serve, caplog):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        api = serve(no_stun=False, second_stun_port=port)
    assert api.server.stun_ports == [api.server.server_port] and f"UDP port {port} cannot be used for STUN too" in caplog.text
    with udp(api.server.server_port) as client:
        assert mapped(client.ask(REQUEST)[0]) == client.address
    assert serve(no_stun=False, stun_port=65535).server.stun_ports == [65535]


def test_the_second_port_for_stun_is_the_next_one_by_default(serve):
    ports = []
    while len(ports) < 2:       # one of them may be taken
        with taken(socket.SOCK_DGRAM, ["{}"]) as (port,):
            pass
        with contextlib.suppress(p2pserver.CannotStart):
            ports = serve(no_stun=False, stun_port=int(port)).server.stun_ports
    assert ports == [int(port), int(port) + 1]


def test_the_second_port_for_stun_can_be_chosen(serve):
    with taken(socket.SOCK_DGRAM, ["{}"]) as (port,):
        pass
    api = serve(no_stun=False, second_stun_port=int(port))
    assert api.server.stun_ports == [api.server.server_port, int(port)] and f"and {port}" in api.server.where


TURN = {"turn_url": "turn:turn.example.net:3478,turns:turn.example.net:5349?transport=tcp", "turn_secret": "what the TURN server knows, too"}


def test_a_host_is_handed_credentials_for_the_relay_and_nobody_else_is(serve, lines):
    api = serve(**TURN, access_log=True)
    began = int(time.time())
    turn = api.register_game("castle").json().pop("turn")
    password = base64.b64encode(hmac.digest(TURN["turn_secret"].encode(), turn["username"].encode(), "sha1")).decode()
    assert turn == {"urls": TURN["turn_url"].split(","), "username": turn["username"], "credential": password, "ttl_seconds": 86400}
    assert re.fullmatch("[0-9]+:[0-9a-f]{8}", turn["username"]) and began <= int(turn["username"].partition(":")[0]) - 86400 <= time.time()
    assert api.register_game("castle").json()["turn"]["username"] != turn["username"]
    others = [api.register_game("castle", GUEST), api.start_game("castle"), api.poll_game("castle"), api.start_game("castle"), api.list_games(),
              api.update_game("castle", info={}), *(api.call("GET", path) for path in ("/", "/healthz", "/metrics", "/games/castle"))]
    wait_until(lambda: any("GET '/games/castle'" in line for line in lines))
    said = "\n".join([*(answer.text for answer in others), *lines])
    assert not [each for each in ("turn:", turn["username"], turn["credential"], TURN["turn_secret"]) if each in said]


@pytest.mark.parametrize("secret", ["a secret\nof two lines", "Geheimnis für zwei"])
def test_a_secret_of_the_relay_that_is_no_good_is_refused_without_being_shown(secret, capsys):
    with pytest.raises(SystemExit):
        parse("--turn-url", "turn:turn.example.net", P2P_TURN_SECRET=secret)
    err = capsys.readouterr().err
    assert "printable ASCII" in err and not [line for line in secret.splitlines() if line in err]


def test_a_cursor_survives_the_numbers_of_game_engines_for_a_hundred_years(serve):
    api = serve()
    api.register_game("castle")
    cursor = api.poll_game("castle").json()["cursor"]
    in_a_hundred_years = cursor + round(100 * 365.25 * 86400 * 10_000)
    assert time.time() - 60 < cursor / 10_000 < time.time() + 60, "more than an earlier run has given out"
    assert all(int(float(f"{number:.14g}")) == number for number in (cursor, in_a_hundred_years)), "Lua writes so"


def test_candidates_are_handed_on_as_they_came(api, name):
    candidates = [{"sdp": "v=0\r\n", "n": [1, 1.5, None, True, {"é": "雪"}]}, "", "any text: é", "198.51.100.1:00080", "127.0.0.1:5000", {}]
    api.register_game(name)
    api.poll_game(name, addresses=candidates)
    assert api.start_game(name, addresses=candidates[::-1]).json()["addresses"] == candidates
    assert api.poll_game(name, addresses=candidates).json()["guests"][0]["addresses"] == candidates[::-1]


def test_the_list_holds_listed_games_oldest_first(serve):
    api = serve()
    assert api.list_games().json() == {"games": []}
    api.register_game("b", info={"map": "ice", "password": True})
    api.register_game("a", OTHER)
    api.register_game("hidden", listed=False)
    api.poll_game("b")
    api.start_game("b")
    answer = api.list_games()
    assert (answer.status_code, answer.headers["Content-Type"], answer.headers["Cache-Control"]) == (200, "application/json", "no-cache")
    assert answer.json() == {"games": [{"name": "b", "info": {"map": "ice", "password": True}, "guests": 1, "ready": True},
                                       {"name": "a", "info": {}, "guests": 0, "ready": False}]}


def test_the_list_takes_no_notice_of_a_query_or_payload(api):
    answer = api.call("GET", "/games?limit=1&x", data=b"{not JSON", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()) == (200, api.list_games().json())


@pytest.mark.parametrize("listed", [True, False])
def test_a_game_is_found_and_started_by_name_where_listed_is(listed, api, name):
    api.register_game(name, info={"map": "ice"}, listed=listed)
    answer = api.get_game(name)
    assert (answer.status_code, answer.json()) == (200, {"name": name, "info": {"map": "ice"}, "guests": 0, "ready": False})
    assert api.start_game(name).ok and (name in api.list_games().text) is listed


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_host_describes_its_game_with(method, api, name):
    api.register_game(name, info={"map": "ice"})
    answer = api.update_game(name, HOST, method, info={"map": "fire"}, listed=False)
    assert (answer.status_code, answer.json()) == (200, {"name": name, "info": {"map": "fire"}, "guests": 0, "ready": False})
    assert "Location" not in answer.headers and name not in api.list_games().text
    assert api.update_game(name, HOST, method, listed=True).json()["info"] == {"map": "fire"} and name in api.list_games().text


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_host_renames_its_game_and_keeps_its_guests_with(method, api, name):
    api.register_game(name)
    guest = api.start_game(name).json()
    answer = api.update_game(name, HOST, method, name=name + " é")
    assert (answer.status_code, answer.headers["Location"], answer.json()["name"]) == (200, path_of(name + " é"), name + " é")
    assert api.get_game(name).status_code == 404 and api.poll_game(name + " é").json()["guests"][0]["sessionId"] == guest["sessionId"]


@pytest.mark.parametrize("delete", rows({
    "a body": (lambda api, name: api.delete_game(name, "schlüssel 雪"),),
    "a bearer": (lambda api, name: api.delete_by_header(name, "Bearer schlüssel 雪"),),
    "a bearer in lower case": (lambda api, name: api.delete_by_header(name, "bearer schlüssel 雪"),),
}))
def test_a_host_deletes_its_game_by(delete, api, name):
    api.register_game(name, "schlüssel 雪")
    answer = delete(api, name)
    assert (answer.status_code, answer.content) == (204, b"") and "Content-Type" not in answer.headers
    assert api.get_game(name).status_code == 404


def test_health_counts_games_and_guests(serve):
    api = serve()
    api.register_game("g")
    api.register_game("hidden", listed=False)
    api.start_game("g")
    answer = api.call("GET", "/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "version": p2pserver.__version__, "games": 2, "guests": 1})


def test_the_start_page_is_text_with_the_version_and_every_endpoint(api):
    answer = api.call("GET", "/")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8") and p2pserver.__version__ in answer.text
    assert all(re.search(rf"^{method} +{re.escape(path)} ", answer.text, re.MULTILINE) for path, routes in p2pserver.ROUTES.items() for method in routes)


def test_times_are_the_settings_and_whole_numbers_where_they_can_be(serve):
    api = serve(game_ttl=30.0, guest_ttl=12.5, poll_after=0.5)
    assert '"expiresIn":30,' in api.register_game("g").text and '"expiresIn":30,' in api.poll_game("g").text
    assert '"expiresIn":12.5,"pollAfter":0.5' in api.start_game("g").text


NOBODYS = {"name": "nobody's", "peerId": HOST, "addresses": []}
PROBLEMS = {
    "a body that is not JSON": ("POST", "/games/register", {"data": b"{"}, 400, ()),
    "no body": ("POST", "/games/register", {"data": b""}, 400, {"name", "peerId"}),
    "an empty object": ("POST", "/games/start", {"json": {}}, 400, {"name", "peerId", "addresses"}),
    "null for what is required": ("POST", "/games/register", {"json": {"name": None, "peerId": None, "info": None}}, 400, {"name", "peerId"}),
    "every fault of register": ("POST", "/games/register", {"json": {"name": ".", "peerId": "", "info": 1, "listed": 1}}, 400,
                                {"name", "peerId", "info", "listed"}),
    "every fault of poll": ("POST", "/games/poll", {"json": {"name": 1, "peerId": 1, "addresses": 1, "after": -1, "replies": 1}}, 400,
                            {"name", "peerId", "addresses", "after", "replies"}),
    "every fault of PATCH": ("PATCH", "/games/x", {"json": {"name": "/", "info": [], "listed": "no"}}, 400, {"peerId", "name", "info", "listed"}),
    "every fault of PUT": ("PUT", "/games/x", {"json": {"peerId": ["x"]}}, 400, {"peerId"}),
    "every fault of DELETE": ("DELETE", "/games/x", {"json": {}}, 400, {"peerId"}),
    "DELETE without body or bearer": ("DELETE", "/games/x", {}, 400, {"peerId"}),
    "DELETE with a bearer of nothing": ("DELETE", "/games/x", {"headers": {"Authorization": "Bearer "}}, 400, {"peerId"}),
    "DELETE with another scheme": ("DELETE", "/games/x", {"headers": {"Authorization": f"Basic {HOST}"}}, 400, {"peerId"}),
    "poll of no game": ("POST", "/games/poll", {"json": NOBODYS}, 404, ()),
    "start of no game": ("POST", "/games/start", {"json": NOBODYS}, 404, ()),
    "GET of no game": ("GET", "/games/nobody's", {}, 404, ()),
    "PATCH of no game": ("PATCH", "/games/nobody's", {"json": {"peerId": HOST}}, 404, ()),
    "PUT of no game": ("PUT", "/games/nobody's", {"json": {"peerId": HOST}}, 404, ()),
    "DELETE of no game": ("DELETE", "/games/nobody's", {"json": {"peerId": HOST}}, 404, ()),
    "no such path": ("GET", "/game", {}, 404, ()),
    "a path below a game": ("GET", "/games/x/y", {}, 404, ()),
    "a game without name": ("GET", "/games//", {}, 404, ()),
    "a name that is not UTF-8": ("GET", "/games/%FF", {}, 404, ()),
    "a name with a slash": ("GET", "/games/a%2Fb", {}, 404, ()),
    "a name with a line break": ("GET", "/games/a%0D%0Ab", {}, 404, ()),
    "a method that is not for the path": ("DELETE", "/games", {}, 405, ()),
    "a method that is for no path": ("TRACE", "/games", {}, 405, ()),
    "another of these (draft-ietf-httpbis-safe-method-w-body)": ("QUERY", "/games", {}, 405, ()),
    "a body that is too large": ("POST", "/games/register", {"data": b" " * 16385}, 413, ()),
    "a path that is too long": ("GET", "/games/" + "x" * 9000, {}, 414, ()),
    "a body of text": ("POST", "/games/register", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, ()),
    "a head that is too large": ("GET", "/", {"headers": {"X": "x" * 33000}}, 431, ()),
    "a method that nobody knows": ("BREW", "/", {}, 501, ()),
}


@pytest.mark.parametrize("method, path, options, status, errors", rows(PROBLEMS))
def test_a_problem_is_told_in_json_of_its_kind(method, path, options, status, errors, api):
    answer = api.call(method, path, **options)
    body = answer.json()
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert set(body) == {"type", "title", "status", "detail"} | ({"errors"} if errors else set())
    assert (body["type"], body["title"], body["status"]) == ("about:blank", answer.reason, status) and body["detail"]
    assert set(body.get("errors", ())) == set(errors) and all(body.get("errors", {}).values())


PATHS = {"/": "GET, HEAD, OPTIONS", "/games": "GET, HEAD, OPTIONS", "/healthz": "GET, HEAD, OPTIONS", "/games/register": "OPTIONS, POST",
         "/games/poll": "OPTIONS, POST", "/games/start": "OPTIONS, POST", "/games/x": "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"}


@pytest.mark.parametrize("path", ["/games", "/healthz", "/games/x"])
def test_a_slash_at_the_end_of_a_path_says_nothing(path, api):
    api.register_game("x")
    for method in ("GET", "OPTIONS"):
        plain, slashed = api.call(method, path), api.call(method, path + "/")
        assert plain.ok and (plain.status_code, plain.content, plain.headers.get("Allow")) == (
            slashed.status_code, slashed.content, slashed.headers.get("Allow"))


@pytest.mark.parametrize("method", ["get", "Get", "pOST"])
def test_a_method_that_is_not_in_capitals_is_told_that_case_matters(method, api):
    """RFC 9110 section 9.1."""
    with Raw(api, GET.replace(b"GET", method.encode()) + END) as raw:
        answer = raw.answer()
        assert answer.status == 501 and "case-sensitive" in json.loads(answer.body)["detail"]
    assert "case-sensitive" not in api.call("BREW", "/").text


@pytest.mark.parametrize("path, allow", PATHS.items(), ids=PATHS)
def test_what_is_not_for_a_path_answers_405_and_options_204_both_with_allow(path, allow, api):
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - set(allow.split(", ")):
        answer = api.call(method, path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allow), method
        assert method == "HEAD" or answer.json()["detail"].endswith(f"which takes {allow}")
    answer = api.call("OPTIONS", path)
    assert (answer.status_code, answer.headers["Allow"], answer.content) == (204, allow, b"")
    assert answer.headers.get("Accept-Patch") == ("application/json" if "PATCH" in allow else None)
    assert "Access-Control-Allow-Methods" not in answer.headers, "this was no preflight"


@pytest.mark.parametrize("path, headers", [
    *((path, {}) for path in (*PATHS, "/games/nobody's", "/nothing", "/games/%zz", "/" + "x" * 9000)),
    *(("/games", headers) for headers in ({"If-Match": '"x"'}, {"Host": "a b"}, {"Expect": "x"}, {"X": "x" * 33000}))], ids=brief)
def test_head_answers_as_get_without_the_body(path, headers, api):
    """RFC 9110 section 9.3.2. Errors, too."""
    api.register_game("x")
    get, head = api.call("GET", path, headers=headers), api.call("HEAD", path, headers=headers)
    assert int(head.headers["Content-Length"]) == len(get.content) > 0 == len(head.content)
    assert (head.status_code, {**head.headers, "Date": ""}) == (get.status_code, {**get.headers, "Date": ""})


@pytest.mark.parametrize("template, status", [("{}", 304), ("W/{}", 304), ('"x", {}', 304), ('"x",W/{} , "y"', 304), ("*", 304), ('"x"', 200), ("", 200),
                                              ("x{}", 200)])
def test_the_list_on_if_none_match(template, status, api):
    tag = api.list_games().headers["ETag"]
    answer = api.list_games(**{"If-None-Match": template.format(tag)})
    assert re.fullmatch('"[^",]+"', tag) and (answer.status_code, answer.headers["ETag"], answer.headers["Cache-Control"]) == (status, tag, "no-cache")
    assert (answer.content == b"" and "Content-Type" not in answer.headers) == (status == 304)
    assert api.call("HEAD", "/games", headers={"If-None-Match": template.format(tag)}).status_code == status


FOREIGN = {"If-Match": '"x"'}
NONE = {"If-None-Match": "*"}


@pytest.mark.parametrize("method, path, headers, status", [
    *((method, "/games/castle", headers, status) for method in ("PATCH", "PUT", "DELETE") for headers, status in (
        (FOREIGN, 412), ({"If-Match": ""}, 412), ({"If-Match": 'W/"x", "y"'}, 412), (NONE, 412), ({"If-Match": "*", **NONE}, 412),
        ({"If-Match": "*"}, 200), ({"If-None-Match": '"x"'}, 200), ({"If-Unmodified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}, 200))),
    *((method, "/games/nobody's", headers, 404) for method in ("GET", "PATCH", "PUT", "DELETE") for headers in (FOREIGN, NONE)),
    *(("POST", path, headers, status) for path in ("/games/register", "/games/poll", "/games/start") for headers, status in (
        (FOREIGN, 412), ({"If-Match": "*"}, 412), (NONE, 200), ({"If-None-Match": '"x"'}, 200))),
    *((method, path, headers, status) for method in ("GET", "HEAD") for path in ("/games/castle", "/games", "/", "/healthz") for headers, status in (
        (FOREIGN, 412), ({"If-Match": "*"}, 200), (NONE, 304), ({"If-None-Match": '"x"'}, 200), ({**FOREIGN, **NONE}, 412))),
    ("OPTIONS", "/games", {**FOREIGN, **NONE}, 204), ("DELETE", "/games", FOREIGN, 405),
], ids=brief)
def test_preconditions_hold_or_nothing_is_performed(method, path, headers, status, serve):
    """RFC 9110 section 13: only the list has a tag, and what is there has no date."""
    api = serve()
    api.register_game("castle")
    fields = {"name": "castle", "peerId": GUEST if path.endswith("start") else HOST, "addresses": HERE}
    fields.update({} if method == "POST" else {"name": "palace"})
    before = api.list_games().json()
    answer = api.call(method, path, fields if method in ("POST", "PATCH", "PUT", "DELETE") else None, headers=headers)
    assert answer.status_code == status or status == 200 and answer.ok
    assert not answer.ok or status == 304 or method in ("GET", "HEAD", "OPTIONS") or path.endswith("register") or api.list_games().json() != before
    assert answer.ok or api.list_games().json() == before
    assert status != 304 or answer.content == b"" and "Content-Type" not in answer.headers


@pytest.mark.parametrize("template, status", [("{}", 200), ('"x", {}', 200), ("W/{}", 412), ("{}x", 412)])
def test_the_list_on_if_match(template, status, api):
    """Strong comparison: RFC 9110 section 13.1.1."""
    answer = api.list_games(**{"If-Match": template.format(api.list_games().headers["ETag"])})
    assert answer.status_code == status


def test_preconditions_are_ignored_where_there_would_be_no_success(serve):
    """RFC 9110 section 13.2.1."""
    api = serve()
    api.server.stopping = True
    for headers in (FOREIGN, NONE):
        assert api.call("GET", "/healthz", headers=headers).status_code == 503
    api.server.stopping = False


@pytest.mark.parametrize("change", rows({
    "a new game": (lambda api: api.register_game("h"),), "new addresses": (lambda api: api.poll_game("g"),), "a guest": (lambda api: api.start_game("g"),),
    "an update": (lambda api: api.update_game("g", info={"map": "ice"}),), "an end": (lambda api: api.delete_game("g"),),
}))
def test_the_tag_of_the_list_changes_with(change, serve):
    api = serve()
    api.register_game("g")
    tag = api.list_games().headers["ETag"]
    assert api.list_games().headers["ETag"] == tag
    change(api)
    answer = api.list_games(**{"If-None-Match": tag})
    assert answer.status_code == 200 and answer.headers["ETag"] != tag


def test_every_answer_carries_the_usual_header_fields(api, name):
    answers = [*(call(name) for call in (api.register_game, api.poll_game, api.start_game, api.get_game, api.update_game, api.delete_game)),
               *(api.call(method, path) for method, path in (("GET", "/"), ("GET", "/healthz"), ("HEAD", "/healthz"), ("OPTIONS", "/games"))),
               *(api.call(method, path, **options) for method, path, options, _, _ in PROBLEMS.values())]
    assert {answer.headers["Cache-Control"] for answer in answers} == {"no-store"}
    for answer in (*answers, api.list_games(), api.list_games(**{"If-None-Match": "*"})):
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Server"] == f"p2pserver/{p2pserver.__version__}"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["Date"])
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["Access-Control-Expose-Headers"] == "ETag, Location, Preference-Applied, Retry-After"
        assert ("Content-Length" in answer.headers) is (answer.status_code not in (204, 304))


@pytest.mark.parametrize("origin", ["*", "https://game.example", ""])
def test_cors_lets_web_pages_call_from(origin, serve):
    api = serve(cors_origin=origin)
    preflight = api.call("OPTIONS", "/games/register", headers={"Origin": "https://game.example", "Access-Control-Request-Method": "POST"})
    answers = [preflight, api.list_games(), api.call("GET", "/nothing")]
    if not origin:
        assert not [field for answer in answers for field in answer.headers if field.lower().startswith("access-control")]
        return
    assert {answer.headers["Access-Control-Allow-Origin"] for answer in answers} == {origin}
    assert (preflight.status_code, preflight.headers["Access-Control-Allow-Methods"]) == (204, "OPTIONS, POST")
    assert int(preflight.headers["Access-Control-Max-Age"]) > 0
    assert {"authorization", "content-type", "if-none-match"} <= set(preflight.headers["Access-Control-Allow-Headers"].lower().split(", "))
    assert not [answer for answer in answers if "Vary" in answer.headers], "all get the same"


@pytest.mark.parametrize("wished", ["content-type", "authorization,traceparent,x-b3-traceid", "X-Anything-At-All"])
def test_a_preflight_is_allowed_the_headers_that_it_asks_for(wished, api):
    """https://fetch.spec.whatwg.org/#cors-preflight-fetch: tracing libraries add some."""
    answer = api.call("OPTIONS", "/games/poll", headers={
        "Origin": "https://game.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wished})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Headers"]) == (204, wished)


@pytest.mark.parametrize("origin, allowed", rows({
    **{each: ({"Origin": each}, each) for each in ("https://a.example", "http://[::1]:8080", "capacitor://localhost", "null")},
    **{each: ({"Origin": each}, None) for each in ("https://b.example", "http://a.example", "https://a.example:444", "https://a.example, null")},
    "none": ({}, None),
}))
def test_of_a_list_of_origins_the_one_that_matches_is_answered(origin, allowed, serve):
    """https://fetch.spec.whatwg.org/#cors-protocol-and-http-caches. A poll that waited, and errors, too."""
    api = serve(cors_origin="https://a.example, http://[::1]:8080,capacitor://localhost,null")
    api.register_game("castle")
    answers = [api.call(method, path, headers={"Access-Control-Request-Method": "POST", **origin}) for method, path in (
        ("OPTIONS", "/games/poll"), ("GET", "/games"), ("GET", "/nothing"), ("POST", "/games/poll"), ("HEAD", "/games"))]
    answers.append(api.call("POST", "/games/poll", {"name": "castle", "peerId": HOST, "addresses": HERE, "wait": 1}, headers=origin))
    assert answers[-1].headers["Preference-Applied"] == "wait=1"
    assert [answer.headers.get("Access-Control-Allow-Origin") for answer in answers] == [allowed] * 6
    assert {answer.headers["Vary"] for answer in answers} == {"Origin"}


def test_each_body_of_json_ends_with_a_newline_and_has_no_other(api, name):
    """So that the prompt of a shell has a line of its own."""
    answers = [call(name) for call in (api.register_game, api.poll_game, api.start_game, api.get_game, api.update_game, api.register_game)]
    answers += [api.list_games(), api.call("GET", "/healthz"), api.call("GET", "/nothing"), api.call("POST", "/games/register", {})]
    for answer in answers:
        assert "json" in answer.headers["Content-Type"] and answer.text.count("\n") == 1 and answer.text.endswith("}\n")
    assert api.delete_game(name).content == b""

@pytest.mark.parametrize("headers, status", rows({
    "nothing": ({}, 201),
    "JSON": ({"Content-Type": "application/json"}, 201),
    "JSON in capitals": ({"Content-Type": "Application/JSON"}, 201),
    "JSON in UTF-8": ({"Content-Type": "application/json; charset=UTF-8"}, 201),
    "JSON in quoted UTF-8": ({"Content-Type": 'application/json ;charset="utf-8"'}, 201),
    "JSON in UTF8": ({"Content-Type": "application/json; charset=utf8"}, 201),
    "JSON in quoted UTF8 in capitals": ({"Content-Type": 'application/json;CHARSET="UTF8" ; x=y'}, 201),
    "JSON in UTF-80": ({"Content-Type": "application/json; charset=utf-80"}, 415),
    "a JSON patch": ({"Content-Type": "application/json-patch+json"}, 415),
    "another kind of JSON": ({"Content-Type": "application/vnd.game+json"}, 201),
    "not compressed": ({"Content-Encoding": "identity"}, 201),
    "text": ({"Content-Type": "text/plain"}, 415),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "JSON in Latin-1": ({"Content-Type": "application/json; charset=iso-8859-1"}, 415),
    "what only begins like JSON": ({"Content-Type": "application/jsonp"}, 415),
    "compressed": ({"Content-Encoding": "gzip"}, 415),
}))
def test_a_body_declared_as(headers, status, api, name):
    answer = api.call("POST", "/games/register", data=json.dumps({"name": name, "peerId": HOST}).encode(), headers=headers)
    assert answer.status_code == status and api.get_game(name).status_code == (200 if status == 201 else 404)
    # RFC 9110 section 12.5.3: Accept-Encoding says that the coding is the fault; section 15.5.16: Accept, that the type is.
    is_compressed = "Content-Encoding" in headers and status == 415
    assert answer.headers.get("Accept-Encoding") == ("identity" if is_compressed else None)
    assert answer.headers.get("Accept") == ("application/json" if status == 415 and not is_compressed else None)
    assert status == 201 or is_compressed or "set Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize("media_type", ["application/json-patch+json", "text/plain"])
def test_a_patch_of_another_type_is_told_which_it_may_have(media_type, api, name):
    """RFC 5789 section 2.2."""
    api.register_game(name)
    answer = api.call("PATCH", path_of(name), data=b"[]", headers={"Content-Type": media_type})
    assert (answer.status_code, answer.headers["Accept-Patch"], answer.headers.get("Accept")) == (415, "application/json", None)


@pytest.mark.parametrize("call", [lambda api, game, peer: api.register_game(game), lambda api, game, peer: api.start_game("g0", peer)], ids=["server", "game"])
def test_a_full_one_answers_503_with_retry_after_and_still_serves_those_it_has(call, serve):
    api = serve(max_games=1, max_guests=1)
    api.register_game("g0")
    assert call(api, "g0", "1").ok
    answer = call(api, "g1", "2")
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0 and call(api, "g0", "1").ok


def test_an_unexpected_failure_answers_500_without_inside_detail_and_is_logged(serve, lines):
    def new_id():
        raise RuntimeError("inside detail")

    api = serve(Clock(), new_id)
    api.register_game("g")
    answer = api.start_game("g")
    assert answer.status_code == 500 and answer.json()["title"] == "Internal Server Error"
    assert not any(word in answer.text for word in ("inside", "Runtime", "Traceback", ".py"))
    assert any("RuntimeError: inside detail" in line for line in lines) and api.get_game("g").json()["guests"] == 0


# ---- endpoints: facts of the protocol -------------------------------------------------------------------------------

def test_a_minimal_client_that_sends_only_what_is_required_works(api, name):
    assert api.call("POST", "/games/register", {"name": name, "peerId": "h"}).status_code == 201
    assert api.call("POST", "/games/poll", {"name": name, "peerId": "h", "addresses": ["203.0.113.1:1"]}).json()["guests"] == []
    assert name in [game["name"] for game in api.call("GET", "/games").json()["games"]]
    joined = api.call("POST", "/games/start", {"name": name, "peerId": "g", "addresses": ["203.0.113.2:2"]})
    assert (joined.status_code, joined.json()["addresses"]) == (200, ["203.0.113.1:1"])
    guest, = api.call("POST", "/games/poll", {"name": name, "peerId": "h", "addresses": ["203.0.113.1:1"]}).json()["guests"]
    assert guest["addresses"] == ["203.0.113.2:2"] and api.call("DELETE", path_of(name), {"peerId": "h"}).status_code == 204


def test_unknown_fields_are_ignored(api, name):
    more = {"later": {"x": [1]}, "": None, "expiresIn": "x"}
    assert api.register_game(name, **more).status_code == 201 and api.start_game(name, replies="no field of start", **more).status_code == 202
    assert api.poll_game(name, **more).status_code == api.update_game(name, **more).status_code == 200


def test_which_of_several_errors_comes_first(api, name):
    def call(method, path, **fields):
        return api.call(method, path, fields).status_code

    wrong, other = {"peerId": OTHER}, f"{name} taken"
    for each in (name, other):
        api.register_game(each)
    assert call("DELETE", "/games") == 405 and call("PATCH", "/games/no such", peerId="", name="/") == 400
    assert call("PATCH", "/games/no such", name=other, **wrong) == 404
    assert call("PATCH", path_of(name), name=other, **wrong) == 403
    assert call("PATCH", path_of(name), name=other, peerId=HOST) == call("POST", "/games/register", name=name, **wrong) == 409


def test_a_peer_id_holds_no_character_of_these_categories_and_any_of_the_others():
    refused = {"Cc": "\x07", "Cf": "\u200b", "Cs": "\ud800", "Co": "\ue000", "Cn": "\u0378", "Zl": "\u2028", "Zp": "\u2029", "Zs": "\u00a0"}
    taken = {"Lu": "A", "Lo": "雪", "Mn": "\u0301", "Nd": "1", "Pd": "-", "Sm": "+", "So": "🎲", "Zs": " "}
    for check, characters in ((pytest.raises, refused), (contextlib.nullcontext, taken)):
        for category, character in characters.items():
            assert unicodedata.category(character) == category
            with check(ValueError) if check is pytest.raises else check():
                p2pserver.check_peer_id(character, Scope())


def test_numbers_inside_of_info_keep_their_value(api, name):
    api.register_game(name, info={"a": 1.50, "b": 2 ** 60, "c": 1e300, "d": -0.25})
    assert api.get_game(name).json()["info"] == {"a": 1.5, "b": 2 ** 60, "c": 1e300, "d": -0.25}


def test_line_separators_go_through_info_and_addresses(api, name):
    text = "a\u2028b\u2029"
    api.register_game(name, info={"text": text})
    api.poll_game(name, addresses=[text])
    assert api.get_game(name).json()["info"] == {"text": text} and api.start_game(name).json()["addresses"] == [text]


def test_null_for_an_optional_field_is_as_absent(api, name):
    api.register_game(name, info={"map": "ice"}, listed=False)
    assert api.register_game(name, info=None, listed=None).status_code == 200
    assert api.update_game(name, name=None, info=None, listed=None).json()["info"] == {"map": "ice"} and name not in api.list_games().text
    assert api.poll_game(name, after=None, replies=None).json()["gone"] == []


def test_two_spellings_of_a_name_are_one_game(api, name):
    composed, decomposed = f"{name} \u00e9", f"{name} e\u0301"
    assert api.register_game(decomposed).json()["name"] == composed and api.register_game(composed, OTHER).status_code == 409
    calls = (api.register_game, api.poll_game, api.start_game, api.get_game, lambda spelling: api.update_game(spelling, name=spelling))
    assert {call(spelling).json()["name"] for spelling in (composed, decomposed) for call in calls} == {composed}
    assert api.delete_game(decomposed).status_code == 204


def test_nothing_is_lost_when_answers_to_poll_and_start_are_lost(api, name):
    api.register_game(name)
    cursor = api.poll_game(name).json()["cursor"]
    lost, again = api.start_game(name).json(), api.start_game(name).json()
    assert lost == again and api.get_game(name).json()["guests"] == 1
    lost, again = api.poll_game(name, after=cursor).json(), api.poll_game(name, after=cursor).json()
    assert lost == again and len(again["guests"]) == 1 and api.poll_game(name, after=again["cursor"]).json()["guests"] == []


def test_a_negotiation_of_offer_and_answer_fits_through_the_calls(api, name):
    """As two browsers do it: the guest's offer, the host's answer for it alone."""
    offer, reply = [{"type": "offer", "sdp": "v=0\r\n"}], [{"type": "answer", "sdp": "v=0\r\n"}]
    api.register_game(name)
    cursor = api.poll_game(name, addresses=[]).json()["cursor"]
    waiting = api.start_game(name, addresses=offer).json()
    guest, = api.poll_game(name, addresses=[], after=cursor).json()["guests"]
    assert guest["addresses"] == offer and guest["sessionId"] == waiting["sessionId"]
    assert api.poll_game(name, addresses=[], replies={guest["sessionId"]: reply}).json()["gone"] == []
    done = api.start_game(name, addresses=offer)
    assert (done.status_code, done.json()["addresses"]) == (200, reply) and done.json()["cursor"] > waiting["cursor"]
    assert api.start_game(name, OTHER, offer).status_code == 202
    api.poll_game(name, addresses=HERE, replies={guest["sessionId"]: []})
    assert api.start_game(name, addresses=offer).status_code == 202, "the host has taken its answer back"


def test_a_host_cannot_start_its_own_game(api, name):
    api.register_game(name)
    assert api.start_game(name, HOST).status_code == 409 and api.get_game(name).json()["guests"] == 0


def test_silent_guests_and_then_silent_hosts_are_gone(serve, clock):
    api = serve(clock)
    api.register_game("g")
    api.start_game("g")
    clock.tick(59)
    assert len(api.poll_game("g").json()["guests"]) == 1
    clock.tick(1)
    assert api.poll_game("g").json()["guests"] == []
    clock.tick(60)
    assert {answer.status_code for answer in (api.get_game("g"), api.poll_game("g"), api.start_game("g"), api.update_game("g"), api.delete_game("g"))} == {404}
    assert api.list_games().json() == {"games": []} and api.register_game("g", OTHER).status_code == 201


def test_the_cursors_of_a_server_begin_above_those_of_its_earlier_runs(serve):
    first, second = serve(), serve()
    for api in (first, second):
        api.register_game("g")
        api.start_game("g")
    cursor = first.poll_game("g").json()["cursor"]
    body = second.poll_game("g", after=cursor).json()
    assert len(body["guests"]) == 1 and cursor < body["cursor"] < 2 ** 53


def test_loopback_addresses_are_for_clients_of_this_machine_alone(serve):
    """One that calls from another address of the machine counts as from elsewhere; its packets stay on loopback."""
    api = serve(host="")
    api.register_game("g")
    assert api.poll_game("g", addresses=["127.0.0.1:5000", "[::1]:5000"]).status_code == 200
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if sock.connect_ex(("192.0.2.1", 9)) or sock.getsockname()[0].startswith("127."):
            pytest.skip("this machine has no other address")
        address = sock.getsockname()[0]
    body = {"name": "g", "peerId": HOST, "addresses": ["127.0.0.1:5000"]}
    assert api.session.post(f"http://{address}:{api.port}/games/poll", json=body, timeout=WAIT).status_code == 400


def test_a_body_that_came_before_is_judged_anew_from_elsewhere_of_another_type_and_for_another_operation(serve):
    api = serve(trusted_proxies="127.0.0.1")
    body = {"name": "g", "peerId": HOST, "addresses": ["127.0.0.1:5000"], "info": 1}
    assert api.call("POST", "/games/register", {"name": "g", "peerId": HOST}).status_code == 201
    for _ in range(2):
        assert api.call("POST", "/games/poll", body).status_code == 200
        assert api.call("POST", "/games/poll", body, headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 400
        assert api.call("POST", "/games/poll", body, headers={"Content-Type": "text/plain"}).status_code == 415
        assert api.call("POST", "/games/poll", body, headers={"Content-Encoding": "gzip"}).status_code == 415
        assert api.call("POST", "/games/register", body).status_code == 400
        assert api.call("POST", "/games/leave", body).status_code == 404
    assert api.call("POST", "/games/start", {**body, "peerId": GUEST}).json()["addresses"] == body["addresses"]


# ---- endpoints: JSON, strictly --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    '"x":NaN', '"x":Infinity', '"x":[-Infinity]', '"x":1e999', '"info":{"x":-1e999}', '"x":' + "9" * 309, '"x":' + "9" * 5000, '"x":01', '"x":+1', '"x":0x1',
    '"x":.5', '"x":1,', "'x':1", "x:1", '"x":1/**/', '"x":True', '"x":1,"x":1', '"peerId":"x"', '"x":{"a":[{"b":1,"b":2}]}', r'"x":1,"\u0078":2',
    '"x":"a\nb"', '"x":"\t"', r'"x":"\x41"', r'"x":"\ud800"', r'"info":{"x":"\uDC00"}', r'"\udfff":1', r'"x":"\udc00\ud800"', '"x":' + "[" * 8000,
], ids=brief)
def test_a_body_is_no_json_with(text, api, name):
    answer = api.call("POST", "/games/register", data=f'{{"name":"{name}","peerId":"{HOST}",{text}}}'.encode())
    assert answer.status_code == 400 and "errors" not in answer.json() and api.get_game(name).status_code == 404


@pytest.mark.parametrize("deep", ["[" * 7000 + "]" * 7000, '{"x":' * 2000 + "1" + "}" * 2000, "[" * 3000 + r'"\ud83c\udfb2"' + "]" * 3000], ids=brief)
def test_deep_nesting_is_refused_in_what_is_kept_and_harms_nothing_elsewhere(deep, api, name):
    """How deep Python reads depends on its version."""
    statuses = [api.call("POST", "/games/register", data=f'{{"name":"{name}","peerId":"x",{field}}}'.encode()).status_code for field in (
        f'"info":{{"x":{deep}}}', f'"later":{deep}')]
    assert statuses[0] == 400 and statuses[1] in (201, 400) and api.call("GET", "/healthz").status_code == 200


@pytest.mark.parametrize("data", [b"null", b"true", b"1", b'"x"', b"[]", b"[{}]", b" ", b"{}{}", b"{} x", b"\0", b"\xef\xbb\xbf{}", b"\xff", b'{"x":"\xff"}',
                                  b'{"x":"\xed\xa0\x80"}', b'{"x":"\xc0\x80"}', '{"x":1}'.encode("utf-16")], ids=brief)
def test_a_body_is_no_json_object_in_utf_8(data, api):
    answer = api.call("POST", "/games/register", data=data)
    assert answer.status_code == 400 and "errors" not in answer.json()


@pytest.mark.parametrize("text", [r'"x":"\ud83c\udfb2"', r'"x":"\\ud800"', '"x":1e-999', '"x":' + "9" * 308, '"x":-0', '"x":' + "[" * 100 + "]" * 100,
                                  '"x":"\U0001f3b2\\u0000"'], ids=brief)
def test_a_body_is_json_with(text, api, name):
    data = f'\r\n\t {{"name":"{name} \\ud83c\\udfb2\\u0041","peerId":"x",{text}}} '.encode()
    assert api.call("POST", "/games/register", data=data).json()["name"] == name + " 🎲A"


@pytest.mark.parametrize("wait", ["3", "3.0", "3e0", "3.00E+0", "30e-1", "0.3e1"])
def test_a_whole_number_may_have_any_spelling_of_json(wait, api, name):
    """RFC 8259 section 6. Of an encoder that knows floats only, and of the cursor in %.14g."""
    api.register_game(name)
    api.start_game(name)
    for after in ("0.0", "0e0", "1.7956255424844e+15"):
        body = f'{{"name":"{name}","peerId":"{HOST}","addresses":{{}},"after":{after},"wait":{wait}}}'.encode()
        answer = api.call("POST", "/games/poll", data=body)
        assert answer.status_code == 200 and answer.headers["Preference-Applied"] == "wait=3", answer.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_named(encoding, api):
    """RFC 8259 section 8.1."""
    answer = api.call("POST", "/games/register", data='{"name":"x"}'.encode(encoding))
    assert answer.status_code == 400 and "BOM" in answer.json()["detail"]


# ---- HTTP's edges ---------------------------------------------------------------------------------------------------

EMPTY = POST + b"Content-Length: 2\r\n\r\n{}"      # answered by 400


def register(name, *fields):
    body = json.dumps({"name": name, "peerId": HOST}).encode()
    return b"".join([POST, b"Content-Length: %d\r\n" % len(body), *fields, END, body])


BAD_LINES = [   # each with Host after it; named by themselves
    b"GET /\r\n", b"GET / http/1.1\r\n", b"GET / HTTP/1.10\r\n", b"GET / HTTP/11\r\n", b"GET / HTTP/1.1 \r\n", b" GET / HTTP/1.1\r\n", b"GET  / HTTP/1.1\r\n",
    b"GET\t/ HTTP/1.1\r\n", b"GET /games/a b HTTP/1.1\r\n", b"GET /\0 HTTP/1.1\r\n", b"GET /\xc3\xa9 HTTP/1.1\r\n", b"GET /\r HTTP/1.1\r\n",
    b"G@T / HTTP/1.1\r\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\r\r\n",
    b"\nGET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n",
]
BAD_FIELDS = [  # each between Host and the end of the head
    b"Host: h\r\n", b"host:h\r\n", b" folded: x\r\n", b"X: a\r\n b\r\n", b"X: a\r\n\tb\r\n", b"X : a\r\n", b"Content-Length\t: 0\r\n", b"X\r\n", b": x\r\n",
    b"X Y: x\r\n", b"\xc3\x9c: x\r\n", b"X\0: a\r\n", b"X: a\0b\r\n", b"X: a\x01b\r\n", b"X: \x1b[2J\r\n", b"X: \x7f\r\n", b"X: a\rb\r\n", b"\rX: a\r\n",
    b"X: a\r\r\n", b"X: a\n", b"\n", b"Content-Length: x\r\n",
]
# RFC 3986 section 3.2, and what RFC 9112 section 3.2 makes of it.
GOOD_HOSTS = [b"", b":80", b"h", b"H.example.", b"h:", b"h:8000", b"192.0.2.1:80", b"[::1]", b"[2001:db8::1]:8000", b"[::ffff:192.0.2.1]", b"a_b", b"a,b",
              b"%C3%A9", b"~!$&'()*+;="]
BAD_HOSTS = [b"a b", b"a/b", b"/", b"u@a", b"u:p@a", b"a:b", b"a:80:80", b"[::1", b"::1", b"[::1]x", b"[]", b"[1]", b"[1.2.3.4]", b"[:::]", b"[1::2::3]",
             b"[fe80::1%25lo]",
             b"[::1]:x", b"a, b", b"h, h", b"a?b", b"a#b", b"a%", b"a%zz", b"<a>", b'"a"', b"a\\b", b"\xc3\xa9", b"\x80", b"\xff", b"http://a"]
BAD_TARGETS = [b"?x", b"a:80", b"h", b"games", b"/games/%zz", b"/games/%", b"/games/%4", b"/?%z1", b"/games/<name>", b'/"', b"/a\\b", b"/`", b"/{x}", b"/#x",
               b"/?#", b'/?"', b"/?<x>", b"ftp://h/games", b"http:/games", b"http:games", b"http://", b"http:///games", b"//h:80%", b"mailto:a@b",
               *(b"http://%s/games" % host for host in (b":80", *BAD_HOSTS) if not set(host) & set(b" /?\x80\xc3\xff"))]
LAST = b"0\r\n\r\n"
BAD_CHUNKS = [  # each the first bytes of a chunked body
    *(size + b"\r\n{}\r\n" + LAST for size in (b"-2", b"+2", b"0x2", b"g", b"", b" 2", b"2 ", b"2\t", b"\xb2", b"2\r", b"000000002",
                                               b"2 x", b"2;\0", b"2;x\ny", b"2;x\ry", b"2;" + b"x" * 257)),
    b"2\n{}\r\n" + LAST, b"2\r{}\r\n" + LAST, b"2\r\n{}\n" + LAST, b"2\r\n{}\r" + LAST, b"2\r\n{}" + LAST, b"2\r\n{} \r\n" + LAST, b"2\r\n{}\r\n0\n\r\n",
    b"2\r\n{}\r\n0\r\n\n", b"2\r\n{}\r\n000000000\r\n\r\n", b"0\r\nX\r\n\r\n", b"0\r\nX: a\nY: b\r\n\r\n", b"0\r\n folded: x\r\n\r\n", b"0\r\nX: \0\r\n\r\n",
]
BAD_CODINGS = [b"identity", b"gzip", b"gzip chunked", b"gzip, chunked, chunked", b"chunked" * 4000,
               b"chunked, gzip", b"chunked, chunked", b"chunked\r\nTransfer-Encoding: chunked", b"xchunked", b"chunkedx", b"chunked;q=1",
               b"", b'"chunked"', b"chunked,", b"\x0bchunked"]
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BAD_LENGTHS = [b"two", b"", b"+2", b"-2", b"0_2", b"0x2", b"2.0", b"2 2", b"\xb2", b"2, 2",
               b"2\r\nContent-Length: 2", b"2\r\ncontent-length: 3", b"2\r\nTransfer-Encoding: chunked"]
REFUSED = {
    **{brief(line): (line + b"Host: h\r\n\r\n", 400) for line in BAD_LINES},
    **{brief(field): (GET + field + END, 400) for field in BAD_FIELDS},
    **{brief(length): (POST + b"Content-Length: %s\r\n\r\n{}" % length, 400) for length in BAD_LENGTHS},
    **{f"chunk {brief(chunks)}": (CHUNKED + chunks, 400) for chunks in BAD_CHUNKS},
    **{f"coding {brief(coding)}": (POST + b"Transfer-Encoding: %s\r\n\r\n2\r\n{}\r\n0\r\n\r\n" % coding, 400) for coding in BAD_CODINGS},
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    **{f"Host {brief(host)}": (b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host, 400) for host in BAD_HOSTS},
    "a wrong Host in HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
    "a wrong Host with an absolute form": (b"GET http://h/ HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9 by name": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "a method in lower case": (GET.replace(b"GET", b"get") + END, 501),
    "a method in lower case with a body": (EMPTY.replace(b"POST", b"Post"), 501),
    "CONNECT": (b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    "no Content-Length for POST": (POST + END, 411),
    "no Content-Length for PUT": (b"PUT /games/x HTTP/1.1\r\nHost: h\r\n\r\n", 411),
    "no Content-Length for PATCH": (b"PATCH /games/x HTTP/1.1\r\nHost: h\r\n\r\n", 411),
    "a body that is too large": (POST + b"Content-Length: 16385\r\n\r\n", 413),
    "a body for GET that is too large": (GET + b"Content-Length: 16385\r\n\r\n", 413),
    "a huge Content-Length": (POST + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    "a Content-Length of 9000 digits": (POST + b"Content-Length: " + b"9" * 9000 + b"\r\n\r\n", 413),
    "a Content-Length that ends in zeros": (POST + b"Content-Length: 1" + b"0" * 400 + b"\r\n\r\n", 413),
    "a transfer coding that nobody knows": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 501),
    "Transfer-Encoding in HTTP/1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"2\r\n{}\r\n0\r\n\r\n", 400),
    "Content-Length before Transfer-Encoding": (CHUNKED.replace(b"Transfer", b"Content-Length: 12\r\nTransfer") + b"2\r\n{}\r\n0\r\n\r\n", 400),
    "a chunk that is too large": (CHUNKED + b"4001\r\n", 413),
    "a chunk of the largest size": (CHUNKED + b"ffffffff\r\n", 413),
    "chunks that are too large in all": (CHUNKED + b"2000\r\n" + b" " * 8192 + b"\r\n2001\r\n", 413),
    "chunks of GET that are too large": (CHUNKED.replace(b"POST", b"GET") + b"4001\r\n", 413),
    "trailers of more than 1024 bytes": (CHUNKED + b"0\r\nX: " + b"x" * 1024 + b"\r\n\r\n", 431),
    "trailers that do not end": (CHUNKED + b"0\r\nX: " + b"x" * 100_000, 431),
    "101 trailers": (CHUNKED + b"0\r\n" + b"X: x\r\n" * 101 + END, 431),
    "an expectation that nobody knows": (POST + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}", 417),
    "101 fields": (GET + b"X: x\r\n" * 100 + END, 431),
    "more than 32 KiB of fields": (GET + b"".join(b"X%d: %s\r\n" % (i, b"x" * 1000) for i in range(33)) + END, 431),
    "a field that does not end": (GET + b"X: " + b"x" * 100_000, 431),
    "a request line of 8193 bytes": (b"GET /" + b"x" * (8193 - 16) + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    "a request line of 70000 bytes": (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    "a request line that does not end": (b"G" * 70000, 414),
    "a long request line after an empty one": (b"\r\nGET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
}


@pytest.mark.parametrize("data, status", REFUSED.values(), ids=REFUSED)
def test_http_refuses_and_closes_after(data, status, api):
    with Raw(api, data + GET + END) as raw:     # what comes after such a head is read as no request
        answer = raw.answer()
        assert (answer.status, answer.headers["connection"], answer.headers["content-type"]) == (status, "close", "application/problem+json")
        assert json.loads(answer.body)["status"] == status and raw.is_closed()


NEVER = [b"\0", b"\x04\x01\0P\x7f\0\0\x01\0", b"\x05\x01\0", b"\x80\x2e\x01", b"\xff", b'{"name":', b" GET", b"GET\t/", b"G@T", b"GET / HTTP/1.1\rX", b"\rG",
         b"\n", b"\r\n\rG", b"SSH-2.0-OpenSSH_9.6\r\n", b"GET /\r\n", b"GET / HTTP/1.1 ", b"GET / HTTP/1.10\r\n", b"GET / http", b"GET /games/a b",
         b"GET /\xc3", b"PROXY TCP4 127.0.0.1 ", GET + b"X: \0", GET + b"X: y\rz", GET + b"X: y\n", GET + b"\x1b",
         CHUNKED + b"x", CHUNKED + b"2 x", CHUNKED + b"2\rx",
         CHUNKED + b"2\r\n{}x", CHUNKED + b"0\r\n\0"]


@pytest.mark.parametrize("data", NEVER, ids=brief)
@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
def test_what_can_never_become_a_request_is_refused_at_once(data, pieces, api):
    """The client sends no more, and the time for a request is not awaited."""
    with Raw(api) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for piece in [data[i:i + 1] for i in range(len(data))] if pieces else [data]:
            raw.send(piece)
        raw.socket.settimeout(p2pserver.REQUEST_TIME / 2)
        assert raw.answer().status == 400 and raw.is_closed()


@pytest.mark.parametrize("data", [GET + END, END + END + register("x"), CHUNKED + b"2;x\r\n{}\r\n0\r\nX: y\r\n\r\n", b"OPTIONS * HTTP/1.0\r\n\r\n"], ids=brief)
def test_what_may_still_become_a_request_is_awaited_wherever_it_stops(data, api):
    for end in range(len(data)):
        with Raw(api) as raw:
            raw.send(data[:end])
            raw.socket.shutdown(socket.SHUT_WR)
            answer = raw.stream.read()
            assert b"ended early" in answer or not answer and not data[:end].strip(), data[:end]


ACCEPTED = {
    "a Content-Length with leading zeros": (POST + b"Content-Length: 000000000000000000000002\r\n\r\n{}", 400),
    "a Content-Length of zero": (POST + b"Content-Length: 0\r\n\r\n", 400),
    "a chunked body": (CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", 400),
    "no chunk": (CHUNKED + b"0\r\n\r\n", 400),
    "a chunked body for GET": (CHUNKED.replace(b"POST /games/register", b"GET /healthz") + b"5\r\nhello\r\n0\r\n\r\n", 200),
    "chunked in capitals": (CHUNKED.replace(b"chunked", b"CHUNKED") + b"2\r\n{}\r\n0\r\n\r\n", 400),
    "16384 bytes in chunks": (CHUNKED + b"1fff\r\n" + b" " * 8191 + b"\r\n2001\r\n" + b" " * 8193 + b"\r\n0\r\n\r\n", 400),
    "an empty line before the request line": (END + GET + END, 200),
    "the absolute form": (b"GET http://anywhere.example:1/healthz HTTP/1.1\r\nHost: h\r\n\r\n", 200),
    "the absolute form in capitals": (b"GET HTTPS://ANYWHERE/healthz?x HTTP/1.1\r\nHost: h\r\n\r\n", 200),
    "the absolute form without a path": (b"OPTIONS http://anywhere.example HTTP/1.1\r\nHost: h\r\n\r\n", 204),
    "the asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 204),
    "the asterisk for GET": (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    **{f"the target {brief(target)}": (b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target, 400) for target in BAD_TARGETS},
    **{f"the authority {brief(host)}": (b"GET http://%s/healthz HTTP/1.1\r\nHost: h\r\n\r\n" % host, 200) for host in GOOD_HOSTS[2:]},
    **{f"Host {brief(host)}": (b"GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n" % host, 200) for host in GOOD_HOSTS},
    "an empty Host": (b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 200),
    "field names in any case and space around values": (b"POST /games/register HTTP/1.1\r\nhOST:h\r\ncontent-LENGTH: \t 2 \t\r\n\r\n{}", 400),
    "Latin-1 in a field and an empty one": (GET + b"X: \xe9\r\nY:\r\n\r\n", 200),
    "100 fields": (GET + b"X: x\r\n" * 99 + END, 200),
    "32000 bytes of fields": (GET + b"X: " + b"x" * 32000 + b"\r\n\r\n", 200),
    "a request line of 8192 bytes": (b"GET /" + b"x" * (8192 - 16) + b" HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    "a body for GET": (GET + b"Content-Length: 5\r\n\r\nhello", 200),
    "a body for OPTIONS": (b"OPTIONS / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", 204),
    "a later HTTP/1": (b"GET /healthz HTTP/1.9\r\nHost: h\r\n\r\n", 200),
    "16384 bytes of body": (POST + b"Content-Length: 16384\r\n\r\n{}" + b" " * 16382, 400),
    "dots in a path": (b"GET /games/../healthz HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    "a name of escaped dots": (b"GET /games/%2e%2e HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    "two slashes": (b"GET //games HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    "a name in two spellings of one path": (b"GET /%67ames HTTP/1.1\r\nHost: h\r\n\r\n", 404),
}


@pytest.mark.parametrize("data, status", ACCEPTED.values(), ids=ACCEPTED)
def test_http_accepts_and_goes_on_after(data, status, api):
    with Raw(api, data + GET + END) as raw:
        assert [raw.answer().status, raw.answer().status] == [status, 200]


def chunked(name, chunks, *fields):
    """A registration whose body is cut into these chunks: {size line: how many bytes}. A size line of None is written as is usual."""
    body, data = json.dumps({"name": name, "peerId": HOST}).encode(), b""
    for line, size in chunks:
        data += (line or b"%x") % size + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return POST + b"Transfer-Encoding: chunked\r\n" + b"".join(fields) + END + data + b"%X\r\n%s\r\n0" % (len(body), body)


@pytest.mark.parametrize("chunks, end", rows({
    "one chunk": ([], END + END), "single bytes": ([(None, 1)] * 20, END + END), "leading zeros": ([(b"0000000%x", 3), (b"%08X", 11)], b"0000000" + END + END),
    "extensions": ([(b"%x;a", 1), (b"%x ; a = \"b;\\\"\" ;c", 2), (b"%x;" + b"x" * 256, 3)], b";last" + END + END),
    "trailers": ([], END + b"Digest: x\r\nContent-Length: 5\r\nHost: a b\r\n" + END),
    "trailers of 1024 bytes": ([], END + b"X: " + b"x" * 1021 + END + END),
}))
@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
def test_a_chunked_body_is_decoded_with(chunks, end, pieces, api, name):
    """RFC 9112 section 7.1. What comes after it is the next request."""
    data = chunked(name, chunks) + end + GET + END
    with Raw(api) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for i in range(len(data) if pieces else 0):
            raw.send(data[i:i + 1])
        pieces or raw.send(data)
        assert [raw.answer().status for _ in range(2)] == [201, 200] and api.get_game(name).status_code == 200


def test_a_chunked_body_is_decoded_wherever_its_bytes_are_parted():
    data = b"5;x=y\r\nhello\r\n00A \t;z\r\n and more.\r\n0\r\nX: y\r\n\r\nnext"
    for first, second in itertools.combinations(range(len(data) + 1), 2):
        buffer, length, is_more = bytearray(), 0, True
        for piece in (data[:first], data[first:second], data[second:]):
            buffer += piece
            length, is_more = p2pserver.decode_chunks(buffer, length, 15) if is_more else (length, False)
        assert (bytes(buffer), length, is_more) == (b"hello and more.next", 15, False)


def test_a_chunked_body_of_a_megabyte_in_many_reads_takes_no_more_work_than_its_bytes():
    """What is decoded is not moved again, however long it gets."""
    class Buffer(bytearray):
        moved = 0

        def __delitem__(self, where):
            Buffer.moved += len(self) - where.stop if where.start else 0
            super().__delitem__(where)

    buffer, length, is_more, count = Buffer(), 0, True, 5000
    data = b"c8\r\n" + b"x" * 200 + b"\r\n"
    for _ in range(count):
        buffer += data[:100]
        assert p2pserver.decode_chunks(buffer, length, 10 ** 6) == (length, True)
        buffer += data[100:]
        length, is_more = p2pserver.decode_chunks(buffer, length, 10 ** 6)
    assert length == 200 * count and is_more and Buffer.moved <= count * len(data)


def test_a_chunked_request_waits_as_any_other(serve):
    api = serve()
    api.register_game("castle")
    head, body = poll("castle", b"Prefer: wait=20").split(b"\r\n\r\n")
    with Raw(api, re.sub(b"Content-Length: [0-9]+", b"Transfer-Encoding: chunked", head) + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)) as raw:
        wait_until(lambda: waiters(api) == 1)
        raw.send(CHUNKED + b"2\r\n{")       # the next request comes early
        api.start_game("castle")
        assert len(json.loads(raw.answer().body)["guests"]) == 1
        raw.send(b"}\r\n0\r\n\r\n")
        assert raw.answer().status == 400


@pytest.mark.parametrize("name, path, status", rows({
    "its own path": ("<name>", b"/games/%3Cname%3E", 200),
    "what a URI may hold": ("!$&'()*+,;=:@-._~ a", b"/games/!$&'()*+,;=:@-._~%20a?/?", 200),
    "what browsers leave in a path and a query": ("[EU]^|", b"/games/[EU]^|?[]^|{}`\\", 200),
    "its path with a slash at the end": ("slash", b"/games/slash/", 200),
    "its path with two slashes at the end": ("slash", b"/games/slash//", 404),
    "bytes that are not UTF-8": ("\ufffd", b"/games/%FF", 404),
}))
def test_how_a_game_is_found_by(name, path, status, api):
    api.register_game(name)
    with Raw(api, b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path) as raw:
        assert raw.answer().status == status


@pytest.mark.parametrize("more", [{"replies": {"a": []}}, {"dismiss": ["a"]}], ids=str)
def test_of_a_poll_with_replies_or_dismissals_nothing_is_kept_for_the_next_one(more, serve):
    """Many small ones take far more than the bytes of their body."""
    api = serve()
    assert api.poll_game("castle", **more).status_code == 404 and not api.server.known_bodies
    assert api.poll_game("castle").status_code == 404 and api.server.known_bodies


def test_a_connection_that_pipelines_has_one_turn_at_a_time(serve):
    """Else one of thousands of requests would wait in the queue thousands of times, before those of others."""
    api, count, turns = serve(), 5000, set()
    with Raw(api) as raw:
        threading.Thread(target=raw.send, args=((GET + END) * count,), daemon=True).start()
        for _ in range(count):
            assert raw.answer().status == 200
            turns.add(len(api.server.queue))
    assert turns <= {0, 1}


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_chunked_body_may_end_with_a_newline_wherever_its_framing_stops(end, api, name):
    body = json.dumps({"name": name, "peerId": HOST}).encode() + end.encode()
    with Raw(api, POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0" % (len(body), body)) as raw:
        assert is_silent(raw)
        raw.send(b"\r\n\r\n")
        assert raw.answer().status == 201


def test_an_answer_that_ends_its_connection_comes_whole_whatever_the_client_has_sent_behind(serve):
    """RFC 9112 section 9.6: to close with bytes unread resets the connection."""
    api = serve()
    for i in range(2000):
        api.server.registry.register_game(f"game {i}", b"%016d" % i, info=b'{"a":"%s"}' % (b"x" * 900))
    with Deaf(api, LIST + b"Connection: close\r\n\r\n" + b"x" * 40_000) as raw:
        assert len(json.loads(raw.answer().body)["games"]) == 2000


@pytest.mark.parametrize("pipelined", [False, True])
def test_requests_on_one_connection_are_answered_in_their_order_where_pipelined_is(pipelined, api, name):
    requests_ = [GET + END, register(name), EMPTY, GET.replace(b"healthz", b"nothing") + END, register(name), GET + END]
    with Raw(api, b"".join(requests_) if pipelined else b"") as raw:
        answers = [(pipelined or raw.send(data), raw.answer())[1] for data in requests_]
        assert [answer.status for answer in answers] == [200, 201, 400, 404, 200, 200] and not [answer for answer in answers if "connection" in answer.headers]


@pytest.mark.parametrize("data, status", rows({
    "HEAD": (GET.replace(b"GET", b"HEAD") + END, 200),
    "HEAD of nothing": (b"HEAD /nothing HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    "204": (b"OPTIONS / HTTP/1.1\r\nHost: h\r\n\r\n", 204),
    "304": (b"GET /games HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\n\r\n", 304),
}))
def test_an_answer_has_no_body_and_the_next_one_can_be_read_after(data, status, api):
    with Raw(api, data + GET + END) as raw:
        first, second = raw.answer(head=True), raw.answer()
        assert (first.status, second.status) == (status, 200) and json.loads(second.body)["status"] == "ok"


@pytest.mark.parametrize("data, connection", rows({
    "HTTP/1.1": (GET, None),
    "HTTP/1.1 with keep-alive": (GET + b"Connection: keep-alive\r\n", None),
    "HTTP/1.1 with close": (GET + b"Connection: close\r\n", "close"),
    "HTTP/1.1 with close among others": (GET + b"Connection: Upgrade\r\nconnection: x , CLOSE\r\n", "close"),
    "HTTP/1.0": (b"GET /healthz HTTP/1.0\r\n", "close"),
    "HTTP/1.0 with keep-alive": (b"GET /healthz HTTP/1.0\r\nConnection: Keep-Alive\r\n", "keep-alive"),
}))
def test_whether_a_connection_stays_open_after(data, connection, api):
    with Raw(api, data + END + GET + END) as raw:
        answer = raw.answer()
        assert (answer.status, answer.headers.get("connection")) == (200, connection)
        assert raw.is_closed() if connection == "close" else raw.answer().status == 200


@pytest.mark.parametrize("request_", [register, lambda name, field: chunked(name, [], field) + END + END], ids=["whole", "chunked"])
def test_expect_100_continue_is_answered_before_the_body_is_sent(request_, api, name):
    head, body = request_(name, b"Expect: 100-Continue\r\n").split(b"\r\n\r\n", 1)
    with Raw(api, head + b"\r\n\r\n") as raw:
        assert raw.answer() == (100, {}, b"")
        raw.send(body)
        assert raw.answer().status == 201


@pytest.mark.parametrize("data, status", rows({
    "a body that is too large": (POST + b"Expect: 100-continue\r\nContent-Length: 16385\r\n\r\n", 413),
    "no body": (POST + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n", 400),
    "a chunk that is there": (POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "HTTP/1.0": ((POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}").replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
}))
def test_there_is_no_100_continue_for(data, status, api):
    with Raw(api, data) as raw:
        assert raw.answer().status == status


def test_the_answer_413_reaches_a_client_that_goes_on_to_send_a_megabyte(api):
    with Raw(api, POST + b"Content-Length: 1000000\r\n\r\n") as raw:
        assert select.select([raw.socket], [], [], WAIT)[0]     # the answer is there, but such a client looks for it later
        for _ in range(10):
            raw.send(b"x" * 100_000)
        assert raw.answer().status == 413 and raw.is_closed()


@pytest.mark.parametrize("data", [b"GET / HT", GET, GET + b"X: ", POST + b'Content-Length: 99\r\n\r\n{"name":"half","peerId":"x"}',
                                  CHUNKED + b'1c\r\n{"name":"half","peerId":"x"}\r\n', CHUNKED + b'1c\r\n{"name":"half","peerId":"x"}\r\n0\r\n'],
                         ids=["half a request line", "half a head", "half a field", "half a body", "chunks without a last one", "half the last chunk"])
def test_a_client_that_ends_its_side_is_answered_400_after(data, api):
    with Raw(api, data) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.answer().status == 400 and raw.is_closed() and api.get_game("half").status_code == 404


@pytest.mark.parametrize("data, statuses", [(b"", []), (GET + END, [200]), (b"GET", [408]), (GET, [408]), (POST + b"Content-Length: 20\r\n\r\n{", [408]),
                                            (CHUNKED + b"2\r\n{", [408]), (POST + b"Expect: 100-continue\r\nContent-Length: 20\r\n\r\n", [100, 408])])
def test_a_connection_is_closed_when_its_client_falls_silent(serve, monkeypatch, data, statuses):
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 0.3)
    monkeypatch.setattr(p2pserver, "SEND_TIME", 2 * WAIT)
    with Raw(serve(poll_after=0.5, idle_timeout=1), data) as raw:
        assert [raw.answer().status for _ in statuses] == statuses and raw.is_closed()


def test_an_empty_line_after_a_request_leaves_the_connection_its_whole_idle_time(serve, monkeypatch):
    """Old clients end a body with one (RFC 9112 section 2.2)."""
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 0.2)
    with Raw(serve(), GET + END + b"\r\n") as raw:
        assert raw.answer().status == 200
        raw.socket.settimeout(0.6)
        with pytest.raises(socket.timeout):
            raw.socket.recv(1)


def test_clients_that_vanish_leave_no_error_in_the_log(lines):
    with serving() as api:
        for data in (b"", b"GET", GET, POST + b"Content-Length: 20\r\n\r\n{", GET + END, b"x\r\n\r\n", (GET + END) * 200):
            with Raw(api, data) as raw:
                raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # close() resets
        assert api.call("GET", "/healthz").status_code == 200
    assert not [line for line in lines if not line.startswith("a connection was lost")]


# ---- waiting --------------------------------------------------------------------------------------------------------

def post(path, fields, *more):
    """A POST as bytes, with further lines of head."""
    body = json.dumps(fields).encode()
    return b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: h", b"Content-Length: %d" % len(body), *more, b"", body])


def poll(name, *more, peer=HOST, **fields):
    return post(b"/games/poll", {"name": name, "peerId": peer, "addresses": HERE, **fields}, *more)


WAIT_20 = b"Prefer: wait=20"


def test_a_refusal_after_head_has_its_body(api):
    with Raw(api, b"HEAD /healthz HTTP/1.1\r\nHost: h\r\n\r\n" + b"GET / HTTP/1.1\n\n") as raw:
        assert raw.answer(head=True).status == 200
        assert json.loads(raw.answer().body)["status"] == 400


@pytest.mark.parametrize("peer_id", ["voil\u00e0", "\u00c5", "a b"])
def test_a_bearer_may_be_any_peer_id(api, name, peer_id):
    api.register_game(name, peer_id)
    assert api.delete_by_header(name, f"Bearer {peer_id}").status_code == 204


def is_silent(raw, seconds=0.15):
    """Whether nothing comes. It is the proof that a request waits, so it has to take some time."""
    return not select.select([raw.socket], [], [], seconds)[0]


def waiters(api):
    """How many polls and starts wait."""
    return api.server.registry.counts()["waiting"]


def test_a_poll_that_waits_is_answered_at_once_when_a_guest_comes(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", WAIT_20)) as raw:
        assert is_silent(raw)
        began = time.monotonic()
        api.start_game("castle")
        answer = raw.answer()
        assert answer.status == 200 and len(json.loads(answer.body)["guests"]) == 1 and time.monotonic() - began < 10
        assert answer.headers["preference-applied"] == "wait=20"


def test_a_host_is_told_of_a_guest_before_the_guest_of_the_host(serve):
    """Else the first datagram of the guest would come to a host that does not know it yet."""
    api = serve()
    api.register_game("castle")
    cursor = api.poll_game("castle").json()["cursor"]
    for i in range(50):
        with Raw(api, poll("castle", WAIT_20, after=cursor)) as host:
            wait_until(lambda: waiters(api) == 1)
            assert api.start_game("castle", f"guest {i}").json()["addresses"] and not is_silent(host, 0)
            cursor = json.loads(host.answer().body)["cursor"]


def test_only_the_host_whose_guest_came_is_answered(serve):
    api = serve()
    for name in ("castle", "island"):
        api.register_game(name)
    with Raw(api, poll("castle", WAIT_20)) as castle, Raw(api, poll("island", WAIT_20)) as island:
        wait_until(lambda: waiters(api) == 2)
        api.start_game("castle")
        assert castle.answer().status == 200 and is_silent(island)


def test_a_start_that_waits_is_answered_at_once_when_the_host_has_addresses(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, post(b"/games/start", {"name": "castle", "peerId": GUEST, "addresses": THERE}, WAIT_20)) as raw:
        assert is_silent(raw)
        api.poll_game("castle")
        answer = raw.answer()
        assert (answer.status, json.loads(answer.body)["addresses"], answer.headers["preference-applied"]) == (200, HERE, "wait=20")


@pytest.mark.parametrize("field, applied", [
    (b"Prefer: wait=1", 1), (b"prefer: respond-async, Wait = \"1\"", 1), (b"Prefer: foo; bar, wait=1;x", 1), (b"Prefer: wait=999999", 2),
    (b"Prefer: wait=0", None), (b"Prefer: wait=-1", None), (b"Prefer: wait=x", None), (b"Prefer: await=5", None), (b"Prefer: wait", None), (b"X: wait=1", None),
    (b"Prefer: foo; wait=1", None), (b'Prefer: foo="a, wait=1"', None), (b'Prefer: foo; a="b, wait=1"', None), (b'Prefer: foo="\\", wait=1"', None),
    (b'Prefer: foo="a, wait=2", wait=1', 1), (b'Prefer: foo = "\\"" ; a = ",;" , wait="1"; b="c, wait=2"', 1), (b'Prefer: wait="\\1"', 1),
    (b"Prefer: wait=1, wait=2", 1), (b"Prefer: wait, wait=2", None), (b"Prefer: wait=x, wait=2", None), (b'Prefer: wait="", wait=2', None),
    (b"Prefer: foo\r\nPrefer: wait=1\r\nPrefer: wait=2", 1), (b"Prefer: ,\t, wait\t=\t1 ,", 1), (b'Prefer: foo="a, wait=1', None),
    (b"Prefer: wait=1.0", None), (b"Prefer: wait=1.5", None), (b"Prefer: wait=" + b"9" * 400, 2), (b"Prefer: wait=0x1", None), (b"Prefer: wait=1s", None),
    (b'Prefer: "wait"=1', None), (b"Prefer: wait;a=1", None), (b"Prefer: wait=\xb2", None), (b"Prefer: return=minimal; wait=2; x, handling=lenient, WAIT=1", 1),
])
def test_the_preference_is_read_as_rfc_7240_writes_it(serve, field, applied):
    api = serve(max_wait=2)
    api.register_game("castle")
    api.start_game("castle")        # there is news: it is applied, but nobody has to wait
    with Raw(api, poll("castle", field)) as raw:
        assert raw.answer().headers.get("preference-applied") == (applied and f"wait={applied}")


def test_wait_in_the_body_does_the_same_and_goes_before_the_header(serve):
    api = serve()
    api.register_game("castle")
    api.start_game("castle")
    with Raw(api, poll("castle", WAIT_20, wait=3)) as raw:
        assert raw.answer().headers["preference-applied"] == "wait=3"


@pytest.mark.parametrize("wait", [-1, 1.5, "1", True, [], 2 ** 60])
def test_a_wait_that_is_no_number_of_seconds_is_a_fault(api, name, wait):
    api.register_game(name)
    answer = api.poll_game(name, wait=wait)
    assert answer.status_code == 400 and list(answer.json()["errors"]) == ["wait"]


def test_at_the_deadline_the_answer_is_the_one_without_waiting(serve):
    api = serve()
    api.register_game("castle")
    plain = api.poll_game("castle")
    began = time.monotonic()
    patient = api.poll_game("castle", wait=1)
    assert time.monotonic() - began >= 1
    assert patient.json() == plain.json() and patient.headers["Preference-Applied"] == "wait=1"
    assert "Preference-Applied" not in plain.headers


def test_a_start_at_the_deadline_is_202(serve):
    api = serve()
    api.register_game("castle")
    answer = api.call("POST", "/games/start", {"name": "castle", "peerId": GUEST, "addresses": THERE, "wait": 1})
    assert answer.status_code == 202 and answer.json()["addresses"] == []


def test_an_answer_to_who_waited_leaves_the_connection_open(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", WAIT_20)) as raw:
        wait_until(lambda: waiters(api) == 1)
        api.start_game("castle")
        assert raw.answer().status == 200
        raw.send(GET + END)
        assert raw.answer().status == 200


def test_a_request_behind_one_that_waits_is_answered_after_it(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", WAIT_20)) as raw:
        wait_until(lambda: waiters(api) == 1)
        raw.send(GET + END)
        assert is_silent(raw)
        api.start_game("castle")
        assert b"guests" in raw.answer().body and b"version" in raw.answer().body


def test_a_deleted_game_answers_its_host_with_404_and_a_renamed_one_with_its_name(serve):
    api = serve()
    for name in ("castle", "island"):
        api.register_game(name)
    with Raw(api, poll("castle", WAIT_20)) as castle, Raw(api, poll("island", WAIT_20)) as island:
        wait_until(lambda: waiters(api) == 2)
        api.delete_game("castle")
        api.update_game("island", name="atoll")
        assert castle.answer().status == 404
        answer = island.answer()
        assert answer.status == 200 and json.loads(answer.body)["name"] == "atoll"


def test_shutting_down_answers_all_that_wait(serve):
    api = serve()
    for name in ("castle", "island"):
        api.register_game(name)
    with Raw(api, poll("castle", WAIT_20)) as castle, Raw(api, poll("island", WAIT_20)) as island:
        wait_until(lambda: waiters(api) == 2)
        api.server.stop()
        for raw in (castle, island):
            answer = raw.answer()
            assert answer.status == 200 and answer.headers["connection"] == "close" and raw.is_closed()


def test_a_client_that_hangs_up_waits_no_more(serve):
    api = serve(max_waiting=1)
    api.register_game("castle")
    with Raw(api, poll("castle", WAIT_20)):
        wait_until(lambda: waiters(api) == 1)
    wait_until(lambda: waiters(api) == 0)


def test_where_no_more_can_wait_the_answer_comes_at_once_and_asks_for_patience(serve):
    api = serve(max_waiting=1)
    for name in ("castle", "island"):
        api.register_game(name)
    with Raw(api, poll("castle", WAIT_20)):
        wait_until(lambda: waiters(api) == 1)
        answer = api.poll_game("island", wait=20)
        assert answer.status_code == 200 and answer.json()["pollAfter"] > 2 and "Preference-Applied" not in answer.headers
        assert refused(api, "waiting") == 1


@pytest.mark.parametrize("poll_after", [1.0, 3.9])
def test_who_obeys_a_server_that_has_no_place_to_wait_does_not_expire(poll_after, serve):
    api = serve(game_ttl=4.0, guest_ttl=4.0, poll_after=poll_after, max_waiting=0)
    api.register_game("castle")
    for answer in (api.poll_game("castle", wait=20, addresses=[]).json(), api.start_game("castle", wait=20).json()):
        assert poll_after <= answer["pollAfter"] < answer["expiresIn"]


def test_after_a_poll_that_waited_to_its_deadline_the_connection_goes_on(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", b"Prefer: wait=1")) as raw, Raw(api, poll("castle", b"Prefer: wait=1") + GET + END) as pipelining:
        for each in (pipelining, raw):
            assert each.answer().status == 200
        raw.send(GET + END)
        assert raw.answer().status == 200 and pipelining.answer().status == 200


def test_a_poll_that_waits_and_asked_to_close_is_answered_though_more_bytes_come(serve):
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", WAIT_20, b"Connection: close")) as raw:
        wait_until(lambda: waiters(api) == 1)
        raw.send(b"\r\n")
        assert is_silent(raw)
        api.start_game("castle")
        assert raw.answer().status == 200 and raw.is_closed()


def test_a_poll_whose_body_came_in_many_pieces_is_answered_after_it_has_waited(serve):
    """As segments of TCP bring a long one."""
    api = serve()
    api.register_game("castle")
    data = poll("castle", ignored="x" * 30_000, wait=20)
    with Raw(api) as raw:
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for start in range(0, len(data), 1000):
            raw.send(data[start:start + 1000])
            time.sleep(0.005)       # so that the server reads most of them alone
        wait_until(lambda: waiters(api))
        api.start_game("castle")
        answer = raw.answer()
        assert answer.status == 200 and len(json.loads(answer.body)["guests"]) == 1


def test_a_poll_that_a_second_one_has_replaced_is_told_not_to_follow_at_once_and_the_second_waits(serve):
    api = serve()
    api.register_game("castle")
    data = poll("castle", b"Prefer: wait=25")       # longer than the test waits
    with Raw(api, data) as first, Raw(api, data) as second:
        wait_until(lambda: not is_silent(first, 0) or not is_silent(second, 0))
        replaced, waits = (second, first) if is_silent(first, 0) else (first, second)
        answer = replaced.answer()
        assert answer.status == 200 and "preference-applied" not in answer.headers and json.loads(answer.body)["pollAfter"] > 2
        assert is_silent(waits) and metrics(api)["waiting",] == 1


@pytest.mark.parametrize("wait", [0, 1])
def test_an_answer_tells_of_replies_also_after_a_wait(wait, serve):
    api = serve()
    api.register_game("castle")
    assert api.poll_game("castle", replies={}, wait=wait).json()["gone"] == []


@pytest.mark.parametrize("early", [b"x", b"\r\n"])
def test_a_client_that_dribbles_behind_its_own_waiting_poll_is_cut_off(early, serve):
    """Each piece makes the server look at the poll again."""
    api = serve()
    api.register_game("castle")
    with Raw(api, poll("castle", b"Prefer: wait=25")) as raw, contextlib.suppress(ConnectionError):
        for _ in range(1000):
            raw.send(early)
            if not is_silent(raw, 0.005):
                break
        assert raw.is_closed()
    wait_until(lambda: metrics(api)["waiting",] == 0)


def test_a_refusal_of_what_cannot_be_read_is_counted_by_its_limit(serve, clock):
    api = serve()
    limited(api, clock, 0.01, 10)
    junk = [ask(api, "127.0.0.1", b"x\r\n\r\n").status for _ in range(12)]
    assert junk == [400] * 10 + [429] * 2
    limited(api, clock, 0, 10)
    assert refused(api, "rate") == 2


def test_a_client_behind_a_proxy_pays_for_what_cannot_be_read_to_its_end(serve, clock):
    api = serve(trusted_proxies="127.0.0.1")
    limited(api, clock, 0.01, 10)
    large = POST + b"X-Forwarded-For: 203.0.113.9\r\nContent-Length: 99999\r\n\r\n"
    assert [ask(api, "127.0.0.1", large).status for _ in range(11)] == [413] * 10 + [429]


def test_a_proxy_does_not_pay_for_what_its_clients_send_and_cannot_be_read(serve, clock):
    api = serve(trusted_proxies="127.0.0.1")
    limited(api, clock, 0.01, 10)
    assert [ask(api, "127.0.0.1", b"x\r\n\r\n").status for _ in range(12)] == [400] * 12
    assert ask(api, "127.0.0.1", LIST + END).status == 200


def test_no_answer_is_lost_when_connections_are_woken_and_closed_while_they_begin_to_wait(serve, hasty_threads):
    api = serve(max_guests=10_000)
    for i in range(4):
        api.register_game(f"game {i}")

    def host_and_guest(i):
        client, chance = Api(api.server), random.Random(i)
        for round in range(20):
            with Raw(api, poll(f"game {i}", WAIT_20, b"Connection: close", after=cursors[i])) as raw:
                time.sleep(chance.random() * 0.002)
                client.start_game(f"game {i}", peer=f"guest {round}")
                answer = raw.answer()
                assert answer.status == 200
                cursors[i] = json.loads(answer.body)["cursor"]
        return True

    cursors = [0] * 4
    assert in_threads(4, host_and_guest) == [True] * 4
    assert api.get_game("game 0").ok and waiters(api) == 0


def test_polls_that_wait_need_no_threads(serve):
    api = serve()
    before = metrics(api)["threads",]
    with contextlib.ExitStack() as stack:
        for i in range(100):
            api.register_game(f"game {i}")
        hosts = [stack.enter_context(Raw(api, poll(f"game {i}", WAIT_20))) for i in range(100)]
        wait_until(lambda: waiters(api) == 100)
        assert metrics(api)["threads",] == before
        for i, host in enumerate(hosts):
            assert api.start_game(f"game {i}").status_code == 200
            assert host.answer().status == 200


def test_no_news_is_lost_between_a_poll_and_its_waiting(serve, hasty_threads):
    api = serve(max_guests=1000)
    api.register_game("castle")
    seen, rounds, times = [], 60, []

    def host():
        cursor, client = None, Api(api.server)
        while len(seen) < rounds:
            began = time.monotonic()
            answer = client.poll_game("castle", wait=15, **({} if cursor is None else {"after": cursor})).json()
            times.append(time.monotonic() - began)
            cursor = answer["cursor"]
            seen.extend(answer["guests"])

    thread = threading.Thread(target=host)
    thread.start()
    for i in range(rounds):
        api.start_game("castle", peer=f"guest {i}")
        if i % 20 == 0:
            wait_until(lambda sent=i: len(seen) > sent)       # it came without the next start
    thread.join(WAIT)
    assert len({guest["sessionId"] for guest in seen}) == rounds and max(times) < 15, "no poll waited to its deadline"


# ---- slow and greedy clients ----------------------------------------------------------------------------------------

def test_without_a_thread_to_be_had_all_is_served(serve, monkeypatch):
    """Nothing short of running out of threads makes the system refuse one; the start of a thread is what is doubled here."""
    api = serve()
    api.register_game("castle")

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(threading.Thread, "start", refuse)
        raws = [stack.enter_context(Raw(api, LIST + END)) for _ in range(50)]
        assert [raw.answer().status for raw in raws] == [200] * 50
        assert api.list_games().ok and api.poll_game("castle", wait=1).ok


@pytest.mark.parametrize("begun", [b"", b"GET", GET, POST + b"Content-Length: 20\r\n\r\n{"], ids=["nothing", "line", "head", "body"])
def test_clients_that_are_slow_do_not_stop_others(serve, begun):
    api = serve()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(api, begun)) for _ in range(50)]
        assert api.list_games().status_code == 200
        for raw in slow:
            raw.send(GET + END if not begun else b" /healthz HTTP/1.1\r\nHost: h\r\n\r\n" if begun == b"GET" else END if begun == GET else b" " * 18 + b"}")
        assert {raw.answer().status for raw in slow} <= {200, 400}


def test_a_client_that_never_stops_asking_does_not_keep_others_waiting(serve):
    api = serve()
    stop = threading.Event()
    with Raw(api) as greedy:
        def ask():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    greedy.send((GET + END) * 100)

        def read():
            with contextlib.suppress(OSError, ValueError):
                while greedy.stream.read(65536):
                    pass

        threads = [threading.Thread(target=work) for work in (ask, read)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with Raw(api, GET + END) as raw:
                assert raw.answer().status == 200
        stop.set()
        greedy.socket.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(WAIT)


def test_a_request_that_does_not_come_in_time_is_refused(serve, monkeypatch):
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 0.3)
    api = serve()
    with Raw(api, GET) as raw:
        assert raw.answer().status == 408 and raw.is_closed()


@pytest.mark.parametrize("pause", [0.05, 0.001])
def test_time_for_a_request_runs_from_its_first_byte_however_many_follow(serve, monkeypatch, pause):
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 0.5)
    api = serve()
    with Raw(api, b"GET /healthz HTTP/1.1\r\nX: ") as raw:
        began = time.monotonic()
        while is_silent(raw, pause):
            assert time.monotonic() - began < WAIT, "its time begins anew with each byte"
            raw.send(b"x")
        assert raw.answer().status == 408


def many_guests(api):
    """Give the game castle so many guests that no poll of theirs is sent at once."""
    api.register_game("castle")
    for i in range(500):
        api.server.registry.start_game("castle", b"guest %d" % i, json.dumps(["x" * 500] * 16).encode())


@pytest.mark.parametrize("is_slow", [False, True], ids=["at once", "slowly"])
def test_the_time_for_a_request_is_over_also_behind_an_answer_that_is_read(is_slow, serve, monkeypatch):
    """It begins when the request gets its turn at the latest: when the answer before it has been sent."""
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 0.3)
    monkeypatch.setattr(p2pserver, "SEND_TIME", 2 * WAIT)
    api = serve(max_guests=500)
    many_guests(api)
    with (Deaf if is_slow else Raw)(api, poll("castle") + b"GET /") as raw:
        assert len(json.loads(raw.answer().body)["guests"]) == 500
        assert raw.answer().status == 408 and raw.is_closed()


def test_a_connection_may_be_idle_for_idle_timeout_also_after_an_answer_that_was_read_slowly(serve, monkeypatch):
    monkeypatch.setattr(p2pserver, "SEND_TIME", 0.5)
    api = serve(max_guests=500)
    many_guests(api)
    with Deaf(api, poll("castle")) as raw:
        assert len(json.loads(raw.answer().body)["guests"]) == 500 and is_silent(raw, 1.5)
        raw.send(GET + END)
        assert raw.answer().status == 200


@pytest.mark.parametrize("value", ["," * 32000, "a" * 32000 + '"', '"' * 32000, '\\"' * 16000, '"\\' * 16000, 'a="' * 10000, " " * 32000 + '"', ";" * 32000,
                                   "wait= " * 6000], ids=brief)
def test_a_long_preference_is_harmless(value):
    for _ in range(20):     # which would take minutes if the pattern went back and forth
        assert p2pserver.wished_wait(None, {"prefer": value}, 25) == 0


@pytest.mark.parametrize("head", [b"X-Forwarded-For: " + b"," * 32000, b"Connection: " + b"," * 32000,
                                  b"If-None-Match: " + b"," * 32000, b"\r\n" * 500 + b"X: x"], ids=lambda head: brief(head[:12]))
def test_a_long_list_in_the_head_is_harmless(head, serve):
    api = serve(trusted_proxies="127.0.0.1")
    data = b"\r\n" * 500 + GET + END if head.startswith(b"\r\n") else GET + head + b"\r\n\r\n"
    with Raw(api, data + GET + END) as raw:
        assert [raw.answer().status for _ in range(2)] == [200, 200]


class Deaf(Raw):
    """A client that reads nothing of its answers, at first: the system takes in next to nothing for it, and the server has to keep the rest."""

    def __init__(self, api, data):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(WAIT)
        self.socket.connect(("127.0.0.1", api.port))
        self.stream = self.socket.makefile("rb")
        self.send = self.socket.sendall
        self.send(data)
        assert not is_silent(self, WAIT)


def test_a_client_that_does_not_read_is_cut_off_and_stops_nobody(serve, monkeypatch):
    monkeypatch.setattr(p2pserver, "SEND_TIME", 0.3)
    api = serve()
    for i in range(40):
        api.register_game(f"game {i}", info={"text": "x" * 1000})
    with Deaf(api, (LIST + END) * 300):     # 12 MB of answers
        assert api.get_game("game 1").status_code == 200
        wait_until(lambda: metrics(api)["connections",] <= 2)       # ours, and that of metrics


def test_of_an_answer_that_its_client_does_not_read_nothing_is_kept(serve, monkeypatch):
    """Not even until Python looks for cycles: it counts objects, and an answer is one, of however many megabytes."""
    monkeypatch.setattr(p2pserver, "SEND_TIME", 0.3)
    api = serve(max_guests=500)
    many_guests(api)
    gc.disable()
    try:
        with Deaf(api, poll("castle")):
            kept = weakref.WeakSet(wait_until(lambda: [each for each in list(api.server.connections) if each.events == p2pserver.WRITE]))
            wait_until(lambda: not kept & api.server.connections)
            wait_until(lambda: not kept)
    finally:
        gc.enable()


# ---- authorisation --------------------------------------------------------------------------------------------------

WRONG = {
    "the guest's": GUEST, "another host's": OTHER, "a blank": " ", "all but its last character": HOST[:-1], "one character more": HOST + "x",
    "another case": HOST.upper(), "a blank after it": HOST + " ", "the sessionId": "sessionId", "the sessionKey": "sessionKey",
    "nothing": "", "null": None, "true": True, "zero": 0, "a list of it": [HOST], "an object": {"peerId": HOST}, "too long": HOST * 10,
    "NUL after it": HOST + "\0",
}
EVIL = ["203.0.113.66:6666"]
AUTHORISED = {
    "register": lambda api, name, peer, session: api.register_game(name, peer, info={"evil": 1}, listed=False),
    "poll": lambda api, name, peer, session: api.poll_game(name, peer, EVIL),
    "poll with replies": lambda api, name, peer, session: api.poll_game(name, peer, replies={session["sessionId"]: EVIL}),
    "rename": lambda api, name, peer, session: api.update_game(name, peer, name=name + " stolen"),
    "describe": lambda api, name, peer, session: api.update_game(name, peer, info={"evil": 1}),
    "unlist": lambda api, name, peer, session: api.update_game(name, peer, "PUT", listed=False),
    "delete": lambda api, name, peer, session: api.delete_game(name, peer),
}


def state(api, name):
    """All that host, guest and public can see of a game."""
    listed = [game for game in api.list_games().json()["games"] if game["name"] in (name, name + " stolen")]
    return listed, api.get_game(name).json(), api.poll_game(name).json(), api.start_game(name).json()


def begin(api, name):
    """Register a game with a guest, whose session is returned with the state."""
    api.register_game(name)
    api.poll_game(name)
    return api.start_game(name).json(), state(api, name)


@pytest.mark.parametrize("peer", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("operation", AUTHORISED, ids=AUTHORISED)
def test_a_wrong_peer_id_changes_nothing(operation, peer, api, name):
    session, before = begin(api, name)
    peer = session[peer] if peer in ("sessionId", "sessionKey") else peer
    answer = AUTHORISED[operation](api, name, peer, session)
    bad = not isinstance(peer, str) or not 0 < len(peer) <= 128 or "\0" in peer
    assert answer.status_code == (400 if bad else 409 if operation == "register" else 403)
    assert state(api, name) == before and not {"guests", "sessionKey", "cursor"} & set(answer.json())


@pytest.mark.parametrize("token", [GUEST, OTHER, HOST[:-1], HOST + "x", HOST.upper(), f'"{HOST}"', f"{HOST}, {HOST}"])
def test_a_wrong_bearer_deletes_nothing(token, api, name):
    _, before = begin(api, name)
    assert api.delete_by_header(name, f"Bearer {token}").status_code == 403 and state(api, name) == before


def test_a_peer_id_elsewhere_than_in_the_body_does_not_stand_in_for_the_one_in_it(api, name):
    api.register_game(name)
    path, headers = path_of(name) + "?" + urllib.parse.urlencode({"peerId": HOST}), {"Authorization": f"Bearer {HOST}"}
    assert [api.call("DELETE", path, body, headers=headers).status_code for body in ({"peerId": OTHER}, {})] == [403, 400]
    assert api.call("DELETE", path).status_code == 400
    assert api.get_game(name).status_code == 200


def test_another_guests_start_never_gets_the_first_guests_session(api, name):
    api.register_game(name)
    first = api.start_game(name).json()
    for peer in (OTHER, first["sessionId"], first["sessionKey"], GUEST + " "):
        second = api.start_game(name, peer).json()
        assert not {first["sessionId"], first["sessionKey"]} & {second["sessionId"], second["sessionKey"]}


# ---- secrets and log ------------------------------------------------------------------------------------------------

def test_no_secret_is_in_any_log_line_or_in_an_answer_to_anybody_else(lines):
    """Everything that can be asked, also wrongly, also with peerIds in places where they do not belong."""
    host, guest, other, broken, answers, clock = "hosts-secret", "guests-secret", "strangers-secret", [], [], Clock()

    def new_id():
        if broken:
            raise RuntimeError("no id")
        return p2pserver.new_session_id()

    with serving(clock, new_id, access_log=True) as api:
        def ask(who, *calls):
            answers.extend((who, f"{call.status_code} {call.headers} {call.text}") for call in calls)

        ask("host", api.register_game("g", host, info={"map": "ice"}))
        joined = api.start_game("g", guest)
        key = joined.json()["sessionKey"]
        ask("guest", joined)
        ask("host", api.poll_game("g", host, replies={"gone": []}), api.start_game("g", host))
        ask("guest", api.start_game("g", guest))
        ask("other", *(call("g", other) for call in (api.register_game, api.poll_game, api.update_game, api.delete_game, api.start_game)))
        ask("other", api.register_game("h", other))
        ask("host", api.update_game("g", host, name="h"), api.update_game("g", host, name="i", info={"x": 1}), api.poll_game("i", host))
        ask("other", *(api.call("GET", path) for path in ("/games", "/games/i", "/healthz", "/", "/nothing", "/games/poll")))
        for data in (b'{"peerId": "%s", ', b'{"peerId": "%s", "peerId": 1}', b'{"peerId": "%s"}x', b'["%s"]', b'"%s"', b'{"peerId": "%s\\n"}',
                     b'{"peerId": ["%s"], "name": 1}', b'{"peerId": "%s", "x": NaN}', b'{"peerId": "%s", "x": "\xff"}',
                     b'{"peerId": "%s", "x": "\\ud800"}', b'%s', b'%s' + b"x" * 70000):
            ask("host", api.call("POST", "/games/poll", data=data % host.encode()))
        ask("host", api.call("POST", "/games/poll", data=host, headers={"Content-Type": "text/plain"}), api.call("DELETE", f"/games/i?peerId={host}"),
            api.call("GET", f"/nothing?{host}"), api.call("BREW", f"/games?{host}", data=host), api.delete_by_header("i", f"Basic {host}"))
        for data in (b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %s\0\r\n\r\n", b"DELETE /games/i?%s HTTP/3.0\r\n\r\n",
                     b"POST /games/poll?%s HTTP/1.1\r\nHost: h\r\n\r\n", b"GET /?%s" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
                     b"GET /?%s HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n"):
            with Raw(api, data % host.encode()) as raw:
                raw.socket.shutdown(socket.SHUT_WR)
                answers.append(("host", repr(raw.answer())))
        broken.append(True)
        ask("guest", api.start_game("i", guest + "2"))
        ask("host", api.delete_by_header("i", f"Bearer {host}"), api.register_game("j", host))
        clock.tick(60)
        wait_until(lambda: any("expire_game 'j'" in line for line in lines))
    assert {text[:3] for _, text in answers} >= {"200", "201", "202", "204", "400", "403", "404", "405", "409", "413", "415", "500", "501"}
    assert any("RuntimeError" in line for line in lines) and len(lines) > len(answers) > 40
    for secret, knowing in ((host, ()), (guest, ()), (other, ()), (key, ("host", "guest"))):
        assert [line for line in lines if secret in line] == []
        assert [text for who, text in answers if secret in text and who not in knowing] == []


def test_a_head_with_a_secret_is_not_kept_for_the_next_request(api, name):
    """A client's other heads are, so that they need not be read anew."""
    api.register_game(name)
    with Raw(api) as raw:
        for field in (b"X-Plain: kept-for-the-next", b"Authorization: Bearer hidden-secret", b"aUTHORIZATION:Bearer hidden-secret"):
            raw.send(b"DELETE " + path_of(name).encode() + b" HTTP/1.1\r\nHost: h\r\n" + field + b"\r\n\r\n")
            raw.answer()
    kept = b"".join(each for each in reachable(p2pserver.parse_head) if isinstance(each, bytes))
    assert b"kept-for-the-next" in kept and b"hidden-secret" not in kept


def test_each_thing_that_happens_to_a_game_is_one_line_and_nothing_else_is(serve, clock, lines):
    api = serve(clock)
    for _ in range(2):
        for call in (api.register_game, api.poll_game, api.start_game, api.get_game):
            call("g")
        api.list_games()
    api.update_game("g", name="h")
    api.delete_game("h")
    api.register_game("i")
    wait_until(lambda: len(lines) == 6)
    clock.tick(60)
    wait_until(lambda: len(lines) == 7)
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        "register_game 'g'", "poll_game 'g'", "start_game 'g'", "update_game 'g'", "delete_game 'h'", "register_game 'i'", "expire_game 'i'"]
    assert lines[3].endswith("renamed to 'h'")


def test_an_event_quotes_its_name_in_one_printable_line(serve, lines):
    api = serve()
    names = [api.register_game(name).json()["name"] for name in NAMES]
    wait_until(lambda: len(lines) == len(names))
    for line, name in zip(lines, names):
        _, operation, quoted = line.split(" ", 2)
        assert line.isprintable() and (operation, ast.literal_eval(quoted)) == ("register_game", name)


def test_an_event_tells_its_client_at_debug_level_and_at_no_other(serve, clock, lines):
    """By client key, so that one can see whose limits it counts for."""
    api = serve(clock, trusted_proxies="127.0.0.1")
    for level, expected in ((logging.DEBUG, ["203.0.113.1 register_game", "2001:db8:1:200:: start_game", ":: start_game", "203.0.113.1 poll_game",
                                             "203.0.113.1 expire_game"]),
                            (logging.INFO, ["register_game", "start_game", "start_game", "poll_game", "expire_game"])):
        lines.clear()
        p2pserver.log.setLevel(level)
        api.call("POST", "/games/register", {"name": "g", "peerId": HOST}, headers={"X-Forwarded-For": "203.0.113.1"})
        for peer, client in ((GUEST, "2001:db8:1:2ff::1"), (OTHER, "junk")):
            api.call("POST", "/games/start", {"name": "g", "peerId": peer, "addresses": THERE}, headers={"X-Forwarded-For": client})
        api.poll_game("g")
        wait_until(lambda: any("poll_game" in line for line in lines))
        clock.tick(60)
        wait_until(lambda: any("expire_game" in line for line in lines))
        assert [line.split(" 'g'")[0] for line in lines] == expected


@pytest.mark.parametrize("access_log", [False, True])
def test_requests_are_logged_without_their_query_and_only_where_access_log_is(access_log, serve, lines):
    api = serve(access_log=access_log)
    for method, path in (("GET", "/healthz?x"), ("POST", "/games/a%0Ab"), ("BREW", "/")):
        api.call(method, path)
    expected = ["127.0.0.1 GET '/healthz' 200 ", "127.0.0.1 POST '/games/a%0Ab' ", "127.0.0.1 BREW '/' 501 "] if access_log else []
    wait_until(lambda: len(lines) >= len(expected))
    assert len(lines) == len(expected) and all(line.startswith(beginning) for line, beginning in zip(lines, expected))


def test_refusals_are_a_line_for_each_limit_once_a_minute_with_their_count(serve, lines):
    api = serve(max_games=1, max_guests=1)
    api.register_game("game 0")
    api.start_game("game 0")
    said = []

    def is_told(words):
        return any(line.endswith(words) for line in lines)

    def told():
        return [line for line in lines if line.startswith("limit")]

    for i, refused in enumerate((3, 0, 2)):
        assert [api.register_game(f"other {j}").status_code for j in range(refused)] == [503] * refused
        assert api.start_game(f"game {i}", OTHER).status_code == 503
        for old, new in ((f"game {i}", f"meanwhile {i}"), (f"meanwhile {i}", f"game {i + 1}")):
            api.update_game(old, name=new)
            wait_until(functools.partial(is_told, f"renamed to {new!r}"))       # so the server has looked at what is due
            assert told() == said, "the minute is not over"
        api.server.next_report = 0.0
        said = [*said, *[f"limit games: {refused} refused"] * bool(refused), "limit guests: 1 refused"]
        wait_until(functools.partial(lambda count: len(told()) == count, len(said)))
        assert told() == said
    api.register_game("other")
    api.server.stop()
    assert told() == [*said, "limit games: 1 refused"], "what is left is told in the end"


# ---- concurrency ----------------------------------------------------------------------------------------------------

def test_nothing_is_lost_or_double_when_32_clients_register_poll_and_start_at_once(serve):
    """Each hosts a game and is a guest of its next four neighbours, twice; each host polls by cursor until it has seen its four."""
    shared, registered = serve(), threading.Barrier(32)

    def work(i):
        api, guests, cursors = Api(shared.server), [], [0]
        with api.session:
            assert api.register_game(f"g{i}", f"host {i}").status_code == 201
            registered.wait(WAIT)
            joined = [api.start_game(f"g{(i + k) % 32}", f"guest {i}", [f"from {i}"]).json() for k in (1, 2, 3, 4, 1, 2, 3, 4)]
            deadline = time.monotonic() + WAIT
            while len(guests) < 4 and time.monotonic() < deadline:
                body = api.poll_game(f"g{i}", f"host {i}", [f"at {i}"], after=cursors[-1]).json()
                guests += body["guests"]
                cursors.append(body["cursor"])
        return joined, guests, cursors

    results = in_threads(32, work)
    given = {(game["name"], game["sessionId"], game["sessionKey"]) for joined, _, _ in results for game in joined}
    seen = [(f"g{i}", guest["sessionId"], guest["sessionKey"]) for i, (_, guests, _) in enumerate(results) for guest in guests]
    assert set(seen) == given and len(given) == len(seen) == len({session for _, session, _ in given}) == len({key for _, _, key in given}) == 128
    assert all(cursors == sorted(cursors) for _, _, cursors in results)
    for i, (_, guests, _) in enumerate(results):
        assert sorted(guest["addresses"] for guest in guests) == sorted([f"from {(i - k) % 32}"] for k in (1, 2, 3, 4))
    listed = shared.list_games().json()["games"]
    assert sorted((game["name"], game["guests"], game["ready"]) for game in listed) == sorted((f"g{i}", 4, True) for i in range(32))


# ---- limits for each client -----------------------------------------------------------------------------------------

def limited(api, clock, rate, burst):
    """Give a server a limiter that goes by a test's clock."""
    api.server.limiter = p2pserver.RateLimiter(rate, burst, clock)


def ask(api, source, data=GET + END, connection=None):
    """The answer to a client at another address of loopback."""
    with (connection or Raw)(api, data, source) as raw:
        return raw.answer()


def metrics(api, connection=None):
    """What GET /metrics gives, by name and labels. Who asks is a client that no test has otherwise."""
    text = ask(api, "127.0.0.99", b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n", connection).body.decode()
    samples = re.findall(r"^p2pserver_(\w+)(?:{(.*)})? (\S+)$", text, re.MULTILINE)
    return {(name, *re.findall('="(.*?)"', labels)): float(value) for name, labels, value in samples}


def refused(api, limit, connection=None):
    return metrics(api, connection)["refused_total", limit]


def test_a_client_has_its_burst_and_then_its_rate_and_is_told_when_to_come_again(serve, clock):
    api = serve()
    limited(api, clock, 0.5, 20)
    assert [api.list_games().status_code for _ in range(20)] == [200] * 20
    answer = api.list_games()
    assert (answer.status_code, answer.headers["Retry-After"], answer.headers["Content-Type"]) == (429, "2", "application/problem+json")
    assert answer.json()["detail"] == "too many requests come from your address" and refused(api, "rate") == 1
    clock.tick(2)
    assert [api.list_games().status_code for _ in range(2)] == [200, 429]


def test_a_client_that_asks_too_much_takes_nothing_from_others(serve, clock):
    api = serve()
    limited(api, clock, 1, 10)
    assert [ask(api, "127.0.0.1", LIST + END).status for _ in range(12)] == [200] * 10 + [429] * 2
    assert ask(api, "127.0.0.2", LIST + END).status == 200


def test_what_is_refused_for_the_rate_changes_nothing(serve, clock):
    api = serve()
    limited(api, clock, 1, 10)
    assert [api.register_game(f"game {i}").status_code for i in range(11)] == [201] * 10 + [429]
    assert api.server.registry.counts()["games"] == 10


def test_a_rate_of_zero_is_no_limit(serve):
    api = serve(rate=0.0, burst=10)
    with Raw(api, (LIST + END) * 300) as raw:
        assert [raw.answer().status for _ in range(300)] == [200] * 300


@pytest.mark.parametrize("guess, status", rows({
    "poll": (lambda api: api.poll_game("castle", OTHER), 403),
    "describe": (lambda api: api.update_game("castle", OTHER, info={}), 403),
    "delete": (lambda api: api.delete_game("castle", OTHER), 403),
    "register": (lambda api: api.register_game("castle", OTHER), 409),
}))
def test_a_guess_at_a_peer_id_costs_as_much_as_ten_requests(guess, status, serve, clock):
    api = serve()
    api.register_game("castle")
    limited(api, clock, 1, 100)
    assert [guess(api).status_code for _ in range(11)] == [status] * 10 + [429]
    clock.tick(9)
    assert guess(api).status_code == status, "there is a token for it"
    clock.tick(1)
    assert guess(api).status_code == 429, "the tenth is still owed"


def test_a_client_has_no_more_games_than_max_games_per_client(serve):
    api = serve(max_games_per_client=2)
    assert [api.register_game(f"game {i}").status_code for i in range(2)] == [201, 201]
    answer = api.register_game("game 2")
    assert (answer.status_code, answer.json()["detail"]) == (429, "your address has 2 games, which is all that one may have")
    assert int(answer.headers["Retry-After"]) > 0 and refused(api, "games_per_client") == 1
    assert api.register_game("game 0").status_code == 200, "what is there already is no new one"
    assert ask(api, "127.0.0.2", post(b"/games/register", {"name": "another's", "peerId": OTHER})).status == 201
    assert api.delete_game("game 0").ok and api.register_game("game 2").status_code == 201


def test_a_connection_of_a_client_over_its_rate_is_closed(serve, clock):
    """Else each request that it sent ahead could have a refusal, and the work of all these would be others' loss."""
    api = serve()
    limited(api, clock, 5, 10)
    with Raw(api, (LIST + END) * 20) as raw:
        answers = [raw.answer() for _ in range(11)]
        assert [answer.status for answer in answers] == [200] * 10 + [429]
        assert answers[-1].headers["connection"] == "close" and raw.is_closed() and refused(api, "rate") == 1
    clock.tick(1)
    assert ask(api, "127.0.0.1", LIST + END).status == 200


@pytest.mark.parametrize("data, status", rows({
    "a good request": (LIST + END, 200), "a malformed one": (b"GET\r\n\r\n", 400), "one for nothing": (b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n", 404),
}))
def test_a_token_is_the_price_of(data, status, serve, clock):
    api = serve()
    limited(api, clock, 1, 10)
    assert [ask(api, "127.0.0.1", data).status for _ in range(11)] == [status] * 10 + [429]
    for target in (b"/healthz", b"/healthz/", b"http://castle.example/healthz?x"):
        assert ask(api, "127.0.0.1", b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target).status == 200, "a monitor is never refused"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_list_costs_a_token_more_for_each_16_kb_of_it_also_if_it_is_made_for_its_head_alone(method, serve, clock):
    api = serve()
    for i in range(40):
        api.register_game(f"game {i}", info={"x": "x" * 1000})
    assert 2 * 16384 < len(api.list_games().content) < 3 * 16384
    limited(api, clock, 1, 10)
    # What is left before each: 10, 7, 4, 1, and none.
    assert [api.call(method, "/games").status_code for _ in range(5)] == [200] * 4 + [429]


@pytest.mark.parametrize("burst, status", [(24, 200), (23, 429)])
def test_each_read_beyond_the_eighth_costs_a_token(burst, status, serve, clock):
    """One is for the head, thirty for a byte each of the body; and one token more is for the request."""
    api = serve()
    limited(api, clock, 1, burst)
    with Raw(api, LIST + b"Content-Length: 30\r\n" + END) as raw, Raw(api) as other:
        for _ in range(30):
            for _ in range(2):      # when these are answered the server has read what came before
                other.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                assert other.answer().status == 200
            with contextlib.suppress(OSError):
                raw.send(b"x")
        assert raw.answer().status == status


def test_reads_of_empty_lines_before_a_request_cost_tokens_also_if_the_client_sends_them_faster_than_they_are_read(serve, clock, monkeypatch):
    monkeypatch.setattr(p2pserver, "READ_SIZE", 64)
    api = serve()
    limited(api, clock, 1, 10)
    with Raw(api, END * 1600 + LIST + END) as raw:
        assert raw.answer().status == 429


@pytest.mark.parametrize("chunks, requests_", [(1, 10), (200, 5), (900, 1)])
def test_many_small_chunks_cost_a_token_for_each_512_bytes_of_their_framing(chunks, requests_, serve, clock):
    api = serve()
    limited(api, clock, 1, 10)
    data = CHUNKED.replace(b"POST /games/register", b"GET /games") + b"1\r\nx\r\n" * chunks + LAST
    assert [ask(api, "127.0.0.1", data).status for _ in range(requests_ + 1)] == [200] * requests_ + [429]


def test_a_client_has_no_more_guests_in_a_game_than_max_guests_per_client(serve):
    """Else one could keep all others out of a game."""
    api = serve(max_guests_per_client=2)
    for game in ("castle", "tower"):
        api.register_game(game)
        assert [api.start_game(game, f"guest {i}").status_code for i in range(3)] == [202, 202, 429]
    assert refused(api, "guests_per_client") == 2 and api.start_game("castle", "guest 0").status_code == 202, "who is there stays"
    assert ask(api, "127.0.0.2", post(b"/games/start", {"name": "castle", "peerId": OTHER, "addresses": THERE})).status == 202


def test_a_handshake_counts_as_a_request(secure, clock):
    api = secure()
    limited(api, clock, 1, 10)
    for _ in range(5):
        with Tls(api, LIST + END) as tls:
            assert tls.answer().status == 200
    with pytest.raises(OSError):
        Tls(api)
    assert refused(api, "rate", Tls) == 1


def test_games_that_are_gone_no_longer_count_for_their_client(clock):
    registry = Registry(Settings(max_games_per_client=1), clock)
    for end in (lambda: registry.delete_game("castle", BY_HOST), lambda: clock.tick(61)):
        registry.register_game("castle", BY_HOST, client=b"me")
        with pytest.raises(p2pserver.TooMany):
            registry.register_game("tower", BY_HOST, client=b"me")
        end()
    registry.register_game("tower", BY_HOST, client=b"me")


def test_connections_beyond_max_connections_are_refused_and_those_that_there_are_go_on(serve):
    api = serve(max_connections=3)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(api, GET + END)) for _ in range(3)]
        assert [raw.answer().status for raw in raws] == [200] * 3
        with Raw(api, GET + END) as more:
            answer = more.answer()
            assert (answer.status, json.loads(answer.body)["detail"]) == (503, "there are too many connections") and more.is_closed()
            assert int(answer.headers["retry-after"]) > 0
        raws[0].send(GET + END)
        assert raws[0].answer().status == 200
        raws.pop().__exit__()
        wait_until(lambda: ask(api, "127.0.0.1").status == 200)
        assert wait_until(lambda: metrics(api).get(("refused_total", "connections")))


def test_one_client_cannot_have_all_connections(serve):
    api = serve(max_connections_per_client=3)
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(api, GET + END)) for _ in range(3)]
        assert [raw.answer().status for raw in raws] == [200] * 3
        assert ask(api, "127.0.0.1").status == 429 and refused(api, "connections_per_client") == 1
        assert ask(api, "127.0.0.2").status == 200
    wait_until(lambda: ask(api, "127.0.0.1").status == 200)


def test_a_trusted_proxy_may_have_more_connections_than_a_client(serve):
    api = serve(max_connections_per_client=1, trusted_proxies="127.0.0.1")
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(api, GET + END)) for _ in range(5)]
        assert [raw.answer().status for raw in raws] == [200] * 5


def test_far_too_many_connections_are_closed_without_a_word(serve, monkeypatch):
    monkeypatch.setattr(p2pserver, "MAX_REFUSALS", 0)
    api = serve(max_connections=1)
    with Raw(api, GET + END) as first, Raw(api, GET + END) as second:
        assert first.answer().status == 200
        with contextlib.suppress(ConnectionResetError):
            assert second.is_closed()
        first.send(GET + END)
        assert first.answer().status == 200


# ---- memory ---------------------------------------------------------------------------------------------------------

MEGABYTE = 1_000_000


def fill(api):
    """Register games until there is no room; their number."""
    answers = (api.register_game(f"game {i}", info={"text": "x" * 1000}) for i in itertools.count())
    count, answer = next((i, answer) for i, answer in enumerate(answers) if not answer.ok)
    assert (answer.status_code, answer.json()["detail"]) == (503, "the server's memory for games is full") and int(answer.headers["Retry-After"]) > 0
    return count


def test_when_memory_is_full_newcomers_are_refused_and_those_that_there_are_go_on(serve):
    api = serve(max_memory=1)
    count = fill(api)
    assert 300 < count < 900 and refused(api, "memory") == 1
    assert api.start_game("game 0", addresses=["x" * 500] * 16).status_code == 503
    for i in range(20):
        assert api.register_game(f"game {i}").status_code == 200 and api.poll_game(f"game {i}").ok, "a tenth is kept for them"
    assert len(api.list_games().json()["games"]) == count
    assert all(api.delete_game(f"game {i}").ok for i in range(1, 10)) and api.register_game("a new one").status_code == 201


def test_also_those_that_there_are_cannot_take_more_than_all_memory(serve):
    api = serve(max_memory=1)
    count = fill(api)
    statuses = [api.poll_game(f"game {i}", addresses=["x" * 500] * 16).status_code for i in range(count)]
    assert set(statuses) == {200, 503} and api.server.registry.counts()["stored_bytes"] <= MEGABYTE
    assert api.get_game(f"game {statuses.index(503)}").json()["ready"] is False, "nothing is done by halves"


def fill_up(registry):
    """Have a host publish so much that no byte of the memory is left. This ends with what it publishes then."""
    registry.register_game("filler", BY_OTHER)
    registry.poll_game("filler", BY_OTHER, NO_ADDRESSES + b" " * (MEGABYTE - registry.counts()["stored_bytes"]))


def test_a_change_for_which_there_is_no_memory_is_not_made_by_halves(make_registry):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    fill_up(registry)
    before = listed(registry)
    with pytest.raises(Full):
        registry.update_game("castle", BY_HOST, name="a much longer name", info=b'{"map":"castle"}', listed=False)
    with pytest.raises(Full):
        registry.register_game("tower", BY_HOST)
    with pytest.raises(Full):
        started(registry, "castle")
    assert listed(registry) == before and games_and_guests(registry) == (2, 0)
    registry.poll_game("filler", BY_OTHER, NO_ADDRESSES)
    assert started(registry, "castle")


def test_a_poll_for_whose_replies_there_is_no_memory_changes_nothing(make_registry, wakes):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    sessions = [registry.start_game("castle", peer, TWO, wake=wake).peers[0].session_id for peer, wake in zip((BY_GUEST, BY_OTHER), wakes)]
    with pytest.raises(Full):
        registry.poll_game("castle", BY_HOST, ONE, replies={sessions[0]: ONE, sessions[1]: b" " * MEGABYTE})
    assert [wake.calls for wake in wakes] == [0, 0, 0]
    assert [registry.start_game("castle", peer, TWO).peers[0].addresses for peer in (BY_GUEST, BY_OTHER)] == [NO_ADDRESSES] * 2


def test_a_host_may_offer_more_to_all_where_it_offers_less_to_one_though_no_byte_is_left(make_registry):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    session = started(registry, "castle")[0].session_id
    registry.poll_game("castle", BY_HOST, ONE, replies={session: b" " * 1000})
    fill_up(registry)
    registry.poll_game("castle", BY_HOST, ONE + b" " * 900, replies={session: TWO})
    assert started(registry, "castle")[0].addresses == TWO


def test_a_poll_for_which_there_is_no_memory_has_told_its_host_nothing(make_registry):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    first, second = [started(registry, "castle", peer)[0].session_id for peer in (BY_GUEST, BY_OTHER)]
    cursor = registry.poll_game("castle", BY_HOST).cursor
    registry.leave_game("castle", BY_GUEST)
    with pytest.raises(Full):
        registry.poll_game("castle", BY_HOST, b" " * MEGABYTE)
    registry.leave_game("castle", BY_OTHER)
    assert list(registry.poll_game("castle", BY_HOST, after=cursor).left) == [first, second]


def test_bytes_are_counted_for_a_name_however_the_game_came_by_it(registry):
    registry.register_game("castle", BY_HOST)
    before = registry.counts()["stored_bytes"]
    registry.update_game("castle", BY_HOST, name="a castle in the clouds")
    assert registry.counts()["stored_bytes"] > before
    registry.update_game("a castle in the clouds", BY_HOST, name="castle")
    assert registry.counts()["stored_bytes"] == before
    registry.delete_game("castle", BY_HOST)
    registry.register_game("a castle in the clouds", BY_HOST)
    assert registry.counts()["stored_bytes"] > before


def test_a_tenth_of_the_memory_is_kept_for_games_that_are_there(make_registry):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    registry.poll_game("castle", BY_HOST, NO_ADDRESSES + b" " * 950_000)
    with pytest.raises(Full):
        registry.register_game("tower", BY_OTHER)
    with pytest.raises(Full):
        started(registry, "castle")
    registry.poll_game("castle", BY_HOST, NO_ADDRESSES + b" " * 960_000)


def test_a_host_that_is_woken_has_its_whole_time_to_ask_again(registry, clock, wakes):
    registry.register_game("castle", BY_HOST)
    assert registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    clock.tick(59)
    assert started(registry, "castle") and wakes[0].calls == 1
    clock.tick(59)
    assert registry.get_game("castle")


def test_a_host_whose_wait_ends_without_news_has_its_whole_time_to_ask_again(registry, clock, wakes):
    registry.register_game("castle", BY_HOST)
    waiter = registry.poll_game("castle", BY_HOST, ONE, wake=wakes[0]).waiter
    clock.tick(59)
    registry.forget_waiter(waiter)
    clock.tick(59)
    assert registry.get_game("castle")


def test_a_start_for_which_there_is_no_memory_leaves_the_one_that_waits(make_registry, wakes):
    registry = make_registry(max_memory=1)
    registry.register_game("castle", BY_HOST)
    assert registry.start_game("castle", BY_GUEST, ONE, wake=wakes[0]).waiter
    fill_up(registry)
    with pytest.raises(Full):
        registry.start_game("castle", BY_GUEST, ONE + b" ", wake=wakes[1])
    assert wakes[0].calls == 0 and registry.counts()["waiting"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_what_is_stored_is_counted_and_nothing_remains_when_all_is_gone(seed, clock):
    """A thousand operations at random: what they leave, as Python counts it, is never much more than what the registry says."""
    chance = random.Random(seed)
    registry = Registry(Settings(), clock)
    sessions = []

    def addresses():
        return json.dumps([chance.choice(["203.0.113.1:5000", "x" * 400, "ü" * 200, {"candidate": "x"}]) for _ in range(chance.randrange(17))]).encode()

    def size():
        return sum(map(sys.getsizeof, reachable(registry)))

    empty = size()
    for _ in range(1000):
        game, guest, client = f"game {chance.randrange(20)}", b"guest %d" % chance.randrange(50), b"client %d" % chance.randrange(1000)
        clock.tick(chance.random())
        with contextlib.suppress(Problem):
            kind = chance.randrange(6)
            if kind == 0:
                registry.register_game(game, game.encode(), info=chance.choice([None, b'{"text":"' + b"x" * chance.randrange(900) + b'"}']), client=client)
            elif kind == 1:
                registry.poll_game(game, game.encode(), addresses(), replies={session: addresses() for session in sessions[-3:]},
                                   dismiss=chance.sample(sessions, min(len(sessions), chance.randrange(3))))
            elif kind < 4:
                sessions.append(registry.start_game(game, guest, addresses(), client=client, seen_at=f"2001:db8::{kind}").peers[0].session_id)
            elif kind == 4:
                registry.update_game(game, game.encode(), name=chance.choice([None, game + " renamed"]), info=chance.choice([None, b"{}"]))
            elif chance.random() < 0.6:
                registry.leave_game(game, guest)
            elif chance.random() < 0.5:
                registry.delete_game(game, game.encode())
        registry.events.clear()
    registry.list_games()
    assert 20_000 < registry.counts()["stored_bytes"] > (size() - empty) / 1.3
    clock.tick(61)
    registry.list_games()
    registry.events.clear()
    assert set(registry.counts().values()) == {0} and size() < empty + 10_000, "the room that dictionaries keep"


def test_neither_an_idle_nor_a_waiting_connection_keeps_what_its_client_sent(serve):
    api = serve()
    api.register_game("castle")
    head = b"\r\n".join(b"X-%d: %s" % (i, b"private" * 40) for i in range(90))
    with Raw(api, poll("castle", head)) as idle, Raw(api, poll("castle", head).replace(b"/poll", b"/poll/it")) as lost, \
            Raw(api, poll("castle", head + b"\r\n" + WAIT_20)) as waiting:
        assert idle.answer().status == 200 and lost.answer().status == 404
        wait_until(lambda: waiters(api) == 1)
        kept = [bytes(thing) if isinstance(thing, (bytes, bytearray)) else thing.encode() for thing in reachable(api.server)
                if isinstance(thing, (str, bytes, bytearray))]
        assert b"127.0.0.1" in kept and not [text for text in kept if b"private" in text or HOST.encode() in text]
        api.start_game("castle")
        assert waiting.answer().status == 200


def test_heads_of_answers_that_are_kept_for_the_next_ones_take_no_more_than_a_megabyte(api):
    preflight = b"OPTIONS /games HTTP/1.1\r\nHost: h\r\nAccess-Control-Request-Method: GET\r\nAccess-Control-Request-Headers: %d" + b"x" * 30_000 + END * 2
    with Raw(api) as raw:
        for i in range(300):
            raw.send(preflight % i)
            assert raw.answer().status == 204
    assert p2pserver.head_text.cache_info().currsize > 200
    assert sum(map(sys.getsizeof, reachable(p2pserver.head_text))) < 1_000_000


def test_an_idle_connection_keeps_nothing_of_its_last_answer(serve):
    """Each may have been given another version of a long list."""
    api = serve()
    with contextlib.ExitStack() as stack:
        for i in range(3):
            api.register_game("castle", info={"version": i})
            assert stack.enter_context(Raw(api, LIST + END)).answer().status == 200
        assert metrics(api)["connections",] == 5        # these, ours, and that of metrics
        assert len({thing for thing in reachable(api.server) if isinstance(thing, bytes) and thing.startswith(b'{"games":')}) == 1, "the registry's own"


def test_a_connection_that_waits_for_a_request_keeps_no_exception(serve):
    """Which would take more memory, with its frames, than all else that is kept of a silent client."""
    api = serve()
    with Raw(api), Raw(api, GET):
        wait_until(lambda: sorted(len(each.buffer) for each in api.server.connections) == [0, len(GET)])
        metrics(api)
        assert [thing for thing in reachable(api.server) if isinstance(thing, OSError)] == []


@pytest.mark.parametrize("change", [{}, {"listed": True}, {"info": {"map": "castle"}}], ids=str)
def test_a_description_that_changes_nothing_does_not_change_the_list(change, api, name):
    api.register_game(name, info={"map": "castle"})
    before = api.list_games().headers["ETag"]
    assert api.update_game(name, **change).ok and api.list_games().headers["ETag"] == before


# ---- proxies --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("peer, headers, client", rows({
    "nobody's word": ("203.0.113.9", {}, "203.0.113.9"),
    "a stranger's word": ("203.0.113.9", {"x-forwarded-for": "198.51.100.1"}, "203.0.113.9"),
    "a proxy's": ("10.0.0.1", {"x-forwarded-for": "198.51.100.1"}, "198.51.100.1"),
    "the last that is no proxy, for a client can write the first itself": ("10.0.0.1", {"x-forwarded-for": "1.1.1.1, 198.51.100.1, 10.0.0.2"}, "198.51.100.1"),
    "proxies alone": ("10.0.0.1", {"x-forwarded-for": "10.0.0.3, 10.0.0.2"}, "10.0.0.3"),
    "with a port": ("10.0.0.1", {"x-forwarded-for": "198.51.100.1:4000"}, "198.51.100.1"),
    "IPv6": ("10.0.0.1", {"x-forwarded-for": "2001:db8::1"}, "2001:db8::1"),
    "IPv6 with a port": ("10.0.0.1", {"x-forwarded-for": "[2001:db8::1]:4000"}, "2001:db8::1"),
    "an IPv4-mapped proxy": ("::ffff:10.0.0.1", {"x-forwarded-for": "198.51.100.1"}, "198.51.100.1"),
    "an IPv6 proxy": ("2001:db8::53", {"x-forwarded-for": "198.51.100.1"}, "198.51.100.1"),
    "junk": ("10.0.0.1", {"x-forwarded-for": "198.51.100.1, junk"}, ""),
    "unknown": ("10.0.0.1", {"x-forwarded-for": "unknown"}, ""),
    "Forwarded, which is not read": ("10.0.0.1", {"forwarded": "for=198.51.100.1"}, "10.0.0.1"),
    "nothing": ("10.0.0.1", {"x-forwarded-for": ""}, ""),
    "more than anybody needs": ("10.0.0.1", {"x-forwarded-for": "1.1.1.1, " * 300 + "198.51.100.1"}, "198.51.100.1"),
    "one that is too long": ("10.0.0.1", {"x-forwarded-for": "1" * 3000}, ""),
    "before as many proxies as are read": ("10.0.0.1", {"x-forwarded-for": "198.51.100.1" + ",10.0.0.2" * 220}, "198.51.100.1"),
    "before more proxies than are read": ("10.0.0.1", {"x-forwarded-for": "198.51.100.1" + ",10.0.0.2" * 230}, ""),
}))
def test_who_asks_is_by(peer, headers, client):
    proxies = p2pserver.Networks("10.0.0.0/8, 2001:db8::53")
    found = p2pserver.client_behind(p2pserver.client_of(peer), headers, proxies)
    assert (found.address, found.key) == (client, b"" if not client else key_of(client))


@pytest.mark.parametrize("forwarded, told", [("198.51.100.1", "198.51.100.1"), ("2001:db8::1", "2001:db8::1"), ("unknown", None)])
def test_a_host_is_told_where_a_guest_behind_a_proxy_calls_from(serve, forwarded, told):
    api = serve(trusted_proxies="127.0.0.1")
    api.register_game("castle")
    api.call("POST", "/games/start", {"name": "castle", "peerId": GUEST, "addresses": THERE}, headers={"X-Forwarded-For": forwarded})
    assert [guest.get("from") for guest in api.poll_game("castle").json()["guests"]] == [told]


def test_a_guest_is_told_where_its_host_behind_a_proxy_calls_from_if_the_host_publishes_it(serve):
    api = serve(trusted_proxies="127.0.0.1")
    api.register_game("castle")
    poll = {"name": "castle", "peerId": HOST, "addresses": ["198.51.100.1:5000"]}
    told = []
    for forwarded in ("198.51.100.1", "198.51.100.2"):
        api.call("POST", "/games/poll", poll, headers={"X-Forwarded-For": forwarded})
        told.append(api.start_game("castle").json().get("from"))
    assert told == ["198.51.100.1", None]


def test_a_client_over_its_rate_does_not_stop_others_on_the_connection_of_their_proxy(serve, clock):
    api = serve(trusted_proxies="127.0.0.1")
    limited(api, clock, 0.001, 10)
    with Raw(api) as proxy:
        for client, status in [*[(b"203.0.113.1", 200)] * 10, *[(b"203.0.113.1", 429)] * 3, (b"203.0.113.2", 200)]:
            proxy.send(LIST + b"X-Forwarded-For: " + client + b"\r\n\r\n")
            assert proxy.answer().status == status


@pytest.mark.parametrize("text, member, stranger", rows({
    "an IPv4-mapped address": ("::ffff:127.0.0.1", "127.0.0.1", "127.0.0.2"),
    "one in hexadecimal": ("::FFFF:7f00:1", "127.0.0.1", "127.0.0.2"),
    "an IPv4-mapped network": ("::ffff:10.1.2.3/104", "10.255.0.1", "11.0.0.1"),
    "all IPv4-mapped addresses": ("::ffff:0:0/96", "203.0.113.1", "2001:db8::1"),
    "IPv6, which is not IPv4": ("::/0", "2001:db8::1", "127.0.0.1"),
    "a link-local address with its zone": ("10.0.0.1, fe80::1%wlp2s0", "fe80::1", "fe80::2"),
    "a link-local network with a zone": ("fe80::1%eth0/64, 10.0.0.1", "fe80::2", "fe80:0:0:1::1"),
}))
def test_the_networks_of_proxies_have_a_member_by(text, member, stranger):
    networks = Settings(trusted_proxies=text).proxies
    assert member in networks and stranger not in networks


def test_a_proxy_named_by_its_ipv4_mapped_address_is_believed(serve):
    api = serve(trusted_proxies="::ffff:127.0.0.1", metrics_from="::ffff:203.0.113.0/120")
    for client, status in ((b"203.0.113.9", 200), (b"198.51.100.1", 403)):
        assert ask(api, "127.0.0.1", b"GET /metrics HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: " + client + b"\r\n\r\n").status == status


def test_a_proxy_that_is_over_its_own_rate_may_still_connect_for_others(serve, clock):
    """Anybody else is closed without a word then."""
    api = serve(trusted_proxies="127.0.0.1")
    limited(api, clock, 0.001, 10)
    api.server.refusals = p2pserver.RateLimiter(0.001, 5, clock)
    with Raw(api) as proxy:
        for status in [*[200] * 10, *[429] * 6]:
            proxy.send(LIST + END)
            assert proxy.answer().status == status
    with Raw(api, LIST + b"X-Forwarded-For: 203.0.113.2\r\n\r\n") as proxy:
        assert proxy.answer().status == 200


def test_who_comes_through_a_proxy_is_not_taken_for_a_user_of_this_machine(serve):
    proxies = p2pserver.Networks("127.0.0.1")
    peer = p2pserver.client_of("127.0.0.1")
    assert peer.is_local and p2pserver.client_behind(peer, {}, proxies).is_local
    for forwarded in ("203.0.113.1", "junk", "", "_hidden", "127.0.0.1", "127.0.0.2, 127.0.0.1"):
        assert not p2pserver.client_behind(peer, {"x-forwarded-for": forwarded}, proxies).is_local
        assert not p2pserver.client_behind(peer, {"x-forwarded-for": forwarded}, p2pserver.Networks("")).is_local, "also behind one that is not trusted"


def test_the_first_request_with_x_forwarded_for_of_an_address_that_is_not_trusted_is_a_warning(serve, lines):
    api = serve(trusted_proxies="127.0.0.2")
    for source, header in (("127.0.0.2", b"X-Forwarded-For: 203.0.113.1"), ("127.0.0.1", b"X-Other: 1")):
        assert ask(api, source, GET + header + b"\r\n\r\n").status == 200
    assert lines == []
    for source in ("127.0.0.3", "127.0.0.3", "127.0.0.1"):
        assert ask(api, source, GET + b"X-Forwarded-For: 203.0.113.1\r\n\r\n").status == 200
    [line] = lines
    assert "127.0.0.3" in line and "--trusted-proxies" in line and "203.0.113" not in line


def test_each_client_behind_a_trusted_proxy_has_a_rate_of_its_own(serve, clock):
    api = serve(trusted_proxies="127.0.0.1")
    limited(api, clock, 1, 10)

    def call(source, client):
        return ask(api, source, LIST + b"X-Forwarded-For: " + client + b"\r\n\r\n").status

    assert [call("127.0.0.1", b"203.0.113.1") for _ in range(11)] == [200] * 10 + [429]
    assert call("127.0.0.1", b"203.0.113.2") == 200
    assert [call("127.0.0.2", b"203.0.113.%d" % i) for i in range(11)] == [200] * 10 + [429], "who is no proxy cannot speak for others"


# ---- TLS ------------------------------------------------------------------------------------------------------------

# Self-signed, for localhost and 127.0.0.1, and for these tests alone: each its key and the certificate.
CERTIFICATES = (
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgpwXwFJpWMI01C6Gs
BJRY+igQKeFeK1mubWwbvqh4MBahRANCAAQivn5HYJ3KMQArw0253qBk0DDfoBFj
Hgg0KaB5h1jBdscKQ3AgFxW/Ukr6fEMUGoUiUklYCGqI2VyhrV4zh9Pz
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlTCCATugAwIBAgIUJhr39FvGkWeeS6hlPche1y3dNVwwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGdGVzdCAxMCAXDTI2MTEyMjE4MzMxMloYDzIxMjYxMDI5MTgz
MzEyWjARMQ8wDQYDVQQDDAZ0ZXN0IDEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAQivn5HYJ3KMQArw0253qBk0DDfoBFjHgg0KaB5h1jBdscKQ3AgFxW/Ukr6fEMU
GoUiUklYCGqI2VyhrV4zh9Pzo28wbTAdBgNVHQ4EFgQUK4+HxXJ5gDKnDp/zUrek
BtEMRyowHwYDVR0jBBgwFoAUK4+HxXJ5gDKnDp/zUrekBtEMRyowDwYDVR0TAQH/
BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwID
SAAwRQIgEF0E5ipAsYQeBXkTuxXTPmHgbc7vQDhb6tux2N4eQwACIQCh3gwHg5kj
b7NKd4W+7g+n5FxdLlfrzsBhBqCRjWbhFA==
-----END CERTIFICATE-----
""",
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvfP4abYQRjHV7Tg6
s/TvoEj51EJNk/V30/A5SD1TMpqhRANCAAQAbVCjOnRCdvfDYnwva39qc+J3Ny7H
PU3nG5+RyVUm1n43WdszC/JYAyyRygpSmLJ6fl6b8Heq39viyQzl0SpK
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUYZeBFoCIT/xNd6Yl4uUqlXnZn9gwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGdGVzdCAyMCAXDTI2MTEyMjE4MzMxMloYDzIxMjYxMDI5MTgz
MzEyWjARMQ8wDQYDVQQDDAZ0ZXN0IDIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAQAbVCjOnRCdvfDYnwva39qc+J3Ny7HPU3nG5+RyVUm1n43WdszC/JYAyyRygpS
mLJ6fl6b8Heq39viyQzl0SpKo28wbTAdBgNVHQ4EFgQURhXTTzKvt574xzqOnRrK
UiVfGQ4wHwYDVR0jBBgwFoAURhXTTzKvt574xzqOnRrKUiVfGQ4wDwYDVR0TAQH/
BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZIzj0EAwID
RwAwRAIgSBLFedqmXxJMxTxt7xmGT0mcnPx5+EAdfmk2ausVpDECIG41cUjng7K7
luHd6QMTN4tbJsI2TO6O4EZrVNkYbygH
-----END CERTIFICATE-----
""",
)


def certificate_of(text):
    """The certificate in PEM, as bytes in DER."""
    return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERT"):])


class Tls(Raw):
    """A connection under TLS on which a test says each byte itself."""

    def __init__(self, api, data=b"", source=None, **settings):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=CERTIFICATES[0] + CERTIFICATES[1])
        context.set_alpn_protocols(["h2", "http/1.1"])
        for name, value in settings.items():
            setattr(context, name, value)
        # Without suppress_ragged_eofs an end that TLS does not vouch for is an error.
        plain = socket.create_connection(("127.0.0.1", api.port), WAIT, source_address=source and (source, 0))
        self.socket = context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)
        self.stream = self.socket.makefile("rb")
        self.send = self.socket.sendall
        self.send(data)


class TlsInMemory:
    """The client's side of TLS, whose bytes a test carries itself. hello: those that begin the handshake."""

    def __init__(self):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=CERTIFICATES[0])
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.hello = self.outgoing.read()

    def do(self, raw, step, *arguments, size=65536, pause=0.0):
        """Do what may take more bytes of the server, of which size at the most are read at once, after a pause of seconds."""
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                return step(*arguments)
            raw.send(self.outgoing.read())
            is_silent(raw, WAIT)
            time.sleep(pause)
            data = raw.socket.recv(size)
            assert data, "the server has cut the connection"
            self.incoming.write(data)

    def ask(self, raw, data):
        """Finish the handshake, and send a request."""
        self.do(raw, self.tls.do_handshake, size=2000)
        self.tls.write(data)
        raw.send(self.outgoing.read())


@pytest.fixture
def certificate(tmp_path):
    """A file with the first certificate and its key."""
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATES[0])
    return path


@pytest.fixture
def secure(serve, certificate):
    """Start a server with TLS and settings of one's own."""
    return lambda *args, **values: serve(*args, tls_cert=str(certificate), **values)


def test_the_server_speaks_https_with_a_certificate(secure):
    api = secure()
    assert api.server.where.startswith("https://")
    with Tls(api, GET + END) as tls:
        assert tls.answer().status == 200 and tls.socket.selected_alpn_protocol() == "http/1.1"
        assert tls.socket.getpeercert(binary_form=True) == certificate_of(CERTIFICATES[0])
        tls.send(poll("nothing") + GET + b"Connection: close\r\n\r\n")
        assert [tls.answer().status for _ in range(2)] == [404, 200] and tls.is_closed()


def test_who_reads_some_of_a_record_of_tls_counts_as_one_who_reads(secure, monkeypatch):
    """Or a client that is slow would be cut where one without TLS is not: its record can be longer than what the system takes in at once."""
    monkeypatch.setattr(p2pserver, "SEND_TIME", 1.0)
    api = secure()
    for i in range(48):
        api.server.registry.register_game(f"game {i}", BY_HOST, info=b'{"text":"' + b"x" * 1000 + b'"}')
    api.server.listeners[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)       # which its connections have as well
    client, text = TlsInMemory(), b""
    with Deaf(api, client.hello) as raw:
        client.ask(raw, LIST + END)
        began = time.monotonic()
        while not text.endswith(b"]}\n"):
            text += client.do(raw, client.tls.read, 65536, size=2000, pause=0.1)
        assert time.monotonic() - began > 2 * p2pserver.SEND_TIME and len(json.loads(text.partition(END + END)[2])["games"]) == 48


def test_the_key_may_be_in_a_file_of_its_own(serve, tmp_path):
    end = CERTIFICATES[0].index("-----BEGIN CERT")
    (tmp_path / "key.pem").write_text(CERTIFICATES[0][:end])
    (tmp_path / "cert.pem").write_text(CERTIFICATES[0][end:])
    with Tls(serve(tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem")), GET + END) as tls:
        assert tls.answer().status == 200


def test_requests_and_answers_larger_than_a_record_of_tls_come_whole(secure):
    api = secure(max_body=200_000)
    for i in range(300):
        api.server.registry.register_game(f"game {i}", api.server.registry.peer_digest(HOST), info=b'{"text":"' + b"x" * 1000 + b'"}')
    with Tls(api, (LIST + END) * 5) as tls:
        assert [len(json.loads(tls.answer().body)["games"]) for _ in range(5)] == [300] * 5
        tls.send(post(b"/games/poll", {"name": "game 1", "peerId": HOST, "addresses": HERE, "ignored": "x" * 150_000}) * 3)
        assert [tls.answer().status for _ in range(3)] == [200] * 3


def test_a_poll_that_waits_is_answered_and_its_hanging_up_noticed_under_tls(secure):
    api = secure()
    api.server.registry.register_game("castle", api.server.registry.peer_digest(HOST))
    with Tls(api, poll("castle", WAIT_20)) as tls:
        wait_until(lambda: waiters(api) == 1)
        api.server.registry.start_game("castle", BY_GUEST, ONE)
        answer = json.loads(tls.answer().body)
        assert answer["guests"]
        tls.send(poll("castle", WAIT_20, after=answer["cursor"]))
        wait_until(lambda: waiters(api) == 1)
    wait_until(lambda: waiters(api) == 0)


def test_tls_has_no_more_threads_than_max_threads_and_none_when_nothing_is_to_do(secure, clock, gate):
    api = secure(clock, gate, max_threads=2)
    api.server.registry.register_game("castle", BY_HOST)
    before = set(threading.enumerate())     # threads of earlier tests may end meanwhile

    def threads():
        return len(set(threading.enumerate()) - before)

    with contextlib.ExitStack() as stack:
        # Up to TLS 1.2 nothing comes after the handshake by itself.
        guests = [stack.enter_context(Tls(api, maximum_version=ssl.TLSVersion.TLSv1_2)) for _ in range(6)]
        wait_until(lambda: threads() == 0)
        for i, guest in enumerate(guests):
            guest.send(post(b"/games/start", {"name": "castle", "peerId": f"guest {i}", "addresses": THERE}))
        wait_until(lambda: threads() == 2)
        assert is_silent(guests[-1], 0.3) and threads() == 2
        gate.opened.set()
        assert [guest.answer().status for guest in guests] == [202] * 6
        wait_until(lambda: threads() == 0)


def test_clients_that_do_not_finish_the_handshake_stop_nobody_and_are_cut_off(secure, monkeypatch):
    monkeypatch.setattr(p2pserver, "REQUEST_TIME", 1.0)
    api = secure(max_threads=1)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Raw(api, data)) for data in [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"] * 20]
        with Tls(api, GET + END) as tls:
            assert tls.answer().status == 200
        assert all(raw.is_closed() for raw in silent)


def test_a_plain_head_on_a_port_of_tls_has_an_answer_without_a_body(secure):
    with Raw(secure(), b"HEAD" + GET[3:] + END) as raw:
        assert raw.answer(head=True).status == 400 and raw.is_closed()


@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"PATCH", b"OPTIONS"])
def test_plain_http_on_a_port_of_tls_is_told_to_use_https(method, secure):
    api = secure()
    with Raw(api, method + GET[3:] + END) as raw:
        answer = raw.answer()
        assert (answer.status, answer.headers["content-type"], answer.headers["connection"]) == (400, "application/problem+json", "close")
        assert "https://" in json.loads(answer.body)["detail"] and raw.is_closed()
    with Raw(api, POST + b"Content-Length: 100000\r\n\r\n") as raw:
        assert select.select([raw.socket], [], [], WAIT)[0]
        raw.send(b"x" * 100_000)        # the answer is not lost, though more comes
        assert raw.answer().status == 400 and raw.is_closed()
    with Tls(api, GET + END) as tls:
        assert tls.answer().status == 200


def test_tls_on_a_port_of_plain_http_is_told_what_the_port_speaks(api):
    with Raw(api, TlsInMemory().hello) as raw:
        answer = raw.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close") and "http://" in json.loads(answer.body)["detail"] and raw.is_closed()


def test_tls_1_2_has_no_suites_with_cbc(secure):
    api = secure()
    assert {suite["symmetric"] for suite in api.server.tls.get_ciphers()} <= {"aes-128-gcm", "aes-256-gcm", "chacha20-poly1305"}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_2
    for suites, is_taken in (("ECDHE+AES128+SHA256:ECDHE+AES128+SHA1:!AESGCM", False), ("ECDHE+AESGCM", True)):
        context.set_ciphers(suites)
        fault = contextlib.nullcontext() if is_taken else pytest.raises(ssl.SSLError, match="(?i)handshake.failure")
        with socket.create_connection(("127.0.0.1", api.port), WAIT) as plain, fault:
            context.wrap_socket(plain).close()


@pytest.mark.parametrize("junk", [GET + END, b"\x80" * 100, b"\0", b"\x16\x03\x01" + b"\xff" * 500], ids=brief)
def test_what_is_no_tls_is_closed_and_the_server_stays_up(secure, junk):
    api = secure()
    with Raw(api, junk) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            raw.stream.read()
    with Tls(api, GET + END) as tls:
        assert tls.answer().status == 200


def test_a_handshake_for_which_no_thread_is_to_be_had_is_counted_as_refused(secure, monkeypatch, caplog):
    api = secure()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with Raw(api, b"\x16") as raw:
            assert raw.is_closed()
    assert refused(api, "threads", Tls) == 1 and not [record for record in caplog.records if record.exc_info]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def client_hello(version):
    """The first record of a client that speaks this version at the most, as 0x0303 for TLS 1.2 (RFC 5246 section 7.4.1.2)."""
    extensions = b"".join(struct.pack(">HH", kind, len(data)) + data for kind, data in (
        (0x000A, b"\0\x04\0\x17\0\x1d"), (0x000B, b"\x01\0"), (0x000D, b"\0\x04\x04\x03\x08\x04")))     # groups, point formats, signatures
    suites = b"\xc0\x2b\xc0\x09\xc0\x0a"     # ECDHE-ECDSA with AES-128-GCM, and with AES-CBC, which older versions have
    body = struct.pack(">H", version) + bytes(33) + struct.pack(">H", len(suites)) + suites + b"\x01\0" + struct.pack(">H", len(extensions)) + extensions
    return b"\x16\x03\x01" + struct.pack(">H", len(body) + 4) + b"\x01" + struct.pack(">I", len(body))[1:] + body


@pytest.mark.parametrize("version", [0x0301, 0x0302], ids=["TLS 1.0", "TLS 1.1"])
def test_old_tls_is_refused(secure, version):
    """By the server, with the alert protocol_version: the client has no objection, as its good word with TLS 1.2 shows."""
    api = secure()
    with Raw(api, client_hello(version)) as raw:
        record = raw.stream.read()
        assert record[:1] == b"\x15" and record[-2:] == b"\x02\x46"        # an alert, fatal: protocol_version (RFC 8446 section 6)
    with Raw(api, client_hello(0x0303)) as raw:
        assert raw.stream.read(6)[0::5] == b"\x16\x02"      # a handshake record that begins with ServerHello
    with Tls(api, GET + END, maximum_version=ssl.TLSVersion.TLSv1_2) as tls:
        assert tls.answer().status == 200 and tls.socket.version() == "TLSv1.2"


def test_no_client_may_negotiate_anew_in_the_middle_of_a_connection(certificate):
    """That would be work for nothing. OpenSSL 3 refuses it by itself, so no client of ours would notice where the server does not."""
    context = p2pserver.load_certificate(Settings(tls_cert=str(certificate)))
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_a_renewed_certificate_is_for_new_connections_and_old_ones_go_on(secure, certificate):
    api = secure()
    with Tls(api, GET + END) as old:
        assert old.answer().status == 200
        certificate.write_text(CERTIFICATES[1])
        api.server.renew_certificate()
        wait_until(lambda: shown_by(api) == certificate_of(CERTIFICATES[1]))
        old.send(GET + END)
        assert old.answer().status == 200


def shown_by(api):
    """The certificate that a new connection gets."""
    with Tls(api, GET + END) as tls:
        assert tls.answer().status == 200
        return tls.socket.getpeercert(binary_form=True)


KEYS, CHAINS = zip(*[text.split("-----BEGIN CERT") for text in CERTIFICATES])
CHAINS = ["-----BEGIN CERT" + chain for chain in CHAINS]
# The first key again, encrypted with the password "x", in the two forms that OpenSSL writes.
ENCRYPTED = (
    """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAhFu9qbvTV0DAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEK9w/Gd/K9G8Xkq8aBFz/zIEgZB+
VNOWd7aXSBiSlVQJbGVgHCI/dhQMZx7zM2v70QnjhW7DFX7+PA3Ox3T+8VdNFOi3
JcH7523QbEN1juEk4qizjVnGgpc0ENZINecinNIn1r3CnEN6g3zgTO7O8nUnqxdi
+0pzdj+f/zHRUVw2Jgz9y3uVrGUPaly7rUb5dmS+4j4JbNXK6g/xp6h9V3Fu8fQ=
-----END ENCRYPTED PRIVATE KEY-----
""",
    """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,B5B4228937CBC9AD2C6E23C7D5D7DF8F

nisSYj2nINurVf/F50nl26iPvAp35HCavicp1ONzHkaJcF7f4FsA64ToSuAkPV7I
hcl1hM4yPpTJla+sUjhbsufHNN9jBKO8s/7iaj9Q2lgRNoKtDleb9Q2n/tsoAmAb
x/qsVfGJsR0r01GcSviIBcdr7VC2u0vaCCjW3tqppqI=
-----END EC PRIVATE KEY-----
""",
)
BAD_CERTIFICATES = {
    "missing": (None, KEYS[0], "No such file or directory: '{0}'"), "its key missing": (CHAINS[0], None, "No such file or directory: '{1}'"),
    "empty": ("", KEYS[0], "there is no CERTIFICATE in {0}"), "junk": ("junk", KEYS[0], "there is no CERTIFICATE in {0}"),
    "a key in its place": (KEYS[0], KEYS[0], "there is no CERTIFICATE in {0}"), "without a key": (CHAINS[0], CHAINS[0], "there is no PRIVATE KEY in {1}"),
    "with an encrypted key": (CHAINS[0], ENCRYPTED[0], "the key in {1} is encrypted"),
    "with a key encrypted the old way": (CHAINS[0], ENCRYPTED[1], "the key in {1} is encrypted"),
    "another's key": (CHAINS[0], KEYS[1], "certificate {0} with the key {1} cannot be used: [X509: KEY_VALUES_MISMATCH]"),
    "damaged": (CHAINS[0].replace("MII", "!"), KEYS[0], "certificate {0} with the key {1} cannot be used"),
}


@pytest.mark.parametrize("chain, key, words", rows(BAD_CERTIFICATES))
def test_a_bad_certificate_is_refused_with_file_and_fault_and_the_old_one_stays(chain, key, words, serve, tmp_path, lines):
    files = tmp_path / "chain.pem", tmp_path / "key.pem"
    for file, text in zip(files, (CHAINS[0], KEYS[0])):
        file.write_text(text)
    api = serve(tls_cert=str(files[0]), tls_key=str(files[1]))
    for file, text in zip(files, (chain, key)):
        file.unlink()
        if text is not None:
            file.write_text(text)
    with pytest.raises(p2pserver.CannotStart, match="--tls-cert") as refused:
        p2pserver.open_server(api.server.settings)
    assert words.format(*files) in str(refused.value) and "MIH" not in str(refused.value)
    api.server.renew_certificate()
    wait_until(lambda: any(line.endswith("look at --tls-cert and --tls-key; the old one stays in use") for line in lines))
    assert shown_by(api) == certificate_of(CERTIFICATES[0])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is for POSIX")
def test_sighup_loads_the_certificate_anew_and_says_so(certificate):
    with running("--port", "0", "--rate", "0", "--tls-cert", str(certificate)) as process:
        for text, expected in ((CERTIFICATES[1], 1), ("junk", 1), (CERTIFICATES[0], 0)):
            certificate.write_text(text)
            process.send_signal(signal.SIGHUP)
            assert wait_until(lambda expected=expected: shown_by(process) == certificate_of(CERTIFICATES[expected]))
            if text == "junk":
                assert "the old one stays in use" in process.stderr.readline()
            else:
                assert "the certificate was loaded anew" in process.stderr.readline()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is for POSIX")
def test_sighup_without_tls_is_ignored_with_a_line():
    with running("--port", "0") as process:
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            assert "SIGHUP is ignored" in process.stderr.readline() and is_healthy(process)


@contextlib.contextmanager
def on_terminal(command):
    """A server on loopback that is the first process on a terminal of its own, and listens already; with hang_up(), which closes the terminal."""
    import pty
    ours, its = pty.openpty()
    process = subprocess.Popen(command, stdin=its, stdout=subprocess.PIPE, stderr=its, env=variables(P2P_HOST="127.0.0.1"), start_new_session=True,
                               preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))     # the first one that it opens becomes its own
    os.close(its)
    with os.fdopen(ours, "rb", 0) as terminal:
        try:
            process.port = int(re.search(rb":(\d+)/", process.stdout.readline())[1])
            process.terminal, process.hang_up = terminal, terminal.close
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is for POSIX")
@pytest.mark.parametrize("with_tls", [False, True], ids=["without TLS", "with TLS"])
def test_the_server_ends_when_its_terminal_is_closed_and_not_by_another_sighup(with_tls, certificate):
    flags = ["--tls-cert", str(certificate)] if with_tls else []
    with on_terminal([sys.executable, SERVER, "--port", "0", *flags]) as process:
        process.send_signal(signal.SIGHUP)
        assert (b"loaded anew" if with_tls else b"is ignored") in process.terminal.read(1000)
        assert ask(process, "127.0.0.1", connection=Tls if with_tls else Raw).status == 200
        process.hang_up()
        assert process.wait(WAIT) == 0


@pytest.mark.skipif(not shutil.which("nohup"), reason="nohup is not installed")
def test_a_server_under_nohup_outlives_its_terminal():
    with on_terminal(["nohup", sys.executable, SERVER, "--port", "0"]) as process:
        process.hang_up()
        process.send_signal(signal.SIGHUP)
        assert is_healthy(process)
        process.terminate()
        process.wait(WAIT)


@pytest.mark.parametrize("data", [b"", GET + END, poll("castle", b"Prefer: wait=25")], ids=["nothing", "a request", "a poll that waits"])
def test_a_client_that_closes_tls_politely_is_gone_and_its_thread_free(data, secure):
    """More of them than there are threads, and each leaves its TCP connection open."""
    api = secure(max_threads=2)
    api.server.registry.register_game("castle", api.server.registry.peer_digest(HOST))
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            tls = stack.enter_context(Tls(api, data))
            if data.startswith(b"GET"):
                assert tls.answer().status == 200
            if data.startswith(b"POST"):
                wait_until(lambda: api.server.registry.counts()["waiting"] == 1)
            with contextlib.suppress(ssl.SSLError, OSError):
                tls.socket.setblocking(False)
                tls.socket.unwrap()
        assert ask(api, "127.0.0.1", connection=Tls).status == 200
        wait_until(lambda: len(api.server.connections) == 0)


def test_a_server_with_tls_stops_at_once_and_tells_its_clients(secure):
    api = secure()
    with Tls(api, GET + END) as idle, Raw(api) as silent:
        assert idle.answer().status == 200
        api.server.stop()
        assert idle.is_closed() and silent.is_closed()


def test_a_client_in_its_tls_handshake_when_the_server_stops_is_still_answered(secure):
    api = secure()
    client = TlsInMemory()
    with Raw(api, client.hello) as raw, concurrent.futures.ThreadPoolExecutor(1) as pool:
        client.incoming.write(raw.socket.recv(65536))
        stopping = pool.submit(api.server.stop, WAIT)
        assert is_silent(raw, 0.3) and api.server.stopping
        client.ask(raw, GET + END)
        assert client.do(raw, client.tls.read, 65536).startswith(b"HTTP/1.1 503 ")
        stopping.result(WAIT)


# ---- metrics --------------------------------------------------------------------------------------------------------

def test_metrics_count_what_there_is_and_what_has_happened(serve, clock):
    api = serve(clock, no_stun=False, max_guests=1)
    api.register_game("castle")
    api.register_game("castle")
    api.start_game("castle")
    api.start_game("castle", OTHER)
    api.poll_game("castle", OTHER)
    api.call("GET", "/nothing")
    with Raw(api, poll("castle", WAIT_20)) as raw, udp(api.port) as client:
        raw.send(poll("castle", WAIT_20, after=json.loads(raw.answer().body)["cursor"]))
        wait_until(lambda: waiters(api) == 1)
        client.ask(b"junk", REQUEST)
        found = metrics(api)
    assert {key: found[key] for key in [("games",), ("guests",), ("waiting",), ("connections",)]} == {
        ("games",): 1, ("guests",): 1, ("waiting",): 1, ("connections",): 3}
    assert found["threads",] >= 3 and found["stored_bytes",] > 1000 and found["uptime_seconds",] > 0
    assert {key[1:]: value for key, value in found.items() if key[0] == "requests_total"} == {
        ("register_game", "201"): 1, ("register_game", "200"): 1, ("start_game", "202"): 1, ("start_game", "503"): 1, ("poll_game", "403"): 1,
        ("poll_game", "200"): 1, ("none", "404"): 1}
    assert found["refused_total", "guests"] == 1 and found["stun_total", "answer"] == 1 and found["stun_total", "silence"] == 1


def test_metrics_tell_no_secret_and_no_address(api, name):
    api.register_game(name)
    api.poll_game(name)
    text = api.call("GET", "/metrics").text
    assert not any(secret in text for secret in (name, HOST, GUEST, "203.0.113", "127.0.0.1"))


def test_metrics_are_for_this_machine_and_whom_metrics_from_names(serve):
    ask_metrics = b"GET /metrics HTTP/1.1\r\nHost: h\r\n"
    api, open_one = serve(trusted_proxies="127.0.0.1"), serve(metrics_from="127.0.0.0/30, 203.0.113.7", trusted_proxies="127.0.0.1")
    local = ask(api, "127.0.0.1", ask_metrics + END)
    assert (local.status, local.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    for header, closed, named in ((b"X-Forwarded-For: 203.0.113.7", 403, 200), (b"X-Forwarded-For: 203.0.113.8", 403, 403)):
        assert ask(api, "127.0.0.1", ask_metrics + header + b"\r\n\r\n").status == closed
        assert ask(open_one, "127.0.0.1", ask_metrics + header + b"\r\n\r\n").status == named


# ---- log ------------------------------------------------------------------------------------------------------------

HOSTILE = "a\ue000b\U0010ffff [31m\U0001f600"    # characters that no terminal knows, as a name may have them


def is_iso_8601(text):
    """Whether it is a time with its offset from UTC: within the last minute, so that the offset is right."""
    is_one = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", text)
    return is_one and 0 <= time.time() - datetime.datetime.fromisoformat(text).timestamp() < 60


@pytest.mark.parametrize("zone, offset", [("UTC0", "+00:00"), ("XXX-5:30", "+05:30"), ("XXX3:30", "-03:30")])
def test_times_in_the_log_are_iso_8601_with_offset(zone, offset):
    with running("--port", "0", TZ=zone) as process:
        [line] = end(process)[2].splitlines()
    at, words = line.split(" ", 1)
    assert is_iso_8601(at) and at.endswith(offset) and words == "INFO the server has ended"


def test_each_line_of_a_json_log_is_an_object_that_says_what_happened():
    with running("--port", "0", "--log-format", "json", "--access-log") as process:
        api = Api(process, process.port)
        api.register_game(HOSTILE)
        ask(api, "127.0.0.1", b"GET /a%0A%1B[31m?secret=1 HTTP/1.1\r\nHost: h\r\n\r\n")
        status, _, err = end(process)
    lines = [json.loads(line) for line in [process.line, *err.splitlines()]]
    assert status == 0 and err.isascii() and all(line["level"] == "info" and is_iso_8601(line["time"]) for line in lines)
    assert f"listens on http://127.0.0.1:{process.port}/" in lines[0]["message"] and lines[-1]["message"] == "the server has ended"
    event, = (line for line in lines if line.get("operation") == "register_game")
    assert event["name"] == HOSTILE
    first, second = (line for line in lines if "method" in line)
    assert (first["client"], first["method"], first["path"], first["status"]) == ("127.0.0.1", "POST", "/games/register", 201) and first["bytes"] > 0
    assert (second["path"], second["status"]) == ("/a%0A%1B[31m", 404)


def ask_much(process):
    """Cause more lines of --access-log than two pipes hold."""
    for _ in range(8):
        with Raw(process, (b"GET /" + b"x" * 1000 + b" HTTP/1.1\r\nHost: h\r\n\r\n") * 20) as raw:
            assert [raw.answer().status for _ in range(20)] == [404] * 20


def test_a_log_that_nobody_reads_keeps_nobody_waiting_and_goes_on_once_it_is_read():
    """It has room for ten lines: what finds none is lost, and all else is written."""
    command = [sys.executable, "-c", "import p2pserver; p2pserver.LOG_LINES = 10; p2pserver.main()"]
    with running("--port", "0", "--access-log", "--no-stun", command=command) as process:
        ask_much(process)
        read = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
        lines = []
        read.start()
        wait_until(lambda: is_healthy(process) and any("healthz" in line for line in lines))
        process.terminate()
        read.join(WAIT)
        assert process.wait(WAIT) == 0 and lines[-1].endswith("the server has ended\n")
        assert all(re.match(r"\S+ INFO 127\.0\.0\.1 GET '/(x{1000}' 404|healthz' 200) \d+\n$", line) for line in lines[:-1])
        assert 10 < sum("xxx" in line for line in lines) < 150


def test_a_log_that_nobody_reads_does_not_keep_the_process_from_its_end():
    with running("--port", "0", "--access-log", "--no-stun") as process:
        ask_much(process)
        process.terminate()
        assert process.wait(WAIT) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is for Linux")
def test_a_log_whose_disk_is_full_keeps_nobody_from_being_served():
    with open("/dev/full", "w") as full, running("--port", "0", "--access-log", "--no-stun", stderr=full) as process:
        for _ in range(3):
            assert is_healthy(process)
        process.terminate()
        assert process.wait(WAIT) == 0


def test_stop_answers_a_request_whose_body_comes_within_the_grace(serve):
    """Many clients send head and body apart, and one that expects 100 Continue has to."""
    api = serve()
    head, body = post(b"/games/register", {"name": "castle", "peerId": HOST}, b"Expect: 100-continue").split(b"\r\n\r\n")
    with Raw(api, head + b"\r\n\r\n") as raw, concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert raw.answer().status == 100
        stopping = pool.submit(api.server.stop, WAIT)
        assert is_silent(raw, 0.3) and api.server.stopping
        raw.send(body)
        assert raw.answer().status == 201
        stopping.result(WAIT)


# ---- start and stop -------------------------------------------------------------------------------------------------

def test_stop_answers_the_requests_in_progress_and_health_with_503(serve, clock, gate):
    """A start is held up, which holds the registry's lock: so the other request waits, too."""
    api = serve(clock, gate)
    with concurrent.futures.ThreadPoolExecutor(2) as pool, Raw(api, GET + END) as raw:
        assert raw.answer().status == 200 and api.register_game("g").ok
        starting = pool.submit(api.start_game, "g")
        assert gate.reached.wait(WAIT)
        raw.send(GET + END)
        stopping = pool.submit(api.server.stop, WAIT)
        wait_until(lambda: api.server.stopping)
        gate.opened.set()
        answer, health = starting.result(WAIT), raw.answer()
        assert (answer.status_code, answer.headers["Connection"]) == (202, "close")
        assert (health.status, health.headers["content-type"], health.headers["connection"]) == (503, "application/problem+json", "close")
        assert int(health.headers["retry-after"]) > 0 and raw.is_closed()
        stopping.result(WAIT)


def test_stop_answers_those_whom_it_has_yet_to_accept(serve, clock, gate):
    """The thread that accepts them is held up meanwhile, and there is no other connection yet."""
    api = serve(clock, gate)
    api.server.registry.register_game("castle", BY_HOST)
    with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        starting = pool.submit(ask, api, "127.0.0.1", post(b"/games/start", {"name": "castle", "peerId": GUEST, "addresses": THERE}))
        assert gate.reached.wait(WAIT)
        raws = [stack.enter_context(Raw(api, data)) for data in (GET, GET + END, GET + END)]      # the first one's request does not come whole
        stopping = pool.submit(api.server.stop)
        assert is_silent(raws[0], 0.5) and api.server.stopping
        gate.opened.set()
        assert starting.result(WAIT).status == 202 and [raw.answer().status for raw in raws] == [503] * 3
        stopping.result(WAIT)


def test_stop_closes_idle_connections_and_frees_the_ports(serve):
    api = serve(no_stun=False)
    with Raw(api, GET + END) as raw:
        assert raw.answer().status == 200
        api.server.stop()
        assert raw.is_closed()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", api.port), WAIT)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", api.port))


def test_two_servers_never_share_a_port(serve):
    with pytest.raises(p2pserver.CannotStart, match="in use"):
        p2pserver.Server(Settings(host="127.0.0.1", port=serve().port))


def test_a_server_that_was_never_started_can_be_stopped():
    server = p2pserver.open_server(Settings(host="127.0.0.1", port=0))
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(WAIT)
    assert not stopping.is_alive()


# ---- command line (real processes) ----------------------------------------------------------------------------------

SERVER = os.path.abspath(p2pserver.__file__)


def variables(**more):
    return {**{key: value for key, value in os.environ.items() if key not in ("PORT", "PYTHONUNBUFFERED") and not key.startswith("P2P_")}, **more}


def run(*flags, **more):
    """Status, output and errors of a server that is expected not to stay."""
    process = subprocess.run([sys.executable, SERVER, *flags], env=variables(**more), capture_output=True, text=True, timeout=WAIT)
    return process.returncode, process.stdout, process.stderr


@contextlib.contextmanager
def running(*flags, before=(), command=(sys.executable, SERVER), stderr=subprocess.PIPE, **more):
    """A server as its own process on loopback: its Popen with line, the one it prints at start, and port. before: what its command begins with."""
    process = subprocess.Popen([*before, *command, *flags], env=variables(**{"P2P_HOST": "127.0.0.1", **more}), stdout=subprocess.PIPE, stderr=stderr,
                               text=True, cwd=ROOT)
    try:
        assert select.select([process.stdout], [], [], WAIT)[0], "it says nothing"
        process.line = process.stdout.readline()
        found = re.search(r"https?://127\.0\.0\.\d:(\d+)/", process.line)
        assert found, process.line + process.communicate(timeout=WAIT)[1]
        process.port = int(found[1])
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process, number=signal.SIGTERM):
    """Status, further output and errors of a running server after a signal."""
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT)
    return process.returncode, out, err


def is_healthy(process):
    with Raw(process, b"GET /healthz HTTP/1.0\r\n\r\n") as raw:
        return raw.answer().status == 200


@contextlib.contextmanager
def taken(kind, words):
    """Words with the number of a port in place of {} that is in use on 127.0.0.5, where no client's connection has the same one."""
    require("127.0.0.5")
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.5", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield [word.format(sock.getsockname()[1]) for word in words]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_status_0_and_no_traceback(number):
    with running("--port", "0") as process, Raw(process, GET) as half:
        assert is_healthy(process)
        status, out, err = end(process, number)
        assert (status, out) == (0, "") and "Traceback" not in err
        assert half.answer().status == 503, "half a request does not hold it up, and is answered still"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_while_the_server_ends_changes_nothing(number):
    with running("--port", "0") as process, Raw(process, GET) as half, Raw(process, GET + END) as idle:
        assert idle.answer().status == 200
        process.send_signal(signal.SIGINT)
        assert idle.is_closed(), "it is ending, and gives half a request its time"
        status, out, err = end(process, number)
        assert (status, out) == (0, "") and "Traceback" not in err and half.answer().status == 503


def test_the_line_at_start_says_what_listens_where():
    with running("--port", "0") as process, udp(process.port) as client:
        where = rf"http://127\.0\.0\.1:{process.port}/ and STUN on UDP ports {process.port} and [0-9]+"
        assert re.fullmatch(rf"p2pserver {p2pserver.__version__} listens on {where}; Ctrl-C ends it\n", process.line)
        assert is_healthy(process) and mapped(client.ask(REQUEST)[0]) == client.address


def test_stun_can_have_a_port_of_its_own_or_none():
    with taken(socket.SOCK_DGRAM, ["{}"]) as (port,):
        pass
    with running("--port", "0", "--stun-port", port) as process, udp(int(port)) as client:
        assert f"STUN on UDP ports {port} and {int(port) + 1};" in process.line and mapped(client.ask(REQUEST)[0]) == client.address
    with running("--port", "0", "--no-stun") as process, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert "no STUN" in process.line
        sock.bind(("127.0.0.1", process.port))


@pytest.mark.parametrize("host, words", [("", "all addresses, IPv6 and IPv4"), ("0.0.0.0", "http://0.0.0.0:"), ("::1", "http://[::1]:")])
def test_what_is_said_at_start_by_a_server_on(host, words, serve):
    require("127.0.0.1" if host == "0.0.0.0" else "::1")
    assert words in serve(host=host).server.where


def test_a_server_on_all_addresses_is_reached_by_both_versions_of_ip(serve):
    require("::1")
    port = serve(host="").port
    for address in ("127.0.0.1", "::1"):
        with socket.create_connection((address, port), WAIT) as sock:
            sock.sendall(GET + END)
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def in_world(tmp_path):
    """The beginning of a command for which localhost has the addresses of a text like that of /etc/hosts."""
    def world(hosts):
        (tmp_path / "hosts").write_text(hosts)
        command = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"',
                   str(tmp_path / "hosts")]
        if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True, timeout=WAIT).returncode:
            pytest.skip("this machine lets nobody have a file /etc/hosts of his own")
        return command

    return world


def test_a_host_that_is_no_name_is_said_in_words():
    with pytest.raises(p2pserver.CannotStart, match=r"TCP port 0 of a\.\.b cannot be used"):
        p2pserver.Server(Settings(host="a..b", port=0))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_all_spellings_of_all_addresses_are_one(serve):
    api = serve(host="0::0")
    with Raw(api, GET + END) as raw:     # over IPv4
        assert raw.answer().status == 200


def test_a_server_on_a_name_listens_on_every_address_that_it_resolves_to(in_world):
    require("::1")
    require("127.0.0.2")
    addresses = ["127.0.0.1", "127.0.0.2", "::1"]
    before = in_world("".join(f"{address} localhost\n" for address in [*addresses, "127.0.0.1"]))
    with running("--host", "localhost", "--port", "0", before=before) as process:
        for address in addresses:
            for _ in range(2):
                with socket.create_connection((address, process.port), WAIT) as sock:
                    sock.sendall(GET + END)
                    assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
            with udp(process.port, address) as client:
                answer, sender = client.ask(REQUEST)
                assert sender == (address, process.port) and mapped(answer) == client.address
            assert f"http://{f'[{address}]' if ':' in address else address}:{process.port}/ and " in process.line
        assert Api(process, process.port).call("GET", "/metrics").text.count('p2pserver_stun_total{result="answer"} 3\n') == 1
        assert process.line.count("127.0.0.1") == 1, "that it is found twice is no matter"
        assert end(process)[0] == 0
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, process.port), WAIT)


def test_a_server_on_a_name_does_without_the_addresses_that_this_machine_has_not(in_world):
    with running("--host", "localhost", "--port", "0", before=in_world("127.0.0.1 localhost\n2001:db8::1 localhost\n")) as process:
        assert is_healthy(process) and f"http://127.0.0.1:{process.port}/ and STUN" in process.line


def test_a_port_in_use_on_one_address_of_a_name_is_one_line_and_status_1(in_world):
    before = in_world("127.0.0.1 localhost\n127.0.0.5 localhost\n")
    with taken(socket.SOCK_STREAM, ["{}"]) as (port,):
        process = subprocess.run([*before, sys.executable, SERVER, "--host", "localhost", "--port", port], env=variables(), capture_output=True, text=True,
                                 timeout=WAIT)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (1, "", 1)
    assert f"TCP port {port} of localhost cannot be used: Address already in use" in process.stderr


def test_a_second_port_for_stun_that_is_taken_on_one_address_of_a_name_is_told_to_nobody(in_world):
    before = in_world("127.0.0.1 localhost\n127.0.0.5 localhost\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.5", 0))
        with running("--host", "localhost", "--port", "0", "--second-stun-port", str(other.getsockname()[1]), before=before) as process:
            assert Api(process, process.port).register_game("castle").json()["stun"] == [process.port]
            assert f"STUN on UDP port {process.port};" in process.line and "cannot be used for STUN too" in end(process)[2]


def test_a_name_that_is_none_is_one_line_and_status_1():
    status, out, err = run("--host", "nosuch.invalid", "--port", "0")
    assert (status, out, err.count("\n")) == (1, "", 1) and "nosuch.invalid" in err


@pytest.mark.parametrize("flags, more", rows({
    "P2P_PORT before PORT": ([], {"P2P_PORT": "0", "PORT": "{}"}),
    "--port before P2P_PORT": (["--port", "0"], {"P2P_PORT": "{}"}),
    "PORT where there is nothing else": ([], {"PORT": "0"}),
}))
def test_the_process_obeys(flags, more):
    with taken(socket.SOCK_STREAM, more.values()) as values, running(*flags, P2P_HOST="127.0.0.5", **dict(zip(more, values))) as process:
        assert process.port != 8000


@pytest.mark.parametrize("kind, flags, more, words", rows({
    "the port": (socket.SOCK_STREAM, ["--port", "{}"], {}, "TCP port {} of 127.0.0.5 cannot be used: Address already in use"),
    "the port of PORT": (socket.SOCK_STREAM, [], {"PORT": "{}"}, "TCP port {} of 127.0.0.5 cannot be used: Address already in use"),
    "the port of P2P_PORT": (socket.SOCK_STREAM, [], {"P2P_PORT": "{}"}, "TCP port {} of 127.0.0.5 cannot be used: Address already in use"),
    "the port of STUN": (socket.SOCK_DGRAM, ["--port", "0", "--stun-port", "{}"], {}, "UDP port {} of 127.0.0.5 cannot be used: Address already in use"),
    "the port of HTTP for STUN": (socket.SOCK_DGRAM, ["--port", "{}"], {}, "UDP port {} of 127.0.0.5 cannot be used: Address already in use"),
}))
def test_one_line_and_status_1_if_in_use_is(kind, flags, more, words):
    with taken(kind, [words, *more.values(), *flags]) as (line, *values):
        status, out, err = run("--host", "127.0.0.5", *values[len(more):], **dict(zip(more, values)))
    assert (status, out, err.count("\n")) == (1, "", 1) and line in err


def test_an_address_that_is_not_this_machines_is_one_line_and_status_1():
    status, out, err = run("--host", "203.0.113.1", "--port", "0")
    assert (status, out, err.count("\n")) == (1, "", 1) and "203.0.113.1" in err


def test_a_privileged_port_is_one_line_and_status_1():
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", 1)) == 0 or os.geteuid() == 0:
            pytest.skip("root may listen on any port")
    status, out, err = run("--host", "127.0.0.1", "--port", "1")
    assert (status, out, err.count("\n")) == (1, "", 1) and "TCP port 1 of 127.0.0.1 cannot be used: Permission denied" in err


@pytest.mark.parametrize("flags, more, words", rows({
    "a bad flag": (["--prot", "1"], {}, "--prot"),
    "a bad value": (["--port", "http"], {}, "--port"),
    "a bad value in the environment": ([], {"P2P_MAX_GAMES": "0"}, "P2P_MAX_GAMES"),
    "limits that do not go together": (["--game-ttl", "1"], {}, "--poll-after must be less than --game-ttl"),
}))
def test_one_line_and_status_2_is_the_answer_to(flags, more, words):
    status, out, err = run(*flags, **more)
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize("log_format, level", rows({"text": ("text", " WARNING "), "json": ("json", '"level": "warning"')}))
def test_the_process_warns_of_variables_that_it_ignores_and_tells_no_value(log_format, level):
    with running("--port", "0", "--log-format", log_format, P2P_GAME_TLL="a secret", P2P_PORT="tcp://10.0.0.1:8000") as process:
        err = end(process)[2]
    for name, words in (("P2P_GAME_TLL", "nearest name is P2P_GAME_TTL"), ("P2P_PORT", "Kubernetes")):
        [line] = [line for line in err.splitlines() if f"{name} in the environment is ignored" in line]
        assert words in line and level in line
    assert "secret" not in err and "tcp:" not in err


def test_version_is_printed():
    assert run("--version") == (0, f"p2pserver {p2pserver.__version__}\n", "")


@pytest.mark.parametrize("level, logged", [("info", True), ("warning", False)])
def test_the_process_logs_by_level(level, logged):
    with running("--port", "0", "--access-log", "--log-level", level) as process:
        assert is_healthy(process)
        err = end(process)[2]
        assert bool(re.search(r"^\S+ INFO 127\.0\.0\.1 GET '/healthz' 200 \d+\n", err)) is logged and (logged or err == "")


def test_the_server_imports_nothing_outside_the_standard_library():
    """There is nothing else to import without site-packages, but for what lies beside it."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(SERVER)!r}); import p2pserver; print('p2pclient' in sys.modules)"
    process = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert (process.returncode, process.stdout, process.stderr) == (0, "False\n", "")


# ---- README and docs ------------------------------------------------------------------------------------------------

README, API, OPERATING = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/API.md", "docs/OPERATING.md")]


def without_chance(text):
    """An output with what differs from run to run made alike."""
    for pattern, constant in ('"cursor":[0-9]{9,}', '"cursor":0'), (r'"stun":\[[0-9,]*\]', '"stun":[]'), ("[0-9a-f]{32}", "0"):
        text = re.sub(pattern, constant, text)
    return text.strip()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("page", ["README.md", "docs/API.md"])
def test_every_curl_example_prints_what_the_page_says(page, serve):
    port, text = serve().port, (ROOT / page).read_text(encoding="utf-8")
    examples = [example for block in re.findall("```console\n(.*?)```", text, re.DOTALL) for example in block.split("\n\n")]
    assert len(examples) > 4
    present = {"localhost:8000": f"127.0.0.1:{port}"}       # for what a command quotes of an earlier output: what it was this time
    for example in examples:
        command, _, output = example.strip().partition("\n")
        arguments = shlex.split(re.sub("localhost:8000|[0-9a-f]{32}|[0-9]{14}", lambda quoted: present[quoted[0]], command[2:]))
        found = subprocess.run([arguments[0], "-s", *arguments[1:]], capture_output=True, text=True, timeout=10).stdout
        assert without_chance(found) == without_chance(output), command
        present.update(zip(*[re.findall("[0-9a-f]{32}|[0-9]{14}", text) for text in (output, found)]))


def test_every_flag_is_documented_with_its_default():
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]*?) ?\|", OPERATING, re.MULTILINE))
    assert set(rows) == {option.flag for option in p2pserver.OPTIONS} | {"--version"}
    for option in p2pserver.OPTIONS:
        said = rows[option.flag]
        if said in ("", "all addresses", "as `--port`", "the next port", "none", "this machine"):
            assert not option.default, option.flag
        else:
            assert said == (f"{option.default:g}" if isinstance(option.default, float) else str(option.default)), option.flag


def test_the_version_is_the_same_everywhere():
    assert f'version = "{p2pserver.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"p2pserver {p2pserver.__version__} listens" in README
    assert f"## {p2pserver.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_list_of_statuses_is_complete():
    code = (ROOT / "p2pserver.py").read_text(encoding="utf-8")
    used = set(re.findall(r"status = ([45][0-9]{2})|, ([45][0-9]{2})[,)]", code))
    assert {status for pair_of in used for status in pair_of if status} <= set(re.findall("`([45][0-9]{2})`", API))


def headings(page):
    """What a link to a heading of a page may name."""
    found = re.findall("^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub("[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-") for line in found]


def test_every_link_in_the_documentation_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "deploy" / "README.md", ROOT / "lab" / "README.md", *(ROOT / "docs").glob("*.md")):
        for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert target.exists() and (not heading or heading in headings(target)), f"{path}#{heading} in {page.name}"


def test_each_test_that_the_threat_model_names_is_there():
    """In the file or folder that it names, or here."""
    named = re.findall(r"`(test_\w+)`(?: \(`([\w./]+)`\))?", (ROOT / "docs" / "SECURITY.md").read_text())
    assert len(named) > 30
    for name, where in named:
        place = ROOT / (where or pathlib.Path(__file__).name)
        files = place.glob("test_*.py") if place.is_dir() else [place]
        assert any(f"def {name}(" in file.read_text() for file in files), name
