"""API keys: who may call a gateway, whose requests theirs are, and how many of them may be in flight."""

import asyncio
import json
import urllib.error
import urllib.request
from asyncio import to_thread
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

import shoal
from gen.shoal.fleet.v1.request_pb2 import RequestPayload
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import (
    Exhausted,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
    from_rpc,
)
from services.common.ids import TenantId
from services.common.store.api_keys import ApiKeys
from services.common.store.connection import command, connect
from services.gateway import authentication
from services.gateway.authentication import Authentication
from services.gateway.identity import Identity, cache_salt
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import Fleet, RunningGateway, bearer


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def refused(call: Any) -> ShoalError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


async def over_http(gateway: RunningGateway, path: str, key: str, body: Any = None) -> tuple[int, Any, Any]:
    """Status, headers and document of a call."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{gateway.addresses.http}{path}", data, headers)

    def ask() -> tuple[int, Any, Any]:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.headers, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json.load(error)

    return await to_thread(ask)


# Keys in Redis


async def test_redis_holds_a_hash_and_never_the_key(redis: Redis) -> None:
    key, info = await ApiKeys(redis).create("acme", max_in_flight=3)
    stored = await command(redis, "GET", f"api_key:{info.key_id}")
    assert key.split("_")[1] == info.key_id
    assert key.split("_")[2].encode() not in stored
    assert key.encode() not in stored
    found = await ApiKeys(redis).find(key)
    assert found == info
    assert (info.tenant, info.max_in_flight, info.expires_at_ms) == ("acme", 3, 0)


async def test_only_the_whole_key_counts(redis: Redis) -> None:
    keys = ApiKeys(redis)
    key, _ = await keys.create("acme")
    other, _ = await keys.create("umbrella")
    mixed = "_".join([*other.split("_")[:2], key.split("_")[2]])
    for wrong in ("", "shoal_", key[:-1], key + "0", key.upper(), mixed, key.replace("_", "-"), f" {key}"):
        assert await keys.find(wrong) is None, wrong


async def test_keys_are_listed_without_themselves_and_end_by_revocation_or_time(redis: Redis) -> None:
    keys = ApiKeys(redis)
    first, info = await keys.create("acme")
    brief, brief_info = await keys.create("acme", lifetime_ms=60_000)
    assert [each.key_id for each in await keys.all()] == [info.key_id, brief_info.key_id]
    assert brief_info.expires_at_ms == brief_info.created_at_ms + 60_000
    assert 0 < await command(redis, "PTTL", f"api_key:{brief_info.key_id}") <= 60_000
    assert await keys.revoke(info.key_id)
    assert not await keys.revoke(info.key_id)
    assert not await keys.revoke("*")
    assert await keys.find(first) is None
    assert await keys.find(brief) == brief_info


async def test_a_tenant_that_cannot_be_one_gets_no_key(redis: Redis) -> None:
    for tenant in ("", "a/b", "x" * 65):
        with pytest.raises(ValueError, match="tenant"):
            await ApiKeys(redis).create(tenant)


# How long a key is remembered


async def test_a_revoked_key_stops_within_two_seconds(redis: Redis) -> None:
    clock, keys = Clock(), ApiKeys(redis)
    refused: list[ShoalError] = []
    key, info = await keys.create("acme")
    authenticated = Authentication(keys, True, refused.append, clock)
    assert await authenticated.identify(bearer(key)) == Identity(TenantId("acme"))
    await keys.revoke(info.key_id)
    clock.now_s += authentication.FRESH_S - 0.1
    assert await authenticated.identify(bearer(key)) == Identity(TenantId("acme")), "what is remembered costs nothing"
    clock.now_s += authentication.LIFE_S - authentication.FRESH_S + 0.1
    with pytest.raises(Unauthenticated):
        await authenticated.identify(bearer(key))
    assert [error.reason for error in refused] == ["KEY_UNKNOWN"], "its refusal is counted"
    assert authentication.LIFE_S <= 2


async def test_what_is_remembered_is_bounded(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "MAX_KNOWN", 2)
    keys = ApiKeys(redis)
    authenticated = Authentication(keys, True, lambda _: None, Clock())
    for _ in range(5):
        await authenticated.identify(bearer((await keys.create("acme"))[0]))
    assert len(authenticated._known) == 2


# Callers of a gateway


async def test_every_call_asks_for_a_key_where_keys_are_required(fleet: Fleet) -> None:
    gateway = await fleet.gateway(require_keys=True)
    stub = gateway.stub
    calls: list[Any] = [
        lambda metadata: stub.Generate(pb.GenerateRequest(prompt="hello"), metadata=metadata).read(),
        lambda metadata: stub.Attach(pb.AttachRequest(request_id="r"), metadata=metadata).read(),
        lambda metadata: stub.Cancel(pb.CancelRequest(request_id="r"), metadata=metadata),
        lambda metadata: stub.GetRequest(pb.GetRequestRequest(request_id="r"), metadata=metadata),
        lambda metadata: stub.CountTokens(pb.CountTokensRequest(prompt="hello"), metadata=metadata),
        lambda metadata: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
    ]
    bad = f"shoal_{'0' * 12}_{'0' * 48}"
    for call in calls:
        for metadata, reason in (
            ([], "KEY_REQUIRED"), ([("authorization", bad)], "KEY_REQUIRED"), (bearer("none"), "KEY_UNKNOWN"),
            (bearer(bad), "KEY_UNKNOWN"), ([("x-shoal-tenant", "acme")], "KEY_REQUIRED"),
        ):  # fmt: skip
            error = await refused(call(metadata))
            assert (type(error), error.reason) == (Unauthenticated, reason)
            assert bad not in error.message
    key, _ = await ApiKeys(fleet.redis).create("acme")
    assert await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
    assert (await stub.CountTokens(pb.CountTokensRequest(prompt="hello"), metadata=bearer(key))).prompt_tokens == 5


async def test_tenant_and_salt_come_from_the_key(fleet: Fleet) -> None:
    for required in (True, False):
        gateway = await fleet.gateway(require_keys=required)
        key, _ = await ApiKeys(fleet.redis).create("acme")
        request_id = await gateway.generate(api_key=key).accepted()
        payload = RequestPayload.FromString((await fleet.record(fleet.key(request_id, "acme"))).payload)
        assert (payload.tenant, payload.cache_salt) == ("acme", cache_salt(TenantId("acme")))
        assert await gateway.generate(api_key=key, tenant="acme").accepted()
        error = await gateway.generate(api_key=key, tenant="umbrella").error()
        assert (type(error), error.field) == (PermissionDenied, "x-shoal-tenant")
        other, _ = await ApiKeys(fleet.redis).create("umbrella")
        call = gateway.stub.GetRequest(pb.GetRequestRequest(request_id=request_id), metadata=bearer(other))
        assert type(await refused(call)) is NotFound


async def test_without_required_keys_what_is_no_key_of_ours_has_no_effect(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    request_id = await gateway.generate(api_key="none", tenant="acme").accepted()
    assert await fleet.record(fleet.key(request_id, "acme"))
    assert (await gateway.generate(api_key=f"shoal_{'0' * 12}_{'0' * 48}").error()).reason == "KEY_UNKNOWN"


async def test_a_tenant_has_only_so_many_requests_in_flight(fleet: Fleet) -> None:
    gateways = [await fleet.gateway(require_keys=True) for _ in range(2)]
    key, _ = await ApiKeys(fleet.redis).create("acme", max_in_flight=2)
    other, _ = await ApiKeys(fleet.redis).create("umbrella")
    ids = [await gateway.generate(api_key=key).accepted() for gateway in gateways]
    for gateway in gateways:
        error = await gateway.generate(api_key=key).error()
        assert (type(error), error.reason) == (Exhausted, "TENANT_LIMIT")
        assert error.retry_after_ms > 0
        assert "2 requests in flight" in error.message
        assert await gateway.generate(api_key=other).accepted()
    await gateways[1].stub.Cancel(pb.CancelRequest(request_id=ids[0]), metadata=bearer(key))
    assert await gateways[0].generate(api_key=key).accepted(), "one has ended"


async def test_a_request_that_is_sent_again_counts_once(fleet: Fleet) -> None:
    gateway = await fleet.gateway(require_keys=True)
    key, _ = await ApiKeys(fleet.redis).create("acme", max_in_flight=1)
    for _ in range(2):
        assert await gateway.generate(api_key=key, request_id="mine").accepted() == "mine"


async def test_a_tenant_takes_only_so_many_tokens_a_minute_and_gets_back_what_it_did_not_need(fleet: Fleet) -> None:
    gateways = [await fleet.gateway(require_keys=True) for _ in range(2)]
    key, info = await ApiKeys(fleet.redis).create("acme", max_tokens_per_minute=100)
    other, _ = await ApiKeys(fleet.redis).create("umbrella")
    assert info.max_tokens_per_minute == 100
    ids = [await gateway.generate(api_key=key, max_tokens=45).accepted() for gateway in gateways]
    for gateway in gateways:
        error = await gateway.generate(api_key=key, max_tokens=45).error()
        assert (type(error), error.reason) == (Exhausted, "TOKEN_LIMIT")
        assert 0 < error.retry_after_ms <= 60_000
        assert "50 tokens" in error.message
        assert await gateway.generate(api_key=other, max_tokens=45).accepted()
    await gateways[1].stub.Cancel(pb.CancelRequest(request_id=ids[0]), metadata=bearer(key))
    assert await gateways[0].generate(api_key=key, max_tokens=40).accepted(), "its prompt's tokens are not given back"


async def test_a_request_that_asks_for_more_tokens_than_a_minute_has_is_told_so(fleet: Fleet) -> None:
    gateway = await fleet.gateway(require_keys=True)
    key, _ = await ApiKeys(fleet.redis).create("acme", max_tokens_per_minute=100)
    error = await gateway.generate(api_key=key, max_tokens=48, n=2).error()
    assert (type(error), error.reason, error.field) == (InvalidRequest, "EXCEEDS_TOKEN_LIMIT", "max_tokens")
    request_id = await gateway.generate(api_key=key).accepted()
    record = await fleet.record(fleet.key(request_id, "acme"))
    assert record.reserved_tokens == 95, "who asks for no number may have all"


async def test_http_has_the_same_keys(fleet: Fleet) -> None:
    gateway = await fleet.gateway(require_keys=True)
    key, _ = await ApiKeys(fleet.redis).create("acme", max_in_flight=1)
    body = {"prompt": "hello", "max_tokens": 4, "stream": True}
    for path, sent in (("/v1/completions", body), ("/v1/models", None), ("/v1/models/fake", None)):
        for wrong in ("", "none"):
            status, headers, document = await over_http(gateway, path, wrong, sent)
            assert (status, document["error"]["type"]) == (401, "authentication_error")
            assert headers["WWW-Authenticate"] == "Bearer"
    assert (await over_http(gateway, "/health", ""))[0] == 200
    assert (await over_http(gateway, "/v1/models", key))[0] == 200
    assert await gateway.generate(api_key=key).accepted()
    status, headers, document = await over_http(gateway, "/v1/completions", key, body)
    assert (status, document["error"]["code"]) == (429, "tenant_limit")
    assert int(headers["Retry-After"]) >= 1


async def test_a_key_that_cannot_be_looked_up_is_no_wrong_key(own_redis_server: RedisServer, pool: str) -> None:
    redis = await connect(own_redis_server.url)
    async with Fleet(redis, own_redis_server.url, pool) as fleet:
        gateway = await fleet.gateway(require_keys=True)
        key, _ = await ApiKeys(redis).create("acme")
        own_redis_server.kill()
        error = await gateway.generate(api_key=key).error()
        assert (type(error), error.reason) == (Unavailable, "STORE_UNAVAILABLE")
        assert error.retry_after_ms > 0
        own_redis_server.start()
    await redis.aclose()


# The clients


async def test_the_clients_send_their_key_with_every_call(fleet: Fleet) -> None:
    gateway = await fleet.gateway(require_keys=True)
    key, _ = await ApiKeys(fleet.redis).create("acme")
    async with shoal.AsyncClient(gateway.addresses.public, api_key=key) as client:
        await _use(client)
    with shoal.Client(gateway.addresses.public, api_key=key) as client:
        await to_thread(_use_blocking, client)
    with shoal.Client(gateway.addresses.public) as client, pytest.raises(Unauthenticated, match="shoal keys create"):
        await to_thread(client.list_models)
    for unsendable in ("", " ", "shoal_\n", "shoal_é"):
        with pytest.raises(ValueError, match="API key"):
            shoal.Client(gateway.addresses.public, api_key=unsendable)


async def _use(client: shoal.AsyncClient) -> None:
    assert await client.list_models()
    assert await client.count_tokens("hello") == 5
    stream = client.generate("hello", max_tokens=4)
    await _cancelled(client, stream.request_id)
    assert await stream.read() == ""
    assert (await client.get_request(stream.request_id)).state == shoal.RequestState.CANCELLED
    assert await client.attach(stream.request_id).read() == ""


async def _cancelled(client: shoal.AsyncClient, request_id: str) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await client.cancel(request_id)
            except NotFound:
                await asyncio.sleep(0.01)  # not accepted yet
            else:
                return


def _use_blocking(client: shoal.Client) -> None:
    assert client.list_models()
    with client.generate("hello", max_tokens=4) as stream:
        stream.cancel()
        assert stream.read() == ""
    assert client.attach(stream.request_id).read() == ""
