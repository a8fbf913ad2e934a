"""Log-probabilities of tokens, computed on the device and read when the step is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.cuda.transfer import HostCopy, to_device
from services.worker.engine.step_plan import SequenceChunk, TokenLogprobs

SCORED_AT_ONCE = 256
"""Rows of given tokens whose logits are in memory together: 131 MB in float32 for a vocabulary of 128,256."""

Place = tuple[int, int]
"""The number of a chunk in its plan, and which of its tokens."""


@dataclass(frozen=True, slots=True)
class _Part:
    places: tuple[Place, ...]
    num_top: tuple[int, ...]
    own: HostCopy
    best: HostCopy
    token_ids: HostCopy


@dataclass(frozen=True, slots=True)
class AskedLogprobs:
    """What was asked for, on its way to the host."""

    parts: tuple[_Part, ...]

    def get(self) -> dict[Place, TokenLogprobs]:
        """Return it, once the step is done."""
        found: dict[Place, TokenLogprobs] = {}
        for part in self.parts:
            rows = zip(
                part.places,
                part.num_top,
                part.own.get().tolist(),
                part.best.get().tolist(),
                part.token_ids.get().tolist(),
                strict=True,
            )
            for place, num_top, own, best, token_ids in rows:
                found[place] = TokenLogprobs(own, tuple(zip(token_ids[:num_top], best[:num_top], strict=True)))
        return found


class Scoring:
    """Launches what log-probabilities take. Nothing, where none are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sampled(self, chunks: Sequence[SequenceChunk], logits: Tensor, tokens: Tensor) -> AskedLogprobs:
        """Those of sampled tokens. logits: [num_samples, vocabulary_size]; tokens: [num_samples or more]."""
        samples = [(index, chunk) for index, chunk in enumerate(chunks) if chunk.sample_index is not None]
        asked = [
            (row, (index, 0), chunk.sampling.num_logprobs)
            for row, (index, chunk) in enumerate(samples)
            if chunk.sampling.num_logprobs is not None
        ]
        if not asked:
            return AskedLogprobs(())
        rows, places, num_top = zip(*asked, strict=True)
        on_device = to_device(torch.tensor(rows), self._device)
        return AskedLogprobs((self._part(logits[on_device], tokens[on_device], places, num_top),))

    def given(
        self, chunks: Sequence[SequenceChunk], hidden: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> AskedLogprobs:
        """Those of given tokens. hidden: last hidden states of all rows of the step; `logits` maps some of them."""
        if not any(chunk.scored_token_ids for chunk in chunks):
            return AskedLogprobs(())
        asked: list[tuple[int, int, Place, int]] = []
        first_row = 0
        for index, chunk in enumerate(chunks):
            end = first_row + len(chunk.token_ids) - (chunk.sample_index is not None)
            begin = end - len(chunk.scored_token_ids)
            first_row += len(chunk.token_ids)
            num_top = chunk.sampling.num_scored_logprobs
            asked += [
                (row, token, (index, place), num_top)
                for place, (row, token) in enumerate(zip(range(begin, end), chunk.scored_token_ids, strict=True))
            ]
        parts = []
        for first in range(0, len(asked), SCORED_AT_ONCE):
            rows, tokens, places, num_top_each = zip(*asked[first : first + SCORED_AT_ONCE], strict=True)
            wanted = hidden[to_device(torch.tensor(rows), self._device)]
            own = to_device(torch.tensor(tokens, dtype=torch.int32), self._device)
            parts.append(self._part(logits(wanted), own, places, num_top_each))
        return AskedLogprobs(tuple(parts))

    def _part(self, logits: Tensor, tokens: Tensor, places: tuple[Place, ...], num_top: tuple[int, ...]) -> _Part:
        logprobs = logits.float().log_softmax(dim=1)
        own = logprobs.gather(1, tokens.long()[:, None]).squeeze(1)
        best, token_ids = logprobs.topk(min(max(num_top), logits.shape[1]), dim=1)
        return _Part(places, num_top, HostCopy(own), HostCopy(best), HostCopy(token_ids))
