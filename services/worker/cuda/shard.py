"""Which part of each matrix a rank holds, and where ranks add up what their parts gave (Megatron-LM, Shoeybi et
al., 2019).

Heads and intermediate dimensions are dealt out to ranks in runs of neighbours: a rank computes with its own ones from
the residual to the residual, and each layer's two products that lead back to it are summed over all ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.common.config import ConfigError
from services.worker.kernels.rows import Scaled
from services.worker.runner.models.decoder_weights import DecoderConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a worker."""

    rank: int = 0
    world_size: int = 1

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """Return what a rank computes of a decoder. Raises ConfigError if it cannot be dealt out evenly."""
        for name, count in (
            ("num_kv_heads", config.num_kv_heads),
            ("intermediate_size", config.intermediate_size),
            ("vocabulary_size", config.vocabulary_size),
        ):
            if count % self.world_size:
                raise ConfigError(f"{self.world_size} shards cannot deal out the model's {name}, {count}")
        return replace(
            config,
            num_heads=config.num_heads // self.world_size,
            num_kv_heads=config.num_kv_heads // self.world_size,
            intermediate_size=config.intermediate_size // self.world_size,
        )

    def qkv(self, whole: Tensor, config: DecoderConfig) -> Tensor:
        """Rows of queries, keys and values, as weights [out, in] or biases [out]: a rank's own heads of each."""
        return torch.cat([self._run(part) for part in whole.split([config.q_size, config.kv_size, config.kv_size])])

    def heads(self, whole: Tensor, config: DecoderConfig) -> Tensor:
        """Rows of query heads, then of key heads: [num_heads + num_kv_heads, ...]."""
        return torch.cat([self._run(part) for part in whole.split([config.num_heads, config.num_kv_heads])])

    def gate_up(self, whole: Tensor) -> Tensor:
        """Rows of the gate, then of the other half."""
        return torch.cat([self._run(part) for part in whole.chunk(2)])

    def columns(self, whole: Tensor) -> Tensor:
        """What a rank's own part of the inputs is multiplied with, of the two matrices that lead back."""
        return self._run(whole.T).T.contiguous()

    def sum_over_ranks(self, product: Scaled) -> Scaled:
        """Add up what the ranks' parts of a product gave: behind the attention's output, and behind the MLP's."""
        if self.world_size > 1:
            raise NotImplementedError("ranks are not connected yet")
        return product

    def _run(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.world_size)[self.rank]
