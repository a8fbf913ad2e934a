"""The leader's own clock. It measures gaps and silence; times that requests carry are Redis', see `deadlines`."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Milliseconds that never go back, from any beginning."""


def monotonic_ms() -> float:
    """The machine's clock. It stands still for nobody: a stopped process finds it far ahead."""
    return time.monotonic() * 1000
