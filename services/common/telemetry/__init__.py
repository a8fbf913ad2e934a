"""What a process tells of itself while it runs.

`metrics`    figures, for Prometheus               `histogram`  how long things took, counted in buckets
`tracing`    spans of a request's phases           `otlp`       their way to OpenTelemetry
`trace_context`  which trace a request is in    `conventions`  names of what spans say
"""
