"""The engine's process: owns the model and the KV cache, and talks to its front over an inherited socket.

    python -m services.worker.engine_process --fd 5 --model-path model.gguf --kv-cache-bytes 1073741824 ...

Of a sharded engine, each rank is such a process; rank 0 plans, and speaks with the front.

It ends with status 0 after Shutdown, with 1 when the front is gone, with 78 when none can start, which it tells the
front, with 75 when another rank does not come, and with a traceback after an exception in a step. Interrupts (SIGINT)
are the front's to answer: a terminal sends them to both.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import TracebackType
from typing import NoReturn

from gen.shoal.fleet.v1 import engine_pb2
from services.common.config import ConfigError
from services.common.ending import UNFIT_STATUS, UnfitError
from services.common.garbage import collect_rarely
from services.common.model.stored_model import read_stored_model
from services.common.text.grammar import GrammarCompiler
from services.common.text.stored_vocabulary import read_vocabulary
from services.worker.engine.grammar import Grammars
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop, FrontGoneError
from services.worker.engine.planner import Planner
from services.worker.engine.runner import RanksLostError, Runner
from services.worker.engine.step_time import StepTimeModel, on_a_cpu
from services.worker.engine_config import RANKS_LOST_STATUS, EngineConfig
from services.worker.pipe import EnginePipe
from services.worker.plan_ring import PlanReader, PlanWriter

REASON_S = 5.0
"""Longest that a rank waits to be ended when rank 0 is gone: its own end is not to be taken for the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an engine until its front says Shutdown or goes; return the process's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = EngineConfig.parse(arguments)
    pipe = EnginePipe(socket.socket(fileno=config.fd))
    executor = ThreadPoolExecutor(1, "grammars")
    try:
        check_installed(config.device)
        if config.rank > 0:
            return follow(config, pipe)
        # Reads the vocabulary beside the loading: right behind it, it would take the first requests' time.
        grammars = Grammars(executor, lambda: GrammarCompiler(read_vocabulary(read_stored_model(config.model_path))))
        limits, runner, step_time = load(config, pipe)
        collect_rarely()
        pipe.send(engine_pb2.EngineEvent(ready=ready(limits)))
        EngineLoop(Planner(limits, step_time, grammars), step_time, runner, pipe, monotonic_ms).run()
    except FrontGoneError:
        print("engine: the front is gone", file=sys.stderr)
        return 1
    except RanksLostError as error:
        print(f"engine: {error}", file=sys.stderr)
        return RANKS_LOST_STATUS
    except UnfitError as error:
        pipe.send(engine_pb2.EngineEvent(unfit=engine_pb2.EngineUnfit(reason=str(error))))
        return UNFIT_STATUS
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        pipe.close()
    return 0


def check_installed(device: str) -> None:
    """Raises ConfigError if what the device needs is not installed: Triton comes with torch for CUDA only."""
    if device == "cuda" and find_spec("triton") is None:
        raise ConfigError(
            "--device cuda needs Triton, which is not installed: pip install 'shoal-inference[gpu]', beside torch for "
            "CUDA, or give --device cpu"
        )


def load(config: EngineConfig, pipe: EnginePipe) -> tuple[EngineLimits, Runner, StepTimeModel]:
    """Load the model and allocate the KV cache, telling the front how far it is; say what is known of steps' times.

    Raises ConfigError and ModelFileError.
    """

    def report(stage: str, fraction: float) -> None:
        pipe.send(engine_pb2.EngineEvent(loading=engine_pb2.EngineLoading(stage=stage, fraction=fraction)))

    report("starting torch", 0.0)
    # Imported here, as it takes longer than all the rest and the front should not hear nothing until then.
    if config.device == "cuda":
        from services.worker.cuda.worker_start import start_worker_runner

        return start_worker_runner(config, report)
    from services.worker.runner.rank_runner import ShardedRunner
    from services.worker.runner.start import start_cpu_runner, start_rank
    from services.worker.weights.open_decoder import open_decoder

    stored = open_decoder(read_stored_model(config.model_path))
    step_time = StepTimeModel(on_a_cpu(stored.config.num_weights))
    if config.shards == 1:
        return *start_cpu_runner(stored, config, lambda share: report("loading weights", share)), step_time
    limits, rank, memory = start_rank(stored, config, lambda share: report("loading weights", share))
    plans = PlanWriter(memory, [socket.socket(fileno=bell) for bell in config.bells])
    return limits, ShardedRunner(rank, plans), step_time


def follow(config: EngineConfig, pipe: EnginePipe) -> int:
    """Be a rank that does what rank 0 plans, until rank 0 or the front is gone.

    Raises ConfigError, ModelFileError and RanksLostError.
    """
    if config.device == "cuda":
        from services.worker.cuda.worker_start import start_following

        limits, follow_plans = start_following(config, pipe.connection)
    else:
        limits, follow_plans = _start_following_on_cpu(config, pipe.connection)
    pipe.send(engine_pb2.EngineEvent(ready=ready(limits)))
    follow_plans()
    # The front asks the first that ends why; that is rank 0 here, if it is not the front itself.
    pipe.wait(REASON_S)
    return 1


def _start_following_on_cpu(config: EngineConfig, front: socket.socket) -> tuple[EngineLimits, Callable[[], None]]:
    from services.worker.runner.start import start_rank
    from services.worker.weights.open_decoder import open_decoder

    stored = open_decoder(read_stored_model(config.model_path))
    limits, rank, memory = start_rank(stored, config, lambda share: None)
    (bell,) = config.bells
    plans = PlanReader(memory, config.rank, socket.socket(fileno=bell), front)

    def follow_plans() -> None:
        while plan := plans.take():
            rank.compute(plan)

    return limits, follow_plans


def ready(limits: EngineLimits) -> engine_pb2.EngineReady:
    """Say what the engine can hold."""
    return engine_pb2.EngineReady(
        num_blocks=limits.num_blocks,
        block_size_tokens=limits.block_size_tokens,
        max_sequences=limits.max_sequences,
        max_prefill_tokens_per_step=limits.max_prefill_tokens_per_step,
        context_tokens=limits.context_tokens,
        pid=os.getpid(),
    )


def monotonic_ms() -> float:
    """Milliseconds that never go back."""
    return time.monotonic() * 1000


def run() -> NoReturn:
    """Be an engine's process, and end at once, also by an exception.

    To take torch and a GPU's memory down in order, and to wait for a form that is compiled, takes up to seconds: longer
    than the leader waits for a step. Then the engine counted as one that stands still, and its requests as no suspects.
    """
    sys.excepthook = _show_and_end
    status = main()
    sys.stderr.flush()
    os._exit(status)


def _show_and_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    run()
