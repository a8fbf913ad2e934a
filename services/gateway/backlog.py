"""Which calls may go on to be encoded and stored: as many as the backlog has room for, over all gateways.

The script that accepts a request enforces the backlog's limit. This is in front of it, so that the surplus of a flood
costs neither tokenizers nor Redis anything, and is refused at once. While there is room, a gateway lets calls in by
itself, FEW at a time. For more it asks (services.common.grants): one command for all that wait. Once the answer is that
there is no room, calls are refused without asking, for a moment; and work for those that were let in waits, a moment
too, until no more are refused.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from services.common.grants import Grant
from services.common.store.connection import StoreError
from services.gateway.admission import backlog_full
from services.gateway.calm import Calm

FEW = 4
"""Calls on their way that other gateways need not know of: the most that this gateway lets in too many."""
REMEMBERED_S = 0.02
"""How long no room is known to be left, behind an answer that says so."""
STALE_S = 0.1
"""The same for all but one call, while that one waits for the next answer."""
STATED_AGAIN_S = 0.05
"""What other gateways know of this one's calls on their way is no older, as long as there are any."""
ANSWER_LIMIT_S = 0.5
"""Longest wait for an answer; then calls go on without one: storing them says what is wrong with Redis."""


@dataclass(eq=False, slots=True)
class Arrival:
    """A call that wants to go on. Changed by its Backlog alone."""

    on_its_way: bool = False


class Backlog:
    """Lets calls in. Used on one event loop."""

    def __init__(self, ask: Callable[[int, int], Awaitable[Grant]], limit: int, clock: Callable[[], float]) -> None:
        """`ask`: states how many calls are on their way, and asks for so many more. `clock`: the loop's, in s."""
        self._ask = ask
        self._limit = limit
        self._clock = clock
        self._num_on_their_way = 0
        self._num_stated = 0
        """As the other gateways know."""
        self._room = 0
        """As answered last, less what was let in without asking."""
        self._num_taken = limit
        """As told last to those that were refused."""
        self._no_room_at_s = -math.inf
        self._waiting: list[tuple[Arrival, asyncio.Future[bool]]] = []
        """Calls for which nobody has answered yet, in order."""
        self._wanted = asyncio.Event()
        self._calm = Calm(clock)

    @contextmanager
    def arrival(self) -> Iterator[Arrival]:
        """A call. It is on its way from `let_in` until `submitting`, or until the block ends."""
        arrival = Arrival()
        try:
            yield arrival
        finally:
            self.submitting(arrival)

    async def let_in(self, arrival: Arrival) -> None:
        """Go on, now or once there is an answer. Raises Exhausted: the backlog is full."""
        if self._room > 0 and self._num_on_their_way < FEW:
            self._room -= 1
            self._count(arrival)
        elif self._is_full() or not await self._answer(arrival):
            self._calm.note_refusal()
            raise backlog_full(self._num_taken, self._limit)

    def let_in_known(self, arrival: Arrival) -> None:
        """The same for a request that waits already, or has ended: reading it on takes no room."""
        self._count(arrival)

    async def calm(self) -> None:
        """Wait while calls are being refused, for a moment at most."""
        await self._calm.wait()

    def submitting(self, arrival: Arrival) -> None:
        """Its submit is sent next. An answer that is asked for behind it counts it in the backlog."""
        if arrival.on_its_way:
            arrival.on_its_way = False
            self._num_on_their_way -= 1

    def found_full(self) -> None:
        """A submit was refused: others have filled the backlog."""
        self._note(room=0, num_taken=self._limit)

    async def run(self) -> None:
        """Ask, and state what changed, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(STATED_AGAIN_S if self._num_stated else None):
                    await self._wanted.wait()
            self._wanted.clear()
            await self._ask_for_all()

    async def _answer(self, arrival: Arrival) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((arrival, answer))
        self._wanted.set()
        return await answer

    async def _ask_for_all(self) -> None:
        # They stay in the list while they are asked for: `_is_full` counts them.
        waiting = [(arrival, answer) for arrival, answer in self._waiting if not answer.done()]  # else its caller left
        self._waiting[:] = waiting
        num_on_their_way = self._num_on_their_way
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                grant = await self._ask(num_on_their_way, len(waiting))
        except (StoreError, TimeoutError):
            num_granted = len(waiting)
        else:
            num_granted = grant.num_granted
            self._num_stated = num_on_their_way + num_granted
            num_taken = grant.num_taken + num_granted
            self._note(self._limit - num_taken, num_taken)
        del self._waiting[: len(waiting)]
        for position, (arrival, answer) in enumerate(waiting):
            if answer.done():
                continue
            if position < num_granted:
                # Before its task runs, which may be cancelled until then.
                self._count(arrival)
            answer.set_result(position < num_granted)

    def _note(self, room: int, num_taken: int) -> None:
        self._room = room
        if room > 0:
            self._no_room_at_s = -math.inf
        else:
            self._no_room_at_s = self._clock()
            self._num_taken = num_taken

    def _is_full(self) -> bool:
        # Without asking: all room there can be is taken by calls of this gateway.
        if self._num_on_their_way + len(self._waiting) >= self._limit:
            return True
        age_s = self._clock() - self._no_room_at_s
        return age_s < REMEMBERED_S or (age_s < STALE_S and bool(self._waiting))

    def _count(self, arrival: Arrival) -> None:
        arrival.on_its_way = True
        self._num_on_their_way += 1
