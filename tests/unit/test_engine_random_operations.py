"""Whatever comes in whatever order: no block is leaked, none is written while another reads it, memory is never
exceeded, every sequence ends with the tokens it would have had alone, and the rules of a step hold."""

from collections import Counter, deque
from itertools import combinations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.planner import Planner
from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_plan import PENDING_TOKEN, StepPlan, StepResult
from services.worker.engine.step_time import StepTimeModel
from tests.unit.engine_builders import STOP_TOKEN, PretendedRunner, add, limits_of

# Few enough that prompts have common beginnings.
TOKENS = st.sampled_from([5, 6, 7])
SALTS = st.sampled_from([b"", b"other"])


def next_token(context: list[int]) -> int:
    """Depends on every token before, and on their order."""
    total = sum(position * token for position, token in enumerate(context, 1))
    return STOP_TOKEN if total % 11 == 0 else 5 + total % 3


class EngineMachine(RuleBasedStateMachine):
    """Commands, time and steps in any order, beside a plain model of what the front knows."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = 0.0
        self.next_id = 1
        self.commands: dict[int, engine_pb2.AddSequence] = {}
        """Those that have not ended."""
        self.held: set[int] = set()
        self.tokens: dict[int, list[int]] = {}
        """Prompt and answer, as far as the front was told."""
        self.num_sampled: Counter[int] = Counter()
        self.scored_to: dict[int, int] = {}
        """Of those with log-probabilities: position of the next given token to be told of."""
        self.admitted: dict[int, tuple[int, int]] = {}
        """How long each sequence was when it was admitted for the first time, and how much it might write; in that
        order."""
        self.aborted: set[int] = set()
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size_tokens=st.integers(1, 5),
        max_sequences=st.integers(1, 4),
        max_prefill_tokens_per_step=st.integers(1, 9),
        step_budget_ms=st.sampled_from([None, 1.0, 33.0, 1e9]),
        steps_ahead=st.integers(0, 1),
    )
    def start(
        self,
        num_blocks: int,
        block_size_tokens: int,
        max_sequences: int,
        max_prefill_tokens_per_step: int,
        step_budget_ms: float | None,
        steps_ahead: int,
    ) -> None:
        self.limits = limits_of(
            num_blocks, block_size_tokens, max_sequences, max_prefill_tokens_per_step, 40, step_budget_ms
        )
        self.planner = Planner(self.limits, StepTimeModel())
        self.runner = PretendedRunner(self.limits, next_token, steps_ahead=steps_ahead)

    @rule(
        prompt=st.lists(TOKENS, max_size=25),
        max_tokens=st.integers(1, 12),
        known=st.lists(TOKENS | st.just(STOP_TOKEN), max_size=3),
        num_choices=st.sampled_from([1, 1, 3]),
        salt=SALTS,
        held=st.booleans(),
        alone=st.sampled_from([0, 0, 1, 3, 6]),
        remaining_ms=st.sampled_from([0, 0, 1, 50]),
        penalties=st.booleans(),
        logprobs=st.sampled_from([None, None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        known: list[int],
        num_choices: int,
        salt: bytes,
        held: bool,
        alone: int,
        remaining_ms: int,
        penalties: bool,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> None:
        first = self.next_id
        for choice in range(num_choices):
            command = add(
                self.next_id,
                prompt,
                max_tokens=max_tokens,
                known=known[choice:],
                held=held,
                alone_until_tokens=alone,
                remaining_ms=remaining_ms,
                fork_of=first if choice else 0,
                salt=salt,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            command.choice = choice
            if penalties:
                command.payload.sampling.presence_penalty = 1.0
            self.next_id += 1
            self.commands[command.sequence_id] = command
            self.tokens[command.sequence_id] = [*prompt, *known[choice:]]
            if prompt_logprobs is not None and choice == 0:
                self.scored_to[command.sequence_id] = min(1, len(prompt))
            elif logprobs is not None:
                self.scored_to[command.sequence_id] = len(prompt)
            self.runner.salts[command.sequence_id] = salt
            if held:
                self.held.add(command.sequence_id)
            self.planner.add(command, self.now_ms)
            if remaining_ms:
                command.remaining_ms += int(self.now_ms)

    @rule(sequence_id=st.integers(1, 30), forced=st.lists(TOKENS | st.just(STOP_TOKEN), max_size=5))
    def release(self, sequence_id: int, forced: list[int]) -> None:
        self.planner.release(SequenceId(sequence_id), forced)
        if sequence_id in self.held:
            self.held.remove(sequence_id)
            self.tokens[sequence_id] += forced

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
        """As the loop does it. False: nothing is left to do."""
        self.planner.expire(self.now_ms)
        self._note(self.planner.take_ended())
        first_before = next(iter(self.planner._running), None)
        plan = self.planner.plan()
        assert first_before is None or first_before in self.planner._running, "the first had to give way"
        for sequence_id, sequence in self.planner._running.items():
            num_left = sequence.max_tokens - len(sequence.token_ids) + sequence.num_prompt_tokens
            self.admitted.setdefault(sequence_id, (sequence.num_tokens, num_left))
        if plan:
            self._check(plan)
            self.in_flight.append((plan, self.runner.launch(plan).result()))
        busy = bool(self.in_flight)
        if len(self.in_flight) > (self.runner.steps_ahead if plan else 0):
            self._note(self.planner.complete(*self.in_flight.popleft()))
        return busy

    def _check(self, plan: StepPlan) -> None:
        ids = [chunk.sequence_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids) <= self.limits.max_sequences
        prefill_tokens = 0
        for chunk in plan.chunks:
            command = self.commands[chunk.sequence_id]
            assert not command.remaining_ms or command.remaining_ms > self.now_ms, "an expired sequence in a step"
            num_pending = PENDING_TOKEN in chunk.token_ids
            if chunk.sample_index is not None:
                assert chunk.sequence_id not in self.held, "a held sequence samples"
                generated = len(self.tokens[chunk.sequence_id]) - len(command.payload.prompt_token_ids) + num_pending
                assert chunk.sample_index == generated < command.payload.max_tokens
                assert not (num_pending and command.payload.sampling.presence_penalty), (
                    "what it depends on is not known"
                )
            if len(chunk.token_ids) > 1:
                prefill_tokens += len(chunk.token_ids)
        assert prefill_tokens <= self.limits.max_prefill_tokens_per_step
        suspects = [i for i in ids if self._generated(i) < self.commands[i].alone_until_tokens]
        assert not suspects or (len(ids) == 1 and not self.in_flight), "a suspect in company"
        self._check_writers(plan)

    def _check_writers(self, plan: StepPlan) -> None:
        """What a step writes to has one writer. It has no other holder, nor can be found, unless the step fills it."""
        holders = self._holders()
        size = self.limits.block_size_tokens
        written = []
        for chunk in plan.chunks:
            for index in range(chunk.first_position // size, -(-chunk.context_tokens // size)):
                block = chunk.block_table[index]
                written.append(block)
                is_filled = (index + 1) * size <= chunk.context_tokens
                assert is_filled or (holders[block] == 1 and block not in self.planner._cache)
        assert len(written) == len(set(written))

    def _generated(self, sequence_id: int) -> int:
        return len(self.tokens[sequence_id]) - len(self.commands[sequence_id].payload.prompt_token_ids)

    def _note(self, outputs: list[engine_pb2.SequenceOutput]) -> None:
        for output in outputs:
            tokens = self.tokens[output.sequence_id]
            for token in output.token_ids:
                # With planning ahead, nothing of company, preemption or sharing shows.
                assert token == next_token(tokens)
                tokens.append(token)
                self.num_sampled[output.sequence_id] += 1
            self._note_logprobs(output)
            if output.end == engine_pb2.SEQUENCE_END_LENGTH and (ended := self.commands.get(output.sequence_id)):
                assert self._generated(output.sequence_id) >= ended.payload.max_tokens, "it ends too soon"
            if output.end:
                # An end that was not told yet is told, even if the front gave the sequence up meanwhile.
                assert self.commands.pop(output.sequence_id, None) or output.sequence_id in self.aborted
                self.held.discard(output.sequence_id)

    def _note_logprobs(self, output: engine_pb2.SequenceOutput) -> None:
        tokens = self.tokens[output.sequence_id]
        given = [-scored.logprob for scored in output.given_logprobs]
        if given:
            assert output.given_from == self.scored_to[output.sequence_id], "each is told once, in order"
            assert given == tokens[output.given_from : output.given_from + len(given)]
            self.scored_to[output.sequence_id] += len(given)
        if output.end in (engine_pb2.SEQUENCE_END_STOP_TOKEN, engine_pb2.SEQUENCE_END_LENGTH):
            num_given = len(tokens) - self.num_sampled[output.sequence_id]
            assert self.scored_to.get(output.sequence_id, num_given) == num_given, "all of them are told"
        if output.token_ids and self.commands[output.sequence_id].payload.HasField("logprobs"):
            assert [-scored.logprob for scored in output.logprobs] == list(output.token_ids)

    def _holders(self) -> Counter[int]:
        return Counter(block for sequence in self.planner._running.values() for block in sequence.block_table)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if self.next_id > 1:
            holders = self._holders()
            assert len(holders) + self.planner.num_free_blocks == self.limits.num_blocks
            assert {block: holders[block] for block in range(self.limits.num_blocks)} == dict(
                enumerate(self.planner._pool._num_holders)
            )

    @invariant()
    def what_is_kept_of_running_ones_is_what_a_look_at_each_would_say(self) -> None:
        if self.next_id > 1:
            planner = self.planner
            running = list(planner._running.values())
            assert [s for s in running if s.id in planner._begun] == list(planner._begun.values())
            assert len(planner._begun) == sum(s.id in planner._running for s in planner._begun.values())
            prefilled = [s for s in planner._sequences() if not s.is_decoding]
            assert planner.waiting_prefill_tokens == sum(s.num_ready_tokens for s in prefilled)
            begun = any(s.num_ready_tokens > 0 and not s.is_decoding for s in running)
            assert planner.prefills_next == (begun or (bool(planner._waiting) and not planner._is_full))

    def teardown(self) -> None:
        """Released and left alone, everything ends, and every block is free again."""
        if self.next_id == 1:
            return
        for sequence_id in sorted(self.held):
            self.planner.release(SequenceId(sequence_id), [])
        self.held.clear()
        for _ in range(3000):
            if not self._step():
                break
        self._note(self.planner.take_ended())
        assert not self.commands
        assert self.planner.num_free_blocks == self.limits.num_blocks
        for (first, (first_tokens, first_left)), (second, (second_tokens, second_left)) in combinations(
            self.admitted.items(), 2
        ):
            if self.limits.step_budget_ms is None:
                assert first < second or first_left >= second_left, "one overtook another that may write more"
            else:
                # What is held leaves its last token to be computed later, and so is taken for one shorter.
                assert first < second or first_tokens <= second_tokens + 1, "one overtook another that was shorter"


EngineMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestAnyOrderOfEvents = EngineMachine.TestCase
