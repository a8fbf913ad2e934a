"""Chooses tokens from logits.

In this order: logits are adjusted (see `adjustments`), divided by the temperature, and cut to candidates by top_k,
top_p and min_p, as transformers does; vLLM does min_p before the other two, which keeps the same tokens whenever one of
them is used alone. At temperature 0 the best adjusted logit is taken.

With noise g of the standard Gumbel distribution, argmax(logits / temperature + g) is a sample of the softmax. The noise
of a candidate is a hash of (seed, choice, index of the token to choose, candidate) and of nothing else: a sequence that
is continued elsewhere, or in other company, meets the same noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.sequence import SamplingParameters
from services.worker.engine.step_plan import SeenTokens
from services.worker.runner.adjustments import adjusted
from services.worker.runner.noise import gumbel_noise, noise_key

# Sorting a whole vocabulary costs some ms; most nuclei are among so many of the best.
_LIKELY_NUCLEUS = 1024


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to choose."""

    parameters: SamplingParameters
    index: int
    """The token's index in its choice."""
    seen: SeenTokens | None = None
    """What penalties look at; None: there are none."""
    allowed_tokens: bytes | None = None
    """As in SequenceChunk."""


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose a token for each row. logits: [num_draws, vocabulary_size] float32; they are not changed.

    One row after the other: so a row cannot depend on the others, not even by rounding.
    """
    return [
        choose(adjusted(row, draw.parameters, draw.seen, draw.allowed_tokens), None, draw)
        for row, draw in zip(logits.unbind(), draws, strict=True)
    ]


def choose(logits: Tensor, token_ids: Tensor | None, draw: Draw) -> int:
    """Choose one of some tokens by their adjusted logits, [num_tokens] float32. `token_ids`: None if it is all."""
    parameters = draw.parameters
    if parameters.temperature == 0:
        # By numpy: 4 us over 49,152 tokens where torch takes 44. Of equal ones the first.
        best = int(logits.numpy().argmax())
        return best if token_ids is None else int(token_ids[best])
    # Less the largest first: however low the temperature, the best token has 0 and nothing overflows to +inf.
    scores = (logits - logits.max()) / parameters.temperature
    if token_ids is None:
        token_ids = torch.arange(len(scores))
    scores, token_ids = _candidates(scores, token_ids, parameters)
    noise = gumbel_noise(noise_key(parameters.seed, parameters.choice, draw.index), token_ids)
    return int(token_ids[(scores + noise).argmax()])


def _candidates(scores: Tensor, token_ids: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor]:
    """Keep the tokens that top_k, then top_p, then min_p leave. [num_tokens] each, the largest score is 0.

    Returns scores and token ids, [num_candidates]; at least one.
    """
    if 0 < parameters.top_k < scores.shape[0]:
        scores, order = scores.topk(parameters.top_k)
        token_ids = token_ids[order]
    if parameters.top_p < 1:
        scores, order = _nucleus(scores, parameters.top_p)
        token_ids = token_ids[order]
    if parameters.min_p > 0:
        is_kept = scores >= math.log(parameters.min_p)
        scores, token_ids = scores[is_kept], token_ids[is_kept]
    return scores, token_ids


def _nucleus(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the fewest of the best scores whose probability reaches `top_p`, best first, and their places."""
    log_total = scores.double().logsumexp(dim=0)
    best, order = scores.topk(min(_LIKELY_NUCLEUS, scores.shape[0]))
    if (best.double() - log_total).exp().sum() < top_p:
        best, order = scores.sort(descending=True)
    probabilities = (best.double() - log_total).exp()
    # A token stays if those before it do not reach top_p.
    num_kept = int((probabilities.cumsum(dim=0) - probabilities < top_p).sum())
    return best[:num_kept], order[:num_kept]
