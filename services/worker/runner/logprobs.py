"""Log-probabilities that are reported beside tokens: of the model's own distribution, the softmax of its raw logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.worker.engine.step_plan import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Place:
    """A token whose log-probability is asked for, and how many of the most probable ones beside it."""

    token_id: int
    num_top: int


def token_logprobs(logits: Tensor, places: Sequence[Place]) -> list[TokenLogprobs]:
    """Return what is asked of each row. logits: [num_places, vocabulary_size] float32.

    Takes as much memory again as `logits`. A row's results depend on no other row.
    """
    if not places:
        return []
    logprobs = logits.log_softmax(dim=1)
    own = logprobs.gather(1, torch.tensor([[place.token_id] for place in places])).squeeze(1).tolist()
    num_top = min(max(place.num_top for place in places), logits.shape[1])
    best, token_ids = logprobs.topk(num_top, dim=1)
    tops = [tuple(zip(*row, strict=True)) for row in zip(token_ids.tolist(), best.tolist(), strict=True)]
    return [TokenLogprobs(logprob, top[: place.num_top]) for place, logprob, top in zip(places, own, tops, strict=True)]
