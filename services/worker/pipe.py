"""Messages between a worker's front and its engine, over a pair of connected sockets.

A frame is the message's length in bytes (4 bytes, little-endian) and the serialized message. The front sends
EngineCommand, the engine EngineEvent. The front's side is asyncio, the engine's blocks.
"""

import asyncio
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.loop import FrontGoneError

# The largest prompt is far below this; a larger length means that the two ends have lost each other.
MAX_FRAME_BYTES = 64 << 20
# What `take` reads at most between two steps: a front that never stops writing cannot stop the steps.
MAX_BYTES_PER_TAKE = 16 << 20
_RECEIVE_BYTES = 1 << 18
_LENGTH = struct.Struct("<I")
_Message = TypeVar("_Message", bound=Message)


class BrokenFrameError(Exception):
    """A frame's length or content cannot be right."""


async def read(reader: asyncio.StreamReader) -> engine_pb2.EngineEvent | None:
    """Read the engine's next event; None when the engine is gone, also when it died inside a frame.

    Raises BrokenFrameError.
    """
    try:
        length = _checked_length(*_LENGTH.unpack(await reader.readexactly(_LENGTH.size)))
        return _parsed(engine_pb2.EngineEvent(), await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


async def write(writer: asyncio.StreamWriter, command: engine_pb2.EngineCommand) -> None:
    """Send a command; waits while the engine does not read. Raises ConnectionError if the engine is gone."""
    writer.write(_frame(command))
    await writer.drain()


def write_at_once(writer: asyncio.StreamWriter, command: engine_pb2.EngineCommand) -> None:
    """Send a short command without waiting: what the engine does not read yet takes memory of this process. A command
    to an engine that is gone is lost."""
    writer.write(_frame(command))


class EnginePipe:
    """The engine's end. Owned by the engine's loop."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected stream socket."""
        connection.setblocking(True)
        self._connection = connection
        self._received = bytearray()

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        """Return all commands that came, waiting for the first at most `timeout_ms` (None: as long as it takes).

        What came before the front's end is still returned. Raises FrontGoneError after that, and BrokenFrameError.
        """
        front_gone = False
        # Not by poll(2), which waits for whole milliseconds.
        if select.select([self._connection], [], [], None if timeout_ms is None else timeout_ms / 1000)[0]:
            front_gone = self._receive_until_end()
        commands = list(self._complete_frames())
        if front_gone and not commands:
            raise FrontGoneError
        return commands

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """Send an event; blocks while the front does not read. One to a front that is gone is lost: `take` tells."""
        # Not raised here: the front may have said Shutdown before it closed its end, and that is still to be read.
        with suppress(ConnectionError):
            self._connection.sendall(_frame(event))

    @property
    def connection(self) -> socket.socket:
        """For who only waits for the front's end."""
        return self._connection

    def wait(self, timeout_s: float) -> None:
        """Wait until the front says something or is gone."""
        select.select([self._connection], [], [], timeout_s)

    def close(self) -> None:
        """Close this end; the front then reads the end of the stream."""
        self._connection.close()

    def _receive_until_end(self) -> bool:
        """Append all that has come to `_received`; return whether the front has closed its end."""
        num_bytes = 0
        with suppress(BlockingIOError):
            while num_bytes < MAX_BYTES_PER_TAKE:
                try:
                    data = self._connection.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
                except ConnectionError:
                    return True
                if not data:
                    return True
                self._received += data
                num_bytes += len(data)
        return False

    def _complete_frames(self) -> Iterator[engine_pb2.EngineCommand]:
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _checked_length(*_LENGTH.unpack_from(self._received, start))
            if end > len(self._received):
                break
            yield _parsed(engine_pb2.EngineCommand(), bytes(self._received[start + _LENGTH.size : end]))
            start = end
        del self._received[:start]


def _frame(message: Message) -> bytes:
    data = message.SerializeToString()
    return _LENGTH.pack(_checked_length(len(data))) + data


def _checked_length(num_bytes: int) -> int:
    if num_bytes > MAX_FRAME_BYTES:
        raise BrokenFrameError(f"a frame of {num_bytes} bytes; the most is {MAX_FRAME_BYTES}")
    return num_bytes


def _parsed(message: _Message, data: bytes) -> _Message:
    try:
        message.ParseFromString(data)
    except DecodeError as cause:
        raise BrokenFrameError(f"a frame of {len(data)} bytes holds no {message.DESCRIPTOR.name}") from cause
    return message
