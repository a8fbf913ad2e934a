"""A worker: one session after another, each with an engine and a worker id of its own."""

import asyncio
import logging
import time
from collections.abc import Callable

from redis.asyncio import Redis

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from services.common.store.connection import StoreUnavailable
from services.common.store.inbox import Inbox
from services.common.store.recovery import Recovery
from services.common.store.requests import RequestStore
from services.common.store.workers import WorkerDirectory
from services.common.telemetry.tracing import Tracer
from services.common.text.vocabulary import Vocabulary
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import EngineClient, EngineDiedError, EngineUnfitError, start_engine
from services.worker.front.holdings import HoldingsPoster
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.reporter import Reporter
from services.worker.front.session import DrainedError, LostError, Session, to_the_end

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
HEALTHY_S = 30.0
LOAD_FAILURES = 5
LONGEST_SILENCE_S = 300.0
"""An engine that loads says how far it is. What it needs longest for without a word is compiling kernels, tens of
seconds, or reading a layer from a slow disk."""
REGISTER_TRIES = 100
RETRY_S = 0.2

OnEngine = Callable[[EngineClient | None], None]
OnLoading = Callable[[engine_pb2.EngineLoading], None]


class EngineStartError(Exception):
    """The engine could not be started, repeatedly; its log says why."""

    shown_in_logs = True


class EngineSilentError(Exception):
    """An engine hangs while it starts."""

    shown_in_logs = True

    def __init__(self, stage: str, limit_s: float) -> None:
        super().__init__(f"the engine said nothing for {limit_s:g} s, the limit, while {stage}")


class Worker:
    """Runs sessions until it is stopped or drained."""

    def __init__(
        self, config: WorkerConfig, redis: Redis, vocabulary: Vocabulary, address: str, on_engine: OnEngine,
        on_loading: OnLoading, metrics: WorkerMetrics, tracer: Tracer,
    ) -> None:  # fmt: skip
        """`on_engine` hears of each engine that is ready, and of its loss (None)."""
        self._config = config
        self._redis = redis
        self._vocabulary = vocabulary
        self._address = address
        self._on_engine = on_engine
        self._on_loading = on_loading
        self._metrics = metrics
        self._tracer = tracer
        self._directory = WorkerDirectory(redis, config.pool)

    async def run(self) -> None:
        """Return when the fleet drained this worker.

        Raises EngineUnfitError when the first engine says that none can start, and EngineStartError when none did.
        """
        pause_s, failures = FIRST_PAUSE_S, 0
        drained, has_served = False, False
        while True:
            started_s = time.monotonic()
            served, last = False, None
            try:
                async with start_engine(self._config) as engine:
                    ready = await self._loaded(engine)
                    served = has_served = True
                    self._on_engine(engine)
                    self._metrics.engine_is(ready)
                    await self._serve(engine, ready)
            except* DrainedError:
                drained = True
            except* (EngineDiedError, EngineUnfitError, EngineSilentError, LostError) as ended:
                last = ended.exceptions[0]
                logger.warning("session over", extra={"error": str(last)})
            finally:
                self._on_engine(None)
                self._metrics.engine_is(None)
            if drained:
                return
            # Behind an engine that served, its memory may not be free yet: then others may start.
            if isinstance(last, EngineUnfitError) and not has_served:
                raise last
            failures = 0 if served else failures + 1
            if failures == LOAD_FAILURES:
                raise EngineStartError(f"the engine failed to start {failures} times in a row; at last {last}")
            if time.monotonic() - started_s > HEALTHY_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _loaded(self, engine: EngineClient) -> engine_pb2.EngineReady:
        """Wait until the engine is ready.

        Raises EngineDiedError or EngineUnfitError, and EngineSilentError if it hangs instead.
        """
        events, stage = engine.events(), "starting"
        while True:
            try:
                async with asyncio.timeout(LONGEST_SILENCE_S):
                    event = await anext(events)
            except TimeoutError as error:
                raise EngineSilentError(stage, LONGEST_SILENCE_S) from error
            if event.HasField("loading"):
                if event.loading.stage != stage:
                    stage = event.loading.stage
                    logger.info("engine starts", extra={"engine_pid": engine.pid, "stage": stage})
                self._on_loading(event.loading)
            if event.HasField("ready"):
                return event.ready

    async def _serve(self, engine: EngineClient, ready: engine_pb2.EngineReady) -> None:
        config = self._config
        store = RequestStore(self._redis, config.pool, config.retention_ms)
        session = Session(
            config, engine, ready, store, lambda worker: Inbox(self._redis, config.pool, worker), self._vocabulary,
            self._metrics, self._tracer,
        )  # fmt: skip
        info = self._info(session, ready)
        await self._register(info)
        logger.info("serving", extra={"worker": session.worker, "engine_pid": engine.pid, "blocks": ready.num_blocks})
        recovery = Recovery(self._redis, config.pool)
        reporter = Reporter(session, info, recovery, self._directory, config)
        holdings = HoldingsPoster(session, info, recovery, self._directory, config)
        try:
            await session.run((reporter.run, holdings.run), lambda: self._close(session))
        finally:
            await to_the_end(self._unregister(session))

    async def _register(self, info: request_pb2.WorkerInfo) -> None:
        for attempt in range(REGISTER_TRIES):
            try:
                await self._directory.register(info, self._config.registration_ttl_ms)
                return
            except StoreUnavailable:
                if attempt == REGISTER_TRIES - 1:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _close(self, session: Session) -> None:
        try:
            await self._directory.close(session.worker)
        except StoreUnavailable as error:
            logger.warning("could not close the inbox", extra={"error": str(error)})

    async def _unregister(self, session: Session) -> None:
        try:
            if not await self._directory.unregister(session.worker):
                logger.warning("left requests to the leader", extra={"worker": session.worker})
        except StoreUnavailable as error:
            # The registration expires by itself, and the leader finds what is left.
            logger.warning("could not unregister", extra={"error": str(error)})

    def _info(self, session: Session, ready: engine_pb2.EngineReady) -> request_pb2.WorkerInfo:
        return request_pb2.WorkerInfo(
            worker_id=session.worker,
            address=self._address,
            num_blocks=ready.num_blocks,
            block_size_tokens=ready.block_size_tokens,
            max_sequences=ready.max_sequences,
            max_prefill_tokens_per_step=ready.max_prefill_tokens_per_step,
            context_tokens=ready.context_tokens,
            model=self._config.pool,
            report_interval_ms=self._config.report_interval_ms,
            is_batch=self._config.batch,
        )
