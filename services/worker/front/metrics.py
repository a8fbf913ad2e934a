"""What a worker counts: its front's figures, and those of its engine, as the pipe brings them."""

from collections import Counter as Multiset
from collections.abc import Iterable

from gen.shoal.fleet.v1 import engine_pb2
from services.common.record.states import RequestState
from services.common.telemetry.histogram import COUNT_BOUNDS
from services.common.telemetry.metrics import Metrics


class WorkerMetrics:
    """Figures of one worker, over all its engines. Counted on the front's event loop: once a step, flush or request."""

    def __init__(self, metrics: Metrics) -> None:
        self.queue_time = metrics.histogram(
            "shoal_request_queue_time_seconds", "From a request's acceptance to its first placement, by Redis' clock."
        )
        self.attempts = metrics.counter("shoal_attempts", "Attempts at requests that began here.")
        self.requeues = metrics.counter(
            "shoal_requeues", "Attempts that were given back to the queue, by why.", ["reason"]
        )
        self._ended = metrics.counter("shoal_requests_ended", "Requests that ended here, by their state.", ["state"])
        self.engine_deaths = metrics.counter("shoal_engine_deaths", "Engines that ended before they were told to.")
        self.journal_flush = metrics.histogram(
            "shoal_journal_flush_duration_seconds", "Writing what journals lack to Redis, of all requests together."
        )
        self.journal_tokens = metrics.counter("shoal_journal_tokens", "Tokens that were written to journals.")
        self._prompt_tokens = metrics.counter("shoal_prompt_tokens", "Prompt tokens of requests that ended here.")
        self._cached_tokens = metrics.counter(
            "shoal_cached_prompt_tokens", "Of these, tokens that were found in the prefix cache."
        )
        self._generation_tokens = metrics.counter("shoal_generation_tokens", "Tokens that were generated here.")
        self._inter_token_latency = metrics.histogram(
            "shoal_inter_token_latency_seconds", "From one token of a sequence to its next, as they leave the engine."
        )
        self._step_time = metrics.histogram("shoal_step_duration_seconds", "One step of the engine.")
        self._batch_size = metrics.histogram("shoal_batch_size_sequences", "Sequences in one step.", COUNT_BOUNDS)
        self._preemptions = metrics.counter(
            "shoal_preemptions", "Times that a sequence had to give its KV blocks to an earlier one."
        )
        self._engine = engine_pb2.EngineReady()
        self._done = engine_pb2.StepDone()
        metrics.gauge("shoal_kv_cache_usage_ratio", "Share of KV blocks that sequences hold.", self._kv_usage)
        metrics.gauge("shoal_kv_blocks", "KV blocks of the engine; 0: there is none.", lambda: self._engine.num_blocks)
        metrics.gauge("shoal_running_sequences", "Sequences that hold KV blocks.", lambda: self._done.running_sequences)
        metrics.gauge(
            "shoal_waiting_sequences", "Sequences in the engine that wait for KV blocks.",
            lambda: self._done.waiting_sequences,
        )  # fmt: skip
        metrics.gauge(
            "shoal_waiting_prefill_tokens", "Tokens in the engine that are not computed yet.",
            lambda: self._done.waiting_prefill_tokens,
        )  # fmt: skip

    def engine_is(self, ready: engine_pb2.EngineReady | None) -> None:
        """An engine is ready; None: it is gone."""
        self._engine = ready or engine_pb2.EngineReady()
        self._done = engine_pb2.StepDone(free_blocks=self._engine.num_blocks)

    def step_done(self, done: engine_pb2.StepDone, num_sequences: int, gaps_s: Iterable[float]) -> None:
        """A step of so many sequences is done; 0: only ends were told. `gaps_s`: since the token before, of each token
        that is not a sequence's first here."""
        self._preemptions.inc(done.preemptions - self._done.preemptions)
        self._done = done
        if num_sequences:
            self._step_time.observe(done.took_us / 1e6)
            self._batch_size.observe(num_sequences)
        self._generation_tokens.inc(sum(len(output.token_ids) for output in done.outputs))
        # Sequences that were in the step before as well share one gap: they are counted together.
        for gap_s, times in Multiset(gaps_s).items():
            self._inter_token_latency.observe(gap_s, times)

    def request_ended(self, state: RequestState, prompt_tokens: int, cached_tokens: int) -> None:
        """A request's end is stored."""
        self._ended.labels(state).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)

    def _kv_usage(self) -> float:
        num_blocks = self._engine.num_blocks
        return 1 - self._done.free_blocks / num_blocks if num_blocks else 0.0
