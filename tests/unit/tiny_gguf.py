"""Writes a tiny model of transformers as a GGUF file, with the writer and the names of the `gguf` package."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.unit.ggml_blocks import stored_as

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def write_gguf(model: Any, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """Write a model; its matrices are stored as `kind`, its vectors in float32, as is usual."""
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rotary_divisors(config))
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        stored_name = names.get_name(name, (".weight", ".bias"))
        assert stored_name is not None
        if array.ndim == 1:
            writer.add_tensor(stored_name, array)
            continue
        rows = stored_as(array, kind)
        if architecture is gguf.MODEL_ARCH.LLAMA and name.endswith("q_proj.weight"):
            rows = _in_pairs(rows, config.num_attention_heads)
        if architecture is gguf.MODEL_ARCH.LLAMA and name.endswith("k_proj.weight"):
            rows = _in_pairs(rows, config.num_key_value_heads)
        writer.add_tensor(stored_name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _in_pairs(rows: npt.NDArray[np.uint8], num_heads: int) -> npt.NDArray[np.uint8]:
    """Put halves of heads into the order of neighbouring pairs, as converters to GGUF do for Llamas."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _rotary_divisors(config: Any) -> npt.NDArray[np.float32]:
    """By what Llama 3.1's scaling divides each frequency."""
    rope = config.rope_parameters
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / config.head_dim)
        share = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        share = min(max(share, 0.0), 1.0)
        divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(divisors, dtype=np.float32)
