"""A Llama model out of a GGUF file."""

from collections.abc import Callable

from torch import Tensor

from services.common.model.errors import ModelFileError
from services.common.model.gguf import GgufFile
from services.worker.runner.linear import Linear
from services.worker.runner.models.llama_weights import LlamaConfig, LlamaLayerWeights, LlamaWeights
from services.worker.weights.gguf_tensors import GgufTensors, StoredMatrix

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""


def read_llama_config(file: GgufFile) -> LlamaConfig:
    """Read a model's sizes. Raises ModelFileError if it is no Llama, or one that this engine would compute wrongly."""
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise ModelFileError(file.path, f"the architecture is {architecture!r}; this engine computes 'llama' only")
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelFileError(file.path, f"llama.rope.scaling.type is {scaling!r}; this engine supports 'none' only")
    embedding_shape = file.tensor("token_embd.weight").shape
    if len(embedding_shape) != 2:
        raise ModelFileError(file.path, f"tensor 'token_embd.weight' has shape {embedding_shape}; expected two numbers")
    hidden_size = file.require("llama.embedding_length", int)
    num_heads = file.require("llama.attention.head_count", int)
    config = LlamaConfig(
        num_layers=file.require("llama.block_count", int),
        hidden_size=hidden_size,
        intermediate_size=file.require("llama.feed_forward_length", int),
        num_heads=num_heads,
        num_kv_heads=_optional_int(file, "llama.attention.head_count_kv", num_heads),
        head_dim=hidden_size // max(num_heads, 1),
        vocabulary_size=embedding_shape[1],
        context_tokens=file.require("llama.context_length", int),
        rms_norm_eps=file.require("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=_optional_float(file, "llama.rope.freq_base", 10000.0),
    )
    _check_sizes(file, config)
    return config


def load_llama(
    file: GgufFile, config: LlamaConfig, make_linear: Callable[[Tensor], Linear], on_progress: Progress
) -> LlamaWeights:
    """Load all weights as float32; `make_linear` copies each matrix, [out, in], into the layout that a runner wants.

    Raises ModelFileError for a tensor that is missing, has another shape or a type that cannot be read, or that a Llama
    does not have.
    """
    tensors = GgufTensors(file)
    embedding = tensors.matrix([StoredMatrix("token_embd.weight", config.vocabulary_size)], config.hidden_size)
    head = embedding
    if "output.weight" in file.tensors:
        head = tensors.matrix([StoredMatrix("output.weight", config.vocabulary_size)], config.hidden_size)
    lm_head = make_linear(head)
    layers = []
    for index in range(config.num_layers):
        # The embedding and the head take about as long as a fifth of the layers of a small model.
        on_progress((index + config.num_layers / 5) / (config.num_layers * 6 / 5))
        layers.append(_load_layer(tensors, index, config, make_linear))
    weights = LlamaWeights(embedding, tuple(layers), tensors.vector("output_norm.weight", config.hidden_size), lm_head)
    tensors.check_all_read()
    on_progress(1.0)
    return weights


def _load_layer(
    tensors: GgufTensors, index: int, config: LlamaConfig, make_linear: Callable[[Tensor], Linear]
) -> LlamaLayerWeights:
    name = f"blk.{index}"
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv = [
        StoredMatrix(f"{name}.attn_q.weight", config.q_size, num_rotary_heads=config.num_heads),
        StoredMatrix(f"{name}.attn_k.weight", config.kv_size, num_rotary_heads=config.num_kv_heads),
        StoredMatrix(f"{name}.attn_v.weight", config.kv_size),
    ]
    output = [StoredMatrix(f"{name}.attn_output.weight", hidden)]
    gate_up = [
        StoredMatrix(f"{name}.ffn_gate.weight", intermediate),
        StoredMatrix(f"{name}.ffn_up.weight", intermediate),
    ]
    down = [StoredMatrix(f"{name}.ffn_down.weight", hidden)]
    return LlamaLayerWeights(
        attention_norm=tensors.vector(f"{name}.attn_norm.weight", hidden),
        qkv_proj=make_linear(tensors.matrix(qkv, hidden)),
        o_proj=make_linear(tensors.matrix(output, config.q_size)),
        mlp_norm=tensors.vector(f"{name}.ffn_norm.weight", hidden),
        gate_up_proj=make_linear(tensors.matrix(gate_up, hidden)),
        down_proj=make_linear(tensors.matrix(down, intermediate)),
    )


def _check_sizes(file: GgufFile, config: LlamaConfig) -> None:
    sizes = (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads)
    if min(*sizes, config.context_tokens) < 1:
        raise ModelFileError(file.path, f"a size in the metadata is below 1: {config}")
    if config.hidden_size % config.num_heads or config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelFileError(file.path, f"the heads do not divide what they share: {config}")
    for key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        value = _optional_int(file, key, config.head_dim)
        if value != config.head_dim:
            raise ModelFileError(file.path, f"{key} is {value}; this engine supports {config.head_dim} only")


def _optional_int(file: GgufFile, key: str, default: int) -> int:
    return file.require(key, int) if key in file.metadata else default


def _optional_float(file: GgufFile, key: str, default: float) -> float:
    return file.require(key, float) if key in file.metadata else default
