"""Starts a worker's runner on the device, as its flags say, and says which flag does not fit."""

import socket
from collections.abc import Callable
from dataclasses import replace

import torch

from services.common.config import ConfigError
from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.device import find_device
from services.worker.cuda.made_up_steps import made_up_step
from services.worker.cuda.rank_runner import LeadingRunner, follow, watch_ranks
from services.worker.cuda.source import open_source
from services.worker.cuda.start import DeviceOptions, start_cuda_runner
from services.worker.cuda.warm_up import timed_ms, warm_up
from services.worker.cuda.weights import weights_bytes
from services.worker.engine.limits import EngineLimits
from services.worker.engine.step_time import ON_A_GPU, StepTimeModel
from services.worker.engine_config import EngineConfig
from services.worker.plan_ring import PlanReader, PlanWriter
from services.worker.rank_file import RankFile
from services.worker.runner.cache_blocks import num_blocks_asked_for
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard

BLOCK_SIZES_TOKENS = (16, 32, 64, 128, 256)
"""Kernels read a block in tiles, whose lengths are powers of two; the tensor cores take none of fewer than 16."""

_TOLD_TIMES = 20
"""A step's time that is so far from what was thought is believed once it was seen so often."""


def start_worker_runner(
    engine: EngineConfig, on_progress: Callable[[str, float], None]
) -> tuple[EngineLimits, CudaRunner | LeadingRunner, StepTimeModel]:
    """Load a model onto the GPU, take its memory, and make some steps, to see how long they take.

    `on_progress` hears what is being done, and which share of it is. Of several ranks this is the one that leads.
    Raises ModelFileError, NcclError, and ConfigError for what the GPU cannot do, or has no memory for.
    """
    if engine.shards == 1:
        return _start(engine, on_progress, None)
    file = RankFile(engine.memory_fd, engine.rank, engine.shards)
    limits, runner, step_time = _start(engine, on_progress, file)
    watch_ranks(file)
    bells = [socket.socket(fileno=bell) for bell in engine.bells]
    return limits, LeadingRunner(runner, PlanWriter(file.plans, bells)), step_time


def start_following(engine: EngineConfig, front: socket.socket) -> tuple[EngineLimits, Callable[[], None]]:
    """Start another rank. Returns what the engine can hold, and what does as rank 0 plans, until that or the front is
    gone.

    Raises as `start_worker_runner`.
    """
    file = RankFile(engine.memory_fd, engine.rank, engine.shards)
    limits, runner, _ = _start(engine, lambda stage, share: None, file)
    watch_ranks(file)
    (bell,) = engine.bells
    plans = PlanReader(file.plans, engine.rank, socket.socket(fileno=bell), front)
    return limits, lambda: follow(runner, plans)


def _start(
    engine: EngineConfig, on_progress: Callable[[str, float], None], file: RankFile | None
) -> tuple[EngineLimits, CudaRunner, StepTimeModel]:
    device = find_device(engine.rank, engine.shards)
    torch.set_num_threads(max(1, engine.threads // engine.shards))
    if engine.block_size_tokens not in BLOCK_SIZES_TOKENS:
        allowed = ", ".join(map(str, BLOCK_SIZES_TOKENS))
        raise ConfigError(f"--block-size-tokens is {engine.block_size_tokens}; on a GPU it is one of {allowed}")
    shard = Shard(engine.rank, engine.shards)

    def on_loading(share: float) -> None:
        on_progress("loading weights", share)

    config, load = open_source(engine.model_path, engine.dtype, shard, device, on_loading, dummy=engine.dummy)
    options = _options(engine, config, device)
    _check_weights_fit(config, shard, engine, options, device)

    def on_stage(stage: str) -> None:
        on_progress(stage, 0.0)

    try:
        limits, runner = start_cuda_runner(config, load, shard, options, device, file, on_stage)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory does not hold the engine: {str(error).splitlines()[0]} Lower --kv-cache-bytes "
            f"({engine.kv_cache_bytes}), --max-prefill-tokens-per-step ({engine.max_prefill_tokens_per_step}) or "
            f"--max-sequences ({engine.max_sequences}), or end what else is on it"
        ) from error
    on_progress("warming up", 0.0)
    step_time = StepTimeModel(ON_A_GPU, limits.filled_up_to)
    if device.type == "cuda":
        warm_up(runner, limits, step_time)
    else:
        # The interpreter takes up to a second: who expects the milliseconds of a GPU takes this worker for dead.
        plan = made_up_step(1, [2], limits.block_size_tokens)
        took_ms, _ = timed_ms(runner, plan)
        for _ in range(_TOLD_TIMES):
            step_time.observe(plan, took_ms)
    return limits, runner, step_time


def _options(engine: EngineConfig, config: DecoderConfig, device: torch.device) -> DeviceOptions:
    options = DeviceOptions(
        weights=engine.dtype,
        has_fp8_cache=engine.kv_dtype == "fp8",
        block_size_tokens=engine.block_size_tokens,
        max_sequences=engine.max_sequences,
        max_prefill_tokens_per_step=engine.max_prefill_tokens_per_step,
        step_budget_ms=engine.budget_ms,
        context_tokens=engine.context_tokens or config.context_tokens,
        has_graphs=device.type == "cuda",
        has_dense_attention=False,
    )
    return replace(options, num_blocks=_num_blocks(engine, options, config, device))


def _num_blocks(
    engine: EngineConfig, options: DeviceOptions, config: DecoderConfig, device: torch.device
) -> int | None:
    """Blocks of the KV cache that were asked for; None: as many as fit."""
    if engine.kv_cache_bytes == 0:
        if device.type != "cuda":
            raise ConfigError("--kv-cache-bytes is 0, what the GPU has left; without a GPU it must be given")
        return None
    return num_blocks_asked_for(engine, config, options.kv_dtype)


def _check_weights_fit(
    config: DecoderConfig, shard: Shard, engine: EngineConfig, options: DeviceOptions, device: torch.device
) -> None:
    """Before they are loaded, which may take minutes."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    most = free - (1 - options.memory_share) * total
    needed = weights_bytes(config, engine.dtype, shard)
    if needed > most:
        raise ConfigError(
            f"--dtype is {engine.dtype}: the weights take {needed / 1e9:.1f} GB, and of the GPU's {total / 1e9:.1f} GB "
            f"{most / 1e9:.1f} may be taken now; give a smaller model or --dtype fp8, or end what else is on it"
        )
