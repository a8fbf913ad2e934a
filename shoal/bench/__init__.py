"""`shoal bench serve`: load on a server as its users make it, and what they would see.

`workloads`  named shapes of requests        `ask`      one request, and files of them
`load`       who asks when                   `answer`   what one request saw
`target`     what can be asked               `shoal_target`, `openai_target`  over gRPC, over HTTP
`summary`    percentiles, rates, goodput     `report`, `plot`  as text, JSON and SVG
"""
