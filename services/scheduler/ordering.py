"""Which request is next: by the time of acceptance.

So a requeued request, accepted before those that wait, is first. Another order changes `Queue.in_order` and what
`Queue.add` sorts by, and nothing outside this file.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from services.common.ids import RequestKey
from services.common.record.record import Attempt
from services.common.store.intake import Queued

_Rank = tuple[int, int, int]
"""Acceptance (ms, Redis' clock), then the entry's place in the intake, which is unique."""


class Queue:
    """Requests that wait for a worker. Changed only by the tasks of one reign. Adding, dropping: O(n) pointer moves."""

    def __init__(self) -> None:
        self._ranked: list[tuple[_Rank, RequestKey]] = []
        self._waiting: dict[RequestKey, Queued] = {}

    def add(self, queued: Queued) -> None:
        """Let a request wait. It replaces an older attempt at it, and gives way to a newer one."""
        known = self._waiting.get(queued.key)
        if known is not None:
            if known.attempt.number > queued.attempt.number:
                return
            self._remove(known)
        self._waiting[queued.key] = queued
        insort(self._ranked, (_rank(queued), queued.key))

    def drop(self, key: RequestKey, attempt: Attempt) -> None:
        """Forget a request, if it waits under this attempt: it was placed, it expired, or it ended."""
        known = self._waiting.get(key)
        if known is not None and known.attempt == attempt:
            del self._waiting[key]
            self._remove(known)

    def in_order(self) -> Iterator[Queued]:
        """All that wait, the next one first. The queue may not be changed meanwhile."""
        return (self._waiting[key] for _, key in self._ranked)

    def attempt(self, key: RequestKey) -> Attempt | None:
        """Under which attempt a request waits. None: it does not."""
        known = self._waiting.get(key)
        return None if known is None else known.attempt

    def get(self, key: RequestKey) -> Queued | None:
        """A request that waits. None: it does not."""
        return self._waiting.get(key)

    def __len__(self) -> int:
        return len(self._waiting)

    def _remove(self, queued: Queued) -> None:
        place = bisect_left(self._ranked, (_rank(queued), queued.key))
        del self._ranked[place]


def _rank(queued: Queued) -> _Rank:
    at_ms, _, number = queued.entry_id.partition("-")
    return (queued.accepted_at_ms, int(at_ms), int(number or 0))
