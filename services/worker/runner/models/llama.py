"""Llama: one forward pass, in the order of the paper (Touvron et al., 2023; grouped queries as in Llama 2).

float32 throughout. All state is passed in: weights at construction, the cache and the batch at each call.
"""

from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from services.worker.runner.attention import paged_attention
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.llama_weights import LlamaConfig, LlamaLayerWeights, LlamaWeights
from services.worker.runner.rope import RotaryAngles, rotary_table


class LlamaModel:
    """A Llama decoder."""

    def __init__(self, config: LlamaConfig, weights: LlamaWeights) -> None:
        self._config = config
        self._weights = weights
        self._rotary = rotary_table(config.context_tokens, config.head_dim, config.rope_theta)

    def forward(self, batch: BatchInputs, cache: PagedKvCache) -> Tensor:
        """Compute a batch, writing its keys and values to the cache.

        Returns every row's hidden state: [num_tokens, hidden_size]. `logits` of those that are wanted is left to the
        caller: they are 200 KB a row for 49,152 tokens.
        """
        hidden = embedding(batch.token_ids, self._weights.embedding)
        angles = self._rotary.at(batch.positions)
        for index, layer in enumerate(self._weights.layers):
            hidden += self._attention(index, layer, hidden, angles, batch, cache)
            hidden += self._mlp(layer, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states, [num_rows, hidden_size], to the logits of the tokens after them:
        [num_rows, vocabulary_size].
        """
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self._config.vocabulary_size))
        return self._weights.lm_head(self._norm(hidden, self._weights.norm))

    def _attention(
        self,
        index: int,
        layer: LlamaLayerWeights,
        hidden: Tensor,
        angles: RotaryAngles,
        batch: BatchInputs,
        cache: PagedKvCache,
    ) -> Tensor:
        config = self._config
        num_tokens = hidden.shape[0]
        qkv = layer.qkv_proj(self._norm(hidden, layer.attention_norm))
        heads = qkv.view(num_tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        angles.rotate_(heads[:, : config.num_heads + config.num_kv_heads])
        queries, kv = heads[:, : config.num_heads], heads[:, config.num_heads :]
        cache.write(index, batch.slot_mapping, kv.view(num_tokens, 2, config.num_kv_heads, config.head_dim))
        return layer.o_proj(paged_attention(queries, cache, index, batch.attention_groups).flatten(1))

    def _mlp(self, layer: LlamaLayerWeights, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up_proj(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=1)
        return layer.down_proj(silu(gate).mul_(up))

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, (self._config.hidden_size,), weight, self._config.rms_norm_eps)
