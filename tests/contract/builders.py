"""Requests, workers and leaders for tests of the store."""

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import RequestPayload, WorkerInfo
from services.common.ids import RequestKey, WorkerId
from services.common.record import moves
from services.common.record.record import Attempt
from services.common.store.leadership import Leadership, Lease
from services.common.store.recovery import Recovery
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory

KEY = RequestKey("acme/r1")
FIRST_ATTEMPT = Attempt(1, "n1")
WORKER = WorkerId("w1")
RETENTION_MS = 60_000
TTL_MS = 10_000


def a_payload(prompt_tokens: int = 5, max_tokens: int = 16) -> bytes:
    payload = RequestPayload(request_id="r1", tenant="acme", max_tokens=max_tokens, n=1)
    payload.prompt_token_ids.extend(range(prompt_tokens))
    return payload.SerializeToString()


def a_submit(key: RequestKey = KEY, *, num_choices: int = 1, deadline_ms: int = 0, backlog_limit: int = 1000,
             payload: bytes | None = None) -> moves.Submit:  # fmt: skip
    return moves.Submit(
        key=key,
        digest="digest",
        payload=a_payload() if payload is None else payload,
        num_choices=num_choices,
        nonce="n1",
        gateway="gateway:1",
        resume_ms=1000,
        deadline_ms=deadline_ms,
        backlog_limit=backlog_limit,
    )


def a_store(redis: Redis, pool: str) -> RequestStore:
    return RequestStore(redis, pool, RETENTION_MS)


async def a_leader(redis: Redis, pool: str, holder: str = "leader-1", ttl_ms: int = TTL_MS) -> Lease:
    """A leader of a pool that has recovered: moves are possible."""
    lease = await Leadership(redis, pool, holder).acquire(ttl_ms)
    assert lease is not None
    await recovered(redis, pool, lease)
    return lease


async def recovered(redis: Redis, pool: str, lease: Lease) -> None:
    recovery = Recovery(redis, pool)
    run_id = await recovery.needed()
    if run_id is not None:
        assert await recovery.complete(run_id, lease.fence)


async def a_worker(redis: Redis, pool: str, worker: WorkerId = WORKER, ttl_ms: int = TTL_MS) -> WorkerDirectory:
    directory = WorkerDirectory(redis, pool)
    await directory.register(WorkerInfo(worker_id=worker, num_blocks=100, block_size_tokens=16), ttl_ms)
    return directory


def a_place(lease: Lease, key: RequestKey = KEY, attempt: Attempt = FIRST_ATTEMPT) -> moves.Place:
    return moves.Place(key, lease.fence, attempt, WORKER)


async def a_placed_request(redis: Redis, pool: str, num_choices: int = 1, submit: moves.Submit | None = None) -> Lease:
    """A request with WORKER, under its first attempt."""
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    await store.submit(submit or a_submit(num_choices=num_choices))
    await store.place(a_place(lease))
    return lease
