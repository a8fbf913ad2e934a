"""`python -m services.common.probe`: the health check of an image."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.rpc import Server
from services.common.tls.credentials import fleet_server_credentials, server_credentials
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


async def test_a_service_that_takes_no_work_lives(server: tuple[Server, str]) -> None:
    await server[0].set_serving(False)
    assert await probe("--listen", server[1], "--health-name", "live") == (0, "")


async def test_where_nobody_serves_it_says_so_in_a_line(server: tuple[Server, str]) -> None:
    await server[0].stop(0)
    status, said = await probe("--listen", server[1])
    assert status == 1
    assert "nobody serves at 127.0.0.1" in said
    assert "Traceback" not in said


async def test_a_service_that_speaks_tls_is_asked_with_its_own_files(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    own = ("--tls-ca", f"{files.ca}", "--tls-certificate", f"{files.certificate}", "--tls-key", f"{files.key}")
    server = Server([], credentials=fleet_server_credentials(FleetTls(files, True, "")))
    address = await server.start("127.0.0.1:0")
    try:
        assert await probe("--listen", address, *own) == (0, "")
        assert await probe("--listen", address, *own, "--tls-server-name", "localhost") == (0, "")
        for strange in ((), (*own, "--tls-server-name", "example.com")):
            status, said = await probe("--listen", address, *strange, "--probe-timeout-ms", "2000")
            assert status == 1
            assert "UNAVAILABLE" in said
    finally:
        await server.stop(0)


async def test_a_gateway_with_a_certificate_for_clients_is_asked_as_they_ask(tmp_path: Path) -> None:
    public, fleet = make_certificates(tmp_path / "public"), make_certificates(tmp_path / "fleet")
    own = ("--tls-ca", f"{fleet.ca}", "--tls-certificate", f"{fleet.certificate}", "--tls-key", f"{fleet.key}")
    server = Server([], credentials=server_credentials(public, require_client_certificate=False))
    address = await server.start("127.0.0.1:0")
    try:
        seen = ("--public-tls-certificate", f"{public.certificate}", "--public-tls-ca", f"{public.ca}")
        assert await probe("--listen", address, *own, *seen) == (0, "")
        assert (await probe("--listen", address, *own, "--probe-timeout-ms", "2000"))[0] == 1
    finally:
        await server.stop(0)
