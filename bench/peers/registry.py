"""What the Python peers share: the games, in a dictionary, and the check of a body's fields.

They do less than p2pserver: games do not expire, peerIds are kept as they came, addresses are not looked into, and nothing
but the number of addresses is limited. Whatever that saves is the peers' advantage.
"""

import secrets

LEASE = {"expiresIn": 60, "pollAfter": 2}   # seconds


class Problem(Exception):
    """What a client is told went wrong, and the status of HTTP."""

    def __init__(self, status, detail):
        super().__init__(detail)
        self.status = status
        self.body = {"status": status, "detail": detail}


# ---- fields ---------------------------------------------------------------------------------------------------------

def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= 64 and "/" not in value


def is_peer_id(value):
    return isinstance(value, str) and 0 < len(value) <= 128


def are_addresses(value):
    return isinstance(value, list) and len(value) <= 16 and all(isinstance(item, (str, dict)) for item in value)


def is_info(value):
    return value is None or isinstance(value, dict)


def is_flag(value):
    return value is None or isinstance(value, bool)


def is_cursor(value):
    return value is None or isinstance(value, int) and not isinstance(value, bool) and value >= 0


REGISTER = {"name": is_name, "peerId": is_peer_id, "info": is_info, "listed": is_flag}
POLL = {"name": is_name, "peerId": is_peer_id, "addresses": are_addresses, "after": is_cursor}
START = {"name": is_name, "peerId": is_peer_id, "addresses": are_addresses}
DELETE = {"peerId": is_peer_id}


def check(body, fields):
    """The body, if it is an object with these fields."""
    if not isinstance(body, dict):
        raise Problem(400, "the body must be a JSON object")
    faults = [name for name, right in fields.items() if not right(body.get(name))]
    if faults:
        raise Problem(400, "missing or of the wrong type: " + ", ".join(faults))
    return body


# ---- games ----------------------------------------------------------------------------------------------------------

class Game:
    def __init__(self, name, owner):
        self.name, self.owner = name, owner
        self.info, self.listed = {}, True
        self.addresses, self.offered = [], 0
        self.guests, self.changed = {}, 0


class Guest:
    def __init__(self):
        self.session_id, self.session_key = secrets.token_hex(16), secrets.token_hex(16)
        self.addresses, self.changed = None, 0

    def body(self):
        return {"sessionId": self.session_id, "sessionKey": self.session_key, "addresses": self.addresses}


class Registry:
    """The games by name. Servers with threads hold a lock of their own around each call. What the methods return is a body of JSON."""

    def __init__(self):
        self.games = {}
        self.cursor = 0

    def register(self, body):
        """(whether the game is new, the answer)"""
        name, peer_id = body["name"], body["peerId"]
        game = self.games.get(name)
        created = game is None
        if created:
            game = self.games[name] = Game(name, peer_id)
        elif game.owner != peer_id:
            raise Problem(409, "the name is taken")
        if body.get("info") is not None:
            game.info = body["info"]
        if body.get("listed") is not None:
            game.listed = body["listed"]
        return created, {"name": name, **LEASE}

    def poll(self, body):
        game = self.owned(body["name"], body["peerId"])
        if game.addresses != body["addresses"]:
            game.addresses, game.offered = body["addresses"], self.next_version()
        after = body.get("after")
        since = -1 if after is None else after
        guests = [guest.body() for guest in game.guests.values() if guest.changed > since]
        return {"name": game.name, "guests": guests, "cursor": game.changed, **LEASE}

    def start(self, body):
        """(whether the host has addresses yet, the answer)"""
        game = self.found(body["name"])
        if game.owner == body["peerId"]:
            raise Problem(409, "a host cannot start its own game")
        guest = game.guests.get(body["peerId"])
        if guest is None:
            guest = game.guests[body["peerId"]] = Guest()
        if guest.addresses != body["addresses"]:
            guest.addresses = body["addresses"]
            guest.changed = game.changed = self.next_version()
        return bool(game.addresses), {"name": game.name, **guest.body(), "addresses": game.addresses, "cursor": game.offered, **LEASE}

    def list(self):
        return {"games": [{"name": game.name, "info": game.info, "guests": len(game.guests), "ready": bool(game.addresses)}
                          for game in self.games.values() if game.listed]}

    def delete(self, name, body):
        del self.games[self.owned(name, body["peerId"]).name]

    def next_version(self):
        self.cursor += 1
        return self.cursor

    def found(self, name):
        game = self.games.get(name)
        if game is None:
            raise Problem(404, "there is no such game")
        return game

    def owned(self, name, peer_id):
        game = self.found(name)
        if game.owner != peer_id:
            raise Problem(403, "the peerId is not the one that registered this game")
        return game
