"""Generated tokens on their way to Redis: off the token path, one script for all requests of the worker."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress

from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.transitions import Verdict
from services.common.store.connection import Recovering, StoreUnavailable
from services.common.store.requests import RequestStore
from services.worker.front.active import ActiveRequest
from services.worker.front.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

OnAnswer = Callable[[ActiveRequest, Verdict], Awaitable[None]]


class Journal:
    """Writes what the journals of a session's requests do not have yet: each interval, and of some at once."""

    def __init__(
        self, store: RequestStore, active: Mapping[RequestKey, ActiveRequest], interval_ms: int, on_answer: OnAnswer,
        metrics: WorkerMetrics,
    ) -> None:  # fmt: skip
        """`on_answer` is called for each request whose append was answered by anything but OK or GAP."""
        self._hurried: dict[RequestKey, ActiveRequest] = {}
        self._wake = asyncio.Event()
        self._store = store
        self._active = active
        self._interval_s = interval_ms / 1000
        self._on_answer = on_answer
        self._metrics = metrics

    def hurry(self, active: ActiveRequest) -> None:
        """It has just begun, or has many tokens to journal: it waits for no interval. Others do, each of whose writes
        costs as much: where requests begin all the time, none would ever wait.
        """
        self._hurried[active.run.key] = active
        self._wake.set()

    async def run(self) -> None:
        """Write for as long as the session lives."""
        clock = asyncio.get_running_loop().time
        while True:
            all_at_s = clock() + self._interval_s
            while clock() < all_at_s:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(all_at_s):
                        await self._wake.wait()
                self._wake.clear()
                hurried, self._hurried = self._hurried, {}
                await self._write(active for key, active in hurried.items() if self._active.get(key) is active)
            # The end of one that ends brings what its journal lacks.
            await self._write(active for active in self._active.values() if not active.ending)

    async def flush(self) -> None:
        """Write what any request lacks now."""
        await self._write(self._active.values())

    async def _write(self, requests: Iterable[ActiveRequest]) -> None:
        """While Redis is away nothing is lost: the tokens are written by a later call."""
        appends: list[tuple[ActiveRequest, moves.Append]] = []
        for active in requests:
            run = active.run
            frames = [(frame.choice, frame.index, frame.tokens) for frame in run.unjournaled()]
            if not frames and not active.announced:
                # No tokens yet: it says that the request runs here, and asks whether it still may.
                frames = [(0, len(run.known[0]), ())]
            appends.extend((active, moves.Append(run.key, run.attempt, *frame)) for frame in frames)
        if not appends:
            return
        began_s = time.monotonic()
        try:
            answers = await self._store.append([move for _, move in appends])
        except (StoreUnavailable, Recovering) as error:
            logger.warning("journal waits", extra={"error": str(error), "requests": len(appends)})
            return
        self._metrics.journal_flush.observe(time.monotonic() - began_s)
        self._metrics.journal_tokens.inc(sum(len(move.tokens) for _, move in appends))
        for (active, move), answer in zip(appends, answers, strict=True):
            if answer.verdict in (Verdict.OK, Verdict.CANCEL, Verdict.GAP):
                active.run.journal_is(move.choice, answer.index)
                active.announced = answer.verdict != Verdict.GAP
            if answer.verdict not in (Verdict.OK, Verdict.GAP):
                await self._on_answer(active, answer.verdict)
