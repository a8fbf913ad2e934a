"""The request record's moves, each one atomic script: `services.common.record.transitions` in Redis.

All methods raise StoreUnavailable (whether the move was made is then unknown) and, but for `restore`, `recover` and
`leave`, Recovering (nothing was done). No move is repeated here; each method says what a repetition answers.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import RequestPayload
from services.common.ids import RequestKey, WorkerId
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import ENDED, RequestState
from services.common.record.transitions import Answer, Verdict
from services.common.store.clock import now_ms
from services.common.store.codec import pack_tokens, pairs, unpack_record
from services.common.store.connection import Argument
from services.common.store.keys import Keys
from services.common.store.scripts import Script

MAX_BATCH = 500
"""Most moves in one script call: about 10 ms of Redis' time."""

M = TypeVar("M")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a Submit. Times are Redis' clock, ms since the epoch, of the record that now exists."""

    answer: Answer
    accepted_at_ms: int
    """0: FULL, QUOTA, TOKENS or CONFLICT."""
    deadline_at_ms: int
    """0: none."""
    now_ms: int


@dataclass(frozen=True, slots=True)
class Attached:
    """What became of an Attach."""

    answer: Answer
    record: Record | None
    """As it is after the move, journal included. None: UNKNOWN."""
    now_ms: int


@dataclass(frozen=True, slots=True)
class Peek:
    """Where a request stands, without what it carries."""

    state: RequestState
    reader: int
    attempt: Attempt
    worker: WorkerId
    gateway: str
    reader_left_at_ms: int
    """0: it is there."""
    resume_ms: int
    traceparent: str


class RequestStore:
    """Records of one pool's requests.

    `retention_ms`: how long an ended record is kept. `clock_ms`: for tests; otherwise it is Redis' own clock.
    """

    def __init__(self, redis: Redis, pool: str, retention_ms: int, clock_ms: Callable[[], int] | None = None) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._retention_ms = retention_ms
        self._clock_ms = clock_ms
        self._submit = Script.load("submit")
        self._place = Script.load("place")
        self._append = Script.load("append")
        self._finish = Script.load("finish")
        self._requeue = Script.load("requeue")
        self._rebase = Script.load("rebase")
        self._cancel = Script.load("cancel")
        self._attach = Script.load("attach")
        self._leave = Script.load("leave")
        self._sweep = Script.load("sweep")
        self._restore = Script.load("restore")
        self._recover = Script.load("recover")
        self._read = Script.load("read")
        self._peek = Script.load("peek")

    async def submit(self, move: moves.Submit) -> Submitted:
        """Accept a request. Repeated: KNOWN, with the record's own times; attach to it then. Raises StoreFull."""
        verdict, choice, index, accepted_at_ms, deadline_at_ms, now_ms = await self._call(
            self._submit,
            move.key,
            move.digest,
            move.payload,
            move.num_choices,
            move.nonce,
            move.gateway,
            move.resume_ms,
            move.deadline_ms,
            move.backlog_limit,
            *_summary(move.key, move.payload),
            move.tenant_limit,
            move.tokens_per_minute,
            move.prompt_tokens,
            move.reserved_tokens,
        )
        return Submitted(_answer([verdict, choice, index]), accepted_at_ms, deadline_at_ms, now_ms)

    async def place(self, move: moves.Place) -> Answer:
        """Give a queued request to a worker. ENDED: it has ended, perhaps now, since its deadline had passed.

        Repeated: STALE; `peek` then tells whether this worker has it under this attempt.
        """
        return _answer(
            await self._call(self._place, move.key, move.fence, move.attempt.number, move.attempt.nonce, move.worker)
        )

    async def append(self, appends: Sequence[moves.Append]) -> list[Answer]:
        """Append tokens of any number of requests and choices, in this order; one script call for each MAX_BATCH.

        Repeated: the same answers, since it is idempotent by index. An error after a first batch leaves that done.
        """
        return await _in_batches(appends, self._append_batch)

    async def _append_batch(self, appends: Sequence[moves.Append]) -> list[Answer]:
        arguments: list[Argument] = []
        for move in appends:
            arguments += (
                move.key, move.attempt.number, move.attempt.nonce, move.choice, move.start, pack_tokens(move.tokens)
            )  # fmt: skip
        return [_answer(answer) for answer in await self._call(self._append, *arguments)]

    async def finish(self, move: moves.Finish) -> Answer:
        """Write a request's end. Repeated: ENDED; `read` then tells whether the end is this one (attempt, outcome).

        Raises ValueError for a state that is not an end.
        """
        if move.state not in ENDED:
            raise ValueError(f"a request cannot end as {move.state}")
        tails: list[Argument] = []
        for start, tokens in move.tails:
            tails += (start, pack_tokens(tokens))
        return _answer(
            await self._call(
                self._finish,
                move.key,
                move.attempt.number,
                move.attempt.nonce,
                move.state,
                move.outcome,
                move.error,
                *tails,
            )
        )

    async def requeue(self, move: moves.Requeue) -> Answer:
        """Take a request from its worker; `index` is its new attempt's number, 0 if it ended instead.

        Repeated: STALE or ENDED.
        """
        return _answer(
            await self._call(
                self._requeue,
                move.key,
                move.attempt.number,
                move.attempt.nonce,
                move.nonce,
                move.why,
                move.fence,
                move.floor,
                move.suspect_until,
            )
        )

    async def rebase(self, move: moves.Rebase) -> Answer:
        """Requeue with the reader's own history as journal, one of each choice. Repeated: STALE or ENDED."""
        return _answer(
            await self._call(
                self._rebase,
                move.key,
                move.attempt.number,
                move.attempt.nonce,
                move.nonce,
                *(pack_tokens(tokens) for tokens in move.journal),
            )
        )

    async def cancel(self, move: moves.Cancel) -> Answer:
        """Ask for a request's end. ENDED: it has ended, perhaps by this. Repeated: OK, or ENDED."""
        return _answer(await self._call(self._cancel, move.key, move.why))

    async def attach(self, move: moves.Attach) -> Attached:
        """Make a gateway's reader the one that counts; `answer.index` is its number. Repeated: OK, a higher number.

        Raises ValueError if more tokens are stated than are held.
        """
        if any(claim.start < 0 for claim in move.held):
            raise ValueError("a reader states more tokens than it holds")
        held: list[Argument] = []
        for claim in move.held:
            held += (claim.count, pack_tokens(claim.tokens))
        answer, whole = await self._call(self._attach, move.key, move.gateway, *held)
        now_ms, record = _whole(move.key, whole)
        return Attached(_answer(answer), record, now_ms)

    async def leave(self, move: moves.Leave) -> Answer:
        """Note that a reader went away. Works in recovery. Repeated: STALE or ENDED."""
        return _answer(await self._call(self._leave, move.key, move.reader))

    async def sweep(self, sweeps: Sequence[moves.Sweep]) -> list[Answer]:
        """End what is due, in this order; one script call for each MAX_BATCH.

        Repeated: ENDED, OK (still to be cancelled) or IDLE.
        """
        return await _in_batches(sweeps, self._sweep_batch)

    async def _sweep_batch(self, sweeps: Sequence[moves.Sweep]) -> list[Answer]:
        arguments = [text for move in sweeps for text in (move.key, move.fence)]
        return [_answer(answer) for answer in await self._call(self._sweep, *arguments)]

    async def restore(self, move: moves.Restore) -> Answer:
        """Put back a request that Redis lost. Works in recovery. Repeated: KNOWN."""
        return _answer(
            await self._call(
                self._restore,
                move.key,
                move.fence,
                move.digest,
                move.payload,
                move.nonce,
                move.gateway,
                move.reader,
                move.resume_ms,
                move.accepted_at_ms,
                move.deadline_at_ms,
                move.floor,
                *_summary(move.key, move.payload),
                *(pack_tokens(tokens) for tokens in move.journal),
            )
        )

    async def recover(self, move: moves.Recover) -> Answer:
        """Raise a live request's attempt; `index` is its number. Works in recovery. Repeated: OK, a higher number."""
        return _answer(await self._call(self._recover, move.key, move.fence, move.nonce, move.floor))

    async def read(self, key: RequestKey) -> tuple[Record, int] | None:
        """The whole record, journal included, and the time in ms. None: there is none."""
        now_ms, record = _whole(key, await self._call(self._read, key, 1))
        return None if record is None else (record, now_ms)

    async def peek(self, keys: Sequence[RequestKey]) -> list[Peek | None]:
        """Where requests stand; one script call for each MAX_BATCH. None: there is none."""
        return await _in_batches(keys, self._peek_batch)

    async def _peek_batch(self, keys: Sequence[RequestKey]) -> list[Peek | None]:
        return [_peek(reply) for reply in await self._call(self._peek, *keys)]

    async def now_ms(self) -> int:
        """The clock that all times of records are in: Redis', ms since the epoch."""
        return await now_ms(self._redis)

    async def _call(self, script: Script, *arguments: Argument) -> Any:
        now = "" if self._clock_ms is None else self._clock_ms()
        header = (self._keys.prefix, now, self._retention_ms)
        return await script.call(self._redis, (self._keys.generation,), (*header, *arguments))


async def _in_batches(items: Sequence[M], run: Callable[[Sequence[M]], Awaitable[list[R]]]) -> list[R]:
    done: list[R] = []
    for start in range(0, len(items), MAX_BATCH):
        done += await run(items[start : start + MAX_BATCH])
    return done


def _summary(key: RequestKey, payload: bytes) -> tuple[Argument, ...]:
    """What an intake entry says of a payload: prompt_tokens, max_tokens, priority, tenant, traceparent."""
    parsed = RequestPayload.FromString(payload)
    tenant = key.split("/", 1)[0]
    return len(parsed.prompt_token_ids), parsed.max_tokens, int(parsed.priority), tenant, parsed.traceparent


def _answer(reply: Sequence[Any]) -> Answer:
    verdict, choice, index = reply
    return Answer(Verdict(verdict.decode()), choice, index)


def _whole(key: RequestKey, reply: Sequence[Any]) -> tuple[int, Record | None]:
    now_ms, fields, journal = reply
    return now_ms, unpack_record(key, pairs(fields), journal) if fields else None


def _peek(reply: Sequence[Any]) -> Peek | None:
    if not reply:
        return None
    state, reader, attempt, nonce, worker, gateway, reader_left_at_ms, resume_ms, traceparent = reply
    return Peek(
        state=RequestState(state.decode()),
        reader=int(reader),
        attempt=Attempt(int(attempt), nonce.decode()),
        worker=WorkerId(worker.decode()),
        gateway=gateway.decode(),
        reader_left_at_ms=int(reader_left_at_ms),
        resume_ms=int(resume_ms),
        traceparent=(traceparent or b"").decode(),
    )
