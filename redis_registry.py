"""The registry of p2pserver in Redis 7 or newer, or in Valkey, so that several servers share their games: --store redis://host:6379/0.

It does what p2pserver.Registry does. Each operation is one call of one Lua script: atomic, one round trip, by the store's clock. One
thread sends the calls, as many in one round trip as there are; another hears who is to be woken. Keys, which all begin with p2p:{lobby}:

    cursor                  the last version: tenths of milliseconds since 1970, or ahead of that
    secret                  "<id>:<hex>": keys the digests, in hex if it was made here
    names, lines            hashes: name, as JSON -> gid; gid of a listed game -> what anybody may know of it, as JSON
    list, stored            the version of the list; bytes that games and guests take
    games, guests           sorted sets: gid, and gid:digest -> when it expires, in milliseconds
    clients                 hash: client -> how many games it has
    game:<gid>              a game with its guests by digest, as MessagePack; register_game() and start_game() below show what they have
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
import re
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
local cursor = tonumber(call('GET', P .. 'cursor') or 0)
-- Of what this call changes. Never behind the clock, so that it grows also over the loss of the store.
local version = math.max(cursor + 1, time[1] * 10000 + math.floor(time[2] / 100))
local woken, events = {}, {}                -- tokens of this server; what has happened to games
local texts = {}                            -- games by gid, as they are in the store

local function event(operation, name, detail, client) events[#events + 1] = {operation, name, detail, client} end
local function given(text) if text ~= '' then return text end end
local function append(list, member)
  list[#list + 1] = member
  if #list > max_remembered then table.remove(list, 1) end
end
local function count(client, by)
  if call('HINCRBY', P .. 'clients', client, by) <= 0 then call('HDEL', P .. 'clients', client) end
end
local function guests_of(g, client)         -- how many there are, and of that client
  local all, own = 0, 0
  for _, guest in pairs(g.guests) do
    all, own = all + 1, own + (guest.client == client and 1 or 0)
  end
  return all, own
end
local function check_room(what, there, most, of_client, most_of_client)
  if there >= most then error({'full', tostring(there), what}) end
  if of_client >= most_of_client then error({'too_many', tostring(of_client), what}) end
end
local function keep_alive(gid, who)
  if who == '' then call('ZADD', P .. 'games', now + game_ttl * 1000, gid)
  else call('ZADD', P .. 'guests', now + guest_ttl * 1000, gid .. ':' .. who) end
end

local function load(gid)
  texts[gid] = call('GET', P .. 'game:' .. gid)
  return texts[gid] and cmsgpack.unpack(texts[gid])
end
local function line(g)
  return string.format('{"name":%s,"info":%s,"guests":%d,"ready":%s}', g.name, g.info, guests_of(g), tostring(g.ready))
end
local function save(g, is_new)              -- with what follows from it: bytes, cursor, list
  local size = game_size + #g.name + #g.info + #g.addresses + member_size * (#g.left + #g.dismissed)
  for _, guest in pairs(g.guests) do size = size + guest_size + #guest.addresses + #guest.reply end
  local growth, room = size - g.size, max_memory * (is_new and 900000 or 1000000) - (call('GET', P .. 'stored') or 0)
  if growth > 0 and growth > room then error({'memory'}) end
  g.size = size
  local text, shown = cmsgpack.pack(g), g.listed and line(g)
  if text == texts[g.gid] then return end
  texts[g.gid] = text
  call('SET', P .. 'game:' .. g.gid, text)
  call('INCRBY', P .. 'stored', growth)
  call('SET', P .. 'cursor', version)
  if shown ~= call('HGET', P .. 'lines', g.gid) then
    if shown then call('HSET', P .. 'lines', g.gid, shown) else call('HDEL', P .. 'lines', g.gid) end
    call('SET', P .. 'list', version)
  end
end
local function found(name)                  -- name: as JSON, or of one that is asked again /gid/name
  local gid, rest = string.match(name, '^/(%d+)/(.*)$')
  gid, name = gid or call('HGET', P .. 'names', name), rest or name
  return gid and load(gid) or rest and load(call('HGET', P .. 'names', name) or '') or error({'no_game', name})
end
local function owned(name, owner)
  local g = found(name)
  if g.owner ~= owner then error({'not_owner'}) end
  return g
end
local function since_of(after)
  local since = tonumber(after)
  return since and since <= cursor and since or -1
end
local function offer(g, guest)              -- the addresses that a guest gets, and their version
  if guest.reply ~= '' then return guest.reply, guest.replied end
  return g.addresses, g.changed
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
local function wait(gid, who, token, has_news, is_again, is_busy)       -- 1: it waits, in place of an earlier one
  if call('HEXISTS', P .. 'held:' .. gid, who) == 1 then
    if is_again then return 0 end
    wake(gid, who, is_busy and '!!' or '!')
  end
  if has_news or token == '' then return 0 end
  call('HSET', P .. 'held:' .. gid, who, process .. '/' .. token)
  return 1
end

local function remove_guest(g, who, operation)
  local guest, untold = g.guests[who], {}
  version = version + 1
  wake(g.gid, who, '')
  call('ZREM', P .. 'guests', g.gid .. ':' .. who)
  for _, each in ipairs(g.left) do if each[1] > g.told then append(untold, each) end end
  append(untold, {version, guest.id})
  g.guests[who], g.left, g.news = nil, untold, version
  save(g)
  wake(g.gid, '', '')
  event(operation, g.name, 'guests: ' .. guests_of(g), guest.client)
end
local function remove_game(g, operation)
  for who in pairs(g.guests) do
    wake(g.gid, who, '')
    call('ZREM', P .. 'guests', g.gid .. ':' .. who)
  end
  wake(g.gid, '', '')
  call('ZREM', P .. 'games', g.gid)
  call('HDEL', P .. 'names', g.name)
  call('HDEL', P .. 'lines', g.gid)
  call('INCRBY', P .. 'stored', -g.size)
  count(g.client, -1)
  call('DEL', P .. 'game:' .. g.gid, P .. 'held:' .. g.gid)
  call('MSET', P .. 'list', version, P .. 'cursor', version)
  event(operation, g.name, '', g.client)
end
local function expire(set, operation)       -- who waits at a server that is there is alive, unless an operator has set its time to -1
  for _, member in ipairs(call('ZRANGEBYSCORE', P .. set, '-inf', now, 'LIMIT', 0, 500)) do
    local gid, who = string.match(member, '^(%d+):?(.*)$')
    local g, holder = load(gid), call('HGET', P .. 'held:' .. gid, who)
    if not g or who ~= '' and not g.guests[who] then call('ZREM', P .. set, member)
    elseif holder and tonumber(call('ZSCORE', P .. set, member)) >= 0 and call('EXISTS', P .. 'alive:' .. string.match(holder, '^(.-)/')) == 1 then
      keep_alive(gid, who)
    elseif who == '' then remove_game(g, operation)
    else remove_guest(g, who, operation) end
  end
end

local ops = {}
function ops.register_game(name, owner, client, info, listed)
  local gid = call('HGET', P .. 'names', name)
  local is_new, g = not gid, gid and load(gid)
  if is_new then
    check_room('"games"', call('ZCARD', P .. 'games'), max_games, tonumber(call('HGET', P .. 'clients', client) or 0), max_games_per_client)
    g = {gid = string.format('%.0f', version), name = name, owner = owner, client = client, info = '{}', listed = true, addresses = '[]', ready = false,
      changed = 0, news = version, told = -1, left = {}, dismissed = {}, guests = {}, size = 0}
  elseif g.owner ~= owner then error({'taken', name}) end
  g.info = given(info) or g.info
  if listed ~= '' then g.listed = listed == '1' end
  save(g, is_new)
  keep_alive(g.gid, '')
  if is_new then
    call('HSET', P .. 'names', name, g.gid)
    count(client, 1)
    event(op, name, '', client)
  end
  return {is_new and 1 or 0}
end
local function publish(g, addresses, replies, sessions)         -- the sessions of replies that are gone
  local gone, is_first = {}, g.changed == 0
  g.ready = addresses ~= '[]' or replies ~= nil
  if addresses ~= g.addresses then g.addresses, g.changed = addresses, version end
  for i = 1, #(replies or {}), 2 do
    local guest = g.guests[sessions[replies[i]]]
    if not guest then gone[#gone + 1] = replies[i]
    elseif guest.changed <= g.told and guest.reply ~= replies[i + 1] then guest.reply, guest.replied = replies[i + 1], version end
  end
  save(g)
  if is_first and g.changed > 0 then event('poll_game', g.name, 'first addresses', g.client) end
  for who, guest in pairs(g.guests) do
    local _, its_version = offer(g, guest)
    if its_version == version then wake(g.gid, who, '') end
  end
  return gone
end
function ops.poll_game(name, owner, addresses, after, token, replies, dismiss, seen_at)
  local g = owned(name, owner)
  keep_alive(g.gid, '')
  local since, told, sessions, guests, left, gone = since_of(after), g.told, {}, {}, {}, {}
  local has_moved = seen_at ~= '' and seen_at ~= g.seen_at
  g.seen_at = given(seen_at) or g.seen_at
  for who, guest in pairs(g.guests) do sessions[guest.id] = who end
  local is_again, answers = addresses == '', given(replies) and cjson.decode(replies)
  addresses = given(addresses) or g.addresses
  local is_same = addresses == g.addresses
  g.told = after == '' and cursor or since
  if answers or not is_same then gone = publish(g, addresses, answers, sessions) end
  for _, session in ipairs(given(dismiss) and cjson.decode(dismiss) or {}) do
    local who = sessions[session]
    if g.guests[who] then
      append(g.dismissed, who)
      remove_guest(g, who, 'dismiss_guest')
    end
  end
  if g.told ~= told or has_moved then save(g) end
  if g.news > since then
    for _, each in ipairs(after ~= '' and g.left or {}) do if each[1] > since then left[#left + 1] = each[2] end end
    for _, guest in pairs(g.guests) do
      if guest.changed > since then guests[#guests + 1] = {guest.born, guest.id, guest.sessionKey, guest.addresses, guest.seen_at} end
    end
  end
  local is_busy = is_same and #(answers or {}) == 0 and dismiss == ''
  return {g.gid, g.name, g.news, guests, left, gone, wait(g.gid, '', token, #guests + #left + #gone > 0, is_again, is_busy)}
end
function ops.start_game(name, who, addresses, after, token, client, seen_at, id, key)
  local g = found(name)
  if g.owner == who then error({'own_game'}) end
  for _, each in ipairs(g.dismissed) do if each == who then error({'dismissed', g.name}) end end
  local is_new, guest = not g.guests[who], g.guests[who]
  if is_new then
    if addresses == '' then error({'no_session', g.name}) end
    local all, own = guests_of(g, client)
    check_room('"guests"', all, max_guests, own, max_guests_per_client)
    guest = {id = id, sessionKey = key, client = client, born = version, addresses = '', changed = 0, reply = '', replied = 0, seen_at = ''}
    g.guests[who] = guest
  end
  local has_moved = addresses ~= '' and addresses ~= guest.addresses
  if has_moved then guest.addresses, guest.reply, guest.changed, g.news = addresses, '', version, version end
  guest.seen_at = given(seen_at) or guest.seen_at
  save(g, is_new)
  if has_moved then wake(g.gid, '', '') end
  keep_alive(g.gid, who)
  if is_new then event(op, g.name, 'guests: ' .. guests_of(g), client) end
  local text, its_version = offer(g, guest)
  local waits = wait(g.gid, who, token, text ~= '[]' and its_version > since_of(after), addresses == '', not has_moved)
  return {g.gid, g.name, its_version, guest.id, guest.sessionKey, text, g.seen_at or '', waits}
end
function ops.leave_game(name, who)
  local g = found(name)
  if not g.guests[who] then error({'no_guest', name}) end
  remove_guest(g, who, op)
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
function ops.get_game(name) return {line(found(name))} end
function ops.update_game(name, owner, new_name, info, listed)
  local g, other = owned(name, owner), call('HGET', P .. 'names', new_name)
  if other and other ~= g.gid then error({'taken', new_name}) end
  g.name, g.info = new_name, given(info) or g.info
  if listed ~= '' then g.listed = listed == '1' end
  save(g)
  if not other then
    call('HDEL', P .. 'names', name)
    call('HSET', P .. 'names', new_name, g.gid)
    for _, who in ipairs(call('HKEYS', P .. 'held:' .. g.gid)) do wake(g.gid, who, '!') end
    event(op, name, new_name, g.client)
  end
  return {line(g)}
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
GAME_SIZE, GUEST_SIZE = 1000, 350        # bytes that one takes in the store beside its texts (bench/store.py measures it)
TIMEOUT = 2.0           # seconds for the store to answer
TICK, SILENCE = 0.25, 1.0       # seconds between two signs of life, and without any, after which the subscription counts as cut
SPREAD = 1.0            # seconds over which all are asked again who may have missed something
MAX_BATCH = 256         # calls in one round trip

DOWN = functools.partial(Full, "the store of games does not answer", limit="store", headers={"Retry-After": "1"})
PROBLEMS: Mapping[bytes, Callable[..., Exception]] = {      # by what the script calls them, of what it says of them
    b"no_game": lambda name: NotFound(f"there is no game {name!r}"),
    b"no_guest": lambda name: NotFound(f"there is no session with the game {name!r} that could end"),
    b"no_session": lambda name: NotFound(f"the session with the game {name!r} is gone"),
    b"not_owner": lambda: Forbidden("the peerId is not the one that registered this game"),
    b"dismissed": lambda name: Forbidden(f"the host of the game {name!r} has sent you away"),
    b"own_game": lambda: Conflict("a host cannot start its own game"),
    b"taken": lambda name: Conflict(f"the name {name!r} is taken"),
    b"memory": lambda: Full("the server's memory for games is full", limit="memory"),
    b"full": lambda count, what: Full(f"there are {count} {what}, and no more may be", limit=what),
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
        self._list = 0, p2pserver.list_text(())
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
            self._redis = redis.Redis.from_url(re.sub("^valkey", "redis", settings.store), retry=Retry(NoBackoff(), 0), protocol=2,
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
        return p2pserver.keyed_digest(peer_id, self._secret)

    def register_game(self, name: str, digest: bytes, client: bytes = b"", **shown: Any) -> bool:
        return bool(self._ask("register_game", quoted(name), digest.hex(), client.hex(), *shown_as_text(**shown))[0])

    def poll_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, replies: Replies = None,
                  dismiss: Sequence[str] = (), wake: Wake = None, seen_at: str = "") -> News:
        flat = "" if replies is None else json.dumps([text for session_id, reply in replies.items() for text in (session_id, reply.decode())])
        (cursor, guests, left, gone), name, waiter = self._meet(
            ("poll_game", name, digest, addresses, after), wake, flat, json.dumps(dismiss) if dismiss else "", seen_at)
        peers = [Session(session_id.decode(), key.decode(), texts, seen_at.decode())
                 for _, session_id, key, texts, seen_at in sorted(guests, key=lambda guest: int(guest[0]))]
        return News(name, peers, cursor, waiter, [each.decode() for each in left], [each.decode() for each in gone])

    def start_game(self, name: str, digest: bytes, addresses: Text = None, after: Optional[int] = None, client: bytes = b"", seen_at: str = "",
                   wake: Wake = None) -> News:
        (cursor, session_id, key, offer, host), name, waiter = self._meet(
            ("start_game", name, digest, addresses, after), wake, client.hex(), seen_at, p2pserver.new_session_id(), p2pserver.new_session_id())
        peer = Session(session_id.decode(), key.decode(), offer, p2pserver.published_at(host.decode(), offer))
        return News(name, [peer], cursor, waiter)

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
            self._list = int(version), p2pserver.list_text([line for _, line in games])
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
