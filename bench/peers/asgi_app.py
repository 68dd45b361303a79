"""The API on bare ASGI: no framework, what uvicorn hands on is read by hand."""

import json
from urllib.parse import unquote

from registry import DELETE, POLL, REGISTER, START, Problem, Registry, check

games = Registry()


def register_game(body):
    created, answer = games.register(check(body, REGISTER))
    return 201 if created else 200, answer


def poll_game(body):
    return 200, games.poll(check(body, POLL))


def start_game(body):
    ready, answer = games.start(check(body, START))
    return 200 if ready else 202, answer


POSTS = {"/games/register": register_game, "/games/poll": poll_game, "/games/start": start_game}


async def read(receive):
    """The body as JSON."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    try:
        return json.loads(body)
    except ValueError:
        raise Problem(400, "the body is not JSON") from None


async def answer(scope, receive):
    """(status, body) of a request."""
    method, path = scope["method"], scope["path"]
    if method == "POST" and path in POSTS:
        return POSTS[path](await read(receive))
    if method == "GET" and path == "/games":
        return 200, games.list()
    if method == "DELETE" and path.startswith("/games/"):
        games.delete(unquote(path[len("/games/"):]), check(await read(receive), DELETE))
        return 204, None
    raise Problem(404, "there is nothing here")


async def app(scope, receive, send):
    try:
        status, body = await answer(scope, receive)
    except Problem as problem:
        status, body = problem.status, problem.body
    content = b"" if body is None else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": [] if body is None else headers})
    await send({"type": "http.response.body", "body": content})
