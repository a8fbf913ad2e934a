"""How the measuring process talks to an engine: JSON lines over the child's standard input and output.

    {"do": "load", "model": "/path/model.gguf", "settings": {}}   {"about": "torch 2.13.0"}
    {"do": "run", "prompts": [[5, 6], [7, 8]], "max_tokens": 2}   {"token_ids": [[9, 3], [4, 4]], "first_s": 1, ...}

The end of standard input ends the child. An engine is computing only between a line and its reply; whatever goes wrong
ends it with a traceback. Only the standard library is needed here: each engine has its own virtual environment.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine generated for prompts that it was given at once, and when, in seconds from then."""

    token_ids: Sequence[Sequence[int]]
    """In the order of the prompts."""
    first_s: float
    """The first token of any stream was known."""
    last_s: float
    """The last token of the last stream was known."""


class MeasuredEngine(Protocol):
    """What a child serves."""

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        """Get ready; return what is measured, with its versions. `settings` are the engine's own."""
        ...

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Answer all prompts at once, greedily, with exactly `max_tokens` each, end tokens ignored."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


def serve(engine: MeasuredEngine) -> None:
    """Be a child: obey until standard input ends."""
    # What libraries print goes to standard error: it is not ours.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            print(json.dumps(_reply(engine, json.loads(line))), file=replies, flush=True)
    finally:
        engine.close()


def _reply(engine: MeasuredEngine, command: dict[str, object]) -> dict[str, object]:
    match command:
        case {"do": "load", "model": str(model), "settings": dict(settings)}:
            return {"about": engine.load(Path(model), settings)}
        case {"do": "run", "prompts": list(prompts), "max_tokens": int(max_tokens)}:
            return asdict(engine.run(prompts, max_tokens))
        case _:
            raise ValueError(f"not a command: {str(command)[:200]}")
