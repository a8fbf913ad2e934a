"""What the engine's tests are made of: commands, and a runner and a front that only pretend."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import FrontGoneError
from services.worker.engine.step_plan import StepPlan, StepResult

STOP_TOKEN = 999


def limits_of(
    num_blocks: int = 16,
    block_size_tokens: int = 4,
    max_sequences: int = 4,
    max_prefill_tokens_per_step: int = 8,
    context_tokens: int = 64,
) -> EngineLimits:
    return EngineLimits(
        num_blocks=num_blocks,
        block_size_tokens=block_size_tokens,
        max_sequences=max_sequences,
        max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        context_tokens=context_tokens,
        vocabulary_size=1000,
    )


def add(
    sequence_id: int,
    prompt: Sequence[int] | int = 5,
    *,
    max_tokens: int = 4,
    known: Iterable[int] = (),
    held: bool = False,
    alone_until_tokens: int = 0,
    remaining_ms: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
) -> engine_pb2.AddSequence:
    """A sequence, greedy unless told; a prompt given as a number is so many tokens."""
    prompt_token_ids = list(range(100, 100 + prompt)) if isinstance(prompt, int) else list(prompt)
    payload = request_pb2.RequestPayload(
        prompt_token_ids=prompt_token_ids, max_tokens=max_tokens, stop_token_ids=[STOP_TOKEN]
    )
    payload.sampling.temperature = temperature
    payload.sampling.seed = seed
    return engine_pb2.AddSequence(
        sequence_id=sequence_id,
        payload=payload,
        known_token_ids=known,
        held=held,
        alone_until_tokens=alone_until_tokens,
        remaining_ms=remaining_ms,
    )


def add_command(sequence: engine_pb2.AddSequence) -> engine_pb2.EngineCommand:
    return engine_pb2.EngineCommand(add=sequence)


def abort_command(sequence_id: int) -> engine_pb2.EngineCommand:
    return engine_pb2.EngineCommand(abort=engine_pb2.AbortSequence(sequence_id=sequence_id))


def release_command(sequence_id: int, forced: Iterable[int] = ()) -> engine_pb2.EngineCommand:
    return engine_pb2.EngineCommand(
        release=engine_pb2.ReleaseSequence(sequence_id=sequence_id, forced_token_ids=forced)
    )


def shutdown_command() -> engine_pb2.EngineCommand:
    return engine_pb2.EngineCommand(shutdown=engine_pb2.EngineCommand.Shutdown())


@dataclass
class PretendedStep:
    _result: StepResult

    def result(self) -> StepResult:
        return self._result


@dataclass
class PretendedRunner:
    """Keeps, for every slot of its cache, the sequence and token written last, and reads contexts back before sampling.

    It fails when a context is not what the sequence's own chunks have written: when a block is shared, lost or skipped.
    The token it samples is the number of tokens in the context, unless `next_token` says otherwise.
    """

    limits: EngineLimits
    next_token: Callable[[list[int]], int] = len
    plans: list[StepPlan] = field(default_factory=list)
    _slots: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> PretendedStep:
        self.plans.append(plan)
        return PretendedStep(StepResult(tuple(self._compute(plan))))

    def _compute(self, plan: StepPlan) -> Iterable[int | None]:
        size = self.limits.block_size_tokens
        for chunk in plan.chunks:
            for position, token_id in enumerate(chunk.token_ids, chunk.first_position):
                self._slots[chunk.block_table[position // size], position % size] = chunk.sequence_id, token_id
        for chunk in plan.chunks:
            context = []
            for position in range(chunk.context_tokens):
                owner, token_id = self._slots[chunk.block_table[position // size], position % size]
                assert owner == chunk.sequence_id
                context.append(token_id)
            yield None if chunk.sample_index is None else self.next_token(context)


@dataclass
class PretendedFront:
    """Gives one list of commands at each look, and notes what it is told. Out of lists, it is gone.

    `at` are things to do when it is looked at, by the number of the look.
    """

    looks: list[list[engine_pb2.EngineCommand]]
    events: list[engine_pb2.EngineEvent] = field(default_factory=list)
    timeouts_ms: list[float | None] = field(default_factory=list)
    on_take: Callable[[float | None], None] = lambda timeout_ms: None

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        self.timeouts_ms.append(timeout_ms)
        self.on_take(timeout_ms)
        if not self.looks:
            raise FrontGoneError
        return self.looks.pop(0)

    def send(self, event: engine_pb2.EngineEvent) -> None:
        self.events.append(event)

    @property
    def steps_done(self) -> list[engine_pb2.StepDone]:
        return [event.done for event in self.events if event.HasField("done")]

    @property
    def outputs(self) -> list[engine_pb2.SequenceOutput]:
        return [output for done in self.steps_done for output in done.outputs]
