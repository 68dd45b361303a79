-- lua5.1 peer.lua host|join NAME [SERVER]: a host that echoes what its guests say until Ctrl-C, or a guest that says hello five times.
package.path = arg[0]:gsub("[^/]*$", "?.lua;") .. package.path
local Endpoint, socket, url = require "p2p", require "socket", require "socket.url"
local role, name, server = arg[1], arg[2], arg[3] or "http://localhost:8000"
local endpoint = Endpoint.open(server)
local peer, reason, number, stun, next_call, next_hello = nil, nil, 1, nil, 0, 0
io.stdout:setvbuf("line")

function endpoint.on_connect(session)
  peer = session
  print("connected with " .. session.selected)
end

function endpoint.on_message(session, text)
  if role == "host" then return endpoint:send(text, session.selected) end
  if text == "hello " .. number then
    print("back came " .. text)
    number, next_hello = number + 1, 0
  end
end

function endpoint.on_end(why) reason = role == "join" and why or print("a guest is gone: " .. why) end

local function ask()        -- poll or start again, at the server's pace
  local answer, why, status = endpoint:call("POST", role == "host" and "/games/poll" or "/games/start",
    {name = name, addresses = endpoint:addresses()})
  next_call = socket.gettime() + (answer and answer.pollAfter or 2)
  if not answer then
    reason = (not stun or status >= 400 and status < 500 and status ~= 429) and why      -- a server that is gone may come back
  elseif role == "host" then
    for _, guest in ipairs(answer.guests) do endpoint:learn(guest, false) end
  else
    stun = answer.stun[1]
    if #answer.addresses > 0 then endpoint:learn(answer, true) end
  end
end

local function play()
  if role == "host" then
    stun = assert(endpoint:call("POST", "/games/register", {name = name})).stun[1]
    print(name .. " is on offer")
  end
  while not reason and number <= 5 do
    local before, now = endpoint.mapped, socket.gettime()
    endpoint:ask_stun(stun, now)
    endpoint:step()
    if now >= next_call or endpoint.mapped ~= before then ask() end
    if peer and role == "join" and now >= next_hello then       -- until it comes back: a datagram may be lost
      next_hello = now + 0.1
      endpoint:send("hello " .. number, peer.selected)
    end
  end
end

local ok, fault = pcall(play)       -- Ctrl-C is an error, "interrupted!"
endpoint:call(role == "host" and "DELETE" or "POST", role == "host" and "/games/" .. url.escape(name) or "/games/leave", {name = name})
if reason or not ok then io.stderr:write(reason or fault, "\n") end
os.exit((reason or not ok) and 1 or 0)
