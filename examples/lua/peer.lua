-- lua5.1 peer.lua host|join NAME [SERVER]: a host that sends everything back, or a guest that says hello five times,
-- as docs/WIRE.md has it, with LuaSocket, lua-cjson and bit. It sends no P2P and is a plain peer: datagrams may be
-- lost, doubled, reordered or forged. A game should add: IPv6; private networks among the addresses to skip, and the
-- budget over all sessions (Checks); the way back after a silence (Silence); a file for a host's peerId; in LOVE a
-- thread for request(), which blocks; on Windows another source of randomness.

local socket, http, ltn12, url = require "socket", require "socket.http", require "ltn12", require "socket.url"
local json, bit = require "cjson", require "bit"
local band, bor, bxor, rol, rshift = bit.band, bit.bor, bit.bxor, bit.rol, bit.rshift

local REQUEST, SUCCESS, USERNAME, INTEGRITY, XOR_MAPPED_ADDRESS = 0x0001, 0x0101, 0x0006, 0x0008, 0x0020
local PRIORITY, USE_CANDIDATE, FINGERPRINT, CONTROLLED, CONTROLLING = 0x0024, 0x0025, 0x8028, 0x8029, 0x802a
local COOKIE, PEER_REFLEXIVE = "\33\18\164\66", "\110\255\255\255"
local MASK = "\0\0\33\18" .. COOKIE      -- of XOR-MAPPED-ADDRESS: a zero, the family, port and IP address
local urandom = assert(io.open("/dev/urandom", "rb"))
http.TIMEOUT = 5
io.stdout:setvbuf "line"
math.randomseed(urandom:read(1):byte())

local function uint16(number) return string.char(rshift(number, 8), band(number, 255)) end
local function uint32(number) return uint16(rshift(number, 16)) .. uint16(band(number, 65535)) end
local function attribute(type, value) return uint16(type) .. uint16(#value) .. value .. ("\0"):rep(-#value % 4) end
local function read16(text, at) return 256 * text:byte(at) + text:byte(at + 1) end
local function read32(text, at) return 65536 * read16(text, at) + read16(text, at + 2) end

local function crc32(text)
  local crc = -1
  for i = 1, #text do
    crc = bxor(crc, text:byte(i))
    for _ = 1, 8 do crc = bxor(rshift(crc, 1), band(-band(crc, 1), 0xedb88320)) end
  end
  return bit.bnot(crc)
end

local function sha1(text)
  local h = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0 }
  text = text .. "\128" .. ("\0"):rep((55 - #text) % 64) .. uint32(0) .. uint32(8 * #text)
  for chunk = 1, #text, 64 do
    local w, a, b, c, d, e = {}, unpack(h)
    for i = 0, 79 do
      w[i] = i < 16 and read32(text, chunk + 4 * i) or rol(bxor(w[i - 3], w[i - 8], w[i - 14], w[i - 16]), 1)
      local f, k = bxor(b, c, d), i < 40 and 0x6ed9eba1 or 0xca62c1d6
      if i < 20 then f, k = bxor(d, band(b, bxor(c, d))), 0x5a827999 end
      if i >= 40 and i < 60 then f, k = bor(band(b, c), band(d, bor(b, c))), 0x8f1bbcdc end
      a, b, c, d, e = bit.tobit(rol(a, 5) + f + e + k + w[i]), a, rol(b, 30), c, d
    end
    for i, value in ipairs { a, b, c, d, e } do h[i] = bit.tobit(h[i] + value) end
  end
  return uint32(h[1]) .. uint32(h[2]) .. uint32(h[3]) .. uint32(h[4]) .. uint32(h[5])
end

local function xor(text, mask)
  local bytes = {}
  for i = 1, #mask do bytes[i] = string.char(bxor(text:byte(i) or 0, mask:byte(i))) end
  return table.concat(bytes)
end

-- HMAC-SHA1 (RFC 2104) over what comes before MESSAGE-INTEGRITY, with a length in the header that counts it already.
local function sign(head, key)
  head = head:sub(1, 2) .. uint16(#head - 20 + 24) .. head:sub(5)
  return sha1(xor(key, ("\92"):rep(64)) .. sha1(xor(key, ("\54"):rep(64)) .. head))
end

-- A message. A question to a STUN server has no key.
local function encode(kind, transaction, attributes, key)
  local message = uint16(kind) .. "\0\0" .. COOKIE .. transaction .. attributes
  if key then message = message .. attribute(INTEGRITY, sign(message, key)) end
  message = message:sub(1, 2) .. uint16(#message - 20 + 8) .. message:sub(5)
  return message .. attribute(FINGERPRINT, uint32(bxor(crc32(message), 0x5354554e)))
end

-- Kind, transaction, values by type, what comes before MESSAGE-INTEGRITY; nil if it is the game's.
local function decode(datagram)
  if #datagram < 20 or datagram:byte() > 3 or datagram:sub(5, 8) ~= COOKIE then return nil end
  local values, at, signed = {}, 21, nil
  while at + 3 <= #datagram and not signed do
    local type, length = read16(datagram, at), read16(datagram, at + 2)
    if type == INTEGRITY then signed = datagram:sub(1, at - 1) end
    values[type] = values[type] or datagram:sub(at + 4, at + 3 + length)
    at = at + 4 + length + -length % 4
  end
  return read16(datagram, 1), datagram:sub(9, 20), values, signed
end

local role, name, server = arg[1], arg[2], arg[3] or "http://localhost:8000"
local function fail(why) io.stderr:write(why, "\n") os.exit(1) end
if not name or role ~= "host" and role ~= "join" then fail "usage: peer.lua host|join NAME [SERVER]" end
local is_host, sessions, cursor, call_at = role == "host", {}, nil, 0       -- a host has a session for each guest
local checks = setmetatable({}, { __mode = "v" })       -- sessions by transaction and address, until the answer comes
local heard = setmetatable({}, { __mode = "v" })        -- sessions by address from which something authentic came
local peer_id, tie_breaker = ("%02x"):rep(16):format(urandom:read(16):byte(1, 16)), urandom:read(8)
local server_ip, question, stun_port = assert(socket.dns.toip(url.parse(server).host)), urandom:read(12), nil
local udp, probe = socket.udp(), socket.udp()
udp:setsockname("*", 0)
udp:settimeout(0)
probe:setpeername(server_ip, 80)        -- tells from which address we reach the server
local addresses = { probe:getsockname() .. ":" .. select(2, udp:getsockname()) }
local function send(data, address) udp:sendto(data, address:match("(.*):(.*)")) end

local function request(method, path, fields)
  fields.name, fields.peerId = name, peer_id
  local body, parts = json.encode(fields), {}
  local done, status = http.request { url = server .. "/games/" .. path, method = method,
    headers = { ["Content-Type"] = "application/json", ["Content-Length"] = #body },
    source = ltn12.source.string(body), sink = ltn12.sink.table(parts) }
  local is_json, answer = pcall(json.decode, table.concat(parts))
  if done and is_json and status < 400 then return answer end
  return nil, is_json and answer.detail or status
end

-- Registers, polls or starts, takes the sessions of the answer, and asks STUN, whose answer the next call tells.
local function call()
  local path = not is_host and "start" or cursor and "poll" or "register"
  local answer, why = request("POST", path, { addresses = addresses, after = cursor })
  cursor, call_at = answer and (answer.cursor or 0), socket.gettime() + (answer and answer.pollAfter or 5)
  if not answer then return why end       -- a host registers again
  stun_port = answer.stun and answer.stun[1] or stun_port
  if stun_port then udp:sendto(encode(REQUEST, question, ""), server_ip, stun_port) end
  for _, told in ipairs(answer.guests or { answer.sessionId and answer }) do
    local session = sessions[told.sessionId] or { key = told.sessionKey, proven = {}, inbox = {}, turn = 0,
      due = 0, answered = socket.gettime() }
    sessions[told.sessionId], session.addresses = session, told.addresses
    if is_host then session.turn, session.due = 0, 0 end        -- all told is new
  end
end

-- Sends the next check. Five of a host open its router, whatever a guest claims; the checks of the guest do the rest.
local function check(id, session, now)
  local turn, selected, most = session.turn, session.selected, is_host and 5 or 100
  local address = session.unproven or selected or turn < most and session.addresses[turn % #session.addresses + 1]
  local wait = turn < (is_host and 1 or 20) and 0.05 or is_host and 2 or 0.17
  session.due, session.turn, session.unproven = now + (selected and 4 + 2 * math.random() or wait), turn + 1, nil
  if not tostring(address):match("^[%d.]+:%d%d%d%d%d?$") then return end
  local transaction, nominates = urandom:read(12), not is_host and address == (session.nominated or address)
  checks[transaction .. address] = session
  send(encode(REQUEST, transaction, attribute(USERNAME, id .. ":" .. id)
    .. attribute(is_host and CONTROLLED or CONTROLLING, tie_breaker) .. attribute(PRIORITY, PEER_REFLEXIVE)
    .. (nominates and attribute(USE_CANDIDATE, "") or ""), session.key), address)
end

local function receive(datagram, from)
  local kind, transaction, values, signed = decode(datagram)
  if not kind and heard[from] then table.insert(heard[from].inbox, datagram) end
  if kind == SUCCESS and transaction == question then
    local value = xor(values[XOR_MAPPED_ADDRESS], MASK)
    local mapped = table.concat({ value:byte(5, 8) }, ".") .. ":" .. read16(value, 3)
    if mapped ~= addresses[2] then addresses[2], call_at = mapped, 0 end
  end
  local is_check = kind == REQUEST and values[USERNAME] and values[is_host and CONTROLLING or CONTROLLED]
  local session = kind == SUCCESS and checks[transaction .. from]
  if is_check then session = sessions[values[USERNAME]:match("[^:]*")] end
  if not session or not signed or sign(signed, session.key) ~= values[INTEGRITY] then return end
  heard[from] = session
  if is_check then
    local a, b, c, d, port = from:match("(%d+)%.(%d+)%.(%d+)%.(%d+):(%d+)")
    local mapped = xor("\0\1" .. uint16(port) .. string.char(a, b, c, d), MASK)
    send(encode(SUCCESS, transaction, attribute(XOR_MAPPED_ADDRESS, mapped), session.key), from)
    if is_host and values[USE_CANDIDATE] then session.nominated = from end
    if not session.proven[from] then session.unproven, session.due = from, 0 end      -- to be checked before all others
  else
    checks[transaction .. from], session.proven[from], session.answered = nil, true, socket.gettime()
    if not is_host then session.nominated = session.nominated or from end
  end
  local chosen = session.nominated
  if session.proven[chosen] and session.selected ~= chosen then session.selected, session.due = chosen, 0 end
end

-- Does what is due. One check at a time keeps 5 ms between any two.
local function update()
  local now = socket.gettime()
  if now >= call_at then call() end
  for datagram, ip, port in function() return udp:receivefrom() end do receive(datagram, ip .. ":" .. port) end
  for id, session in pairs(sessions) do
    if now > session.answered + 40 then sessions[id] = nil
    elseif now >= session.due then return check(id, session, now) end
  end
end

local function play()
  local count, why = 1, call()
  if why then error(why, 0) end
  if is_host then print(name .. " is on offer at " .. server) end
  while count <= 5 do
    update()
    if not (is_host or next(sessions)) then error("there is no connection", 0) end
    for _, session in pairs(sessions) do
      while session.selected and #session.inbox > 0 do
        local data = table.remove(session.inbox, 1)
        if is_host then send(data, session.selected)
        elseif data == "hello " .. count then print("back came " .. data) count = count + 1 end
      end     -- about ten times a second, until it comes back:
      if not is_host and session.selected and math.random(10) == 1 then send("hello " .. count, session.selected) end
    end
    socket.sleep(0.01)
  end
end

local done, why = pcall(play)       -- Ctrl-C is the error "interrupted!"
request(is_host and "DELETE" or "POST", is_host and url.escape(name) or "leave", {})
if not done and not why:find("interrupted!", 1, true) then fail(why) end
