"""What several chapters of contract tests begin with."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from services.common.store.connection import connect
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import Fleet
from tests.contract.worker_front import Bench, served


@pytest.fixture
async def bench(redis: Redis, pool: str) -> AsyncIterator[Bench]:
    async with served(Bench(redis, pool)) as bench:
        yield bench


@pytest.fixture
async def fleet(redis: Redis, redis_server: RedisServer, pool: str) -> AsyncIterator[Fleet]:
    """The neighbours of gateways, for as many as the test starts."""
    async with Fleet(redis, redis_server.url, pool) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """For tests that hypothesis calls many times: one loop for all calls."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def store_client(runner: asyncio.Runner, redis_server: RedisServer) -> Iterator[Redis]:
    """A client of the session's server on that loop."""
    client = runner.run(connect(redis_server.url))
    yield client
    runner.run(client.aclose())
