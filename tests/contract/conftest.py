"""What several chapters of contract tests begin with."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.contract.worker_front import Bench, serve_gateway


@pytest.fixture
async def bench(redis: Redis, pool: str) -> AsyncIterator[Bench]:
    made = Bench(redis, pool)
    server, made.gateway_address = await serve_gateway(made.gateway)
    await made.lead()
    await made.start_session()
    yield made
    made.ended.cancel()
    await asyncio.wait({made.ended})
    await server.stop(0)
