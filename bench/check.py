"""Whether a server answers the API rightly: nobody is to be fast by doing something else."""

from typing import Any, Dict

from client import Client
from servers import Failure, Server

HOST = {"name": "the castle", "peerId": "the-secret-of-the-host"}
HOST_ADDRESSES = ["203.0.113.7:41000", {"sdp": "v=0"}]
GUEST = {"name": "the castle", "peerId": "the-secret-of-the-guest"}
GUEST_ADDRESSES = ["198.51.100.9:52000"]
STRANGER = "the-secret-of-a-stranger"

# Requests to be answered with 400: the path's last part and the body.
BAD = (
    ("register", b"{"),
    ("register", b"[1]"),
    ("register", {"peerId": "p"}),
    ("register", {"name": "n"}),
    ("register", {"name": 5, "peerId": "p"}),
    ("register", {"name": "", "peerId": "p"}),
    ("register", {"name": "n" * 300, "peerId": "p"}),
    ("register", {"name": "n", "peerId": ["p"]}),
    ("register", {"name": "n", "peerId": "p", "info": "text"}),
    ("register", {"name": "n", "peerId": "p", "listed": "maybe"}),
    ("poll", dict(HOST)),
    ("poll", {**HOST, "addresses": "203.0.113.7:41000"}),
    ("poll", {**HOST, "addresses": [5]}),
    ("poll", {**HOST, "addresses": ["a"] * 17}),
    ("poll", {**HOST, "addresses": [], "after": "now"}),
    ("poll", {**HOST, "addresses": [], "after": -1}),
    ("start", {**GUEST, "addresses": None}),
    ("start", {**GUEST, "addresses": [["198.51.100.9", 52000]]}),
)


def check_api(server: Server, port: int) -> None:
    """Play a game through. Failure names the first wrong answer."""
    def expect(status: int, method: str, path: str, body: Any = None, **members: Any) -> Dict[str, Any]:
        with Client(port) as client:    # waitress closes a connection after 204, without a word
            answer = client.request(method, path, body)
        got = answer.json if answer.body and answer.status < 300 else {}
        wrong = {name: got.get(name) for name, value in members.items() if got.get(name) != value}
        if answer.status != status or wrong:
            raise Failure(f"{server.label} answers {method} {path} {body!r} with {answer.status} {answer.body[:200]!r}, "
                          f"where {status} {members or ''} is right")
        return got

    lease = {"name": HOST["name"], "expiresIn": 60, "pollAfter": 2}
    expect(200, "GET", "/games", games=[])
    expect(201, "POST", "/games/register", {**HOST, "info": {"map": "x"}}, **lease)
    expect(200, "POST", "/games/register", HOST, **lease)
    expect(409, "POST", "/games/register", {**HOST, "peerId": STRANGER})
    for path, body in BAD:
        expect(400, "POST", "/games/" + path, body)
    first = expect(202, "POST", "/games/start", {**GUEST, "addresses": GUEST_ADDRESSES}, addresses=[], **lease)
    expect(409, "POST", "/games/start", {**HOST, "addresses": []})
    expect(404, "POST", "/games/start", {**GUEST, "name": "another", "addresses": []})
    polled = expect(200, "POST", "/games/poll", {**HOST, "addresses": HOST_ADDRESSES}, **lease)
    guest = {"sessionId": first["sessionId"], "sessionKey": first["sessionKey"], "addresses": GUEST_ADDRESSES}
    if [{name: value for name, value in each.items() if name in guest} for each in polled["guests"]] != [guest]:     # a server may tell more
        raise Failure(f"{server.label} tells a host of the guests {polled['guests']}, where {[guest]} is right")
    expect(200, "POST", "/games/poll", {**HOST, "addresses": HOST_ADDRESSES, "after": polled["cursor"]}, guests=[], cursor=polled["cursor"])
    expect(403, "POST", "/games/poll", {**HOST, "peerId": STRANGER, "addresses": []})
    expect(404, "POST", "/games/poll", {**HOST, "name": "another", "addresses": []})
    expect(200, "POST", "/games/start", {**GUEST, "addresses": GUEST_ADDRESSES}, addresses=HOST_ADDRESSES, sessionId=guest["sessionId"])
    expect(200, "GET", "/games", games=[{"name": HOST["name"], "info": {"map": "x"}, "guests": 1, "ready": True}])
    expect(403, "DELETE", "/games/the%20castle", {"peerId": STRANGER})
    expect(204, "DELETE", "/games/the%20castle", {"peerId": HOST["peerId"]})
    expect(404, "DELETE", "/games/the%20castle", {"peerId": HOST["peerId"]})
    expect(200, "GET", "/games", games=[])
