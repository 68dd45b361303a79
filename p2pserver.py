#!/usr/bin/env python3
"""p2pserver: the rendezvous server by which two players behind home routers find each other.

A host offers a game under a name, guests look it up, and the two exchange candidate addresses through this server, to talk
directly from then on. JSON over HTTP/1.1; fields in brackets are optional:

    POST   /games/register  {name, peerId, [info, listed]}                    a host offers a game: 201; its owner again: 200
    POST   /games/poll      {name, peerId, addresses, [after, wait,           a host publishes its addresses, learns of guests,
                             replies, dismiss]}                               answers single ones, or sends them away
    POST   /games/start     {name, peerId, addresses, [after, wait]}          a guest asks for the host's addresses: 200, or 202: none yet
    POST   /games/leave     {name, peerId}                                    a guest leaves: 204
    GET    /games                                                             the listed games, oldest first
    GET    /games/<name>                                                      one game
    PATCH  /games/<name>    {peerId, [name, info, listed]}                    its host renames or describes it (PUT does the same)
    DELETE /games/<name>    {peerId}                                          its host ends it: 204
    GET    /healthz                                                           200, or 503 while shutting down
    GET    /metrics                                                           counts for Prometheus, for whom --metrics-from allows
    GET    /                                                                  the methods and paths, for a person

    register, 201 or 200   {name, stun, [turn], expiresIn, pollAfter}
    poll, 200              {name, guests: [{sessionId, sessionKey, addresses, from}], cursor, left, gone, expiresIn, pollAfter}
    start, 200 or 202      {name, sessionId, sessionKey, addresses, [from], cursor, stun, expiresIn, pollAfter}
    list, 200              {games: [{name, info, guests, ready}]}       one game, and PATCH: {name, info, guests, ready}
    any error              application/problem+json (RFC 9457): {type, title, status, detail, [errors: {field: rule}]}

The peerId authorises: whoever registers a game with it owns the game; a request without a body may bring it as Authorization:
Bearer. Only a keyed digest of it is kept. Each pair of host and guest has a session, whose sessionKey only the two know. With
after, the cursor of an earlier answer, an answer tells what is new since. With wait, or Prefer: wait=N (RFC 7240), a poll waits
for news and a start for addresses of the host; Preference-Applied in the answer says so.

Threads: 1. One thread accepts and serves all connections, in Server.service_actions(); it never waits for a client. 2. A connection that must wait,
for bytes or for news of its game, is parked: it costs a record and no thread, until there is something to go on with.
3. Under TLS each burst of a connection has a thread of ThreadingHTTPServer's, because OpenSSL may work for long. 4. One
thread for each socket answers STUN, one writes the log. 5. All games live in the Registry behind its one lock; or, with
--store, in a store that servers share, and two threads of redis_registry.py talk to it.

Sections: options, problems, fields, registry, clients and rate limiter, STUN, endpoints and routes, HTTP (reading a request,
connections, handler, server), log, command line.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import datetime
import difflib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.server
import ipaddress
import itertools
import json
import logging.handlers
import math
import mmap
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import unicodedata
import urllib.parse
from typing import Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Set, Tuple, Union

__version__ = "0.1.0"

log = logging.getLogger("p2pserver")


# ---- options --------------------------------------------------------------------------------------------------------
# One table gives the limits, the command line and the environment: --game-ttl is also P2P_GAME_TTL and settings.game_ttl.

class Option:
    """A row of the table. The default has the type of the option: a number lies within bounds, a text matches a pattern, False is a flag."""

    def __init__(self, name: str, default: Any, help: str, low: float = 0, high: float = 1, pattern: str = "[ -~]*") -> None:
        self.name, self.default, self.help, self.low, self.high, self.pattern = name, default, help, low, high, pattern
        self.flag, self.variable = "--" + name.replace("_", "-"), "P2P_" + name.upper()
        self.rule = f"match {pattern} ({help})" if isinstance(default, str) else f"be from {low:.15g} to {high:.15g}"

    def checked(self, value: Any) -> Any:
        """The value, without a fraction as an integer: some clients do not take 60.0 for one. ValueError: it breaks the rule."""
        kinds: Any = (int, float) if isinstance(self.default, float) else str if isinstance(self.default, str) else int
        is_good = isinstance(value, kinds) and (re.fullmatch(self.pattern, value) if isinstance(value, str) else self.low <= value <= self.high)
        insist(is_good, f"{self.flag} ({self.variable}) must {self.rule}, not {value!r}")
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Networks:
    """Addresses and networks with commas between, as "192.0.2.1, 2001:db8::/32". ValueError if the text is anything else.

    An IPv4-mapped one is the IPv4 one, as it is where clients' addresses are read (packed_address).
    """

    has_warned = False      # of an address outside that speaks for others

    def __init__(self, text: str) -> None:
        self._networks = []
        for network in [ipaddress.ip_network(each.strip(), strict=False) for each in text.split(",") if each.strip()]:
            mapped = getattr(network.network_address, "ipv4_mapped", None)
            self._networks.append(ipaddress.ip_network((mapped, network.prefixlen - 96)) if mapped else network)

    def __contains__(self, address: str) -> bool:
        """Whether an IP address, as text, is in one of them. An empty text, of an unknown client, never is."""
        return bool(address) and any(ipaddress.ip_address(address) in network for network in self._networks)


IP_LIST = "([0-9A-Fa-f:./, ]|%[^/, ]+)*"      # the zone of a link-local address may be any text (RFC 4007 section 11)

OPTIONS = (
    Option("host", "", "address to listen on, or a name: all its addresses; all addresses, IPv6 and IPv4, if not given"),
    Option("port", 8000, "port to listen on, TCP for HTTP and UDP for STUN; 0 picks a free one and prints it", 0, 65535),
    Option("stun_port", 0, "another UDP port for STUN than that of HTTP", 0, 65535),
    Option("second_stun_port", 0, "a second UDP port for STUN, for clients to learn the kind of their NAT (default: the next one)", 0, 65535),
    Option("stun_rate", 20.0, "STUN answers a second to one address, and 500 at once, of each port; 0 for no limit", 0, 1_000_000),
    Option("no_stun", False, "no STUN: clients then need another STUN server"),
    Option("turn_url", "", "TURN servers for hosts, as turn:turn.example.net:3478, with commas between", pattern=r"(turns?:[^\s,]+(,(?=t)|$))*"),
    Option("turn_secret", "", "the secret shared with them, coturn's static-auth-secret; better given as P2P_TURN_SECRET", pattern="(?s).*"),
    Option("game_ttl", 60.0, "seconds after which a game whose host is silent is gone", 1, 86400),
    Option("guest_ttl", 60.0, "seconds after which a guest who has not started again is gone", 1, 86400),
    Option("poll_after", 2.0, "seconds that clients are advised to wait between two polls", 0.1, 3600),
    Option("max_games", 10000, "games at once", 1, 10_000_000),
    Option("max_guests", 64, "guests of one game at once", 1, 100_000),
    Option("max_games_per_client", 50, "games at once of one client address, of which an IPv6 /56 is one", 1, 10_000_000),
    Option("rate", 50.0, "requests a second of one client address, a failed authorisation counting as ten; 0 for no limit", 0, 1_000_000),
    Option("burst", 200, "requests at once of one client address, on top of --rate", 10, 1_000_000),
    Option("store", "", "Redis or Valkey by which servers share their games, as redis://host:6379/0; in memory if not given", pattern="(?s).*"),
    Option("max_connections", 400 if os.name == "nt" else 20000, "connections at once; 400 on Windows, whose select() takes 512 sockets", 1, 10_000_000),
    Option("max_connections_per_client", 256, "connections at once of one client address", 1, 10_000_000),
    Option("max_memory", 256, "megabytes of games and guests", 1, 1_000_000),
    Option("max_guests_per_client", 16, "guests of one game at once that come from one client address", 1, 100_000),
    Option("max_wait", 25, "seconds for which a poll or start waits at the most", 0, 3600),
    Option("max_waiting", 20000, "polls and starts that wait at once; beyond that they are answered without waiting", 0, 10_000_000),
    Option("max_threads", 8, "threads at once for TLS; without TLS no connection needs one", 1, 10_000),
    Option("max_body", 16384, "bytes in the body of a request; in that of a poll, with its replies, four times as many", 1024, 16_777_216),
    Option("idle_timeout", 75.0, "seconds of silence after which a connection is closed", 1, 3600),
    Option("cors_origin", "*", "origins whose web pages may call, with commas between: * for all, empty for none"),
    Option("trusted_proxies", "", "reverse proxies whose X-Forwarded-For is believed: addresses and networks, with commas between", pattern=IP_LIST),
    Option("metrics_from", "", "who may GET /metrics beside this machine: addresses and networks, with commas between", pattern=IP_LIST),
    Option("tls_cert", "", "file with the certificate and its chain, PEM: HTTPS instead of HTTP; SIGHUP loads it anew", pattern=".*"),
    Option("tls_key", "", "file with the certificate's key, PEM, if it is not in the --tls-cert file", pattern=".*"),
    Option("log_format", "text", "lines of the log as text, or each as a JSON object", pattern="text|json"),
    Option("log_level", "info", "least level of what is logged", pattern="debug|info|warning|error"),
    Option("access_log", False, "log every request"),
)

# What a browser may send as Origin (RFC 6454 section 6.1): a scheme, a host and a port that is not the scheme's usual one.
ORIGIN = re.compile(r"null|(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")

MAX_NAME, MAX_PEER_ID, MAX_ADDRESS = 64, 128, 512       # characters
MAX_ADDRESSES, MAX_REPLY_ADDRESSES = 16, 64             # candidates in one list, and in all the replies of one poll
MAX_INFO, MAX_DEPTH = 1024, 16  # bytes as compact JSON; levels of arrays and objects in what is handed on
MAX_REQUEST_LINE, MAX_HEAD, MAX_TRAILER = 8192, 32768, 1024     # bytes; RFC 9112 section 3 asks for 8000 at least. Trailers follow a chunked body
MAX_HEADER_FIELDS = 100
READ_SIZE = 16384               # bytes that are received at once: a connection's buffer holds at most MAX_HEAD or a body, and READ_SIZE more
MAX_FORWARDED = 2048            # characters of X-Forwarded-For that are read, from its end
MAX_CIPHERTEXT = 65536          # bytes of TLS that may come without any plaintext; a record has at most 16,640 (RFC 8446 section 5.2)
MAX_STUN, MAX_STUN_ATTRIBUTES = 1280, 16                # bytes of a request, and attributes in it
TURN_TTL = 86400                # seconds for which the credentials of a relay are good
STUN_BURST = 500                # answers that one address gets at once of each port, on top of --stun-rate a second: a school may be one
FREE_READS, BYTES_PER_READ = 8, 512     # a request may take 8 reads, and one for each 512 bytes; more cost a token each, as do 512 bytes of framing
BYTES_PER_TOKEN = 16384         # of an answer's body: a long list costs as much as many short answers
FORBIDDEN_COST = 10             # tokens that a wrong peerId costs, so that guessing is slow
MAX_REFUSALS = 100              # refusals that a client, or the server in all, sends at once beyond a limit; then it closes without a word
ACCEPTED_AT_ONCE = 64           # new clients
REQUEST_TIME = 10.0             # seconds for a request to arrive, from its first byte to its last, and for a TLS handshake
SEND_TIME = 10.0                # seconds in which a client must read some of an answer
LINGER_TIME = 2.0               # seconds that more may arrive before a connection is closed
RETRY_AFTER, RESTARTED_AFTER = 10, 1     # seconds, where a full server or game may have room again, and where another server takes over
POLL_FACTOR = 4                 # times --max-body may be in a poll, whose replies can be many
BUSY_FACTOR = 5                 # times as long between two polls is advised to a client for which no place to wait is left
GAME_SIZE, GUEST_SIZE = 1250, 1050      # bytes that one takes beside its texts (bench/memory.py measures it)
MAX_REMEMBERED, MEMBER_SIZE = 256, 200  # sessions that ended, and guests that were dismissed, of which a game knows; bytes of one
REPORT_EVERY = 60.0             # seconds between two lines that tell how often one limit was reached
MAX_KNOWN_BODIES, MAX_KNOWN_BODY = 10000, 512   # bodies that need not be read again, the latest, and the bytes of one
LOOKS_PER_SECOND = 10000        # at the deadlines of connections: among so many, one that has passed is noticed up to a second late
LOG_LINES = 10000               # that wait to be written at the most


class Settings(argparse.Namespace):
    """The values of OPTIONS by name. ValueError: one is out of bounds, or two do not go together."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{option.name: option.checked(values.pop(option.name, option.default)) for option in OPTIONS})
        insist(not values, f"there is no option {', '.join(values)}")
        self.proxies, self.watchers = Networks(self.trusted_proxies), Networks(self.metrics_from)
        self.origins = re.split(" *, *", self.cors_origin)
        insist(self.cors_origin in ("", "*") or all(ORIGIN.fullmatch(origin) for origin in self.origins),
               f"--cors-origin must be * or what browsers send, as https://game.example without a slash at the end, not {self.cors_origin!r}")
        insist(self.poll_after < min(self.game_ttl, self.guest_ttl, self.idle_timeout),
               "--poll-after must be less than --game-ttl, --guest-ttl and --idle-timeout, or clients that obey it come too late")
        insist(self.tls_cert or not self.tls_key, "--tls-key needs --tls-cert")
        insist(bool(self.turn_url) == bool(self.turn_secret) and self.turn_secret.isascii() and self.turn_secret.isprintable(),
               "--turn-url and --turn-secret (P2P_TURN_SECRET) need each other, and the secret consists of printable ASCII characters")


# ---- problems -------------------------------------------------------------------------------------------------------

class Problem(ValueError):
    """What went wrong, for a client or whoever starts the server. errors: the faults of the body by field; limit: which is reached, as /metrics
    has it; headers: more header fields."""

    status = 400

    def __init__(self, detail: str, status: int = 0, errors: Any = None, limit: str = "", headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(detail)
        self.detail, self.status, self.errors, self.limit, self.headers = detail, status or self.status, errors or {}, limit, headers or {}


class NotFound(Problem):
    status = 404


class Forbidden(Problem):
    status = 403


class Conflict(Problem):
    status = 409


class Full(Problem):
    """A limit of the server or of a game is reached."""

    status = 503


class TooMany(Full):
    """A limit that each client has for itself is reached (RFC 6585 section 4)."""

    status = 429


def insist(value: Any, detail: str, problem: Callable[..., Exception] = Problem, **more: Any) -> Any:
    """The value, if it is true. Otherwise the problem, with these details."""
    if not value:
        raise problem(detail, **more)
    return value


# ---- fields ---------------------------------------------------------------------------------------------------------
# A check returns the value to use, or raises Problem with the rule. Addresses and info become JSON text: as Python's
# objects they can take twenty times as much memory.

class Scope(NamedTuple):
    """What a check may depend on beside the value."""

    is_local: bool = False      # the client calls from this machine
    max_guests: int = 64


RESERVED_NAMES = {".", ".."}        # clients fold them away (RFC 3986 section 5.2.4); the rows of ROUTES add theirs
NO_ADDRESSES = b"[]"
IP_PORT = re.compile(r"(?:([0-9]+(?:\.[0-9]+){3})|\[([0-9A-Fa-f:.]+(?:%[^\]]*)?)\]):([0-9]+)")
# No control character, lone surrogate, line separator or slash; no white space at the ends.
GAME_NAME = re.compile(rf"(?!\s)[^\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029/]{{1,{MAX_NAME}}}(?<!\s)")

# Two names that look alike must not differ by what is not drawn: category Cf, fillers, blanks, and selectors of variants.
NOT_DRAWN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
EMOJI = "\xa9\xae\u203c-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
EMOJI_JOINER = re.compile(f"(?<=[{EMOJI}])\ufe0f|(?<=[{EMOJI}\ufe0f])\u200d(?=[{EMOJI}])|(?<=[0-9#*])\ufe0f(?=\u20e3)")


def check_name(value: Any, scope: Scope) -> Any:
    """A game's name, normalised to NFC, so that two ways of typing one name are one game."""
    # NFC makes at most four characters one: what is longer than four times the limit stays too long, and need not be normalised whole.
    name = unicodedata.normalize("NFC", value[:4 * MAX_NAME + 1]) if isinstance(value, str) else ""
    insist(name not in RESERVED_NAMES and GAME_NAME.fullmatch(name),
           f"must be a string of 1 to {MAX_NAME} characters, without /, control characters and line separators, with no white space at its ends, "
           "and no reserved word")
    unseen = [] if name.isascii() else [each for each in EMOJI_JOINER.sub("", name) if unicodedata.category(each) == "Cf" or NOT_DRAWN.match(each)]
    return insist(not unseen, "must not have characters that cannot be seen, beside joiners within emoji") and name


def check_peer_id(value: Any, scope: Scope) -> Any:
    """The secret that authorises its owner."""
    is_good = isinstance(value, str) and 0 < len(value) <= MAX_PEER_ID and value.isprintable()
    return insist(is_good, f"must be a string of 1 to {MAX_PEER_ID} printable characters") and value


def packed_address(text: str) -> bytes:
    """The 4 or 16 bytes of an IP address, which may have a zone. An IPv4-mapped IPv6 address is the IPv4 one. OSError if the text is none."""
    if ":" not in text:
        return socket.inet_pton(socket.AF_INET, text)
    packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    return packed[12:] if packed.startswith(b"\0" * 10 + b"\xff\xff") else packed


def is_loopback(packed: bytes) -> bool:
    return packed[0] == 127 if len(packed) == 4 else packed == b"\0" * 15 + b"\1"


def is_too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether arrays and objects are nested deeper than that. How deep a JSON reader goes is its own affair (RFC 8259 section 9)."""
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list)) and (levels == 0 or any(is_too_deep(item, levels - 1) for item in items))


def address_fault(value: Any, is_local: bool) -> str:
    """The rule that one candidate breaks, or nothing. Text that is no ip:port or [ipv6]:port is passed on as it is."""
    if isinstance(value, dict):
        return f"must be at most {MAX_DEPTH} levels deep" if is_too_deep(value) else ""
    if not isinstance(value, str) or len(value) > MAX_ADDRESS:
        return f"must be a string of at most {MAX_ADDRESS} characters, or an object, which may be larger"
    match = IP_PORT.fullmatch(value)
    if not match:
        return ""
    try:
        address = packed_address(match[1] or match[2])
    except OSError:
        return "must be an IP address"
    if not 0 < int(match[3]) <= 65535:
        return "must have a port from 1 to 65535"
    if not any(address) or address[0] == 0xFF or len(address) == 4 and 224 <= address[0] < 240:
        return "must not be an unspecified, multicast or broadcast address"
    return "must not be a loopback address, as the client is on another machine" if is_loopback(address) and not is_local else ""


def check_array(value: Any, most: int, members: str) -> Any:
    """An array. Encoders of Lua and PHP write an empty one as an empty object."""
    return insist(isinstance(value, list) and len(value) <= most or value == {}, f"must be an array of at most {most} {members}") and (value or [])


def check_addresses(value: Any, scope: Scope) -> bytes:
    """Candidates, most wanted first, as JSON text."""
    candidates = check_array(value, MAX_ADDRESSES, "addresses")
    faults = [f"[{i}] {fault}" for i, fault in enumerate([address_fault(item, scope.is_local) for item in candidates]) if fault]
    insist(not faults, "; ".join(faults[:3]))      # so that answers stay short
    return to_json(candidates).encode()


def check_replies(value: Any, scope: Scope) -> Dict[str, bytes]:
    """Addresses for single guests: {sessionId: addresses}. Counted first, so that a large body costs no more than a small one."""
    insist(isinstance(value, dict) and len(value) <= scope.max_guests, f"must be an object of at most {scope.max_guests} replies")
    count = sum([len(addresses) for addresses in value.values() if isinstance(addresses, list)])
    insist(count <= MAX_REPLY_ADDRESSES, f"must have at most {MAX_REPLY_ADDRESSES} addresses in all")
    return {session_id: check_addresses(addresses, scope) for session_id, addresses in value.items()}


def check_dismiss(value: Any, scope: Scope) -> Any:
    """The sessionIds of guests."""
    sessions = check_array(value, scope.max_guests, "sessionIds")
    return insist(all(isinstance(each, str) for each in sessions), "must hold sessionIds, which are strings") and sessions


def check_info(value: Any, scope: Scope) -> Any:
    """What lobbies show of a game, as JSON text."""
    text = to_json(value).encode() if isinstance(value, dict) and not is_too_deep(value) else b""
    return insist(0 < len(text) <= MAX_INFO, f"must be an object of at most {MAX_INFO} bytes of JSON and {MAX_DEPTH} levels") and text


def check_flag(value: Any, scope: Scope) -> Any:
    return insist(isinstance(value, bool), "must be true or false") and value


def check_whole_number(value: Any, scope: Scope) -> Any:
    """In any spelling, as 25.0 or 2.5e1: many encoders know no other numbers than floats."""
    # Every JSON reader holds whole numbers up to this exactly (RFC 8259 section 6).
    insist(type(value) in (int, float) and 0 <= value < 2 ** 53 and value == int(value), "must be a whole number, not negative")
    return int(value)


Check = Callable[[Any, Scope], Any]


def optional(check: Check) -> Check:
    """The check of a field that may be absent or null, which is None then. Every other check refuses None."""
    return lambda value, scope: None if value is None else check(value, scope)


def validate(body: Mapping[str, Any], fields: Mapping[str, Check], scope: Scope) -> Dict[str, Any]:
    """The checked values by field name. Other fields of the body are ignored, so newer clients work. Problem names every fault at once."""
    values: Dict[str, Any] = {}
    faults = {}
    for name, check in fields.items():
        try:
            values[name] = check(body.get(name), scope)
        except ValueError as fault:
            faults[name] = str(fault) if name in body else f"is missing: it {fault}"
    insist(not faults, "; ".join([f"{name} {fault}" for name, fault in faults.items()]), errors=faults)
    return values


def unique_keys(pairs: List[Tuple[str, Any]]) -> Any:
    """An object none of whose names comes twice: readers differ in which one they take (RFC 8259 section 4)."""
    members = dict(pairs)
    return insist(len(members) == len(pairs), "a name stands twice in one object") and members


to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False).encode
# To Python 1e999 is infinite. So is a whole number that is too large for a double.
from_json = json.JSONDecoder(object_pairs_hook=unique_keys, parse_int=lambda text: int(text) if len(text) < 300 else float(text)).decode


def json_text(members: Mapping[str, Any], name: bytes = b"", text: bytes = b"") -> bytes:
    """A JSON object of these members, of which there is at least one, and under that name of what is JSON text already."""
    whole = to_json(members).encode()
    return b'%b,"%b":%b}' % (whole[:-1], name, text) if name else whole


def parse_body(body: bytes) -> Dict[str, Any]:
    """The object that a body holds. Problem 400 if it is not JSON, or JSON that not every reader reads alike."""
    try:
        insist(not body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")), "it begins with a byte order mark, a BOM")
        value: Dict[str, Any] = from_json(body.decode("utf-8"))
        to_json(value).encode("utf-8")      # fails for what Python reads and JSON has not: NaN, infinite numbers, lone surrogates
        insist(isinstance(value, dict), "it is something else")
    except (ValueError, RecursionError) as fault:
        raise Problem(f"the body must be a JSON object in UTF-8: {fault}") from None
    return value


# ---- registry -------------------------------------------------------------------------------------------------------

Text = Optional[bytes]                      # JSON text as it was checked; None stands for no change
Replies = Optional[Mapping[str, bytes]]     # addresses for single guests, by sessionId
Wake = Optional[Callable[[], None]]         # called in any thread, with the registry's lock held: it only queues


class Waiter:
    """A poll or start that waits for news. When there may be some, wake is called once; then the call is to be made again with these values."""

    def __init__(self, entry: Any, name: str, digest: bytes, after: Optional[int], wake: Callable[[], None]) -> None:
        self.entry = entry                              # by which the registry knows it
        self.name, self.digest, self.after = name, digest, after    # the game's present name, the digest of the peerId, the cursor
        self.wake = wake
        self.is_over = False                    # it is to be answered now
        self.is_busy = False                    # another call took its place, and changed nothing


class Session(NamedTuple):
    """What one of a pair of host and guest may know: the session that the two share, and the addresses of the other as JSON text.

    seen_at: the IP address from which the other called, as text; of a host only if it is among these addresses.
    """

    session_id: str
    session_key: str
    addresses: bytes
    seen_at: str = ""


class News(NamedTuple):
    """What a host learns from a poll, or a guest from a start: its peers, and the cursor of what it learns.

    peers: of a host the guests; of a guest the host alone, with NO_ADDRESSES while there are none for it.
    has_news: there is something to tell. waiter: there is nothing, and it waits. Of a host also: left: the sessions that ended since its cursor, of
    the latest MAX_REMEMBERED; gone: those of its replies that are gone.
    """

    name: str
    peers: List[Session]
    cursor: int
    has_news: bool
    waiter: Optional[Waiter]
    left: Sequence[str] = ()
    gone: Sequence[str] = ()


class Later(Exception):
    """Raised by a registry whose answer comes later. send(wake): wake is called, in any thread, once it is there; then the same call is to be made
    again. Before, that raises this again."""

    def __init__(self, send: Callable[[Callable[[], None]], None]) -> None:
        self.send = send


class GameRegistry(Protocol):
    """What the server asks of a registry. Any thread may call it, with values that passed validation. It knows no HTTP. Of what for_request() gives
    each method may raise Later, but for forget_waiter and expire_games.

    A method that raises NotFound, Forbidden, Conflict or Full has changed nothing, except that the owner counts as alive.
    digest is that of the caller's peerId; client is the client key of its address.
    """

    events: collections.deque[Tuple[str, str, str, bytes]]     # what has happened to games: operation, name, detail, client key
    peer_digest: functools.partial[bytes]   # of a peerId gives what stands for it in all methods

    def for_request(self) -> GameRegistry:
        """The same registry for the calls of one request, with the answers that have come to these."""
        return self

    def register_game(self, name: str, digest: bytes, client: bytes = b"", **shown: Any) -> bool:
        """Offer a game; True if it is new. Its owner keeps it alive, and changes what the list shows of it: info, listed. Conflict: the name is
        taken. Full. TooMany."""

    def poll_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, replies: Replies = None,
                  dismiss: Sequence[str] = (), wake: Wake = None, seen_at: str = "") -> News:
        """Publish the host's addresses and replies; learn of the guests that came, moved or left since the cursor after, or of all there are. No
        addresses and no replies: a poll that has waited is asked again, as in start_game.

        A reply that was made before after, without the guest's present addresses, is ignored. dismiss: sessions of guests to be sent away.
        With wake, without news and while there is room, the answer has a waiter. A later poll of the host replaces it. NotFound. Forbidden. Full.
        """

    def start_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, client: bytes = b"", seen_at: str = "",
                   wake: Wake = None) -> News:
        """Join a game as a guest, or say that one is still there, and from which IP address. Without addresses the guest must be there already.

        New addresses end the host's reply to the earlier ones. With wake, without addresses of the host that are newer than after and while there is
        room, the answer has a waiter. NotFound. Forbidden: the host has dismissed it. Conflict: the host's own game. Full. TooMany.
        """

    def leave_game(self, name: str, digest: bytes) -> None:
        """End a guest's session. NotFound: the game or the session."""

    def forget_waiter(self, waiter: Waiter) -> GameRegistry:
        """Its client has gone, or it is asked again, of what this returns: it is not to be woken any more, and has the game's present name."""

    def list_games(self) -> Tuple[int, bytes]:
        """The listed games, oldest first, as JSON text, and the version of the list, which grows with every change of it."""

    def get_game(self, name: str) -> bytes:
        """One game, listed or not, as JSON text. NotFound."""

    def update_game(self, name: str, /, digest: bytes, **changes: Any) -> bytes:
        """Rename or describe a game, which keeps its guests: changes are its new name, info and listed; the game as JSON text. NotFound. Forbidden.
        Conflict: the new name is taken. Full."""

    def delete_game(self, name: str, digest: bytes) -> None:
        """End a game. NotFound. Forbidden."""

    def counts(self) -> Dict[str, int]:
        """How many games, guests and waiting polls and starts there are, and the stored_bytes that games and guests take."""

    def expire_games(self) -> None:
        """Free what has expired. Every other method does so too; this is for times when nobody calls."""
        self.counts()


class Game:
    """A game while its host is alive. Versions are values of the registry's cursor; 0 stands for never."""

    game: Any = property(lambda self: self)         # as a guest has it

    def __init__(self, name: str, digest: bytes, client: bytes, version: int) -> None:
        self.name, self.digest, self.client = name, digest, client      # the last two of its host, as in Guest of the guest
        self.info, self.listed, self.ready = b"{}", True, False         # ready: its host has addresses, or replies to guests
        self.offer, self.offered = NO_ADDRESSES, 0  # the host's addresses, which it offers to every guest, and their version
        self.seen_at, self.size = "", 0             # the IP address from which its host called last; the bytes that are counted for it
        self.guests: Dict[bytes, Guest] = {}        # by digest, in the order they came
        self.news = version                         # when a guest last came, moved or left
        self.left: Tuple[Tuple[int, str], ...] = () # when a session ended, and which
        self.told = -1                              # up to when its host knows of these
        self.dismissed: Tuple[bytes, ...] = ()      # digests of guests that its host has sent away
        self.line: Text = None                      # what anybody may know of it; None: to be made anew


class Guest:
    """One guest's session with one game."""

    def __init__(self, game: Game, digest: bytes, client: bytes, session_id: str, session_key: str) -> None:
        self.game, self.digest, self.client = game, digest, client
        self.session_id, self.session_key = session_id, session_key
        self.addresses, self.changed = b"", 0       # its own, and their version. So its first ones are news, even if there are none
        self.offer, self.offered = b"", 0           # the host's reply, which it offers to this guest instead, if there is one; its version
        self.seen_at, self.size = "", 0


Entry = Union[Game, Guest]


def published_at(host: str, addresses: bytes) -> str:
    """The IPv4 address from which a host called, if that is among the addresses that it publishes; "" otherwise: no guest learns what it hides."""
    return host if f'"{host}:'.encode() in addresses else ""


def size_of(value: Any) -> int:
    """Bytes that are counted for an attribute, of which true and false take none of their own."""
    return len(value) * MEMBER_SIZE if isinstance(value, tuple) else 0 if isinstance(value, bool) else sys.getsizeof(value)


def count_down(counter: collections.Counter[bytes], key: bytes) -> None:
    """One less for a client. At zero it is forgotten, or all clients that ever came would be kept."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def keyed_digest(peer_id: str, secret: bytes) -> bytes:
    """What is kept of a peerId: it reveals nothing, and to look it up takes no time that depends on the peerId."""
    return hashlib.blake2b(peer_id.encode("utf-8"), key=secret, digest_size=16).digest()


def list_text(lines: Iterable[bytes]) -> bytes:
    """The list of games as JSON text, of what get_game() gives of each."""
    return b'{"games":[' + b",".join(lines) + b"]}\n"


def new_session_id() -> str:
    """128 random bits: a sessionId or a sessionKey."""
    return os.urandom(16).hex()


class Registry(GameRegistry):
    """The GameRegistry in memory: all games and guests, behind one lock.

    clock: seconds that never go back. new_id: a new unguessable string at each call.
    cursor: the first version. The server passes tenths of milliseconds since 1970, which is more than an earlier run can have reached.
    So a cursor that a host kept across a restart does not hide the guests that came since. It has 14 digits until the year 2286, which is what
    JSON libraries of Lua write of a number.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic, new_id: Callable[[], str] = new_session_id, cursor: int = 0) -> None:
        self._settings, self._clock, self._new_id = settings, clock, new_id
        self.peer_digest = functools.partial(keyed_digest, secret=os.urandom(32))
        # The lock guards everything below. Public methods take it; private ones need it held.
        self._lock = threading.Lock()
        self._cursor = cursor                   # grows with every change
        self._list, self._listed = (0, b""), -1     # the list with its version; the cursor when it was made
        self._games: Dict[str, Game] = {}       # the oldest first
        # When all games and all guests expire, each with the first in front: expiry looks at the front only, never at all of them.
        self._queues: Dict[type, collections.OrderedDict[Any, float]] = {Game: collections.OrderedDict(), Guest: collections.OrderedDict()}
        self._ttls = {Game: settings.game_ttl, Guest: settings.guest_ttl}
        self._games_of: collections.Counter[bytes] = collections.Counter()      # how many games each client has
        self._waiters: Dict[Entry, Waiter] = {}             # the polls of hosts and the starts of guests
        self._stored = 0                                    # bytes that games and guests take
        # Appended to under the lock. A deque's ends are safe without it.
        self.events = collections.deque()

    def register_game(self, name: str, digest: bytes, client: bytes = b"", **shown: Any) -> bool:
        with self._lock:
            self._expire()
            is_new = name not in self._games
            if is_new:
                self._check_room("games", len(self._games), self._games_of[client])
                self._games[name] = Game(name, digest, client, self._cursor + 1)
                self._games_of[client] += 1
                self._resize({self._games[name]: GAME_SIZE + size_of(name)})
                self.events.append(("register_game", name, "", client))
            game = self._games[name]
            insist(hmac.compare_digest(game.digest, digest), f"the name {name!r} is taken", Conflict)
            self._keep_alive(game)
            self._change(game, **shown)     # this never fails for a new game: a tenth of the memory is left
            return is_new

    def poll_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, replies: Replies = None,
                  dismiss: Sequence[str] = (), wake: Wake = None, seen_at: str = "") -> News:
        with self._lock:
            game = self._find(name, digest)
            self._keep_alive(game, seen_at)
            since, is_same = self._since(after), addresses in (None, game.offer)
            told = since if after is not None else self._cursor     # without a cursor it learns of all that there is
            gone = [] if is_same and replies is None else self._publish(game, addresses, replies, told)
            game.told = told
            sent_away = set(dismiss)
            for guest in [each for each in game.guests.values() if each.session_id in sent_away] if dismiss else ():
                self._remove(guest, "dismiss_guest")
                self._change(game, dismissed=(*game.dismissed, guest.digest)[-MAX_REMEMBERED:])
            left = [] if after is None or game.news <= since else [session_id for version, session_id in game.left if version > since]
            guests = [] if game.news <= since else [
                Session(each.session_id, each.session_key, each.addresses, each.seen_at) for each in game.guests.values() if each.changed > since]
            news = News(name, guests, game.news, bool(guests or left or gone), None, left, gone)
            return self._wait(game, news, after, wake, addresses is None, is_same and not (replies or dismiss))

    def start_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, client: bytes = b"", seen_at: str = "",
                   wake: Wake = None) -> News:
        with self._lock:
            game = self._find(name)
            insist(not hmac.compare_digest(game.digest, digest), "a host cannot start its own game", Conflict)
            insist(digest not in game.dismissed, f"the host of the game {name!r} has sent you away", Forbidden)
            guest = game.guests.get(digest)
            if guest is None:
                insist(addresses is not None, f"the session with the game {name!r} is gone", NotFound)
                self._check_room("guests", len(game.guests), sum([each.client == client for each in game.guests.values()]))
                guest, after = Guest(game, digest, client, self._new_id(), self._new_id()), None    # the session itself is news
            present = addresses or guest.addresses
            has_moved = present != guest.addresses
            if has_moved:
                self._resize({guest: GUEST_SIZE + len(present)})
                guest.addresses, guest.offer = present, b""
                guest.changed = game.news = self._cursor
                if digest not in game.guests:
                    game.guests[digest], game.line = guest, None
                    self.events.append(("start_game", name, f"guests: {len(game.guests)}", client))
                self._wake(game)
            self._keep_alive(guest, seen_at)
            source = guest if guest.offer else game
            host = Session(guest.session_id, guest.session_key, source.offer, published_at(game.seen_at, source.offer))
            news = News(name, [host], source.offered, source.offer != NO_ADDRESSES and source.offered > self._since(after), None)
            return self._wait(guest, news, after, wake, addresses is None, not has_moved)

    def leave_game(self, name: str, digest: bytes) -> None:
        with self._lock:
            guest = self._find(name).guests.get(digest)
            self._remove(insist(guest, f"this peerId has no session with the game {name!r}", NotFound), "leave_game")

    def forget_waiter(self, waiter: Waiter) -> GameRegistry:
        with self._lock:
            waiter.name = waiter.entry.game.name
            if self._waiters.get(waiter.entry) is waiter:
                del self._waiters[waiter.entry]
                self._keep_alive(waiter.entry)      # until now the wait did
            return self

    def list_games(self) -> Tuple[int, bytes]:
        with self._lock:
            self._expire()
            if self._listed != self._cursor:
                self._listed = self._cursor
                text = list_text([self._line(game) for game in self._games.values() if game.listed])
                if text != self._list[1]:
                    self._list = (self._cursor, text)
            return self._list

    def get_game(self, name: str) -> bytes:
        with self._lock:
            return self._line(self._find(name))

    def update_game(self, name: str, /, digest: bytes, **changes: Any) -> bytes:
        with self._lock:
            game, new_name = self._find(name, digest), changes.get("name")
            insist(self._games.get(new_name or name, game) is game, f"the name {new_name!r} is taken", Conflict)
            self._change(game, **changes)
            if game.name != name:
                self._games = {each.name: each for each in self._games.values()}     # in the same order
                self._wake(game, *game.guests.values(), is_over=True)
                self.events.append(("update_game", name, f"renamed to {new_name!r}", game.client))
            return self._line(game)

    def delete_game(self, name: str, digest: bytes) -> None:
        with self._lock:
            self._remove(self._find(name, digest), "delete_game")

    def counts(self) -> Dict[str, int]:
        with self._lock:
            self._expire()
            return {"games": len(self._games), "guests": len(self._queues[Guest]), "waiting": len(self._waiters), "stored_bytes": self._stored}

    def _find(self, name: str, owner: Optional[bytes] = None) -> Game:
        """A game that has not expired. NotFound. Forbidden: somebody else owns it, where an owner is given."""
        self._expire()
        game: Game = insist(self._games.get(name), f"there is no game {name!r}", NotFound)
        insist(owner is None or hmac.compare_digest(game.digest, owner), "the peerId is not the one that registered this game", Forbidden)
        return game

    def _check_room(self, what: str, count: int, of_client: int) -> None:
        """Full, TooMany: of "games", or of the "guests" of a game, there are that many, and may be no more. Full: only a tenth of the memory is left,
        which is kept for those that are there already."""
        most, most_of_one = getattr(self._settings, f"max_{what}"), getattr(self._settings, f"max_{what}_per_client")
        insist(count < most, f"there are {count} {what}, and no more may be", Full, limit=what)
        insist(of_client < most_of_one, f"your address has {of_client} {what}, which is all that one may have", TooMany, limit=f"{what}_per_client")
        insist(self._stored <= 900_000 * self._settings.max_memory, "the server's memory for games is full", Full, limit="memory")

    def _resize(self, sizes: Mapping[Entry, int]) -> None:
        """Count so many bytes for games and guests that are about to change; the cursor grows. Full: there is no room, and nothing has changed."""
        growth = sum(sizes.values()) - sum([entry.size for entry in sizes])
        is_room = growth <= 0 or self._stored + growth <= 1_000_000 * self._settings.max_memory
        insist(is_room, "the server's memory for games is full", Full, limit="memory")
        self._stored += growth
        self._cursor += 1
        for entry, size in sizes.items():
            entry.size = size

    def _change(self, game: Game, **values: Any) -> None:
        """Set what a game shows or remembers, of these values those that are not None. Full."""
        values = {name: value for name, value in values.items() if value is not None}
        self._resize({game: game.size + sum([size_of(value) - size_of(getattr(game, name)) for name, value in values.items()])})
        for name, value in values.items():
            setattr(game, name, value)
        game.line = None

    def _since(self, after: Optional[int]) -> int:
        """The version up to which a caller with this cursor knows all. One ahead of ours was given out by an earlier run whose clock was ahead: it
        says nothing about this one."""
        return after if after is not None and after <= self._cursor else -1

    def _publish(self, game: Game, addresses: Text, replies: Replies, told: int) -> List[str]:
        """Change what the host offers to all guests, and to single ones whose addresses have not changed since told; the sessions of its replies
        that are gone."""
        guests = {guest.session_id: guest for guest in game.guests.values()}
        replied: Dict[Entry, bytes] = {guests[key]: text for key, text in (replies or {}).items() if key in guests and guests[key].changed <= told}
        offers = {entry: offer for entry, offer in {game: addresses or game.offer, **replied}.items() if offer != entry.offer}
        self._resize({entry: entry.size + len(offer) - len(entry.offer) for entry, offer in offers.items()})
        if game in offers and not game.offered:
            self.events.append(("poll_game", game.name, "first addresses", game.client))
        for entry, offer in offers.items():
            entry.offer, entry.offered = offer, self._cursor
        game.ready, game.line = addresses != NO_ADDRESSES or replies is not None, None     # ready stays so until the addresses change
        self._wake(*[guest for guest in guests.values() if (guest if guest.offer else game) in offers])
        return [session_id for session_id in replies or () if session_id not in guests]

    def _line(self, game: Game) -> bytes:
        """What anybody may know of a game, as JSON text."""
        game.line = game.line or json_text({"name": game.name, "guests": len(game.guests), "ready": game.ready}, b"info", game.info)
        return game.line

    def _wait(self, entry: Entry, news: News, after: Optional[int], wake: Wake, is_again: bool, is_busy: bool) -> News:
        """The news; if there are none, the poll or start waits in place of an earlier one, if it wishes to and there is room. One that is asked again,
        which has no addresses, makes way for a later one. is_busy: the earlier one did not make way for news."""
        if entry in self._waiters and not is_again:
            self._wake(entry, is_over=True, is_busy=is_busy)
        if wake is None or news.has_news or entry in self._waiters or len(self._waiters) >= self._settings.max_waiting:
            return news
        waiter = self._waiters[entry] = Waiter(entry, news.name, entry.digest, after, wake)
        return news._replace(waiter=waiter)

    def _wake(self, *entries: Entry, is_over: bool = False, is_busy: bool = False) -> None:
        """Have the polls and starts that wait there asked again."""
        for waiter in [self._waiters.pop(entry) for entry in entries if entry in self._waiters]:
            self._keep_alive(waiter.entry)      # until now the wait did
            waiter.is_over, waiter.is_busy = is_over, is_busy
            waiter.wake()

    def _keep_alive(self, entry: Entry, seen_at: str = "") -> None:
        """Its owner has called, from that IP address if there is one."""
        entry.seen_at = seen_at or entry.seen_at
        entries = self._queues[type(entry)]
        entries[entry] = self._clock() + self._ttls[type(entry)]
        entries.move_to_end(entry)

    def _expire(self) -> None:
        """Remove what has expired. A game or guest whose poll or start waits is alive."""
        now = self._clock()
        for entries in self._queues.values():
            while entries and next(iter(entries.values())) <= now:
                entry = next(iter(entries))
                if entry in self._waiters:
                    self._keep_alive(entry)
                else:
                    self._remove(entry, "expire_game" if isinstance(entry, Game) else "expire_guest")

    def _remove(self, entry: Entry, operation: str) -> None:
        """Remove a guest, or a game with its guests. operation: what the event says."""
        game: Game = entry.game
        for each in (entry, *(game.guests.values() if entry is game else ())):
            self._wake(each)
            del self._queues[type(each)][each]
            self._stored -= each.size
        if isinstance(entry, Game):
            self._cursor += 1
            game.guests.clear()
            del self._games[game.name]
            count_down(self._games_of, game.client)
        else:
            del game.guests[entry.digest]
            untold = [each for each in game.left if each[0] > game.told]
            self._change(game, left=(*untold, (self._cursor + 1, entry.session_id))[-MAX_REMEMBERED:])
            game.news = self._cursor
            self._wake(game)
        self.events.append((operation, game.name, "" if entry is game else f"guests: {len(game.guests)}", entry.client))


# ---- clients and rate limiter ---------------------------------------------------------------------------------------

BUCKETS = 65536         # 512 KiB


class Client(NamedTuple):
    """Who asks. Limits take for one client: an IPv4 address, or an IPv6 /56, which is what a home line often gets (RFC 6177 section 2)."""

    address: str        # IP, as text; empty: its proxy tells nothing of it
    key: bytes          # that limits count it by
    is_local: bool      # it is this machine


@functools.lru_cache(maxsize=1024)
def client_of(host: str) -> Client:
    """Who has this address. OSError: it is none."""
    packed = packed_address(host)
    return Client(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), packed[:7], is_loopback(packed))


def client_behind(peer: Client, headers: Mapping[str, str], proxies: Networks) -> Client:
    """Who asks, where the connection comes from peer: who is the last in the row of X-Forwarded-For and peer that is none of the proxies.

    Who comes with that field is not taken for a user of this machine. All clients of whom a proxy tells nothing are one.
    """
    forwarded = headers.get("x-forwarded-for")
    if forwarded is None:
        return peer
    if peer.address not in proxies and not proxies.has_warned:
        proxies.has_warned = True
        log.warning("X-Forwarded-For from %s is not believed, as --trusted-proxies does not name it: all who come through it are one client", peer.address)
    client, members = peer, forwarded[-MAX_FORWARDED:].split(",")
    with contextlib.suppress(OSError):
        while members and client.address in proxies:
            member = members.pop().strip()
            match = IP_PORT.fullmatch(member)       # some proxies add the port
            client = client_of(match[1] or match[2] if match else member.strip("[]"))
        return client._replace(is_local=False)
    return Client("", b"", False)


class RateLimiter:
    """A token bucket for each client key: rate tokens a second (0 for no limit), and burst at once.

    Clients share a fixed number of buckets, by a hash that only this process knows: however many come or are forged, memory stays.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._depth = burst * self._interval
        self._clock = clock
        self._lock = threading.Lock()
        # When each bucket is full again, a double each. The system gives memory that is all zeros and takes no room until it is written to.
        self._full_at = memoryview(mmap.mmap(-1, 8 * BUCKETS)).cast("d")

    def pause(self, key: bytes) -> float:
        """Seconds until there is a token; 0 if there is one."""
        pause = self._full_at[hash(key) % BUCKETS] - self._clock() + self._interval - self._depth
        return pause if pause > 1e-6 else 0.0      # sums of fractions are not exact

    def acquire(self, key: bytes) -> float:
        """Take a token: 0, or the seconds until there is one."""
        pause = self.pause(key)
        if not pause:
            self.charge(key, 1)
        return pause

    def charge(self, key: bytes, tokens: float) -> None:
        """Take tokens, whether or not they are there."""
        index = hash(key) % BUCKETS
        with self._lock:
            self._full_at[index] = max(self._full_at[index], self._clock()) + tokens * self._interval


# ---- STUN -----------------------------------------------------------------------------------------------------------
# RFC 8489 Binding alone: a client asks from which public address its datagrams come. All else gets silence. A client of the older
# RFC 3489 has more of its transaction id where others have the cookie, and gets its address as it is (RFC 8489 section 11). FINGERPRINT is
# ignored: on a port for STUN alone it tells nothing (section 12).

STUN_COOKIE = b"\x21\x12\xa4\x42"
STUN_REQUEST, STUN_SUCCESS, STUN_ERROR = b"\0\x01", b"\1\x01", b"\1\x11"      # types of messages: Binding, by class
# Types of attributes.
STUN_MAPPED_ADDRESS, STUN_ERROR_CODE, STUN_UNKNOWN_ATTRIBUTES, STUN_XOR_MAPPED_ADDRESS = b"\0\x01", b"\0\x09", b"\0\x0a", b"\0\x20"
STUN_INTEGRITY = b"\0\x08", b"\0\x1c"   # MESSAGE-INTEGRITY, by SHA-1 and SHA-256: not checked; what follows is ignored (sections 14.5 and 14.6)
# What ICE agents add for each other (RFC 8445 section 7.1): to be comprehended, not obeyed. USERNAME, PRIORITY and USE-CANDIDATE.
STUN_IGNORED = b"\0\x06", b"\0\x24", b"\0\x25"


def stun_unknown_attributes(request: bytes) -> Optional[bytes]:
    """The types of a Binding request's attributes that must be comprehended and are not, one after the other; None: it is no well-formed request."""
    if not 20 <= len(request) <= MAX_STUN or len(request) % 4 or request[:4] != struct.pack(">2sH", STUN_REQUEST, len(request) - 20):
        return None
    kinds: List[bytes] = []
    position = 20
    while position < len(request) and len(kinds) < MAX_STUN_ATTRIBUTES:
        kind, length = struct.unpack_from(">2sH", request, position)
        kinds.append(kind)
        position += 4 + length + -length % 4
    obeyed = itertools.takewhile(lambda kind: kind not in STUN_INTEGRITY, kinds)
    return b"".join([kind for kind in obeyed if kind < b"\x80" and kind not in STUN_IGNORED]) if position == len(request) else None


def stun_answer(request: bytes, source: Tuple[str, int]) -> Optional[bytes]:
    """The answer to a datagram from source, an (IP address, port), or None for silence."""
    unknown, has_cookie = stun_unknown_attributes(request), request[4:8] == STUN_COOKIE
    if unknown is None or unknown and not has_cookie:
        return None     # RFC 8489 section 6.3.1 asks for 420, but old clients that get it ask again at once
    if unknown:
        kind, attributes = STUN_ERROR, {STUN_ERROR_CODE: b"\0\0\x04\x14Unknown Attribute", STUN_UNKNOWN_ATTRIBUTES: unknown}
    else:
        address = packed_address(source[0])
        mask = request[4:6] + request[4:20] if has_cookie else bytes(18)    # of port and address (section 14.2)
        value = (b"\0\1" if len(address) == 4 else b"\0\2") + bytes(a ^ b for a, b in zip(struct.pack(">H", source[1]) + address, mask))
        kind, attributes = STUN_SUCCESS, {STUN_XOR_MAPPED_ADDRESS if has_cookie else STUN_MAPPED_ADDRESS: value}
    body = b"".join([struct.pack(">2sH", each, len(value)) + value + bytes(-len(value) % 4) for each, value in attributes.items()])
    return struct.pack(">2sH", kind, len(body)) + request[4:20] + body


class StunServer(socketserver.UDPServer):
    """Answers on one UDP socket, always from the address that was asked (RFC 8489 section 6.3.1).

    address: as bind() takes it; limiter: how many answers one source gets; tally: called with what became of each datagram.
    OSError from the constructor: the port is in use, or not permitted.
    """

    def __init__(self, family: int, address: Any, limiter: RateLimiter, tally: Callable[[str, str], None]) -> None:
        self.address_family, self._limiter, self._tally = family, limiter, tally
        super().__init__(address, socketserver.BaseRequestHandler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        if sys.platform == "linux":     # IP_PKTINFO is 8 there; elsewhere routing picks the address to answer from
            self.socket.setsockopt(*((socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if self.address_family == socket.AF_INET6 else (socket.IPPROTO_IP, 8)), 1)
        super().server_bind()

    def get_request(self) -> Any:
        """A datagram with what tells where it came to, and its source."""
        if sys.platform != "linux":
            return super().get_request()
        request, arrived_at, _, source = self.socket.recvmsg(self.max_packet_size, 128)
        return (request, arrived_at), source

    def finish_request(self, request: Any, client_address: Any) -> None:
        # The limiter first: to parse costs more than to refuse.
        answer = None if self._limiter.acquire(client_of(client_address[0]).key) else stun_answer(request[0], client_address)
        self._tally(STUN, "answer" if answer else "silence")
        if answer and sys.platform == "linux":
            self.socket.sendmsg([answer], request[1], 0, client_address)
        elif answer:
            self.socket.sendto(answer, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a STUN answer failed", exc_info=True)    # it has no route, or an earlier one was refused


# ---- endpoints and routes -------------------------------------------------------------------------------------------
# The docstring of an endpoint is its line on the start page.

class Answer(NamedTuple):
    """A status, a body, and header fields beside the usual ones. A body ends with a newline, so that the prompt of a shell has a line of its own."""

    status: int
    body: Optional[bytes] = None
    headers: Mapping[str, str] = {}
    media_type: str = "application/json"


def answer_with_ttl(request: Handler, status: int, ttl: float, has_news: bool, body: Dict[str, Any], *stored: bytes) -> Answer:
    """The answer to a poll or start with how long the game or guest is remembered and when to ask again, in seconds. body and stored: as in json_text().

    pollAfter is longer where a request that wishes to wait finds no place, or was replaced: else two hosts with one peerId would chase each other.
    Who obeys it still comes in time.
    """
    server, has_no_place = request.server, not has_news and request.wake is not None    # it wishes to wait, and has no waiter
    if has_no_place:
        server.tally(REFUSED, "waiting")
    is_busy = has_no_place or request.waiter is not None and request.waiter.is_busy
    usual = server.settings.poll_after
    body.update(expiresIn=ttl, pollAfter=min(usual * (BUSY_FACTOR if is_busy else 1), (usual + ttl) / 2))
    return Answer(status, json_text(body, *stored) + b"\n", {"Preference-Applied": f"wait={request.wait}"} if request.wait and not is_busy else {})


def session_body(session: Session) -> Dict[str, Any]:
    """What an answer tells of the other player, but for the addresses."""
    body = {"sessionId": session.session_id, "sessionKey": session.session_key}
    return {**body, "from": session.seen_at} if session.seen_at else body


def location(name: str) -> Dict[str, str]:
    return {"Location": "/games/" + urllib.parse.quote(name, safe="")}


def turn_credentials(settings: Settings) -> Dict[str, Any]:
    """What one host needs to take a relay for a day, in the words of WebRTC's RTCIceServer. The TURN server checks the credential by the secret,
    as coturn does with use-auth-secret (draft-uberti-behave-turn-rest-00 section 2.2)."""
    username = f"{int(time.time()) + TURN_TTL}:{os.urandom(4).hex()}"
    credential = base64.b64encode(hmac.digest(settings.turn_secret.encode("ascii"), username.encode("ascii"), "sha1")).decode("ascii")
    return {"urls": settings.turn_url.split(","), "username": username, "credential": credential, "ttl_seconds": TURN_TTL}


def register_game(request: Handler) -> Answer:
    """offer a game, or go on offering it"""
    settings = request.server.settings
    is_new = request.registry.register_game(request.name, request.digest, request.client.key, **request.fields)
    turn = {"turn": turn_credentials(settings)} if settings.turn_url else {}
    body = {"name": request.name, "stun": request.server.stun_ports, **turn, "expiresIn": settings.game_ttl, "pollAfter": settings.poll_after}
    return Answer(201 if is_new else 200, json_text(body) + b"\n", location(request.name) if is_new else {})


def poll_game(request: Handler) -> Outcome:
    """publish the host's addresses and learn of guests"""
    news = request.registry.poll_game(request.name, request.digest, **request.fields, wake=request.wake, seen_at=request.client.address)
    guests = b",".join([json_text(session_body(guest), b"addresses", guest.addresses) for guest in news.peers])
    body = {"name": news.name, "cursor": news.cursor, "left": news.left, "gone": news.gone}
    return news.waiter or answer_with_ttl(request, 200, request.server.settings.game_ttl, news.has_news, body, b"guests", b"[%b]" % guests)


def start_game(request: Handler) -> Outcome:
    """join as a guest and learn the host's addresses"""
    client = request.client
    news = request.registry.start_game(request.name, request.digest, **request.fields, client=client.key, seen_at=client.address, wake=request.wake)
    [host] = news.peers
    status = 202 if host.addresses == NO_ADDRESSES else 200
    body = {"name": news.name, **session_body(host), "cursor": news.cursor, "stun": request.server.stun_ports}
    return news.waiter or answer_with_ttl(request, status, request.server.settings.guest_ttl, news.has_news, body, b"addresses", host.addresses)


def leave_game(request: Handler) -> Answer:
    """leave as a guest, whose place is free then"""
    request.registry.leave_game(request.name, request.digest)
    return Answer(204)


def list_games(request: Handler) -> Answer:
    """the listed games, oldest first"""
    version, body = request.registry.list_games()
    return Answer(200, body, {"ETag": f'"{version:x}"', "Cache-Control": "no-cache"})    # to be kept, but not used without asking again


def get_game(request: Handler) -> Answer:
    """one game, listed or not"""
    return Answer(200, request.registry.get_game(request.name) + b"\n")


def update_game(request: Handler) -> Answer:
    """its host renames or describes it"""
    body = request.registry.update_game(request.name, request.digest, **request.fields)
    new_name = request.fields.get("name", request.name)
    return Answer(200, body + b"\n", location(new_name) if new_name != request.name else {})


def delete_game(request: Handler) -> Answer:
    """its host ends it"""
    request.registry.delete_game(request.name, request.digest)
    return Answer(204)


def show_health(request: Handler) -> Answer:
    """for load balancers and monitors"""
    insist(not request.server.stopping, "the server is shutting down", status=503)
    counts = request.registry.counts()
    return Answer(200, json_text({"status": "ok", "version": __version__, "games": counts["games"], "guests": counts["guests"]}) + b"\n")


# What Server.tally() counts, with its labels.
REQUESTS, REFUSED, STUN = 'requests_total{operation="%s",status="%s"}', 'refused_total{limit="%s"}', 'stun_total{result="%s"}'


def show_metrics(request: Handler) -> Answer:
    """counts for Prometheus"""
    server, client = request.server, request.client
    insist(client.is_local or client.address in server.settings.watchers, "metrics are for this machine and for --metrics-from", Forbidden)
    gauges = {**request.registry.counts(), "connections": len(server.connections), "threads": threading.active_count(),
              "uptime_seconds": round(time.monotonic() - server.began, 3)}
    text = "".join([f"# TYPE p2pserver_{name} gauge\np2pserver_{name} {value}\n" for name, value in gauges.items()])
    for counter in (REQUESTS, REFUSED, STUN):
        samples = [f"p2pserver_{counter % labels} {value}\n" for (name, labels), value in sorted(server.counters.items()) if name == counter]
        text += f"# TYPE p2pserver_{counter.partition('{')[0]} counter\n" + "".join(samples)
    return Answer(200, text.encode("ascii"), media_type="text/plain; version=0.0.4; charset=utf-8")


def show_start_page(request: Handler) -> Answer:
    """this page"""
    rows = "".join([f"{method:8}{path:18}{route.endpoint.__doc__}\n" for path, routes in ROUTES.items() for method, route in routes.items()])
    text = f"p2pserver {__version__}: the rendezvous server by which two players behind home routers find each other\n\n{rows}"
    return Answer(200, text.encode("ascii"), media_type="text/plain; charset=utf-8")


Outcome = Union[Answer, Waiter]


class Route(NamedTuple):
    """What answers a method on a path, and the fields that its body must or may have."""

    endpoint: Callable[[Handler], Outcome]
    fields: Mapping[str, Check] = {}


OWNER = {"name": check_name, "peerId": check_peer_id}
SHOWN = {"info": optional(check_info), "listed": optional(check_flag)}       # what the list shows of a game, and Game's attributes
# What a poll and a start have.
MEETING = {**OWNER, "addresses": check_addresses, **dict.fromkeys(("after", "wait"), optional(check_whole_number))}
UPDATE = Route(update_game, {"peerId": check_peer_id, "name": optional(check_name), **SHOWN})
GAME_PATH, POLL_PATH, HEALTH_PATH = "/games/<name>", "/games/poll", "/healthz"

ROUTES: Dict[str, Dict[str, Route]] = {     # by path and method
    "/games/register": {"POST": Route(register_game, {**OWNER, **SHOWN})},
    POLL_PATH: {"POST": Route(poll_game, {**MEETING, "replies": optional(check_replies), "dismiss": optional(check_dismiss)})},
    "/games/start": {"POST": Route(start_game, MEETING)},
    "/games/leave": {"POST": Route(leave_game, OWNER)},
    "/games": {"GET": Route(list_games)},
    GAME_PATH: {"GET": Route(get_game), "PATCH": UPDATE, "PUT": UPDATE, "DELETE": Route(delete_game, {"peerId": check_peer_id})},
    HEALTH_PATH: {"GET": Route(show_health)},
    "/metrics": {"GET": Route(show_metrics)},
    "/": {"GET": Route(show_start_page)},
}
RESERVED_NAMES.update(path[len("/games/"):] for path in ROUTES if path.startswith("/games/") and path != GAME_PATH)

# A preference by its name and value, with its parameters (RFC 7240 section 2). A quoted string that does not end goes on to the end.
PREFERENCE = re.compile(r'[ \t,]*([^=;," \t]*)[ \t]*(?:=[ \t]*("(?:[^"\\]|\\.)*"?|[^;," \t]*))?[^",]*(?:"(?:[^"\\]|\\.)*"?[^",]*)*')


def allowed(methods: Iterable[str]) -> str:
    """The value of Allow: HEAD goes wherever GET does, OPTIONS everywhere."""
    return ", ".join(sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def resolve(path: str) -> Tuple[Dict[str, Route], str]:
    """The routes at a path by method, and the game that it names."""
    if path in ROUTES:
        return ROUTES[path], ""
    insist(path, "the request target is no path or http URI; what these cannot hold must be percent-encoded (RFC 3986)")
    with contextlib.suppress(ValueError):       # the name breaks a rule, as one with a slash does, or is not UTF-8
        return ROUTES[GAME_PATH], check_name(urllib.parse.unquote(path.removeprefix("/games/"), errors="strict"), Scope())
    raise NotFound("there is no such path, and no game can have such a name; GET / lists the paths")


def wished_wait(wait: Optional[float], headers: Mapping[str, str], max_wait: int) -> int:
    """Seconds that a request wishes to wait: its field wait, else the first Prefer: wait=N (RFC 7240 section 4.3), at most max_wait. Only a poll and
    a start do wait."""
    if wait is None and "prefer" in headers:
        wishes = [value.replace("\\", "").strip('"') for name, value in PREFERENCE.findall(headers["prefer"]) if name.lower() == "wait"]
        wait = float(wishes[0]) if wishes and wishes[0].isdecimal() else 0
    return int(min(wait or 0, max_wait))


# ---- HTTP: reading a request ----------------------------------------------------------------------------------------

REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9]\.[0-9])")      # RFC 9112 section 3
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "TRACE")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")      # RFC 9110 sections 5.1 and 5.5
# A host and perhaps a port (RFC 9112 section 3.2, RFC 3986 section 3.2), and a target in origin-form or absolute-form. It may hold what a URI may,
# and what browsers leave as it is: []^| and, in a query, \`{} (https://url.spec.whatwg.org/#percent-encoded-bytes).
AUTHORITY = r"(?:\[(?![^\]]*::(?:[^\]]*:)?:)(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f.]*\]|(?:[!$&-.0-9;=A-Z_a-z~]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
TARGET = re.compile(rf"(?!.*%(?![0-9A-Fa-f]{{2}}))(?:(?i:https?)://(?=[^:/?]){AUTHORITY}|(?=/))((?:/[!$-;=@-[\]-_a-z|~]*)?)(?:\?[!$-;=?-~]*)?")
# The size and extension of a chunk (RFC 9112 section 7.1), as far as it has come.
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]{0,8}(?:;[\t -~\x80-\xff]{0,256}|\Z))?(?:\r\n|\r?\Z)")
# The first line of a request, as far as it has come; and what no head may hold: a bare LF or CR, and control characters.
BEGINNING = re.compile(rb"\r?\Z|[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:\Z| [!-~]*(?:\Z| [HTP/.0-9]{0,8}(?:\Z|\r)))")
FORBIDDEN = re.compile(rb"(?<!\r)\n|\r[^\n]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A media type that is JSON, with any parameters but a charset other than UTF-8.
JSON_TYPE = re.compile(r'(application/json|(?!application/json-patch)[^;]*\+json)[ \t]*(;(?!.*charset=(?!"?utf-?8"?[ \t]*(;|$))).*)?')


class Head(NamedTuple):
    """The head of a request, with names of fields in lower case, and what follows from it."""

    method: str = ""
    target: str = ""
    path: str = ""                      # that the target names
    version: str = "1.1"                # of HTTP
    headers: Mapping[str, str] = {}
    length: int = 0                     # of the body, in bytes
    is_chunked: bool = False            # length counts what is decoded so far, and more chunks follow
    closes: bool = True                 # the connection ends with the answer


NO_HEAD = Head()


def path_of(target: str) -> str:
    """The path that a request target names, without the slash at its end, which says nothing; of what is no target, nothing."""
    match = TARGET.fullmatch(target)
    return match[1].removesuffix("/") or "/" if match else ""


def find_head(buffer: bytearray, scanned: int) -> int:
    """Where the head at the start of the buffer ends, or -1 while it is not whole. scanned: the bytes that an earlier call has seen."""
    # 22 begins a TLS handshake (RFC 8446 section 5.1). The answer is HTTP, because some clients show its words; a TLS alert has none.
    insist(BEGINNING.match(buffer), "this port speaks HTTP, not TLS: use http://" if buffer[:1] == b"\x16" else "the request line is malformed")
    insist(len(buffer) < MAX_REQUEST_LINE or b"\n" in buffer[:MAX_REQUEST_LINE], f"the request line has over {MAX_REQUEST_LINE} bytes", status=414)
    return find_empty_line(buffer, max(0, scanned - 3), MAX_HEAD)


def find_empty_line(buffer: bytearray, start: int, limit: int) -> int:
    """Where the empty line that ends the fields begins, or -1 while it has not come. Bytes before start were searched already."""
    end = buffer.find(b"\r\n\r\n", start, limit + 4)
    if end < 0:     # readers differ on what ends a line: where they do, requests can be smuggled
        insist(not FORBIDDEN.search(buffer, start), "a line of the head does not end in CRLF, or holds a control character")
        insist(len(buffer) < limit + 4, f"the head has more than {MAX_HEAD} bytes, or the trailers more than {MAX_TRAILER}", status=431)
    return end


@functools.lru_cache(maxsize=1024)
def parse_head(head: bytes) -> Head:
    """The head without its last empty line, read strictly after RFC 9112. Clients send the same one again and again."""
    line, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = insist(REQUEST_LINE.fullmatch(line), "the request line is malformed").groups()
    headers = parse_fields(lines)
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding", "chunked").lower()
    has_length, is_chunked = "content-length" in headers, "transfer-encoding" in headers
    insist(version[0] == "1", "only HTTP/1.0 and HTTP/1.1 are supported", status=505)
    # Only HTTP/1.0 may do without (RFC 9112 section 3.2). A slash is no host.
    insist(re.fullmatch(AUTHORITY, headers.get("host", "/" if version > "1.0" else "")), "Host must stand once, as a host with perhaps a port")
    insist(method in METHODS, "methods are case-sensitive: use capitals" if method.upper() in METHODS else "there is no such method", status=501)
    # Where readers could differ on where the body ends, requests can be smuggled (RFC 9112 section 6.3).
    insist(not is_chunked or version > "1.0" and not has_length, "Transfer-Encoding is for HTTP/1.1 without Content-Length")
    insist(coding == "chunked", "only chunked is decoded", status=501 if coding.count("chunked") == 1 and re.search(", *chunked$", coding) else 400)
    insist(has_length or is_chunked or method not in ("POST", "PUT", "PATCH"), "a Content-Length is required", status=411)
    insist(re.fullmatch("[0-9]+", length), "Content-Length must stand once, and be a number")
    insist(headers.get("expect", "100-continue").lower() == "100-continue", "only Expect: 100-continue is understood", status=417)
    options = headers.get("connection", "").lower().replace(",", " ").split()
    closes = "close" in options or version == "1.0" and "keep-alive" not in options
    # More digits are too large a length in any case, and slow to convert.
    return Head(method, target, path_of(target), version, headers, int(length.lstrip("0")[:18] or "0"), is_chunked, closes)


def read_head(head: bytes) -> Head:
    """As parse_head. What may hold a secret is not cached."""
    return parse_head.__wrapped__(head) if len(head) > 1024 or b"authorization" in head.lower() else parse_head(head)


def parse_fields(lines: List[str]) -> Dict[str, str]:
    """Header fields by name in lower case. Those that come twice are joined (RFC 9110 section 5.3)."""
    insist(len(lines) <= MAX_HEADER_FIELDS, f"the head has more than {MAX_HEADER_FIELDS} fields", status=431)
    headers: Dict[str, str] = {}
    for line in lines:
        match = insist(FIELD.fullmatch(line), "a header field is malformed")
        name, value = match[1].lower(), match[2].strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def decode_chunks(buffer: bytearray, length: int, limit: int) -> Tuple[int, bool]:
    """Take the framing off the chunks that have come whole (RFC 9112 section 7.1). Extensions and trailers are dropped.

    The buffer begins with length bytes of the body that are decoded already. Returned is how many they are now, and whether more are to come.
    Problem: the framing is malformed, or the body has more than limit bytes.
    """
    size = -1
    while size and length < len(buffer):
        chunk = insist(CHUNK.match(buffer, length), "the size of a chunk is malformed")
        start, size = chunk.end(), int(chunk[1], 16)
        insist(length + size <= limit, f"the body has more than {limit} bytes", status=413)
        end = start + size if size else 2 + find_empty_line(buffer, max(length, start - 2), start + MAX_TRAILER)    # of the data, or of the trailers
        insist(end < start or b"\r\n".startswith(bytes(buffer[end:end + 2])), "a chunk is longer than its size")
        if not start <= end <= len(buffer) - 2:
            return length, True
        parse_fields(buffer[start + size:end].decode("latin-1").split("\r\n")[:-1])
        del buffer[start + size:end + 2], buffer[length:start]
        length += size
    return length, size != 0


def read_body(head: Head, body: bytes) -> Dict[str, Any]:
    """The JSON object that a request brings: its body, or what Authorization: Bearer stands for where there is none (RFC 6750 section 2.1).

    Problem 415: the body is declared as anything but JSON in UTF-8. Accept-Encoding in it is for codings alone (RFC 9110 section 12.5.3).
    """
    if not body:
        scheme, _, token = head.headers.get("authorization", "").partition(" ")
        return {"peerId": token.strip(" \t").encode("latin-1").decode("utf-8", "replace")} if scheme.lower() == "bearer" else {}
    coding, media_type = head.headers.get("content-encoding", "identity").lower(), head.headers.get("content-type", "application/json").lower()
    insist(coding == "identity", "the body must not be compressed; leave out Content-Encoding", status=415, headers={"Accept-Encoding": "identity"})
    accept = {"Accept-Patch" if head.method == "PATCH" else "Accept": "application/json"}       # RFC 5789 section 2.2
    insist(JSON_TYPE.fullmatch(media_type), "the body must be JSON in UTF-8: set Content-Type: application/json", status=415, headers=accept)
    return parse_body(body)


# ---- HTTP: connections ----------------------------------------------------------------------------------------------

# For what of its socket a connection waits.
READ, WRITE, NOTHING = selectors.EVENT_READ, selectors.EVENT_WRITE, 0
Steps = Generator[int, None, Any]       # of a connection: it yields one of these where it must wait, and goes on when it is called again


class Gone(Exception):
    """The client has ended the connection, or is silent for too long."""


class Tls:
    """TLS of one connection. It knows no socket: bytes go through memory, so that no call works on more of them than it is given. at_end is called
    when the client says that no more comes."""

    def __init__(self, context: ssl.SSLContext, at_end: Callable[[], None]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)      # whose read() does the handshake
        self._silent, self._at_end = 0, at_end      # bytes of TLS since the last plaintext

    def decrypt(self, data: bytes) -> Optional[bytes]:
        """Plaintext, None where data holds none, nothing at the end of the stream. OSError: no TLS, or too much without plaintext."""
        self._silent += len(data)
        insist(self._silent <= MAX_CIPHERTEXT, "the client sends TLS without any data", OSError)
        self._incoming.write(data)
        plaintext = b""
        try:
            for piece in iter(functools.partial(self._tls.read, READ_SIZE), b""):
                plaintext += piece
            self._at_end()
        except ssl.SSLWantReadError:
            if data and not plaintext:
                return None
        self._silent = 0
        return plaintext

    def records(self, data: bytes) -> Iterator[bytes]:
        """What to send: what TLS itself has to say, and data, a record at a time, because the memory that TLS has used once stays its own."""
        yield self._outgoing.read()
        for start in range(0, len(data), READ_SIZE):
            self._tls.write(data[start:start + READ_SIZE])
            yield self._outgoing.read()

    def end(self) -> bytes:
        """What to send last: close_notify (RFC 8446 section 6.1)."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        return self._outgoing.read()


# ---- HTTP: handler --------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)
def head_text(now: int, status: int, cors_origin: str, fields: Tuple[Tuple[str, str], ...]) -> str:
    """The head of an answer, but for its last lines, which tell of the body: with what all have, and fields. now: seconds since 1970."""
    usual = {"Server": Handler.server_version, "Date": email.utils.formatdate(now, usegmt=True), "X-Content-Type-Options": "nosniff"}
    if cors_origin:     # of a list of origins, send_answer() names the one that asks
        usual.update({"Vary": "Origin"} if "," in cors_origin else {"Access-Control-Allow-Origin": cors_origin})
        usual["Access-Control-Expose-Headers"] = "ETag, Location, Preference-Applied, Retry-After"
    lines = [f"{name}: {value}\r\n" for name, value in {**usual, "Cache-Control": "no-store", **dict(fields)}.items()]
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{''.join(lines)}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Its life is the generator serve(), which never blocks: where it must wait it yields, and the server calls handle() again when
    its socket is ready, it is woken, or its deadline passes. One thread at a time does."""

    protocol_version, server_version, sys_version = "HTTP/1.1", f"p2pserver/{__version__}", ""
    # Parts of the head by the names of the base class.
    command: Any = property(lambda self: self.head.method)
    path: Any = property(lambda self: self.head.target)
    headers: Any = property(lambda self: self.head.headers)
    fileno: Any = property(lambda self: self.request.fileno)        # what the selector asks for
    server: Server

    def setup(self) -> None:
        self.request.setblocking(False)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.tls: Optional[Tls] = None
        self.peer = client_of(self.client_address[0])                   # the other end
        self.is_proxy = self.peer.address in self.server.settings.proxies   # the other end is a trusted proxy
        self.counted: Any = None                            # the client key that it counts for; None: it counts for nobody
        self.buffer = bytearray()                           # received, not parsed yet
        self.forget_request()
        self.problem: Optional[Problem] = None              # for which it is refused, and read on for a moment before it closes
        # Of what it waits for. Under TLS the first is the handshake.
        self.deadline = time.monotonic() + (REQUEST_TIME if self.server.tls else self.server.settings.idle_timeout)
        self.steps = self.serve()
        # These are the server's, see there.
        self.events: Optional[int] = None                   # for what it waits, where it is parked
        self.watched, self.is_woken = NOTHING, False        # what the selector tells of; there is news, which has not been looked at

    def handle(self) -> None:
        """Serve the connection until it is parked or closed."""
        server, self.is_woken = self.server, False
        try:
            self.events = next(self.steps)
            (server.look_at if server.tls else server.watch)(self)
            return
        except (StopIteration, Gone):
            pass
        except OSError as error:        # the client has gone, which is no fault of ours
            log.debug("a connection was lost: %s", error)
        except Exception:
            server.handle_error(self, self.client_address)
        server.close(self)

    def finish(self) -> None:
        """Nothing: the connection goes on, or the server closes it."""

    def forget_request(self) -> None:
        """Begin with the next request, of which nothing is known yet."""
        self.reads = 0                                      # that it took
        self.client = self.peer                             # who asks, perhaps through a proxy
        self.head, self.body = NO_HEAD, b""
        self.route: Optional[Route] = None                  # what serves it
        self.registry = self.server.registry.for_request()  # what it asks
        self.fields: Dict[str, Any] = {}                    # what the registry is given of its body; once it has waited, "after" alone
        self.waiter: Optional[Waiter] = None                # while it waits for news

    @property
    def is_late(self) -> bool:
        """Whether what the connection waits for has not come in time."""
        return time.monotonic() >= self.deadline

    def serve(self) -> Steps:
        """The life of the connection. Gone. OSError."""
        self.server.admit(self)
        if self.server.tls:
            yield READ          # nothing of it is done in the thread that accepts
            if not self.request.recv(1, socket.MSG_PEEK).isalpha():     # no message of TLS begins so
                self.tls = Tls(self.server.tls, functools.partial(self.request.shutdown, socket.SHUT_RD))      # then the socket, too, is at its end
        while True:
            yield from self.send_answer((yield from self.answer()))     # no variable holds the answer while the connection is idle
            if self.close_connection:
                break
            if not self.buffer:
                yield READ
        if self.problem or self.buffer:     # to close with bytes unread would reset the connection, and the answer could be lost (RFC 9112 section 9.6)
            self.end_tls()
            self.request.shutdown(socket.SHUT_WR)
            while self.read() != b"" and not self.is_late:
                yield READ

    # Reading a request.

    def parse_request(self) -> Steps:  # type: ignore[override]
        """Take a whole request from the buffer, as it comes. Problem. Gone."""
        buffer, scanned, end = self.buffer, 0, -1
        while end < 0:
            if scanned == len(buffer):
                yield from self.receive()
            while buffer.startswith(b"\r\n"):      # RFC 9112 section 2.2: empty lines before the request line are ignored
                del buffer[:2]
                if not buffer:
                    self.deadline = time.monotonic() + self.server.settings.idle_timeout
            end = find_head(buffer, scanned)
            scanned = len(buffer)
        head = self.head = read_head(bytes(buffer[:end]))
        del buffer[:end + 4]
        self.client = client_behind(self.peer, head.headers, self.server.settings.proxies)
        if self.is_proxy and self.client is not self.peer:
            self.server.count(self, self.client.key)    # until it is answered
        limit = self.server.settings.max_body * (POLL_FACTOR if head.path == POLL_PATH else 1)
        insist(head.length <= limit, f"the body has more than {limit} bytes", status=413)
        length, is_chunked = head.length, head.is_chunked
        if length + is_chunked > len(buffer) and head.version > "1.0" and "expect" in head.headers:
            yield from self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if is_chunked:
                size = len(buffer)
                length, is_chunked = decode_chunks(buffer, length, limit)
                self.server.limiter.charge(self.client.key, (size - len(buffer)) // BYTES_PER_READ)     # many small chunks are work, too
            if not is_chunked and len(buffer) >= length:
                break
            yield from self.receive()
        self.body, self.reads = bytes(buffer[:length]), 0       # what comes while it waits is counted anew
        del buffer[:length]

    def receive(self) -> Steps:
        """Wait for more of a request. Problem: it does not come to its end. Gone: no further one comes."""
        data = None if self.reads else self.read()      # most clients send as soon as they connect; before a further read others have their turn
        while data is None and not self.is_late:
            yield from self.send(b"")       # nothing, or under TLS what that has to say
            yield READ
            data = self.read()
            if self.reads > FREE_READS + len(self.buffer) // BYTES_PER_READ and not self.is_proxy:
                self.server.charge(self.peer)       # many small pieces are work
        if not self.buffer and self.head is NO_HEAD:
            self.deadline = time.monotonic() + REQUEST_TIME
            insist(data, "no further request comes", Gone)
        if not data:
            raise Problem("the request ended early, or did not come in time", 503 if self.server.stopping else 408 if self.is_late else 400)
        self.buffer += data
        insist(self.tls or not self.server.tls, "this port speaks TLS: use https://")

    def read_ahead(self) -> None:
        """Read what comes while a poll or start waits: the next request. Gone."""
        data = self.read()
        is_good = data != b"" and len(self.buffer) <= MAX_HEAD and self.reads <= 2 * FREE_READS + len(self.buffer) // BYTES_PER_READ
        insist(is_good, "it ends, or sends too much while its poll or start waits", Gone)
        self.buffer += data or b""

    def read(self) -> Optional[bytes]:
        """What has come; nothing at the end of the stream. None: nothing has come, or TLS alone, which is work, too."""
        try:
            data: bytes = self.request.recv(READ_SIZE)
        except BlockingIOError:
            return None
        self.reads += 1
        return self.tls.decrypt(data) if self.tls else data

    # Answering it.

    def answer(self) -> Steps:
        """Receive a request, and find the answer to it, or to what is wrong with it. Gone. OSError."""
        try:
            if not self.problem:
                yield from self.parse_request()
        except Problem as problem:
            self.problem = problem
            line = REQUEST_LINE.match(self.buffer.decode("latin-1"))
            if line and self.head is NO_HEAD:
                self.head = Head(line[1], line[2], path_of(line[2]))
        outcome = self.outcome_of(self.begin)
        while not isinstance(outcome, Answer):
            if outcome:     # a Waiter: of its fields, and of what the registry has answered, nothing is kept, of its head little
                self.registry, self.fields, self.waiter = self.server.registry, {}, outcome
                self.head = self.head._replace(target=self.path[:200], headers={"origin": self.headers.get("origin", "")[:200]})
                yield READ
                self.read_ahead()
                self.registry = self.server.registry.forget_waiter(outcome)
                self.name, self.fields = outcome.name, {"after": outcome.after}
            else:           # the registry's answer will wake it
                yield NOTHING
            outcome = self.outcome_of(self.perform)
        if (self.server.queue or self.buffer) and not self.waiter:
            # Others have their turn: where the next request came with this one, and a host that this one has woken, because else its guest's first
            # datagram may reach it before it knows the guest. More that comes meanwhile gives this connection no further turn.
            self.server.wake(self)
            yield NOTHING if self.buffer else READ
        return outcome

    def outcome_of(self, step: Callable[[], Outcome]) -> Optional[Outcome]:
        """What a step comes to, or the answer that stands for its failure. None: the registry answers later, and then wakes the connection."""
        try:
            return step()
        except Problem as problem:
            if problem.limit == "rate" and not self.is_proxy:       # a proxy's connection is for others as well
                self.problem = problem
            return self.answer_to(problem)
        except Later as later:
            later.send(functools.partial(self.server.wake, self))
            return None
        except Exception:
            log.exception("a request failed")
            return self.answer_to(Problem("the server failed to answer this request; its log says why", 500))

    def begin(self) -> Outcome:
        """Find the route, check the fields, and perform the request for the first time. Problem: what is wrong."""
        server, head = self.server, self.head
        # The rate is not for monitors. A proxy does not pay for what cannot be read, which may be anybody's.
        if head.path != HEALTH_PATH and not (self.problem and self.is_proxy and self.client is self.peer):
            server.charge(self.client)
        if self.problem:
            raise self.problem
        if head.method == "OPTIONS":
            return self.options(set().union(*ROUTES.values()) if head.target == "*" else resolve(head.path)[0])
        self.routes, name = resolve(head.path)
        self.route = self.routes.get("GET" if head.method == "HEAD" else head.method)
        if self.route is None:
            raise Problem(f"this method is not for this path, which takes {allowed(self.routes)}", 405, headers={"Allow": allowed(self.routes)})
        self.digest, self.fields = self.read_fields(self.route) if self.route.fields else (b"", {})
        self.name = name or self.fields.pop("name", "")         # of the game; where the path tells it, the field is its new name
        self.wait = wished_wait(self.fields.pop("wait", None), head.headers, server.settings.max_wait)
        self.deadline = time.monotonic() + self.wait
        return self.perform()

    def perform(self) -> Outcome:
        """What the endpoint comes to, or the answer 304. Problem 412: a precondition does not hold (RFC 9110 section 13.2.2). It is compared with
        what GET gives now, whose own Problem goes first; where there is no GET, nothing matches."""
        assert self.route
        head = self.head
        match, none_match = head.headers.get("if-match"), head.headers.get("if-none-match", "")
        if match is None and not none_match:
            return self.route.endpoint(self)
        current: Any = self.routes["GET"].endpoint(self) if "GET" in self.routes else Answer(404)
        tags = {"*", current.headers.get("ETag")} if current.body else set()
        is_wanted = match is None or tags & set(match.replace(",", " ").split())
        is_known = tags & set(none_match.replace("W/", "").replace(",", " ").split())
        insist(is_wanted and (head.method in ("GET", "HEAD") or not is_known), "If-Match or If-None-Match does not hold", status=412)
        return Answer(304, None, current.headers) if is_known else self.route.endpoint(self)

    def read_fields(self, route: Route) -> Tuple[bytes, Dict[str, Any]]:
        """The digest of the peerId, and the other fields that are given. They are kept by the digest of the body: clients send the same one again."""
        server, headers, body = self.server, self.head.headers, self.body
        self.body = b""     # which holds the peerId
        is_local, peer_digest = self.client.is_local, server.registry.peer_digest
        declared = f"{headers.get('content-type')!r} {headers.get('content-encoding')!r}"
        key = (route.endpoint, is_local, peer_digest(declared + body.decode("latin-1")))
        found = server.known_bodies.get(key) if body else None
        if found is None:
            fields = validate(read_body(self.head, body), route.fields, Scope(is_local, server.settings.max_guests))
            found = peer_digest(fields.pop("peerId")), {name: value for name, value in fields.items() if value is not None}
            if 0 < len(body) <= MAX_KNOWN_BODY and not {"replies", "dismiss"} & found[1].keys():     # of many small ones much is kept
                server.known_bodies[key] = found
            if len(server.known_bodies) > MAX_KNOWN_BODIES:
                server.known_bodies.popitem(last=False)
        return found[0], {**found[1]}       # from which more is taken

    @property
    def wake(self) -> Wake:
        """What to call when there is news for this connection. None: it is to be answered now."""
        is_over = not self.wait or self.server.stopping or self.waiter and (self.waiter.is_over or self.is_late)
        return None if is_over else functools.partial(self.server.wake, self)

    def answer_to(self, problem: Problem) -> Answer:
        """RFC 9457. The type about:blank says that the status tells the kind, whose phrase then is the title (section 4.2.1)."""
        server, headers = self.server, dict(problem.headers)
        if problem.limit:
            server.tally(REFUSED, problem.limit)
        if problem.status in (403, 409):        # to register somebody's game is to guess, too
            server.limiter.charge(self.client.key, FORBIDDEN_COST - 1)
        if problem.status in (429, 503):
            headers.setdefault("Retry-After", str(RESTARTED_AFTER if server.stopping else RETRY_AFTER))
        body = {"type": "about:blank", "title": http.HTTPStatus(problem.status).phrase, "status": problem.status, "detail": problem.detail}
        text = json_text({**body, "errors": problem.errors} if problem.errors else body)
        return Answer(problem.status, text + b"\n", headers, "application/problem+json")

    def options(self, methods: Iterable[str]) -> Answer:
        """What a path takes. To a web page's preflight also that it may (https://fetch.spec.whatwg.org/#http-cors-protocol)."""
        headers = {"Allow": allowed(methods), **({"Accept-Patch": "application/json"} if "PATCH" in methods else {})}      # RFC 5789 section 3.1
        if self.server.settings.cors_origin and "access-control-request-method" in self.headers:
            wished = self.headers.get("access-control-request-headers", "Authorization, Content-Type, If-None-Match, Prefer")[:1000]
            headers.update({"Access-Control-Allow-Methods": headers["Allow"], "Access-Control-Max-Age": "86400", "Access-Control-Allow-Headers": wished})
        return Answer(204, None, headers)

    def send_answer(self, answer: Answer) -> Steps:
        """Send an answer. The request is forgotten then, and the time for what comes next begins."""
        server, data, fields, cors_origin = self.server, answer.body or b"", dict(answer.headers), self.server.settings.cors_origin
        self.close_connection = self.head.closes or server.stopping or self.problem is not None
        if self.close_connection or self.head.version == "1.0":
            fields["Connection"] = "close" if self.close_connection else "keep-alive"
        if "," in cors_origin and self.headers.get("origin") in server.settings.origins:
            fields["Access-Control-Allow-Origin"] = self.headers["origin"]
        text = head_text(int(time.time()), answer.status, cors_origin, tuple(fields.items()))
        content = "" if answer.body is None else f"Content-Type: {answer.media_type}\r\nContent-Length: {len(data)}\r\n"
        head = f"{text}{content}\r\n".encode("latin-1")
        self.log_request(answer.status, len(data))
        if len(data) >= BYTES_PER_TOKEN:
            server.limiter.charge(self.client.key, len(data) // BYTES_PER_TOKEN)
        if self.head.method == "HEAD":      # it pays as GET does, as the list may have been made for it
            data = b""
        if self.is_proxy:
            server.count(self, None)
        self.forget_request()
        for piece in (head, data) if len(data) >= BYTES_PER_TOKEN else (head + data,):      # connections share a long list
            yield from self.send(piece)
        self.deadline = time.monotonic() + (LINGER_TIME if self.close_connection else REQUEST_TIME if self.buffer else server.settings.idle_timeout)

    def send(self, data: bytes) -> Steps:
        """Send bytes, as fast as the client reads them. Gone: it does not."""
        for piece in self.tls.records(data) if self.tls else (data,):
            unsent = memoryview(piece)
            while unsent:
                try:
                    unsent = unsent[self.request.send(unsent):]
                except BlockingIOError:
                    self.deadline = time.monotonic() + SEND_TIME
                    yield WRITE
                    insist(not self.is_late, "the client does not read", Gone)

    def end_tls(self) -> None:
        """Say that no more is sent. What still comes is not decrypted."""
        if self.tls:
            with contextlib.suppress(OSError):
                self.request.send(self.tls.end())
            self.tls = None

    def log_request(self, code: Union[int, str] = "-", size: Union[int, str] = "-") -> None:
        """Count an answer, and log it where --access-log is. Without the query, which is none of this server's and could hold anything."""
        self.server.tally(REQUESTS, self.route.endpoint.__name__ if self.route else "none", code)
        if self.server.settings.access_log:
            log_fields("{client} {method} {path!r} {status} {bytes}", [{"client": self.client.address or "unknown", "method": self.command,
                                                                        "path": self.path.partition("?")[0], "status": code, "bytes": size}])


# ---- HTTP: the server -----------------------------------------------------------------------------------------------

class CannotStart(SystemExit):
    """Why the server cannot start, in words that help. Python prints them and ends with status 1, where nobody catches it."""


class Server(http.server.ThreadingHTTPServer):
    """The HTTP server around a registry, with the STUN server beside it. The constructor binds, start() serves, stop() ends.

    CannotStart: a port is in use or not permitted, the address is not this machine's, or the certificate is no good.
    """

    request_queue_size = 1024

    def __init__(self, settings: Settings, registry: Optional[GameRegistry] = None) -> None:
        self.settings = settings
        self.registry: GameRegistry = registry or Registry(settings, cursor=time.time_ns() // 100_000)
        self.stopping = False
        self.tls = load_certificate(settings)
        self.limiter = RateLimiter(settings.rate, settings.burst)
        self.refusals = RateLimiter(settings.rate, MAX_REFUSALS)        # how many times a client without tokens gets a 429
        self.began = time.monotonic()
        self.known_bodies: collections.OrderedDict[Any, Tuple[bytes, Dict[str, Any]]] = collections.OrderedDict()   # what has been found in bodies
        self.threads = threading.BoundedSemaphore(settings.max_threads)      # that serve connections under TLS
        self.go_on = self.start_thread if self.tls else Handler.handle      # with a parked connection
        # The lock guards the counters, which several threads change. Sets and deques are safe without it.
        self._lock = threading.Lock()
        self.counters: collections.Counter[Tuple[str, Any]] = collections.Counter()     # by name and values of the labels, see tally()
        self._logged = self.counters.copy()     # as they were when the log told of refusals
        self._connections_of: collections.Counter[Any] = collections.Counter()      # how many count for each client
        self.connections: Set[Handler] = set()
        self.queue: collections.deque[Handler] = collections.deque()     # that have been parked or woken, to be looked at
        self.next_look, self.next_report = 0.0, self.began + REPORT_EVERY
        self._running: List[threading.Thread] = []
        socketserver.BaseServer.__init__(self, (settings.host, settings.port), Handler)     # TCPServer's would listen on one address alone
        self.server_port = 0
        self.listeners: List[socket.socket] = []        # one for each address of the host
        self.stuns: List[StunServer] = []               # likewise
        self.selector = selectors.DefaultSelector()     # what it finds ready is passed to the function that it is registered with
        self._waker, self._wakened = socket.socketpair()        # a byte through these ends the selector's wait
        self._waker.setblocking(False)
        self.selector.register(self._wakened, READ, lambda wakened: wakened.recv(65536))
        self.socket = self._waker       # what serve_forever() watches: nothing ever comes there, and it does service_actions() again and again
        self._bind()
        ports = collections.Counter([stun.server_address[1] for stun in self.stuns])
        self.stun_ports = [port for port, count in ports.items() if count == len(self.listeners)]      # that all addresses have

    def _bind(self) -> None:
        """Listen on each address of the host, everywhere on one port for TCP and one for UDP, and on a second one for UDP where that can be used."""
        settings, limiter, dualstack = self.settings, RateLimiter(self.settings.stun_rate, STUN_BURST), socket.has_dualstack_ipv6()
        host = settings.host or ("::" if dualstack else "0.0.0.0")     # looked up as bytes: as text, what is no name is a UnicodeError
        kind, port = "TCP", settings.port
        try:
            for family, address in dict.fromkeys([(row[0], row[4]) for row in socket.getaddrinfo(host.encode(), None, type=socket.SOCK_STREAM)]):
                kind, port = "TCP", self.server_port or settings.port
                listener = socket.create_server((address[0], port, *address[2:]), family=family, dualstack_ipv6=dualstack and address[0] == "::",
                                                backlog=self.request_queue_size)
                listener.setblocking(False)
                self.listeners.append(listener)
                self.selector.register(listener, READ, self.accept_clients)
                self.server_port = listener.getsockname()[1]
                kind, port = "UDP", settings.stun_port or self.server_port
                if not settings.no_stun:
                    self.stuns.append(StunServer(family, (address[0], port, *address[2:]), limiter, self.tally))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or not self.listeners:    # else it has no IPv6, say: such addresses come last (RFC 6724 section 6)
                self.server_close()
                raise CannotStart(f"{kind} port {port} of {host} cannot be used: {error.strerror}; look at --host, --port and --stun-port") from None
        # A client that asks two ports sees whether its router maps by destination. The second has a limiter of its own, because clients ask both.
        first_port = settings.stun_port or settings.port        # 0: the system picks it, and the second one
        port, limiter = settings.second_stun_port or (first_port + 1 if first_port else 0), RateLimiter(settings.stun_rate, STUN_BURST)
        try:
            for stun in list(self.stuns):
                self.stuns.append(StunServer(stun.address_family, (stun.server_address[0], port, *stun.server_address[2:]), limiter, self.tally))
                port = self.stuns[-1].server_address[1]
        except (OSError, OverflowError) as error:
            log.warning("UDP port %d cannot be used for STUN too, so that clients cannot tell the kind of their NAT: %s", port, error)

    def server_close(self) -> None:
        self.selector.close()
        for each in (self._waker, self._wakened, *self.listeners, *[stun.socket for stun in self.stuns]):
            each.close()

    @property
    def where(self) -> str:
        """What listens where, for a person."""
        scheme = "https" if self.tls else "http"
        ports = " and ".join(map(str, self.stun_ports))
        stun = f"STUN on UDP port{'s' if len(self.stun_ports) > 1 else ''} {ports}" if self.stuns else "no STUN"
        hosts = [listener.getsockname()[0] for listener in self.listeners] if self.settings.host else ["localhost"]
        urls = [f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.server_port}/" for host in hosts]
        versions = "addresses, IPv6 and IPv4" if self.listeners[0].family == socket.AF_INET6 else "IPv4 addresses"
        return " and ".join([*urls, stun]) + ("" if self.settings.host else f" (all {versions})")

    def start(self) -> None:
        """Serve in threads of its own, and return."""
        self._running = [threading.Thread(target=each.serve_forever, args=(0.0 if each is self else 0.1,), daemon=True) for each in (self, *self.stuns)]
        for thread in self._running:
            thread.start()

    def stop(self, grace: float = 0.6) -> None:
        """Let the requests that come within grace (seconds) be answered, and close."""
        if self.stopping:
            return
        self.stopping = True
        for server in (self, *self.stuns) if self._running else ():
            server.shutdown()
        for _ in range(2):      # clients that have connected, and perhaps asked or begun a TLS handshake, are still served
            self.serve_ready(0.0)
        ends_at = time.monotonic() + grace
        while self.connections and (time.monotonic() < ends_at + 0.1 or any(each.events == NOTHING for each in list(self.connections))):
            for connection in list(self.connections):       # what neither arrives nor is sent has no time any more
                is_arriving = connection.buffer or connection.reads and not connection.waiter       # or its handshake is
                connection.deadline = min(connection.deadline, 0.0 if connection.events == READ and not is_arriving else ends_at)
            self.serve_late()
            self.serve_ready(0.05)
        for _ in range(self.settings.max_threads):      # each ends its burst
            self.threads.acquire(timeout=grace)
        for connection in list(self.connections):
            self.close(connection)
        self.server_close()
        self.log_events()
        self.log_refusals()

    def service_actions(self) -> None:
        """Called by serve_forever() again and again: serve for a tenth of a second, then do what is due."""
        ends_at = time.monotonic() + 0.1
        try:
            while time.monotonic() < ends_at:
                self.serve_ready(0.1)
            if time.monotonic() >= self.next_look:
                self.serve_late()
            self.registry.expire_games()
            self.log_events()
            if time.monotonic() >= self.next_report:
                self.log_refusals()
        except Exception:
            log.exception("the server failed in one thing, and goes on")

    def renew_certificate(self) -> None:
        """Have new connections use the certificate as its file is now."""
        try:
            self.tls = load_certificate(self.settings)
            log.info("the certificate was loaded anew" if self.tls else "SIGHUP is ignored: without --tls-cert there is no certificate to load anew")
        except CannotStart as reason:
            log.error("%s; the old one stays in use", reason)

    def log_events(self) -> None:
        """Log what has happened to games, and at the level debug the client key of the guest or host that it is about."""
        lines, is_debugging = [], log.isEnabledFor(logging.DEBUG)
        while self.registry.events:
            operation, name, detail, key = self.registry.events.popleft()
            # The first address of a /56; :: for an unknown client.
            client = {"client": str(ipaddress.ip_address(key if len(key) == 4 else key.ljust(16, b"\0")))} if is_debugging else {}
            lines.append({"operation": operation, "name": name, "detail": detail, **client})
        log_fields("{client} " * is_debugging + "{operation} {name!r} {detail}", lines)

    def log_refusals(self) -> None:
        """Log how often each limit has been reached since the last time."""
        self.next_report = time.monotonic() + REPORT_EVERY
        counters = self.counters.copy()
        lately = sorted((counters - self._logged).items())
        log_fields("limit {limit}: {count} refused", [{"limit": labels[0], "count": count} for (name, labels), count in lately if name == REFUSED])
        self._logged = counters

    # A new connection.

    def accept_clients(self, listener: socket.socket) -> None:
        """Accept new clients, but not too many before existing connections have their turn."""
        try:
            for _ in range(self.request_queue_size if self.stopping else ACCEPTED_AT_ONCE):
                self.finish_request(*listener.accept())     # this makes a Handler
        except OSError as error:        # there are no more, or this one has gone already
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.tally(REFUSED, "files")
                time.sleep(0.01)    # the client stays in the backlog; to accept it again at once would be to spin

    def admit(self, connection: Handler) -> None:
        """Refuse a new connection over a limit. Gone: it is not told so, because under TLS a handshake would come first, or many have been told."""
        client, is_proxy = connection.peer, connection.is_proxy
        self.connections.add(connection)
        excess = len(self.connections) - self.settings.max_connections
        is_over = self.limiter.pause(client.key) and self.refusals.pause(client.key) and not is_proxy
        try:
            insist(excess <= 0, "there are too many connections", Full, limit="connections")
            if is_over or self.tls and not is_proxy:        # a handshake costs a token, as a request does
                self.charge(client)
            self.count(connection, None if is_proxy else client.key)
        except Full as problem:
            connection.problem = problem
            if self.tls or is_over or excess > MAX_REFUSALS:
                self.tally(REFUSED, problem.limit)
                raise Gone from None

    def count(self, connection: Handler, key: Optional[bytes]) -> None:
        """Have a connection count for a client; None: for nobody. TooMany: the client has max_connections_per_client, and this one until it ends."""
        with self._lock:
            count_down(self._connections_of, connection.counted)
            connection.counted = key
            self._connections_of[key] += 1
            is_over = key is not None and self._connections_of[key] > self.settings.max_connections_per_client
        insist(not is_over, "there are too many connections from your address", TooMany, limit="connections_per_client")

    # Connections that wait. A connection is served by a thread, or parked, and then the selector watches it for its events. The selector is for the
    # serving thread alone: a thread that parks a connection under TLS, or wakes one, puts it into the queue. A woken one is served once it is parked.

    def serve_ready(self, seconds: float) -> None:
        """Wait for something at most so long, and serve what there is something for."""
        for key, _ in self.selector.select(0.0 if self.queue else seconds):
            key.data(key.fileobj)
        for _ in range(len(self.queue)):        # what these add waits for the next turn
            connection = self.queue.popleft()
            if connection.events is not None:   # else it is woken early, and looked at when it is parked
                (self.go_on if connection.is_woken else self.watch)(connection)

    def serve_late(self) -> None:
        """Serve connections whose deadline has passed. One that waits for the store has none: its answer, or its failure, always comes."""
        now = time.monotonic()
        self.next_look = now + len(self.connections) / LOOKS_PER_SECOND
        for connection in [each for each in list(self.connections) if each.deadline <= now and each.events]:
            self.go_on(connection)

    def start_thread(self, connection: Handler) -> None:
        """Serve a parked connection in a thread of the base class's, once there are fewer than max_threads, none of which waits for its client."""
        connection.events = None
        self.watch(connection)
        self.threads.acquire()
        try:
            self.process_request(connection, connection.client_address)  # type: ignore[arg-type]
        except RuntimeError:       # the system gives no thread
            self.threads.release()
            self.tally(REFUSED, "threads")
            self.close(connection)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.handle()
        finally:
            self.threads.release()

    def watch(self, connection: Handler) -> None:
        """Have the selector tell when there is something for a connection, if it is parked."""
        events = connection.events or NOTHING
        if events != connection.watched:
            if connection.watched:
                self.selector.unregister(connection)
            if events:
                self.selector.register(connection, events, self.go_on)
            connection.watched = events

    # What any thread may call.

    def charge(self, client: Client) -> None:
        """Take a token of the client's. TooMany: it has none."""
        pause = self.limiter.acquire(client.key)
        if pause:
            self.refusals.acquire(client.key)
            raise TooMany("too many requests come from your address", limit="rate", headers={"Retry-After": str(math.ceil(pause))})

    def tally(self, counter: str, *labels: Any) -> None:
        """Count one more: counter is REQUESTS, REFUSED or STUN, whose labels have these values."""
        with self._lock:
            self.counters[counter, labels] += 1

    def wake(self, connection: Handler) -> None:
        """Have a connection served that waits for news, or will in a moment."""
        connection.is_woken = True
        self.look_at(connection)

    def look_at(self, connection: Handler) -> None:
        self.queue.append(connection)
        if threading.current_thread() not in self._running:
            with contextlib.suppress(BlockingIOError):      # so many bytes end the wait as well
                self._waker.send(b".")

    def close(self, connection: Handler) -> None:
        """End a connection that no thread serves."""
        if connection.waiter:
            self.registry.forget_waiter(connection.waiter)
        self.count(connection, None)
        self.connections.discard(connection)
        connection.events = None
        self.watch(connection)
        connection.end_tls()
        self.shutdown_request(connection.request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")        # which ends, and the server goes on


def load_certificate(settings: Settings) -> Optional[ssl.SSLContext]:
    """What new connections use, as --tls-cert and --tls-key are now; None without TLS. CannotStart: they are no good."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")      # of TLS 1.2: none with CBC; those of TLS 1.3 are as they are
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    certificate, key = settings.tls_cert, settings.tls_key or settings.tls_cert
    try:
        for path, kind in ((certificate, "CERTIFICATE"), (key, "PRIVATE KEY")):
            with open(path, encoding="latin-1") as file:
                text = file.read()
            insist(f"{kind}-----" in text, f"there is no {kind} in {path} as PEM")     # of OpenSSL's own errors few say what is wrong
        insist("ENCRYPTED" not in text, f"the key in {path} is encrypted, and nobody is there to type its password")
        context.load_cert_chain(certificate, key, password="")      # without a password it would ask for one on the terminal
    except (OSError, ValueError) as error:
        raise CannotStart(f"the certificate {certificate} with the key {key} cannot be used: {error}; look at --tls-cert and --tls-key") from None
    return context


# ---- log ------------------------------------------------------------------------------------------------------------

def start_log(level: str, formatter: logging.Formatter) -> queue.Queue[Any]:
    """Have a thread write the log, so that nobody waits for a disk or a pipe. The queue of what it has yet to write.

    A line for which there is no room in that, or none where it is written, is lost.
    """
    lines: queue.Queue[Any] = queue.Queue(LOG_LINES)
    writer = logging.StreamHandler()
    writer.setFormatter(formatter)
    logging.handlers.QueueListener(lines, writer).start()
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[logging.handlers.QueueHandler(lines)])
    logging.raiseExceptions = False     # else the thread that logs would write of it to the standard error itself
    return lines


def log_fields(text: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Log lines of this text, one for each of these fields. All are one record, as to hand over one costs more than to write a line.

    Names are quoted as Python does it, so that none can forge a line or steer a terminal.
    """
    if lines:
        log.info(text, extra={"lines": lines})


class TextFormatter(logging.Formatter):
    """Each line a text, whose time is that of ISO 8601 with the offset from UTC."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        lines = [(record.msg.format_map(fields).rstrip(), fields) for fields in getattr(record, "lines", ())] or [(super().format(record), {})]
        return "\n".join([self.line(when, record.levelname, message, fields) for message, fields in lines])

    def line(self, when: str, level: str, message: str, fields: Mapping[str, Any]) -> str:
        return f"{when} {level} {message}"


class JsonFormatter(TextFormatter):
    """Each line an object: {time, level, message}, and the fields of log_fields() by their names."""

    def line(self, when: str, level: str, message: str, fields: Mapping[str, Any]) -> str:
        return json.dumps({"time": when, "level": level.lower(), "message": message, **fields})     # in ASCII, so that no name can steer a terminal


# ---- command line ---------------------------------------------------------------------------------------------------

def ignored_variables(environment: Mapping[str, str]) -> Dict[str, str]:
    """Variables that look like an option's and are none, each with what helps."""
    known = [*[option.variable for option in OPTIONS], "P2P_STORE_SECRET", "P2P_STORE_SECRET_FILE"]
    ignored = [name for name, text in environment.items() if name.startswith("P2P_") and (name not in known or text.startswith("tcp://"))]
    return {name: "Kubernetes sets it for a service named p2p" if environment[name].startswith("tcp://")
            else f"the option with the nearest name is {difflib.get_close_matches(name, known, 1, 0)[0]}" for name in ignored}


def parse_settings(arguments: Optional[List[str]], environment: Mapping[str, str]) -> Settings:
    """The settings from flags, else the environment, else the table. SystemExit 2 with one line if they are no good."""
    parser = argparse.ArgumentParser(prog="p2pserver", description="A rendezvous server: through it two players behind home routers find each other.",
                                     epilog="The environment can set each one: --game-ttl as P2P_GAME_TTL.", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"p2pserver {__version__}")
    given = {"P2P_PORT": environment["PORT"]} if "PORT" in environment else {}      # hosting services say PORT
    given.update({name: text for name, text in environment.items() if not text.startswith("tcp://")})       # see ignored_variables
    for option in OPTIONS:
        text = f"{option.help} (default: {option.default})" if option.default else option.help
        kind: Dict[str, Any] = {"type": int, "nargs": "?", "const": 1} if option.default is False else {"type": type(option.default)}
        parser.add_argument(option.flag, default=given.get(option.variable, option.default), help=text, **kind)
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValueError as fault:
        parser.error(str(fault))


def open_server(settings: Settings) -> Server:
    """A server bound to its ports, with its registry in memory or in the store. CannotStart."""
    registry = None
    if settings.store:
        sys.modules["p2pserver"] = sys.modules[__name__]        # for the imports of redis_registry, even if this is __main__
        try:
            from redis_registry import RedisRegistry
            registry = RedisRegistry(settings)
        except ImportError as error:
            raise CannotStart(f"--store needs redis_registry.py and its library: pip install 'redis>=8.1,<9' ({error})") from None
    for _ in range(0 if settings.port else 9):      # where the system picks the port for TCP, it may be taken for UDP: then it picks again
        with contextlib.suppress(CannotStart):
            return Server(settings, registry)
    return Server(settings, registry)


def allow_many_files() -> None:
    """Raise the number of open files, and so of connections, to what the system allows; it is 1024 by habit."""
    with contextlib.suppress(ImportError, ValueError, OSError):     # ImportError: there is no such limit here
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Where the limit is endless, as on macOS, the system may not allow that much all the same.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 10240, hard))


def watch_signals() -> socket.socket:
    """Have SIGINT, SIGTERM and SIGHUP do nothing but send their numbers, a byte each, to the socket returned, whichever thread takes them."""
    numbers, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):     # Windows has no SIGHUP
        signal.signal(getattr(signal, name), lambda number, frame: None)
    return numbers


def main(arguments: Optional[List[str]] = None) -> None:
    """Serve until SIGINT, SIGTERM, or SIGHUP as the terminal is closed. Any other SIGHUP has the certificate loaded anew. CannotStart."""
    settings = parse_settings(arguments, os.environ)
    formatter = JsonFormatter if settings.log_format == "json" else TextFormatter
    lines = start_log(settings.log_level, formatter())
    for name, advice in ignored_variables(os.environ).items():
        log.warning("%s in the environment is ignored; %s", name, advice)
    allow_many_files()
    sys.setswitchinterval(0.001)    # seconds; while a thread works for TLS, others would wait five times as long for their turn
    server = open_server(settings)
    signals = watch_signals()
    terminal = next(filter(os.isatty, (0, 1, 2)), None)     # under nohup none of the three is one
    server.start()
    line = f"p2pserver {__version__} listens on {server.where}; Ctrl-C ends it"
    with contextlib.suppress(OSError):      # nobody reads it
        print(formatter().format(logging.makeLogRecord({"levelname": "INFO", "msg": line})) if formatter is JsonFormatter else line, flush=True)
    while signals.recv(1)[0] == getattr(signal, "SIGHUP", None) and (terminal is None or os.isatty(terminal)):
        server.renew_certificate()
    server.stop()
    log.info("the server has ended")
    with lines.all_tasks_done:      # half a second for the log to be written
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, 0.5)
    os._exit(0)     # Python's own end would wait for the stream of the log, or fail where its terminal is closed


if __name__ == "__main__":
    main()
