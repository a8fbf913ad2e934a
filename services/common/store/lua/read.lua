#!lua flags=no-writes
-- The whole record.
-- ARGV[4] key, [5] 1: refuse while the pool is recovering
-- Returns now_ms, fields (name, value, ...; empty: there is none), packed tokens of each choice
if ARGV[5] == '1' and recovering() then return RECOVERING end
return whole(ARGV[4])
