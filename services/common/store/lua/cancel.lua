#!lua flags=allow-oom
-- A client (or the leader, for want of a reader) asks for the end.
-- ARGV[4] key, [5] why
-- Returns verdict, choice, index
if recovering() then return RECOVERING end

local record = load_record(ARGV[4])
if not record then return answer('unknown') end
return cancel(record, ARGV[5])
