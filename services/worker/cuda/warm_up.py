"""Before a worker serves: every kernel is compiled, all at once, and some steps are made and timed.

A kernel that were compiled in the middle of a request would take as long as a hundred steps; and to the fleet, a worker
that makes no step for so long is lost.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any

from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.made_up_steps import every_kind, every_way_to_choose, usual
from services.worker.engine.limits import EngineLimits
from services.worker.engine.step_plan import StepPlan
from services.worker.engine.step_time import StepTimeModel


@contextmanager
def compiled_only(threads: int) -> Iterator[None]:
    """Kernels that are launched in here are compiled instead, so many at once. Left when all are there.

    Triton has a mode for it, in which a launch waits for its own kernel all the same; so each is told to be no launch.
    """
    run: Any = JITFunction.run

    def compile_it(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(threads, "kernels") as executor, AsyncCompileMode(executor) as mode:
        mode.submit = partial(_compile_all, mode.submit, defaultdict(Lock))
        JITFunction.run = compile_it
        try:
            yield
        finally:
            JITFunction.run = run


def _compile_all(
    submit: Any,
    building: Mapping[str, Lock],
    key: str,
    compile_fn: Callable[[], Any],
    finalize_fn: Callable[[Any], None],
    *more: Any,
) -> Any:
    """Have a kernel compiled, and the C function that launches kernels of its parameters, which Triton would build at
    its first launch.

    `building`: one at a time by a kernel's name, since most of its forms have one such function.
    """

    def with_launcher() -> Any:
        kernel = compile_fn()
        with building[kernel.src.fn.__name__]:
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel

    future = submit(key, with_launcher, finalize_fn, *more)
    # Known from now on, as in later versions of Triton: else each further launch hashes the kernel's source to find it.
    finalize_fn(future)
    return future


def compile_kernels(plain: CudaRunner, filling: CudaRunner, limits: EngineLimits, threads: int) -> None:
    """Compile what steps within these limits take; Triton's cache on disk has what was compiled before.

    `plain` computes steps as they are, `filling` fills them up: both are taken, and kernels have forms for each.
    """
    with compiled_only(threads):
        for plan in every_kind(limits):
            # Sums of ranks are not Triton's, and so are made: behind one, inputs might be written over others that are
            # not copied yet.
            plain.launch(plan).wait()
        filling.rehearse()


def warm_up(runner: CudaRunner, limits: EngineLimits, step_time: StepTimeModel) -> None:
    """Make some steps, so that what libraries load for them is there; then teach what steps take."""
    for plan in every_way_to_choose(limits):
        runner.launch(plan).result()
    for plan in usual(limits):
        step_time.observe(plan, *timed_ms(runner, plan))


def timed_ms(runner: CudaRunner, plan: StepPlan) -> tuple[float, float]:
    """Return what a step takes that follows another, and of it what the host takes to launch it (0: not asked)."""
    before, began_s = runner.launch(plan), time.monotonic()
    step = runner.launch(plan)
    launch_ms = 1000 * (time.monotonic() - began_s)
    before.result()
    result = step.result()
    if result.took_ms is None:
        return 1000 * (time.monotonic() - began_s), 0.0
    return result.took_ms, launch_ms
