"""What several chapters of contract tests begin with."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.contract.worker_front import Bench, served


@pytest.fixture
async def bench(redis: Redis, pool: str) -> AsyncIterator[Bench]:
    async with served(Bench(redis, pool)) as bench:
        yield bench
