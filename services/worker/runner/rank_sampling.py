"""Chooses tokens from logits that are dealt out to ranks by vocabulary: what each has to give.

Of a greedy draw, a rank gives its best token; of one with a top_k, its top_k best: those of the whole vocabulary are
among them. Bias, penalties and masks are a token's own, so that a rank applies them before. Any other draw depends on
all logits, by its noise or its nucleus, and so do log-probabilities: the row is gathered whole.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from services.worker.engine.step_plan import SeenTokens
from services.worker.runner.adjustments import adjusted, unpacked_mask
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.runner.ranks import Ranks
from services.worker.runner.sampling import Draw, choose

MOST_CANDIDATES = 256
"""That a rank gives of a row; a draw among more has the row gathered."""


class DealtVocabulary:
    """The vocabulary's parts, and how what is known of each becomes what is known of all."""

    def __init__(self, ranks: Ranks, config: DecoderConfig) -> None:
        """`config` is the whole model's."""
        self._ranks = ranks
        self._size = config.vocabulary_size
        world_size = ranks.shard.world_size
        self._parts = [Shard(rank, world_size).vocabulary(config) for rank in range(world_size)]
        self._own = self._parts[ranks.shard.rank]
        self.rows_at_once = ranks.slot_floats // max(len(part) for part in self._parts)
        """Rows of logits that can be gathered at once."""

    def whole(self, logits: Tensor) -> Tensor:
        """Gather rows, [num_rows, len(own part)]: [num_rows, vocabulary_size]."""
        num_rows = len(logits)
        given = self._ranks.gather(logits, [num_rows * len(part) for part in self._parts])
        return torch.cat([part.view(num_rows, -1) for part in given], dim=1)

    def choose(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """Choose a token for each row of logits, [num_rows, len(own part)], for draws that `is_narrow`."""
        counts = [1 if draw.parameters.temperature == 0 else draw.parameters.top_k for draw in draws]
        own = [
            self._adjusted(row, draw).topk(min(count, len(self._own)))
            for row, draw, count in zip(logits.unbind(), draws, counts, strict=True)
        ]
        token_ids = torch.cat([best.indices for best in own]) + self._own.start
        # Ids travel as the bits of floats.
        given = torch.cat([*(best.values for best in own), token_ids.to(torch.int32).view(torch.float32)])
        sizes = [[min(count, len(part)) for count in counts] for part in self._parts]
        gathered = [
            (torch.split(values, rows), torch.split(ids.view(torch.int32), rows))
            for part, rows in zip(self._ranks.gather(given, [2 * sum(rows) for rows in sizes]), sizes, strict=True)
            for values, ids in [part.chunk(2)]
        ]
        return [
            choose(
                torch.cat([values[row] for values, _ in gathered]),
                torch.cat([ids[row] for _, ids in gathered]).long(),
                draw,
            )
            for row, draw in enumerate(draws)
        ]

    def _adjusted(self, logits: Tensor, draw: Draw) -> Tensor:
        """As `adjusted`, of the own part of a row."""
        bias = tuple((token_id - self._own.start, bias) for token_id, bias in draw.parameters.logit_bias
                     if token_id in self._own)  # fmt: skip
        seen = draw.seen and SeenTokens(self._here(draw.seen.prompt), self._here(draw.seen.generated))
        logits = adjusted(logits, replace(draw.parameters, logit_bias=bias), seen, None)
        if draw.allowed_tokens is not None:
            allowed = unpacked_mask(draw.allowed_tokens, self._size)[self._own.start : self._own.stop]
            logits = logits.masked_fill(~allowed, float("-inf"))
        return logits

    def _here(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token_id - self._own.start for token_id in token_ids if token_id in self._own)


def is_narrow(draw: Draw) -> bool:
    """Whether a few of each rank's tokens decide a draw."""
    return draw.parameters.temperature == 0 or 0 < draw.parameters.top_k <= MOST_CANDIDATES
