"""When which request is due: its deadline in the queue, or the end of its resume time. In Redis' time."""

from collections.abc import Collection
from heapq import heapify, heappop, heappush

from services.common.ids import RequestKey

SLACK = 1_000
"""Due times of ended requests that are not worth the work of forgetting them."""


class Deadlines:
    """Due times of requests, soonest first. A request may have several; one that came to nothing is dropped when due.

    Changed by the leader's tasks between awaits. O(log n) each.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, RequestKey]] = []

    def add(self, key: RequestKey, due_at_ms: int) -> None:
        """Make a request due at a time (ms since the epoch, Redis' clock)."""
        heappush(self._heap, (due_at_ms, key))

    def take_due(self, now_ms: int, most: int) -> list[RequestKey]:
        """Take out what is due by now, each request once; at most this many."""
        due: dict[RequestKey, None] = {}
        while self._heap and self._heap[0][0] <= now_ms and len(due) < most:
            due[heappop(self._heap)[1]] = None
        return list(due)

    def prune(self, live: Collection[RequestKey]) -> None:
        """Forget those of requests that are not live, once they are the most: long deadlines outlast short requests."""
        if len(self._heap) > SLACK + 2 * len(live):
            self._heap = [due for due in self._heap if due[1] in live]
            heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)
