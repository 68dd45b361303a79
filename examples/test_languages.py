"""The tests of the examples in other languages: each meets the simulators, as guest and as host, with the real server on this machine."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys

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
    """The name of its game, and the file with what it says; it ends with the block as by Ctrl-C or Enter, and takes its game along."""
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, text=True) as process:
        try:
            [name] = wait_until(lambda: offered(server))
            yield name, process.stdout
        finally:
            if command[0] == "mono":       # which does not tell a program of Ctrl-C unless it has a terminal
                process.stdin.close()
            else:
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
    with run_host([*simulator("hosts", server, tmp_path), "--hosts", "1", "--name", "castle"], server) as (name, said):
        text = run_guest([*example, "join", name, server])
        assert re.findall(r"back came (.*)", text) == [f"hello {number}" for number in range(1, 6)]
        wait_until(lambda: "connected: 127.0.0.1:" in said.readline())


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
