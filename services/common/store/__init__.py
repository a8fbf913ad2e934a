"""Redis as Shoal uses it: each pool's queues, request records, journals and leases, behind typed functions.

`keys`         names of all keys
`connection`   the client, and what can go wrong
`scripts`      Lua scripts, one a move (`lua/<move>.lua`), loaded and called
`codec`        values as Redis holds them: tokens, decisions, whole records
`clock`        the time that all of them share
`requests`     the request record's moves (services.common.record), each atomic in Redis
`ids`          which pool owns a request id
`streams`      blocking reads of streams
`intake`       requests that wait for a place
`inbox`        what a worker is told
`events`       workers' reports and freed reservations
`leader_feed`  intake and events in one read
`leadership`   the leader's lease and epoch
`workers`      registration and reports of workers
`gateways`     leases of gateways
`grants`       how gateways share the room in the backlog
`recovery`     what happens after Redis lost its last writes
"""
