"""Errors of tasks, which come in groups."""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def flat(group: BaseExceptionGroup[E]) -> list[E]:
    """The errors themselves, in order: groups of tasks nest them."""
    errors: list[E] = []
    for error in group.exceptions:
        errors += flat(error) if isinstance(error, BaseExceptionGroup) else [error]
    return errors
