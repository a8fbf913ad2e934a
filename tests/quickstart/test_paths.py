"""Each path of docs/quickstart.md, run as it is written."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.docker.images import BUILD_LIMIT_S
from tests.quickstart.document import ROOT, paths, setup

MAX_COMMANDS = 5
PATH_LIMIT_S = 240
ANSWER = "The capital of France is Paris."
LOCAL, COMPOSE, KUBERNETES, PYTHON, GRPC = paths()


def follow(path: str, folder: Path) -> str:
    """Run a path's commands in the root, up to the first that fails; its fleet is in a folder of its own."""
    environment = {
        **os.environ,
        "SHOAL_STATE_DIR": str(folder / "fleet"),
        "COMPOSE_PROJECT_NAME": f"path-{os.getpid()}",
    }
    script = "\n".join(["set -euo pipefail", *paths()[path]])
    try:
        done = _bash(script, environment)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    finally:
        # Again the last command, which ends what was started: for a path that did not get so far.
        if "down" in paths()[path][-1]:
            _bash(paths()[path][-1], environment)


def _bash(script: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATH_LIMIT_S,
        check=False,
    )  # fmt: skip


def test_there_are_five_of_a_few_commands() -> None:
    assert len(paths()) == 5
    for title, commands in paths().items():
        assert 1 <= len(commands) <= MAX_COMMANDS, title


def test_what_comes_first_is_what_every_target_of_make_does_first() -> None:
    """`make test` has run it: the tests need what it makes."""
    assert setup() == ["make setup"]


def test_local(tmp_path: Path) -> None:
    assert ANSWER in follow(LOCAL, tmp_path)


@pytest.mark.docker
@pytest.mark.timeout(BUILD_LIMIT_S + PATH_LIMIT_S)
def test_compose(images: dict[str, str], tmp_path: Path) -> None:
    assert ANSWER in follow(COMPOSE, tmp_path)


def test_kubernetes(tmp_path: Path) -> None:
    try:
        assert "INFO" in follow(KUBERNETES, tmp_path)
    finally:
        (ROOT / "shoal.yaml").unlink(missing_ok=True)


def test_python(tmp_path: Path) -> None:
    said = follow(PYTHON, tmp_path)
    assert "prompt tokens" in said
    assert "finished" in said


def test_plain_grpc(tmp_path: Path) -> None:
    assert "ocean" in follow(GRPC, tmp_path).lower()
