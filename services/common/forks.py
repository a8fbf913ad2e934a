"""Imported in front of gRPC by what starts programs.

They fork for nothing else, and in the programs nothing of gRPC goes on. By default gRPC holds all its threads at each
fork, or says in the log that it could not. It reads this as it is imported.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
