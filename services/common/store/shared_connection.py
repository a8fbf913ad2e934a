"""One connection to Redis for all short commands of a process.

redis-py takes a connection out of its pool for each command and gives it back behind the reply: this costs more than
the command itself. Here a command is written behind those that still wait for their replies: those of many calls go
out, and come back, together.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection

MOST_AWAITED = 10_000
"""Replies. A command beyond is not sent."""

_INCOMPLETE = object()
_ERRORS: Mapping[str, type[exceptions.RedisError]] = {
    "NOSCRIPT": exceptions.NoScriptError,
    "NOAUTH": exceptions.AuthenticationError,
}


class SharedConnection:
    """Connects when the first command comes, and anew when the connection was lost. Used on one event loop.

    `pool`: makes connections, that is: says where Redis is, and greets it. `limit_s`: longest wait for a reply, and to
    connect.
    """

    def __init__(self, pool: ConnectionPool, limit_s: float) -> None:
        self._pool = pool
        self._limit_s = limit_s
        self._wire: _Wire | None = None
        self._connecting = asyncio.Lock()

    async def ask(self, command: Sequence[str | bytes | int]) -> Any:
        """Send a command, and return its reply as Redis gives it.

        Raises redis-py's errors, and OSError. A command whose connection was lost may have been carried out; so may one
        whose caller was cancelled.
        """
        wire = self._wire
        if wire is None or wire.is_lost:
            wire = await self._connected()
        return await wire.ask(command)

    async def close(self) -> None:
        """Hang up. Who still waits for a reply gets a ConnectionError."""
        if self._wire is not None:
            await self._wire.close()

    async def _connected(self) -> "_Wire":
        async with asyncio.timeout(self._limit_s), self._connecting:
            if self._wire is None or self._wire.is_lost:
                await self.close()
                # What took this one took the pool's idle ones: none is left for somebody to find broken.
                await self._pool.disconnect(inuse_connections=False)
                connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
                try:
                    await connection.connect()
                except BaseException:
                    await connection.disconnect(nowait=True)
                    raise
                self._wire = _Wire(connection, self._limit_s)
            return self._wire


class _Wire(asyncio.Protocol):
    """A greeted connection, whose bytes this protocol reads instead of redis-py."""

    def __init__(self, connection: AbstractConnection, limit_s: float) -> None:
        self.is_lost = False
        self._connection = connection
        assert connection._writer, "redis-py has no public way to its transport"
        self._transport = connection._writer.transport
        self._transport.set_protocol(self)
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._replies = hiredis.Reader(replyError=_error, notEnoughData=_INCOMPLETE)
        self._awaited: deque[tuple[asyncio.Future[Any], float]] = deque()
        """In the order of the commands, with the time at which each is too late."""
        self._watch: asyncio.TimerHandle | None = None

    async def ask(self, command: Sequence[str | bytes | int]) -> Any:
        if len(self._awaited) >= MOST_AWAITED:
            raise exceptions.ConnectionError(f"{MOST_AWAITED} commands wait for replies")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._transport.write(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]
        self._awaited.append((answer, self._loop.time() + self._limit_s))
        if self._watch is None:
            self._watch = self._loop.call_later(self._limit_s, self._look)
        return await answer

    async def close(self) -> None:
        self._lose(exceptions.ConnectionError("the connection was closed"))
        await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        self._replies.feed(data)
        while (reply := self._replies.gets()) is not _INCOMPLETE:
            answer, _ = self._awaited.popleft()
            if answer.done():  # its caller was cancelled
                continue
            if isinstance(reply, exceptions.RedisError):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(exceptions.ConnectionError(f"the connection was lost: {error or 'Redis hung up'}"))

    def _look(self) -> None:
        """One timer for all: the first that waits has waited longest."""
        self._watch = None
        if not self._awaited:
            return
        left_s = self._awaited[0][1] - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._look)
        else:
            self._lose(exceptions.TimeoutError(f"no reply within {self._limit_s:g} s"))

    def _lose(self, error: exceptions.RedisError) -> None:
        self.is_lost = True
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
        while self._awaited:
            answer, _ = self._awaited.popleft()
            if not answer.done():
                answer.set_exception(type(error)(*error.args))


def _error(text: str) -> exceptions.RedisError:
    return _ERRORS.get(text.partition(" ")[0], exceptions.ResponseError)(text)
