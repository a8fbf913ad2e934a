"""The embedding's rows of tokens, some of which only the device knows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.worker.kernels.launch import after_previous

_BLOCK = 1024


def embed_reference(
    token_ids: Tensor, places: Tensor, last_tokens: Tensor, embedding: Tensor, first_token: int = 0
) -> Tensor:
    """Return the rows, [num_tokens, hidden_size], of tokens, [num_tokens].

    A token below 0 is the one sampled last at its place, `last_tokens[places[i]]`. `embedding` may be a part, from
    `first_token` on: of a token that is not in it the row is zeros.
    """
    tokens = torch.where(token_ids < 0, last_tokens[places], token_ids) - first_token
    is_here = (tokens >= 0) & (tokens < len(embedding))
    return embedding[tokens.clamp(0, len(embedding) - 1)] * is_here[:, None]


def embed(
    token_ids: Tensor,
    places: Tensor,
    last_tokens: Tensor,
    embedding: Tensor,
    out: Tensor,
    first_token: int = 0,
    cleared: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """As the reference, into `out`; `cleared`, as large, becomes zeros.

    A row that is computed for nothing holds a token of 0 or more.
    """
    assert cleared is None or (cleared.shape == out.shape and cleared.is_contiguous())
    num_tokens, size = out.shape
    block = min(_BLOCK, triton.next_power_of_2(size))
    _embed[(num_tokens, triton.cdiv(size, block))](
        token_ids, places, last_tokens, embedding, out, cleared, size, first_token, len(embedding),
        BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip


@triton.jit
def _embed(
    token_ids,
    places,
    last_tokens,
    embedding,
    out,
    cleared,
    size,
    first_token,
    num_tokens,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    after_previous(PDL)
    token = tl.load(token_ids + row)
    if token < 0:
        token = tl.load(last_tokens + tl.load(places + row))
    token -= first_token
    num_columns = tl.where((token >= 0) & (token < num_tokens), size, 0)
    values = tl.load(embedding + token.to(tl.int64) * size + columns, columns < num_columns, other=0.0)
    tl.store(out + row * size + columns, values, inside)
    if cleared is not None:
        tl.store(cleared + row * size + columns, tl.zeros_like(values), inside)
