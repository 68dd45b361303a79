"""The API on Flask, for gunicorn and for waitress."""

import threading

from flask import Flask, request
from registry import DELETE, POLL, REGISTER, START, Problem, Registry, check

app = Flask(__name__)
games = Registry()
lock = threading.Lock()


@app.errorhandler(Problem)
def show_problem(problem):
    return problem.body, problem.status


@app.post("/games/register")
def register_game():
    body = check(request.get_json(), REGISTER)
    with lock:
        created, answer = games.register(body)
    return answer, 201 if created else 200


@app.post("/games/poll")
def poll_game():
    body = check(request.get_json(), POLL)
    with lock:
        return games.poll(body)


@app.post("/games/start")
def start_game():
    body = check(request.get_json(), START)
    with lock:
        ready, answer = games.start(body)
    return answer, 200 if ready else 202


@app.get("/games")
def list_games():
    with lock:
        return games.list()


@app.delete("/games/<name>")
def delete_game(name):
    body = check(request.get_json(), DELETE)
    with lock:
        games.delete(name, body)
    return "", 204
