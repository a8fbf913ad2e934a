"""`shoal bench engine` and `shoal bench profile`: an engine on a device, without a fleet.

The engine is a process of its own, as a worker's is: the requests go to it as files, one for each seed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from shoal.bench.ask import Ask, LoadError, read_asks
from shoal.bench.workloads import WARM_UP_SEED, WORKLOADS, asks_of

ENGINE, PROFILE = "services.worker.benchmark.engine", "services.worker.benchmark.profile"
MAX_CONFIG_BYTES = 1 << 20


def run_engine(workload: str, seeds: Sequence[int], model: Path, options: Sequence[str]) -> int:
    """Measure a workload of a name, one line a seed, or of a file. Returns the process's exit status.

    `options` are the engine's, as `python -m services.worker.benchmark.engine --help` lists them. Raises LoadError.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        loads = _write_loads(workload, seeds, model, Path(folder))
        warm_up, *measured = map(str, loads)
        command = [sys.executable, "-m", ENGINE, "--model", str(model), *options]
        return subprocess.run([*command, "--warm-up", warm_up, "--load", *measured], check=False).returncode


def run_profile(model: Path, options: Sequence[str]) -> int:
    """Look at steps, kernel by kernel; options as `python -m services.worker.benchmark.profile --help` lists them."""
    return subprocess.run([sys.executable, "-m", PROFILE, "--model", str(model), *options], check=False).returncode


def _write_loads(workload: str, seeds: Sequence[int], model: Path, folder: Path) -> list[Path]:
    """Write the files: that of the warm-up, then those that are measured."""
    if workload not in WORKLOADS:
        path = Path(workload)
        if not path.exists():
            raise LoadError(f"{workload!r} is no file, and none of the workloads {', '.join(WORKLOADS)}")
        written = write_load(folder / path.name, read_asks(path))
        return [written, written]
    num_tokens = vocabulary_tokens(model)
    return [
        write_load(folder / f"{workload}-{seed}.jsonl", asks_of(workload, seed, num_tokens))
        for seed in (WARM_UP_SEED, *seeds)
    ]


def write_load(path: Path, asks: Iterable[Ask]) -> Path:
    """Write a file of requests, as an engine alone reads it; with those of a process, when they arrive. Returns the
    path. Raises LoadError."""
    with path.open("w", encoding="utf-8") as out:
        for ask in asks:
            if not ask.token_ids:
                raise LoadError("an engine alone takes prompts as token_ids only")
            line: dict[str, object] = {"token_ids": ask.token_ids, "max_tokens": ask.max_tokens}
            if ask.arrival_s:
                line["arrival_s"] = ask.arrival_s
            out.write(json.dumps(line) + "\n")
    return path


def vocabulary_tokens(model: Path) -> int:
    """Return how large the vocabulary of a model's folder is. Raises LoadError."""
    path = model / "config.json"
    try:
        return int(json.loads(path.read_bytes()[:MAX_CONFIG_BYTES])["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{path} does not say the model's vocab_size: {error!r}") from error
