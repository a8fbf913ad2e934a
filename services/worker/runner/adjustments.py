"""What changes the model's logits before a token is chosen: bias, penalties, a mask; in this order.

As in transformers (`_get_logits_processor`: sequence bias, repetition penalty, then constraints) and vLLM (`Sampler`:
logit bias, then repetition, frequency and presence penalties). So a bias is penalized like the model's own logit, and
no bias brings back a token that a mask forbids.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.sequence import SamplingParameters
from services.worker.engine.step_plan import SeenTokens


def adjusted(
    logits: Tensor, parameters: SamplingParameters, seen: SeenTokens | None, allowed_tokens: bytes | None
) -> Tensor:
    """Return the logits that a token is chosen from; the model's own, [vocabulary_size] float32, stay as they are.

    Raises ValueError if a mask allows no token or is not the vocabulary's: it is a defect of whoever made it.
    """
    if not (parameters.logit_bias or (seen and parameters.has_penalties) or allowed_tokens is not None):
        return logits
    logits = logits.clone()
    if parameters.logit_bias:
        token_ids, biases = zip(*parameters.logit_bias, strict=True)
        logits[torch.tensor(token_ids)] += torch.tensor(biases)
    if seen and parameters.repetition_penalty != 1:
        _penalize_repetition(logits, (*seen.prompt, *seen.generated), parameters.repetition_penalty)
    if seen and (parameters.frequency_penalty or parameters.presence_penalty):
        _penalize_occurrences(logits, seen.generated, parameters)
    if allowed_tokens is not None:
        logits[~unpacked_mask(allowed_tokens, logits.shape[0])] = float("-inf")
    return logits


def _penalize_repetition(logits: Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """Make seen tokens less probable, of the prompt too: CTRL (Keskar et al., 2019), section 4.1.

    A negative logit is multiplied where the paper divides, as everybody does since: dividing would raise it.
    """
    ids = torch.from_numpy(np.unique(np.array(token_ids, dtype=np.int64)))
    seen = logits[ids]
    logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalize_occurrences(logits: Tensor, token_ids: Sequence[int], parameters: SamplingParameters) -> None:
    """OpenAI's definition, of generated tokens: logit - count * frequency penalty - (count > 0) * presence penalty."""
    ids, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    logits[torch.from_numpy(ids)] -= (
        torch.from_numpy(counts) * parameters.frequency_penalty + parameters.presence_penalty
    )


def unpacked_mask(mask: bytes, vocabulary_size: int) -> Tensor:
    """Return whether each token is allowed: [vocabulary_size] bool. Raises ValueError as `adjusted`."""
    num_bytes = -(-vocabulary_size // 8)
    if len(mask) != num_bytes:
        raise ValueError(f"a mask of {len(mask)} bytes; {vocabulary_size} tokens take {num_bytes}")
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=vocabulary_size, bitorder="little")
    allowed = torch.from_numpy(bits).bool()
    if not allowed.any():
        raise ValueError(f"a mask of {vocabulary_size} tokens allows none")
    return allowed
