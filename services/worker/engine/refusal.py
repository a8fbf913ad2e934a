"""What an engine can never compute, and why."""

from collections.abc import Sequence as Tokens

from gen.shoal.fleet.v1 import request_pb2
from services.worker.engine.limits import EngineLimits
from services.worker.engine.sequence import Sequence


def why_refused(payload: request_pb2.RequestPayload, sequence: Sequence, limits: EngineLimits) -> str | None:
    """Return why a sequence can never be computed by this engine, or None if it can.

    The gateway refuses all of this before anything is stored; here it keeps one bad request from ending the engine.
    """
    if sequence.num_prompt_tokens == 0:
        return "the prompt has no tokens"
    if problem := why_too_long(sequence, limits):
        return problem
    return why_tokens_refused([*sequence.token_ids, *payload.sampling.logit_bias], limits)


def why_too_long(sequence: Sequence, limits: EngineLimits) -> str | None:
    """Return why a sequence never fits, alone even, or None if it does. Forced tokens can make it longer."""
    if sequence.most_tokens > limits.context_tokens:
        return (
            f"{sequence.num_prompt_tokens} prompt tokens and max_tokens {sequence.max_tokens} "
            f"exceed the context of {limits.context_tokens} tokens"
        )
    num_blocks = limits.blocks_for(sequence.most_tokens)
    if num_blocks > limits.num_blocks:
        return f"{sequence.most_tokens} tokens need {num_blocks} blocks; the KV cache has {limits.num_blocks}"
    return None


def why_tokens_refused(token_ids: Tokens[int], limits: EngineLimits) -> str | None:
    """Return why tokens are none of the model's, or None if they all are."""
    largest = max(token_ids, default=0)
    if largest < limits.vocabulary_size:
        return None
    return f"token id {largest} is not in the vocabulary of {limits.vocabulary_size}"
