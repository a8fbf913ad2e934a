#!lua flags=allow-oom
-- The leader's clock: ends what expired in the queue, and cancels what nobody has read for its resume time.
-- ARGV, two for each request from [4]: key, fence
-- Returns for each: verdict, choice, index
if recovering() then return RECOVERING end

local function sweep(record, fence)
  if not record then return answer('unknown') end
  if fence ~= current_fence() then return answer('not_leader') end
  if ENDED[record.state] then return answer('ended') end
  if record.state == 'queued' and expired(record) then return end_in_queue(record, 'expired', 'deadline') end
  if record.reader_left_at_ms > 0 and record.reader_left_at_ms + record.resume_ms <= NOW_MS then
    return cancel(record, 'nobody reads it')
  end
  return answer('idle')
end

local answers = {}
for position = 4, #ARGV, 2 do answers[#answers + 1] = sweep(load_record(ARGV[position]), ARGV[position + 1]) end
return answers
