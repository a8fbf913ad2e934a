"""Run schedules: `python -m simulator.protocol --schedules 10000 --first-seed 0 --jobs 2`, or one with its trace."""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

from simulator.protocol.defects import DEFECTS, planted
from simulator.protocol.faults import KINDS
from simulator.protocol.schedule import Verdict, run_schedule


def main() -> int:
    """Return 1 if any schedule broke an invariant."""
    parser = argparse.ArgumentParser(prog="python -m simulator.protocol", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many seeds to run")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes to run them in")
    parser.add_argument("--max-failures", type=int, default=10, help="stop after this many failing seeds")
    parser.add_argument("--seed", type=int, help="run only this seed")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="faults of this kind; may be repeated")
    parser.add_argument("--defect", choices=list(DEFECTS), help="break the protocol like this first")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    parser.add_argument("--paths", action="store_true", help="print how often each path was taken")
    options = parser.parse_args()
    with planted(options.defect) if options.defect else nullcontext():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    only = tuple(options.only or ())
    if options.seed is not None:
        verdict = run_schedule(options.seed, print if options.trace else None, only)
        print(f"seed {verdict.seed}: {verdict.violation or 'every invariant held'} ({verdict.ended_at_ms:.0f} ms)")
        return bool(verdict.violation)
    began = time.perf_counter()
    seeds = range(options.first_seed, options.first_seed + options.schedules)
    paths: Counter[str] = Counter()
    failures = num_run = 0
    for verdict in _verdicts(seeds, options.jobs, only):
        num_run += 1
        paths.update(verdict.stats)
        if verdict.violation:
            failures += 1
            print(f"seed {verdict.seed}: {verdict.violation}", flush=True)
            if failures >= options.max_failures:
                break
    took = time.perf_counter() - began
    if options.paths:
        for path, count in sorted(paths.items()):
            print(f"  {count:9d}  {path}")
    print(f"{num_run} schedules, {failures} broken, in {took:.0f} s ({num_run / took:.0f} a second)")
    return bool(failures)


def _verdicts(seeds: range, jobs: int, only: Sequence[str]) -> Iterator[Verdict]:
    run = partial(run_schedule, only=only)
    if jobs <= 1:
        yield from map(run, seeds)
        return
    with multiprocessing.Pool(jobs) as pool:
        yield from pool.imap_unordered(run, seeds, chunksize=50)


if __name__ == "__main__":
    sys.exit(main())
