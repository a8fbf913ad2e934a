#!lua flags=allow-oom
-- State what a process holds.
-- KEYS[2] holdings of this recovery. ARGV[4] holder, [5] Holdings, [6] lifetime of all of them, ms
redis.call('HSET', KEYS[2], ARGV[4], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 1
