"""What steps that are filled up to some size take, beside what a straight line through all steps says.

On a GPU time is no straight line of the rows: few cost what reading the weights takes, many what multiplying does, and
the line is up to a third off in between. So each size has a factor, learned from its own steps; between two sizes that
were seen it is interpolated. A factor of all sizes follows what changes for all of them: other decodes beside the
prompts, say.
"""

from bisect import bisect_left
from collections.abc import Sequence

from services.worker.engine.limits import least_size

FOLLOWS = 0.1
"""How far a step moves its size's factor, and that of all, to what it took."""


class SizeFactors:
    """Factors by size. Only its owner, a StepTimeModel, changes them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: ascending; as `EngineLimits.filled_up_to`."""
        self.sizes = sizes
        self._seen: list[int] = []
        self._factors: dict[int, float] = {}
        self._of_all = 1.0

    def filled(self, num_tokens: int) -> int | None:
        """What a step of so many tokens is filled up to. None: it is not."""
        return least_size(self.sizes, num_tokens)

    def factor(self, size: int) -> float:
        """Return how many times as long as the line says a step of a size takes."""
        return self._of_all * self._own(size)

    def observe(self, size: int, ratio: float) -> None:
        """Learn from a step that took `ratio` times as long as the line says."""
        if size not in self._factors:
            self._factors[size] = ratio / self._of_all
            self._seen.insert(bisect_left(self._seen, size), size)
            return
        own = self._factors[size]
        self._factors[size] += FOLLOWS * (ratio / self._of_all - own)
        self._of_all += FOLLOWS * (ratio / own - self._of_all)

    def _own(self, size: int) -> float:
        if size in self._factors or not self._seen:
            return self._factors.get(size, 1.0)
        above = bisect_left(self._seen, size)
        if above in (0, len(self._seen)):
            return self._factors[self._seen[min(above, len(self._seen) - 1)]]
        low, high = self._seen[above - 1], self._seen[above]
        share = (size - low) / (high - low)
        return (1 - share) * self._factors[low] + share * self._factors[high]
