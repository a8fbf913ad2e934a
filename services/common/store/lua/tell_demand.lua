#!lua flags=allow-oom
-- The leader tells what its pool needs.
-- KEYS[2] leader, [3] demand. ARGV[4] fence, [5] PoolDemand
-- Returns 1; 0: the fence is not the leader's
if ARGV[4] ~= current_fence() then return 0 end
redis.call('HSET', KEYS[3], 'demand', ARGV[5], 'at_ms', text(NOW_MS))
return 1
