"""The default model as two ranks gives the reference's tokens in float32: on two devices, or sharing one."""

import argparse

import pytest
import torch

from services.common.model.location import default_model_path
from services.worker.benchmark.options import add_engine_options
from services.worker.benchmark.ranks import engine_of
from tests.gpu.devices import IS_CUDA
from tests.gpu.test_cuda_runner import generate
from tests.gpu.test_reference import CASES
from tests.unit.engine_builders import add, add_command

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_CUDA, reason="the interpreter takes hours for it")]


def answers_of(device: str, *flags: str) -> dict[int, list[int]]:
    sizes = {"--max-sequences": 32, "--max-prefill-tokens": 512, "--num-blocks": 600, "--shards": 2}
    told = ["--model", str(default_model_path()), "--device", device, "--dtype", "float32", *flags]
    told += [text for name, size in sizes.items() for text in (name, str(size))]
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    commands = []
    for number, case in enumerate(CASES, 1):
        sequence = add(number, case["prompt_token_ids"], max_tokens=case["max_tokens"])
        sequence.payload.stop_token_ids[:] = [2]
        commands.append(add_command(sequence))
    with engine_of(parser.parse_args(told), told) as engine:
        answers, _ = generate(engine.rank.limits, engine.runner, commands)
    return answers


EXPECTED = {number: case["output_token_ids"] for number, case in enumerate(CASES, 1)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two devices")
@pytest.mark.parametrize("flags", [[], ["--no-graphs"]])
def test_two_devices_give_the_references_tokens(flags: list[str]) -> None:
    assert answers_of("cuda", *flags) == EXPECTED


def test_two_ranks_that_share_a_device_give_the_references_tokens() -> None:
    assert answers_of("cuda:0") == EXPECTED
