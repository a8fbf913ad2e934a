"""What the gateway must know of the pool's model and workers to judge a request."""

from dataclasses import dataclass

from gen.shoal.fleet.v1 import request_pb2, tokenizer_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.blocks import most_tokens_within

USUAL_BLOCK_SIZE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Model:
    """A model's facts, as its tokenizer describes it."""

    name: str
    context_tokens: int
    """Most tokens of prompt and answer together."""
    vocabulary_tokens: int
    """Token ids are below this."""
    end_token_ids: tuple[int, ...]

    @staticmethod
    def described(name: str, description: tokenizer_pb2.DescribeResponse) -> "Model":
        """The facts in a tokenizer's answer, under the pool's name."""
        return Model(name, description.context_tokens, description.vocabulary_tokens, tuple(description.end_token_ids))

    def to_proto(self) -> inference_pb2.Model:
        """As ListModels tells it."""
        return inference_pb2.Model(
            name=self.name, context_tokens=self.context_tokens, vocabulary_tokens=self.vocabulary_tokens
        )


@dataclass(frozen=True, slots=True)
class Room:
    """What the smallest registered worker can hold of one request."""

    num_blocks: int
    """Of its KV cache."""
    block_size_tokens: int
    context_tokens: int

    @staticmethod
    def of(worker: request_pb2.WorkerInfo) -> "Room":
        """Room of one worker."""
        return Room(worker.num_blocks, worker.block_size_tokens, worker.context_tokens)

    @staticmethod
    def of_cache(num_tokens: int, model: Model) -> "Room":
        """Room of a worker of which only its token slots are known: with blocks as workers have them unless told."""
        return Room(num_tokens // USUAL_BLOCK_SIZE_TOKENS, USUAL_BLOCK_SIZE_TOKENS, model.context_tokens)

    @property
    def cache_tokens(self) -> int:
        """Token slots of its KV cache."""
        return self.num_blocks * self.block_size_tokens

    def most_tokens(self, num_prompt_tokens: int, num_choices: int) -> int:
        """Most tokens that each choice may have for all of them to fit the cache at once; may be negative."""
        return most_tokens_within(self.num_blocks, num_prompt_tokens, num_choices, self.block_size_tokens)
