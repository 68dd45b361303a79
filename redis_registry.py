"""The registry of p2pserver in Redis 6.2 or newer, or in Valkey, so that several servers share their games: --store redis://host:6379/0.

It does what p2pserver.Registry does. Each operation is one call of one Lua script: atomic, one round trip, by the store's clock. One
thread sends the calls, as many in one round trip as there are; another reads who is to be woken. Keys, which all begin with p2p:{lobby}:

    cursor, secret      the last version: tenths of milliseconds since 1970, or ahead of that; "<digest>:<hex>", what keys the digests
    names               hash: name -> key of a game, which is the version at which it began: 14 digits
    game:<key>          a game with its guests, as MessagePack; register_game() and start_game() below show what they have
    ends                sorted set: key of a game, or game:digest of a guest -> when it expires, in milliseconds
    lines, list         sorted set: what anybody may know of a listed game, as JSON -> its key; the version of the list
    clients, stored     hash: client -> how many games it has; bytes that games and guests take
    held                hash: key of a game or guest -> "<process>/<random>", the token of who waits for its news
    wake:<process>      stream of tokens that are to be woken; it is there while that server is
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import os
import pathlib
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import redis

import p2pserver
from p2pserver import CannotStart, Full, Later, News, Replies, Session, Settings, Text, Waiter, Wake, log

LUA = r"""
local P, process, deadline, clock, op, a = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], cjson.decode(ARGV[5])
local call, time = redis.call, redis.call('TIME')
local real = time[1] * 1000 + math.floor(time[2] / 1000)
local now, cursor = clock or real, tonumber(call('GET', P .. 'cursor') or 0)      -- milliseconds; the last version
local version = math.max(cursor + 1, time[1] * 10000 + math.floor(time[2] / 100))       -- of what this call changes; grows over a loss of the store
local woken, events = {}, {}                -- tokens of this server; what has happened to games

local function event(operation, name, detail, client) events[#events + 1] = {operation, name, detail, client} end
local function find(list, value, field)     -- an entry by its key, or another field, and where it is
  for i, each in ipairs(list) do if each[field or 'key'] == value then return each, i end end
end
local function newer(list, than)            -- the entries that have changed since
  local found = {}
  for _, each in ipairs(list) do if each.changed > than then found[#found + 1] = each end end
  return found
end
local function check_room(what, count, of_client)
  if count >= limit['max_' .. what] then error({'Full', what, 'there are {} {}, and no more may be', count, what}) end
  if of_client < limit['max_' .. what .. '_per_client'] then return end
  error({'TooMany', what .. '_per_client', 'your address has {} {}, which is all that one may have', of_client, what})
end

local function load(key) return cmsgpack.unpack(call('GET', P .. 'game:' .. (key or '')) or '\192') end      -- \192: nil, as MessagePack
local function find_game(owner)             -- a.name: of a call that waited /key/name
  local key, name = string.match(a.name, '^/(%d+)[^/]*/(.*)$')
  local g = load(key) or load(call('HGET', P .. 'names', name or a.name)) or error({'NotFound', '', 'there is no game {!r}', name or a.name})
  if owner and g.owner ~= owner then error({'Forbidden', '', 'the peerId is not the one that registered this game'}) end
  return g
end
local function line(g)
  return string.format('{"name":%s,"guests":%d,"ready":%s,"info":%s}', cjson.encode(g.name), #g.guests, tostring(g.ready), g.info)
end
local function save(g, is_new)              -- with what follows from it: bytes (bench/store.py measures them), cursor, list
  for _, list in ipairs({g.left, g.dismissed}) do if #list > limit.max_remembered then table.remove(list, 1) end end
  local size = 800 + #g.name + #g.info + #g.addresses + limit.member_size * (#g.left + #g.dismissed)
  for _, guest in ipairs(g.guests) do size = size + 400 + #guest.addresses + (guest.reply and #guest.reply.addresses or 0) end
  local growth, room = size - g.size, limit.max_memory * (is_new and 900000 or 1000000) - (call('GET', P .. 'stored') or 0)
  if growth > 0 and growth > room then error({'Full', 'memory', "the server's memory for games is full"}) end
  g.size = size
  call('MSET', P .. 'game:' .. g.key, cmsgpack.pack(g), P .. 'cursor', version)
  call('INCRBY', P .. 'stored', growth)
  local shown, was = g.listed and line(g) or nil, call('ZRANGEBYSCORE', P .. 'lines', g.key, g.key)[1]
  if shown == was then return end
  call('ZREMRANGEBYSCORE', P .. 'lines', g.key, g.key)
  if shown then call('ZADD', P .. 'lines', g.key, shown) end
  call('SET', P .. 'list', version)
end

local function keep_alive(key) call('ZADD', P .. 'ends', now + 1000 * (string.find(key, ':') and limit.guest_ttl or limit.game_ttl), key) end
local function wake(key, mark)              -- mark: "!": it is to be answered now; "!!": another took its place
  local token = call('HGET', P .. 'held', key)
  if not token then return end
  call('HDEL', P .. 'held', key)
  keep_alive(key)
  local holder = string.match(token, '^[^/]+')
  if holder == process then woken[#woken + 1] = token .. mark
  else call('XADD', P .. 'wake:' .. holder, 'NOMKSTREAM', 'MAXLEN', '~', limit.max_waiting, '*', 'token', token .. mark) end
end
local function wait(key, news, is_busy)     -- the news, with whether it waits for some now, in place of an earlier one
  local is_again = not a.addresses and call('HEXISTS', P .. 'held', key) == 1     -- it makes way for the one that waits
  if not is_again then wake(key, is_busy and '!!' or '!') end
  news.key, news.waits = key, not (is_again or news.has_news) and a.token ~= nil
  if news.waits then call('HSET', P .. 'held', key, a.token) end
  return news
end

local function remove(g, guest, operation)  -- a guest; or the game with its guests, if none is given
  local going = guest and {guest} or g.guests
  if guest then
    version = version + 1
    table.remove(g.guests, select(2, find(g.guests, guest.key)))
    g.left, g.news = newer(g.left, g.told), version
    g.left[#g.left + 1] = {changed = version, id = guest.id}
    if operation == 'dismiss_guest' then g.dismissed[#g.dismissed + 1] = {key = guest.key} end
    save(g)
    wake(g.key, '')
  else
    going[#going + 1] = g
    call('HDEL', P .. 'names', g.name)
    if call('ZREMRANGEBYSCORE', P .. 'lines', g.key, g.key) > 0 then call('SET', P .. 'list', version) end
    if call('HINCRBY', P .. 'clients', g.client, -1) == 0 then call('HDEL', P .. 'clients', g.client) end
    call('INCRBY', P .. 'stored', -g.size)
    call('DEL', P .. 'game:' .. g.key)
    call('SET', P .. 'cursor', version)
  end
  event(operation, g.name, guest and 'guests: ' .. #g.guests or '', (guest or g).client)
  for _, entry in ipairs(going) do
    wake(entry.key, '')
    call('ZREM', P .. 'ends', entry.key)
  end
end

local ops = {}
local function describe(g, is_new)
  g.info = a.info or g.info
  if a.listed ~= nil then g.listed = a.listed end
  save(g, is_new)
end
function ops.register_game()
  local old = load(call('HGET', P .. 'names', a.name))
  if old and old.owner ~= a.digest then error({'Conflict', '', 'the name {!r} is taken', a.name}) end
  if not old then check_room('games', call('HLEN', P .. 'names'), tonumber(call('HGET', P .. 'clients', a.client) or 0)) end
  local g = old or {key = string.format('%.0f', version), name = a.name, owner = a.digest, client = a.client, info = '{}', listed = true,
    addresses = '[]', ready = false, changed = 0, news = version, told = -1, left = {}, dismissed = {}, guests = {}, size = 0}
  describe(g, not old)
  keep_alive(g.key)
  if old then return false end
  call('HSET', P .. 'names', g.name, g.key)
  call('HINCRBY', P .. 'clients', g.client, 1)
  event(op, g.name, '', g.client)
  return true
end
local function since() return a.after and a.after <= cursor and a.after or -1 end       -- the version up to which the caller knows all
function ops.poll_game()
  local g, replies, gone = find_game(a.digest), a.replies or {}, {}
  local told, seen_at, is_first, is_same = g.told, g.seen_at, g.changed == 0, a.addresses == nil or a.addresses == g.addresses
  keep_alive(g.key)
  g.told = a.after and since() or cursor
  if not is_same then g.addresses, g.changed = a.addresses, version end
  if a.replies or not is_same then g.ready = g.addresses ~= '[]' or a.replies ~= nil end
  for _, reply in ipairs(replies) do
    local guest = find(g.guests, reply[1], 'id')
    if not guest then gone[#gone + 1] = reply[1]
    elseif guest.changed <= g.told and reply[2] ~= (guest.reply or {}).addresses then guest.reply = {addresses = reply[2], changed = version} end
  end
  g.seen_at = a.seen_at or g.seen_at
  if a.replies or not is_same or g.seen_at ~= seen_at or g.told ~= told then save(g) end
  if is_first and g.changed > 0 then event(op, g.name, 'first addresses', g.client) end
  for _, guest in ipairs(g.guests) do if (guest.reply or g).changed == version then wake(guest.key, '') end end
  for _, id in ipairs(a.dismiss) do
    local guest = find(g.guests, id, 'id')
    if guest then remove(g, guest, 'dismiss_guest') end
  end
  local guests, left = newer(g.guests, since()), a.after and newer(g.left, since()) or {}
  local news = {name = g.name, peers = guests, cursor = g.news, has_news = #guests + #left + #gone > 0, left = left, gone = gone}
  return wait(g.key, news, is_same and #replies + #a.dismiss == 0)
end
function ops.start_game()
  local g = find_game()
  local key = g.key .. ':' .. a.digest
  if g.owner == a.digest then error({'Conflict', '', 'a host cannot start its own game'}) end
  if find(g.dismissed, key) then error({'Forbidden', '', 'the host of the game {!r} has sent you away', g.name}) end
  local guest, own = find(g.guests, key), 0
  local is_new = not guest
  if is_new then
    if not a.addresses then error({'NotFound', '', 'the session with the game {!r} is gone', g.name}) end
    for _, each in ipairs(g.guests) do own = own + (each.client == a.client and 1 or 0) end
    check_room('guests', #g.guests, own)
    guest = {key = key, id = a.id, session_key = a.session_key, client = a.client, addresses = '', changed = 0}
    g.guests[#g.guests + 1] = guest
  end
  local has_moved = a.addresses and a.addresses ~= guest.addresses
  if has_moved then guest.addresses, guest.reply, guest.changed, g.news = a.addresses, nil, version, version end
  guest.seen_at = a.seen_at or guest.seen_at
  save(g, is_new)
  keep_alive(key)
  if has_moved then wake(g.key, '') end
  if is_new then event(op, g.name, 'guests: ' .. #g.guests, guest.client) end
  local offer = guest.reply or g              -- what the host has for this guest, or for all
  local has_news = offer.addresses ~= '[]' and (is_new or offer.changed > since())        -- a new session is news itself
  local peers = {{id = guest.id, session_key = guest.session_key, addresses = offer.addresses, seen_at = g.seen_at}}
  return wait(key, {name = g.name, peers = peers, cursor = offer.changed, has_news = has_news, left = {}, gone = {}}, not has_moved)
end
function ops.leave_game()
  local g = find_game()
  remove(g, find(g.guests, g.key .. ':' .. a.digest) or error({'NotFound', '', 'this peerId has no session with the game {!r}', g.name}), op)
end
function ops.forget_waiter() if call('HGET', P .. 'held', a.key) == a.token then wake(a.key, '') end end
function ops.list_games()
  local current = tonumber(call('GET', P .. 'list') or 0)
  return {version = current, lines = current ~= a.known and call('ZRANGE', P .. 'lines', 0, -1)}
end
function ops.get_game() return line(find_game()) end
function ops.update_game()
  local g, other = find_game(a.digest), call('HGET', P .. 'names', a.new_name)
  if other and other ~= g.key then error({'Conflict', '', 'the name {!r} is taken', a.new_name}) end
  g.name = a.new_name
  describe(g)
  if not other then
    call('HDEL', P .. 'names', a.name)
    call('HSET', P .. 'names', g.name, g.key)
    wake(g.key, '!')
    for _, guest in ipairs(g.guests) do wake(guest.key, '!') end
    event(op, a.name, g.name, g.client)
  end
  return line(g)
end
function ops.delete_game() remove(find_game(a.digest), nil, op) end
function ops.counts()
  local games = call('HLEN', P .. 'names')
  return {games = games, guests = call('ZCARD', P .. 'ends') - games, stored_bytes = tonumber(call('GET', P .. 'stored') or 0)}
end

if real > deadline then return redis.error_reply('LATE nobody waits for it any more') end
-- The first write: a replica refuses it before anything has changed, and Redis 6.2, when it is full, lets go on who has written already.
if call('PEXPIRE', P .. 'wake:' .. process, 10000) == 0 then return redis.error_reply('LOST the store came back empty') end
local keys = call('ZRANGEBYSCORE', P .. 'ends', '-inf', now, 'LIMIT', 0, 500)
table.sort(keys, function(one, other) return #one < #other end)     -- games first: their guests go with them
for _, key in ipairs(keys) do
  local g, token = load(string.match(key, '^%d+')), call('HGET', P .. 'held', key)
  local guest = g and find(g.guests, key)
  local waits = token and call('EXISTS', P .. 'wake:' .. string.match(token, '^[^/]+')) == 1     -- alive, unless an operator set -1
  if waits and tonumber(call('ZSCORE', P .. 'ends', key)) >= 0 then keep_alive(key)
  elseif guest then remove(g, guest, 'expire_guest')
  elseif g and g.key == key then remove(g, nil, 'expire_game')
  else call('ZREM', P .. 'ends', key) end
end
local ok, result = pcall(ops[op])
if not ok and (type(result) == 'string' or result.err) then error(result) end
return cjson.encode({ok = ok, result = result, woken = woken, events = events, now = real})
"""

PREFIX, MAX_BATCH = "p2p:{lobby}:", 256         # of all keys; calls in one round trip
TIMEOUT, SILENCE = 2.0, 0.7     # seconds for the store to answer, and to say that nobody is to be woken, which it does four times a second


class RedisRegistry:
    """The GameRegistry in a store. clock: seconds, if not the store's. CannotStart: the store does not answer, is too old, or has another secret."""

    def __init__(self, settings: Settings, clock: Optional[Callable[[], float]] = None) -> None:
        self._settings, self._clock, self._process = settings, clock, os.urandom(6).hex()
        self._answers: Dict[str, Future[Any]] = {}      # to the calls of a request, by operation; requests share all but these two
        self._waiter: Optional[Waiter] = None           # its poll or start, if that may come to wait
        self._list = [(0, p2pserver.list_text(()))]     # one item: the list of games as it was last seen, after its version
        self._waiters: Dict[str, Waiter] = {}       # by their tokens; also of calls that are on their way
        self.events: collections.deque[Tuple[str, str, str, bytes]] = collections.deque()
        self._queue: queue.SimpleQueue[Tuple[str, str, Future[Any]]] = queue.SimpleQueue()     # operations, arguments as JSON, answers
        self._is_closed = False
        try:
            path = os.environ.get("P2P_STORE_SECRET_FILE")
            self._given = pathlib.Path(path).read_text(encoding="utf-8").strip() if path else os.environ.get("P2P_STORE_SECRET", "")
            self._secret = p2pserver.keyed_digest(self._given, b"") if self._given else os.urandom(16)
            self._greet()
        except (redis.RedisError, ValueError, OSError) as error:
            raise CannotStart(f"the store that --store names cannot be used, Redis 6.2 or newer, or Valkey: {type(error).__name__}") from None
        for work in (self._work, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def for_request(self) -> RedisRegistry:
        registry = copy.copy(self)
        registry._answers = {}
        return registry

    def register_game(self, name: str, digest: bytes, client: bytes = b"", **shown: Any) -> bool:
        return bool(self._ask("register_game", name=name, digest=digest, client=client, **shown).result())

    def poll_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, replies: Replies = None,
                  dismiss: Sequence[str] = (), wake: Wake = None, seen_at: str = "") -> News:
        pairs = replies and list(replies.items())
        return self._meet("poll_game", name, digest, after, wake, addresses=addresses, replies=pairs, dismiss=list(dismiss), seen_at=seen_at or None)

    def start_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, client: bytes = b"", seen_at: str = "",
                   wake: Wake = None) -> News:
        news = self._meet("start_game", name, digest, after, wake, addresses=addresses, client=client, seen_at=seen_at or None,
                          id=p2pserver.new_session_id(), session_key=p2pserver.new_session_id())
        return news._replace(peers=[host._replace(seen_at=p2pserver.published_at(host.seen_at, host.addresses)) for host in news.peers])

    def leave_game(self, name: str, digest: bytes) -> None:
        self._ask("leave_game", name=name, digest=digest).result()

    def forget_waiter(self, waiter: Waiter) -> RedisRegistry:
        registry, (operation, token) = self.for_request(), waiter.entry
        if self._waiters.pop(token, None):
            self._send("forget_waiter", key=waiter.name.split("/")[1], token=token)
        elif isinstance(token, Future) and token.done() and not token.exception() and token.result()["has_news"]:
            registry._answers[operation] = token
        return registry

    def list_games(self) -> Tuple[int, bytes]:
        answer = self._ask("list_games", known=self._list[0][0]).result()
        if answer["lines"] is not False:
            self._list[0] = answer["version"], p2pserver.list_text(map(str.encode, answer["lines"]))
        return self._list[0]

    def get_game(self, name: str) -> bytes:
        return str.encode(self._ask("get_game", name=name).result())

    def update_game(self, name: str, /, digest: bytes, **changes: Any) -> bytes:
        new_name = changes.pop("name", None) or name
        return str.encode(self._ask("update_game", name=name, digest=digest, new_name=new_name, **changes).result())

    def delete_game(self, name: str, digest: bytes) -> None:
        self._ask("delete_game", name=name, digest=digest).result()

    def counts(self) -> Dict[str, int]:
        return {**self._ask("counts").result(), "waiting": len(self._waiters)}

    def expire_games(self) -> None:
        self._send("counts")    # as each call it frees what has expired, and ten times a second it shows whether the store is there

    def close(self) -> None:
        self._is_closed = True
        self.expire_games()     # ends the wait for a call

    def _send(self, operation: str, **values: Any) -> Future[Any]:
        """Have the store do an operation; its answer."""
        given = {name: value.hex() if name in ("digest", "client") else value for name, value in values.items() if value is not None}
        answer: Future[Any] = Future()
        self._queue.put((operation, json.dumps(given, default=bytes.decode), answer))
        return answer

    def _ask(self, operation: str, **values: Any) -> Future[Any]:
        """The store's answer to the call of a request. Later: it is not there yet."""
        if operation not in self._answers:
            self._answers[operation] = self._send(operation, **values)
        answer = self._answers[operation]
        if not answer.done():
            raise Later(lambda wake: answer.add_done_callback(lambda _: wake()))
        return answer

    def _meet(self, operation: str, name: str, digest: bytes, after: Optional[int], wake: Wake, **values: Any) -> News:
        """What the store answers to a poll or start. Later. Problem."""
        if wake and not self._answers and len(self._waiters) < self._settings.max_waiting:
            token: Any = f"{self._process}/{os.urandom(8).hex()}"
            self._waiter = self._waiters[token] = Waiter([operation, token], name, digest, after, wake)      # its news may come before the answer
        waiter, token = self._waiter, self._waiter and self._waiter.entry[1]
        answer = self._ask(operation, name=name, digest=digest, after=after, token=token, **values)
        if waiter and (answer.exception() or not answer.result()["waits"]):
            self._waiters.pop(token, None)
            waiter = None
        found = answer.result()
        if waiter:
            waiter.name = f"/{found['key']}/{found['name']}"        # finds the game whatever it is called by then
            if token not in self._waiters:
                waiter.wake()       # once more: when it was woken, nobody waited
        peers = [Session(peer["id"], peer["session_key"], peer["addresses"].encode(), peer.get("seen_at", "")) for peer in found["peers"]]
        return News(found["name"], peers, found["cursor"], found["has_news"], waiter, [each["id"] for each in found["left"]], list(found["gone"]))

    def _greet(self) -> None:
        """Connect, and learn the secret that all servers share. RedisError. CannotStart: the store has another one."""
        url = "redis" + self._settings.store.removeprefix("redis").removeprefix("valkey")
        pool = redis.ConnectionPool.from_url(url, protocol=2, decode_responses=True, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
        self._redis = redis.Redis(connection_pool=pool)
        self._sender, self._reader = pool.get_connection(), pool.get_connection()      # the library's pipeline and xread take longer than the store
        numbers = {name: value for name, value in vars(self._settings).items() if isinstance(value, (int, float))}
        limits = {**numbers, "member_size": p2pserver.MEMBER_SIZE, "max_remembered": p2pserver.MAX_REMEMBERED}
        flags = "#!lua flags=allow-oom\n" if int(self._redis.info("server")["redis_version"].partition(".")[0]) >= 7 else ""
        self._script = flags + f"local limit = {{{', '.join([f'{name} = {value:.15g}' for name, value in limits.items()])}}}\n" + LUA
        self._sha = self._redis.script_load(self._script)
        self._offset = 1e18     # milliseconds from this clock to the store's, and TIMEOUT; until the store tells, no call is late
        self._redis.xadd(f"{PREFIX}wake:{self._process}", {"token": ""})
        self._exchange([("counts", "{}", Future())])     # the script runs here; and it says how long the stream lives
        self._redis.set(PREFIX + "secret", f"{p2pserver.keyed_digest('', self._secret).hex()}:{'' if self._given else self._secret.hex()}", nx=True)
        digest, _, made = self._redis.get(PREFIX + "secret").partition(":")
        self._secret = bytes.fromhex(made) or self._secret
        if made and self._given or digest != p2pserver.keyed_digest("", self._secret).hex():
            raise CannotStart("the servers that share a store need the same P2P_STORE_SECRET")
        self.peer_digest = functools.partial(p2pserver.keyed_digest, secret=self._secret)
        self._last, self._is_up = "0", True     # what is read of those to be woken

    def _work(self) -> None:
        """Send the calls, as many at once as there are. While the store is down they end at once."""
        while not self._is_closed:
            calls = [self._queue.get(), *[self._queue.get() for _ in range(min(self._queue.qsize(), MAX_BATCH))]]
            try:
                if self._is_up:
                    self._exchange(calls)
                    continue
            except (redis.RedisError, OSError) as error:
                log.error("the store does not answer: %s", type(error).__name__)
                self._is_up = False
            for answer in [answer for _, _, answer in calls if not answer.done()]:
                answer.set_exception(Full("the store of games does not answer", limit="store", headers={"Retry-After": "1"}))

    def _exchange(self, calls: List[Tuple[str, str, Future[Any]]]) -> None:
        """Send calls, all at once, and end each. RedisError: the store is down, has come back empty, or cannot be written to."""
        command = "EVALSHA", self._sha, 1, PREFIX, self._process, time.monotonic() * 1000 + self._offset, self._clock() * 1000 if self._clock else ""
        self._sender.send_packed_command(self._sender.pack_commands([(*command, operation, text) for operation, text, _ in calls]))
        for operation, text, answer in calls:
            try:
                done = json.loads(self._sender.read_response())
            except redis.exceptions.NoScriptError:
                self._redis.script_load(self._script)
                self._queue.put((operation, text, answer))
                continue
            self._offset = done["now"] + (TIMEOUT - time.monotonic()) * 1000
            for event, name, detail, client in done["events"]:
                self.events.append((event, name, f"renamed to {detail!r}" if event == "update_game" else detail, bytes.fromhex(client)))
            for token in done["woken"]:
                self._wake(token)
            if done["ok"]:
                answer.set_result(done.get("result"))
            else:
                kind, limit, detail, *words = done["result"]
                answer.set_exception(getattr(p2pserver, kind)(detail.format(*words), limit=limit))

    def _listen(self) -> None:
        """Wake whom the store names. What is not read yet stays there, so that a cut loses nothing. Once the store has failed, greet it again."""
        while not self._is_closed:
            try:
                if not self._is_up:
                    self._greet()
                    log.info("the store answers again")
                    threading.Thread(target=self._wake_all, daemon=True).start()
                self._reader.send_command("XREAD", "BLOCK", 250, "STREAMS", f"{PREFIX}wake:{self._process}", self._last)
                [(_, entries)] = self._reader.read_response(timeout=SILENCE) or [("", [])]
                for self._last, (_, token) in entries:
                    self._wake(token)
            except (redis.RedisError, OSError, CannotStart):
                time.sleep(0.05)

    def _wake(self, token: str) -> None:
        waiter = self._waiters.pop(token.rstrip("!"), None)
        if waiter:
            waiter.is_over, waiter.is_busy = token.endswith("!"), token.endswith("!!")
            waiter.entry[1] = ahead = self._send(waiter.entry[0], name=waiter.name, digest=waiter.digest, after=waiter.after, dismiss=[])
            ahead.add_done_callback(lambda _: waiter.wake())        # it finds the answer there, so that two threads less pass it on

    def _wake_all(self) -> None:
        """The store has come up again: have all asked again within a second. They wait until they are."""
        waiters = list(self._waiters.values())
        for i in range(100):
            for waiter in waiters[i::100]:
                waiter.wake()
            time.sleep(0.01)
