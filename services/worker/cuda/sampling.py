"""Chooses tokens on the device where the likeliest is not wanted, without waiting for it.

The same rules, in the same order, as `services.worker.runner.sampling`; all of a row's candidates are kept, and those
that top_k, top_p or min_p leave out get no chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.worker.cuda.transfer import to_device
from services.worker.engine.sequence import SamplingParameters
from services.worker.engine.step_plan import SequenceChunk
from services.worker.kernels.choose_token import Draws, PartResults, draw_tokens
from services.worker.runner.noise import gumbel_noise, noise_key


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a step's tokens are."""

    logits: Tensor
    """[num_samples, vocabulary_size]"""
    room: PartResults
    places: Tensor
    tokens: Tensor
    last_tokens: Tensor


def choose_others(chosen: Chosen, chunks: Sequence[SequenceChunk]) -> None:
    """Overwrite the tokens of rows that are not simply the likeliest. chunks: those that sample, in order of rows."""
    drawn: list[tuple[int, SequenceChunk]] = []
    for row, chunk in enumerate(chunks):
        parameters = chunk.sampling
        if _is_adjusted(chunk) or (parameters.temperature > 0 and _is_cut(parameters)):
            token = _choose(chosen.logits[row].float(), chunk)
            chosen.tokens[row] = token
            chosen.last_tokens.scatter_(0, chosen.places[row].long()[None], token[None])
        elif parameters.temperature > 0:
            drawn.append((row, chunk))
    if drawn:
        device = chosen.logits.device
        draws = Draws(
            to_device(torch.tensor([row for row, _ in drawn], dtype=torch.int32), device),
            to_device(torch.tensor([_key(chunk) for _, chunk in drawn]), device),
            to_device(torch.tensor([chunk.sampling.temperature for _, chunk in drawn]), device),
        )
        draw_tokens(chosen.logits, draws, chosen.room, chosen.places, chosen.tokens, chosen.last_tokens)


def needs_all_logits(chunk: SequenceChunk) -> bool:
    """Whether the likeliest token is not all that is wanted of a chunk that samples."""
    parameters = chunk.sampling
    return _is_adjusted(chunk) or parameters.temperature > 0 or parameters.num_logprobs is not None


def _is_adjusted(chunk: SequenceChunk) -> bool:
    if chunk.allowed_tokens is not None or chunk.sampling.logit_bias:
        return True
    return chunk.seen is not None and chunk.sampling.has_penalties


def _is_cut(parameters: SamplingParameters) -> bool:
    return parameters.top_k > 0 or parameters.top_p < 1 or parameters.min_p > 0


def _key(chunk: SequenceChunk) -> int:
    assert chunk.sample_index is not None
    return noise_key(chunk.sampling.seed, chunk.sampling.choice, chunk.sample_index)


def _choose(logits: Tensor, chunk: SequenceChunk) -> Tensor:
    """logits: [vocabulary_size] float32. Returns a token: [] int32."""
    parameters = chunk.sampling
    logits = _adjusted(logits, chunk)
    if parameters.temperature == 0:
        return logits.argmax().int()
    scores = (logits - logits.max()) / parameters.temperature
    token_ids = torch.arange(len(scores), device=scores.device)
    if _is_cut(parameters):
        scores, token_ids = scores.sort(descending=True, stable=True)
        scores = _cut(scores, parameters)
    return token_ids[(scores + gumbel_noise(_key(chunk), token_ids)).argmax()].int()


def _cut(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """Leave what top_k, then top_p, then min_p keep of scores, best first; the others become minus infinity."""
    if 0 < parameters.top_k < len(scores):
        scores[parameters.top_k :] = float("-inf")
    if parameters.top_p < 1:
        probabilities = scores.double().softmax(dim=0)
        scores = scores.masked_fill(probabilities.cumsum(dim=0) - probabilities >= parameters.top_p, float("-inf"))
    if parameters.min_p > 0:
        scores = scores.masked_fill(scores < math.log(parameters.min_p), float("-inf"))
    return scores


def _adjusted(logits: Tensor, chunk: SequenceChunk) -> Tensor:
    """Bias, penalties and mask, as `services.worker.runner.adjustments` has them. Changes `logits`."""
    parameters, seen, device = chunk.sampling, chunk.seen, logits.device
    if parameters.logit_bias:
        token_ids, biases = zip(*parameters.logit_bias, strict=True)
        logits[to_device(torch.tensor(token_ids), device)] += to_device(torch.tensor(biases), device)
    if seen and parameters.repetition_penalty != 1:
        ids = to_device(torch.from_numpy(np.unique(np.array((*seen.prompt, *seen.generated), dtype=np.int64))), device)
        before = logits[ids]
        penalty = parameters.repetition_penalty
        logits[ids] = torch.where(before > 0, before / penalty, before * penalty)
    if seen and (parameters.frequency_penalty or parameters.presence_penalty):
        unique, counts = np.unique(np.array(seen.generated, dtype=np.int64), return_counts=True)
        costs = torch.from_numpy(counts) * parameters.frequency_penalty + parameters.presence_penalty
        logits[to_device(torch.from_numpy(unique), device)] -= to_device(costs, device)
    if chunk.allowed_tokens is not None:
        bits = np.unpackbits(np.frombuffer(chunk.allowed_tokens, dtype=np.uint8), count=len(logits), bitorder="little")
        if not bits.any():
            raise ValueError(f"a mask of {len(logits)} tokens allows none")
        logits = logits.masked_fill(to_device(torch.from_numpy(bits == 0), device), float("-inf"))
    return logits
