"""Kernels that work inside of a forward pass, each by itself."""

import ctypes

import torch
from torch import Tensor

from services.worker.cpu_kernels.library import address, kernels
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache


def paged_attention(qkv: Tensor, batch: BatchInputs, cache: PagedKvCache, layer: int, window: int | None) -> Tensor:
    """Attend each row to its sequence's context, or the `window` last tokens of it. qkv: [num_tokens, (num_heads + 2 *
    num_kv_heads) * head_dim]. Returns [num_tokens, num_heads * head_dim].
    """
    out = qkv.new_empty((len(qkv), cache.config.q_size))
    kernels().shoal_attention(
        ctypes.byref(cache.heads),
        ctypes.byref(batch.structure()),
        address(qkv),
        address(cache.layer(layer)),
        window or 1 << 30,
        address(out),
        torch.get_num_threads(),
    )
    return out


def rotate_and_store(
    qkv: Tensor, turns: Tensor, qk_norm: Tensor | None, batch: BatchInputs, cache: PagedKvCache, layer: int
) -> None:
    """Turn queries and keys in place, normalized before if `qk_norm` is given; write keys and values to the cache."""
    kernels().shoal_rotate_and_store(
        ctypes.byref(cache.heads),
        ctypes.byref(batch.structure()),
        address(qkv),
        address(turns),
        None if qk_norm is None else address(qk_norm),
        cache.config.rms_norm_eps,
        address(cache.layer(layer)),
        torch.get_num_threads(),
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up. gate_up: [num_rows, 2 * size], the gate first."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, size))
    kernels().shoal_swiglu(address(gate_up), address(out), num_rows, size, torch.get_num_threads())
    return out
