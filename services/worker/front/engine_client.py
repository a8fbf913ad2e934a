"""The engine process as its front sees it: started, spoken to, and watched."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from gen.shoal.fleet.v1 import engine_pb2
from services.worker import pipe
from services.worker.config import WorkerConfig
from services.worker.engine_config import EngineConfig

ENGINE_ENVIRONMENT: Mapping[str, str] = {
    # torch's OpenMP threads spin at barriers; beside a busy neighbour that costs a factor of 4 to 24.
    "GOMP_SPINCOUNT": "3000",
    # Weights on pages of 2 MB, where the system has them for those who ask: a step reads them a tenth faster.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""What an engine's environment has, if the worker's own says nothing else. torch reads both when it is imported."""
ENGINE_MODULE = "services.worker.engine_process"


class EngineDiedError(Exception):
    """The engine is gone. `returncode` as of subprocess: negative for a signal. `out_of_memory`: the kernel did it."""

    shown_in_logs = True

    def __init__(self, returncode: int, out_of_memory: bool = False) -> None:
        super().__init__(f"the engine ended with {_how(returncode)}{', out of memory' if out_of_memory else ''}")
        self.returncode = returncode
        self.out_of_memory = out_of_memory

    @property
    def on_request(self) -> bool:
        """Whether somebody ended it, or it ended without error: no request is to blame then.

        SIGKILL comes from outside, or from the kernel for want of memory.
        """
        killed = self.returncode == -signal.SIGKILL and not self.out_of_memory
        return killed or self.returncode in (0, -signal.SIGTERM)


class EngineClient:
    """A running engine. Owned by one session."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._oom_kills = _oom_kills()

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        """Give a command; waits while the engine does not read. A command to a dead engine is lost: `events` tells."""
        try:
            await pipe.write(self._writer, command)
        except ConnectionError:
            # The reading side finds the same end, and reports it once.
            return

    async def events(self) -> AsyncIterator[engine_pb2.EngineEvent]:
        """What the engine says. Ends with EngineDiedError."""
        while True:
            event = await pipe.read(self._reader)
            if event is None:
                returncode = await self._process.wait()
                raise EngineDiedError(returncode, out_of_memory=_oom_kills() > self._oom_kills)
            yield event

    async def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()
        self._writer.close()
        await self._process.wait()


@asynccontextmanager
async def start_engine(config: WorkerConfig, module: str = ENGINE_MODULE) -> AsyncIterator[EngineClient]:
    """Start an engine process; it is gone when the block ends, however it ends. `module`: its program."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *engine_config(config, theirs.fileno()).arguments(),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env={**ENGINE_ENVIRONMENT, **os.environ},
        )
    reader, writer = await asyncio.open_connection(sock=ours)
    engine = EngineClient(process, reader, writer)
    try:
        yield engine
    finally:
        await engine.kill()


def engine_config(config: WorkerConfig, fd: int) -> EngineConfig:
    """Return what a worker with this configuration tells its engine. `fd`: the engine's end of their sockets."""
    return EngineConfig(
        fd=fd,
        model_path=config.model_path,
        kv_cache_bytes=config.kv_cache_bytes,
        block_size_tokens=config.block_size_tokens,
        max_sequences=config.max_sequences,
        max_prefill_tokens_per_step=config.max_prefill_tokens_per_step,
        step_budget_ms=config.step_budget_ms,
        threads=config.threads or os.cpu_count() or 1,
        weights=config.weights,
    )


def _oom_kills() -> int:
    """Processes that this host's kernel has killed for want of memory so far; 0 where it does not count them."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _how(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"status {returncode}"
