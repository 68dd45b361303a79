-- A plain peer after docs/WIRE.md and docs/API.md, for Lua 5.1 and LuaJIT, as LÖVE has it, over IPv4. peer.lua shows how a game uses it.
-- It needs LuaSocket, lua-cjson and bit: Debian's lua-socket, lua-cjson and lua-bitop; LuaJIT has the last one itself.
local bytes, cjson, http, ltn12 = require "bytes", require "cjson", require "socket.http", require "ltn12"
local socket, url, bxor = require "socket", require "socket.url", require("bit").bxor
local half, half_at, random, word, word_at = bytes.half, bytes.half_at, bytes.random, bytes.word, bytes.word_at

local COOKIE, REQUEST, SUCCESS, FINGERPRINT, CONTROLLED, CONTROLLING = 0x2112a442, 0x0001, 0x0101, 0x8028, 0x8029, 0x802a
local USERNAME, INTEGRITY, MAPPED, PRIORITY, USE_CANDIDATE = 0x0006, 0x0008, 0x0020, 0x0024, 0x0025

local function fingerprint(text) return word(bxor(bytes.crc32(text), 0x5354554e)) end
local function head(kind, length, transaction) return half(kind) .. half(length) .. word(COOKIE) .. transaction end
local function attribute(kind, value) return half(kind) .. half(#value) .. value .. ("\0"):rep(-#value % 4) end

local function encode(kind, transaction, body, key)
  if key then body = body .. attribute(INTEGRITY, bytes.hmac(key, head(kind, #body + 24, transaction) .. body)) end
  local message = head(kind, #body + 8, transaction) .. body
  return message .. attribute(FINGERPRINT, fingerprint(message))
end

local function decode(text)     -- nil: it is the game's
  if #text < 20 or #text % 4 > 0 or text:byte() > 3 or word_at(text, 5) ~= COOKIE then return nil end
  local message, at = {kind = half_at(text, 1), transaction = text:sub(9, 20)}, 21
  while at < #text do
    local kind, size = half_at(text, at), half_at(text, at + 2)
    local value = text:sub(at + 4, at + 3 + size)
    if kind == FINGERPRINT then return value == fingerprint(text:sub(1, at - 1)) and message or nil end
    if not message.signed then message[kind] = message[kind] or value end
    if kind == INTEGRITY then message.signed = message.signed or head(message.kind, at + 3, message.transaction) .. text:sub(21, at - 1) end
    at = at + 4 + size + -size % 4
  end
  return not message.signed and message or nil     -- the answer of a STUN server needs no FINGERPRINT
end

local function is_authentic(message, key) return message.signed and bytes.hmac(key, message.signed) == message[INTEGRITY] end
local function ip_of(address) return address:match("^[^:]*") end

local function pack_address(address)
  local a, b, c, d, port = address:match("^(%d+)%.(%d+)%.(%d+)%.(%d+):(%d+)$")
  return half(1) .. half(bxor(port, 0x2112)) .. word(bxor(word_at(string.char(a, b, c, d), 1), COOKIE))
end

local function unpack_address(value)
  return table.concat({word(bxor(word_at(value, 5), COOKIE)):byte(1, 4)}, ".") .. ":" .. bxor(half_at(value, 3), 0x2112)
end

local Endpoint = {}     -- one UDP socket with all its sessions, which are tables; on_connect, on_message and on_end are the game's

function Endpoint.open(server)
  local self = setmetatable({server = server, sessions = {}, socket = socket.udp(), next_check = 0, next_question = 0}, {__index = Endpoint})
  self.peer_id = random(16):gsub(".", function(c) return ("%02x"):format(c:byte()) end)
  self.server_ip = assert(socket.dns.toip(url.parse(server).host))
  local probe = socket.udp()
  probe:setpeername(self.server_ip, 9)
  self.ip = probe:getsockname()     -- from which we reach the server
  probe:close()
  self.socket:setsockname("0.0.0.0", 0)
  self.socket:settimeout(0.005)
  return self
end

function Endpoint:call(method, path, body)      -- the answer, or nil, why, status; all else waits meanwhile: in LÖVE, call in a love.thread
  body.peerId = self.peer_id
  local text, parts = cjson.encode(body), {}
  local ok, status = http.request {url = self.server .. path, method = method, source = ltn12.source.string(text), sink = ltn12.sink.table(parts),
    headers = {["Content-Type"] = "application/json", ["Content-Length"] = #text}}
  local is_json, answer = pcall(cjson.decode, table.concat(parts))
  if ok and status < 300 then return is_json and answer or {} end
  return nil, is_json and answer.detail or status, ok and status or 0
end

function Endpoint:addresses() return {self.ip .. ":" .. select(2, self.socket:getsockname()), self.mapped} end

function Endpoint:is_usable(text)
  local near, a, b, port = tostring(text):match("^((%d+)%.(%d+)%.)%d+%.%d+:(%d+)$")
  a, b, port = tonumber(a), tonumber(b), tonumber(port)
  if not a or a == 0 or a > 223 or a == 169 and b == 254 or port < 1024 and port ~= 80 and port ~= 443 then return false end
  local is_private = a == 10 or a == 127 or a == 172 and b >= 16 and b < 32 or a == 192 and b == 168 or a == 100 and b >= 64 and b < 128
  return not is_private or self.ip:sub(1, #near) == near
end

function Endpoint:learn(told, is_guest)     -- of a guest that a poll told of, or of the host in a start
  local session = self.sessions[told.sessionId] or {id = told.sessionId, key = told.sessionKey, from = told.from, is_guest = is_guest, unheard = {},
    began = socket.gettime(), due = 0, sent = 0, tie_breaker = random(8), remotes = {}, waiting = {}, heard = {}, proven = {}, pending = {}}
  self.sessions[session.id] = session
  for _, address in ipairs(told.addresses) do
    if self:is_usable(address) and not session.remotes[address] then
      session.remotes[address], session.remotes[#session.remotes + 1] = true, address
      if session.selected then session.urgent = address end
    end
  end
end

function Endpoint:send(text, address) self.socket:sendto(text, ip_of(address), tonumber(address:match("%d+$"))) end

local function may_check(session, ip, now)      -- a host is told by a guest whom to check: it may be anybody
  if session.is_guest or ip == session.from or session.heard[ip] then return true end
  local count, latest = unpack(session.unheard[ip] or {0, 0})
  local allowed = now >= latest + (({0, 0.05, 1, 3, 5})[count + 1] or math.huge)
  if allowed then session.unheard[ip] = {count + 1, now} end
  return allowed
end

function Endpoint:check(session, now)       -- the next one, if one may go out
  session.due = now + (session.sent == 0 and 0.01 or session.sent < math.max(20, 3 * #session.remotes) and 0.05 or 0.17)
  local consent = session.selected and now >= session.consent
  local renominates = session.selected and session.is_guest and session.nominated ~= session.selected
  local address = (consent or renominates) and session.selected or session.urgent
  session.urgent = address ~= session.urgent and session.urgent or nil
  address = address or not session.selected and session.remotes[session.sent % math.max(1, #session.remotes) + 1]
  if consent then session.consent = now + 4 + 2 * math.random() else session.sent = session.sent + (address and 1 or 0) end
  if not address or session.sent > 100 and not consent or not may_check(session, ip_of(address), now) then return end
  local transaction, nominates = random(12), session.is_guest and (session.selected or address) == address
  if nominates then session.nominated = address end
  session.pending[transaction], self.next_check = address, now + 0.005
  self:send(encode(REQUEST, transaction, attribute(USERNAME, session.id .. ":" .. session.id)
    .. attribute(session.is_guest and CONTROLLING or CONTROLLED, session.tie_breaker) .. attribute(PRIORITY, word(0x6effffff))
    .. (nominates and attribute(USE_CANDIDATE, "") or ""), session.key), address)
end

function Endpoint:select(session, source, now)      -- after each message that has come
  local address = session.nominated
  if session.is_guest then address = (not session.selected or now - session.answered > 6) and source or nil end
  if not address or not session.proven[address] or address == session.selected then return end
  local is_first = not session.selected
  session.selected, session.answered, session.consent = address, now, now + 5
  if is_first then self.on_connect(session) end
end

function Endpoint:requested(session, message, source, now)
  if not is_authentic(message, session.key) or not message[session.is_guest and CONTROLLED or CONTROLLING] then return end
  self:send(encode(SUCCESS, message.transaction, attribute(MAPPED, pack_address(source)), session.key), source)
  session.heard[source], session.heard[ip_of(source)] = true, true
  if not session.proven[source] then session.urgent, session.due = source, 0 end
  if not session.is_guest and message[USE_CANDIDATE] then session.nominated = source end
  self:select(session, source, now)
end

function Endpoint:answered(session, message, source, now)
  if session.pending[message.transaction] ~= source or not is_authentic(message, session.key) then return end
  session.pending[message.transaction] = nil
  session.heard[source], session.heard[ip_of(source)], session.proven[source] = true, true, true
  if source == session.selected then session.answered = now end
  self:select(session, source, now)
end

function Endpoint:take(text, source, now)
  local message = decode(text) or {}
  local named = message.kind == REQUEST and self.sessions[(message[USERNAME] or ""):match("^[^:]*")]
  if named then self:requested(named, message, source, now) end
  if message.transaction == self.question and message[MAPPED] then self.mapped = unpack_address(message[MAPPED]) end
  for _, session in pairs(self.sessions) do
    if message.kind == SUCCESS then self:answered(session, message, source, now) end
    if not message.kind and session.heard[source] and #session.waiting < 64 then table.insert(session.waiting, text) end
    while session.selected and session.waiting[1] do self.on_message(session, table.remove(session.waiting, 1)) end
  end
end

function Endpoint:ask_stun(port, now)       -- every 15 seconds, until it has answered every half
  if not port or now < self.next_question then return end
  self.question, self.next_question = random(12), now + (self.mapped and 15 or 0.5)
  self:send(encode(REQUEST, self.question, ""), self.server_ip .. ":" .. port)
end

function Endpoint:step()        -- what a game calls in each of its frames, or all the time; it waits 5 milliseconds for datagrams
  local text, ip, port = self.socket:receivefrom()
  local now = socket.gettime()
  if text then self:take(text, ip .. ":" .. port, now) end
  for id, session in pairs(self.sessions) do
    if now - (session.answered or session.began) > (session.selected and 40 or 15) then
      self.sessions[id] = nil
      self.on_end(session.selected and "the other player has been silent" or "no check got through in both directions")
    elseif now >= math.max(self.next_check, session.due) then self:check(session, now) end
  end
end

return Endpoint
