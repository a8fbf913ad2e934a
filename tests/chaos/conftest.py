"""The fleets that faults are done to."""

from tests.fleet.conftest import greedy_cases, start

__all__ = ["greedy_cases", "start"]
