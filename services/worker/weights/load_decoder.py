"""A decoder's weights, out of its files into the layout of its forward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.common.model.errors import ModelFileError
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights, Matrix
from services.worker.runner.models.shard import Shard
from services.worker.runner.rotary_frequencies import rotary_frequencies
from services.worker.weights.stored_decoder import StoredDecoder, StoredMatrix, Weight

Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""
MakeMatrix = Callable[[Tensor, Tensor | None], Matrix]
"""Copies a matrix, [out, in], into the layout that a runner wants, with a bias, [out], or None."""


def load_decoder(
    stored: StoredDecoder, make_matrix: MakeMatrix[Matrix], on_progress: Progress, shard: Shard | None = None
) -> DecoderWeights[Matrix]:
    """Load all weights as float32, or a rank's: what `DecoderWeights` says, of the rank's config and tokens.

    Raises ConfigError if the model does not have something for each rank, and ModelFileError for a tensor that is
    missing, has another shape or a type that cannot be read, or that the model's family does not have.
    """
    return load_decoder_as(
        stored,
        lambda weight, bias: make_matrix(weight.values, bias),
        lambda head: make_matrix(head, None),
        on_progress,
        shard or Shard(),
    )


def load_decoder_as(
    stored: StoredDecoder,
    make_matrix: Callable[[Weight, Tensor | None], Matrix],
    make_head: Callable[[Tensor], Matrix],
    on_progress: Progress,
    shard: Shard,
) -> DecoderWeights[Matrix]:
    """Load as `load_decoder`, to wherever `stored.tensors` are brought; the head of a tied model is its embedding."""
    part = _Part(stored.config, shard)
    config, names, tensors = stored.config, stored.names, stored.tensors
    embedding = tensors.table(part.tokens(names.embedding), config.hidden_size)
    lm_head = make_head(_head(stored, part, embedding))
    layers = []
    for index in range(config.num_layers):
        # The embedding and the head take about as long as a fifth of the layers of a small model.
        on_progress((index + config.num_layers / 5) / (config.num_layers * 6 / 5))
        layers.append(_load_layer(stored, part, index, make_matrix))
    norm = tensors.vector(names.norm, config.hidden_size)
    weights = DecoderWeights(embedding, tuple(layers), norm, lm_head, _rotary_frequencies(stored))
    tensors.check_all_read()
    on_progress(1.0)
    return weights


class _Part:
    """What a rank has of each kind of matrix."""

    def __init__(self, config: DecoderConfig, shard: Shard) -> None:
        self._whole = config
        self.config = shard.config(config)
        self.heads, self.kv_heads = shard.heads(config), shard.kv_heads(config)
        self.intermediate, self._vocabulary = shard.intermediate(config), shard.vocabulary(config)

    @property
    def head_columns(self) -> range:
        """Of the attention's output."""
        return self._dimensions(self.heads)

    def tokens(self, name: str) -> StoredMatrix:
        return StoredMatrix(name, self._whole.vocabulary_size, self._vocabulary)

    def queries(self, name: str) -> StoredMatrix:
        return StoredMatrix(name, self._whole.q_size, self._dimensions(self.heads))

    def keys(self, name: str) -> StoredMatrix:
        return StoredMatrix(name, self._whole.kv_size, self._dimensions(self.kv_heads))

    def mlp(self, name: str) -> StoredMatrix:
        return StoredMatrix(name, self._whole.intermediate_size, self.intermediate)

    def outputs(self, name: str) -> StoredMatrix:
        return StoredMatrix(name, self._whole.hidden_size, range(self._whole.hidden_size))

    def _dimensions(self, heads: range) -> range:
        return range(heads.start * self._whole.head_dim, heads.stop * self._whole.head_dim)


def _head(stored: StoredDecoder, part: _Part, embedding: Tensor) -> Tensor:
    """The head's matrix. Some files of tied models hold it all the same."""
    config, name = stored.config, stored.names.lm_head
    if config.is_tied and name not in stored.tensors:
        return embedding
    head = stored.tensors.table(part.tokens(name), config.hidden_size)
    if not config.is_tied:
        return head
    if not torch.equal(head, embedding):
        raise ModelFileError(
            stored.tensors.path,
            f"tie_word_embeddings is true, but tensor {name!r} differs from {stored.names.embedding!r}; "
            "set it to false if the model has a head of its own",
        )
    return embedding


def _load_layer(
    stored: StoredDecoder, part: _Part, index: int, make_matrix: Callable[[Weight, Tensor | None], Matrix]
) -> DecoderLayerWeights[Matrix]:
    config, names, tensors = stored.config, stored.names, stored.tensors
    prefix = names.layer_prefix.format(index)
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def weight(name: str) -> str:
        return f"{prefix}{name}.weight"

    qkv = [part.queries(weight(names.q_proj)), part.keys(weight(names.k_proj)), part.keys(weight(names.v_proj))]
    gate_up = [part.mlp(weight(names.gate_proj)), part.mlp(weight(names.up_proj))]
    o_proj, down_proj = [part.outputs(weight(names.o_proj))], [part.outputs(weight(names.down_proj))]
    return DecoderLayerWeights(
        attention_norm=tensors.vector(weight(names.attention_norm), hidden),
        qkv_proj=make_matrix(_qkv(stored, part, qkv), _qkv_bias(stored, part, prefix)),
        qk_norm=_qk_norm(stored, part, prefix),
        o_proj=make_matrix(tensors.matrix(o_proj, config.q_size, part.head_columns), None),
        mlp_norm=tensors.vector(weight(names.mlp_norm), hidden),
        gate_up_proj=make_matrix(tensors.matrix(gate_up, hidden), None),
        down_proj=make_matrix(tensors.matrix(down_proj, intermediate, part.intermediate), None),
    )


def _qkv(stored: StoredDecoder, part: _Part, parts: Sequence[StoredMatrix]) -> Weight:
    weight = stored.tensors.matrix(parts, stored.config.hidden_size)
    _paired(stored, part, weight.values)
    if weight.scales is not None:
        _paired(stored, part, weight.scales)
    return weight


def _qkv_bias(stored: StoredDecoder, part: _Part, prefix: str) -> Tensor | None:
    if not stored.family.has_qkv_bias:
        return None
    names = stored.names
    parts = [part.queries(names.q_proj), part.keys(names.k_proj), part.keys(names.v_proj)]
    biases = [
        stored.tensors.vector(f"{prefix}{of.name}.bias", of.num_rows)[of.rows.start : of.rows.stop] for of in parts
    ]
    return _paired(stored, part, torch.cat(biases))


def _qk_norm(stored: StoredDecoder, part: _Part, prefix: str) -> Tensor | None:
    if not stored.family.has_qk_norm:
        return None
    names, head_dim = stored.names, stored.config.head_dim
    parts = ((names.q_norm, part.config.num_heads), (names.k_norm, part.config.num_kv_heads))
    return torch.cat(
        [
            _paired(stored, part, stored.tensors.vector(f"{prefix}{name}.weight", head_dim)).expand(num_heads, -1)
            for name, num_heads in parts
        ]
    )


def _paired(stored: StoredDecoder, part: _Part, rows: Tensor) -> Tensor:
    """Make neighbours of the rows that the rotary embedding turns together, in place; `rows` begin with heads that it
    turns and may go on with those of values. Scores stay, since queries and keys are put into the same order.
    """
    if not stored.has_rotary_pairs:
        turned = rows[: part.config.q_size + part.config.kv_size]
        halves = turned.view(-1, 2, part.config.head_dim // 2, *rows.shape[1:])
        turned.copy_(halves.transpose(1, 2).reshape(turned.shape))
    return rows


def _rotary_frequencies(stored: StoredDecoder) -> Tensor:
    config, divisors = stored.config, stored.rotary_divisors
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if divisors is None:
        return frequencies
    return frequencies / stored.tensors.vector(divisors, config.head_dim // 2).to(frequencies.device)
