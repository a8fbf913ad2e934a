"""Tokens a second of an engine alone: planner, loop and runner in this process, without a front, Redis or gRPC.

    python -m services.worker.benchmark.engine --model DIR --dummy --dtype bf16 --load one.jsonl two.jsonl

A load is a file of requests, a JSON object a line: `token_ids` and `max_tokens`. All of them wait from the beginning;
answers are as long as `max_tokens` says. Loads to warm up with are run before, not counted. Prints a line when the
engine is ready, and one for each load: `shoal bench engine` makes the files of a workload's name and seeds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.config import ConfigError
from services.common.garbage import collect_rarely
from services.common.model.errors import ModelFileError
from services.worker.benchmark.floors import floors_us
from services.worker.benchmark.options import Engine, add_engine_options, print_line
from services.worker.benchmark.ranks import engine_of
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.runner import RanksLostError
from services.worker.engine.step_plan import StepPlan
from services.worker.engine.step_time import ON_A_GPU, StepTimeModel
from services.worker.engine_config import RANKS_LOST_STATUS


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one file."""

    name: str
    requests: tuple[tuple[tuple[int, ...], int], ...]
    """Each one's prompt and number of tokens to generate."""

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(len(token_ids) for token_ids, _ in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all requests together."""
        return sum(max_tokens for _, max_tokens in self.requests)


def read_load(path: Path) -> Load:
    """Read a file of requests."""
    with path.open(encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines if line.strip()]
    return Load(path.stem, tuple((tuple(one["token_ids"]), int(one["max_tokens"])) for one in requests))


@dataclass
class LoadFront:
    """A front that has requests ready: as many are with the engine as it can take soon, as in a fleet."""

    load: Load
    most_in_engine: int
    first_id: int
    waiting: deque[engine_pb2.EngineCommand] = field(default_factory=deque)
    in_engine: int = 0
    num_tokens: int = 0
    first_token_s: dict[int, float] = field(default_factory=dict)
    began_s: float = 0.0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self.waiting.extend(
            engine_pb2.EngineCommand(add=_command(number, token_ids, max_tokens))
            for number, (token_ids, max_tokens) in enumerate(self.load.requests, self.first_id)
        )

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        """Give the engine what it has room for; Shutdown when all is done."""
        self.began_s = self.began_s or time.monotonic()
        if not self.waiting and not self.in_engine:
            return [engine_pb2.EngineCommand(shutdown=engine_pb2.EngineCommand.Shutdown())]
        given = []
        while self.waiting and self.in_engine < self.most_in_engine:
            given.append(self.waiting.popleft())
            self.in_engine += 1
        return given

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """Count what was generated."""
        now_s = time.monotonic()
        for output in event.done.outputs:
            self.num_tokens += len(output.token_ids)
            if output.token_ids:
                self.first_token_s.setdefault(output.sequence_id, now_s)
            if output.end:
                if output.error:
                    raise RuntimeError(f"request {output.sequence_id} failed: {output.error}")
                self.in_engine -= 1
                self.ended_s = now_s


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """A step that was made."""

    plan: StepPlan
    predicted_ms: float
    took_ms: float


class WatchedStepTime(StepTimeModel):
    """Remembers steps, what they were thought to take, and what they took."""

    def __init__(self, filled_up_to: Sequence[int]) -> None:
        super().__init__(ON_A_GPU, filled_up_to)
        self.steps: list[WatchedStep] = []

    def observe(self, plan: StepPlan, took_ms: float, launch_ms: float = 0.0) -> None:
        """Learn from a step; what was thought of it is what the model says just before."""
        self.steps.append(WatchedStep(plan, self.predict_ms(plan), took_ms))
        super().observe(plan, took_ms, launch_ms)


def _command(number: int, token_ids: Sequence[int], max_tokens: int) -> engine_pb2.AddSequence:
    payload = request_pb2.RequestPayload(
        prompt_token_ids=token_ids,
        max_tokens=max_tokens,
        sampling=inference_pb2.Sampling(temperature=0.0),
    )
    return engine_pb2.AddSequence(sequence_id=number, payload=payload)


def run_load(engine: Engine, load: Load, first_id: int, step_time: StepTimeModel) -> LoadFront:
    """Run a load on an empty cache of prefixes."""
    front = LoadFront(load, 2 * engine.rank.limits.max_sequences, first_id)
    planner = Planner(engine.rank.limits, step_time)
    EngineLoop(planner, step_time, engine.runner, front, lambda: time.monotonic() * 1000).run()
    return front


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.benchmark.engine", description=__doc__)
    add_engine_options(parser)
    parser.add_argument("--load", type=Path, nargs="+", required=True, metavar="FILE", help="requests to run")
    parser.add_argument("--warm-up", type=Path, nargs="+", metavar="FILE", help="loads to run before (the first)")
    given = parser.parse_args(arguments)
    try:
        with engine_of(given, arguments) as engine:
            _measure(engine, given)
    except (ConfigError, ModelFileError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except RanksLostError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return RANKS_LOST_STATUS
    return 0


def _measure(engine: Engine, given: argparse.Namespace) -> None:
    numbers: Iterator[int] = iter(range(1, 1 << 62, 1 << 20))
    step_time = WatchedStepTime(engine.rank.limits.filled_up_to)
    warm_ups = [run_load(engine, read_load(path), next(numbers), step_time) for path in given.warm_up or given.load[:1]]
    while engine.runner.prepare():
        pass
    # As the worker's process does: else a look for cycles of garbage takes 0.1 s in the midst of a load.
    collect_rarely()
    since_first_token_s = time.monotonic() - min(warm_ups[0].first_token_s.values())
    print_line(
        ready_s=round(engine.rank.start_s, 2),
        process_start_to_first_token_s=round(_process_age_s() - since_first_token_s, 2),
        num_blocks=engine.rank.limits.num_blocks,
        model=str(given.model),
    )
    for path in given.load:
        load = read_load(path)
        step_time.steps.clear()
        _report(engine, load, run_load(engine, load, next(numbers), step_time), step_time.steps)


def _process_age_s() -> float:
    """How long ago this process was started, imports and all (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")


def _report(engine: Engine, load: Load, front: LoadFront, steps: Sequence[WatchedStep]) -> None:
    seconds = front.ended_s - front.began_s
    took = [step.took_ms for step in steps]
    errors = [abs(step.predicted_ms - step.took_ms) / step.took_ms for step in steps]
    least_us = sum(sum(floors_us(engine, step.plan).values()) for step in steps)
    first = sorted(moment - front.began_s for moment in front.first_token_s.values())
    print_line(
        workload=load.name,
        dtype=engine.rank.options.weights,
        shards=engine.rank.shards,
        kv_dtype="fp8" if engine.rank.options.has_fp8_cache else engine.rank.options.weights.replace("fp8", "bf16"),
        tokens_per_s=round(front.num_tokens / seconds, 1),
        prompt_tokens_per_s=round(load.prompt_tokens / seconds, 1),
        seconds=round(seconds, 3),
        requests=len(load.requests),
        prompt_tokens=load.prompt_tokens,
        output_tokens=front.num_tokens,
        steps=len(took),
        step_ms_median=round(statistics.median(took), 3),
        step_time_error_median=round(statistics.median(errors), 3),
        share_of_floor=round(least_us / 1e6 / seconds, 3),
        device_waited_share=round(1 - sum(took) / 1000 / seconds, 4),
        ttft_ms_median=round(1000 * statistics.median(first), 1),
    )


if __name__ == "__main__":
    sys.exit(main())
