"""Ranks that meet through gloo, as a reference: the default model's cases in float32, by as many processes.

    python -m tests.unit.gloo_ranks --ranks 2
    python -m tests.unit.gloo_ranks --ranks 3 --way moved

A line for each way to answer them: how many cases came out token for token. Minutes a way, seconds with --short.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from services.common.model.location import default_model_path
from services.common.model.stored_model import read_stored_model
from services.worker.cpu_kernels.structures import SumOverRanks
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
from tests.unit.ranks_in_threads import SLOT_FLOATS
from tests.unit.reference_ways import WAYS
from tests.unit.test_runner_reference import CASES, SHORT_CASES, Case

MODULE = "tests.unit.gloo_ranks"
Told = StepPlan | tuple[int, int] | None
"""What rank 0 tells the others: a step, or the blocks of a new cache and their size, or that it was all."""


class GlooRanks(Ranks):
    """The kernels hand their sums over; all else is gathered by gloo too."""

    def __init__(self, shard: Shard) -> None:
        memory = torch.zeros(RankMemory.num_bytes(shard.world_size, SLOT_FLOATS), dtype=torch.uint8)

        def sum_over_ranks(slot: "ctypes._Pointer[ctypes.c_float]", count: int) -> int:
            dist.all_reduce(torch.from_numpy(np.ctypeslib.as_array(slot, (count,))))
            return 1

        super().__init__(
            shard,
            RankMemory.of(memory, shard.world_size, SLOT_FLOATS),
            sum_over_ranks=SumOverRanks(sum_over_ranks),
        )

    def gather(self, given: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        all_given = [torch.zeros(max(sizes)) for _ in sizes]
        own = torch.zeros(max(sizes))
        own[: given.numel()] = given.flatten()
        dist.all_gather(all_given, own)
        return [values[:size] for values, size in zip(all_given, sizes, strict=True)]


class GlooRunner:
    """Rank 0, which tells its plans: a Runner of the engine."""

    steps_ahead = 0

    def __init__(self, rank: RankRunner) -> None:
        self._rank = rank

    def launch(self, plan: StepPlan) -> FinishedStep:
        tell(plan)
        result = self._rank.compute(plan)
        assert result is not None
        return FinishedStep(result)

    def prepare(self) -> bool:
        return False


class GlooModel:
    """A rank's part of the default model; rank 0's is one that tests run."""

    def __init__(self, rank: int, world_size: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        stored = open_decoder(read_stored_model(default_model_path()))
        self.config: DecoderConfig = stored.config
        self._ranks = GlooRanks(Shard(rank, world_size))
        self._part = Decoder(
            stored.config, load_decoder(stored, pack_float32, lambda share: None, self._ranks.shard), self._ranks
        )

    def rank_runner(self, num_blocks: int, block_size_tokens: int) -> RankRunner:
        cache = PagedKvCache(self._part.config, num_blocks, block_size_tokens)
        return RankRunner(self._part, cache, self._ranks, DealtVocabulary(self._ranks, self.config))

    def runner(self, num_blocks: int, block_size_tokens: int) -> GlooRunner:
        tell((num_blocks, block_size_tokens))
        return GlooRunner(self.rank_runner(num_blocks, block_size_tokens))

    def follow(self) -> None:
        """Take part in what rank 0 runs."""
        told: list[Told] = [None]
        runner: RankRunner | None = None
        while True:
            dist.broadcast_object_list(told, src=0)
            match told[0]:
                case None:
                    return
                case StepPlan() as plan:
                    assert runner is not None
                    runner.compute(plan)
                case num_blocks, block_size_tokens:
                    runner = self.rank_runner(num_blocks, block_size_tokens)


def tell(what: Told) -> None:
    dist.broadcast_object_list([what], src=0)


def answer(model: GlooModel, ways: Sequence[str], cases: Sequence[Case]) -> None:
    """Be rank 0: run the ways, and say what came of each."""
    for name in ways:
        came = WAYS[name](model, cases)
        line = {"ranks": dist.get_world_size(), "way": name, "right": came.right, "of": len(cases), "by": came.by}
        print(json.dumps(line), flush=True)
    tell(None)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--way", choices=WAYS, action="append", help="(all)")
    parser.add_argument("--short", action="store_true", help="six short cases")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        GlooModel(given.rank, given.ranks, given.store).follow()
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [sys.executable, "-m", MODULE, "--ranks", str(given.ranks), "--store", store, "--rank"]
        others = [subprocess.Popen([*command, str(rank)]) for rank in range(1, given.ranks)]
        try:
            answer(GlooModel(0, given.ranks, store), given.way or [*WAYS], SHORT_CASES if given.short else CASES)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
