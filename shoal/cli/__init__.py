"""The `shoal` command: one file for each of its commands."""

from shoal.cli.program import main

__all__ = ["main"]
