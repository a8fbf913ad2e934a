"""After Redis restarted: nothing is placed until what processes hold is above what Redis may have lost.

The steps are those of docs/protocol.md, "Lost writes".

A pool with earlier life is given a window, in which workers and gateways state what they hold. Earlier life is: Redis
knows a generation, this process has seen one, or somebody states a request. Without it (the first start of a fleet) a
moment is enough. What is then overlooked: a Redis that kept nothing at all, and every scheduler started anew with it,
and all holders silent for that moment; such a Redis promises nothing of what was accepted.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gen.shoal.fleet.v1.request_pb2 import HeldRequest, Holdings, RequestPayload
from services.common import log
from services.common.ids import RequestKey, WorkerId, new_nonce
from services.common.record import moves
from services.common.record.record import Attempt, Record
from services.common.record.states import ON_WORKER
from services.common.record.transitions import Verdict
from services.common.store.ids import claim_id
from services.scheduler.clock import Clock
from services.scheduler.deposed import Deposed
from services.scheduler.pool_store import PoolStore

logger = logging.getLogger(__name__)

LOOK_MS = 50
"""Between two looks at what was stated: a hash, which cannot be waited for."""


@dataclass(frozen=True, slots=True)
class Window:
    """How long statements are waited for, in ms."""

    known_ms: int = 2_000
    """With earlier life. Each new statement prolongs it by a quarter; it at most doubles."""
    fresh_ms: int = 200
    """Without."""


class Claims:
    """What processes say they hold. Immutable."""

    def __init__(self, stated: Iterable[Holdings]) -> None:
        self._attempts: dict[RequestKey, set[Attempt]] = {}
        self._running: set[tuple[RequestKey, WorkerId, Attempt]] = set()
        self._readers: dict[RequestKey, HeldRequest] = {}
        self._served: set[tuple[RequestKey, str, int]] = set()
        for holdings in stated:
            for held in holdings.requests:
                self._add(holdings.holder, held)

    def __len__(self) -> int:
        return len(self._attempts)

    def next_number(self, key: RequestKey) -> int:
        """An attempt's number above every one that was stated."""
        return 1 + max((attempt.number for attempt in self._attempts.get(key, ())), default=0)

    def confirm(self, record: Record) -> bool:
        """Whether its worker has exactly this attempt, and nobody one that could follow it."""
        if record.state not in ON_WORKER or (record.key, record.worker, record.attempt) not in self._running:
            return False
        return all(
            stated == record.attempt or stated.number < record.attempt.number for stated in self._attempts[record.key]
        )

    def is_read(self, record: Record) -> bool:
        """Whether a gateway serves the very reader that the record names."""
        return (record.key, record.gateway, record.reader) in self._served

    def lost(self, found: set[RequestKey]) -> Iterator[HeldRequest]:
        """Requests that a gateway reads, with all that is needed to put them back, and that were not found."""
        return (held for key, held in self._readers.items() if key not in found)

    def _add(self, holder: str, held: HeldRequest) -> None:
        key, attempt = RequestKey(held.key), Attempt(held.attempt, held.nonce)
        self._attempts.setdefault(key, set()).add(attempt)
        if held.runs_here:
            self._running.add((key, WorkerId(holder), attempt))
        elif held.HasField("payload"):
            self._served.add((key, held.gateway, held.reader))
            known = self._readers.get(key)
            # The last reader counts; of two gateways, one may not know yet that it was superseded.
            if known is None or known.reader < held.reader:
                self._readers[key] = held


async def recover(store: PoolStore, fence: str, window: Window, clock: Clock, seen_life: bool) -> bool:
    """Make the pool whole, if Redis has restarted. Returns whether it had. Repeatable at any point.

    Raises Deposed, StoreError.
    """
    run_id = await store.recovery.needed()
    if run_id is None:
        return False
    logger.info("recovery begins", extra={"run_id": run_id})
    claims = await _collect(store, run_id, window, clock, seen_life)
    found = await _confirm_or_raise(store, fence, claims)
    num_restored = await _restore(store, fence, claims, found)
    if not await store.recovery.complete(run_id, fence):
        raise Deposed("recovery was finished by somebody else, or Redis restarted again")
    logger.info(
        "recovery ends", extra={"run_id": run_id, "claims": len(claims), "found": len(found), "restored": num_restored}
    )
    return True


async def restore_late(store: PoolStore, fence: str) -> None:
    """Put back what gateways state after a recovery that did not hear them. Repeatable. Raises Deposed, StoreError."""
    run_id = await store.recovery.generation()
    stated = await store.recovery.posted(run_id) if run_id else []
    if run_id and stated:
        await _restore(store, fence, Claims(stated), found=set())
        await store.recovery.forget(run_id)


async def _collect(store: PoolStore, run_id: str, window: Window, clock: Clock, seen_life: bool) -> Claims:
    began_ms = clock()
    known = seen_life or await store.recovery.generation() is not None
    num_holders, until_ms = 0, began_ms + (window.known_ms if known else window.fresh_ms)
    while True:
        stated = await store.recovery.posted(run_id)
        if not known and any(holdings.requests for holdings in stated):
            known, until_ms = True, began_ms + window.known_ms
        if len(stated) > num_holders and known:
            until_ms = max(until_ms, min(clock() + window.known_ms / 4, began_ms + 2 * window.known_ms))
        num_holders = len(stated)
        if clock() >= until_ms:
            return Claims(stated)
        await asyncio.sleep(LOOK_MS / 1000)


async def _confirm_or_raise(store: PoolStore, fence: str, claims: Claims) -> set[RequestKey]:
    """Leave alone what runs as its record says, and is read so; returns every live request that Redis still has."""
    found = set()
    async for record in store.recovery.unfinished():
        if record.key in found:  # a scan may give a record twice
            continue
        found.add(record.key)
        if not claims.confirm(record):
            await _raise_attempt(store, fence, claims, record)
        if not record.reader_left_at_ms and not claims.is_read(record):
            # Redis may have lost that this reader left, or that another one came; who reads attaches again.
            await store.requests.leave(moves.Leave(record.key, record.reader))
            logger.info("left: no gateway serves it", extra={**_about(record), "gateway": record.gateway})
    return found


async def _raise_attempt(store: PoolStore, fence: str, claims: Claims, record: Record) -> None:
    floor = claims.next_number(record.key)
    answer = await store.requests.recover(moves.Recover(record.key, fence, new_nonce(), floor))
    _check(answer.verdict)
    logger.info("recovered", extra={**_about(record), "attempt": answer.index, "worker": record.worker})


async def _restore(store: PoolStore, fence: str, claims: Claims, found: set[RequestKey]) -> int:
    num_restored = 0
    for held in claims.lost(found):
        floor = claims.next_number(RequestKey(held.key))
        verdict = (await store.requests.restore(restoration(held, fence, new_nonce(), floor))).verdict
        _check(verdict)
        if verdict == Verdict.OK:
            # What mapped its id to this pool was written just before it, and is lost with it.
            await claim_id(store.redis, held.payload.tenant, held.payload.request_id, store.pool)
            num_restored += 1
            about = log.about(RequestKey(held.key), held.payload.traceparent)
            logger.info("restored", extra={**about, "attempt": floor, "gateway": held.gateway})
    return num_restored


def restoration(held: HeldRequest, fence: str, nonce: str, floor: int) -> moves.Restore:
    """The move that puts a gateway's request back, behind the tokens that its client was given."""
    num_choices = held.payload.n
    delivered = [tuple(choice.ids) for choice in held.choices[:num_choices]]
    return moves.Restore(
        key=RequestKey(held.key),
        fence=fence,
        digest=held.payload_digest,
        payload=held.payload.SerializeToString(),
        num_choices=num_choices,
        nonce=nonce,
        gateway=held.gateway,
        reader=held.reader,
        resume_ms=held.resume_ms,
        accepted_at_ms=held.accepted_at_ms,
        deadline_at_ms=held.deadline_at_ms,
        journal=(*delivered, *((),) * (num_choices - len(delivered))),
        floor=floor,
    )


def _about(record: Record) -> dict[str, object]:
    return log.about(record.key, RequestPayload.FromString(record.payload).traceparent)


def _check(verdict: Verdict) -> None:
    if verdict == Verdict.NOT_LEADER:
        raise Deposed("a move of recovery was refused")
