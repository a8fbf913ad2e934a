"""How a service ends that cannot go on: one line that says why, and a status that says whether to try again."""

import sys
from typing import NoReturn

UNFIT_STATUS = 78
"""Nothing that a retry would mend: EX_CONFIG of sysexits.h."""


class UnfitError(Exception):
    """What it was given cannot be used: a flag, a model, a machine. The text says what to do; no retry mends it."""

    shown_in_logs = True


def end_with(service: str, error: Exception) -> NoReturn:
    """Say each error's own words on standard error, and exit: with UNFIT_STATUS if no retry mends any of them, or 1."""
    errors = _flat(error)
    for each in errors:
        print(f"{service}: {each}", file=sys.stderr, flush=True)
    sys.exit(UNFIT_STATUS if all(isinstance(each, UnfitError) for each in errors) else 1)


def _flat(error: Exception) -> list[Exception]:
    """Groups of tasks nest them."""
    if not isinstance(error, ExceptionGroup):
        return [error]
    return [each for inner in error.exceptions for each in _flat(inner)]
