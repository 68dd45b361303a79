"""The tests of the examples in other languages: each meets the simulators, as guest and as host, with the real server on this machine."""

from __future__ import annotations

import contextlib
import hmac
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import pytest
import requests
from browsers import HERE, WAIT, run, run_server, wait_until

# The programs that each takes, and what the last one of them runs.
LANGUAGES = {"node": (["node"], "peer.mjs"), "lua": (["lua5.1"], "peer.lua"), "csharp": (["mcs", "mono"], "peer.exe")}


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    """Where the example in C# is compiled to."""
    target = tmp_path_factory.mktemp("csharp") / "peer.exe"
    libraries = ["-r:System.Net.Http.dll", "-r:System.Runtime.Serialization.dll"]
    subprocess.run(["mcs", "-warnaserror", f"-out:{target}", *libraries, *map(str, (HERE / "csharp").glob("*.cs"))], check=True)
    return target


def command_of(request):
    """The command that starts the example; role, name and server are to follow."""
    programs, script = LANGUAGES[request.param]
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"there is no {' '.join(missing)}")
    return [programs[-1], request.getfixturevalue("executable") if request.param == "csharp" else HERE / request.param / script]


@pytest.fixture(params=list(LANGUAGES))
def example(request):
    return command_of(request)


@pytest.fixture(params=list(LANGUAGES))
def other(request):
    return command_of(request)


@pytest.fixture
def server():
    with run_server() as url:
        yield url


def simulator(name, server, folder):
    """The command of a simulator that keeps its peerId in a folder."""
    return [sys.executable, HERE.parent / f"simulate_{name}.py", "--server", server, "--peer-id-file", folder / name]


def offered(server):
    """The names of the games to which a guest can go."""
    return [game["name"] for game in requests.get(f"{server}/games", timeout=WAIT).json()["games"] if game["ready"]]


@contextlib.contextmanager
def run_host(command, server):
    """The name of its game, and what tells whether it has said something; it ends with the block as by Ctrl-C, and takes its game along."""
    reading, terminal = pty.openpty()       # without a terminal mono does not tell a program of Ctrl-C
    os.set_blocking(reading, False)
    text = bytearray()

    def has_said(words):
        with contextlib.suppress(BlockingIOError):
            text.extend(os.read(reading, 4096))
        return words.encode() in text

    with open(reading), open(terminal), subprocess.Popen(list(map(str, command)), stdin=terminal, stdout=terminal, stderr=terminal) as process:
        try:
            [name] = wait_until(lambda: offered(server))
            yield name, has_said
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(WAIT)
            finally:
                process.kill()
    assert offered(server) == []


def run_guest(command):
    """What a guest says until it ends, which is well."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2 * WAIT, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_example_has_at_most_200_lines_of_at_most_120_characters(language):
    lines = [line for path in (HERE / language).iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


def test_an_example_joins_a_host_in_python(example, server, tmp_path):
    with run_host([*simulator("hosts", server, tmp_path), "--hosts", "1", "--name", "castle"], server) as (name, has_said):
        text = run_guest([*example, "join", name, server])
        assert re.findall(r"back came (.*)", text) == [f"hello {number}" for number in range(1, 6)]
        wait_until(lambda: has_said("connected: 127.0.0.1:"))


def test_a_guest_in_python_joins_an_example(example, server, tmp_path):
    with run_host([*example, "host", "castle", server], server):
        text = run_guest([*simulator("guest", server, tmp_path), "--game", "castle"])
        assert "connected to 1 of 1 games, 5 of 5 messages came back" in text
        assert re.search(r"candidates (\S+),", text)[1] == re.search(r"connected: (\S+) to", text)[1]       # the answer tells where it sees us


def test_each_example_meets_each(example, other, server):
    """The guest leaves when it ends: its place is free at once."""
    with run_host([*example, "host", "castle", server], server):
        assert run_guest([*other, "join", "castle", server]).count("back came hello") == 5
        assert requests.get(f"{server}/games/castle", timeout=WAIT).json()["guests"] == 0


def test_an_example_publishes_its_own_address_and_where_stun_sees_it(example, server):
    """They are the same on this machine."""
    owner = {"name": "castle", "peerId": "ada"}
    requests.post(f"{server}/games/register", json=owner, timeout=WAIT)
    with subprocess.Popen([*map(str, example), "join", "castle", server]) as guest:
        try:
            addresses = wait_until(lambda: [each["addresses"] for each in requests.post(f"{server}/games/poll", json={**owner, "addresses": []}, timeout=WAIT)
                                            .json()["guests"] if len(each["addresses"]) == 2])
        finally:
            guest.kill()
    assert len(set(addresses[0])) == 1


def test_an_example_says_when_its_game_is_on_offer(example, server):
    with run_host([*example, "host", "castle", server], server) as (_, has_said):
        wait_until(lambda: has_said(f"castle is on offer at {server}"))


@pytest.mark.parametrize("arguments", [[], ["host"], ["castle", "host"]])
def test_an_example_says_how_it_is_used(example, arguments):
    done = subprocess.run([*map(str, example), *arguments], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"usage: {example[1].name} host|join NAME [SERVER]\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("example", ["node"], indirect=True)
def test_an_example_deletes_its_game_when_it_is_ended_or_its_terminal_closes(example, server, number):
    with run(*map(str, example), "host", "castle", server, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: offered(server))
        process.send_signal(number)
        assert process.wait(WAIT) == 0 and offered(server) == []


def test_a_host_runs_without_a_terminal(example, server):
    with run(*map(str, example), "host", "castle", server, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL):
        assert run_guest([*example, "join", *wait_until(lambda: offered(server)), server]).count("back came hello") == 5


def test_an_example_needs_no_stun_on_one_machine(example):
    with run_server("--no-stun") as server, run_host([*example, "host", "castle", server], server):
        assert run_guest([*example, "join", "castle", server]).count("back came hello") == 5


@pytest.mark.parametrize("example", ["node"], indirect=True)
def test_an_example_says_that_it_cannot_reach_the_server(example):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = subprocess.run([*map(str, example), "join", "castle", server], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"cannot reach {server}\n")


def test_an_example_says_that_there_is_no_such_game(example, server):
    done = subprocess.run([*map(str, example), "join", "castle", server], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "there is no game 'castle'\n")


def test_the_example_in_csharp_sends_its_bodies_in_chunks(executable):
    """As HttpClient's PostAsJsonAsync does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT)
        with run("mono", executable, "join", "castle", f"http://127.0.0.1:{listener.getsockname()[1]}", stderr=subprocess.DEVNULL):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                head = b"".join(iter(stream.readline, b"\r\n")).lower()
    assert b"transfer-encoding: chunked" in head and b"content-length" not in head


def attribute(kind, value=b""):
    return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)


def stun(kind, transaction, key, *attributes):
    """A signed STUN message, as docs/WIRE.md describes it."""
    def extended(body, by):
        return struct.pack(">HHI", kind, len(body) + by, 0x2112a442) + transaction + body
    body = b"".join(attributes)
    body += attribute(0x0008, hmac.digest(key, extended(body, 24), "sha1"))
    return extended(body, 8) + attribute(0x8028, struct.pack(">I", zlib.crc32(extended(body, 8)) ^ 0x5354554e))


def checks_of(peer, key, nomination):
    """When each check of the other comes, and it; each is answered, and followed by a check of ours if there is one."""
    while True:
        datagram, sender = peer.recvfrom(2048)
        if datagram[:2] == b"\0\1":
            peer.sendto(stun(0x0101, datagram[8:20], key, attribute(0x0020, bytes(8))), sender)
            if nomination:
                peer.sendto(nomination, sender)
            yield time.monotonic(), datagram


@pytest.mark.parametrize("role", ["host", "join"])
def test_an_example_keeps_its_connection_alive_and_a_guest_nominates_it(example, role, server):
    """A peer by hand answers it. Once it has selected the address, checks come at intervals of seconds for as long as it plays."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(WAIT)
        fields = {"name": "castle", "peerId": "ada", "addresses": [f"127.0.0.1:{peer.getsockname()[1]}"]}

        def ask(what):
            return requests.post(f"{server}/games/{what}", json=fields, timeout=WAIT).json()
        if role == "join":
            ask("register")
            ask("poll")
        with run(*map(str, example), role, "castle", server, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process, process.stdin:
            if role == "host":
                wait_until(lambda: offered(server))
            session = ask("start") if role == "host" else wait_until(lambda: ask("poll")["guests"])[0]
            key, user = session["sessionKey"].encode(), f"{session['sessionId']}:{session['sessionId']}".encode()
            nomination = stun(0x0001, bytes(12), key, attribute(0x0006, user), attribute(0x802a, bytes(8)),
                              attribute(0x0024, b"\x6e\xff\xff\xff"), attribute(0x0025))
            checks = checks_of(peer, key, nomination if role == "host" else None)
            last, _ = next(checks)
            moment, check = next(checks)
            while moment - last < 3:
                last = moment
                moment, check = next(checks)        # TimeoutError: no more come
    assert (attribute(0x0006, user) in check, attribute(0x0025) in check) == (True, role == "join")
