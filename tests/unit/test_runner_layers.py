"""The parts of a forward pass compute what their formulas say."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from services.common.config import ConfigError
from services.worker.cpu_kernels import library
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan
from services.worker.runner.batch import make_batch
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import pack_float32
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderWeights
from services.worker.runner.norm import rms_norm
from services.worker.runner.rope import rotary_table
from services.worker.runner.rotary_frequencies import rotary_frequencies
from tests.unit.instruction_sets import instruction_set
from tests.unit.kernels_alone import rotate_and_store, swiglu

__all__ = ["instruction_set"]


def a_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_inputs", [1, 40, 511, 512, 513, 1300])
@pytest.mark.parametrize("num_outputs", [1, 31, 32, 33, 96])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 13, 96, 97, 200])
def test_a_linear_layer_is_a_product(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    weight, bias, rows = (
        a_matrix(num_outputs, num_inputs),
        a_matrix(num_outputs, seed=1),
        a_matrix(num_rows, num_inputs),
    )
    product = rows.double() @ weight.double().T
    size = num_inputs**0.5
    torch.testing.assert_close(pack_float32(weight, None)(rows), product.float(), atol=1e-5 * size, rtol=1e-5)
    with_bias = pack_float32(weight, bias)
    torch.testing.assert_close(with_bias(rows), (product + bias).float(), atol=1e-5 * size, rtol=1e-5)


def test_a_linear_layer_keeps_its_own_weight() -> None:
    weight, bias, rows = a_matrix(96, 40), a_matrix(96), a_matrix(3, 40)
    linear = pack_float32(weight, bias)
    before = linear(rows)
    weight.zero_()
    bias.zero_()
    assert torch.equal(linear(rows), before)


@pytest.mark.parametrize("num_inputs", [40, 1300])
def test_a_row_is_bit_for_bit_the_same_in_any_company(num_inputs: int) -> None:
    linear, rows = pack_float32(a_matrix(100, num_inputs), None), a_matrix(230, num_inputs)
    together = linear(rows)
    for num_rows in (1, 2, 3, 5, 11, 12, 13, 40, 97, 200):
        assert torch.equal(linear(rows[-num_rows:]), together[-num_rows:])


def test_without_its_kernels_a_worker_says_how_to_build_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_LIBRARIES", tmp_path)
    with pytest.raises(ConfigError, match="make setup"):
        pack_float32(a_matrix(4, 4), None)


@pytest.mark.parametrize(("head_dim", "num_heads", "word"), [(258, 1, "head_dim"), (8, 33, "query heads")])
def test_heads_that_the_kernels_do_not_take_are_refused_by_name(head_dim: int, num_heads: int, word: str) -> None:
    config = replace(a_config(head_dim), num_heads=num_heads, num_layers=0)
    none = torch.empty(0)
    weights = DecoderWeights(none, (), none, pack_float32(a_matrix(4, 4), None), none)
    with pytest.raises(ConfigError, match=word):
        Decoder(config, weights)


def test_threads_do_not_change_a_bit() -> None:
    linear, rows, threads = pack_float32(a_matrix(100, 300), None), a_matrix(50, 300), torch.get_num_threads()
    before = linear(rows)
    try:
        for num_threads in (1, 3, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(linear(rows), before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("num_rows", "size"), [(1, 576), (7, 64), (9, 30), (5, 3)])
def test_a_norm_divides_by_the_root_of_the_mean_square(num_rows: int, size: int) -> None:
    rows, weight = a_matrix(num_rows, size) * 100, a_matrix(size, seed=1)
    torch.testing.assert_close(rms_norm(rows, weight, 1e-5), torch.nn.functional.rms_norm(rows, (size,), weight, 1e-5))


@pytest.mark.parametrize(("num_rows", "size"), [(1, 1536), (7, 64), (9, 30), (5, 3)])
def test_the_gate_lets_through_what_silu_says(num_rows: int, size: int) -> None:
    gate_up = a_matrix(num_rows, 2 * size) * 30
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(swiglu(gate_up), silu(gate) * up, atol=1e-6, rtol=1e-5)


def test_the_gate_takes_values_of_any_size() -> None:
    gate_up = torch.tensor([[-3e38, -1e4, -88.0, 0.0, 88.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert swiglu(gate_up)[0].tolist() == [0.0, 0.0, pytest.approx(0.0, abs=1e-30), 0.0, 88.0, 1e4]


def a_config(head_dim: int) -> DecoderConfig:
    return DecoderConfig(
        num_layers=2,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=head_dim,
        vocabulary_size=100,
        context_tokens=64,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
    )


def stored(qkv: Tensor, head_dim: int, first_position: int, qk_norm: Tensor | None = None) -> PagedKvCache:
    """Turn and store the rows of a sequence in blocks 5 and 2, of 4 tokens each."""
    config = a_config(head_dim)
    cache = PagedKvCache(config, num_blocks=6, block_size_tokens=4)
    chunk = SequenceChunk(
        SequenceId(1), (0,) * len(qkv), first_position, (BlockId(5), BlockId(2)), SamplingParameters(), sample_index=0
    )
    turns = rotary_table(config.context_tokens, rotary_frequencies(head_dim, config.rope_theta))
    rotate_and_store(qkv, turns, qk_norm, make_batch(StepPlan(1, (chunk,)), cache), cache, 1)
    return cache


def test_rotation_turns_neighbours_by_the_angle_of_the_position() -> None:
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0] * 4])
    stored(qkv, 4, first_position=3)
    expected = []
    for x, y, frequency in ((1.0, 2.0, 1.0), (3.0, 4.0, 0.1)):
        cos, sin = math.cos(3 * frequency), math.sin(3 * frequency)
        expected += [x * cos - y * sin, y * cos + x * sin]
    # Two queries, a key, and the value, which is not turned.
    assert qkv[0].tolist() == pytest.approx([*expected * 3, 1.0, 2.0, 3.0, 4.0], rel=1e-6)


def test_queries_and_keys_are_normalized_before_they_are_turned() -> None:
    qkv, weights = a_matrix(2, 4 * 6), a_matrix(3, 6, seed=1)
    normalized = qkv.clone().view(2, 4, 6)
    normalized[:, :3] = torch.nn.functional.rms_norm(normalized[:, :3], (6,), None, 1e-5) * weights
    turned = normalized.reshape(2, -1).clone()
    stored(turned, 6, first_position=2)
    stored(qkv, 6, first_position=2, qk_norm=weights)
    torch.testing.assert_close(qkv, turned)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    qkv = a_matrix(3, 4 * 8)
    layer = stored(qkv, 8, first_position=2).layer(1)
    keys, values = layer[:, 0, 0].view(6, 8, 4).transpose(1, 2), layer[:, 1, 0].view(6, 4, 8)
    for row, (block, place) in zip(qkv, [(5, 2), (5, 3), (2, 0)], strict=True):
        assert torch.equal(keys[block, place], row[16:24])
        assert torch.equal(values[block, place], row[24:])
    assert int(layer.count_nonzero()) == 3 * 2 * 8
