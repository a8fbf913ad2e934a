"""A decoder out of a folder in the layout of Hugging Face.

Only what this engine computes exactly as transformers does is taken; a key that would change the computation otherwise
is refused by name.
"""

from collections.abc import Mapping

from services.common.model.errors import ModelFileError
from services.common.model.folder import ModelFolder
from services.common.model.json_file import JsonFile
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.rotary_frequencies import Llama3Scaling
from services.worker.weights.decoder_sizes import check_sizes
from services.worker.weights.families import FOLDER_ARCHITECTURES, Family, WindowRule
from services.worker.weights.folder_tensors import FolderTensors
from services.worker.weights.fp8_scheme import read_fp8_scheme
from services.worker.weights.safetensors_files import SafetensorsFiles
from services.worker.weights.stored_decoder import FOLDER_NAMES, StoredDecoder

# Keys that change the computation, with the one value that this engine computes. Absent is as good.
_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "compression_config": None,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def open_folder_decoder(folder: ModelFolder) -> StoredDecoder:
    """Read a model's description and open its weights' files.

    Raises ModelFileError if it is of no family that this engine computes, or would be computed wrongly.
    """
    family = _family(folder.config)
    scheme = read_fp8_scheme(folder.config)
    return StoredDecoder(
        config=_read_config(folder.config, family),
        family=family,
        names=FOLDER_NAMES,
        tensors=FolderTensors(SafetensorsFiles(folder.path), scheme),
    )


def read_decoder_config(folder: ModelFolder) -> DecoderConfig:
    """Read a model's shape alone: weights need not be there. Raises ModelFileError as `open_folder_decoder`."""
    return _read_config(folder.config, _family(folder.config))


def _family(config: JsonFile) -> Family:
    given = config.require("architectures", list)
    family = FOLDER_ARCHITECTURES.get(str(given[0])) if len(given) == 1 else None
    if family is None:
        raise ModelFileError(config.path, f"'architectures' is {given}; this engine computes {[*FOLDER_ARCHITECTURES]}")
    model_type = config.optional("model_type", str, family.model_type)
    if model_type != family.model_type:
        raise ModelFileError(config.path, f"'model_type' is {model_type!r}, but 'architectures' is {given}")
    return family


def _read_config(config: JsonFile, family: Family) -> DecoderConfig:
    for key, supported in _FIXED.items():
        if config.values.get(key) not in (None, supported):
            raise ModelFileError(
                config.path, f"{key!r} is {config.values[key]!r}; this engine supports {supported!r} only"
            )
    num_layers = config.require("num_hidden_layers", int)
    hidden_size = config.require("hidden_size", int)
    num_heads = config.require("num_attention_heads", int)
    context_tokens = config.require("max_position_embeddings", int)
    window = _sliding_window(config, family)
    sliding_layers = _sliding_layers(config, family, num_layers, window)
    # A window as long as the context hides nothing.
    slides = window is not None and window < context_tokens and bool(sliding_layers)
    rope_theta, rope_scaling = _read_rope(config, context_tokens)
    read = DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.require("intermediate_size", int),
        num_heads=num_heads,
        num_kv_heads=config.optional("num_key_value_heads", int, num_heads),
        head_dim=config.optional("head_dim", int, family.default_head_dim or hidden_size // max(num_heads, 1)),
        vocabulary_size=config.require("vocab_size", int),
        context_tokens=context_tokens,
        rms_norm_eps=config.require("rms_norm_eps", float),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=window if slides else None,
        sliding_layers=sliding_layers if slides else frozenset(),
        is_tied=config.optional("tie_word_embeddings", bool, False),
    )
    check_sizes(config.path, read)
    return read


def _read_rope(config: JsonFile, context_tokens: int) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling: of `rope_parameters` (transformers 5), or of `rope_theta` and `rope_scaling` (before)."""
    rope = config.section("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ModelFileError(
            config.path, f"its rope parameters differ by layer, {rope.values!r}; that is not supported"
        )
    if rope.optional("partial_rotary_factor", float, 1.0) != 1.0:
        raise ModelFileError(
            config.path,
            f"'partial_rotary_factor' is {rope.values['partial_rotary_factor']!r}; this engine supports 1.0 only",
        )
    theta = rope.optional("rope_theta", float, config.optional("rope_theta", float, 10000.0))
    kind = rope.optional("rope_type", str, rope.optional("type", str, "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelFileError(config.path, f"'rope_type' is {kind!r}; this engine supports 'default' and 'llama3' only")
    scaling = Llama3Scaling(
        factor=rope.require("factor", float),
        low_frequency_factor=rope.require("low_freq_factor", float),
        high_frequency_factor=rope.require("high_freq_factor", float),
        original_context_tokens=rope.optional("original_max_position_embeddings", int, context_tokens),
    )
    if (
        not 0 < scaling.low_frequency_factor < scaling.high_frequency_factor
        or min(scaling.factor, scaling.original_context_tokens) <= 0
    ):
        raise ModelFileError(config.path, f"its llama3 rope scaling makes no sense: {rope.values!r}")
    return theta, scaling


def _sliding_window(config: JsonFile, family: Family) -> int | None:
    if family.window is WindowRule.NONE:
        return None
    if family.window is WindowRule.MARKED_LAYERS and not config.optional("use_sliding_window", bool, False):
        return None
    if "sliding_window" not in config.values:
        raise ModelFileError(config.path, "key 'sliding_window' is missing: a size in tokens, or null")
    window = config.optional("sliding_window", int, 0)
    if "sliding_window" in config and window < 1:
        raise ModelFileError(config.path, f"'sliding_window' is {window}; expected at least 1, or null")
    return window or None


def _sliding_layers(config: JsonFile, family: Family, num_layers: int, window: int | None) -> frozenset[int]:
    every_layer = range(num_layers)
    marked = _marked_layers(config, num_layers)
    if window is None:
        sliding = frozenset[int]()
    elif family.window is WindowRule.EVERY_LAYER:
        sliding = frozenset(every_layer)
    else:
        sliding = frozenset(every_layer[config.require("max_window_layers", int) :]) if marked is None else marked
    if marked is not None and marked != sliding:
        raise ModelFileError(
            config.path,
            f"'layer_types' marks layers {sorted(marked)} as sliding, but with its window, {window}, "
            f"a {family.name} slides in layers {sorted(sliding)}",
        )
    return sliding


def _marked_layers(config: JsonFile, num_layers: int) -> frozenset[int] | None:
    if "layer_types" not in config:
        return None
    kinds = config.require("layer_types", list)
    if len(kinds) != num_layers or any(kind not in (_SLIDING, _FULL) for kind in kinds):
        raise ModelFileError(
            config.path, f"'layer_types' is {kinds}; expected {num_layers} of {_SLIDING!r} and {_FULL!r}"
        )
    return frozenset(index for index, kind in enumerate(kinds) if kind == _SLIDING)
