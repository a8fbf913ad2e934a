"""The request store at its edges: many requests at once, long journals, repeated moves, ids over pools, no Redis."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from services.common.ids import RequestKey, TenantId
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.record import Attempt
from services.common.record.states import RequestState
from services.common.record.transitions import Answer, Verdict
from services.common.store import connection
from services.common.store.connection import StoreUnavailable, command, connect
from services.common.store.ids import claim_id, pool_of
from services.common.store.inbox import Inbox, Start
from services.common.store.keys import Keys
from services.common.store.requests import MAX_BATCH
from services.common.store.streams import FIRST
from tests.contract.builders import (
    FIRST_ATTEMPT,
    KEY,
    WORKER,
    a_leader,
    a_payload,
    a_place,
    a_placed_request,
    a_store,
    a_submit,
    a_worker,
)  # fmt: skip


async def test_five_hundred_requests_are_journaled_by_one_script_call(redis: Redis, pool: str) -> None:
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    keys = [RequestKey(f"acme/r{number}") for number in range(MAX_BATCH)]
    for key in keys:
        await store.submit(a_submit(key))
        await store.place(a_place(lease, key))
    await redis.config_resetstat()
    appends = [moves.Append(key, FIRST_ATTEMPT, 0, 0, tuple(range(number % 7))) for number, key in enumerate(keys)]
    answers = await store.append(appends)
    assert answers == [Answer(Verdict.OK, 0, number % 7) for number in range(MAX_BATCH)]
    calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert calls == 1 or (calls, (await redis.info("commandstats"))["cmdstat_eval"]["calls"]) == (1, 1)
    last = await store.read(keys[-1])
    assert last is not None
    assert last[0].journal == (tuple(range((MAX_BATCH - 1) % 7)),)
    assert await store.append(appends + appends) == answers + answers


async def test_a_long_journal_comes_back_whole_with_the_next_attempt(redis: Redis, pool: str) -> None:
    lease = await a_placed_request(redis, pool, num_choices=2)
    store = a_store(redis, pool)
    tokens = tuple((number * 2654435761) % 2**32 for number in range(100_000))
    [answer] = await store.append([moves.Append(KEY, FIRST_ATTEMPT, 1, 0, tokens)])
    assert answer.index == len(tokens)
    await store.requeue(moves.Requeue(KEY, FIRST_ATTEMPT, "n2", "lost", fence=lease.fence))
    await store.place(a_place(lease, attempt=Attempt(2, "n2")))
    messages = [message for _, message in await Inbox(redis, pool, WORKER).read(FIRST, 0, 10)]
    [start] = [message for message in messages if isinstance(message, Start)]
    assert start.journal == ((), tokens)
    attached = await store.attach(moves.Attach(KEY, "gateway:2", (Held(0), Held(len(tokens), tokens[-5:]))))
    assert attached.record is not None
    assert attached.record.journal == ((), tokens)


async def test_a_long_prompt_reaches_the_worker_as_it_was(redis: Redis, pool: str) -> None:
    lease = await a_leader(redis, pool)
    await a_worker(redis, pool)
    store = a_store(redis, pool)
    payload = a_payload(prompt_tokens=100_000)
    await store.submit(a_submit(payload=payload))
    await store.place(a_place(lease))
    [(_, start)] = await Inbox(redis, pool, WORKER).read(FIRST, 0, 10)
    assert isinstance(start, Start)
    assert start.payload.SerializeToString() == payload


async def test_a_repeated_move_answers_that_it_was_made_and_changes_nothing(redis: Redis, pool: str) -> None:
    """What a caller sees that lost the first reply."""
    lease = await a_placed_request(redis, pool)
    store = a_store(redis, pool)
    first = await store.submit(a_submit())
    again = await store.submit(a_submit())
    assert again.answer.verdict == first.answer.verdict == Verdict.KNOWN
    assert again.accepted_at_ms == first.accepted_at_ms > 0
    assert (await store.place(a_place(lease))).verdict == Verdict.STALE
    append = moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (1, 2, 3))
    assert await store.append([append]) == await store.append([append])
    finish = moves.Finish(KEY, FIRST_ATTEMPT, RequestState.FINISHED, ((0, (1, 2, 3, 4)),), b"end")
    assert (await store.finish(finish)).verdict == Verdict.OK
    before = await store.read(KEY)
    assert (await store.finish(finish)).verdict == Verdict.ENDED
    after = await store.read(KEY)
    assert before is not None
    assert after is not None
    assert after[0] == before[0]
    assert (after[0].journal, after[0].outcome) == (((1, 2, 3, 4),), b"end")


async def test_an_ended_record_goes_after_its_retention_time(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    store = type(a_store(redis, pool))(redis, pool, retention_ms=30)
    await store.submit(a_submit())
    await store.cancel(moves.Cancel(KEY, "enough"))
    assert await store.read(KEY) is not None
    await asyncio.sleep(0.06)
    assert await store.read(KEY) is None
    assert await store.peek([KEY]) == [None]
    assert (await store.submit(a_submit())).answer.verdict == Verdict.OK


async def test_times_are_those_of_redis(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    store = a_store(redis, pool)
    before = await store.now_ms()
    submitted = await store.submit(a_submit(deadline_ms=5_000))
    assert before <= submitted.accepted_at_ms == submitted.now_ms <= await store.now_ms()
    assert submitted.deadline_at_ms == submitted.accepted_at_ms + 5_000


async def test_what_cannot_be_stored_is_refused_before_anything_is_written(redis: Redis, pool: str) -> None:
    await a_placed_request(redis, pool)
    store = a_store(redis, pool)
    with pytest.raises(ValueError, match="token id"):
        await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (2**32,))])
    with pytest.raises(ValueError, match="cannot end as queued"):
        await store.finish(moves.Finish(KEY, FIRST_ATTEMPT, RequestState.QUEUED, (), b""))
    with pytest.raises(ValueError, match="more tokens than it holds"):
        await store.attach(moves.Attach(KEY, "gateway:2", (Held(1, (1, 2)),)))


async def test_an_id_belongs_to_the_pool_that_claimed_it_first(redis: Redis) -> None:
    assert await pool_of(redis, "acme", "r1") is None
    assert await claim_id(redis, "acme", "r1", "small") == "small"
    assert await claim_id(redis, "acme", "r1", "large") == "small"
    assert await claim_id(redis, "umbrella", "r1", "large") == "large"
    assert await pool_of(redis, "acme", "r1") == "small"


async def test_scripts_are_sent_again_to_a_server_that_forgot_them(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    store = a_store(redis, pool)
    await store.submit(a_submit())
    await redis.script_flush()
    assert (await store.submit(a_submit())).answer.verdict == Verdict.KNOWN


async def test_what_a_tenant_took_of_a_minute_is_forgotten_once_it_has_come_back(redis: Redis, pool: str) -> None:
    await a_leader(redis, pool)
    metered = replace(a_submit(), tokens_per_minute=42, prompt_tokens=5, reserved_tokens=16)
    assert (await a_store(redis, pool).submit(metered)).answer.verdict == Verdict.OK
    assert 0 < await redis.pttl(Keys(pool).tokens(TenantId("acme"))) <= 30_000


async def test_scripts_name_keys_as_the_keys_module_does(redis: Redis, pool: str) -> None:
    """One request through its life touches every kind of key; none may have a name that `Keys` does not make."""
    metered = replace(a_submit(), tokens_per_minute=21, prompt_tokens=5, reserved_tokens=16)
    lease = await a_placed_request(redis, pool, submit=metered)
    store = a_store(redis, pool)
    await store.append([moves.Append(KEY, FIRST_ATTEMPT, 0, 0, (1,))])
    await store.requeue(moves.Requeue(KEY, FIRST_ATTEMPT, "n2", "lost", fence=lease.fence))
    keys = Keys(pool)
    expected = {
        keys.intake, keys.events, keys.leader, keys.epoch, keys.generation, keys.workers, keys.worker(WORKER),
        keys.inbox(WORKER), keys.request(KEY), keys.journal(KEY, 0), keys.in_flight("acme"), keys.tokens("acme"),
    }  # fmt: skip
    assert {name.decode() for name in await command(redis, "KEYS", "*")} == expected


@pytest.mark.parametrize("pool", ["", "a{b", "a}b", "with space", "x" * 201])
def test_a_pool_whose_name_would_break_the_hash_tag_is_refused(pool: str) -> None:
    with pytest.raises(ValueError, match="pool name"):
        Keys(pool)


async def test_connecting_gives_up_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_BACKOFF_S", 0.001)
    with pytest.raises(StoreUnavailable):
        await connect("redis://127.0.0.1:1")
