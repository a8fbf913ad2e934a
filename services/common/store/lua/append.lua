#!lua flags=allow-oom
-- A worker appends generated tokens, for many requests and choices; with no tokens it says that it runs a request.
-- ARGV, six for each append from [4]: key, attempt, nonce, choice, start, packed tokens
-- Returns for each: verdict, choice, index
if recovering() then return RECOVERING end

local function append(record, choice, start, packed)
  local length = journal_length(record, choice)
  if start > length then return answer('gap', choice, length) end
  length = append_journal(record, choice, start, packed)
  if record.state == 'placed' then
    record.state = 'running'
    decide(record, 'running', record.worker, 'state', 'running')
  end
  return answer(record.cancel and 'cancel' or 'ok', choice, length)
end

local records, answers = {}, {}
for position = 4, #ARGV, 6 do
  local key = ARGV[position]
  if records[key] == nil then records[key] = load_record(key) or false end
  local record = records[key]
  answers[#answers + 1] = refusal(record, ARGV[position + 1], ARGV[position + 2])
    or append(record, tonumber(ARGV[position + 3]), tonumber(ARGV[position + 4]), ARGV[position + 5])
end
return answers
