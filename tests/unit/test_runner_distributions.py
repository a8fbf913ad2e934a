"""What is sampled has the distribution that was asked for, by its closed form; draws are the same in every run."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.sequence import SamplingParameters
from services.worker.engine.step_plan import SeenTokens
from services.worker.runner.adjustments import adjusted
from services.worker.runner.sampling import Draw, sample

PLAIN = SamplingParameters(temperature=1.0, seed=11)
GREEDY = SamplingParameters()
LOGITS = (0.5, 2.0, -1.0, 1.5, -0.25, 0.0)
NUM_DRAWS = 6000
NORMAL_QUANTILE = 4.0
"""One in 30,000 fair draws would fail."""


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def only(logits: Sequence[float], kept: set[int]) -> list[float]:
    """The softmax among the tokens that are kept."""
    return softmax([logit if token in kept else -math.inf for token, logit in enumerate(logits)])


def drawn(
    parameters: SamplingParameters, seen: SeenTokens | None = None, allowed: bytes | None = None
) -> "Counter[int]":
    draws = [Draw(parameters, index, seen, allowed) for index in range(NUM_DRAWS)]
    return Counter(sample(torch.tensor(LOGITS).expand(NUM_DRAWS, -1), draws))


def check(counts: "Counter[int]", probabilities: Sequence[float]) -> None:
    """Pearson's chi-square test, its quantile by Wilson and Hilferty (1931); what is impossible never comes."""
    possible = [token for token, probability in enumerate(probabilities) if probability > 0]
    assert set(counts) <= set(possible)
    statistic = sum(
        (counts[token] - NUM_DRAWS * probabilities[token]) ** 2 / (NUM_DRAWS * probabilities[token])
        for token in possible
    )
    degrees = len(possible) - 1
    if degrees:
        spread = 2 / (9 * degrees)
        assert statistic < degrees * (1 - spread + NORMAL_QUANTILE * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_temperature_divides_logits(temperature: float) -> None:
    check(drawn(replace(PLAIN, temperature=temperature)), softmax([logit / temperature for logit in LOGITS]))


def test_the_test_finds_a_wrong_temperature() -> None:
    with pytest.raises(AssertionError):
        check(drawn(replace(PLAIN, temperature=0.8)), softmax(LOGITS))


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (4, {0, 1, 3, 5})])
def test_top_k_is_the_softmax_of_the_best_k(top_k: int, kept: set[int]) -> None:
    check(drawn(replace(PLAIN, top_k=top_k)), only(LOGITS, kept))


def test_top_p_is_the_softmax_of_the_smallest_set_that_reaches_it() -> None:
    best_first = sorted(enumerate(softmax(LOGITS)), key=lambda pair: -pair[1])
    for top_p in (0.3, 0.6, 0.85, 0.97):
        kept: set[int] = set()
        reached = 0.0
        while reached < top_p:
            token, probability = best_first[len(kept)]
            kept.add(token)
            reached += probability
        check(drawn(replace(PLAIN, top_p=top_p)), only(LOGITS, kept))


@pytest.mark.parametrize("min_p", [0.05, 0.2, 0.7])
def test_min_p_is_the_softmax_of_what_reaches_that_share_of_the_best(min_p: float) -> None:
    probabilities = softmax(LOGITS)
    kept = {token for token, probability in enumerate(probabilities) if probability >= min_p * max(probabilities)}
    check(drawn(replace(PLAIN, min_p=min_p)), only(LOGITS, kept))


def test_a_bias_is_added_to_logits() -> None:
    biased = [*LOGITS]
    biased[2] += 3.0
    biased[1] -= 1.5
    check(drawn(replace(PLAIN, logit_bias=((1, -1.5), (2, 3.0)))), softmax(biased))


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    # Token 0 stands in the prompt, 2 in the output, 1 in both.
    seen = SeenTokens(prompt=(0, 1, 1), generated=(2, 1))
    penalized = [0.5 / 1.8, 2.0 / 1.8, -1.0 * 1.8, 1.5, -0.25, 0.0]
    check(drawn(replace(PLAIN, repetition_penalty=1.8), seen), softmax(penalized))


def test_frequency_counts_and_presence_does_not_and_neither_looks_at_the_prompt() -> None:
    seen = SeenTokens(prompt=(3, 3, 3), generated=(1, 1, 1, 0))
    penalized = [0.5 - 0.4 - 0.7, 2.0 - 3 * 0.4 - 0.7, *LOGITS[2:]]
    check(drawn(replace(PLAIN, frequency_penalty=0.4, presence_penalty=0.7), seen), softmax(penalized))


def test_a_mask_leaves_the_softmax_of_what_it_allows() -> None:
    check(drawn(PLAIN, allowed=bytes([0b101001])), only(LOGITS, {0, 3, 5}))


def test_the_order_is_bias_penalties_mask_temperature_and_then_the_cuts() -> None:
    parameters = replace(
        PLAIN, logit_bias=((2, 4.0), (1, -3.0)), repetition_penalty=2.0, presence_penalty=0.5, temperature=0.5, top_k=3,
        min_p=0.1,
    )  # fmt: skip
    seen = SeenTokens(prompt=(2,), generated=(1,))
    # Token 2 is biased to 3.0 and then halved. Token 1 is biased to -1.0, then doubled, then lowered. Token 3 would be
    # among the best three, and is forbidden.
    scores = [0.5, -2.5, 1.5, -math.inf, -0.25, 0.0]
    tempered = [logit / 0.5 for logit in scores]
    # Of the best three, 2, 0 and 5, the last has exp(-3) of the best one's probability: below min_p.
    check(drawn(parameters, seen, bytes([0b110111])), only(tempered, {0, 2}))


def test_penalties_and_bias_hold_for_greedy_choices_too() -> None:
    def best(parameters: SamplingParameters, seen: SeenTokens | None = None) -> int:
        return sample(torch.tensor([LOGITS]), [Draw(parameters, 0, seen)])[0]

    assert best(GREEDY) == 1
    assert best(replace(GREEDY, repetition_penalty=1.5), SeenTokens((1,), ())) == 3
    assert best(replace(GREEDY, presence_penalty=0.6), SeenTokens((), (1,))) == 3
    assert best(replace(GREEDY, presence_penalty=0.6), SeenTokens((1,), ())) == 1
    assert best(replace(GREEDY, logit_bias=((4, 10.0),))) == 4


def test_a_negative_penalty_favours_what_was_said() -> None:
    (token,) = sample(
        torch.tensor([LOGITS]), [Draw(replace(GREEDY, frequency_penalty=-1), 0, SeenTokens((), (4,) * 3))]
    )
    assert token == 4


@pytest.mark.parametrize("mask", [b"", bytes(1), bytes(2)])
def test_a_mask_of_another_size_or_of_no_token_is_a_defect(mask: bytes) -> None:
    with pytest.raises(ValueError, match="mask"):
        sample(torch.tensor([LOGITS]), [Draw(GREEDY, 0, None, mask)])


VOCABULARY = 40
vectors = st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY, unique=True)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12).map(tuple)
parameters_of = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 15),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-5, 5), max_size=4).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
)
masks = st.one_of(
    st.none(),
    st.sets(st.integers(0, VOCABULARY - 1), min_size=1).map(
        lambda allowed: np.packbits([token in allowed for token in range(VOCABULARY)], bitorder="little").tobytes()
    ),
)
draws_of = st.builds(Draw, parameters_of, st.integers(0, 1000), st.builds(SeenTokens, tokens, tokens), masks)


def chosen(logits: list[float], draw: Draw) -> int:
    return sample(torch.tensor([logits]), [draw])[0]


@given(logits=vectors, draw=draws_of)
def test_top_k_1_and_min_p_1_choose_as_greedy_does(logits: list[float], draw: Draw) -> None:
    greedy = chosen(logits, replace(draw, parameters=replace(draw.parameters, temperature=0.0)))
    for cut in (replace(draw.parameters, top_k=1), replace(draw.parameters, top_k=0, min_p=1.0)):
        one = replace(draw, parameters=replace(cut, temperature=0.7))
        # Adjustments can make two equal: either is the best one then.
        assert chosen(logits, one) == greedy or _tied(logits, draw)


def _tied(logits: list[float], draw: Draw) -> bool:
    best = adjusted(torch.tensor(logits), draw.parameters, draw.seen, draw.allowed_tokens).topk(2).values.tolist()
    return bool(abs(best[0] - best[1]) < 1e-6)


@given(logits=vectors, draw=draws_of, token=st.integers(0, VOCABULARY - 1))
def test_a_bias_of_100_forces_a_token(logits: list[float], draw: Draw, token: int) -> None:
    forced = replace(
        draw.parameters, logit_bias=((token, 100.0),), repetition_penalty=1.0, frequency_penalty=0.0, temperature=0.5
    )
    assert chosen(logits, Draw(forced, draw.index, draw.seen)) == token


@given(logits=vectors, draw=draws_of)
def test_what_is_masked_is_never_chosen(logits: list[float], draw: Draw) -> None:
    token = chosen(logits, draw)
    assert draw.allowed_tokens is None or draw.allowed_tokens[token // 8] >> token % 8 & 1


@settings(deadline=None)
@given(rows=st.lists(st.tuples(vectors, draws_of), min_size=1, max_size=6), data=st.data())
def test_rows_in_another_order_give_the_same_tokens_in_that_order(
    rows: list[tuple[list[float], Draw]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    logits = torch.tensor([logits for logits, _ in rows])
    before = logits.clone()
    straight = sample(logits, [draw for _, draw in rows])
    permuted = sample(logits[list(order)], [rows[row][1] for row in order])
    assert permuted == [straight[row] for row in order]
    assert torch.equal(logits, before), "log-probabilities are of the logits as the model gave them"
