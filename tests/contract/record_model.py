"""The pure protocol beside real Redis: each move goes to both, and everything that can be seen is compared.

`Model` holds what `transitions.apply` says; `World` makes moves in both and raises AssertionError on a difference.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import RequestPayload
from services.common.ids import RequestKey, TenantId, WorkerId
from services.common.record import moves, transitions
from services.common.record.record import Record
from services.common.record.states import RequestState
from services.common.record.transitions import Answer, Pool, Verdict
from services.common.store.connection import command
from services.common.store.events import Events, Released
from services.common.store.inbox import CancelAttempt, Inbox, InboxMessage, Redirect, Start
from services.common.store.intake import Intake, Queued
from services.common.store.keys import Keys
from services.common.store.requests import RequestStore
from services.common.store.streams import FIRST, read_many

RETENTION_MS = 600_000
WORKERS = (WorkerId("w1"), WorkerId("w2"), WorkerId("w3"))
KEYS = tuple(RequestKey(f"{tenant}/r{number}") for number in range(4) for tenant in ("acme", "umbrella"))
ALL = 1_000
SOON_MS = 5_000
"""Longer than a history takes from one move to the next, and shorter than most of what a request takes of a budget."""


@dataclass
class Model:
    """What the pure protocol says that Redis holds."""

    now_ms: int = 1_000_000_000_000
    """Long past for Redis itself."""
    fence: str = "1:leader"
    workers: set[WorkerId] = field(default_factory=lambda: set(WORKERS[:2]))
    records: dict[RequestKey, Record] = field(default_factory=dict)
    intake: list[Queued] = field(default_factory=list)
    inboxes: dict[WorkerId, list[InboxMessage]] = field(default_factory=lambda: {worker: [] for worker in WORKERS})
    events: list[Released] = field(default_factory=list)
    retained: set[RequestKey] = field(default_factory=set)
    tokens_back_at_ms: dict[TenantId, int] = field(default_factory=dict)

    def make(self, move: moves.Move) -> Answer:
        """Make a move and apply its effects."""
        before = self.records.get(move.key)
        pool = Pool(
            self.now_ms,
            self.fence,
            len(self.intake),
            frozenset(self.workers),
            len(self.in_flight(move.key)),
            self.tokens_back_at_ms.get(_tenant(move.key), 0),
        )
        step = transitions.apply(before, move, pool)
        if step.record is not None:
            self.records[move.key] = step.record
        for effect in step.effects:
            self._take_effect(effect)
        return step.answer

    def in_flight(self, key: RequestKey) -> set[RequestKey]:
        """Requests of the key's tenant that have not ended."""
        return {other for other, record in self.records.items() if _tenant(other) == _tenant(key) and not record.ended}

    def _take_effect(self, effect: transitions.Effect) -> None:
        record = self.records[effect.key]
        match effect:
            case transitions.EnterIntake():
                self.intake.append(_queued(record))
            case transitions.LeaveIntake():
                self.intake = [queued for queued in self.intake if queued.key != effect.key]
            case transitions.SendStart():
                self.inboxes[effect.worker].append(_start(record))
            case transitions.SendCancel():
                self.inboxes[effect.worker].append(CancelAttempt(effect.key, effect.attempt))
            case transitions.SendRedirect():
                redirect = Redirect(effect.key, effect.attempt, effect.gateway, effect.reader)
                self.inboxes[effect.worker].append(redirect)
            case transitions.Release():
                inbox = self.inboxes[effect.worker]
                self.inboxes[effect.worker] = [
                    message for message in inbox if not (isinstance(message, Start) and message.key == effect.key)
                ]
                self.events.append(Released(effect.key, effect.worker))
            case transitions.Retain():
                self.retained.add(effect.key)
            case transitions.TokensBackAt(key, at_ms):
                self.tokens_back_at_ms[_tenant(key)] = at_ms
                if at_ms <= self.now_ms:
                    del self.tokens_back_at_ms[_tenant(key)]


def _tenant(key: RequestKey) -> TenantId:
    return TenantId(key.split("/")[0])


def _text(number: int | None) -> bytes | None:
    return None if number is None else str(number).encode()


def _queued(record: Record) -> Queued:
    payload = RequestPayload.FromString(record.payload)
    return Queued(
        entry_id="",
        key=record.key,
        attempt=record.attempt,
        accepted_at_ms=record.accepted_at_ms,
        deadline_at_ms=record.deadline_at_ms,
        prompt_tokens=len(payload.prompt_token_ids),
        generated_tokens=sum(len(tokens) for tokens in record.journal),
        max_tokens=payload.max_tokens,
        num_choices=record.num_choices,
        priority=int(payload.priority),
        tenant=_tenant(record.key),
        suspect_until=record.suspect_until,
        traceparent=payload.traceparent,
    )


def _start(record: Record) -> Start:
    return Start(
        key=record.key,
        attempt=record.attempt,
        gateway=record.gateway,
        reader=record.reader,
        payload=RequestPayload.FromString(record.payload),
        journal=record.journal,
        remaining_ms=record.deadline_at_ms,  # As read at time 0.
        suspect_until=record.suspect_until,
        accepted_at_ms=record.accepted_at_ms,
        placed_at_ms=record.placed_at_ms,
    )


class World:
    """A model and a pool of real Redis, in step."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self.model = Model()
        self._redis = redis
        self._keys = Keys(pool)
        self._pool = pool
        self._store = RequestStore(redis, pool, RETENTION_MS, clock_ms=lambda: self.model.now_ms)

    async def begin(self, run_id: str) -> None:
        """Make the pool recovered, led, and staffed as the model says."""
        await self._redis.set(self._keys.generation, run_id)
        await self._redis.set(self._keys.leader, self.model.fence)
        for worker in self.model.workers:
            await self.register(worker)

    async def register(self, worker: WorkerId) -> None:
        """A worker comes, or its registration is renewed."""
        self.model.workers.add(worker)
        await self._redis.sadd(self._keys.workers, worker)
        await self._redis.set(self._keys.worker(worker), b"")

    async def lose(self, worker: WorkerId) -> None:
        """A worker's registration expires."""
        self.model.workers.discard(worker)
        await self._redis.delete(self._keys.worker(worker))

    async def elect(self, fence: str) -> None:
        """Another leader; empty: none."""
        self.model.fence = fence
        await (self._redis.set(self._keys.leader, fence) if fence else self._redis.delete(self._keys.leader))

    async def make(self, move: moves.Move) -> Answer:
        """Make a move in both, and compare all that there is."""
        expected = self.model.make(move)
        assert await self._send(move) == expected
        await self._compare(move.key)
        return expected

    async def make_together(self, appends: list[moves.Append]) -> None:
        """Make appends in one script call."""
        expected = [self.model.make(move) for move in appends]
        assert await self._store.append(appends) == expected
        for move in appends:
            await self._compare(move.key)

    async def _send(self, move: moves.Move) -> Answer:
        store, model = self._store, self.model
        match move:
            case moves.Submit():
                submitted = await store.submit(move)
                record = model.records.get(move.key)
                known = record is not None and submitted.answer.verdict in (Verdict.OK, Verdict.KNOWN)
                times = (record.accepted_at_ms, record.deadline_at_ms) if record is not None and known else (0, 0)
                assert (submitted.accepted_at_ms, submitted.deadline_at_ms) == times
                assert submitted.now_ms == model.now_ms
                return submitted.answer
            case moves.Attach():
                attached = await store.attach(move)
                assert attached.record == model.records.get(move.key)
                assert attached.now_ms == model.now_ms
                return attached.answer
            case moves.Append():
                return (await store.append([move]))[0]
            case moves.Sweep():
                return (await store.sweep([move]))[0]
            case _:
                send: Any = getattr(store, type(move).__name__.lower())
                answer: Answer = await send(move)
                return answer

    async def _compare(self, moved: RequestKey) -> None:
        """Records of the others cannot have changed: `compare_all` sees to them at the end of a history."""
        await self._compare_record(moved)
        keys, model = self._keys, self.model
        counted = await command(self._redis, "SMEMBERS", keys.in_flight(_tenant(moved)))
        assert {name.decode() for name in counted} == model.in_flight(moved)
        await self._compare_tokens(_tenant(moved))
        streams = [keys.intake, keys.events, *map(keys.inbox, WORKERS)]
        entries = await read_many(self._redis, dict.fromkeys(streams, FIRST), 0, ALL)
        intake = Intake.parse(entries.get(keys.intake, []))
        assert [replace(queued, entry_id="") for queued in intake] == model.intake
        assert [event for _, event in Events.parse(entries.get(keys.events, []))] == model.events
        for worker in WORKERS:
            messages = Inbox.parse(entries.get(keys.inbox(worker), []), now_ms=0)
            assert [message for _, message in messages] == model.inboxes[worker]

    async def _compare_tokens(self, tenant: TenantId) -> None:
        """They expire by Redis' own clock, which has no part in a history: what soon would is forgotten in both."""
        name, back_at_ms = self._keys.tokens(tenant), self.model.tokens_back_at_ms.get(tenant)
        found = await command(self._redis, "GET", name)
        if back_at_ms is not None and back_at_ms < self.model.now_ms + SOON_MS:
            assert found in (_text(back_at_ms), None)
            del self.model.tokens_back_at_ms[tenant]
            await command(self._redis, "DEL", name)
        else:
            assert found == _text(back_at_ms)
            await command(self._redis, "PERSIST", name)

    async def compare_all(self) -> None:
        """Compare every record, and what `peek` says of it."""
        for key in KEYS:
            await self._compare_record(key)
        for key, peek in zip(KEYS, await self._store.peek(KEYS), strict=True):
            record = self.model.records.get(key)
            assert (peek is None) == (record is None)
            if peek is not None and record is not None:
                for name in ("state", "reader", "attempt", "worker", "gateway", "reader_left_at_ms", "resume_ms"):
                    assert getattr(peek, name) == getattr(record, name)

    async def _compare_record(self, key: RequestKey) -> None:
        model = self.model
        read = await self._store.read(key)
        assert read == ((model.records[key], model.now_ms) if key in model.records else None)
        if key in model.records:
            await self._compare_expiry(model.records[key])

    async def _compare_expiry(self, record: Record) -> None:
        """What has ended expires, journals included; nothing else does."""
        names = [self._keys.request(record.key)]
        names += [self._keys.journal(record.key, choice) for choice, tokens in enumerate(record.journal) if tokens]
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.pttl(name)
        for remaining_ms in await pipeline.execute():
            if record.key in self.model.retained:
                assert 0 < remaining_ms <= RETENTION_MS
            else:
                assert remaining_ms == -1


def ended_states() -> list[RequestState]:
    """The ends that a worker may write."""
    return [RequestState.FINISHED, RequestState.CANCELLED, RequestState.EXPIRED, RequestState.FAILED]
