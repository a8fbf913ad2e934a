"""`make chaos`: many faults on one fleet, with figures.

    python -m tests.chaos --faults 200 --seed 1
    python -m tests.chaos --faults 12 --worker-deaths-only

With --worker-deaths-only, workers and engines are killed so far apart that another one is well each time: the pause
that a worker's death alone makes.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.chaos.storm import (
    SHORT_CONTEXT_TOKENS,
    Report,
    context_tokens,
    deaths_of_workers,
    faults,
    inflict,
    run_storm,
)
from tests.fleet.conftest import start_fleet


def main() -> int:
    """Run one storm; status 1 if any answer was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker-deaths-only", action="store_true", help="kill workers and engines, 12 s apart")
    arguments = parser.parse_args()
    reference = Path(__file__).parent.parent / "reference" / "smollm2_greedy.jsonl"
    cases = [json.loads(line) for line in reference.read_text().splitlines()]
    if arguments.worker_deaths_only:
        plan = deaths_of_workers(arguments.faults, pause_s=12.0)
        cases = [case for case in cases if context_tokens(case) <= SHORT_CONTEXT_TOKENS]
    else:
        plan = faults(arguments.seed, arguments.faults)
    state_dir = Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    fleet = start_fleet(state_dir, "--gateways", "2", "--schedulers", "2", "--workers", "2")
    report = Report()
    try:
        storm = inflict(fleet, plan, report)
        asyncio.run(run_storm(fleet, cases, storm, arguments.seed, report))
    finally:
        fleet.stop()
    print(*report.faults, report.summary(), sep="\n")
    if report.failed:
        print("FAILED", *report.failed, f"logs are in {state_dir}/log", sep="\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
