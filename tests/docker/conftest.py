"""Fleets of processes, and what the default model answers, as tests/fleet has them."""

from tests.fleet.conftest import greedy_cases, start

__all__ = ["greedy_cases", "start"]
