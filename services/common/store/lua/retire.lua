#!lua flags=allow-oom
-- Remove a worker that has no requests: registration, membership, inbox.
-- KEYS[2] workers, [3] its registration, [4] its inbox, [6] leader. ARGV[4] worker, [5] "leader" or "self", [6] fence
-- Returns 1; 0: the fence is not the leader's, or the worker still has requests
if ARGV[5] == 'leader' and ARGV[6] ~= (redis.call('GET', KEYS[6]) or '') then return 0 end
for _, entry in ipairs(redis.call('XRANGE', KEYS[4], '-', '+')) do
  if entry[2][2] == 'start' then return 0 end
end
redis.call('SREM', KEYS[2], ARGV[4])
redis.call('DEL', KEYS[3], KEYS[4])
return 1
