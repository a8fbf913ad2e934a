#!lua flags=allow-oom
-- A gateway reads on for a client. The last one wins.
-- ARGV[4] key, [5] gateway, [6...] for each choice that the client speaks of: tokens held, packed tokens of the last of them
-- Returns the answer (verdict, choice, index) and the whole record after it
if recovering() then return RECOVERING end

-- Index of the first token that both the journal and the client state and that differs, or nil.
local function first_difference(known, held, packed)
  local start = held - #packed / 4
  local stop = math.min(held, #known / 4)
  if stop <= start or string.sub(known, start * 4 + 1, stop * 4) == string.sub(packed, 1, (stop - start) * 4) then
    return nil
  end
  for index = start, stop - 1 do
    local offset = (index - start) * 4
    if string.sub(known, index * 4 + 1, index * 4 + 4) ~= string.sub(packed, offset + 1, offset + 4) then return index end
  end
end

-- Calls judge(choice, known, held, packed) for each choice that the client speaks of, until it returns something.
local function each_claim(record, judge)
  for choice = 0, math.min(record.n, (#ARGV - 5) / 2) - 1 do
    local known = redis.call('GET', journal_key(record.key, choice)) or ''
    local judged = judge(choice, known, tonumber(ARGV[6 + choice * 2]), ARGV[7 + choice * 2])
    if judged then return judged end
  end
end

-- Only a finished request has its whole text in the journal; any other end is told as it is.
local function compare_with_end(record)
  return record.state == 'finished' and each_claim(record, function(choice, known, held, packed)
    local index = first_difference(known, held, packed)
    if not index and held > #known / 4 then index = #known / 4 end
    return index and answer('diverged', choice, index)
  end) or answer('ended')
end

-- Nobody holds the attempt of a queued request, so its journal may follow the reader at once.
local function follow(record)
  each_claim(record, function(choice, known, held, packed)
    local start = held - #packed / 4
    if first_difference(known, held, packed) then
      write_journal(record, choice, string.sub(known, 1, start * 4) .. packed)
    elseif start * 4 <= #known and held * 4 > #known then
      write_journal(record, choice, known .. string.sub(packed, #known - start * 4 + 1))
    end
  end)
end

local function attach(record)
  if ENDED[record.state] then return compare_with_end(record) end
  local gateway = ARGV[5]
  record.reader = record.reader + 1
  if record.state == 'queued' then
    follow(record)
  else
    redis.call('XADD', inbox_key(record.worker), 'NOMKSTREAM', '*', 'type', 'redirect', 'key', record.key,
      'attempt', text(record.attempt), 'nonce', record.nonce, 'gateway', gateway, 'reader', text(record.reader))
  end
  decide(record, 'attached', gateway, 'gateway', gateway, 'reader', text(record.reader), 'reader_left_at_ms', '0')
  return answer('ok', 0, record.reader)
end

local record = load_record(ARGV[4])
local answered = record and attach(record) or answer('unknown')
return {answered, whole(ARGV[4])}
