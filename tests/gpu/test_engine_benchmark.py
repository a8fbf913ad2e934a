"""The engine's benchmark runs requests through planner, loop and runner, and prints a line a run."""

import argparse
import json
from pathlib import Path

import pytest

from services.worker.benchmark.engine import main
from services.worker.benchmark.floors import FLOPS_PER_S, READ_BYTES_PER_S, floors_us
from services.worker.benchmark.options import Engine, add_engine_options, load_engine
from services.worker.benchmark.profile import MadeUpStep
from services.worker.engine.step_plan import StepPlan
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
    # Of a model that computes next to nothing the least time is next to nothing.
    assert 0 <= line["share_of_floor"] < 0.01
    assert -0.001 <= line["device_waited_share"] < 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 3}))
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    sizes = ["--num-blocks", "8", "--block-size", "16", "--max-sequences", "2", "--max-prefill-tokens", "64"]
    told = ["--device", DEVICE.type, "--model", str(folder), "--dummy", "--dtype", "float32", "--no-graphs", *sizes]
    rank = load_engine(parser.parse_args([*told, "--context-tokens", "64"]))
    return Engine(rank, rank.runner)


def test_the_least_that_decodes_take_is_the_time_to_read_weights_and_contexts(engine: Engine) -> None:
    floors = floors_us(engine, MadeUpStep.parse("2x1@39").plan(16))
    us_of_a_value = 4e6 / READ_BYTES_PER_S
    assert floors["qkv_proj"] == pytest.approx(3 * 64 * 32 * us_of_a_value)
    assert floors["gate_up_proj"] == pytest.approx(3 * 2 * 48 * 32 * us_of_a_value)
    assert floors["lm_head"] == pytest.approx(96 * 32 * us_of_a_value)
    assert floors["attention of decodes"] == pytest.approx(3 * 2 * 40 * 2 * 16 * us_of_a_value)
    assert "attention of chunks" not in floors


def test_contexts_that_decodes_share_are_read_once(engine: Engine) -> None:
    first, second = MadeUpStep.parse("2x1@39").plan(16).chunks
    shared = second._replace(block_table=(*first.block_table[:2], second.block_table[2]))
    floors = floors_us(engine, StepPlan(1, (first, shared)))
    assert floors["attention of decodes"] == pytest.approx(3 * (40 + 8) * 2 * 16 * 4e6 / READ_BYTES_PER_S)


def test_the_least_that_a_prompt_takes_is_its_flops_in_the_last_layer_for_sampled_rows_alone(engine: Engine) -> None:
    (chunk,) = MadeUpStep.parse("1x60@0").plan(16).chunks
    us_of_a_row = 2e6 * 2 * 48 * 32 / FLOPS_PER_S["float32"]
    us_to_read = 4e6 * 2 * 48 * 32 / READ_BYTES_PER_S
    assert floors_us(engine, StepPlan(1, (chunk,)))["gate_up_proj"] == pytest.approx(2 * 60 * us_of_a_row + us_to_read)
    floors = floors_us(engine, StepPlan(1, (chunk._replace(sample_index=None),)))
    assert floors["gate_up_proj"] == pytest.approx(2 * 60 * us_of_a_row)
    assert floors["qkv_proj"] == pytest.approx(3 * 60 * 2e6 * 64 * 32 / FLOPS_PER_S["float32"])
    assert "lm_head" not in floors


def test_a_steps_shape_is_read_and_its_sequences_share_no_block() -> None:
    plan = MadeUpStep.parse("3x2@127+1x70@0").plan(64)
    assert [(len(chunk.token_ids), chunk.first_position) for chunk in plan.chunks] == [(2, 127)] * 3 + [(70, 0)]
    assert sorted(block for chunk in plan.chunks for block in chunk.block_table) == list(range(11))
