"""`shoal bench engine` gives the engine's process the requests of each seed, and its options as they were given."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run; the files they name are read while they are there."""
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        seen.append([Path(part).read_text() if part.endswith(".jsonl") else part for part in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 128256}))
    return tmp_path


def requests_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_seed_is_a_load_and_another_one_warms_up(commands: list[list[str]], model: Path) -> None:
    asked = ["bench", "engine", "--device", "cuda", "--model", str(model), "--dummy", "--workload", "single"]
    assert main([*asked, "--dtype", "fp8", "--kv-dtype", "fp8", "--seeds", "3", "4"]) == 0
    (command,) = commands
    assert command[1:3] == ["-m", "services.worker.benchmark.engine"]
    flags = ["--model", str(model), "--device", "cuda", "--dtype", "fp8", "--kv-dtype", "fp8", "--dummy", "--warm-up"]
    assert command[3 : 3 + len(flags)] == flags
    warm_up, load, *loads = command[3 + len(flags) :]
    assert load == "--load"
    prompts = [request["token_ids"] for text in (warm_up, *loads) for request in requests_of(text)]
    assert [len(prompt) for prompt in prompts] == [512, 512, 512]
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_a_file_of_requests_is_a_load(commands: list[list[str]], model: Path) -> None:
    mine = model / "mine.jsonl"
    mine.write_text(json.dumps({"prompt_token_ids": [1, 2, 3], "max_tokens": 5}))
    assert main(["bench", "engine", "--model", str(model), "--workload", str(mine)]) == 0
    assert requests_of(commands[0][-1]) == [{"token_ids": [1, 2, 3], "max_tokens": 5}]


def test_an_unknown_workload_is_refused(
    commands: list[list[str]], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", "--model", str(model), "--workload", "enormous"]) == 1
    assert "enormous" in capsys.readouterr().err
    assert not commands
