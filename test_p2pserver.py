"""The tests of p2pserver: pure ones of its parts first, then the whole over real sockets. Traffic goes to loopback only.

The sections follow the server's. The only doubles are the clock and the source of ids, both arguments of Registry.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import urllib.parse
import zlib
from typing import NamedTuple

import pytest
import requests

import p2pserver
from p2pserver import Conflict, Forbidden, Full, NotFound, Problem, Registry, Session, Settings

WAIT = 20           # seconds after which a thing that must happen counts as one that does not
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

    def __init__(self, server):
        self.server, self.port = server, server.server_port
        self.session = requests.Session()
        self.session.trust_env = False      # no proxy of the environment

    def call(self, method, path, json=None, **options):
        return self.session.request(method, f"http://127.0.0.1:{self.port}{path}", json=json, timeout=WAIT, **options)

    def post(self, operation, **fields):
        return self.call("POST", f"/games/{operation}", fields)

    def register_game(self, name, peer=HOST, **more):
        return self.post("register", name=name, peerId=peer, **more)

    def poll_game(self, name, peer=HOST, addresses=HERE, **more):
        return self.post("poll", name=name, peerId=peer, addresses=addresses, **more)

    def start_game(self, name, peer=GUEST, addresses=THERE):
        return self.post("start", name=name, peerId=peer, addresses=addresses)

    def list_games(self, **headers):
        return self.call("GET", "/games", headers=headers)

    def get_game(self, name):
        return self.call("GET", path_of(name))

    def update_game(self, name, peer=HOST, method="PATCH", **changes):
        return self.call(method, path_of(name), {"peerId": peer, **changes})

    def delete_game(self, name, peer=HOST):
        return self.call("DELETE", path_of(name), {"peerId": peer})


def path_of(name):
    return "/games/" + urllib.parse.quote(name, safe="")


@contextlib.contextmanager
def serving(clock=None, new_id=p2pserver.new_session_id, **values):
    """The Api of a server on a free port of loopback, which is stopped in the end."""
    settings = Settings(**{"host": "127.0.0.1", "port": 0, "no_stun": True, **values})
    server = p2pserver.Server(settings, Registry(settings, clock, new_id)) if clock else p2pserver.open_server(settings)
    server.start()
    api = Api(server)
    try:
        yield api
    finally:
        api.session.close()
        server.stop()
        if server.stun:
            server.stun.join(WAIT)


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture(scope="module")
def api():
    """A server for all tests that need none of their own. Its time stands still: no slow machine loses a game."""
    with serving(clock=Clock()) as api:
        yield api


@pytest.fixture
def serve():
    """Start a server with settings of one's own: serve(max_games=1) returns its Api."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **values: stack.enter_context(serving(*args, **values))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock):
    """A registry with a fake clock and the ids id0, id1, ..."""
    return Registry(Settings(max_games=5, max_guests=3), clock, map("id{}".format, itertools.count()).__next__)


@pytest.fixture
def name(numbers=itertools.count(1)):   # noqa: B008  # one for all calls is what is wanted
    return f"game {next(numbers)}"


@pytest.fixture
def lines():
    """What the server logs at any level, each entry as it would be written."""
    entries = []
    handler = logging.Handler()
    handler.emit = lambda record: entries.append(handler.format(record))
    level = p2pserver.log.level
    p2pserver.log.setLevel(logging.DEBUG)
    p2pserver.log.addHandler(handler)
    yield entries
    p2pserver.log.removeHandler(handler)
    p2pserver.log.setLevel(level)


@pytest.fixture
def hasty_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def wait_until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def in_threads(count, work):
    """The results of work(0), work(1), ..., which all begin at once."""
    barrier = threading.Barrier(count)

    def run(i):
        barrier.wait(WAIT)
        return work(i)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def rows(table):
    """A dict of cases by name, for parametrize."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name) for name, case in table.items()]


# ---- limits ---------------------------------------------------------------------------------------------------------

def parse(*flags, **environment):
    return p2pserver.parse_settings(list(flags), environment)


def refusal(capsys, *flags, **environment):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parse(*flags, **environment)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("option", p2pserver.OPTIONS, ids=lambda option: option.name)
def test_each_option_can_be_given_as_flag_and_in_the_environment(option):
    text, value = ("1", True) if option.default is False else (option.choices[0],) * 2 if option.choices else \
        ("x", "x") if option.default == "" or option.default == "*" else (str(option.high), option.high)
    more = {"P2P_GAME_TTL": "86400", "P2P_GUEST_TTL": "86400", "P2P_IDLE_TIMEOUT": "3600", "P2P_POLL_AFTER": "1"}
    more.pop(option.variable, None)
    if option.name == "poll_after":
        text, value = "3599", 3599
    flag = [option.flag] if option.default is False else [option.flag, text]
    assert getattr(parse(*flag, **more), option.name) == value
    assert getattr(parse(**{**more, option.variable: text}), option.name) == value


def test_the_defaults_are_those_of_the_contract():
    settings = parse()
    assert (settings.host, settings.port, settings.game_ttl, settings.guest_ttl, settings.poll_after) == ("", 8000, 60, 60, 2)
    assert (settings.max_games, settings.max_guests, settings.max_body, settings.cors_origin) == (10000, 64, 16384, "*")
    assert (settings.log_level, settings.access_log, settings.no_stun) == ("info", False, False)


@pytest.mark.parametrize("flags, environment, port", rows({
    "nothing": ([], {}, 8000),
    "PORT": ([], {"PORT": "1"}, 1),
    "P2P_PORT before PORT": ([], {"PORT": "1", "P2P_PORT": "2"}, 2),
    "the flag before both": (["--port", "3"], {"PORT": "1", "P2P_PORT": "2"}, 3),
    "a zero is not nothing": (["--port", "0"], {"P2P_PORT": "2"}, 0),
    "the flag as one word": (["--port=3"], {}, 3),
}))
def test_the_port_is_taken_from(flags, environment, port):
    assert parse(*flags, **environment).port == port


@pytest.mark.parametrize("flags, environment, words", rows({
    "letters for a number": (["--port", "http"], {}, "--port must be a whole number, not 'http'"),
    "a fraction for a whole number": (["--max-games", "1.5"], {}, "--max-games must be a whole number, not '1.5'"),
    "too large": (["--port", "65536"], {}, "--port must be from 0 to 65535, not '65536'"),
    "too small": (["--game-ttl", "0"], {}, "--game-ttl must be from 1 to 86400, not '0'"),
    "negative": (["--stun-port=-1"], {}, "--stun-port must be from 0 to 65535"),
    "not a number": (["--game-ttl", "nan"], {}, "--game-ttl must be from 1 to 86400"),
    "infinite": (["--poll-after", "inf"], {}, "--poll-after must be from 0.1 to 3600"),
    "large bounds are exact": (["--max-body", "1"], {}, "--max-body must be from 1024 to 16777216"),
    "no such level": (["--log-level", "loud"], {}, "--log-level must be one of debug, info, warning, error, not 'loud'"),
    "a line break in a header field": (["--cors-origin", "x\r\ny: z"], {}, "--cors-origin must be printable ASCII"),
    "P2P_PORT": ([], {"P2P_PORT": "http"}, "P2P_PORT must be a whole number, not 'http'"),
    "PORT": ([], {"PORT": "70000"}, "PORT must be from 0 to 65535"),
    "a flag's variable": ([], {"P2P_NO_STUN": "yes"}, "P2P_NO_STUN must be 1 or 0, not 'yes'"),
    "unknown flag": (["--portt", "1"], {}, "--portt"),
    "abbreviated flag": (["--max-g", "1"], {}, "--max-g"),
    "flag without value": (["--port"], {}, "--port"),
    "stray word": (["serve"], {}, "serve"),
    "poll_after and game_ttl": (["--game-ttl", "2"], {}, "--poll-after must be less than --game-ttl"),
    "poll_after and guest_ttl": (["--guest-ttl", "2"], {}, "--poll-after must be less than --guest-ttl"),
    "poll_after and idle_timeout": (["--poll-after", "59", "--idle-timeout", "59"], {}, "--poll-after must be less than --idle-timeout"),
}))
def test_a_bad_command_line_is_refused_in_one_line_that_names_the_fault(capsys, flags, environment, words):
    assert words in refusal(capsys, *flags, **environment)


def test_help_names_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert all(option.flag in text and (option.default in ("", False) or f"(default: {option.default})" in text) for option in p2pserver.OPTIONS)


@pytest.mark.parametrize("values, words", rows({
    "an option that there is not": ({"max_gamez": 1}, "max_gamez"),
    "a value out of bounds": ({"max_games": 0}, "max-games"),
    "two that do not go together": ({"poll_after": 60}, "--poll-after must be less than --game-ttl"),
}))
def test_settings_refuse(values, words):
    with pytest.raises(ValueError, match=words):
        Settings(**values)


@pytest.mark.parametrize("error, words", rows({
    "in use": (errno.EADDRINUSE, "TCP port 80 of h is in use"),
    "not permitted": (errno.EACCES, "ports below 1024 are for root"),
    "anything else": (errno.EADDRNOTAVAIL, "cannot listen on TCP port 80 of h"),
}))
def test_a_port_that_cannot_be_had_is_explained(error, words):
    assert words in str(p2pserver.CannotListen("TCP", "h", 80, OSError(error, os.strerror(error))))


# ---- fields (validation) --------------------------------------------------------------------------------------------

NOT_STRINGS = (None, True, 1, 1.5, [], {}, ["x"])
NAMES = ("a", "Snow 雪 🎲", "x" * 64, "e\u0301" * 64, "a b", "...", "Register", "polls", "a.b", "%2F", "<name>", "\u202eevil", "'\"\\", "🧑‍🚀")
BAD_NAMES = ("", "x" * 65, "x" * 300, "e\u0301" * 65, "a/b", "/", ".", "..", "register", "poll", "start", " a", "a ", "\u00a0a", "a\u3000", "a\nb", "a\0",
             "\x1b[2J", "\x7f", "a\u0085b", "a\u2028b", "a\u2029b", "\ud800", "a\udfff")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_may_be(name):
    assert p2pserver.check_name(name) == name.replace("e\u0301", "é")


@pytest.mark.parametrize("name", [*BAD_NAMES, *NOT_STRINGS], ids=ascii)
def test_a_name_must_not_be(name):
    with pytest.raises(ValueError):
        p2pserver.check_name(name)


@pytest.mark.parametrize("peer_id", ["x", "x" * 128, "two words", " ", "é雪🎲", "\"'\\"], ids=ascii)
def test_a_peer_id_may_be(peer_id):
    assert p2pserver.check_peer_id(peer_id) == peer_id


@pytest.mark.parametrize("peer_id", ["", "x" * 129, "a\nb", "\0", "\x7f", "\u202e", "\ud800", *NOT_STRINGS], ids=ascii)
def test_a_peer_id_must_not_be(peer_id):
    with pytest.raises(ValueError):
        p2pserver.check_peer_id(peer_id)


@pytest.mark.parametrize("addresses", rows({
    "none": [], "IPv4": ["203.0.113.1:1"], "IPv6": ["[2001:db8::1]:65535"], "link-local with its interface": ["[fe80::1%eth0]:5000"], "private": ["192.168.0.1:5000"],
    "sixteen": ["203.0.113.1:5000"] * 16, "512 characters": ["x" * 512], "any text": ["candidate:1 1 udp 2122 192.0.2.1 5000 typ host", "", "é\n"],
    "an object": [{"sdp": {"type": "offer", "lines": [1, None]}}], "the broadcast address without a port": ["255.255.255.255"], "a host name": ["localhost:80"],
}))
def test_addresses_may_be(addresses):
    assert p2pserver.check_addresses(addresses, local=False) == tuple(addresses)


LOOPBACK = ("127.0.0.1:5000", "127.9.9.9:5000", "[::1]:5000", "[::ffff:127.0.0.1]:5000", "[0:0:0:0:0:0:0:1]:5000", "[::1%lo]:5000")


@pytest.mark.parametrize("address, words", [
    *((text, "unspecified, multicast or broadcast") for text in ("0.0.0.0:5000", "[::]:5000", "[::ffff:0.0.0.0]:5000", "224.0.0.1:5000", "239.1.2.3:5000",
                                                                 "[ff02::1]:5000", "[::ffff:224.0.0.1]:5000", "255.255.255.255:5000")),
    *((text, "port from 1 to 65535") for text in ("203.0.113.1:0", "[2001:db8::1]:0", "203.0.113.1:65536", "203.0.113.1:000", "203.0.113.1:" + "9" * 400)),
    *((text, "loopback") for text in LOOPBACK),
    *((text, "not an IP address") for text in ("256.0.0.1:5000", "[::g]:5000".replace("g", "1::"), "[1:2:3]:5000", "999.1.1.1:1")),
    ("x" * 513, "at most 512 characters"),
    *((value, "a string or an object") for value in (None, 5000, True, ["203.0.113.1", 5000])),
    (functools.reduce(lambda inner, _: {"x": inner}, range(16), {}), "16 levels"),
], ids=lambda value: ascii(value)[:40])
def test_an_address_must_not_be(address, words):
    with pytest.raises(ValueError, match=words):
        p2pserver.check_addresses([address], local=False)


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_client_on_the_servers_machine_may_give_a_loopback_address(address):
    assert p2pserver.check_addresses([address], local=True) == (address,)


@pytest.mark.parametrize("addresses", [["x"] * 17, None, {}, "203.0.113.1:5000", 1, True], ids=lambda value: ascii(value)[:40])
def test_addresses_must_be_an_array_of_at_most_sixteen(addresses):
    with pytest.raises(ValueError, match="at most 16 addresses"):
        p2pserver.check_addresses(addresses, local=False)


def test_each_fault_of_a_list_of_addresses_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"^\[1\] must have a port.*; \[3\] must be a string"):
        p2pserver.check_addresses(["203.0.113.1:1", "203.0.113.1:0", "x", 7], local=False)


@pytest.mark.parametrize("replies", [None, [], "x", {"s": "203.0.113.1:5000"}, {"s": ["0.0.0.0:1"]}, {"s": ["x"] * 17}, {"s": ["127.0.0.1:1"]}, {"s": None}], ids=ascii)
def test_replies_must_not_be(replies):
    with pytest.raises(ValueError):
        p2pserver.check_replies(replies, local=False)


def test_replies_are_addresses_by_session():
    assert p2pserver.check_replies({"s": [{"sdp": "x"}], "t": []}, local=False) == {"s": ({"sdp": "x"},), "t": ()}


LARGEST = {"k": "x" * (1024 - len('{"k":""}'))}


@pytest.mark.parametrize("info", [{}, LARGEST, {"players": 1, "map": "é", "deep": [[{"x": None}]]}], ids=lambda value: ascii(value)[:40])
def test_info_may_be(info):
    assert p2pserver.check_info(info, local=False) == info


@pytest.mark.parametrize("info", [None, [], "x", 1, {"k": LARGEST["k"] + "x"}, {"k": LARGEST["k"][:-1] + "é"}, {"k": "雪" * 400},
                                  functools.reduce(lambda inner, _: [inner], range(16), {}), {"x": functools.reduce(lambda inner, _: [inner], range(16), 0)}],
                         ids=lambda value: ascii(value)[:20] + ascii(value)[-12:])
def test_info_must_be_an_object_of_at_most_1024_bytes_and_16_levels(info):
    with pytest.raises(ValueError):
        p2pserver.check_info(info, local=False)


@pytest.mark.parametrize("check, good, bad", rows({
    "listed": (p2pserver.check_flag, [True, False], [0, 1, "true", None, [], {}]),
    "after": (p2pserver.check_cursor, [0, 1, 2 ** 53 - 1], [-1, 2 ** 53, True, 1.0, "1", None, [], 10 ** 200]),
}))
def test_only_values_of_its_kind_pass_for(check, good, bad):
    assert [check(value, False) for value in good] == good
    for value in bad:
        with pytest.raises(ValueError):
            check(value, False)


def test_every_fault_of_a_body_is_named_at_once():
    with pytest.raises(Problem) as refused:
        p2pserver.validate({"name": "", "addresses": 1, "peerId": "x", "after": "x", "more": 1}, {
            "name": p2pserver.NAME, "peerId": p2pserver.PEER_ID, "addresses": p2pserver.ADDRESSES, "info": p2pserver.INFO, "listed": p2pserver.Field(p2pserver.check_flag),
            "after": p2pserver.Field(p2pserver.check_cursor, required=False)}, local=False)
    assert set(refused.value.errors) == {"name", "addresses", "listed", "after"}
    assert all(field in refused.value.detail for field in refused.value.errors)


# ---- registry -------------------------------------------------------------------------------------------------------

def polled(registry, name="g", peer=HOST, addresses=("here",), after=None, replies=None):
    return registry.poll_game(name, peer, addresses, after, replies)


def started(registry, name="g", peer=GUEST, addresses=("there",)):
    return registry.start_game(name, peer, addresses)


def events(registry):
    operations = [event.operation for event in registry.events]
    registry.events.clear()
    return operations


def test_a_game_is_new_once(registry):
    assert registry.register_game("g", HOST) is True
    assert registry.register_game("g", HOST) is False


def test_a_taken_name_is_a_conflict_and_stays_what_it_was(registry):
    registry.register_game("g", HOST, {"map": "ice"})
    with pytest.raises(Conflict):
        registry.register_game("g", OTHER, {"map": "fire"}, False)
    assert [game.info for game in registry.list_games()] == [{"map": "ice"}]
    assert polled(registry).guests == []


def test_registering_again_keeps_guests_addresses_and_what_is_not_given(registry):
    registry.register_game("g", HOST, {"map": "ice"}, False)
    polled(registry)
    session, _ = started(registry)
    registry.register_game("g", HOST)
    assert registry.get_game("g") == ("g", {"map": "ice"}, 1, True) and registry.list_games() == []
    assert [guest.session_id for guest in polled(registry).guests] == [session.session_id]


def test_registering_again_changes_what_is_given(registry):
    registry.register_game("g", HOST, {"map": "ice"}, False)
    registry.register_game("g", HOST, {}, True)
    assert registry.list_games() == [("g", {}, 0, False)]


def test_a_full_registry_takes_no_new_game_but_keeps_serving_the_old(registry, clock):
    for i in range(5):
        registry.register_game(f"g{i}", HOST)
    with pytest.raises(Full):
        registry.register_game("one more", HOST)
    assert registry.register_game("g0", HOST) is False
    clock.tick(60)
    assert registry.register_game("one more", HOST) is True


def test_a_poll_gives_all_guests_each_time(registry):
    registry.register_game("g", HOST)
    first, second = started(registry, peer="1", addresses=("a",))[0], started(registry, peer="2", addresses=("b",))[0]
    expected = [Session(first.session_id, first.session_key, ("a",)), Session(second.session_id, second.session_key, ("b",))]
    assert polled(registry).guests == polled(registry).guests == expected


def test_a_poll_after_a_cursor_gives_those_that_came_or_moved_since(registry):
    registry.register_game("g", HOST)
    started(registry, peer="1")
    cursor = polled(registry).cursor
    assert polled(registry, after=cursor).guests == []
    came, _ = started(registry, peer="2")
    assert [guest.session_id for guest in polled(registry, after=cursor).guests] == [came.session_id]
    cursor = polled(registry).cursor
    moved, _ = started(registry, peer="1", addresses=("elsewhere",))
    assert polled(registry, after=cursor).guests == [Session(moved.session_id, moved.session_key, ("elsewhere",))]


def test_a_guest_who_only_says_that_it_is_still_there_does_not_come_again(registry):
    registry.register_game("g", HOST)
    started(registry)
    cursor = polled(registry).cursor
    started(registry)
    assert polled(registry, after=cursor) == ([], cursor, [])


def test_an_old_cursor_gives_the_same_again(registry):
    registry.register_game("g", HOST)
    before = polled(registry).cursor
    started(registry)
    assert polled(registry, after=before) == polled(registry, after=before)


def test_the_cursor_grows_with_each_guest_and_never_shrinks(registry, clock):
    registry.register_game("g", HOST)
    cursors = [polled(registry).cursor]
    for peer in "abc":
        started(registry, peer=peer)
        cursors.append(polled(registry).cursor)
    assert cursors == sorted(set(cursors))
    clock.tick(59)
    polled(registry)
    clock.tick(59)
    assert polled(registry).cursor >= cursors[-1] and registry.counts() == (1, 0)


def test_a_cursor_of_an_earlier_run_hides_no_guest(clock):
    for first, kept in ((0, 10 ** 9), (10 ** 9, 7)):    # this run's cursors begin below or above
        registry = Registry(Settings(), clock, cursor=first)
        registry.register_game("g", HOST)
        started(registry)
        assert len(polled(registry, after=kept).guests) == 1
        assert polled(registry).cursor > first


def test_a_cursor_of_another_game_says_nothing_wrong(registry):
    """Versions are common to all games, so none is ever reused for another guest."""
    registry.register_game("g", HOST)
    started(registry)
    cursor = polled(registry).cursor
    registry.delete_game("g", HOST)
    registry.register_game("g", HOST)
    started(registry)
    assert len(polled(registry, after=cursor).guests) == 1


def test_the_same_start_twice_is_one_guest_with_one_session(registry):
    registry.register_game("g", HOST)
    assert started(registry) == started(registry)
    assert registry.counts() == (1, 1) and len(polled(registry).guests) == 1


def test_each_host_and_guest_pair_has_a_session_of_its_own(registry):
    registry.register_game("g", HOST)
    registry.register_game("h", HOST)
    sessions = [started(registry, game, peer)[0] for game in "gh" for peer in "12"]
    assert len({session.session_id for session in sessions} | {session.session_key for session in sessions}) == 8


def test_the_host_and_the_guest_are_given_the_same_session(registry):
    registry.register_game("g", HOST)
    session, _ = started(registry)
    assert polled(registry).guests == [session._replace(addresses=("there",))]


def test_a_guest_gets_the_hosts_addresses_and_a_cursor_that_grows_when_they_change(registry):
    registry.register_game("g", HOST)
    assert started(registry)[0].addresses == ()
    polled(registry)
    session, first = started(registry)
    assert session.addresses == ("here",)
    polled(registry)
    assert started(registry)[1] == first
    polled(registry, addresses=("moved",))
    session, second = started(registry)
    assert session.addresses == ("moved",) and second > first


def test_a_host_cannot_start_its_own_game(registry):
    registry.register_game("g", HOST)
    with pytest.raises(Conflict):
        started(registry, peer=HOST)
    assert registry.counts() == (1, 0)


def test_a_full_game_takes_no_new_guest_but_keeps_serving_the_old(registry, clock):
    registry.register_game("g", HOST)
    for peer in "123":
        started(registry, peer=peer)
    with pytest.raises(Full):
        started(registry, peer="4")
    assert started(registry, peer="1") and registry.counts() == (1, 3)
    clock.tick(59)
    polled(registry)
    clock.tick(1)
    assert started(registry, peer="4")


def test_a_reply_goes_to_one_guest_alone(registry):
    registry.register_game("g", HOST)
    one, other = started(registry, peer="1")[0], started(registry, peer="2")[0]
    assert polled(registry, replies={one.session_id: ("for you",)}).gone == []
    assert started(registry, peer="1")[0].addresses == ("for you",)
    assert started(registry, peer="2")[0].addresses == ("here",) and other.session_id != one.session_id


def test_a_reply_stands_in_place_of_the_general_addresses_also_when_they_change(registry):
    registry.register_game("g", HOST)
    session, _ = started(registry)
    polled(registry, replies={session.session_id: ("for you",)})
    before = started(registry)
    polled(registry, addresses=("moved",))
    assert started(registry) == before


def test_the_cursor_of_a_start_grows_with_a_new_reply_only(registry):
    registry.register_game("g", HOST)
    session, first = started(registry)
    cursors = [first]
    for reply in (("a",), ("a",), ("b",), ()):
        polled(registry, replies={session.session_id: reply})
        offered, cursor = started(registry)
        assert offered.addresses == reply
        cursors.append(cursor)
    assert cursors[1] == cursors[2] and first < cursors[1] < cursors[3] < cursors[4]


def test_replies_to_sessions_that_are_gone_are_listed_and_the_others_delivered(registry, clock):
    registry.register_game("g", HOST)
    late, _ = started(registry, peer="1")
    clock.tick(30)
    polled(registry)
    session, _ = started(registry, peer="2")
    clock.tick(30)
    assert polled(registry, replies={late.session_id: ("x",), session.session_id: ("y",), "never": ()}).gone == [late.session_id, "never"]
    assert started(registry, peer="2")[0].addresses == ("y",)


def test_a_reply_does_not_reach_another_hosts_guest(registry):
    registry.register_game("g", HOST)
    registry.register_game("h", OTHER)
    session, _ = started(registry)
    before = started(registry)
    assert polled(registry, "h", OTHER, replies={session.session_id: ("evil",)}).gone == [session.session_id]
    assert started(registry) == before


def test_the_list_is_oldest_first_also_after_a_rename(registry):
    for game in ("b", "c", "a"):
        registry.register_game(game, HOST)
    registry.update_game("b", HOST, "z")
    assert [game.name for game in registry.list_games()] == ["z", "c", "a"]


def test_an_unlisted_game_is_not_listed_but_found_and_started_by_name(registry):
    registry.register_game("g", HOST, listed=False)
    assert registry.list_games() == [] and registry.get_game("g") == ("g", {}, 0, False)
    assert started(registry)
    registry.update_game("g", HOST, listed=True)
    assert registry.list_games() == [("g", {}, 1, False)]


def test_a_game_is_ready_when_its_host_has_addresses(registry):
    registry.register_game("g", HOST)
    ready = [registry.get_game("g").ready]
    for addresses in ((), ("here",), ()):
        polled(registry, addresses=addresses)
        ready.append(registry.get_game("g").ready)
    assert ready == [False, False, True, False]


def test_a_rename_keeps_guests_addresses_owner_and_session(registry):
    registry.register_game("g", HOST, {"map": "ice"})
    polled(registry)
    before = started(registry)
    assert registry.update_game("g", HOST, "h") == ("h", {"map": "ice"}, 1, True)
    assert started(registry, "h") == before and len(polled(registry, "h").guests) == 1
    with pytest.raises(NotFound):
        registry.get_game("g")
    assert registry.register_game("g", OTHER) is True


def test_a_rename_to_a_taken_name_changes_nothing(registry):
    registry.register_game("g", HOST)
    registry.register_game("h", OTHER)
    before = registry.list_games()
    with pytest.raises(Conflict):
        registry.update_game("g", HOST, "h", {"map": "ice"}, False)
    assert registry.list_games() == before


def test_a_rename_to_its_own_name_is_none(registry):
    registry.register_game("g", HOST)
    events(registry)
    assert registry.update_game("g", HOST, "g").name == "g" and events(registry) == []


def test_a_deleted_game_is_gone_with_its_guests(registry):
    registry.register_game("g", HOST)
    started(registry)
    registry.delete_game("g", HOST)
    assert registry.counts() == (0, 0) and registry.list_games() == []


OPERATIONS = {
    "poll": lambda registry, peer: polled(registry, peer=peer, addresses=("evil",), replies={"id0": ("evil",)}),
    "update": lambda registry, peer: registry.update_game("g", peer, "h", {"evil": 1}, False),
    "delete": lambda registry, peer: registry.delete_game("g", peer),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_only_the_owner_may(operation, registry):
    registry.register_game("g", HOST)
    started(registry)
    before = registry.list_games(), started(registry)
    with pytest.raises(Forbidden):
        operation(registry, OTHER)
    assert (registry.list_games(), started(registry)) == before
    operation(registry, HOST)


@pytest.mark.parametrize("operation", [*OPERATIONS.values(), lambda registry, peer: started(registry), lambda registry, peer: registry.get_game("g")],
                         ids=[*OPERATIONS, "start", "get"])
def test_there_is_no_way_to(operation, registry, clock):
    with pytest.raises(NotFound):
        operation(registry, HOST)
    registry.register_game("g", HOST)
    clock.tick(60)
    with pytest.raises(NotFound):
        operation(registry, HOST)


@pytest.mark.parametrize("sign, lives", rows({
    "register": (lambda registry: registry.register_game("g", HOST), True),
    "poll": (lambda registry: polled(registry), True),
    "start by a guest": (lambda registry: started(registry), False),
    "update": (lambda registry: registry.update_game("g", HOST, info={}), False),
    "get and list": (lambda registry: (registry.get_game("g"), registry.list_games()), False),
    "register by another": (lambda registry: pytest.raises(Conflict, registry.register_game, "g", OTHER), False),
    "poll by another": (lambda registry: pytest.raises(Forbidden, polled, registry, peer=OTHER), False),
}))
def test_sign_of_life_of_a_host(sign, lives, registry, clock):
    registry.register_game("g", HOST)
    clock.tick(59.9)
    sign(registry)
    clock.tick(0.1)
    assert registry.counts()[0] == lives
    clock.tick(59.8)
    assert registry.counts()[0] == lives
    clock.tick(0.1)
    assert registry.counts() == (0, 0)


def test_a_guest_lives_by_its_starts_alone(registry, clock):
    registry.register_game("g", HOST)
    started(registry, peer="1")
    started(registry, peer="2")
    for _ in range(2):
        clock.tick(30)
        polled(registry)
        started(registry, peer="2")
    assert len(polled(registry).guests) == 1 and registry.get_game("g").guests == 1
    clock.tick(59)
    assert len(polled(registry).guests) == 1
    clock.tick(1)
    assert len(polled(registry).guests) == 0


def test_a_guest_who_was_gone_comes_back_with_a_new_session(registry, clock):
    registry.register_game("g", HOST)
    old, _ = started(registry)
    cursor = polled(registry).cursor
    clock.tick(59)
    polled(registry)
    clock.tick(1)
    new, _ = started(registry)
    assert [guest.session_id for guest in polled(registry, after=cursor).guests] == [new.session_id] != [old.session_id]


def test_each_lease_is_the_settings(clock):
    registry = Registry(Settings(game_ttl=10, guest_ttl=5), clock)
    registry.register_game("g", HOST)
    started(registry)
    counts = []
    for _ in range(2):
        clock.tick(5)
        counts.append(registry.counts())
    assert counts == [(1, 0), (0, 0)]


class CountedFloat(float):
    """A time that counts how often times are compared."""

    compared = 0

    def __add__(self, other):
        return CountedFloat(float(self) + other)

    def compare(self, other, how):
        CountedFloat.compared += 1
        return how(float(self), float(other))

    def __gt__(self, other):
        return self.compare(other, float.__gt__)

    def __ge__(self, other):
        return self.compare(other, float.__ge__)

    def __lt__(self, other):
        return self.compare(other, float.__lt__)

    def __le__(self, other):
        return self.compare(other, float.__le__)


def test_expiry_looks_at_no_more_games_however_many_there_are(clock):
    clock.now = CountedFloat(clock.now)
    registry = Registry(Settings(), clock)
    for i in range(500):
        registry.register_game(f"g{i}", HOST)
        started(registry, f"g{i}")
    CountedFloat.compared = 0
    polled(registry, "g250")
    assert 0 < CountedFloat.compared <= 4


def test_what_happens_to_games_is_an_event_each(registry, clock):
    registry.register_game("g", HOST)
    registry.register_game("g", HOST)
    polled(registry, addresses=())
    for addresses in (("here",), ("here",), ("moved",)):
        polled(registry, addresses=addresses)
    started(registry)
    started(registry, addresses=("moved",))
    registry.update_game("g", HOST, "h")
    registry.update_game("h", HOST, info={"map": "ice"})
    registry.get_game("h")
    registry.list_games()
    assert events(registry) == ["register_game", "poll_game", "start_game", "update_game"]
    registry.delete_game("h", HOST)
    registry.register_game("i", HOST)
    clock.tick(60)
    registry.expire_games()
    assert events(registry) == ["delete_game", "register_game", "expire_game"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_event_quotes_its_name_in_one_printable_line(name):
    line = str(p2pserver.Event("register_game", name))
    operation, quoted = line.split(" ", 1)
    assert line.isprintable() and (operation, ast.literal_eval(quoted)) == ("register_game", name)


def test_the_registry_keeps_no_peer_id(registry):
    registry.register_game("g", HOST, {"keep": "kept"})
    started(registry)
    seen, queue = set(), [registry]
    while queue:
        thing = queue.pop()
        if id(thing) not in seen and not isinstance(thing, (type, types.ModuleType, types.FunctionType, types.MethodType)):
            seen.add(id(thing))
            queue += gc.get_referents(thing)
            assert not isinstance(thing, str) or HOST not in thing and GUEST not in thing
            assert not isinstance(thing, bytes) or HOST.encode() not in thing and GUEST.encode() not in thing
    assert id(registry.get_game("g").info) in seen, "this looked into the games"


def test_new_ids_are_128_random_bits():
    ids = {p2pserver.new_session_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(re.fullmatch("[0-9a-f]{32}", text) for text in ids)


def test_nothing_is_lost_or_double_when_32_threads_use_one_registry(hasty_threads):
    """One game: 31 guests come and move while its host polls by cursor."""
    registry = Registry(Settings())
    registry.register_game("g", HOST)
    seen, cursors = {}, [-1]

    def work(i):
        if i:
            results = [started(registry, peer=f"guest {i}", addresses=(move,))[0] for move in range(20)]
            return {session.session_id for session in results}
        deadline = time.monotonic() + WAIT
        while (len(seen) < 31 or set(seen.values()) != {(19,)}) and time.monotonic() < deadline:
            answer = polled(registry, after=cursors[-1] if cursors[-1] >= 0 else None)
            seen.update((guest.session_id, guest.addresses) for guest in answer.guests)
            cursors.append(answer.cursor)
        return set(seen)

    everything, *each = in_threads(32, work)
    assert all(len(ids) == 1 for ids in each) and set().union(*each) == everything and len(everything) == 31
    assert set(seen.values()) == {(19,)} and cursors == sorted(cursors)


def test_of_32_threads_that_want_one_name_one_gets_it(hasty_threads):
    registry = Registry(Settings())

    def work(i):
        won = 0
        for n in range(30):
            with contextlib.suppress(Conflict):
                won += registry.register_game(f"g{n}", f"host {i}")
        return won

    assert sum(in_threads(32, work)) == 30 and registry.counts() == (30, 0)


def test_limits_hold_when_32_threads_press_against_them(hasty_threads):
    registry = Registry(Settings(max_games=7, max_guests=7))
    registry.register_game("g", HOST)

    def work(i):
        for call in (functools.partial(registry.register_game, f"g{i}", f"host {i}"), functools.partial(started, registry, peer=f"guest {i}")):
            with contextlib.suppress(Full):
                call()

    in_threads(32, work)
    assert registry.counts() == (7, 7)


# ---- STUN -----------------------------------------------------------------------------------------------------------

COOKIE, TRANSACTION = 0x2112A442, b"transaction!"
MAPPED, FINGERPRINT = 0x0020, 0x8028
SOURCE = ("203.0.113.7", 40000)

# RFC 5769: a request with SOFTWARE, PRIORITY, ICE-CONTROLLED, USERNAME, MESSAGE-INTEGRITY and FINGERPRINT (2.1), its answers (2.2, 2.3), and a
# request with USERNAME, NONCE, REALM and MESSAGE-INTEGRITY (2.4).
RFC5769_1 = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff80290008932ff9b151263b36"
    "000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a280280004e57a3bcf")
RFC5769_2 = bytes.fromhex("0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
                          "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96")
RFC5769_3 = bytes.fromhex("010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
                          "00080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c")
RFC5769_4 = bytes.fromhex("000100602112a44278ad3433c6ad72c029da412e00060012e3839ee38388e383aae38383e382afe382b90000"
                          "0015001c662f2f3439396b39353464364f4c33346f4c39465354767936347341"
                          "0014000b6578616d706c652e6f72670000080014f67024656dd64a3e02b8e0712e85c9a28ca89666")


def attribute(kind, value=b"", length=None):
    return struct.pack(">HH", kind, len(value) if length is None else length) + value + b"\0" * (-len(value) % 4)


def stun(*attributes, kind=1, cookie=COOKIE, length=None, fingerprint=False):
    body = b"".join(attributes)
    size = len(body) + 8 * fingerprint if length is None else length
    message = struct.pack(">HHI", kind, size, cookie) + TRANSACTION + body
    return message + attribute(FINGERPRINT, struct.pack(">I", zlib.crc32(message) ^ 0x5354554E)) if fingerprint else message


def taken_apart(answer):
    """Kind and attributes of an answer, whose head is checked; attributes as a list of (kind, value)."""
    kind, length, cookie = struct.unpack_from(">HHI", answer)
    assert (length, cookie, len(answer) % 4) == (len(answer) - 20, COOKIE, 0)
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
    "one byte": b"\0",
    "nineteen bytes": REQUEST[:19],
    "a wrong cookie": stun(cookie=0x2112A443),
    "RFC 3489, which had no cookie": stun(cookie=0),
    "a length that is too small": stun(attribute(0x8022, b"test"), length=4),
    "a length that is too large": stun(length=4),
    "a length that ends within a word": stun(length=2) + b"\0\0",
    "a message that ends within a word": REQUEST + b"\0\0",
    "an attribute that overruns": stun(attribute(0x8022, b"test", length=5)),
    "an attribute that overruns by far": stun(attribute(0x8022, b"test", length=0xFFFF)),
    "a last attribute without its value": stun(attribute(0x8022, length=4)),
    "more than 1280 bytes": stun(attribute(0x8022, bytes(1260))),
    "an Allocate request": stun(kind=0x0003),
    "a Shared Secret request": stun(kind=0x0002),
    "a Binding indication": stun(kind=0x0011),
    "a Binding success": stun(kind=0x0101),
    "a Binding error": stun(kind=0x0111),
    "the first bits set": stun(kind=0x8001),
    "the second bit set": stun(kind=0x4001),
    "a wrong FINGERPRINT": stun(attribute(FINGERPRINT, b"1234")),
    "a FINGERPRINT that is not the last": stun(attribute(FINGERPRINT, struct.pack(">I", zlib.crc32(stun(length=16)) ^ 0x5354554E)), attribute(0x8022, b"test")),
    "a FINGERPRINT of eight bytes": stun(attribute(FINGERPRINT, b"12345678")),
    "a FINGERPRINT of no byte": stun(attribute(FINGERPRINT)),
    "a FINGERPRINT made without its length": stun(length=8) + attribute(FINGERPRINT, struct.pack(">I", zlib.crc32(REQUEST) ^ 0x5354554E)),
    "RFC 5769 2.2": RFC5769_2,
    "RFC 5769 2.3": RFC5769_3,
    "a request of HTTP": b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
}


@pytest.mark.parametrize("datagram", SILENT.values(), ids=SILENT)
def test_stun_is_silent_to(datagram):
    assert p2pserver.stun_answer(datagram, SOURCE) is None


@pytest.mark.parametrize("request_, answer", rows({
    "without FINGERPRINT": (REQUEST, "0101000c2112a442" + TRANSACTION.hex() + "0020000800018d52ea12d545"),
    "RFC 5769 2.1": (RFC5769_1, None),
    "exactly 1280 bytes": (stun(attribute(0x8022, bytes(1256))), None),
    "padding of other than zeros": (stun(b"\x80\x22\0\1Axyz"), None),
}))
def test_stun_answers(request_, answer):
    reply = p2pserver.stun_answer(request_, SOURCE)
    assert mapped(reply) == SOURCE and reply[4:20] == request_[4:20]
    assert answer is None or reply.hex() == answer


@pytest.mark.parametrize("fingerprint", [False, True])
def test_an_answer_of_stun_has_a_fingerprint_if_the_request_had_one_and_no_software(fingerprint):
    answer = p2pserver.stun_answer(stun(attribute(0x8022, b"client"), fingerprint=fingerprint), SOURCE)
    kinds = [kind for kind, _ in taken_apart(answer)[1]]
    assert kinds == ([MAPPED, FINGERPRINT] if fingerprint else [MAPPED])
    assert not fingerprint or answer[-4:] == struct.pack(">I", zlib.crc32(answer[:-8]) ^ 0x5354554E)


@pytest.mark.parametrize("answer, source", [(RFC5769_2, ("192.0.2.1", 32853)), (RFC5769_3, ("2001:db8:1234:5678:11:2233:4455:6677", 32853))], ids=["2.2", "2.3"])
def test_stun_maps_an_address_as_rfc_5769_does(answer, source):
    assert dict(taken_apart(p2pserver.stun_answer(RFC5769_1, source))[1])[MAPPED] == dict(taken_apart(answer)[1])[MAPPED]


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
    "REALM and NONCE, as in RFC 5769 2.4": ([RFC5769_4[42 + 2:-24]], [0x0015, 0x0014]),
}))
@pytest.mark.parametrize("fingerprint", [False, True])
def test_stun_answers_420_to(attributes, unknown, fingerprint):
    kind, answered = taken_apart(p2pserver.stun_answer(stun(*attributes, fingerprint=fingerprint), SOURCE))
    assert kind == 0x0111 and [each for each, _ in answered] == [0x0009, 0x000A] + [FINGERPRINT] * fingerprint
    assert answered[0][1][:4] == b"\0\0\4\x14" and answered[1][1] == struct.pack(f">{len(unknown)}H", *unknown)


@pytest.mark.parametrize("kind, value", rows({
    "USERNAME": (0x0006, b"a:b"), "MESSAGE-INTEGRITY": (0x0008, bytes(20)), "MESSAGE-INTEGRITY-SHA256": (0x001C, bytes(32)), "PRIORITY": (0x0024, b"1234"),
    "USE-CANDIDATE": (0x0025, b""), "ICE-CONTROLLED": (0x8029, bytes(8)), "ICE-CONTROLLING": (0x802A, bytes(8)), "one that may be ignored": (0xFFFF, b"x"),
}))
def test_stun_ignores(kind, value):
    assert mapped(p2pserver.stun_answer(stun(attribute(kind, value), fingerprint=True), SOURCE)) == SOURCE


def test_a_flipped_bit_makes_a_request_with_fingerprint_silent():
    """Save in the kind of FINGERPRINT itself: then there is none."""
    last = len(RFC5769_1) - 8
    for bit in (bit for bit in range(len(RFC5769_1) * 8) if bit // 8 not in (last, last + 1)):
        flipped = bytearray(RFC5769_1)
        flipped[bit // 8] ^= 1 << bit % 8
        assert p2pserver.stun_answer(bytes(flipped), SOURCE) is None, bit


def test_a_request_cut_anywhere_is_silent():
    assert [p2pserver.stun_answer(RFC5769_1[:end], SOURCE) for end in range(len(RFC5769_1))] == [None] * len(RFC5769_1)


def test_no_junk_makes_stun_fail():
    chance = random.Random(5389)
    for _ in range(5000):
        junk = bytearray(chance.choice((REQUEST, RFC5769_1[:-8] + stun(), stun(attribute(0x8022, b"x")), bytes(40))) + bytes(chance.randrange(3) * 4))
        junk[2:4] = struct.pack(">H", len(junk) - 20)
        for _ in range(chance.randrange(4)):
            junk[chance.randrange(len(junk))] = chance.randrange(256)
        answer = p2pserver.stun_answer(bytes(junk), SOURCE)
        assert answer is None or taken_apart(answer)[0] in (0x0101, 0x0111)


def test_a_source_has_its_burst_at_once_and_then_its_rate(clock):
    buckets = p2pserver.Buckets(5.0, clock)
    assert [buckets.take("203.0.113.1") for _ in range(100)].count(True) == 20
    counts = []
    for seconds in (0.1, 0.1, 1.0, 2.0, 1000.0):
        clock.tick(seconds)
        counts.append([buckets.take("203.0.113.1") for _ in range(100)].count(True))
    assert counts == [0, 1, 5, 10, 20]


def test_a_flood_that_goes_on_gets_the_rate_and_no_more(clock):
    buckets, taken = p2pserver.Buckets(5.0, clock), 0
    for _ in range(10000):
        clock.tick(0.001)
        taken += buckets.take("203.0.113.1")
    assert 60 <= taken <= 70


def test_without_a_rate_each_datagram_is_answered(clock):
    assert all(p2pserver.Buckets(0, clock).take("203.0.113.1") for _ in range(1000))


@pytest.mark.parametrize("flooder, neighbours, one", rows({
    "IPv4 addresses apart": ("203.0.113.1", "203.0.113.{}", False),
    "a /64 as one": ("2001:db8::1", "2001:db8::{}:1", True),
    "two /64s apart": ("2001:db8::1", "2001:db8:0:{}::1", False),
    "an IPv4-mapped address as the IPv4 one": ("203.0.113.1", "::ffff:203.0.113.1", True),
    "IPv4-mapped addresses apart": ("::ffff:203.0.113.1", "::ffff:203.0.113.{}", False),
}))
def test_buckets_take(flooder, neighbours, one, clock):
    """One of eight neighbours in a bucket of its own will do: two sources may share one by chance."""
    buckets = p2pserver.Buckets(5.0, clock)
    while buckets.take(flooder):
        pass
    assert any(buckets.take(neighbours.format(i)) for i in range(2, 10)) is not one


def test_200_000_forged_sources_take_no_memory(clock):
    buckets = p2pserver.Buckets(5.0, clock)
    buckets.take("203.0.113.1")
    tracemalloc.start()
    try:
        for i in range(200_000):
            buckets.take(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def udp(api, to="127.0.0.1", source=None):
    """A UDP socket with ask(datagram, ...): send them all, and return the first answer and the address that it came from."""
    with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT)
        sock.bind((source or to if to != "127.0.0.2" else "127.0.0.1", 0))

        def ask(*datagrams):
            for datagram in datagrams:
                sock.sendto(datagram, (to, api.server.stun.port))
            answer, address = sock.recvfrom(2048)
            return answer, address[:2]

        yield types.SimpleNamespace(ask=ask, socket=sock, address=sock.getsockname()[:2])


def require_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@pytest.mark.parametrize("host, to", [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), ("::1", "::1"), ("", "127.0.0.1"), ("", "127.0.0.2"),
                                      ("", "::1")], ids=lambda text: text or "all")
def test_the_stun_socket_on_one_host_answers_from_the_address_that_was_asked(host, to, serve):
    if ":" in to:
        require_ipv6()
    api = serve(host=host, no_stun=False)
    with udp(api, to) as client:
        answer, sender = client.ask(REQUEST)
        assert sender == (to, api.port) and mapped(answer) == client.address


def test_the_stun_socket_is_silent_to_junk_and_serves_on(serve):
    with udp(serve(no_stun=False)) as client:
        answer, _ = client.ask(*SILENT.values(), RFC5769_1)
        assert answer[8:20] == RFC5769_1[8:20]


def test_stun_has_the_port_of_http_unless_told_otherwise(serve):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = serve(no_stun=False, stun_port=port)
    assert serve(no_stun=False).server.stun.port != port == api.server.stun.port
    with udp(api) as client:
        assert mapped(client.ask(REQUEST)[0]) == client.address


def test_a_flooding_source_gets_its_burst_from_the_stun_socket_and_others_are_served(serve):
    api = serve(no_stun=False, stun_rate=0.001)
    with udp(api) as flooder, contextlib.ExitStack() as stack:
        flooder.ask(*[REQUEST] * 50)
        others = [stack.enter_context(udp(api, source=f"127.0.0.{i}")) for i in range(3, 7)]
        for other in others:
            other.socket.sendto(REQUEST, ("127.0.0.1", api.server.stun.port))
        assert select.select([other.socket for other in others], [], [], WAIT)[0]   # by then the flood has been dealt with
        flooder.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            for answers in itertools.count(1):
                flooder.socket.recv(2048)
        assert answers == 20
