"""Configuration of a scheduler."""

from dataclasses import dataclass

from services.common.config import ConfigError, option
from services.common.service_options import ServiceOptions
from services.scheduler.demand import Bounds
from services.scheduler.lease_keeper import Term
from services.scheduler.liveness import Patience
from services.scheduler.recovery import Window
from services.scheduler.sweeper import Rhythm


@dataclass(frozen=True, slots=True)
class SchedulerConfig(ServiceOptions):
    """Schedules one pool: several of these stand by, and one leads."""

    redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
    pool: str = option("smollm2-135m-instruct", "name of the pool, which is the model's name")
    listen: str = option("127.0.0.1:0", "address of the gRPC server (KEDA's scaler, health, reflection); port 0: any")
    lease_ttl_ms: int = option(2_000, "how long leadership lasts unless renewed", minimum=200, maximum=60_000)
    lease_renew_ms: int = option(500, "how often leadership is renewed, or asked for", minimum=20, maximum=20_000)
    retention_ms: int = option(600_000, "how long the record of an ended request is kept", minimum=1_000)
    lost_after_ms: int = option(1_000, "least time without progress after which a worker is lost", minimum=100)
    lost_after_steps: float = option(8.0, "the same, in predicted lengths of its step", minimum=1)
    held_after_ms: int = option(10_000, "the same, for a worker whose requests all wait for gateways", minimum=100)
    stall_ms: int = option(500, "a wake-up later than this is the leader's own stall", minimum=50)
    registration_check_ms: int = option(1_000, "how often registrations of workers are read", minimum=50)
    sweep_ms: int = option(250, "least time between two sweeps of deadlines", minimum=10)
    scan_ms: int = option(2_000, "time between two looks at readers and gateways", minimum=50)
    min_workers: int = option(
        1, "fewest workers wanted; 0: none while there is nothing to do", minimum=0, maximum=10_000
    )
    max_workers: int = option(64, "most workers wanted", minimum=1, maximum=10_000)
    work_within_ms: int = option(
        10_000, "workers are wanted so that what was accepted is done in this time", minimum=100, maximum=86_400_000
    )
    quiet_ms: int = option(
        120_000, "fewer are wanted only once they were enough for so long", minimum=1_000, maximum=86_400_000
    )
    demand_look_ms: int = option(1_000, "time between two looks at demand", minimum=20, maximum=3_000)
    recovery_window_ms: int = option(2_000, "how long workers and gateways may state what they hold", minimum=0)
    recovery_fresh_ms: int = option(200, "the same, for a pool that shows no earlier life", minimum=0)

    def __post_init__(self) -> None:
        ServiceOptions.__post_init__(self)
        if 2 * self.lease_renew_ms > self.lease_ttl_ms:
            raise ConfigError(
                f"--lease-renew-ms is {self.lease_renew_ms}; the most is half of --lease-ttl-ms ({self.lease_ttl_ms})"
            )
        if self.min_workers > self.max_workers:
            raise ConfigError(f"--min-workers is {self.min_workers}; the most is --max-workers ({self.max_workers})")

    @property
    def bounds(self) -> Bounds:
        """How many workers may be wanted, and when."""
        return Bounds(self.min_workers, self.max_workers, self.work_within_ms, self.quiet_ms)

    @property
    def term(self) -> Term:
        """How leadership is kept."""
        return Term(self.lease_ttl_ms, self.lease_renew_ms)

    @property
    def patience(self) -> Patience:
        """When a worker is lost."""
        return Patience(self.lost_after_ms, self.lost_after_steps, self.held_after_ms, self.stall_ms)

    @property
    def rhythm(self) -> Rhythm:
        """How often requests are swept."""
        return Rhythm(self.sweep_ms, self.scan_ms)

    @property
    def window(self) -> Window:
        """How long recovery waits."""
        return Window(self.recovery_window_ms, self.recovery_fresh_ms)
