"""A decoder out of a GGUF file. A key that would change the computation otherwise is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.weights.decoder_sizes import check_sizes
from services.worker.weights.families import GGUF_ARCHITECTURES, WindowRule
from services.worker.weights.gguf_tensors import GgufTensors
from services.worker.weights.stored_decoder import GGUF_NAMES, StoredDecoder

_Value = TypeVar("_Value")

# Keys of an architecture that change the computation, with the one value that this engine computes.
_FIXED: Mapping[str, object] = {
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "expert_count": 0,
    "attention.causal": True,
}
# Llama 3.1's scaling, as numbers that each pair's frequency is divided by.
_ROTARY_DIVISORS = "rope_freqs.weight"
_TOKENS = "tokenizer.ggml.tokens"


def open_gguf_decoder(file: GgufFile) -> StoredDecoder:
    """Read a model's description and open its tensors.

    Raises ModelFileError if it is of no architecture that this engine computes, or would be computed wrongly.
    """
    architecture = file.require("general.architecture", str)
    family = GGUF_ARCHITECTURES.get(architecture)
    if family is None:
        raise ModelFileError(
            file.path, f"the architecture is {architecture!r}; this engine computes {[*GGUF_ARCHITECTURES]}"
        )
    keys = _Keys(file, architecture)
    window = keys.optional("attention.sliding_window", int, 0)
    if family.window is WindowRule.MARKED_LAYERS and 0 < window < keys.require("context_length", int):
        raise keys.unsupported("attention.sliding_window", "no window: which layers it is for is not said")
    return StoredDecoder(
        config=_read_config(keys, window),
        family=family,
        names=GGUF_NAMES,
        tensors=GgufTensors(file),
        # The converter reorders the rows of these alone.
        has_rotary_pairs=architecture == "llama",
        rotary_divisors=_ROTARY_DIVISORS if _ROTARY_DIVISORS in file.tensors else None,
    )


def _read_config(keys: "_Keys", window: int) -> DecoderConfig:
    for key, supported in _FIXED.items():
        if keys.optional(key, type(supported), supported) != supported:
            raise keys.unsupported(key, repr(supported))
    file = keys.file
    embedding_shape = file.tensor(GGUF_NAMES.embedding).shape
    if len(embedding_shape) != 2:
        raise ModelFileError(
            file.path, f"tensor {GGUF_NAMES.embedding!r} has shape {embedding_shape}; expected two numbers"
        )
    num_tokens = len(file.require_tuple(_TOKENS, str)) if _TOKENS in file.metadata else embedding_shape[1]
    if num_tokens != embedding_shape[1]:
        raise ModelFileError(
            file.path, f"it has {num_tokens} tokens, but {GGUF_NAMES.embedding!r} has {embedding_shape[1]} rows"
        )
    num_layers = keys.require("block_count", int)
    hidden_size = keys.require("embedding_length", int)
    num_heads = keys.require("attention.head_count", int)
    context_tokens = keys.require("context_length", int)
    head_dim = keys.optional("attention.key_length", int, hidden_size // max(num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.optional(key, int, head_dim) != head_dim:
            raise keys.unsupported(key, f"{head_dim}, the length of a key,")
    has_window = 0 < window < context_tokens
    config = DecoderConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=keys.require("feed_forward_length", int),
        num_heads=num_heads,
        num_kv_heads=keys.optional("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        vocabulary_size=embedding_shape[1],
        context_tokens=context_tokens,
        rms_norm_eps=keys.require("attention.layer_norm_rms_epsilon", float),
        rope_theta=keys.optional("rope.freq_base", float, 10000.0),
        sliding_window=window if has_window else None,
        sliding_layers=frozenset(range(num_layers) if has_window else ()),
        is_tied=GGUF_NAMES.lm_head not in file.tensors,
    )
    check_sizes(file.path, config)
    return config


@dataclass(frozen=True, slots=True)
class _Keys:
    """A file's metadata under its architecture's name."""

    file: GgufFile
    architecture: str

    def require(self, key: str, kind: type[_Value]) -> _Value:
        return self.file.require(f"{self.architecture}.{key}", kind)

    def optional(self, key: str, kind: type[_Value], default: _Value) -> _Value:
        return self.require(key, kind) if f"{self.architecture}.{key}" in self.file.metadata else default

    def unsupported(self, key: str, supported: str) -> ModelFileError:
        name = f"{self.architecture}.{key}"
        return ModelFileError(
            self.file.path, f"{name} is {self.file.metadata[name]!r}; this engine supports {supported} only"
        )
