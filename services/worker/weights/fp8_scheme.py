"""What a folder's `quantization_config` says of weights that are stored in 8 bits, as float8_e4m3fn.

Two ways of writing them are read:

- `quant_method` "fp8" (transformers' FineGrainedFP8Config, as DeepSeek and Qwen publish; AutoFP8 and vLLM): beside a
  weight lies `weight_scale_inv`, a number for each block of `weight_block_size`, or, without blocks, `weight_scale` or
  `weight_scale_inv`, one number for all of it. Weights are multiplied with either, the latter despite its name.
- `quant_method` "compressed-tensors" (llm-compressor) in the format "float-quantized": `weight_scale`, for the tensor,
  for each output, or for each block.

Scales of activations (`activation_scheme` "static", `input_scale`) are not used. Activations are rounded row by row,
each with a scale of its own, or not at all: that is nearer to what the model computes without rounding than one scale
for all, which clips what its calibration did not see. Nor are scales of keys and values: `--kv-dtype` says what the
cache is.

What was left out (`ignored_layers`, `modules_to_not_convert`, `ignore`) shows in the type that a tensor is stored in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.model.errors import ModelFileError
from services.common.model.json_file import JsonFile

_METHODS = ("fp8", "compressed-tensors")
_FORMATS = ("float-quantized", "naive-quantized")
UNUSED_SUFFIXES = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".output_scale")
"""Of tensors' names: scales of activations, keys and values."""


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """How scales are told."""

    block_size: tuple[int, int] | None
    """Outputs and inputs that share a scale. None: a scale is a whole tensor's or an output's."""


def read_fp8_scheme(config: JsonFile) -> Fp8Scheme | None:
    """Read a model's `quantization_config`; None: it has none. Raises ModelFileError for any but those above."""
    section = config.section("quantization_config")
    if not section.values:
        return None
    if _one_of(section, "quant_method", _METHODS) == "fp8":
        _one_of(section, "activation_scheme", ("dynamic", "static"), "dynamic")
        _one_of(section, "fmt", ("e4m3",), "e4m3")
        return Fp8Scheme(_block_size(section, "weight_block_size"))
    return _compressed(section)


def _compressed(section: JsonFile) -> Fp8Scheme:
    _one_of(section, "format", _FORMATS)
    _one_of(section.section("sparsity_config"), "format", ("dense",), "dense")
    if section.section("transform_config").values:
        raise _unsupported(section, "transform_config", "none")
    groups = section.section("config_groups")
    block_sizes = {_group(groups.section(name)) for name in groups.values}
    if len(block_sizes) != 1:
        raise _unsupported(section, "config_groups", "groups that all have one block size, or none")
    return Fp8Scheme(block_sizes.pop())


def _group(group: JsonFile) -> tuple[int, int] | None:
    """Check a group of modules, and return the size of its blocks."""
    _one_of(group, "format", _FORMATS, _FORMATS[0])
    weights, inputs = group.section("weights"), group.section("input_activations")
    for of in (weights, inputs):
        _one_of(of, "type", ("float",), "float")
        _one_of(of, "num_bits", (8,), 8)
        _one_of(of, "symmetric", (True,), True)
    _one_of(weights, "dynamic", (False,), False)
    strategy = _one_of(weights, "strategy", ("tensor", "channel", "block"))
    return _block_size(weights, "block_structure", is_required=True) if strategy == "block" else None


def _block_size(section: JsonFile, key: str, *, is_required: bool = False) -> tuple[int, int] | None:
    if key not in section and not is_required:
        return None
    size = section.require(key, list)
    if len(size) != 2 or not all(type(count) is int and count > 0 for count in size):
        raise _unsupported(section, key, "two numbers above 0")
    return size[0], size[1]


def _one_of(section: JsonFile, key: str, supported: Sequence[object], default: object = None) -> object:
    value = section.values[key] if key in section else default
    if value not in supported:
        raise _unsupported(section, key, " or ".join(map(repr, supported)))
    return value


def _unsupported(section: JsonFile, key: str, supported: str) -> ModelFileError:
    given = section.values.get(key)
    return ModelFileError(
        section.path, f"{key!r} in 'quantization_config' is {given!r}; this engine supports {supported} only"
    )
