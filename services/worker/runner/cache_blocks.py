"""How many blocks a KV cache has, and what one takes; on any device."""

import torch

from services.common.config import ConfigError
from services.worker.engine_config import EngineConfig
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard


def kv_block_bytes(config: DecoderConfig, block_size_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the memory that one block takes, over all layers; of a rank, with the rank's part of the model."""
    return config.num_layers * block_size_tokens * 2 * config.kv_size * dtype.itemsize


def num_blocks_asked_for(engine: EngineConfig, config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Return how many blocks `--kv-cache-bytes` holds, which is the whole worker's: all ranks' parts of each.

    Raises ConfigError if it holds none.
    """
    block_bytes = sum(
        kv_block_bytes(Shard(rank, engine.shards).config(config), engine.block_size_tokens, dtype)
        for rank in range(engine.shards)
    )
    num_blocks = engine.kv_cache_bytes // block_bytes
    if num_blocks == 0:
        raise ConfigError(f"--kv-cache-bytes is {engine.kv_cache_bytes}; the least is one block, {block_bytes}")
    return num_blocks
