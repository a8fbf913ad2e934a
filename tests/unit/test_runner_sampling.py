"""Tokens are chosen as asked, with noise that belongs to a place in an answer and to nothing else."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from services.worker.engine.sequence import SamplingParameters
from services.worker.runner.noise import gumbel_noise, noise_key
from services.worker.runner.sampling import Draw, sample

PLAIN = SamplingParameters(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, choice=0)
PROBABILITIES = torch.tensor([0.05, 0.4, 0.05, 0.3, 0.2])


def drawn(parameters: SamplingParameters, probabilities: torch.Tensor = PROBABILITIES, draws: int = 4000) -> list[int]:
    logits = probabilities.log().expand(draws, -1)
    return sample(logits, [Draw(parameters, index) for index in range(draws)])


def test_temperature_0_takes_the_best_token() -> None:
    assert set(drawn(replace(PLAIN, temperature=0.0))) == {1}


def test_tokens_come_as_often_as_they_are_probable() -> None:
    counts = Counter(drawn(PLAIN))
    for token_id, probability in enumerate(PROBABILITIES.tolist()):
        # Five standard deviations of a binomial; the draws are the same in every run.
        assert abs(counts[token_id] - 4000 * probability) < 5 * math.sqrt(4000 * probability * (1 - probability))


def test_temperature_sharpens() -> None:
    share = Counter(drawn(replace(PLAIN, temperature=0.5)))[1] / 4000
    squares = PROBABILITIES.square()
    assert share == pytest.approx(float(squares[1] / squares.sum()), abs=0.04)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 100.0])
def test_extreme_temperatures_are_no_trouble(temperature: float) -> None:
    logits = torch.tensor([[1000.0, -1000.0, 999.0]])
    (token_id,) = sample(logits, [Draw(replace(PLAIN, temperature=temperature), 0)])
    assert token_id in ((0,) if temperature < 1 else (0, 1, 2))


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        (replace(PLAIN, top_k=2), {1, 3}),
        (replace(PLAIN, top_k=5), {0, 1, 2, 3, 4}),
        (replace(PLAIN, top_k=1_000_000), {0, 1, 2, 3, 4}),
        (replace(PLAIN, top_p=0.6), {1, 3}),
        (replace(PLAIN, top_p=0.75), {1, 3, 4}),
        (replace(PLAIN, top_p=1e-9), {1}),
        (replace(PLAIN, min_p=0.45), {1, 3, 4}),
        (replace(PLAIN, min_p=1.0), {1}),
        # top_p speaks of what top_k leaves: 0.4 of 0.7 reaches 0.5.
        (replace(PLAIN, top_k=2, top_p=0.5), {1}),
        (replace(PLAIN, top_k=3, top_p=0.99, min_p=0.6), {1, 3}),
    ],
)
def test_only_the_tokens_asked_for_are_chosen(parameters: SamplingParameters, kept: set[int]) -> None:
    assert set(drawn(parameters, draws=500)) == kept


def test_a_nucleus_larger_than_the_usual_is_found_too() -> None:
    flat = torch.full((5000,), 1 / 5000)
    flat[:2500] *= 1.5
    flat[2500:] *= 0.5
    chosen = set(drawn(replace(PLAIN, top_p=0.7), flat, draws=200))
    assert max(chosen) < 2500
    assert len(chosen) > 150


def test_a_token_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn((6, 1000), generator=torch.Generator().manual_seed(0))
    draws = [Draw(replace(PLAIN, seed=row), row) for row in range(6)]
    together = sample(logits, draws)
    assert [sample(logits[row : row + 1], [draws[row]])[0] for row in range(6)] == together


def test_noise_differs_by_seed_choice_index_and_token() -> None:
    ids = torch.arange(1000)
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2**64 - 1, 0, 0), (2**63, 0, 0)]
    values = torch.cat([gumbel_noise(noise_key(*place), ids) for place in places])
    assert len(set(values.tolist())) == len(values)


def test_noise_is_the_same_on_every_machine() -> None:
    # By a SplitMix64 in plain integers, written apart from this one.
    expected = [1.3717998612134916, 1.9015944323343965]
    assert gumbel_noise(noise_key(42, 1, 3), torch.tensor([0, 49151])).tolist() == pytest.approx(expected, rel=1e-12)


def test_noise_of_some_candidates_is_that_of_all() -> None:
    some = torch.tensor([999, 3, 500])
    key = noise_key(5, 0, 9)
    assert torch.equal(gumbel_noise(key, some), gumbel_noise(key, torch.arange(1000))[some])


def test_noise_has_the_gumbel_distributions_mean_and_variance() -> None:
    noise = gumbel_noise(noise_key(1, 0, 0), torch.arange(200_000))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert bool(noise.isfinite().all())
