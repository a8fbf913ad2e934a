"""Attention of one sequence's chunk of tokens over its context, in tiles.

A tile of queries is multiplied with the keys that its tokens see and, at most, as many again as it has tokens: of a
prompt computed at once, about half of all pairs is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from services.worker.engine.step_plan import SequenceChunk
from services.worker.runner.kv_cache import PagedKvCache

TILE_TOKENS = 64
"""Queries of a tile: fewer leave out more pairs and make more calls."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some neighbouring tokens of a chunk and all keys that any of them sees."""

    first_token: int
    end_token: int
    first_key: int
    end_key: int
    """Among the keys that the chunk gathers."""
    mask: Tensor
    """Added to the scores: 0, or -inf where a key is in a token's future or before its window.
    [end_token - first_token, end_key - first_key] float32."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A chunk of several tokens; their rows are neighbours."""

    first_row: int
    num_tokens: int
    kv_rows: Tensor
    """Rows in the cache of the keys that the chunk sees, then of the values, head by head:
    [2 * num_kv_heads * num_keys] int64."""
    tiles: tuple[Tile, ...]

    def attend(self, queries: Tensor, cache: PagedKvCache, layer: int) -> Tensor:
        """Return softmax(Q K^T / sqrt(head_dim) + mask) V of the chunk's rows among `queries`,
        [num_rows, num_heads, head_dim]: [num_tokens, num_heads, head_dim].
        """
        num_heads, num_kv_heads = queries.shape[1], cache.config.num_kv_heads
        rows = queries[self.first_row : self.first_row + self.num_tokens].transpose(0, 1)[None]
        gathered = cache.table(layer).index_select(0, self.kv_rows)
        keys, values = gathered.view(2, 1, num_kv_heads, -1, gathered.shape[1])
        attended = [
            scaled_dot_product_attention(
                rows[:, :, tile.first_token : tile.end_token],
                keys[:, :, tile.first_key : tile.end_key],
                values[:, :, tile.first_key : tile.end_key],
                attn_mask=tile.mask,
                enable_gqa=num_kv_heads != num_heads,
            )
            for tile in self.tiles
        ]
        return torch.cat(attended, dim=2)[0].transpose(0, 1)


def make_prefill_chunk(first_row: int, chunk: SequenceChunk, cache: PagedKvCache, window: int | None) -> PrefillChunk:
    """Prepare a chunk. `window`: tokens that each sees, itself included; None: all before it."""
    # What lies before the window of the chunk's first token is not gathered.
    gathered_from = max(0, chunk.first_position + 1 - window) if window else 0
    slots = cache.slots(torch.tensor(chunk.block_table), torch.arange(gathered_from, chunk.context_tokens))
    kv_rows = torch.stack((cache.key_rows(slots), cache.value_rows(slots)))
    return PrefillChunk(
        first_row=first_row,
        num_tokens=len(chunk.token_ids),
        kv_rows=kv_rows.transpose(1, 2).flatten(),
        tiles=tuple(_tiles(chunk, gathered_from, window)),
    )


def _tiles(chunk: SequenceChunk, gathered_from: int, window: int | None) -> Iterator[Tile]:
    """Cut a chunk whose gathered keys begin at a position."""
    num_tokens = len(chunk.token_ids)
    for first_token in range(0, num_tokens, TILE_TOKENS):
        end_token = min(first_token + TILE_TOKENS, num_tokens)
        first_query, end_query = chunk.first_position + first_token, chunk.first_position + end_token
        first_seen = max(0, first_query + 1 - window) if window else 0
        queries = torch.arange(first_query, end_query)[:, None]
        keys = torch.arange(first_seen, end_query)
        is_hidden = keys > queries
        if window:
            is_hidden |= keys <= queries - window
        mask = torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf"))
        yield Tile(first_token, end_token, first_seen - gathered_from, end_query - gathered_from, mask)
