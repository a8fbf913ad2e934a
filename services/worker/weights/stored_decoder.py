"""A decoder as its files hold it: what it is, where its tensors are, and under which names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.weights.families import Family


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix under one name in the files, and what is wanted of it."""

    name: str
    num_rows: int
    """Of the whole matrix."""
    rows: range
    """Those that are wanted: a run."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where tensors are brought to, and what matrices become there."""

    device: torch.device
    kind: torch.dtype
    """Of matrices; vectors are float32."""
    keeps_fp8: bool = False
    """Whether matrices of a model that is stored in fp8 stay so."""


ON_THE_CPU = Destination(torch.device("cpu"), torch.float32)


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix as it was brought."""

    values: Tensor
    """[num_rows, num_columns], in the destination's type or, if it was stored so and stays so, in fp8"""
    scales: Tensor | None = None
    """[num_rows] float32, if `values` are fp8: what they are to be multiplied with."""


class StoredTensors(Protocol):
    """Tensors in files; keeps count of those read. They are brought to the CPU, as float32, if nothing else is said."""

    @property
    def path(self) -> Path:
        """What an error about these files names."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def on(self, destination: Destination) -> "StoredTensors":
        """Return the same tensors for another place."""
        ...

    def vector(self, name: str, length: int) -> Tensor:
        """Return a tensor of one dimension, float32: [length]. Raises ModelFileError."""
        ...

    def table(self, part: StoredMatrix, num_columns: int) -> Tensor:
        """Return what is wanted of a matrix whose rows are looked up, or that is the head: [wanted rows, num_columns],
        never in fp8. Raises ModelFileError.
        """
        ...

    def matrix(self, parts: Sequence[StoredMatrix], num_columns: int, columns: range | None = None) -> Weight:
        """Return what is wanted of matrices, one below the other: [sum of wanted rows, wanted columns].

        `num_columns` is that of the whole matrices; of the columns, a run is wanted, or all. Only what is wanted takes
        memory. Raises ModelFileError.
        """
        ...

    def check_all_read(self) -> None:
        """Raise ModelFileError if there is a tensor that was never read: the model is not what it was taken for."""
        ...


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of a decoder's tensors. Those of a layer follow its prefix and are followed by `.weight` or `.bias`."""

    embedding: str
    norm: str
    lm_head: str
    layer_prefix: str
    """With the layer's number for `{}`."""
    attention_norm: str
    q_proj: str
    k_proj: str
    v_proj: str
    o_proj: str
    q_norm: str
    k_norm: str
    mlp_norm: str
    gate_proj: str
    up_proj: str
    down_proj: str


FOLDER_NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    lm_head="lm_head.weight",
    layer_prefix="model.layers.{}.",
    attention_norm="input_layernorm",
    q_proj="self_attn.q_proj",
    k_proj="self_attn.k_proj",
    v_proj="self_attn.v_proj",
    o_proj="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    mlp_norm="post_attention_layernorm",
    gate_proj="mlp.gate_proj",
    up_proj="mlp.up_proj",
    down_proj="mlp.down_proj",
)
GGUF_NAMES = TensorNames(
    embedding="token_embd.weight",
    norm="output_norm.weight",
    lm_head="output.weight",
    layer_prefix="blk.{}.",
    attention_norm="attn_norm",
    q_proj="attn_q",
    k_proj="attn_k",
    v_proj="attn_v",
    o_proj="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    mlp_norm="ffn_norm",
    gate_proj="ffn_gate",
    up_proj="ffn_up",
    down_proj="ffn_down",
)


@dataclass(frozen=True, slots=True)
class StoredDecoder:
    """A decoder that can be loaded."""

    config: DecoderConfig
    family: Family
    names: TensorNames
    tensors: StoredTensors
    has_rotary_pairs: bool = False
    """What the rotary embedding turns together is neighbours, (2i, 2i + 1); else it is (i, i + head_dim / 2)."""
    rotary_divisors: str | None = None
    """Name of a tensor, [head_dim / 2], that the rotary frequencies are divided by. None: they are not."""
