"""The API on the standard library's ThreadingHTTPServer as it comes, but for HTTP/1.1 and one write per answer. The argument is the port."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from registry import DELETE, POLL, REGISTER, START, Problem, Registry, check

games = Registry()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1   # head and body leave together

    def do_POST(self):
        self.answer(self.post)

    def do_GET(self):
        self.answer(self.list)

    def do_DELETE(self):
        self.answer(self.delete)

    def answer(self, endpoint):
        try:
            length = int(self.headers.get("Content-Length", 0))
            try:
                body = json.loads(self.rfile.read(length)) if length else None
            except ValueError:
                raise Problem(400, "the body is not JSON") from None
            status, answer = endpoint(body)
        except Problem as problem:
            status, answer = problem.status, problem.body
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        if answer is not None:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def post(self, body):
        if self.path == "/games/register":
            with lock:
                created, answer = games.register(check(body, REGISTER))
            return 201 if created else 200, answer
        if self.path == "/games/poll":
            with lock:
                return 200, games.poll(check(body, POLL))
        if self.path == "/games/start":
            with lock:
                ready, answer = games.start(check(body, START))
            return 200 if ready else 202, answer
        raise Problem(404, "there is nothing here")

    def list(self, body):
        if self.path != "/games":
            raise Problem(404, "there is nothing here")
        with lock:
            return 200, games.list()

    def delete(self, body):
        with lock:
            games.delete(unquote(self.path[len("/games/"):]), check(body, DELETE))
        return 204, None

    def log_message(self, format, *args):
        """Log no requests, as the others do not."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
