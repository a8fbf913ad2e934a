"""`shoal up`: a fleet that answers, heals and leaves nothing behind."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from tests.fleet.conftest import Fleet, run_shoal, start_fleet

KINDS = ["gateway", "tokenizer", "scheduler", "worker", "engine", "redis"]


def ask(fleet: Fleet, case: dict[str, Any]) -> None:
    """The case's answer, token for token."""
    with fleet.client() as client:
        stream = client.generate(messages=case["messages"], temperature=0, max_tokens=case["max_tokens"])
        text = stream.read()
    assert list(stream.token_ids) == case["output_token_ids"]
    assert text.rstrip("\ufffd") == case["text"].rstrip("\ufffd")
    assert stream.finished is not None
    assert stream.finished.reason == case["finish_reason"]
    assert stream.finished.usage.completion_tokens == len(case["output_token_ids"])


@pytest.fixture(scope="module")
def case(greedy_cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A short one."""
    return next(case for case in greedy_cases if case["name"] == "chat_capital")


def test_it_answers_as_the_reference(fleet: Fleet, case: dict[str, Any]) -> None:
    assert sorted({process.kind for process in fleet.processes}) == sorted(KINDS)
    ask(fleet, case)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_killed_is_started_again_at_its_place(fleet: Fleet, case: dict[str, Any], kind: str) -> None:
    (before,) = fleet.of_kind(kind)
    num_lines = len(fleet.lines)
    os.kill(before.pid, signal.SIGKILL)
    fleet.await_lines(num_lines + 1)
    (after,) = fleet.of_kind(kind)
    assert after.pid != before.pid
    assert (after.address, after.log) == (before.address, before.log)
    ask(fleet, case)


def test_status_shows_the_line(fleet: Fleet) -> None:
    shown = fleet.command("status")
    assert shown.returncode == 0
    assert [process["pid"] for process in json.loads(shown.stdout)["processes"]] == [p.pid for p in fleet.processes]


def test_generate_answers_a_file_in_its_order(fleet: Fleet, greedy_cases: list[dict[str, Any]], tmp_path: Path) -> None:
    cases = sorted(greedy_cases, key=lambda case: len(case["prompt_token_ids"]) + case["max_tokens"])[:5]
    broken = {"name": "broken", "prompt": "hi", "temperature": "hot"}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(case) + "\n" for case in [*cases, broken]))
    done = fleet.command(
        "generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"),
        "--concurrency", "3", "--temperature", "0",
    )  # fmt: skip
    assert done.returncode == 1
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["name"] for result in results] == [*(case["name"] for case in cases), "broken"]
    assert [result["token_ids"] for result in results[:-1]] == [case["output_token_ids"] for case in cases]
    assert results[-1]["error"]["code"] == "INVALID_ARGUMENT"


def test_generate_prints_text_or_json(fleet: Fleet) -> None:
    text = fleet.command("generate", "--temperature", "0", "--max-tokens", "5", input="The sea is")
    whole = fleet.command("generate", "--temperature", "0", "--max-tokens", "5", "--json", "The sea is")
    assert (text.returncode, whole.returncode) == (0, 0)
    answer = json.loads(whole.stdout)
    assert text.stdout == answer["text"] + "\n"
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_chat_remembers_what_was_said(fleet: Fleet) -> None:
    chat = fleet.command(
        "chat", "--temperature", "0", "--max-tokens", "12", input="My name is Ada.\nWhat is my name?\n"
    )
    assert chat.returncode == 0
    assert "Ada" in chat.stdout


def test_a_second_fleet_in_the_same_directory_is_refused(fleet: Fleet) -> None:
    second = fleet.command("up")
    assert second.returncode == 1
    assert "runs in" in second.stderr
    assert "shoal down" in second.stderr


def test_down_leaves_no_process(start: Callable[..., Fleet]) -> None:
    fleet = start("--gateways", "2", "--schedulers", "2")
    descendants = fleet.descendants()
    assert len(descendants) >= len(fleet.processes)
    down = fleet.command("down")
    assert down.returncode == 0, down.stderr
    assert fleet.supervisor.wait(10) == 0
    assert not [process for process in descendants if process.is_running()]
    assert fleet.command("status").returncode == 1


def test_a_killed_supervisor_takes_all_with_it(tmp_path: Path) -> None:
    fleet = start_fleet(tmp_path)
    descendants = fleet.descendants()
    fleet.supervisor.kill()
    fleet.supervisor.wait()
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive


def test_a_detached_fleet_stays_until_down(tmp_path: Path) -> None:
    up = run_shoal(tmp_path, "up", "--detach")
    try:
        assert up.returncode == 0, up.stderr
        processes = json.loads(up.stdout)["processes"]
        gateways = [process["address"] for process in processes if process["kind"] == "gateway"]
        with shoal.Client(gateways) as client:
            assert client.list_models()
    finally:
        down = run_shoal(tmp_path, "down")
    assert down.returncode == 0, down.stderr
    assert not [process for process in processes if psutil.pid_exists(process["pid"])]


def test_a_stopped_fleet_comes_back_on_its_data(tmp_path: Path) -> None:
    first = start_fleet(tmp_path)
    with first.client() as client:
        client.generate("The sea is", request_id="kept", max_tokens=3, temperature=0).read()
    first.stop()
    second = start_fleet(tmp_path)
    try:
        with second.client() as client:
            assert client.get_request("kept").state is shoal.RequestState.FINISHED
    finally:
        second.stop()


def test_weights_of_8_bits_answer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_WEIGHTS", "int8")
    fleet = start_fleet(tmp_path)
    try:
        with fleet.client() as client:
            question = [{"role": "user", "content": "What is the capital of France?"}]
            assert "Paris" in client.generate(messages=question, temperature=0, max_tokens=12).read()
    finally:
        fleet.stop()


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    def complaint(*words: str) -> str:
        began = time.monotonic()
        done = run_shoal(tmp_path, *words)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert time.monotonic() - began < 30
        return done.stderr

    assert "shoal up" in complaint("status")
    assert "shoal up" in complaint("down")
    assert "shoal up" in complaint("generate", "hello")
    assert "nothing.gguf" in complaint("up", "--model", str(tmp_path / "nothing.gguf"))
    (tmp_path / "text.gguf").write_text("this is no model")
    assert "text.gguf" in complaint("up", "--model", str(tmp_path / "text.gguf"))
    assert "redis://127.0.0.1:1" in complaint("up", "--redis", "redis://127.0.0.1:1")
    assert "host:port" in complaint("generate", "--gateways", "localhost", "hello")
