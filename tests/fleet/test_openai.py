"""OpenAI's own client against a real fleet: it needs no other address than a gateway's."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

import shoal
from tests.fleet.conftest import Fleet

MODEL = "smollm2-135m-instruct"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
MAX_STREAMS = 2


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_MAX_STREAMS", str(MAX_STREAMS))
        return start("--gateways", "2")


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet.http_gateways[0], api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A short one, with what the reference answers."""
    return next(case for case in greedy_cases if case["name"] == "chat_capital")


@pytest.fixture(scope="module")
def prompt(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = [case for case in greedy_cases if case["kind"] != "chat"]
    return min(prompts, key=lambda case: len(case["prompt_token_ids"]) + len(case["output_token_ids"]))


def test_a_chat_is_answered_as_the_reference(client: openai.OpenAI, chat: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat["messages"], temperature=0, max_completion_tokens=chat["max_tokens"]
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", chat["text"])
    assert choice.finish_reason == chat["finish_reason"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat["prompt_token_ids"])
    assert answer.usage.completion_tokens == len(chat["output_token_ids"])
    assert answer.id == f"chatcmpl-{answer._request_id}"


def test_a_chat_is_streamed_with_its_usage(client: openai.OpenAI, chat: dict[str, Any]) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=chat["messages"], temperature=0, max_tokens=chat["max_tokens"], stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *answer, last = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == chat["text"]
    assert [chunk.choices[0].finish_reason for chunk in answer][-1] == chat["finish_reason"]
    assert len(answer) > 3, "it comes piece by piece"
    assert last.usage is not None
    assert last.usage.completion_tokens == len(chat["output_token_ids"])


@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_completion_is_answered_as_the_reference(
    client: openai.OpenAI, prompt: dict[str, Any], as_tokens: bool
) -> None:
    asked = prompt["prompt_token_ids"] if as_tokens else prompt["prompt"]
    answer = client.completions.create(model=MODEL, prompt=asked, temperature=0, max_tokens=prompt["max_tokens"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (prompt["text"], prompt["finish_reason"])
    stream = client.completions.create(
        model=MODEL, prompt=asked, temperature=0, max_tokens=prompt["max_tokens"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == prompt["text"]


def test_a_completion_without_max_tokens_has_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The sea is", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_a_stop_text_ends_the_answer_before_it(client: openai.OpenAI, chat: dict[str, Any]) -> None:
    stop = chat["text"].split()[2]
    answer = client.chat.completions.create(model=MODEL, messages=chat["messages"], temperature=0, stop=stop)
    assert answer.choices[0].message.content == chat["text"].partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def once(seed: int) -> str | None:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, max_tokens=12, temperature=2)
        return answer.choices[0].message.content

    assert once(7) == once(7)
    assert len({once(seed) for seed in range(4)}) > 1


def test_choices_are_told_apart_also_in_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "n": 3, "seed": 5, "max_tokens": 8, "temperature": 2,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    answer = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_log_probabilities_spell_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Write one emoji and é."}], temperature=0, max_tokens=12,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    places = choice.logprobs.content
    assert answer.usage is not None
    assert len(places) == answer.usage.completion_tokens
    spelled = b"".join(bytes(place.bytes or []) for place in places).decode()
    assert spelled.removesuffix("<|im_end|>") == choice.message.content
    for place in places:
        assert len(place.top_logprobs) == 3
        assert place.token == place.top_logprobs[0].token, "greedy: the best is taken"
        assert place.logprob == place.top_logprobs[0].logprob <= 0


def test_an_echo_tells_the_prompts_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The sea is", echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.text.startswith("The sea is")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert answer.usage is not None
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    stream = client.completions.create(model=MODEL, prompt="The sea is", echo=True, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream).startswith("The sea is")


def test_an_answer_under_a_schema_fits_it(client: openai.OpenAI) -> None:
    class Sailor(pydantic.BaseModel):
        role: Literal["captain", "cook"]
        age: Annotated[int, pydantic.Field(ge=16, le=99)]

    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Describe a sailor as JSON."}]
    parsed = client.chat.completions.parse(model=MODEL, messages=question, response_format=Sailor, temperature=0)
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].finish_reason == "stop"
    some = client.chat.completions.create(
        model=MODEL, messages=question, response_format={"type": "json_object"}, max_tokens=40
    )
    assert (some.choices[0].message.content or "").lstrip().startswith("{")


def test_a_bias_bans_a_token(client: openai.OpenAI, prompt: dict[str, Any]) -> None:
    def tokens(**how: Any) -> list[str] | None:
        answer: openai.types.Completion = client.completions.create(
            model=MODEL, prompt=prompt["prompt_token_ids"], temperature=0, max_tokens=4, logprobs=0, **how
        )
        assert answer.choices[0].logprobs is not None
        return answer.choices[0].logprobs.tokens

    usual, biased = tokens(), tokens(logit_bias={str(prompt["output_token_ids"][0]): -100})
    assert usual is not None
    assert biased is not None
    assert usual[0] != biased[0]
    assert tokens(frequency_penalty=2, presence_penalty=2)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "shoal"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_field",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"colour": "red"})
    assert bad.value.param == "colour"
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as bad:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[{"type": "function", "function": {"name": "add"}}]
        )
    assert (bad.value.param, bad.value.code) == ("tools", "not_supported")
    look_ahead: dict[str, object] = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    with pytest.raises(openai.BadRequestError, match="look-around") as bad:
        client.chat.completions.create(
            model=MODEL, messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": look_ahead}},
        )  # fmt: skip
    assert bad.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x " * 9_000}])
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=4_000, extra_body={"deadline_ms": 100, "ignore_eos": True}
        )
    assert late.value.status_code == 504
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4_000, stream=True, extra_body={"deadline_ms": 300, "ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="deadline") as cut:
        list(stream)
    assert cut.value.code == "expired"


def test_a_full_gateway_is_a_rate_limit_and_the_clients_own_retries_get_through(
    fleet: Fleet, client: openai.OpenAI
) -> None:
    def endless() -> "openai.Stream[Any]":
        return client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=1_000, stream=True, extra_body={"ignore_eos": True}
        )

    streams = [endless() for _ in range(MAX_STREAMS)]
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            endless()
        assert refused.value.code == "too_many_streams"
        assert int(refused.value.response.headers["Retry-After"]) >= 1
    finally:
        for stream in streams:
            stream.close()
    patient = client.with_options(max_retries=5)
    assert patient.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1).choices


def test_a_retry_with_the_same_key_reads_the_same_answer_at_any_gateway(fleet: Fleet) -> None:
    answers = []
    for gateway in (*fleet.http_gateways, *fleet.http_gateways):
        with openai.OpenAI(base_url=gateway, api_key="none", max_retries=5) as client:
            answers.append(
                client.chat.completions.create(
                    model=MODEL, messages=HELLO, max_tokens=8, temperature=2, extra_headers={"Idempotency-Key": "again"}
                )
            )
    first = answers[0]
    assert first.id == "chatcmpl-again"
    for answer in answers:
        assert (answer.choices[0].message.content, answer.created) == (first.choices[0].message.content, first.created)
    with fleet.client() as other:
        assert other.get_request("again").state is shoal.RequestState.FINISHED
    with openai.OpenAI(base_url=fleet.http_gateways[0], api_key="none") as client, pytest.raises(openai.ConflictError):
        client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=9, extra_headers={"Idempotency-Key": "again"}
        )


async def test_the_asynchronous_client_hangs_up_and_its_request_is_cancelled(fleet: Fleet) -> None:
    async with openai.AsyncOpenAI(base_url=fleet.http_gateways[1], api_key="none", max_retries=5) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=2_000, stream=True, extra_body={"ignore_eos": True}
        )
        async with stream:
            async for chunk in stream:
                request_id = chunk.id.removeprefix("chatcmpl-")
                break
    async with fleet.async_client() as other, asyncio.timeout(20):
        while (found := await other.get_request(request_id)).state is not shoal.RequestState.CANCELLED:
            await asyncio.sleep(0.05)
    assert found.usage.completion_tokens < 1_000


async def test_with_a_key_it_may_come_back_for_the_answer(fleet: Fleet) -> None:
    async with openai.AsyncOpenAI(base_url=fleet.http_gateways[1], api_key="none", max_retries=5) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=20, stream=True, extra_headers={"Idempotency-Key": "left"}
        )
        async with stream:
            async for chunk in stream:
                assert chunk.id == "chatcmpl-left"
                break
        again = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=20, extra_headers={"Idempotency-Key": "left"}
        )
    assert again.choices[0].finish_reason in ("stop", "length")
