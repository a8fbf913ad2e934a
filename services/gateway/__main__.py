"""Starts the gateway: `python -m services.gateway`."""

import asyncio
import logging
import sys

import uvloop

from services.common import log
from services.common.config import ConfigError, parse
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
    problems: list[str] = []
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(parsed.config))
    except* (ConfigError, StoreError, ShoalError, OSError) as errors:
        problems = _problems(errors)
    if problems:
        sys.exit("\n".join(problems))


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


def _problems(errors: BaseExceptionGroup[Exception]) -> list[str]:
    """Each error's own words: groups of tasks nest them."""
    problems: list[str] = []
    for error in errors.exceptions:
        problems += _problems(error) if isinstance(error, BaseExceptionGroup) else [f"gateway: {error}"]
    return problems


if __name__ == "__main__":
    main()
