"""Ranks on devices answer as one runner does: each with its part of the model, all in step.

That they draw as one does, too, and give its log-probabilities, is in test_worker_engine.py.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.worker.benchmark.options import Engine, add_engine_options
from services.worker.benchmark.ranks import engine_of
from services.worker.runner.models.shard import Shard
from tests.gpu.devices import DEVICE, IS_CUDA
from tests.gpu.test_cuda_runner import generate, greedy, prompts
from tests.unit.tiny_models import reference_greedy, save, tiny_model

# The interpreter takes seconds a step.
FAMILIES = ["mistral-window", "qwen2-tied", "qwen3"] if IS_CUDA else ["qwen2-tied"]
NUM_LAYERS, NUM_TOKENS = (2, 6) if IS_CUDA else (1, 3)


@contextmanager
def ranks_of(folder: Path, world_size: int) -> Iterator[Engine]:
    """An engine of several ranks, which share the device."""
    device = f"{DEVICE.type}:0" if IS_CUDA else "cpu"
    sizes = {"--block-size": 16, "--max-sequences": 4, "--max-prefill-tokens": 16, "--num-blocks": 40}
    told = ["--model", str(folder), "--device", device, "--dtype", "float32", "--context-tokens", "128"]
    told += ["--shards", str(world_size), *(text for name, size in sizes.items() for text in (name, str(size)))]
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    with engine_of(parser.parse_args(told), told) as engine:
        yield engine


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_references_tokens(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    asked = prompts() if IS_CUDA else prompts()[:2]
    # The second comes while the first one decodes: a step of a decode and a chunk.
    later = [greedy(number, prompt, NUM_TOKENS) for number, prompt in enumerate(asked[1:], 2)]
    with ranks_of(save(model, tmp_path), 2) as engine:
        whole = engine.rank.runner.cache.layers[0].kv.shape[2]
        assert whole < Shard().config(engine.rank.config).num_kv_heads * 2
        answers, _ = generate(engine.rank.limits, engine.runner, [greedy(1, asked[0], NUM_TOKENS)], [], later)
    assert answers == {number: reference_greedy(model, prompt, NUM_TOKENS) for number, prompt in enumerate(asked, 1)}
