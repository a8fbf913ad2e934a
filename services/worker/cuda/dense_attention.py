"""Attention of whole prompts of one length by cuDNN, which is faster than the paged kernel and takes no block tables.

cuDNN makes a plan for each shape, which takes longer than a step: so only lengths are left to it that come again and
again, and sequences in numbers that are powers of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from services.worker.engine.step_plan import SequenceChunk

_GRANULE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class DenseRun:
    """Rows behind each other that are whole prompts of one length."""

    first_row: int
    num_sequences: int
    num_tokens: int
    """Of each."""

    @property
    def rows(self) -> slice:
        """Where they are."""
        return slice(self.first_row, self.first_row + self.num_sequences * self.num_tokens)


def is_dense(chunk: SequenceChunk) -> bool:
    """Whether a chunk begins its sequence and has a length that cuDNN may have a plan for."""
    return chunk.first_position == 0 and len(chunk.token_ids) % _GRANULE_TOKENS == 0


def dense_runs(chunks: Sequence[SequenceChunk]) -> tuple[DenseRun, ...]:
    """Find the runs of a step's chunks."""
    runs = []
    first_row = 0
    for num_tokens, group in groupby(chunks, lambda chunk: len(chunk.token_ids) if is_dense(chunk) else 0):
        members = list(group)
        if num_tokens == 0:
            first_row += sum(len(chunk.token_ids) for chunk in members)
            continue
        left = len(members)
        while left:
            taken = 1 << (left.bit_length() - 1)
            runs.append(DenseRun(first_row, taken, num_tokens))
            first_row += taken * num_tokens
            left -= taken
    return tuple(runs)


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor, run: DenseRun) -> Tensor:
    """Attend in a run, causally. Returns memory of its own, [rows of the run, num_heads, head_dim].

    queries: [num_rows, num_heads, head_dim]; keys and values: [num_rows, num_kv_heads, head_dim], strided.
    """
    by_sequence = (run.num_sequences, run.num_tokens)
    q, k, v = (x[run.rows].unflatten(0, by_sequence).transpose(1, 2) for x in (queries, keys, values))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # It lies as the queries do, so this copies nothing.
    return attended.transpose(1, 2).flatten(0, 1)
