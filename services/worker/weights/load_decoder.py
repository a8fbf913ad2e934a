"""A decoder's weights, out of its files into the layout of its forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.worker.runner.models.decoder_weights import DecoderLayerWeights, DecoderWeights, Matrix
from services.worker.runner.rotary_frequencies import rotary_frequencies
from services.worker.weights.stored_decoder import StoredDecoder, StoredMatrix

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""
MakeMatrix = Callable[[Tensor, Tensor | None], Matrix]
"""Copies a matrix, [out, in], into the layout that a runner wants, with a bias, [out], or None."""


def load_decoder(
    stored: StoredDecoder, make_matrix: MakeMatrix[Matrix], on_progress: Progress
) -> DecoderWeights[Matrix]:
    """Load all weights as float32.

    Raises ModelFileError for a tensor that is missing, has another shape or a type that cannot be read, or that the
    model's family does not have.
    """
    config, names, tensors = stored.config, stored.names, stored.tensors
    embedding = tensors.matrix([StoredMatrix(names.embedding, config.vocabulary_size)], config.hidden_size)
    lm_head = make_matrix(_head(stored, embedding), None)
    layers = []
    for index in range(config.num_layers):
        # The embedding and the head take about as long as a fifth of the layers of a small model.
        on_progress((index + config.num_layers / 5) / (config.num_layers * 6 / 5))
        layers.append(_load_layer(stored, index, make_matrix))
    norm = tensors.vector(names.norm, config.hidden_size)
    weights = DecoderWeights(embedding, tuple(layers), norm, lm_head, _rotary_frequencies(stored))
    tensors.check_all_read()
    on_progress(1.0)
    return weights


def _head(stored: StoredDecoder, embedding: Tensor) -> Tensor:
    """The head's matrix. Some files of tied models hold it all the same."""
    config, name = stored.config, stored.names.lm_head
    if stored.is_tied and name not in stored.tensors:
        return embedding
    head = stored.tensors.matrix([StoredMatrix(name, config.vocabulary_size)], config.hidden_size)
    if not stored.is_tied:
        return head
    if not torch.equal(head, embedding):
        raise ModelFileError(
            stored.tensors.path,
            f"tie_word_embeddings is true, but tensor {name!r} differs from {stored.names.embedding!r}; "
            "set it to false if the model has a head of its own",
        )
    return embedding


def _load_layer(stored: StoredDecoder, index: int, make_matrix: MakeMatrix[Matrix]) -> DecoderLayerWeights[Matrix]:
    config, names, tensors = stored.config, stored.names, stored.tensors
    prefix = names.layer_prefix.format(index)
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def weight(name: str, num_rows: int) -> StoredMatrix:
        return StoredMatrix(f"{prefix}{name}.weight", num_rows)

    qkv = [
        weight(names.q_proj, config.q_size),
        weight(names.k_proj, config.kv_size),
        weight(names.v_proj, config.kv_size),
    ]
    gate_up = [weight(names.gate_proj, intermediate), weight(names.up_proj, intermediate)]
    return DecoderLayerWeights(
        attention_norm=tensors.vector(f"{prefix}{names.attention_norm}.weight", hidden),
        qkv_proj=make_matrix(_paired(stored, tensors.matrix(qkv, hidden)), _qkv_bias(stored, prefix)),
        qk_norm=_qk_norm(stored, prefix),
        o_proj=make_matrix(tensors.matrix([weight(names.o_proj, hidden)], config.q_size), None),
        mlp_norm=tensors.vector(f"{prefix}{names.mlp_norm}.weight", hidden),
        gate_up_proj=make_matrix(tensors.matrix(gate_up, hidden), None),
        down_proj=make_matrix(tensors.matrix([weight(names.down_proj, hidden)], intermediate), None),
    )


def _qkv_bias(stored: StoredDecoder, prefix: str) -> Tensor | None:
    if not stored.family.has_qkv_bias:
        return None
    config, names = stored.config, stored.names
    parts = ((names.q_proj, config.q_size), (names.k_proj, config.kv_size), (names.v_proj, config.kv_size))
    return _paired(stored, torch.cat([stored.tensors.vector(f"{prefix}{name}.bias", length) for name, length in parts]))


def _qk_norm(stored: StoredDecoder, prefix: str) -> Tensor | None:
    if not stored.family.has_qk_norm:
        return None
    config, names = stored.config, stored.names
    parts = ((names.q_norm, config.num_heads), (names.k_norm, config.num_kv_heads))
    return torch.cat(
        [
            _paired(stored, stored.tensors.vector(f"{prefix}{name}.weight", config.head_dim)).expand(num_heads, -1)
            for name, num_heads in parts
        ]
    )


def _paired(stored: StoredDecoder, rows: Tensor) -> Tensor:
    """Make neighbours of the rows that the rotary embedding turns together, in place; `rows` begin with heads that it
    turns and may go on with those of values. Scores stay, since queries and keys are put into the same order.
    """
    if not stored.has_rotary_pairs:
        turned = rows[: stored.config.q_size + stored.config.kv_size]
        halves = turned.view(-1, 2, stored.config.head_dim // 2, *rows.shape[1:])
        turned.copy_(halves.transpose(1, 2).reshape(turned.shape))
    return rows


def _rotary_frequencies(stored: StoredDecoder) -> Tensor:
    config, divisors = stored.config, stored.rotary_divisors
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return frequencies if divisors is None else frequencies / stored.tensors.vector(divisors, config.head_dim // 2)
