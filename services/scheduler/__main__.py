"""Starts a scheduler: `python -m services.scheduler`."""

import asyncio
import logging
import secrets

import uvloop

from services.common import log
from services.common.config import ConfigError, parse
from services.common.ending import ending_with
from services.common.garbage import collect_rarely
from services.common.rpc import announce, termination
from services.common.store.connection import StoreError, connect
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import tracing
from services.common.tls.credentials import fleet_server_credentials
from services.scheduler.clock import monotonic_ms
from services.scheduler.config import SchedulerConfig
from services.scheduler.election import Candidate
from services.scheduler.leader import Reign
from services.scheduler.lease_keeper import Held
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.pool_store import PoolStore
from services.scheduler.server import make_server
from services.scheduler.telemetry import Telemetry

logger = logging.getLogger(__name__)

STOP_GRACE_S = 0.2
"""Given to open calls at the end: only health checks and reflection."""


def main() -> None:
    """Parse the configuration, print it, and schedule until SIGTERM."""
    parsed = parse(SchedulerConfig, "scheduler")
    log.configure("scheduler", parsed.config.log_level)
    logger.info("configuration", extra={"configuration": parsed.describe()})
    with ending_with("scheduler", ConfigError, StoreError, OSError, ValueError):
        uvloop.run(_serve(parsed.config))


async def _serve(config: SchedulerConfig) -> None:
    stop = termination()
    redis = await connect(config.redis_url, config.tls_files)
    store = PoolStore.of(redis, config.pool, holder=secrets.token_hex(8), retention_ms=config.retention_ms)

    server = make_server(store.demand, fleet_server_credentials(config.fleet_tls()))
    with Metrics() as metrics, tracing(config.otlp_endpoint, "scheduler") as tracer:
        told = Telemetry(SchedulerMetrics(metrics), tracer)

        async def reign(held: Held, seen_life: bool) -> None:
            await Reign(store, held, config, told, monotonic_ms).run(seen_life)

        collect_rarely()
        address = await server.start(config.listen)
        announce("scheduler", address, **metrics.serve(config.listen, config.metrics_port))
        async with asyncio.TaskGroup() as tasks:
            candidate = tasks.create_task(Candidate(store.leadership, config.term, reign, monotonic_ms).run())
            await stop.wait()
            candidate.cancel()
            await server.stop(STOP_GRACE_S)
    await redis.aclose()


if __name__ == "__main__":
    main()
