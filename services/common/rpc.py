"""A service's gRPC server: health, reflection, typed errors, and a graceful end. And channels between services."""

import asyncio
import inspect
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from services.common.errors import Internal, InvalidRequest, ShoalError, to_status
from services.common.tls.credentials import channel_credentials
from services.common.tls.options import FleetTls

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A stream on which only the server talks is pinged too, or a frozen peer is never noticed.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A name may stand for several processes: calls go to all of them in turn, not to the first alone.
    ("grpc.lb_policy_name", "round_robin"),
)
SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two processes on one port would share its connections silently; a port that is taken shall be an error.
    ("grpc.so_reuseport", 0),
)

# A service forks only to start a program, in which nothing of gRPC goes on. By default gRPC holds all its threads at
# each fork, or says that it could not. Read when gRPC begins its work: with the first server or channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

LIVE = "live"
"""A name in health checks that is SERVING as long as the event loop answers, whatever is missing to take work."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns a ShoalError into its gRPC status, and anything else into INTERNAL, logged. The only place that does."""

    def __init__(self) -> None:
        self._statuses = _Statuses()
        self._wrapped: dict[str, Any] = {}
        """By method. Methods are those of the services, so there are few."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler, by its kind of call; once, since a refusal shall cost little more than gRPC's own part."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = _wrap(handler, self._statuses)
        return wrapped


class _Statuses:
    """The statuses of errors. The last one is kept: a flood is refused call by call in the same words."""

    def __init__(self) -> None:
        self._words: tuple[object, ...] = ()
        self._status: Any = None

    def of(self, error: Exception) -> Any:
        if not isinstance(error, ShoalError):
            logger.error("a call failed by a defect", exc_info=error)
            error = Internal("an internal error; it is in the service's log", reason="INTERNAL")
        words = (type(error), error.message, error.reason, error.field, error.retry_after_ms)
        if words != self._words:
            self._words, self._status = words, rpc_status.to_status(to_status(error))
        return self._status


def _wrap(handler: Any, statuses: _Statuses) -> Any:
    if handler.request_streaming:
        if handler.response_streaming:
            wrapped = _streaming(handler.stream_stream, _as_is, statuses)
            factory = grpc.stream_stream_rpc_method_handler
        else:
            wrapped, factory = _unary(handler.stream_unary, _as_is, statuses), grpc.stream_unary_rpc_method_handler
        return factory(wrapped, handler.request_deserializer, handler.response_serializer)
    # One request is decoded in here: bytes that are no message get a status of ours, not UNKNOWN and a traceback.
    decode = _decoding(handler.request_deserializer)
    if handler.response_streaming:
        # A coroutine, as health's Watch, writes its responses by its context.
        wrap = _unary if inspect.iscoroutinefunction(handler.unary_stream) else _streaming
        wrapped, factory = wrap(handler.unary_stream, decode, statuses), grpc.unary_stream_rpc_method_handler
    else:
        wrapped, factory = _unary(handler.unary_unary, decode, statuses), grpc.unary_unary_rpc_method_handler
    return factory(wrapped, None, handler.response_serializer)


def _as_is(request: Any) -> Any:
    return request


def _decoding(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def decode(payload: bytes) -> Any:
        try:
            return deserializer(payload) if deserializer else payload
        except DecodeError as error:
            raise InvalidRequest(
                f"{len(payload)} bytes are no message of this method: {error}", reason="MALFORMED_MESSAGE"
            ) from error

    return decode


def _unary(
    method: Callable[..., Awaitable[Any]], decode: Callable[[Any], Any], statuses: _Statuses
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(decode(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: every error gets a status
            # Not set as below: gRPC would send an empty message in front of the status.
            await context.abort_with_status(statuses.of(error))

    return call


def _streaming(method: Callable[..., Any], decode: Callable[[Any], Any], statuses: _Statuses) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(decode(request), context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: every error gets a status
            # Set, not aborted: an abort raises once more, and its traceback keeps the call until garbage is collected.
            status = statuses.of(error)
            context.set_code(status.code)
            context.set_details(status.details)
            context.set_trailing_metadata(status.trailing_metadata)

    return call


class Server:
    """An aio gRPC server and its health. `grpc` is the server to register servicers on."""

    def __init__(
        self, service_names: Sequence[str], extra_options: Sequence[tuple[str, int]] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:  # fmt: skip
        """`credentials`: for TLS; None: in plain."""
        self._credentials = credentials
        # Merged here: of an option that is given twice, gRPC takes the first.
        options = {**dict(SERVER_OPTIONS), **dict(extra_options)}
        self.grpc = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[*options.items()])
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._names = ["", *service_names]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection([*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc)

    async def start(self, listen: str) -> str:
        """Listen on `host:port` (port 0: any) and serve. Returns the address. Raises OSError if the port is taken."""
        # gRPC would take a larger number, and listen on another port.
        host, _ = host_and_port(listen)
        try:
            if self._credentials:
                port = self.grpc.add_secure_port(listen, self._credentials)
            else:
                port = self.grpc.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"can't listen on {listen}: is the port taken? Choose another, or 0 for any") from error
        await self.grpc.start()
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(True)
        return f"{host}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks whether to send work here."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give open ones `grace_s`, then end them."""
        await self.set_serving(False)
        await self.grpc.stop(grace_s)


def host_and_port(listen: str) -> tuple[str, int]:
    """The parts of `host:port`. Raises OSError if there is no port in it."""
    host, _, port = listen.rpartition(":")
    if not (port.isdecimal() and int(port) < 65536):
        raise OSError(f"can't listen on {listen}: {port!r} is no port; choose 1 to 65535, or 0 for any")
    return host, int(port)


@asynccontextmanager
async def channel(address: str, tls: FleetTls | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to another service, closed at the end. `tls`: None: in plain."""
    opened = open_channel(address, tls)
    try:
        yield opened
    finally:
        await opened.close(None)


def open_channel(address: str, tls: FleetTls | None = None) -> grpc.aio.Channel:
    """A channel to another service, with its TLS files as they are now; whoever opens it closes it."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))
    options: list[tuple[str, int | str]] = list(CHANNEL_OPTIONS)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(address, channel_credentials(tls.renewing.now()), options=options)


def termination() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets: the start of a graceful end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def announce(kind: str, address: str, **more: object) -> None:
    """Print the one JSON line on standard output that says a process is ready (again, after each change of `more`)."""
    print(json.dumps({"kind": kind, "address": address, "pid": os.getpid(), **more}), flush=True)
    sys.stdout.flush()
