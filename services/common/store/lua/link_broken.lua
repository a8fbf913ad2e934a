#!lua flags=allow-oom
-- A gateway's stream from a worker broke: a hint for the leader, unless the worker has closed its registration itself.
-- KEYS[3] its registration, [5] events. ARGV[4] worker, [5] LinkBroken
-- Returns 1; 0: it is not registered
if redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', MAX_EVENTS, '*', 'link_broken', ARGV[5])
return 1
