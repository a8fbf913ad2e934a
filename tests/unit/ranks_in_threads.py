"""Ranks as threads of a test's process: each waits for the others outside of the interpreter's lock."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from services.common.model.stored_model import read_stored_model
from services.worker.engine.step_plan import StepPlan
from services.worker.runner.cpu_runner import FinishedStep
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.matrix import pack_float32
from services.worker.runner.models.decoder import Decoder
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.runner.rank_runner import RankRunner
from services.worker.runner.rank_sampling import DealtVocabulary
from services.worker.runner.ranks import RankMemory, Ranks
from services.worker.weights.load_decoder import load_decoder
from services.worker.weights.open_decoder import open_decoder

SLOT_FLOATS = 1 << 20


class ThreadedRunner:
    """A Runner of the engine."""

    steps_ahead = 0

    def __init__(self, runners: list[RankRunner], threads: ThreadPoolExecutor) -> None:
        self.ranks = runners
        self._threads = threads

    def launch(self, plan: StepPlan) -> FinishedStep:
        computed = [self._threads.submit(rank.compute, plan) for rank in self.ranks]
        result, *others = [future.result() for future in computed]
        assert result is not None
        assert others == [None] * len(others), "rank 0 alone says what came of a step"
        return FinishedStep(result)

    def prepare(self) -> bool:
        return False


@dataclass
class ShardedModel:
    """A model dealt out to ranks."""

    config: DecoderConfig
    decoders: list[Decoder]
    ranks: list[Ranks]
    threads: ThreadPoolExecutor

    def runner(self, num_blocks: int, block_size_tokens: int) -> ThreadedRunner:
        return ThreadedRunner(
            [
                RankRunner(
                    decoder,
                    PagedKvCache(decoder.config, num_blocks, block_size_tokens),
                    ranks,
                    DealtVocabulary(ranks, self.config),
                )
                for decoder, ranks in zip(self.decoders, self.ranks, strict=True)
            ],
            self.threads,
        )


@contextmanager
def sharded_model(path: Path, world_size: int, patience_s: float = 60.0) -> Iterator[ShardedModel]:
    """Load a model's parts. A test's ranks share few cores: they are waited for longer than a worker's."""
    stored = open_decoder(read_stored_model(path))
    memory = torch.zeros(RankMemory.num_bytes(world_size, SLOT_FLOATS), dtype=torch.uint8)
    ranks = [
        Ranks(Shard(rank, world_size), RankMemory.of(memory, world_size, SLOT_FLOATS), patience_s)
        for rank in range(world_size)
    ]
    decoders = [
        Decoder(
            stored.config,
            # A file keeps count of what was read of it: each rank opens its own.
            load_decoder(open_decoder(read_stored_model(path)), pack_float32, lambda share: None, seat.shard),
            seat,
        )
        for seat in ranks
    ]
    # A team of several threads is not begun by several threads at once.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(world_size) as threads:
        yield ShardedModel(stored.config, decoders, ranks, threads)
    torch.set_num_threads(num_threads)
