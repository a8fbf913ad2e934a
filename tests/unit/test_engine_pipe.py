"""Messages between front and engine arrive whole and in order; each end learns that the other is gone."""

import asyncio
import socket
import struct
from collections.abc import Iterator

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.worker import pipe
from services.worker.engine.loop import FrontGoneError
from services.worker.pipe import MAX_FRAME_BYTES, BrokenFrameError, EnginePipe
from tests.unit.engine_builders import abort_command, add, add_command, shutdown_command

Ends = tuple[socket.socket, EnginePipe]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The front's end, bare, and the engine's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, EnginePipe(theirs)


def frame(command: engine_pb2.EngineCommand) -> bytes:
    data = command.SerializeToString()
    return struct.pack("<I", len(data)) + data


async def test_what_the_front_writes_the_engine_takes_and_the_other_way_round() -> None:
    ours, theirs = socket.socketpair()
    engine = EnginePipe(theirs)
    reader, writer = await asyncio.open_connection(sock=ours)
    command = add_command(add(1, prompt=3000))
    await pipe.write(writer, command)
    assert engine.take(timeout_ms=10_000) == [command]
    events = [engine_pb2.EngineEvent(begins=engine_pb2.StepBegins(step=step)) for step in range(3)]
    for event in events:
        engine.send(event)
    assert [await pipe.read(reader) for _ in events] == events
    engine.close()
    assert await pipe.read(reader) is None
    writer.close()


async def test_an_engine_that_died_inside_a_frame_reads_as_gone() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", 100) + b"half of it")
    reader.feed_eof()
    assert await pipe.read(reader) is None


def test_all_waiting_commands_are_taken_at_once_in_their_order(ends: Ends) -> None:
    front, engine = ends
    commands = [abort_command(number) for number in range(100)]
    front.sendall(b"".join(frame(command) for command in commands))
    assert engine.take(timeout_ms=0) == commands
    assert engine.take(timeout_ms=0) == []


def test_a_frame_that_comes_in_pieces_is_taken_when_it_is_whole(ends: Ends) -> None:
    front, engine = ends
    command = add_command(add(1))
    data = frame(abort_command(7)) + frame(command)
    front.sendall(data[:20])
    assert engine.take(timeout_ms=0) == [abort_command(7)]
    front.sendall(data[20:])
    assert engine.take(timeout_ms=0) == [command]


def test_a_wait_ends_after_its_time(ends: Ends) -> None:
    assert ends[1].take(timeout_ms=5) == []


def test_commands_before_the_fronts_end_are_still_taken(ends: Ends) -> None:
    front, engine = ends
    front.sendall(frame(shutdown_command()))
    front.close()
    engine.send(engine_pb2.EngineEvent(done=engine_pb2.StepDone(step=1)))
    assert engine.take(timeout_ms=None) == [shutdown_command()]
    with pytest.raises(FrontGoneError):
        engine.take(timeout_ms=None)


def test_half_a_command_and_then_the_end_is_the_end(ends: Ends) -> None:
    front, engine = ends
    front.sendall(frame(abort_command(1))[:-1])
    front.close()
    with pytest.raises(FrontGoneError):
        engine.take(timeout_ms=None)


@pytest.mark.parametrize("data", [struct.pack("<I", MAX_FRAME_BYTES + 1), struct.pack("<I", 3) + b"\xff\xff\xff"])
def test_what_cannot_be_a_frame_is_refused(ends: Ends, data: bytes) -> None:
    front, engine = ends
    front.sendall(data)
    with pytest.raises(BrokenFrameError):
        engine.take(timeout_ms=0)
