"""Weights of 8 bits: close to the product, each row by itself, and a model that still says nearly the same."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from services.common.config import parse
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.worker.config import WorkerConfig
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.engine_config import EngineConfig
from services.worker.front.engine_client import engine_config
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import pack_int8
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.start import start_cpu_runner
from services.worker.weight_format import WeightFormat
from services.worker.weights.gguf_decoder import open_gguf_decoder
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.unit.instruction_sets import instruction_set

__all__ = ["instruction_set"]

REFERENCE = Path(__file__).parents[1] / "reference" / "smollm2_greedy.jsonl"


def a_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 2, 8, 33])
def test_a_product_is_off_by_about_a_hundredth(num_rows: int) -> None:
    weight, bias, rows = a_matrix(96, 640), a_matrix(96, seed=1), a_matrix(num_rows, 640, seed=2)
    exact = rows @ weight.T + bias
    error = pack_int8(weight, bias)(rows) - exact
    assert float(error.norm() / exact.norm()) < 0.015


@pytest.mark.parametrize("num_inputs", [64, 640, 644])
@pytest.mark.parametrize("num_rows", [8, 9, 16, 17, 32, 33, 300])
def test_a_row_is_bit_for_bit_the_same_in_any_company(num_rows: int, num_inputs: int) -> None:
    """Also of the processor's tiles, which take many rows, and the vectors, which take few."""
    linear = pack_int8(a_matrix(100, num_inputs), a_matrix(100, seed=1))
    rows = a_matrix(num_rows, num_inputs, seed=3) * torch.logspace(-6, 6, num_rows)[:, None]
    together = linear(rows)
    for row, result in zip(rows, together, strict=True):
        assert torch.equal(linear(row[None])[0], result)


def test_rows_of_very_different_size_keep_their_precision() -> None:
    weight, rows = a_matrix(64, 640), a_matrix(2, 640, seed=4)
    rows[1] *= 1e6
    exact = rows @ weight.T
    relative = (pack_int8(weight, None)(rows) - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(relative.max()) < 0.015


def test_zeros_give_zeros() -> None:
    weight = a_matrix(64, 640)
    weight[5] = 0
    product = pack_int8(weight, None)(torch.cat((torch.zeros(1, 640), torch.ones(1, 640))))
    assert not product[0].any()
    assert float(product[1, 5]) == 0


def test_the_largest_magnitudes_do_not_overflow() -> None:
    weight, rows = torch.full((16, 640), -3.0), torch.full((2, 640), 5.0)
    assert pack_int8(weight, None)(rows).tolist() == [[pytest.approx(-3.0 * 5.0 * 640, rel=1e-5)] * 16] * 2


def test_the_default_model_chooses_eight_of_ten_tokens_as_in_float32() -> None:
    stored = open_gguf_decoder(read_gguf(default_model_path()))
    decoder = Decoder(stored.config, load_decoder(stored, pack_int8, lambda share: None))
    num_tokens = num_same = 0
    for case in map(json.loads, REFERENCE.read_text().splitlines()[:8]):
        prompt, output = case["prompt_token_ids"], case["output_token_ids"]
        given = (*prompt, *output[:-1])
        blocks = tuple(BlockId(block) for block in range(-(-len(given) // 16)))
        scored = tuple(output[:-1])
        chunk = SequenceChunk(SequenceId(1), given, 0, blocks, SamplingParameters(), 0, scored)
        cache = PagedKvCache(stored.config, len(blocks), 16)
        with torch.inference_mode():
            hidden = decoder.forward(make_batch(StepPlan(1, (chunk,)), cache), cache)
            chosen = decoder.logits(hidden).argmax(dim=1).tolist()
        num_tokens += len(output)
        num_same += sum(a == b for a, b in zip(chosen, output, strict=True))
    assert num_same / num_tokens > 0.8


def test_a_worker_tells_its_engine_how_to_hold_weights() -> None:
    worker = parse(WorkerConfig, "worker", ["--model-path", "model.gguf", "--weights", "int8"], {}).config
    assert EngineConfig.parse(engine_config(worker, fd=3).arguments()).weights == "int8"


def test_an_engine_holds_weights_as_it_is_told() -> None:
    prompt = tuple(json.loads(REFERENCE.read_text().splitlines()[0])["prompt_token_ids"][:16])
    chunk = SequenceChunk(SequenceId(1), prompt, 0, (BlockId(0),), SamplingParameters(num_logprobs=0), sample_index=0)
    told = []
    for weights in get_args(WeightFormat):
        arguments = ["--model-path", str(default_model_path()), "--weights", weights, "--kv-cache-bytes", str(1 << 20)]
        config = engine_config(parse(WorkerConfig, "worker", arguments, {}).config, fd=0)
        _, runner = start_cpu_runner(open_decoder(read_gguf(default_model_path())), config, lambda share: None)
        logprobs = runner.launch(StepPlan(1, (chunk,))).result().chunks[0].logprobs
        assert logprobs is not None
        told.append(logprobs.logprob)
    assert told[0] != told[1]
    assert told == pytest.approx([told[0]] * 2, abs=1.0)


def test_a_format_that_is_not_known_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(WorkerConfig, "worker", ["--model-path", "model.gguf", "--weights", "int4"], {})
    assert "--weights is 'int4'; expected one of float32, int8" in capsys.readouterr().err
