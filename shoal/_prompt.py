"""What may be asked: the arguments of `generate` and `count_tokens`, put into protos."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import InvalidRequest
from services.common.ids import new_request_id
from shoal._values import PRIORITIES, Priority


class Message(TypedDict):
    """One message of a chat. `role` is system, user or assistant."""

    role: str
    content: str


class ResponseFormat(TypedDict, total=False):
    """The form that an answer shall have. Give exactly one."""

    json_object: bool
    """Any JSON object."""
    json_schema: Mapping[str, Any] | str
    """JSON that fits this schema, given as a mapping or as its text."""
    regex: str
    """Text that matches, as a whole."""
    choices: Sequence[str]
    """One of these texts."""


class Options(TypedDict, total=False):
    """How `generate` answers. What is left out has the fleet's default; limits are in inference.proto."""

    model: str
    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    min_p: float
    seed: int
    """The same seed gives the same answers, choice by choice."""
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]
    """Added to the logits of these token ids."""
    n: int
    """Number of choices: see `Stream.choices`."""
    logprobs: int
    """Most probable tokens to tell of at each token's place; 0: the token's own log-probability alone."""
    prompt_logprobs: int
    """The same at each place of the prompt; they come with the end."""
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    deadline_ms: int
    request_id: str
    """Idempotency key. Left out, the library draws one, so that a retry never runs twice."""
    priority: Priority | str
    traceparent: str
    """W3C trace context of the call. Left out: OpenTelemetry's current span, where the program uses it."""
    response_format: ResponseFormat | Mapping[str, Any]


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip


def generate_request(
    prompt: str | None,
    messages: Sequence[Message | Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    options: Options,
) -> pb.GenerateRequest:
    """Put a question into its proto.

    Raises TypeError unless exactly one input is given, and InvalidRequest for what does not even fit its field: all
    other limits are checked by the fleet.
    """
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise TypeError("give exactly one of prompt, messages and token_ids")
    try:
        return _request(prompt, messages, token_ids, options)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"a value does not fit its field: {error}", reason="INVALID") from error


def count_tokens_request(
    prompt: str | None, messages: Sequence[Message | Mapping[str, str]] | None, model: str
) -> pb.CountTokensRequest:
    """Put text or a chat into its proto. Raises TypeError unless exactly one is given."""
    if (prompt is None) == (messages is None):
        raise TypeError("give exactly one of prompt and messages")
    request = pb.CountTokensRequest(model=model)
    if messages is None:
        request.prompt = prompt or ""
    else:
        request.chat.CopyFrom(_chat(messages))
    return request


def _request(
    prompt: str | None,
    messages: Sequence[Message | Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    options: Options,
) -> pb.GenerateRequest:
    stop = options.get("stop", ())
    request = pb.GenerateRequest(
        request_id=options.get("request_id") or new_request_id(),
        model=options.get("model", ""),
        sampling=_sampling(options),
        stop=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids", ()),
        ignore_eos=options.get("ignore_eos", False),
        deadline_ms=options.get("deadline_ms", 0),
        n=options.get("n", 0),
        logprobs=options.get("logprobs"),
        prompt_logprobs=options.get("prompt_logprobs"),
    )
    if "max_tokens" in options:
        request.max_tokens = options["max_tokens"]
    if "priority" in options:
        request.priority = PRIORITIES[Priority(options["priority"])]
    if "response_format" in options:
        request.response_format.CopyFrom(_response_format(options["response_format"]))
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.chat.CopyFrom(_chat(messages))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=token_ids or ()))
    return request


def _sampling(options: Options) -> pb.Sampling | None:
    given = {name: options[name] for name in _SAMPLING if name in options}  # type: ignore[literal-required]
    if "logit_bias" in options:
        # Keys that come out of JSON are strings.
        given["logit_bias"] = {int(token_id): bias for token_id, bias in dict(options["logit_bias"]).items()}
    return pb.Sampling(**given) if given else None


def _response_format(form: ResponseFormat | Mapping[str, Any]) -> pb.ResponseFormat:
    if len(form) != 1:
        raise ValueError(f"response_format has {sorted(form)}; give one of json_object, json_schema, regex, choices")
    given: dict[str, Any] = dict(form)
    if "choices" in given:
        given["choices"] = pb.ResponseFormat.Choices(texts=given["choices"])
    if not isinstance(given.get("json_schema", ""), str):
        given["json_schema"] = json.dumps(given["json_schema"])
    return pb.ResponseFormat(**given)


def _chat(messages: Sequence[Message | Mapping[str, str]]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages])
