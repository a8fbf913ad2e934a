"""Images, as `deploy/build` makes them, once for all tests; where no Docker engine answers, each is skipped by name."""

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "tokenizer", "scheduler", "worker")
BUILD_LIMIT_S = 900


def run(*command: str, limit_s: float = 60, **environ: str) -> str:
    """A command's output. Fails with all that it said."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False, env={**os.environ, **environ}
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def docker() -> None:
    """A Docker engine answers."""
    try:
        done = subprocess.run(["docker", "version"], capture_output=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("no `docker` is installed")
    if done.returncode:
        pytest.skip("no Docker engine answers")


@pytest.fixture(scope="session")
def images(docker: None) -> dict[str, str]:
    """The name of each service's image, built from what lies here; of old layers only what changed is built."""
    # Where pip itself has brought torch for the CPU, PyTorch's index is not asked.
    torch = ["--torch-from-pip"] if metadata.version("torch").endswith("+cpu") else []
    sizes = run("deploy/build", *torch, limit_s=BUILD_LIMIT_S)
    print(sizes)
    return {name.removeprefix("shoal-").partition(":")[0]: name for name in sizes.split() if name.startswith("shoal-")}


def inspect(image: str) -> dict[str, Any]:
    """What the engine knows of an image."""
    described: dict[str, Any] = json.loads(run("docker", "image", "inspect", image))[0]
    return described
