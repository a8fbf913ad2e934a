"""The client of Redis, and what can go wrong with it.

StoreError
├── StoreUnavailable   Redis cannot be reached, timed out, or is not (yet) a writable master
├── StoreFull          Redis is at its memory limit: nothing was written
├── Recovering         Redis restarted, and the leader has not finished recovery: nothing was written
└── StoreUnfit         Redis is not set up as Shoal needs it; the text says what to do
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.ending import UnfitError
from services.common.store.shared_connection import SharedConnection
from services.common.tls.files import Tls

Argument = str | bytes | int
"""What a command or a script can be given."""

SOCKET_TIMEOUT_S = 5.0
"""Longest wait for a reply, and for a free connection."""
MAX_BLOCK_MS = 2_000
"""Longest that a blocking read waits in the server: far enough below the socket's timeout."""
MAX_CONNECTIONS = 64
"""Of redis-py's own pool, which few commands use."""
CONNECT_ATTEMPTS = 5
CONNECT_BACKOFF_S = 0.2
"""Before the second attempt; doubles."""

_NOT_SERVING = ("READONLY", "MASTERDOWN", "LOADING", "MISCONF", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "UNKILLABLE")


class StoreError(Exception):
    """Base of all that the store raises, but for ValueErrors and defects."""

    shown_in_logs = True


class StoreUnavailable(StoreError):
    """Redis could not be reached, or does not serve now. Whether a move was made is unknown: retry within bounds."""


class StoreFull(StoreError):
    """Redis is at its memory limit. Nothing was written. Only new work is refused so; accepted work goes on."""


class Recovering(StoreError):
    """Redis restarted, and the pool's leader has not finished recovery. Nothing was written; retry."""


class StoreUnfit(StoreError, UnfitError):
    """Redis is reached, but not set up as Shoal needs it. Waiting does not help; the text says what to do."""


@contextmanager
def translated() -> Iterator[None]:
    """Raise this module's errors in place of redis-py's. Other replies of error are defects and pass unchanged."""
    task = asyncio.current_task()
    num_cancellations = task.cancelling() if task else 0
    try:
        yield
    except exceptions.OutOfMemoryError as error:
        raise StoreFull(f"Redis is at its memory limit: {error}. Raise maxmemory, or let requests end") from error
    except exceptions.AuthenticationError as error:
        raise StoreUnfit(f"Redis refuses the credentials: {error}. Give user and password in the URL") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError) as error:
        raise StoreUnavailable(f"Redis cannot be used now: {error or type(error).__name__}") from error
    except exceptions.ResponseError as error:
        text = str(error)
        if text.startswith("RECOVERING"):
            raise Recovering("Redis restarted, and recovery is not finished: retry") from error
        if text.startswith("OOM"):
            raise StoreFull(f"Redis is at its memory limit: {text}. Raise maxmemory, or let requests end") from error
        if text.startswith(_NOT_SERVING):
            raise StoreUnavailable(f"Redis does not serve now: {text}") from error
        raise
    finally:
        # redis-py sends by asyncio.wait_for, which in Python 3.11 loses a cancellation that comes as the write is done.
        if task and task.cancelling() > num_cancellations:
            raise asyncio.CancelledError


class SharingRedis(Redis):
    """redis-py's client, and beside its pool the connection that all short commands share, and those of commands that
    wait. `connect` makes it.
    """

    def __init__(self, connections: BlockingConnectionPool) -> None:
        super().__init__(connection_pool=connections)
        self.auto_close_connection_pool = True
        self.shared = SharedConnection(connections, SOCKET_TIMEOUT_S)
        self._idle: list[SharedConnection] = []
        """Connections of commands that wait, while none does."""

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[SharedConnection]:
        """One that nobody else uses until the block is left."""
        connection = self._idle.pop() if self._idle else SharedConnection(self.connection_pool, SOCKET_TIMEOUT_S)
        try:
            yield connection
        except BaseException:
            # Its reply may still be under way.
            await connection.close()
            raise
        self._idle.append(connection)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections."""
        for connection in (self.shared, *self._idle):
            await connection.close()
        await super().aclose(close_connection_pool)


async def command(redis: Redis, *arguments: Argument) -> Any:
    """Send one short command, and return its reply as Redis gives it. `redis`: of `connect`. Raises StoreError."""
    assert isinstance(redis, SharingRedis), "a client that was not made by `connect`"
    with translated():
        return await redis.shared.ask(arguments)


async def waiting_command(redis: Redis, *arguments: Argument) -> Any:
    """The same for a command that may wait in Redis: on a connection of its own, where it delays no other."""
    assert isinstance(redis, SharingRedis), "a client that was not made by `connect`"
    with translated():
        async with redis.own_connection() as connection:
            return await connection.ask(arguments)


async def connect(url: str, tls: Tls | None = None) -> SharingRedis:
    """A client of the Redis at `url`, once it has answered and is found fit; close it with `aclose()`.

    `tls`: for a `rediss://` URL, unless the URL itself names files as `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`
    in its query. With neither, the system's authorities count.

    It never repeats a command by itself: the callers decide. Tries CONNECT_ATTEMPTS times, about 3 s when refused at
    once. Raises StoreUnavailable after them, and StoreUnfit unless maxmemory-policy is noeviction, scripts work, and
    certificates are as they should be, or if `url` is none.
    """
    try:
        connections = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT_S,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=3,
            **_files(url, tls),
        )
    except ValueError as error:
        raise StoreUnfit(f"the URL of Redis cannot be used: {error}. It looks like redis://127.0.0.1:6379") from error
    if connections.connection_class is SSLConnection:
        connections.connection_class = _RenewedConnection
    redis = SharingRedis(connections)
    try:
        await _await_answer(redis)
        await _check_fitness(redis)
    except BaseException:
        await redis.aclose()
        raise
    return redis


class _RenewedConnection(SSLConnection):
    """Reads its TLS files at each time that it connects: redis-py would show the first ones for ever."""

    async def connect(self) -> None:
        self.ssl_context.context = None
        await super().connect()  # type: ignore[no-untyped-call]


def _files(url: str, tls: Tls | None) -> dict[str, str]:
    if tls is None or not url.startswith("rediss:"):
        return {}
    files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    return {name: os.fspath(path) for name, path in files.items() if path is not None}


async def _await_answer(redis: Redis) -> None:
    for attempt in range(CONNECT_ATTEMPTS):
        try:
            await command(redis, "PING")
            return
        except StoreUnavailable as error:
            problem = _tls_problem(error)
            if problem:
                raise StoreUnfit(
                    f"TLS with Redis fails: {problem}. Its URL is rediss://... if it serves TLS, else redis://...; its "
                    "authority is the URL's ?ssl_ca_certs=FILE, else --tls-ca, else one of the system's"
                ) from error
            if attempt == CONNECT_ATTEMPTS - 1:
                raise StoreUnavailable(f"{str(error).rstrip('.')}. Start one there, or say where yours is") from error
            await asyncio.sleep(CONNECT_BACKOFF_S * 2**attempt)


def _tls_problem(error: BaseException) -> BaseException | None:
    """What trying again does not help against: a certificate, a file, a port that speaks no TLS."""
    cause: BaseException | None = error
    while cause is not None:
        cut = isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        if isinstance(cause, ssl.SSLError | FileNotFoundError | PermissionError) and not cut:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


async def _check_fitness(redis: Redis) -> None:
    with translated():
        try:
            policy = (await redis.info("memory")).get("maxmemory_policy") or (
                await redis.config_get("maxmemory-policy")
            ).get("maxmemory-policy")
            # redis-py would leave out the code of some errors, CLUSTERDOWN's too, which say that it does not serve now.
            run_id = await command(redis, "EVAL", _PROBE, 1, "{shoal}:probe")
        except exceptions.ResponseError as error:
            if str(error).startswith(_NOT_SERVING):
                raise
            raise StoreUnfit(
                f"Redis cannot run Shoal's scripts: {error}. Needed: Redis 7.0 or newer, or Valkey, with EVAL, INFO "
                "and CONFIG GET allowed to this user"
            ) from error
    if policy != "noeviction":
        raise StoreUnfit(
            f"Redis' maxmemory-policy is {policy}: accepted requests could be evicted. Set it: CONFIG SET "
            "maxmemory-policy noeviction, and in the server's configuration"
        )
    if not run_id:
        raise StoreUnfit("Redis' INFO server has no run_id in scripts: use Redis 7.0 or newer, or Valkey")


_PROBE = """#!lua flags=no-writes
redis.call('EXISTS', KEYS[1])
return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
"""
