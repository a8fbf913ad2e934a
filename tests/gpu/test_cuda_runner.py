"""The device's runner gives what transformers gives, whatever the batch, the chunks and the steps ahead."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen.shoal.fleet.v1 import engine_pb2
from services.common.config import ConfigError
from services.common.model.folder import read_folder
from services.worker.cuda import cuda_runner, decoder, matrix, shared_prefixes, step_shapes
from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.made_up_steps import made_up_step
from services.worker.cuda.matrix import DeviceMatrix, Multiplier, PartsReader
from services.worker.cuda.shared_prefixes import SharedPrefix
from services.worker.cuda.start import DeviceOptions, start_cuda_runner
from services.worker.cuda.weights import load_weights
from services.worker.engine.limits import EngineLimits
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.runner import Runner
from services.worker.engine.step_time import StepTimeModel
from services.worker.kernels.rope_kv import rope_and_write
from services.worker.kernels.rows import Rows, Scaled
from services.worker.kernels.small_product import small_product_reference, small_product_swiglu
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights.folder_decoder import open_folder_decoder
from tests.gpu.devices import DEVICE, IS_CUDA
from tests.unit.engine_builders import FinishingFront, add, add_command
from tests.unit.tiny_models import CONFIGS, reference_greedy, save, tiny_model

# The interpreter takes seconds a step: a window, a bias and heads' norms between them.
FAMILIES = list(CONFIGS) if IS_CUDA else ["mistral-window", "qwen2-tied", "qwen3"]
HEADS = {"llama-9-heads-of-3": {"head_dim": 8}}
"""Where a family's own are narrower than a GPU takes."""


def a_runner(
    folder: Path,
    weights: DeviceWeightFormat = "float32",
    *,
    is_batch_invariant: bool = False,
    has_graphs: bool = IS_CUDA,
    **options: int,
) -> tuple[EngineLimits, CudaRunner]:
    stored = open_folder_decoder(read_folder(folder))
    return start_cuda_runner(
        stored.config,
        lambda: load_weights(stored, weights, Shard(), DEVICE, lambda share: None),
        Shard(),
        DeviceOptions(
            weights=weights,
            block_size_tokens=16,
            max_sequences=4,
            context_tokens=128,
            num_blocks=40,
            has_graphs=has_graphs,
            is_batch_invariant=is_batch_invariant,
            **{"max_prefill_tokens_per_step": 16, **options},  # type: ignore[arg-type]
        ),
        DEVICE,
    )


def generate(
    limits: EngineLimits, runner: Runner, *looks: list[engine_pb2.EngineCommand]
) -> tuple[dict[int, list[int]], FinishingFront]:
    front = FinishingFront([*looks])
    step_time = StepTimeModel()
    EngineLoop(Planner(limits, step_time), step_time, runner, front, lambda: time.monotonic() * 1000).run()
    answers: dict[int, list[int]] = {}
    for output in front.outputs:
        answers.setdefault(output.sequence_id, []).extend(output.token_ids)
    return answers, front


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (5, 20, 1, 40)]


def greedy(number: int, prompt: Sequence[int], max_tokens: int) -> engine_pb2.EngineCommand:
    return add_command(add(number, prompt, max_tokens=max_tokens, stop_token_ids=()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_references_tokens_in_float32(family: str, tmp_path: Path) -> None:
    layers = {} if IS_CUDA else {"num_hidden_layers": 2}
    model = tiny_model(family, **HEADS.get(family, {}), **layers)
    limits, runner = a_runner(save(model, tmp_path))
    asked, num_tokens = (prompts(), 6) if IS_CUDA else (prompts()[:2], 3)
    # The second comes while the first one decodes: a step of a decode and a chunk.
    later = [greedy(number, prompt, num_tokens) for number, prompt in enumerate(asked[1:], 2)]
    looks = [[greedy(1, asked[0], num_tokens)], [], later]
    answers, _ = generate(limits, runner, *looks)
    assert answers == {number: reference_greedy(model, prompt, num_tokens) for number, prompt in enumerate(asked, 1)}


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_steps_that_are_filled_up_to_a_graphs_size_give_the_same_tokens(
    is_batch_invariant: bool, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("qwen3", num_hidden_layers=2, **sizes)
    limits, runner = a_runner(save(model, tmp_path), has_graphs=True, is_batch_invariant=is_batch_invariant)
    assert limits.filled_up_to == (20,)
    asked = [prompts()[1], prompts()[0], prompts()[2]]
    looks = [[greedy(1, asked[0], 3)], [], [greedy(number, prompt, 3) for number, prompt in enumerate(asked[1:], 2)]]
    # The second time, on a device, all of it is in graphs.
    for _ in range(2):
        answers, _ = generate(limits, runner, *looks)
        assert answers == {number: reference_greedy(model, prompt, 3) for number, prompt in enumerate(asked, 1)}


def test_long_steps_add_their_products_to_the_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, runner = a_runner(save(tiny_model("qwen3", num_hidden_layers=3), tmp_path), max_prefill_tokens_per_step=64)
    looks = [
        [add_command(add(number, prompt, max_tokens=1, stop_token_ids=(), logprobs=3))]
        for number, prompt in enumerate((prompts()[1], prompts()[3]), 1)
    ]

    def told() -> list[float]:
        _, front = generate(limits, runner, *looks)
        return [top.logprob for output in front.outputs for given in output.logprobs for top in given.top]

    in_norms = told()
    monkeypatch.setattr(matrix, "_ADDING_FROM_ROWS", 8)
    assert told() == pytest.approx(in_norms, abs=2e-5)
    assert len(in_norms) == 6


def test_products_in_parts_are_added_up_by_the_kernels_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3", num_hidden_layers=2)
    limits, runner = a_runner(save(model, tmp_path), has_graphs=False)
    multiply, readers = Multiplier.__call__, list[PartsReader]()

    def in_parts(
        multiplier: Multiplier,
        rows: Rows,
        weight: DeviceMatrix,
        out: Tensor,
        *,
        parts_for: PartsReader | None = None,
        **options: Any,
    ) -> Scaled:
        if parts_for is None:
            return multiply(multiplier, rows, weight, out, **options)
        readers.append(parts_for)
        return Scaled(small_product_reference(rows.values, weight.values, num_splits=2))

    monkeypatch.setattr(Multiplier, "__call__", in_parts)
    answers, _ = generate(limits, runner, [greedy(1, prompts()[0], 2)])
    assert answers == {1: reference_greedy(model, prompts()[0], 2)}
    assert readers == ["rope", "norm", "norm"] * 4, "two layers, twice"


@pytest.mark.skipif(not IS_CUDA, reason="the interpreter does not multiply bf16")
def test_few_rows_heads_are_turned_out_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 512, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = tiny_model("qwen3", num_hidden_layers=2, **sizes)
    limits, runner = a_runner(save(model, tmp_path), "bf16", has_graphs=False, max_prefill_tokens_per_step=64)
    num_parts: set[int] = set()

    def watched(qkv: Scaled, *arguments: Any, **options: Any) -> None:
        num_parts.add(qkv.num_parts)
        rope_and_write(qkv, *arguments, **options)

    def told() -> list[float]:
        asked = [
            add_command(add(number, prompt, max_tokens=1, stop_token_ids=(), logprobs=3))
            for number, prompt in enumerate(prompts()[:2], 1)
        ]
        _, front = generate(limits, runner, asked)
        return [given.top[0].logprob for output in front.outputs for given in output.logprobs]

    monkeypatch.setattr(decoder, "rope_and_write", watched)
    out_of_parts = told()
    assert 2 in num_parts
    num_parts.clear()
    monkeypatch.setattr(matrix, "_MOST_ROWS_TURNED_IN_PARTS", 0)
    assert told() == pytest.approx(out_of_parts, abs=0.1)
    assert num_parts == {1}


@pytest.mark.skipif(not IS_CUDA, reason="the interpreter does not multiply bf16")
def test_few_rows_gates_open_in_their_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3", num_hidden_layers=2, hidden_size=256, intermediate_size=512, head_dim=16)
    limits, runner = a_runner(save(model, tmp_path), "bf16", has_graphs=False, max_prefill_tokens_per_step=64)
    looks = [
        [add_command(add(number, prompt, max_tokens=1, stop_token_ids=(), logprobs=3))]
        for number, prompt in enumerate((prompts()[1], prompts()[3]), 1)
    ]

    def told() -> list[float]:
        _, front = generate(limits, runner, *looks)
        return [given.top[0].logprob for output in front.outputs for given in output.logprobs]

    apart = told()
    multiplied: list[int] = []

    def watched(rows: Rows, *arguments: Any, **options: Any) -> None:
        multiplied.append(len(rows.values))
        small_product_swiglu(rows, *arguments, **options)

    monkeypatch.setattr(decoder, "small_product_swiglu", watched)
    monkeypatch.setattr(matrix, "_MANY_OUTPUTS", 1024)
    assert told() == pytest.approx(apart, abs=0.1)
    assert max(multiplied) > 16


def test_what_is_prepared_between_requests_changes_nothing_of_theirs(tmp_path: Path) -> None:
    limits, runner = a_runner(save(tiny_model("qwen3", num_hidden_layers=1), tmp_path), has_graphs=True)
    runner.launch(made_up_step(1, [7], limits.block_size_tokens)).result()
    before = [layer.kv.clone() for layer in runner.cache.layers]
    assert before[0].any()
    num_prepared = 0
    while runner.prepare():
        num_prepared += 1
    assert 0 < num_prepared <= 5, "one to four decodes, and a step with prompts; some of them were captured before"
    assert all(torch.equal(layer.kv, kv) for layer, kv in zip(runner.cache.layers, before, strict=True))


def test_what_prompts_begin_with_in_common_is_attended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_shapes, "_LEAST_SHARING_DECODES", 2)
    monkeypatch.setattr(shared_prefixes, "LEAST_SHARED_TOKENS", 16)
    monkeypatch.setattr(shared_prefixes, "LEAST_TOKENS_SAVED", 1)
    model = tiny_model("qwen3", num_hidden_layers=2)
    limits, runner = a_runner(save(model, tmp_path), max_prefill_tokens_per_step=64)
    begin = prompts()[3]
    asked = [begin, [*begin, 7, 8, 9], [*begin, 11]]
    members: set[int] = set()
    tiles_of = shared_prefixes.tiles_of

    def watched(*arguments: Any) -> list[SharedPrefix]:
        tiles = tiles_of(*arguments)
        members.update(len(tile.members) for tile in tiles)
        return tiles

    monkeypatch.setattr(cuda_runner, "tiles_of", watched)
    # The second and the third find the first one's blocks in the step that computes them.
    answers, front = generate(limits, runner, [greedy(number, prompt, 4) for number, prompt in enumerate(asked, 1)])
    assert answers == {number: reference_greedy(model, prompt, 4) for number, prompt in enumerate(asked, 1)}
    assert [output.cached_tokens for output in front.outputs[:3]] == [0, 32, 32]
    assert 3 in members


# The interpreter rounds to bf16 and fp8 in ways of its own, but adds up in one order as well.
@pytest.mark.parametrize("weights", ["float32", "bf16", "fp8"] if IS_CUDA else ["float32"])
def test_in_the_batch_invariant_mode_neighbours_change_nothing(weights: DeviceWeightFormat, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("qwen3", num_hidden_layers=2, **sizes)
    # Chunks of at most 24 tokens: beside others the third prompt comes in two, its last token alone.
    limits, runner = a_runner(save(model, tmp_path), weights, is_batch_invariant=True, max_prefill_tokens_per_step=24)
    asked = [prompts()[0], prompts()[1][:7], prompts()[3][:13], prompts()[3][:30]]

    def ask(number: int, place: int) -> engine_pb2.EngineCommand:
        return add_command(add(number, asked[place], max_tokens=4, stop_token_ids=(), logprobs=3))

    def told(front: FinishingFront, number: int) -> list[tuple[int, float]]:
        outputs = [output for output in front.outputs if output.sequence_id == number]
        return [(top.token_id, top.logprob) for output in outputs for given in output.logprobs for top in given.top]

    _, together = generate(limits, runner, [ask(place + 1, place) for place in range(len(asked))])
    for place in range(len(asked)):
        _, alone = generate(limits, runner, [ask(10 + place, place)])
        assert told(alone, 10 + place) == told(together, place + 1), f"prompt {place}"
        assert len(told(together, place + 1)) == 12


def test_the_batch_invariant_mode_refuses_a_model_that_it_does_not_take(tmp_path: Path) -> None:
    folder = save(tiny_model("llama-9-heads-of-3", num_hidden_layers=1, head_dim=8), tmp_path)
    with pytest.raises(ConfigError, match=r"does not take a matrix of .* multiples of 16 bytes"):
        a_runner(folder, "float32", is_batch_invariant=True)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ({"head_dim": 18}, "a key of the model's heads takes 72 bytes; on a GPU it is to fill multiples of 16"),
        ({"head_dim": 4, "num_attention_heads": 65}, "65 query heads share a key head; on a GPU at most 64 can"),
    ],
)
def test_heads_that_chunks_are_not_attended_with_are_refused(heads: dict[str, int], said: str, tmp_path: Path) -> None:
    folder = save(tiny_model("qwen3", num_hidden_layers=1, **heads), tmp_path)
    with pytest.raises(ConfigError, match=said):
        a_runner(folder)


def test_kernels_are_compiled_of_few_layers_and_then_all_are_computed(tmp_path: Path) -> None:
    model = tiny_model("qwen3", num_hidden_layers=4)
    # A graph would be of the few layers that were computed when it was captured.
    limits, runner = a_runner(save(model, tmp_path), has_graphs=False)
    step = made_up_step(1, [7], limits.block_size_tokens)

    def written() -> list[bool]:
        return [bool(layer.kv.any()) for layer in runner.cache.layers]

    with runner._model.with_few_layers():
        runner.launch(step).result()
    assert written() == [True, True, False, False]
    runner.launch(step).result()
    assert written() == [True] * 4
