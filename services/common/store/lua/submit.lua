#!lua
-- Accept a request: its record comes into being, in the intake under attempt 1. Refused when memory is full.
-- ARGV[4] key, [5] digest, [6] payload, [7] n, [8] nonce, [9] gateway, [10] resume_ms, [11] deadline_ms from now (0: none),
-- [12] most entries of the intake, [13] prompt_tokens, [14] max_tokens, [15] priority, [16] tenant,
-- [17] traceparent, [18] most requests of the tenant in flight (0: any number), [19] tokens that it may take a minute (0: any
-- number), [20] tokens that this one takes for good, [21] and for its answer, of which it gives back what it does not generate
-- Returns verdict, choice, index, accepted_at_ms, deadline_at_ms, now_ms
if recovering() then return RECOVERING end

local known = redis.call('HMGET', request_key(ARGV[4]), 'digest', 'accepted_at_ms', 'deadline_at_ms')
if known[1] then
  if known[1] ~= ARGV[5] then return {'conflict', 0, 0, 0, 0, NOW_MS} end
  return {'known', 0, 0, tonumber(known[2]), tonumber(known[3]), NOW_MS}
end
local in_flight, tenant_limit = redis.call('SCARD', in_flight_key(ARGV[4])), tonumber(ARGV[18])
if tenant_limit > 0 and in_flight >= tenant_limit then return {'quota', 0, in_flight, 0, 0, NOW_MS} end
local per_minute, back_at_ms = tonumber(ARGV[19]), 0
if per_minute > 0 then
  local tokens = tonumber(ARGV[20]) + tonumber(ARGV[21])
  back_at_ms = math.max(tokens_back_at_ms(ARGV[4]), NOW_MS) + math.ceil(tokens * MINUTE_MS / per_minute)
  local short_ms = back_at_ms - NOW_MS - MINUTE_MS
  if short_ms > 0 then return {'tokens', 0, short_ms, 0, 0, NOW_MS} end
end
local length = redis.call('XLEN', INTAKE)
if length >= tonumber(ARGV[12]) then return {'full', 0, length, 0, 0, NOW_MS} end

local deadline_ms = tonumber(ARGV[11])
local deadline_at_ms = deadline_ms > 0 and NOW_MS + deadline_ms or 0
create(
  {key = ARGV[4], attempt = 1, nonce = ARGV[8], gateway = ARGV[9], reader = 1, n = tonumber(ARGV[7]),
    accepted_at_ms = text(NOW_MS), deadline_at_ms = deadline_at_ms},
  'accepted',
  {'digest', ARGV[5], 'payload', ARGV[6], 'resume_ms', ARGV[10], 'prompt_tokens', ARGV[13], 'max_tokens', ARGV[14],
    'priority', ARGV[15], 'tenant', ARGV[16], 'traceparent', ARGV[17], 'tokens_per_minute', ARGV[19],
    'reserved_tokens', per_minute > 0 and ARGV[21] or '0'},
  {})
if per_minute > 0 then set_tokens_back_at(ARGV[4], back_at_ms) end
return {'ok', 0, 0, NOW_MS, deadline_at_ms, NOW_MS}
