"""How a worker's front ends an answer of a given form: what the engine says of it, not what it counts itself."""

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.ids import RequestKey, WorkerId
from services.common.record.record import Attempt
from services.common.store.inbox import Start
from services.common.telemetry.tracing import NoTracer
from services.common.text.vocabulary import Vocabulary
from services.worker.front.active import ActiveRequest
from services.worker.front.spans import AttemptSpans

VOCABULARY = Vocabulary(tuple(bytes([byte]) for byte in range(128)), end_token_ids=(0,))
DIGITS = inference_pb2.ResponseFormat(regex="[0-9]{3}")


def a_request(journal: bytes, form: inference_pb2.ResponseFormat | None = DIGITS, max_tokens: int = 3) -> ActiveRequest:
    payload = request_pb2.RequestPayload(prompt_token_ids=[1], max_tokens=max_tokens, n=1, response_format=form)
    start = Start(
        key=RequestKey("t/r"), attempt=Attempt(2, "nonce"), gateway="g", reader=1, payload=payload,
        journal=(tuple(journal),), remaining_ms=0, suspect_until=0, accepted_at_ms=0, placed_at_ms=0,
    )  # fmt: skip
    return ActiveRequest(start, VOCABULARY, [1], AttemptSpans(NoTracer(), start, WorkerId("w")), now_s=0.0)


def reasons(active: ActiveRequest) -> list[inference_pb2.FinishReason.ValueType]:
    return list(active.outcome(now_s=0.0).reasons)


def test_a_whole_answer_ends_by_itself_and_its_last_token_is_shown() -> None:
    active = a_request(b"", max_tokens=9)
    for token in b"12":
        active.sampled(0, engine_pb2.SequenceOutput(token_ids=[token]), 0.0)
    last = engine_pb2.SequenceOutput(token_ids=[ord("3")], end=engine_pb2.SEQUENCE_END_COMPLETE)
    assert not active.sampled(0, last, 0.0)
    assert active.complete
    assert reasons(active) == [inference_pb2.FINISH_REASON_STOP]
    assert "".join(active.choices[0].pieces) == "123"
    assert list(active.outcome(now_s=0.0).last_token_hidden) == [False]


def test_whether_a_moved_answer_of_max_tokens_is_whole_or_cut_the_engine_says() -> None:
    active = a_request(b"123")
    assert not active.complete
    active.sampled(0, engine_pb2.SequenceOutput(end=engine_pb2.SEQUENCE_END_COMPLETE), 0.0)
    assert reasons(active) == [inference_pb2.FINISH_REASON_STOP]


def test_a_moved_free_answer_of_max_tokens_is_cut() -> None:
    active = a_request(b"123", form=None)
    assert active.complete
    assert reasons(active) == [inference_pb2.FINISH_REASON_LENGTH]
