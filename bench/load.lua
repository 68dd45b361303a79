-- What wrk sends. Arguments after --: KIND GAMES [CLOSE [ETAG]]
--
--   poll   polls of GAMES games in turn, each with the addresses of its own that its host publishes with every poll
--   list   GET /games with If-None-Match: ETAG, and from then on with the newest ETag seen
--   mix    the two in turn
--
-- CLOSE: "close" asks for a new connection for each request, "keep" does not.
-- Prints one line of JSON when it is done: what was counted, and the time in microseconds.

local threads = {}
local turn = 0

function setup(thread)
    table.insert(threads, thread)
end

function init(arguments)
    kind, games, etag = arguments[1], tonumber(arguments[2]), arguments[4]
    lists_changed = 0       -- how many lists came with 200: the ETag had become old
    wrk.headers["User-Agent"] = "bench"
    wrk.headers["Accept"] = "*/*"
    if arguments[3] == "close" then
        wrk.headers["Connection"] = "close"
    end
    if kind ~= "list" then
        polls = {}
        for i = 0, games - 1 do
            polls[i] = poll(i)
        end
    end
    if kind ~= "poll" then
        response = see_list     -- wrk looks for it after this; polls alone are not slowed by it
    end
end

-- The same names as client.game() in Python.
function poll(i)
    local body = string.format(
        '{"name":"game-%05d","peerId":"the-secret-of-host-%05d","addresses":["203.0.113.%d:%d","192.168.%d.%d:41000"],"after":0}',
        i, i, i % 250 + 1, 1024 + i, math.floor(i / 250) + 1, i % 250 + 1)
    local headers = {["Content-Type"] = "application/json"}
    for name, value in pairs(wrk.headers) do
        headers[name] = value
    end
    return wrk.format("POST", "/games/poll", headers, body)
end

function list()
    local headers = {["If-None-Match"] = etag}
    for name, value in pairs(wrk.headers) do
        headers[name] = value
    end
    return wrk.format("GET", "/games", headers)
end

function request()
    turn = turn + 1
    if kind == "list" or kind == "mix" and turn % 2 == 0 then
        list_request = list_request or list()
        return list_request
    end
    return polls[turn % games]
end

function see_list(status, headers)
    if status ~= 200 then
        return
    end
    for name, value in pairs(headers) do
        if name:lower() == "etag" then
            lists_changed = lists_changed + 1
            if value ~= etag then
                etag, list_request = value, nil
            end
        end
    end
end

function done(summary, latency)
    local changed = 0
    for _, thread in ipairs(threads) do
        changed = changed + thread:get("lists_changed")
    end
    local errors = summary.errors
    print(string.format(
        '{"requests":%d,"duration":%d,"refused":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d,"lists_changed":%d,"median":%d,"p99":%d}',
        summary.requests, summary.duration, errors.status, errors.connect, errors.read, errors.write, errors.timeout,
        changed, latency:percentile(50), latency:percentile(99)))
end
