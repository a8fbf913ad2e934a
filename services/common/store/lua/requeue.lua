#!lua flags=allow-oom
-- A request is taken from its worker: by the leader (fence given), or by the worker's own front (empty).
-- ARGV[4] key, [5] attempt, [6] nonce, both of what is taken away, [7] next nonce, [8] why, [9] fence,
-- [10] least number of the next attempt, [11] suspect_until (0: it is no suspect)
-- Returns verdict, choice, index
if recovering() then return RECOVERING end

local record = load_record(ARGV[4])
if not record then return answer('unknown') end
local fence = ARGV[9]
if fence ~= '' and fence ~= current_fence() then return answer('not_leader') end
return refusal(record, ARGV[5], ARGV[6])
  or requeue(record, ARGV[7], ARGV[8], fence ~= '', tonumber(ARGV[10]), tonumber(ARGV[11]))
