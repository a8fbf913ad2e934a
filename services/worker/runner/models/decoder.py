"""A decoder: one forward pass for Llama (Touvron et al., 2023), Mistral, Qwen2 and Qwen3.

What sets the families apart is in the weights (biases, norms of queries and keys) and in the config (a window), not
here. float32 throughout. All state is passed in: weights at construction, the cache and the batch at each call.
"""

from torch import Tensor
from torch.nn.functional import embedding, silu

from services.worker.runner.attention import paged_attention
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights
from services.worker.runner.norm import rms_norm
from services.worker.runner.rope import RotaryTable, rotate_


class Decoder:
    """A decoder of any of the families."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self._rotary = RotaryTable(config.context_tokens, weights.rotary_frequencies)

    def forward(self, batch: BatchInputs, cache: PagedKvCache) -> Tensor:
        """Compute a batch, writing its keys and values to the cache.

        Returns every row's hidden state: [num_tokens, hidden_size]. `logits` of those that are wanted is left to the
        caller: they are 200 KB a row for 49,152 tokens.
        """
        hidden = embedding(batch.token_ids, self._weights.embedding)
        turns = self._rotary.at(batch.positions)
        for index, layer in enumerate(self._weights.layers):
            hidden += self._attention(index, layer, hidden, turns, batch, cache)
            hidden += self._mlp(layer, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states, [num_rows, hidden_size], to the logits of the tokens after them:
        [num_rows, vocabulary_size].
        """
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.config.vocabulary_size))
        return self._weights.lm_head(self._norm(hidden, self._weights.norm))

    def _attention(
        self,
        index: int,
        layer: DecoderLayerWeights,
        hidden: Tensor,
        turns: Tensor,
        batch: BatchInputs,
        cache: PagedKvCache,
    ) -> Tensor:
        config = self.config
        num_tokens = hidden.shape[0]
        qkv = layer.qkv_proj(self._norm(hidden, layer.attention_norm))
        heads = qkv.view(num_tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        queries_and_keys = heads[:, : config.num_heads + config.num_kv_heads]
        if layer.qk_norm is not None:
            queries_and_keys.copy_(rms_norm(queries_and_keys, layer.qk_norm, config.rms_norm_eps))
        rotate_(queries_and_keys, turns)
        queries, kv = heads[:, : config.num_heads], heads[:, config.num_heads :]
        cache.write(index, batch.write_rows, kv)
        groups = batch.sliding_groups if index in config.sliding_layers else batch.attention_groups
        return layer.o_proj(paged_attention(queries, cache, index, groups).flatten(1))

    def _mlp(self, layer: DecoderLayerWeights, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up_proj(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=1)
        return layer.down_proj(silu(gate).mul_(up))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight, self.config.rms_norm_eps)
