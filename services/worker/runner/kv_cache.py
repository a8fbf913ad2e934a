"""The paged KV cache: allocated once, addressed by block tables."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.common.config import ConfigError
from services.worker.cpu_kernels.library import address
from services.worker.cpu_kernels.structures import Heads
from services.worker.engine.step_plan import BlockCopy
from services.worker.runner.models.decoder_weights import DecoderConfig

_OVERHANG = 16
"""Values behind a layer's end: the kernels read whole vectors, of which they use what is a block's."""


class PagedKvCache:
    """Keys and values of all layers.

    One tensor a layer: [num_blocks, 2, num_kv_heads, block_size_tokens * head_dim], float32; index 0 of the second
    dimension is the key, 1 the value. A head's keys of a block lie dimension by dimension, [head_dim,
    block_size_tokens], its values token by token, [block_size_tokens, head_dim]: attention multiplies a dimension of
    neighbouring keys at once. A token's slot is block * block_size_tokens + its place in the block.
    """

    def __init__(self, config: DecoderConfig, num_blocks: int, block_size_tokens: int) -> None:
        """Raises ConfigError if the machine has not so much memory."""
        self.config = config
        self.block_size_tokens = block_size_tokens
        shape = (num_blocks, 2, config.num_kv_heads, block_size_tokens * config.head_dim)
        size = num_blocks * 2 * block_size_tokens * config.kv_size
        self._layers = [_zeros(size).view(shape) for _ in range(config.num_layers)]
        self.heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, block_size_tokens)
        """How the kernels are told of the layout."""
        self.addresses = (ctypes.c_void_p * config.num_layers)(*map(address, self._layers))
        """Of the layers, in order."""

    def layer(self, layer: int) -> Tensor:
        """All keys and values of a layer."""
        return self._layers[layer]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in all layers; all sources are read before anything is written."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies])
        destinations = torch.tensor([copy.destination for copy in copies])
        for layer in self._layers:
            layer.index_copy_(0, destinations, layer.index_select(0, sources))


def _zeros(size: int) -> Tensor:
    # From numpy, whose zeros are pages that the system clears at their first use: torch clears all at once, 1 s a GiB.
    try:
        return torch.from_numpy(np.zeros(size + _OVERHANG, dtype=np.float32))[:size]
    except MemoryError as error:
        raise ConfigError(
            f"this machine's memory does not hold the KV cache: lower --kv-cache-bytes ({error})"
        ) from error
