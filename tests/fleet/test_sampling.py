"""What a caller may ask of sampling, through the whole fleet: log-probabilities, several choices, penalties, bias."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import shoal
from tests.fleet.conftest import Fleet

Case = dict[str, Any]
CASES: list[Case] = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "reference" / "smollm2_logprobs.jsonl").read_text().splitlines()
]
LONGEST = max(CASES, key=lambda case: len(case["output_token_ids"]))
TOP = 5


@pytest.fixture(scope="module")
def fleet(start: Callable[..., Fleet]) -> Fleet:
    return start("--gateways", "2")


def ask(client: shoal.Client, case: Case, **options: Any) -> shoal.Stream:
    """The case's prompt, greedy unless told."""
    asked = {"temperature": 0.0, "max_tokens": len(case["output_token_ids"]), **options}
    return client.generate(token_ids=case["prompt_token_ids"], **asked)


def check(tokens: Sequence[int], logprobs: Sequence[shoal.TokenLogprobs], case: Case) -> None:
    """Tokens are the reference's, log-probabilities within 1e-3 of it."""
    assert list(tokens) == case["output_token_ids"]
    check_logprobs(logprobs, case)


def check_logprobs(logprobs: Sequence[shoal.TokenLogprobs], case: Case) -> None:
    assert len(logprobs) == len(case["steps"])
    for told, step in zip(logprobs, case["steps"], strict=True):
        assert told.logprob == pytest.approx(step["logprob"], abs=1e-3)
        assert list(told.top) == [token_id for token_id, _ in step["top5"]]
        assert list(told.top.values()) == pytest.approx([logprob for _, logprob in step["top5"]], abs=1e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_log_probabilities_are_the_references_cold_and_with_a_warm_cache_and_for_each_of_three_choices(
    fleet: Fleet, case: Case
) -> None:
    with fleet.client() as client:
        cold = ask(client, case, logprobs=TOP)
        deltas = list(cold)
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
        check(cold.token_ids, [told for delta in deltas for told in delta.logprobs], case)
        warm = ask(client, case, logprobs=TOP, n=3)
        warm.read()
    assert warm.finished
    assert warm.finished.usage.cached_tokens >= len(case["prompt_token_ids"]) // 16 * 16 - 16
    assert len(warm.choices) == 3
    for choice in warm.choices:
        check(choice.token_ids, choice.logprobs, case)
        assert choice.finish_reason == cold.choices[0].finish_reason


def test_given_tokens_have_the_log_probabilities_that_they_were_sampled_with(fleet: Fleet) -> None:
    prompt = [*LONGEST["prompt_token_ids"], *LONGEST["output_token_ids"]]
    with fleet.client() as client:
        for _ in range(2):  # The second finds all of it in the prefix cache, and computes it anyway.
            stream = client.generate(token_ids=prompt, max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
            stream.read()
            assert stream.finished
            told = stream.finished.prompt_logprobs
            assert len(told) == len(prompt) - 1, "the first token has nothing before it"
            check_logprobs(told[len(LONGEST["prompt_token_ids"]) - 1 :], LONGEST)
            assert not stream.choices[0].logprobs, "of the answer nothing was asked"


def test_0_tells_the_tokens_own_log_probability_alone(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = ask(client, CASES[0], logprobs=0)
        stream.read()
    logprobs = stream.choices[0].logprobs
    assert [told.logprob for told in logprobs] == pytest.approx(
        [step["logprob"] for step in CASES[0]["steps"]], abs=1e-3
    )
    assert not any(told.top for told in logprobs)


def test_an_ended_answer_is_read_again_with_its_log_probabilities_at_another_gateway(fleet: Fleet) -> None:
    with fleet.client() as client, shoal.Client(fleet.gateways[1]) as other:
        stream = ask(client, CASES[0], logprobs=TOP, prompt_logprobs=0, n=2)
        stream.read()
        again = other.attach(stream.request_id)
        again.read()
    for choice in again.choices:
        check(choice.token_ids, choice.logprobs, CASES[0])
    assert again.finished
    assert stream.finished
    assert again.finished.prompt_logprobs == stream.finished.prompt_logprobs != ()


@pytest.mark.parametrize("kind", ["worker", "engine"])
def test_after_a_workers_death_log_probabilities_go_on_without_a_gap(fleet: Fleet, kind: str) -> None:
    (victim,) = fleet.of_kind(kind)
    num_lines = len(fleet.lines)
    with fleet.client() as client:
        stream = ask(client, LONGEST, logprobs=TOP, n=2)
        told: dict[int, list[shoal.TokenLogprobs]] = {0: [], 1: []}
        killed = False
        for delta in stream:
            assert len(delta.logprobs) == len(delta.token_ids)
            told[delta.choice] += delta.logprobs
            if not killed and len(stream.token_ids) >= 5:
                os.kill(victim.pid, signal.SIGKILL)
                killed = True
        info = client.get_request(stream.request_id)
        assert info.attempts > 1, "it was killed in time"
        for number, choice in enumerate(stream.choices):
            check(choice.token_ids, told[number], LONGEST)
        again = client.attach(stream.request_id)
        again.read()
        for choice in again.choices:
            check(choice.token_ids, choice.logprobs, LONGEST)
    fleet.await_lines(num_lines + 1)


def texts(client: shoal.Client, **options: Any) -> shoal.Stream:
    stream = client.generate("Once upon a time, there was a", temperature=1.0, seed=5, max_tokens=24, n=3, **options)
    stream.read()
    return stream


def test_choices_differ_and_a_seed_repeats_each_of_them(fleet: Fleet) -> None:
    with fleet.client() as client:
        first, again, alone = (
            texts(client),
            texts(client),
            client.generate("Once upon a time, there was a", temperature=1.0, seed=5, max_tokens=24),
        )
        alone.read()
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 3
    assert alone.text == first.choices[0].text, "a choice does not depend on those beside it"
    assert first.finished
    assert first.finished.usage.completion_tokens == sum(len(choice.token_ids) for choice in first.choices)


def test_a_stop_text_ends_the_choice_that_says_it_and_no_other(fleet: Fleet) -> None:
    with fleet.client() as client:
        before = texts(client, logprobs=0, ignore_eos=True).choices
        others = before[0].text + before[2].text
        stop = next(word for word in before[1].text.split()[1:] if word not in others)
        after = texts(client, logprobs=0, ignore_eos=True, stop=stop).choices
    for number in (0, 2):
        assert (after[number].text, after[number].token_ids) == (before[number].text, before[number].token_ids)
        assert after[number].finish_reason is shoal.FinishReason.LENGTH
        assert len(after[number].logprobs) == 24
    assert after[1].finish_reason is shoal.FinishReason.STOP
    assert after[1].text == before[1].text[: before[1].text.index(stop)]
    assert len(after[1].logprobs) == len(after[1].token_ids) < len(before[1].token_ids)


def test_penalties_and_bias_change_greedy_answers(fleet: Fleet) -> None:
    case = LONGEST
    first = case["output_token_ids"][0]
    with fleet.client() as client:
        banned = ask(client, case, logit_bias={first: -100.0}, max_tokens=3, logprobs=1)
        forced = ask(client, case, logit_bias={17: 100.0}, max_tokens=3)
        repeating = client.generate("one one one one one", temperature=0.0, max_tokens=16, ignore_eos=True)
        varied = client.generate(
            "one one one one one", temperature=0.0, max_tokens=16, ignore_eos=True, repetition_penalty=5.0
        )
        for stream in (banned, forced, repeating, varied):
            stream.read()
    assert first not in banned.token_ids
    # What is told is what the model thinks, not what it was allowed.
    assert next(iter(banned.choices[0].logprobs[0].top)) == first
    assert list(forced.token_ids) == [17] * 3
    assert len(set(varied.token_ids)) == 16 > len(set(repeating.token_ids))


def test_a_share_of_the_best_tokens_probability_of_1_is_greedy(fleet: Fleet) -> None:
    with fleet.client() as client:
        stream = ask(client, CASES[0], temperature=1.0, min_p=1.0)
        stream.read()
    assert list(stream.token_ids) == CASES[0]["output_token_ids"]


def test_generate_tells_choices_and_log_probabilities_as_json(fleet: Fleet) -> None:
    done = fleet.command(
        "generate", "--json", "--n", "2", "--logprobs", "1", "--prompt-logprobs", "0", "--max-tokens", "3",
        "--temperature", "0", "--logit-bias", "17=-100", "The sea is",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [len(choice["logprobs"]) for choice in answer["choices"]] == [3, 3]
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] - 1
    assert fleet.command("generate", "--n", "2", "The sea is").returncode == 1
