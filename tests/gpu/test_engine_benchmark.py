"""The engine's benchmark runs requests through planner, loop and runner, and prints a line a run."""

import json
from pathlib import Path

import pytest

from services.worker.benchmark.engine import main
from services.worker.benchmark.profile import MadeUpStep
from tests.gpu.devices import DEVICE

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_a_line_says_how_many_tokens_a_load_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    requests = [{"token_ids": [5, 6, 7], "max_tokens": 2}, {"token_ids": [8] * 20, "max_tokens": 3}]
    load = tmp_path / "mine.jsonl"
    load.write_text("\n".join(map(json.dumps, requests)))
    sizes = ["--num-blocks", "8", "--block-size", "16", "--max-sequences", "2", "--max-prefill-tokens", "32"]
    engine = ["--device", DEVICE.type, "--model", str(tmp_path), "--dummy", "--dtype", "float32", *sizes]
    assert main([*engine, "--context-tokens", "64", "--load", str(load)]) == 0
    ready, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["num_blocks"] == 8
    assert (line["workload"], line["dtype"], line["kv_dtype"]) == ("mine", "float32", "float32")
    assert (line["requests"], line["prompt_tokens"], line["output_tokens"]) == (2, 23, 5)
    # Both are rounded: to whole ms, of which a device takes four, and to tenths.
    longest_s, shortest_s = line["seconds"] + 0.0006, line["seconds"] - 0.0006
    assert 5 / longest_s - 0.06 <= line["tokens_per_s"] <= 5 / shortest_s + 0.06


def test_a_steps_shape_is_read_and_its_sequences_share_no_block() -> None:
    plan = MadeUpStep.parse("3x2@127+1x70@0").plan(64)
    assert [(len(chunk.token_ids), chunk.first_position) for chunk in plan.chunks] == [(2, 127)] * 3 + [(70, 0)]
    assert sorted(block for chunk in plan.chunks for block in chunk.block_table) == list(range(11))
