"""The `shoal` command: one file for each of its commands."""

import services.common.forks  # noqa: F401 - in front of gRPC
from shoal.cli.program import main

__all__ = ["main"]
