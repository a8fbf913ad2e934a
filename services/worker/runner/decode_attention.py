"""Attention of single tokens, each over its own sequence's context, without gathering it.

The cache's keys and values are rows of one table. A score is wanted for few of all pairs of a query and a row: a sparse
matrix, computed as a sampled product (`sampled_addmm`). The values are summed where they lie, as an embedding bag with
weights. So each key and value is read once for each query head and copied nowhere. Each token's result is computed from
its own row alone, in the same order of additions, whatever else the step computes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.step_plan import SequenceChunk
from services.worker.runner.kv_cache import PagedKvCache

with warnings.catch_warnings():
    # torch says once that its compressed sparse layout may change; the tests of this module would see it.
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([]), torch.tensor([]), size=(1, 1), check_invariants=False
    )

LEAST_KEYS = 16
"""Softmax adds up fewer values than a vector register holds in another order. Padded to so many, a short context gives
the same sum beside a longer one as alone."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Tokens, each a chunk of its own, that are attended together; their rows are neighbours."""

    first_row: int
    num_tokens: int
    scores: Tensor
    """Room for the scores: sparse CSR [num_tokens * num_heads, cache.num_rows], with num_keys entries a row. Its
    columns are the keys that a query head is multiplied with."""
    mask: Tensor
    """Added to the scores: 0, or -inf where a key is beyond a token's context. [num_tokens * num_heads * num_keys]."""
    value_rows: Tensor
    """Rows in the cache of the values, in the order of the scores: [num_tokens * num_heads * num_keys] int32."""
    bag_starts: Tensor
    """Where each query head's entries begin in `value_rows`: [num_tokens * num_heads] int32."""

    def attend(self, queries: Tensor, cache: PagedKvCache, layer: int) -> Tensor:
        """Return softmax(Q K^T / sqrt(head_dim) + mask) V of the group's rows among `queries`,
        [num_rows, num_heads, head_dim]: [num_tokens, num_heads, head_dim].
        """
        num_heads, head_dim = queries.shape[1:]
        table = cache.table(layer)
        heads = queries[self.first_row : self.first_row + self.num_tokens].reshape(-1, head_dim)
        scores = self.scores.values().copy_(self.mask)
        torch.sparse.sampled_addmm(self.scores, heads, table.t(), alpha=head_dim**-0.5, out=self.scores)
        weights = scores.view(heads.shape[0], -1).softmax(dim=1).flatten()
        attended = torch.embedding_bag(table, self.value_rows, self.bag_starts, per_sample_weights=weights, mode=_SUM)
        return attended[0].view(self.num_tokens, num_heads, head_dim)


_SUM = 0
"""The mode of an embedding bag that adds."""


def make_decode_group(
    first_row: int, chunks: Sequence[SequenceChunk], cache: PagedKvCache, window: int | None
) -> DecodeGroup:
    """Prepare chunks of one token each. `window`: tokens that each sees, itself included; None: all before it."""
    contexts = torch.tensor([chunk.context_tokens for chunk in chunks])
    first_positions = (contexts - window).clamp_min_(0) if window else torch.zeros_like(contexts)
    num_keys = max(int((contexts - first_positions).max()), LEAST_KEYS)
    num_blocks = max(len(chunk.block_table) for chunk in chunks)
    tables = torch.tensor([[*chunk.block_table, *[0] * (num_blocks - len(chunk.block_table))] for chunk in chunks])
    positions = first_positions[:, None] + torch.arange(num_keys)
    is_hidden = positions >= contexts[:, None]
    # A hidden place reads the token's own row and gives it the weight 0.
    positions = torch.minimum(positions, contexts[:, None] - 1)
    slots = cache.slots(tables, positions)
    key_rows = _for_query_heads(cache.key_rows(slots), cache.config.num_heads)
    starts = torch.arange(0, len(key_rows) + 1, num_keys, dtype=torch.int32)
    mask = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf"))
    return DecodeGroup(
        first_row=first_row,
        num_tokens=len(chunks),
        scores=torch.sparse_csr_tensor(
            starts,
            key_rows,
            torch.empty(len(key_rows)),
            size=(len(chunks) * cache.config.num_heads, cache.num_rows),
            # Hidden places repeat a column, which the product does not mind.
            check_invariants=False,
        ),
        mask=mask[:, None, :].expand(-1, cache.config.num_heads, -1).flatten(),
        value_rows=_for_query_heads(cache.value_rows(slots), cache.config.num_heads),
        bag_starts=starts[:-1],
    )


def _for_query_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Repeat rows for the query heads that share them. rows: [num_tokens, num_keys, num_kv_heads].

    Returns [num_tokens * num_heads * num_keys] int32.
    """
    shared = rows.int().transpose(1, 2).unsqueeze(2)
    return shared.expand(-1, -1, num_heads // rows.shape[2], -1).flatten()
