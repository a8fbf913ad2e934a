#!lua flags=no-writes
-- What a worker has: Start entries of its inbox, without what they carry.
-- KEYS[2] its inbox
-- Returns for each: name, value, ... of the fields below
local SHOWN = {key = true, attempt = true, nonce = true, prompt_tokens = true, generated_tokens = true,
  max_tokens = true, n = true, traceparent = true}

local shown = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  local fields = entry[2]
  if fields[2] == 'start' then
    local some = {}
    for position = 1, #fields, 2 do
      if SHOWN[fields[position]] then
        some[#some + 1] = fields[position]
        some[#some + 1] = fields[position + 1]
      end
    end
    shown[#shown + 1] = some
  end
end
return shown
