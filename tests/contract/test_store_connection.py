"""All short commands of a process share one connection: each caller gets its own reply, or hears that none comes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.common.store import connection
from services.common.store.connection import StoreUnavailable, command, connect
from tests.conftest import RedisServer

WAIT_S = 0.3
"""Longest wait for a reply in these tests."""


@pytest.fixture
async def impatient(own_redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", WAIT_S)
    client = await connect(own_redis_server.url)
    yield client
    await client.aclose()


async def test_callers_at_once_share_one_connection_and_get_their_own_replies(impatient: Redis) -> None:
    before = (await impatient.info("stats"))["total_connections_received"]
    replies = await asyncio.gather(*(command(impatient, "ECHO", str(number)) for number in range(200)))
    assert replies == [b"%d" % number for number in range(200)]
    assert (await impatient.info("stats"))["total_connections_received"] == before


async def test_an_error_goes_to_the_caller_whose_command_it_is(impatient: Redis) -> None:
    replies = await asyncio.gather(
        command(impatient, "SET", "text", "a"), command(impatient, "INCR", "text"), command(impatient, "GET", "text"),
        return_exceptions=True,
    )  # fmt: skip
    assert replies[0] == b"OK"
    assert isinstance(replies[1], ResponseError)
    assert replies[2] == b"a"


async def test_a_caller_that_is_cancelled_takes_nobodys_reply(impatient: Redis) -> None:
    given_up = asyncio.create_task(command(impatient, "ECHO", "unwanted"))
    asking = asyncio.create_task(command(impatient, "ECHO", "wanted"))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert await asking == b"wanted"


async def test_when_redis_dies_all_who_wait_are_told_and_later_callers_reach_the_next_one(
    impatient: Redis, own_redis_server: RedisServer
) -> None:
    await stand_still(impatient, 60_000)
    waiting = [asyncio.create_task(command(impatient, "PING")) for _ in range(3)]
    await asyncio.sleep(0)
    own_redis_server.kill()
    for each in waiting:
        with pytest.raises(StoreUnavailable):
            await each
    with pytest.raises(StoreUnavailable):
        await command(impatient, "PING")
    own_redis_server.start()
    assert await command(impatient, "PING") == b"PONG"


async def test_a_redis_that_stands_still_is_given_up_in_time_and_taken_again(impatient: Redis) -> None:
    await stand_still(impatient, 1_000)
    for error in await asyncio.gather(*(command(impatient, "PING") for _ in range(3)), return_exceptions=True):
        assert isinstance(error, StoreUnavailable)
    async with asyncio.timeout(10):
        while await asked(impatient) != b"again":
            pass


async def test_a_client_that_is_closed_leaves_nobody_waiting(own_redis_server: RedisServer) -> None:
    client = await connect(own_redis_server.url)
    await stand_still(client, 60_000)
    waiting = asyncio.create_task(command(client, "PING"))
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(StoreUnavailable):
        await waiting


async def test_a_cluster_that_is_down_does_not_serve_now_and_is_not_unfit(tmp_path: Path) -> None:
    with socket.socket() as bus:
        bus.bind(("127.0.0.1", 0))
        bus_port = str(bus.getsockname()[1])
    # It has no slot yet: PING and INFO are answered, scripts are not.
    server = RedisServer(tmp_path, {"cluster-enabled": "yes", "cluster-port": bus_port})
    server.start()
    try:
        with pytest.raises(StoreUnavailable, match="CLUSTERDOWN"):
            await connect(server.url)
    finally:
        server.kill()


async def stand_still(redis: Redis, for_ms: int) -> None:
    """Have Redis take connections and commands, and answer none."""
    await command(redis, "CLIENT", "PAUSE", for_ms, "ALL")


async def asked(redis: Redis) -> bytes | None:
    try:
        return bytes(await command(redis, "ECHO", "again"))
    except StoreUnavailable:
        return None
