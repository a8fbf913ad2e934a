"""Start a worker: its front here, its engine as a child process."""

import asyncio
import json
import logging

import uvloop

from gen.shoal.fleet.v1 import engine_pb2
from services.common import log, rpc
from services.common.config import Parsed, parse
from services.common.ending import UnfitError, ending_with
from services.common.garbage import collect_rarely
from services.common.model.stored_model import read_stored_model
from services.common.store.connection import StoreError, connect
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import Tracer, tracing
from services.common.text.stored_vocabulary import read_vocabulary
from services.common.tls.credentials import fleet_server_credentials
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import EngineClient
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.worker import EngineStartError, Worker

logger = logging.getLogger(__name__)


async def serve(parsed: Parsed[WorkerConfig]) -> None:
    """Run until SIGTERM, or until the fleet drained this worker."""
    with Metrics() as metrics, tracing(parsed.config.otlp_endpoint, "worker") as tracer:
        await _serve(parsed, metrics, tracer)


async def _serve(parsed: Parsed[WorkerConfig], metrics: Metrics, tracer: Tracer) -> None:
    config = parsed.config
    config.check()
    logger.info("starting", extra={"config": parsed.describe()})
    vocabulary = read_vocabulary(read_stored_model(config.model_path))
    redis = await connect(config.redis_url, config.tls_files)
    server = rpc.Server([], credentials=fleet_server_credentials(config.fleet_tls()))
    address = await server.start(config.listen)
    served = metrics.serve(config.listen, config.metrics_port)
    tasks: set[asyncio.Task[None]] = set()

    def on_engine(engine: EngineClient | None) -> None:
        task = asyncio.ensure_future(server.set_serving(engine is not None))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if engine:
            rpc.announce("worker", address, engine_pid=engine.pid, rank_pids=engine.other_pids, **served)

    await server.set_serving(False)
    collect_rarely()
    running = Worker(config, redis, vocabulary, address, on_engine, _print_loading, WorkerMetrics(metrics), tracer)
    worker = asyncio.create_task(running.run())
    stop = asyncio.create_task(rpc.termination().wait())
    await asyncio.wait({worker, stop}, return_when=asyncio.FIRST_COMPLETED)
    # A cancelled session hands over what it holds, and ends its engine.
    worker.cancel()
    await asyncio.wait({worker})
    await server.stop(0)
    await redis.aclose()
    if not worker.cancelled():
        worker.result()


def _print_loading(loading: engine_pb2.EngineLoading) -> None:
    print(json.dumps({"kind": "worker", "loading": loading.stage, "fraction": round(loading.fraction, 2)}), flush=True)


def main() -> None:
    """Read the configuration and run."""
    parsed = parse(WorkerConfig, "worker")
    log.configure("worker", parsed.config.log_level, log_prompts=parsed.config.log_prompts)
    with ending_with("worker", UnfitError, StoreError, EngineStartError, OSError):
        uvloop.run(serve(parsed))


if __name__ == "__main__":
    main()
