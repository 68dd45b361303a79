"""The server as a process that a test starts, harms and watches from outside, and the clients that harm it. Linux: it looks at /proc."""
import contextlib
import functools
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = pathlib.Path(os.environ.get("P2P_SERVER_FILE") or ROOT / "p2pserver.py").resolve()     # so that one server can be tested beside another
WAIT = 20       # seconds after which a thing that must happen counts as one that does not
OTHER = "127.0.0.2"     # another client than the tests' usual one
FEW_THREADS = 48        # more than the server has in any case, and far fewer than it has clients here
HERE, THERE = ["203.0.113.1:5000"], ["203.0.113.2:6000"]

# What is off for the tests, whose thousands of clients all have one address. A server that lacks a flag is not given it.
LIFTED = {"--rate": "0", "--burst": "100000", "--max-connections": "15000", "--max-connections-per-client": "15000", "--max-games-per-client": "100000"}

RUN = f"import importlib, sys; sys.path.insert(0, {str(SERVER.parent)!r}); sys.exit(importlib.import_module({SERVER.stem!r}).main(sys.argv[1:]))"

# Ahead of a program: a thread that runs what comes by standard input, line by line. What writes a traceback is loaded now, for when it is
# needed the process may be somebody who may not read it.
EARS = """
import io, os, resource, sys, threading, time, tokenize, traceback
try:
    raise OSError
except OSError:
    traceback.print_exc(file=io.StringIO())
def listen(names={"os": os, "resource": resource, "time": time}):
    for line in sys.stdin:
        exec(line, names)
threading.Thread(target=listen, daemon=True).start()
"""

# What people write: a thread for each connection, without limits. It stands beside ours to show what a fault does where nobody took care.
STOCK = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(bytes(1000000))
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer.request_queue_size = 1024
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"listens on http://localhost:{server.server_port}/", flush=True)
server.serve_forever()
"""


def wait_until(condition, seconds=WAIT):
    """What condition() gives once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return found


def open_files(number):
    """Let this process have so many descriptors; False if it may not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard == resource.RLIM_INFINITY or hard >= number


def free_port():
    """A port that is free, and that no client gets meanwhile: below those which Linux gives to clients."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


# ---- processes ------------------------------------------------------------------------------------------------------

class Program:
    """A Python process seen from outside: what it says, and what /proc says of it. Its output goes to files, which never block it."""

    def __init__(self, *arguments, **options):
        self._files = [tempfile.TemporaryFile() for _ in range(2)]     # noqa: SIM115    # closed by __exit__
        self._said = ()
        environment = {name: value for name, value in os.environ.items() if name != "PORT" and not name.startswith("P2P_")}
        self.process = subprocess.Popen([sys.executable, *map(str, arguments)], **{
            "stdin": subprocess.DEVNULL, "stdout": self._files[0], "stderr": self._files[1],
            "env": {**environment, "PYTHONUNBUFFERED": "1", "NO_PROXY": "*"}, **options})
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.is_alive:
            self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self._said = self.out, self.err
        for file in self._files:
            file.close()

    @property
    def is_alive(self):
        return self.process.poll() is None

    out = property(lambda self: self._text(0), doc="What it has written to standard output.")
    err = property(lambda self: self._text(1))

    def _text(self, number):
        if self._said:
            return self._said[number]
        file = self._files[number].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")     # the process shares the place in the file, which this does not move

    def says(self, pattern, seconds=WAIT):
        """The match for what it must print in time."""
        found = wait_until(lambda: re.search(pattern, self.out) or not self.is_alive, seconds)
        assert found is not True, f"it ended with {self.process.returncode}:\n{self.out}\n{self.err}"
        return found

    def stop(self, number=signal.SIGTERM, seconds=WAIT):
        """Its exit status, and how many seconds a signal took to end it."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(seconds), time.monotonic() - began

    def _status(self, field):
        return int(re.search(rf"^{field}:\s+(\d+)", pathlib.Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)[1])

    memory = property(lambda self: self._status("VmRSS") / 1024, doc="MiB in use")
    threads = property(lambda self: self._status("Threads"))
    descriptors = property(lambda self: len(os.listdir(f"/proc/{self.pid}/fd")))

    @property
    def cpu(self):
        """Seconds of CPU time so far."""
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cpu_share(self, seconds=1.5):
        """The share of one CPU that it takes for a while."""
        cpu, began = self.cpu, time.monotonic()
        time.sleep(seconds)
        return (self.cpu - cpu) / (time.monotonic() - began)


class Listener(Program):
    """A program that prints at which URL it listens."""

    def __init__(self, *arguments, port=None, is_up=None, **options):
        super().__init__(*arguments, **options)
        try:
            self.port = port or int(self.says(r"listens on http://[^ ]*:(\d+)/")[1])
            assert wait_until(lambda: (is_up(self) if is_up else self.answers()) or not self.is_alive) and self.is_alive, f"it ended at once:\n{self.err}"
        except BaseException:
            self.__exit__()
            raise
        self.url = f"http://127.0.0.1:{self.port}"

    def answers(self):
        """Whether a new connection is answered."""
        with contextlib.suppress(OSError, EOFError), Connection(self) as connection:
            return connection.ask("GET", "/healthz").status == 200
        return False

    def do(self, code):
        """Have the process run a line of Python. It must have been started with EARS."""
        self.process.stdin.write(code.encode() + b"\n")
        self.process.stdin.flush()

    def seconds_to_answer(self, count=30):
        """The median time of polls, each on a new connection, of a client who has done nothing wrong."""
        call(self, "POST", "/games/register", {"name": "the watched game", "peerId": "host"})
        times = []
        for _ in range(count):
            began = time.monotonic()
            assert call(self, "POST", "/games/poll", {"name": "the watched game", "peerId": "host", "addresses": HERE}).status == 200
            times.append(time.monotonic() - began)
        return sorted(times)[count // 2]


@functools.cache
def known_flags():
    return set(re.findall(r"--[a-z-]+", subprocess.run([sys.executable, SERVER, "--help"], capture_output=True, text=True).stdout))


def serving(*flags, before="", **options):
    """The server on a free port of 127.0.0.1, its limits for one client lifted. before: what its process does ahead of it, in Python."""
    if before:
        options["stdin"] = subprocess.PIPE
    lifted = [word for flag, value in LIFTED.items() if flag in known_flags() and flag not in flags for word in (flag, value)]
    program = ["-c", f"{before}\n{RUN}"] if before else [SERVER]
    where = [] if "--port" in flags else ["--port", "0"]
    return Listener(*program, "--host", "127.0.0.1", *where, *lifted, *flags, **options)


def stock(before="", **options):
    if before:
        options["stdin"] = subprocess.PIPE
    return Listener("-c", before + STOCK, **options)


# ---- clients --------------------------------------------------------------------------------------------------------

HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [ -~]+\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*\r\n)*)\r\n")
DOCUMENTED = {int(status) for status in re.findall(r"`([1-5][0-9][0-9])\b", (ROOT / "docs" / "API.md").read_text(encoding="utf-8"))} - {500}


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Incomplete(EOFError):
    """An answer was cut off. Where not a byte of one came, it is a plain EOFError."""


def take_answer(buffer, has_body=True):
    """The first whole answer in the buffer, and where the next one begins; None while it has not come whole. AssertionError if it is not HTTP."""
    end = buffer.find(b"\r\n\r\n") + 4
    if end < 4:
        return None
    match = HEAD.fullmatch(buffer, 0, end)
    assert match, f"no answer of HTTP: {bytes(buffer[:end])!r}"
    status = int(match[1])
    if status < 200:        # 100 Continue: the answer is yet to come
        assert status == 100
        rest = take_answer(buffer[end:], has_body)
        return rest and (rest[0], end + rest[1])
    fields = (field.split(": ", 1) for field in match[2].decode("latin-1").split("\r\n")[:-1])
    headers = {name.lower(): value for name, value in fields}
    has_body = has_body and status not in (204, 304)
    assert not has_body or "content-length" in headers
    length = int(headers["content-length"]) if has_body else 0
    if len(buffer) < end + length:
        return None
    return Answer(status, headers, bytes(buffer[end:end + length])), end + length


def check_answer(answer, has_body=True):
    """An answer is as docs/API.md has it: AssertionError if not."""
    status, headers, body = answer
    assert status in DOCUMENTED, f"{status} is not documented: {body!r}"
    assert "date" in headers
    if status >= 400 and not (status == 503 and body.startswith(b'{"status"')):     # that is the health
        assert headers["content-type"] == "application/problem+json"
        if has_body:
            assert answer.json["status"] == status and answer.json["title"] and answer.json["detail"]
    elif has_body and headers.get("content-type") == "application/json":
        answer.json     # noqa: B018    # can be read
    return answer


def request(method, path, body=None, **headers):
    """The bytes of a request; a body that is no bytes goes as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: h", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def poll(name, peer="host", **headers):
    return request("POST", "/games/poll", {"name": name, "peerId": peer, "addresses": HERE}, **headers)


class Connection:
    """A connection on which a test says each byte itself, and that can end it in any manner."""

    def __init__(self, server, data=b"", receive_buffer=0, source=""):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(WAIT)
        try:
            if source:      # another address of this machine, which is another client
                self.socket.bind((source, 0))
            self.socket.connect(("127.0.0.1", server.port))
            self.buffer = bytearray()
            self.send = self.socket.sendall
            self.send(data)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def answer(self, has_body=True):
        """The next answer. EOFError if none comes, Incomplete if one is cut off."""
        while not (found := take_answer(self.buffer, has_body)):
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                raise (Incomplete if self.buffer else EOFError)(bytes(self.buffer[:200]))
            self.buffer += data
        del self.buffer[:found[1]]
        return found[0]

    def ask(self, method, path, body=None, **headers):
        self.send(request(method, path, body, **headers))
        return self.answer(method != "HEAD")

    def is_closed(self):
        with contextlib.suppress(ConnectionError):
            return not self.buffer and not self.socket.recv(1)
        return True

    def reset(self):
        """Close it as a machine that was switched off would seem to do: by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def call(server, method, path, body=None, **headers):
    with Connection(server) as connection:
        return connection.ask(method, path, body, Connection="close", **headers)


def metric(server, name):
    """A number of /metrics. Who asks is another client than those of the test."""
    with Connection(server, source=OTHER) as connection:
        found = re.search(rf"^p2pserver_{re.escape(name)} (\S+)$", connection.ask("GET", "/metrics").body.decode(), re.MULTILINE)
    return float(found[1]) if found else 0


def pipeline(server, requests, at_once=100):
    """The answers to many requests on one connection."""
    answers = []
    with Connection(server) as connection:
        for i in range(0, len(requests), at_once):
            some = requests[i:i + at_once]
            connection.send(b"".join(some))
            answers += [connection.answer() for _ in some]
    return answers


def register(server, count, info=None, prefix="game"):
    """Offer many games, each with an address; their names."""
    names = [f"{prefix} {i}" for i in range(count)]
    answers = pipeline(server, [request("POST", "/games/register", {"name": name, "peerId": "host", "info": info or {}}) for name in names])
    assert {answer.status for answer in answers} == {201}
    return names


@contextlib.contextmanager
def many(server, count, data=b"", receive_buffer=0):
    """So many connections at once. They end by RST, which leaves nothing behind in this machine's tables."""
    assert open_files(count + 500), "this machine does not allow so many open files"
    connections = []
    try:
        for _ in range(count):
            connections.append(Connection(server, data, receive_buffer))
        yield connections
    finally:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.reset()


def tls_status(server, patience=WAIT):
    """The status that a client of HTTPS gets; 0 for none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), patience) as plain, context.wrap_socket(plain) as sock:
        sock.sendall(request("GET", "/healthz", Connection="close"))
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        return int(answer[9:12] or 0)
    return 0


def listening(flags, **options):
    """A server with TLS, which answers nobody else."""
    port = free_port()
    server = serving("--port", port, *flags, port=port, is_up=lambda server: tls_status(server) == 200, **options)
    assert server.threads <= FEW_THREADS
    return server
