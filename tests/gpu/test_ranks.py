"""Ranks on devices answer as one runner does: each with its part of the model, all in step.

That they draw as one does, too, and give its log-probabilities, is in test_worker_engine.py.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.benchmark.options import Engine, add_engine_options
from services.worker.benchmark.ranks import engine_of
from services.worker.runner.models.shard import Shard
from tests.gpu.devices import DEVICE, IS_CUDA
from tests.gpu.test_cuda_runner import generate, greedy, prompts
from tests.unit.engine_builders import FinishingFront, add, add_command
from tests.unit.tiny_models import reference_greedy, save, tiny_model

# The interpreter takes seconds a step.
FAMILIES = ["mistral-window", "qwen2-tied", "qwen3"] if IS_CUDA else ["qwen2-tied"]
NUM_LAYERS, NUM_TOKENS = (2, 6) if IS_CUDA else (1, 3)
SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLERANCES = {"float32": 1e-4, "bf16": 0.25, "fp8": 0.8}
"""Of log-probabilities of -1 to -10. In fp8 ranks have scales of their own."""
DEVICES = [pytest.param(f"{DEVICE.type}:0" if IS_CUDA else "cpu", id="shared")]
if torch.cuda.device_count() > 1:
    DEVICES.append(pytest.param("cuda", id="one-each"))


@contextmanager
def ranks_of(folder: Path, world_size: int, device: str, *flags: str, fills_up: bool = IS_CUDA) -> Iterator[Engine]:
    sizes = {"--block-size": 16, "--max-sequences": 4, "--max-prefill-tokens": 16, "--num-blocks": 40}
    told = ["--model", str(folder), "--device", device, "--dtype", "float32", "--context-tokens", "128"]
    told += ["--shards", str(world_size), *(text for name, size in sizes.items() for text in (name, str(size))), *flags]
    told += [] if fills_up else ["--no-graphs"]
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    with engine_of(parser.parse_args(told), told) as engine:
        yield engine


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_references_tokens(family: str, device: str, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    asked = prompts() if IS_CUDA else prompts()[:2]
    # The second comes while the first one decodes: a step of a decode and a chunk.
    later = [greedy(number, prompt, NUM_TOKENS) for number, prompt in enumerate(asked[1:], 2)]
    with ranks_of(save(model, tmp_path), 2, device) as engine:
        whole = engine.rank.runner.cache.layers[0].kv.shape[2]
        assert whole < Shard().config(engine.rank.config).num_kv_heads * 2
        answers, _ = generate(engine.rank.limits, engine.runner, [greedy(1, asked[0], NUM_TOKENS)], [], later)
    assert answers == {number: reference_greedy(model, prompt, NUM_TOKENS) for number, prompt in enumerate(asked, 1)}


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_that_fill_steps_up_and_prepare_in_between_give_the_same_tokens(device: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3", num_hidden_layers=NUM_LAYERS, **SIZES)
    asked = prompts()[:2]
    with ranks_of(save(model, tmp_path), 2, device, fills_up=True) as engine:
        assert engine.rank.limits.filled_up_to == (20,)
        for first in (1, 11):
            looks = [[greedy(first, asked[0], NUM_TOKENS)], [], [greedy(first + 1, asked[1], NUM_TOKENS)]]
            answers, _ = generate(engine.rank.limits, engine.runner, *looks)
            expected = [reference_greedy(model, prompt, NUM_TOKENS) for prompt in asked]
            assert answers == dict(enumerate(expected, first))
            assert not engine.rank.runner.may_prepare, "the loop has ranks prepare when there is nothing else to do"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", ["bf16", "fp8"] if IS_CUDA else ["float32"])
@pytest.mark.parametrize("most_rows", [2, 16])
def test_two_ranks_think_of_a_prompt_as_one_does(weights: str, most_rows: int, device: str, tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3", num_hidden_layers=NUM_LAYERS, **SIZES), tmp_path)
    flags = ["--dtype", weights, "--max-prefill-tokens", str(most_rows)]

    def thought(world_size: int) -> torch.Tensor:
        asked = add_command(add(1, prompts()[0], max_tokens=1, stop_token_ids=(), prompt_logprobs=2))
        with ranks_of(folder, world_size, device, *flags) as engine:
            _, front = generate(engine.rank.limits, engine.runner, [asked])
        told = [one for output in front.outputs for one in output.given_logprobs]
        return torch.tensor([[one.logprob, *(top.logprob for top in one.top)] for one in told])

    alone, together = thought(1), thought(2)
    assert alone.shape == (len(prompts()[0]) - 1, 3)
    assert float((together - alone).abs().max()) < TOLERANCES[weights]


@pytest.mark.parametrize("device", DEVICES)
def test_in_the_batch_invariant_mode_neighbours_change_nothing_on_two_ranks_either(device: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3", num_hidden_layers=NUM_LAYERS, **SIZES)
    asked = [prompts()[0], prompts()[3][:7], prompts()[3][:19]] if IS_CUDA else [prompts()[0], prompts()[3][:7]]

    def ask(number: int, place: int) -> engine_pb2.EngineCommand:
        return add_command(add(number, asked[place], max_tokens=NUM_TOKENS, stop_token_ids=(), logprobs=2))

    def told(front: FinishingFront, number: int) -> list[tuple[int, float]]:
        outputs = [output for output in front.outputs if output.sequence_id == number]
        return [(top.token_id, top.logprob) for output in outputs for given in output.logprobs for top in given.top]

    with ranks_of(save(model, tmp_path), 2, device, "--batch-invariant") as engine:
        limits = engine.rank.limits
        _, together = generate(limits, engine.runner, [ask(place + 1, place) for place in range(len(asked))])
        for place in range(len(asked)):
            answers, alone = generate(limits, engine.runner, [ask(10 + place, place)])
            assert told(alone, 10 + place) == told(together, place + 1), f"prompt {place}"
            assert answers[10 + place] == reference_greedy(model, asked[place], NUM_TOKENS)
