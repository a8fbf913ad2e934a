"""TLS at a gateway: for clients over gRPC and HTTP, and mutual TLS with tokenizers, workers and Redis."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import aiohttp
import grpc
import pytest
from redis.asyncio import Redis

import shoal
from gen.shoal.fleet.v1 import delivery_pb2, delivery_pb2_grpc
from gen.shoal.inference.v1 import inference_pb2 as pb
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import Unavailable
from services.common.store.connection import StoreUnfit, command, connect
from services.common.tls.credentials import channel_credentials, http_context
from services.common.tls.files import Tls
from services.common.tls.options import FleetTls
from shoal.fleet.certificates import make_certificates
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import Fleet

QUICK = shoal.RetryPolicy(outage_limit_s=1.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Of another authority."""
    return make_certificates(tmp_path_factory.mktemp("others"))


@pytest.fixture
async def fleet(redis: Redis, redis_server: RedisServer, pool: str, files: Tls) -> AsyncIterator[Fleet]:
    """Its services show and demand certificates."""
    async with Fleet(redis, redis_server.url, pool, FleetTls(files, True, "")) as fleet:
        yield fleet


async def test_a_request_passes_over_tls_from_client_to_worker_and_back(fleet: Fleet, files: Tls) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    await started.send(0, "ab")
    await started.end(2)
    assert (await started.answer.end()).usage.completion_tokens == 2
    assert started.answer.text == "ab"
    async with shoal.AsyncClient(gateway.addresses.public, tls=shoal.Tls(ca=files.ca)) as client:
        assert await client.count_tokens("hello") == 5


async def test_clients_without_tls_or_of_another_authority_are_not_served(fleet: Fleet, others: Tls) -> None:
    gateway = await fleet.gateway()
    for tls, told in ((None, "connect"), (shoal.Tls(ca=others.ca), "CERTIFICATE_VERIFY_FAILED")):
        async with shoal.AsyncClient(gateway.addresses.public, tls=tls, retries=QUICK) as client:
            with pytest.raises(Unavailable, match=told):
                await client.list_models()


async def test_where_clients_need_a_certificate_only_one_of_that_authority_counts(
    fleet: Fleet, files: Tls, others: Tls
) -> None:
    gateway = await fleet.gateway(public_tls_client_ca=str(others.ca))
    known = shoal.Tls(ca=files.ca, certificate=others.certificate, key=others.key)
    async with shoal.AsyncClient(gateway.addresses.public, tls=known) as client:
        assert await client.list_models()
    for unknown in (shoal.Tls(ca=files.ca), files):
        async with shoal.AsyncClient(gateway.addresses.public, tls=unknown, retries=QUICK) as client:
            with pytest.raises(Unavailable):
                await client.list_models()
    assert await models_over_http(gateway.addresses.http, known) == 200
    for unknown in (shoal.Tls(ca=files.ca), files):
        with pytest.raises(aiohttp.ClientError):
            await models_over_http(gateway.addresses.http, unknown)


async def test_http_has_the_same_certificate(fleet: Fleet, files: Tls, others: Tls) -> None:
    gateway = await fleet.gateway()
    assert await models_over_http(gateway.addresses.http, shoal.Tls(ca=files.ca)) == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await models_over_http(gateway.addresses.http, shoal.Tls(ca=others.ca))
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://{gateway.addresses.http}/v1/models")


async def test_only_workers_of_the_fleet_may_deliver_tokens(fleet: Fleet, files: Tls, others: Tls) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway)
    strangers: tuple[FleetTls | None, ...] = (None, FleetTls(replace(others, ca=files.ca), True, ""))
    for tls in strangers:
        async with rpc.channel(gateway.fleet_address, tls) as channel:
            await cannot_deliver(channel)
    # A client's way in, which asks for no certificate, does not lead to the fleet's port.
    credentials = channel_credentials(Tls(ca=files.ca))
    async with grpc.aio.secure_channel(gateway.fleet_address, credentials) as channel:
        await cannot_deliver(channel)
    await started.send(0, "ab")
    await started.end(2)
    await started.answer.end()


async def test_a_gateway_serves_workers_without_a_certificate_if_it_is_told_to(fleet: Fleet, files: Tls) -> None:
    gateway = await fleet.gateway(tls_require_client_certificate=False)
    async with grpc.aio.secure_channel(gateway.fleet_address, channel_credentials(Tls(ca=files.ca))) as channel:
        call = delivery_pb2_grpc.DeliveryServiceStub(channel).Deliver(iter([delivery_pb2.DeliverRequest()]))
        await asyncio.wait_for(call.wait_for_connection(), 10)
        call.cancel()


async def test_a_tokenizer_of_another_authority_is_not_asked(
    redis: Redis, redis_server: RedisServer, pool: str, files: Tls, others: Tls
) -> None:
    async with Fleet(redis, redis_server.url, pool, FleetTls(files, True, "")) as fleet:
        wrong = {"tls_ca": str(others.ca), "tls_certificate": str(others.certificate), "tls_key": str(others.key)}
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await fleet.gateway(**wrong, start_limit_ms=0, tokenizer_timeout_ms=2_000)


async def test_services_may_be_known_by_a_name_instead_of_their_address(fleet: Fleet, files: Tls) -> None:
    gateway = await fleet.gateway(tls_server_name="localhost")
    for name, works in (("localhost", True), ("example.com", False)):
        async with rpc.channel(gateway.addresses.public, FleetTls(files, True, name)) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
            if works:
                assert await call
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await call


async def test_redis_is_reached_by_rediss_with_an_authority_of_ones_own(
    redis_server: RedisServer, files: Tls, others: Tls
) -> None:
    async with redis_over_tls(redis_server, files) as address:
        for url, tls in ((f"rediss://{address}", files), (f"rediss://{address}?{_in_url(files)}", others)):
            redis = await connect(url, tls)
            assert await command(redis, "PING")
            await redis.aclose()
        refused: tuple[tuple[str, Tls | None, str], ...] = (
            (f"rediss://{address}", others, "certificate verify failed"),
            (f"rediss://{address}", None, "certificate verify failed"),
            (f"rediss://{address}?ssl_ca_certs=/nothing", None, "No such file"),
        )
        for wrong_url, wrong_tls, told in refused:
            with pytest.raises(StoreUnfit, match=told):
                await connect(wrong_url, wrong_tls)


async def models_over_http(address: str, tls: Tls) -> int:
    context = ssl.create_default_context(cadata=(tls.ca_pem or b"").decode())
    if tls.certificate:
        context.load_cert_chain(tls.certificate, tls.key)
    async with aiohttp.ClientSession() as session, session.get(f"https://{address}/v1/models", ssl=context) as answer:
        return answer.status


async def cannot_deliver(channel: grpc.aio.Channel) -> None:
    call = delivery_pb2_grpc.DeliveryServiceStub(channel).Deliver(iter([delivery_pb2.DeliverRequest(worker_id="x")]))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in call:
            pass
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def _in_url(files: Tls) -> str:
    return f"ssl_ca_certs={files.ca}&ssl_certfile={files.certificate}&ssl_keyfile={files.key}"


@asynccontextmanager
async def redis_over_tls(redis_server: RedisServer, files: Tls) -> AsyncIterator[str]:
    """The embedded server has no TLS: this stands in front of it, and demands certificates."""
    behind = urlsplit(redis_server.url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_connection(behind.hostname, behind.port)
        await asyncio.gather(pump(reader, redis_writer), pump(redis_reader, writer), return_exceptions=True)
        writer.close()
        redis_writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=http_context(files, require_client_certificate=True))
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
