"""Several choices, each with its log-probabilities, reach a client whole: streamed, read on, and replayed (gateway)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from gen.shoal.fleet.v1 import delivery_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2 as pb
from services.common.errors import Aborted
from services.common.ids import RequestKey
from services.common.record import moves
from services.common.record.record import Attempt
from services.common.record.states import RequestState
from services.common.record.transitions import Verdict
from tests.contract.gateway_fleet import Answer, Fleet, text_of, tokens_of

TEXTS = ("abc", "xy")
SAMPLING = pb.Sampling(min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={7: -1.0})


def told(tokens: Sequence[int]) -> list[pb.TokenLogprobs]:
    """Log-probabilities that belong to these tokens and to no others."""
    return [
        pb.TokenLogprobs(logprob=-float(token), top=[pb.TokenLogprob(token_id=token, logprob=-float(token))])
        for token in tokens
    ]


@dataclass
class Whole:
    """All that a client was sent, by choice; each token with its own log-probabilities, or this fails."""

    start: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finished: pb.Finished | None = None


async def read(call: Any) -> Whole:
    """Read a stream of a request with log-probabilities to its end."""
    whole = Whole()
    while isinstance(response := await call.read(), pb.GenerateResponse):
        delta = response.delta
        if response.HasField("delta"):
            so_far = whole.tokens.setdefault(delta.choice, [])
            assert delta.index == whole.start.setdefault(delta.choice, delta.index) + len(so_far)
            assert list(delta.logprobs) == told(delta.token_ids)
            so_far += delta.token_ids
            whole.text[delta.choice] = whole.text.get(delta.choice, "") + delta.text
        elif response.HasField("finished"):
            whole.finished = response.finished
    return whole


def frames(key: RequestKey, attempt: Attempt, *pieces: tuple[int, int, str]) -> delivery_pb2.DeliverRequest:
    """Of (choice, index, text)."""
    return delivery_pb2.DeliverRequest(
        frames=[
            delivery_pb2.TokenFrame(
                key=key,
                attempt=delivery_pb2.AttemptId(number=attempt.number, nonce=attempt.nonce),
                delta=pb.Delta(
                    choice=choice, index=index, text=text, token_ids=tokens_of(text), logprobs=told(tokens_of(text))
                ),
            )
            for choice, index, text in pieces
        ]
    )


async def store_end(
    fleet: Fleet,
    key: RequestKey,
    attempt: Attempt,
    state: RequestState = RequestState.FINISHED,
    num_told: Sequence[int] = (3, 2),
) -> None:
    """As the worker; it was told the log-probabilities of so many tokens of each choice."""
    outcome = request_pb2.Outcome(
        reasons=[pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH],
        usage=pb.Usage(prompt_tokens=5, completion_tokens=5),
        last_token_hidden=[False, False],
        logprobs=[
            request_pb2.ChoiceLogprobs(tokens=told(tokens_of(text))[:num])
            for text, num in zip(TEXTS, num_told, strict=True)
        ],
        prompt_logprobs=told(tokens_of("ello")),
    )
    tails = tuple((0, tuple(tokens_of(text))) for text in TEXTS)
    move = moves.Finish(key, attempt, state, tails, outcome.SerializeToString(), "")
    assert (await fleet.store.finish(move)).verdict == Verdict.OK


def check_whole(whole: Whole, texts: Sequence[str] = TEXTS) -> None:
    assert whole.tokens == {choice: tokens_of(text) for choice, text in enumerate(texts) if text}
    assert whole.text == {choice: text for choice, text in enumerate(texts) if text}
    assert whole.finished
    assert whole.finished.reason == pb.FINISH_REASON_STOP
    assert whole.finished.further_reasons == [pb.FINISH_REASON_LENGTH]


async def test_what_was_asked_is_what_the_worker_is_told(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    answer = gateway.generate(request_id="a", n=3, logprobs=4, prompt_logprobs=0, sampling=SAMPLING)
    await answer.accepted()
    record = await fleet.record(fleet.key("a"))
    payload = request_pb2.RequestPayload.FromString(record.payload)
    assert (record.num_choices, payload.n, payload.logprobs, payload.prompt_logprobs) == (3, 3, 4, 0)
    assert payload.HasField("prompt_logprobs")
    for name in ("min_p", "repetition_penalty", "presence_penalty", "logit_bias"):
        assert getattr(payload.sampling, name) == getattr(SAMPLING, name)


async def test_choices_are_streamed_each_with_its_own_indices_and_log_probabilities(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway(), request_id="a", n=2, logprobs=1, prompt_logprobs=1)
    key, attempt = started.key, started.attempt
    await started.worker.call.write(frames(key, attempt, (0, 0, "a"), (1, 0, "x")))
    await started.worker.call.write(frames(key, attempt, (1, 1, "y"), (0, 1, "bc")))
    finished = pb.Finished(
        reason=pb.FINISH_REASON_STOP,
        further_reasons=[pb.FINISH_REASON_LENGTH],
        usage=pb.Usage(completion_tokens=5),
        prompt_logprobs=told(tokens_of("ello")),
    )
    end = delivery_pb2.EndFrame(
        key=key,
        attempt=delivery_pb2.AttemptId(number=attempt.number, nonce=attempt.nonce),
        state=pb.REQUEST_STATE_FINISHED,
        finished=finished,
    )
    await started.worker.call.write(delivery_pb2.DeliverRequest(ends=[end]))
    whole = await read(started.answer.call)
    check_whole(whole)
    assert whole.finished
    assert list(whole.finished.prompt_logprobs) == told(tokens_of("ello"))


async def test_an_end_in_the_record_tells_log_probabilities_too(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway(), request_id="a", n=2, logprobs=1, prompt_logprobs=1)
    await started.worker.call.write(frames(started.key, started.attempt, (0, 0, "ab")))
    await store_end(fleet, started.key, started.attempt)
    whole = await read(started.answer.call)
    check_whole(whole)
    assert whole.finished
    assert list(whole.finished.prompt_logprobs) == told(tokens_of("ello"))


@pytest.mark.parametrize("held", [("", ""), ("ab", "x"), ("abc", ""), ("a", "xy")])
async def test_an_attach_goes_on_at_each_choices_own_place(fleet: Fleet, held: tuple[str, str]) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway, request_id="a", n=2, logprobs=1)
    await store_end(fleet, started.key, started.attempt)
    request = pb.AttachRequest(
        request_id="a",
        from_index=len(held[0]),
        held_token_ids=tokens_of(held[0]),
        points=[pb.ResumePoint(choice=1, from_index=len(held[1]), held_token_ids=tokens_of(held[1]))],
    )
    whole = await read(gateway.stub.Attach(request))
    check_whole(whole, [text[len(has) :] for text, has in zip(TEXTS, held, strict=True)])


async def test_an_attach_that_differs_in_a_further_choice_is_told_which_and_where(fleet: Fleet) -> None:
    gateway = await fleet.gateway()
    started = await fleet.started(gateway, request_id="a", n=2, logprobs=1)
    await store_end(fleet, started.key, started.attempt)
    point = pb.ResumePoint(choice=1, from_index=2, held_token_ids=tokens_of("xz"))
    error = await Answer(gateway.stub.Attach(pb.AttachRequest(request_id="a", points=[point]))).error()
    assert isinstance(error, Aborted)
    assert "choice 1" in error.message
    assert "token 1" in error.message


async def test_of_a_request_that_was_cut_off_no_token_is_sent_without_its_log_probability(fleet: Fleet) -> None:
    started = await fleet.started(await fleet.gateway(), request_id="a", n=2, logprobs=1)
    await store_end(fleet, started.key, started.attempt, RequestState.CANCELLED, num_told=(2, 0))
    whole = await read(started.answer.call)
    assert {choice: text_of(tokens) for choice, tokens in whole.tokens.items()} == {0: "ab"}
    assert whole.finished
