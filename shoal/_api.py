"""What users of the package get, loaded when they first ask for some of it."""

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
