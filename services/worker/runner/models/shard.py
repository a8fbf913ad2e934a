"""Which part of a decoder each rank of a worker has (tensor parallelism: Megatron-LM, Shoeybi et al., 2019).

A rank has whole heads of keys with the heads of queries that read them, columns of the MLP, and rows of the vocabulary;
always a run of neighbours. Norms are whole on every rank. What ranks have of the two matrices that lead back to the
residual are columns: their products are summed over the ranks.
"""

from dataclasses import dataclass, replace

from services.common.config import ConfigError
from services.worker.runner.models.decoder_weights import DecoderConfig

UNIT = 16
"""Columns of the MLP and rows of the vocabulary are dealt out by so many: products of 8 bits take multiples of 4 (CPU)
or 16 (GPU) inputs, and a run of the vocabulary begins at a whole byte of a grammar's mask."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a worker; as it is, the whole model."""

    rank: int = 0
    world_size: int = 1

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """Return what a rank computes of a decoder. The vocabulary's size stays the whole one: tokens are its numbers.

        Raises ConfigError if there is not something of everything for each rank.
        """
        for name, count, unit in (
            ("heads", config.num_heads, 1),
            ("MLP columns", config.intermediate_size, UNIT),
            ("tokens", config.vocabulary_size, UNIT),
        ):
            most = -(-count // unit)
            if self.world_size > most:
                raise ConfigError(f"--shards is {self.world_size}; the model's {count} {name} make at most {most}")
        return replace(
            config,
            num_heads=len(self.heads(config)),
            num_kv_heads=len(self.kv_heads(config)),
            intermediate_size=len(self.intermediate(config)),
        )

    def kv_heads(self, config: DecoderConfig) -> range:
        """Return a rank's heads of keys and values. Where there are fewer than ranks, neighbouring ranks share one."""
        if self.world_size <= config.num_kv_heads:
            return _run(config.num_kv_heads, self.rank, self.world_size)
        shared = self._shared_kv_head(config)
        return range(shared, shared + 1)

    def heads(self, config: DecoderConfig) -> range:
        """Return a rank's heads of queries: all that read its heads of keys, or its part of those of a shared one."""
        group = config.num_heads // config.num_kv_heads
        kv_heads = self.kv_heads(config)
        if self.world_size <= config.num_kv_heads:
            return range(kv_heads.start * group, kv_heads.stop * group)
        sharing = [
            rank for rank in range(self.world_size) if Shard(rank, self.world_size)._shared_kv_head(config) in kv_heads
        ]
        part = _run(group, self.rank - sharing[0], len(sharing))
        return range(kv_heads.start * group + part.start, kv_heads.start * group + part.stop)

    def intermediate(self, config: DecoderConfig) -> range:
        """Return a rank's columns of the MLP."""
        return self._units(config.intermediate_size)

    def vocabulary(self, config: DecoderConfig) -> range:
        """Return a rank's tokens: its rows of the embedding and of the head."""
        return self._units(config.vocabulary_size)

    def _shared_kv_head(self, config: DecoderConfig) -> int:
        return self.rank * config.num_kv_heads // self.world_size

    def _units(self, count: int) -> range:
        units = _run(-(-count // UNIT), self.rank, self.world_size)
        return range(units.start * UNIT, min(units.stop * UNIT, count))


def _run(count: int, rank: int, world_size: int) -> range:
    """Deal `count` things out in runs of neighbours, as even as they can be: the first ones have one more."""
    each, more = divmod(count, world_size)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))
