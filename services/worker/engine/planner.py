"""Decides what each step computes.

Each step takes every decode, then prefill chunks, up to a number of tokens and, while others decode, to a time. Short
prompts go before long ones, but for what those have waited already; of batch work, which has no such time, long answers
before short ones (`batch_work.py`). Sequences are admitted in that order when the blocks of their tokens are free, less
those that the prefix cache has; they take further blocks as they grow. When none is left, the last of the running
sequences is put back to the head of those that wait, to be computed again: so the first always ends, and the rest after
it.

A step may be planned while the one before still runs: what is computed is counted when it is planned, since steps run
in order, and a token not yet known has its place by number.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from concurrent.futures import Future
from itertools import chain

from gen.shoal.fleet.v1 import engine_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.blocks import num_shared_blocks
from services.common.text.grammar_errors import GrammarError
from services.worker.engine import batch_work
from services.worker.engine.block_pool import BlockId, BlockPool
from services.worker.engine.grammar import Grammars, SequenceGrammar
from services.worker.engine.limits import EngineLimits
from services.worker.engine.outputs import last_scored, output_of
from services.worker.engine.prefix_cache import PrefixCache, block_hash
from services.worker.engine.refusal import why_refused, why_tokens_refused, why_too_long
from services.worker.engine.sequence import FIRST_OF_ALL, Sequence, SequenceId, SequenceState
from services.worker.engine.step_budget import StepBudget
from services.worker.engine.step_plan import (
    PENDING_TOKEN,
    BlockCopy,
    SeenTokens,
    SequenceChunk,
    StepPlan,
    StepResult,
)
from services.worker.engine.step_time import StepTimeModel, StepWork

AGEING = 0.25
"""A prompt goes before one that is shorter by so much of each token that was prefilled since it came. So one of 1,000
tokens waits for at most 4,000 tokens of shorter ones."""


class Planner:
    """All sequences of an engine and the blocks they hold. Only the loop calls it; nothing else changes a sequence."""

    def __init__(self, limits: EngineLimits, step_time: StepTimeModel, grammars: Grammars | None = None) -> None:
        """`step_time` is asked for predictions; whoever runs the steps teaches it.

        `grammars`: None: answers of a given form are refused.
        """
        self._limits = limits
        self._step_time = step_time
        self._budget = StepBudget()
        self._is_batch = limits.step_budget_ms is None
        self._rank = batch_work.rank if self._is_batch else _short_prompts_first
        """Who is prefilled and admitted first: the lowest."""
        self._grammars = grammars
        self._cache = PrefixCache()
        self._pool = BlockPool(limits.num_blocks, self._cache)
        # Those that wait in order of arrival, those that run in order of admission. A preempted sequence goes to the
        # head of those that wait, and nobody overtakes it.
        self._waiting: OrderedDict[SequenceId, Sequence] = OrderedDict()
        self._running: OrderedDict[SequenceId, Sequence] = OrderedDict()
        self._begun: dict[SequenceId, Sequence] = {}
        """Those of the running that sampled nothing since they were admitted. The others wait for nothing to be
        prefilled: all but their last token is computed."""
        self._preparing: OrderedDict[SequenceId, tuple[Sequence, Future[SequenceGrammar]]] = OrderedDict()
        """New ones whose grammar is compiled. They come to wait behind the others when it is there."""
        self._copies: dict[BlockId, BlockId] = {}
        """Sources by destination, for the next step: nothing is written before it, so they may wait for one."""
        self._ended_without_step: list[engine_pb2.SequenceOutput] = []
        self._num_steps = 0
        self._num_in_flight = 0
        self._num_preemptions = 0
        self._num_prefilled_tokens = 0
        self._last_came_after_tokens = 0
        """How many there were when the last one came."""
        self._is_full = False
        """Who is to be admitted next found no room, and no block was released since."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free

    @property
    def num_steps(self) -> int:
        """Steps planned so far; the number of the last one."""
        return self._num_steps

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks, or for their grammar."""
        return len(self._waiting) + len(self._preparing)

    @property
    def num_preemptions(self) -> int:
        """Times that a sequence had to give its blocks to one before it."""
        return self._num_preemptions

    @property
    def is_preparing(self) -> bool:
        """Whether `plan` may find more to do in a moment, without another command."""
        return bool(self._preparing)

    @property
    def prefills_next(self) -> bool:
        """Whether the next step is to hold a prompt, or a part of one. O(sequences that do not decode)."""
        begun = any(sequence.is_prefilling for sequence in self._begun.values())
        return begun or (bool(self._waiting) and not self._is_full)

    @property
    def waiting_prefill_tokens(self) -> int:
        """Tokens, of prompts and forced ones, not yet computed. O(sequences that do not decode)."""
        preparing = (sequence for sequence, _ in self._preparing.values() if sequence.is_prefilling)
        return sum(sequence.num_ready_tokens for sequence in chain(self._to_prefill(), preparing))

    @property
    def next_prefill_ms(self) -> float:
        """How long the next step takes at most by what waits to be prefilled, if it is no long one. O(sequences that do
        not decode)."""
        ms = self._ms(min(self.waiting_prefill_tokens, self._limits.max_prefill_tokens_per_step))
        return ms if self._is_batch else min(ms, self._budget.stretched_ms(self._budget_ms))

    @property
    def next_deadline_ms(self) -> float | None:
        """When the next sequence expires, in the engine's time; None if none can. O(sequences)."""
        return min((s.deadline_ms for s in self._sequences() if s.deadline_ms is not None), default=None)

    def add(self, add: engine_pb2.AddSequence, now_ms: float) -> None:
        """Take in a sequence; it waits behind those that came before. Raises ValueError for an id in use."""
        sequence = Sequence.from_command(add, now_ms)
        if self._find(sequence.id):
            raise ValueError(f"sequence {sequence.id} is in the engine already")
        self._waiting[sequence.id] = sequence
        sequence.came_after_tokens = self._last_came_after_tokens = self._num_prefilled_tokens
        if problem := why_refused(add.payload, sequence, self._limits):
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
        elif add.payload.response_format.WhichOneof("format"):
            self._prepare(sequence, add.payload.response_format)
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
        if problem := why_too_long(sequence, self._limits):
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
            return
        if sequence.id not in self._preparing:
            self._follow_or_end(sequence)

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
        self._take_prepared()
        may_admit = self._make_room()
        alone = self._alone()
        chunks = self._chunk_alone(alone) if alone else self._chunks(may_admit)
        if not chunks and not alone and (alone := self._alone()):
            # It was only admitted by the search for prefills.
            chunks = self._chunk_alone(alone)
        if not chunks:
            return None
        for chunk in chunks:
            self._count(self._running[chunk.sequence_id], chunk)
        copies = tuple(BlockCopy(source, destination) for destination, source in self._copies.items())
        self._copies.clear()
        self._num_steps += 1
        self._num_in_flight += 1
        return StepPlan(self._num_steps, tuple(chunks), copies)

    def complete(self, plan: StepPlan, result: StepResult) -> list[engine_pb2.SequenceOutput]:
        """Take in what a step computed: sequences grow, some end. Returns an output for each that has something new.

        Steps are completed in the order of their plans. What was aborted or has ended since the plan is passed over.
        """
        self._num_in_flight -= 1
        outputs = []
        for chunk, computed in zip(plan.chunks, result.chunks, strict=True):
            sequence = self._find(chunk.sequence_id)
            if sequence is None:
                continue
            samples = computed.token_id is not None
            if computed.token_id is not None:
                sequence.token_ids.append(computed.token_id)
                sequence.num_pending_tokens -= 1
            if computed.scored:
                sequence.tell_from = last_scored(chunk) + 1
            self._cache_filled_blocks(sequence, chunk)
            problem = _follow(sequence) if samples else ""
            end = engine_pb2.SEQUENCE_END_UNSPECIFIED
            if problem:
                end = engine_pb2.SEQUENCE_END_FAILED
            elif samples or (sequence.scores_only and sequence.is_told):
                end = sequence.end_reached()
            if samples or computed.scored:
                outputs.append(output_of(sequence, chunk, computed, end, problem))
            if end:
                self._end(sequence)
        return outputs

    # Forms of answers

    def _prepare(self, sequence: Sequence, form: inference_pb2.ResponseFormat) -> None:
        """Have a new sequence's grammar compiled; it is not admitted before."""
        if self._grammars is None:
            problem = "this engine does not support response_format"
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
            return
        del self._waiting[sequence.id]
        known = sequence.token_ids[sequence.num_prompt_tokens :]
        self._preparing[sequence.id] = sequence, self._grammars.prepare(form, sequence.stop_token_ids, known)

    def _take_prepared(self) -> None:
        """Let those wait for room whose grammar is there. O(sequences that it is compiled for)."""
        for sequence, prepared in [entry for entry in self._preparing.values() if entry[1].done()]:
            del self._preparing[sequence.id]
            self._waiting[sequence.id] = sequence
            try:
                sequence.grammar = prepared.result()
            except GrammarError as error:
                self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, str(error))
                continue
            if not sequence.held:
                # It may have been released meanwhile, with further tokens.
                self._follow_or_end(sequence)

    def _follow_or_end(self, sequence: Sequence) -> None:
        """A sequence that may sample has got tokens outside a step: it goes on behind them, or has ended with them."""
        if problem := _follow(sequence):
            self._end_without_step(sequence, engine_pb2.SEQUENCE_END_FAILED, problem)
        else:
            self._end_if_complete(sequence)

    # Blocks

    def _make_room(self) -> bool:
        """See to it that running sequences hold the blocks of all their tokens, the first ones at the cost of the last.

        False: some had to give way, so there is no room for new ones.
        """
        num_preempted = self._num_preemptions
        size = self._limits.block_size_tokens
        lacking = [s for s in self._running.values() if s.num_tokens > size * len(s.block_table)]
        for sequence in lacking:
            num_missing = self._limits.blocks_for(sequence.num_tokens) - len(sequence.block_table)
            while sequence.state == SequenceState.RUNNING and num_missing > self._pool.num_free:
                self._preempt(next(reversed(self._running.values())))
            if sequence.state == SequenceState.RUNNING:
                sequence.block_table += self._pool.allocate(num_missing)
        return self._num_preemptions == num_preempted

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it is computed again later, from what the prefix cache still has by then."""
        self._release_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.move_to(SequenceState.WAITING)
        del self._running[sequence.id]
        self._begun.pop(sequence.id, None)
        self._waiting[sequence.id] = sequence
        self._waiting.move_to_end(sequence.id, last=False)
        sequence.came_after_tokens = FIRST_OF_ALL
        self._num_preemptions += 1

    def _cache_filled_blocks(self, sequence: Sequence, chunk: SequenceChunk) -> None:
        """Let others find the blocks that a chunk fills; those before it were found, shared or filled before.

        From the plan on, where their tokens are known: who finds them is computed in a later step, or in the same one,
        in which all keys and values of a layer are written before any is read.
        """
        size = self._limits.block_size_tokens
        first, end = chunk.first_position // size, min(chunk.context_tokens, len(sequence.token_ids)) // size
        if first >= end or sequence.state != SequenceState.RUNNING:
            return
        self._hash_blocks(sequence, end)
        for index in range(first, end):
            self._cache.add(sequence.block_table[index], sequence.block_hashes[index])

    def _hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        size = self._limits.block_size_tokens
        hashes = sequence.block_hashes
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else sequence.cache_salt
            hashes.append(block_hash(parent, sequence.token_ids[index * size : (index + 1) * size]))

    def _release_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = ()
        self._is_full = False

    # Admission

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its blocks, if there are enough. False: there are not, or it is not to be yet."""
        if len(self._running) >= self._limits.max_sequences or sequence.num_pending_tokens:
            return False
        parent = self._running.get(sequence.fork_of)
        if parent and not parent.has_computed_prompt:
            return False
        shared = self._blocks_of_prompt(parent, sequence) if parent else self._cached_blocks(sequence)
        num_new = self._limits.blocks_for(sequence.num_tokens) - len(shared)
        # One block more for each that runs already: it will want it soon, and would take it back from this one.
        if num_new + self._pool.num_free_of(shared) + len(self._running) > self._pool.num_free and self._running:
            return False
        self._pool.share(shared)
        sequence.block_table = (*shared, *self._pool.allocate(num_new))
        sequence.num_computed_tokens = len(shared) * self._limits.block_size_tokens
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = 0 if parent else min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        if parent:
            self._copy_rest_of_prompt(parent, sequence)
        sequence.move_to(SequenceState.RUNNING)
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        self._begun[sequence.id] = sequence
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[BlockId]:
        """The blocks that hold its first tokens already: all but the last token, and but what is to be scored."""
        num_tokens = len(sequence.token_ids) - 1
        if sequence.score_from is not None:
            num_tokens = min(num_tokens, sequence.score_from - 1)
        num_blocks = num_tokens // self._limits.block_size_tokens
        self._hash_blocks(sequence, num_blocks)
        return self._cache.find(sequence.block_hashes[:num_blocks])

    def _blocks_of_prompt(self, parent: Sequence, sequence: Sequence) -> list[BlockId]:
        """The full blocks of the prompt, all but its last token, that another choice has computed."""
        num_blocks = num_shared_blocks(sequence.num_prompt_tokens, self._limits.block_size_tokens)
        return list(parent.block_table[:num_blocks])

    def _copy_rest_of_prompt(self, parent: Sequence, sequence: Sequence) -> None:
        """Take over what another choice has computed in the block that both go on to write."""
        index = sequence.num_computed_tokens // self._limits.block_size_tokens
        if sequence.num_prompt_tokens - 1 > sequence.num_computed_tokens:
            self._copies[sequence.block_table[index]] = parent.block_table[index]
            sequence.num_computed_tokens = sequence.num_prompt_tokens - 1

    # Chunks

    def _alone(self) -> Sequence | None:
        """The first running sequence that must be alone in its steps."""
        suspects = (sequence for sequence in self._running.values() if sequence.alone_until_tokens)
        return next((sequence for sequence in suspects if sequence.wants_step_alone), None)

    def _chunk_alone(self, sequence: Sequence) -> list[SequenceChunk]:
        """Its next chunk; nothing while another step is in flight: it would not be alone if the engine died then."""
        most_tokens = self._limits.max_prefill_tokens_per_step
        return [] if self._num_in_flight else [self._chunk(sequence, min(sequence.num_ready_tokens, most_tokens))]

    def _chunks(self, may_admit: bool) -> list[SequenceChunk]:
        decodes = [self._chunk(sequence, 1) for sequence in self._running.values() if sequence.is_decoding]
        if not self._is_batch:
            self._budget.begin_step(len(decodes), self._ms(self.waiting_prefill_tokens))
        begun = [sequence for sequence in self._begun.values() if sequence.is_prefilling]
        if not begun and not self._waiting:
            return decodes
        return decodes + self._prefills(decodes, self._prefilling(begun, may_admit))

    def _prefills(self, decodes: list[SequenceChunk], sequences: Iterator[Sequence]) -> list[SequenceChunk]:
        """Chunks of sequences, the first first, as many as a step takes besides."""
        chunks: list[SequenceChunk] = []
        work = StepWork.of(decodes)
        tokens_left = self._limits.max_prefill_tokens_per_step
        most_ms = None
        if self._is_batch and self._have_all_come:
            tokens_left = batch_work.prefill_tokens(
                self._limits, len(decodes), self._running.values(), self._to_prefill()
            )
        for sequence in sequences:
            if not self._is_batch and not chunks:
                most_ms = self._budget.spend(self._budget_ms, len(decodes), self._ms(sequence.num_ready_tokens))
            if most_ms is not None:
                within = self._step_time.tokens_within(
                    most_ms, work, sequence.num_computed_tokens, are_scored=sequence.score_from is not None
                )
                # Not less than a block for the first: a prompt goes on, however long the decodes alone take.
                tokens_left = min(tokens_left, max(within, 0 if chunks else self._limits.block_size_tokens))
            if tokens_left == 0:
                break
            chunk = self._chunk(sequence, min(sequence.num_ready_tokens, tokens_left))
            chunks.append(chunk)
            self._cache_filled_blocks(sequence, chunk)
            work = work.with_prefill(chunk)
            self._num_prefilled_tokens += len(chunk.token_ids)
            tokens_left -= len(chunk.token_ids)
            if tokens_left == 0:
                break
        return chunks

    @property
    def _budget_ms(self) -> float:
        """How long a step with decodes is to take, if there is a limit. Cut any shorter, a prompt's launch would take
        longer."""
        return max(self._limits.step_budget_ms or 0.0, self._step_time.launch_ms)

    @property
    def _have_all_come(self) -> bool:
        """Whether nobody came while as many tokens were prefilled as a step takes. Else more may wait for room here."""
        return self._num_prefilled_tokens - self._last_came_after_tokens >= self._limits.max_prefill_tokens_per_step

    def _to_prefill(self) -> Iterator[Sequence]:
        """Those that a step could prefill, if there is room for them. O(sequences that do not decode)."""
        not_sampled = chain(self._begun.values(), self._waiting.values())
        return (sequence for sequence in not_sampled if sequence.is_prefilling)

    def _ms(self, num_prefill_tokens: int) -> float:
        """What so many tokens add to a step, by their number alone."""
        return num_prefill_tokens * self._step_time.coefficients.ms_per_token

    def _prefilling(self, begun: list[Sequence], may_admit: bool) -> Iterator[Sequence]:
        """Sequences to prefill, in order. Those that wait are admitted as they are asked for; when the first of them
        cannot be, none is: large ones would starve."""
        running = deque(sorted(begun, key=self._rank))
        while running or may_admit:
            first = self._first_waiting() if may_admit else None
            if first is None or (running and self._rank(running[0]) <= self._rank(first)):
                may_admit = may_admit and first is not None
                if not running:
                    return
                yield running.popleft()
            elif not self._admit(first):
                may_admit = False
                self._is_full = True
            elif first.wants_step_alone:
                return  # The next step is its own.
            elif first.num_ready_tokens > 0:
                yield first

    def _first_waiting(self) -> Sequence | None:
        """Who is to be admitted next; None: nobody waits."""
        return min(self._waiting.values(), key=self._rank, default=None)

    def _chunk(self, sequence: Sequence, count: int) -> SequenceChunk:
        """The next `count` tokens of a sequence, of those that are ready."""
        first, num_tokens = sequence.num_computed_tokens, sequence.num_tokens
        end = first + count
        samples = end == num_tokens
        token_ids = tuple(sequence.token_ids[first:end])
        # By place: names take half as long again, of hundreds in each step.
        return SequenceChunk(
            sequence.id,
            token_ids if len(token_ids) == end - first else (*token_ids, PENDING_TOKEN),
            first,
            sequence.block_table,
            sequence.sampling,
            num_tokens - sequence.num_prompt_tokens if samples else None,
            () if sequence.score_from is None else _scored(sequence, sequence.score_from, first, end),
            _seen(sequence) if samples and sequence.sampling.has_penalties else None,
            sequence.grammar.allowed_tokens if samples and sequence.grammar else None,
        )

    def _count(self, sequence: Sequence, chunk: SequenceChunk) -> None:
        """A chunk is in the step: from the next one on, what it computes is there."""
        end = sequence.num_computed_tokens = chunk.first_position + len(chunk.token_ids)
        if chunk.sample_index is not None:
            sequence.num_pending_tokens += 1
            sequence.num_sampled_tokens += 1
            sequence.score_from = None
            self._begun.pop(sequence.id, None)
        elif sequence.score_from is not None:
            sequence.score_from = max(sequence.score_from, end + 1)

    # Ends

    def _end_if_complete(self, sequence: Sequence) -> None:
        """End a sequence that came with all its tokens, once the log-probabilities of these are told."""
        end = sequence.end_reached()
        sequence.scores_only = bool(end)
        if end and sequence.is_told:
            self._end_without_step(sequence, end)

    def _end_without_step(self, sequence: Sequence, end: engine_pb2.SequenceEnd.ValueType, error: str = "") -> None:
        self._end(sequence)
        self._ended_without_step.append(engine_pb2.SequenceOutput(sequence_id=sequence.id, end=end, error=error))

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        self._waiting.pop(sequence.id, None)
        self._running.pop(sequence.id, None)
        self._begun.pop(sequence.id, None)
        if entry := self._preparing.pop(sequence.id, None):
            entry[1].cancel()
        self._release_blocks(sequence)
        sequence.move_to(SequenceState.ENDED)

    def _find(self, sequence_id: SequenceId) -> Sequence | None:
        if found := self._running.get(sequence_id) or self._waiting.get(sequence_id):
            return found
        entry = self._preparing.get(sequence_id)
        return entry[0] if entry else None

    def _sequences(self) -> Iterator[Sequence]:
        yield from self._running.values()
        yield from self._waiting.values()
        yield from (sequence for sequence, _ in self._preparing.values())


def _short_prompts_first(sequence: Sequence) -> float:
    """The lowest goes first."""
    return sequence.num_ready_tokens + AGEING * sequence.came_after_tokens


def _follow(sequence: Sequence) -> str:
    """Take its grammar, if it has one, to the end of its tokens. Returns why that cannot be, or nothing."""
    if sequence.grammar is None:
        return ""
    try:
        sequence.grammar.follow(sequence.token_ids[sequence.num_prompt_tokens :])
    except GrammarError as error:
        return str(error)
    return ""


def _scored(sequence: Sequence, score_from: int, first: int, end: int) -> tuple[int, ...]:
    """Given tokens that a chunk of positions first to end - 1 has the log-probabilities of: those behind its tokens."""
    return tuple(sequence.token_ids[max(first + 1, score_from) : end + 1])


def _seen(sequence: Sequence) -> SeenTokens:
    tokens = sequence.token_ids
    return SeenTokens(tuple(tokens[: sequence.num_prompt_tokens]), tuple(tokens[sequence.num_prompt_tokens :]))
