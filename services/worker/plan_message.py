"""A step's plan as a message, from rank 0 to the others, and back.

It is in the way of every step: columns of numbers, and what Python does with all of them at once.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar, cast

from gen.shoal.fleet.v1 import rank_pb2
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import BlockCopy, SeenTokens, SequenceChunk, StepPlan

_Number = TypeVar("_Number")
_NO_SAMPLE = -1


def plan_message(plan: StepPlan) -> rank_pb2.RankPlan:
    """Say a plan."""
    chunks = plan.chunks
    return rank_pb2.RankPlan(
        step=plan.step,
        sequence_ids=[chunk.sequence_id for chunk in chunks],
        num_tokens=[len(chunk.token_ids) for chunk in chunks],
        token_ids=chain.from_iterable([chunk.token_ids for chunk in chunks]),
        first_positions=[chunk.first_position for chunk in chunks],
        num_blocks=[len(chunk.block_table) for chunk in chunks],
        blocks=chain.from_iterable([chunk.block_table for chunk in chunks]),
        sample_indices=[_NO_SAMPLE if chunk.sample_index is None else chunk.sample_index for chunk in chunks],
        samplings=[_sampling_message(chunk.sampling) for chunk in chunks],
        extras=[
            _extras_message(index, chunk)
            for index, chunk in enumerate(chunks)
            if chunk.scored_token_ids or chunk.seen or chunk.allowed_tokens is not None
        ],
        copy_sources=[copy.source for copy in plan.block_copies],
        copy_destinations=[copy.destination for copy in plan.block_copies],
    )


def plan_of(message: rank_pb2.RankPlan) -> StepPlan:
    """Read a plan."""
    chunks = [
        SequenceChunk(
            SequenceId(sequence_id),
            token_ids,
            first_position,
            block_table,
            _sampling_of(sampling),
            None if sample_index == _NO_SAMPLE else sample_index,
        )
        for sequence_id, token_ids, first_position, block_table, sampling, sample_index in zip(
            message.sequence_ids,
            _dealt_out(message.token_ids[:], message.num_tokens),
            message.first_positions,
            _dealt_out(cast("list[BlockId]", message.blocks[:]), message.num_blocks),
            message.samplings,
            message.sample_indices,
            strict=True,
        )
    ]
    for extras in message.extras:
        chunks[extras.chunk] = _with_extras(chunks[extras.chunk], extras)
    copies = zip(message.copy_sources, message.copy_destinations, strict=True)
    return StepPlan(
        step=message.step,
        chunks=tuple(chunks),
        block_copies=tuple(BlockCopy(BlockId(source), BlockId(destination)) for source, destination in copies),
    )


def _dealt_out(numbers: Iterable[_Number], counts: Iterable[int]) -> Iterator[tuple[_Number, ...]]:
    """The first so many of the numbers, the next so many, and so on."""
    rest = iter(numbers)
    return (tuple(islice(rest, count)) for count in counts)


def _extras_message(index: int, chunk: SequenceChunk) -> rank_pb2.RankExtras:
    seen = chunk.seen
    return rank_pb2.RankExtras(
        chunk=index,
        scored_token_ids=chunk.scored_token_ids,
        seen=rank_pb2.RankSeenTokens(prompt=seen.prompt, generated=seen.generated) if seen else None,
        allowed_tokens=chunk.allowed_tokens,
    )


def _with_extras(chunk: SequenceChunk, message: rank_pb2.RankExtras) -> SequenceChunk:
    seen = message.seen
    return chunk._replace(
        scored_token_ids=tuple(message.scored_token_ids),
        seen=SeenTokens(tuple(seen.prompt), tuple(seen.generated)) if message.HasField("seen") else None,
        allowed_tokens=message.allowed_tokens if message.HasField("allowed_tokens") else None,
    )


@lru_cache(maxsize=4096)
def _sampling_message(sampling: SamplingParameters) -> bytes:
    """Say it: the same, step after step, as long as a sequence is in the running set."""
    return rank_pb2.RankSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=sampling.choice,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
        biases=[bias for _, bias in sampling.logit_bias],
        num_logprobs=sampling.num_logprobs,
        num_prompt_logprobs=sampling.num_prompt_logprobs,
    ).SerializeToString()


@lru_cache(maxsize=4096)
def _sampling_of(data: bytes) -> SamplingParameters:
    """Read a message, `data`."""
    message = rank_pb2.RankSampling.FromString(data)
    return SamplingParameters(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        choice=message.choice,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(zip(message.bias_token_ids, message.biases, strict=True)),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
    )
