#!lua flags=allow-oom
-- Tell a worker to hand over and stop.
-- KEYS[3] its registration, [4] its inbox. ARGV[4] worker
-- Returns 1; 0: it is not registered
if redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
redis.call('XADD', KEYS[4], '*', 'type', 'drain')
return 1
