"""What the fleet itself takes, without a model: `make bench-gateway`.

`paced_engine`, `paced_worker`  a real worker whose engine only keeps time
`fleet`                         one of each service, as processes
`streams`                       many streams at once
`hops`, `noted`                 where a token's time goes
`figures`                       what is measured, and its bounds
"""
