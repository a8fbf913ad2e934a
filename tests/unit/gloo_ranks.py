"""Ranks that meet through gloo, as a reference: `python -m tests.unit.gloo_ranks RANK WORLD_SIZE STORE NAMES` takes
part in reference cases ("a,b", or "all": two minutes), and rank 0 prints what was answered, as JSON, by name.
"""

import ctypes
import json
import sys
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
from tests.unit.test_runner_reference import CASES, generate, greedy

NUM_BLOCKS, BLOCK_SIZE_TOKENS = 1024, 16


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

    def __init__(self, config: DecoderConfig, rank: RankRunner) -> None:
        self.config = config
        self._rank = rank

    def runner(self, num_blocks: int, block_size_tokens: int) -> "GlooRunner":
        assert (num_blocks, block_size_tokens) == (NUM_BLOCKS, BLOCK_SIZE_TOKENS)
        return self

    def launch(self, plan: StepPlan) -> FinishedStep:
        dist.broadcast_object_list([plan], src=0)
        result = self._rank.compute(plan)
        assert result is not None
        return FinishedStep(result)

    def prepare(self) -> bool:
        return False


def main(rank: int, world_size: int, store: str, names: str) -> None:
    cases = [case for case in CASES if names == "all" or case["name"] in names.split(",")]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    stored = open_decoder(read_stored_model(default_model_path()))
    ranks = GlooRanks(Shard(rank, world_size))
    decoder = Decoder(stored.config, load_decoder(stored, pack_float32, lambda share: None, ranks.shard), ranks)
    cache = PagedKvCache(decoder.config, NUM_BLOCKS, BLOCK_SIZE_TOKENS)
    runner = RankRunner(decoder, cache, ranks, DealtVocabulary(ranks, stored.config))
    if rank == 0:
        answers = generate(GlooRunner(stored.config, runner), [greedy(n, case) for n, case in enumerate(cases, 1)])
        dist.broadcast_object_list([None], src=0)
        print(json.dumps({cases[number - 1]["name"]: tokens for number, (tokens, _) in answers.items()}))
        return
    told: list[StepPlan | None] = [None]
    while True:
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        runner.compute(told[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
