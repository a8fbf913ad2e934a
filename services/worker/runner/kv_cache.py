"""The paged KV cache: allocated once, addressed by block tables."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.step_plan import BlockCopy
from services.worker.runner.models.decoder_weights import DecoderConfig


class PagedKvCache:
    """Keys and values of all layers.

    One tensor a layer: [num_blocks, 2, num_kv_heads, block_size_tokens, head_dim], float32; index 0 of the second
    dimension is the key, 1 the value. A token's slot is block * block_size_tokens + its place in the block. One head's
    keys of a block lie side by side: attention reads them as one run of memory.

    A layer is also a table of rows, [num_rows, head_dim], that attention and writes address each key and value in.
    """

    def __init__(self, config: DecoderConfig, num_blocks: int, block_size_tokens: int) -> None:
        self.config = config
        self.block_size_tokens = block_size_tokens
        shape = (num_blocks, 2, config.num_kv_heads, block_size_tokens, config.head_dim)
        # Zeros, since what lies behind a sequence's end is multiplied by a weight of 0, and 0 * NaN would be NaN. From
        # numpy, whose zeros are pages that the system clears at their first use: torch clears all at once, 1 s a GiB.
        self._layers = [torch.from_numpy(np.zeros(shape, dtype=np.float32)) for _ in range(config.num_layers)]
        self._tables = [layer.view(-1, config.head_dim) for layer in self._layers]
        heads_of_a_slot = torch.arange(config.num_kv_heads) * block_size_tokens
        self._key_rows_of_a_slot = heads_of_a_slot
        self._value_rows_of_a_slot = heads_of_a_slot + config.num_kv_heads * block_size_tokens

    @property
    def num_rows(self) -> int:
        """Keys and values of one layer, of all heads."""
        return self._tables[0].shape[0]

    def table(self, layer: int) -> Tensor:
        """All keys and values of a layer: [num_rows, head_dim]."""
        return self._tables[layer]

    def slots(self, block_tables: Tensor, positions: Tensor) -> Tensor:
        """Return the slots of some positions. block_tables: [..., num_blocks] int64; positions: [..., num_positions]
        int64, of the same sequences. Returns [..., num_positions] int64.
        """
        blocks = block_tables.gather(-1, positions // self.block_size_tokens)
        return blocks * self.block_size_tokens + positions % self.block_size_tokens

    def key_rows(self, slots: Tensor) -> Tensor:
        """Return the rows of some slots' keys. slots: [...] int64. Returns [..., num_kv_heads] int64."""
        return self._first_rows(slots)[..., None] + self._key_rows_of_a_slot

    def value_rows(self, slots: Tensor) -> Tensor:
        """Return the rows of some slots' values. slots: [...] int64. Returns [..., num_kv_heads] int64."""
        return self._first_rows(slots)[..., None] + self._value_rows_of_a_slot

    def _first_rows(self, slots: Tensor) -> Tensor:
        blocks = slots // self.block_size_tokens
        # A block has 2 * num_kv_heads * block_size_tokens rows.
        return blocks * ((2 * self.config.num_kv_heads - 1) * self.block_size_tokens) + slots

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in all layers; all sources are read before anything is written."""
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies])
        destinations = torch.tensor([copy.destination for copy in copies])
        for layer in self._layers:
            layer.index_copy_(0, destinations, layer.index_select(0, sources))

    def write(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Store keys and values of tokens.

        rows: [num_tokens * 2 * num_kv_heads] int64, of `write_rows`; kv: [num_tokens, 2 * num_kv_heads, head_dim].
        """
        self._tables[layer].index_copy_(0, rows, kv.reshape(-1, self.config.head_dim))

    def write_rows(self, slots: Tensor) -> Tensor:
        """Return where tokens' keys and values go. slots: [num_tokens] int64."""
        return torch.cat((self.key_rows(slots), self.value_rows(slots)), dim=1).flatten()


def kv_block_bytes(config: DecoderConfig, block_size_tokens: int) -> int:
    """Return the memory that one block takes, over all layers."""
    return config.num_layers * block_size_tokens * 2 * config.kv_size * torch.float32.itemsize
