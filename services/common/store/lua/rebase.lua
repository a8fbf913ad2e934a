#!lua flags=allow-oom
-- A worker's front found that the reader holds another history: the request goes on from the reader's own.
-- ARGV[4] key, [5] attempt, [6] nonce, both of what is taken away, [7] next nonce, [8...] packed tokens of each choice
-- Returns verdict, choice, index
if recovering() then return RECOVERING end

local record = load_record(ARGV[4])
local refused = refusal(record, ARGV[5], ARGV[6])
if refused then return refused end
local journal = {}
for position = 8, #ARGV do journal[#journal + 1] = ARGV[position] end
return requeue(record, ARGV[7], 'the reader holds another history', false, 0, 0, journal)
