"""The shape of a decoder, and its weights as its forward pass takes them."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from services.worker.runner.rotary_frequencies import Llama3Scaling

Matrix = TypeVar("Matrix")
"""How a runner holds the matrices that rows are multiplied with."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and constants of a decoder."""

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
    rope_scaling: Llama3Scaling | None = None
    sliding_window: int | None = None
    """Tokens that a sliding layer's token sees, itself included. None: no layer slides."""
    sliding_layers: frozenset[int] = frozenset()
    is_tied: bool = False
    """The embedding is the head too; a GPU holds it once."""

    @property
    def q_size(self) -> int:
        """Length of all query heads of a token, side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Length of all key heads of a token, side by side; also of its value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_layer_weights(self) -> int:
        """Of all layers' matrices."""
        layer = 2 * self.q_size + 2 * self.kv_size + 3 * self.intermediate_size
        return self.num_layers * self.hidden_size * layer

    @property
    def num_weights(self) -> int:
        """Weights that a token is multiplied with: of all layers' matrices and the head."""
        return self.num_layer_weights + self.hidden_size * self.vocabulary_size


@dataclass(frozen=True, slots=True)
class DecoderLayerWeights(Generic[Matrix]):
    """One layer. Matrices of the same input are one; their outputs lie side by side, in the order of the name."""

    attention_norm: Tensor
    """[hidden_size]"""
    qkv_proj: Matrix
    """hidden_size to q_size + 2 * kv_size; the rotary embedding turns dimensions (2i, 2i + 1) of a head."""
    qk_norm: Tensor | None
    """[num_heads + num_kv_heads, head_dim], a row a head. None: queries and keys are not normalized."""
    o_proj: Matrix
    """q_size to hidden_size"""
    mlp_norm: Tensor
    """[hidden_size]"""
    gate_up_proj: Matrix
    """hidden_size to 2 * intermediate_size"""
    down_proj: Matrix
    """intermediate_size to hidden_size"""


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[Matrix]):
    """All weights of a decoder."""

    embedding: Tensor
    """[vocabulary_size, hidden_size]"""
    layers: tuple[DecoderLayerWeights[Matrix], ...]
    norm: Tensor
    """[hidden_size]"""
    lm_head: Matrix
    """hidden_size to vocabulary_size"""
    rotary_frequencies: Tensor
    """Radians a position, for each pair of a head's dimensions: [head_dim / 2]."""
