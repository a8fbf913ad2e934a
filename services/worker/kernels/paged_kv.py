"""One layer of the paged KV cache, as kernels address it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.kernels.rows import FP8


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """Keys and values of a layer."""

    kv: Tensor
    """[num_blocks, 2, num_kv_heads, block_size_tokens, head_dim]; keys, then values. A head's tokens of a block lie
    together: attention reads them as one piece."""

    @property
    def block_size_tokens(self) -> int:
        """Tokens of a block."""
        return self.kv.shape[3]

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are rounded to e4m3, without a scale: a trained model's are far below 448."""
        return self.kv.dtype == FP8

    def context(self, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a sequence's first tokens, [num_tokens, num_kv_heads, head_dim] float32 each:
        of one that lies in `block_table`'s blocks. For references."""
        size = self.block_size_tokens
        blocks = self.kv[block_table[: -(-num_tokens // size)].long()].to(torch.float32)
        keys, values = blocks.transpose(0, 1).transpose(2, 3).flatten(1, 2)[:, :num_tokens]
        return keys, values
