"""Certificates that are renewed while services run, as cert-manager does: who connects after that sees the new ones."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import pytest
from redis.asyncio import Redis

import shoal
from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from services.common import rpc
from services.common.errors import Unavailable
from services.common.store.connection import command, connect
from services.common.tls.credentials import fleet_server_credentials
from services.common.tls.files import Tls
from services.common.tls.options import FleetTls
from services.gateway import tokenizer_link
from services.gateway.tokenizer_client import TokenizerClient
from services.gateway.tokenizer_link import TokenizerLink
from shoal.fleet.certificates import make_certificates
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import FakeTokenizer, Fleet
from tests.contract.test_gateway_tls import QUICK, cannot_deliver, models_over_http, redis_over_tls

LIMIT_S = 20.0


@pytest.fixture
def files(tmp_path: Path) -> Tls:
    """Of the fleet, as they are at its start."""
    return make_certificates(tmp_path / "tls")


@pytest.fixture
def former(files: Tls, tmp_path: Path) -> Tls:
    """A copy of them, which stays."""
    return _all_of(Path(shutil.copytree(tmp_path / "tls", tmp_path / "former")))


@pytest.fixture
async def fleet(redis: Redis, redis_server: RedisServer, pool: str, files: Tls) -> AsyncIterator[Fleet]:
    """Its services show and demand certificates."""
    async with Fleet(redis, redis_server.url, pool, FleetTls(files, True, "")) as fleet:
        yield fleet


def renew(files: Tls) -> Tls:
    """Put others, of a new authority, in their place."""
    assert files.ca
    return make_certificates(Path(files.ca).parent)


def _all_of(folder: Path) -> Tls:
    return Tls(ca=folder / "ca.pem", certificate=folder / "service.pem", key=folder / "service.key")


async def test_clients_that_connect_see_the_new_certificate_and_open_streams_go_on(
    fleet: Fleet, files: Tls, former: Tls
) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await started.send(0, "a")
    renewed = renew(files)
    async with shoal.AsyncClient(gateway.addresses.public, tls=shoal.Tls(ca=renewed.ca)) as client:
        assert await client.list_models()
    assert await models_over_http(gateway.addresses.http, Tls(ca=renewed.ca)) == 200
    async with shoal.AsyncClient(gateway.addresses.public, tls=shoal.Tls(ca=former.ca), retries=QUICK) as client:
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await client.list_models()
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await models_over_http(gateway.addresses.http, Tls(ca=former.ca))
    await started.send(1, "b")
    await started.end(2)
    assert (await started.answer.end()).usage.completion_tokens == 2
    assert started.answer.text == "ab"


async def test_clients_are_known_by_the_authority_that_is_in_the_file_now(
    fleet: Fleet, files: Tls, tmp_path: Path
) -> None:
    clients = make_certificates(tmp_path / "clients")
    gateway = await fleet.gateway(public_tls_client_ca=str(clients.ca))
    unknown = shoal.Tls(ca=files.ca, certificate=clients.certificate, key=clients.key)
    renewed = renew(clients)
    known = shoal.Tls(ca=files.ca, certificate=renewed.certificate, key=renewed.key)
    async with shoal.AsyncClient(gateway.addresses.public, tls=known) as client:
        assert await client.list_models()
    async with shoal.AsyncClient(gateway.addresses.public, tls=unknown, retries=QUICK) as client:
        with pytest.raises(Unavailable):
            await client.list_models()
    assert await models_over_http(gateway.addresses.http, known) == 200


async def test_workers_dial_with_their_new_certificate_and_only_with_that(
    fleet: Fleet, files: Tls, former: Tls
) -> None:
    gateway = await fleet.gateway()
    renew(files)
    # The worker's own options are those of its start.
    worker = await fleet.link(gateway)
    await asyncio.wait_for(worker.call.wait_for_connection(), LIMIT_S)
    async with rpc.channel(gateway.fleet_address, FleetTls(former, True, "")) as channel:
        await cannot_deliver(channel)


async def test_a_gateway_asks_tokenizers_with_its_new_certificate(
    files: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_link, "LOOK_S", 0.01)
    theirs = make_certificates(tmp_path / "theirs")
    server = rpc.Server([], credentials=fleet_server_credentials(FleetTls(theirs, True, "")))
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(FakeTokenizer(), server.grpc)
    link = TokenizerLink(await server.start("127.0.0.1:0"), FleetTls(files, True, ""), grace_s=1)
    tokenizer = TokenizerClient([link], timeout_s=LIMIT_S)
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await tokenizer.describe()
    looking = asyncio.create_task(tokenizer.run())
    for name in ("ca.pem", "service.key", "service.pem"):
        shutil.copy(tmp_path / "theirs" / name, tmp_path / "tls" / name)
    async with asyncio.timeout(LIMIT_S):
        while not await _answers(tokenizer):
            pass
    looking.cancel()
    await link.close()
    await server.stop(0)


async def _answers(tokenizer: TokenizerClient) -> bool:
    try:
        return bool(await tokenizer.describe())
    except Unavailable:
        return False


async def test_redis_is_reached_anew_with_new_files(redis_server: RedisServer, files: Tls) -> None:
    async with redis_over_tls(redis_server, files) as address:
        redis = await connect(f"rediss://{address}", files)
        renew(files)
        await redis.shared.close()
        assert await command(redis, "PING")
        await redis.connection_pool.disconnect()
        assert await redis.info("memory")
        await redis.aclose()


async def test_files_that_do_not_belong_together_yet_change_nothing(fleet: Fleet, files: Tls, former: Tls) -> None:
    gateway = await fleet.gateway()
    renewed = renew(files)
    assert former.certificate
    assert files.certificate
    complete = shutil.copy(files.certificate, f"{files.certificate}.new")
    shutil.copy(former.certificate, files.certificate)
    async with grpc.aio.secure_channel(
        gateway.addresses.public, grpc.ssl_channel_credentials(former.ca_pem)
    ) as channel:
        await asyncio.wait_for(channel.channel_ready(), LIMIT_S)
    assert await models_over_http(gateway.addresses.http, Tls(ca=former.ca)) == 200
    shutil.move(complete, files.certificate)
    assert await models_over_http(gateway.addresses.http, Tls(ca=renewed.ca)) == 200
