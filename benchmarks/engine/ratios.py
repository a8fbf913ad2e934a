"""What is asked of the figures: ratios between engines, and the bounds that they are held to."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.engine.figures import Figure
from benchmarks.engine.workloads import DECODE, STREAMS_8, STREAMS_32, TTFT_512, Workload


@dataclass(frozen=True, slots=True)
class Comparison:
    """An engine's figure divided by another's on the same workload."""

    workload: Workload
    engine: str
    peer: str
    bound: float | None = None
    """The least, or the most where lower is better, that is asked. None: it is told only."""

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.workload.name}: {self.engine} ÷ {self.peer}"

    def is_met(self, ratio: float) -> bool | None:
        """Whether a ratio is within the bound; None without one."""
        if self.bound is None:
            return None
        return ratio <= self.bound if self.workload.lower_is_better else ratio >= self.bound


COMPARISONS = (
    Comparison(DECODE, "shoal", "transformers", 1.3),
    Comparison(DECODE, "shoal", "llama.cpp-f32", 0.95),
    Comparison(DECODE, "shoal-fleet", "transformers"),
    Comparison(TTFT_512, "shoal", "transformers", 0.85),
    Comparison(TTFT_512, "shoal-fleet", "transformers"),
    Comparison(STREAMS_8, "shoal-fleet", "transformers", 1.35),
    Comparison(STREAMS_8, "shoal-fleet", "transformers-batching", 1.7),
    Comparison(STREAMS_32, "shoal-fleet", "transformers", 1.25),
    Comparison(STREAMS_32, "shoal-fleet", "transformers-batching", 2.8),
    Comparison(DECODE, "shoal-int8", "llama.cpp-q4_1", 0.65),
    Comparison(STREAMS_8, "shoal-fleet-int8", "llama.cpp-q4_1", 3.0),
    Comparison(STREAMS_32, "shoal-fleet-int8", "llama.cpp-q4_1", 5.0),
    Comparison(DECODE, "shoal-int8", "openvino-q4_1"),
    Comparison(STREAMS_8, "shoal-fleet-int8", "openvino-q4_1"),
    Comparison(STREAMS_32, "shoal-fleet-int8", "openvino-q4_1"),
    *(Comparison(workload, "shoal", "vllm-cpu") for workload in (DECODE, TTFT_512)),
    *(Comparison(workload, "shoal-fleet", "vllm-cpu") for workload in (STREAMS_8, STREAMS_32)),
    Comparison(STREAMS_32, "shoal-fleet", "shoal", 0.92),
)
"""Bounds for SmolLM2-135M on a machine with AVX-512; what is computed by the engine alone is compared so for the peers'
sake, which are measured in their own processes, too."""


@dataclass(frozen=True, slots=True)
class RoundRatio:
    """A ratio in one round."""

    value: float
    is_beside_load: bool
    """One of its figures, or both, was taken beside load."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A comparison's outcome: of the rounds in which both engines were measured, at least one."""

    comparison: Comparison
    rounds: tuple[RoundRatio, ...]

    @property
    def is_beside_load(self) -> bool:
        """Whether no round was calm."""
        return all(of_round.is_beside_load for of_round in self.rounds)

    @property
    def median(self) -> float:
        """Of the calm rounds; of all, if none was: load changes ratios many times over, as some engines spin."""
        return statistics.median(
            of_round.value for of_round in self.rounds if self.is_beside_load or not of_round.is_beside_load
        )

    @property
    def is_met(self) -> bool | None:
        """Whether the median is within the bound; None without one."""
        return self.comparison.is_met(self.median)


def ratio_of(comparison: Comparison, figures: Sequence[Figure]) -> Ratio | None:
    """Compare round by round: a machine's pace drifts. None if the two were never measured in the same round."""
    engine = _by_round(figures, comparison.engine, comparison.workload)
    peer = _by_round(figures, comparison.peer, comparison.workload)
    rounds = tuple(
        RoundRatio(
            engine[number].value / peer[number].value, engine[number].is_beside_load or peer[number].is_beside_load
        )
        for number in sorted(engine.keys() & peer.keys())
    )
    return Ratio(comparison, rounds) if rounds else None


def _by_round(figures: Sequence[Figure], engine: str, workload: Workload) -> Mapping[int, Figure]:
    return {
        figure.round_number: figure
        for figure in figures
        if figure.engine == engine and figure.workload == workload.name
    }
