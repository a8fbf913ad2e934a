#!lua flags=no-writes
-- Where requests stand.
-- ARGV[4...] keys
-- Returns for each: nothing (there is none), or state, reader, attempt, nonce, worker, gateway, reader_left_at_ms, resume_ms,
-- traceparent
if recovering() then return RECOVERING end

local peeks = {}
for position = 4, #ARGV do
  local v = redis.call('HMGET', request_key(ARGV[position]), 'state', 'reader', 'attempt', 'nonce', 'worker', 'gateway',
    'reader_left_at_ms', 'resume_ms', 'traceparent')
  peeks[#peeks + 1] = v[1] and v or {}
end
return peeks
