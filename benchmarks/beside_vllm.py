"""Shoal's engine and vLLM's on one GPU, one after the other, under the same requests; dummy weights of one shape.

    python -m benchmarks.beside_vllm --model DIR --dtype bf16 --workload mixed prefill --vllm-path SITE

Prints what each measured, a JSON object a load, and then for each workload the medians over its seeds, their ratio and
the ratios of the seeds. With `--online 10:150`, vLLM's engine also has so many requests of `mixed` at so many a second:
beside `shoal bench serve --rate 10 --requests 150`, which asks a whole fleet for the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.bench.engine import ENGINE, vocabulary_tokens, write_load
from shoal.bench.workloads import WARM_UP_SEED, WORKLOADS, asks_of, at_poisson_times

VLLM = Path(__file__).parent / "peers" / "vllm_gpu.py"
Rates = Mapping[str, Mapping[str, float]]
"""Tokens a second by workload and seed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_vllm", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model's folder: its shape is taken")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the weights (bf16)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["mixed"], help="which (mixed)")
    parser.add_argument("--seeds", type=int, default=3, help="of each workload (3)")
    parser.add_argument(
        "--online", nargs="*", default=[], metavar="RATE:REQUESTS", help="loads of mixed, for vLLM alone"
    )
    parser.add_argument("--vllm-path", default="", metavar="SITE", help="the folder that vLLM is installed in")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="beside-vllm-") as name:
        folder, vocabulary = Path(name), vocabulary_tokens(given.model)
        warm_up = [
            write_load(
                folder / f"warm-up-{workload}.jsonl", islice(asks_of(workload, WARM_UP_SEED, vocabulary), number)
            )
            for workload, number in (("mixed", 128), ("prefill", 16))
        ]
        loads = [
            write_load(folder / f"{workload}-{seed}.jsonl", asks_of(workload, seed, vocabulary))
            for workload in given.workload
            for seed in range(given.seeds)
        ]
        online = [
            write_load(
                folder / f"online_{rate}-0.jsonl",
                at_poisson_times(list(islice(asks_of("mixed", 0, vocabulary), number)), 0, rate),
            )
            for rate, number in (map(int, load.split(":")) for load in given.online)
        ]
        engine = ["--model", given.model, "--dtype", given.dtype, "--warm-up", *warm_up, "--load"]
        ours = _measured([sys.executable, "-m", ENGINE, "--dummy", *engine, *loads], {})
        theirs = _measured([sys.executable, VLLM, *engine, *loads, *online], {"PYTHONPATH": given.vllm_path})
    for line in compared(_rates(ours), _rates(theirs)):
        print(line)
    return 0


def compared(ours: Rates, theirs: Rates) -> list[str]:
    """Return a line for each workload: medians, their ratio, and the ratios of the seeds."""
    lines = []
    for workload, rates in ours.items():
        others = theirs[workload]
        medians = statistics.median(rates.values()), statistics.median(others.values())
        of_seeds = ", ".join(f"{rate / others[seed]:.3f}" for seed, rate in rates.items())
        lines.append(f"{workload}: {medians[0]:,.1f} / {medians[1]:,.1f} = {medians[0] / medians[1]:.3f} ({of_seeds})")
    return lines


def _measured(command: Sequence[str | Path], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Run an engine; what it said of each load. Raises CalledProcessError."""
    said, environment = [], {**os.environ, **environment}
    with subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout
        for line in engine.stdout:
            if line.startswith("{"):
                print(line, end="", flush=True)
                said.append(json.loads(line))
    if engine.returncode:
        raise subprocess.CalledProcessError(engine.returncode, engine.args)
    return [figures for figures in said if "workload" in figures]


def _rates(said: Iterable[Mapping[str, Any]]) -> Rates:
    """Generated tokens a second or, of `prefill`, prompts'."""
    rates: dict[str, dict[str, float]] = defaultdict(dict)
    for figures in said:
        if "tokens_per_s" in figures:
            workload, seed = figures["workload"].rsplit("-", 1)
            rates[workload][seed] = figures["prompt_tokens_per_s" if workload == "prefill" else "tokens_per_s"]
    return rates


if __name__ == "__main__":
    sys.exit(main())
