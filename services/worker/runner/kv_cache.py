"""The paged KV cache: allocated once, addressed by block tables."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.step_plan import BlockCopy
from services.worker.runner.models.llama_weights import LlamaConfig


class PagedKvCache:
    """Keys and values of all layers.

    One tensor a layer: [num_blocks, block_size_tokens, 2, num_kv_heads, head_dim], float32; index 0 of the third
    dimension is the key, 1 the value. A token's slot is block * block_size_tokens + its place in the block. Key and
    value of a slot lie side by side, so that one copy writes both and one gather reads both.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        shape = (num_blocks, block_size_tokens, 2, config.num_kv_heads, config.head_dim)
        # Zeros, since what lies behind a sequence's end is multiplied by a weight of 0, and 0 * NaN would be NaN. From
        # numpy, whose zeros are pages that the system clears at their first use: torch clears all at once, 1 s a GiB.
        self._layers = [torch.from_numpy(np.zeros(shape, dtype=np.float32)) for _ in range(config.num_layers)]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in all layers; all sources are read before anything is written."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies])
        destinations = torch.tensor([copy.destination for copy in copies])
        for layer in self._layers:
            layer.index_copy_(0, destinations, layer.index_select(0, sources))

    def write(self, layer: int, slot_mapping: Tensor, kv: Tensor) -> None:
        """Store tokens. slot_mapping: [num_tokens] int64; kv: [num_tokens, 2, num_kv_heads, head_dim]."""
        self._layers[layer].flatten(0, 1).index_copy_(0, slot_mapping, kv)

    def read(self, layer: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the context of several sequences.

        block_tables: [num_sequences, num_blocks] int64. Returns keys and values, each
        [num_sequences, num_kv_heads, num_blocks * block_size_tokens, head_dim].
        """
        num_sequences, num_blocks = block_tables.shape
        cache = self._layers[layer]
        gathered = cache.flatten(1).index_select(0, block_tables.flatten())
        kv = gathered.view(num_sequences, num_blocks * self.block_size_tokens, *cache.shape[2:])
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values


def kv_block_bytes(config: LlamaConfig, block_size_tokens: int) -> int:
    """Return the memory that one block takes, over all layers."""
    return config.num_layers * block_size_tokens * 2 * config.kv_size * torch.float32.itemsize
