"""How a service ends that cannot go on: one line that says why, and a status that says whether to try again."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from services.common.error_groups import flat

UNFIT_STATUS = 78
"""Nothing that a retry would mend: EX_CONFIG of sysexits.h."""


class UnfitError(Exception):
    """What it was given cannot be used: a flag, a model, a machine. The text says what to do; no retry mends it."""

    shown_in_logs = True


@contextmanager
def ending_with(service: str, *expected: type[Exception]) -> Iterator[None]:
    """End the process at errors of these kinds: each one's own words on standard error, and a status.

    UNFIT_STATUS if no retry mends any of them, else 1. Other errors pass, behind the words of those in their group.
    """
    status = 0
    try:
        yield
    except* expected as group:
        errors = flat(group)
        for error in errors:
            print(f"{service}: {error}", file=sys.stderr, flush=True)
        status = UNFIT_STATUS if all(isinstance(error, UnfitError) for error in errors) else 1
    # Not in the block above: of a group's errors, it would make a group of the exit.
    if status:
        sys.exit(status)
