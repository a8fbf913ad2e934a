"""The engine process as its front sees it: started, spoken to, and watched."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gen.shoal.fleet.v1 import engine_pb2
from services.common.ending import UnfitError
from services.worker import pipe
from services.worker.config import BATCH_SIZES, SIZES, WorkerConfig
from services.worker.engine_config import RANKS_LOST_STATUS, EngineConfig
from services.worker.rank_links import RankLink, rank_links

ENGINE_ENVIRONMENT: Mapping[str, str] = {
    # torch's OpenMP threads spin at barriers; beside a busy neighbour that costs a factor of 4 to 24.
    "GOMP_SPINCOUNT": "3000",
    # Weights on pages of 2 MB, where the system has them for those who ask: a step reads them a tenth faster.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""What an engine's environment has, if the worker's own says nothing else. torch reads both when it is imported."""
ENGINE_MODULE = "services.worker.engine_process"


class EngineDiedError(Exception):
    """The engine is gone. `returncode` as of subprocess: negative for a signal. `out_of_memory`: the kernel did it.

    `rank` is the one that ended first.
    """

    shown_in_logs = True

    def __init__(self, returncode: int, out_of_memory: bool = False, rank: int = 0) -> None:
        who = f"rank {rank} of the engine" if rank else "the engine"
        super().__init__(f"{who} ended with {_how(returncode)}{', out of memory' if out_of_memory else ''}")
        self.returncode = returncode
        self.out_of_memory = out_of_memory

    @property
    def on_request(self) -> bool:
        """Whether somebody ended it, or it ended without error: no request is to blame then.

        SIGKILL comes from outside, or from the kernel for want of memory. Neither is a request to blame for a rank that
        stands still: the one that waited for it in vain ends, and names no other cause.
        """
        killed = self.returncode == -signal.SIGKILL and not self.out_of_memory
        return killed or self.returncode in (0, -signal.SIGTERM, RANKS_LOST_STATUS)


class EngineUnfitError(UnfitError):
    """The engine cannot start, and no other one will: it said why."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One rank of an engine, and the front's end of the sockets to it."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def kill(self) -> None:
        """End it at once."""
        if self.process.returncode is None:
            self.process.kill()
        self.writer.close()


class EngineClient:
    """A running engine: rank 0, which is spoken with, and maybe others. Owned by one session."""

    def __init__(self, ranks: Sequence[RankProcess]) -> None:
        self._ranks = ranks
        self._process, self._reader, self._writer = ranks[0].process, ranks[0].reader, ranks[0].writer
        self._oom_kills = _oom_kills()
        self._first_to_end: int | None = None
        """A rank that ended before rank 0 did."""
        self._unfit = ""
        """Why another rank cannot start."""
        self._others_ready = asyncio.Semaphore(0)

    @property
    def pid(self) -> int:
        """The engine's process id: rank 0's."""
        return self._process.pid

    @property
    def other_pids(self) -> list[int]:
        """Process ids of ranks 1, 2 and so on."""
        return [rank.process.pid for rank in self._ranks[1:]]

    @property
    def is_ending(self) -> bool:
        """Whether a rank has let go of its socket: its process is gone, or goes. With a GPU's memory to give back, that
        takes up to seconds."""
        return any(rank.reader.at_eof() for rank in self._ranks)

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        """Give a command; waits while the engine does not read. A command to a dead engine is lost: `events` tells."""
        try:
            await pipe.write(self._writer, command)
        except ConnectionError:
            # The reading side finds the same end, and reports it once.
            return

    def abort(self, sequence_id: int) -> None:
        """Have the engine forget a sequence. Whoever hears the engine says this, and waits for nothing meanwhile: the
        engine may be telling of its next step, and read nothing before it was heard."""
        abort = engine_pb2.AbortSequence(sequence_id=sequence_id)
        pipe.write_at_once(self._writer, engine_pb2.EngineCommand(abort=abort))

    async def events(self) -> AsyncIterator[engine_pb2.EngineEvent]:
        """What the engine says. Ready when all its ranks are; ends with EngineDiedError when one of them does.

        Raises EngineUnfitError if one of them cannot start.
        """
        while True:
            event = await pipe.read(self._reader)
            if event is None:
                await self._process.wait()
                if self._unfit:
                    raise EngineUnfitError(self._unfit)
                rank = self._first_to_end or 0
                returncode = await self._ranks[rank].process.wait()
                raise EngineDiedError(returncode, out_of_memory=_oom_kills() > self._oom_kills, rank=rank)
            if event.HasField("unfit"):
                raise EngineUnfitError(event.unfit.reason)
            if event.HasField("ready"):
                for _ in self._ranks[1:]:
                    await self._others_ready.acquire()
                if self._unfit:
                    raise EngineUnfitError(self._unfit)
            yield event

    async def watch(self, rank: int) -> None:
        """See to it that no rank outlives another: with this one, rank 0 ends, and `events` says why."""
        watched = self._ranks[rank]
        while event := await pipe.read(watched.reader):
            self._unfit = self._unfit or event.unfit.reason
            self._others_ready.release()
        # One that ends after rank 0 has closed its end is not the cause. Noted before its process is gone: meanwhile
        # the others miss its beats, and end as those that no request is to blame for.
        if not self._reader.at_eof() and self._first_to_end is None:
            self._first_to_end = rank
            self._ranks[0].kill()
        await watched.process.wait()
        self._others_ready.release()


@asynccontextmanager
async def start_engine(config: WorkerConfig, module: str = ENGINE_MODULE) -> AsyncIterator[EngineClient]:
    """Start an engine, a process for each rank; all are gone when the block ends, however it ends. `module`: their
    program."""
    ranks: list[RankProcess] = []
    watching: list[asyncio.Task[None]] = []
    try:
        with rank_links(config.shards) as links:
            for link in links:  # one by one: those that were started are ended if the next cannot be
                ranks.append(await _start_rank(config, link, module))  # noqa: PERF401
        engine = EngineClient(ranks)
        watching = [asyncio.create_task(engine.watch(rank)) for rank in range(1, config.shards)]
        yield engine
    finally:
        for task in watching:
            task.cancel()
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            await rank.process.wait()


async def _start_rank(config: WorkerConfig, link: RankLink, module: str) -> RankProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *replace(engine_config(config, theirs.fileno()), **link.told).arguments(),
            pass_fds=[theirs.fileno(), *link.fds],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env={**ENGINE_ENVIRONMENT, **os.environ},
        )
    return RankProcess(process, *await asyncio.open_connection(sock=ours))


def engine_config(config: WorkerConfig, fd: int) -> EngineConfig:
    """Return what a worker with this configuration tells its engine. `fd`: the engine's end of their sockets."""
    sizes = (BATCH_SIZES if config.batch else SIZES)[config.device]
    return EngineConfig(
        fd=fd,
        model_path=config.model_path,
        kv_cache_bytes=config.kv_cache_bytes or sizes.kv_cache_bytes,
        block_size_tokens=config.block_size_tokens or sizes.block_size_tokens,
        max_sequences=config.max_sequences or sizes.max_sequences,
        max_prefill_tokens_per_step=config.max_prefill_tokens_per_step or sizes.max_prefill_tokens_per_step,
        step_budget_ms=config.step_budget_ms or sizes.step_budget_ms,
        context_tokens=config.context_tokens or sizes.context_tokens,
        threads=config.threads or os.cpu_count() or 1,
        weights=config.weights,
        device=config.device,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        dummy=config.dummy,
        shards=config.shards,
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
