"""Everything that can go wrong for a caller, and how gRPC says it.

ShoalError
├── InvalidRequest      INVALID_ARGUMENT     a field, its value and its limit
├── NotFound            NOT_FOUND            unknown model or request
├── AlreadyExists       ALREADY_EXISTS       request id reused with another payload
├── Unauthenticated     UNAUTHENTICATED
├── PermissionDenied    PERMISSION_DENIED    not yours
├── Exhausted           RESOURCE_EXHAUSTED   backlog or quota full; come back after retry_after_ms
├── DeadlineExceeded    DEADLINE_EXCEEDED
├── Cancelled           CANCELLED
├── Aborted             ABORTED              superseded, diverged or poisoned: see its reason
├── Unavailable         UNAVAILABLE          Redis away, no worker; come back after retry_after_ms
└── Internal            INTERNAL             a defect of Shoal
"""

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "shoal"


class ShoalError(Exception):
    """Base of all. `message` says what happened, the value, the limit and what to do; `reason` is one stable word."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, reason: str = "", field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidRequest(ShoalError):
    """A field that cannot be taken; nothing was stored."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ShoalError):
    """An unknown model or request."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ShoalError):
    """The request id is in use with another payload."""

    code = grpc.StatusCode.ALREADY_EXISTS


class Unauthenticated(ShoalError):
    """No credentials, or none that are known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ShoalError):
    """Known, but not allowed."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Exhausted(ShoalError):
    """A limit is reached. Come back after `retry_after_ms`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(ShoalError):
    """The request's time ran out."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ShoalError):
    """The request was cancelled."""

    code = grpc.StatusCode.CANCELLED


class Aborted(ShoalError):
    """The stream or request can't go on: reason SUPERSEDED, DIVERGED or POISONED."""

    code = grpc.StatusCode.ABORTED


class Unavailable(ShoalError):
    """Something needed is away for now. Come back after `retry_after_ms`."""

    code = grpc.StatusCode.UNAVAILABLE


class Internal(ShoalError):
    """A defect of Shoal itself."""

    code = grpc.StatusCode.INTERNAL


ERRORS: Mapping[grpc.StatusCode, type[ShoalError]] = {
    kind.code: kind
    for kind in (
        InvalidRequest, NotFound, AlreadyExists, Unauthenticated, PermissionDenied, Exhausted, DeadlineExceeded,
        Cancelled, Aborted, Unavailable, Internal,
    )
}  # fmt: skip


def to_status(error: ShoalError) -> status_pb2.Status:
    """The google.rpc status of an error: its code, its message, and what a program needs as details."""
    details: list[any_pb2.Any] = []

    def add(
        message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
    ) -> None:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)

    if error.reason:
        add(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        add(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        add(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details)


def from_rpc(error: grpc.RpcError) -> ShoalError:
    """The error that a service of ours (or the wire) answered with. Unknown codes become Internal."""
    code = error.code()
    metadata = error.trailing_metadata() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    reason, field_name, retry_after_ms = _details(metadata)
    kind = ERRORS.get(code, Internal)
    return kind(str(error.details() or code.name), reason=reason, field=field_name, retry_after_ms=retry_after_ms)


def from_status(serialized: bytes) -> ShoalError:
    """The error that `to_status` made this of, serialized."""
    status = status_pb2.Status.FromString(serialized)
    kind = next((kind for code, kind in ERRORS.items() if code.value[0] == status.code), Internal)
    reason, field_name, retry_after_ms = _told(status)
    return kind(status.message, reason=reason, field=field_name, retry_after_ms=retry_after_ms)


def _details(metadata: object) -> tuple[str, str, int]:
    for key, value in metadata or ():  # type: ignore[attr-defined]
        if key == "grpc-status-details-bin":
            return _told(status_pb2.Status.FromString(value))
    return "", "", 0


def _told(status: status_pb2.Status) -> tuple[str, str, int]:
    reason, field_name, retry_after_ms = "", "", 0
    for detail in status.details:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field_name = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    return reason, field_name, retry_after_ms
