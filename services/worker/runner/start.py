"""Starts a CPU runner: threads, weights, KV cache."""

import torch

from services.common.config import ConfigError
from services.common.model.stored_model import StoredModel
from services.worker.engine.limits import EngineLimits
from services.worker.engine_config import EngineConfig
from services.worker.runner.cpu_runner import CpuRunner
from services.worker.runner.kv_cache import PagedKvCache, kv_block_bytes
from services.worker.runner.matrix import PackedMatrix, pack_float32, pack_int8
from services.worker.runner.models.decoder import Decoder
from services.worker.weight_format import WeightFormat
from services.worker.weights.load_decoder import MakeMatrix, Progress, load_decoder
from services.worker.weights.open_decoder import open_decoder


def start_cpu_runner(
    model: StoredModel, engine_config: EngineConfig, on_progress: Progress
) -> tuple[EngineLimits, CpuRunner]:
    """Load a model and allocate its KV cache.

    Sets the process's number of threads. Raises ModelFileError, and ConfigError if the memory holds no block or
    the weights cannot be held as asked.
    """
    torch.set_num_threads(engine_config.threads)
    stored = open_decoder(model)
    config = stored.config
    block_bytes = kv_block_bytes(config, engine_config.block_size_tokens)
    num_blocks = engine_config.kv_cache_bytes // block_bytes
    if num_blocks == 0:
        raise ConfigError(f"--kv-cache-bytes is {engine_config.kv_cache_bytes}; the least is one block, {block_bytes}")
    decoder = Decoder(config, load_decoder(stored, _PACK[engine_config.weights], on_progress))
    limits = EngineLimits(
        num_blocks=num_blocks,
        block_size_tokens=engine_config.block_size_tokens,
        max_sequences=engine_config.max_sequences,
        max_prefill_tokens_per_step=engine_config.max_prefill_tokens_per_step,
        step_budget_ms=engine_config.step_budget_ms,
        context_tokens=config.context_tokens,
        vocabulary_size=config.vocabulary_size,
    )
    return limits, CpuRunner(decoder, PagedKvCache(config, num_blocks, engine_config.block_size_tokens))


_PACK: dict[WeightFormat, MakeMatrix[PackedMatrix]] = {"float32": pack_float32, "int8": pack_int8}
