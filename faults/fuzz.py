#!/usr/bin/env python3
"""Random and mutated input for a running server, over HTTP and STUN, and a check of each answer.

    python faults/fuzz.py [--inputs 100000] [--seed N]      starts a server of its own

The seed, which is printed, decides on all inputs: FUZZ_SEED in the environment does as --seed.
"""
import argparse
import contextlib
import json
import os
import random
import re
import select
import socket
import string
import struct
import sys
import time

from stage import FEW_THREADS, HERE, THERE, Connection, call, check_answer, request, serving, take_answer, wait_until

# Few and short-lived games, so that the memory which they take is no more at the end; no holds, so that nothing waits.
FLAGS = ["--max-games", "300", "--max-guests", "8", "--game-ttl", "3", "--poll-after", "1", "--max-wait", "0", "--stun-rate", "0", "--access-log"]
NAMES = ["g", "Ada's castle", "e\u0301", "\u00e9", "\ue000x", "\U0001f3b2", "a" * 64, "%2F", "x y", "0"]
PEERS = ["host", "guest", "\u00fc", "p" * 128]
NASTY = [
    None, True, False, 0, -1, 1, 2 ** 53, 2 ** 63, -2 ** 70, 10 ** 400, 0.5, -0.0, 1e308, {"a": 1e309}, "", " ", ".", "..", "register", "\0", "\n",
    "\x1b[2J", "\x7f", "\u2028", "\ufdfa" * 64, "\ufdfa" * 18, "a\u0301" * 64, "\ud800", "\udc00\ud800", "a" * 65, "a" * 257, "/", "\ufeff", "\u200b",
    "\u202ex",
    [], {}, [[]], {"": {}}, [None], "0.0.0.0:1", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:99999999999", "[::]:1", "[::1%lo]:1", "[fe80::1%25eth0]:5",
    "[::ffff:127.0.0.1]:1", "999.1.1.1:1", "01.2.3.4:1", "\u0661.2.3.4:\u0665", "255.255.255.255:1", "[ff02::1]:9", "127.0.0.1:80", "a" * 513,
    ["1.2.3.4:5"] * 17, {"candidate": "x", "n": [1, {"y": None}]}]
TARGETS = [
    "/", "/healthz", "/games", "/games/g", "/games/Ada%27s%20castle", "/games/%F0%9F%8E%B2", "/games/register", "/games/poll", "/games/start",
    "/games/leave", "*",
    "http://h/games", "//games", "/games/", "/games//", "/games/..", "/games/%2e%2e", "/games/%00", "/games/%ff", "/games/%", "/games/%zz",
    "/games/a%2Fb", "/games?x=1", "/games/g?%0d%0aX:y", "/games/" + "a" * 65, "/games/" + "%EF%B7%BA" * 64, "/games/" + "a" * 4000, "h:80"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
WRITES = [
    ("POST", "/games/register"), ("POST", "/games/poll"), ("POST", "/games/start"), ("PATCH", "/games/g"), ("DELETE", "/games/g"),
    ("PUT", "/games/%F0%9F%8E%B2")]
FIELDS = ["Content-Type", "If-None-Match", "Prefer", "Authorization", "Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers",
          "Content-Encoding", "Accept", "Accept-Encoding", "Range", "Cookie", "X-Forwarded-For", "Forwarded", "User-Agent", "Upgrade", "Via", "Date"]
VALUES = [
    "", "*", ",", '"x"', 'W/"x", *', "application/json", "application/json; charset=latin-1", "text/plain", "application/merge-patch+json",
    "Bearer host", "Bearer  ", "Bearer \xfc\xff", "Basic Zm9vOmJhcg==", "wait=0", "wait=99999999999", 'wait="0"; x, wait=-1', "gzip", "identity",
    "null", "bytes=0-", "a" * 900, ";;;===", "\t\t", "\x80\xff", "h2c", "application/json;" * 50]
# What tells where a request ends: a stray one of these leaves open which answer is whose, so they are for the wild alone.
FRAMING = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 0", b"Content-Length: 5, 5", b"Content-Length: 99999999999999999999",
    b"Content-Length: 0x10", b"Content-Length: \xb2", b"Content-Length:", b"Content-Length : 5", b"Content-Length: " + b"0" * 5000 + b"2",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: \x0bchunked", b"Host: a", b"Host:", b" folded: x", b"no colon", b": none",
    b"Expect: 100-continue", b"Expect: 200-ok", b"Connection: close", b"Connection: keep-alive, Upgrade", b"X: \0", b"X: a\rb", b"X\x80: y",
    b"X: " + b"y" * 40000]
LINES = [
    b"GET / HTTP/1.1", b"GET  / HTTP/1.1", b"GET /", b"get / HTTP/1.1", b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"GET / HTTP/1.10", b"GET / HTTP/1.1 ",
    b" GET / HTTP/1.1", b"GET\t/\tHTTP/1.1", b"GET \xff HTTP/1.1", b"GET /\0 HTTP/1.1", b"GET /" + b"a" * 9000 + b" HTTP/1.1", b"BREW /pot HTTP/1.1",
    b"CONNECT h:80 HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"SSH-2.0-x", b"\r\n\r\n\r\n",
    b"\n", b""]
SCRAPS = [b"\0", b"\xff\xfe", b"\r\n", b"\n", b"\r", b'"', b"\\", b"{", b"]", b":", b"\xf0\x9f", b"\xed\xa0\x80", b"1e999", b"-", b"\\ud800"]
REMEMBERED = 10_000     # bodies of requests: MAX_KNOWN_BODIES in p2pserver.py
STUN_KINDS, STUN_ATTRIBUTES = [1, 1, 1, 1, 0x101, 0x111, 0x11, 3], [0x0001, 0x0006, 0x0008, 0x0020, 0x0024, 0x8022, 0x8028, 0x8029, 0x7FFF]


class Fuzz:
    """All inputs come of one random.Random. statuses: how often each was the answer."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.statuses = {}

    def noise(self, length):
        return self.random.getrandbits(8 * length + 1).to_bytes(length + 1, "big")[1:]

    # ---- mutations ----

    def body(self):
        """A body that an endpoint could take."""
        pick = self.random.choice
        more = {"info": [{}, {"map": "castle"}], "listed": [True, False], "after": [0, 10 ** 15], "replies": [{}, {"x": HERE}], "wait": [0, 5]}
        return {"name": pick(NAMES), "peerId": pick(PEERS), "addresses": pick([HERE, THERE, [], ["[2001:db8::1]:5"], [{"candidate": "c"}]]),
                **{name: pick(values) for name, values in more.items() if self.random.random() < 0.2}}

    def mutated_value(self, value):
        """A JSON value with something in it replaced, left out, repeated or nested."""
        if not isinstance(value, (dict, list)) or not value or self.random.random() < 0.2:
            return self.random.choice(NASTY)
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = self.random.choice(list(copy)) if isinstance(copy, dict) else self.random.randrange(len(copy))
        how = self.random.random()
        if how < 0.15:
            del copy[key]
        elif how < 0.25:
            for _ in range(self.random.choice([1, 15, 16, 17, 400])):
                copy[key] = [copy[key]] if self.random.random() < 0.5 else {"x": copy[key]}
        else:
            copy[key] = self.mutated_value(copy[key])
        return copy

    def mutated_bytes(self, data):
        """Bytes of which some are flipped, cut out, doubled, put in or cut off."""
        data = bytearray(data)
        for _ in range(self.random.choice([1, 1, 1, 2, 5, 20])):
            at = self.random.randrange(len(data) + 1)
            length = min(self.random.choice([1, 1, 2, 4, 16, 64]), len(data) - at)
            how = self.random.randrange(6)
            if how == 0 and at < len(data):
                data[at] ^= 1 << self.random.randrange(8)
            elif how == 1:
                del data[at:at + length]
            elif how == 2:
                data[at:at] = data[at:at + length] * self.random.choice([1, 2, 50])
            elif how == 3:
                data[at:at] = self.random.choice(SCRAPS)
            elif how == 4:
                data[at:at + length] = self.noise(length)
            else:
                del data[at:]
        return bytes(data)

    def json_bytes(self):
        value, how = self.body(), self.random.random()
        if how > 0.4:
            value = self.mutated_value(value)
        data = json.dumps(value, ensure_ascii=self.random.random() < 0.5).encode("utf-8", "surrogatepass")
        return self.mutated_bytes(data) if how > 0.7 else data

    # ---- HTTP ----

    def framed(self):
        """A request of which it is certain where it ends, so that more can follow: (method, bytes). All else in it may be wrong."""
        pick, chance = self.random.choice, self.random.random
        body = None
        if chance() < 0.7:
            method, target = pick(WRITES)
            body = self.json_bytes()[:16384]
        else:
            method, target = pick(METHODS), pick(TARGETS)
            if method in ("POST", "PUT", "PATCH"):
                body = b""
        if chance() < 0.1:
            letters = string.ascii_letters + string.digits + "%%%%//?#[]@!$&'()*+,;=:-._~|\"<>\\^`{}"
            target = "/games/"[:self.random.randrange(8)] + "".join(self.random.choices(letters, k=self.random.randrange(1, 60)))
        fields = {pick(FIELDS): pick(VALUES) for _ in range(pick([0, 0, 1, 2, 5]))}
        data = request(method, target, body, **fields)
        return method, self.chunked(data) if body is not None and chance() < 0.3 else data

    def chunked(self, data):
        """The same request with its body in chunks of any sizes, with and without extensions and trailers."""
        pick, (head, body), chunks = self.random.choice, data.split(b"\r\n\r\n", 1), b""
        while body:
            size = pick([1, 2, 10, 1000, 20_000])
            chunks += pick([b"%x", b"%X", b"%08x"]) % len(body[:size]) + pick([b"", b"", b";x", b" ; x=\"y z\""]) + b"\r\n" + body[:size] + b"\r\n"
            body = body[size:]
        head = re.sub(rb"\r\nContent-Length: [0-9]+", b"\r\nTransfer-Encoding: chunked", head)
        return head + b"\r\n\r\n" + chunks + pick([b"0", b"000"]) + b"\r\n" + pick([b"", b"", b"X: y\r\nContent-Length: 7\r\n"]) + b"\r\n"

    def wild(self):
        """Bytes that may be anything, up to several requests."""
        pick, how = self.random.choice, self.random.random()
        if how < 0.1:
            return self.noise(self.random.randrange(200))
        data = b"".join(self.framed()[1] for _ in range(pick([1, 1, 2, 4])))
        if how < 0.5:
            return self.mutated_bytes(data)
        lines = data.split(b"\r\n")
        for _ in range(pick([1, 1, 2])):
            lines.insert(self.random.randrange(1, len(lines) + 1), pick(FRAMING))
        if how < 0.7:
            lines[0] = pick(LINES)
        if how > 0.95:
            lines[1:1] = [b"X: y"] * pick([99, 100, 101, 5000])
        return pick([b"\r\n"] * 9 + [b"\n", b"\r"]).join(lines)

    def check(self, answer, data, has_body):
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        try:
            check_answer(answer, has_body)
        except (AssertionError, KeyError, ValueError) as fault:
            raise AssertionError(f"{fault!r} in {answer}, the answer to {data!r}") from fault

    def send_framed(self, server, count, at_once=50):
        """Pipelined on one connection, in pieces that know nothing of where a request ends: each is answered, in its order."""
        with Connection(server) as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for start in range(0, count, at_once):
                inputs = [self.framed() for _ in range(min(at_once, count - start))]
                sent, size = b"".join(data for _, data in inputs), self.random.choice([100, 1000, 10_000, 100_000])
                with contextlib.suppress(OSError):      # then an answer will be missing, which says more
                    for i in range(0, len(sent), size):
                        connection.send(sent[i:i + size])
                for method, data in inputs:
                    try:
                        answer = connection.answer(method != "HEAD")
                    except (OSError, EOFError) as fault:
                        raise AssertionError(f"{fault!r} where the answer should be to {data!r}, which came after {inputs[0][1]!r}") from fault
                    self.check(answer, data, method != "HEAD")

    def fill_caches(self, server):
        """Send as many sound bodies as the server remembers, which then are forgotten one by one for what comes."""
        with Connection(server) as connection:
            for start in range(0, REMEMBERED, 100):
                bodies = [{"name": f"{start + i}", "peerId": "p" * 128, "addresses": ["198.51.100.1:40000"] * 8} for i in range(100)]
                connection.send(b"".join(request("POST", "/games/poll", body) for body in bodies))
                for body in bodies:
                    self.check(connection.answer(True), body, True)

    def send_wild(self, server, count, at_once=50):
        """Each on a connection of its own, which then is closed for writing: what comes back until its end are whole answers."""
        for start in range(0, count, at_once):
            inputs = [self.wild() for _ in range(min(at_once, count - start))]
            connections = [Connection(server) for _ in inputs]
            for connection, data in zip(connections, inputs):
                with contextlib.suppress(OSError):      # it was refused before it was whole
                    connection.send(data)
                    connection.socket.shutdown(socket.SHUT_WR)
            for connection, data in zip(connections, inputs):
                with connection:
                    self.check_wild(self.read_to_end(connection, data), data)

    def read_to_end(self, connection, data):
        came = bytearray()
        try:
            while some := connection.socket.recv(1 << 16):
                came += some
        except ConnectionError:
            pass
        except OSError as fault:
            raise AssertionError(f"{fault!r}: the connection stayed open after {data!r}") from fault
        return came

    def check_wild(self, came, data):
        while came:
            # The answer to HEAD has no body, and which answer is to it is hard to say: no body begins as the next answer does.
            end = came.find(b"\r\n\r\n") + 4
            has_body = not (b"HEAD" in data and (end == len(came) or came.startswith(b"HTTP/1.1 ", end)))
            try:
                found = take_answer(came, has_body)
            except AssertionError as fault:
                raise AssertionError(f"{fault}, in the answer to {data!r}") from None
            assert found, f"an answer was cut off: {bytes(came)!r} to {data!r}"
            self.check(found[0], data, has_body)
            del came[:found[1]]

    # ---- STUN ----

    def stun(self):
        """A datagram."""
        pick, head = self.random.choice, struct.pack(">I", 0x2112A442) + self.noise(12)
        attributes = b""
        for _ in range(pick([0, 0, 1, 2, 9, 40])):
            length = pick([0, 1, 3, 4, 8, 20, 33])
            attributes += struct.pack(">HH", pick([*STUN_ATTRIBUTES, self.random.getrandbits(16)]), length) + bytes(length + -length % 4)
        data = struct.pack(">HH", pick(STUN_KINDS), len(attributes)) + head + attributes
        how = self.random.random()
        return data if how < 0.4 else self.mutated_bytes(data) if how < 0.9 else self.noise(self.random.randrange(300))

    def send_stun(self, server, count, at_once=100):
        """Each answer is one to something that was sent, and after each lot a good question is answered still."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", server.port))
            sock.settimeout(0.5)
            for start in range(0, count, at_once):
                lot = [self.stun() for _ in range(min(at_once, count - start))]
                for data in lot:
                    sock.send(data)
                good = struct.pack(">HHI", 1, 0, 0x2112A442) + self.noise(12)
                sent, asked, ended = {data[4:20] for data in lot} | {good[4:20]}, 0, False
                while not ended:
                    assert asked < 20, f"STUN is silent after one of {lot!r}"
                    sock.send(good)
                    asked += 1
                    while not ended and select.select([sock], [], [], 0.5)[0]:
                        answer = sock.recv(65536)
                        kind, length = struct.unpack_from(">HH", answer)
                        is_sound = kind in (0x101, 0x111) and length == len(answer) - 20 and length % 4 == 0
                        assert is_sound and answer[4:20] in sent, f"{answer!r} to one of {lot!r}"
                        ended = answer[4:20] == good[4:20]


def run(inputs, seed):
    """Send so many to a server of its own; what it did, for a person, and its memory over the time. AssertionError: what it should not have done."""
    fuzz, began = Fuzz(seed), time.monotonic()
    with serving(*FLAGS) as server:
        memory, descriptors = [], server.descriptors
        fuzz.fill_caches(server)
        for _ in range(20):
            share = inputs // 20
            fuzz.send_framed(server, share * 50 // 100)
            fuzz.send_wild(server, share * 10 // 100)
            fuzz.send_stun(server, share * 40 // 100)
            memory.append(server.memory)
        assert server.is_alive and call(server, "GET", "/healthz").status == 200
        wait_until(lambda: call(server, "GET", "/healthz").json["games"] == 0)
        wait_until(lambda: server.descriptors <= descriptors)
        assert server.threads <= FEW_THREADS
        # A thread that ends by what it was sent says so here, too.
        strange = [line for line in server.err.splitlines() if not re.match(r"\S+ (INFO|WARNING X-Forwarded-For) ", line) or not line.isprintable()]
        assert not strange, strange[:5]
        assert server.stop()[0] == 0
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(fuzz.statuses.items()))
    return f"{inputs} inputs in {time.monotonic() - began:.0f} s; MiB {[round(level, 1) for level in memory]}; answers {statuses}", memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32)))
    options = parser.parse_args()
    print(f"FUZZ_SEED={options.seed}", flush=True)
    print(run(options.inputs, options.seed)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
