"""Whatever comes in whatever order: no block is leaked or shared, every sequence ends, and the rules of a step hold."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.planner import Planner
from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_plan import StepPlan
from tests.unit.engine_builders import STOP_TOKEN, PretendedRunner, add, limits_of


class EngineMachine(RuleBasedStateMachine):
    """Commands, time and steps in any order, beside a plain model of what the front knows."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0.0
        self.next_id = 1
        self.commands: dict[int, engine_pb2.AddSequence] = {}
        """Those that have not ended."""
        self.held: set[int] = set()
        self.generated: dict[int, int] = {}
        self.admitted: list[int] = []
        self.aborted: set[int] = set()

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size_tokens=st.integers(1, 5),
        max_sequences=st.integers(1, 4),
        max_prefill_tokens_per_step=st.integers(1, 9),
    )
    def start(
        self, num_blocks: int, block_size_tokens: int, max_sequences: int, max_prefill_tokens_per_step: int
    ) -> None:
        self.limits = limits_of(num_blocks, block_size_tokens, max_sequences, max_prefill_tokens_per_step, 40)
        self.pool = BlockPool(num_blocks)
        self.planner = Planner(self.limits, self.pool)
        self.runner = PretendedRunner(self.limits, lambda context: STOP_TOKEN if sum(context) % 7 == 0 else 50)

    @rule(
        prompt=st.lists(st.integers(3, 900), max_size=25),
        max_tokens=st.integers(1, 12),
        known=st.lists(st.integers(3, 900) | st.just(STOP_TOKEN), max_size=3),
        held=st.booleans(),
        alone=st.sampled_from([0, 0, 1, 3, 6]),
        remaining_ms=st.sampled_from([0, 0, 1, 50]),
    )
    def add(
        self, prompt: list[int], max_tokens: int, known: list[int], held: bool, alone: int, remaining_ms: int
    ) -> None:
        command = add(
            self.next_id,
            prompt,
            max_tokens=max_tokens,
            known=known,
            held=held,
            alone_until_tokens=alone,
            remaining_ms=remaining_ms,
        )
        self.next_id += 1
        self.commands[command.sequence_id] = command
        self.generated[command.sequence_id] = len(known)
        if held:
            self.held.add(command.sequence_id)
        self.planner.add(command, self.now_ms)
        if remaining_ms:
            command.remaining_ms += int(self.now_ms)

    @rule(sequence_id=st.integers(1, 30), forced=st.lists(st.integers(3, 900) | st.just(STOP_TOKEN), max_size=5))
    def release(self, sequence_id: int, forced: list[int]) -> None:
        self.planner.release(SequenceId(sequence_id), forced)
        if sequence_id in self.held:
            self.held.remove(sequence_id)
            self.generated[sequence_id] += len(forced)

    @rule(sequence_id=st.integers(1, 30))
    def abort(self, sequence_id: int) -> None:
        self.planner.abort(SequenceId(sequence_id))
        if self.commands.pop(sequence_id, None):
            self.aborted.add(sequence_id)
        self.held.discard(sequence_id)

    @rule(passed_ms=st.sampled_from([1.0, 20.0, 60.0]))
    def wait(self, passed_ms: float) -> None:
        self.now_ms += passed_ms

    @precondition(lambda self: self.next_id > 1)
    @rule()
    def step(self) -> None:
        self._step()

    def _step(self) -> bool:
        self.planner.expire(self.now_ms)
        self._note_ends(self.planner.take_ended())
        plan = self.planner.plan()
        if plan is None:
            return False
        self._check(plan)
        outputs = self.planner.complete(plan, self.runner.launch(plan).result())
        for output in outputs:
            assert len(output.token_ids) == 1
            self.generated[output.sequence_id] += 1
            assert self.generated[output.sequence_id] <= self.commands[output.sequence_id].payload.max_tokens
        self._note_ends(outputs)
        return True

    def _check(self, plan: StepPlan) -> None:
        ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids) <= self.limits.max_sequences
        prefill_tokens = 0
        for chunk in plan.chunks:
            command = self.commands[chunk.sequence_id]
            assert not command.remaining_ms or command.remaining_ms > self.now_ms, "an expired sequence in a step"
            if chunk.sample_index is not None:
                assert chunk.sequence_id not in self.held, "a held sequence samples"
                assert chunk.sample_index == self.generated[chunk.sequence_id]
            if chunk.sequence_id not in self.admitted:
                self.admitted.append(chunk.sequence_id)
            if len(chunk.token_ids) > 1:
                prefill_tokens += len(chunk.token_ids)
        assert prefill_tokens <= self.limits.max_prefill_tokens_per_step
        suspects = [i for i in ids if self.generated[i] < self.commands[i].alone_until_tokens]
        assert not suspects or len(ids) == 1, "a suspect in company"

    def _note_ends(self, outputs: list[engine_pb2.SequenceOutput]) -> None:
        for output in outputs:
            if output.end:
                # An end that was not told yet is told, even if the front gave the sequence up meanwhile.
                assert self.commands.pop(output.sequence_id, None) or output.sequence_id in self.aborted
                self.held.discard(output.sequence_id)

    @invariant()
    def blocks_of_a_sequence_are_its_own(self) -> None:
        if self.next_id == 1:
            return
        tables = [sequence.block_table for sequence in self.planner._running.values()]
        blocks = [block for table in tables for block in table]
        assert len(set(blocks)) == len(blocks)
        assert len(blocks) + self.pool.num_free == self.pool.num_blocks

    def teardown(self) -> None:
        """Released and left alone, everything ends, and every block is free again."""
        if self.next_id == 1:
            return
        for sequence_id in sorted(self.held):
            self.planner.release(SequenceId(sequence_id), [])
        self.held.clear()
        for _ in range(2000):
            if not self._step():
                break
        self._note_ends(self.planner.take_ended())
        assert not self.commands
        assert self.pool.num_free == self.pool.num_blocks
        assert self.admitted == sorted(self.admitted), "one was admitted before another that came earlier"


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrderOfEvents = EngineMachine.TestCase
