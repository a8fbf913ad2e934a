"""A request's JSON body: read within its bounds, and decoded into the fields that an endpoint declares."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from services.common.errors import Exhausted, InvalidRequest
from services.gateway.admission import RETRY_AFTER_MS
from services.gateway.http.errors import HttpRefusal

WITHIN_S = 30.0
NUM_LARGEST = 32
"""Bodies of the largest size that may be read, or wait to be accepted, at once: 16 MiB by default."""
JSON = "application/json"
MAX_SHOWN_CHARACTERS = 100
_AT_PATH = re.compile(r"(?s)(?P<problem>.*) - at (?P<key>`key` in )?`\$\.?(?P<path>.*)`")
_FIELD = re.compile(r"(?s)Object (?:contains unknown|missing required) field `(?P<name>.*)`")

F = TypeVar("F")


class Bodies:
    """Bodies that are read, or whose requests are not accepted yet: all of them together are bounded."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of one; NUM_LARGEST times that of all."""
        self.max_bytes = max_bytes
        self._left_bytes = NUM_LARGEST * max_bytes

    @contextmanager
    def room(self) -> Iterator["Room"]:
        """Room for one body, given back with the block's end."""
        room = Room(self)
        try:
            yield room
        finally:
            self._left_bytes += room.num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises Exhausted if so much is not left."""
        if num_bytes > self._left_bytes:
            raise Exhausted(
                f"bodies that are being read here have {NUM_LARGEST * self.max_bytes} bytes, the most; come back later",
                reason="TOO_MANY_BODIES",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._left_bytes -= num_bytes


class Room:
    """What one body has taken."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.num_bytes = 0

    def check(self, num_bytes: int) -> None:
        """Raises HttpRefusal if a body of this size is too large."""
        if num_bytes > self._bodies.max_bytes:
            raise _too_large(self._bodies.max_bytes)

    def grow(self, num_bytes: int) -> None:
        """So much was read. Raises HttpRefusal if this body is too large, Exhausted if all are together."""
        self.check(self.num_bytes + num_bytes)
        self._bodies.take(num_bytes)
        self.num_bytes += num_bytes


async def read(request: web.Request, room: Room) -> bytes:
    """The whole body. Raises HttpRefusal: 408, 413, 415; Exhausted.

    Not `request.read()`, which keeps the body for as long as its answer is streamed.
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if request.content_type != JSON or encoding != "identity":
        raise HttpRefusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            f"the body is {request.content_type[:80]!r}, encoding {encoding[:80]!r}; send {JSON} as it is",
        )
    room.check(request.content_length or 0)
    body = bytearray()
    try:
        async with asyncio.timeout(WITHIN_S):
            while chunk := await request.content.readany():
                room.grow(len(chunk))
                body += chunk
    except TimeoutError as error:
        message = f"the body did not come within {WITHIN_S:.0f} s; send it at once"
        raise HttpRefusal(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message) from error
    return bytes(body)


def decode(body: bytes, decoder: "msgspec.json.Decoder[F]") -> F:
    """The fields. Raises InvalidRequest, which names the first that is unknown, missing, or of another type.

    It holds the event loop: 0.3 to 1 ms for 512 KiB of text, 4 ms for as much of token ids, the slowest there is.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from error
    except (ValueError, RecursionError) as error:
        message = f"the body of {len(body)} bytes is no JSON document: {error}"
        raise InvalidRequest(message, reason="MALFORMED_JSON") from error


def _misfit(told: str) -> InvalidRequest:
    """The library's words for a document that is not as declared, with the field's name apart."""
    at = _AT_PATH.fullmatch(told)
    problem, path = (at["problem"], at["path"]) if at else (told, "")
    named = _FIELD.fullmatch(problem)
    if named:
        field = _shown(f"{path}.{named['name']}" if path else named["name"])
        if problem.startswith("Object missing"):
            return InvalidRequest(f"{field} is missing; it is required", reason="MISSING_FIELD", field=field)
        return InvalidRequest(
            f"{field} is unknown; leave it out (docs/http.md lists the fields)", reason="UNKNOWN_FIELD", field=field
        )
    field = _shown(path)
    if problem.startswith("Expected `null`"):
        message = f"{field} is not supported; leave it out (docs/http.md lists the fields)"
        return InvalidRequest(message, reason="NOT_SUPPORTED", field=field)
    of_key = "a key of " if at and at["key"] else ""
    return InvalidRequest(
        f"{of_key}{field or 'the body'} does not fit: {_shown(problem)}", reason="INVALID_FIELD", field=field
    )


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _too_large(max_bytes: int) -> HttpRefusal:
    return HttpRefusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body_too_large",
        f"the body is over {max_bytes} bytes, the most that is taken; send less (--http-max-body-bytes is the limit)",
    )
