"""Waits that a deployment may choose; each schedule draws its own, so that no order of events is left out."""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Timing:
    """Times in ms."""

    step: float = 25.0
    flush: float = 100.0
    resume_grace: float = 700.0
    link: float = 2.0
    """Most that a message between worker and gateway takes, where the link is not slowed."""
    silent: float = 700.0
    """A stream without news for so long is looked up in Redis."""
    engine_restart: float = 200.0
    window: float = 900.0
    """How long recovery waits for what processes hold."""
    room: int = 3
    """Requests that a worker may hold."""


def draw_timing(rng: Random) -> Timing:
    """A schedule's timing."""
    return Timing(
        step=rng.choice((15.0, 25.0, 40.0)),
        flush=rng.choice((40.0, 100.0, 400.0)),
        resume_grace=rng.choice((60.0, 250.0, 700.0)),
        link=rng.choice((2.0, 2.0, 30.0, 120.0)),
        silent=rng.choice((150.0, 700.0)),
        engine_restart=rng.choice((50.0, 400.0)),
        window=rng.choice((250.0, 900.0)),
        room=rng.choice((1, 2, 3)),
    )
