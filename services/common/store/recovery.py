"""After Redis restarted: it may have lost its last writes (docs/protocol.md, "Lost writes").

Every move's script refuses (Recovering) while the server's run id is not the pool's recovered generation. The leader
then collects what workers and gateways hold, raises the attempts of live requests (`RequestStore.recover`), notes that
readers left whom no gateway serves (`leave`), puts lost requests back (`restore`), and calls `complete`. A pool's very
first start goes the same way, and finds nothing. What is posted after `complete` came late; the leader takes it in too.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import Holdings
from services.common.ids import RequestKey
from services.common.record.record import Record
from services.common.record.states import ENDED
from services.common.store.codec import pairs, unpack_record
from services.common.store.connection import Argument, command
from services.common.store.keys import Keys
from services.common.store.scripts import Script

HOLDINGS_LIFETIME_MS = 3_600_000
"""How long posted holdings are kept."""
SCAN_COUNT = 1_000
"""Keys that one step of a scan looks at."""


class Recovery:
    """The recovery of one pool. All methods raise StoreUnavailable and may be repeated."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._needed = Script.load("recovery_needed")
        self._post = Script.load("post_holdings")
        self._complete = Script.load("complete_recovery")
        self._read = Script.load("read")

    async def needed(self) -> str | None:
        """The server's run id if this pool is not recovered in it, as on the pool's very first start; else None."""
        run_id = await self._call(self._needed, ())
        return run_id.decode() if run_id else None

    async def generation(self) -> str | None:
        """Run id of the server that was recovered last, as stored; None: this Redis never had one."""
        run_id = await command(self._redis, "GET", self._keys.generation)
        return run_id.decode() if run_id else None

    async def post(self, holdings: Holdings, run_id: str) -> None:
        """State what a process holds, once for each run id; the last statement of a holder counts."""
        stated = (holdings.holder, holdings.SerializeToString(), HOLDINGS_LIFETIME_MS)
        await self._call(self._post, (self._keys.recovery(run_id),), *stated)

    async def posted(self, run_id: str) -> list[Holdings]:
        """What was stated so far for this run id; once that is recovered, since then or since `forget`."""
        stated = await command(self._redis, "HGETALL", self._keys.recovery(run_id))
        return [Holdings.FromString(holdings) for holdings in stated.values()]

    async def forget(self, run_id: str) -> None:
        """Drop what was stated for this run id. Who is still in need states it again."""
        await command(self._redis, "DEL", self._keys.recovery(run_id))

    async def unfinished(self) -> AsyncIterator[Record]:
        """Every record that has not ended, in no order; some perhaps twice. Walks all keys of the server."""
        prefix = self._keys.request(RequestKey(""))
        cursor = b"0"
        while True:
            cursor, names = await command(self._redis, "SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", SCAN_COUNT)
            for name in names:
                record = await self._live_record(RequestKey(name.decode().removeprefix(prefix)))
                if record is not None:
                    yield record
            if cursor == b"0":
                return

    async def complete(self, run_id: str, fence: str) -> bool:
        """Moves are possible again. False: `fence` is not the leader's, or the server has restarted once more."""
        keys = (self._keys.leader, self._keys.recovery(run_id))
        return bool(await self._call(self._complete, keys, run_id, fence))

    async def _live_record(self, key: RequestKey) -> Record | None:
        state = await command(self._redis, "HGET", self._keys.request(key), "state")
        if state is None or state.decode() in ENDED:
            return None
        _, fields, journal = await self._call(self._read, (), key, 0)
        return unpack_record(key, pairs(fields), journal) if fields else None

    async def _call(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Any:
        return await script.call(self._redis, (self._keys.generation, *keys), (self._keys.prefix, "", 0, *arguments))
