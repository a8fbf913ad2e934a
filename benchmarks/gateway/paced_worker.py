"""A real worker that starts the paced engine: `python -m benchmarks.gateway.paced_worker`, with a worker's flags."""

from functools import partial

from services.worker import __main__ as worker_process
from services.worker.front import worker
from services.worker.front.engine_client import start_engine

if __name__ == "__main__":
    paced = partial(start_engine, module="benchmarks.gateway.paced_engine")
    worker.start_engine = paced  # type: ignore[attr-defined]
    worker_process.main()
