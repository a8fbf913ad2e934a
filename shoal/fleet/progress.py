"""What a person sees on standard error while a fleet starts."""

from contextlib import suppress
from typing import TextIO

_STEPS_SHOWN = 4
"""Without a terminal, a line for each so many-th part of a process' loading."""


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line for each thing worth one."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rewrites = out.isatty()
        self._shown: dict[str, tuple[str, int]] = {}
        self._open_line = False

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(text + "\n")
        self._open_line = False

    def ready(self, name: str, num_ready: int, num_processes: int) -> None:
        """A process is ready."""
        text = f"shoal: {name} is ready ({num_ready} of {num_processes})"
        if self._rewrites and num_ready < num_processes:
            self._rewrite(text)
        else:
            self.say(text)

    def loading(self, name: str, what: str, fraction: float) -> None:
        """A process has come so far."""
        step = int(fraction * _STEPS_SHOWN)
        if self._rewrites:
            self._rewrite(f"shoal: {name}: {what} {fraction:.0%}")
        elif self._shown.get(name) != (what, step):
            self._shown[name] = (what, step)
            self.say(f"shoal: {name}: {what} {fraction:.0%}")

    def _rewrite(self, text: str) -> None:
        self._print(text)
        self._open_line = True

    def _print(self, text: str) -> None:
        # Who read it may have gone, as `| tee` at Ctrl-C; the fleet goes on, and is to be stopped.
        with suppress(BrokenPipeError):
            self._out.write(("\r\x1b[K" if self._open_line else "") + text)
            self._out.flush()
