#!lua flags=allow-oom
-- A worker tells the leader of its progress, and stays registered.
-- KEYS[3] its registration, [5] events. ARGV[4] worker, [5] WorkerReport, [6] ttl_ms
-- Returns 1; 0: it is not registered
if redis.call('PEXPIRE', KEYS[3], ARGV[6]) == 0 then return 0 end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', MAX_EVENTS, '*', 'report', ARGV[5])
return 1
