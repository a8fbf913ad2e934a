"""A sequence: one choice of one request, as the engine sees it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NewType

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.block_pool import BlockId

SequenceId = NewType("SequenceId", int)


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """It holds no blocks."""
    RUNNING = "running"
    """It holds all the blocks it can ever need."""
    ENDED = "ended"
    """It holds nothing; the engine has forgotten it."""


TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.ENDED}),
    SequenceState.RUNNING: frozenset({SequenceState.ENDED}),
    SequenceState.ENDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a sequence's tokens are chosen. Noise comes from (seed, choice, index of the token in its choice) alone."""

    temperature: float
    """0: greedy."""
    top_k: int
    """0: off."""
    top_p: float
    """1: off."""
    min_p: float
    """0: off."""
    seed: int
    choice: int

    @classmethod
    def from_command(cls, add: engine_pb2.AddSequence) -> "SamplingParameters":
        """Read a command's sampling; absent fields have the public API's defaults."""
        sampling = add.payload.sampling
        return cls(
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            seed=sampling.seed,
            choice=add.choice,
        )


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
    held: bool
    """Nothing is sampled for now."""
    alone_until_tokens: int
    """Until it has so many generated tokens, its steps hold no other sequence."""
    deadline_ms: float | None
    """In the engine's time."""
    state: SequenceState = SequenceState.WAITING
    block_table: tuple[BlockId, ...] = ()
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    num_sampled_tokens: int = 0
    """Tokens sampled by this engine."""

    @classmethod
    def from_command(cls, add: engine_pb2.AddSequence, now_ms: float) -> "Sequence":
        """Make a waiting sequence of the front's command, taken at `now_ms`."""
        payload = add.payload
        return cls(
            id=SequenceId(add.sequence_id),
            token_ids=[*payload.prompt_token_ids, *add.known_token_ids],
            num_prompt_tokens=len(payload.prompt_token_ids),
            max_tokens=payload.max_tokens,
            stop_token_ids=frozenset(payload.stop_token_ids),
            sampling=SamplingParameters.from_command(add),
            held=add.held,
            alone_until_tokens=add.alone_until_tokens,
            deadline_ms=now_ms + add.remaining_ms if add.remaining_ms else None,
        )

    @property
    def most_tokens(self) -> int:
        """Most tokens it can ever have, prompt included."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt; also the index of the next one in its choice."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_ready_tokens(self) -> int:
        """Tokens that a step may compute now.

        The last one is computed by the step that samples its successor, so a held sequence leaves it.
        """
        return len(self.token_ids) - self.num_computed_tokens - (1 if self.held else 0)

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token it sampled last is computed."""
        return self.num_sampled_tokens > 0 and self.num_ready_tokens == 1

    @property
    def wants_step_alone(self) -> bool:
        """Whether its next step may hold no other sequence."""
        return self.num_generated_tokens < self.alone_until_tokens and self.num_ready_tokens > 0

    def move_to(self, state: SequenceState) -> None:
        """Change the state. Raises ValueError for a move that `TRANSITIONS` does not have."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"sequence {self.id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def end_reached(self) -> engine_pb2.SequenceEnd.ValueType:
        """Return why its generated tokens are its last ones, or SEQUENCE_END_UNSPECIFIED if they are not."""
        if self.num_generated_tokens > 0 and self.token_ids[-1] in self.stop_token_ids:
            return engine_pb2.SEQUENCE_END_STOP_TOKEN
        if self.num_generated_tokens >= self.max_tokens:
            return engine_pb2.SEQUENCE_END_LENGTH
        return engine_pb2.SEQUENCE_END_UNSPECIFIED
