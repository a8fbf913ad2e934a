"""What the leader is told of a worker: that it makes progress, and how much room it has."""

import asyncio
from contextlib import suppress

from gen.shoal.fleet.v1 import request_pb2
from services.common.store.connection import Recovering, StoreUnavailable
from services.common.store.recovery import Recovery
from services.common.store.workers import WorkerDirectory
from services.worker.config import WorkerConfig
from services.worker.front.session import LostError, Session

LEAST_INTERVAL_S = 0.02
"""Steps may be shorter than this; the leader need not hear of each."""


class Reporter:
    """Reports for one session: at each change, but not more often than every 20 ms, and at the configured interval."""

    def __init__(
        self, session: Session, info: request_pb2.WorkerInfo, recovery: Recovery, directory: WorkerDirectory,
        config: WorkerConfig,
    ) -> None:  # fmt: skip
        self._session = session
        self._info = info
        self._directory = directory
        self._recovery = recovery
        self._config = config
        self._sequence_number = 0

    async def run(self) -> None:
        """Report for as long as the session lives. Raises LostError when the leader has given the worker up."""
        progress = self._session.progress
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.report_interval_ms / 1000):
                    await progress.wait()
            progress.clear()
            try:
                known = await self._directory.report(self._report(), self._config.registration_ttl_ms)
                lost = not known and not await self._comes_back()
            except (StoreUnavailable, Recovering):
                await asyncio.sleep(self._config.report_interval_ms / 1000)
                continue
            if lost:
                raise LostError
            await asyncio.sleep(LEAST_INTERVAL_S)

    async def _comes_back(self) -> bool:
        """Register again. False: the leader has given this worker up.

        A registration that Redis lost is made anew in its recovery; here is one that expired, as all workers' do when
        Redis stood still or was cut off, or its clock was set.
        """
        if await self._recovery.needed() is not None:
            return True
        if not await self._directory.is_member(self._session.worker):
            return False
        await self._directory.register(self._info, self._config.registration_ttl_ms)
        return True

    def _report(self) -> request_pb2.WorkerReport:
        self._sequence_number += 1
        session = self._session
        return request_pb2.WorkerReport(
            worker_id=session.worker,
            sequence_number=self._sequence_number,
            steps=session.steps,
            predicted_step_ms=session.predicted_step_ms or int(session.could_step),
            free_blocks=session.free_blocks,
            sequences=session.num_sequences,
            waiting_prefill_tokens=session.waiting_prefill_tokens,
            requests=len(session.active),
            step_time=session.step_time,
            ended_choices=session.num_ended_choices,
            ended_choice_tokens=session.num_ended_choice_tokens,
        )
