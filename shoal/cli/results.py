"""An answer as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from services.common.errors import ShoalError
from shoal._async_client import AsyncStream


def result_of(stream: AsyncStream) -> dict[str, Any]:
    """A whole answer."""
    finished = stream.finished
    return {
        "request_id": stream.request_id,
        "text": stream.text,
        "token_ids": list(stream.token_ids),
        "finish_reason": str(finished.reason) if finished else None,
        "usage": asdict(finished.usage) if finished else None,
        "timings": asdict(finished.timings) if finished else None,
    }


def error_of(error: Exception) -> Mapping[str, Any]:
    """A failure; a case that can't be read is an INVALID_ARGUMENT too."""
    if isinstance(error, ShoalError):
        return {"code": error.code.name, "reason": error.reason, "message": error.message}
    return {"code": "INVALID_ARGUMENT", "reason": "", "message": str(error)}
