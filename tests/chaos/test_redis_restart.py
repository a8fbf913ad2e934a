"""Redis dies and comes back: nothing that was accepted before its window is lost.

docs/protocol.md, "Lost writes".
"""

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.storm import Report, run_storm
from tests.fleet.conftest import Fleet

SEED = 3


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    return start("--gateways", "2", "--schedulers", "2", "--workers", "2")


async def kill_redis(fleet: Fleet) -> None:
    os.kill(fleet.of_kind("redis")[0].pid, signal.SIGKILL)


async def kill_redis_and_lose_its_last_second(fleet: Fleet) -> None:
    """As if the machine had crashed: what was written to the log in the last second is gone."""
    (log,) = (fleet.state_dir / "redis").glob("**/*.incr.aof")
    size_before = log.stat().st_size
    await asyncio.sleep(1.0)
    # The supervisor would start Redis again before the file could be cut.
    supervisor = psutil.Process(fleet.supervisor.pid)
    supervisor.suspend()
    try:
        await kill_redis(fleet)
        _cut(log, size_before)
    finally:
        supervisor.resume()


def _cut(log: Path, size: int) -> None:
    with log.open("r+b") as opened:
        opened.truncate(size)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [kill_redis, kill_redis_and_lose_its_last_second])
async def test_streams_survive_a_restart_of_redis(
    fleet: Fleet, greedy_cases: list[dict[str, Any]], fault: Callable[[Fleet], Any]
) -> None:
    async def faults(rng: random.Random) -> None:
        for _ in range(2):
            await asyncio.sleep(rng.uniform(3.0, 5.0))
            await fault(fleet)
        await asyncio.sleep(5.0)

    report = await run_storm(fleet, greedy_cases, faults(random.Random(SEED)), SEED, Report())
    assert report.failed == []
    assert len(report.answers) >= 16
