#!lua flags=allow-oom
-- The leader gives a queued request, under its current attempt, to a worker's inbox.
-- ARGV[4] key, [5] fence, [6] attempt, [7] nonce, [8] worker
-- Returns verdict, choice, index
if recovering() then return RECOVERING end

local record = load_record(ARGV[4])
if not record then return answer('unknown') end
if ARGV[5] ~= current_fence() then return answer('not_leader') end
if ENDED[record.state] then return answer('ended') end
if record.state ~= 'queued' or record.attempt ~= tonumber(ARGV[6]) or record.nonce ~= ARGV[7] then
  return answer('stale')
end
if expired(record) then return end_in_queue(record, 'expired', 'deadline') end
local worker = ARGV[8]
if not registered(worker) then return answer('no_worker') end

leave_intake(record)
record.state, record.worker = 'placed', worker
if record.placed_at_ms == 0 then record.placed_at_ms = NOW_MS end
local v = redis.call('HMGET', record.name, 'payload', 'prompt_tokens', 'max_tokens', 'traceparent')
local start = {'type', 'start', 'key', record.key, 'attempt', text(record.attempt), 'nonce', record.nonce,
  'gateway', record.gateway, 'reader', text(record.reader),
  'payload', v[1], 'prompt_tokens', v[2], 'max_tokens', v[3], 'n', text(record.n), 'generated_tokens', text(generated_tokens(record)),
  'deadline_at_ms', text(record.deadline_at_ms), 'suspect_until', text(record.suspect_until),
  'accepted_at_ms', record.accepted_at_ms, 'placed_at_ms', text(record.placed_at_ms),
  'traceparent', v[4] or ''}
for choice = 0, record.n - 1 do
  start[#start + 1] = 'journal' .. text(choice)
  start[#start + 1] = redis.call('GET', journal_key(record.key, choice)) or ''
end
local entry = redis.call('XADD', inbox_key(worker), '*', unpack(start))
decide(record, 'placed', worker, 'state', 'placed', 'worker', worker, 'placed_at_ms', text(record.placed_at_ms),
  'intake_entry', '', 'inbox_entry', entry)
return answer('ok')
