"""A small client of HTTP/1.1, quick enough to fill a server with games, and what the benchmark's hosts and guests send."""

import json
import socket
from typing import Any, Dict, NamedTuple, Optional, Tuple

LOOPBACK = "127.0.0.1"


def game(i: int) -> Dict[str, Any]:
    """What the host of the i-th game sends with its polls; the same as poll() in load.lua. 0 <= i < 60,000."""
    return {"name": f"game-{i:05d}", "peerId": f"the-secret-of-host-{i:05d}",
            "addresses": [f"203.0.113.{i % 250 + 1}:{1024 + i}", f"192.168.{i // 250 + 1}.{i % 250 + 1}:41000"], "after": 0}


class Answer(NamedTuple):
    """An answer: its header by name in lower case, its body as bytes."""

    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None) -> bytes:
    """A whole request. The body is bytes as they are, or anything else as JSON."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    fields = {"Host": "localhost", "User-Agent": "bench", "Accept": "*/*", **(headers or {})}
    if content:
        fields.update({"Content-Type": "application/json", "Content-Length": str(len(content))})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def read_answer(received: bytes) -> Optional[Tuple[Answer, bytes]]:
    """The first answer in what was received and the rest, or None while it is not complete."""
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(status_line.split(" ", 2)[1])
    length = int(headers.get("content-length", 0)) if status not in (204, 304) else 0
    if len(rest) < length:
        return None
    return Answer(status, headers, rest[:length]), rest[length:]


class Client:
    """One connection, kept open: a request, then its answer. timeout: seconds. OSError: the server does not answer."""

    def __init__(self, port: int, timeout: float = 20.0, source: str = LOOPBACK) -> None:
        self.socket = socket.create_connection((LOOPBACK, port), timeout, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def request(self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None) -> Answer:
        self.socket.sendall(request_bytes(method, path, body, headers))
        return self.read()

    def read(self) -> Answer:
        received = b""
        while True:
            more = self.socket.recv(1 << 20)
            if not more:
                raise ConnectionError("the connection was closed before an answer came")
            received += more
            complete = read_answer(received)
            if complete:
                return complete[0]


def register(port: int, games: int, poll: bool = False) -> None:
    """Register that many games, and if asked publish their addresses. ConnectionError: one was refused."""
    with Client(port) as client:
        for i in range(games):
            body = game(i)
            answers = [client.request("POST", "/games/register", {"name": body["name"], "peerId": body["peerId"], "info": {"map": "castle"}})]
            if poll:
                answers.append(client.request("POST", "/games/poll", body))
            for answer in answers:
                if answer.status not in (200, 201):
                    raise ConnectionError(f"game {i} was refused with {answer.status}: {answer.body.decode(errors='replace')[:200]}")
