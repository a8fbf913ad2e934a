"""A stream that breaks anywhere continues at the next token: the client's state machine, without a network."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Aborted, Exhausted, Internal, InvalidRequest, ShoalError, Unavailable
from shoal._prompt import Options, generate_request
from shoal._resumption import AttachCall, GenerateCall, Resumption
from shoal._retries import Outage, RetryPolicy
from shoal._values import FinishReason, TokenLogprobs

AWAY = Unavailable("away")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_stream(
    time: Time | None = None, policy: RetryPolicy | None = None, num_gateways: int = 2, seed: int = 1
) -> Resumption:
    outage = Outage(policy or RetryPolicy(), time or Time(), random.Random(seed))
    return Resumption(GenerateCall(0, pb.GenerateRequest(request_id="r", prompt="hi")), num_gateways, outage)


def accepted(request_id: str = "r") -> pb.GenerateResponse:
    return pb.GenerateResponse(accepted=pb.Accepted(request_id=request_id))


def delta(index: int, *tokens: int, choice: int = 0) -> pb.GenerateResponse:
    text = "".join(f"<{token}>" for token in tokens)
    return pb.GenerateResponse(delta=pb.Delta(choice=choice, index=index, text=text, token_ids=tokens))


def finished() -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))


@given(
    tokens=st.lists(st.integers(0, 49151), max_size=30),
    break_after=st.lists(st.integers(0, 6), max_size=20),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    num_gateways=st.integers(1, 3),
)
def test_each_token_comes_once_and_in_order_wherever_the_stream_breaks(
    tokens: list[int], break_after: list[int], sizes: list[int], num_gateways: int
) -> None:
    stream = a_stream(num_gateways=num_gateways)
    breaks = iter(break_after)
    got: list[int] = []
    at = 0
    while not stream.ended:
        call = stream.next_call()
        assert call.gateway < num_gateways
        assert call.request.request_id == "r"
        if isinstance(call, AttachCall):
            assert call.request.from_index == len(got)
            assert list(call.request.held_token_ids) == got
        at = len(got)
        responses = [accepted()]
        for turn in range(len(tokens)):
            piece = tokens[at : at + sizes[turn % len(sizes)]]
            if piece:
                responses.append(delta(at, *piece))
                at += len(piece)
        responses.append(finished())
        for response in responses[: next(breaks, None)]:
            given_delta = stream.receive(response)
            if given_delta is not None:
                assert given_delta.index == len(got)
                got += given_delta.token_ids
        if not stream.ended:
            stream.failed(AWAY)
    assert got == tokens == list(stream.token_ids)
    assert stream.text == "".join(f"<{token}>" for token in tokens)


def test_before_acceptance_the_same_request_is_sent_again_to_the_next_gateway() -> None:
    stream = a_stream()
    first = stream.next_call()
    stream.failed(AWAY)
    second = stream.next_call()
    assert isinstance(first, GenerateCall)
    assert isinstance(second, GenerateCall)
    assert (first.gateway, second.gateway) == (0, 1)
    assert second.request == first.request


@pytest.mark.parametrize("index", [0, 1, 3, 7])
def test_a_repeated_or_missing_index_is_an_error(index: int) -> None:
    stream = a_stream()
    stream.receive(accepted())
    stream.receive(delta(0, 5, 6))
    with pytest.raises(Internal, match="expected index 2"):
        stream.receive(delta(index, 7))


def test_another_requests_stream_is_an_error() -> None:
    with pytest.raises(Internal, match="accepted 'other'"):
        a_stream().receive(accepted("other"))


def test_further_choices_are_resumed_at_their_own_places() -> None:
    stream = a_stream()
    for response in (accepted(), delta(0, 1, 2), delta(0, 9, choice=1), delta(1, 8, choice=1), delta(0, 7, choice=2)):
        stream.receive(response)
    stream.failed(AWAY)
    call = stream.next_call()
    assert isinstance(call, AttachCall)
    assert (call.request.from_index, list(call.request.held_token_ids)) == (2, [1, 2])
    assert [(p.choice, p.from_index, list(p.held_token_ids)) for p in call.request.points] == [
        (1, 2, [9, 8]),
        (2, 1, [7]),
    ]


def test_each_choice_is_kept_with_its_log_probabilities_and_its_end() -> None:
    stream = a_stream()
    stream.receive(accepted())
    for choice, index, token in ((1, 0, 9), (0, 0, 5), (1, 1, 8)):
        told = pb.TokenLogprobs(logprob=-token, top=[pb.TokenLogprob(token_id=token, logprob=-token)])
        response = delta(index, token, choice=choice)
        response.delta.logprobs.append(told)
        given_delta = stream.receive(response)
        assert given_delta
        assert given_delta.logprobs == (TokenLogprobs(-token, {token: -token}),)
    assert [choice.finish_reason for choice in stream.choices] == [None, None]
    reasons = pb.FINISH_REASON_STOP, [pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP]
    prompt = [pb.TokenLogprobs(logprob=-0.5)]
    stream.receive(
        pb.GenerateResponse(finished=pb.Finished(reason=reasons[0], further_reasons=reasons[1], prompt_logprobs=prompt))
    )
    first, second, third = stream.choices
    assert (first.text, first.token_ids, first.finish_reason) == ("<5>", (5,), FinishReason.STOP)
    assert (second.text, second.token_ids, second.finish_reason) == ("<9><8>", (9, 8), FinishReason.LENGTH)
    assert [told.logprob for told in second.logprobs] == [-9, -8]
    assert (third.text, third.token_ids, third.finish_reason) == ("", (), FinishReason.STOP)
    assert stream.finished
    assert [told.logprob for told in stream.finished.prompt_logprobs] == [-0.5]


def test_what_is_asked_is_put_into_its_fields() -> None:
    options: Options = {
        "n": 3, "logprobs": 0, "prompt_logprobs": 2, "min_p": 0.25, "repetition_penalty": 1.5, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "logit_bias": {7: 1.5},
    }  # fmt: skip
    request = generate_request("hi", None, None, options)
    assert (request.n, request.logprobs, request.prompt_logprobs) == (3, 0, 2)
    assert request.HasField("logprobs")
    assert request.sampling == pb.Sampling(
        min_p=0.25, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={7: 1.5}
    )
    left_out = generate_request("hi", None, None, {})
    assert not any(left_out.HasField(name) for name in ("logprobs", "prompt_logprobs", "sampling"))


def test_a_caller_that_attaches_without_tokens_continues_behind_what_it_then_gets() -> None:
    attach = AttachCall(1, pb.AttachRequest(request_id="r", from_index=10))
    stream = Resumption(attach, 2, Outage(RetryPolicy(), Time(), random.Random(1)))
    stream.receive(accepted())
    stream.receive(delta(10, 3, 4))
    stream.failed(AWAY)
    call = stream.next_call()
    assert isinstance(call, AttachCall)
    assert (call.gateway, call.request.from_index, list(call.request.held_token_ids)) == (0, 12, [3, 4])


def test_delays_grow_are_jittered_and_capped_and_end_with_the_outage_limit() -> None:
    time = Time()
    policy = RetryPolicy(outage_limit_s=30, first_delay_s=0.05, longest_delay_s=2)
    stream = a_stream(time, policy)
    delays = []
    with pytest.raises(Unavailable):  # noqa: PT012 - the number of tries is drawn
        while True:
            delays.append(stream.failed(AWAY))
            time.now += delays[-1]
    assert delays[0] <= 0.05
    assert max(delays) <= 2
    assert len(set(delays)) == len(delays)
    assert time.now == pytest.approx(30)
    assert len(delays) < 100


def test_accepting_and_failing_for_ever_is_given_up_too() -> None:
    time = Time()
    stream = a_stream(time)
    with pytest.raises(Unavailable):  # noqa: PT012 - the number of tries is drawn
        while True:
            stream.receive(accepted())
            time.now += stream.failed(AWAY)
    assert 29 < time.now < 31


def test_time_that_a_request_waits_in_the_queue_is_no_outage() -> None:
    time = Time()
    stream = a_stream(time)
    stream.receive(accepted())
    for _ in range(3):
        time.now += 3600
        assert stream.failed(AWAY) < 1
        stream.receive(accepted())


def test_progress_ends_an_outage() -> None:
    time = Time()
    stream = a_stream(time)
    stream.receive(accepted())
    for index in range(10):
        stream.failed(AWAY)
        time.now += 20
        stream.receive(delta(index, 1))


def test_the_fleets_own_wish_for_a_later_retry_is_kept() -> None:
    assert a_stream().failed(Unavailable("away", retry_after_ms=700)) >= 0.7


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", field="prompt"),
        Aborted("another reader", reason="SUPERSEDED"),
        Internal("a defect", reason="INTERNAL"),
        Exhausted("full", retry_after_ms=100),
    ],
)
def test_an_error_of_the_request_is_not_retried(error: ShoalError) -> None:
    with pytest.raises(type(error)):
        a_stream().failed(error)


def test_a_full_queue_is_waited_for_only_if_asked() -> None:
    stream = a_stream(policy=RetryPolicy(retry_exhausted=True))
    assert stream.failed(Exhausted("full", retry_after_ms=400)) >= 0.4
    with pytest.raises(Exhausted):
        stream.failed(Exhausted("a message over gRPC's limit: it would not help to wait"))
