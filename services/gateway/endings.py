"""How a request's end is told to its client, whether a worker told it or the record did.

FINISHED and CANCELLED end a stream with `finished`; the other ends are errors: EXPIRED is DEADLINE_EXCEEDED (behind
what was generated), FAILED is INTERNAL, QUARANTINED is ABORTED with reason POISONED.
"""

from collections.abc import Mapping

from gen.shoal.fleet.v1 import delivery_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.errors import Aborted, DeadlineExceeded, Internal, ShoalError
from services.common.record.record import Record
from services.common.record.states import RequestState
from services.gateway.streams import End

STATES: Mapping[RequestState, inference_pb2.RequestState.ValueType] = {
    RequestState.QUEUED: inference_pb2.REQUEST_STATE_QUEUED,
    RequestState.PLACED: inference_pb2.REQUEST_STATE_PLACED,
    RequestState.RUNNING: inference_pb2.REQUEST_STATE_RUNNING,
    RequestState.FINISHED: inference_pb2.REQUEST_STATE_FINISHED,
    RequestState.CANCELLED: inference_pb2.REQUEST_STATE_CANCELLED,
    RequestState.EXPIRED: inference_pb2.REQUEST_STATE_EXPIRED,
    RequestState.FAILED: inference_pb2.REQUEST_STATE_FAILED,
    RequestState.QUARANTINED: inference_pb2.REQUEST_STATE_QUARANTINED,
}


def told_by_worker(end: delivery_pb2.EndFrame) -> tuple[End, int | None]:
    """The end of the stream, and how many tokens the whole request has, if told."""
    completion_tokens = end.finished.usage.completion_tokens if end.HasField("finished") else None
    return _error(end.state, end.error) or end.finished, completion_tokens


def told_by_record(record: Record) -> End:
    """The end of the stream of a request that has ended."""
    return _error(STATES[record.state], record.error) or _finished(record)


def usage(record: Record) -> inference_pb2.Usage:
    """Token counts so far, or of the end."""
    if record.outcome:
        return request_pb2.Outcome.FromString(record.outcome).usage
    return inference_pb2.Usage(
        prompt_tokens=len(request_pb2.RequestPayload.FromString(record.payload).prompt_token_ids),
        completion_tokens=sum(len(tokens) for tokens in record.journal),
    )


def timings(record: Record) -> inference_pb2.Timings:
    """Phases of a request that has ended."""
    if record.outcome:
        return request_pb2.Outcome.FromString(record.outcome).timings
    return inference_pb2.Timings(
        placed_ms=max(0, record.placed_at_ms - record.accepted_at_ms),
        finished_ms=max(0, record.ended_at_ms - record.accepted_at_ms),
    )


def _finished(record: Record) -> inference_pb2.Finished:
    outcome = request_pb2.Outcome.FromString(record.outcome)
    # No worker ended it: it was cancelled in the queue, or taken from a worker that was lost.
    reasons = outcome.reasons or [inference_pb2.FINISH_REASON_CANCELLED] * record.num_choices
    return inference_pb2.Finished(
        reason=reasons[0],
        further_reasons=reasons[1:],
        usage=usage(record),
        timings=timings(record),
        prompt_logprobs=outcome.prompt_logprobs,
    )


def _error(state: inference_pb2.RequestState.ValueType, error: str) -> ShoalError | None:
    match state:
        case inference_pb2.REQUEST_STATE_EXPIRED:
            return DeadlineExceeded("the deadline passed; what was generated until then was sent", reason="EXPIRED")
        case inference_pb2.REQUEST_STATE_FAILED:
            return Internal(f"the request could not be computed: {error}", reason="FAILED")
        case inference_pb2.REQUEST_STATE_QUARANTINED:
            return Aborted(f"the request is not run again: {error}", reason="POISONED")
    return None
