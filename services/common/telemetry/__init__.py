"""What a process tells of itself while it runs.

`metrics`    figures, for Prometheus               `histogram`  how long things took, counted in buckets
"""
