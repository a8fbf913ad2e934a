"""The typed Redis API of one pool: all that a scheduler uses of it."""

from dataclasses import dataclass

from redis.asyncio import Redis

from services.common.ids import WorkerId
from services.common.store.demand import DemandStore
from services.common.store.events import Events
from services.common.store.gateways import GatewayLease
from services.common.store.inbox import Inbox
from services.common.store.intake import Intake
from services.common.store.leadership import Leadership
from services.common.store.recovery import Recovery
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory


@dataclass(frozen=True, slots=True)
class PoolStore:
    """Made once a process; its parts hold no state but the connection's."""

    redis: Redis
    pool: str
    requests: RequestStore
    intake: Intake
    events: Events
    workers: WorkerDirectory
    gateways: GatewayLease
    leadership: Leadership
    recovery: Recovery
    demand: DemandStore

    @staticmethod
    def of(redis: Redis, pool: str, holder: str, retention_ms: int) -> "PoolStore":
        """The pool as the candidate `holder` sees it; ended records stay for `retention_ms`.

        Raises ValueError for an impossible pool name.
        """
        return PoolStore(
            redis=redis,
            pool=pool,
            requests=RequestStore(redis, pool, retention_ms),
            intake=Intake(redis, pool),
            events=Events(redis, pool),
            workers=WorkerDirectory(redis, pool),
            gateways=GatewayLease(redis),
            leadership=Leadership(redis, pool, holder),
            recovery=Recovery(redis, pool),
            demand=DemandStore(redis, pool),
        )

    def inbox(self, worker: WorkerId) -> Inbox:
        """A worker's inbox, to ask what is outstanding."""
        return Inbox(self.redis, self.pool, worker)
