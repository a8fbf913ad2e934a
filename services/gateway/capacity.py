"""What any worker can hold of one request, read at most once a second; while there is none, what the last could."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from services.common.store.connection import StoreError
from services.common.store.demand import DemandStore
from services.common.store.workers import WorkerDirectory
from services.gateway.model import Room

LIFETIME_S = 1.0


class Capacity:
    """The room of the smallest worker. `clock`: the loop's, in s."""

    def __init__(
        self, workers: WorkerDirectory, demand: DemandStore, assumed: Room | None, clock: Callable[[], float]
    ) -> None:
        """`assumed`: of workers to come, taken until one was seen. None: not known."""
        self._workers = workers
        self._demand = demand
        self._room = assumed
        self._clock = clock
        self._read_at_s = -LIFETIME_S
        self._reading = asyncio.Lock()

    async def room(self) -> Room | None:
        """The smallest worker's room, as known a second ago at most; None: the pool never had a worker."""
        if self._clock() - self._read_at_s >= LIFETIME_S:
            async with self._reading:
                if self._clock() - self._read_at_s >= LIFETIME_S:
                    await self._read()
        return self._room

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(LIFETIME_S):
                room = await self._registered() or await self._last_seen()
        except (StoreError, TimeoutError):
            # What was known still holds; if Redis stays away, the submit says so.
            room = None
        self._room = room or self._room
        self._read_at_s = self._clock()

    async def _registered(self) -> Room | None:
        rooms = [Room.of(info) for _, info in await self._workers.all() if info is not None]
        if not rooms:
            return None
        smallest = min(rooms, key=lambda room: room.cache_tokens)
        return replace(smallest, context_tokens=min(room.context_tokens for room in rooms))

    async def _last_seen(self) -> Room | None:
        """Scaled to zero: who comes is like who went."""
        told = await self._demand.read()
        return Room.of(told.demand.smallest_worker) if told and told.demand.HasField("smallest_worker") else None
