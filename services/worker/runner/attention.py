"""Attention over a paged KV cache, with plain torch operators."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from services.worker.runner.batch import AttentionGroup
from services.worker.runner.kv_cache import PagedKvCache


def paged_attention(queries: Tensor, cache: PagedKvCache, layer: int, groups: tuple[AttentionGroup, ...]) -> Tensor:
    """Attend every row to its sequence's context in the cache; keys and values of the rows are there already.

    queries: [num_tokens, num_heads, head_dim]. Returns the same shape. Prefill chunks and decodes may be mixed: each
    group gathers its contexts by its block tables and is one call, softmax(Q K^T / sqrt(head_dim) + mask) V, where
    num_heads / num_kv_heads query heads share a key head.
    """
    attended = [_attend(queries, cache, layer, group) for group in groups]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attend(queries: Tensor, cache: PagedKvCache, layer: int, group: AttentionGroup) -> Tensor:
    num_heads, head_dim = queries.shape[1:]
    rows = queries[group.first_row : group.end_row].view(group.num_chunks, group.chunk_tokens, num_heads, head_dim)
    keys, values = cache.read(layer, group.block_tables)
    attended = scaled_dot_product_attention(
        rows.transpose(1, 2), keys, values, attn_mask=group.mask, enable_gqa=keys.shape[1] != num_heads
    )
    return attended.transpose(1, 2).reshape(-1, num_heads, head_dim)
