"""What a step's result is for a sequence's client."""

from gen.shoal.fleet.v1 import engine_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.worker.engine.sequence import Sequence
from services.worker.engine.step_plan import ChunkResult, SequenceChunk, TokenLogprobs


def output_of(
    sequence: Sequence,
    chunk: SequenceChunk,
    computed: ChunkResult,
    end: engine_pb2.SequenceEnd.ValueType,
    error: str,
) -> engine_pb2.SequenceOutput:
    """Return the output of a chunk that sampled a token or scored given ones. `error`: why it failed, if it did."""
    output = engine_pb2.SequenceOutput(
        sequence_id=sequence.id,
        token_ids=() if computed.token_id is None else (computed.token_id,),
        cached_tokens=sequence.num_cached_tokens or 0,
    )
    # Most outputs have none of these: they would cost as much as the rest.
    if end:
        output.end, output.error = end, error
    if computed.logprobs:
        output.logprobs.append(_logprobs(computed.logprobs))
    if computed.scored:
        output.given_logprobs.extend(map(_logprobs, computed.scored))
        output.given_from = last_scored(chunk) + 1 - len(computed.scored)
    return output


def last_scored(chunk: SequenceChunk) -> int:
    """Position of the last of a chunk's `scored_token_ids`."""
    return chunk.context_tokens - (chunk.sample_index is not None)


def _logprobs(logprobs: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top=[inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )
