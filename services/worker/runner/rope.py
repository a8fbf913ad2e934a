"""Rotary position embedding (Su et al., 2021): a turn for each pair of neighbouring dimensions.

Hugging Face pairs dimension i with i + head_dim / 2; such weights are put into this order when they are loaded.
"""

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address, kernels
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache


def rotary_table(num_positions: int, frequencies: Tensor) -> Tensor:
    """Return the cosine and sine of position * frequency: [num_positions, head_dim / 2, 2].

    frequencies: radians a position, [head_dim / 2] float32.
    """
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=2)


def rotate_and_store(
    qkv: Tensor, turns: Tensor, qk_norm: Tensor | None, batch: BatchInputs, cache: PagedKvCache, layer: int
) -> None:
    """Turn queries and keys in place, and write keys and values to their slots.

    A pair (x, y) of dimensions (2i, 2i + 1) becomes (x cos - y sin, y cos + x sin). qkv: [num_tokens, (num_heads + 2 *
    num_kv_heads) * head_dim]; turns: of `rotary_table`; qk_norm: weights to normalize each query and key with before,
    [num_heads + num_kv_heads, head_dim], or None.
    """
    config = cache.config
    kernels().shoal_rotate_and_store(
        address(qkv),
        address(turns),
        None if qk_norm is None else address(qk_norm),
        address(batch.positions, torch.int64),
        address(batch.slots, torch.int64),
        address(cache.layer(layer)),
        qkv.shape[0],
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        cache.block_size_tokens,
        config.rms_norm_eps,
        torch.get_num_threads(),
    )
