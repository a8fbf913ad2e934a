"""Takes the figures: every engine on every workload in turn, round after round."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import psutil

from benchmarks.engine.child import REPOSITORY, EngineChild
from benchmarks.engine.engines import Engine
from benchmarks.engine.load import BESIDE_LOAD_CORES, LoadMeter
from benchmarks.engine.workloads import Workload

MEMORY = "memory"
"""Stands in an engine's and a workload's place in the figures of the memory's bandwidth, GB/s."""
WARM_UP_ROUND = -1
WAKE_TOKENS = 8
"""An engine that waited is woken by so many tokens before its time is taken."""
LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One engine's figure on one workload in one round."""

    engine: str
    workload: str
    round_number: int
    value: float
    others_cores: float
    """Cores that others used meanwhile, waiting engines among them."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """What it generated, stream by stream."""
    try_number: int = 0
    """Prompts are other ones in each try."""

    @property
    def is_beside_load(self) -> bool:
        """Whether others used so much of the machine that the figure says little."""
        return self.others_cores > BESIDE_LOAD_CORES


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, and how."""

    engines: Sequence[Engine]
    workloads: Sequence[Workload]
    num_rounds: int
    model: Path
    f32_model: Path
    vocabulary_size: int
    seed: int
    patience_s: float
    """How long a figure may wait for a calm machine, and be taken again, before one taken beside load is kept."""
    environment: Mapping[str, str]
    """Of every engine."""
    logs: Path


class Session:
    """All engines, loaded and warm: one computes while the others wait for a line. A context manager."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """`say` is told of progress."""
        self._run = run
        self._say = say
        self._children: dict[str, EngineChild] = {}
        self._stack = ExitStack()
        self.about: dict[str, str] = {}
        """What each engine says of itself."""

    def __enter__(self) -> Self:
        """Start all. Raises EngineFailedError."""
        with ExitStack() as stack:
            for engine in self._run.engines:
                self._say(f"loading {engine.name}")
                child = stack.enter_context(start(engine, self._run))
                model = self._run.f32_model if engine.reads_f32_file else self._run.model
                self.about[engine.name] = child.load(model, engine.settings)
                self._children[engine.name] = child
                for workload in self._run.workloads:
                    self._take(engine.name, workload, WARM_UP_ROUND, 0)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def figures(self) -> Iterator[Figure]:
        """Measure: neighbours in time are the engines on one workload, as their ratio counts. Raises EngineFailedError,
        and ValueError if an engine did other work than it was asked to."""
        for round_number in range(self._run.num_rounds):
            yield self._when_calm(partial(memory_figure, self._run.environment, round_number))
            for workload in self._run.workloads:
                # There and back, so that nobody always comes behind the same neighbour.
                for engine in self._run.engines[:: -1 if round_number % 2 else 1]:
                    yield self._when_calm(partial(self._take, engine.name, workload, round_number))

    def _when_calm(self, take: Callable[[int], Figure]) -> Figure:
        """Take a figure, again while others disturb it and patience lasts; return the least disturbed one."""
        deadline_s = time.monotonic() + self._run.patience_s
        tries: list[Figure] = []
        while not tries or (tries[-1].is_beside_load and time.monotonic() < deadline_s):
            await_calm(deadline_s)
            tries.append(take(len(tries)))
        best = min(tries, key=lambda figure: figure.others_cores)
        self._say(
            f"round {best.round_number + 1}, {best.workload}, {best.engine}: {best.value:.1f}"
            f"{' beside load' if best.is_beside_load else ''} ({best.others_cores:.2f} cores, try {len(tries)})"
        )
        return best

    def _take(self, name: str, workload: Workload, round_number: int, try_number: int) -> Figure:
        child = self._children[name]
        prompts = workload.prompts(self._run.seed, round_number, try_number, self._run.vocabulary_size)
        child.run([prompts[0][0][:WAKE_TOKENS]], WAKE_TOKENS)
        load = LoadMeter.start(child.pid)
        answers = [child.run(repeat, workload.output_tokens) for repeat in prompts]
        return Figure(
            name,
            workload.name,
            round_number,
            workload.figure(answers),
            load.others_cores(),
            tuple(tuple(token_ids) for answer in answers for token_ids in answer.token_ids),
            try_number,
        )


def start(engine: Engine, run: Run) -> EngineChild:
    """Start an engine's process."""
    command = [str(engine.python), "-m", engine.module]
    return EngineChild(engine.name, command, {**run.environment, **engine.environment}, run.logs / f"{engine.name}.log")


def memory_figure(environment: Mapping[str, str], round_number: int, try_number: int) -> Figure:
    """Measure the memory's bandwidth."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine.memory"],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        text=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        load = LoadMeter.start(process.pid)
        value = float(process.stdout.readline())
        others_cores = load.others_cores()
    return Figure(MEMORY, MEMORY, round_number, value, others_cores, try_number=try_number)


def await_calm(deadline_s: float) -> None:
    """Wait until nobody uses the machine, or `time.monotonic` says the deadline; look at least once, for a second."""
    num_cores = psutil.cpu_count() or 1
    while psutil.cpu_percent(LOOK_S) / 100 * num_cores > BESIDE_LOAD_CORES and time.monotonic() < deadline_s:
        pass
