"""The request record: one protocol, as pure code; docs/protocol.md says it in words.

`states`       where a request stands, and which moves between states exist
`record`       the record itself: what Redis holds of a request
`moves`        everything that may be asked of a record
`transitions`  record + move -> record + effects + answer; each move is one Lua script in `services/common/store/lua`
`history`      tokens that two sides hold, compared
`reader`       a gateway's side of one stream: whose tokens count
`run`          a worker's side of one attempt: when it may sample, what it sends, what it journals
"""
