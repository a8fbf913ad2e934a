"""Whether a request fits, once its prompt is counted: the most tokens that a choice of it may have."""

from services.common.errors import InvalidRequest
from services.gateway.model import Model, Room
from services.gateway.validation import ValidRequest, prompt_too_long

MAX_LOGPROB_ENTRIES = 1_000_000
"""Of one request, over prompt and choices. An entry takes 11 bytes, and the end of a request is one message and one
value in Redis: 11 MB, where a message may have 16."""


def fitted_max_tokens(
    num_prompt_tokens: int, valid: ValidRequest, model: Model, room: Room | None, tokens_per_minute: int = 0
) -> int:
    """Most tokens a choice may have: as asked, or what is left. Raises InvalidRequest if it does not fit.

    `room`: of the smallest worker; None: none is registered, so only the model's own context counts.
    `tokens_per_minute`: what the caller's key allows; 0: any number.
    """
    context_tokens = min(model.context_tokens, room.context_tokens) if room else model.context_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest("input is of 0 tokens; give at least 1 token", reason="INVALID_FIELD", field="input")
    if num_prompt_tokens + 1 > context_tokens:
        raise prompt_too_long(num_prompt_tokens, context_tokens)
    left = (
        context_tokens - num_prompt_tokens,
        _held_by_workers(num_prompt_tokens, valid, room) if room else None,
        _allowed_by_key(num_prompt_tokens, valid, tokens_per_minute) if tokens_per_minute else None,
        _told_of_logprobs(num_prompt_tokens, valid),
    )
    most = min(tokens for tokens in left if tokens is not None)
    if valid.max_tokens is None:
        return most
    if valid.max_tokens > most:
        raise InvalidRequest(
            f"max_tokens is {valid.max_tokens}; the prompt's {num_prompt_tokens} tokens leave {most} of the context of "
            f"{context_tokens} tokens",
            reason="CONTEXT_EXCEEDED",
            field="max_tokens",
        )
    return valid.max_tokens


def _held_by_workers(num_prompt_tokens: int, valid: ValidRequest, room: Room) -> int:
    most = room.most_tokens(num_prompt_tokens, valid.n)
    if most < _least(valid):
        asked = f"{valid.n} x max_tokens {valid.max_tokens}" if valid.max_tokens else f"at least {valid.n}"
        raise InvalidRequest(
            f"{num_prompt_tokens} prompt tokens and {asked} never fit the smallest worker's KV cache of "
            f"{room.cache_tokens} tokens; ask for less",
            reason="CAPACITY_EXCEEDED",
            field="max_tokens" if valid.max_tokens else "input",
        )
    return most


def _allowed_by_key(num_prompt_tokens: int, valid: ValidRequest, tokens_per_minute: int) -> int:
    most = (tokens_per_minute - num_prompt_tokens) // valid.n
    if most < _least(valid):
        raise InvalidRequest(
            f"{num_prompt_tokens} tokens of the prompt and {valid.n} x max_tokens {_least(valid)} are more "
            f"than the {tokens_per_minute} a minute that the API key allows; ask for less",
            reason="EXCEEDS_TOKEN_LIMIT",
            field="max_tokens",
        )
    return most


def _told_of_logprobs(num_prompt_tokens: int, valid: ValidRequest) -> int | None:
    """As many as leave room to tell all log-probabilities at the end; None: any number."""
    of_prompt = 0 if valid.prompt_logprobs is None else num_prompt_tokens * (1 + valid.prompt_logprobs)
    left = MAX_LOGPROB_ENTRIES - of_prompt
    most = None if valid.logprobs is None else left // (valid.n * (1 + valid.logprobs))
    if left < 0 or (most is not None and most < _least(valid)):
        raise InvalidRequest(
            f"prompt_logprobs of {num_prompt_tokens} tokens and logprobs of {valid.n} x max_tokens "
            f"{_least(valid)} are more than {MAX_LOGPROB_ENTRIES} log-probabilities; ask for less",
            reason="TOO_MANY_LOGPROBS",
            field="prompt_logprobs" if valid.logprobs is None else "logprobs",
        )
    return most


def _least(valid: ValidRequest) -> int:
    return valid.max_tokens or 1
