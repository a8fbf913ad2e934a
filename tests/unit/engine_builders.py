"""What the engine's tests are made of: commands, and a runner and a front that only pretend."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.text.vocabulary import Vocabulary
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import FrontGoneError
from services.worker.engine.planner import Planner
from services.worker.engine.step_plan import (
    PENDING_TOKEN,
    ChunkResult,
    SequenceChunk,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from services.worker.engine.step_time import StepTimeModel

STOP_TOKEN = 999
VOCABULARY = Vocabulary((*(bytes([byte]) for byte in range(256)), *[b""] * 744), (STOP_TOKEN,))
"""A token for each byte, and tokens that say nothing."""


def limits_of(
    num_blocks: int = 16,
    block_size_tokens: int = 4,
    max_sequences: int = 4,
    max_prefill_tokens_per_step: int = 8,
    context_tokens: int = 64,
    step_budget_ms: float | None = 1e9,
) -> EngineLimits:
    return EngineLimits(
        num_blocks=num_blocks,
        block_size_tokens=block_size_tokens,
        max_sequences=max_sequences,
        max_prefill_tokens_per_step=max_prefill_tokens_per_step,
        step_budget_ms=step_budget_ms,
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
    fork_of: int = 0,
    salt: bytes = b"",
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    form: inference_pb2.ResponseFormat | None = None,
    stop_token_ids: Iterable[int] = (STOP_TOKEN,),
) -> engine_pb2.AddSequence:
    """A sequence, greedy unless told; a prompt given as a number is so many tokens, others than its neighbours'."""
    first = 100 * (1 + (sequence_id - 1) % 8)
    prompt_token_ids = list(range(first, first + prompt)) if isinstance(prompt, int) else list(prompt)
    payload = request_pb2.RequestPayload(
        prompt_token_ids=prompt_token_ids,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        cache_salt=salt,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        response_format=form,
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
        fork_of=fork_of,
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

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


@dataclass
class PretendedRunner:
    """Keeps, for every slot of its cache, the salt and all the tokens that its key and value depend on.

    It fails when a chunk's context is not what the sequence's own tokens would have written: when a block is lost,
    skipped, overwritten, or shared with a sequence of another salt or other tokens. The token it samples is the number
    of tokens in the context, unless `next_token` says otherwise, or the next higher one that is allowed;
    log-probabilities are minus the token.
    """

    limits: EngineLimits
    next_token: Callable[[list[int]], int] = len
    salts: dict[int, bytes] = field(default_factory=dict)
    """Of sequences that have one."""
    steps_ahead: int = 0
    plans: list[StepPlan] = field(default_factory=list)
    _slots: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    _last_sampled: dict[int, int] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> PretendedStep:
        self.plans.append(plan)
        self._copy(plan)
        for chunk in plan.chunks:
            self._write(chunk)
        return PretendedStep(StepResult(tuple(self._read(chunk) for chunk in plan.chunks)))

    def prepare(self) -> bool:
        return False

    def _copy(self, plan: StepPlan) -> None:
        size = self.limits.block_size_tokens
        destinations = [copy.destination for copy in plan.block_copies]
        assert len({*destinations, *(copy.source for copy in plan.block_copies)}) == len(destinations) + len(
            {copy.source for copy in plan.block_copies}
        )
        read = {
            (copy.destination, offset): self._slots.get((copy.source, offset))
            for copy in plan.block_copies
            for offset in range(size)
        }
        self._slots.update({slot: content for slot, content in read.items() if content})

    def _write(self, chunk: SequenceChunk) -> None:
        for position, token_id in enumerate(chunk.token_ids, chunk.first_position):
            token = self._last_sampled[chunk.sequence_id] if token_id == PENDING_TOKEN else token_id
            before = self._slot(chunk, position - 1)[1] if position else ()
            self._slots[self._place(chunk, position)] = self.salts.get(chunk.sequence_id, b""), (*before, token)

    def _read(self, chunk: SequenceChunk) -> ChunkResult:
        context = self._slot(chunk, chunk.context_tokens - 1)[1]
        for position in range(chunk.context_tokens):
            salt, tokens = self._slot(chunk, position)
            assert salt == self.salts.get(chunk.sequence_id, b"")
            assert tokens == context[: position + 1]
        scored = tuple(TokenLogprobs(-float(token), ()) for token in chunk.scored_token_ids)
        if chunk.sample_index is None:
            return ChunkResult(None, None, scored)
        token = self._last_sampled[chunk.sequence_id] = self._allowed(chunk, self.next_token([*context]))
        asked = chunk.sampling.num_logprobs is not None
        return ChunkResult(token, TokenLogprobs(-float(token), ()) if asked else None, scored)

    def _allowed(self, chunk: SequenceChunk, wanted: int) -> int:
        mask, num_tokens = chunk.allowed_tokens, self.limits.vocabulary_size
        if mask is None:
            return wanted
        assert len(mask) == -(-num_tokens // 8)
        candidates = (token % num_tokens for token in range(wanted, wanted + num_tokens))
        return next(token for token in candidates if mask[token // 8] >> token % 8 & 1)

    def _slot(self, chunk: SequenceChunk, position: int) -> tuple[bytes, tuple[int, ...]]:
        return self._slots[self._place(chunk, position)]

    def _place(self, chunk: SequenceChunk, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.limits.block_size_tokens)
        return chunk.block_table[block], offset


def blind_result(plan: StepPlan) -> StepResult:
    """A token for each that is to be sampled, nothing looked at: `PretendedRunner` takes long to check thousands."""
    return StepResult(tuple(ChunkResult(None if chunk.sample_index is None else 5) for chunk in plan.chunks))


class Engine:
    """A planner with a pretended runner, step by step."""

    def __init__(self, limits: EngineLimits | None = None) -> None:
        self.limits = limits or limits_of()
        self.planner = Planner(self.limits, StepTimeModel())
        self.runner = PretendedRunner(self.limits)
        self.outputs: list[engine_pb2.SequenceOutput] = []

    def step(self) -> StepPlan | None:
        plan = self.planner.plan()
        if plan:
            self.outputs += self.planner.complete(plan, self.compute(plan))
        self.outputs += self.planner.take_ended()
        return plan

    def compute(self, plan: StepPlan) -> StepResult:
        return self.runner.launch(plan).result()

    def steps(self) -> list[list[tuple[int, int]]]:
        """Run until nothing is left to compute; (sequence, tokens) of each step's chunks."""
        made: list[list[tuple[int, int]]] = []
        while plan := self.step():
            made.append([(chunk.sequence_id, len(chunk.token_ids)) for chunk in plan.chunks])
        return made

    def ends(self) -> dict[int, engine_pb2.SequenceEnd.ValueType]:
        return {output.sequence_id: output.end for output in self.outputs if output.end}

    def tokens(self, sequence_id: int) -> list[int]:
        return [token for output in self.outputs if output.sequence_id == sequence_id for token in output.token_ids]


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


class FinishingFront(PretendedFront):
    """Never goes, and says Shutdown when the loop has nothing left to compute."""

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        if self.looks:
            return super().take(timeout_ms)
        return [shutdown_command()] if timeout_ms is None else []
