#!lua flags=allow-oom
-- In recovery, the leader raises a live request's attempt above every one that anybody has seen.
-- ARGV[4] key, [5] fence, [6] next nonce, [7] least number of the next attempt
-- Returns verdict, choice, index
local record = load_record(ARGV[4])
if not record then return answer('unknown') end
local fence, nonce, floor = ARGV[5], ARGV[6], tonumber(ARGV[7])
if fence ~= current_fence() then return answer('not_leader') end
if ON_WORKER[record.state] then
  return requeue(record, nonce, 'Redis lost its last writes', fence ~= '', floor, 0)
end
if ENDED[record.state] then return answer('ended') end

-- Its placement may be among the lost writes: a worker may run it under the number that the record still has. The intake
-- entry names the attempt, so it is replaced.
leave_intake(record)
record.attempt, record.nonce = math.max(record.attempt + 1, floor), nonce
local entry = enter_intake(record)
decide(record, 'recovered', '', 'attempt', text(record.attempt), 'nonce', nonce, 'intake_entry', entry)
return answer('ok', 0, record.attempt)
