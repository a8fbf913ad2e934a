"""A histogram whose writer takes no lock and may count several equal values at once.

prometheus-client's own takes a lock for each value. A step of 32 sequences gives 32 times between tokens, nearly all of
them equal: here they are one call.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

DURATION_BOUNDS_S: Sequence[float] = tuple(0.001 * 2**power for power in range(18))
"""1 ms to 131 s, doubling: from a hop between processes to a long answer."""
COUNT_BOUNDS: Sequence[float] = tuple(2.0**power for power in range(11))
"""1 to 1,024, doubling."""


class Histogram(Collector):
    """Counts by bucket. One thread writes; the thread that serves metrics reads, and may see a value half counted."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        """`bounds`: the upper ends of the buckets, ascending; one more takes what is above."""
        self._name = name
        self._about = about
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times. O(log buckets)."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The buckets as Prometheus wants them: each counts all that is not above it."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), tuple(self._counts), strict=True):
            total += count
            buckets.append((_text(bound), float(total)))
        return [HistogramMetricFamily(self._name, self._about, buckets=buckets, sum_value=self._sum)]

    def describe(self) -> Iterable[Metric]:
        """Its name, so that no other figure takes it."""
        return [HistogramMetricFamily(self._name, self._about)]


def _text(bound: float) -> str:
    return "+Inf" if bound == float("inf") else str(bound)
