"""What can be wrong with a model's file."""

from pathlib import Path

from services.common.ending import UnfitError


class ModelFileError(UnfitError):
    """A model's file is absent, foreign, damaged or lacks something; the message says which, where, and what to do."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"
