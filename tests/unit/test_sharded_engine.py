"""An engine of several processes answers as one, and ends as one: whichever of them dies or stands still."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.common.model.location import default_model_path
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import EngineClient, EngineDiedError, start_engine
from tests.unit.engine_builders import add, add_command

CASES = [json.loads(line) for line in Path("tests/reference/smollm2_greedy.jsonl").read_text().splitlines()]
CONFIG = WorkerConfig(model_path=default_model_path(), shards=2, kv_cache_bytes=1 << 28)
LONGEST_WAIT_S = 60
"""For loading and for an end; the end's own bound is the ranks' patience."""


async def next_event(events: AsyncIterator[engine_pb2.EngineEvent], kind: str) -> engine_pb2.EngineEvent:
    async for event in events:
        if event.WhichOneof("event") == kind:
            return event
    raise AssertionError("events end only by an exception")


async def begin(engine: EngineClient, events: AsyncIterator[engine_pb2.EngineEvent]) -> engine_pb2.EngineReady:
    """Wait until it is ready, and give it a long answer to make."""
    ready = (await next_event(events, "ready")).ready
    await engine.send(add_command(add(1, prompt=64, max_tokens=4000, stop_token_ids=())))
    await next_event(events, "done")
    return ready


def assert_gone(pids: Sequence[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_it_has_the_whole_caches_blocks_and_gives_the_references_tokens() -> None:
    case = next(case for case in CASES if case["name"] == "chat_capital")
    async with asyncio.timeout(LONGEST_WAIT_S), start_engine(CONFIG) as engine:
        events = engine.events()
        ready = (await next_event(events, "ready")).ready
        assert (ready.num_blocks, ready.pid) == (364, engine.pid)
        assert len({engine.pid, *engine.other_pids}) == 2
        sequence = add(7, case["prompt_token_ids"], max_tokens=case["max_tokens"], stop_token_ids=[2])
        await engine.send(add_command(sequence))
        tokens: list[int] = []
        while True:
            (output,) = (await next_event(events, "done")).done.outputs
            tokens += output.token_ids
            if output.end:
                break
    assert tokens == case["output_token_ids"]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
async def test_it_ends_whole_when_one_of_its_processes_dies_or_stands_still(
    victim: int, signal_number: signal.Signals
) -> None:
    pids: list[int] = []
    with pytest.raises(EngineDiedError) as died:  # noqa: PT012
        async with asyncio.timeout(LONGEST_WAIT_S), start_engine(CONFIG) as engine:
            events = engine.events()
            await begin(engine, events)
            pids = [engine.pid, *engine.other_pids]
            os.kill(pids[victim], signal_number)
            while True:
                await next_event(events, "done")
    assert died.value.on_request, "no request is to blame"
    assert_gone(pids)


async def test_it_ends_whole_when_its_processes_computed_different_things() -> None:
    pids: list[int] = []
    with pytest.raises(EngineDiedError, match="ended with status 1"):  # noqa: PT012
        async with asyncio.timeout(LONGEST_WAIT_S), start_engine(CONFIG, "tests.unit.disagreeing_engine") as engine:
            pids = [engine.pid, *engine.other_pids]
            events = engine.events()
            await begin(engine, events)
            while True:
                await next_event(events, "done")
    assert_gone(pids)


async def test_its_processes_end_when_the_front_lets_go_of_them() -> None:
    async with asyncio.timeout(LONGEST_WAIT_S), start_engine(CONFIG) as engine:
        await begin(engine, engine.events())
        pids = [engine.pid, *engine.other_pids]
    assert_gone(pids)
