#!lua flags=allow-oom
-- A reader went away. Works in recovery: Redis may have lost that another came, who then comes again.
-- ARGV[4] key, [5] reader
-- Returns verdict, choice, index
local record = load_record(ARGV[4])
if not record then return answer('unknown') end
if ENDED[record.state] then return answer('ended') end
if record.reader ~= tonumber(ARGV[5]) or record.reader_left_at_ms > 0 then return answer('stale') end
decide(record, 'left', ARGV[5], 'reader_left_at_ms', text(NOW_MS))
return answer('ok')
