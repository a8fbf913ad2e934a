"""A sequence: one choice of one request, as the engine sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.block_pool import BlockId
from services.worker.engine.grammar import SequenceGrammar
from services.worker.engine.prefix_cache import BlockHash

SequenceId = NewType("SequenceId", int)

FIRST_OF_ALL = float("-inf")
"""`came_after_tokens` of a sequence that had begun already."""


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """It holds no blocks: it is new, or was preempted."""
    RUNNING = "running"
    """It holds the blocks of all its tokens."""
    ENDED = "ended"
    """It holds nothing; the engine has forgotten it."""


TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.ENDED}),
    SequenceState.RUNNING: frozenset({SequenceState.WAITING, SequenceState.ENDED}),
    SequenceState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a sequence's tokens are chosen. Noise comes from (seed, choice, index of the token in its choice) alone."""

    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    min_p: float = 0.0
    """0: off."""
    seed: int = 0
    choice: int = 0
    repetition_penalty: float = 1.0
    """1: off."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    num_logprobs: int | None = None
    """Most probable tokens reported with each generated token; None: no log-probabilities."""
    num_prompt_logprobs: int | None = None
    """The same with each prompt token."""

    @classmethod
    def from_command(cls, add: engine_pb2.AddSequence) -> "SamplingParameters":
        """Read a command's sampling; absent fields have the public API's defaults."""
        payload, sampling = add.payload, add.payload.sampling
        return cls(
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            seed=sampling.seed,
            choice=add.choice,
            repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            num_logprobs=payload.logprobs if payload.HasField("logprobs") else None,
            # One choice is enough: the prompt is the same.
            num_prompt_logprobs=payload.prompt_logprobs
            if payload.HasField("prompt_logprobs") and add.choice == 0
            else None,
        )

    @property
    def has_penalties(self) -> bool:
        """Whether the choice of a token depends on those before it."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def num_scored_logprobs(self) -> int:
        """Most probable tokens reported with each given token: of the prompt or known, as more are asked for."""
        return max(self.num_logprobs or 0, self.num_prompt_logprobs or 0)


@dataclass(slots=True)
class Sequence:
    """A sequence and how far it is computed. Only the planner changes it."""

    id: SequenceId
    token_ids: list[int]
    """The prompt, then the generated tokens: known, forced or sampled."""
    num_prompt_tokens: int
    max_tokens: int
    """Most generated tokens, known and forced ones included."""
    stop_token_ids: frozenset[int]
    sampling: SamplingParameters
    cache_salt: bytes
    """Prefixes are shared only with sequences of the same salt."""
    fork_of: SequenceId
    """A choice of the same request whose prompt it may share; 0: none."""
    held: bool
    """Nothing is sampled for now."""
    alone_until_tokens: int
    """Until it has so many generated tokens, its steps hold no other sequence."""
    deadline_ms: float | None
    """In the engine's time."""
    score_from: int | None
    """Position of the next given token whose log-probability is to be computed; None: of none."""
    tell_from: int | None
    """Position of the next given token whose log-probability is to be told; None: of none."""
    scores_only: bool = False
    """It came with all its tokens: it ends once their log-probabilities are told."""
    came_after_tokens: float = 0.0
    """How many tokens of prompts the engine had prefilled when it came."""
    state: SequenceState = SequenceState.WAITING
    block_table: tuple[BlockId, ...] = ()
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of its first full blocks, as far as they were wanted."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache, or will be once the steps launched so far are done."""
    num_pending_tokens: int = 0
    """Tokens that steps in flight will sample: 0 or 1, and 2 from the launch of a step until the one before is done."""
    num_sampled_tokens: int = 0
    """Tokens sampled by this engine, pending ones included."""
    grammar: SequenceGrammar | None = None
    """What its tokens may be; None: anything, or it is still compiled."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at its first admission."""

    @classmethod
    def from_command(cls, add: engine_pb2.AddSequence, now_ms: float) -> "Sequence":
        """Make a waiting sequence of the front's command, taken at `now_ms`."""
        payload = add.payload
        sampling = SamplingParameters.from_command(add)
        num_prompt_tokens = len(payload.prompt_token_ids)
        score_from = None
        if sampling.num_prompt_logprobs is not None:
            score_from = 1
        elif sampling.num_logprobs is not None:
            score_from = num_prompt_tokens
        return cls(
            id=SequenceId(add.sequence_id),
            token_ids=[*payload.prompt_token_ids, *add.known_token_ids],
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=payload.max_tokens,
            stop_token_ids=frozenset(payload.stop_token_ids),
            sampling=sampling,
            cache_salt=payload.cache_salt,
            fork_of=SequenceId(add.fork_of),
            held=add.held,
            alone_until_tokens=add.alone_until_tokens,
            deadline_ms=now_ms + add.remaining_ms if add.remaining_ms else None,
            score_from=score_from,
            tell_from=score_from,
        )

    @property
    def most_tokens(self) -> int:
        """Most tokens it can ever have, prompt included. A held one may come with more than max_tokens."""
        return max(self.num_prompt_tokens + self.max_tokens, len(self.token_ids))

    @property
    def num_tokens_left(self) -> int:
        """Tokens that it may still generate."""
        return max(0, self.max_tokens - self.num_generated_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens it has, the pending one included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, the pending one included; also the index of the next one in its choice."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_ready_tokens(self) -> int:
        """Tokens that a step may compute now.

        The last one is computed by the step that samples its successor. So a sequence leaves it that is held or samples
        nothing any more; and so does one whose pending token is its last whatever it is, or must be known to choose
        the next.
        """
        num_tokens = len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens
        is_last_left = self.held or self.scores_only or (self.num_pending_tokens and not self._goes_on_unseen)
        return num_tokens - 1 if is_last_left else num_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token it sampled last is computed."""
        return self.num_sampled_tokens > 0 and self.num_ready_tokens == 1

    @property
    def is_prefilling(self) -> bool:
        """Whether a step may compute tokens of it, of its prompt or forced ones."""
        num_ready_tokens = self.num_ready_tokens
        return num_ready_tokens > 1 or (num_ready_tokens == 1 and self.num_sampled_tokens == 0)

    @property
    def wants_step_alone(self) -> bool:
        """Whether its steps may hold no other sequence, and it waits for one or is in one."""
        is_suspect = len(self.token_ids) - self.num_prompt_tokens < self.alone_until_tokens
        return is_suspect and self.num_ready_tokens + self.num_pending_tokens > 0

    @property
    def is_told(self) -> bool:
        """Whether no log-probability of a token that it was given is missing."""
        return self.tell_from is None or self.tell_from >= len(self.token_ids)

    @property
    def has_computed_prompt(self) -> bool:
        """Whether another choice can begin with its blocks: all but the prompt's last token is computed."""
        return self.num_computed_tokens >= self.num_prompt_tokens - 1

    @property
    def _goes_on_unseen(self) -> bool:
        """Whether the token after a pending one can be planned: it does not depend on it, and is allowed."""
        num_generated_tokens = len(self.token_ids) + self.num_pending_tokens - self.num_prompt_tokens
        return num_generated_tokens < self.max_tokens and self.grammar is None and not self.sampling.has_penalties

    def move_to(self, state: SequenceState) -> None:
        """Change the state. Raises ValueError for a move that `TRANSITIONS` does not have."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"sequence {self.id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def end_reached(self) -> engine_pb2.SequenceEnd.ValueType:
        """Return why its generated tokens are its last ones, or SEQUENCE_END_UNSPECIFIED if they are not.

        Of those that are known: a step ahead may have one more pending, which is told when that step is done.
        """
        num_known_tokens = len(self.token_ids) - self.num_prompt_tokens
        if num_known_tokens > 0 and self.token_ids[-1] in self.stop_token_ids:
            return engine_pb2.SEQUENCE_END_STOP_TOKEN
        if self.grammar and self.grammar.is_over:
            return engine_pb2.SEQUENCE_END_COMPLETE
        if num_known_tokens >= self.max_tokens:
            return engine_pb2.SEQUENCE_END_LENGTH
        return engine_pb2.SEQUENCE_END_UNSPECIFIED
