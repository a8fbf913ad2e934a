"""The shape of a Llama model, and its weights as its forward pass takes them."""

from dataclasses import dataclass

from torch import Tensor

from services.worker.runner.linear import Linear


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of a Llama model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    context_tokens: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def q_size(self) -> int:
        """Length of all query heads of a token, side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Length of all key heads of a token, side by side; also of its value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LlamaLayerWeights:
    """One layer. Matrices of the same input are one; their outputs lie side by side, in the order of the name."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv_proj: Linear
    """hidden_size to q_size + 2 * kv_size; the rotary embedding turns dimensions (i, i + head_dim / 2) of a head."""
    o_proj: Linear
    """q_size to hidden_size"""
    mlp_norm: Tensor
    """[hidden_size]"""
    gate_up_proj: Linear
    """hidden_size to 2 * intermediate_size"""
    down_proj: Linear
    """intermediate_size to hidden_size"""


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All weights of a Llama model."""

    embedding: Tensor
    """[vocabulary_size, hidden_size]"""
    layers: tuple[LlamaLayerWeights, ...]
    norm: Tensor
    """[hidden_size]"""
    lm_head: Linear
    """hidden_size to vocabulary_size"""
