"""What a sum over ranks costs where a step has one: by the norm that reads it, and by NCCL with a norm behind it.

    python -m services.worker.benchmark.sums --shards 2 --size 4096 --rows 1 2 4 8 16 32 64 128 256

Prints a line for each number of rows: us of a sum and its norm, in graphs of 64 of each, and of the norm alone.
`FEW_BYTES` of cuda/ranks.py follows it.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from services.worker.benchmark.options import device_of, print_line
from services.worker.benchmark.ranks import other_ranks
from services.worker.cuda.nccl import Nccl
from services.worker.cuda.peer_memory import share_memory
from services.worker.cuda.ranks import LOOKS
from services.worker.engine_config import add_rank_flags
from services.worker.kernels.norm import add_rms_norm
from services.worker.kernels.peers import MOST_LOOKS, STATE_SIZE, Seat
from services.worker.kernels.rows import Rows, Scaled
from services.worker.rank_file import RankFile

_SUMS = 64
_REPLAYS = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.benchmark.sums", description=__doc__)
    parser.add_argument("--device", default="cuda", help="of each rank, one each (cuda)")
    parser.add_argument("--shards", type=int, default=2, help="ranks (2)")
    parser.add_argument("--size", type=int, default=4096, help="of a row (4096)")
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="numbers of rows")
    add_rank_flags(parser)
    told = sys.argv[1:] if arguments is None else list(arguments)
    given = parser.parse_args(told)
    if given.rank:
        _measure(given, RankFile(given.memory_fd, given.rank, given.shards))
        return 0
    with other_ranks(given.shards, "services.worker.benchmark.sums", told) as link:
        _measure(given, RankFile(link.memory_fd, 0, given.shards))
    return 0


def _measure(given: argparse.Namespace, file: RankFile) -> None:
    device = device_of(given.device, file.rank)
    most_rows, size = max(given.rows), given.size
    num_words = Seat.words_of(size, torch.bfloat16)
    memory = share_memory(Seat.num_bytes(most_rows, file.world_size, num_words), file, device)
    state = torch.zeros(STATE_SIZE, dtype=torch.int32, device=device)
    state[MOST_LOOKS] = LOOKS
    counts = torch.zeros(most_rows, dtype=torch.int32, device=device)
    seat = Seat(file.rank, file.world_size, memory.seat_addresses(0, device), counts, num_words, state)
    nccl = Nccl(file)
    weight = torch.ones(size, dtype=torch.bfloat16, device=device)
    for num_rows in given.rows:
        delta, residual, out = torch.zeros((3, num_rows, size), dtype=torch.bfloat16, device=device)

        normed = partial(add_rms_norm, Scaled(delta), residual, weight, 1e-5, Rows(out), pdl=True)
        own_us = _us([partial(normed, seat)], file)
        nccl_us = _us([partial(nccl.sum, delta), normed], file)
        norm_us = _us([normed], file)
        if file.rank == 0:
            print_line(
                rows=num_rows,
                kib=num_rows * size * 2 / 1024,
                own_us=round(own_us, 2),
                nccl_us=round(nccl_us, 2),
                norm_us=round(norm_us, 2),
                state=state.tolist(),
            )


def _us(launches: Sequence[Callable[[], None]], file: RankFile) -> float:
    """Median time of these launches, many times in a graph that all ranks replay at once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in [*launches] * _SUMS:
            launch()
    took = []
    for _ in range(_REPLAYS):
        file.board.exchange(b"")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Ranks come at different times; with this one they are in step.
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(1000 * begin.elapsed_time(end) / _SUMS)
    return float(statistics.median(took[3:]))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
