"""Tiny models with random weights, made by transformers, and what transformers computes for them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96
CONTEXT = 128

# Sizes are odd on purpose: 6 heads share 2 key heads, and a head's length is not hidden size over heads.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
# Of the 4 pairs of a head of 8, one stays, one is between, and two are slowed.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# A model of each family, and of each thing that models of a family differ in.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": DEFAULT_ROPE}),
    "llama-tied-llama3-rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-9-heads-of-3": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1e6}}),
    "qwen2-window-from-layer-1": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40}),
    "qwen3-tied-one-key-head-each": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 6}),
}  # fmt: skip


def tiny_model(name: str, **changes: Any) -> Any:
    """A model of `CONFIGS` in float32; the same for the same arguments. Norms and biases are random too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of transformers' own imports.
        import transformers

    family, settings = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **settings, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a folder as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def reference_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Logits after each token: [num_tokens, VOCABULARY]."""
    logits: Tensor = model(torch.tensor([[*token_ids]]), use_cache=False).logits[0]
    return logits


def reference_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The likeliest continuation, each token computed from the whole text before it."""
    token_ids = [*prompt]
    for _ in range(num_tokens):
        token_ids.append(int(reference_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]
