"""Starts the tokenizer: `python -m services.tokenizer`."""

import asyncio
import logging
from pathlib import Path

import uvloop

from services.common import log
from services.common.config import ConfigError, parse
from services.common.ending import ending_with
from services.common.garbage import collect_rarely
from services.common.model.errors import ModelFileError
from services.common.model.location import default_model_path
from services.common.model.stored_model import read_stored_model
from services.common.rpc import Server, announce, termination
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import Tracer, tracing
from services.common.tls.credentials import fleet_server_credentials
from services.tokenizer.config import TokenizerConfig
from services.tokenizer.encoding import TextCodec
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.pool import Pool, PoolLimits, PoolStartError
from services.tokenizer.server import SERVICE_NAME, TokenizerService, describe_model, handlers

logger = logging.getLogger(__name__)

CONNECTION_AGE_MS = 30_000
"""After about so long, a gateway is asked to connect anew: so it looks up the name again, and finds new tokenizers."""


def main() -> None:
    """Parse the configuration, print it, and serve until SIGTERM."""
    parsed = parse(TokenizerConfig, "tokenizer")
    log.configure("tokenizer", parsed.config.log_level, log_prompts=parsed.config.log_prompts)
    logger.info("configuration", extra={"configuration": parsed.describe()})
    with (
        ending_with("tokenizer", ConfigError, ModelFileError, PoolStartError, OSError),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(parsed.config))


async def _serve(config: TokenizerConfig) -> None:
    with Metrics() as metrics, tracing(config.otlp_endpoint, "tokenizer") as tracer:
        await _run(config, metrics, tracer)


async def _run(config: TokenizerConfig, metrics: Metrics, tracer: Tracer) -> None:
    stop = termination()
    model_path = Path(config.model_path) if config.model_path else default_model_path()
    pool = Pool(model_path, _limits(config))
    model = read_stored_model(model_path)
    description = describe_model(model, config.pool)
    counted = TokenizerMetrics(metrics, lambda: pool.num_queued)
    service = TokenizerService(pool, TextCodec(model), description, config.max_input_bytes, counted, tracer)
    server = Server(
        [SERVICE_NAME],
        [("grpc.max_connection_age_ms", CONNECTION_AGE_MS)],
        credentials=fleet_server_credentials(config.fleet_tls()),
    )
    server.grpc.add_generic_rpc_handlers((handlers(service),))
    async with asyncio.TaskGroup() as tasks:
        running_pool = tasks.create_task(pool.run())
        await pool.ready.wait()
        collect_rarely()
        address = await server.start(config.listen)
        announce("tokenizer", address, **metrics.serve(config.listen, config.metrics_port))
        await stop.wait()
        await server.stop(config.stop_grace_ms / 1000)
        running_pool.cancel()


def _limits(config: TokenizerConfig) -> PoolLimits:
    return PoolLimits(
        num_processes=config.num_processes,
        max_queued_jobs=config.max_queued_inputs,
        max_queued_bytes=config.max_queued_bytes,
        job_limit_s=config.input_limit_ms / 1000,
        format_limit_s=config.format_limit_ms / 1000,
    )


if __name__ == "__main__":
    main()
