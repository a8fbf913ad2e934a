"""Whoever is refused is counted by reason, wherever in a gateway that happens; who it was is no label."""

import asyncio
import urllib.request
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.store.api_keys import ApiKeys
from tests.contract.gateway_fleet import Fleet, RunningGateway
from tests.unit.test_telemetry_metrics import free_port


async def exposed(gateway: RunningGateway) -> str:
    """What Prometheus reads."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{gateway.addresses.metrics['metrics_address']}/metrics") as response:
            return str(response.read(), "utf-8")

    return await asyncio.to_thread(read)


async def refusals(gateway: RunningGateway) -> dict[str, float]:
    """By reason."""
    samples = [sample for family in text_string_to_metric_families(await exposed(gateway)) for sample in family.samples]
    return {each.labels["reason"]: each.value for each in samples if each.name == "shoal_refusals_total"}


async def test_a_refusal_of_too_many_streams_is_counted_whichever_limit_it_is(fleet: Fleet) -> None:
    of_connection = await fleet.gateway(max_connection_streams=1, metrics_port=free_port())
    of_gateway = await fleet.gateway(max_streams=1, metrics_port=free_port())
    for gateway in (of_connection, of_gateway):
        await gateway.generate().accepted()
        for _ in range(2):
            await gateway.generate().error()
    assert await refusals(of_connection) == {"TOO_MANY_STREAMS_OF_CONNECTION": 2}
    assert await refusals(of_gateway) == {"TOO_MANY_STREAMS": 2}


async def test_a_refusal_of_too_many_short_calls_is_counted(fleet: Fleet) -> None:
    gateway = await fleet.gateway(max_short_calls=1, metrics_port=free_port())
    fleet.tokenizer.refuses = 3  # so that the first call is in progress for a while
    first: Any = gateway.stub.CountTokens(pb.CountTokensRequest(prompt="hello"))
    async with asyncio.timeout(10):
        while fleet.tokenizer.refuses == 3:
            await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.stub.ListModels(pb.ListModelsRequest())
    await first
    assert await refusals(gateway) == {"TOO_MANY_CALLS": 1}


async def test_refusals_by_keys_and_quotas_are_counted_and_no_tenant_is_told(fleet: Fleet, redis: Redis) -> None:
    gateway = await fleet.gateway(require_keys=True, metrics_port=free_port())
    key, _ = await ApiKeys(redis).create("acme", max_in_flight=1)
    await gateway.generate(api_key=key).accepted()
    await gateway.generate(api_key=key).error()
    await gateway.generate(api_key=key, tenant="other").error()
    await gateway.generate(api_key="shoal_nothing").error()
    await gateway.generate().error()
    assert await refusals(gateway) == {
        "TENANT_LIMIT": 1, "NOT_YOUR_TENANT": 1, "KEY_UNKNOWN": 1, "KEY_REQUIRED": 1,
    }  # fmt: skip
    assert "acme" not in await exposed(gateway)
