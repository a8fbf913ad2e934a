"""What every registered worker can hold of one request, read at most once a second."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from services.common.store.connection import StoreError
from services.common.store.workers import WorkerDirectory
from services.gateway.model import Room

LIFETIME_S = 1.0


class Capacity:
    """The room of the smallest worker. `clock`: the loop's, in s."""

    def __init__(self, workers: WorkerDirectory, clock: Callable[[], float]) -> None:
        self._workers = workers
        self._clock = clock
        self._room: Room | None = None
        self._read_at_s = -LIFETIME_S
        self._reading = asyncio.Lock()

    async def room(self) -> Room | None:
        """The smallest worker's room, as known a second ago at most; None: no worker is known."""
        if self._clock() - self._read_at_s >= LIFETIME_S:
            async with self._reading:
                if self._clock() - self._read_at_s >= LIFETIME_S:
                    await self._read()
        return self._room

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(LIFETIME_S):
                infos = [info for _, info in await self._workers.all() if info is not None]
        except (StoreError, TimeoutError):
            # What was known still holds; if Redis stays away, the submit says so.
            infos = []
        if infos:
            rooms = [Room.of(info) for info in infos]
            smallest = min(rooms, key=lambda room: room.cache_tokens)
            self._room = replace(smallest, context_tokens=min(room.context_tokens for room in rooms))
        self._read_at_s = self._clock()
