"""A request's record as GetRequest tells it."""

from gen.shoal.fleet.v1 import request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.record.record import Record
from services.common.telemetry.trace_context import trace_id_of
from services.gateway.endings import STATES, timings, usage


def described(record: Record) -> inference_pb2.GetRequestResponse:
    """State, counts so far, and each decision, with times in ms since acceptance."""
    payload = request_pb2.RequestPayload.FromString(record.payload)
    return inference_pb2.GetRequestResponse(
        request_id=payload.request_id,
        state=STATES[record.state],
        usage=usage(record),
        decisions=[
            inference_pb2.Decision(
                at_ms=max(0, decision.at_ms - record.accepted_at_ms),
                what=decision.what,
                attempt=decision.attempt,
                detail=decision.detail,
            )
            for decision in record.decisions
        ],
        model=payload.model,
        attempts=record.attempt.number,
        timings=timings(record) if record.ended else None,
        error=record.error,
        priority=payload.priority,
        trace_id=trace_id_of(payload.traceparent),
    )
