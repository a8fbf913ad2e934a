"""The body of /v1/chat/completions, and the request that it is."""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import InvalidRequest
from services.gateway.http.fields import CommonFields, NotSupported, UInt32, common_request
from services.gateway.validation import MAX_MESSAGES

NAMES: Mapping[str, str] = {"input": "messages", "chat.messages": "messages"}
"""Of the proto's fields in this body."""
DEVELOPER, SYSTEM = "developer", "system"


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True, gc=False):
    """A part of a message; images, sounds and files are refused by their type."""

    text: str


class Message(Struct, forbid_unknown_fields=True, gc=False):
    """One message of a chat."""

    role: str
    content: str | list[TextPart]
    # Without effect.
    name: str | None = None
    # An answer of OpenAI's that is sent back has these, as null.
    refusal: NotSupported = None
    annotations: NotSupported = None
    audio: NotSupported = None
    function_call: NotSupported = None
    tool_calls: NotSupported = None
    tool_call_id: NotSupported = None


class ChatFields(CommonFields, kw_only=True, forbid_unknown_fields=True):
    """Every field that a body may have."""

    messages: Annotated[list[Message], Meta(max_length=MAX_MESSAGES)]
    max_completion_tokens: UInt32 | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    # Without effect.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Refused.
    audio: NotSupported = None
    function_call: NotSupported = None
    functions: NotSupported = None
    modalities: NotSupported = None
    moderation: NotSupported = None
    parallel_tool_calls: NotSupported = None
    prediction: NotSupported = None
    prompt_cache_options: NotSupported = None
    prompt_cache_retention: NotSupported = None
    reasoning_effort: NotSupported = None
    service_tier: NotSupported = None
    store: NotSupported = None
    tool_choice: NotSupported = None
    tools: NotSupported = None
    verbosity: NotSupported = None
    web_search_options: NotSupported = None


def chat_request(fields: ChatFields) -> inference_pb2.GenerateRequest:
    """The request, but for its id. Raises InvalidRequest."""
    request = common_request(fields)
    request.chat.SetInParent()  # No messages are a chat too, which the core refuses by its name.
    for message in fields.messages:
        request.chat.messages.add(role=_role(message.role), content=_text(message.content))
    if fields.max_completion_tokens is not None:
        if fields.max_tokens not in (None, fields.max_completion_tokens):
            raise _invalid(
                "max_tokens",
                f"is {fields.max_tokens}, but max_completion_tokens, its new name, is {fields.max_completion_tokens}; "
                "give one",
            )
        request.max_tokens = fields.max_completion_tokens
    if fields.top_logprobs is not None and not fields.logprobs:
        raise _invalid("top_logprobs", f"is {fields.top_logprobs}, but logprobs is not true; set it, or leave this out")
    if fields.logprobs:
        request.logprobs = fields.top_logprobs or 0
    return request


def _role(role: str) -> str:
    # OpenAI's later models call it so; it is the same place in a conversation.
    return SYSTEM if role == DEVELOPER else role


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _invalid(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {problem}", reason="INVALID_FIELD", field=field)
