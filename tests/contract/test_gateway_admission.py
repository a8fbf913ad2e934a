"""What the gateway takes, refuses and looks up: bad input has its code, and a good request after it is served."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.asyncio import Redis

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Exhausted,
    InvalidRequest,
    NotFound,
    ShoalError,
    Unavailable,
    from_rpc,
)
from services.common.ids import fleet_address
from services.common.record import moves
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.connection import StoreUnavailable, command, connect
from services.common.store.demand import DemandStore
from services.common.store.ids import claim_id
from services.common.store.keys import Keys
from services.common.store.recovery import Recovery
from services.scheduler.recovery import restoration
from tests.conftest import RedisServer
from tests.contract.gateway_fleet import CONTEXT_TOKENS, WITHIN_S, Fleet, RunningGateway, tokens_of


async def refused(call: Any) -> ShoalError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


async def health(gateway: RunningGateway) -> "health_pb2.HealthCheckResponse.ServingStatus.ValueType":
    stub: Any = health_pb2_grpc.HealthStub(gateway.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest())).status


async def health_until(gateway: RunningGateway, status: int) -> None:
    async with asyncio.timeout(10):
        while await health(gateway) != status:
            await asyncio.sleep(0.02)


# Inputs


async def test_every_kind_of_input_becomes_tokens(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    for request_id, fields, tokens in (
        ("prompt", {"prompt": "hé"}, tokens_of("hé")),
        ("chat", {"chat": chat}, tokens_of("user:hi")),
        ("ids", {"token_ids": pb.TokenIds(ids=[5, 6])}, [5, 6]),
    ):
        await gateway.generate(request_id=request_id, max_tokens=7, **fields).accepted()
        record = await fleet.record(fleet.key(request_id))
        payload = request_pb2.RequestPayload.FromString(record.payload)
        assert list(payload.prompt_token_ids) == tokens
        assert payload.sampling.HasField("seed"), "drawn and stored, so that a continued request keeps its noise"
        assert (payload.max_tokens, list(payload.stop_token_ids), payload.n) == (7, [1], 1)
        assert len(payload.cache_salt) == 16


async def test_the_form_of_an_answer_is_checked_once_and_stored(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    form = pb.ResponseFormat(regex="[a-z]+")
    for request_id in ("first", "second"):
        await gateway.generate(request_id=request_id, response_format=form).accepted()
        payload = request_pb2.RequestPayload.FromString((await fleet.record(fleet.key(request_id))).payload)
        assert payload.response_format == form
    assert fleet.tokenizer.checked == [form]


async def test_a_form_that_cannot_be_kept_is_refused_before_anything_is_stored(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    with pytest.raises(InvalidRequest, match="unclosed") as caught:
        await gateway.generate(request_id="bad", response_format=pb.ResponseFormat(regex="[")).accepted()
    assert caught.value.field == "response_format.regex"
    await gateway.generate(request_id="bad").accepted()  # The id is free.


async def test_one_token_over_the_context_is_refused_and_the_last_that_fits_is_not(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    error = await gateway.generate(prompt="x" * CONTEXT_TOKENS).error()
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.reason) == ("input", "PROMPT_TOO_LONG")
    error = await gateway.generate(prompt="x" * (CONTEXT_TOKENS - 5), max_tokens=6).error()
    assert (error.field, error.reason) == ("max_tokens", "CONTEXT_EXCEEDED")
    request_id = await gateway.generate(prompt="x" * (CONTEXT_TOKENS - 1)).accepted()
    payload = request_pb2.RequestPayload.FromString((await fleet.record(fleet.key(request_id))).payload)
    assert payload.max_tokens == 1


async def test_what_no_worker_can_ever_hold_is_refused(fleet: Fleet) -> None:
    await fleet.register(num_blocks=2)
    gateway = await fleet.gateway()
    error = await gateway.generate(prompt="x" * 30, max_tokens=3).error()
    assert (error.field, error.reason) == ("max_tokens", "CAPACITY_EXCEEDED")
    request_id = await gateway.generate(prompt="x" * 30).accepted()
    payload = request_pb2.RequestPayload.FromString((await fleet.record(fleet.key(request_id))).payload)
    assert payload.max_tokens == 2, "what is left in the smallest worker's cache"


async def test_without_any_worker_requests_are_accepted_and_held_up_to_the_backlogs_limit(fleet: Fleet) -> None:
    await fleet.directory.unregister(fleet.worker)
    gateway = await fleet.gateway(backlog_limit=2)
    for name in ("first", "second"):
        await gateway.generate(request_id=name).accepted()
        assert (await fleet.record(fleet.key(name))).state is RequestState.QUEUED
    error = await gateway.generate(request_id="third").error()
    assert error.reason == "BACKLOG_FULL"


async def test_without_any_worker_the_last_ones_room_says_what_can_ever_fit(fleet: Fleet) -> None:
    seen = request_pb2.WorkerInfo(num_blocks=2, block_size_tokens=16, context_tokens=CONTEXT_TOKENS)
    await DemandStore(fleet.redis, fleet.pool).tell(PoolDemand(smallest_worker=seen), fleet.fence)
    await fleet.directory.unregister(fleet.worker)
    gateway = await fleet.gateway(least_cache_tokens=CONTEXT_TOKENS)
    error = await gateway.generate(prompt="x" * 30, max_tokens=3).error()
    assert (error.field, error.reason) == ("max_tokens", "CAPACITY_EXCEEDED")


async def test_before_there_ever_was_a_worker_the_configured_room_says_what_can_fit(fleet: Fleet) -> None:
    await fleet.directory.unregister(fleet.worker)
    gateway = await fleet.gateway(least_cache_tokens=32)
    error = await gateway.generate(prompt="x" * 30, max_tokens=3).error()
    assert (error.field, error.reason) == ("max_tokens", "CAPACITY_EXCEEDED")
    await gateway.generate(prompt="x" * 30, max_tokens=2).accepted()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\xff" * 100, grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.GenerateRequest(prompt="xxxx").SerializeToString().replace(b"xxxx", b"\xff\xfexx"),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (pb.GenerateRequest(prompt="x" * 20_000_000).SerializeToString(), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["random bytes", "invalid UTF-8", "20 MB"],
)
async def test_a_message_that_is_none_is_refused_by_grpc_and_the_next_one_is_served(
    fleet: Fleet, message: bytes, code: grpc.StatusCode
) -> None:
    gateway = await fleet.gateway()
    channel: Any = gateway.channel
    raw = channel.unary_stream("/shoal.inference.v1.InferenceService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(message).read()
    assert caught.value.code() == code
    assert await gateway.generate().accepted()


async def test_a_tenant_that_cannot_be_one_is_refused(fleet: Fleet) -> None:
    error = await (await fleet.gateway()).generate(tenant="a/b").error()
    assert (type(error), error.field) == (InvalidRequest, "x-shoal-tenant")


async def test_large_metadata_and_messages_are_refused_with_the_limit(fleet: Fleet) -> None:
    gateway = await fleet.gateway(max_metadata_bytes=8_000, max_message_bytes=100_000)
    error = await refused(gateway.stub.ListModels(pb.ListModelsRequest(), metadata=[("x-large", "x" * 9_000)]))
    assert isinstance(error, Exhausted)
    assert "metadata size" in error.message
    assert "8000" in error.message
    error = await gateway.generate(prompt="x" * 200_000).error()
    assert isinstance(error, Exhausted)
    assert "message larger than max" in error.message
    assert "100000" in error.message
    assert await gateway.generate().accepted()


async def test_one_connection_cannot_take_all_streams(fleet: Fleet) -> None:
    gateway = await fleet.gateway(max_connection_streams=2)
    open_streams = [gateway.generate() for _ in range(2)]
    for stream in open_streams:
        await stream.accepted()
    error = await gateway.generate().error()
    assert (type(error), error.reason) == (Exhausted, "TOO_MANY_STREAMS_OF_CONNECTION")
    assert "2 open streams" in error.message
    assert error.retry_after_ms
    own_pool = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(gateway.addresses.public, own_pool) as channel:
        assert await replace(gateway, channel=channel).generate().accepted()
    open_streams[0].call.cancel()
    async with asyncio.timeout(10):
        while isinstance(await _attempt(gateway), Exhausted):
            await asyncio.sleep(0.01)


async def test_calls_that_do_not_stream_are_bounded_too(fleet: Fleet) -> None:
    gateway = await fleet.gateway(max_short_calls=1, tokenizer_timeout_ms=10_000)
    fleet.tokenizer.refuses = 3  # so that the first call is in progress for a while
    first = asyncio.ensure_future(_count(gateway))
    async with asyncio.timeout(10):
        while fleet.tokenizer.refuses == 3:
            await asyncio.sleep(0)
    error = await refused(gateway.stub.ListModels(pb.ListModelsRequest()))
    assert (type(error), error.reason) == (Exhausted, "TOO_MANY_CALLS")
    assert "the most is 1" in error.message
    assert await gateway.generate().accepted(), "streams are counted apart"
    assert await first == 5
    assert await gateway.stub.ListModels(pb.ListModelsRequest())


async def _count(gateway: RunningGateway) -> int:
    return (await gateway.stub.CountTokens(pb.CountTokensRequest(prompt="hello"))).prompt_tokens


async def _attempt(gateway: RunningGateway) -> ShoalError | None:
    try:
        await gateway.generate().accepted()
    except ShoalError as error:
        return error
    return None


async def test_a_tokenizer_that_is_away_for_a_moment_is_waited_for(fleet: Fleet) -> None:
    gateway = await fleet.gateway(tokenizer_timeout_ms=3_000)
    fleet.tokenizer.refuses = 2
    await gateway.generate().accepted()
    fleet.tokenizer.refuses = 1_000
    error = await gateway.generate().error()
    assert isinstance(error, Unavailable)
    assert error.retry_after_ms


# Ids


async def test_the_same_id_with_the_same_payload_attaches(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    first = gateway.generate(request_id="a")
    await first.accepted()
    second = (await fleet.gateway()).generate(request_id="a")
    assert await second.accepted() == "a"
    assert (await fleet.record(fleet.key("a"))).reader == 2
    assert (await first.error()).reason == "SUPERSEDED"


async def test_the_same_id_with_another_payload_is_refused(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    await gateway.generate(request_id="a").accepted()
    error = await gateway.generate(request_id="a", max_tokens=3).error()
    assert isinstance(error, AlreadyExists)
    assert error.field == "request_id"


async def test_the_same_id_twice_at_once_is_one_request(fleet: Fleet) -> None:
    gateways = [await fleet.gateway(), await fleet.gateway()]
    equal = [gateway.generate(request_id="a") for gateway in gateways for _ in range(4)]
    assert await asyncio.gather(*(answer.accepted() for answer in equal)) == ["a"] * 8
    other = [gateways[0].generate(request_id="b", max_tokens=1 + number) for number in range(4)]
    outcomes = await asyncio.gather(*(answer.accepted() for answer in other), return_exceptions=True)
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 3


async def test_two_tenants_may_choose_the_same_id(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    await gateway.generate(request_id="a", tenant="acme").accepted()
    await gateway.generate(request_id="a", tenant="umbrella", max_tokens=9).accepted()
    records = [await fleet.record(fleet.key("a", tenant)) for tenant in ("acme", "umbrella")]
    salts = {request_pb2.RequestPayload.FromString(record.payload).cache_salt for record in records}
    assert len(salts) == 2


async def test_an_id_of_another_pool_is_taken(fleet: Fleet) -> None:
    await claim_id(fleet.redis, "default", "a", "another-pool")
    gateway = await fleet.gateway()
    assert isinstance(await gateway.generate(request_id="a").error(), AlreadyExists)
    assert isinstance(await gateway.attach("a").error(), NotFound)


# Limits


async def test_a_full_backlog_refuses_at_once_and_keeps_what_it_took(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=20)
    answers = [gateway.generate() for _ in range(200)]
    outcomes = await asyncio.gather(*(answer.accepted() for answer in answers), return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(errors) == 180
    assert all(isinstance(error, Exhausted) and error.retry_after_ms > 0 for error in errors)
    assert {error.reason for error in errors if isinstance(error, Exhausted)} == {"BACKLOG_FULL"}
    began = time.perf_counter()
    assert (await gateway.generate().error()).reason == "BACKLOG_FULL"
    assert time.perf_counter() - began < 0.5


async def test_a_flood_is_refused_call_by_call_with_when_to_come_back(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=5)
    answers = [gateway.generate() for _ in range(1_500)]
    outcomes = await asyncio.gather(*(answer.accepted() for answer in answers), return_exceptions=True)
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 5
    assert sum(isinstance(outcome, Exhausted) and outcome.retry_after_ms > 0 for outcome in outcomes) == 1_495


async def test_room_in_the_backlog_is_seen_again_at_once(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=2)
    first = await gateway.generate().accepted()
    await gateway.generate().accepted()
    assert isinstance(await gateway.generate().error(), Exhausted)
    await fleet.place(fleet.key(first))
    await _until_taken(gateway)


async def test_a_known_request_is_read_on_though_the_backlog_is_full(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=1)
    await gateway.generate(request_id="a").accepted()
    assert isinstance(await gateway.generate(request_id="b").error(), Exhausted)
    assert await gateway.generate(request_id="a").accepted() == "a"


async def test_a_flood_with_ids_is_refused_by_few_lookups_and_the_known_request_in_it_is_read_on(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=1)
    await gateway.generate(request_id="a").accepted()
    before = await _num_scripts(fleet.redis)
    answers = [gateway.generate(request_id=f"b{number}") for number in range(500)]
    known = gateway.generate(request_id="a")
    outcomes = await asyncio.gather(*(answer.accepted() for answer in answers), return_exceptions=True)
    assert all(isinstance(outcome, Exhausted) and outcome.reason == "BACKLOG_FULL" for outcome in outcomes)
    assert await known.accepted() == "a"
    assert await _num_scripts(fleet.redis) - before < 250


async def test_an_id_that_was_claimed_but_never_stored_is_refused_before_it_is_encoded(fleet: Fleet) -> None:
    gateway = await fleet.gateway(backlog_limit=1)
    await gateway.generate().accepted()
    await claim_id(fleet.redis, "default", "b", fleet.pool)
    fleet.tokenizer.refuses = 1_000
    assert (await gateway.generate(request_id="b").error()).reason == "BACKLOG_FULL"


async def test_while_redis_is_away_a_request_with_an_id_is_told_so_and_not_that_it_is_unknown(
    own_redis_server: RedisServer, pool: str
) -> None:
    client = await connect(own_redis_server.url)
    async with Fleet(client, own_redis_server.url, pool) as fleet:
        gateway = await fleet.gateway(backlog_limit=1)
        await gateway.generate(request_id="a").accepted()
        own_redis_server.kill()
        answers = [gateway.generate(request_id="a") for _ in range(3)]
        errors = await asyncio.gather(*(answer.error() for answer in answers))
        assert {(type(error), error.reason) for error in errors} == {(Unavailable, "STORE_UNAVAILABLE")}
        own_redis_server.start()
    await client.aclose()


async def test_what_redis_lost_without_this_gateway_hearing_of_it_is_stated_until_it_is_put_back(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    answer, other = gateway.generate(request_id="a"), gateway.generate(request_id="b")
    for each in (answer, other):
        await each.accepted()
    # A Redis without its last writes was recovered while this gateway stood still.
    key = fleet.key("a")
    await fleet.redis.delete(Keys(fleet.pool).request(key))
    recovery = Recovery(fleet.redis, fleet.pool)
    run_id = await recovery.generation()
    assert run_id is not None
    for _ in range(2):
        async with asyncio.timeout(WITHIN_S):
            while not (stated := await recovery.posted(run_id)):
                await asyncio.sleep(0.05)
        (holdings,) = stated
        (held,) = holdings.requests
        assert (held.key, held.payload.request_id, held.reader) == (key, "a", 1)
        await recovery.forget(run_id)
    restore = restoration(held, fleet.fence, "n", floor=2)
    assert (await fleet.store.restore(restore)).verdict == Verdict.OK
    attempt = await fleet.place(key)
    worker = await fleet.link(gateway)
    await worker.open(key, attempt)
    await worker.send(key, attempt, 0, "good")
    await answer.until_text("good")


async def _num_scripts(redis: Redis) -> int:
    stats: Any = await redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


async def test_more_streams_than_allowed_are_refused(fleet: Fleet) -> None:
    gateway = await fleet.gateway(max_streams=1)
    answer = gateway.generate()
    await answer.accepted()
    error = await gateway.generate().error()
    assert isinstance(error, Exhausted)
    assert (error.reason, error.retry_after_ms > 0) == ("TOO_MANY_STREAMS", True)
    answer.call.cancel()
    await _until_taken(gateway)


async def _until_taken(gateway: RunningGateway) -> None:
    """Ask until a request is accepted, which shall be soon."""
    async with asyncio.timeout(1):
        while True:
            with suppress(Exhausted):
                await gateway.generate().accepted()
                return


async def test_the_earlier_of_both_deadlines_holds(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    for request_id, deadline_ms, timeout_s, low, high in (
        ("own", 60_000, None, 60_000, 60_000),
        ("call", 60_000, 20, 15_000, 21_000),
        ("none", 0, None, 0, 0),
    ):
        answer = gateway.generate(timeout_s=timeout_s, request_id=request_id, deadline_ms=deadline_ms)
        await answer.accepted()
        record = await fleet.record(fleet.key(request_id))
        left_ms = record.deadline_at_ms - record.accepted_at_ms if record.deadline_at_ms else 0
        assert low <= left_ms <= high


async def test_a_request_that_expires_in_the_queue_says_so(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    answer = gateway.generate(request_id="a", deadline_ms=1)
    await answer.accepted()
    async with asyncio.timeout(WITHIN_S):
        # As the leader does: its time may not be over yet at the first look.
        while (await fleet.store.sweep([moves.Sweep(fleet.key("a"), fleet.fence)]))[0].verdict != Verdict.ENDED:
            pass
    assert isinstance(await answer.error(), DeadlineExceeded)
    assert isinstance(await gateway.attach("a").error(), DeadlineExceeded), "and to who comes later"


# Looking up


async def test_a_request_is_told_with_every_decision_about_it(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway, request_id="a", priority=pb.PRIORITY_BATCH)
    await fleet.store.append([moves.Append(started.key, started.attempt, 0, 0, (7, 8))])
    found = await gateway.stub.GetRequest(pb.GetRequestRequest(request_id="a"))
    assert (found.state, found.model, found.attempts) == (pb.REQUEST_STATE_RUNNING, fleet.pool, 1)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 2)
    assert [decision.what for decision in found.decisions] == ["accepted", "placed", "running"]
    assert found.priority == pb.PRIORITY_BATCH
    assert not found.HasField("timings")
    await fleet.finish(started.key, started.attempt, "ab", RequestState.FAILED, "because")
    found = await gateway.stub.GetRequest(pb.GetRequestRequest(request_id="a"))
    assert (found.state, found.error, found.HasField("timings")) == (pb.REQUEST_STATE_FAILED, "because", True)


async def test_lookups_of_what_never_was_are_not_found(fleet: Fleet) -> None:
    stub = (await fleet.gateway()).stub
    assert isinstance(await refused(stub.GetRequest(pb.GetRequestRequest(request_id="a"))), NotFound)
    assert isinstance(await refused(stub.Cancel(pb.CancelRequest(request_id="a"))), NotFound)
    assert isinstance(await refused(stub.Cancel(pb.CancelRequest(request_id=""))), InvalidRequest)


async def test_tokens_are_counted_and_the_model_is_named(fleet: Fleet) -> None:
    stub = (await fleet.gateway()).stub
    assert (await stub.CountTokens(pb.CountTokensRequest(prompt="hello"))).prompt_tokens == 5
    assert isinstance(await refused(stub.CountTokens(pb.CountTokensRequest(prompt=""))), InvalidRequest)
    assert isinstance(await refused(stub.CountTokens(pb.CountTokensRequest(prompt="x", model="y"))), NotFound)
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.context_tokens, model.vocabulary_tokens) == (fleet.pool, CONTEXT_TOKENS, 1_000)


async def test_the_api_describes_itself(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in (await call.read()).list_services_response.service}
    call.cancel()
    assert "shoal.inference.v1.InferenceService" in names
    assert "shoal.fleet.v1.DeliveryService" not in names, "that is not for clients"


# Stopping, and Redis away


async def test_a_stopping_gateway_lets_streams_end_and_takes_no_new_ones(fleet: Fleet) -> None:
    gateway = await fleet.gateway(drain_ms=5_000)
    started = await fleet.started(gateway)
    gateway.stop.set()
    await health_until(gateway, health_pb2.HealthCheckResponse.NOT_SERVING)
    error = await gateway.generate().error()
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_ms > 0) == ("DRAINING", True)
    await started.send(0, "ab")
    await started.worker.end(started.key, started.attempt, RequestState.FINISHED, 2)
    await started.answer.end()
    assert started.answer.text == "ab"
    async with asyncio.timeout(2):
        await gateway.ended


async def test_what_does_not_end_in_time_goes_on_elsewhere(fleet: Fleet) -> None:
    gateway = await fleet.gateway(drain_ms=50)
    started = await fleet.started(gateway)
    await started.send(0, "ab")
    gateway.stop.set()
    error = await started.answer.error()
    assert (type(error), error.reason, error.retry_after_ms > 0) == (Unavailable, "DRAINING", True)
    async with asyncio.timeout(5):
        await gateway.ended
    record = await fleet.record(started.key)
    assert record.reader_left_at_ms, "its time to come back runs"
    again = (await fleet.gateway()).attach(started.answer.request_id, 2, "ab")
    assert await again.accepted()


async def test_while_redis_is_away_nothing_is_accepted_and_health_says_so(
    own_redis_server: RedisServer, pool: str
) -> None:
    client = await connect(own_redis_server.url)
    async with Fleet(client, own_redis_server.url, pool) as fleet:
        gateway = await fleet.gateway()
        assert await health(gateway) == health_pb2.HealthCheckResponse.SERVING
        started = await fleet.started(gateway)
        await started.send(0, "ab")
        own_redis_server.kill()
        error = await gateway.generate().error()
        assert isinstance(error, Unavailable)
        assert error.retry_after_ms > 0
        await health_until(gateway, health_pb2.HealthCheckResponse.NOT_SERVING)
        await started.send(2, "cd")
        await started.answer.until_text("abcd")
        own_redis_server.start()
        posted = await _posted(fleet)
        (held,) = posted.requests
        assert (held.key, held.reader, fleet_address(held.gateway)) == (started.key, 1, gateway.fleet_address)
        assert list(held.choices[0].ids) == tokens_of("abcd"), "more than Redis was ever told"
        assert held.attempt == started.attempt.number
        assert held.payload.max_tokens
        assert isinstance(await gateway.generate().error(), Unavailable), "not before recovery is complete"
        await fleet.lead()
        await health_until(gateway, health_pb2.HealthCheckResponse.SERVING)
        await gateway.generate().accepted()
    await client.aclose()


async def _posted(fleet: Fleet) -> request_pb2.Holdings:
    recovery = Recovery(fleet.redis, fleet.pool)
    run_id: str | None = None
    async with asyncio.timeout(10):
        while not run_id:
            # The first use of each connection finds it broken.
            with suppress(StoreUnavailable):
                run_id = await recovery.needed()
    posted: list[request_pb2.Holdings] = []
    async with asyncio.timeout(10):
        while not posted:
            posted = await recovery.posted(run_id)
            await asyncio.sleep(0.02)
    return posted[0]


async def test_the_lease_beats(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    assert len(await command(fleet.redis, "KEYS", f"gateway:{gateway.fleet_address}#*")) == 1


# What the log gets


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_logged_only_where_that_is_asked_for(
    fleet: Fleet, log_prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    gateway = await fleet.gateway(log_prompts=log_prompts)
    await gateway.generate(prompt="planted in a prompt").accepted()
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="planted in a chat")])
    await gateway.generate(chat=chat).accepted()
    await gateway.generate(prompt="planted in a refusal", max_tokens=10_000).error()
    logged = "\n".join(str(vars(record)) for record in caplog.records)
    assert "accepted" in logged
    assert ("planted in a prompt" in logged, "planted in a chat" in logged) == (log_prompts, log_prompts)
    assert "planted in a refusal" not in logged
