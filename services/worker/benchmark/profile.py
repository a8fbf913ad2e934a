"""Where a step's time goes on a device, kernel by kernel, beside the least that it can take.

    python -m services.worker.benchmark.profile --model DIR --dummy --dtype bf16 --step 32x1@768 --step 4x2048@0

A step is SEQUENCESxTOKENS@CONTEXT: so many chunks of so many tokens, each behind so many cached ones; several such
with a + between them, as 16x1@768+1x496@0, are one step. A kernel's time is what passes from the end of the one in
front of it to its own end, so that all times add up to the step's. The least: of `floors.py`.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from services.common.config import ConfigError
from services.common.model.errors import ModelFileError
from services.worker.benchmark.floors import MATRICES, floors_us
from services.worker.benchmark.options import Engine, add_engine_options, print_line
from services.worker.benchmark.ranks import engine_of
from services.worker.engine.block_pool import BlockId
from services.worker.engine.sequence import SamplingParameters, SequenceId
from services.worker.engine.step_plan import SequenceChunk, StepPlan

TIMED_STEPS = 20
_OWN_KERNELS = {
    "nccl": "sum over ranks",
    "_decode_attention": "attention of decodes",
    "_merge_pieces": "attention of decodes",
    "_prefill_attention": "attention of chunks",
    "_rope_and_write": "rope and KV write",
    "_add_rms_norm": "residual and norm",
    "_gemv_swiglu": "gate_up_proj",
    "_gemv_rope": "qkv_proj",
    "_swiglu": "SwiGLU",
    "_round_rows": "rounding to fp8",
    "_embed": "embedding",
    "_best_of": "choice of tokens",
    "sdpa": "attention of chunks",
}
"""The first whose name is part of a kernel's."""
_PRODUCTS = ("gemm", "_gemv", "nvjet", "cutlass", "xmma", "_small_product", "_tile_product")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences of a step that are alike."""

    num_sequences: int
    num_tokens: int
    cached_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read SEQUENCESxTOKENS@CONTEXT. Raises ValueError."""
        chunks, cached = text.split("@")
        sequences, tokens = chunks.split("x")
        return cls(int(sequences), int(tokens), int(cached))


@dataclass(frozen=True, slots=True)
class MadeUpStep:
    """A step to look at; what decodes comes first."""

    name: str
    shapes: tuple[Shape, ...]

    @classmethod
    def parse(cls, text: str) -> "MadeUpStep":
        """Read shapes with a + between them. Raises ValueError."""
        return cls(text, tuple(map(Shape.parse, text.split("+"))))

    def plan(self, block_size_tokens: int) -> StepPlan:
        """Make the step; every sequence has blocks of its own."""
        chunks: list[SequenceChunk] = []
        num_blocks = 0
        for shape in self.shapes:
            own_blocks = -(-(shape.cached_tokens + shape.num_tokens) // block_size_tokens)
            for _ in range(shape.num_sequences):
                number = len(chunks)
                chunks.append(
                    SequenceChunk(
                        SequenceId(number + 1),
                        tuple((number * 7 + place) % 1000 for place in range(shape.num_tokens)),
                        shape.cached_tokens,
                        tuple(map(BlockId, range(num_blocks, num_blocks + own_blocks))),
                        SamplingParameters(),
                        0,
                    )
                )
                num_blocks += own_blocks
        return StepPlan(1, tuple(chunks))


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at steps; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.benchmark.profile", description=__doc__)
    add_engine_options(parser)
    parser.add_argument("--step", type=MadeUpStep.parse, action="append", required=True, metavar="NxT@C", help="a step")
    given = parser.parse_args(arguments)
    try:
        with engine_of(given, arguments) as engine:
            engine.runner.cache.fill_randomly()
            for step in given.step:
                _look(engine, step)
    except (ConfigError, ModelFileError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def _look(engine: Engine, step: MadeUpStep) -> None:
    plan = step.plan(engine.rank.limits.block_size_tokens)
    step_us, launch_us = _timed_us(engine, plan), _launch_us(engine, plan)
    floors = floors_us(engine, plan)
    times: dict[str, list[float]] = defaultdict(list)
    for name, took_us in _kernels(engine, plan):
        times[name].append(took_us)
    profiled_us = sum(map(sum, times.values()))
    print_line(
        step=step.name,
        dtype=engine.rank.options.weights,
        step_us=round(step_us, 1),
        launch_us=round(launch_us, 1),
        profiled_us=round(profiled_us, 1),
        floor_us=round(sum(floors.values()), 1),
        share_of_floor=round(sum(floors.values()) / step_us, 3),
    )
    for name, took in sorted(times.items(), key=lambda item: -sum(item[1])):
        print_line(
            kernel=name,
            calls=len(took),
            us=round(sum(took), 1),
            us_a_call=round(sum(took) / len(took), 2),
            share=round(sum(took) / profiled_us, 3),
            floor_us=round(floors.get(name, 0.0), 1),
        )


def _timed_us(engine: Engine, plan: StepPlan) -> float:
    """Median time from one step's end to the next one's, launched without waiting."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    engine.runner.launch(plan).result()
    for event in events:
        engine.runner.launch(plan)
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(1000 * a.elapsed_time(b) for a, b in pairwise(events)))


def _launch_us(engine: Engine, plan: StepPlan) -> float:
    """Median time that a launch takes the host, on a device that does nothing else."""
    launches_s = []
    for _ in range(TIMED_STEPS):
        began_s = time.monotonic()
        step = engine.runner.launch(plan)
        launches_s.append(time.monotonic() - began_s)
        step.result()
    return 1e6 * statistics.median(launches_s)


def _kernels(engine: Engine, plan: StepPlan) -> Iterator[tuple[str, float]]:
    """One step's kernels, by what they are for, and their times in us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.runner.launch(plan).result()
        torch.cuda.synchronize()
    events = sorted(
        (e for e in profile.events() if e.device_type.name == "CUDA" and "Memset" not in e.name),
        key=lambda e: e.time_range.end,
    )
    last_end_us: float | None = None
    num_products = 0
    num_of_layers = engine.rank.config.num_layers * len(MATRICES)
    for event in events:
        begin_us = event.time_range.start if last_end_us is None else last_end_us
        took_us, last_end_us = event.time_range.end - begin_us, event.time_range.end
        own = next((what for kernel, what in _OWN_KERNELS.items() if kernel in event.name), None)
        if own:
            num_products += own in MATRICES
            yield own, took_us
        elif "Memcpy" in event.name:
            yield "copies", took_us
        elif "reduce" in event.name.lower():
            # Of a product whose inputs cuBLAS has dealt out.
            yield _product_name(num_products - 1, num_of_layers), took_us
        elif any(part in event.name.lower() for part in _PRODUCTS):
            yield _product_name(num_products, num_of_layers), took_us
            num_products += 1
        else:
            yield f"other: {event.name[:40]}", took_us


def _product_name(index: int, num_of_layers: int) -> str:
    return MATRICES[index % len(MATRICES)] if index < num_of_layers else "lm_head"


if __name__ == "__main__":
    sys.exit(main())
