"""Figures of a load against closed forms."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.bench.answer import Answer
from shoal.bench.plot import write_plot
from shoal.bench.report import as_text
from shoal.bench.summary import Latency, Objective, Summary, latencies_s, percentile, summarize
from shoal.bench.target import TokenCounts


def an_answer(
    arrival_s: float, first_s: float, pauses_s: Sequence[float] = (), *, sent_s: float | None = None
) -> Answer:
    message_s = [first_s]
    for pause_s in pauses_s:
        message_s.append(message_s[-1] + pause_s)
    return Answer(
        arrival_s, arrival_s if sent_s is None else sent_s, message_s, message_s[-1], TokenCounts(len(message_s))
    )


def a_failure(kind: str, end_s: float = 1.0) -> Answer:
    return Answer(0.0, 0.0, [], end_s, TokenCounts(0), kind, "in its own words")


def of(summary: Summary, name: str) -> Latency:
    latency = summary.latencies[name]
    assert latency is not None
    return latency


def test_percentiles_of_an_even_grid_are_its_points() -> None:
    grid = [float(value) for value in range(101)]
    assert [percentile(grid, percent) for percent in (0, 50, 90, 99, 100)] == [0, 50, 90, 99, 100]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([7.0], 99) == 7.0


def test_each_latency_has_its_closed_form() -> None:
    # Request k of 0 to 100 gets its first token after k ms, then 10 more at pauses of 20 ms.
    answers = [an_answer(k, k + k / 1000, [0.02] * 10) for k in range(101)]
    summary = summarize(answers, Objective())
    assert of(summary, "TTFT").percentiles_ms == pytest.approx({50: 50, 90: 90, 99: 99})
    assert of(summary, "TTFT").mean_ms == pytest.approx(50)
    assert of(summary, "ITL").percentiles_ms == pytest.approx({50: 20, 90: 20, 99: 20})
    assert of(summary, "TPOT").percentiles_ms == pytest.approx({50: 20, 90: 20, 99: 20})
    assert of(summary, "E2E").percentiles_ms == pytest.approx({50: 250, 90: 290, 99: 299})
    assert summary.duration_s == pytest.approx(100.3)
    assert summary.output_tokens_per_s == pytest.approx(101 * 11 / 100.3)
    assert summary.requests_per_s == pytest.approx(101 / 100.3)


def test_what_was_cached_is_a_share_of_the_prompts_of_servers_that_tell() -> None:
    told, not_told = TokenCounts(1, prompt=30, cached=12), TokenCounts(1, prompt=50)
    answers = [Answer(0.0, 0.0, [1.0], 1.0, counts) for counts in (told, TokenCounts(1, prompt=10, cached=0), not_told)]
    assert summarize(answers, Objective()).cached_share == 0.3
    silent = summarize(answers[2:], Objective())
    assert silent.cached_share is None
    assert "cache" not in as_text("silent", silent, Objective(), answers[2:])


def test_latencies_begin_when_the_request_should_have_been_sent() -> None:
    late = an_answer(1.0, 2.0, [0.5], sent_s=1.75)
    assert late.time_to_first_token_s == 1.0
    assert late.end_to_end_s == 1.5
    assert summarize([late], Objective()).client_lag_ms == pytest.approx(750)


def test_tokens_that_come_together_share_their_time_but_are_one_pause() -> None:
    answer = Answer(0.0, 0.0, [1.0, 1.4], 1.4, TokenCounts(5))
    assert answer.inter_token_s == pytest.approx([0.4])
    assert answer.time_per_output_token_s == pytest.approx(0.1)


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    summary = summarize([an_answer(0.0, 0.5)], Objective())
    assert summary.latencies["TPOT"] is None
    assert summary.latencies["ITL"] is None
    assert of(summary, "E2E").mean_ms == 500


def test_goodput_counts_what_was_as_expected_and_no_failure() -> None:
    good = an_answer(0.0, 0.1, [0.02] * 99)
    answers = [good, an_answer(0.0, 0.3, [0.02] * 99), an_answer(0.0, 0.1, [0.2] * 99), a_failure("HTTP 500", 4.0)]
    assert summarize(answers, Objective(ttft_ms=200, itl_ms=50)).goodput_per_s == pytest.approx(1 / 19.9)
    assert summarize(answers, Objective(ttft_ms=200)).good_share == 0.5
    assert summarize(answers, Objective()).good_share == 0.75


def test_one_long_pause_in_a_hundred_is_forgiven_and_two_are_not() -> None:
    objective = Objective(itl_ms=50)
    assert objective.met_by(an_answer(0.0, 0.1, [0.02] * 100 + [1.0]))
    assert not objective.met_by(an_answer(0.0, 0.1, [0.02] * 99 + [1.0] * 2))


def test_failures_are_counted_by_kind_and_shown() -> None:
    answers = [an_answer(0.0, 0.5), a_failure("HTTP 429"), a_failure("HTTP 429"), a_failure("timeout")]
    summary = summarize(answers, Objective())
    assert dict(summary.errors) == {"HTTP 429": 2, "timeout": 1}
    text = as_text("a server", summary, Objective(), answers)
    assert "4 requests in 1.0 s, 3 failed" in text
    assert "2 HTTP 429: in its own words" in text
    assert "1 timeout: in its own words" in text


def test_a_load_of_failures_has_no_latencies() -> None:
    summary = summarize([a_failure("timeout")], Objective())
    assert set(summary.latencies.values()) == {None}
    assert summary.output_tokens_per_s == 0


def test_the_plot_is_svg_with_a_curve_a_latency_and_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    answers = [an_answer(k, k + k / 1000, [0.02] * 10) for k in range(1, 101)]
    write_plot(path, "a <server>", latencies_s(answers), Objective(ttft_ms=50))
    root = ElementTree.fromstring(path.read_text())
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert (tags.count("polyline"), tags.count("circle"), tags.count("line")) == (4, 12, 1)
    write_plot(path, "nothing", latencies_s([a_failure("timeout")]), Objective())
    assert "none" in path.read_text()
