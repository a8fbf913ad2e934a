"""A device gets the weights that the files hold: in pieces, put together and rounded there, whole or a rank's.

They are compared to what the CPU's runner gets, in one piece each; tests/unit/test_decoder_families.py holds that
against transformers.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.common.model.stored_model import read_stored_model
from services.worker.cuda.matrix import DeviceMatrix, to_fp8
from services.worker.cuda.weights import DeviceWeights, load_weights
from services.worker.runner.models.decoder_weights import DecoderWeights
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat
from services.worker.weights import staging
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder
from tests.gpu.devices import DEVICE
from tests.unit.kept_matrix import KeptMatrix
from tests.unit.tiny_gguf import write_gguf
from tests.unit.tiny_models import CONFIGS, save, tiny_model


def on_the_device(
    path: Path, weights: DeviceWeightFormat, shard: Shard | None = None, *, piece_bytes: int = 1000
) -> DeviceWeights:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "PIECE_BYTES", piece_bytes)
        stored = open_decoder(read_stored_model(path))
        return load_weights(stored, weights, shard or Shard(), DEVICE, lambda share: None)


def on_the_cpu(path: Path, shard: Shard | None = None) -> DecoderWeights[KeptMatrix]:
    return load_decoder(open_decoder(read_stored_model(path)), KeptMatrix, lambda share: None, shard)


def assert_same(device: Tensor | None, cpu: Tensor | None, kind: torch.dtype = torch.float32) -> None:
    if device is None or cpu is None:
        assert device is cpu
        return
    assert device.device.type == DEVICE.type
    assert device.is_contiguous()
    assert device.dtype == kind
    assert torch.equal(device.cpu(), cpu.to(kind))


def assert_same_weights(device: DeviceWeights, cpu: DecoderWeights[KeptMatrix], kind: torch.dtype) -> None:
    assert_same(device.embedding, cpu.embedding, kind)
    assert_same(device.lm_head.values, cpu.lm_head.weight, kind)
    assert_same(device.norm, cpu.norm, kind)
    assert torch.equal(device.rotary_frequencies.cpu(), cpu.rotary_frequencies)
    for on_device, on_cpu in zip(device.layers, cpu.layers, strict=True):
        assert_same(on_device.attention_norm, on_cpu.attention_norm, kind)
        assert_same(on_device.mlp_norm, on_cpu.mlp_norm, kind)
        assert_same(on_device.qk_norm, on_cpu.qk_norm)
        assert_same(on_device.qkv_proj.bias, on_cpu.qkv_proj.bias)
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            matrix: DeviceMatrix = getattr(on_device, name)
            assert_same(matrix.values, getattr(on_cpu, name).weight, kind)


# In the first, pieces are parts of a row; in the second a few rows, the last ones fewer; in the third whole matrices.
@pytest.mark.parametrize("piece_bytes", [100, 1000, 1 << 20])
@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_of_any_type_comes_in_pieces_of_any_size(
    tmp_path: Path, stored_as: torch.dtype, piece_bytes: int
) -> None:
    save(copy.deepcopy(tiny_model("llama")).to(stored_as), tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    cpu = on_the_cpu(tmp_path)
    assert_same_weights(on_the_device(tmp_path, "bf16", piece_bytes=piece_bytes), cpu, torch.bfloat16)
    assert_same_weights(on_the_device(tmp_path, "float32", piece_bytes=piece_bytes), cpu, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_whole(tmp_path: Path, name: str) -> None:
    path = save(tiny_model(name), tmp_path)
    assert_same_weights(on_the_device(path, "bf16"), on_the_cpu(path), torch.bfloat16)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["llama-9-heads-of-3", "qwen2-tied", "qwen3"])
def test_a_rank_gets_its_part(tmp_path: Path, name: str, world_size: int) -> None:
    path = save(tiny_model(name), tmp_path)
    for rank in range(world_size):
        shard = Shard(rank, world_size)
        assert_same_weights(on_the_device(path, "bf16", shard), on_the_cpu(path, shard), torch.bfloat16)


def test_a_gguf_file_gives_a_device_what_it_gives_the_cpu(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama-tied-llama3-rope"), tmp_path / "tiny.gguf")
    assert_same_weights(on_the_device(path, "bf16"), on_the_cpu(path), torch.bfloat16)


def test_matrices_of_layers_are_rounded_to_fp8_and_no_others(tmp_path: Path) -> None:
    path = save(tiny_model("qwen2-tied"), tmp_path)
    rounded, plain = on_the_device(path, "fp8"), on_the_device(path, "bf16")
    assert torch.equal(rounded.embedding, plain.embedding)
    assert torch.equal(rounded.lm_head.values, plain.lm_head.values)
    for layer, exact in zip(rounded.layers, plain.layers, strict=True):
        expected = to_fp8(exact.qkv_proj.values, exact.qkv_proj.bias)
        assert torch.equal(layer.qkv_proj.values.float(), expected.values.float())
        assert_same(layer.qkv_proj.channel_scales, expected.channel_scales)
        assert_same(layer.qkv_proj.bias, expected.bias)


def test_a_tied_models_table_is_held_once(tmp_path: Path) -> None:
    tied = on_the_device(save(tiny_model("qwen2-tied"), tmp_path), "fp8")
    assert tied.lm_head.values.data_ptr() == tied.embedding.data_ptr()
