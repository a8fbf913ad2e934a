"""A decoder: one forward pass for Llama (Touvron et al., 2023), Mistral, Qwen2 and Qwen3.

What sets the families apart is in the weights (biases, norms of queries and keys) and in the config (a window), not
here. The layers themselves are in C: `services/worker/cpu_kernels/decoder.c`.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import embedding

from services.common.config import ConfigError
from services.worker.cpu_kernels import structures
from services.worker.cpu_kernels.library import address, kernels
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import PackedMatrix
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights
from services.worker.runner.models.shard import Shard
from services.worker.runner.norm import rms_norm
from services.worker.runner.ranks import Ranks
from services.worker.runner.rope import rotary_table

_NO_WINDOW = 1 << 30
"""More tokens than any context has."""


class Decoder:
    """A decoder of any of the families, or a rank's part of one."""

    def __init__(
        self, config: DecoderConfig, weights: DecoderWeights[PackedMatrix], ranks: Ranks | None = None
    ) -> None:
        """Take weights of this config: the whole model's, or with `ranks` those of a rank's part of it.

        Raises ConfigError if its heads are more than the kernels take.
        """
        shard = ranks.shard if ranks else Shard()
        self.tokens = shard.vocabulary(config)
        """The tokens whose embeddings and logits are here."""
        config = shard.config(config)
        _check_heads(config)
        self.config = config
        self._ranks = ranks
        self._weights = weights
        self._turns = rotary_table(config.context_tokens, weights.rotary_frequencies)
        self._layers = (structures.Layer * config.num_layers)(
            *(_layer(config, index, layer) for index, layer in enumerate(weights.layers))
        )
        self.part_s: Tensor | None = None
        """If set, [len(structures.PARTS)] float64 zeros: the seconds of each part of forward passes are added there."""

    def forward(self, batch: BatchInputs, cache: PagedKvCache) -> Tensor:
        """Compute a batch, writing its keys and values to the cache.

        Returns the hidden states of the rows that are wanted: [num_wanted, hidden_size]. Their `logits` are left to the
        caller: they are 200 KB a row for 49,152 tokens. A rank takes part in a pass of all; raises RanksLostError.
        """
        config, ranks = self.config, self._ranks
        hidden = self._embedding(batch.token_ids)
        assert ranks is None or hidden.numel() <= ranks.slot_floats
        decoder = structures.Decoder(
            ctypes.addressof(self._layers),
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            cache.heads,
            address(self._turns),
            config.rms_norm_eps,
        )
        room = _Room(config, hidden, self.part_s)
        kernels().shoal_forward(
            ctypes.byref(decoder),
            ctypes.byref(batch.structure()),
            cache.addresses,
            ctypes.byref(room.structure),
            ctypes.byref(ranks.structure) if ranks else None,
            torch.get_num_threads(),
        )
        if ranks:
            ranks.check()
        return hidden[: len(batch.wanted_rows)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states, [num_rows, hidden_size], to the logits of the tokens after them, of those that are here:
        [num_rows, len(tokens)].
        """
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, len(self.tokens)))
        return self._weights.lm_head(rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps))

    def _embedding(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding, [num_tokens, hidden_size]; zeros for tokens that are on another rank."""
        if self._ranks is None:
            return embedding(token_ids, self._weights.embedding)
        places = token_ids - self.tokens.start
        is_here = (places >= 0) & (places < len(self.tokens))
        return embedding(places.where(is_here, 0), self._weights.embedding) * is_here.unsqueeze(1)


class _Room:
    """Where a forward pass works, beside its hidden states, [num_rows, hidden_size], which it changes in place."""

    def __init__(self, config: DecoderConfig, hidden: Tensor, part_s: Tensor | None) -> None:
        num_rows = len(hidden)
        sizes = (
            config.hidden_size,
            config.q_size + 2 * config.kv_size,
            config.q_size,
            2 * config.intermediate_size,
            config.intermediate_size,
        )
        values = [hidden.new_empty((num_rows, size)) for size in sizes]
        rounded, row_scales = torch.empty((num_rows, max(sizes)), dtype=torch.uint8), hidden.new_empty(num_rows)
        next_tasks = torch.zeros(config.num_layers, dtype=torch.int64)
        self._kept = (values, rounded, row_scales, next_tasks)
        self.structure = structures.Room(
            address(hidden),
            *map(address, values),
            address(rounded, torch.uint8),
            address(row_scales),
            address(next_tasks, torch.int64),
            None if part_s is None else address(part_s, torch.float64),
        )


def _layer(config: DecoderConfig, index: int, layer: DecoderLayerWeights[PackedMatrix]) -> structures.Layer:
    return structures.Layer(
        address(layer.attention_norm),
        None if layer.qk_norm is None else address(layer.qk_norm),
        address(layer.mlp_norm),
        layer.qkv_proj.structure,
        layer.o_proj.structure,
        layer.gate_up_proj.structure,
        layer.down_proj.structure,
        config.sliding_window if config.sliding_window and index in config.sliding_layers else _NO_WINDOW,
    )


def _check_heads(config: DecoderConfig) -> None:
    limits = (
        ("head_dim", config.head_dim, kernels().shoal_max_head_dim()),
        ("query heads for each key head", config.num_heads // config.num_kv_heads, kernels().shoal_max_tile_queries()),
    )
    for name, value, limit in limits:
        if value > limit:
            raise ConfigError(f"the model's {name} is {value}; the CPU runner takes at most {limit}")
