#!/usr/bin/env python3
"""Everything at once for a while, and a report: does anything grow, and is any answer but the expected?

    python faults/soak.py [--minutes 10] [--seed N]

Hosts register, wait in polls, rename and delete their games; guests start and wait; lobbies read the list by its ETag; meanwhile
others send garbage, reset, dawdle, do not read, or ask for their address by STUN. The server is a process with short leases, so that
all that it remembers comes and goes many times. Exit status 0: it is as it was, and nothing unexpected came.
"""
import argparse
import collections
import contextlib
import itertools
import os
import random
import sys
import threading
import time
import urllib.parse

from fuzz import Fuzz
from stage import HERE, THERE, WAIT, Connection, call, check_answer, many, open_files, poll, request, serving, wait_until

FLAGS = ["--game-ttl", "6", "--guest-ttl", "4", "--poll-after", "1", "--max-wait", "3", "--idle-timeout", "20", "--stun-rate", "0", "--access-log",
         "--max-guests-per-client", "64"]       # all guests call from one address


class Soak:
    """The clients, each kind in threads of its own. answers: how often which kind got which status; faults: what should not have come."""

    def __init__(self, server, seed):
        self.server, self.seed = server, seed
        self.answers, self.times, self.faults = collections.Counter(), collections.deque(maxlen=20_000), []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._numbers = itertools.count(1)
        kinds = [self.host] * 6 + [self.guest] * 6 + [self.lobby] * 3 + [self.garbage] * 2 + [self.resetter, self.dawdler, self.deaf, self.stun]
        self._threads = [threading.Thread(target=self._play, args=(kind, random.Random(seed + i)), daemon=True) for i, kind in enumerate(kinds)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * WAIT)

    def _play(self, kind, dice):
        while not self._ended.is_set():
            try:
                kind(dice)
            except Exception as fault:
                self.faults.append(f"{kind.__name__}: {fault!r:.500}")
                self._ended.wait(1)

    def pause(self, seconds):
        self._ended.wait(seconds)

    def ask(self, connection, expected, method, path, body=None, **headers):
        """An answer, which must have one of the expected statuses."""
        began = time.monotonic()
        answer = check_answer(connection.ask(method, path, body, **headers), method != "HEAD")
        with self._lock:
            self.answers[f"{method} {'/games/<name>' if path.count('/') > 1 and method != 'POST' else path}", answer.status] += 1
            if "Prefer" not in headers:
                self.times.append(time.monotonic() - began)
        if answer.status not in expected:
            self.faults.append(f"{method} {path} {body}: {answer.status} {answer.body!r:.200}")
        return answer

    # ---- who behaves ----

    def host(self, dice):
        """Offers a game, is polled out of a wait by guests, renames it, answers one of them, and deletes it or is never seen again."""
        name, peer = f"game-{next(self._numbers)}", f"host-{dice.random()}"
        with Connection(self.server) as connection:
            self.ask(connection, [201], "POST", "/games/register", {"name": name, "peerId": peer, "info": {"map": "m" * dice.randrange(500)}})
            cursor = None
            for i in range(dice.randrange(2, 8)):
                answer = self.ask(connection, [200], "POST", "/games/poll", {"name": name, "peerId": peer, "addresses": HERE, "after": cursor},
                                  Prefer=f"wait={dice.randrange(3)}").json
                cursor = answer["cursor"]
                if answer["guests"]:
                    replies = {answer["guests"][0]["sessionId"]: THERE, "none": HERE}
                    self.ask(connection, [200], "POST", "/games/poll", {"name": name, "peerId": peer, "addresses": HERE, "replies": replies})
                if i == 1:
                    self.ask(connection, [200], "PATCH", f"/games/{name}", {"peerId": peer, "name": f"{name}-renamed", "info": {}})
                    name += "-renamed"
                self.pause(0.02)
                self.ask(connection, [403], "POST", "/games/poll", {"name": name, "peerId": "somebody else", "addresses": HERE})
            if dice.random() < 0.6:
                self.ask(connection, [204], "DELETE", f"/games/{name}", {"peerId": peer})
                self.ask(connection, [404], "GET", f"/games/{name}")

    def guest(self, dice):
        with Connection(self.server) as connection:
            games = self.ask(connection, [200], "GET", "/games").json["games"]
            for game in dice.sample(games, min(3, len(games))):     # which may have ended meanwhile
                body = {"name": game["name"], "peerId": f"guest-{dice.random()}", "addresses": THERE}
                for _ in range(0 if self._ended.is_set() else 2):
                    self.ask(connection, [200, 202, 404, 503], "POST", "/games/start", body, Prefer="wait=2")
                self.ask(connection, [200, 404], "GET", "/games/" + urllib.parse.quote(game["name"], safe=""))
                self.pause(0.02)
        self.pause(0.05)

    def lobby(self, dice):
        with Connection(self.server) as connection:
            tag = '"none"'
            for _ in range(50):
                answer = self.ask(connection, [200, 304], "GET", "/games", If_None_Match=tag)
                tag = answer.headers["etag"]
                self.ask(connection, [200], "HEAD", "/healthz")
                self.pause(dice.random() * 0.05)

    # ---- who does not ----

    def garbage(self, dice):
        fuzz = Fuzz(dice.random())
        fuzz.send_wild(self.server, 10, at_once=10)
        self.pause(0.1)

    def stun(self, dice):
        Fuzz(dice.random()).send_stun(self.server, 50)
        self.pause(0.1)

    def resetter(self, dice):
        data = poll("nothing", Prefer="wait=3") + request("GET", "/games") * 20
        for _ in range(20):
            Connection(self.server, data[:dice.randrange(len(data))]).reset()
        self.pause(0.2)

    def dawdler(self, dice):
        """Connections of which some bytes come, or none, until the server has had enough of them."""
        with many(self.server, 50, b"POST /games/poll HTTP/1.1\r\n"[:dice.choice([0, 5, 27])]) as connections:
            for _ in range(10):
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.send(b"x: y\r\n"[:dice.randrange(2)])
                self.pause(0.5)

    def deaf(self, dice):
        """Connections that ask for much and read nothing."""
        with many(self.server, 10, request("GET", "/games") * 50, receive_buffer=4096):
            self.pause(5)


class Level:
    """What the server takes at one time."""

    def __init__(self, server):
        self.memory, self.threads, self.descriptors = server.memory, server.threads, server.descriptors

    def __str__(self):
        return f"{self.memory:.1f} MiB, {self.threads} threads, {self.descriptors} descriptors"


def middle(levels, what):
    return sorted(getattr(level, what) for level in levels)[len(levels) // 2]


def soak(minutes, seed, report=print):
    """The faults that were found, after so many minutes; report takes the lines of a report."""
    open_files(2000)
    with serving(*FLAGS) as server:
        Fuzz(seed).fill_caches(server)
        before, levels = Level(server), []
        report(f"seed {seed}; before: {before}")
        end = time.monotonic() + 60 * minutes
        with Soak(server, seed) as clients:
            next_word = 0.0
            while time.monotonic() < end and server.is_alive:
                levels.append(Level(server))
                if time.monotonic() > next_word:
                    next_word = time.monotonic() + 6 * minutes
                    passed = 60 * minutes - end + time.monotonic()
                    report(f"{passed:5.0f} s: {levels[-1]}, {sum(clients.answers.values())} answers, {len(clients.faults)} faults")
                time.sleep(0.5)
        faults = clients.faults
        if not server.is_alive:
            return [*faults, f"the server ended with {server.process.returncode}: {server.err[-2000:]}"]
        # All clients have gone: in the end so have their connections, and what the server remembers of them.
        try:
            wait_until(lambda: server.descriptors <= before.descriptors, 3 * WAIT)
            wait_until(lambda: call(server, "GET", "/healthz").json["games"] == 0)
        except AssertionError:
            faults.append(f"something stays: {server.descriptors} descriptors, {call(server, 'GET', '/healthz').body!r}")
        report(f"after: {Level(server)}")
        # The first third is for warming up. What comes and goes is compared by its middle over the second and over the last third.
        third = len(levels) // 3
        for what, slack in (("memory", 2), ("threads", 4), ("descriptors", 40)):
            early, late = middle(levels[third:2 * third], what), middle(levels[2 * third:], what)
            report(f"{what}: {early:.1f} in the second third, {late:.1f} in the last")
            if late > 1.1 * early + slack:
                faults.append(f"{what} grow: {early:.1f} to {late:.1f}")
        strange = [line for line in server.err.splitlines() if " INFO " not in line and " WARNING X-Forwarded-For " not in line]
        faults += strange[:5]
        status, seconds = server.stop()
        if status:
            faults.append(f"the server ended with {status}")
    times = sorted(clients.times)
    report(f"{sum(clients.answers.values())} answers to who behaved, half of them within {1000 * times[len(times) // 2]:.1f} ms, "
           f"99 of 100 within {1000 * times[len(times) * 99 // 100]:.1f} ms; ended within {seconds:.2f} s of SIGTERM")
    for (what, status), count in sorted(clients.answers.items()):
        report(f"  {what:30} {status} {count:8}")
    report(f"{len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults[:20]))
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32)))
    options = parser.parse_args()
    return 1 if soak(options.minutes, options.seed, lambda line: print(line, flush=True)) else 0


if __name__ == "__main__":
    sys.exit(main())
