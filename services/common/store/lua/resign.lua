#!lua flags=allow-oom
-- Give the lease of leadership up, if it is one's own.
-- KEYS[2] leader. ARGV[4] holder
local fence = redis.call('GET', KEYS[2])
if fence and string.match(fence, '^%d+:(.*)$') == ARGV[4] then redis.call('DEL', KEYS[2]) end
return 1
