"""What a pool needs, as its leader told last."""

from dataclasses import dataclass

from redis.asyncio import Redis

from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from services.common.store.connection import translated
from services.common.store.keys import Keys
from services.common.store.scripts import Script


@dataclass(frozen=True, slots=True)
class Told:
    """A leader's word, and how old it is by Redis' clock."""

    demand: PoolDemand
    age_ms: int


class DemandStore:
    """The demand of one pool. Both methods work in recovery, may be repeated, and raise StoreUnavailable."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._tell = Script.load("tell_demand")

    async def tell(self, demand: PoolDemand, fence: str) -> bool:
        """The leader's word, in place of the last. False: `fence` is not the leader's, and nothing was written."""
        keys = (self._keys.generation, self._keys.leader, self._keys.demand)
        arguments = (self._keys.prefix, "", 0, fence, demand.SerializeToString())
        return bool(await self._tell.call(self._redis, keys, arguments))

    async def read(self) -> Told | None:
        """The last word. None: nobody has led this pool yet."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.execute_command("HMGET", self._keys.demand, "demand", "at_ms")
        pipeline.execute_command("TIME")
        with translated():
            (demand, at_ms), (seconds, microseconds) = await pipeline.execute()
        if demand is None:
            return None
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        return Told(PoolDemand.FromString(demand), max(0, now_ms - int(at_ms)))
