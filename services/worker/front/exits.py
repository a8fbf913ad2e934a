"""How a request leaves this worker, in its record: by its end, or back into the queue.

Each move is repeated while Redis is away, for a bounded number of tries; what is left then, the leader finds.
"""

import asyncio
from collections.abc import Awaitable, Callable

from gen.shoal.fleet.v1 import request_pb2
from services.common.ids import RequestKey, new_nonce
from services.common.record import moves
from services.common.record.record import Attempt
from services.common.record.run import Run
from services.common.record.states import RequestState
from services.common.record.transitions import Answer, Verdict
from services.common.store.connection import Recovering, StoreUnavailable
from services.common.store.requests import RequestStore
from services.worker.front.metrics import WorkerMetrics

RETRY_S = 0.2
TRIES = 600
HAND_OVER_TRIES = 5
"""Of a session that ends."""


class Exits:
    """The moves by which requests leave a session. Nonces are drawn for each try: Redis may make one, lose it, and make
    the next.
    """

    def __init__(self, store: RequestStore, metrics: WorkerMetrics) -> None:
        self._store = store
        self._metrics = metrics

    async def finish(self, run: Run, state: RequestState, outcome: request_pb2.Outcome, error: str) -> Verdict | None:
        """Write the end, with the tokens that the journal lacks. OK: it is written, by this or by an earlier try.

        STALE, ENDED, UNKNOWN: the attempt was over. None: given up.
        """

        async def finish() -> Answer:
            move = moves.Finish(run.key, run.attempt, state, run.tails(), outcome.SerializeToString(), error)
            answer = await self._store.finish(move)
            if answer.verdict == Verdict.GAP:
                run.journal_is(answer.choice, answer.index)
            if answer.verdict == Verdict.ENDED and await self._ended_by_us(run, state):
                # The reply of an earlier try was lost.
                return Answer(Verdict.OK)
            return answer

        return await self._until_stored(finish, TRIES)

    async def rebase(self, key: RequestKey, attempt: Attempt, histories: tuple[tuple[int, ...], ...]) -> None:
        """Give a request back with its reader's own tokens as journal."""
        await self._until_stored(lambda: self._store.rebase(moves.Rebase(key, attempt, new_nonce(), histories)), TRIES)

    async def give_back(
        self, key: RequestKey, attempt: Attempt, why: str, cause: str, floor: int = 0, suspect_until: int = 0,
        tries: int = HAND_OVER_TRIES,
    ) -> None:  # fmt: skip
        """Give a request back. `why`: for the record; `cause`: the same in a word, one of few."""
        verdict = await self._until_stored(
            lambda: self._store.requeue(
                moves.Requeue(key, attempt, new_nonce(), why, floor=floor, suspect_until=suspect_until)
            ),
            tries,
        )
        if verdict == Verdict.OK:
            self._metrics.requeues.labels(cause).inc()

    async def _ended_by_us(self, run: Run, state: RequestState) -> bool:
        found = await self._store.read(run.key)
        return found is not None and found[0].attempt == run.attempt and found[0].state == state

    async def _until_stored(self, move: Callable[[], Awaitable[Answer]], tries: int) -> Verdict | None:
        for _ in range(tries):
            try:
                answer = await move()
            except (StoreUnavailable, Recovering):
                await asyncio.sleep(RETRY_S)
                continue
            if answer.verdict != Verdict.GAP:
                return answer.verdict
        return None
