"""Server-sent events to one client, no faster than it reads (WHATWG HTML, section 9.2)."""

import socket
from collections.abc import Mapping

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

WRITE_BUFFER_BYTES = 8 * 1024
"""What may wait in this process for a client that does not read, and one chunk."""
SEND_BUFFER_BYTES = 64 * 1024
"""What may wait in the kernel, which else takes up to 4 MB for each."""


class EventStream:
    """The response, once it has begun. Raises ConnectionError from any of its methods once the client is gone."""

    def __init__(self, response: web.StreamResponse, writer: AbstractStreamWriter) -> None:
        self.response = response
        self._writer = writer

    @staticmethod
    async def begun(request: web.Request, headers: Mapping[str, str]) -> "EventStream":
        """Send the response's head."""
        if request.transport is None:
            raise ConnectionResetError("the client went before its response began")
        request.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # Nginx would collect events otherwise.
        head = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        response = web.StreamResponse(headers=head)
        writer = await response.prepare(request)
        assert writer is not None, "it is None for a response that has ended"
        return EventStream(response, writer)

    async def send(self, data: bytes) -> None:
        """Send one event, and wait while too much waits. `data` has no line feed."""
        await self._writer.write(b"data: " + data + b"\n\n")
        await self._writer.drain()

    async def end(self) -> None:
        """Send the end of the response."""
        await self.response.write_eof()
