"""A pool for tests of the scheduler: requests, fake workers, and real schedulers on a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import HeldRequest, Holdings, RequestPayload, WorkerInfo, WorkerReport
from services.common.ids import GatewayId, RequestKey, WorkerId, new_nonce
from services.common.record import moves
from services.common.record.record import Record
from services.common.record.states import RequestState
from services.common.record.transitions import Answer
from services.common.store.connection import StoreError
from services.common.store.gateways import GatewayLease
from services.common.store.inbox import Start
from services.common.store.leadership import Leadership
from services.common.store.streams import FIRST
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import NoTracer
from services.scheduler.clock import Clock, monotonic_ms
from services.scheduler.config import SchedulerConfig
from services.scheduler.election import Candidate
from services.scheduler.leader import Reign
from services.scheduler.lease_keeper import Held
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.pool_store import PoolStore
from services.scheduler.telemetry import Telemetry

WITHIN_S = 10
"""Longest wait for anything."""
RETENTION_MS = 60_000
REPORT_S = 0.03
GATEWAY = GatewayId("gateway:1")

QUICK = SchedulerConfig(
    lease_ttl_ms=600,
    lease_renew_ms=100,
    lost_after_ms=400,
    registration_check_ms=100,
    sweep_ms=20,
    scan_ms=100,
    recovery_window_ms=400,
    recovery_fresh_ms=0,
)


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
    """Return once the condition holds; while Redis is away it does not. Raises TimeoutError if it does not in time."""
    async with asyncio.timeout(within_s):
        while not await _holds(condition):
            await asyncio.sleep(0.01)


async def _holds(condition: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await condition()
    except StoreError:
        return False


class SkewedClock:
    """The machine's clock, which a test may move ahead: as a stopped process finds it."""

    def __init__(self) -> None:
        self._ahead_ms = 0.0

    def __call__(self) -> float:
        return monotonic_ms() + self._ahead_ms

    def jump(self, ms: float) -> None:
        self._ahead_ms += ms


class Immortal(Leadership):
    """A leader that dies without a word: its lease is never given back."""

    async def resign(self) -> None:
        """Say nothing."""


@dataclass
class Scheduler:
    """One candidate and its reigns so far."""

    task: "asyncio.Task[None]"
    reigns: list[Reign] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def figure(self, name: str) -> float | None:
        """A sample of its metrics that has no labels."""
        return self.metrics.registry.get_sample_value(name)

    async def leads(self) -> bool:
        """Whether it leads, and is done with rebuilding."""
        return bool(self.reigns) and bool(self.reigns[-1].view.ledger.accounts)

    async def die(self) -> None:
        """End it at once; it does not give its lease back if its leadership is Immortal."""
        self.task.cancel()
        await asyncio.wait([self.task], timeout=WITHIN_S)


class FakeWorker:
    """A worker that takes what its inbox brings, reports, and ends requests when it is told to."""

    def __init__(self, store: PoolStore, info: WorkerInfo) -> None:
        self.id = WorkerId(info.worker_id)
        self.started: asyncio.Queue[Start] = asyncio.Queue()
        self.holds: dict[RequestKey, Start] = {}
        self.alive = asyncio.Event()
        """Cleared: it is frozen."""
        self.alive.set()
        self.makes_steps = True
        self._store = store
        self._info = info
        self._steps = 0

    async def run(self, registered: asyncio.Event) -> None:
        """Live until cancelled."""
        await self._store.workers.register(self._info, RETENTION_MS)
        registered.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_inbox())
            tasks.create_task(self._report())
            tasks.create_task(self._state_holdings())

    async def next_start(self, within_s: float = WITHIN_S) -> Start:
        """The next request that it was given."""
        async with asyncio.timeout(within_s):
            return await self.started.get()

    async def finish(self, start: Start) -> Answer:
        """End a request well."""
        move = moves.Finish(start.key, start.attempt, RequestState.FINISHED, ((0, (1, 2)),), b"outcome")
        answer = await self._store.requests.finish(move)
        self.holds.pop(start.key, None)
        return answer

    async def hand_back(self, start: Start) -> Answer:
        """Give a request back to the queue."""
        answer = await self._store.requests.requeue(moves.Requeue(start.key, start.attempt, new_nonce(), "test"))
        self.holds.pop(start.key, None)
        return answer

    async def _read_inbox(self) -> None:
        inbox, after = self._store.inbox(self.id), FIRST
        while True:
            try:
                messages = await inbox.read(after, 500, 100)
            except StoreError:
                await asyncio.sleep(REPORT_S)
                continue
            await self.alive.wait()
            for entry_id, message in messages:
                after = entry_id
                if isinstance(message, Start):
                    self.holds[message.key] = message
                    self.started.put_nowait(message)

    async def _report(self) -> None:
        for number in count(1):
            await self.alive.wait()
            self._steps += bool(self.holds) and self.makes_steps
            report = WorkerReport(
                worker_id=self.id,
                sequence_number=number,
                steps=self._steps,
                predicted_step_ms=10 if self.holds else 0,
                requests=len(self.holds),
            )
            with suppress(StoreError):
                await self._store.workers.report(report, RETENTION_MS)
            await asyncio.sleep(REPORT_S)

    async def _state_holdings(self) -> None:
        while True:
            with suppress(StoreError):
                run_id = await self._store.recovery.needed()
                if run_id is not None:
                    await self._store.workers.register(self._info, RETENTION_MS)
                    await self._store.recovery.post(Holdings(holder=self.id, requests=self._held()), run_id)
            await asyncio.sleep(REPORT_S)

    def _held(self) -> list[HeldRequest]:
        return [
            HeldRequest(key=start.key, attempt=start.attempt.number, nonce=start.attempt.nonce, runs_here=True)
            for start in self.holds.values()
        ]


class SchedulerPool:
    """Everything about one pool; all tasks end with it."""

    def __init__(self, redis: Redis, pool: str, tasks: asyncio.TaskGroup) -> None:
        self.store = PoolStore.of(redis, pool, "tester", RETENTION_MS)
        self._redis = redis
        self._pool = pool
        self._tasks = tasks
        self._running: list[asyncio.Task[None]] = []
        self._names = count(1)

    async def a_scheduler(
        self, config: SchedulerConfig = QUICK, clock: Clock = monotonic_ms, *, immortal: bool = False
    ) -> Scheduler:
        """A process that stands for election."""
        holder = f"scheduler-{next(self._names)}"
        store = PoolStore.of(self._redis, self._pool, holder, RETENTION_MS)
        leadership = Immortal(self._redis, self._pool, holder) if immortal else store.leadership
        reigns: list[Reign] = []
        metrics = Metrics()
        telemetry = Telemetry(SchedulerMetrics(metrics), NoTracer())

        async def reign(held: Held, seen_life: bool) -> None:
            reigns.append(Reign(store, held, config, telemetry, clock))
            await reigns[-1].run(seen_life)

        task = self._spawn(Candidate(leadership, config.term, reign, clock).run())
        return Scheduler(task, reigns, metrics)

    async def a_worker(self, num_blocks: int = 100, max_sequences: int = 8, max_prefill_tokens_per_step: int = 64,
                       name: str = "") -> FakeWorker:  # fmt: skip
        """A registered worker that runs."""
        info = WorkerInfo(
            worker_id=name or f"w-{next(self._names)}",
            num_blocks=num_blocks,
            block_size_tokens=16,
            max_sequences=max_sequences,
            max_prefill_tokens_per_step=max_prefill_tokens_per_step,
            report_interval_ms=int(1000 * REPORT_S),
        )
        worker = FakeWorker(self.store, info)
        registered = asyncio.Event()
        self._spawn(worker.run(registered))
        async with asyncio.timeout(WITHIN_S):
            await registered.wait()
        return worker

    async def recovered(self) -> None:
        """Wait until moves are possible."""
        await until(self._is_recovered)

    async def submit(
        self, name: str, *, prompt_tokens: int = 5, max_tokens: int = 11, deadline_ms: int = 0, resume_ms: int = 60_000
    ) -> RequestKey:
        """Accept a request, read at GATEWAY."""
        key = RequestKey(f"acme/{name}")
        payload = a_payload(name, prompt_tokens, max_tokens)
        move = moves.Submit(key, "digest", payload.SerializeToString(), 1, "n1", GATEWAY, resume_ms, deadline_ms, 1000)
        await self.store.requests.submit(move)
        return key

    async def beat(self) -> None:
        """GATEWAY lives, for longer than any test."""
        await until(self._beats)

    async def _beats(self) -> bool:
        await GatewayLease(self._redis).beat(GATEWAY, RETENTION_MS)
        return True

    async def given(self, worker: FakeWorker, name: str) -> Start:
        """Accept a request, and wait until this worker has it."""
        await self.submit(name)
        return await worker.next_start()

    async def record(self, key: RequestKey) -> Record:
        """A record as Redis has it."""
        found = await self.store.requests.read(key)
        assert found is not None
        return found[0]

    async def reaches(self, key: RequestKey, state: RequestState) -> Record:
        """The record, once it is in this state."""
        await until(lambda: self._is_in(key, state))
        return await self.record(key)

    def end(self) -> None:
        """Stop all tasks."""
        for task in self._running:
            task.cancel()

    async def _is_in(self, key: RequestKey, state: RequestState) -> bool:
        found = await self.store.requests.read(key)
        return found is not None and found[0].state == state

    async def _is_recovered(self) -> bool:
        return await self.store.recovery.needed() is None

    def _spawn(self, work: Awaitable[None]) -> "asyncio.Task[None]":
        async def run() -> None:
            await work

        task = self._tasks.create_task(run())
        self._running.append(task)
        return task


def a_payload(name: str, prompt_tokens: int = 5, max_tokens: int = 11) -> RequestPayload:
    payload = RequestPayload(request_id=name, tenant="acme", max_tokens=max_tokens, n=1)
    payload.prompt_token_ids.extend(range(prompt_tokens))
    return payload


@asynccontextmanager
async def scheduler_pool(redis: Redis, pool: str) -> AsyncIterator[SchedulerPool]:
    """A pool in which nothing runs yet."""
    async with asyncio.TaskGroup() as tasks:
        parts = SchedulerPool(redis, pool, tasks)
        await parts.beat()
        try:
            yield parts
        finally:
            parts.end()
