"""Ranks that each have a part of the model give what the whole one gives, and nothing if they are not of one mind."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.model.location import default_model_path
from services.worker.engine.block_pool import BlockId
from services.worker.engine.runner import RanksDisagreeError, RanksLostError
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SeenTokens, SequenceChunk, StepPlan
from services.worker.runner.models.shard import Shard
from services.worker.runner.rank_sampling import DealtVocabulary
from services.worker.runner.ranks import RankMemory, Ranks
from services.worker.runner.sampling import Draw, sample
from tests.unit.ranks_in_threads import ShardedModel, sharded_model
from tests.unit.reference_ways import WAYS
from tests.unit.test_runner_reference import (
    CASES,
    LOGPROB_CASES,
    SHORT_CASES,
    asking,
    check,
    expected,
    greedy,
    run,
    scored,
)
from tests.unit.test_shard import SMOLLM2
from tests.unit.tiny_models import save, tiny_model


@pytest.fixture(scope="module", params=[2, 3])
def sharded(request: pytest.FixtureRequest) -> Iterator[ShardedModel]:
    with sharded_model(default_model_path(), request.param) as model:
        yield model


@pytest.mark.parametrize("way", WAYS)
def test_however_they_are_run_cases_give_the_references_tokens(sharded: ShardedModel, way: str) -> None:
    cases = CASES if way == "at-once" else SHORT_CASES
    assert WAYS[way](sharded, cases).right == len(cases)


def test_a_prefix_found_in_the_cache_changes_no_token(sharded: ShardedModel) -> None:
    shared = [case for case in CASES if len(case["prompt_token_ids"]) > 1000][:2]
    ran = run(sharded, *[[greedy(number, case)] for number, case in enumerate(shared, 1)])
    assert ran.answers == {number: expected(case) for number, case in enumerate(shared, 1)}
    assert ran.cached_tokens[2] > 1000


@pytest.mark.parametrize("case", LOGPROB_CASES[:2], ids=lambda case: case["name"])
def test_log_probabilities_are_the_references(sharded: ShardedModel, case: dict[str, object]) -> None:
    told, _ = scored(sharded, asking(case))
    check(told, case)
    told, given = scored(sharded, asking(case, known=9), 7)
    check([*given.values(), *told], case)


NUM_TOKENS = 96
TINY = replace(SMOLLM2, vocabulary_size=NUM_TOKENS)
token_ids = st.lists(st.integers(0, NUM_TOKENS - 1), max_size=9).map(tuple)
parameters = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([1, 2, 7, 40, 200]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1 << 60),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    presence_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, NUM_TOKENS - 1), st.floats(-5, 5), max_size=4).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
)
masks = st.sets(st.integers(0, NUM_TOKENS - 1), min_size=1).map(
    lambda allowed: bytes(sum(1 << bit for bit in range(8) if 8 * byte + bit in allowed) for byte in range(12))
)
draws = st.builds(
    Draw, parameters, st.integers(0, 1000), st.builds(SeenTokens, token_ids, token_ids), st.none() | masks
)


@given(st.lists(draws, min_size=1, max_size=3), st.integers(0, 1 << 30), st.sampled_from([2, 3, 5]))
@settings(max_examples=200, deadline=None)
def test_a_few_tokens_of_each_rank_choose_what_all_logits_would(drawn: list[Draw], seed: int, world_size: int) -> None:
    logits = torch.randn((len(drawn), NUM_TOKENS), generator=torch.Generator().manual_seed(seed)) * 4
    memory = torch.zeros(RankMemory.num_bytes(world_size, 4096), dtype=torch.uint8)

    def chosen_by(rank: int) -> list[int]:
        ranks = Ranks(Shard(rank, world_size), RankMemory.of(memory, world_size, 4096), 60)
        own = ranks.shard.vocabulary(TINY)
        return DealtVocabulary(ranks, TINY).choose(logits[:, own.start : own.stop], drawn)

    with ThreadPoolExecutor(world_size) as threads:
        chosen = list(threads.map(chosen_by, range(world_size)))
    assert chosen == [sample(logits, drawn)] * world_size


def plan_of(step: int) -> StepPlan:
    chunk = SequenceChunk(SequenceId(1), (5, 6), 0, (BlockId(0),), SamplingParameters(), 0)
    return StepPlan(step, (chunk,))


def test_ranks_that_compute_different_steps_all_say_so(tmp_path: Path) -> None:
    path = save(tiny_model("llama"), tmp_path)
    with sharded_model(path, 2) as model:
        runner = model.runner(4, 4)
        runner.launch(plan_of(1)).result()
        told = [
            model.threads.submit(rank.compute, plan_of(step)) for rank, step in zip(runner.ranks, (2, 3), strict=True)
        ]
        for future in told:
            with pytest.raises(RanksDisagreeError, match="ranks differ in step"):
                future.result()


def test_ranks_that_computed_different_things_all_say_so(tmp_path: Path) -> None:
    path = save(tiny_model("llama"), tmp_path)
    with sharded_model(path, 2) as model:
        runner = model.runner(4, 4)
        other = replace(plan_of(1), chunks=(plan_of(1).chunks[0]._replace(token_ids=(5, 50)),))
        told = [
            model.threads.submit(rank.compute, plan)
            for rank, plan in zip(runner.ranks, (plan_of(1), other), strict=True)
        ]
        errors = [future.exception() for future in told]
    assert [type(error) for error in errors] == [RanksDisagreeError] * 2


def test_a_rank_waits_for_one_that_does_not_come_only_so_long(tmp_path: Path) -> None:
    path = save(tiny_model("llama"), tmp_path)
    with sharded_model(path, 3, patience_s=0.1) as model:
        first, second, _ = model.runner(4, 4).ranks
        told = [model.threads.submit(rank.compute, plan_of(1)) for rank in (first, second)]
        for future in told:
            with pytest.raises(RanksLostError, match="waited for another one in vain"):
                future.result()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_meet_through_gloo_give_the_references_tokens_too(ranks: int) -> None:
    """Another library's sums, in another order: what ranks do does not hang on how they meet."""
    command = [sys.executable, "-m", "tests.unit.gloo_ranks", "--short", "--way", "at-once", "--ranks", str(ranks)]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=100, check=True).stdout)
    assert (told["ranks"], told["right"], told["of"]) == (ranks, len(SHORT_CASES), len(SHORT_CASES))
