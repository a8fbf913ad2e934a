"""What HTTP makes of the core's responses: documents as OpenAI's clients read them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.shoal.inference.v1 import inference_pb2 as pb
from services.gateway.http.chat_form import ChatForm
from services.gateway.http.completion_form import CompletionForm
from services.gateway.http.envelope import Envelope, Wanted
from services.gateway.http.form import FINISH_REASONS, Form
from services.gateway.http.spelling import MAX_PLACES, Place, Spelling

STOP, LENGTH, CANCELLED = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CANCELLED
PLAIN = Wanted()
LOGPROBS = Wanted(logprobs=True)
SPELLINGS = {1: b"a", 2: "é".encode(), 3: b"\xe2\x82", 4: b"\xac", 5: b"<|im_end|>"}


class FakeTokenizers:
    """Stands for the client of the tokenizers; counts what it is asked."""

    def __init__(self, spell: Callable[[int], bytes] = SPELLINGS.__getitem__) -> None:
        self._spell = spell
        self.asked: list[int] = []

    async def spell(self, token_ids: Sequence[int]) -> Sequence[bytes]:
        self.asked += token_ids
        return [self._spell(token_id) for token_id in token_ids]


def spelling() -> Spelling:
    tokenizers: Any = FakeTokenizers()
    return Spelling(tokenizers)


def a_delta(text: str, *tokens: int, choice: int = 0, index: int = 0, top: int = 0) -> pb.GenerateResponse:
    """With log-probabilities if `top`: the generated token's is minus its place in the delta."""
    best = [pb.TokenLogprob(token_id=token_id, logprob=-token_id) for token_id in range(1, top + 1)]
    at = [pb.TokenLogprobs(logprob=-place, top=best) for place in range(len(tokens))]
    delta = pb.Delta(choice=choice, index=index, text=text, token_ids=tokens, logprobs=at if top else None)
    return pb.GenerateResponse(delta=delta)


def accepted() -> pb.GenerateResponse:
    return pb.GenerateResponse(accepted=pb.Accepted(request_id="r", prompt_tokens=7))


def finished(*reasons: pb.FinishReason.ValueType, completion_tokens: int = 3) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_tokens=7, cached_tokens=2, completion_tokens=completion_tokens)
    return pb.GenerateResponse(finished=pb.Finished(reason=reasons[0], further_reasons=reasons[1:], usage=usage))


async def _stream(responses: Sequence[pb.GenerateResponse]) -> AsyncIterator[pb.GenerateResponse]:
    for response in responses:
        yield response


def whole(form: Form, *responses: pb.GenerateResponse, wanted: Wanted = PLAIN, num_choices: int = 1) -> dict[str, Any]:
    envelope = Envelope(form, "r", "m", 99, spelling())
    pieces = asyncio.run(envelope.whole(_stream(responses), num_choices, wanted))
    document: dict[str, Any] = json.loads(b"".join(pieces))
    return document


def chunks(
    form: Form, *responses: pb.GenerateResponse, wanted: Wanted = PLAIN, num_choices: int = 1
) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        envelope = Envelope(form, "r", "m", 99, spelling())
        written = envelope.chunks(_stream(responses), num_choices, wanted)
        return [json.loads(chunk) async for chunk in written]

    return asyncio.run(read())


ONE = (accepted(), a_delta("Hel", 1, 2), a_delta("lo", 3, index=2), finished(STOP))


def test_a_chat_in_one_document() -> None:
    assert whole(ChatForm(), *ONE) == {
        "id": "chatcmpl-r",
        "object": "chat.completion",
        "created": 99,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_a_completion_in_one_document() -> None:
    document = whole(CompletionForm(), *ONE)
    assert (document["id"], document["object"]) == ("cmpl-r", "text_completion")
    assert document["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert document["usage"]["total_tokens"] == 10


def test_a_chat_in_chunks_says_who_speaks_then_the_text_then_why_it_ends() -> None:
    written = chunks(ChatForm(), *ONE)
    heads = [{name: value for name, value in chunk.items() if name != "choices"} for chunk in written]
    assert heads == [{"id": "chatcmpl-r", "object": "chat.completion.chunk", "created": 99, "model": "m"}] * 4
    assert [chunk["choices"] for chunk in written] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "Hel"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "lo"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]


def test_a_completion_in_chunks() -> None:
    written = chunks(CompletionForm(), *ONE)
    assert {chunk["object"] for chunk in written} == {"text_completion"}
    texts = [(choice["text"], choice["finish_reason"]) for chunk in written for choice in chunk["choices"]]
    assert texts == [("Hel", None), ("lo", None), ("", "stop")]


def test_tokens_that_show_nothing_yet_make_no_chunk() -> None:
    written = chunks(CompletionForm(), accepted(), a_delta("", 3), a_delta("€", 4, index=1), finished(LENGTH))
    assert [chunk["choices"][0]["text"] for chunk in written] == ["€", ""]


def test_usage_comes_in_a_last_chunk_without_choices_and_is_null_before() -> None:
    *others, last = chunks(ChatForm(), *ONE, wanted=Wanted(usage=True))
    assert {chunk["usage"] for chunk in others} == {None}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_usage_may_run_with_the_text() -> None:
    written = chunks(CompletionForm(), *ONE, wanted=Wanted(usage=True, running_usage=True))
    counts = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in written]
    assert counts == [(7, 2), (7, 3), (7, 3), (7, 3)]


@pytest.mark.parametrize("reason", [value for value in pb.FinishReason.values() if value])
def test_every_reason_to_end_has_a_word(reason: pb.FinishReason.ValueType) -> None:
    assert whole(ChatForm(), accepted(), finished(reason))["choices"][0]["finish_reason"] == FINISH_REASONS[reason]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5)), max_size=50),
    form=st.sampled_from([ChatForm, CompletionForm]),
)
def test_each_choice_has_its_own_text_and_end_in_chunks_as_in_one_document(
    pieces: list[tuple[int, str]], form: Callable[[], Form]
) -> None:
    counts = [0, 0, 0]
    responses = [accepted()]
    for choice, text in pieces:
        responses.append(a_delta(text, 1, choice=choice, index=counts[choice]))
        counts[choice] += 1
    responses.append(finished(STOP, LENGTH, CANCELLED))
    document = whole(form(), *responses, num_choices=3)
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in document["choices"]] == ["stop", "length", "cancelled"]
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in chunks(form(), *responses, num_choices=3):
        (choice,) = chunk["choices"]
        assert reasons[choice["index"]] is None, "nothing follows a choice's end"
        texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert reasons == ["stop", "length", "cancelled"]
    expected = ["".join(text for at, text in pieces if at == choice) for choice in range(3)]
    assert texts == expected
    assert expected == [
        choice["message"]["content"] if "message" in choice else choice["text"] for choice in document["choices"]
    ]


def test_a_chats_logprobs_name_each_token_by_text_and_bytes() -> None:
    responses = (accepted(), a_delta("aé", 1, 2, top=2), finished(STOP))
    expected = [
        {
            "token": "a", "logprob": 0.0, "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -1.0, "bytes": [97]},
                {"token": "é", "logprob": -2.0, "bytes": [195, 169]},
            ],
        },
        {
            "token": "é", "logprob": -1.0, "bytes": [195, 169],
            "top_logprobs": [
                {"token": "a", "logprob": -1.0, "bytes": [97]},
                {"token": "é", "logprob": -2.0, "bytes": [195, 169]},
            ],
        },
    ]  # fmt: skip
    for choice in (
        whole(ChatForm(), *responses, wanted=LOGPROBS)["choices"][0],
        chunks(ChatForm(), *responses, wanted=LOGPROBS)[1]["choices"][0],
    ):
        assert choice["logprobs"] == {"content": expected, "refusal": None}


def test_a_completions_logprobs_say_where_each_token_begins_also_over_chunks() -> None:
    responses = (
        accepted(),
        a_delta("aé", 1, 2, top=1),
        a_delta("", 3, index=2, top=1),
        a_delta("€a", 4, 1, index=3, top=1),
        finished(STOP),
    )
    (choice,) = whole(CompletionForm(), *responses, wanted=LOGPROBS)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "é", "bytes:\\xe2\\x82", "bytes:\\xac", "a"],
        "token_logprobs": [0.0, -1.0, 0.0, 0.0, -1.0],
        # The generated token is there too, though one was asked for; its own log-probability is the one that counts.
        "top_logprobs": [
            {"a": 0.0}, {"a": -1.0, "é": -1.0}, {"a": -1.0, "bytes:\\xe2\\x82": 0.0},
            {"a": -1.0, "bytes:\\xac": 0.0}, {"a": -1.0},
        ],
        "text_offset": [0, 1, 2, 3, 3],
    }  # fmt: skip
    *pieces, _ = chunks(CompletionForm(), *responses, wanted=LOGPROBS)
    assert len(pieces) == 3, "tokens that show nothing have log-probabilities"
    for name, values in choice["logprobs"].items():
        assert [value for piece in pieces for value in piece["choices"][0]["logprobs"][name]] == values


def test_a_special_token_is_told_by_its_name() -> None:
    (choice,) = whole(ChatForm(), accepted(), a_delta("", 5, top=1), finished(STOP), wanted=LOGPROBS)["choices"]
    assert choice["logprobs"]["content"][0]["token"] == "<|im_end|>"


def test_an_impossible_token_has_a_number_that_json_can_write() -> None:
    delta = pb.Delta(text="a", token_ids=[1], logprobs=[pb.TokenLogprobs(logprob=float("-inf"))])
    (choice,) = whole(ChatForm(), accepted(), pb.GenerateResponse(delta=delta), finished(STOP), wanted=LOGPROBS)[
        "choices"
    ]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


async def places(spelled: Spelling, delta: pb.Delta) -> list[Place]:
    return [place async for some in spelled.places(delta.token_ids, delta.logprobs) for place in some]


async def test_a_token_is_spelled_once() -> None:
    tokenizers: Any = FakeTokenizers()
    spelled = Spelling(tokenizers)
    for _ in range(3):
        assert len(await places(spelled, a_delta("aé", 1, 2, top=3).delta)) == 2
    assert sorted(tokenizers.asked) == [1, 2, 3]


async def test_however_many_tokens_are_spelled_few_are_remembered() -> None:
    tokenizers: Any = FakeTokenizers(lambda token_id: str(token_id).encode())
    spelled = Spelling(tokenizers)
    for _ in range(2):
        found = await places(spelled, a_delta("", *range(25_000), top=1).delta)
        assert [place.chosen.text for place in found] == [str(token) for token in range(25_000)]
    assert len(tokenizers.asked) > 25_000, "the first ones were forgotten"


async def test_each_call_of_a_tokenizer_is_bounded() -> None:
    calls: list[int] = []

    class Counting(FakeTokenizers):
        async def spell(self, token_ids: Sequence[int]) -> Sequence[bytes]:
            calls.append(len(token_ids))
            return await super().spell(token_ids)

    tokenizers: Any = Counting(lambda token_id: b"x")
    assert await Spelling(tokenizers).text(range(25_000)) == "x" * 25_000
    assert max(calls) == 10_000


# An answer that begins with the prompt


def test_an_echoed_prompt_stands_before_each_choice() -> None:
    responses = (accepted(), a_delta("Hi", 1), a_delta("Ho", 2, choice=1), finished(STOP, STOP))
    document = whole(CompletionForm("Say: "), *responses, num_choices=2)
    assert [choice["text"] for choice in document["choices"]] == ["Say: Hi", "Say: Ho"]
    written = chunks(CompletionForm("Say: "), *responses, num_choices=2)
    for index, text in enumerate(("Say: Hi", "Say: Ho")):
        pieces = [choice["text"] for chunk in written for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(pieces) == text


def test_an_echoed_prompts_logprobs_stand_before_those_of_each_choice() -> None:
    last = finished(STOP, STOP)
    last.finished.prompt_logprobs.add(logprob=-5, top=[pb.TokenLogprob(token_id=1, logprob=-0.5)])
    document = whole(
        CompletionForm("éa"), accepted(), a_delta("a", 1, top=1), a_delta("é", 2, choice=1, top=1), last,
        num_choices=2, wanted=Wanted(logprobs=True, prompt_token_ids=[2, 1]),
    )  # fmt: skip
    first, second = (choice["logprobs"] for choice in document["choices"])
    # Nothing stands before a prompt's first token.
    assert first["token_logprobs"] == [None, -5, 0]
    assert first["top_logprobs"] == [None, {"a": -5}, {"a": 0}]
    assert first["tokens"] == ["é", "a", "a"]
    assert second["tokens"] == ["é", "a", "é"]
    assert first["text_offset"] == second["text_offset"] == [0, 1, 2]


def test_a_cancelled_requests_prompt_may_have_no_logprobs() -> None:
    document = whole(
        CompletionForm("éa"), accepted(), finished(CANCELLED), wanted=Wanted(logprobs=True, prompt_token_ids=[2, 1])
    )
    assert document["choices"][0]["logprobs"]["token_logprobs"] == [None]


# Many log-probabilities


def test_many_logprobs_in_one_delta_are_told_in_chunks_of_bounded_size() -> None:
    num_tokens = 1_000
    responses = (accepted(), a_delta("a" * num_tokens, *[1] * num_tokens, top=2), finished(STOP))
    *pieces, _ = chunks(CompletionForm(), *responses, wanted=LOGPROBS)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "a" * num_tokens
    told = [len(piece["choices"][0]["logprobs"]["tokens"]) for piece in pieces]
    assert sum(told) == num_tokens
    assert max(told) == MAX_PLACES
    (choice,) = whole(CompletionForm(), *responses, wanted=LOGPROBS)["choices"]
    for name, values in choice["logprobs"].items():
        assert [value for piece in pieces for value in piece["choices"][0]["logprobs"][name]] == values
