"""Attention over a paged KV cache."""

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address, kernels
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache

_ALL = 1 << 30
"""A window of more tokens than any context."""


def paged_attention(qkv: Tensor, batch: BatchInputs, cache: PagedKvCache, layer: int, window: int | None) -> Tensor:
    """Attend every row to its sequence's context in the cache; keys and values of the rows are there already.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], of which the queries are read; num_heads /
    num_kv_heads of them share a key head. `window`: tokens that each sees, itself included; None: all before it.
    Returns softmax(Q K^T / sqrt(head_dim)) V, [num_tokens, num_heads * head_dim]. A row's result has the same bits
    whatever else the step computes, and however its prompt was cut into chunks.
    """
    config = cache.config
    out = qkv.new_empty((qkv.shape[0], config.q_size))
    kernels().shoal_attention(
        address(qkv),
        address(cache.layer(layer)),
        address(batch.tiles, torch.int64),
        address(batch.block_tables, torch.int64),
        address(out),
        len(batch.tiles),
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        cache.block_size_tokens,
        window or _ALL,
        config.head_dim**-0.5,
        torch.get_num_threads(),
    )
    return out
