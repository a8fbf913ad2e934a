"""A step's plan as a message, from rank 0 to the others, and back."""

from functools import lru_cache

from gen.shoal.fleet.v1 import rank_pb2
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import PENDING_TOKEN, BlockCopy, SeenTokens, SequenceChunk, StepPlan


def plan_message(plan: StepPlan) -> rank_pb2.RankPlan:
    """Say a plan."""
    return rank_pb2.RankPlan(
        step=plan.step,
        chunks=map(_chunk_message, plan.chunks),
        copy_sources=[copy.source for copy in plan.block_copies],
        copy_destinations=[copy.destination for copy in plan.block_copies],
    )


def plan_of(message: rank_pb2.RankPlan) -> StepPlan:
    """Read a plan."""
    copies = zip(message.copy_sources, message.copy_destinations, strict=True)
    return StepPlan(
        step=message.step,
        chunks=tuple(map(_chunk_of, message.chunks)),
        block_copies=tuple(BlockCopy(BlockId(source), BlockId(destination)) for source, destination in copies),
    )


def _chunk_message(chunk: SequenceChunk) -> rank_pb2.RankChunk:
    seen = chunk.seen
    is_pending = chunk.token_ids[-1:] == (PENDING_TOKEN,)
    return rank_pb2.RankChunk(
        sequence_id=chunk.sequence_id,
        token_ids=chunk.token_ids[:-1] if is_pending else chunk.token_ids,
        has_pending_token=is_pending,
        first_position=chunk.first_position,
        block_table=chunk.block_table,
        sample_index=chunk.sample_index,
        scored_token_ids=chunk.scored_token_ids,
        seen=rank_pb2.RankSeenTokens(prompt=seen.prompt, generated=seen.generated) if seen else None,
        allowed_tokens=chunk.allowed_tokens,
        sampling=_sampling_message(chunk.sampling),
    )


def _chunk_of(message: rank_pb2.RankChunk) -> SequenceChunk:
    seen = message.seen
    return SequenceChunk(
        sequence_id=SequenceId(message.sequence_id),
        token_ids=(*message.token_ids, PENDING_TOKEN) if message.has_pending_token else tuple(message.token_ids),
        first_position=message.first_position,
        block_table=tuple(map(BlockId, message.block_table)),
        sampling=_sampling_of(message.sampling.SerializeToString()),
        sample_index=message.sample_index if message.HasField("sample_index") else None,
        scored_token_ids=tuple(message.scored_token_ids),
        seen=SeenTokens(tuple(seen.prompt), tuple(seen.generated)) if message.HasField("seen") else None,
        allowed_tokens=message.allowed_tokens if message.HasField("allowed_tokens") else None,
    )


@lru_cache(maxsize=4096)
def _sampling_message(sampling: SamplingParameters) -> rank_pb2.RankSampling:
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
    )


@lru_cache(maxsize=4096)
def _sampling_of(data: bytes) -> SamplingParameters:
    """Read a message, `data`: the same, step after step, as long as a sequence is in the running set."""
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
