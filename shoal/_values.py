"""What a fleet tells: values of the client, made from the protos in one place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gen.shoal.inference.v1 import inference_pb2 as pb


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """An end token, a stop token or a stop text."""
    LENGTH = "length"
    """max_tokens were generated, or the context is full."""
    CANCELLED = "cancelled"
    """By a client, or because nobody read it."""
    UNKNOWN = "unknown"
    """The fleet is newer than this library and has a reason that it does not know."""


class Priority(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class RequestState(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"
    PLACED = "placed"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one token's place: of that token, and of the most probable ones by id.

    Of the model's own distribution, before temperature, penalties, bias and cuts. `top` begins with the best.
    """

    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer. `index` is the index of its first token; `text` may be empty while a character is open.

    `logprobs` has one for each token, if they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several answers, as far as it was received. `finish_reason` is None until the end of all of them."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens` are those of the prompt that were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Phases of a request, in ms since it was accepted."""

    placed_ms: int
    first_token_ms: int
    finished_ms: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. `reasons` are those of all choices; `reason` is the first one's.

    `prompt_logprobs` are of the prompt's second token and those after it, if they were asked for.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    reasons: tuple[FinishReason, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """One entry of what was decided about a request, and when: `at_ms` since it was accepted."""

    at_ms: int
    what: str
    attempt: int
    detail: str


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """What the fleet knows of a request. `timings` are set once it has ended; `error` says why it failed."""

    request_id: str
    state: RequestState
    usage: Usage
    decisions: tuple[Decision, ...]
    model: str
    attempts: int
    timings: Timings | None
    error: str
    trace_id: str
    """Under which spans, where they are recorded, and log lines are found."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the fleet serves. Prompt and answer together take at most `context_tokens`."""

    name: str
    context_tokens: int
    vocabulary_tokens: int


PRIORITIES: Mapping[Priority, "pb.Priority.ValueType"] = {
    Priority.INTERACTIVE: pb.PRIORITY_INTERACTIVE,
    Priority.STANDARD: pb.PRIORITY_STANDARD,
    Priority.BATCH: pb.PRIORITY_BATCH,
}

_REASONS: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

_STATES: Mapping[int, RequestState] = {
    pb.REQUEST_STATE_QUEUED: RequestState.QUEUED,
    pb.REQUEST_STATE_PLACED: RequestState.PLACED,
    pb.REQUEST_STATE_RUNNING: RequestState.RUNNING,
    pb.REQUEST_STATE_FINISHED: RequestState.FINISHED,
    pb.REQUEST_STATE_CANCELLED: RequestState.CANCELLED,
    pb.REQUEST_STATE_EXPIRED: RequestState.EXPIRED,
    pb.REQUEST_STATE_FAILED: RequestState.FAILED,
    pb.REQUEST_STATE_QUARANTINED: RequestState.QUARANTINED,
}


def finished_of(finished: pb.Finished) -> Finished:
    """The end of all choices."""
    reasons = tuple(_REASONS.get(each, FinishReason.UNKNOWN) for each in (finished.reason, *finished.further_reasons))
    return Finished(
        reasons[0],
        _usage(finished.usage),
        _timings(finished.timings),
        reasons,
        logprobs_of(finished.prompt_logprobs),
    )


def logprobs_of(told: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of tokens, in order."""
    return tuple(TokenLogprobs(each.logprob, {top.token_id: top.logprob for top in each.top}) for each in told)


def state_of(state: int) -> RequestState:
    """A state's name."""
    return _STATES.get(state, RequestState.UNKNOWN)


def request_info_of(response: pb.GetRequestResponse) -> RequestInfo:
    """A request, as GetRequest tells it."""
    return RequestInfo(
        request_id=response.request_id,
        state=state_of(response.state),
        usage=_usage(response.usage),
        decisions=tuple(Decision(d.at_ms, d.what, d.attempt, d.detail) for d in response.decisions),
        model=response.model,
        attempts=response.attempts,
        timings=_timings(response.timings) if response.HasField("timings") else None,
        error=response.error,
        trace_id=response.trace_id,
    )


def models_of(response: pb.ListModelsResponse) -> list[Model]:
    """The models, by name."""
    return [Model(model.name, model.context_tokens, model.vocabulary_tokens) for model in response.models]


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _timings(timings: pb.Timings) -> Timings:
    return Timings(timings.placed_ms, timings.first_token_ms, timings.finished_ms)
