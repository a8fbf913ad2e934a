"""A device gets the weights that the files hold: in pieces, put together and rounded there, whole or a rank's.

They are compared to what the CPU's runner gets, in one piece each; tests/unit/test_decoder_families.py holds that
against transformers.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
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
from tests.gpu.test_cuda_runner import a_runner, generate, greedy, prompts
from tests.unit.kept_matrix import KeptMatrix
from tests.unit.test_fp8_checkpoints import change_tensors
from tests.unit.tiny_fp8 import LAYOUTS, save_in_fp8
from tests.unit.tiny_gguf import write_gguf
from tests.unit.tiny_models import CONFIGS, reference_greedy, save, tiny_model

MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FLOATS: dict[DeviceWeightFormat, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}


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
        for name in MATRICES:
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
    for weights, kind in FLOATS.items():
        assert_same_weights(on_the_device(tmp_path, weights, piece_bytes=piece_bytes), cpu, kind)


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
        assert torch.equal(in_float32(layer.qkv_proj), in_float32(expected))
        assert layer.qkv_proj.bias is not None
        assert expected.bias is not None
        assert torch.equal(layer.qkv_proj.bias, expected.bias)


def test_a_tied_models_table_is_held_once(tmp_path: Path) -> None:
    tied = on_the_device(save(tiny_model("qwen2-tied"), tmp_path), "fp8")
    assert tied.lm_head.values.data_ptr() == tied.embedding.data_ptr()


@pytest.mark.parametrize("layout", ["fp8-blocks", "compressed-channel"])
def test_a_model_stored_in_fp8_gives_the_tokens_of_what_it_stands_for(tmp_path: Path, layout: str) -> None:
    model = tiny_model("qwen3", num_hidden_layers=2)
    limits, runner = a_runner(save_in_fp8(model, tmp_path, layout))
    prompt = prompts()[1]
    answers, _ = generate(limits, runner, [greedy(1, prompt, 3)])
    assert answers == {1: reference_greedy(model, prompt, 3)}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_fp8_are_multiplied_with_their_scales_where_the_device_holds_none(
    tmp_path: Path, layout: str, world_size: int
) -> None:
    path = save_in_fp8(tiny_model("llama-9-heads-of-3"), tmp_path, layout)
    shard = Shard(world_size - 1, world_size)
    for weights, kind in FLOATS.items():
        assert_same_weights(on_the_device(path, weights, shard), on_the_cpu(path, shard), kind)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "blocks" not in name])
def test_a_scale_of_a_tensor_or_an_output_leaves_the_stored_values_as_they_are(
    tmp_path: Path, layout: str, world_size: int
) -> None:
    path = save_in_fp8(tiny_model("llama-9-heads-of-3"), tmp_path, layout)
    shard = Shard(world_size - 1, world_size)
    device, cpu = on_the_device(path, "fp8", shard), on_the_cpu(path, shard)
    assert_same(device.embedding, cpu.embedding, torch.bfloat16)
    assert_same(device.lm_head.values, cpu.lm_head.weight, torch.bfloat16)
    for on_device, on_cpu in zip(device.layers, cpu.layers, strict=True):
        for name in MATRICES:
            # To the last bit: so it is no other value with another scale.
            assert torch.equal(in_float32(getattr(on_device, name)), getattr(on_cpu, name).weight)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "blocks" in name])
def test_of_blocks_those_of_an_outputs_largest_scale_stay_and_others_are_rounded_again(
    tmp_path: Path, layout: str, world_size: int
) -> None:
    path = save_in_fp8(tiny_model("llama-9-heads-of-3"), tmp_path, layout)
    shard = Shard(world_size - 1, world_size)
    for on_device, on_cpu in zip(on_the_device(path, "fp8", shard).layers, on_the_cpu(path, shard).layers, strict=True):
        for name in MATRICES:
            matrix: DeviceMatrix = getattr(on_device, name)
            assert matrix.channel_scales is not None
            rounded, exact = in_float32(matrix), getattr(on_cpu, name).weight
            # Half of the last of e4m3's 3 bits, or of its smallest number.
            bound = torch.maximum(exact.abs() / 16, matrix.channel_scales.cpu()[:, None] / 1024)
            assert bool(((rounded - exact).abs() <= bound * 1.001).all())
            # The smallest block has a fifth of the columns.
            assert float((rounded == exact).float().mean(dim=1).min()) >= 0.199


def test_a_matrix_that_a_checkpoint_in_fp8_left_out_is_not_rounded_behind_its_back(tmp_path: Path) -> None:
    path = save_in_fp8(tiny_model("llama"), tmp_path, "fp8-dynamic")
    name = "model.layers.2.mlp.up_proj.weight"
    change_tensors(path, **{name: torch.ones(80, 48), f"{name}_scale": None})
    assert_same_weights(on_the_device(path, "bf16"), on_the_cpu(path), torch.bfloat16)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: tensor '.*up_proj.weight' is .*float32, not in fp8"):
        on_the_device(path, "fp8")


def in_float32(matrix: DeviceMatrix) -> Tensor:
    assert matrix.values.dtype == torch.float8_e4m3fn
    assert matrix.channel_scales is not None
    return matrix.values.cpu().float() * matrix.channel_scales.cpu()[:, None]
