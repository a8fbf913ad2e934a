"""Streams from workers that broke, told to the leader: it then waits less long for the worker's next report.

A hint may be lost, and is never repeated: one that comes late helps nobody, and the leader finds a silent worker by
itself.
"""

import asyncio
import logging

from gen.shoal.fleet.v1.request_pb2 import LinkBroken
from services.common.ids import WorkerId
from services.common.store.connection import StoreError
from services.common.store.workers import WorkerDirectory

logger = logging.getLogger(__name__)

MAX_WAITING = 1_000
SETTLE_S = 0.05
"""A worker whose session ends well closes its registration just after its streams: by then, and nothing is told."""


class Hints:
    """Hints to be written, at most MAX_WAITING, one a worker; beyond, a new one is dropped."""

    def __init__(self, directory: WorkerDirectory) -> None:
        self._directory = directory
        self._waiting: dict[WorkerId, None] = {}
        self._wake = asyncio.Event()

    def add(self, worker: WorkerId) -> None:
        """A stream from this worker broke."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting[worker] = None
            self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(SETTLE_S)
            self._wake.clear()
            while self._waiting:
                worker = next(iter(self._waiting))
                del self._waiting[worker]
                await self._tell(worker)

    async def _tell(self, worker: WorkerId) -> None:
        try:
            told = await self._directory.link_broken(LinkBroken(worker_id=worker))
        except StoreError as error:
            logger.info("a hint is dropped", extra={"worker": worker, "error": str(error)})
            return
        if told:
            logger.info("the leader is told that a link broke", extra={"worker": worker})
