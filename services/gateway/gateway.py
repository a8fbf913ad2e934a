"""The gateway's parts, put together, run, and stopped."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio import Redis

from gen.shoal.fleet.v1 import delivery_pb2_grpc
from gen.shoal.inference.v1 import inference_pb2_grpc
from services.common import rpc
from services.common.errors import ShoalError
from services.common.grants import Ask, Grant
from services.common.ids import GatewayId, new_gateway_id
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
        await _Gateway(config, redis, tokenizer, model, metrics, tracer).serve(stop, ready)


class _Gateway:
    """Its parts, and how they are served."""

    def __init__(
        self, config: GatewayConfig, redis: Redis, tokenizer: TokenizerClient, model: Model, metrics: Metrics,
        tracer: Tracer,
    ) -> None:  # fmt: skip
        self._config, self._redis, self._tokenizer, self._model = config, redis, tokenizer, model
        self._metrics, self._tracer = metrics, tracer
        self._clock = clock = asyncio.get_running_loop().time
        self._store = RequestStore(redis, config.pool, config.retention_ms)
        self._streams = OpenStreams()
        self._counted = GatewayMetrics(metrics, lambda: len(self._streams), clock)
        self._departures = Departures(self._store)
        self._replay = Replay(tokenizer)
        self._requests = Requests(
            redis, config.pool, self._store, self._streams, self._departures, self._replay, self._counted, tracer, clock
        )
        self._calls = OpenCalls(config.max_streams, config.max_connection_streams, self._counted.refused)
        self._known = KnownRequests(self._store.peek)
        workers = WorkerDirectory(redis, config.pool)
        self._hints = Hints(workers)
        self._wakes = Wakes(clock)
        assumed = Room.of_cache(config.least_cache_tokens, model) if config.least_cache_tokens else None
        self._capacity = Capacity(workers, DemandStore(redis, config.pool), assumed, clock)
        self._authentication = Authentication(ApiKeys(redis), config.require_keys, self._counted.refused, clock)
        self._public = rpc.Server([server.SERVICE_NAME], config.client_options(), config.client_credentials())
        self._fleet = rpc.Server([delivery.SERVICE_NAME], credentials=fleet_server_credentials(config.fleet_tls()))
        self._readiness = Readiness(self._public)

    async def serve(self, stop: asyncio.Event, ready: Ready) -> None:
        """Until `stop`, and then to a good end."""
        config = self._config
        async with AsyncExitStack() as servers, asyncio.TaskGroup() as tasks:
            for started in (self._public, self._fleet):
                servers.push_async_callback(started.stop, 0)  # Also if another's port is taken.
            fleet_address = await self._listen_to_workers(tasks)
            limits = Limits(
                new_gateway_id(fleet_address), config.backlog_limit, config.resume_ms, config.anonymous_resume_ms,
                config.log_prompts,
            )  # fmt: skip
            backlog = _backlog(GrantStore(self._redis, config.pool), limits, self._clock)
            http = self._offer(limits, backlog)
            background = [tasks.create_task(run()) for run in self._background(limits.gateway, backlog)]
            ready(
                Addresses(
                    public=await self._public.start(config.listen),
                    http=await http.start(config.http_listen, config.http_context()),
                    fleet=fleet_address,
                    metrics=self._metrics.serve(config.listen, config.metrics_port),
                )
            )
            await stop.wait()
            await self._drain()
            await http.stop()
            if not await self._departures.flush(FLUSH_S):
                logger.warning(
                    "some readers' departures were not written; the leader finds them by this gateway's lease"
                )
            for task in background:
                task.cancel()
            # Behind the hints: the streams that this breaks are no worker's death.
            await self._fleet.stop(0)

    async def _listen_to_workers(self, tasks: asyncio.TaskGroup) -> str:
        """Returns the address at which they reach it."""
        links = DeliveryService(
            self._streams, self._departures, self._hints, self._wakes, tasks, self._counted, self._clock
        )
        delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(links, self._fleet.grpc)
        return self._config.advertised(await self._fleet.start(self._config.fleet_listen))

    def _offer(self, limits: Limits, backlog: Backlog) -> HttpServer:
        """What clients may call: over gRPC, and the same over HTTP."""
        generation = Generation(
            self._model, self._tokenizer, self._capacity, backlog, self._known, self._requests, limits, self._counted,
            self._tracer, self._clock,
        )  # fmt: skip
        short_calls = ShortCalls(self._config.max_short_calls, self._counted.refused)
        service = InferenceService(
            self._model, limits.gateway, self._calls, short_calls, generation, self._requests, self._tokenizer,
            self._authentication,
        )  # fmt: skip
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, self._public.grpc)
        return HttpServer(
            Endpoints(
                self._model, self._calls, generation, self._requests, Spelling(self._tokenizer), self._readiness,
                self._config.http_max_body_bytes, self._authentication,
            )
        )  # fmt: skip

    def _background(self, gateway: GatewayId, backlog: Backlog) -> list[Callable[[], Coroutine[None, None, None]]]:
        """What goes on beside the calls."""
        lease = Lease(GatewayLease(self._redis), gateway, self._streams, self._readiness, self._clock)
        recovery = Recovery(self._redis, self._config.pool)
        poster = HoldingsPoster(recovery, self._streams, gateway, self._readiness, self._clock)
        watch = Watch(self._streams, self._store, self._requests, self._replay, gateway, self._clock)
        parts = self._tokenizer, self._departures, self._hints, self._wakes, backlog, self._known, lease, poster, watch
        return [part.run for part in parts]

    async def _drain(self) -> None:
        """Take nothing new, let open streams end by themselves for a while, then end them: their requests go on."""
        self._calls.draining = True
        await self._readiness.unready("the gateway stops")
        logger.info("draining", extra={"streams": len(self._streams)})
        await self._calls.all_done(self._config.drain_ms / 1000)
        for stream in self._streams:
            stream.finish(draining())
        await self._calls.all_done(LAST_WORDS_S)
        await self._public.stop(0)


def _backlog(grants: GrantStore, limits: Limits, clock: Callable[[], float]) -> Backlog:
    def ask(num_on_their_way: int, num_wanted: int) -> Awaitable[Grant]:
        return grants.ask(Ask(limits.gateway, num_on_their_way, num_wanted, limits.backlog_limit))

    return Backlog(ask, limits.backlog_limit, clock)


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
