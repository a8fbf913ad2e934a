"""A service that notes when requests and tokens pass, for `hops`: its own program, with notes around a few functions.

    SHOAL_BENCH_NOTES=folder python -m benchmarks.gateway.noted services.gateway --listen ...

All processes of a machine have one monotonic clock. So the mean time of a hop is the mean of when its end was passed
less the mean of when its beginning was, over the same requests: no two notes need be told to belong together.
"""

import functools
import importlib
import inspect
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTES_VARIABLE = "SHOAL_BENCH_NOTES"


@dataclass(frozen=True, slots=True)
class Seam:
    """A function by which requests or tokens pass."""

    event: str
    module: str
    function: str
    """Possibly of a class: `Class.method`."""
    num: Callable[..., int] = lambda *_: 1
    """How many pass, by its arguments."""
    at_end: bool = False
    """They pass when it returns, not when it is called."""


def _inputs(_: object, request: Any, __: object) -> int:
    return len(request.inputs)


def _outputs(_: object, done: Any) -> int:
    return sum(len(output.token_ids) for output in done.outputs)


def _frames(_: object, message: Any, __: object) -> int:
    return sum(len(frame.delta.token_ids) for frame in message.frames)


SEAMS: Mapping[str, Sequence[Seam]] = {
    "services.gateway": (
        Seam("gateway called", "services.gateway.generation", "Generation.start"),
        Seam("encode asked", "services.gateway.tokenizer_client", "TokenizerClient.encode"),
        Seam("encode answered", "services.gateway.tokenizer_client", "TokenizerClient.encode", at_end=True),
        Seam("submit asked", "services.common.store.requests", "RequestStore.submit"),
        Seam("gateway has token", "services.gateway.delivery", "DeliveryService.route", _frames),
    ),
    "services.tokenizer": (
        Seam("tokenizer called", "services.tokenizer.server", "TokenizerService.encode_all", _inputs),
        Seam("tokenizer answers", "services.tokenizer.server", "TokenizerService.encode_all", _inputs, at_end=True),
    ),
    "services.scheduler": (Seam("place asked", "services.common.store.requests", "RequestStore.place"),),
    "benchmarks.gateway.paced_worker": (
        Seam("worker starts", "services.worker.front.session", "Session._start"),
        Seam("front has token", "services.worker.front.session", "Session._step_done", _outputs),
    ),
}


class Notes:
    """When how many passed, by event; us of the monotonic clock."""

    def __init__(self) -> None:
        self.passed: dict[str, list[tuple[int, int]]] = {}

    def around(self, seam: Seam, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted."""

        def note(arguments: tuple[Any, ...]) -> None:
            if num := seam.num(*arguments):
                self.passed.setdefault(seam.event, []).append((time.monotonic_ns() // 1000, num))

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*arguments: Any, **named: Any) -> Any:
                if not seam.at_end:
                    note(arguments)
                result = await function(*arguments, **named)
                if seam.at_end:
                    note(arguments)
                return result

            return awaited

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            note(arguments)
            return function(*arguments, **named)

        return called


def main() -> None:
    """Run the service named by the first argument; write its notes when it ends."""
    service = sys.argv.pop(1)
    notes = Notes()
    for seam in SEAMS[service]:
        *class_name, name = seam.function.split(".")
        owner: Any = importlib.import_module(seam.module)
        for part in class_name:
            owner = getattr(owner, part)
        setattr(owner, name, notes.around(seam, getattr(owner, name)))
    try:
        runpy.run_module(service, run_name="__main__", alter_sys=True)
    finally:
        Path(os.environ[NOTES_VARIABLE], f"{service}.json").write_text(json.dumps(notes.passed))


if __name__ == "__main__":
    main()
