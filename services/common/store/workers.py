"""Which workers a pool has: registration, reports, retirement."""

from redis.asyncio import Redis

from gen.shoal.fleet.v1.request_pb2 import LinkBroken, WorkerInfo, WorkerReport
from services.common.ids import WorkerId
from services.common.store.connection import Argument, command
from services.common.store.keys import Keys
from services.common.store.scripts import Script


class WorkerDirectory:
    """The workers of one pool. All methods work in recovery and raise StoreUnavailable."""

    def __init__(self, redis: Redis, pool: str) -> None:
        self._redis = redis
        self._keys = Keys(pool)
        self._register = Script.load("register")
        self._report = Script.load("report")
        self._link_broken = Script.load("link_broken")
        self._retire = Script.load("retire")
        self._drain = Script.load("drain")

    async def register(self, info: WorkerInfo, ttl_ms: int) -> None:
        """Add a worker, or change what is known of it; it stays while it reports within `ttl_ms`. May be repeated."""
        worker = WorkerId(info.worker_id)
        await self._call(self._register, worker, info.SerializeToString(), ttl_ms)

    async def report(self, report: WorkerReport, ttl_ms: int) -> bool:
        """Tell the leader of progress, and stay registered. Repeated: the same report twice in the events.

        False: this worker is not registered. If it is still a member, its registration expired; else the leader has
        declared it lost, and it starts again under a new id.
        """
        worker = WorkerId(report.worker_id)
        return bool(await self._call(self._report, worker, report.SerializeToString(), ttl_ms))

    async def is_member(self, worker: WorkerId) -> bool:
        """Whether a worker is in the pool, its registration expired or not: nobody has taken its requests from it."""
        return bool(await command(self._redis, "SISMEMBER", self._keys.workers, worker))

    async def link_broken(self, broken: LinkBroken) -> bool:
        """Tell the leader that a gateway's stream from a worker broke. Repeated: told twice.

        False: this worker is not registered (it ended well, or is known to be lost): there is nothing to tell.
        """
        return bool(await self._call(self._link_broken, WorkerId(broken.worker_id), broken.SerializeToString()))

    async def retire(self, worker: WorkerId, fence: str) -> bool:
        """The leader removes a lost worker: registration, membership, inbox. Repeated: True.

        False: `fence` is not the leader's, or the worker still has requests (`Inbox.outstanding`): requeue them first,
        or nobody would find them again.
        """
        return bool(await self._call(self._retire, worker, "leader", fence))

    async def close(self, worker: WorkerId) -> None:
        """Take nothing more before leaving: not registered, but its inbox stays until `unregister`. Repeated: same."""
        await command(self._redis, "DEL", self._keys.worker(worker))

    async def unregister(self, worker: WorkerId) -> bool:
        """A worker removes itself, having handed everything over. Repeated: True. False: it still has requests."""
        return bool(await self._call(self._retire, worker, "self", ""))

    async def drain(self, worker: WorkerId) -> bool:
        """Tell a worker to hand over and stop. Repeated: told twice. False: it is not registered."""
        return bool(await self._call(self._drain, worker))

    async def all(self) -> list[tuple[WorkerId, WorkerInfo | None]]:
        """Each member by id, with its registration; None: that has expired, so it is silent or gone."""
        members = sorted(member.decode() for member in await command(self._redis, "SMEMBERS", self._keys.workers))
        if not members:
            return []
        names = [self._keys.worker(WorkerId(member)) for member in members]
        registrations = await command(self._redis, "MGET", *names)
        return [
            (WorkerId(member), None if info is None else WorkerInfo.FromString(info))
            for member, info in zip(members, registrations, strict=True)
        ]

    async def _call(self, script: Script, worker: WorkerId, *arguments: Argument) -> int:
        keys = (
            self._keys.generation,
            self._keys.workers,
            self._keys.worker(worker),
            self._keys.inbox(worker),
            self._keys.events,
            self._keys.leader,
        )
        return int(await script.call(self._redis, keys, (self._keys.prefix, "", 0, worker, *arguments)))
