"""TLS: one place for files, flags and credentials.

`files`        a side's certificate, key and trusted authorities, read and checked
`renewal`      the same files when they have changed
`options`      the flags that every service has
`credentials`  what gRPC and HTTP make of them
"""
