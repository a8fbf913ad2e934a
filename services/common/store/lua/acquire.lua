#!lua flags=allow-oom
-- Take a free lease of leadership, or renew one's own. Works in recovery.
-- KEYS[2] leader, [3] epoch. ARGV[4] holder, [5] ttl_ms, [6] highest epoch that the holder knows
-- Returns the epoch; 0: another holds the lease
local holder, known_epoch = ARGV[4], tonumber(ARGV[6])
local fence = redis.call('GET', KEYS[2])
if fence then
  local epoch, by = string.match(fence, '^(%d+):(.*)$')
  if by ~= holder then return 0 end
  if tonumber(epoch) >= known_epoch then
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
    return tonumber(epoch)
  end
end
local stored = tonumber(redis.call('GET', KEYS[3]) or '0')
local epoch = math.max(stored, known_epoch) + 1
redis.call('SET', KEYS[3], text(epoch))
redis.call('SET', KEYS[2], text(epoch) .. ':' .. holder, 'PX', ARGV[5])
return epoch
