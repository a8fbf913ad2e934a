"""A response's body to one client, no faster than it reads, and not for longer than it reads at all."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http import StreamWriter

WRITE_BUFFER_BYTES = 8 * 1024
"""What may wait in this process for a client that does not read, and one piece."""
SEND_BUFFER_BYTES = 64 * 1024
"""What may wait in the kernel, which else takes up to 4 MB for each."""
PIECE_BYTES = 64 * 1024
WITHIN_S = 60.0
"""How long a client may take for what waits for it, until it counts as gone."""


class Outgoing:
    """A response. Raises ConnectionError from any of its methods once the client is gone."""

    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self.response = web.StreamResponse(headers=headers)
        self._request = request
        self._writer: StreamWriter

    async def begin(self) -> None:
        """Send the response's head."""
        transport = self._transport()
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        writer = await self.response.prepare(self._request)
        assert isinstance(writer, StreamWriter), "HTTP/1's"
        self._writer = writer

    async def event(self, data: bytes) -> None:
        """Send a server-sent event (WHATWG HTML, section 9.2). `data` has no line feed."""
        await self._write(b"data: " + data + b"\n\n")

    async def document(self, pieces: Iterable[bytes]) -> None:
        """Send a whole body."""
        waiting = bytearray()
        for piece in pieces:
            waiting += piece
            if len(waiting) >= PIECE_BYTES:
                await self._write(bytes(waiting))
                waiting.clear()
        await self._write(bytes(waiting))

    async def end(self) -> None:
        """Send the end of the response."""
        async with self._patience():
            await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        await self._writer.write(data, drain=False)
        # Asked first, for a timeout takes 7 us, and most clients read at once.
        if self._transport().get_write_buffer_size() > WRITE_BUFFER_BYTES:
            async with self._patience():
                await self._writer.drain()

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(WITHIN_S):
                yield
        except TimeoutError as error:
            self._transport().abort()
            raise ConnectionAbortedError(f"the client did not take what waits within {WITHIN_S:.0f} s") from error

    def _transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        return transport
