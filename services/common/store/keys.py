"""Names of all keys in Redis.

Every key of a pool carries the hash tag `{<pool>}`, so that they share one slot and one script may touch all of them.
Scripts get the prefix and build the rest as here: `lua/prelude.lua` mirrors this module, and a test compares the two.
"""

import re

from services.common.ids import RequestKey, WorkerId

_POOL_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


class Keys:
    """Keys of one pool. Raises ValueError for a pool's name outside `[A-Za-z0-9._-]{1,200}`."""

    def __init__(self, pool: str) -> None:
        if not _POOL_NAME.fullmatch(pool):
            raise ValueError(f"pool name {pool!r}: only 1 to 200 of A-Z a-z 0-9 . _ - are possible")
        self.prefix = f"{{{pool}}}:"
        self.intake = f"{self.prefix}intake"
        """Stream of queued requests."""
        self.events = f"{self.prefix}events"
        """Stream of workers' reports, freed reservations and broken links."""
        self.leader = f"{self.prefix}leader"
        """The current leader's fence `<epoch>:<holder>`; expires."""
        self.epoch = f"{self.prefix}epoch"
        """Highest epoch given so far."""
        self.generation = f"{self.prefix}generation"
        """Run id of the server whose data was recovered last."""
        self.workers = f"{self.prefix}workers"
        """Set of worker ids."""
        self.grants = f"{self.prefix}grants"
        """Hash: gateway -> how many of its calls count beside the intake, and until when; expires."""
        self.demand = f"{self.prefix}demand"
        """Hash: a fleet.v1.PoolDemand, and when the leader told it."""

    def request(self, key: RequestKey) -> str:
        """Hash: the record, but for its journal."""
        return f"{self.prefix}request:{key}"

    def journal(self, key: RequestKey, choice: int) -> str:
        """String: tokens of one choice, 4 bytes each, little-endian."""
        return f"{self.prefix}journal:{key}:{choice}"

    def in_flight(self, tenant: str) -> str:
        """Set: keys of a tenant's requests that have not ended."""
        return f"{self.prefix}in_flight:{tenant}"

    def tokens(self, tenant: str) -> str:
        """String: when all tokens that a tenant took will have come back, in ms; expires then."""
        return f"{self.prefix}tokens:{tenant}"

    def inbox(self, worker: WorkerId) -> str:
        """Stream of what a worker is told."""
        return f"{self.prefix}inbox:{worker}"

    def worker(self, worker: WorkerId) -> str:
        """String: a fleet.v1.WorkerInfo; expires."""
        return f"{self.prefix}worker:{worker}"

    def recovery(self, run_id: str) -> str:
        """Hash: holder -> fleet.v1.Holdings, for the recovery of one server run; expires."""
        return f"{self.prefix}recovery:{run_id}"


def id_key(tenant: str, request_id: str) -> str:
    """String: the pool that owns a tenant's request id. Outside pools. Neither part holds a `/`, so no two collide."""
    return f"id:{tenant}/{request_id}"


def gateway_key(gateway: str) -> str:
    """String: exists while the gateway with this id beats. Outside pools."""
    return f"gateway:{gateway}"


def api_key_key(key_id: str) -> str:
    """String: a fleet.v1.ApiKey; expires with the key. Outside pools."""
    return f"api_key:{key_id}"
