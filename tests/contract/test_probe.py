"""`python -m services.common.probe`: the health check of an image."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.rpc import Server
from services.common.tls.credentials import fleet_server_credentials
from services.common.tls.options import FleetTls
from shoal.fleet.certificates import make_certificates


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    server = Server([])
    yield server, await server.start("127.0.0.1:0")
    await server.stop(0)


async def probe(*flags: str) -> tuple[int, str]:
    """Its status, and what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.common.probe", *flags, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_service_that_serves_is_healthy(server: tuple[Server, str]) -> None:
    assert await probe("--listen", server[1]) == (0, "")


async def test_it_is_found_by_the_variable_of_the_service_also_where_that_listens_everywhere(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_LISTEN", server[1].replace("127.0.0.1", "0.0.0.0"))
    assert await probe() == (0, "")


async def test_a_service_that_drains_is_not_healthy(server: tuple[Server, str]) -> None:
    await server[0].set_serving(False)
    status, said = await probe("--listen", server[1])
    assert status == 1
    assert "NOT_SERVING" in said


async def test_where_nobody_serves_it_says_so_in_a_line(server: tuple[Server, str]) -> None:
    await server[0].stop(0)
    status, said = await probe("--listen", server[1])
    assert status == 1
    assert "nobody serves at 127.0.0.1" in said
    assert "Traceback" not in said


async def test_a_service_that_speaks_tls_is_asked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_certificates(tmp_path)
    server = Server([], credentials=fleet_server_credentials(FleetTls(files, True, "")))
    address = await server.start("127.0.0.1:0")
    try:
        assert (await probe("--listen", address))[0] == 1
        for variable, path in (("CERTIFICATE", files.certificate), ("KEY", files.key), ("CA", files.ca)):
            monkeypatch.setenv(f"SHOAL_TLS_{variable}", str(path))
        assert await probe("--listen", address) == (0, "")
    finally:
        await server.stop(0)
