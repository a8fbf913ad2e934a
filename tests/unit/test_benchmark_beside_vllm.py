"""`benchmarks.beside_vllm`: both engines get the same requests, and ratios are of medians and of seeds."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import beside_vllm

# Generates a token of every request that it has in each step.
FAKE_VLLM = """
import json
import os
import queue
from types import SimpleNamespace

class SamplingParams(SimpleNamespace):
    pass

class Engine:
    def __init__(self):
        self.added, self.running = queue.Queue(), {}

    def add_request(self, name, prompt, params):
        assert params.output_kind == "delta" and prompt["prompt_token_ids"]
        self.added.put((name, params.max_tokens))

    def step(self):
        while not self.added.empty() or not self.running:
            name, left = self.added.get()
            self.running[name] = left
        outputs = []
        for name in list(self.running):
            self.running[name] -= 1
            finished = self.running[name] == 0
            answer = [SimpleNamespace(token_ids=[7])]
            outputs.append(SimpleNamespace(request_id=name + "-ab12", finished=finished, outputs=answer))
            if finished:
                del self.running[name]
        return outputs

class LLM:
    def __init__(self, **options):
        assert options["load_format"] == "dummy"
        self.llm_engine = Engine()

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        with open(os.environ["SEEN_BY_VLLM"], "a") as seen:
            asks = zip((one["prompt_token_ids"] for one in prompts), (one.max_tokens for one in params))
            seen.write(json.dumps(list(asks)) + "\\n")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * one.max_tokens)]) for one in params]
"""
# Says what it was given.
FAKE_ENGINE = """
import json, os, pathlib, sys
loads = sys.argv[sys.argv.index("--load") + 1:]
assert "--warm-up" in sys.argv and "--dummy" in sys.argv
for load in map(pathlib.Path, loads):
    asks = [json.loads(line) for line in load.read_text().splitlines()]
    with open(os.environ["SEEN_BY_SHOAL"], "a") as seen:
        seen.write(json.dumps([[ask["token_ids"], ask["max_tokens"]] for ask in asks]) + "\\n")
    rates = {"tokens_per_s": sum(ask["max_tokens"] for ask in asks), "prompt_tokens_per_s": 1.0}
    print(json.dumps({"workload": load.stem, **rates}))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    return folder


def test_both_get_the_same_requests_and_vllm_also_gets_some_at_their_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(FAKE_VLLM)
    (site / "vllm" / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 'delta'\n")
    (tmp_path / "an_engine.py").write_text(FAKE_ENGINE)
    monkeypatch.setattr(beside_vllm, "ENGINE", "an_engine")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    by_shoal, by_vllm = tmp_path / "by_shoal", tmp_path / "by_vllm"
    monkeypatch.setenv("SEEN_BY_SHOAL", str(by_shoal))
    monkeypatch.setenv("SEEN_BY_VLLM", str(by_vllm))
    flags = ["--model", str(model), "--workload", "single", "batch32", "--seeds", "2", "--online", "200:12"]
    assert beside_vllm.main([*flags, "--vllm-path", str(site)]) == 0
    _mixed, _prefill, *asked = by_vllm.read_text().splitlines()
    assert asked == by_shoal.read_text().splitlines()
    *figures, single, batch32 = capsys.readouterr().out.splitlines()
    said = [json.loads(line) for line in figures]
    ours, (ready, *theirs) = said[:4], said[4:]
    assert ready["ready_s"] >= 0
    assert [one["workload"] for one in ours] == ["single-0", "single-1", "batch32-0", "batch32-1"]
    assert [one["workload"] for one in theirs] == [*(one["workload"] for one in ours), "online_200-0"]
    assert ours[0]["tokens_per_s"] == 512, "what one request of `single` generates"
    online = theirs[-1]
    assert len(online["ttft_ms"]) == len(online["itl_ms"]) == 3
    assert 0 <= online["ttft_ms"][0] <= online["ttft_ms"][2]
    assert single.startswith("single: 512.0 / ")
    assert batch32.startswith("batch32: 16,384.0 / ")


def test_ratios_are_of_medians_and_of_each_seed() -> None:
    ours = {"mixed": {"0": 110.0, "1": 90.0, "2": 120.0}}
    theirs = {"mixed": {"0": 100.0, "1": 100.0, "2": 80.0}}
    assert beside_vllm.compared(ours, theirs) == ["mixed: 110.0 / 100.0 = 1.100 (1.100, 0.900, 1.500)"]


def test_an_engine_that_fails_ends_the_comparison(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_vllm, "ENGINE", "no_such_engine")
    with pytest.raises(subprocess.CalledProcessError):
        beside_vllm.main(["--model", str(model), "--workload", "single", "--seeds", "1"])
