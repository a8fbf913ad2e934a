"""What can be wrong with a form of answers; apart from the compiler, whose library not every engine has."""


class FormatError(Exception):
    """A form that cannot be kept: the field of ResponseFormat, and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class GrammarError(Exception):
    """An answer cannot go on under its form; the text says why."""
