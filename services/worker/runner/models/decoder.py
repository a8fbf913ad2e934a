"""A decoder: one forward pass for Llama (Touvron et al., 2023), Mistral, Qwen2 and Qwen3.

What sets the families apart is in the weights (biases, norms of queries and keys) and in the config (a window), not
here. float32 throughout. All state is passed in: weights at construction, the cache and the batch at each call.
"""

from torch import Tensor
from torch.nn.functional import embedding

from services.worker.runner.attention import paged_attention
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.decoder_weights import DecoderConfig, DecoderLayerWeights, DecoderWeights
from services.worker.runner.norm import rms_norm
from services.worker.runner.rope import rotary_table, rotate_and_store
from services.worker.runner.swiglu import swiglu


class Decoder:
    """A decoder of any of the families."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self._turns = rotary_table(config.context_tokens, weights.rotary_frequencies)

    def forward(self, batch: BatchInputs, cache: PagedKvCache) -> Tensor:
        """Compute a batch, writing its keys and values to the cache.

        Returns every row's hidden state: [num_tokens, hidden_size]. `logits` of those that are wanted is left to the
        caller: they are 200 KB a row for 49,152 tokens.
        """
        hidden = embedding(batch.token_ids, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            layer.o_proj.add_to(hidden, self._attention(index, layer, hidden, batch, cache))
            gate_up = layer.gate_up_proj(self._norm(hidden, layer.mlp_norm))
            layer.down_proj.add_to(hidden, swiglu(gate_up))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states, [num_rows, hidden_size], to the logits of the tokens after them:
        [num_rows, vocabulary_size].
        """
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.config.vocabulary_size))
        return self._weights.lm_head(self._norm(hidden, self._weights.norm))

    def _attention(
        self, index: int, layer: DecoderLayerWeights, hidden: Tensor, batch: BatchInputs, cache: PagedKvCache
    ) -> Tensor:
        qkv = layer.qkv_proj(self._norm(hidden, layer.attention_norm))
        rotate_and_store(qkv, self._turns, layer.qk_norm, batch, cache, index)
        window = self.config.sliding_window if index in self.config.sliding_layers else None
        return paged_attention(qkv, batch, cache, index, window)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight, self.config.rms_norm_eps)
