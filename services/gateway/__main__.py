"""Starts the gateway: `python -m services.gateway`."""

import asyncio
import logging

import uvloop

from services.common import log
from services.common.config import ConfigError, parse
from services.common.ending import ending_with
from services.common.errors import ShoalError
from services.common.garbage import collect_rarely
from services.common.rpc import announce, termination
from services.common.store.connection import StoreError
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Addresses, run

logger = logging.getLogger(__name__)


def main() -> None:
    """Parse the configuration, print it, and serve until SIGTERM."""
    parsed = parse(GatewayConfig, "gateway")
    log.configure("gateway", parsed.config.log_level, log_prompts=parsed.config.log_prompts)
    logger.info("configuration", extra={"configuration": parsed.describe()})
    with (
        ending_with("gateway", ConfigError, StoreError, ShoalError, OSError),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(parsed.config))


async def _serve(config: GatewayConfig) -> None:
    stop = termination()
    await run(config, stop, _announce)
    logger.info("stopped")


def _announce(addresses: Addresses) -> None:
    collect_rarely()
    announce(
        "gateway", addresses.public, http_address=addresses.http, fleet_address=addresses.fleet,
        **addresses.metrics,
    )  # fmt: skip


if __name__ == "__main__":
    main()
