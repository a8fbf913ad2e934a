"""A worker of several processes is one worker: whichever of them dies or stands still, its requests go on elsewhere at
the next token, and it comes back."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

import shoal
from tests.fleet.conftest import Fleet
from tests.fleet.test_metrics import scraped
from tests.unit.eventually import eventually

SHARDS = 2
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Iterator[Fleet]:
    """One worker of two processes, and, beside what `shoal up` starts, one whose model is whole."""
    fleet = start("--metrics", "--shards", str(SHARDS))
    (worker,) = fleet.of_kind("worker")
    command = psutil.Process(worker.pid).cmdline()
    own = [command.index(flag) for flag in ("--shards", "--listen", "--metrics-port")]
    kept = [word for place, word in enumerate(command) if place not in {at + more for at in own for more in (0, 1)}]
    whole = subprocess.Popen(kept, stdout=subprocess.PIPE, text=True)
    assert whole.stdout is not None
    while '"address"' not in whole.stdout.readline():
        assert whole.poll() is None
    yield fleet
    whole.terminate()
    whole.communicate(timeout=30)


@pytest.fixture(scope="module")
def cases(greedy_cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(greedy_cases, key=lambda case: len(case["prompt_token_ids"]))[:12]


async def ask_all(client: shoal.AsyncClient, cases: list[dict[str, Any]], begun: asyncio.Event) -> list[list[int]]:
    async def ask(case: dict[str, Any]) -> list[int]:
        stream = client.generate(token_ids=case["prompt_token_ids"], temperature=0, max_tokens=case["max_tokens"])
        async for _ in stream:
            begun.set()
        return list(stream.token_ids)

    return await asyncio.gather(*map(ask, cases))


def pool(fleet: Fleet) -> dict[str, float]:
    """Workers, and blocks of KV cache, as the scheduler has them."""
    (scheduler,) = fleet.of_kind("scheduler")
    families = scraped(scheduler.metrics_address)
    return {name: families[name].samples[0].value for name in ("shoal_workers", "shoal_pool_kv_blocks")}


def kv_blocks(fleet: Fleet) -> float:
    """Of the sharded worker."""
    (worker,) = fleet.of_kind("worker")
    return float(scraped(worker.metrics_address)["shoal_kv_blocks"].samples[0].value)


async def test_the_scheduler_sees_one_worker_with_the_capacity_of_one_whose_model_is_whole(fleet: Fleet) -> None:
    await eventually(lambda: pool(fleet) == {"shoal_workers": 2, "shoal_pool_kv_blocks": 2 * kv_blocks(fleet)})
    assert kv_blocks(fleet) > 0


def test_its_processes_are_listed_as_engines(fleet: Fleet) -> None:
    assert len(fleet.of_kind("worker")) == 1
    assert len({engine.pid for engine in fleet.of_kind("engine")}) == SHARDS


@pytest.mark.parametrize("victim", range(SHARDS))
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_process_costs_no_token_of_any_answer(
    fleet: Fleet, cases: list[dict[str, Any]], victim: int, signal_number: signal.Signals
) -> None:
    before = [engine.pid for engine in fleet.of_kind("engine")]
    num_lines = len(fleet.lines)
    expected = [case["output_token_ids"] for case in cases]
    begun = asyncio.Event()
    async with fleet.async_client() as client, asyncio.timeout(LIMIT_S):
        asked = asyncio.create_task(ask_all(client, cases, begun))
        await begun.wait()
        os.kill(before[victim], signal_number)
        assert await asked == expected
        # One that stands still is noticed when there is work for it.
        while len(fleet.lines) == num_lines:
            assert await ask_all(client, cases, begun) == expected
    after = [engine.pid for engine in fleet.of_kind("engine")]
    assert len({*before, *after}) == 2 * SHARDS, "all of its processes are new"
    await eventually(lambda: pool(fleet) == {"shoal_workers": 2, "shoal_pool_kv_blocks": 2 * kv_blocks(fleet)})
