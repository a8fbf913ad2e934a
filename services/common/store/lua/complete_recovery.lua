#!lua flags=allow-oom
-- Moves are possible again.
-- KEYS[2] leader, [3] what was stated for it. ARGV[4] run id of the server that was recovered, [5] fence
-- Returns 1; 0: the fence is not the leader's, or this is another server
if ARGV[5] ~= (redis.call('GET', KEYS[2]) or '') or ARGV[4] ~= run_id() then return 0 end
redis.call('SET', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[3])
return 1
