"""Attention over a paged KV cache, with plain torch operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from services.worker.runner.decode_attention import DecodeGroup
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.prefill_attention import PrefillChunk

AttentionGroup = DecodeGroup | PrefillChunk
"""Rows that are attended together."""


def paged_attention(queries: Tensor, cache: PagedKvCache, layer: int, groups: Sequence[AttentionGroup]) -> Tensor:
    """Attend every row to its sequence's context in the cache; keys and values of the rows are there already.

    queries: [num_tokens, num_heads, head_dim], where num_heads / num_kv_heads query heads share a key head. Returns the
    same shape. `groups` hold every row once, in order.
    """
    attended = [group.attend(queries, cache, layer) for group in groups]
    return attended[0] if len(attended) == 1 else torch.cat(attended)
