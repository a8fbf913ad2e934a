"""The pool's events: workers' reports, freed reservations and broken links, as the leader reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import LinkBroken, WorkerReport
from services.common.ids import RequestKey, WorkerId
from services.common.store.keys import Keys
from services.common.store.streams import Entry, read_many, read_newest


@dataclass(frozen=True, slots=True)
class Released:
    """A worker no longer has a request: what was reserved there for it is free."""

    key: RequestKey
    worker: WorkerId


Event = WorkerReport | Released | LinkBroken


class Events:
    """The events of one pool. Only about the last 10,000 are kept."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self.stream = Keys(pool).events
        """Its key, for `read_many`."""

    async def read(self, after: str, block_ms: int, count: int) -> list[tuple[str, Event]]:
        """Events behind `after`, with their ids; see `streams`."""
        entries = await read_many(self._redis, {self.stream: after}, block_ms, count)
        return self.parse(entries.get(self.stream, []))

    async def newest(self, count: int) -> list[tuple[str, Event]]:
        """The last `count` events, oldest first."""
        return self.parse(await read_newest(self._redis, self.stream, count))

    @staticmethod
    def parse(entries: Sequence[Entry]) -> list[tuple[str, Event]]:
        """Entries that `read_many` gave for `stream`."""
        return [(entry.id, _event(entry)) for entry in entries]


def _event(entry: Entry) -> Event:
    report = entry.fields.get(b"report")
    if report is not None:
        return WorkerReport.FromString(report)
    broken = entry.fields.get(b"link_broken")
    if broken is not None:
        return LinkBroken.FromString(broken)
    return Released(RequestKey(entry.fields[b"released"].decode()), WorkerId(entry.fields[b"worker"].decode()))
