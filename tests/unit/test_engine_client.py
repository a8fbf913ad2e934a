"""What a front is told of an engine's ranks that do not all fare alike."""

import asyncio
import signal
import struct
from unittest.mock import create_autospec

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.common.model.location import default_model_path
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import (
    EngineClient,
    EngineDiedError,
    EngineUnfitError,
    RankProcess,
    start_engine,
)
from tests.unit.engine_builders import add, add_command


async def a_rank(*events: engine_pb2.EngineEvent) -> RankProcess:
    """One that says this, and has ended."""
    reader = asyncio.StreamReader()
    for event in events:
        data = event.SerializeToString()
        reader.feed_data(struct.pack("<I", len(data)) + data)
    reader.feed_eof()
    process = await asyncio.create_subprocess_exec("true")
    return RankProcess(process, reader, create_autospec(asyncio.StreamWriter, instance=True))


async def test_why_one_rank_cannot_start_is_told_though_another_is_ready_after_it() -> None:
    unfit = engine_pb2.EngineEvent(unfit=engine_pb2.EngineUnfit(reason="--kv-cache-bytes is 1"))
    ready = engine_pb2.EngineEvent(ready=engine_pb2.EngineReady(num_blocks=8))
    engine = EngineClient([await a_rank(), await a_rank(unfit), await a_rank(ready)])
    await engine.watch(1)
    await engine.watch(2)
    with pytest.raises(EngineUnfitError, match="--kv-cache-bytes is 1"):
        await anext(engine.events())


async def a_rank_that_lives() -> RankProcess:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    writer = create_autospec(asyncio.StreamWriter, instance=True)
    rank = RankProcess(process, asyncio.StreamReader(), writer)
    writer.close.side_effect = rank.reader.feed_eof
    return rank


async def test_a_rank_that_lets_go_is_the_cause_though_its_process_ends_last() -> None:
    first, second = await a_rank_that_lives(), await a_rank_that_lives()
    engine = EngineClient([first, second])
    assert not engine.is_ending
    second.reader.feed_eof()
    assert engine.is_ending
    watching = asyncio.create_task(engine.watch(1))
    await first.process.wait()
    second.process.send_signal(signal.SIGSEGV)
    with pytest.raises(EngineDiedError, match="rank 1 of the engine ended with signal SIGSEGV"):
        await anext(engine.events())
    await watching


async def test_a_step_that_raises_ends_its_engine_though_a_form_is_still_compiled() -> None:
    config = WorkerConfig(model_path=default_model_path())
    with pytest.raises(EngineDiedError) as died:  # noqa: PT012
        async with asyncio.timeout(60), start_engine(config, "tests.unit.stumbling_engine") as engine:
            await engine.send(add_command(add(1)))
            async for _ in engine.events():
                pass
    assert not died.value.on_request, "its step is to blame"
