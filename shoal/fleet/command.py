"""Starting a process that cannot outlive its supervisor."""

import asyncio
import ctypes
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import services

_PR_SET_PDEATHSIG = 1


async def start(command: Sequence[str], stdout: int, stderr: IO[bytes]) -> Process:
    """Start it as leader of a session of its own: Ctrl-C reaches the supervisor only, which ends all in order.

    To be called in the main thread: the kernel kills the child when the thread that started it ends.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with(os.getpid()),
        env=_environment(os.environ),
    )


def kill_session(leader_pid: int) -> None:
    """Kill a process, and what it started and left behind: engines, pool processes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader_pid, signal.SIGKILL)


def _die_with(parent_pid: int) -> Callable[[], None] | None:
    """What the child runs before its program: the kernel is to kill it when its parent is gone (prctl(2))."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def before_program() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)

    return before_program


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The children import the services from where they are imported here, also when nothing is installed."""
    ours = str(Path(str(services.__file__)).parent.parent)
    path = [ours, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
