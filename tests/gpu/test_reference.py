"""On a device, the default model gives the reference's tokens in float32; in bf16 it leaves them only at a near tie."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.start import DeviceOptions, start_cuda_runner
from services.worker.cuda.weights import load_weights
from services.worker.engine.limits import EngineLimits
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights.gguf_decoder import open_gguf_decoder
from tests.gpu.devices import DEVICE, IS_CUDA
from tests.gpu.test_cuda_runner import generate
from tests.unit.engine_builders import add, add_command

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_CUDA, reason="the interpreter takes hours for it")]

CASES: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "reference" / "smollm2_greedy.jsonl").read_text().splitlines()
]
# Logits of about 20 and their 8 bits of mantissa.
BF16_LOGIT_ERROR = 0.25


def a_runner(weights: DeviceWeightFormat, *, has_graphs: bool = True) -> tuple[EngineLimits, CudaRunner]:
    stored = open_gguf_decoder(read_gguf(default_model_path()))
    options = DeviceOptions(
        weights=weights,
        max_sequences=32,
        max_prefill_tokens_per_step=512,
        context_tokens=8192,
        num_blocks=600,
        step_budget_ms=1e9,
        has_graphs=has_graphs,
    )
    return start_cuda_runner(
        stored.config,
        lambda: load_weights(stored, weights, Shard(), DEVICE, lambda share: None),
        Shard(),
        options,
        DEVICE,
    )


def answers_of(
    limits: EngineLimits, runner: CudaRunner, *, one_by_one: bool = False
) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Each case's tokens, and by how much the best logit was ahead of the second at each of them."""
    commands = []
    for number, case in enumerate(CASES, 1):
        sequence = add(number, case["prompt_token_ids"], max_tokens=case["max_tokens"], logprobs=2)
        sequence.payload.stop_token_ids[:] = [2]
        commands.append(add_command(sequence))
    answers, front = generate(limits, runner, *([[one] for one in commands] if one_by_one else [commands]))
    gaps: dict[int, list[float]] = {}
    for output in front.outputs:
        for told in output.logprobs:
            gaps.setdefault(output.sequence_id, []).append(told.top[0].logprob - told.top[1].logprob)
    return answers, gaps


@pytest.mark.parametrize(("one_by_one", "has_graphs"), [(False, True), (True, True), (False, False)])
def test_float32_gives_the_references_tokens(one_by_one: bool, has_graphs: bool) -> None:
    limits, runner = a_runner("float32", has_graphs=has_graphs)
    answers, _ = answers_of(limits, runner, one_by_one=one_by_one)
    wrong = [case["name"] for number, case in enumerate(CASES, 1) if answers[number] != case["output_token_ids"]]
    assert not wrong


def test_bf16_leaves_the_reference_only_where_two_logits_are_near_each_other() -> None:
    _, gaps = answers_of(*a_runner("float32"))
    answers, _ = answers_of(*a_runner("bf16"))
    left = {}
    for number, case in enumerate(CASES, 1):
        pairs = enumerate(zip(answers[number], case["output_token_ids"], strict=False))
        first = next((index for index, (token, expected) in pairs if token != expected), None)
        if first is not None:
            left[case["name"]] = (first, round(gaps[number][first], 4))
    print(f"bf16 leaves {len(left)} of {len(CASES)} cases: {left}")
    assert all(gap < BF16_LOGIT_ERROR for _, gap in left.values())
