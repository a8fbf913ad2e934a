#!lua flags=allow-oom
-- Add a worker, or change what is known of it.
-- KEYS[2] workers, [3] its registration. ARGV[4] worker, [5] WorkerInfo, [6] ttl_ms
redis.call('SADD', KEYS[2], ARGV[4])
redis.call('SET', KEYS[3], ARGV[5], 'PX', ARGV[6])
return 1
