"""The default model's reference outputs, token for token, through gateway, tokenizer, scheduler, worker and Redis."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from tests.fleet.conftest import Fleet


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    return start("--gateways", "2")


async def answer(client: shoal.AsyncClient, case: dict[str, Any]) -> shoal.AsyncStream:
    question = {"messages": case["messages"]} if case["kind"] == "chat" else {"prompt": case["prompt"]}
    stream = client.generate(**question, temperature=0.0, max_tokens=case["max_tokens"])
    await stream.read()
    return stream


def check(stream: shoal.AsyncStream, case: dict[str, Any]) -> None:
    assert list(stream.token_ids) == case["output_token_ids"], case["name"]
    assert stream.text.rstrip("\ufffd") == case["text"].rstrip("\ufffd"), case["name"]
    assert stream.finished
    assert stream.finished.reason == case["finish_reason"], case["name"]
    assert stream.finished.usage.prompt_tokens == len(case["prompt_token_ids"]), case["name"]


async def test_all_cases_one_by_one(fleet: Fleet, greedy_cases: list[dict[str, Any]]) -> None:
    assert len(greedy_cases) == 25
    async with fleet.async_client() as client:
        for case in greedy_cases:
            check(await answer(client, case), case)


async def test_all_cases_at_once(fleet: Fleet, greedy_cases: list[dict[str, Any]]) -> None:
    async with fleet.async_client() as client:
        streams = await asyncio.gather(*(answer(client, case) for case in greedy_cases))
    for stream, case in zip(streams, greedy_cases, strict=True):
        check(stream, case)


async def test_a_seed_repeats_an_answer_and_another_changes_it(fleet: Fleet) -> None:
    async with fleet.async_client() as client:
        texts = [
            await client.generate("My favourite animal is", temperature=1.0, top_p=0.9, seed=seed, max_tokens=12).read()
            for seed in (7, 7, 8)
        ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


async def test_a_stop_text_across_tokens_ends_the_answer_before_it(
    fleet: Fleet, greedy_cases: list[dict[str, Any]]
) -> None:
    case = next(case for case in greedy_cases if case["name"] == "chat_capital")
    assert case["text"] == "The capital of France is Paris."
    async with fleet.async_client() as client:
        stream = client.generate(messages=case["messages"], temperature=0.0, stop=["ance is P"])
        text = await stream.read()
    assert text == "The capital of Fr"
    assert stream.finished
    assert stream.finished.reason == "stop"


async def test_an_answer_is_read_on_at_another_gateway_and_again_after_its_end(
    fleet: Fleet, greedy_cases: list[dict[str, Any]]
) -> None:
    case = next(case for case in greedy_cases if case["name"] == "completion_once")
    here, there = (shoal.AsyncClient(address) for address in fleet.gateways)
    async with here, there:
        first = here.generate(case["prompt"], temperature=0.0, max_tokens=case["max_tokens"], request_id="read-on")
        async for _ in first:
            if len(first.token_ids) >= 10:
                break
        held = list(first.token_ids)
        second = there.attach("read-on", len(held), held)
        await second.read()
        assert list(second.token_ids) == case["output_token_ids"]
        with pytest.raises(shoal.Aborted, match="later Attach"):
            await first.read()
        again = here.attach("read-on")
        await again.read()
        assert list(again.token_ids) == case["output_token_ids"]
        assert again.text.rstrip("\ufffd") == case["text"].rstrip("\ufffd")


async def test_a_cancelled_answer_ends_and_its_record_says_why(fleet: Fleet) -> None:
    async with fleet.async_client() as client:
        stream = client.generate("One, two, three,", temperature=0.0, max_tokens=2000, ignore_eos=True)
        await anext(stream)
        await stream.cancel()
        await stream.read()
        assert stream.finished
        assert stream.finished.reason == "cancelled"
        info = await client.get_request(stream.request_id)
    assert info.state == "cancelled"
    assert [decision.what for decision in info.decisions[:3]] == ["accepted", "placed", "running"]


async def test_a_deadline_ends_a_running_answer(fleet: Fleet) -> None:
    async with fleet.async_client() as client:
        stream = client.generate("One, two, three,", max_tokens=2000, ignore_eos=True, deadline_ms=1500)
        with pytest.raises(shoal.DeadlineExceeded):
            await stream.read()
        assert stream.token_ids
