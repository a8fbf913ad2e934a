-- Shared by all scripts; the loader puts it behind their first line. It mirrors services/common/record/transitions.py.
-- KEYS[1] the pool's generation. ARGV[1] prefix of its keys, [2] time in ms (empty: this server's), [3] retention in ms.
-- Scripts are atomic, but are not rolled back: whatever may be refused is checked before the first write.
-- Numbers up to 2^53 are exact; where one becomes text, `text` keeps all its digits.

local PREFIX, RETENTION_MS = ARGV[1], ARGV[3]
local MAX_DECISIONS = 100
local MAX_EVENTS = 10000
local ON_WORKER = {placed = true, running = true}
local ENDED = {finished = true, cancelled = true, expired = true, failed = true, quarantined = true}

local function text(number)
  return string.format('%.0f', number)
end

local function clock_ms()
  if ARGV[2] ~= '' then return tonumber(ARGV[2]) end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local NOW_MS = clock_ms()

-- The guard: this server's data is what the pool's leader has recovered.
local function run_id()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end
local function recovering()
  return redis.call('GET', KEYS[1]) ~= run_id()
end
local RECOVERING = redis.error_reply('RECOVERING the server restarted, and the leader has not finished recovery')

-- Names of keys, as in keys.py.
local INTAKE, EVENTS = PREFIX .. 'intake', PREFIX .. 'events'
local function request_key(key) return PREFIX .. 'request:' .. key end
local function journal_key(key, choice) return PREFIX .. 'journal:' .. key .. ':' .. text(choice) end
local function in_flight_key(key) return PREFIX .. 'in_flight:' .. string.match(key, '^[^/]*') end
local function tokens_key(key) return PREFIX .. 'tokens:' .. string.match(key, '^[^/]*') end
local function inbox_key(worker) return PREFIX .. 'inbox:' .. worker end

-- While nobody leads, this equals no fence that a move may carry, the empty one included.
local function current_fence()
  return redis.call('GET', PREFIX .. 'leader') or 'nobody leads'
end

local function registered(worker)
  return redis.call('SISMEMBER', PREFIX .. 'workers', worker) == 1
    and redis.call('EXISTS', PREFIX .. 'worker:' .. worker) == 1
end

local function answer(verdict, choice, index)
  return {verdict, choice or 0, index or 0}
end

-- The record -------------------------------------------------------------------------------------------------------

-- What moves decide by; nil if there is no such request.
local function load_record(key)
  local name = request_key(key)
  local v = redis.call('HMGET', name, 'state', 'attempt', 'nonce', 'worker', 'gateway', 'reader', 'reader_left_at_ms',
    'cancel', 'suspect_until', 'accepted_at_ms', 'deadline_at_ms', 'placed_at_ms', 'resume_ms', 'n', 'num_decisions',
    'intake_entry', 'inbox_entry', 'tokens_per_minute', 'reserved_tokens')
  if not v[1] then return nil end
  return {
    key = key, name = name, state = v[1], attempt = tonumber(v[2]), nonce = v[3], worker = v[4], gateway = v[5],
    reader = tonumber(v[6]), reader_left_at_ms = tonumber(v[7]), cancel = v[8] == '1', suspect_until = tonumber(v[9]),
    accepted_at_ms = v[10], deadline_at_ms = tonumber(v[11]), placed_at_ms = tonumber(v[12]),
    resume_ms = tonumber(v[13]), n = tonumber(v[14]), num_decisions = tonumber(v[15]), intake_entry = v[16],
    inbox_entry = v[17], tokens_per_minute = tonumber(v[18] or 0), reserved_tokens = tonumber(v[19] or 0),
  }
end

local function expired(record)
  return record.deadline_at_ms > 0 and record.deadline_at_ms <= NOW_MS
end

-- The refusal of a worker's move, unless the worker has the request under exactly this attempt.
local function refusal(record, attempt, nonce)
  if not record then return answer('unknown') end
  if ENDED[record.state] then return answer('ended') end
  if record.attempt ~= tonumber(attempt) or record.nonce ~= nonce or not ON_WORKER[record.state] then
    return answer('stale')
  end
  return nil
end

-- Write fields of the record, and one more decision about it. `record` has its new state and attempt already.
local function decide(record, what, detail, ...)
  if record.num_decisions >= MAX_DECISIONS and not ENDED[record.state] then
    if select('#', ...) > 0 then redis.call('HSET', record.name, ...) end
    return
  end
  local escaped = string.gsub(detail, '[\\\n]', {['\\'] = '\\\\', ['\n'] = '\\n'})
  local line = text(NOW_MS) .. '|' .. what .. '|' .. text(record.attempt) .. '|' .. escaped
  if record.num_decisions > 0 then
    line = redis.call('HGET', record.name, 'decisions') .. '\n' .. line
  end
  record.num_decisions = record.num_decisions + 1
  redis.call('HSET', record.name, 'decisions', line, 'num_decisions', text(record.num_decisions), ...)
end

-- The journal ------------------------------------------------------------------------------------------------------

local function journal_length(record, choice)
  return redis.call('STRLEN', journal_key(record.key, choice)) / 4
end

local function generated_tokens(record)
  local total = 0
  for choice = 0, record.n - 1 do total = total + journal_length(record, choice) end
  return total
end

local function write_journal(record, choice, packed)
  if packed == '' then
    redis.call('DEL', journal_key(record.key, choice))
  else
    redis.call('SET', journal_key(record.key, choice), packed)
  end
end

-- Add what the journal lacks of tokens that begin at `start`, which is not behind its end. Returns its length.
local function append_journal(record, choice, start, packed)
  local length = journal_length(record, choice)
  local missing = string.sub(packed, (length - start) * 4 + 1)
  if missing ~= '' then
    length = redis.call('APPEND', journal_key(record.key, choice), missing) / 4
  end
  if record.suspect_until > 0 and length >= record.suspect_until then
    record.suspect_until = 0
    redis.call('HSET', record.name, 'suspect_until', '0')
  end
  return length
end

-- What moves do beside the record (transitions.py's effects) ---------------------------------------------------------

-- Returns the entry's id, to be stored as intake_entry.
local function enter_intake(record)
  local v = redis.call('HMGET', record.name, 'prompt_tokens', 'max_tokens', 'priority', 'tenant', 'traceparent')
  return redis.call('XADD', INTAKE, '*', 'key', record.key, 'attempt', text(record.attempt), 'nonce', record.nonce,
    'accepted_at_ms', record.accepted_at_ms, 'deadline_at_ms', text(record.deadline_at_ms), 'prompt_tokens', v[1],
    'generated_tokens', text(generated_tokens(record)), 'max_tokens', v[2], 'n', text(record.n), 'priority', v[3],
    'tenant', v[4], 'suspect_until', text(record.suspect_until), 'traceparent', v[5] or '')
end

local function leave_intake(record)
  redis.call('XDEL', INTAKE, record.intake_entry)
end

-- A notice to whoever has the request. An inbox that is gone belongs to a retired worker: nobody to tell.
local function send_cancel(record)
  redis.call('XADD', inbox_key(record.worker), 'NOMKSTREAM', '*', 'type', 'cancel', 'key', record.key,
    'attempt', text(record.attempt), 'nonce', record.nonce)
end

local function release(record)
  redis.call('XDEL', inbox_key(record.worker), record.inbox_entry)
  redis.call('XADD', EVENTS, 'MAXLEN', '~', MAX_EVENTS, '*', 'released', record.key, 'worker', record.worker)
end

-- A tenant's tokens a minute (token_budget.py): one time, when all that it took will have come back.
local MINUTE_MS = 60000
local function tokens_back_at_ms(key)
  return tonumber(redis.call('GET', tokens_key(key)) or 0)
end
local function set_tokens_back_at(key, at_ms)
  if at_ms <= NOW_MS then
    redis.call('DEL', tokens_key(key))
  else
    redis.call('SET', tokens_key(key), text(at_ms), 'PX', text(at_ms - NOW_MS))
  end
end

local function give_back_tokens(record)
  if record.tokens_per_minute == 0 then return end
  local back_at_ms = tokens_back_at_ms(record.key)
  if back_at_ms <= NOW_MS then return end
  local unused = math.max(0, record.reserved_tokens - generated_tokens(record))
  set_tokens_back_at(record.key, back_at_ms - math.floor(unused * MINUTE_MS / record.tokens_per_minute))
end

local function retain(record)
  redis.call('SREM', in_flight_key(record.key), record.key)
  give_back_tokens(record)
  redis.call('PEXPIRE', record.name, RETENTION_MS)
  for choice = 0, record.n - 1 do redis.call('PEXPIRE', journal_key(record.key, choice), RETENTION_MS) end
end

-- Ends and requeues, shared by several moves --------------------------------------------------------------------------

local function end_in_queue(record, state, why)
  leave_intake(record)
  record.state = state
  decide(record, state, why, 'state', state, 'ended_at_ms', text(NOW_MS), 'intake_entry', '')
  retain(record)
  return answer('ended')
end

local function end_on_worker(record, state, error, notify)
  release(record)
  if notify then send_cancel(record) end
  record.state, record.worker = state, ''
  decide(record, state, error, 'state', state, 'error', error, 'ended_at_ms', text(NOW_MS), 'worker', '',
    'inbox_entry', '')
  retain(record)
  return answer('ok')
end

-- Take a request from its worker; the caller has judged fence and attempt. `notify`: the worker is told to drop it, which
-- one that is only slow must hear. `journal`: nil, or packed tokens that replace each choice's.
local function requeue(record, nonce, why, notify, floor, suspect_until, journal)
  if record.cancel then return end_on_worker(record, 'cancelled', '', notify) end
  if expired(record) then return end_on_worker(record, 'expired', '', notify) end
  if suspect_until > 0 and record.suspect_until > 0 then
    return end_on_worker(record, 'quarantined', 'its engine died twice, the second time while it ran alone', notify)
  end
  release(record)
  if notify then send_cancel(record) end
  record.state, record.worker, record.nonce = 'queued', '', nonce
  record.attempt = math.max(record.attempt + 1, floor)
  if suspect_until > 0 then record.suspect_until = suspect_until end
  for position, packed in ipairs(journal or {}) do write_journal(record, position - 1, packed) end
  local entry = enter_intake(record)
  decide(record, 'requeued', why, 'state', 'queued', 'attempt', text(record.attempt), 'nonce', nonce, 'worker', '',
    'suspect_until', text(record.suspect_until), 'inbox_entry', '', 'intake_entry', entry)
  return answer('ok', 0, record.attempt)
end

-- A new record in the queue, from all that a submit or a restore says of it. `packed`: its journal.
local function create(record, what, fields, packed)
  record.name, record.state, record.num_decisions = request_key(record.key), 'queued', 0
  record.suspect_until = 0
  redis.call('HSET', record.name, 'state', 'queued', 'attempt', text(record.attempt), 'nonce', record.nonce,
    'worker', '', 'gateway', record.gateway, 'reader', text(record.reader), 'reader_left_at_ms', '0', 'cancel', '0',
    'suspect_until', '0', 'accepted_at_ms', record.accepted_at_ms, 'deadline_at_ms', text(record.deadline_at_ms),
    'placed_at_ms', '0', 'ended_at_ms', '0', 'n', text(record.n), 'outcome', '', 'error', '', 'decisions', '',
    'num_decisions', '0', 'inbox_entry', '', unpack(fields))
  redis.call('SADD', in_flight_key(record.key), record.key)
  for choice = 0, record.n - 1 do write_journal(record, choice, packed[choice + 1] or '') end
  decide(record, what, record.gateway, 'intake_entry', enter_intake(record))
end

local function cancel(record, why)
  if ENDED[record.state] then return answer('ended') end
  if record.state == 'queued' then return end_in_queue(record, 'cancelled', why) end
  if not record.cancel then
    send_cancel(record)
    record.cancel = true
    decide(record, 'cancel_asked', why, 'cancel', '1')
  end
  return answer('ok')
end

-- The whole record, as codec.unpack_record takes it: time, fields, journal.
local function whole(key)
  local fields = redis.call('HGETALL', request_key(key))
  local journal = {}
  if #fields > 0 then
    for choice = 0, tonumber(redis.call('HGET', request_key(key), 'n')) - 1 do
      journal[choice + 1] = redis.call('GET', journal_key(key, choice)) or ''
    end
  end
  return {NOW_MS, fields, journal}
end

-- The script ----------------------------------------------------------------------------------------------------------
