"""The families of decoders that this engine computes: what sets each apart, in one description a family."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class WindowRule(Enum):
    """Which layers a model's `sliding_window` is for."""

    NONE = "none"
    EVERY_LAYER = "every layer"
    MARKED_LAYERS = "marked layers"
    """If `use_sliding_window`: those that `layer_types` marks, or else those from `max_window_layers` on."""


@dataclass(frozen=True, slots=True)
class Family:
    """What all models of a family have in common. All else is in each model's own configuration."""

    name: str
    model_type: str
    """In config.json."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    """Queries and keys are normalized, head by head, before they are turned."""
    window: WindowRule = WindowRule.NONE
    default_head_dim: int | None = None
    """None: hidden size over heads."""


LLAMA = Family("Llama", "llama")
MISTRAL = Family("Mistral", "mistral", window=WindowRule.EVERY_LAYER)
QWEN2 = Family("Qwen2", "qwen2", has_qkv_bias=True, window=WindowRule.MARKED_LAYERS)
QWEN3 = Family("Qwen3", "qwen3", has_qk_norm=True, window=WindowRule.MARKED_LAYERS, default_head_dim=128)

FOLDER_ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
"""By `architectures` in config.json."""

# GGUF knows Mistral as llama: a Llama with, maybe, a window.
GGUF_ARCHITECTURES: Mapping[str, Family] = {"llama": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
"""By `general.architecture`."""
