"""Decides what each step computes.

Each step takes every decode, then prefill chunks, in order of admission, up to a number of tokens. Sequences are
admitted in order of arrival, each when all the blocks that it can ever need are free: so nothing admitted ever runs out
of memory.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.limits import EngineLimits
from services.worker.engine.refusal import why_refused, why_tokens_refused
from services.worker.engine.sequence import Sequence, SequenceId, SequenceState
from services.worker.engine.step_plan import SequenceChunk, StepPlan, StepResult


class Planner:
    """All sequences of an engine and the blocks they hold. Only the loop calls it; nothing else changes a sequence."""

    def __init__(self, limits: EngineLimits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        # Both in order of arrival, which is also the order of admission.
        self._waiting: dict[SequenceId, Sequence] = {}
        self._running: dict[SequenceId, Sequence] = {}
        self._ended_without_step: list[engine_pb2.SequenceOutput] = []
        self._num_steps = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free

    @property
    def num_steps(self) -> int:
        """Steps planned so far; the number of the last one."""
        return self._num_steps

    @property
    def waiting_prefill_tokens(self) -> int:
        """Tokens, of prompts and forced ones, not yet computed. O(sequences)."""
        return sum(sequence.num_ready_tokens for sequence in self._sequences() if not sequence.is_decoding)

    @property
    def next_deadline_ms(self) -> float | None:
        """When the next sequence expires, in the engine's time; None if none can. O(sequences)."""
        return min((s.deadline_ms for s in self._sequences() if s.deadline_ms is not None), default=None)

    def add(self, add: engine_pb2.AddSequence, now_ms: float) -> None:
        """Take in a sequence; it waits behind those that came before. Raises ValueError for an id in use."""
        sequence = Sequence.from_command(add, now_ms)
        if sequence.id in self._waiting or sequence.id in self._running:
            raise ValueError(f"sequence {sequence.id} is in the engine already")
        self._waiting[sequence.id] = sequence
        if problem := why_refused(add.payload, sequence, self._limits):
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
        elif not sequence.held:
            self._end_if_complete(sequence)

    def abort(self, sequence_id: SequenceId) -> None:
        """Forget a sequence and free its blocks; nothing more is said about it. An unknown one may just have ended."""
        if sequence := self._find(sequence_id):
            self._end(sequence)

    def release(self, sequence_id: SequenceId, forced_token_ids: Tokens[int]) -> None:
        """Let a held sequence sample, after these tokens. An unknown one may just have ended."""
        sequence = self._find(sequence_id)
        if sequence is None or not sequence.held:
            return
        if problem := why_tokens_refused(forced_token_ids, self._limits):
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
            return
        sequence.held = False
        sequence.token_ids.extend(forced_token_ids)
        self._end_if_complete(sequence)

    def expire(self, now_ms: float) -> None:
        """End every sequence whose time has run out. O(sequences)."""
        late = [s for s in self._sequences() if s.deadline_ms is not None and s.deadline_ms <= now_ms]
        for sequence in late:
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_EXPIRED)

    def take_ended(self) -> list[engine_pb2.SequenceOutput]:
        """Return, once, the outputs of sequences that ended outside a step."""
        ended, self._ended_without_step = self._ended_without_step, []
        return ended

    def plan(self) -> StepPlan | None:
        """Decide the next step and admit sequences for it; None if nothing can be computed now. O(running)."""
        # Asked twice: what must be alone may only have been admitted by the search for prefills.
        chunks = self._chunk_alone() or [*self._decodes(), *self._prefills()] or self._chunk_alone()
        if not chunks:
            return None
        self._num_steps += 1
        return StepPlan(self._num_steps, tuple(chunks))

    def complete(self, plan: StepPlan, result: StepResult) -> list[engine_pb2.SequenceOutput]:
        """Take in what a step computed: sequences grow, some end. Returns an output for each sampled token."""
        outputs = []
        for chunk, token_id in zip(plan.chunks, result.sampled_token_ids, strict=True):
            sequence = self._running[chunk.sequence_id]
            sequence.num_computed_tokens += len(chunk.token_ids)
            if token_id is None:
                continue
            sequence.token_ids.append(token_id)
            sequence.num_sampled_tokens += 1
            end = sequence.end_reached()
            outputs.append(engine_pb2.SequenceOutput(sequence_id=sequence.id, token_ids=[token_id], end=end))
            if end:
                self._end(sequence)
        return outputs

    def _chunk_alone(self) -> list[SequenceChunk]:
        """The next chunk of the first running sequence that must be alone in its steps."""
        for sequence in self._running.values():
            if sequence.wants_step_alone:
                return [self._chunk(sequence, self._limits.max_prefill_tokens_per_step)]
        return []

    def _decodes(self) -> list[SequenceChunk]:
        return [self._chunk(sequence, 1) for sequence in self._running.values() if sequence.is_decoding]

    def _prefills(self) -> Iterator[SequenceChunk]:
        budget_tokens = self._limits.max_prefill_tokens_per_step
        for sequence in self._prefilling():
            chunk = self._chunk(sequence, budget_tokens)
            yield chunk
            budget_tokens -= len(chunk.token_ids)
            if budget_tokens == 0:
                return

    def _prefilling(self) -> Iterator[Sequence]:
        """Running sequences that prefill, then further ones, admitted as they are asked for."""
        yield from [s for s in self._running.values() if s.num_ready_tokens > 0 and not s.is_decoding]
        while self._waiting and (sequence := self._admit_first()):
            if sequence.wants_step_alone:
                return  # The next step is its own.
            if sequence.num_ready_tokens > 0:
                yield sequence

    def _admit_first(self) -> Sequence | None:
        """Reserve blocks for the sequence that waits longest. None overtakes it: large ones would starve."""
        sequence = next(iter(self._waiting.values()))
        num_blocks = self._limits.blocks_for(sequence.most_tokens)
        if len(self._running) >= self._limits.max_sequences or num_blocks > self._pool.num_free:
            return None
        sequence.block_table = self._pool.allocate(num_blocks)
        sequence.move_to(SequenceState.RUNNING)
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        return sequence

    def _chunk(self, sequence: Sequence, most_tokens: int) -> SequenceChunk:
        first = sequence.num_computed_tokens
        num_tokens = min(sequence.num_ready_tokens, most_tokens)
        samples = first + num_tokens == len(sequence.token_ids)
        return SequenceChunk(
            sequence_id=sequence.id,
            token_ids=tuple(sequence.token_ids[first : first + num_tokens]),
            first_position=first,
            block_table=sequence.block_table,
            sampling=sequence.sampling,
            sample_index=sequence.num_generated_tokens if samples else None,
        )

    def _end_if_complete(self, sequence: Sequence) -> None:
        if end := sequence.end_reached():
            self._end_without_step(sequence, end)

    def _end_without_step(self, sequence: Sequence, end: engine_pb2.SequenceEnd.ValueType, error: str = "") -> None:
        self._end(sequence)
        self._ended_without_step.append(engine_pb2.SequenceOutput(sequence_id=sequence.id, end=end, error=error))

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence. The only place where blocks are freed."""
        self._waiting.pop(sequence.id, None)
        self._running.pop(sequence.id, None)
        self._pool.free(sequence.block_table)
        sequence.block_table = ()
        sequence.move_to(SequenceState.ENDED)

    def _find(self, sequence_id: SequenceId) -> Sequence | None:
        return self._running.get(sequence_id) or self._waiting.get(sequence_id)

    def _sequences(self) -> Iterator[Sequence]:
        yield from self._waiting.values()
        yield from self._running.values()
