"""Each rank's device holds its part of the weights, and little more."""

from dataclasses import replace
from pathlib import Path

import pytest

from services.common.model.stored_model import read_stored_model
from services.worker.cuda.weights import DeviceWeights, dummy_weights, weights_bytes
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights.open_decoder import open_decoder
from tests.gpu.devices import DEVICE
from tests.gpu.test_weights import on_the_device
from tests.unit.tiny_models import save, tiny_model

LLAMA_8B = DecoderConfig(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocabulary_size=128256,
    context_tokens=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
)
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64)
SMALL = replace(LLAMA_8B, num_layers=2, hidden_size=64, intermediate_size=96, num_heads=6, num_kv_heads=3, head_dim=16)


@pytest.mark.parametrize("config", [LLAMA_8B, LLAMA_70B], ids=["8B", "70B"])
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_ranks_weights_are_its_share(config: DecoderConfig, weights: DeviceWeightFormat, world_size: int) -> None:
    whole = weights_bytes(config, weights, Shard())
    parts = [weights_bytes(config, weights, Shard(rank, world_size)) for rank in range(world_size)]
    assert max(parts) <= (1 / world_size + 0.05) * whole
    assert sum(parts) == whole


@pytest.mark.parametrize("weights", ["float32", "bf16", "fp8"])
@pytest.mark.parametrize("shard", [Shard(), Shard(0, 2), Shard(1, 2)])
@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_thought_to_fit_is_what_is_held(weights: DeviceWeightFormat, shard: Shard, is_tied: bool) -> None:
    config = replace(SMALL, is_tied=is_tied)
    assert held_bytes(dummy_weights(config, weights, shard, DEVICE)) == weights_bytes(config, weights, shard)


def test_dummy_weights_are_even_in_a_thousandth_as_vllms_are() -> None:
    weights = dummy_weights(SMALL, "float32", Shard(), DEVICE)
    layer = weights.layers[0]
    for matrix in (layer.qkv_proj.values, layer.down_proj.values, weights.lm_head.values, weights.embedding):
        assert float(matrix.abs().max()) == pytest.approx(1e-3, rel=1e-2)
        assert float(matrix.abs().mean()) == pytest.approx(5e-4, rel=5e-2)


@pytest.mark.parametrize("name", ["llama", "llama-tied-llama3-rope"])
def test_what_is_thought_to_fit_is_what_files_bring(tmp_path: Path, name: str) -> None:
    path = save(tiny_model(name), tmp_path)
    config = open_decoder(read_stored_model(path)).config
    assert held_bytes(on_the_device(path, "bf16")) == weights_bytes(config, "bf16", Shard())


def held_bytes(weights: DeviceWeights) -> int:
    is_tied = weights.lm_head.values.data_ptr() == weights.embedding.data_ptr()
    tensors = [weights.embedding] if is_tied else [weights.embedding, weights.lm_head.values]
    for layer in weights.layers:
        matrices = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        tensors += [matrix.values for matrix in matrices]
    return sum(tensor.nbytes for tensor in tensors)
