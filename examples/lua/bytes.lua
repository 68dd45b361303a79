-- What Lua 5.1 lacks: numbers as bytes, random bytes, HMAC-SHA1 and the CRC-32 of zlib. In LÖVE love.data.hash("sha1", text) can stand for sha1.
local bit = require "bit"
local band, bor, bxor, rol, rshift, tobit = bit.band, bit.bor, bit.bxor, bit.rol, bit.rshift, bit.tobit
local bytes = {}

local urandom = assert(io.open("/dev/urandom", "rb"))      -- on Windows, take love.data.hash of what nobody can guess
function bytes.random(count) return urandom:read(count) end

function bytes.half(number) return string.char(band(rshift(number, 8), 255), band(number, 255)) end
function bytes.word(number) return bytes.half(rshift(number, 16)) .. bytes.half(number) end
function bytes.half_at(text, at) return text:byte(at) * 256 + text:byte(at + 1) end
function bytes.word_at(text, at) return bytes.half_at(text, at) * 65536 + bytes.half_at(text, at + 2) end

function bytes.sha1(text)        -- FIPS 180-4 section 6.1
  local h = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0}
  text = text .. "\128" .. ("\0"):rep((55 - #text) % 64 + 4) .. bytes.word(8 * #text)
  for at = 1, #text, 64 do
    local w, a, b, c, d, e = {}, unpack(h)
    for i = 0, 79 do
      w[i] = i < 16 and bytes.word_at(text, at + 4 * i) or rol(bxor(w[i - 3], w[i - 8], w[i - 14], w[i - 16]), 1)
      local f, k = bxor(b, c, d), i < 40 and 0x6ed9eba1 or 0xca62c1d6
      if i < 20 then
        f, k = bxor(d, band(b, bxor(c, d))), 0x5a827999
      elseif i >= 40 and i < 60 then
        f, k = bor(band(b, c), band(d, bor(b, c))), 0x8f1bbcdc
      end
      a, b, c, d, e = tobit(rol(a, 5) + f + e + k + w[i]), a, rol(b, 30), c, d
    end
    for i, each in ipairs {a, b, c, d, e} do h[i] = tobit(h[i] + each) end
  end
  return bytes.word(h[1]) .. bytes.word(h[2]) .. bytes.word(h[3]) .. bytes.word(h[4]) .. bytes.word(h[5])
end

function bytes.hmac(key, text)       -- RFC 2104, for keys of up to 64 bytes
  local function pad(with) return (key .. ("\0"):rep(64 - #key)):gsub(".", function(c) return string.char(bxor(c:byte(), with)) end) end
  return bytes.sha1(pad(0x5c) .. bytes.sha1(pad(0x36) .. text))
end

function bytes.crc32(text)
  local crc = -1
  for at = 1, #text do
    crc = bxor(crc, text:byte(at))
    for _ = 1, 8 do crc = bxor(rshift(crc, 1), band(crc, 1) * 0xedb88320) end
  end
  return bxor(crc, -1)
end

return bytes
