"""A worker's front among real neighbours, but for the engine (stepped by the test) and the gateway (this file's)."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from gen.shoal.fleet.v1 import delivery_pb2, delivery_pb2_grpc, engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common import rpc
from services.common.ids import RequestKey, WorkerId, new_nonce, request_key
from services.common.record import moves
from services.common.record.history import Held
from services.common.record.reader import Acceptance, Reader, Refused
from services.common.record.record import Attempt, Record
from services.common.record.transitions import Verdict
from services.common.store.events import Events
from services.common.store.inbox import Inbox
from services.common.store.recovery import Recovery
from services.common.store.requests import RequestStore
from services.common.store.streams import FIRST
from services.common.store.workers import WorkerDirectory
from services.common.telemetry.metrics import Metrics
from services.common.telemetry.tracing import NoTracer, Tracer
from services.common.text.vocabulary import Vocabulary
from services.worker.config import WorkerConfig
from services.worker.front.engine_client import EngineDiedError, EngineUnfitError
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.reporter import Reporter
from services.worker.front.session import Session
from tests.contract.builders import a_leader

VOCABULARY = Vocabulary(tuple(bytes([97 + token % 26]) for token in range(100)), end_token_ids=(99,))
"""Token n reads as the n-th letter; token 99 ends."""
READY = engine_pb2.EngineReady(
    num_blocks=64, block_size_tokens=16, max_sequences=8, max_prefill_tokens_per_step=64, context_tokens=512, pid=1
)


def logprobs_of(token: int) -> inference_pb2.TokenLogprobs:
    """What the stepped engine tells of a token; of the most probable ones as many as any request asks for."""
    best = [inference_pb2.TokenLogprob(token_id=token, logprob=-float(rank)) for rank in range(4)]
    return inference_pb2.TokenLogprobs(logprob=-float(token), top=best)


class SteppedEngine:
    """Stands for the engine process: makes a step when the test says so. Token n of a sequence is (10 + n) % 90.

    Those that ask for log-probabilities are told them, also of the tokens that they came with.
    """

    pid = 1
    is_ending = False

    def __init__(self) -> None:
        self.sequences: dict[int, engine_pb2.AddSequence] = {}
        self.generated: dict[int, list[int]] = {}
        self.held: set[int] = set()
        self.unscored: dict[int, list[int]] = {}
        """Tokens that a sequence came with: all of them, or those after the prompt."""
        self.commands: list[str] = []
        self.reads = asyncio.Event()
        """Cleared: it is stuck, and whoever sends to it waits."""
        self.reads.set()
        self.changed = asyncio.Condition()
        self._events: asyncio.Queue[engine_pb2.EngineEvent | EngineDiedError | EngineUnfitError] = asyncio.Queue(1000)
        self._steps = itertools.count(1)

    async def send(self, command: engine_pb2.EngineCommand) -> None:
        kind = command.WhichOneof("command")
        assert kind
        await self.reads.wait()
        async with self.changed:
            self.commands.append(kind)
            if kind == "add":
                add = command.add
                self.sequences[add.sequence_id] = add
                self.generated[add.sequence_id] = list(add.known_token_ids)
                of_prompt = add.payload.prompt_token_ids[1:] if add.payload.HasField("prompt_logprobs") else ()
                self.unscored[add.sequence_id] = [*(of_prompt if add.choice == 0 else ()), *add.known_token_ids]
                if add.held:
                    self.held.add(add.sequence_id)
            elif kind == "release":
                self.held.discard(command.release.sequence_id)
                self.generated[command.release.sequence_id].extend(command.release.forced_token_ids)
                self.unscored[command.release.sequence_id].extend(command.release.forced_token_ids)
            self.changed.notify_all()

    def abort(self, sequence_id: int) -> None:
        self.commands.append("abort")
        self.sequences.pop(sequence_id, None)

    async def events(self) -> AsyncIterator[engine_pb2.EngineEvent]:
        while True:
            event = await self._events.get()
            if isinstance(event, EngineDiedError | EngineUnfitError):
                raise event
            yield event

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)

    def step(self, end: "engine_pb2.SequenceEnd.ValueType" = engine_pb2.SEQUENCE_END_UNSPECIFIED) -> None:
        """One token for every sequence that may sample; what is to be scored of all."""
        self.begin_step()
        outputs = []
        for number in list(self.sequences):
            payload, tokens = self.sequences[number].payload, self.generated[number]
            output = engine_pb2.SequenceOutput(sequence_id=number)
            if self.unscored[number] and (payload.HasField("logprobs") or payload.HasField("prompt_logprobs")):
                output.given_from = len(payload.prompt_token_ids) + len(tokens) - len(self.unscored[number])
                output.given_logprobs.extend(logprobs_of(token) for token in self.unscored[number])
                self.unscored[number] = []
            if number not in self.held:
                if len(tokens) < payload.max_tokens:
                    tokens.append((10 + len(tokens)) % 90)
                    output.token_ids.append(tokens[-1])
                    output.logprobs.extend([logprobs_of(tokens[-1])] if payload.HasField("logprobs") else [])
                output.end = engine_pb2.SEQUENCE_END_LENGTH if len(tokens) >= payload.max_tokens else end
                if output.end:
                    del self.sequences[number]
            outputs.append(output)
        step_time = request_pb2.StepTime(fixed_ms=5, ms_per_token=1)
        done = engine_pb2.StepDone(step=next(self._steps), outputs=outputs, free_blocks=60, step_time=step_time)
        self._events.put_nowait(engine_pb2.EngineEvent(done=done))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def begin_step(self, step: int = 1, predicted_ms: int = 5) -> None:
        running = [number for number in self.sequences if number not in self.held]
        begins = engine_pb2.StepBegins(step=step, predicted_ms=predicted_ms, sequence_ids=running)
        self._events.put_nowait(engine_pb2.EngineEvent(begins=begins))

    async def heard(self) -> None:
        """Return when the front has taken in all that was said."""
        async with asyncio.timeout(5):
            while not self._events.empty():
                await asyncio.sleep(0.001)

    def die(self, returncode: int = -11, out_of_memory: bool = False) -> None:
        """By SIGSEGV, unless told."""
        self._events.put_nowait(EngineDiedError(returncode, out_of_memory))

    def end_as_unfit(self, reason: str) -> None:
        """It says that it cannot go on, and why."""
        self._events.put_nowait(EngineUnfitError(reason))


@dataclass
class Seen:
    """What a gateway was given for one request."""

    reader: Reader
    text: str = ""
    """Of choice 0."""
    tokens: list[int] = field(default_factory=list)
    """Of choice 0."""
    deltas: list[inference_pb2.Delta] = field(default_factory=list)
    """Of all choices."""
    end: delivery_pb2.EndFrame | None = None
    closed: bool = False
    opened: list[Attempt] = field(default_factory=list)

    def logprobs(self, choice: int = 0) -> list[float]:
        """Log-probabilities of the choice's tokens; one for each, or this fails."""
        of_choice = [delta for delta in self.deltas if delta.choice == choice]
        for delta in of_choice:
            assert [told.logprob for told in delta.logprobs] == [-float(token) for token in delta.token_ids]
        return [told.logprob for delta in of_choice for told in delta.logprobs]


class FakeGateway(delivery_pb2_grpc.DeliveryServiceServicer):
    """Takes frames as a gateway does. `on_end` is called at each end, before anything else happens."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.changed = asyncio.Condition()
        self.num_streams = 0
        self.most_frames = 0
        """In one message."""
        self.late_answer: tuple[Held, ...] | None = None
        """What an answer to an earlier open says, which comes before that to each open but the first."""
        self.on_end: Callable[[delivery_pb2.EndFrame], object] | None = None

    def expect(self, key: RequestKey, reader: int = 1, held: tuple[Held, ...] = (), n: int = 1) -> Seen:
        self.seen[key] = Seen(Reader(reader, n, held))
        return self.seen[key]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)

    async def Deliver(  # noqa: N802
        self, request_iterator: AsyncIterator[delivery_pb2.DeliverRequest], context: object
    ) -> AsyncIterator[delivery_pb2.DeliverResponse]:
        self.num_streams += 1
        async for message in request_iterator:
            response = delivery_pb2.DeliverResponse()
            for open_ in message.opens:
                self._open(open_, response)
            self.most_frames = max(self.most_frames, len(message.frames))
            for frame in message.frames:
                self._frame(frame)
            for end in message.ends:
                if self.on_end:
                    self.on_end(end)
                self.seen[end.key].end = end
            for close in message.closes:
                self.seen[close.key].closed = True
            async with self.changed:
                self.changed.notify_all()
            if response.ByteSize():
                yield response

    def _open(self, open_: delivery_pb2.Open, response: delivery_pb2.DeliverResponse) -> None:
        seen = self.seen.get(open_.key)
        attempt = Attempt(open_.attempt.number, open_.attempt.nonce)
        refused = seen.reader.open(attempt, open_.reader) if seen else Refused.NO_READER
        if seen and refused is None:
            seen.opened.append(attempt)
            if self.late_answer and open_.number > 1:
                response.resumes.append(
                    delivery_pb2.Resume(
                        key=open_.key, attempt=open_.attempt, choices=_stated(self.late_answer),
                        open_number=open_.number - 1,
                    )
                )  # fmt: skip
            choices = _stated(seen.reader.delivered())
            response.resumes.append(
                delivery_pb2.Resume(key=open_.key, attempt=open_.attempt, choices=choices, open_number=open_.number)
            )
            return
        stale = refused == Refused.STALE_ATTEMPT
        highest = seen.reader.opened.number if seen and seen.reader.opened else 0
        reason = delivery_pb2.REFUSAL_REASON_STALE_ATTEMPT if stale else delivery_pb2.REFUSAL_REASON_NO_READER
        response.refusals.append(
            delivery_pb2.Refusal(key=open_.key, attempt=open_.attempt, reason=reason, highest_attempt=highest)
        )

    def _frame(self, frame: delivery_pb2.TokenFrame) -> None:
        seen = self.seen[frame.key]
        attempt = Attempt(frame.attempt.number, frame.attempt.nonce)
        delta = frame.delta
        if seen.reader.accept(attempt, delta.choice, delta.index, len(delta.token_ids)) == Acceptance.NEW:
            seen.reader.deliver(delta.choice, delta.token_ids)
            seen.deltas.append(delta)
            if delta.choice == 0:
                seen.text += delta.text
                seen.tokens.extend(delta.token_ids)


def _stated(held: tuple[Held, ...]) -> list[delivery_pb2.Delivered]:
    return [delivery_pb2.Delivered(count=claim.count, token_ids=claim.tokens) for claim in held]


class Bench:
    """One session on a real Redis, with a leader's moves at hand."""

    def __init__(self, redis: Redis, pool: str, tracer: Tracer | None = None) -> None:
        self.redis = redis
        self.tracer = tracer or NoTracer()
        self.registry = Metrics()
        self.metrics = WorkerMetrics(self.registry)
        self.pool = pool
        self.store = RequestStore(redis, pool, retention_ms=60_000)
        self.directory = WorkerDirectory(redis, pool)
        self.engine = SteppedEngine()
        self.gateway = FakeGateway()
        self.gateway_address = ""
        self.fence = ""
        self.session: Session
        self.ended: asyncio.Task[None]

    async def lead(self) -> None:
        self.fence = (await a_leader(self.redis, self.pool, ttl_ms=60_000)).fence

    async def start_session(self, resume_grace_ms: int = 60_000, journal_interval_ms: int = 5) -> None:
        config = WorkerConfig(
            pool=self.pool, model_path=Path("unused"), resume_grace_ms=resume_grace_ms,
            journal_interval_ms=journal_interval_ms, report_interval_ms=50,
        )  # fmt: skip

        def inbox(worker: WorkerId) -> Inbox:
            return Inbox(self.redis, self.pool, worker)

        self.session = Session(config, self.engine, READY, self.store, inbox, VOCABULARY, self.metrics, self.tracer)  # type: ignore[arg-type]
        info = request_pb2.WorkerInfo(worker_id=self.session.worker, num_blocks=64, block_size_tokens=16)
        await self.directory.register(info, 60_000)
        reporter = Reporter(self.session, info, Recovery(self.redis, self.pool), self.directory, config)
        self.ended = asyncio.create_task(
            self.session.run((reporter.run,), lambda: self.directory.close(self.session.worker))
        )

    async def stop(self) -> bool:
        """As SIGTERM does; says whether the session was still running."""
        was_running = self.ended.cancel()
        await asyncio.wait({self.ended})
        return was_running

    async def submit(
        self, name: str, max_tokens: int = 4, gateway: str | None = None, stop: str = "", n: int = 1, **fields: Any
    ) -> RequestKey:
        """`fields`: further ones of the payload."""
        key = request_key("default", name)
        payload = request_pb2.RequestPayload(
            request_id=name, tenant="default", model=self.pool, prompt_token_ids=[1, 2, 3], max_tokens=max_tokens, n=n,
            sampling=inference_pb2.Sampling(temperature=0), stop=[stop] if stop else [], stop_token_ids=[99], **fields,
        )  # fmt: skip
        move = moves.Submit(
            key, "digest", payload.SerializeToString(), n, new_nonce(), gateway or self.gateway_address, 60_000, 0, 100
        )
        assert (await self.store.submit(move)).answer.verdict == Verdict.OK
        return key

    async def run(self, name: str, n: int = 1, **fields: Any) -> tuple[RequestKey, Seen]:
        """Submit a request that has a reader, and place it; returns once the engine has all its choices."""
        key = await self.submit(name, n=n, **fields)
        seen = self.gateway.expect(key, n=n)
        await self._engaged(key, n)
        return key, seen

    async def lose(self, name: str, **fields: Any) -> RequestKey:
        """Submit a request that nobody reads yet, and take it from the worker: it will run as a second attempt."""
        key = await self.submit(name, **fields)
        await self._engaged(key, 1)
        await self.requeue(key)
        return key

    async def _engaged(self, key: RequestKey, n: int) -> None:
        sequences = self.engine.sequences
        wanted = len(sequences) + n
        await self.place(key)
        await self.engine.until(lambda: len(sequences) == wanted)

    def key(self, name: str) -> RequestKey:
        return request_key("default", name)

    async def cancel(self, key: RequestKey) -> None:
        assert (await self.store.cancel(moves.Cancel(key, "test"))).verdict == Verdict.OK

    async def place(self, key: RequestKey) -> None:
        record = await self.record(key)
        answer = await self.store.place(moves.Place(key, self.fence, record.attempt, self.session.worker))
        assert answer.verdict == Verdict.OK

    async def requeue(self, key: RequestKey) -> None:
        record = await self.record(key)
        move = moves.Requeue(key, record.attempt, new_nonce(), "test", self.fence)
        assert (await self.store.requeue(move)).verdict == Verdict.OK

    def figure(self, name: str, **labels: str) -> float | None:
        """A figure as Prometheus would read it; None: there is none."""
        return self.registry.registry.get_sample_value(name, labels)

    async def record(self, key: RequestKey) -> Record:
        found = await self.store.read(key)
        assert found
        return found[0]

    async def report_until(self, condition: Callable[[request_pb2.WorkerReport], bool]) -> request_pb2.WorkerReport:
        """The session's first report behind now of which the condition holds."""
        events = Events(self.redis, self.pool)
        newest = await events.newest(1)
        after = newest[0][0] if newest else FIRST
        async with asyncio.timeout(10):
            while True:
                for entry_id, event in await events.read(after, 500, 100):
                    after = entry_id
                    if isinstance(event, request_pb2.WorkerReport) and condition(event):
                        return event

    async def record_until(self, key: RequestKey, condition: Callable[[Record], bool]) -> Record:
        """The record once the condition holds of it."""
        async with asyncio.timeout(10):
            while not condition(record := await self.record(key)):
                await asyncio.sleep(0.005)
        return record


async def serve_gateway(gateway: FakeGateway, listen: str = "127.0.0.1:0") -> tuple[rpc.Server, str]:
    """Start a fake gateway; returns its server and its address."""
    server = rpc.Server([])
    delivery_pb2_grpc.add_DeliveryServiceServicer_to_server(gateway, server.grpc)
    return server, await server.start(listen)


@asynccontextmanager
async def served(bench: Bench, journal_interval_ms: int = 5) -> AsyncIterator[Bench]:
    """Lead its pool, and run its gateway and its session until the block is left."""
    server, bench.gateway_address = await serve_gateway(bench.gateway)
    await bench.lead()
    await bench.start_session(journal_interval_ms=journal_interval_ms)
    yield bench
    await bench.stop()
    await server.stop(0)
