"""`make bench-engine` counts what was asked, compares like with like, and says so when it cannot."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import report
from benchmarks.engine.child import REPOSITORY, EngineChild, EngineFailedError
from benchmarks.engine.engines import ENGINES
from benchmarks.engine.figures import Figure
from benchmarks.engine.protocol import Answer
from benchmarks.engine.ratios import COMPARISONS, Comparison, ratio_of
from benchmarks.engine.workloads import DECODE, STREAMS_8, TTFT_512, WORKLOADS

AT_LEAST = Comparison(DECODE, "ours", "theirs", 1.3)
AT_MOST = Comparison(TTFT_512, "ours", "theirs", 0.85)


def figures(
    ours: Sequence[float], theirs: Sequence[float], workload: str = "decode", load: float = 0.0
) -> list[Figure]:
    return [
        Figure(engine, workload, number, value, load)
        for engine, values in (("ours", ours), ("theirs", theirs))
        for number, value in enumerate(values)
    ]


def answer(num_streams: int, num_tokens: int, first_s: float = 0.5, last_s: float = 2.0) -> Answer:
    return Answer([[7] * num_tokens for _ in range(num_streams)], first_s, last_s)


# Workloads


def test_decoding_is_timed_from_the_first_token_to_the_last() -> None:
    assert DECODE.figure([answer(1, 128, first_s=1.0, last_s=3.0)]) == 127 / 2


def test_the_time_to_the_first_token_is_the_median_of_the_repeats_in_ms() -> None:
    assert TTFT_512.figure([answer(1, 1, first_s) for first_s in (0.9, 0.3, 0.4)]) == 400


def test_streams_are_counted_over_the_whole_time_prefill_included() -> None:
    assert STREAMS_8.figure([answer(8, 64, last_s=4.0)]) == 8 * 64 / 4


@pytest.mark.parametrize("wrong", [answer(8, 63), answer(7, 64)])
def test_an_engine_that_did_less_than_it_was_asked_to_has_no_figure(wrong: Answer) -> None:
    with pytest.raises(ValueError, match="8 of 64 were asked for"):
        STREAMS_8.figure([wrong])


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_prompts_are_the_same_for_every_engine_and_new_in_each_round_and_try(workload: object) -> None:
    assert isinstance(workload, type(DECODE))
    prompts = workload.prompts(0, 1, 0, 49152)
    assert prompts == workload.prompts(0, 1, 0, 49152)
    assert [len(repeat) for repeat in prompts] == [workload.num_streams] * workload.repeats
    draws = [workload.prompts(0, round_number, try_number, 49152) for round_number in (1, 2) for try_number in (0, 1)]
    first_tokens = {tuple(prompt[:16]) for draw in draws for repeat in draw for prompt in repeat}
    assert len(first_tokens) == len(draws) * workload.num_streams * workload.repeats


# Ratios


def test_a_ratio_is_taken_round_by_round_and_its_median_is_held_to_the_bound() -> None:
    # The machine was half as fast in the second round, for both.
    ratio = ratio_of(AT_LEAST, figures([40, 20, 45], [30, 15, 30]))
    assert ratio
    assert [of_round.value for of_round in ratio.rounds] == pytest.approx([4 / 3, 4 / 3, 1.5])
    assert ratio.median == pytest.approx(4 / 3)
    assert ratio.is_met


@pytest.mark.parametrize(("ours", "is_met"), [(130, True), (129, False)])
def test_a_rate_is_to_be_at_least_the_bound(ours: float, is_met: bool) -> None:
    ratio = ratio_of(AT_LEAST, figures([ours], [100]))
    assert ratio
    assert ratio.is_met is is_met


@pytest.mark.parametrize(("ours", "is_met"), [(85, True), (86, False)])
def test_a_time_is_to_be_at_most_the_bound(ours: float, is_met: bool) -> None:
    ratio = ratio_of(AT_MOST, figures([ours], [100], "ttft512"))
    assert ratio
    assert ratio.is_met is is_met


def test_only_rounds_in_which_both_were_measured_count() -> None:
    ratio = ratio_of(AT_LEAST, figures([40, 20], [20]))
    assert ratio
    assert [of_round.value for of_round in ratio.rounds] == [2.0]
    assert ratio_of(AT_LEAST, figures([40], [])) is None


def test_a_ratio_beside_load_is_marked_in_the_table() -> None:
    calm = report.ratios_table(_as_issue(load=0.02), {})
    busy = report.ratios_table(_as_issue(load=0.5), {})
    assert "1.50 (1.50)" in calm
    assert "1.50 (1.50*)" in busy


def test_the_table_says_what_was_met_what_was_not_and_why_something_was_not_measured() -> None:
    table = report.ratios_table(_as_issue(), {"shoal-int8": "no setting"})
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert rows["decode: shoal ÷ transformers"].endswith("≥ 1.3   met")
    assert rows["decode: shoal ÷ llama.cpp-f32"].endswith("≥ 0.95  NOT met")
    assert "not measured: no setting" in rows["decode: shoal-int8 ÷ llama.cpp-q4_1"]


def test_rounds_beside_load_do_not_count_while_there_are_calm_ones() -> None:
    busy = figures([90, 80], [10, 10], load=0.5)
    calm = [Figure(engine, "decode", 2, value, 0.0) for engine, value in (("ours", 60.0), ("theirs", 40.0))]
    ratio = ratio_of(AT_LEAST, [*busy, *calm])
    assert ratio
    assert ratio.median == 1.5
    assert not ratio.is_beside_load
    only_busy = ratio_of(AT_LEAST, busy)
    assert only_busy
    assert only_busy.median == 8.5
    assert only_busy.is_beside_load


def test_a_verdict_without_a_calm_round_says_so() -> None:
    assert "met, but no round was calm" in report.ratios_table(_as_issue(load=0.5), {})


def _as_issue(load: float = 0.0) -> list[Figure]:
    values = {"shoal": 45.0, "transformers": 30.0, "llama.cpp-f32": 60.0}
    return [Figure(engine, "decode", 0, value, load) for engine, value in values.items()]


# Peers' environments


def test_a_peer_whose_environment_was_not_made_says_how_it_is_made() -> None:
    peer = replace(ENGINES["vllm-cpu"], venv=".venv-nothing")
    assert peer.why_not().endswith(".venv-nothing/bin/python is missing: run `make .venv-nothing/.done`")


def test_every_peer_is_compared_and_make_makes_its_environment() -> None:
    peers = [engine for engine in ENGINES.values() if engine.venv]
    assert {"vllm-cpu", "openvino-q4_1", "transformers", "llama.cpp-f32"} <= {peer.name for peer in peers}
    targets = (REPOSITORY / "Makefile").read_text()
    compared = {comparison.peer for comparison in COMPARISONS}
    for peer in peers:
        assert f"\n{peer.venv}/.done:" in targets
        assert peer.name in compared


# Engines' processes


def child(tmp_path: Path, program: str) -> EngineChild:
    return EngineChild("peer", [sys.executable, "-c", program], {}, tmp_path / "peer.log")


def test_an_engine_answers_over_its_pipes_whatever_its_libraries_print(tmp_path: Path) -> None:
    program = """
from benchmarks.engine.protocol import Answer, serve

class Echo:
    def load(self, model, settings):
        print("a library says hello")
        return f"{model} {settings['kv_cache']}"

    def run(self, prompts, max_tokens):
        return Answer([prompt[:max_tokens] for prompt in prompts], 0.25, 0.5)

    def close(self):
        print("closed")

serve(Echo())
"""
    with child(tmp_path, program) as engine:
        assert engine.load(Path("model.gguf"), {"kv_cache": "float32"}) == "model.gguf float32"
        assert engine.run([[5, 6, 7]], 2) == Answer([[5, 6]], 0.25, 0.5)
    assert "closed" in (tmp_path / "peer.log").read_text()


def test_an_engine_that_dies_is_named_with_its_status_and_its_last_words(tmp_path: Path) -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('no such instruction')"
    with child(tmp_path, program) as engine, pytest.raises(EngineFailedError) as failed:
        engine.load(Path("model.gguf"), {})
    assert "peer died with status 1 when asked to load" in str(failed.value)
    assert "no such instruction" in str(failed.value)


def test_an_engine_that_is_dead_already_is_named_too(tmp_path: Path) -> None:
    with child(tmp_path, "import sys; sys.exit('missing library')") as engine:
        engine._process.wait()
        with pytest.raises(EngineFailedError, match=r"peer died .*load(.|\n)*missing library"):
            engine.load(Path("model.gguf"), {})
