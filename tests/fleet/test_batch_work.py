"""A worker for batch work is given all that it can hold, and answers it by the same tokens as ever."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from services.common.store.connection import connect
from services.common.store.workers import WorkerDirectory
from tests.fleet.conftest import Fleet
from tests.fleet.test_reference import answer, check


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SHOAL_BATCH", "true")
        return start()


async def test_the_leader_is_told_that_it_takes_any_number(fleet: Fleet) -> None:
    (redis,) = fleet.of_kind("redis")
    connection = await connect(f"redis://{redis.address}")
    ((_, info),) = await WorkerDirectory(connection, "smollm2-135m-instruct").all()
    await connection.aclose()
    assert info
    assert info.is_batch


async def test_all_reference_cases_at_once(fleet: Fleet, greedy_cases: list[dict[str, Any]]) -> None:
    async with fleet.async_client() as client:
        streams = await asyncio.gather(*(answer(client, case) for case in greedy_cases))
    for stream, case in zip(streams, greedy_cases, strict=True):
        check(stream, case)
