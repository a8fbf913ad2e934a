"""The body of /v1/completions, and the request that it is."""

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import InvalidRequest
from services.gateway.http.fields import CommonFields, NotSupported, UInt32, common_request

NAMES: Mapping[str, str] = {"input": "prompt", "token_ids.ids": "prompt"}
"""Of the proto's fields in this body."""
MAX_PROMPT_IDS = 131_072
"""More would hold the event loop over 5 ms while they became a proto."""
DEFAULT_MAX_TOKENS = 16
"""As OpenAI's."""


class CompletionFields(CommonFields, kw_only=True, forbid_unknown_fields=True):
    """Every field that a body may have."""

    prompt: str | Annotated[list[str | UInt32], Meta(max_length=MAX_PROMPT_IDS)]
    logprobs: UInt32 | None = None
    echo: bool | None = None
    # Refused, but for what is no demand.
    best_of: UInt32 | None = None
    suffix: NotSupported = None


def completion_request(fields: CompletionFields) -> inference_pb2.GenerateRequest:
    """The request, but for its id. Raises InvalidRequest."""
    if fields.best_of not in (None, fields.n or 1):
        raise _not_supported("best_of", str(fields.best_of))
    request = common_request(fields)
    _set_input(request, fields.prompt)
    if fields.logprobs is not None:
        request.logprobs = fields.logprobs
        if fields.echo:
            if fields.stream:
                # The core tells a prompt's at the end.
                raise _not_supported("stream", "true with echo and logprobs")
            request.prompt_logprobs = fields.logprobs
    if fields.max_tokens is None:
        request.max_tokens = DEFAULT_MAX_TOKENS
    return request


def _set_input(request: inference_pb2.GenerateRequest, prompt: str | list[str | int]) -> None:
    if isinstance(prompt, str):
        request.prompt = prompt
    elif len(prompt) == 1 and isinstance(prompt[0], str):
        request.prompt = prompt[0]
    else:
        request.token_ids.SetInParent()  # An empty list is one too, which the core refuses by its name.
        try:
            # Not looked at one by one in Python: there may be 100,000.
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
        except TypeError as error:
            raise InvalidRequest(
                f"prompt is a list of {len(prompt)}, texts among them; give one text, or token ids. "
                "Send further prompts as requests of their own",
                reason="SEVERAL_PROMPTS",
                field="prompt",
            ) from error


def _not_supported(field: str, value: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}; it is not supported, leave it out", reason="NOT_SUPPORTED", field=field)
