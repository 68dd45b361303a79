"""The API on aiohttp.web, on uvloop. The argument is the port."""

import sys

import uvloop
from aiohttp import web
from registry import DELETE, POLL, REGISTER, START, Problem, Registry, check

games = Registry()
routes = web.RouteTableDef()


async def read(request, fields):
    """The checked body of a request."""
    try:
        body = await request.json()
    except ValueError:
        raise Problem(400, "the body is not JSON") from None
    return check(body, fields)


@web.middleware
async def show_problems(request, handler):
    try:
        return await handler(request)
    except Problem as problem:
        return web.json_response(problem.body, status=problem.status)


@routes.post("/games/register")
async def register_game(request):
    created, answer = games.register(await read(request, REGISTER))
    return web.json_response(answer, status=201 if created else 200)


@routes.post("/games/poll")
async def poll_game(request):
    return web.json_response(games.poll(await read(request, POLL)))


@routes.post("/games/start")
async def start_game(request):
    ready, answer = games.start(await read(request, START))
    return web.json_response(answer, status=200 if ready else 202)


@routes.get("/games")
async def list_games(request):
    return web.json_response(games.list())


@routes.delete("/games/{name}")
async def delete_game(request):
    games.delete(request.match_info["name"], await read(request, DELETE))
    return web.Response(status=204)


if __name__ == "__main__":
    app = web.Application(middlewares=[show_problems])
    app.add_routes(routes)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, loop=uvloop.new_event_loop())
