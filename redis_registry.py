"""The registry of p2pserver in Redis 7 or newer, or in Valkey, so that several servers share their games: --store redis://host:6379/0.

It does what p2pserver.Registry does. Each operation is one call of one Lua script: atomic, one round trip, by the store's clock. One
thread sends the calls, as many in one round trip as there are; another hears who is to be woken. Keys, which all begin with p2p:{lobby}:

    cursor                  the last version: tenths of milliseconds since 1970, or ahead of that
    secret                  "<id>:<hex>": keys the digests, in hex if it was made here
    names, lines            hashes: name, as JSON -> gid; gid of a listed game -> what anybody may know of it, as JSON
    list, stored            the version of the list; bytes that games and guests take
    games, guests           sorted sets: gid, and gid:digest -> when it expires, in milliseconds
    clients                 hash: client, and gid:client -> how many games, and guests of that game, it has
    game:<gid>              hash: name owner client info listed ready addresses changed news told size
    guests:<gid>            sorted set: digest -> version of the guest's addresses
    guest:<gid>:<digest>    hash: id key client born addresses changed reply replied seen_at size
    sessions:<gid>          hash: sessionId -> digest
    left:<gid>, dismissed:<gid>    sorted sets: sessionId, and digest -> version
    held:<gid>              hash: digest of a guest, or "" for the host -> "<process>/<token>", who waits for news
    alive:<process>         is there while that server is: how many tokens have been published for it
    wake:<process>          a channel: tokens that are to be woken; four times a second "#" and how many there were

gid is the version at which a game began. It has 14 digits, the most that Lua makes text of exactly.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import queue
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import p2pserver
from p2pserver import CannotStart, Conflict, Forbidden, Full, Later, News, NotFound, Replies, Session, Settings, Text, TooMany, Waiter, Wake, log

LUA = r"""
local P, op, process, secret, deadline, clock = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local call, time = redis.call, redis.call('TIME')
local real = time[1] * 1000 + math.floor(time[2] / 1000)
local now = tonumber(clock) or real         -- milliseconds
local woken, events = {}, {}                -- tokens of this server; what has happened to games

local function cursor() return tonumber(call('GET', P .. 'cursor') or 0) end
local function version()                    -- never behind the clock, so that it grows also over the loss of the store
  local v = math.max(cursor() + 1, time[1] * 10000 + math.floor(time[2] / 100))
  call('SET', P .. 'cursor', v)
  return v
end
local function game(gid) return P .. 'game:' .. gid end
local function guest(gid, who) return P .. 'guest:' .. gid .. ':' .. who end
local function event(operation, name, detail, client) events[#events + 1] = {operation, name, detail, client} end
local function count(client, by)
  if call('HINCRBY', P .. 'clients', client, by) <= 0 then call('HDEL', P .. 'clients', client) end
end
local function keep_alive(gid, who)
  if who == '' then call('ZADD', P .. 'games', now + game_ttl * 1000, gid)
  else call('ZADD', P .. 'guests', now + guest_ttl * 1000, gid .. ':' .. who) end
end
local function wake(gid, who, mark)         -- mark: "!": it is to be answered now; "!!": another took its place
  local holder = call('HGET', P .. 'held:' .. gid, who)
  if not holder then return end
  call('HDEL', P .. 'held:' .. gid, who)
  keep_alive(gid, who)
  local its_process, token = string.match(holder, '^(.-)/(.*)$')
  if its_process == process then woken[#woken + 1] = token .. mark
  elseif call('EXISTS', P .. 'alive:' .. its_process) == 1 then
    call('INCR', P .. 'alive:' .. its_process)
    call('PUBLISH', P .. 'wake:' .. its_process, token .. mark)
  end
end
local function line(gid)
  local g = call('HMGET', game(gid), 'name', 'info', 'ready', 'listed')
  return string.format('{"name":%s,"info":%s,"guests":%d,"ready":%s}', g[1], g[2], call('ZCARD', P .. 'guests:' .. gid), g[3] == '1' and 'true' or 'false'),
    g[4] == '1'
end
local function show(gid)
  local text, listed = line(gid)
  if listed then call('HSET', P .. 'lines', gid, text) else call('HDEL', P .. 'lines', gid) end
  call('SET', P .. 'list', version())
end
local function grow(key, bytes)
  call('HINCRBY', key, 'size', bytes)
  call('INCRBY', P .. 'stored', bytes)
end
local VERSIONS = {addresses = 'changed', reply = 'replied'}
local function change(changes, is_new)      -- sets fields where they differ: the version of that, and whether the list shows it
  local growth, v, is_shown = 0, nil, false
  for _, each in ipairs(changes) do
    each.size = each.size or 0
    for field, value in pairs(each.fields) do
      local old = call('HGET', each.key, field) or ''
      if value == old then each.fields[field] = nil else each.size = each.size + #value - #old end
    end
    growth = growth + each.size
  end
  local room = max_memory * (is_new and 900000 or 1000000) - (call('GET', P .. 'stored') or 0)
  if growth > 0 and growth > room then error({'memory'}) end
  for _, each in ipairs(changes) do
    for field, value in pairs(each.fields) do
      v, is_shown = v or version(), is_shown or not VERSIONS[field]
      call('HSET', each.key, field, value)
      if VERSIONS[field] then call('HSET', each.key, VERSIONS[field], v) end
    end
    grow(each.key, each.size)
  end
  return v, is_shown
end
local function check_room(what, there, most, of_client, most_of_client)
  if there >= most then error({'full', tostring(there), what}) end
  if tonumber(of_client or 0) >= most_of_client then error({'too_many', of_client, what}) end
end

local function remember(gid, what, version_of, member)      -- a session that ended, or a guest that was dismissed
  local key = P .. what .. ':' .. gid
  local before = call('ZCARD', key)
  if what == 'left' then call('ZREMRANGEBYSCORE', key, '-inf', call('HGET', game(gid), 'told')) end
  call('ZADD', key, version_of, member)
  call('ZREMRANGEBYRANK', key, 0, -1 - max_remembered)
  grow(game(gid), (call('ZCARD', key) - before) * member_size)
end
local function free_guest(gid, who)
  local g = call('HMGET', guest(gid, who), 'id', 'client', 'size')
  wake(gid, who, '')
  call('ZREM', P .. 'guests', gid .. ':' .. who)
  call('ZREM', P .. 'guests:' .. gid, who)
  call('HDEL', P .. 'sessions:' .. gid, g[1])
  call('DEL', guest(gid, who))
  call('INCRBY', P .. 'stored', -g[3])
  count(gid .. ':' .. g[2], -1)
  return g[1]
end
local function remove_guest(gid, who, operation)
  local client = call('HGET', guest(gid, who), 'client')
  local session, v = free_guest(gid, who), version()
  remember(gid, 'left', v, session)
  call('HSET', game(gid), 'news', v)
  wake(gid, '', '')
  show(gid)
  event(operation, call('HGET', game(gid), 'name'), 'guests: ' .. call('ZCARD', P .. 'guests:' .. gid), client)
end
local function remove_game(gid, operation)
  for _, who in ipairs(call('ZRANGE', P .. 'guests:' .. gid, 0, -1)) do free_guest(gid, who) end
  wake(gid, '', '')
  local g = call('HMGET', game(gid), 'name', 'client', 'size')
  call('ZREM', P .. 'games', gid)
  call('HDEL', P .. 'names', g[1])
  call('HDEL', P .. 'lines', gid)
  call('INCRBY', P .. 'stored', -g[3])
  count(g[2], -1)
  for _, kind in ipairs({'game:', 'guests:', 'sessions:', 'left:', 'dismissed:', 'held:'}) do call('DEL', P .. kind .. gid) end
  call('SET', P .. 'list', version())
  event(operation, g[1], '', g[2])
end
local function expire(set, operation)       -- who waits at a server that is there is alive, unless an operator has set its time to -1
  for _, member in ipairs(call('ZRANGEBYSCORE', P .. set, '-inf', now, 'LIMIT', 0, 500)) do
    local gid, who = string.match(member, '^(%d+):?(.*)$')
    local holder = call('HGET', P .. 'held:' .. gid, who)
    if holder and tonumber(call('ZSCORE', P .. set, member)) >= 0 and call('EXISTS', P .. 'alive:' .. string.match(holder, '^(.-)/')) == 1 then
      keep_alive(gid, who)
    elseif who == '' then remove_game(gid, operation)
    else remove_guest(gid, who, operation) end
  end
end
local function found(name)                  -- name: as JSON, or of one that is asked again /gid/name
  local gid, rest = string.match(name, '^/(%d+)/(.*)$')
  if gid and call('EXISTS', game(gid)) == 0 then gid = nil end
  return gid or call('HGET', P .. 'names', rest or name) or error({'no_game', rest or name})
end
local function owned(name, owner)
  local gid = found(name)
  if call('HGET', game(gid), 'owner') ~= owner then error({'not_owner'}) end
  return gid
end
local function since_of(after)
  local since = tonumber(after)
  return since and since <= cursor() and since or -1
end
local function given(text) if text ~= '' then return text end end
local function offer(gid, who)              -- the addresses that a guest gets, and their version
  local g = call('HMGET', guest(gid, who), 'reply', 'replied')
  if not g[1] or g[1] == '' then g = call('HMGET', game(gid), 'addresses', 'changed') end
  return g[1], tonumber(g[2])
end
local function wait(gid, who, token, has_news, is_again, is_busy)       -- 1: it waits, in place of an earlier one
  if call('HEXISTS', P .. 'held:' .. gid, who) == 1 then
    if is_again then return 0 end
    wake(gid, who, is_busy and '!!' or '!')
  end
  if has_news or token == '' then return 0 end
  call('HSET', P .. 'held:' .. gid, who, process .. '/' .. token)
  return 1
end
local function publish(gid, g, addresses, replies, known)       -- the sessions of replies that are gone
  local is_ready = addresses ~= '[]' or replies or g.ready == '1' and g.addresses == '[]'
  local changes, gone = {{key = game(gid), fields = {addresses = addresses, ready = is_ready and '1' or '0'}}}, {}
  for i = 1, #(replies or {}), 2 do
    local who = call('HGET', P .. 'sessions:' .. gid, replies[i])
    if not who then gone[#gone + 1] = replies[i]
    elseif tonumber(call('HGET', guest(gid, who), 'changed')) <= known then
      changes[#changes + 1] = {key = guest(gid, who), fields = {reply = replies[i + 1]}}
    end
  end
  local v, is_shown = change(changes)
  if is_shown then show(gid) end
  local h = call('HMGET', game(gid), 'changed', 'client')
  if v and g.changed == '0' and h[1] ~= '0' then event('poll_game', g.name, 'first addresses', h[2]) end
  for _, who in ipairs(v and call('HKEYS', P .. 'held:' .. gid) or {}) do
    local text, its_version = offer(gid, who)
    if who ~= '' and its_version == v and text ~= '[]' then wake(gid, who, '') end
  end
  return gone
end

local ops = {}
function ops.register_game(name, owner, client, info, listed)
  local gid = call('HGET', P .. 'names', name)
  local is_new, fields = not gid, {info = given(info), listed = given(listed)}
  if is_new then
    check_room('"games"', call('ZCARD', P .. 'games'), max_games, call('HGET', P .. 'clients', client), max_games_per_client)
    gid = string.format('%.0f', version())
    fields = {name = name, info = given(info) or '{}', listed = given(listed) or '1', addresses = '[]', ready = '0'}
  elseif call('HGET', game(gid), 'owner') ~= owner then error({'taken', name}) end
  local _, is_shown = change({{key = game(gid), fields = fields, size = is_new and game_size or 0}}, is_new)
  if is_new then
    call('HSET', game(gid), 'owner', owner, 'client', client, 'changed', 0, 'news', gid, 'told', -1)
    call('HSET', P .. 'names', name, gid)
    count(client, 1)
    event(op, name, '', client)
  end
  keep_alive(gid, '')
  if is_shown then show(gid) end
  return {is_new and 1 or 0}
end
function ops.poll_game(name, owner, addresses, after, token, replies, dismiss)
  local gid = owned(name, owner)
  keep_alive(gid, '')
  local g, since, guests, left, gone = {}, since_of(after), {}, {}, {}
  g.addresses, g.ready, g.changed, g.name = unpack(call('HMGET', game(gid), 'addresses', 'ready', 'changed', 'name'))
  local known, addressed = after == '' and cursor() or since, given(addresses) or g.addresses
  local is_busy = addressed == g.addresses and #replies <= 2 and dismiss == ''
  if replies ~= '' or addressed ~= g.addresses then gone = publish(gid, g, addressed, given(replies) and cjson.decode(replies), known) end
  for _, session in ipairs(given(dismiss) and cjson.decode(dismiss) or {}) do
    local who = call('HGET', P .. 'sessions:' .. gid, session)
    if who then
      remove_guest(gid, who, 'dismiss_guest')
      remember(gid, 'dismissed', version(), who)
    end
  end
  local news = tonumber(call('HGET', game(gid), 'news'))
  if news > since then
    if after ~= '' then left = call('ZRANGEBYSCORE', P .. 'left:' .. gid, '(' .. since, '+inf') end
    for _, who in ipairs(call('ZRANGEBYSCORE', P .. 'guests:' .. gid, '(' .. since, '+inf')) do
      guests[#guests + 1] = call('HMGET', guest(gid, who), 'born', 'id', 'key', 'addresses', 'seen_at')
    end
  end
  call('HSET', game(gid), 'told', known)
  return {gid, g.name, news, guests, left, gone, wait(gid, '', token, #guests + #left + #gone > 0, addresses == '', is_busy)}
end
function ops.start_game(name, who, addresses, after, token, client, seen_at, id, key)
  local gid = found(name)
  local g, peer = call('HMGET', game(gid), 'owner', 'name'), guest(gid, who)
  if g[1] == who then error({'own_game'}) end
  if call('ZSCORE', P .. 'dismissed:' .. gid, who) then error({'dismissed', g[2]}) end
  local is_new = call('EXISTS', peer) == 0
  if is_new then
    if addresses == '' then error({'no_session', g[2]}) end
    check_room('"guests"', call('ZCARD', P .. 'guests:' .. gid), max_guests, call('HGET', P .. 'clients', gid .. ':' .. client), max_guests_per_client)
  end
  local has_moved = addresses ~= '' and addresses ~= call('HGET', peer, 'addresses')
  if has_moved then
    local v = change({{key = peer, fields = {addresses = addresses, reply = ''}, size = is_new and guest_size or 0}}, is_new)
    if is_new then call('HSET', peer, 'id', id, 'key', key, 'client', client, 'born', v, 'seen_at', '') end
    call('HSET', game(gid), 'news', v)
    call('ZADD', P .. 'guests:' .. gid, v, who)
    wake(gid, '', '')
  end
  keep_alive(gid, who)
  if seen_at ~= '' then call('HSET', peer, 'seen_at', seen_at) end
  if is_new then
    call('HSET', P .. 'sessions:' .. gid, id, who)
    count(gid .. ':' .. client, 1)
    show(gid)
    event(op, g[2], 'guests: ' .. call('ZCARD', P .. 'guests:' .. gid), client)
  end
  local text, its_version = offer(gid, who)
  local waits = wait(gid, who, token, text ~= '[]' and its_version > since_of(after), addresses == '', not has_moved)
  local session = call('HMGET', peer, 'id', 'key')
  return {gid, g[2], its_version, session[1], session[2], text, waits}
end
function ops.leave_game(name, who)
  local gid = found(name)
  if call('EXISTS', guest(gid, who)) == 0 then error({'no_guest', name}) end
  remove_guest(gid, who, op)
  return {}
end
function ops.forget_waiter(gid, who, token)
  if call('HGET', P .. 'held:' .. gid, who) == process .. '/' .. token then
    call('HDEL', P .. 'held:' .. gid, who)
    keep_alive(gid, who)
  end
  return {}
end
function ops.list_games(known)
  local v = call('GET', P .. 'list') or '0'
  return {v, v ~= known and call('HGETALL', P .. 'lines')}
end
function ops.get_game(name) return {(line(found(name)))} end
function ops.update_game(name, owner, new_name, info, listed)
  local gid, other = owned(name, owner), call('HGET', P .. 'names', new_name)
  if other and other ~= gid then error({'taken', new_name}) end
  local _, is_shown = change({{key = game(gid), fields = {name = new_name, info = given(info), listed = given(listed)}}})
  if is_shown then show(gid) end
  if not other then
    call('HDEL', P .. 'names', name)
    call('HSET', P .. 'names', new_name, gid)
    for _, who in ipairs(call('HKEYS', P .. 'held:' .. gid)) do wake(gid, who, '!') end
    event(op, name, new_name, call('HGET', game(gid), 'client'))
  end
  return {(line(gid))}
end
function ops.delete_game(name, owner)
  remove_game(owned(name, owner), op)
  return {}
end
function ops.counts() return {call('ZCARD', P .. 'games'), call('ZCARD', P .. 'guests'), tonumber(call('GET', P .. 'stored') or 0)} end
function ops.tick()                 -- the server hears whether it has heard all
  call('SET', P .. 'alive:' .. process, 0, 'NX')
  call('PEXPIRE', P .. 'alive:' .. process, 10000)
  call('PUBLISH', P .. 'wake:' .. process, '#' .. call('GET', P .. 'alive:' .. process))
  return {}
end

local function reply(problem, result) return {problem, result, woken, events, real} end
if real > tonumber(deadline) then return reply('late', {}) end       -- nobody waits for it any more
if string.sub(call('GET', P .. 'secret') or '', 1, 8) ~= secret then return reply('secret', {}) end      -- the store came back empty
expire('games', 'expire_game')
expire('guests', 'expire_guest')
local ok, result = pcall(ops[op], unpack(ARGV, 6))
if ok then return reply('', result) end
if type(result) == 'string' or result.err then return redis.error_reply(result.err or result) end
return reply(result[1], {unpack(result, 2)})
"""

LIMITS = ("game_ttl", "guest_ttl", "max_games", "max_guests", "max_games_per_client", "max_guests_per_client", "max_memory")     # that the script needs
GAME_SIZE, GUEST_SIZE = 800, 900         # bytes that one takes in the store beside its texts (bench/store.py measures it)
TIMEOUT = 2.0           # seconds for the store to answer
TICK, SILENCE = 0.25, 1.0       # seconds between two signs of life, and without any, after which the subscription counts as cut
SPREAD = 1.0            # seconds over which all are asked again who may have missed something
MAX_BATCH = 256         # calls in one round trip

DOWN = functools.partial(Full, "the store of games does not answer", limit="store", Retry_After="1")
PROBLEMS: Mapping[bytes, Callable[..., Exception]] = {      # by what the script calls them, of what it says of them
    b"no_game": lambda name: NotFound(f"there is no game {name!r}"),
    b"no_guest": lambda name: NotFound(f"there is no session with the game {name!r} that could end"),
    b"no_session": lambda name: NotFound(f"the session with the game {name!r} is gone"),
    b"not_owner": lambda: Forbidden("the peerId is not the one that registered this game"),
    b"dismissed": lambda name: Forbidden(f"the host of the game {name!r} has sent you away"),
    b"own_game": lambda: Conflict("a host cannot start its own game"),
    b"taken": lambda name: Conflict(f"the name {name!r} is taken"),
    b"memory": lambda: Full("the server's memory for games is full", limit="memory"),
    b"full": lambda count, what: Full(f"there are {count} {what}, which is all this server takes", limit=what),
    b"too_many": lambda count, what: TooMany(f"your address has {count} {what}, which is all that one may have", limit=f"{what}_per_client"),
    b"late": DOWN,
}


def fingerprint(secret: bytes) -> str:
    return hashlib.blake2b(secret, digest_size=4).hexdigest()


def quoted(name: str) -> str:
    """A name as JSON; of one that is asked again behind /gid/, as it was."""
    head, slash, name = name.rpartition("/")
    return head + slash + p2pserver.to_json(name)


def shown_as_text(info: Text = None, listed: Optional[bool] = None) -> Tuple[bytes, str]:
    """What the list shows of a game, for the script; nothing where it does not change."""
    return info or b"", "" if listed is None else str(int(listed))


class Call(Later):
    """One operation on its way to the store and back. waiter: who waits for news, if it comes to that."""

    def __init__(self, registry: RedisRegistry, operation: str, arguments: Sequence[Any] = (), waiter: Optional[Waiter] = None) -> None:
        super().__init__(operation)
        self.registry, self.operation, self.arguments, self.waiter = registry, operation, arguments, waiter
        self.earlier: Mapping[str, Call] = registry.here.calls
        self.wake: Callable[[], None] = lambda: None
        self.is_there = False
        self.answer: List[Any] = []
        self.problem: Optional[Exception] = None

    def send(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.registry.send(self)

    def repeat(self, call: Callable[[], Any]) -> Any:
        if not self.is_there:
            raise self
        self.registry.here.calls = {**self.earlier, self.operation: self}
        try:
            return call()
        finally:
            self.registry.here.calls = {}

    def end(self, answer: List[Any], problem: Optional[Exception] = None) -> None:
        """The answer is there."""
        self.answer, self.problem, self.is_there = answer, problem, True
        if self.waiter and (problem or not answer[-1]):
            self.registry.waiters.pop(self.waiter.entry, None)      # it does not wait
        self.wake()


class Here(threading.local):
    """calls: those whose answers this thread takes, by operation."""

    calls: Mapping[str, Call] = {}


class RedisRegistry:
    """The GameRegistry in a store.

    clock: seconds, in place of the store's clock. CannotStart: the store does not answer, is too old, or has another secret.
    """

    def __init__(self, settings: Settings, clock: Optional[Callable[[], float]] = None, lobby: str = "lobby") -> None:
        self._settings, self._clock = settings, clock
        self._prefix, self._process = f"p2p:{{{lobby}}}:", os.urandom(6).hex()
        limits = {**{name: getattr(settings, name) for name in LIMITS}, "game_size": GAME_SIZE, "guest_size": GUEST_SIZE,
                  "max_remembered": p2pserver.MAX_REMEMBERED, "member_size": p2pserver.MEMBER_SIZE}
        self._script = "#!lua flags=allow-oom\n" + "".join([f"local {name} = {value:.15g}\n" for name, value in limits.items()]) + LUA
        self._sha = hashlib.sha1(self._script.encode()).hexdigest()
        self._offset = 0.0                          # milliseconds by which the store's clock is ahead of time.monotonic()
        self._list = 0, b'{"games":[]}\n'
        self._tokens = itertools.count(1)
        self.waiters: Dict[str, Waiter] = {}        # by token; also of calls that are on their way
        self.here = Here()
        self.events: collections.deque[Tuple[str, str, str, bytes]] = collections.deque()
        self._queue: queue.SimpleQueue[Call] = queue.SimpleQueue()      # calls that are not sent yet
        self._sent: List[Call] = []
        self._next_tick = 0.0
        self._is_up = self._stopping = False
        self._is_followed = threading.Event()
        try:
            path = os.environ.get("P2P_STORE_SECRET_FILE")
            given = pathlib.Path(path).read_text(encoding="utf-8").strip() if path else os.environ.get("P2P_STORE_SECRET", "")
            self._is_given, self._secret = bool(given), hashlib.blake2b(given.encode("utf-8")).digest() if given else os.urandom(32)
            self._redis = redis.Redis.from_url(settings.store.replace("valkey", "redis", 1), retry=Retry(NoBackoff(), 0), protocol=2,
                                               socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
            self._greet()
        except (redis.RedisError, ValueError, OSError) as error:
            raise CannotStart(f"the store that --store names cannot be used: {type(error).__name__}; it must be Redis 7 or newer, or Valkey") from None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._work, self._listen)]
        for thread in self._threads:
            thread.start()
        self._is_followed.wait(TIMEOUT)

    # Operations.

    def peer_digest(self, peer_id: str) -> bytes:
        return hashlib.blake2b(peer_id.encode("utf-8"), key=self._secret, digest_size=16).digest()

    def register_game(self, name: str, digest: bytes, client: bytes = b"", **shown: Any) -> bool:
        return bool(self._ask("register_game", quoted(name), digest.hex(), client.hex(), *shown_as_text(**shown))[0])

    def poll_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, replies: Replies = None,
                  dismiss: Sequence[str] = (), wake: Wake = None) -> News:
        flat = "" if replies is None else json.dumps([text for session_id, reply in replies.items() for text in (session_id, reply.decode())])
        (cursor, guests, left, gone), name, waiter = self._meet(
            ("poll_game", name, digest, addresses, after), wake, flat, json.dumps(dismiss) if dismiss else "")
        peers = [Session(session_id.decode(), key.decode(), texts, seen_at.decode())
                 for _, session_id, key, texts, seen_at in sorted(guests, key=lambda guest: int(guest[0]))]
        return News(name, peers, cursor, waiter, [each.decode() for each in left], [each.decode() for each in gone])

    def start_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, client: bytes = b"", seen_at: str = "",
                   wake: Wake = None) -> News:
        (cursor, session_id, key, offer), name, waiter = self._meet(
            ("start_game", name, digest, addresses, after), wake, client.hex(), seen_at, p2pserver.new_session_id(), p2pserver.new_session_id())
        return News(name, [Session(session_id.decode(), key.decode(), offer)], cursor, waiter)

    def leave_game(self, name: str, digest: bytes) -> None:
        self._ask("leave_game", quoted(name), digest.hex())

    def forget_waiter(self, waiter: Waiter) -> None:
        gid, who, token = waiter.entry
        self.waiters.pop(token, None)
        waiter.name = f"/{gid}/{waiter.name.rpartition('/')[2]}"        # finds the game whatever its name is by now
        self.send(Call(self, "forget_waiter", waiter.entry))

    def list_games(self) -> Tuple[int, bytes]:
        version, lines = self._ask("list_games", self._list[0])
        if lines is not None:
            games = sorted(zip(map(int, lines[::2]), lines[1::2]))
            self._list = int(version), b'{"games":[' + b",".join([line for _, line in games]) + b"]}\n"
        return self._list

    def get_game(self, name: str) -> bytes:
        return bytes(self._ask("get_game", quoted(name))[0])

    def update_game(self, name: str, digest: bytes, new_name: Optional[str] = None, **shown: Any) -> bytes:
        return bytes(self._ask("update_game", quoted(name), digest.hex(), quoted(new_name or name), *shown_as_text(**shown))[0])

    def delete_game(self, name: str, digest: bytes) -> None:
        self._ask("delete_game", quoted(name), digest.hex())

    def counts(self) -> Dict[str, int]:
        games, guests, stored = self._ask("counts")
        return {"games": games, "guests": guests, "waiting": len(self.waiters), "stored_bytes": stored}

    def expire_games(self) -> None:
        """Nothing: each call does, and so does each tick."""

    def _ask(self, operation: str, *arguments: Any, waiter: Optional[Waiter] = None) -> List[Any]:
        """The store's answer to the call that is repeated. Later: it is made for the first time. Problem."""
        call = self.here.calls.get(operation)
        if call is None:
            raise Call(self, operation, arguments, waiter)
        if call.problem:
            raise call.problem
        return call.answer

    def _meet(self, meeting: Tuple[str, str, bytes, Text, Optional[int]], wake: Wake, *more: str) -> Tuple[List[Any], str, Optional[Waiter]]:
        """What the store answers to a poll or start, the game's present name, and who waits."""
        operation, name, digest, addresses, after = meeting
        call = self.here.calls.get(operation)
        waiter = call.waiter if call else None
        if call is None and wake and len(self.waiters) < self._settings.max_waiting:
            waiter = Waiter(str(next(self._tokens)), name, digest, after, wake)
            self.waiters[waiter.entry] = waiter     # before it is sent: news may come before the answer does
        token = waiter.entry if waiter else ""
        gid, present_name, *answer, waits = self._ask(
            operation, quoted(name), digest.hex(), addresses or b"", "" if after is None else after, token, *more, waiter=waiter)
        if waiter and waits:
            waiter.entry = gid.decode(), digest.hex() if operation == "start_game" else "", token
            if token not in self.waiters:
                waiter.wake()       # once more: when it was woken, nobody waited
        return answer, json.loads(present_name), waiter if waits else None

    # The thread that talks to the store.

    def send(self, call: Call) -> None:
        """Have a call sent. While the store is down it ends at once."""
        if self._is_up:
            self._queue.put(call)
        else:
            call.end([], DOWN())

    def close(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._redis.close()

    def _greet(self) -> None:
        """Learn what time it is in a store, and the secret that its servers share. RedisError. CannotStart: it has another one."""
        seconds, micros = self._redis.time()
        self._offset = seconds * 1000 + micros // 1000 - time.monotonic() * 1000
        self._redis.set(self._prefix + "secret", f"{fingerprint(self._secret)}:{'' if self._is_given else self._secret.hex()}", nx=True)
        mark, _, made = self._redis.get(self._prefix + "secret").decode().partition(":")
        if made and not self._is_given:
            self._secret = bytes.fromhex(made)
        if mark != fingerprint(self._secret):
            raise CannotStart("the servers that share a store need the same P2P_STORE_SECRET")
        self._redis.script_load(self._script)
        self._exchange([Call(self, "tick")])
        self._is_up = True

    def _work(self) -> None:
        while not self._stopping:
            try:
                if not self._is_up:
                    self._greet()
                    log.info("the store answers again")
                self._exchange(self._next_calls())
            except (redis.RedisError, OSError, CannotStart) as error:
                if self._is_up:
                    log.error("the store does not answer: %s", type(error).__name__)
                self._fail()
                time.sleep(0.1)

    def _next_calls(self) -> List[Call]:
        """What is to be sent now, all at once."""
        calls = []
        with contextlib.suppress(queue.Empty):
            calls.append(self._queue.get(timeout=TICK))
            while len(calls) < MAX_BATCH:
                calls.append(self._queue.get_nowait())
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK
            calls.append(Call(self, "tick"))
        return calls

    def _exchange(self, calls: List[Call]) -> None:
        """Send calls, and have them answered. RedisError: the store is down, has come back empty, or cannot be written to."""
        self._sent = calls
        while calls:
            gives_up_at = int(time.monotonic() * 1000 + self._offset + TIMEOUT * 1000)      # by the store's clock
            header = self._process, fingerprint(self._secret), gives_up_at, int(self._clock() * 1000) if self._clock else ""
            with self._redis.pipeline(transaction=False) as pipeline:
                for call in calls:
                    pipeline.evalsha(self._sha, 1, self._prefix, call.operation, *header, *call.arguments)
                for call, answer in zip(calls, pipeline.execute(raise_on_error=False)):
                    self._take(call, answer)
            calls = [call for call in calls if not call.is_there]
            if calls:       # the store has forgotten the script
                self._redis.script_load(self._script)

    def _take(self, call: Call, answer: Any) -> None:
        """End a call by what the store has answered; not if that has forgotten the script. RedisError."""
        if isinstance(answer, redis.exceptions.NoScriptError):
            return
        if isinstance(answer, (redis.ReadOnlyError, redis.ConnectionError)):
            raise answer
        if isinstance(answer, Exception):
            log.error("the store refuses: %s", answer)
            call.end([], DOWN())
            return
        problem, result, woken, events, now = answer
        self._offset = now - time.monotonic() * 1000
        for operation, name, detail, client in events:
            text = f"renamed to {json.loads(detail)!r}" if operation == b"update_game" else detail.decode()
            self.events.append((operation.decode(), json.loads(name), text, bytes.fromhex(client.decode())))
        for token in woken:
            self._wake(token.decode())
        if problem == b"secret":
            raise redis.ConnectionError("the store came back empty")
        if problem:
            call.end([], PROBLEMS[problem](*map(json.loads, result)))
        else:
            call.end(result)

    def _fail(self) -> None:
        """The store is down: end all calls."""
        self._is_up = False
        self._redis.connection_pool.disconnect(inuse_connections=False)     # by now its name may lead elsewhere
        for call in [*self._sent, *[self._queue.get() for _ in range(self._queue.qsize())]]:
            if not call.is_there:
                call.end([], DOWN())

    # The thread that hears who is to be woken.

    def _listen(self) -> None:
        while not self._stopping:
            if self._is_up:
                with contextlib.suppress(redis.RedisError, OSError), self._redis.pubsub() as subscription:
                    subscription.subscribe(f"{self._prefix}wake:{self._process}")
                    self._follow(subscription)
            time.sleep(0.05)

    def _follow(self, subscription: Any) -> None:
        """Wake whom the store names, and all if some were lost; until it is silent: a subscription can be cut without an error."""
        heard = -math.inf       # tokens: as many as the last count said, and those since
        while not self._stopping:
            message = subscription.get_message(timeout=SILENCE)
            if message is None:
                return
            text = message["data"].decode() if message["type"] == "message" else ""
            if text.startswith("#") and int(text[1:]) != heard:
                heard = int(text[1:])
                self._wake_all()
                self._is_followed.set()
            elif text and not text.startswith("#"):
                heard += 1
                self._wake(text)

    def _wake(self, token: str) -> None:
        waiter = self.waiters.pop(token.rstrip("!"), None)
        if waiter:
            waiter.is_over, waiter.is_busy = token.endswith("!"), token.endswith("!!")
            waiter.wake()

    def _wake_all(self) -> None:
        tokens = list(self.waiters)
        for i in range(100 if tokens else 0):
            for token in tokens[i::100]:
                self._wake(token)
            time.sleep(SPREAD / 100)
