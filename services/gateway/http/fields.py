"""Fields that the bodies of both endpoints have, and what they become in the proto.

Only what the proto cannot hold is refused here; limits of values are the core's (services/gateway/validation.py). Those
of lengths are taken from there too, for what is longer would hold the event loop while it became a proto.
docs/http.md tells users of each field.
"""

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from msgspec import Meta, Raw, Struct

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import InvalidRequest
from services.gateway.validation import MAX_LOGIT_BIASES, MAX_STOP_TOKENS, MAX_STOPS

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopK = Annotated[int, Meta(ge=-1, le=2**32 - 1)]
NotSupported: TypeAlias = None
"""Type of a field of OpenAI's that is not done here: taken as null only."""

PRIORITIES: Mapping[str, inference_pb2.Priority.ValueType] = {
    "interactive": inference_pb2.PRIORITY_INTERACTIVE,
    "standard": inference_pb2.PRIORITY_STANDARD,
    "batch": inference_pb2.PRIORITY_BATCH,
}

# `gc=False` where many may come in one body: they hold no cycles, and tracking them made decoding 5 times as slow.


class StreamOptions(Struct, forbid_unknown_fields=True, gc=False):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """No constraint."""


class JsonObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchema(Struct, forbid_unknown_fields=True):
    """A JSON Schema and what OpenAI has beside it."""

    schema: Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON that fits a schema."""

    json_schema: JsonSchema


class CommonFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints. Null is the same as absent."""

    model: str | None = None
    max_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: UInt32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[UInt32, float], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    # Not OpenAI's.
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    top_k: TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[UInt32], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    priority: str | None = None
    time_to_first_token_ms: UInt32 | None = None
    deadline_ms: UInt32 | None = None
    # Without effect.
    user: str | None = None
    metadata: dict[str, str] | None = None


def common_request(fields: CommonFields) -> inference_pb2.GenerateRequest:
    """A request of everything but its input. Raises InvalidRequest."""
    return inference_pb2.GenerateRequest(
        model=fields.model or "",
        sampling=_sampling(fields),
        max_tokens=fields.max_tokens,
        stop=[fields.stop] if isinstance(fields.stop, str) else fields.stop,
        stop_token_ids=fields.stop_token_ids,
        n=fields.n or 0,
        ignore_eos=fields.ignore_eos or False,
        response_format=_response_format(fields),
        priority=_priority(fields.priority),
        time_to_first_token_ms=fields.time_to_first_token_ms or 0,
        deadline_ms=fields.deadline_ms or 0,
    )


def _sampling(fields: CommonFields) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(
        temperature=fields.temperature,
        top_p=fields.top_p,
        # -1 is how vLLM's users write "off".
        top_k=max(0, fields.top_k or 0),
        min_p=fields.min_p or 0,
        # OpenAI's seeds are signed, the proto's are not.
        seed=None if fields.seed is None else fields.seed % 2**64,
        repetition_penalty=fields.repetition_penalty,
        frequency_penalty=fields.frequency_penalty or 0,
        presence_penalty=fields.presence_penalty or 0,
        logit_bias=fields.logit_bias,
    )


def _response_format(fields: CommonFields) -> inference_pb2.ResponseFormat | None:
    match fields.response_format:
        case JsonObjectFormat():
            return inference_pb2.ResponseFormat(json_object=True)
        case JsonSchemaFormat(json_schema):
            try:
                return inference_pb2.ResponseFormat(json_schema=bytes(json_schema.schema).decode())
            except UnicodeDecodeError as error:
                field = "response_format.json_schema.schema"
                raise InvalidRequest(f"{field} is no UTF-8: {error}", reason="MALFORMED_JSON", field=field) from error
    return None


def _priority(name: str | None) -> inference_pb2.Priority.ValueType:
    if name is None:
        return inference_pb2.PRIORITY_UNSPECIFIED
    if name not in PRIORITIES:
        raise InvalidRequest(
            f"priority is {name[:60]!r}; expected one of {', '.join(PRIORITIES)}",
            reason="INVALID_FIELD",
            field="priority",
        )
    return PRIORITIES[name]
