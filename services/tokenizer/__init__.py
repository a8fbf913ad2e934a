import os

# It forks only to start programs, in which nothing of gRPC goes on. By default gRPC holds all its threads at each fork,
# or says in the log that it could not. Read as gRPC is imported, so it stands in front of all that does.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
