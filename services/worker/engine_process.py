"""The engine's process: owns the model and the KV cache, and talks to its front over an inherited socket.

    python -m services.worker.engine_process --fd 5 --model-path model.gguf --kv-cache-bytes 1073741824 ...

It ends with status 0 after Shutdown, with 1 when the front is gone or the model cannot be loaded, and with a traceback
after an exception in a step. Interrupts (SIGINT) are the front's to answer: a terminal sends them to both.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gen.shoal.fleet.v1 import engine_pb2
from services.common.config import ConfigError
from services.common.model.errors import ModelFileError
from services.common.model.gguf import read_gguf
from services.common.text.grammar import GrammarCompiler
from services.common.text.vocabulary import read_vocabulary
from services.worker.engine.grammar import Grammars
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop, FrontGoneError
from services.worker.engine.planner import Planner
from services.worker.engine.runner import Runner
from services.worker.engine.step_time import StepTimeModel
from services.worker.engine_config import EngineConfig
from services.worker.pipe import EnginePipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an engine until its front says Shutdown or goes; return the process's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = EngineConfig.parse(arguments)
    pipe = EnginePipe(socket.socket(fileno=config.fd))
    executor = ThreadPoolExecutor(1, "grammars")
    try:
        limits, runner = load(config, pipe)
        pipe.send(engine_pb2.EngineEvent(ready=ready(limits)))
        step_time = StepTimeModel()
        grammars = Grammars(executor, lambda: GrammarCompiler(read_vocabulary(read_gguf(config.model_path))))
        EngineLoop(Planner(limits, step_time, grammars), step_time, runner, pipe, monotonic_ms).run()
    except FrontGoneError:
        print("engine: the front is gone", file=sys.stderr)
        return 1
    except (ConfigError, ModelFileError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        pipe.close()
    return 0


def load(config: EngineConfig, pipe: EnginePipe) -> tuple[EngineLimits, Runner]:
    """Load the model and allocate the KV cache, telling the front how far it is.

    Raises ConfigError and ModelFileError.
    """

    def report(stage: str, fraction: float) -> None:
        pipe.send(engine_pb2.EngineEvent(loading=engine_pb2.EngineLoading(stage=stage, fraction=fraction)))

    report("starting torch", 0.0)
    # Imported here, as it takes longer than all the rest and the front should not hear nothing until then.
    from services.worker.runner.start import start_cpu_runner

    return start_cpu_runner(read_gguf(config.model_path), config, lambda share: report("loading weights", share))


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


if __name__ == "__main__":
    sys.exit(main())
