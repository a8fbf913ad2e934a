"""The request record's protocol alone, under a deterministic simulation: `python -m simulator.protocol --help`.

`world`         virtual time, processes that crash and freeze, tasks that wait
`redis_model`   Redis: runs `transitions.apply` atomically, loses its last second when a schedule says so
`commands`      everything a process may ask of Redis beside the moves
`links`         streams between workers and gateways, calls between clients and gateways
`client` `gateway` `leader` `worker`   what the real services do around the protocol, and no more
`text`          tokens that remember what they were conditioned on
`faults`        what goes wrong in a schedule
`checks`        the invariants
`schedule`      one seed: a fleet, its requests, its faults, its verdict
`defects`       planted breakages that the checks must find
"""
