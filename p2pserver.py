#!/usr/bin/env python3
"""p2pserver: the rendezvous server by which two players behind home routers find each other.

A host offers a game under a name; guests look it up; the two hand each other their candidate addresses through this
server and from then on talk directly. JSON over HTTP/1.1, fields in brackets are optional:

    POST   /games/register  {name, peerId, [info, listed]}              a host offers a game: 201; its owner again: 200
    POST   /games/poll      {name, peerId, addresses, [after, replies, wait]} a host publishes its addresses, learns of guests
    POST   /games/start     {name, peerId, addresses, [wait]}           a guest asks for the host's addresses: 200, or 202: none yet
    GET    /games                                                       the listed games, oldest first
    GET    /games/<name>                                                one game
    PATCH  /games/<name>    {peerId, [name, info, listed]}              its host renames or describes it (PUT does the same)
    DELETE /games/<name>    {peerId}                                    its host ends it: 204
    GET    /healthz                                                     200, or 503 while shutting down
    GET    /metrics                                                     counts for Prometheus; for whom --metrics-from allows
    GET    /                                                            this table, for a person

    register, 201 or 200   {name, expiresIn, pollAfter}
    poll, 200              {name, guests: [{sessionId, sessionKey, addresses}], cursor, expiresIn, pollAfter, [gone]}
    start, 200 or 202      {name, sessionId, sessionKey, addresses, cursor, expiresIn, pollAfter}
    list, 200              {games: [{name, info, guests, ready}]}       one game, and PATCH: {name, info, guests, ready}
    any error              application/problem+json (RFC 9457): {type, title, status, detail, [errors: {field: rule}]}

The peerId authorises: whoever registers a game with it owns the game. It is never shown to anybody, logged or kept: the
registry holds a keyed digest. Each host and guest pair gets a session of its own, whose sessionKey only the two know.

With wait, or Prefer: wait=N (RFC 7240), a poll without news is held until there are some, and a start until the host has
addresses; Preference-Applied in the answer says that it was.

Threads: one, the loop, accepts connections and serves all of them: it never waits for a client, so none needs a thread, whether it is
slow, silent or held. A pool of a few works at what takes long, and one thread answers STUN. All games live in the Registry behind its
one lock, which is held for dictionary work alone: nothing is parsed, serialised, sent or logged under it. What happens to games is
queued as events and logged afterwards. The main thread only waits for the signal to stop.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import email.utils
import errno
import functools
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import types
import unicodedata
import urllib.parse
import zlib
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn, Optional, Set, Tuple, Union


@contextlib.contextmanager
def spared(*modules: str) -> Iterator[None]:
    """Have imports do without these modules, which they can: OpenSSL alone would be a quarter of all memory."""
    sys.modules.update(dict.fromkeys(modules))  # type: ignore[arg-type]
    yield
    for module in modules:
        del sys.modules[module]


if __name__ == "__main__":
    with spared("ssl", "bz2", "lzma", *(["_hashlib"] if importlib.util.find_spec("_md5") else [])):     # some Pythons hash by OpenSSL alone
        import hashlib
        import hmac
        import http.server
else:
    import hashlib
    import hmac
    import http.server

__version__ = "0.1.0"

log = logging.getLogger("p2pserver")


# ---- limits ---------------------------------------------------------------------------------------------------------
# One table is the limits, the command line and the environment: --game-ttl is also P2P_GAME_TTL and settings.game_ttl.

class Option(NamedTuple):
    """A row of the table: its default's type is the option's, and numbers stay within [low, high]."""

    name: str
    default: Any
    help: str
    low: float = 0
    high: float = 0
    choices: Tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "P2P_" + self.name.upper()

    def parse(self, text: str) -> Any:
        """The value that text stands for; ValueError with the rule if it stands for none."""
        if isinstance(self.default, bool):
            if text not in ("0", "1"):
                raise ValueError("must be 1 or 0")
            return text == "1"
        try:
            value = type(self.default)(text)
        except ValueError:
            raise ValueError("must be a number" if isinstance(self.default, float) else "must be a whole number") from None
        return self.check(value)

    def check(self, value: Any) -> Any:
        """The value; ValueError with the rule if it is out of bounds."""
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                raise ValueError("must be one of " + ", ".join(self.choices))
            if not value.isprintable() or not (value.isascii() or self.name.startswith("tls_")):
                raise ValueError("must be printable ASCII")
            if self.name in ("trusted_proxies", "metrics_from"):
                Networks(value)
        elif not isinstance(value, bool) and not self.low <= value <= self.high:
            raise ValueError(f"must be from {self.low:.15g} to {self.high:.15g}")
        return value


UNKNOWN = "unknown"     # stands for the address of a client of which its proxies tell nothing, or not the same


class Networks:
    """Addresses and networks with commas between, as "192.0.2.1, 2001:db8::/32"; ValueError if the text is anything else."""

    def __init__(self, text: str) -> None:
        try:
            self._networks = [ipaddress.ip_network(each.strip(), strict=False) for each in text.split(",") if each.strip()]
        except ValueError:
            raise ValueError("must be IP addresses and networks with commas between") from None

    def __contains__(self, address: str) -> bool:
        return address != UNKNOWN and any(ipaddress.ip_address(address) in network for network in self._networks)


OPTIONS = (
    Option("host", "", "address to listen on; all addresses, IPv6 and IPv4, if not given"),
    Option("port", 8000, "port to listen on, TCP for HTTP and UDP for STUN; 0 picks a free one and prints it", 0, 65535),
    Option("stun_port", 0, "another UDP port for STUN than that of HTTP", 0, 65535),
    Option("stun_rate", 5.0, "STUN answers a second to one address, and 50 at once; 0 for no limit", 0, 1_000_000),
    Option("no_stun", False, "no STUN: clients then need another STUN server"),
    Option("game_ttl", 60.0, "seconds after which a game whose host is silent is gone", 1, 86400),
    Option("guest_ttl", 60.0, "seconds after which a guest who has not started again is gone", 1, 86400),
    Option("poll_after", 2.0, "seconds that clients are advised to wait between two polls", 0.1, 3600),
    Option("max_games", 10000, "games at once", 1, 10_000_000),
    Option("max_guests", 64, "guests of one game at once", 1, 100_000),
    Option("max_games_per_client", 50, "games at once of one client address, of which an IPv6 /64 is one", 1, 10_000_000),
    Option("rate", 50.0, "requests a second of one client address, a failed authorisation counting as ten; 0 for no limit", 0, 1_000_000),
    Option("burst", 200, "requests at once of one client address, on top of --rate", 10, 1_000_000),
    Option("max_connections", 20000, "connections at once", 1, 10_000_000),
    Option("max_connections_per_client", 256, "connections at once of one client address", 1, 10_000_000),
    Option("max_memory", 256, "megabytes of games, guests and unfinished requests", 1, 1_000_000),
    Option("max_guests_per_client", 16, "guests of one game at once that come from one client address", 1, 100_000),
    Option("max_wait", 25, "seconds for which a poll or start is held at the most", 0, 3600),
    Option("max_waiting", 20000, "polls and starts held at once; beyond that they are answered without waiting", 0, 10_000_000),
    Option("max_threads", 8, "threads for what takes long; connections that wait need none", 1, 10_000),
    Option("max_body", 16384, "bytes in the body of a request", 1024, 16_777_216),
    Option("idle_timeout", 75.0, "seconds of silence after which a connection is closed", 1, 3600),
    Option("cors_origin", "*", "origin whose web pages may call: * for all, empty for none"),
    Option("trusted_proxies", "", "reverse proxies whose X-Forwarded-For or Forwarded is believed: addresses and networks, with commas between"),
    Option("metrics_from", "", "who may GET /metrics beside this machine: addresses and networks, with commas between"),
    Option("tls_cert", "", "file with the certificate and its chain, PEM: HTTPS instead of HTTP; SIGHUP loads it anew"),
    Option("tls_key", "", "file with the certificate's key, PEM, if it is not in that file"),
    Option("log_format", "text", "lines of the log as text, or each as a JSON object", choices=("text", "json")),
    Option("log_level", "info", "least level of what is logged", choices=("debug", "info", "warning", "error")),
    Option("access_log", False, "log every request"),
)

MAX_NAME = 64           # characters
MAX_PEER_ID = 128       # characters
MAX_ADDRESSES = 16      # candidates in one list
MAX_ADDRESS = 512       # characters
MAX_INFO = 1024         # bytes as compact JSON
MAX_DEPTH = 16          # levels of arrays and objects in what is handed on
MAX_NUMBER = 2 ** 53 - 1    # what every JSON reader holds exactly (RFC 8259 section 6)
MAX_REQUEST_LINE = 8192     # bytes; RFC 9112 section 3 asks for 8000 at least
MAX_HEAD = 32768        # bytes
MAX_HEADER_FIELDS = 100
MAX_FORWARDED = 2048        # characters of X-Forwarded-For and Forwarded that are looked into
REQUEST_TIME = 10.0     # seconds for a request to arrive, from its first byte to its last
SEND_TIME = 10.0        # seconds in which a client must read some of an answer
COPIED = 65536          # bytes of a body up to which it is sent in one write with its head; longer ones are not copied
LOG_LINES = 10000       # that wait to be written at the most
LINGER_TIME = 2.0       # seconds that a refused request may go on arriving before its connection is cut
CROWDED = 5             # times as long between two polls is advised to who wished to be held and could not be
ACCEPTED_AT_ONCE = 64   # connections, before those that there are have their turn
THREAD_IDLE = 10.0      # seconds after which a thread that has nothing to do ends
RETRY_AFTER = 10        # seconds, where a full server or game may have room again
FORBIDDEN_COST = 10     # requests that a wrong peerId counts as, so that guessing is slow
SURPLUS = 100           # connections beyond a limit that are told so; what is beyond that is closed without a word
MEMORY_SHARE = 8        # of --max-memory, the part that may wait in the connections of one client
GAME_WEIGHT, GUEST_WEIGHT = 1000, 900    # bytes that one takes beside its texts (bench/memory.py measures it)


class Settings(types.SimpleNamespace):
    """The values of OPTIONS by name. ValueError names the first fault: a value out of bounds, or two that do not go together."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{option.name: values.pop(option.name, option.default) for option in OPTIONS})
        for name in values:
            raise ValueError(f"there is no option {name}")
        for option in OPTIONS:
            try:
                option.check(getattr(self, option.name))
            except ValueError as fault:
                raise ValueError(f"{option.flag} {fault}") from None
        for shorter, longer, why in (
            ("poll_after", "game_ttl", "or every game is gone before its host polls again"),
            ("poll_after", "guest_ttl", "or every guest is gone before it starts again"),
            ("poll_after", "idle_timeout", "or every connection is closed before it is used again"),
        ):
            if not getattr(self, shorter) < getattr(self, longer):
                raise ValueError(f"--{shorter} must be less than --{longer}, {why}".replace("_", "-"))
        if self.tls_key and not self.tls_cert:
            raise ValueError("--tls-key needs --tls-cert")


# ---- problems -------------------------------------------------------------------------------------------------------

class Problem(Exception):
    """What a client is told went wrong: one sentence, the faults of the body by field, a status of HTTP, further header fields."""

    status = 400
    limit = ""      # the one that was reached

    def __init__(self, detail: str, status: Optional[int] = None, errors: Optional[Dict[str, str]] = None, **headers: str) -> None:
        super().__init__(detail)
        self.detail, self.errors = detail, errors or {}
        self.status = status or self.status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class NotFound(Problem):
    status = 404


class Forbidden(Problem):
    status = 403


class Conflict(Problem):
    status = 409


class Full(Problem):
    """A limit of the server's or of a game's is reached."""

    status = 503

    def __init__(self, limit: str, detail: str, **headers: str) -> None:
        super().__init__(detail, **headers)  # type: ignore[arg-type]
        self.limit = limit


class TooMany(Full):
    """A limit that each client has for itself is reached (RFC 6585 section 4)."""

    status = 429


# ---- fields (validation) --------------------------------------------------------------------------------------------
# A check takes the value and whether the client calls from this machine; it returns the value to use, or raises
# ValueError with the rule. Past these checks a value is trusted.

Check = Callable[[Any, bool], Any]
Wake = Callable[[], None]
Addresses = Tuple[Union[str, bytes], ...]       # the objects among them packed

PREFER_WAIT = re.compile(r'(?:^|[,;])[ \t]*wait[ \t]*=[ \t]*"?([0-9]{1,9})"?[ \t]*(?:[,;]|$)', re.IGNORECASE)
RESERVED_NAMES = (".", "..", "register", "poll", "start")   # they are paths, or clients fold them away (RFC 3986 section 5.2.4)
IPV4_MAPPED, LOOPBACK6 = bytes(10) + b"\xff\xff", bytes(15) + b"\1"
NOBODY = (bytes(4), bytes(16), b"\xff\xff\xff\xff")
IP_PORT = re.compile(r"(?:([0-9]+(?:\.[0-9]+){3})|\[([0-9A-Fa-f:.]+(?:%[^\]]*)?)\]):([0-9]+)")


def check_name(value: Any, local: bool = False) -> str:
    """A game's name, normalised to NFC: two ways of typing one name are one game."""
    # What is four times too long stays too long: NFC makes at most four characters one. It bounds the work of normalising.
    if not isinstance(value, str) or not 0 < len(value) <= 4 * MAX_NAME:
        raise ValueError(f"must be a string of 1 to {MAX_NAME} characters")
    name = value if value.isascii() else unicodedata.normalize("NFC", value)
    if len(name) > MAX_NAME:
        raise ValueError(f"must be a string of 1 to {MAX_NAME} characters")
    if not name.isprintable() and any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise ValueError("must not contain control characters, line separators or lone surrogates")
    if "/" in name:
        raise ValueError("must not contain /")
    if name != name.strip():
        raise ValueError("must not begin or end with white space")
    if name in RESERVED_NAMES:
        raise ValueError("must not be one of " + ", ".join(RESERVED_NAMES))
    return name


def check_peer_id(value: Any, local: bool = False) -> str:
    """The secret that authorises its owner."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PEER_ID or not value.isprintable():
        raise ValueError(f"must be a string of 1 to {MAX_PEER_ID} printable characters")
    return value


def ip_port_fault(text: str, local: bool) -> str:
    """The rule that an ip:port or [ipv6]:port breaks, or nothing; text of any other form is none of our business."""
    match = IP_PORT.fullmatch(text)
    if not match:
        return ""
    try:
        address = packed_address(match[1] or match[2])
    except OSError:
        return "is not an IP address"
    if len(match[3]) > 5 or not 0 < int(match[3]) <= 65535:
        return "must have a port from 1 to 65535"
    if address in NOBODY or address[0] == 0xFF or len(address) == 4 and 224 <= address[0] < 240:
        return "must not be an unspecified, multicast or broadcast address"
    if is_loopback(address) and not local:
        return "must not be a loopback address, which only clients on the server's own machine may publish"
    return ""


def packed_address(text: str) -> bytes:
    """The 4 or 16 bytes of an IP address, which may have a zone; an IPv4-mapped IPv6 address is the IPv4 one. OSError if text is none."""
    if ":" not in text:
        return socket.inet_pton(socket.AF_INET, text)
    packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    return packed[12:] if packed.startswith(IPV4_MAPPED) else packed


def is_loopback(packed: bytes) -> bool:
    return packed[0] == 127 if len(packed) == 4 else packed == LOOPBACK6


def too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether arrays and objects lie within each other deeper than that; what can be read could then still fail to be written."""
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(too_deep(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


def address_fault(value: Any, local: bool) -> str:
    """The rule that one candidate breaks, or nothing."""
    if isinstance(value, str):
        return ip_port_fault(value, local) if len(value) <= MAX_ADDRESS else f"must have at most {MAX_ADDRESS} characters"
    if not isinstance(value, dict):
        return "must be a string or an object"
    return f"must be at most {MAX_DEPTH} levels deep" if too_deep(value) else ""


def check_addresses(value: Any, local: bool) -> Addresses:
    """Candidates, most wanted first."""
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise ValueError(f"must be an array of at most {MAX_ADDRESSES} addresses")
    faults = [f"[{i}] {fault}" for i, fault in enumerate([address_fault(item, local) for item in value]) if fault]
    if faults:
        raise ValueError("; ".join(faults))
    return tuple([item if isinstance(item, str) else pack(item) for item in value])


def check_replies(value: Any, local: bool) -> Dict[str, Addresses]:
    """Addresses for single guests: {sessionId: addresses}."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of addresses by sessionId")
    replies, faults = {}, []
    for session_id, addresses in value.items():
        try:
            replies[session_id] = check_addresses(addresses, local)
        except ValueError as fault:
            faults.append(f"{session_id[:32]!r}: {fault}")
    if faults:
        raise ValueError("; ".join(faults))
    return replies


def check_info(value: Any, local: bool) -> bytes:
    """What lobbies show of a game, packed."""
    if not isinstance(value, dict) or too_deep(value) or len(pack(value)) > MAX_INFO:
        raise ValueError(f"must be an object of at most {MAX_INFO} bytes of JSON and {MAX_DEPTH} levels")
    return pack(value)


def check_flag(value: Any, local: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def check_cursor(value: Any, local: bool) -> int:
    """A cursor that this server gave out earlier."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise ValueError("must be a cursor from an earlier answer, a whole number")
    return value


def check_wait(value: Any, local: bool) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise ValueError("must be a whole number of seconds")
    return value


class Field(NamedTuple):
    """A field of a body. Absent or null, an optional one is None."""

    check: Check
    required: bool = True


def validate(body: Mapping[str, Any], fields: Mapping[str, Field], local: bool) -> Dict[str, Any]:
    """The checked values by field name. Fields that are not asked for are ignored, so newer clients work; Problem names every fault at once."""
    values: Dict[str, Any] = {}
    faults = {}
    for name, (check, required) in fields.items():
        value = body.get(name)
        if value is None and not required:
            values[name] = None
        elif value is None and name not in body:
            faults[name] = "is required"
        else:
            try:
                values[name] = check(value, local)
            except ValueError as fault:
                faults[name] = str(fault)
    if faults:
        raise Problem("; ".join(f"{name} {fault}" for name, fault in faults.items()), errors=faults)
    return values


def unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object none of whose names comes twice: readers differ in which one they take (RFC 8259 section 4)."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return members


def plain_int(text: str) -> int:
    if len(text) > 300:     # a double's range; converting more digits costs time that grows with their square
        raise ValueError("a number is too large")
    return int(text)


def plain_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")   # it may also be half of a pair, which is fine
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
from_json = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=plain_int, parse_float=plain_float, parse_constant=no_constant).decode


def pack(value: Dict[str, Any]) -> bytes:
    """An object as the registry keeps it: as JSON text, for as Python's objects it can weigh twenty times as much."""
    return to_json(value).encode("utf-8")


def parse_body(body: bytes) -> Dict[str, Any]:
    """The object that a body holds; Problem 400 if it is not JSON, or JSON that not every reader reads alike."""
    try:
        text = body.decode("utf-8")
        value = from_json(text)
        if LONE_SURROGATE.search(text):
            to_json(value).encode("utf-8")
    except UnicodeError:
        raise Problem("the body is not UTF-8, or has a lone surrogate") from None
    except RecursionError:
        raise Problem("the body is nested too deeply") from None
    except ValueError as fault:     # its text gives a position or one of the rules above, never the body
        raise Problem(f"the body is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise Problem("the body must be a JSON object")
    return value


# ---- games (data) ---------------------------------------------------------------------------------------------------

class Game:
    """A game while its host is alive. Versions are values of the registry's cursor; 0 stands for never."""

    __slots__ = ("name", "owner", "place", "info", "listed", "addresses", "offered", "guests", "changed", "born", "hold")

    def __init__(self, name: str, owner: bytes, place: bytes, info: bytes, version: int) -> None:
        self.name = name
        self.place = place                              # that of the client that registered it
        self.owner = owner                              # the seal of its host's peerId
        self.info = info                                # packed
        self.listed = True
        self.addresses: Addresses = ()                  # what the host offers to every guest
        self.offered = 0                                # version of addresses
        self.guests: Dict[bytes, Guest] = {}            # by the seal of their peerId, in the order they came
        self.changed = version                          # when a guest last came or moved
        self.born = version                             # the order of the list, which a rename keeps
        self.hold: Optional[Hold] = None                # its host's poll, if that is held


class Guest:
    """One guest's session with one game."""

    __slots__ = ("game", "seal", "place", "session_id", "session_key", "addresses", "changed", "reply", "replied", "hold")

    def __init__(self, game: Game, seal: bytes, place: bytes, session_id: str, session_key: str) -> None:
        self.game, self.seal, self.place = game, seal, place
        self.session_id, self.session_key = session_id, session_key
        self.addresses: Addresses = ()
        self.changed = 0                                # version of addresses
        self.reply: Optional[Addresses] = None          # what the host offers this guest in place of the game's addresses
        self.replied = 0                                # version of reply
        self.hold: Optional[Hold] = None                # its start, if that is held


class Hold:
    """A poll or start that is held until there is news: wake is called once, in any thread, when it is to be resumed."""

    __slots__ = ("entry", "since", "wake", "replaced")

    def __init__(self, entry: Union[Game, Guest], since: int, wake: Wake) -> None:
        self.entry, self.since, self.wake = entry, since, wake
        self.replaced = False       # by a later one of the same host or guest


class Counts(NamedTuple):
    """How many games, guests and held polls and starts there are, and the bytes that they take."""

    games: int
    guests: int
    waiting: int
    stored: int


class GameView(NamedTuple):
    """What anybody may know of a game."""

    name: str
    info: bytes
    guests: int
    ready: bool


class Session(NamedTuple):
    """What one of a host and guest pair may know: the session that the two share, and the addresses of the other."""

    session_id: str
    session_key: str
    addresses: Addresses


class Polled(NamedTuple):
    """What a host learns from a poll: guests, the cursor to poll with next time, the sessions of its replies that are gone; or a hold."""

    name: str
    guests: List[Session]
    cursor: int
    gone: List[str]
    hold: Optional[Hold] = None


class Started(NamedTuple):
    """What a guest learns from a start: the host's addresses, empty while it has none for it, and their cursor; or a hold."""

    name: str
    session: Session
    cursor: int
    hold: Optional[Hold] = None


class Event(NamedTuple):
    """Something that happened to a game, for the log."""

    operation: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        """A line of the log. The name is quoted as Python does it, so that none can forge a line or steer a terminal."""
        return f"{self.operation} {self.name!r} {self.detail}".rstrip()


# ---- registry -------------------------------------------------------------------------------------------------------

def new_session_id() -> str:
    """128 random bits: a sessionId or a sessionKey."""
    return os.urandom(16).hex()


class Registry:
    """All games and guests, behind one lock. It knows no network: names in, values out, Problems raised.

    Another store can stand in its place with the same methods. They are called from many threads, take what validation
    lets through, and return values that nobody changes afterwards. Each raises NotFound, Forbidden, Conflict or Full where the
    protocol says so, and then has changed nothing, but that who owns a game or session is alive.

    settings: game_ttl, guest_ttl (seconds), max_games, max_games_per_client, max_guests, max_guests_per_client, max_waiting, max_memory.
    clock: seconds that never go back.
    new_id: a new unguessable string at each call.
    cursor: the first version. The server passes microseconds since 1970, which is more than an earlier run can have reached,
    so a cursor that a host kept across a restart does not hide the guests that came since.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic, new_id: Callable[[], str] = new_session_id,
                 cursor: int = 0) -> None:
        self._settings = settings
        self._clock = clock
        self._new_id = new_id
        self._secret = os.urandom(32)
        # The lock guards everything below. Public methods take it and read the clock once; private ones need it held.
        self._lock = threading.Lock()
        self._cursor = cursor
        self._games: Dict[str, Game] = {}
        # Each with its deadline, the one to end first in front: expiry looks at the front only, never at all of them.
        self._game_queue: collections.OrderedDict[Game, float] = collections.OrderedDict()
        self._guest_queue: collections.OrderedDict[Guest, float] = collections.OrderedDict()
        self._next_end = 0.0                            # no deadline is before that
        self._places: collections.Counter[bytes] = collections.Counter()    # how many games each place has
        self._holding = 0                               # how many holds there are
        self._stored = 0                                # bytes that games and guests take
        self.reserved = 0                               # bytes of max_memory that somebody else takes; written without the lock
        self._woken: List[Wake] = []                    # to be called once the lock is free
        self.listing = 0                                # grows with every change of what list_games() gives; may be read without the lock
        # What is to be logged once the lock is free. A deque's ends are safe without the lock.
        self.events: collections.deque[Event] = collections.deque()

    def register_game(self, name: str, peer_id: str, info: Optional[bytes] = None, listed: Optional[bool] = None, place: bytes = b"") -> bool:
        """Offer a game; True if it is new. Its owner again keeps it alive with its guests, and changes only what is given.

        place stands for the client's address. Conflict: somebody else has the name. Full: there are max_games, or no memory for it.
        TooMany: the place has max_games_per_client.
        """
        seal = self._seal(peer_id)
        with self._turn() as now:
            game = self._games.get(name)
            created = game is None
            if game is None:
                if len(self._games) >= self._settings.max_games:
                    raise Full("games", f"there are {len(self._games)} games, which is all this server takes")
                if self._places[place] >= self._settings.max_games_per_client:
                    raise TooMany("games_per_client", f"your address has {self._places[place]} games, which is all that one may have")
                self._store(GAME_WEIGHT + weight((name, info or b"{}")), is_new=True)
                game = self._games[name] = Game(name, seal, place, info or b"{}", self._next_version())
                self._places[place] += 1
                self.listing += 1
                self.events.append(Event("register_game", name))
            elif not hmac.compare_digest(game.owner, seal):
                raise Conflict(f"the name {name!r} is taken")
            self._store(0 if info is None else len(info) - len(game.info))
            self._describe(game, info, listed)
            self._host_alive(game, now)
            return created

    def poll_game(self, name: str, peer_id: str, addresses: Addresses, after: Optional[int] = None,
                  replies: Optional[Mapping[str, Addresses]] = None, wake: Optional[Wake] = None) -> Polled:
        """Publish the host's addresses and replies; learn of the guests that came or moved since the cursor after, or of all.

        With wake, and without news or while there is room, the poll is held: resume_poll() gives the answer. A host has one hold: an
        earlier one is resumed. NotFound, Forbidden; Full: no memory for what is new.
        """
        seal, replies = self._seal(peer_id), replies or {}
        with self._turn() as now:
            game = self._owned(name, seal)
            self._host_alive(game, now)
            self._store(self._growth(game, addresses, replies))
            self._replace(game)
            if addresses != game.addresses:
                self._host_moved(game, addresses)
            gone = self._reply(game, replies)
            # A cursor ahead of ours was given out by an earlier run whose clock was ahead: it says nothing about these guests.
            since = after if after is not None and after <= self._cursor else -1
            polled = self._polled(game, since, gone)
            return polled if wake is None or polled.guests or gone else polled._replace(hold=self._hold(game, since, wake))

    def resume_poll(self, hold: Hold) -> Polled:
        """The answer to a poll that was held, at whatever time. NotFound: the game is gone."""
        with self._turn() as now:
            self._let_go(hold)
            game = hold.entry
            assert isinstance(game, Game)
            if self._games.get(game.name) is not game:
                raise NotFound(f"the game {game.name!r} is gone")
            self._host_alive(game, now)
            return self._polled(game, hold.since, [])

    def start_game(self, name: str, peer_id: str, addresses: Addresses, wake: Optional[Wake] = None, place: bytes = b"") -> Started:
        """Join a game as a guest, or say that one is still there. With wake, and while there is room, it is held until the host has addresses.

        place stands for the client's address. NotFound; Conflict: the host's own game; Full: there are max_guests, or no memory for it.
        TooMany: max_guests_per_client come from the place.
        """
        seal = self._seal(peer_id)
        with self._turn() as now:
            game = self._found(name)
            if hmac.compare_digest(game.owner, seal):
                raise Conflict("a host cannot start its own game")
            guest = game.guests.get(seal)
            if guest is None:
                if len(game.guests) >= self._settings.max_guests:
                    raise Full("guests", f"the game has {len(game.guests)} guests, which is all this server takes")
                if sum(each.place == place for each in game.guests.values()) >= self._settings.max_guests_per_client:
                    raise TooMany("guests_per_client", "the game has as many guests from your address as it may have")
                self._store(GUEST_WEIGHT + weight(addresses), is_new=True)
                guest = game.guests[seal] = Guest(game, seal, place, self._new_id(), self._new_id())
                self._guest_moved(guest, addresses)
                self.listing += 1
                self.events.append(Event("start_game", name, f"guests: {len(game.guests)}"))
            self._guest_alive(guest, now)
            if addresses != guest.addresses:
                self._store(weight(addresses) - weight(guest.addresses))
                self._guest_moved(guest, addresses)
            self._replace(guest)
            started = self._started(guest)
            return started if wake is None or started.session.addresses else started._replace(hold=self._hold(guest, 0, wake))

    def resume_start(self, hold: Hold) -> Started:
        """The answer to a start that was held, at whatever time. NotFound: the game is gone."""
        with self._turn() as now:
            self._let_go(hold)
            guest = hold.entry
            assert isinstance(guest, Guest)
            if guest not in self._guest_queue:
                raise NotFound(f"the game {guest.game.name!r} is gone")
            self._guest_alive(guest, now)
            return self._started(guest)

    def let_go(self, hold: Hold) -> None:
        """Forget a hold whose client has hung up."""
        with self._lock:
            self._let_go(hold)

    def list_games(self) -> List[GameView]:
        """The listed games, oldest first."""
        with self._turn():
            games = sorted((game for game in self._games.values() if game.listed), key=lambda game: game.born)
            return [self._view(game) for game in games]

    def get_game(self, name: str) -> GameView:
        """One game, listed or not. NotFound."""
        with self._turn():
            return self._view(self._found(name))

    def update_game(self, name: str, peer_id: str, new_name: Optional[str] = None, info: Optional[bytes] = None,
                    listed: Optional[bool] = None) -> GameView:
        """Rename or describe a game, which keeps its guests. NotFound; Forbidden; Conflict: the new name is taken."""
        seal, new_name = self._seal(peer_id), new_name or name
        with self._turn():
            game = self._owned(name, seal)
            if new_name != name and new_name in self._games:
                raise Conflict(f"the name {new_name!r} is taken")
            self._store(weight((new_name, info or game.info)) - weight((name, game.info)))
            if new_name != name:
                self._games[new_name] = self._games.pop(name)
                game.name = new_name
                self.listing += 1
                self._resume_all(game)
                self.events.append(Event("update_game", name, f"renamed to {new_name!r}"))
            self._describe(game, info, listed)
            return self._view(game)

    def delete_game(self, name: str, peer_id: str) -> None:
        """End a game. NotFound, Forbidden."""
        seal = self._seal(peer_id)
        with self._turn():
            self._remove_game(self._owned(name, seal))
            self.events.append(Event("delete_game", name))

    def counts(self) -> Counts:
        with self._turn():
            return Counts(len(self._games), len(self._guest_queue), self._holding, self._stored)

    def expire_games(self) -> None:
        """Free what has expired. Every other method does so too: this is for the times when nobody calls."""
        with self._turn():
            pass

    @contextlib.contextmanager
    def _turn(self) -> Iterator[float]:
        """The lock for one operation, and the time. What has expired is gone, and who is to be woken is woken once the lock is free."""
        try:
            with self._lock:
                now = self._clock()
                self._expire(now)
                yield now
        finally:
            while self._woken:
                with contextlib.suppress(IndexError):   # another thread was faster
                    self._woken.pop()()

    def _seal(self, peer_id: str) -> bytes:
        """A keyed digest that stands for a peerId: what is kept reveals nothing, and looking it up takes no time that depends on the secret."""
        return hashlib.blake2b(peer_id.encode("utf-8"), key=self._secret, digest_size=16).digest()

    def _next_version(self) -> int:
        self._cursor += 1
        return self._cursor

    def _found(self, name: str) -> Game:
        game = self._games.get(name)
        if game is None:
            raise NotFound(f"there is no game {name!r}")
        return game

    def _owned(self, name: str, seal: bytes) -> Game:
        game = self._found(name)
        if not hmac.compare_digest(game.owner, seal):
            raise Forbidden("the peerId is not the one that registered this game")
        return game

    def _view(self, game: Game) -> GameView:
        return GameView(game.name, game.info, len(game.guests), bool(game.addresses))

    def _store(self, growth: int, is_new: bool = False) -> None:
        """Count bytes that are about to be stored, or freed. Full: there is no room for them; a tenth is kept from what is new for the
        sake of what is there already."""
        limit = self._settings.max_memory * 1_000_000
        if growth > 0 and self._stored + self.reserved + growth > (limit * 9 // 10 if is_new else limit):
            raise Full("memory", "the server's memory for games is full")
        self._stored += growth

    def _growth(self, game: Game, addresses: Addresses, replies: Mapping[str, Addresses]) -> int:
        """Bytes that a poll adds to what is stored."""
        growth = 0 if addresses == game.addresses else weight(addresses) - weight(game.addresses)
        if replies:
            growth += sum(weight(replies[guest.session_id]) - weight(guest.reply or ())
                          for guest in game.guests.values() if guest.session_id in replies)
        return growth

    def _describe(self, game: Game, info: Optional[bytes], listed: Optional[bool]) -> None:
        before = game.info, game.listed
        if info is not None:
            game.info = info
        if listed is not None:
            game.listed = listed
        if before != (game.info, game.listed):
            self.listing += 1

    def _host_alive(self, game: Game, now: float) -> None:
        self._game_queue[game] = now + self._settings.game_ttl
        self._game_queue.move_to_end(game)

    def _guest_alive(self, guest: Guest, now: float) -> None:
        self._guest_queue[guest] = now + self._settings.guest_ttl
        self._guest_queue.move_to_end(guest)

    def _host_moved(self, game: Game, addresses: Addresses) -> None:
        if not game.offered:
            self.events.append(Event("poll_game", game.name, f"first addresses: {len(addresses)}"))
        if bool(addresses) != bool(game.addresses):
            self.listing += 1
        game.addresses, game.offered = addresses, self._next_version()
        if addresses:
            for guest in game.guests.values():
                if guest.reply is None:
                    self._resume(guest)

    def _guest_moved(self, guest: Guest, addresses: Addresses) -> None:
        guest.addresses, guest.changed = addresses, self._next_version()
        guest.game.changed = guest.changed
        self._resume(guest.game)

    def _polled(self, game: Game, since: int, gone: List[str]) -> Polled:
        guests = [Session(guest.session_id, guest.session_key, guest.addresses) for guest in game.guests.values() if guest.changed > since]
        return Polled(game.name, guests, game.changed, gone)

    def _started(self, guest: Guest) -> Started:
        game = guest.game
        offer, version = (game.addresses, game.offered) if guest.reply is None else (guest.reply, guest.replied)
        return Started(game.name, Session(guest.session_id, guest.session_key, offer), version)

    def _hold(self, entry: Union[Game, Guest], since: int, wake: Wake) -> Optional[Hold]:
        """Hold a poll or start; None if there is no room."""
        if self._holding >= self._settings.max_waiting:
            return None
        self._holding += 1
        entry.hold = Hold(entry, since, wake)
        return entry.hold

    def _let_go(self, hold: Hold) -> None:
        if hold.entry.hold is hold:
            hold.entry.hold = None
            self._holding -= 1

    def _resume(self, entry: Union[Game, Guest]) -> None:
        """Have what is held for a host or a guest answered."""
        if entry.hold:
            self._woken.append(entry.hold.wake)
            self._let_go(entry.hold)

    def _replace(self, entry: Union[Game, Guest]) -> None:
        """Have what is held for a host or a guest answered because it asks again."""
        if entry.hold:
            entry.hold.replaced = True
            self._resume(entry)

    def _resume_all(self, game: Game) -> None:
        self._resume(game)
        for guest in game.guests.values():
            self._resume(guest)

    def _reply(self, game: Game, replies: Mapping[str, Addresses]) -> List[str]:
        """Give single guests addresses of their own; returns the sessions that are gone."""
        sessions = {guest.session_id: guest for guest in game.guests.values()} if replies else {}
        for session_id in replies.keys() & sessions.keys():
            guest = sessions[session_id]
            if guest.reply != replies[session_id]:
                guest.reply, guest.replied = replies[session_id], self._next_version()
                if guest.reply:
                    self._resume(guest)
        return [session_id for session_id in replies if session_id not in sessions]

    def _expire(self, now: float) -> None:
        """Remove what has expired, each in its turn. Whose poll or start is held is alive."""
        if now < self._next_end:
            return
        for game in overdue(self._game_queue, now):
            if game.hold:
                self._host_alive(game, now)
            else:
                self._remove_game(game)
                self.events.append(Event("expire_game", game.name))
        for guest in overdue(self._guest_queue, now):
            if guest.hold:
                self._guest_alive(guest, now)
            else:
                self._remove_guest(guest)
        # Who comes later ends later than this.
        self._next_end = min([now + min(self._settings.game_ttl, self._settings.guest_ttl),
                              *itertools.islice(self._game_queue.values(), 1), *itertools.islice(self._guest_queue.values(), 1)])

    def _remove_game(self, game: Game) -> None:
        self._resume_all(game)
        del self._games[game.name]
        del self._game_queue[game]
        self._store(-GAME_WEIGHT - weight((game.name, game.info)) - weight(game.addresses))
        self._places[game.place] -= 1
        if not self._places[game.place]:
            del self._places[game.place]
        for guest in list(game.guests.values()):
            self._remove_guest(guest)
        self.listing += 1

    def _remove_guest(self, guest: Guest) -> None:
        del guest.game.guests[guest.seal]
        del self._guest_queue[guest]
        self._store(-GUEST_WEIGHT - weight(guest.addresses) - weight(guest.reply or ()))
        self.listing += 1


def weight(texts: Tuple[Union[str, bytes], ...]) -> int:
    """Bytes that these take."""
    return sum(map(sys.getsizeof, texts)) + 8 * len(texts)


def overdue(queue: collections.OrderedDict[Any, float], now: float) -> Iterable[Any]:
    """The front of the queue as long as its time is over; the caller removes each before it asks for the next."""
    while queue:
        front, deadline = next(iter(queue.items()))
        if deadline > now:
            return
        yield front


# ---- STUN -----------------------------------------------------------------------------------------------------------
# RFC 8489 Binding alone: a client asks from which public address its datagrams come. All else gets silence.

STUN_COOKIE = 0x2112A442
STUN_REQUEST, STUN_SUCCESS, STUN_ERROR = 0x0001, 0x0101, 0x0111     # Binding, by class
STUN_ERROR_CODE, STUN_UNKNOWN_ATTRIBUTES, STUN_XOR_MAPPED_ADDRESS, STUN_FINGERPRINT = 0x0009, 0x000A, 0x0020, 0x8028
# What ICE agents add for each other (RFC 8445 section 7.1): to be comprehended, not obeyed. USERNAME, MESSAGE-INTEGRITY
# (SHA-1 and SHA-256), PRIORITY and USE-CANDIDATE.
STUN_IGNORED = frozenset((0x0006, 0x0008, 0x001C, 0x0024, 0x0025))
STUN_MAX = 1280         # bytes; longer requests are nobody's
STUN_BURST = 50         # answers that one address gets at once, on top of --stun-rate a second
BUCKETS = 65536         # 512 KiB


def stun_attribute(kind: int, value: bytes) -> bytes:
    return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)


def stun_attributes(request: bytes) -> Optional[List[Tuple[int, bytes]]]:
    """The attributes of a Binding request in their order, or None for everything that is not a well-formed one."""
    if not 20 <= len(request) <= STUN_MAX or len(request) % 4:
        return None
    kind, length, cookie = struct.unpack_from(">HHI", request)
    if kind != STUN_REQUEST or length != len(request) - 20 or cookie != STUN_COOKIE:
        return None
    attributes, position = [], 20
    while position < len(request):
        kind, length = struct.unpack_from(">HH", request, position)
        value = request[position + 4:position + 4 + length]
        if len(value) < length:
            return None
        attributes.append((kind, value))
        if kind == STUN_FINGERPRINT and (position + 8 != len(request) or value != stun_fingerprint(request[:position])):
            return None     # it is the last one, and right (RFC 8489 section 14.7)
        position += 4 + length + -length % 4
    return attributes


def stun_fingerprint(message: bytes) -> bytes:
    """The FINGERPRINT over what precedes it, where the length in the head counts it already (RFC 8489 section 14.7)."""
    return struct.pack(">I", zlib.crc32(message) ^ 0x5354554E)


def stun_answer(request: bytes, source: Tuple[str, int]) -> Optional[bytes]:
    """The answer to a datagram from source, an (IP address, port), or None for silence."""
    attributes = stun_attributes(request)
    if attributes is None:
        return None
    kinds = [kind for kind, _ in attributes]
    unknown = [kind for kind in kinds if kind < 0x8000 and kind not in STUN_IGNORED]
    if unknown:     # RFC 8489 section 6.3.1
        kind = STUN_ERROR
        body = (stun_attribute(STUN_ERROR_CODE, b"\0\0\x04\x14Unknown Attribute")
                + stun_attribute(STUN_UNKNOWN_ATTRIBUTES, struct.pack(f">{len(unknown)}H", *unknown)))
    else:
        kind = STUN_SUCCESS
        address = packed_address(source[0])
        mask = request[4:4 + len(address)]      # the cookie, for IPv6 the transaction id after it as well (section 14.2)
        xored = bytes(a ^ b for a, b in zip(address, mask))
        body = stun_attribute(STUN_XOR_MAPPED_ADDRESS, struct.pack(">HH", 1 if len(address) == 4 else 2, source[1] ^ STUN_COOKIE >> 16) + xored)
    length = len(body) + (8 if STUN_FINGERPRINT in kinds else 0)
    message = struct.pack(">HH", kind, length) + request[4:20] + body
    return message + stun_attribute(STUN_FINGERPRINT, stun_fingerprint(message)) if STUN_FINGERPRINT in kinds else message


class Buckets:
    """A token bucket for each place, which is what limits take for one client: rate a second (0 for no limit), and burst at once.

    Places share a fixed number of buckets, by a hash that only this process knows: however many come or are forged, memory stays.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._depth = burst * self._interval
        self._clock = clock
        # When each bucket is full again, a double each. Memory of the system's is all zeros, and weighs nothing until it is written to.
        self._full_at = memoryview(mmap.mmap(-1, 8 * BUCKETS)).cast("d")

    def take(self, place: bytes) -> float:
        """Take one from its bucket: 0, or the seconds after which there is one to take."""
        if not self._interval:
            return 0.0
        now, index = self._clock(), hash(place) % BUCKETS
        full_at = max(self._full_at[index], now) + self._interval
        if full_at > now + self._depth + 1e-6:      # sums of fractions are not exact
            return full_at - now - self._depth
        self._full_at[index] = full_at
        return 0.0

    def fine(self, place: bytes, count: int) -> None:
        """Take more, whether or not they are there."""
        index = hash(place) % BUCKETS
        self._full_at[index] = max(self._full_at[index], self._clock()) + count * self._interval


def place_of(packed: bytes) -> bytes:
    """What limits take for one client: an IPv4 address, or a /64, which is what one customer gets."""
    return packed[:8]


class StunResponder(threading.Thread):
    """Answers on one UDP socket in one thread, always from the address that was asked (RFC 8489 section 6.3.1).

    address: as bind() takes it; rate: answers a second to one source, 0 for no limit.
    OSError from the constructor: the port is in use, or not permitted.
    """

    def __init__(self, family: int, address: Any, rate: float) -> None:
        super().__init__(name="stun", daemon=True)
        self._buckets = Buckets(rate, STUN_BURST)
        self.answered = self.silent = 0     # datagrams so far
        self._stopping = False
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
            if sys.platform == "linux":     # IP_PKTINFO is 8 there; elsewhere routing picks the address to answer from
                tell = (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if family == socket.AF_INET6 else (socket.IPPROTO_IP, 8)
                self._socket.setsockopt(*tell, 1)
            self._socket.bind(address)
        except OSError:
            self._socket.close()
            raise
        self._socket.settimeout(0.5)    # seconds; where no datagram from stop() comes, it is noticed then
        self.port: int = self._socket.getsockname()[1]

    def run(self) -> None:
        while not self._stopping:
            try:
                self._answer_one()
            except socket.timeout:
                pass
            except OSError as error:    # the answer has no route, or an earlier one was refused
                log.debug("a STUN answer failed: %s", error)

    def _answer_one(self) -> None:
        if sys.platform == "linux":
            request, arrived_at, _, source = self._socket.recvmsg(STUN_MAX + 1, 128)
        else:
            (request, source), arrived_at = self._socket.recvfrom(STUN_MAX + 1), []
        answer = stun_answer(request, source)
        if answer is None or self._buckets.take(place_of(packed_address(source[0]))):
            self.silent += 1
            return
        self.answered += 1
        if sys.platform == "linux":
            self._socket.sendmsg([answer], arrived_at, 0, source)   # what told where it came to tells where to answer from
        else:
            self._socket.sendto(answer, source)

    def stop(self) -> None:
        """End the thread and close the socket."""
        self._stopping = True
        with contextlib.suppress(OSError), socket.socket(self._socket.family, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._socket.getsockname())
        if self.is_alive():
            self.join()
        self._socket.close()


# ---- endpoints ------------------------------------------------------------------------------------------------------

class Client(NamedTuple):
    """Who asks: the IP address, the place that limits count it as, and whether it is this machine."""

    address: str
    place: bytes
    is_local: bool


class Request(NamedTuple):
    """A request past all checks: the game that its path names, or nothing; the values of the route's fields; its header; who asks; and
    what to call when it is held and there is news."""

    name: str
    fields: Dict[str, Any]
    headers: Mapping[str, str]
    client: Client
    wake: Wake


class Answer(NamedTuple):
    """A status, a body (a JSON value, text that is a string or bytes already, or None), and header fields beside the usual ones."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = {}
    media_type: str = "application/json"


class Held(NamedTuple):
    """A request that is to be answered later: within seconds, by calling answer; let_go instead if its client hangs up."""

    seconds: float
    answer: Callable[[], Answer]
    let_go: Callable[[], None]


Outcome = Union[Answer, Held]

# Answers are put together as text: what is packed is JSON already, and the commonest ones are written in no time.


def session_text(session: Session) -> str:
    """The members that tell of a session."""
    addresses = [to_json(address) if isinstance(address, str) else address.decode("utf-8") for address in session.addresses]
    return f'"sessionId":"{session.session_id}","sessionKey":"{session.session_key}","addresses":[{",".join(addresses)}]'


def game_text(game: GameView) -> str:
    return f'{{"name":{to_json(game.name)},"info":{game.info.decode("utf-8")},"guests":{game.guests},"ready":{to_json(game.ready)}}}'


@functools.lru_cache(maxsize=16)
def lease_text(ttl: float, poll_after: float, crowded: bool = False) -> str:
    """The members that tell how long one is remembered and when to ask again, in seconds: 60 rather than 60.0, which some clients do not
    take for a whole number."""
    expires_in, poll_in = (int(value) if value == int(value) else value for value in (ttl, poll_after * (CROWDED if crowded else 1)))
    return f'"expiresIn":{expires_in},"pollAfter":{poll_in}'


def wished_wait(server: Server, request: Request) -> int:
    """Seconds for which a request may be held: its field wait, else its Prefer: wait=N (RFC 7240 section 4.3), within --max-wait."""
    wait = request.fields["wait"]
    if wait is None:
        match = PREFER_WAIT.search(request.headers.get("prefer", ""))
        wait = int(match[1]) if match else 0
    return min(int(wait), int(server.settings.max_wait))


def location(name: str) -> Dict[str, str]:
    return {"Location": "/games/" + urllib.parse.quote(name, safe="")}


def register_game(server: Server, request: Request) -> Answer:
    """offer a game, or go on offering it"""
    fields = request.fields
    created = server.registry.register_game(fields["name"], fields["peerId"], fields["info"], fields["listed"], request.client.place)
    body = f'{{"name":{to_json(fields["name"])},{lease_text(server.settings.game_ttl, server.settings.poll_after)}}}'
    return Answer(201, body, location(fields["name"])) if created else Answer(200, body)


def poll_game(server: Server, request: Request) -> Outcome:
    """publish the host's addresses and learn of guests"""
    fields, registry, wait = request.fields, server.registry, wished_wait(server, request)

    def answer(polled: Polled, crowded: bool) -> Answer:
        guests = ",".join([f"{{{session_text(guest)}}}" for guest in polled.guests])
        gone = "" if fields["replies"] is None else f',"gone":{to_json(polled.gone)}'
        lease = lease_text(server.settings.game_ttl, server.settings.poll_after, crowded)
        body = f'{{"name":{to_json(polled.name)},"guests":[{guests}],"cursor":{polled.cursor},{lease}{gone}}}'
        return Answer(200, body, applied_wait(0 if crowded else wait))

    polled = registry.poll_game(fields["name"], fields["peerId"], fields["addresses"], fields["after"], fields["replies"],
                                request.wake if wait else None)
    if polled.hold:
        return held(registry, wait, polled.hold, registry.resume_poll, answer)
    return answer(polled, is_crowded(server, wait, bool(polled.guests or polled.gone)))


def start_game(server: Server, request: Request) -> Outcome:
    """join as a guest and learn the host's addresses"""
    fields, registry, wait = request.fields, server.registry, wished_wait(server, request)

    def answer(started: Started, crowded: bool) -> Answer:
        lease = lease_text(server.settings.guest_ttl, server.settings.poll_after, crowded)
        body = f'{{"name":{to_json(started.name)},{session_text(started.session)},"cursor":{started.cursor},{lease}}}'
        return Answer(200 if started.session.addresses else 202, body, applied_wait(0 if crowded else wait))

    started = registry.start_game(fields["name"], fields["peerId"], fields["addresses"], request.wake if wait else None, request.client.place)
    if started.hold:
        return held(registry, wait, started.hold, registry.resume_start, answer)
    return answer(started, is_crowded(server, wait, bool(started.session.addresses)))


def held(registry: Registry, wait: int, hold: Hold, resume: Callable[[Hold], Any], answer: Callable[[Any, bool], Answer]) -> Held:
    """A poll or start that answer() puts into words when it is resumed. Who asked twice at once counts as crowded: two hosts with one
    peerId would chase each other."""
    return Held(wait, lambda: answer(resume(hold), hold.replaced), lambda: registry.let_go(hold))


def is_crowded(server: Server, wait: int, is_news: bool) -> bool:
    """Whether a poll or start that is not held wished to be, and had no place."""
    crowded = wait > 0 and not is_news
    if crowded:
        server.refused["waiting"] += 1
    return crowded


def applied_wait(seconds: int) -> Dict[str, str]:
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}


class Listing:
    """The body of GET /games and its ETag, made anew only after a change, by one thread at a time, and in a fifth of the time at the most:
    whoever changes the list again and again makes those who want it wait, and nobody else."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._making = threading.Lock()
        self._rests_until = 0.0
        self._made = (-1, b"", "")      # the registry's listing it was made of, body, tag

    @property
    def is_stale(self) -> bool:
        """Whether it is to be made anew."""
        self._registry.expire_games()
        return self._made[0] != self._registry.listing

    def get(self) -> Tuple[bytes, str]:
        """Body and tag as of now."""
        if self.is_stale:
            with self._making:
                if self.is_stale:
                    time.sleep(max(0.0, self._rests_until - time.monotonic()))
                    began = time.monotonic()
                    version = self._registry.listing    # read first: a change while it is made has it made again
                    body = ('{"games":[' + ",".join(map(game_text, self._registry.list_games())) + "]}").encode("utf-8")
                    self._made = version, body, '"' + hashlib.blake2b(body, digest_size=12).hexdigest() + '"'
                    self._rests_until = time.monotonic() + 4 * (time.monotonic() - began)
        return self._made[1:]


def list_games(server: Server, request: Request) -> Answer:
    """the listed games, oldest first"""
    body, tag = server.listing.get()
    headers = {"ETag": tag, "Cache-Control": "no-cache"}    # to be kept, but not used without asking again
    # Weak comparison, as RFC 9110 section 13.1.2 asks.
    known = request.headers.get("if-none-match", "")
    is_known = known == "*" or re.search(rf"(?:^|[,\s])(?:W/)?{tag}\s*(?:,|$)", known)
    return Answer(304, None, headers) if is_known else Answer(200, body, headers)


def get_game(server: Server, request: Request) -> Answer:
    """one game, listed or not"""
    return Answer(200, game_text(server.registry.get_game(request.name)))


def update_game(server: Server, request: Request) -> Answer:
    """its host renames or describes it"""
    fields = request.fields
    game = server.registry.update_game(request.name, fields["peerId"], fields["name"], fields["info"], fields["listed"])
    return Answer(200, game_text(game), location(game.name) if game.name != request.name else {})


def delete_game(server: Server, request: Request) -> Answer:
    """its host ends it"""
    server.registry.delete_game(request.name, request.fields["peerId"])
    return Answer(204)


def show_health(server: Server, request: Request) -> Answer:
    """for load balancers and monitors"""
    counts = server.registry.counts()
    body = {"status": "stopping" if server.stopping else "ok", "version": __version__, "games": counts.games, "guests": counts.guests}
    return Answer(503 if server.stopping else 200, body)


def show_metrics(server: Server, request: Request) -> Answer:
    """counts for Prometheus"""
    if not request.client.is_local and request.client.address not in server.watchers:
        raise Forbidden("metrics are for this machine and for whom --metrics-from names")
    counts, stun = server.registry.counts(), server.stun
    text = ""
    for name, kind, meaning, samples in (
        ("games", "gauge", "games on offer", {"": counts.games}),
        ("guests", "gauge", "guests of them", {"": counts.guests}),
        ("waiting", "gauge", "polls and starts that are held", {"": counts.waiting}),
        ("connections", "gauge", "open connections", {"": len(server.loop.handlers)}),
        ("threads", "gauge", "threads of the process", {"": threading.active_count()}),
        ("stored_bytes", "gauge", "bytes that count against --max-memory", {"": counts.stored + server.registry.reserved}),
        ("uptime_seconds", "gauge", "seconds since the start", {"": round(time.monotonic() - server.began, 3)}),
        ("requests_total", "counter", "requests answered",
         {f'{{operation="{operation}",status="{status}"}}': count for (operation, status), count in sorted(server.answered.items())}),
        ("refused_total", "counter", "requests and connections refused because a limit was reached",
         {f'{{limit="{limit}"}}': count for limit, count in sorted(server.refused.items())}),
        ("stun_total", "counter", "datagrams to STUN, by what they got",
         {'{result="answer"}': stun.answered, '{result="silence"}': stun.silent} if stun else {}),
    ):
        text += f"# HELP p2pserver_{name} {meaning}\n# TYPE p2pserver_{name} {kind}\n"
        text += "".join(f"p2pserver_{name}{labels} {value}\n" for labels, value in samples.items())
    return Answer(200, text, media_type="text/plain; version=0.0.4; charset=utf-8")


def show_start_page(server: Server, request: Request) -> Answer:
    """this page"""
    rows = "".join(f"{route.method:8}{route.path:18}{route.endpoint.__doc__}\n" for route in ROUTES)
    return Answer(200, f"p2pserver {__version__}: a rendezvous server. Hosts offer games, guests find them, "
                       f"and the two exchange addresses to connect directly.\n\n{rows}", media_type="text/plain; charset=utf-8")


# ---- routes ---------------------------------------------------------------------------------------------------------

class Route(NamedTuple):
    """A row of the table: what answers a method on a path, the fields that its body must or may have, and whether that now takes long."""

    method: str
    path: str
    endpoint: Callable[[Server, Request], Outcome]
    fields: Mapping[str, Field] = {}
    takes_long: Optional[Callable[[Server], bool]] = None


NAME, PEER_ID, ADDRESSES = Field(check_name), Field(check_peer_id), Field(check_addresses)
INFO, LISTED, NEW_NAME = Field(check_info, required=False), Field(check_flag, required=False), Field(check_name, required=False)
AFTER, REPLIES, WAIT = Field(check_cursor, required=False), Field(check_replies, required=False), Field(check_wait, required=False)
CHANGES = {"peerId": PEER_ID, "name": NEW_NAME, "info": INFO, "listed": LISTED}

ROUTES = (
    Route("POST", "/games/register", register_game, {"name": NAME, "peerId": PEER_ID, "info": INFO, "listed": LISTED}),
    Route("POST", "/games/poll", poll_game,
          {"name": NAME, "peerId": PEER_ID, "addresses": ADDRESSES, "after": AFTER, "replies": REPLIES, "wait": WAIT}),
    Route("POST", "/games/start", start_game, {"name": NAME, "peerId": PEER_ID, "addresses": ADDRESSES, "wait": WAIT}),
    Route("GET", "/games", list_games, takes_long=lambda server: server.listing.is_stale),
    Route("GET", "/games/<name>", get_game),
    Route("PATCH", "/games/<name>", update_game, CHANGES),
    Route("PUT", "/games/<name>", update_game, CHANGES),
    Route("DELETE", "/games/<name>", delete_game, {"peerId": PEER_ID}),
    Route("GET", "/healthz", show_health),
    Route("GET", "/metrics", show_metrics),
    Route("GET", "/", show_start_page),
)

ROUTES_AT: Dict[str, Dict[str, Route]] = {}     # by path and method
for _route in ROUTES:
    ROUTES_AT.setdefault(_route.path, {})[_route.method] = _route
GAME_ROUTES = ROUTES_AT.pop("/games/<name>")


def allowed(methods: Iterable[str]) -> str:
    """The value of Allow: HEAD goes wherever GET does, OPTIONS everywhere."""
    return ", ".join(sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


ABSOLUTE_FORM = re.compile(r"\Ahttps?://[^/?]*", re.IGNORECASE)     # RFC 9112 section 3.2.2


def resolve(target: str) -> Tuple[Dict[str, Route], str]:
    """The routes at a request target by method, and the game that it names. NotFound: there are none, or no game can have that name."""
    path = (target if target.startswith("/") else ABSOLUTE_FORM.sub("", target)).partition("?")[0] or "/"
    if path in ROUTES_AT:
        return ROUTES_AT[path], ""
    prefix, _, quoted = path.rpartition("/")
    if prefix != "/games":
        raise NotFound("there is nothing here; GET / lists what there is")
    try:
        return GAME_ROUTES, check_name(urllib.parse.unquote(quoted, errors="strict"))
    except UnicodeDecodeError:
        raise NotFound("no game can have this name: it must be UTF-8") from None
    except ValueError as fault:
        raise NotFound(f"no game can have this name: it {fault}") from None


# ---- HTTP: reading a request ----------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")      # RFC 9112 section 3
FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")                                          # RFC 9110 section 5.1
NOT_FIELD_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")                                        # RFC 9110 section 5.5
# Of Connection, those that matter; a long list must not cost time, so it is not split.
CONNECTION_OPTIONS = re.compile(r"(?<![^,\s])(?:close|keep-alive)(?![^,\s])", re.IGNORECASE)
EMPTY_LINES = re.compile(rb"(?:\r\n)+")
BARE_LF = re.compile(rb"(?<!\r)\n")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Head(NamedTuple):
    """The head of a request, and what follows from it: how long the body is (bytes), whether the connection ends with the
    answer, and whether the client waits for 100 Continue. is_new: it is HTTP/1.1 rather than 1.0. Field names are in lower case."""

    method: str = ""
    target: str = ""
    is_new: bool = True
    headers: Mapping[str, str] = {}
    length: int = 0
    closes: bool = True
    expects: bool = False


NO_HEAD = Head()


def find_head(buffer: bytearray) -> int:
    """Where the head that the buffer begins with ends, or -1 while it has not come whole. Problem as soon as it cannot become one."""
    end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD + 4)
    if end < 0:
        check_lines(buffer)
        if len(buffer) > MAX_HEAD:
            raise Problem(f"the head has more than {MAX_HEAD} bytes", 431)
    return end


def check_lines(text: Union[bytes, bytearray]) -> None:
    """Refuse lines that do not end in CRLF, for where readers differ on what ends a line requests are smuggled; and a long request line."""
    line_end = text.find(b"\n")
    if (len(text) if line_end < 0 else line_end) >= MAX_REQUEST_LINE:
        raise Problem(f"the request line has more than {MAX_REQUEST_LINE} bytes", 414)
    if BARE_LF.search(text):
        raise Problem("a line of the head does not end in CRLF")


def parse_head(head: bytes) -> Head:
    """The head without its last empty line, read strictly after RFC 9112."""
    check_lines(head)
    line, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Problem("the request line is malformed")
    if match[3] != b"1":
        raise Problem("only HTTP/1.0 and HTTP/1.1 are supported", 505)
    method, is_new, headers = match[1].decode("ascii"), match[4] != b"0", parse_fields(lines)
    if is_new and "host" not in headers:
        raise Problem("Host is required")      # RFC 9112 section 3.2
    if method not in METHODS:
        raise Problem("this method is not supported", 501)
    length = body_length(method, headers)
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Problem("only Expect: 100-continue is understood", 417)
    options = CONNECTION_OPTIONS.findall(headers.get("connection", ""))
    closes = "close" in map(str.lower, options) or not is_new and "keep-alive" not in map(str.lower, options)
    return Head(method, match[2].decode("ascii"), is_new, headers, length, closes, is_new and "expect" in headers)


def parse_fields(lines: List[bytes]) -> Dict[str, str]:
    """Header fields by name in lower case; those that come twice are joined (RFC 9110 section 5.3), where that is allowed."""
    if len(lines) > MAX_HEADER_FIELDS:
        raise Problem(f"the head has more than {MAX_HEADER_FIELDS} fields", 431)
    headers: Dict[str, str] = {}
    for line in lines:
        field, colon, value = line.partition(b":")
        if not colon or not FIELD_NAME.fullmatch(field) or NOT_FIELD_VALUE.search(value):
            raise Problem("a header field is malformed")
        name, text = field.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        if name in headers:
            if name in ("host", "content-length"):
                raise Problem(f"{name} stands twice in the head")
            text = f"{headers[name]}, {text}"
        headers[name] = text
    return headers


# Clients send the same head again and again.
known_head = functools.lru_cache(maxsize=1024)(parse_head)


def read_head(head: bytes) -> Head:
    """The same as parse_head, which it asks only about what is new. What may hold a secret is not remembered."""
    return parse_head(head) if len(head) > 1024 or b"authorization" in head.lower() else known_head(head)


def body_length(method: str, headers: Mapping[str, str]) -> int:
    """Bytes of the body that the head announces. Problem where readers could differ on it (RFC 9112 section 6.3)."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:
            raise Problem("Transfer-Encoding and Content-Length must not stand in one head")
        raise Problem("Transfer-Encoding is not supported; send a Content-Length", 501)
    if length is None:
        if method in ("POST", "PUT", "PATCH"):
            raise Problem("a Content-Length is required", 411)
        return 0
    if not length.isascii() or not length.isdigit():
        raise Problem("Content-Length is not a number")
    return int(length.lstrip("0")[:18] or "0")      # more digits are too large in any case, and slow to convert


def check_media_type(headers: Mapping[str, str]) -> None:
    """A body that is declared as anything but JSON in UTF-8 is refused; one that is not declared is taken for that."""
    declared = headers.get("content-type", "application/json").lower()
    if declared == "application/json" and "content-encoding" not in headers:
        return
    media_type, *parameters = declared.split(";")
    charsets = [value.strip().strip('"') for name, _, value in (item.partition("=") for item in parameters) if name.strip() == "charset"]
    if media_type.strip() != "application/json" and not media_type.strip().endswith("+json") or any(name != "utf-8" for name in charsets):
        raise Problem("the body must be application/json in UTF-8", 415)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem("the body must not be compressed", 415)


def bearer(headers: Mapping[str, str]) -> Dict[str, str]:
    """The body that Authorization: Bearer stands for where there is none (RFC 6750 section 2.1)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return {}
    return {"peerId": token.strip(" \t").encode("latin-1").decode("utf-8", "replace")}


@functools.lru_cache(maxsize=1024)
def client_of(host: str) -> Client:
    """Who has this address. OSError: it is none."""
    packed = packed_address(host)
    text = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
    return Client(text, place_of(packed), is_loopback(packed))


def client_behind(peer: Client, headers: Mapping[str, str], proxies: Networks) -> Client:
    """Who asks, where the connection comes from peer: if that is one of the proxies, the last address that they tell of and is none of theirs.

    What anybody else says of it is ignored, but for this: who speaks for others is not taken for a user of this machine. All of whom proxies
    tell nothing, or contradict each other, are one client.
    """
    if "x-forwarded-for" not in headers and "forwarded" not in headers:
        return peer
    if peer.address not in proxies:
        return peer._replace(is_local=False)
    told = [hops for hops in (forwarded_for(headers), x_forwarded_for(headers)) if hops]
    client = unknown = Client(UNKNOWN, UNKNOWN.encode("ascii"), False)
    if told[1:] and told[0] != told[1]:
        return unknown
    for hop in reversed(told[0] if told else []):
        try:
            client = client_of(hop)._replace(is_local=False)
        except OSError:
            return unknown
        if client.address not in proxies:
            break
    return client


def x_forwarded_for(headers: Mapping[str, str]) -> List[str]:
    return [host_of(hop) for hop in last_hops(headers, "x-forwarded-for")]


def forwarded_for(headers: Mapping[str, str]) -> List[str]:
    """RFC 7239 section 4."""
    pairs = [pair.strip().partition("=") for hop in last_hops(headers, "forwarded") for pair in hop.split(";")]
    return [host_of(value) for name, _, value in pairs if name.lower() == "for"]


def last_hops(headers: Mapping[str, str], name: str) -> List[str]:
    """The members of such a field; of a long one the last, for these are the proxies'."""
    text = headers.get(name, "")
    if len(text) > MAX_FORWARDED:
        text = text[-MAX_FORWARDED:].partition(",")[2]
    return text.split(",") if text else []


def host_of(hop: str) -> str:
    """The address in what may be quoted, in brackets, or followed by a port."""
    hop = hop.strip().strip('"')
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


# ---- HTTP: a connection ---------------------------------------------------------------------------------------------

class Access(NamedTuple):
    """A request that was answered, for the log."""

    client: str
    method: str
    path: str
    status: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.client} {self.method} {self.path!r} {self.status} {self.bytes}"


STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}
NEVER = float("inf")


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, as the loop's thread serves it and nobody else: what happens is told by one of the methods on_...() through
    serve(), which does what has become possible without ever waiting."""

    server: Server

    def __init__(self, connection: socket.socket, client_address: Any, server: Server) -> None:
        # Not the base class's, which would serve the connection to its end.
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if server.tls:
            connection = server.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.connection, self.client_address, self.server = connection, client_address, server
        self.is_shaking = bool(server.tls)  # whether the handshake of TLS is still to be done
        self.reads_on = selectors.EVENT_READ    # the event after which more can be read, or the handshake goes on: TLS may have to write first
        self.peer = self.client = client_of(client_address[0])      # the other end, and who asks through it
        self.buffer = bytearray()           # what has come and is not served yet
        self.head = NO_HEAD                 # of the request that is served, or whose body is to come
        self.has_head = False               # whether a body is to come
        self.body = b""
        self.began = self.moved = time.monotonic()      # when the request in the buffer began to come, or the handshake; when a byte last came or went
        self.paused_until = 0.0             # it has asked too much, and is not served before
        self.requests = 0                   # how many have come; the number of the one that is served
        self.operation = "none"             # the name of its endpoint
        self.unsent: collections.deque[Union[bytes, memoryview]] = collections.deque()    # the rest of an answer that the client has not read yet
        self.held: Optional[Held] = None
        self.held_until = 0.0
        self.is_away = False                # whether a thread of the pool works at the answer
        self.has_hung_up = False
        self.close_connection = False       # when all is sent
        self.cut_at = 0.0                   # when a connection that was refused is cut at the latest
        self.is_closed = False
        self.answer_body = b""              # of the answer that is sent
        self.shares_body = False            # with other connections
        self.counted: Tuple[int, Optional[bytes]] = (0, None)       # what Server.count_bytes() was told last
        # For the loop: for which events it is watched, when it is late, and in which tenth of a second that is looked at.
        self.watched, self.deadline, self.tenth = 0, NEVER, NEVER

    # What happens to a connection. False: it is to be closed at once.

    def serve(self, happened: Callable[..., bool], *details: Any) -> None:
        """Let something that has happened take its effect, and wait for the next thing or close."""
        if self.is_closed:
            return
        try:
            stays = happened(*details) and self.wait()
        except OSError as error:        # a client that went away is no fault
            log.debug("a connection was lost: %s", error)
            stays = False
        except Exception:
            log.exception("a connection failed")
            stays = False
        if not stays:
            self.close()

    def on_ready(self) -> bool:
        """Something has come, or can be sent; or may, for it does no harm to look."""
        if self.is_away or self.paused_until:
            return True
        if self.is_shaking:
            return self.begin_to_shake()
        if self.held:       # its client can only hang up, or send the next request early
            self.receive()
        elif (not self.unsent or self.flush()) and not self.close_connection:
            try:
                if self.buffer and self.parse_request() or self.receive() and self.parse_request():
                    self.dispatch()
            except Problem as problem:
                self.refuse(problem)
        return not self.has_hung_up

    def on_late(self) -> bool:
        """The deadline is over."""
        if self.paused_until:
            self.paused_until = 0.0
            return self.on_ready()
        if self.held:
            self.resume()
        elif self.is_shaking or self.unsent or self.close_connection or self.is_between_requests or self.is_away:
            return False
        elif self.server.stopping:
            self.refuse(Problem("the server stops, and the request did not come in time", 503))
        else:
            self.refuse(Problem("the request did not come in time", 408))
        return True

    def on_news(self, number: int) -> bool:
        """What request number is held for has come."""
        if self.held and number == self.requests:
            self.resume()
        return True

    def on_outcome(self, outcome: Outcome) -> bool:
        """A thread of the pool has called the endpoint."""
        self.is_away = False
        self.take(outcome)
        return True

    def on_shaken(self, waits_for: int, error: Optional[OSError] = None) -> bool:
        """A thread of the pool has done what could be done of the handshake; it goes on when one of these events of selectors comes."""
        if error:
            raise error
        self.is_away = False
        self.reads_on = waits_for
        self.is_shaking = bool(waits_for)
        return self.is_shaking or self.on_ready()

    def on_refused(self, problem: Problem) -> bool:
        """There are too many connections. Under TLS that cannot be said before the handshake, which would be work."""
        if not self.is_shaking:
            self.refuse(problem)
        return not self.is_shaking

    def on_stop(self) -> bool:
        """The server stops: what is held is answered now, and what has come already is still served."""
        if self.held:
            self.resume()
            return True
        return not self.is_shaking and not self.paused_until and self.on_ready()

    def wait(self) -> bool:
        """Have the loop watch for what can happen next; False if that is nothing."""
        problem = None if self.is_away else self.count_bytes()
        if problem:
            self.server.refused[problem.limit] += 1
            if self.held or self.unsent or self.close_connection:   # an answer is to come before this refusal could, or was the last
                return False
            self.refuse(problem)
            self.count_bytes()
        if self.is_away:
            events, deadline = 0, NEVER
        elif self.is_shaking:
            events, deadline = self.reads_on, self.began + REQUEST_TIME
        elif self.held:     # its client can hang up, or send the next request early, which then waits
            events, deadline = 0 if self.buffer else self.reads_on, self.held_until
        elif self.unsent:
            events, deadline = selectors.EVENT_WRITE, self.moved + SEND_TIME
        elif self.close_connection:
            events, deadline = selectors.EVENT_READ, self.cut_at
            if not self.lingers():
                return False
        elif self.paused_until:
            events, deadline = 0, self.paused_until
        elif self.is_between_requests:
            events, deadline = self.reads_on, self.moved + self.server.settings.idle_timeout
            self.head, self.answer_body = NO_HEAD, b""      # thousands may be idle
            if self.server.stopping:
                return False
        else:
            events, deadline = self.reads_on, self.began + REQUEST_TIME
        self.server.loop.watch(self, events, deadline)
        return True

    def count_bytes(self) -> Optional[Problem]:
        """Have the server count what waits here, to come whole or to be sent; the problem, if there is no memory for it."""
        body = self.answer_body if self.unsent else b""
        return self.server.count_bytes(self, len(self.buffer) + len(body), body if body and self.shares_body else None)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.server.count_bytes(self, 0, None)
        self.end_tls()
        if self.held:
            self.held.let_go()
        self.server.forget(self)
        self.server.shutdown_request(self.connection)

    # TLS.

    def begin_to_shake(self) -> bool:
        """Have a thread of the pool shake hands; False if there is none to be had."""
        try:
            self.server.pool.submit(self.shake_hands)
        except Full as problem:
            self.server.refused[problem.limit] += 1
            return False
        self.is_away = True
        return True

    def shake_hands(self) -> None:
        """In a thread of the pool, for it is a millisecond's work: as much of the handshake as can be done without waiting."""
        import ssl
        outcome: Tuple[Any, ...] = (0,)
        try:
            self.connection.do_handshake()
        except ssl.SSLWantReadError:
            outcome = (selectors.EVENT_READ,)
        except ssl.SSLWantWriteError:
            outcome = (selectors.EVENT_WRITE,)
        except (OSError, ValueError, AttributeError) as error:      # it may have been closed meanwhile
            outcome = 0, OSError(*error.args)
        self.server.loop.call(self.serve, self.on_shaken, *outcome)

    def end_tls(self) -> None:
        """Tell the client that nothing is missing (RFC 8446 section 6.1)."""
        if self.server.tls and not self.is_shaking:
            with contextlib.suppress(OSError, ValueError):
                self.connection.unwrap()

    # Reading a request.

    @property
    def is_between_requests(self) -> bool:
        return not self.buffer and not self.has_head

    def receive(self) -> bool:
        """Take what has come; False if that is nothing, or the client has hung up."""
        self.reads_on = selectors.EVENT_READ
        try:
            data = self.connection.recv(65536)
        except self.server.not_now as error:
            if isinstance(error, self.server.not_before_writing):
                self.reads_on = selectors.EVENT_WRITE
            return False
        if not data:
            if not self.held and not self.is_between_requests:
                raise Problem("the request ended early")
            self.has_hung_up = True
            return False
        self.moved = time.monotonic()
        if self.is_between_requests:
            self.began = self.moved
        self.buffer += data
        if self.server.tls and self.connection.pending():
            self.server.loop.call(self.serve, self.on_ready)        # nothing more need come for it
        return True

    def parse_request(self) -> bool:
        """Whether a whole request has come; it is then in head and body. Problem: it is none."""
        if not self.has_head and not self.next_head():
            return False
        length = self.head.length
        if len(self.buffer) < length:
            return False
        self.body = bytes(self.buffer[:length])
        del self.buffer[:length]
        self.has_head = False
        return True

    def next_head(self) -> bool:
        """Whether a whole head has come; it is then in head. Problem: it is none, or announces too much."""
        empty = EMPTY_LINES.match(self.buffer)     # RFC 9112 section 2.2: empty lines before the request line are ignored
        if empty:
            end = empty.end()
            del empty, self.buffer[:end]    # while there is a match, its buffer cannot shrink
        if not self.buffer:
            return False
        end = find_head(self.buffer)
        if end < 0:
            return False
        self.head = read_head(bytes(self.buffer[:end]))
        del self.buffer[:end + 4]
        self.has_head = True
        if self.head.length > self.server.settings.max_body:
            raise Problem(f"the body has more than {self.server.settings.max_body} bytes", 413)
        if self.head.expects and self.head.length > len(self.buffer):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    # Answering it.

    def dispatch(self) -> None:
        """Answer the request, or hold it, or have a thread of the pool answer it."""
        self.requests += 1
        self.operation = "none"
        self.close_connection = self.head.closes
        self.client = client_behind(self.peer, self.head.headers, self.server.proxies)
        self.take(self.outcome_of(self.call_endpoint))
        self.body = b""

    def outcome_of(self, function: Callable[..., Optional[Outcome]], *arguments: Any) -> Optional[Outcome]:
        """What a call gives, or the answer that stands for its failure."""
        try:
            return function(*arguments)
        except Problem as problem:
            if problem.limit:
                self.server.refused[problem.limit] += 1
            if isinstance(problem, (Forbidden, Conflict)):      # to register a game again is to guess, too
                self.server.buckets.fine(self.client.place, FORBIDDEN_COST - 1)
            return problem_answer(problem)
        except Exception:
            log.exception("a request failed")
            return problem_answer(Problem("the server failed to answer this request; its log says why", 500))

    def take(self, outcome: Optional[Outcome]) -> None:
        """Send the answer, or hold the request."""
        if isinstance(outcome, Held):
            self.held, self.held_until = outcome, time.monotonic() + outcome.seconds
            # What the answer and the log need of it; thousands may be held.
            self.head = self.head._replace(headers={}, target=self.head.target[:200])
        elif outcome:
            self.send_answer(outcome)

    def call_endpoint(self) -> Optional[Outcome]:
        """Find the route, check the fields, and call its endpoint; None if a thread of the pool does that."""
        pause = math.ceil(self.server.buckets.take(self.client.place))
        if pause:
            if self.peer.address not in self.server.proxies:    # a proxy's connection is for others as well
                self.paused_until = time.monotonic() + min(pause, RETRY_AFTER)      # or its next requests would cost time, too
            raise TooMany("rate", "too many requests come from your address", Retry_After=str(pause))
        method, target, headers = self.head.method, self.head.target, self.head.headers
        if method == "OPTIONS" and target == "*":
            return self.options({route.method for route in ROUTES})
        routes, name = resolve(target)
        if method == "OPTIONS":
            return self.options(routes)
        route = routes.get("GET" if method == "HEAD" else method)
        if route is None:
            raise Problem(f"{method} is not for this path", 405, Allow=allowed(routes))
        self.operation = route.endpoint.__name__
        fields: Dict[str, Any] = {}
        if route.fields:
            if self.body:
                check_media_type(headers)
            fields = validate(parse_body(self.body) if self.body else bearer(headers), route.fields, self.client.is_local)
        loop = self.server.loop
        request = Request(name, fields, headers, self.client, functools.partial(loop.tell, self.serve, self.on_news, self.requests))
        if route.takes_long and route.takes_long(self.server):
            self.server.pool.submit(functools.partial(self.work, route.endpoint, request))
            self.is_away = True
            return None
        return route.endpoint(self.server, request)

    def work(self, endpoint: Callable[[Server, Request], Outcome], request: Request) -> None:
        """In a thread of the pool: call an endpoint and hand to the loop what comes of it."""
        self.server.loop.call(self.serve, self.on_outcome, self.outcome_of(endpoint, self.server, request))

    def resume(self) -> None:
        """Answer what is held."""
        held, self.held = self.held, None
        if held:
            self.take(self.outcome_of(held.answer))

    def options(self, methods: Iterable[str]) -> Answer:
        """What a path takes; to a web page's preflight also that it may (https://fetch.spec.whatwg.org/#http-cors-protocol)."""
        headers = {"Allow": allowed(methods)}
        if self.server.settings.cors_origin and "access-control-request-method" in self.head.headers:
            headers.update({"Access-Control-Allow-Methods": headers["Allow"], "Access-Control-Max-Age": "86400",
                            "Access-Control-Allow-Headers": "Authorization, Content-Type, If-None-Match, Prefer"})
        return Answer(204, None, headers)

    def send_answer(self, answer: Answer) -> None:
        """Write an answer: head and body at once."""
        if self.server.stopping:
            self.close_connection = True
        body = bytes_of(answer.body)
        head = self.head_of(answer, len(body))
        self.answer_body, self.shares_body = body, body is answer.body      # the list is one for all that read it
        if self.head.method == "HEAD":
            self.write(head)
        elif len(body) <= COPIED:
            self.write(head + body)
        else:
            self.write(head, body)
        self.server.answered[self.operation, answer.status] += 1
        if self.server.settings.access_log:
            # Without the query, which is none of this server's and could hold anything.
            log.info("%s", Access(self.client.address, self.head.method, self.head.target.partition("?")[0], answer.status, len(body)))
        if self.buffer:     # the next request has come with this one; it is served when others have had their turn
            self.began = time.monotonic()
            self.server.loop.call(self.serve, self.on_ready)

    def head_of(self, answer: Answer, length: int) -> bytes:
        """The head of an answer whose body has that many bytes."""
        headers = answer.headers
        text = STATUS_LINES[answer.status] + self.server.fixed_fields()
        for name, value in headers.items():
            text += f"{name}: {value}\r\n"
        if "Cache-Control" not in headers:
            text += "Cache-Control: no-store\r\n"
        if answer.status in (429, 503) and "Retry-After" not in headers:
            text += f"Retry-After: {RETRY_AFTER}\r\n"
        if answer.body is not None:
            text += f"Content-Type: {answer.media_type}\r\nContent-Length: {length}\r\n"
        if self.close_connection:
            text += "Connection: close\r\n"
        elif not self.head.is_new:
            text += "Connection: keep-alive\r\n"
        return (text + "\r\n").encode("latin-1")

    def write(self, *data: bytes) -> None:
        """Send what the client takes at once; the rest waits in unsent."""
        self.unsent += data
        self.flush()

    def flush(self) -> bool:
        """Send more of what is unsent; whether that was all."""
        try:
            while self.unsent:
                sent = self.connection.send(self.unsent[0])
                self.moved = time.monotonic()
                if sent == len(self.unsent[0]):
                    self.unsent.popleft()
                else:
                    self.unsent[0] = memoryview(self.unsent[0])[sent:]
        except self.server.not_now:
            pass
        return not self.unsent

    def refuse(self, problem: Problem) -> None:
        """Answer what cannot be read to its end; nobody knows where the next request begins, so the connection is closed."""
        self.operation = "none"
        if not self.has_head:       # then head is that of the request before
            line = REQUEST_LINE.match(self.buffer)
            self.head = Head(line[1].decode("ascii"), line[2].decode("ascii")) if line else NO_HEAD
        self.buffer.clear()
        self.close_connection, self.cut_at = True, time.monotonic() + LINGER_TIME
        self.send_answer(problem_answer(problem))

    def lingers(self) -> bool:
        """Whether the connection stays for a while though all is said: to close it with bytes unread would reset it, and a client that was
        refused would lose the answer (RFC 9112 section 9.6)."""
        if self.server.stopping or time.monotonic() >= self.cut_at:
            return False
        self.end_tls()
        with contextlib.suppress(OSError):      # it was done before
            self.connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):     # then it is others' turn
                if not self.connection.recv(65536):
                    return False
        return True


def bytes_of(body: Any) -> bytes:
    """The body of an answer as it is sent."""
    if isinstance(body, bytes) or body is None:
        return body or b""
    return (body if isinstance(body, str) else to_json(body)).encode("utf-8")


def problem_answer(problem: Problem) -> Answer:
    """RFC 9457. The type about:blank says that the status tells the kind, whose phrase then is the title (section 4.2.1)."""
    body = {"type": "about:blank", "title": http.HTTPStatus(problem.status).phrase, "status": problem.status, "detail": problem.detail}
    if problem.errors:
        body["errors"] = problem.errors
    return Answer(problem.status, body, problem.headers, "application/problem+json")


# ---- HTTP: the server -----------------------------------------------------------------------------------------------

class Pool:
    """Threads for what takes long: made when all are busy, up to a limit, used again, and ended when they have nothing to do."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: queue.SimpleQueue[Optional[Callable[[], None]]] = queue.SimpleQueue()
        # The lock guards how many threads there are, and how many jobs wait or are worked at.
        self._lock = threading.Lock()
        self.threads = self._open = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Have a thread call the job, which raises nothing. Full: there is no thread, and the system gives none."""
        with self._lock:
            self._open += 1
            if self._open > self.threads and self.threads < self._limit:
                try:
                    threading.Thread(target=self._work, name="work", daemon=True).start()
                    self.threads += 1
                except RuntimeError as error:
                    log.warning("%s", error)
                    if not self.threads:
                        self._open -= 1
                        raise Full("threads", "the server has no thread for this at the moment") from None
        self._jobs.put(job)

    def stop(self) -> None:
        """End the threads when they have done what is to do."""
        for _ in range(self.threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=THREAD_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._open < self.threads:
                        self.threads -= 1
                        return
                continue
            if job is None:
                return
            job()
            with self._lock:
                self._open -= 1


class Loop:
    """The turns of the one thread that serves all connections: it sleeps until something happens to one of them, a deadline passes,
    or another thread calls. All but call() and tell() is for that thread alone, and so needs no lock."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: collections.deque[Tuple[Callable[..., Any], Tuple[Any, ...]]] = collections.deque()    # safe at its ends
        self._waker, self._wakened = socket.socketpair()    # a byte through these ends its sleep
        for each in (self._waker, self._wakened):
            each.setblocking(False)
        self.add(self._wakened, self._wake_up)
        self._thread = 0
        self.handlers: Set[Handler] = set()
        self._late: Dict[float, Set[Handler]] = {}          # by the tenth of a second in which to look whether they are
        self._tenth = int(time.monotonic() * 10)            # the last one that was looked at

    def add(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        self._selector.register(listener, selectors.EVENT_READ, on_ready)

    def remove(self, listener: socket.socket) -> None:
        self._selector.unregister(listener)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the thread call a function when it is done with what it does. For any thread."""
        self._calls.append((function, arguments))
        if threading.get_ident() != self._thread:
            with contextlib.suppress(OSError):      # BlockingIOError among them: so many bytes wake it as well
                self._waker.send(b".")

    def tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the thread call a function: at once, if this is it. So a host has its guest's addresses before the guest has its, and knows the
        guest when the first datagram comes. For any thread."""
        if threading.get_ident() == self._thread:
            self._do(function, *arguments)
        else:
            self.call(function, *arguments)

    def watch(self, handler: Handler, events: int, deadline: float) -> None:
        """Tell a connection when one of the events of selectors is there, or when it is late."""
        if events != handler.watched:
            self._unwatch(handler)
            if events:
                self._selector.register(handler.connection, events, functools.partial(handler.serve, handler.on_ready))
                handler.watched = events
        handler.deadline = deadline
        # A deadline that has moved to later, as it does with every request, is seen when the earlier one is looked at.
        if deadline * 10 < handler.tenth:
            self._look_later(handler)

    def forget(self, handler: Handler) -> None:
        self._unwatch(handler)
        self.handlers.discard(handler)
        self._late.get(handler.tenth, set()).discard(handler)

    def run(self, every_tenth: Callable[[], bool]) -> None:
        """Take turns until every_tenth(), called ten times a second, says that it is over."""
        self._thread = threading.get_ident()
        goes_on = True
        while goes_on:
            sleep = 0.0 if self._calls else max(0.0, (self._tenth + 1) / 10 - time.monotonic())
            for key, _ in self._selector.select(sleep):
                self._do(key.data)
            for _ in range(len(self._calls)):       # what they call in turn waits for the next round
                function, arguments = self._calls.popleft()
                self._do(function, *arguments)
            now = time.monotonic()
            if now * 10 >= self._tenth + 1:
                self._look_for_late(now)
                goes_on = every_tenth()

    def close(self) -> None:
        for handler in list(self.handlers):
            self._do(handler.serve, handler.on_late)
            self._do(handler.close)
        for each in (self._selector, self._waker, self._wakened):
            each.close()

    def _do(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:       # whatever it is, the others are to be served
            log.exception("the server failed in one thing, and goes on")

    def _wake_up(self) -> None:
        self._wakened.recv(4096)

    def _unwatch(self, handler: Handler) -> None:
        if handler.watched:
            self._selector.unregister(handler.connection)
            handler.watched = 0

    def _look_later(self, handler: Handler) -> None:
        self._late.get(handler.tenth, set()).discard(handler)
        # A deadline can be over already, where a connection comes back from the pool late: it is looked at with the next ones.
        handler.tenth = NEVER if handler.deadline == NEVER else max(self._tenth, int(handler.deadline * 10)) + 1
        if handler.tenth != NEVER:
            self._late.setdefault(handler.tenth, set()).add(handler)

    def _look_for_late(self, now: float) -> None:
        while self._tenth + 1 <= now * 10:
            self._tenth += 1
            for handler in self._late.pop(self._tenth, ()):
                handler.tenth = NEVER
                if handler.deadline <= now:
                    self._do(handler.serve, handler.on_late)
                else:
                    self._look_later(handler)


class CannotStart(Exception):
    """Why the server cannot start, in words that help."""


class CannotListen(CannotStart):
    """An address is in use, not this machine's, or not permitted."""

    def __init__(self, protocol: str, host: str, port: int, error: OSError) -> None:
        where = f"{protocol} port {port}" + (f" of {host}" if host else "")
        other = "--stun-port, or do without by --no-stun" if protocol == "UDP" else "--port"
        reasons = {
            errno.EADDRINUSE: f"{where} is in use; stop what uses it, or choose another with {other}",
            errno.EACCES: f"{where} is not permitted; ports below 1024 are for root, choose another with {other}",
        }
        super().__init__(reasons.get(error.errno or 0, f"cannot listen on {where}: {error.strerror or error}"))


class Server(http.server.ThreadingHTTPServer):
    """The HTTP server around a registry, with the STUN responder beside it. The constructor binds, start() serves, stop() ends.

    CannotListen: the address is in use, not this machine's, or not permitted. CannotStart: the certificate is no good.
    """

    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"    # a restart need not wait for old connections; elsewhere it would let others in
    allow_reuse_port = False                    # some Pythons share a port among servers unless told not to

    def __init__(self, settings: Settings, registry: Optional[Registry] = None) -> None:
        self.settings = settings
        self.registry = registry or Registry(settings, cursor=time.time_ns() // 1000)
        self.stopping = False
        # With TLS what is not there yet has names of its own.
        self.not_now: Tuple[Any, ...] = (BlockingIOError,)
        self.not_before_writing: Tuple[Any, ...] = ()
        self.tls: Any = None
        self.certificate_is_old = False
        self.load_certificate()
        self.proxies = Networks(settings.trusted_proxies)
        self.buckets = Buckets(settings.rate, settings.burst)
        self.watchers = Networks(settings.metrics_from)
        self.began = time.monotonic()
        self.answered: collections.Counter[Tuple[str, int]] = collections.Counter()     # by operation and status
        self.refused: collections.Counter[str] = collections.Counter()      # by the limit that was reached
        self._places: collections.Counter[bytes] = collections.Counter()    # how many connections each place has
        self._waiting: collections.Counter[bytes] = collections.Counter()   # how many bytes wait in them
        self._sharers: collections.Counter[int] = collections.Counter()     # how many connections send the same bytes, by their id()
        self._ends_at = NEVER
        self._is_paused = False     # there was no descriptor for a connection
        self._cors = (f"Access-Control-Allow-Origin: {settings.cors_origin}\r\n"
                      "Access-Control-Expose-Headers: ETag, Location, Preference-Applied, Retry-After\r\n") if settings.cors_origin else ""
        self._fixed_fields = (0, "")        # the second they were made in, and the fields
        self._is_serving, self._has_served = False, threading.Event()
        host = settings.host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        address: Any
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
            super().__init__(address, Handler)
        except OSError as error:
            raise CannotListen("TCP", settings.host, settings.port, error) from None
        self.stun: Optional[StunResponder] = None
        if not settings.no_stun:
            port = settings.stun_port or self.server_port
            try:
                self.stun = StunResponder(self.address_family, (address[0], port, *address[2:]), settings.stun_rate)
            except OSError as error:
                self.server_close()
                raise CannotListen("UDP", settings.host, port, error) from None
        self.listing: Listing = Listing(self.registry)
        self.pool = Pool(settings.max_threads)
        self.loop = Loop()
        self.socket.setblocking(False)
        self.loop.add(self.socket, self.accept_connections)

    def renew_certificate(self) -> None:
        """Load the certificate anew, if that was asked for. One that is no good is not used, and the old one stays."""
        if self.certificate_is_old:
            self.certificate_is_old = False
            try:
                self.load_certificate()
                log.info("the certificate was loaded anew")
            except CannotStart as reason:
                log.error("%s; the old one stays in use", reason)

    def load_certificate(self) -> None:
        """Have new connections use what --tls-cert and --tls-key hold now. CannotStart: they are no good, and nothing has changed."""
        if not self.settings.tls_cert:
            return
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            # Without a password it would ask for one on the terminal.
            context.load_cert_chain(self.settings.tls_cert, self.settings.tls_key or None, password="")
        except (OSError, ValueError) as error:
            raise CannotStart(f"the certificate cannot be used: {error}; look at --tls-cert and --tls-key") from None
        context.options |= ssl.OP_NO_RENEGOTIATION
        self.not_now, self.not_before_writing = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError), (ssl.SSLWantWriteError,)
        self.tls = context

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.settings.host not in ("", "::"))
        socketserver.TCPServer.server_bind(self)    # without the look-up in DNS that HTTPServer adds, which can take seconds
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def where(self) -> str:
        """What listens where, for a person."""
        scheme = "https" if self.tls else "http"
        stun = f"STUN on UDP port {self.stun.port}" if self.stun else "no STUN"
        if not self.settings.host:
            addresses = "all addresses, IPv6 and IPv4" if self.address_family == socket.AF_INET6 else "all IPv4 addresses"
            return f"{scheme}://localhost:{self.server_port}/ and {stun} ({addresses})"
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"{scheme}://{host}:{self.server_port}/ and {stun}"

    def start(self) -> None:
        """Serve in threads of its own, and return."""
        self._is_serving = True
        threading.Thread(target=self.serve_forever, name="serve", daemon=True).start()
        if self.stun:
            self.stun.start()

    def stop(self, grace: float = 0.6) -> None:
        """Accept no more, let the requests that have come be answered within grace (seconds), and close."""
        self.stopping = True
        if self._is_serving:
            self.loop.call(self._begin_to_stop, grace)
            self._has_served.wait()
        if self.stun:
            self.stun.stop()
        self.loop.close()
        self.pool.stop()
        self.server_close()
        self.log_events()

    shutdown = stop

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve in this thread until another calls stop()."""
        self._is_serving = True
        try:
            self.loop.run(self._every_tenth)
        finally:
            self._is_serving = False
            self._has_served.set()

    def _every_tenth(self) -> bool:
        try:
            self.service_actions()
        except Exception:       # those who are connected are to be served all the same
            log.exception("what is due ten times a second failed")
        if self._is_paused:
            self._is_paused = False
            self.loop.add(self.socket, self.accept_connections)
        return time.monotonic() < self._ends_at and (self._ends_at == NEVER or bool(self.loop.handlers))

    def _begin_to_stop(self, grace: float) -> None:
        self._ends_at = time.monotonic() + grace
        for _ in range(self.request_queue_size // ACCEPTED_AT_ONCE + 1):     # who has connected, and perhaps asked, is still served
            self.accept_connections()
        if not self._is_paused:
            self.loop.remove(self.socket)
        self._is_paused = False
        for handler in list(self.loop.handlers):
            handler.serve(handler.on_stop)

    def accept_connections(self) -> None:
        """Accept who has connected, and serve what has come with them. Without a descriptor left they stay in the backlog, and to ask for
        them again at once would be to spin."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, client_address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM) and not self._is_paused:
                    self._is_paused = True
                    self.loop.remove(self.socket)
                return
            try:
                self.process_request(connection, client_address)
            except Exception:
                self.handle_error(connection, client_address)
                self.shutdown_request(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection that was accepted."""
        handler = Handler(request, client_address, self)
        place, settings = handler.peer.place, self.settings
        self.loop.handlers.add(handler)
        self._places[place] += 1
        is_proxy = handler.peer.address in self.proxies     # it speaks for many
        if handler.is_shaking and not is_proxy and self.buckets.take(place):    # a handshake counts as a request, and is more work
            self.refused["rate"] += 1
            handler.close()
            return
        mine = 0 if is_proxy else self._places[place] - settings.max_connections_per_client
        all_others = len(self.loop.handlers) - settings.max_connections
        if mine <= 0 and all_others <= 0:
            handler.serve(handler.on_ready)
            return
        limit = "connections" if mine <= 0 else "connections_per_client"
        self.refused[limit] += 1
        if max(mine, all_others) > SURPLUS:
            handler.close()
        else:
            handler.serve(handler.on_refused, Full(limit, "there are too many connections") if mine <= 0
                          else TooMany(limit, "there are too many connections from your address"))

    def forget(self, handler: Handler) -> None:
        """A connection is about to be closed."""
        self.loop.forget(handler)
        self._places[handler.peer.place] -= 1
        if not self._places[handler.peer.place]:
            del self._places[handler.peer.place]

    def count_bytes(self, handler: Handler, size: int, shared: Optional[bytes]) -> Optional[Problem]:
        """Count what waits in a connection, to come whole or to be sent: all of it for its client, but what connections share once for all
        memory. The problem, if there is no memory for it."""
        place, (old_size, old_shared) = handler.peer.place, handler.counted
        if size == old_size and shared is old_shared:
            return None
        handler.counted = size, shared
        self.registry.reserved += size - len(shared or b"") + self._share(shared, 1) - (old_size - len(old_shared or b"")) + self._share(old_shared, -1)
        self._waiting[place] += size - old_size
        if not self._waiting[place]:
            del self._waiting[place]
        limit = self.settings.max_memory * 1_000_000
        if size <= old_size:
            return None
        if self._waiting[place] > limit // MEMORY_SHARE and handler.peer.address not in self.proxies:
            return TooMany("memory_per_client", "too much waits in the connections from your address")
        if self.registry.counts().stored + self.registry.reserved > limit:
            return Full("memory", "the server's memory for requests is full")
        return None

    def _share(self, shared: Optional[bytes], change: int) -> int:
        """By how many bytes memory grows when one connection more, or less, sends these."""
        if shared is None:
            return 0
        before = self._sharers[id(shared)]
        self._sharers[id(shared)] += change
        if before + change == 0:
            del self._sharers[id(shared)]
            return -len(shared)
        return 0 if before else len(shared)

    def service_actions(self) -> None:
        """Called ten times a second."""
        self.registry.expire_games()
        self.log_events()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection could not even be begun. That its client went away is no fault; anything else is ours."""
        if isinstance(sys.exc_info()[1], OSError):
            log.debug("a connection was lost", exc_info=True)
        else:
            log.exception("a connection failed")

    def fixed_fields(self) -> str:
        """The header fields that every answer has, made once a second for the sake of Date (RFC 9110 section 5.6.7)."""
        now = int(time.time())
        if self._fixed_fields[0] != now:
            self._fixed_fields = now, (f"Server: p2pserver/{__version__}\r\nDate: {email.utils.formatdate(now, usegmt=True)}\r\n"
                                       f"X-Content-Type-Options: nosniff\r\n{self._cors}")
        return self._fixed_fields[1]

    def log_events(self) -> None:
        """Log what has happened to games."""
        events = self.registry.events
        with contextlib.suppress(IndexError):       # another thread was faster
            while events:
                log.info("%s", events.popleft())


# ---- log ------------------------------------------------------------------------------------------------------------

class LogThread(logging.Handler):
    """Writes the log in a thread of its own, so that nobody waits for a disk or a pipe. What finds no room is lost, and counted."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._stream = stream
        self._lost = 0
        self._records: queue.Queue[Optional[logging.LogRecord]] = queue.Queue(LOG_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def end(self, patience: float = 0.5) -> bool:
        """Write what there is, within patience (seconds); whether that was enough."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=patience)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _write(self) -> None:
        for record in iter(self._records.get, None):
            try:
                self._stream.write(self.format(record) + "\n")
                self._stream.flush()
                if self._lost:
                    lost, self._lost = self._lost, 0
                    notice = logging.makeLogRecord({"levelname": "WARNING", "msg": f"{lost} lines of the log were lost"})
                    self._stream.write(self.format(notice) + "\n")
            except (OSError, ValueError):       # the disk is full, or nobody reads any more
                self._lost += 1


class JsonFormatter(logging.Formatter):
    """Each line an object: {time, level, message}, and the fields of an Event or an Access by their names."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        for argument in record.args or ():
            if isinstance(argument, (Event, Access)):
                fields.update(argument._asdict())
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)       # in ASCII, so that no name can steer a terminal


# ---- command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Errors in one line, as everything else at the start."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_settings(arguments: Optional[List[str]], environment: Mapping[str, str]) -> Settings:
    """The settings from flags, else the environment, else the table. SystemExit 2 with one line if they are no good."""
    parser = Parser(prog="p2pserver", description="The rendezvous server by which two players behind home routers find each other.",
                    epilog="Each flag can be given in the environment instead: --game-ttl as P2P_GAME_TTL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"p2pserver {__version__}")
    for option in OPTIONS:
        text = f"{option.help} (default: {option.default})" if option.default not in ("", False) else option.help
        if isinstance(option.default, bool):
            parser.add_argument(option.flag, action="store_const", const="1", help=text)
        else:
            parser.add_argument(option.flag, metavar=option.name.split("_")[-1].upper(), help=text)
    given = vars(parser.parse_args(arguments))
    values = {}
    for option in OPTIONS:
        names = [option.variable, "PORT"] if option.name == "port" else [option.variable]     # hosting services say PORT
        sources = [(option.flag, given[option.name]), *((name, environment.get(name)) for name in names)]
        for source, text in sources:
            if text is not None:
                try:
                    values[option.name] = option.parse(text)
                except ValueError as fault:
                    parser.error(f"{source} {fault}, not {text!r}")
                break
    try:
        return Settings(**values)
    except ValueError as fault:
        parser.error(str(fault))


def open_server(settings: Settings) -> Server:
    """A server bound to its ports. Where the system picks the port for TCP, it can be taken for UDP: then it picks again."""
    for _ in range(0 if settings.port else 9):
        with contextlib.suppress(CannotListen):
            return Server(settings)
    return Server(settings)


def stop_on_signal() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, once; the next one ends the process as it stands.

    As the first process of a container Python ignores SIGTERM unless it is handled.
    """
    def interrupt(number: int, frame: Any) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def renew_on_signal(server: Server) -> None:
    """Make SIGHUP have a renewed certificate loaded. Where there is none, it ends the process, as it does by itself."""
    def renew(number: int, frame: Any) -> None:
        server.certificate_is_old = True

    if server.tls and hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, renew)


def allow_many_files() -> None:
    """Raise the number of open files, and so of connections, to what the system allows; it is 1024 by habit."""
    with contextlib.suppress(ImportError, ValueError, OSError):     # ImportError: there is no such limit here
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Where the limit is endless, as on macOS, the system may not allow that much all the same.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 10240, hard))


def main(arguments: Optional[List[str]] = None) -> int:
    """Serve until a signal comes. Returns the exit status: 0, or 1 if the server cannot listen."""
    settings = parse_settings(arguments, os.environ)
    writer = LogThread(sys.stderr)
    writer.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[writer])
    allow_many_files()
    sys.setswitchinterval(0.001)    # seconds; while a thread of the pool is at work, the others would wait five times as long for their turn
    try:
        server = open_server(settings)
    except CannotStart as reason:
        print(f"p2pserver: {reason}", file=sys.stderr)
        return 1
    try:
        stop_on_signal()
        renew_on_signal(server)
        server.start()
        say(f"p2pserver {__version__} listens on {server.where}; Ctrl-C ends it")
        while True:
            time.sleep(0.5)     # a signal that another thread has taken is acted upon when this one wakes
            server.renew_certificate()
    except KeyboardInterrupt:
        server.stop()
        if not writer.end():
            os._exit(0)     # Python's own end would wait for the stream that this thread still writes to
    return 0


def say(text: str) -> None:
    """Print, if there is somebody to read it."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # or what is still to be written would fail again at the end


if __name__ == "__main__":
    sys.exit(main())
