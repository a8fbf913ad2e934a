"""An engine's process as the measuring one sees it."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engine.protocol import Answer

REPLY_LIMIT_S = 600.0
"""Longest that loading, or one run, may take."""
END_LIMIT_S = 30.0
LOG_LINES_SHOWN = 15
REPOSITORY = Path(__file__).parents[2]


class EngineFailedError(Exception):
    """An engine died, or did not reply in time. The text names it, and has the end of its log."""


class EngineChild:
    """A process that serves `protocol`. Used as a context manager: it is gone afterwards, with all it started."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it; `environment` comes on top of this process's own."""
        self.name = name
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=REPOSITORY,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id; what it started are its descendants."""
        return self._process.pid

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        """Have it load; return what it is. Raises EngineFailedError."""
        return str(self._ask({"do": "load", "model": str(model), "settings": dict(settings)})["about"])

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Have it answer. Raises EngineFailedError."""
        return Answer(**self._ask({"do": "run", "prompts": prompts, "max_tokens": max_tokens}))

    def _ask(self, command: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
        except BrokenPipeError as cause:
            raise self._failed("died before it was asked to", command) from cause
        if not select.select([self._process.stdout], [], [], REPLY_LIMIT_S)[0]:
            raise self._failed(f"did not reply within {REPLY_LIMIT_S:.0f} s when asked to", command)
        reply = self._process.stdout.readline()
        if not reply.endswith("\n"):
            raise self._failed(f"died with status {self._process.wait()} when asked to", command)
        return dict(json.loads(reply))

    def _failed(self, how: str, command: Mapping[str, object]) -> EngineFailedError:
        tail = "\n".join(
            f"  {line[:300]}" for line in self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        )
        return EngineFailedError(f"{self.name} {how} {command['do']}. The end of {self._log}:\n{tail}")
