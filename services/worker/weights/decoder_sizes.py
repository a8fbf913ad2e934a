"""Sizes that contradict each other are refused before memory is taken."""

from pathlib import Path

from services.common.model.errors import ModelFileError
from services.worker.runner.models.decoder_weights import DecoderConfig


def check_sizes(path: Path, config: DecoderConfig) -> None:
    """Raise ModelFileError if a size is below 1, or does not divide what it has to."""
    sizes = (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads)
    if min(*sizes, config.head_dim, config.vocabulary_size, config.context_tokens) < 1:
        raise ModelFileError(path, f"a size of the model is below 1: {config}")
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelFileError(path, f"its heads do not divide what they share: {config}")
