"""Errors as OpenAI's API tells them: a status, and {"error": {message, type, param, code}}.

The core names fields as the proto does; `renamed` gives them the names that the JSON body has.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

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

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""As nginx has it; no registered status says that a request was cancelled."""
INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CODES: Mapping[str, str] = {
    "MODEL_UNKNOWN": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "CONTEXT_EXCEEDED": "context_length_exceeded",
}
"""OpenAI's words, by our reasons; any other reason is told in lower case."""
COMMON_NAMES: Mapping[str, str] = {
    "request_id": "Idempotency-Key",
    "response_format.json_schema": "response_format.json_schema.schema",
}
SAMPLING = "sampling."

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Told:
    """How a kind of error is told."""

    status: int
    type: str


TOLD: Mapping[type[ShoalError], Told] = {
    InvalidRequest: Told(HTTPStatus.BAD_REQUEST, INVALID_REQUEST),
    NotFound: Told(HTTPStatus.NOT_FOUND, INVALID_REQUEST),
    AlreadyExists: Told(HTTPStatus.CONFLICT, INVALID_REQUEST),
    Unauthenticated: Told(HTTPStatus.UNAUTHORIZED, "authentication_error"),
    PermissionDenied: Told(HTTPStatus.FORBIDDEN, "permission_error"),
    Exhausted: Told(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error"),
    DeadlineExceeded: Told(HTTPStatus.GATEWAY_TIMEOUT, SERVER_ERROR),
    Cancelled: Told(CLIENT_CLOSED_REQUEST, INVALID_REQUEST),
    Aborted: Told(HTTPStatus.CONFLICT, SERVER_ERROR),
    Unavailable: Told(HTTPStatus.SERVICE_UNAVAILABLE, SERVER_ERROR),
    Internal: Told(HTTPStatus.INTERNAL_SERVER_ERROR, SERVER_ERROR),
}


class HttpRefusal(Exception):
    """What HTTP itself refuses: a path, a method, a body that is no JSON document of a size that is taken."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def renamed(error: ShoalError, names: Mapping[str, str]) -> ShoalError:
    """The same error, its field called as in the JSON body. `names`: those of the endpoint, by proto field."""
    name = _name(error.field, {**COMMON_NAMES, **names})
    if name == error.field:
        return error
    message = error.message.replace(error.field, name, 1)
    return type(error)(message, reason=error.reason, field=name, retry_after_ms=error.retry_after_ms)


def error_object(error: ShoalError) -> dict[str, Any]:
    """The JSON body of an error."""
    code = CODES.get(error.reason, error.reason.lower()) or None
    return _object(error.message, TOLD[type(error)].type, error.field or None, code)


def error_response(error: ShoalError, request_id: str = "") -> web.Response:
    """The whole response. `request_id`: of the accepted request that the error is about."""
    # OpenAI's clients try again after 408, 409, 429 and 5xx by themselves, unless they are told whether that helps.
    headers = {"x-should-retry": "true" if error.retry_after_ms else "false"}
    if error.retry_after_ms:
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if request_id:
        headers["x-request-id"] = request_id
    return _response(TOLD[type(error)].status, error_object(error), headers)


def defect() -> Internal:
    """What a caller is told of an error that nobody foresaw."""
    return Internal("an internal error; it is in the service's log", reason="INTERNAL")


@web.middleware
async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error that leaves a handler before its response has begun."""
    try:
        return await handler(request)
    except ShoalError as error:
        return error_response(error)
    except HttpRefusal as refusal:
        return _response(refusal.status, _object(refusal.message, INVALID_REQUEST, None, refusal.code))
    except web.HTTPMethodNotAllowed as refusal:
        allowed = ", ".join(sorted(refusal.allowed_methods))
        message = f"{request.method} is not served at {request.path}; {allowed} is"
        body = _object(message, INVALID_REQUEST, None, "method_not_allowed")
        return _response(refusal.status, body, {"Allow": allowed})
    except web.HTTPNotFound as refusal:
        message = f"nothing is served at {request.path[:200]}; docs/http.md lists the paths"
        return _response(refusal.status, _object(message, INVALID_REQUEST, None, "unknown_path"))
    except Exception as error:
        logger.error("an HTTP call failed by a defect", exc_info=error)
        return error_response(defect())


def _name(field: str, names: Mapping[str, str]) -> str:
    for known, name in names.items():
        if field == known or field.startswith(known + "["):
            return name + field[len(known) :]
    return field.removeprefix(SAMPLING)


def _object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> web.Response:
    encoded = msgspec.json.encode(body)
    return web.Response(status=status, body=encoded, content_type="application/json", headers=headers)
