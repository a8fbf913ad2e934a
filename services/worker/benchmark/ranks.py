"""The engine that a benchmark measures; if it has several ranks, the others are a process each.

python -m services.worker.benchmark.ranks --fd 5 --rank 1 --memory-fd 3 --bell-fds 4 --model DIR --shards 2 ...
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from services.common.config import ConfigError
from services.common.model.errors import ModelFileError
from services.worker.benchmark.options import Engine, add_engine_options, load_engine
from services.worker.cuda.rank_runner import LeadingRunner, follow, watch_ranks
from services.worker.engine.runner import RanksLostError
from services.worker.engine_config import RANKS_LOST_STATUS, add_rank_flags, as_flags
from services.worker.plan_ring import PlanReader, PlanWriter
from services.worker.rank_file import RankFile
from services.worker.rank_links import RankLink, rank_links

RANK_MODULE = "services.worker.benchmark.ranks"


@contextmanager
def engine_of(arguments: argparse.Namespace, told: Sequence[str] | None) -> Iterator[Engine]:
    """Start the engine, in this process and its other ranks, which are gone when the block ends.

    `told`: the flags that `arguments` were read of; None: the process's own. Raises as `load_engine`.
    """
    if arguments.shards == 1:
        rank = load_engine(arguments)
        yield Engine(rank, rank.runner)
        return
    with other_ranks(arguments.shards, RANK_MODULE, sys.argv[1:] if told is None else told) as link:
        file = RankFile(link.memory_fd, 0, arguments.shards)
        rank = load_engine(arguments, 0, file)
        beats = watch_ranks(file)
        yield Engine(rank, LeadingRunner(rank.runner, PlanWriter(file.plans, link.bells)))
        if beats:
            beats.stop()


@contextmanager
def other_ranks(shards: int, module: str, options: Sequence[str]) -> Iterator[RankLink]:
    """Start ranks 1 and up, and give what rank 0 needs; they are gone when the block ends.

    `module`: their program; `options`: its own, beside those of `add_rank_flags`.
    """
    fronts: list[socket.socket] = []
    processes: list[subprocess.Popen[bytes]] = []
    with rank_links(shards) as links:
        try:
            for link in links[1:]:
                ours, theirs = socket.socketpair()
                fronts.append(ours)
                told = as_flags({"fd": theirs.fileno(), **link.told})
                command = [sys.executable, "-m", module, *told, *options]
                with theirs:
                    processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno(), *link.fds]))
                # Theirs alone: when they are gone, it is closed.
                (bell,) = link.bells
                bell.close()
            yield links[0]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            for front in fronts:
                front.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a rank; return the process's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m services.worker.benchmark.ranks", description=__doc__, allow_abbrev=False
    )
    add_engine_options(parser)
    add_rank_flags(parser)
    given, _ = parser.parse_known_args(arguments)
    file = RankFile(given.memory_fd, given.rank, given.shards)
    try:
        runner = load_engine(given, given.rank, file).runner
        # As rank 0's in a profile: zeros are read with less power.
        runner.cache.fill_randomly()
        front, bell = socket.socket(fileno=given.fd), socket.socket(fileno=int(given.bell_fds))
        plans = PlanReader(file.plans, given.rank, bell, front)
        watch_ranks(file)
        follow(runner, plans)
    except RanksLostError as error:
        print(f"benchmark: rank {given.rank}: {error}", file=sys.stderr)
        return RANKS_LOST_STATUS
    except (ConfigError, ModelFileError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
