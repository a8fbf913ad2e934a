"""Starts a CPU runner, or a rank of a sharded one: threads, weights, KV cache."""

import mmap
import os

import torch

from services.worker.engine.limits import EngineLimits
from services.worker.engine_config import EngineConfig
from services.worker.plan_ring import ring_bytes
from services.worker.runner.cache_blocks import num_blocks_asked_for
from services.worker.runner.cpu_runner import SCORED_AT_ONCE, CpuRunner
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import PackedMatrix, pack_float32, pack_int8
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.runner.rank_runner import RankRunner
from services.worker.runner.rank_sampling import MOST_CANDIDATES, DealtVocabulary
from services.worker.runner.ranks import RankMemory, Ranks
from services.worker.weight_format import WeightFormat
from services.worker.weights.load_decoder import MakeMatrix, Progress, load_decoder
from services.worker.weights.stored_decoder import StoredDecoder


def start_cpu_runner(
    stored: StoredDecoder, engine_config: EngineConfig, on_progress: Progress
) -> tuple[EngineLimits, CpuRunner]:
    """Load a model and allocate its KV cache.

    Sets the process's number of threads. Raises ModelFileError, and ConfigError if the memory holds no block or
    the weights cannot be held as asked.
    """
    torch.set_num_threads(engine_config.threads)
    limits = _limits(stored.config, engine_config)
    decoder = Decoder(stored.config, load_decoder(stored, _PACK[engine_config.weights], on_progress))
    return limits, CpuRunner(decoder, PagedKvCache(decoder.config, limits.num_blocks, limits.block_size_tokens))


def start_rank(
    stored: StoredDecoder, engine_config: EngineConfig, on_progress: Progress
) -> tuple[EngineLimits, RankRunner, memoryview]:
    """Load a rank's part of a model and allocate its part of the KV cache; the memory is that of plans.

    `kv_cache_bytes` and `threads` are the whole worker's: each rank takes its part. Raises as `start_cpu_runner`.
    """
    shard = Shard(engine_config.rank, engine_config.shards)
    torch.set_num_threads(max(1, engine_config.threads // shard.world_size))
    limits = _limits(stored.config, engine_config)
    slot_floats = _slot_floats(stored.config, engine_config)
    plan_bytes = ring_bytes(shard.world_size)
    num_bytes = plan_bytes + RankMemory.num_bytes(shard.world_size, slot_floats)
    # Every rank gives it the same size: whichever is first makes the zeros.
    os.ftruncate(engine_config.memory_fd, num_bytes)
    shared = mmap.mmap(engine_config.memory_fd, num_bytes)
    memory = torch.frombuffer(shared, dtype=torch.uint8)
    ranks = Ranks(shard, RankMemory.of(memory[plan_bytes:], shard.world_size, slot_floats))
    decoder = Decoder(stored.config, load_decoder(stored, _PACK[engine_config.weights], on_progress, shard), ranks)
    cache = PagedKvCache(decoder.config, limits.num_blocks, limits.block_size_tokens)
    runner = RankRunner(decoder, cache, ranks, DealtVocabulary(ranks, stored.config))
    return limits, runner, memoryview(shared)[:plan_bytes]


def _slot_floats(config: DecoderConfig, engine_config: EngineConfig) -> int:
    """The most that a rank gives at once: rows of a step, logits of some rows, candidates of every sequence."""
    most_rows = engine_config.max_prefill_tokens_per_step + engine_config.max_sequences
    return max(
        most_rows * config.hidden_size,
        SCORED_AT_ONCE * len(Shard(0, engine_config.shards).vocabulary(config)),
        engine_config.max_sequences * 2 * MOST_CANDIDATES,
    )


def _limits(config: DecoderConfig, engine_config: EngineConfig) -> EngineLimits:
    return EngineLimits(
        num_blocks=num_blocks_asked_for(engine_config, config),
        block_size_tokens=engine_config.block_size_tokens,
        max_sequences=engine_config.max_sequences,
        max_prefill_tokens_per_step=engine_config.max_prefill_tokens_per_step,
        step_budget_ms=engine_config.budget_ms,
        context_tokens=min(engine_config.context_tokens or config.context_tokens, config.context_tokens),
        vocabulary_size=config.vocabulary_size,
    )


_PACK: dict[WeightFormat, MakeMatrix[PackedMatrix]] = {"float32": pack_float32, "int8": pack_int8}
