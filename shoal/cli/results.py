"""An answer as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from services.common.errors import ShoalError
from shoal._async_client import AsyncStream
from shoal._values import Choice


def result_of(stream: AsyncStream) -> dict[str, Any]:
    """A whole answer; `choices` are there if there are several, log-probabilities if they were asked for."""
    finished, choices = stream.finished, stream.choices
    result = {
        "request_id": stream.request_id,
        **_choice(choices[0]),
        "usage": asdict(finished.usage) if finished else None,
        "timings": asdict(finished.timings) if finished else None,
    }
    if len(choices) > 1:
        result["choices"] = [_choice(choice) for choice in choices]
    if finished and finished.prompt_logprobs:
        result["prompt_logprobs"] = [asdict(told) for told in finished.prompt_logprobs]
    return result


def _choice(choice: Choice) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": str(choice.finish_reason) if choice.finish_reason else None,
    }
    if choice.logprobs:
        result["logprobs"] = [asdict(told) for told in choice.logprobs]
    return result


def error_of(error: Exception) -> Mapping[str, Any]:
    """A failure; a case that can't be read is an INVALID_ARGUMENT too."""
    if isinstance(error, ShoalError):
        return {"code": error.code.name, "reason": error.reason, "message": error.message}
    return {"code": "INVALID_ARGUMENT", "reason": "", "message": str(error)}
