"""The distributions of a load's latencies as one SVG file: no library is needed for four curves."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from shoal.bench.summary import PERCENTILES, Objective, percentile

_WIDTH, _HEIGHT, _MARGIN, _TOP = 360, 220, 48, 30
_MAX_POINTS = 400


def write_plot(path: Path, title: str, latencies_s: Mapping[str, Sequence[float]], objective: Objective) -> None:
    """Write a panel for each latency: share of values (up) at or below a time (across), percentiles as dots.

    A limit of the objective is a dashed line.
    """
    limits = {"TTFT": objective.ttft_ms, "ITL": objective.itl_ms}
    panels = [
        _panel(number, name, np.sort(np.asarray(values_s) * 1000), limits.get(name))
        for number, (name, values_s) in enumerate(latencies_s.items())
    ]
    width, height = 2 * _WIDTH, -(-len(panels) // 2) * _HEIGHT + _TOP
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{_MARGIN}" y="20" font-size="13">{escape(title)}</text>\n' + "\n".join(panels) + "\n</svg>\n",
        encoding="utf-8",
    )


def _panel(
    number: int, name: str, sorted_ms: "np.ndarray[tuple[int], np.dtype[np.float64]]", limit_ms: float | None
) -> str:
    left, top = (number % 2) * _WIDTH + _MARGIN, (number // 2) * _HEIGHT + _TOP + 10
    across, down = _WIDTH - _MARGIN - 24, _HEIGHT - 60
    frame = f'<rect x="{left}" y="{top}" width="{across}" height="{down}" fill="none" stroke="#bbb"/>'
    parts = [frame, f'<text x="{left + across / 2}" y="{top + down + 30}" text-anchor="middle">{name}, ms</text>']
    if not len(sorted_ms):
        return "\n".join([*parts, f'<text x="{left + 10}" y="{top + 20}">none</text>'])
    most_ms = max(float(sorted_ms[-1]), limit_ms or 0.0) or 1.0

    def place(at_ms: float, share: float) -> tuple[float, float]:
        return round(left + across * at_ms / most_ms, 1), round(top + down * (1 - share), 1)

    ranks = np.unique(np.linspace(0, len(sorted_ms) - 1, min(len(sorted_ms), _MAX_POINTS)).astype(int))
    curve = [place(0, 0), *(place(float(sorted_ms[rank]), (rank + 1) / len(sorted_ms)) for rank in ranks)]
    points = " ".join(f"{x},{y}" for x, y in curve)
    parts.append(f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    for percent in PERCENTILES:
        at_ms = percentile(sorted_ms.tolist(), percent)
        x, y = place(at_ms, percent / 100)
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="3" fill="#1f5fa8"><title>p{percent} {at_ms:.1f} ms</title></circle>'
        )
    if limit_ms is not None:
        x, _ = place(limit_ms, 0)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{top + down}" stroke="#b03030" stroke-dasharray="4 3"/>')
    for share in (0.0, 0.5, 1.0):
        x, y = place(0, share)
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{share:g}</text>')
        x, y = place(most_ms * share, 0)
        parts.append(f'<text x="{x}" y="{y + 14}" text-anchor="middle">{most_ms * share:.4g}</text>')
    return "\n".join(parts)
