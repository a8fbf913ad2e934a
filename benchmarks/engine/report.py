"""The figures as a person reads them."""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.engine.engines import Engine
from benchmarks.engine.figures import MEMORY, Figure
from benchmarks.engine.load import BESIDE_LOAD_CORES
from benchmarks.engine.ratios import COMPARISONS, Comparison, ratio_of
from benchmarks.engine.step_parts import StepParts
from benchmarks.engine.workloads import DECODE, Workload

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def machine() -> str:
    """Describe the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [name for name in INSTRUCTION_SETS if name in about.get("flags", "").split()]
    return f"{os.cpu_count()} cores of {about.get('model name', 'an unknown processor')}: {', '.join(flags)}"


def figures_table(engines: Sequence[Engine], workloads: Sequence[Workload], figures: Sequence[Figure]) -> str:
    """A row an engine: medians, and each round's value."""
    rows = [
        [engine.name, *(_cell(_of(figures, engine.name, workload.name)) for workload in workloads)]
        for engine in engines
    ]
    return _table(["median (rounds)", *(f"{workload.name}, {workload.unit}" for workload in workloads)], rows)


def ratios_table(figures: Sequence[Figure], not_measured: Mapping[str, str]) -> str:
    """A row a comparison, held to its bound; the median is of the calm rounds. `not_measured`: why, by engine."""
    return _table(
        ["ratio", "median of calm rounds (all)", "asked", ""],
        [_ratio_row(c, figures, not_measured) for c in COMPARISONS],
    )


def memory_lines(engines: Sequence[Engine], figures: Sequence[Figure], weight_bytes: Mapping[str, int]) -> str:
    """The memory's bandwidth, and the share of it that each engine's decode reads weights with."""
    memory = _of(figures, MEMORY, MEMORY)
    gb_per_s = statistics.median(figure.value for figure in memory)
    lines = [f"memory, 540 MB read by all cores: {_cell(memory)} GB/s"]
    for engine in engines:
        if decode := _of(figures, engine.name, DECODE.name):
            num_bytes = weight_bytes[engine.name]
            tokens_per_s = statistics.median(figure.value for figure in decode)
            read = num_bytes * tokens_per_s / 1e9
            lines.append(
                f"  {engine.name}: {num_bytes / 1e6:.0f} MB of weights a token × {tokens_per_s:.1f} tok/s "
                f"= {read:.1f} GB/s, {read / gb_per_s:.0%} of it"
            )
    return "\n".join(lines)


def agreement_lines(engines: Sequence[Engine], figures: Sequence[Figure]) -> str:
    """How many streams are, token by token, those of Shoal's engine in float32: whether they compute the same model."""
    ours = {_asked(figure): figure.token_ids for figure in figures if figure.engine == "shoal"}
    lines = []
    for engine in engines:
        pairs = [
            pair
            for figure in figures
            if figure.engine == engine.name and _asked(figure) in ours
            for pair in zip(figure.token_ids, ours[_asked(figure)], strict=True)
        ]
        if pairs and engine.name != "shoal":
            same_first = sum(theirs[0] == our[0] for theirs, our in pairs)
            lines.append(
                f"  {engine.name}: {sum(theirs == our for theirs, our in pairs)} of {len(pairs)} streams, "
                f"the first token of {same_first}"
            )
    return "\n".join(["the same tokens as shoal's:", *lines]) if lines else ""


def _asked(figure: Figure) -> tuple[str, int, int]:
    """What decides which prompts an engine was given."""
    return figure.workload, figure.round_number, figure.try_number


def step_table(kinds: Sequence[StepParts]) -> str:
    """A row a part, a column a kind of step."""
    names = list(dict.fromkeys(name for kind in kinds for name in kind.parts_ms))
    rows = [
        [name, *(f"{kind.parts_ms[name]:.2f} ({kind.parts_ms[name] / kind.timed_ms:.0%})" for kind in kinds)]
        for name in names
    ]
    rows.append(["with timers", *(f"{kind.timed_ms:.2f}" for kind in kinds)])
    rows.append(["without", *(f"{kind.step_ms:.2f}{_mark(kind.others_cores)}" for kind in kinds)])
    return _table(["ms", *(kind.kind for kind in kinds)], rows)


def load_line(figures: Sequence[Figure]) -> str:
    """What others took of the machine."""
    others = [figure.others_cores for figure in figures]
    num_beside = sum(figure.is_beside_load for figure in figures)
    return (
        f"others used {statistics.median(others):.2f} cores in the median figure, {max(others):.2f} at most; "
        f"{num_beside} of {len(figures)} figures were taken beside more than {BESIDE_LOAD_CORES} (*)"
    )


def _ratio_row(comparison: Comparison, figures: Sequence[Figure], not_measured: Mapping[str, str]) -> list[str]:
    sign = "≤" if comparison.workload.lower_is_better else "≥"
    asked = "" if comparison.bound is None else f"{sign} {comparison.bound:g}"
    ratio = ratio_of(comparison, figures)
    if ratio is None:
        why = not_measured.get(comparison.engine) or not_measured.get(comparison.peer) or "not asked for"
        return [comparison.name, f"not measured: {why}", asked, ""]
    rounds = ", ".join(f"{of.value:.2f}{'*' if of.is_beside_load else ''}" for of in ratio.rounds)
    verdict = {True: "met", False: "NOT met", None: ""}[ratio.is_met]
    if verdict and ratio.is_beside_load:
        verdict = f"{verdict}, but no round was calm"
    return [comparison.name, f"{ratio.median:.2f} ({rounds})", asked, verdict]


def _of(figures: Sequence[Figure], engine: str, workload: str) -> list[Figure]:
    return [figure for figure in figures if figure.engine == engine and figure.workload == workload]


def _cell(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    rounds = ", ".join(f"{figure.value:.1f}{_mark(figure.others_cores)}" for figure in figures)
    return f"{statistics.median(figure.value for figure in figures):.1f} ({rounds})"


def _mark(others_cores: float) -> str:
    return "*" if others_cores > BESIDE_LOAD_CORES else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
