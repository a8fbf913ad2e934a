"""Shoal's client: ask a fleet, stream the answer, and keep it when a gateway dies.

    client = shoal.Client("127.0.0.1:50051,127.0.0.1:50052")
    for delta in client.generate("Once upon a time", max_tokens=64):
        print(delta.text, end="", flush=True)

`AsyncClient` is the same for asyncio. Errors are `ShoalError` and its kinds.
"""

from services.common.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Exhausted,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
)
from services.common.tls.files import Tls
from shoal._async_client import AsyncClient, AsyncStream
from shoal._client import Client, Stream
from shoal._prompt import Message, ResponseFormat
from shoal._retries import RetryPolicy
from shoal._values import (
    Choice,
    Decision,
    Delta,
    Finished,
    FinishReason,
    Model,
    Priority,
    RequestInfo,
    RequestState,
    Timings,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "Decision",
    "Delta",
    "Exhausted",
    "FinishReason",
    "Finished",
    "Internal",
    "InvalidRequest",
    "Message",
    "Model",
    "NotFound",
    "PermissionDenied",
    "Priority",
    "RequestInfo",
    "RequestState",
    "ResponseFormat",
    "RetryPolicy",
    "ShoalError",
    "Stream",
    "Timings",
    "Tls",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
