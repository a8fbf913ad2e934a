#!lua flags=allow-oom
-- A worker's front writes the end.
-- ARGV[4] key, [5] attempt, [6] nonce, [7] state, [8] outcome, [9] error, [10...] for each choice: start, packed tokens
-- Returns verdict, choice, index
if recovering() then return RECOVERING end

local record = load_record(ARGV[4])
local refused = refusal(record, ARGV[5], ARGV[6])
if refused then return refused end
for position = 10, #ARGV, 2 do
  local choice = (position - 10) / 2
  local length = journal_length(record, choice)
  if tonumber(ARGV[position]) > length then return answer('gap', choice, length) end
end

for position = 10, #ARGV, 2 do
  append_journal(record, (position - 10) / 2, tonumber(ARGV[position]), ARGV[position + 1])
end
redis.call('HSET', record.name, 'outcome', ARGV[8])
return end_on_worker(record, ARGV[7], ARGV[9], false)
