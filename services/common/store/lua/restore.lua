#!lua flags=allow-oom
-- In recovery, put back a request that Redis lost.
-- ARGV[4] key, [5] fence, [6] digest, [7] payload, [8] nonce, [9] gateway, [10] reader, [11] resume_ms, [12] accepted_at_ms,
-- [13] deadline_at_ms, [14] attempt, [15] prompt_tokens, [16] max_tokens, [17] priority, [18] tenant,
-- [19] traceparent, [20...] packed tokens of each choice
-- Returns verdict, choice, index
if ARGV[5] ~= current_fence() then return answer('not_leader') end
if redis.call('EXISTS', request_key(ARGV[4])) == 1 then return answer('known') end

local journal = {}
for position = 20, #ARGV do journal[#journal + 1] = ARGV[position] end
create(
  {key = ARGV[4], attempt = tonumber(ARGV[14]), nonce = ARGV[8], gateway = ARGV[9], reader = tonumber(ARGV[10]),
    n = #journal, accepted_at_ms = ARGV[12], deadline_at_ms = tonumber(ARGV[13])},
  'restored',
  {'digest', ARGV[6], 'payload', ARGV[7], 'resume_ms', ARGV[11], 'prompt_tokens', ARGV[15], 'max_tokens', ARGV[16],
    'priority', ARGV[17], 'tenant', ARGV[18], 'traceparent', ARGV[19]},
  journal)
return answer('ok')
