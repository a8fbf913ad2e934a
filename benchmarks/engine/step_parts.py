"""Where a step's time goes: `python -m benchmarks.engine.step_parts --model model.gguf` prints one JSON line a kind.

Shoal's engine, alone in this process, with timers put around the seams of its step from outside; the parts of the
forward pass are timed by the kernels. Each kind of step is measured with and without: what the timers cost themselves
is told beside the parts.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.engine.load import LoadMeter
from benchmarks.engine.shoal_alone import ShoalEngine
from benchmarks.engine.workloads import Workload
from services.worker.cpu_kernels.structures import PARTS
from services.worker.runner.batch import BatchInputs
from services.worker.runner.kv_cache import PagedKvCache
from services.worker.runner.models.decoder import Decoder

REST = "loop, events"
"""Of a step, what is in no seam."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A function whose time is a part of a step. What is called inside of it counts as its own, unless it is `open`:
    then the seams inside keep theirs."""

    part: str
    module: str
    function: str
    """Possibly of a class: `Class.method`."""
    is_open: bool = False


_WORKER = "services.worker"
FORWARD = Seam("forward's rest", f"{_WORKER}.runner.models.decoder", "Decoder.forward")
"""The kernels time the parts of it."""
SEAMS = (
    Seam("planning", f"{_WORKER}.engine.planner", "Planner.plan"),
    Seam("planning", f"{_WORKER}.engine.planner", "Planner.complete"),
    Seam("batch building", f"{_WORKER}.runner.cpu_runner", "make_batch"),
    FORWARD,
    Seam("logits", f"{_WORKER}.runner.models.decoder", "Decoder.logits"),
    Seam("sampling", f"{_WORKER}.runner.cpu_runner", "sample"),
    Seam("runner's rest", f"{_WORKER}.runner.cpu_runner", "CpuRunner.launch", is_open=True),
)


@dataclass(frozen=True, slots=True)
class StepKind:
    """Steps that are alike, and the run that has them."""

    name: str
    num_streams: int
    prompt_tokens: int
    output_tokens: int

    @property
    def is_prefill(self) -> bool:
        """Whether the whole prompt is wanted, as one, instead of steps that only decode."""
        return self.output_tokens == 1


KINDS = (
    StepKind("decode, 1 row", 1, 128, 64),
    StepKind("decode, 8 rows", 8, 128, 48),
    StepKind("decode, 32 rows", 32, 128, 96),
    StepKind("prefill, 512 tokens", 1, 512, 1),
)
REPEATS = 2


@dataclass(frozen=True, slots=True)
class StepParts:
    """The parts of one kind of step."""

    kind: str
    step_ms: float
    """Without timers; median."""
    timed_ms: float
    """With timers; mean, as the parts'."""
    parts_ms: dict[str, float]
    others_cores: float


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where a run stands between two steps."""

    at_s: float
    num_tokens: int
    parts_s: dict[str, float]


@dataclass(slots=True)
class PartTimer:
    """Adds up the time of parts. The seams that are being timed share one."""

    parts_s: dict[str, float] = field(default_factory=dict)
    _inner_s: list[float] = field(default_factory=list)
    """Of each open seam that is running: what seams inside it took."""
    _is_closed: bool = False

    def around(self, seam: Seam, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed as a part."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_closed:
                return function(*arguments, **named)
            self._is_closed = not seam.is_open
            self._inner_s.append(0.0)
            began_s = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took_s = perf_counter() - began_s
                self._is_closed = False
                own_s = took_s - self._inner_s.pop()
                self.parts_s[seam.part] = self.parts_s.get(seam.part, 0.0) + own_s
                if self._inner_s:
                    self._inner_s[-1] += took_s

        return timed

    def by_parts(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a forward pass whose parts are taken out of its seam's time."""

        @functools.wraps(forward)
        def timed(decoder: Decoder, batch: BatchInputs, cache: PagedKvCache) -> Tensor:
            decoder.part_s = torch.zeros(len(PARTS), dtype=torch.float64)
            hidden = forward(decoder, batch, cache)
            for part, seconds in zip(PARTS, decoder.part_s.tolist(), strict=True):
                self.parts_s[part] = self.parts_s.get(part, 0.0) + seconds
                self.parts_s[FORWARD.part] = self.parts_s.get(FORWARD.part, 0.0) - seconds
            return hidden

        return timed


@contextmanager
def timers(timer: PartTimer, seams: Sequence[Seam] = SEAMS) -> Iterator[None]:
    """Time all seams. Raises AttributeError if one is not there any more: the table above is to follow the code."""
    with ExitStack() as stack:
        for seam in seams:
            *class_name, name = seam.function.split(".")
            owner = importlib.import_module(seam.module)
            for part in class_name:
                owner = getattr(owner, part)
            function = getattr(owner, name)
            if seam is FORWARD:
                function = timer.by_parts(function)
            stack.enter_context(patch.object(owner, name, timer.around(seam, function)))
        yield


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocabulary-size", type=int, required=True)
    options = parser.parse_args()
    engine = ShoalEngine()
    engine.load(options.model, {})
    for kind in KINDS:
        print(json.dumps(asdict(measure(engine, kind, options.vocabulary_size))), flush=True)


def measure(engine: ShoalEngine, kind: StepKind, vocabulary_size: int) -> StepParts:
    """Run steps of a kind without timers, then with."""
    workload = Workload(kind.name, kind.num_streams, kind.prompt_tokens, kind.output_tokens, 2 * REPEATS + 1, "ms")
    warm_up, *prompts = workload.prompts(0, 0, 0, vocabulary_size)
    _steps(engine, kind, warm_up, PartTimer())
    load = LoadMeter.start(os.getpid())
    bare = [sum(parts.values()) for of_run in prompts[:REPEATS] for parts in _steps(engine, kind, of_run, PartTimer())]
    timer = PartTimer()
    with timers(timer):
        timed = [parts for of_run in prompts[REPEATS:] for parts in _steps(engine, kind, of_run, timer)]
    names = [*dict.fromkeys((*PARTS, *(seam.part for seam in SEAMS))), REST]
    parts_ms = {name: 1000 * statistics.fmean(parts.get(name, 0.0) for parts in timed) for name in names}
    return StepParts(kind.name, 1000 * statistics.median(bare), sum(parts_ms.values()), parts_ms, load.others_cores())


def _steps(
    engine: ShoalEngine, kind: StepKind, prompts: Sequence[Sequence[int]], timer: PartTimer
) -> list[dict[str, float]]:
    """Run prompts; return the seconds of each part, of each step that decodes all, or of a whole prefill as one."""
    marks: list[_Mark] = []
    engine.run(
        prompts,
        kind.output_tokens,
        lambda num_tokens: marks.append(_Mark(perf_counter(), num_tokens, dict(timer.parts_s))),
    )
    if kind.is_prefill:
        return [_between(marks[0], marks[-1])]
    full = [
        (before, after) for before, after in pairwise(marks) if after.num_tokens - before.num_tokens == len(prompts)
    ]
    # The first of them may have been the end of a prefill.
    return [_between(before, after) for before, after in full[1:]]


def _between(before: _Mark, after: _Mark) -> dict[str, float]:
    parts = {name: seconds - before.parts_s.get(name, 0.0) for name, seconds in after.parts_s.items()}
    return {**parts, REST: after.at_s - before.at_s - sum(parts.values())}


if __name__ == "__main__":
    main()
