"""Tiny models as checkpoints in fp8, in each layout in which such are published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.tiny_models import save

BLOCK = (16, 32)
"""Neither divides the sizes of all matrices: blocks at the edges are cut off."""


def _compressed(strategy: str, *, dynamic: bool = True, **weights: object) -> dict[str, object]:
    """As llm-compressor writes it."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "dynamic": False, "strategy": strategy, **weights},
                "input_activations": {**common, "dynamic": dynamic, "strategy": "token" if dynamic else "tensor"},
                "output_activations": None,
            }
        },
    }


# By the layout's name: config.json's quantization_config, the suffix of scales, and whether there is one of a
# tensor ([] or [1]), of each output or of each block.
LAYOUTS: Mapping[str, tuple[dict[str, object], str, str]] = {
    # transformers, DeepSeek, Qwen
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [*BLOCK]},
        "_scale_inv",
        "blocks",
    ),
    "fp8-tensor-inv": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None},
        "_scale_inv",
        "tensor",
    ),
    # AutoFP8, vLLM
    "fp8-dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        "_scale",
        "tensor",
    ),
    "fp8-static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        "_scale",
        "tensor-1",
    ),
    "compressed-tensor-static": (_compressed("tensor", dynamic=False), "_scale", "tensor-1"),
    "compressed-channel": (_compressed("channel"), "_scale", "outputs"),
    "compressed-blocks": (_compressed("block", block_structure=[*BLOCK]), "_scale", "blocks"),
}


def save_in_fp8(model: Any, folder: Path, layout: str, **options: Any) -> Path:
    """Write a model whose layers' matrices are in fp8, and round the model itself to what it then stands for.

    Matrices of layers are rounded, and all else stays in float32. `options`: of `save`.
    """
    settings, suffix, form = LAYOUTS[layout]
    scales: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                rounded[name], scales[name] = _round(parameter, form)
                parameter.copy_(dequantized(rounded[name], scales[name]))
    save(model, folder, **options)
    for file in folder.glob("*.safetensors"):
        tensors = dict(load_file(file))
        for name in [name for name in tensors if name in rounded]:
            tensors[name] = rounded[name]
            tensors[name + suffix] = scales[name]
            if "static" in layout:
                tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor([0.01])
        save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        held = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        index.write_text(json.dumps({"weight_map": held}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    """Weights times scales, in float32."""
    scales = scales.float()
    if scales.numel() > 1 and scales.shape[1] > 1:
        by_weight = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        scales = by_weight[: values.shape[0], : values.shape[1]]
    return values.float() * scales


def _round(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = weight.shape
    rows, columns = {"blocks": BLOCK, "outputs": (1, num_columns)}.get(form, (num_rows, num_columns))
    largest = torch.tensor(
        [
            [float(block.abs().max()) for block in torch.split(band, columns, dim=1)]
            for band in torch.split(weight, rows, dim=0)
        ]
    )
    # Scales are published in bf16, too: what counts is what is stored.
    scales = (largest / 448).bfloat16() if form != "tensor" else largest / 448
    by_weight = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:num_rows, :num_columns]
    values = (weight / by_weight).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales.view({"tensor": [], "tensor-1": [1]}.get(form, scales.shape))
