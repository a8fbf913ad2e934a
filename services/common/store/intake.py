"""The pool's intake: requests that wait for a place, as the leader reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common.ids import RequestKey, TenantId
from services.common.record.record import Attempt
from services.common.store.keys import Keys
from services.common.store.streams import Entry, read_many


@dataclass(frozen=True, slots=True)
class Queued:
    """An entry of the intake: all that ordering and placing need. It leaves when the request is placed or ends.

    A request may come again under a higher attempt (requeued, recovered): the last entry counts.
    """

    entry_id: str
    key: RequestKey
    attempt: Attempt
    accepted_at_ms: int
    """Redis' clock, ms since the epoch; as accepted at first, also after a requeue."""
    deadline_at_ms: int
    """0: none."""
    prompt_tokens: int
    """Without what was generated."""
    generated_tokens: int
    """In its journal, over all choices: they become prompt."""
    max_tokens: int
    """Of a choice, those in the journal included."""
    num_choices: int
    priority: int
    """A shoal.inference.v1.Priority."""
    tenant: TenantId
    suspect_until: int
    """Not 0: it must run alone."""
    traceparent: str
    """As `telemetry.trace_context` has it."""


class Intake:
    """The intake of one pool."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self.stream = Keys(pool).intake
        """Its key, for `read_many`."""

    async def read(self, after: str, block_ms: int, count: int) -> list[Queued]:
        """Entries behind `after`; see `streams`."""
        entries = await read_many(self._redis, {self.stream: after}, block_ms, count)
        return self.parse(entries.get(self.stream, []))

    @staticmethod
    def parse(entries: Sequence[Entry]) -> list[Queued]:
        """Entries that `read_many` gave for `stream`."""
        return [_queued(entry) for entry in entries]


def _queued(entry: Entry) -> Queued:
    fields = entry.fields
    return Queued(
        entry_id=entry.id,
        key=RequestKey(fields[b"key"].decode()),
        attempt=Attempt(int(fields[b"attempt"]), fields[b"nonce"].decode()),
        accepted_at_ms=int(fields[b"accepted_at_ms"]),
        deadline_at_ms=int(fields[b"deadline_at_ms"]),
        prompt_tokens=int(fields[b"prompt_tokens"]),
        generated_tokens=int(fields[b"generated_tokens"]),
        max_tokens=int(fields[b"max_tokens"]),
        num_choices=int(fields[b"n"]),
        priority=int(fields[b"priority"]),
        tenant=TenantId(fields[b"tenant"].decode()),
        suspect_until=int(fields[b"suspect_until"]),
        traceparent=fields[b"traceparent"].decode(),
    )
