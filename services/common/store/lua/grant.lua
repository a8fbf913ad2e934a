#!lua
-- How many of the calls that wait at a gateway may go on: services/common/grants.py.
-- KEYS[2] the pool's grants
-- ARGV[4] gateway, [5] its calls on their way, [6] how many more it wants, [7] most entries of the intake, [8] for how
-- long what it states counts, in ms
-- Returns granted, taken
local on_their_way, life_ms = tonumber(ARGV[5]), tonumber(ARGV[8])
local taken = redis.call('XLEN', INTAKE) + on_their_way
local stated = redis.call('HGETALL', KEYS[2])
for position = 1, #stated, 2 do
  local calls, until_ms = string.match(stated[position + 1], '^(%d+) (%d+)$')
  if tonumber(until_ms) <= NOW_MS then
    redis.call('HDEL', KEYS[2], stated[position])
  elseif stated[position] ~= ARGV[4] then
    taken = taken + tonumber(calls)
  end
end

local granted = math.max(0, math.min(tonumber(ARGV[6]), tonumber(ARGV[7]) - taken))
if on_their_way + granted == 0 then
  redis.call('HDEL', KEYS[2], ARGV[4])
else
  redis.call('HSET', KEYS[2], ARGV[4], text(on_their_way + granted) .. ' ' .. text(NOW_MS + life_ms))
  -- Beyond that only for what no gateway asks about any more: each removes what is over.
  redis.call('PEXPIRE', KEYS[2], 60 * life_ms)
end
return {granted, taken}
