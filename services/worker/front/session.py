"""One life of an engine: from its start, under a worker id of its own, to its death, its loss or its drain.

The session takes requests from its inbox, runs them in the engine, journals and sends their tokens, and writes their
ends. However it ends, what it still held goes back to the queue under a new attempt; a session that could not even do
that (its process was killed) is found by the leader.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence

from gen.shoal.fleet.v1 import delivery_pb2, engine_pb2, request_pb2
from services.common.alone import alone
from services.common.ids import RequestKey, WorkerId, fleet_address, new_worker_id
from services.common.record.history import Held
from services.common.record.record import Attempt
from services.common.record.run import Diverged, MaySample
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from services.common.store.connection import Recovering, StoreUnavailable
from services.common.store.inbox import CancelAttempt, Drain, Inbox, InboxMessage, Redirect, Start
from services.common.store.requests import RequestStore
from services.common.store.streams import FIRST
from services.common.telemetry.conventions import STATE
from services.common.telemetry.tracing import Tracer
from services.common.text.vocabulary import Vocabulary
from services.worker.config import WorkerConfig
from services.worker.front.active import ActiveRequest
from services.worker.front.engine_client import EngineClient, EngineDiedError, EngineUnfitError
from services.worker.front.exits import TRIES, Exits
from services.worker.front.gateway_links import GatewayLinks
from services.worker.front.journal import Journal
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.spans import AttemptSpans

logger = logging.getLogger(__name__)

INBOX_BLOCK_MS = 1000
INBOX_BATCH = 64
RETRY_S = 0.2
HAND_OVER_S = 10.0
"""Longest that a session takes to hand over; what is left then, the leader finds."""
SUSPECT_MARGIN_TOKENS = 2

GONE = frozenset({Verdict.STALE, Verdict.ENDED, Verdict.UNKNOWN})
"""Answers that say: this attempt is no longer ours."""


class LostError(Exception):
    """The leader no longer knows this worker: it was silent for too long."""

    def __init__(self) -> None:
        super().__init__("the leader took this worker for lost")


class DrainedError(Exception):
    """The fleet asked this worker to hand over what it has."""


class Session:
    """The state of one engine's life. All of it is changed on the front's event loop."""

    def __init__(
        self, config: WorkerConfig, engine: EngineClient, ready: engine_pb2.EngineReady, store: RequestStore,
        inbox: Callable[[WorkerId], Inbox], vocabulary: Vocabulary, metrics: WorkerMetrics,
        tracer: Tracer,
    ) -> None:  # fmt: skip
        self.worker = new_worker_id()
        self.steps = 0
        self.free_blocks = ready.num_blocks
        self.waiting_prefill_tokens = 0
        self.step_time: request_pb2.StepTime | None = None
        """None: no step was made."""
        self.num_ended_choices = 0
        """Of requests that finished: not of cancelled, expired or failed ones."""
        self.num_ended_choice_tokens = 0
        self.progress = asyncio.Event()
        """Set when a report would say something new."""
        self.active: dict[RequestKey, ActiveRequest] = {}
        self.journal = Journal(store, self.active, config.journal_interval_ms, self._journaled, metrics)
        self._config = config
        self._engine = engine
        self._exits = Exits(store, metrics)
        self._inbox = inbox(self.worker)
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._tracer = tracer
        self._unbegun: set[int] = set()
        """Sequences that no step has held yet; kept if spans are recorded."""
        self._sequences: dict[int, tuple[ActiveRequest, int]] = {}
        self._sequence_ids = itertools.count(1)
        self._in_flight: dict[int, engine_pb2.StepBegins] = {}
        self._departing = False
        self._links: GatewayLinks
        self._tasks: asyncio.TaskGroup

    @property
    def num_sequences(self) -> int:
        """Sequences in the engine, waiting or running."""
        return len(self._sequences)

    @property
    def predicted_step_ms(self) -> int:
        """How long it may take until a step is done, by the longest in flight; 0: none will be, or there is none."""
        if self._engine.is_ending:
            return 0
        return max((step.predicted_ms for step in self._in_flight.values()), default=0)

    @property
    def could_step(self) -> bool:
        """Whether the engine has work that waits for nothing: that it makes no step then is no excuse.

        One that ends makes none. Whom its end blames is known when its process is gone, and told by the requeue; a
        leader that took its requests before would blame nobody.
        """
        if self._engine.is_ending:
            return False
        going_on = (active for active in self.active.values() if active.run.sampling and not active.ending)
        return not all(active.may_wait_for_form for active in going_on)

    async def run(self, others: Sequence[Callable[[], Awaitable[None]]], close: Callable[[], Awaitable[None]]) -> None:
        """Work until the engine ends, the worker is lost (LostError) or drained (DrainedError).

        Raises one of these, or EngineDiedError, or EngineUnfitError if the engine says that it cannot go on.
        `others` run beside it, and end with it. At the end `close` sees to it that nothing more is placed here; then
        what was still held, or lies unread in the inbox, is handed back.
        """
        reason, cause = "worker stops", "stopped"
        suspects: Sequence[int] = ()
        try:
            await alone(self._work(others))
        except* (EngineDiedError, EngineUnfitError) as died:
            error = died.exceptions[0]
            reason, cause = str(error), "engine_died"
            self._metrics.engine_deaths.inc()
            # Only a death counts: a stopped, drained or lost worker has a step in flight too (docs/protocol.md, "Poison
            # requests").
            if isinstance(error, EngineDiedError) and not error.on_request:
                suspects = [sequence_id for step in self._in_flight.values() for sequence_id in step.sequence_ids]
            raise
        except* LostError:
            reason, cause = "worker was lost", "lost"
            raise
        except* DrainedError:
            reason, cause = "worker drains", "drained"
            suspects = ()
            raise
        finally:
            await to_the_end(self._depart(close, reason, cause, suspects))

    async def _work(self, others: Sequence[Callable[[], Awaitable[None]]]) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            tls = self._config.fleet_tls()
            self._links = GatewayLinks(self.worker, tls, self._tasks, self._on_resume, self._on_refusal)
            for part in (self._read_inbox, self._read_engine, self.journal.run, *others):
                self._tasks.create_task(_awaited(part))

    async def _depart(
        self, close: Callable[[], Awaitable[None]], why: str, cause: str, suspects: Sequence[int]
    ) -> None:
        self._departing = True
        try:
            async with asyncio.timeout(HAND_OVER_S):
                await close()
                await self._hand_back(why, cause, suspects)
                for unread in await self._inbox.outstanding():
                    await self._exits.give_back(unread.key, unread.attempt, why, cause)
        except (StoreUnavailable, TimeoutError) as error:
            logger.warning("left requests to the leader", extra={"error": str(error)})

    async def _hand_back(self, why: str, cause: str, suspected: Sequence[int]) -> None:
        """Everything held goes back to the queue; what has a suspected sequence goes as suspect."""
        suspects = {self._sequences[number][0].run.key for number in suspected if number in self._sequences}
        await self.journal.flush()
        # Those whose end was being written too: if it was stored, giving them back changes nothing.
        for active in list(self.active.values()):
            known = active.num_tokens + SUSPECT_MARGIN_TOKENS if active.run.key in suspects else 0
            self._drop(active, cause)
            await self._exits.give_back(active.run.key, active.run.attempt, why, cause, suspect_until=known)

    # What comes in

    async def _read_inbox(self) -> None:
        after = FIRST
        while True:
            try:
                messages = await self._inbox.read(after, INBOX_BLOCK_MS, INBOX_BATCH)
            except (StoreUnavailable, Recovering):
                await asyncio.sleep(RETRY_S)
                continue
            for entry, message in messages:
                after = entry
                await self._take(message)

    async def _take(self, message: InboxMessage) -> None:
        match message:
            case Start():
                await self._start(message)
            case CancelAttempt():
                active = self._holding(message.key, message.attempt)
                if active:
                    self._finish(active, RequestState.CANCELLED, "")
            case Redirect():
                self._redirect(message)
            case Drain():
                raise DrainedError

    async def _start(self, start: Start) -> None:
        older = self.active.get(start.key)
        if older:
            self._drop(older, "stale")
        ids = [next(self._sequence_ids) for _ in range(max(1, start.payload.n))]
        spans = AttemptSpans(self._tracer, start, self.worker)
        active = ActiveRequest(start, self._vocabulary, ids, spans, time.monotonic())
        self.active[start.key] = active
        for choice, sequence_id in enumerate(ids):
            self._sequences[sequence_id] = (active, choice)
        if self._tracer.enabled:
            self._unbegun.update(ids)
        for add in active.sequences(start.remaining_ms):
            await self._engine.send(engine_pb2.EngineCommand(add=add))
        self.journal.hurry(active)
        self._links.open(active)
        # Told while the engine works at it.
        self._metrics.attempts.inc()
        if active.queued_s is not None:
            self._metrics.queue_time.observe(active.queued_s)
        logger.info("started", extra={**active.about(), "attempt": start.attempt.number, "known": active.num_tokens})
        if not active.run.sampling:
            delay_s = self._config.resume_grace_ms / 1000
            asyncio.get_running_loop().call_later(delay_s, self._grace_over, active)
        self._end_if_complete(active)

    def _redirect(self, message: Redirect) -> None:
        active = self._holding(message.key, message.attempt)
        if not active:
            return
        # One that was started anew at the same address is told nothing of who read before.
        if fleet_address(active.run.gateway) != fleet_address(message.gateway):
            self._links.close(active)
        active.run.redirect(message.gateway, message.reader)
        self._links.open(active)

    # Whose tokens count

    def _grace_over(self, active: ActiveRequest) -> None:
        if self._departing:
            return
        if self.active.get(active.run.key) is active and active.run.grace_over():
            self._tasks.create_task(self._release(active, MaySample(((),) * len(active.choices))))

    async def _on_resume(self, active: ActiveRequest, held: Sequence[Held]) -> None:
        # A choice that the gateway does not speak of has nothing.
        stated = [*held, *[Held(0)] * (len(active.choices) - len(held))][: len(active.choices)]
        answer = active.run.resume(stated)
        if active.ending:
            return
        match answer:
            case Diverged(histories):
                await self._rebase(active, histories)
            case MaySample() as begin:
                active.forced(begin.forced)
                await self._release(active, begin)

    async def _on_refusal(self, active: ActiveRequest, refusal: delivery_pb2.Refusal) -> None:
        if not active.ending and refusal.reason == delivery_pb2.REFUSAL_REASON_STALE_ATTEMPT:
            # The gateway has opened a later attempt than the record knows: Redis lost its last writes.
            run = active.run
            self._drop(active, "stale")
            why, floor = "its gateway knows a later attempt", refusal.highest_attempt + 1
            # Nobody else would find it: this worker lives, and only it knows that it does not run the request.
            await self._exits.give_back(run.key, run.attempt, why, "stale", floor=floor, tries=TRIES)

    async def _release(self, active: ActiveRequest, begin: MaySample) -> None:
        for number, (choice, forced) in enumerate(zip(active.choices, begin.forced, strict=True)):
            if choice.end is None or active.lacks_logprobs(number):
                release = engine_pb2.ReleaseSequence(sequence_id=choice.sequence_id, forced_token_ids=forced)
                await self._engine.send(engine_pb2.EngineCommand(release=release))
            elif choice.sequence_id in self._sequences:
                self._abort(choice.sequence_id)
        self._end_if_complete(active)

    async def _rebase(self, active: ActiveRequest, histories: tuple[tuple[int, ...], ...]) -> None:
        logger.warning("the reader holds another history", extra=active.about())
        key, attempt = active.run.key, active.run.attempt
        self._drop(active, "rebased")
        await self._exits.rebase(key, attempt, histories)

    # What the engine says

    async def _read_engine(self) -> None:
        async for event in self._engine.events():
            match event.WhichOneof("event"):
                case "begins":
                    self._in_flight[event.begins.step] = event.begins
                    self._step_begins(event.begins.sequence_ids)
                    self.progress.set()
                case "done":
                    self._step_done(event.done)

    def _step_begins(self, sequence_ids: Sequence[int]) -> None:
        for sequence_id in self._unbegun.intersection(sequence_ids) if self._unbegun else ():
            self._unbegun.discard(sequence_id)
            if sequence_id in self._sequences:
                self._sequences[sequence_id][0].spans.step_began(time.monotonic())

    def _step_done(self, done: engine_pb2.StepDone) -> None:
        self.steps = done.step
        begun = self._in_flight.pop(done.step, None)
        num_sequences = len(begun.sequence_ids) if begun else 0
        self.free_blocks = done.free_blocks
        self.waiting_prefill_tokens = done.waiting_prefill_tokens
        if done.HasField("step_time"):
            self.step_time = done.step_time
        now_s = time.monotonic()
        self._metrics.step_done(done, num_sequences, self._gaps_s(done, now_s))
        for output in done.outputs:
            self._output(output, now_s)
        self.progress.set()

    def _gaps_s(self, done: engine_pb2.StepDone, now_s: float) -> Iterator[float]:
        """Since the token before, of each sequence that has a new one; they are noted."""
        for output in done.outputs:
            found = self._sequences.get(output.sequence_id)
            if found is None or not output.token_ids:
                continue
            choice = found[0].choices[found[1]]
            if choice.last_token_s is not None:
                yield now_s - choice.last_token_s
            choice.last_token_s = now_s

    def _output(self, output: engine_pb2.SequenceOutput, now_s: float) -> None:
        ended = output.end != engine_pb2.SEQUENCE_END_UNSPECIFIED
        found = self._sequences.pop(output.sequence_id, None) if ended else self._sequences.get(output.sequence_id)
        if found is None:
            return
        active, choice = found
        if active.ending:
            return
        if active.sampled(choice, output, now_s):
            self._abort(output.sequence_id)
        self._links.tell(active)
        if len(active.run.known[choice]) % self._config.journal_tokens == 0:
            self.journal.hurry(active)
        if output.end == engine_pb2.SEQUENCE_END_EXPIRED:
            self._finish(active, RequestState.EXPIRED, "")
        elif output.end == engine_pb2.SEQUENCE_END_FAILED:
            self._finish(active, RequestState.FAILED, output.error)
        self._end_if_complete(active)

    # How requests end here

    def _end_if_complete(self, active: ActiveRequest) -> None:
        # Not before it may sample: a held request's reader may know of more tokens, or of other ones.
        if active.complete and active.run.sampling:
            self._finish(active, RequestState.FINISHED, "")

    def _finish(self, active: ActiveRequest, state: RequestState, error: str) -> None:
        # While it departs, everything is handed back instead: who asked for the end is answered by that.
        if not active.ending and not self._departing:
            active.ending = True
            self._tasks.create_task(self._write_end(active, state, error))

    async def _write_end(self, active: ActiveRequest, state: RequestState, error: str) -> None:
        """Store the end, and only then tell it."""
        self._abort_all(active)
        outcome = active.outcome(time.monotonic())
        span = active.spans.finish()
        verdict = await self._exits.finish(active.run, state, outcome, error)
        if verdict == Verdict.OK:
            self._metrics.request_ended(state, outcome.usage.prompt_tokens, outcome.usage.cached_tokens)
            if state is RequestState.FINISHED:
                self.num_ended_choices += len(active.choices)
                self.num_ended_choice_tokens += sum(len(known) for known in active.run.known)
            self._links.end(active, active.end_frame(state, error, outcome))
        else:
            self._links.forget(active)
        self._forget(active)
        span.end({STATE: state})
        active.end_spans("" if verdict == Verdict.OK else "stale")
        logger.info("ended", extra={**active.about(), "state": state, "answer": verdict or "nobody"})

    async def _journaled(self, active: ActiveRequest, verdict: Verdict) -> None:
        """Act on what an append was answered: the attempt is over, or somebody asked for its end."""
        if self._holding(active.run.key, active.run.attempt) is not active:
            return
        if verdict == Verdict.CANCEL:
            self._finish(active, RequestState.CANCELLED, "")
        elif verdict in GONE:
            logger.info("attempt is over", extra={**active.about(), "verdict": verdict})
            self._drop(active, "stale")

    def _drop(self, active: ActiveRequest, cause: str) -> None:
        """Forget a request that is no longer ours. `cause`: why, in a word of few."""
        active.ending = True
        active.end_spans(cause)
        self._links.forget(active)
        self._abort_all(active)
        self._forget(active)

    def _forget(self, active: ActiveRequest) -> None:
        if self.active.get(active.run.key) is active:
            del self.active[active.run.key]
        self._unbegun.difference_update(choice.sequence_id for choice in active.choices)
        self.progress.set()

    # Small parts

    def _holding(self, key: RequestKey, attempt: Attempt) -> ActiveRequest | None:
        active = self.active.get(key)
        return active if active and active.run.attempt == attempt and not active.ending else None

    def _abort_all(self, active: ActiveRequest) -> None:
        for choice in active.choices:
            if choice.sequence_id in self._sequences:
                self._abort(choice.sequence_id)

    def _abort(self, sequence_id: int) -> None:
        del self._sequences[sequence_id]
        if not self._departing:  # else the engine ends next, or has ended
            self._engine.abort(sequence_id)


async def to_the_end(work: Coroutine[object, object, None]) -> None:
    """Finish this also when cancelled meanwhile, and only then be cancelled."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _awaited(part: Callable[[], Awaitable[None]]) -> None:
    await part()
