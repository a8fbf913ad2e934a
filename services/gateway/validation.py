"""A caller's request, checked whole: proto in, `ValidRequest` out, or one InvalidRequest naming field, value, limit.

Nothing behind this module checks again, but for what is known only after encoding: whether it fits (`max_tokens.py`).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gen.shoal.fleet.v1 import tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import InvalidRequest, NotFound
from services.common.record.history import NOTHING, Held
from services.gateway.model import Model

MAX_MESSAGES = 1_024
MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_SCHEMA_BYTES = 1 << 16
MAX_REGEX_BYTES = 4_096
MAX_FORMAT_CHOICES = 1_024
MAX_CHOICES_BYTES = 1 << 16
MAX_LOGIT_BIASES = 1_024
MAX_TOP_K = 1_000_000
MAX_TEMPERATURE = 100
MAX_BIAS = 100
MAX_OCCURRENCE_PENALTY = 2
MAX_REPETITION_PENALTY = 10
MAX_SHOWN_CHARACTERS = 60
ROLES = ("system", "user", "assistant")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request whose every field is within its limits, defaults filled in."""

    request_id: str
    """Empty: to be drawn."""
    text: tokenizer_pb2.EncodeRequest | None
    """What is to be encoded; None: the prompt is `token_ids`."""
    token_ids: tuple[int, ...]
    sampling: inference_pb2.Sampling
    """Every default filled in, but for a seed that is to be drawn."""
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    """The model's own included, unless the caller ignores them."""
    n: int
    logprobs: int | None
    """Most probable tokens to report with each token; None: no log-probabilities."""
    prompt_logprobs: int | None
    """The same with each prompt token."""
    response_format: inference_pb2.ResponseFormat | None
    """Within its static limits; whether it can be kept, the tokenizer says."""
    priority: inference_pb2.Priority.ValueType
    time_to_first_token_ms: int
    deadline_ms: int
    """From acceptance; 0: none."""
    digest: str
    """Of all that the caller said, but for the id."""


def validate(request: inference_pb2.GenerateRequest, model: Model) -> ValidRequest:
    """Check every field that can be judged before encoding. Raises InvalidRequest, NotFound for another model."""
    if request.request_id:
        check_request_id(request.request_id)
    check_model(request.model, model)
    text, token_ids = _input(request, model)
    n = _choices(request.n)
    return ValidRequest(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        sampling=_sampling(request.sampling, model),
        max_tokens=_max_tokens(request, model),
        stop=_stop(request.stop),
        stop_token_ids=_stop_token_ids(request, model),
        n=n,
        logprobs=_logprobs(request, "logprobs"),
        prompt_logprobs=_logprobs(request, "prompt_logprobs"),
        response_format=_response_format(request),
        priority=_priority(request.priority),
        time_to_first_token_ms=request.time_to_first_token_ms,
        deadline_ms=request.deadline_ms,
        digest=digest(request),
    )


def check_request_id(request_id: str) -> str:
    """Return an id that may be one. Raises InvalidRequest."""
    if not REQUEST_ID.fullmatch(request_id):
        raise _invalid("request_id", _shown(request_id), "expected 1 to 128 of A-Z a-z 0-9 . _ : -")
    return request_id


def check_model(name: str, model: Model) -> None:
    """Raise NotFound unless the name is empty or the model's."""
    if name not in ("", model.name):
        raise NotFound(
            f"model {_shown(name)} is not served here; {model.name!r} is (see ListModels)",
            reason="MODEL_UNKNOWN",
            field="model",
        )


def encodable(request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest) -> tokenizer_pb2.EncodeRequest:
    """A prompt or chat, checked, as the tokenizer takes it. Raises InvalidRequest."""
    if request.WhichOneof("input") == "prompt":
        if not request.prompt:
            raise _invalid("prompt", "empty", "give at least 1 character")
        return tokenizer_pb2.EncodeRequest(prompt=request.prompt)
    if request.WhichOneof("input") != "chat":
        raise _invalid("input", "absent", "give one of prompt, chat or token_ids")
    messages = request.chat.messages
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _invalid("chat.messages", f"of length {len(messages)}", f"give 1 to {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise _invalid(f"chat.messages[{index}].role", _shown(message.role), f"expected one of {', '.join(ROLES)}")
    return tokenizer_pb2.EncodeRequest(chat=request.chat)


def prompt_too_long(num_prompt_tokens: int, context_tokens: int) -> InvalidRequest:
    """What tells a caller that its prompt leaves no room in the context for a token."""
    return InvalidRequest(
        f"the prompt has {num_prompt_tokens} tokens; with at least 1 generated token it must fit the context of "
        f"{context_tokens} tokens. Shorten it by {num_prompt_tokens + 1 - context_tokens}",
        reason="PROMPT_TOO_LONG",
        field="input",
    )


def held_by_client(request: inference_pb2.AttachRequest, model: Model) -> tuple[Held, ...]:
    """What a client that attaches says it holds, by choice from choice 0. Raises InvalidRequest."""
    held = {0: _held("", request.from_index, request.held_token_ids, model)}
    for position, point in enumerate(request.points):
        prefix = f"points[{position}]."
        if not 1 <= point.choice < MAX_CHOICES or point.choice in held:
            raise _invalid(
                f"{prefix}choice", str(point.choice), f"expected each of 1 to {MAX_CHOICES - 1} at most once"
            )
        held[point.choice] = _held(prefix, point.from_index, point.held_token_ids, model)
    return tuple(held.get(choice, NOTHING) for choice in range(max(held) + 1))


def digest(request: inference_pb2.GenerateRequest) -> str:
    """SHA-256 of what the caller asked: equal for equal requests, whatever their ids and however they were encoded."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.DiscardUnknownFields()
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _input(
    request: inference_pb2.GenerateRequest, model: Model
) -> tuple[tokenizer_pb2.EncodeRequest | None, tuple[int, ...]]:
    if request.WhichOneof("input") != "token_ids":
        return encodable(request), ()
    token_ids = request.token_ids.ids
    if not token_ids:
        raise _invalid("token_ids.ids", "empty", "give at least 1 token")
    if len(token_ids) + 1 > model.context_tokens:
        # Before each is looked at: a message has room for millions.
        raise prompt_too_long(len(token_ids), model.context_tokens)
    _check_tokens("token_ids.ids", token_ids, model)
    return None, tuple(token_ids)


def _sampling(asked: inference_pb2.Sampling, model: Model) -> inference_pb2.Sampling:
    filled = inference_pb2.Sampling(
        temperature=asked.temperature if asked.HasField("temperature") else 1.0,
        top_p=asked.top_p if asked.HasField("top_p") else 1.0,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed if asked.HasField("seed") else None,
        repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=asked.logit_bias,
    )
    # Written so that a NaN is refused too: it fails every comparison.
    if not 0 <= filled.temperature <= MAX_TEMPERATURE:
        raise _invalid("sampling.temperature", str(filled.temperature), f"expected 0 (greedy) to {MAX_TEMPERATURE}")
    if not 0 < filled.top_p <= 1:
        raise _invalid("sampling.top_p", str(filled.top_p), "expected above 0, and at most 1 (off)")
    if filled.top_k > MAX_TOP_K:
        raise _invalid("sampling.top_k", str(filled.top_k), f"expected 0 (off) to {MAX_TOP_K}")
    if not 0 <= filled.min_p <= 1:
        raise _invalid("sampling.min_p", str(filled.min_p), "expected 0 (off) to 1")
    if not 0 < filled.repetition_penalty <= MAX_REPETITION_PENALTY:
        limit = f"expected above 0, and at most {MAX_REPETITION_PENALTY}"
        raise _invalid("sampling.repetition_penalty", str(filled.repetition_penalty), limit)
    for name in ("frequency_penalty", "presence_penalty"):
        penalty = getattr(filled, name)
        if not -MAX_OCCURRENCE_PENALTY <= penalty <= MAX_OCCURRENCE_PENALTY:
            limit = f"expected -{MAX_OCCURRENCE_PENALTY} to {MAX_OCCURRENCE_PENALTY}"
            raise _invalid(f"sampling.{name}", str(penalty), limit)
    _check_biases(filled.logit_bias, model)
    return filled


def _check_biases(biases: Mapping[int, float], model: Model) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise _invalid("sampling.logit_bias", f"of {len(biases)} entries", f"give at most {MAX_LOGIT_BIASES}")
    for token_id, bias in biases.items():
        if token_id >= model.vocabulary_tokens:
            limit = f"token ids are below {model.vocabulary_tokens}"
            raise _invalid(f"sampling.logit_bias[{token_id}]", f"for token {token_id}", limit)
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _invalid(f"sampling.logit_bias[{token_id}]", str(bias), f"expected -{MAX_BIAS} to {MAX_BIAS}")


def _logprobs(request: inference_pb2.GenerateRequest, field: Literal["logprobs", "prompt_logprobs"]) -> int | None:
    if not request.HasField(field):
        return None
    num_top: int = getattr(request, field)
    if num_top > MAX_LOGPROBS:
        raise _invalid(field, str(num_top), f"expected at most {MAX_LOGPROBS}")
    return num_top


def _response_format(request: inference_pb2.GenerateRequest) -> inference_pb2.ResponseFormat | None:
    if not request.HasField("response_format"):
        return None
    form = request.response_format
    match form.WhichOneof("format"):
        case "json_object":
            if not form.json_object:
                raise _invalid("response_format.json_object", "false", "expected true, or no response_format")
        case "json_schema":
            _check_bytes("response_format.json_schema", form.json_schema, MAX_SCHEMA_BYTES)
        case "regex":
            _check_bytes("response_format.regex", form.regex, MAX_REGEX_BYTES)
        case "choices":
            _check_texts(form.choices.texts)
        case _:
            limit = "give one of json_object, json_schema, regex, choices"
            raise _invalid("response_format", "of no form", limit)
    return form


def _check_texts(texts: Sequence[str]) -> None:
    field = "response_format.choices.texts"
    if not 1 <= len(texts) <= MAX_FORMAT_CHOICES:
        raise _invalid(field, f"of length {len(texts)}", f"give 1 to {MAX_FORMAT_CHOICES}")
    if "" in texts:
        raise _invalid(f"{field}[{list(texts).index('')}]", "empty", "give at least 1 character")
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > MAX_CHOICES_BYTES:
        raise _invalid(field, f"of {num_bytes} bytes", f"give at most {MAX_CHOICES_BYTES} bytes together")


def _check_bytes(field: str, text: str, most: int) -> None:
    num_bytes = len(text.encode())
    if not 1 <= num_bytes <= most:
        raise _invalid(field, f"of {num_bytes} bytes", f"give 1 to {most} bytes")


def _choices(n: int) -> int:
    if n > MAX_CHOICES:
        raise _invalid("n", str(n), f"expected at most {MAX_CHOICES}")
    return n or 1


def _max_tokens(request: inference_pb2.GenerateRequest, model: Model) -> int | None:
    if not request.HasField("max_tokens"):
        return None
    if not 1 <= request.max_tokens < model.context_tokens:
        limit = f"expected 1 to {model.context_tokens - 1} (the context is {model.context_tokens} tokens)"
        raise _invalid("max_tokens", str(request.max_tokens), limit)
    return request.max_tokens


def _stop(texts: Sequence[str]) -> tuple[str, ...]:
    if len(texts) > MAX_STOPS:
        raise _invalid("stop", f"of length {len(texts)}", f"give at most {MAX_STOPS}")
    for index, text in enumerate(texts):
        num_bytes = len(text.encode())
        if not 1 <= num_bytes <= MAX_STOP_BYTES:
            raise _invalid(f"stop[{index}]", f"of {num_bytes} bytes", f"give 1 to {MAX_STOP_BYTES} bytes")
    return tuple(texts)


def _stop_token_ids(request: inference_pb2.GenerateRequest, model: Model) -> tuple[int, ...]:
    asked = request.stop_token_ids
    if len(asked) > MAX_STOP_TOKENS:
        raise _invalid("stop_token_ids", f"of length {len(asked)}", f"give at most {MAX_STOP_TOKENS}")
    _check_tokens("stop_token_ids", asked, model)
    own = () if request.ignore_eos else model.end_token_ids
    return tuple(dict.fromkeys((*asked, *own)))


def _priority(priority: inference_pb2.Priority.ValueType) -> inference_pb2.Priority.ValueType:
    if priority not in inference_pb2.Priority.values():
        raise _invalid("priority", str(priority), "expected a value of Priority")
    return priority or inference_pb2.PRIORITY_STANDARD


def _held(prefix: str, from_index: int, tokens: Sequence[int], model: Model) -> Held:
    if from_index > model.context_tokens:
        limit = f"an answer has at most {model.context_tokens} tokens"
        raise _invalid(f"{prefix}from_index", str(from_index), limit)
    if len(tokens) > from_index:
        limit = f"expected at most from_index, {from_index}"
        raise _invalid(f"{prefix}held_token_ids", f"of length {len(tokens)}", limit)
    _check_tokens(f"{prefix}held_token_ids", tokens, model)
    return Held(from_index, tuple(tokens))


def _check_tokens(field: str, tokens: Sequence[int], model: Model) -> None:
    largest = max(tokens, default=0)
    if largest >= model.vocabulary_tokens:
        index = list(tokens).index(largest)
        raise _invalid(f"{field}[{index}]", str(largest), f"token ids are below {model.vocabulary_tokens}")


def _invalid(field: str, value: str, limit: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}; {limit}", reason="INVALID_FIELD", field=field)


def _shown(value: str) -> str:
    cut = repr(value[:MAX_SHOWN_CHARACTERS])
    return cut if len(value) <= MAX_SHOWN_CHARACTERS else f"{cut}... ({len(value)} characters)"
