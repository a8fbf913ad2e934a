"""What the leader follows: intake and events, in one blocking read."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common.store.events import Event, Events
from services.common.store.intake import Intake, Queued
from services.common.store.keys import Keys
from services.common.store.streams import read_many


@dataclass(frozen=True, slots=True)
class Batch:
    """New entries of both streams."""

    intake: Sequence[Queued]
    events: Sequence[tuple[str, Event]]


async def read_leader(
    redis: Redis, pool: str, intake_after: str, events_after: str, block_ms: int, count: int
) -> Batch:
    """Entries behind both ids, at most `count` of each; returns as soon as either has any. See `streams`."""
    keys = Keys(pool)
    entries = await read_many(redis, {keys.intake: intake_after, keys.events: events_after}, block_ms, count)
    return Batch(Intake.parse(entries.get(keys.intake, [])), Events.parse(entries.get(keys.events, [])))
