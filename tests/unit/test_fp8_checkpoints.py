"""A folder of weights in fp8 gives the logits and tokens of what they stand for, or says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.model.errors import ModelFileError
from tests.unit.test_decoder_families import check_logits, greedy, load, reference_answers
from tests.unit.tiny_fp8 import LAYOUTS, save_in_fp8
from tests.unit.tiny_models import save, tiny_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_computed_in_float32(tmp_path: Path, layout: str) -> None:
    model = tiny_model("llama")
    decoder = load(save_in_fp8(model, tmp_path, layout))
    check_logits(decoder, model)
    assert greedy(decoder) == reference_answers(model)


@pytest.mark.parametrize("name", ["llama-tied-llama3-rope", "qwen2-tied", "qwen3"])
def test_ties_biases_and_norms_stay_as_they_are(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    check_logits(load(save_in_fp8(model, tmp_path, "fp8-blocks", max_shard_size="40KB")), model)


def test_an_embedding_and_a_head_may_be_stored_in_fp8_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_in_fp8(model, tmp_path, "compressed-channel")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            scales = parameter.abs().amax(dim=1, keepdim=True) / 448
            rounded = (parameter / scales).to(torch.float8_e4m3fn)
            change_tensors(tmp_path, **{name: rounded, f"{name}_scale": scales})
            parameter.copy_(rounded.float() * scales)
    check_logits(load(tmp_path), model)


def test_a_matrix_that_was_left_out_is_read_as_it_is_stored(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_in_fp8(model, tmp_path, "fp8-dynamic")
    exact = tiny_model("llama").get_parameter(Q_PROJ).detach()
    change_tensors(tmp_path, **{Q_PROJ: exact.clone(), f"{Q_PROJ}_scale": None})
    with torch.no_grad():
        model.get_parameter(Q_PROJ).copy_(exact)
    check_logits(load(tmp_path), model)


def change_tensors(path: Path, **changes: Tensor | None) -> Path:
    """Write model.safetensors again; None takes a tensor away."""
    tensors: dict[str, Tensor | None] = {**load_file(path / "model.safetensors"), **changes}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors")
    return path


def broken(**changes: Callable[[Tensor], Tensor | None]) -> Callable[[Path], object]:
    """What changes one of the tensors of Q_PROJ, by what follows its name."""

    def change(path: Path) -> object:
        tensors = load_file(path / "model.safetensors")
        named = {Q_PROJ + suffix.removeprefix("weight"): of for suffix, of in changes.items()}
        return change_tensors(path, **{name: of(tensors[name]) for name, of in named.items()})

    return change


@pytest.mark.parametrize(
    ("layout", "change", "problem"),
    [
        ("fp8-blocks", broken(weight_scale_inv=lambda _: None),
         "is stored as fp8, but neither '.*q_proj.weight_scale_inv' nor '.*q_proj.weight_scale' is there"),
        ("fp8-dynamic", broken(weight_scale=lambda _: None), "is stored as fp8, but neither"),
        ("fp8-blocks", broken(weight_scale_inv=lambda scales: scales[:2]),
         r"q_proj.weight_scale_inv' has shape \[2, 2\]; expected \[3, 2\]"),
        ("compressed-channel", broken(weight_scale=lambda scales: scales[:47]),
         r"q_proj.weight_scale' has shape \[47, 1\]; expected \[\] or \[1\] or \[1, 1\] or \[48\] or \[48, 1\]"),
        ("fp8-dynamic", broken(weight_scale=lambda scale: scale * torch.nan), "weight_scale' has a scale of nan"),
        ("fp8-dynamic", broken(weight_scale=lambda scale: scale * 0), "weight_scale' has a scale of 0.0; a finite"),
        ("fp8-static", broken(weight_scale=lambda scale: -scale), "weight_scale' has a scale of -"),
        ("fp8-blocks", broken(weight_scale_inv=lambda scales: scales.float().fill_(torch.inf)), "has a scale of inf"),
        ("fp8-blocks", broken(weight_scale_inv=lambda scales: scales.to(torch.float8_e8m0fnu)),
         "weight_scale_inv' is stored as F8_E8M0; F32, F16, BF16 can be read"),
        ("fp8-dynamic", broken(weight=lambda values: values.float().to(torch.float8_e5m2)),
         "q_proj.weight' is stored as F8_E5M2; F32, F16, BF16, F8_E4M3 can be read"),
        ("fp8-dynamic", broken(weight=lambda values: values[:, :47]), r"q_proj.weight' has shape \[48, 47\]; expected"),
        ("fp8-dynamic", broken(weight=lambda values: values.float()), "q_proj.weight_scale' has no place"),
    ],
)  # fmt: skip
def test_damaged_scales_and_weights_are_named(
    tmp_path: Path, layout: str, change: Callable[[Path], object], problem: str
) -> None:
    save_in_fp8(tiny_model("llama"), tmp_path, layout)
    change(tmp_path)
    with pytest.raises(ModelFileError, match=rf"model\.safetensors: tensor 'model\.layers\.1\..*{problem}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'quant_method' in 'quantization_config' is 'gptq'; this .* 'fp8' or"),
        ({"quant_method": "awq"}, "is 'awq'"),
        ({"bits": 8}, "'quant_method' in 'quantization_config' is None"),
        ({"quant_method": "fp8", "activation_scheme": "guessed"}, "'activation_scheme' in .* is 'guessed'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fmt' in .* is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"'weight_block_size' in .* is \[128\]; .* two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "'weight_block_size' in"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'format' in .* is 'pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'config_groups' in .* is None"),
        ("fp8", "key 'quantization_config' should be an object"),
    ],
)
def test_what_is_stored_otherwise_is_refused_before_a_weight_is_read(
    tmp_path: Path, settings: object, problem: str
) -> None:
    refuse(save(tiny_model("llama"), tmp_path), settings, problem)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("num_bits", 4, "'num_bits' in .* is 4; .* 8 only"),
        ("type", "int", "'type' in .* is 'int'"),
        ("strategy", "group", "'strategy' in .* is 'group'; .* 'tensor' or 'channel' or 'block' only"),
        ("symmetric", False, "'symmetric' in .* is False"),
        ("dynamic", True, "'dynamic' in .* is True"),
        ("strategy", "block", "key 'block_structure' is missing"),
    ],
)
def test_compressed_tensors_of_another_kind_are_refused(tmp_path: Path, key: str, value: object, problem: str) -> None:
    settings = json.loads(json.dumps(LAYOUTS["compressed-channel"][0]))
    settings["config_groups"]["group_0"]["weights"][key] = value
    refuse(save(tiny_model("llama"), tmp_path), settings, problem)


@pytest.mark.parametrize(
    ("key", "value"), [("transform_config", {"config_groups": {}}), ("sparsity_config", {"format": "sparse-24"})]
)
def test_weights_that_are_not_only_rounded_are_refused(tmp_path: Path, key: str, value: object) -> None:
    settings = {**LAYOUTS["compressed-channel"][0], key: value}
    refuse(save(tiny_model("llama"), tmp_path), settings, "'transform_config' in|'format' in")


def test_weights_in_fp8_of_which_the_configuration_says_nothing_are_refused(tmp_path: Path) -> None:
    save_in_fp8(tiny_model("llama"), tmp_path, "fp8-dynamic")
    refuse(tmp_path, None, "q_proj.weight' is stored as F8_E4M3; F32, F16, BF16 can be read", has_weights=True)


def refuse(path: Path, settings: object, problem: str, *, has_weights: bool = False) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    if not has_weights:
        (path / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=problem):
        load(path)
