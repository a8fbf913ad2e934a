"""A load's figures as text and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shoal.bench.answer import Answer
from shoal.bench.summary import PERCENTILES, Objective, Summary


def as_text(name: str, summary: Summary, objective: Objective, answers: Sequence[Answer]) -> str:
    """A page for a terminal."""
    lines = [
        name,
        f"  {summary.num_requests} requests in {summary.duration_s:.1f} s, {sum(summary.errors.values())} failed",
        *(f"    {number} {kind}: {_first_text(kind, answers)}" for kind, number in summary.errors.items()),
        f"  {summary.output_tokens_per_s:.1f} output tokens/s, {summary.requests_per_s:.2f} requests/s",
        *_cached(summary),
        f"  goodput {summary.goodput_per_s:.2f} requests/s, {summary.good_share:.1%} of all ({_expected(objective)})",
        f"  {'ms':6}" + "".join(f"{column:>10}" for column in ("mean", *(f"p{each}" for each in PERCENTILES))),
    ]
    for kind, latency in summary.latencies.items():
        values = [latency.mean_ms, *latency.percentiles_ms.values()] if latency else []
        lines.append(f"  {kind:6}" + ("".join(f"{value:10.1f}" for value in values) or f"{'none':>10}"))
    lines.append(f"  the client sent p99 {summary.client_lag_ms:.1f} ms late; latencies begin at the intended arrival")
    return "\n".join(lines)


def write_json(
    path: Path, name: str, settings: Mapping[str, object], summary: Summary, answers: Sequence[Answer]
) -> None:
    """Write the figures, and each request's times in s since the load's start."""
    content = {
        "target": name,
        "settings": dict(settings),
        "summary": asdict(summary),
        "requests": [
            {**asdict(answer), "message_s": [round(at_s, 6) for at_s in answer.message_s]} for answer in answers
        ],
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def _cached(summary: Summary) -> list[str]:
    share = summary.cached_share
    return [] if share is None else [f"  {share:.1%} of the prompts' tokens were in the server's cache of prefixes"]


def _first_text(kind: str, answers: Sequence[Answer]) -> str:
    return next(answer.error_text for answer in answers if answer.error == kind)[:200]


def _expected(objective: Objective) -> str:
    limits = [
        f"{name} within {limit_ms:g} ms"
        for name, limit_ms in (("first token", objective.ttft_ms), ("pauses", objective.itl_ms))
        if limit_ms is not None
    ]
    return ", ".join(limits) or "no limit was given"
