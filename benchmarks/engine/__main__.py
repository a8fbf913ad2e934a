"""Shoal beside transformers and llama.cpp: `make bench-engine`, or `python -m benchmarks.engine --rounds 3`.

One run, one machine, the same weights, all interleaved: in each round every engine gets every workload in turn, and
each is a process of its own that waits for the others. Peers live in `.venv-peers`, which `make bench-engine` makes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

from benchmarks.engine import report
from benchmarks.engine.child import REPOSITORY, EngineFailedError
from benchmarks.engine.engines import ENGINES, Engine, Weights
from benchmarks.engine.f32_gguf import f32_copy
from benchmarks.engine.figures import Figure, Run, Session, await_calm
from benchmarks.engine.step_parts import StepParts
from benchmarks.engine.workloads import WORKLOADS
from services.common.model.gguf import GgufFile, read_gguf
from services.common.model.location import default_model_path
from services.worker.front.engine_client import ENGINE_ENVIRONMENT

FOLDER = REPOSITORY / ".shoal" / "bench"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> int:
    """Measure and print; return the exit status."""
    options = _options()
    file = read_gguf(default_model_path())
    FOLDER.mkdir(parents=True, exist_ok=True)
    asked = [ENGINES[name] for name in options.engines]
    not_measured = {engine.name: why for engine in asked if (why := engine.why_not())}
    run = Run(
        engines=[engine for engine in asked if engine.name not in not_measured],
        workloads=[WORKLOADS[name] for name in options.workloads],
        num_rounds=options.rounds,
        model=file.path,
        f32_model=f32_copy(file.path, FOLDER),
        vocabulary_size=file.tensor("token_embd.weight").shape[1],
        seed=options.seed,
        patience_s=options.patience_s,
        environment=AVX2 if options.avx2 else {},
        logs=FOLDER,
    )
    try:
        with Session(run, _say) as session:
            figures = list(session.figures())
        steps = measure_steps(run)
    except EngineFailedError as error:
        print(f"bench-engine: {error}", file=sys.stderr)
        return 1
    print_report(run, session.about, figures, steps, not_measured, file)
    if options.json:
        write_json(options.json, session.about, figures, steps)
    return 0


def measure_steps(run: Run) -> list[StepParts]:
    """Have Shoal's steps taken apart, in a process of their own. Raises EngineFailedError."""
    _say("where a step's time goes")
    await_calm(time.monotonic() + run.patience_s)
    module = "benchmarks.engine.step_parts"
    arguments = ["--model", str(run.model), "--vocabulary-size", str(run.vocabulary_size)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **ENGINE_ENVIRONMENT, **run.environment}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, env=environment, text=True, check=False
    )
    if done.returncode:
        raise EngineFailedError(f"{module} ended with status {done.returncode}; what it said is above")
    return [StepParts(**json.loads(line)) for line in done.stdout.splitlines()]


def print_report(
    run: Run,
    about: Mapping[str, str],
    figures: Sequence[Figure],
    steps: Sequence[StepParts],
    not_measured: Mapping[str, str],
    file: GgufFile,
) -> None:
    """Print all tables."""
    weight_bytes = {engine.name: weight_bytes_per_token(engine, file) for engine in run.engines}
    held = "; torch held to AVX2, while the bounds are for AVX-512" if run.environment else ""
    print(f"{run.model.stem}, {report.machine()}{held}")
    for name, text in about.items():
        print(f"  {name}: {text}")
    for part in (
        report.figures_table(run.engines, run.workloads, figures),
        report.ratios_table(figures, not_measured),
        report.memory_lines(run.engines, figures, weight_bytes),
        report.agreement_lines(run.engines, figures),
        f"where a step's time goes, shoal\n{report.step_table(steps)}",
        report.load_line(figures),
    ):
        print(f"\n{part}")


def write_json(path: Path, about: Mapping[str, str], figures: Sequence[Figure], steps: Sequence[StepParts]) -> None:
    """Write everything measured, tokens left out."""
    taken = [{key: value for key, value in asdict(figure).items() if key != "token_ids"} for figure in figures]
    content = {"machine": report.machine(), "about": dict(about), "figures": taken, "steps": [asdict(s) for s in steps]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def weight_bytes_per_token(engine: Engine, file: GgufFile) -> int:
    """Bytes of weights that a step reads at least: all, but of an embedding that is not the output head too."""
    tensors = [
        tensor
        for tensor in file.tensors.values()
        if tensor.name != "token_embd.weight" or "output.weight" not in file.tensors
    ]
    if engine.weights is Weights.AS_STORED:
        return sum(tensor.num_bytes for tensor in tensors)
    return int(sum(prod(tensor.shape) for tensor in tensors) * engine.weights.value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--engines", type=_names(ENGINES), default=list(ENGINES), metavar="A,B", help=", ".join(ENGINES)
    )
    parser.add_argument(
        "--workloads", type=_names(WORKLOADS), default=list(WORKLOADS), metavar="A,B", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--avx2", action="store_true", help="hold torch to AVX2; llama.cpp always is")
    parser.add_argument(
        "--patience-s",
        type=float,
        default=30.0,
        help="how long a figure may wait for others to leave the machine alone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; the least is 1")
    return options


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
