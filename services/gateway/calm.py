"""Refusals first: while a flood of calls is being refused, work for those that were let in waits, for a moment.

gRPC hands the event loop one call a turn, and work in each turn would delay all refusals.
"""

import asyncio
import math
from collections.abc import Callable

LOOK_S = 0.005
"""Between two looks at whether any call was refused."""
QUIET_LOOKS = 2
"""So many in a row end a flood. One is not enough: behind a turn of the event loop that took long, it comes before the
calls that waited meanwhile."""
LONGEST_S = 0.1
"""So long, at most, work waits in one flood, however long that lasts."""
REST_S = 0.4
"""So long, at least, work goes on before it waits again: refusals that come now and then shall not stop it."""


class Calm:
    """Whether work may go on. Used on one event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: the loop's, in s."""
        self._clock = clock
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._in_flood = False
        self._num_refused = 0
        """Since the last look."""
        self._num_quiet = 0
        """Looks."""
        self._not_before_s = -math.inf
        """Work waits again."""

    async def wait(self) -> None:
        """Until work may go on."""
        await self._goes_on.wait()

    def note_refusal(self) -> None:
        """A call is refused."""
        self._num_refused += 1
        if not self._in_flood and (now_s := self._clock()) >= self._not_before_s:
            self._in_flood = True
            self._goes_on.clear()
            self._look_later(now_s + LONGEST_S)

    def _look_later(self, until_s: float) -> None:
        asyncio.get_running_loop().call_later(LOOK_S, self._look, until_s)

    def _look(self, until_s: float) -> None:
        self._num_quiet = 0 if self._num_refused else self._num_quiet + 1
        self._num_refused = 0
        is_over = self._num_quiet >= QUIET_LOOKS
        if not self._goes_on.is_set() and (is_over or self._clock() >= until_s):
            self._goes_on.set()
            self._not_before_s = self._clock() + REST_S
        if is_over:
            self._in_flood = False
            self._num_quiet = 0
        else:
            self._look_later(until_s)
