"""`shoal top`: the fleet as it works."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shoal.fleet.errors import FleetError
from shoal.fleet.figures import FleetFigures, WorkerFigures, figures, read
from shoal.fleet.running import find_running
from shoal.fleet.state_dir import find_state_dir

_ABOUT = """Shows workers, batches, KV use, queue, tokens a second and the time to the first token, until Ctrl-C, by
the metrics of `shoal up --metrics`. Rates and percentiles are those of the last interval."""
_CLEAR = "\x1b[H\x1b[J"


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "top", help="show the fleet as it works", description=_ABOUT, allow_abbrev=False
    )
    parser.add_argument("--metrics", metavar="ADDR,..", help="host:port of each process' metrics (`shoal up` here)")
    parser.add_argument("--interval-s", type=_interval, default=1.0, metavar="S", help="time between readings (1)")
    parser.add_argument("--once", action="store_true", help="show one interval and leave")
    parser.add_argument("--json", action="store_true", help="one JSON object an interval")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Read, wait, read, show."""
    before = read(_addresses(arguments))
    while True:
        time.sleep(arguments.interval_s)
        # Looked up each time: with `shoal up --autoscale` workers come and go.
        now = read(_addresses(arguments))
        shown = figures(before, now)
        if arguments.json:
            print(json.dumps(asdict(shown)), flush=True)
        else:
            clear = "" if arguments.once or not sys.stdout.isatty() else _CLEAR
            print(clear + "\n".join(lines_of(shown)), flush=True)
        if arguments.once:
            return 0
        before = now


def lines_of(shown: FleetFigures) -> list[str]:
    """For a person."""
    leader = "" if shown.leaders else "; NO LEADER"
    return [
        f"{shown.tokens_per_s:.1f} tokens/s, {shown.requests_per_s:.1f} requests/s, "
        f"{shown.refusals_per_s:.1f} refused/s; {shown.open_streams} streams, {shown.queued} queued{leader}",
        f"first token p50 {_number(shown.ttft_p50_ms)} ms, p99 {_number(shown.ttft_p99_ms)} ms; "
        f"{len(shown.workers)} workers, {shown.workers_wanted} wanted",
        "",
        f"{'worker':<22}{'tokens/s':>9}{'batch':>7}{'running':>9}{'waiting':>9}{'KV':>6}{'step ms':>9}{'token ms':>10}"
        f"{'preempted':>11}",
        *map(_line, shown.workers),
        *(f"{address}: does not answer" for address in shown.away),
    ]


def _line(worker: WorkerFigures) -> str:
    return (
        f"{worker.address:<22}{worker.tokens_per_s:>9.1f}{_number(worker.batch):>7}{worker.running:>9}{worker.waiting:>9}"
        f"{worker.kv_usage:>6.0%}{_number(worker.step_ms):>9}{_number(worker.inter_token_ms):>10}{worker.preemptions:>11}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _addresses(arguments: argparse.Namespace) -> list[str]:
    if arguments.metrics:
        return [address.strip() for address in arguments.metrics.split(",") if address.strip()]
    processes = find_running(find_state_dir()).processes
    addresses = list(dict.fromkeys(each["metrics_address"] for each in processes if "metrics_address" in each))
    if not addresses:
        raise FleetError("this fleet serves no metrics: start it by `shoal up --metrics`, or name them by --metrics")
    return addresses


def _interval(text: str) -> float:
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = math.nan
    if not 0.1 <= interval_s <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.1 to 3600")
    return interval_s
