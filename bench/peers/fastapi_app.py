"""The API on FastAPI: pydantic models in and out."""

from typing import Annotated, Any, Dict, List, Optional, Union

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from registry import Problem, Registry

Name = Annotated[str, Field(min_length=1, max_length=64, pattern="^[^/]*$")]
PeerId = Annotated[str, Field(min_length=1, max_length=128)]
Addresses = Annotated[List[Union[str, Dict[str, Any]]], Field(max_length=16)]


class RegisterBody(BaseModel):
    name: Name
    peerId: PeerId
    info: Optional[Dict[str, Any]] = None
    listed: Optional[bool] = None


class PollBody(BaseModel):
    name: Name
    peerId: PeerId
    addresses: Addresses
    after: Optional[Annotated[int, Field(ge=0)]] = None


class StartBody(BaseModel):
    name: Name
    peerId: PeerId
    addresses: Addresses


class DeleteBody(BaseModel):
    peerId: PeerId


class Lease(BaseModel):
    name: str
    expiresIn: float
    pollAfter: float


class Session(BaseModel):
    sessionId: str
    sessionKey: str
    addresses: List[Union[str, Dict[str, Any]]]


class Polled(Lease):
    guests: List[Session]
    cursor: int


class Started(Lease, Session):
    cursor: int


class Game(BaseModel):
    name: str
    info: Dict[str, Any]
    guests: int
    ready: bool


class Games(BaseModel):
    games: List[Game]


app = FastAPI()
games = Registry()


@app.exception_handler(Problem)
async def show_problem(request: Request, problem: Problem):
    return JSONResponse(problem.body, problem.status)


@app.exception_handler(RequestValidationError)
async def show_faults(request: Request, error: RequestValidationError):
    return JSONResponse({"status": 400, "detail": str(error)}, 400)


@app.post("/games/register", status_code=201)
async def register_game(body: RegisterBody, response: Response) -> Lease:
    created, answer = games.register(body.model_dump())
    response.status_code = 201 if created else 200
    return answer


@app.post("/games/poll")
async def poll_game(body: PollBody) -> Polled:
    return games.poll(body.model_dump())


@app.post("/games/start")
async def start_game(body: StartBody, response: Response) -> Started:
    ready, answer = games.start(body.model_dump())
    response.status_code = 200 if ready else 202
    return answer


@app.get("/games")
async def list_games() -> Games:
    return games.list()


@app.delete("/games/{name}", status_code=204)
async def delete_game(name: str, body: DeleteBody) -> None:
    games.delete(name, body.model_dump())
