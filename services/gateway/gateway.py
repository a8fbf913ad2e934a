"""The gateway's parts, put together, run, and stopped."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio import Redis

from gen.shoal.fleet.v1 import delivery_pb2_grpc
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import ShoalError
from services.common.grants import Ask, Grant
from services.common.ids import new_gateway_id
from services.common.store.api_keys import ApiKeys
from services.common.store.connection import StoreUnavailable, connect
from services.common.store.demand import DemandStore
from services.common.store.gateways import GatewayLease
from services.common.store.grants import GrantStore
from services.common.store.recovery import Recovery
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import Tracer, tracing
from services.common.tls.credentials import fleet_server_credentials
from services.gateway import delivery, server
from services.gateway.admission import OpenCalls, ShortCalls, draining
from services.gateway.authentication import Authentication
from services.gateway.backlog import Backlog
from services.gateway.capacity import Capacity
from services.gateway.config import GatewayConfig
from services.gateway.delivery import DeliveryService
from services.gateway.departures import Departures
from services.gateway.generation import Generation, Limits
from services.gateway.hints import Hints
from services.gateway.holdings import HoldingsPoster
from services.gateway.http.endpoints import Endpoints
from services.gateway.http.server import HttpServer
from services.gateway.http.spelling import Spelling
from services.gateway.known import KnownRequests
from services.gateway.lease import Lease
from services.gateway.metrics import GatewayMetrics
from services.gateway.model import Model, Room
from services.gateway.open_streams import OpenStreams
from services.gateway.readiness import Readiness
from services.gateway.replay import Replay
from services.gateway.requests import Requests
from services.gateway.server import InferenceService
from services.gateway.tokenizer_client import TokenizerClient
from services.gateway.tokenizer_link import TokenizerLink
from services.gateway.wakes import Wakes
from services.gateway.watch import Watch

logger = logging.getLogger(__name__)

START_RETRY_S = 0.5
LAST_WORDS_S = 2.0
"""How long clients have to take the end of their streams when the gateway stops."""
FLUSH_S = 2.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the gateway is reached."""

    public: str
    """By clients, over gRPC."""
    http: str
    """By clients, over HTTP."""
    fleet: str
    """By workers."""
    metrics: Mapping[str, str]
    """By Prometheus: `metrics_address`, or nothing."""


Ready = Callable[[Addresses], None]
R = TypeVar("R")


async def run(config: GatewayConfig, stop: asyncio.Event, ready: Ready) -> None:
    """Serve until `stop`; then drain and return, within drain_ms and about 5 s.

    `ready` is called once everything is served. Raises OSError if a port is taken,
    ConfigError, StoreError if Redis is away or unfit, and Unavailable if no tokenizer answers at the start.
    """
    addresses = config.tokenizer_addresses()
    config.advertised(config.fleet_listen)  # refused before anything starts
    async with AsyncExitStack() as resources:
        metrics = resources.enter_context(Metrics())
        tracer = resources.enter_context(tracing(config.otlp_endpoint, "gateway"))
        redis = await _until_there(lambda: connect(config.redis_url, config.tls_files), config, stop)
        resources.push_async_callback(redis.aclose)
        tls, timeout_s = config.fleet_tls(), config.tokenizer_timeout_ms / 1000
        links = [TokenizerLink(address, tls, timeout_s) for address in addresses]
        for link in links:
            resources.push_async_callback(link.close)
        tokenizer = TokenizerClient(links, timeout_s)
        model = Model.described(config.pool, await _until_there(tokenizer.describe, config, stop))
        await _serve(config, redis, tokenizer, model, metrics, tracer, stop, ready)


async def _serve(
    config: GatewayConfig, redis: Redis, tokenizer: TokenizerClient, model: Model, metrics: Metrics, tracer: Tracer,
    stop: asyncio.Event, ready: Ready,
) -> None:  # fmt: skip
    clock = asyncio.get_running_loop().time
    store = RequestStore(redis, config.pool, config.retention_ms)
    streams = OpenStreams()
    counted = GatewayMetrics(metrics, lambda: len(streams), clock)
    departures = Departures(store)
    replay = Replay(tokenizer)
    calls = OpenCalls(config.max_streams, config.max_connection_streams, counted.refused)
    short_calls = ShortCalls(config.max_short_calls, counted.refused)
    known = KnownRequests(store.peek)
    workers = WorkerDirectory(redis, config.pool)
    hints = Hints(workers)
    wakes = Wakes(clock)
    assumed = Room.of_cache(config.least_cache_tokens, model) if config.least_cache_tokens else None
    capacity = Capacity(workers, DemandStore(redis, config.pool), assumed, clock)
    requests = Requests(redis, config.pool, store, streams, departures, replay, counted, tracer, clock)
    authentication = Authentication(ApiKeys(redis), config.require_keys, counted.refused, clock)
    public = rpc.Server([server.SERVICE_NAME], config.client_options(), config.client_credentials())
    fleet = rpc.Server([delivery.SERVICE_NAME], credentials=fleet_server_credentials(config.fleet_tls()))
    readiness = Readiness(public)
    async with AsyncExitStack() as servers, asyncio.TaskGroup() as tasks:
        for started in (public, fleet):
            servers.push_async_callback(started.stop, 0)  # Also if another's port is taken.
        links = DeliveryService(streams, departures, hints, wakes, tasks, counted, clock)
        delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(links, fleet.grpc)
        fleet_address = config.advertised(await fleet.start(config.fleet_listen))
        gateway = new_gateway_id(fleet_address)
        limits = Limits(gateway, config.backlog_limit, config.resume_ms, config.anonymous_resume_ms, config.log_prompts)
        backlog = _backlog(GrantStore(redis, config.pool), limits, clock)
        generation = Generation(model, tokenizer, capacity, backlog, known, requests, limits, counted, tracer, clock)
        service = InferenceService(model, gateway, calls, short_calls, generation, requests, tokenizer, authentication)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, public.grpc)
        http = HttpServer(
            Endpoints(
                model,
                calls,
                generation,
                requests,
                Spelling(tokenizer),
                readiness,
                config.http_max_body_bytes,
                authentication,
            )
        )
        background = [
            tasks.create_task(part.run())
            for part in (
                tokenizer,
                departures,
                hints,
                wakes,
                backlog,
                known,
                Lease(GatewayLease(redis), gateway, streams, readiness, clock),
                HoldingsPoster(Recovery(redis, config.pool), streams, gateway, readiness, clock),
                Watch(streams, store, requests, replay, gateway, clock),
            )
        ]
        ready(
            Addresses(
                public=await public.start(config.listen),
                http=await http.start(config.http_listen, config.http_context()),
                fleet=fleet_address,
                metrics=metrics.serve(config.listen, config.metrics_port),
            )
        )
        await stop.wait()
        await _drain(config, public, readiness, calls, streams)
        await http.stop()
        if not await departures.flush(FLUSH_S):
            logger.warning("some readers' departures were not written; the leader finds them by this gateway's lease")
        for task in background:
            task.cancel()
        # Behind the hints: the streams that this breaks are no worker's death.
        await fleet.stop(0)


def _backlog(grants: GrantStore, limits: Limits, clock: Callable[[], float]) -> Backlog:
    def ask(num_on_their_way: int, num_wanted: int) -> Awaitable[Grant]:
        return grants.ask(Ask(limits.gateway, num_on_their_way, num_wanted, limits.backlog_limit))

    return Backlog(ask, limits.backlog_limit, clock)


async def _drain(
    config: GatewayConfig, public: rpc.Server, readiness: Readiness, calls: OpenCalls, streams: OpenStreams
) -> None:
    """Take nothing new, let open streams end by themselves for a while, and then end them: their requests go on."""
    calls.draining = True
    await readiness.unready("the gateway stops")
    logger.info("draining", extra={"streams": len(streams)})
    await calls.all_done(config.drain_ms / 1000)
    for stream in streams:
        stream.finish(draining())
    await calls.all_done(LAST_WORDS_S)
    await public.stop(0)


async def _until_there(call: Callable[[], Awaitable[R]], config: GatewayConfig, stop: asyncio.Event) -> R:
    """Repeat a call at the start while what it needs is away, for start_limit_ms."""
    clock = asyncio.get_running_loop().time
    until_s = clock() + config.start_limit_ms / 1000
    while True:
        try:
            return await call()
        except (StoreUnavailable, ShoalError) as error:
            if stop.is_set() or clock() >= until_s:
                raise
            logger.info("waiting at the start", extra={"error": str(error)})
        await asyncio.sleep(START_RETRY_S)
