"""The protocol holds under crashes, delays, freezes and lost writes; and where it is broken, the simulation notices."""

import pytest

from simulator.protocol.defects import DEFECTS, SHOWN_BY, planted
from simulator.protocol.faults import KINDS
from simulator.protocol.schedule import Verdict, run_schedule

SEEDS = range(300)
FOUND_WITHIN = 3_000
"""Schedules in which every planted defect must show."""


def first_broken(only: tuple[str, ...] = ()) -> Verdict | None:
    """The first schedule that breaks an invariant."""
    verdicts = (run_schedule(seed, only=only) for seed in range(FOUND_WITHIN))
    return next((verdict for verdict in verdicts if verdict.violation), None)


def test_every_invariant_holds_whatever_goes_wrong() -> None:
    assert [verdict for seed in SEEDS if (verdict := run_schedule(seed)).violation] == []


@pytest.mark.parametrize(
    ("seed", "once"),
    [
        (387, "a queued request that was recovered kept an entry in the intake that could not be placed any more"),
        (1561, "Redis lost that a reader had come and gone, and the request was read by nobody for ever"),
        (7470, "Redis lost a submission that was sent again, and one attempt ran twice"),
        (6107995, "a gateway started anew stood for the one that died there, and a request ran unread for ever"),
        (1010421, "a leader that stood still in the midst of a round declared a healthy worker lost"),
    ],
)
def test_a_schedule_that_failed_once_holds(seed: int, once: str) -> None:
    assert not run_schedule(seed).violation, once


@pytest.mark.parametrize("kind", KINDS)
def test_every_invariant_holds_under_each_kind_of_fault(kind: str) -> None:
    assert [verdict for seed in range(20) if (verdict := run_schedule(seed, only=(kind,))).violation] == []


def test_the_same_seed_is_the_same_schedule() -> None:
    traces: tuple[list[str], list[str]] = ([], [])
    verdicts = [run_schedule(13, trace.append) for trace in traces]
    assert verdicts[0] == verdicts[1]
    assert traces[0] == traces[1]
    assert traces[0]


def test_a_trace_changes_nothing() -> None:
    lines: list[str] = []
    assert [run_schedule(seed, lines.append) for seed in range(10)] == [run_schedule(seed) for seed in range(10)]


def test_the_schedules_reach_every_way_that_a_request_can_end_and_resume() -> None:
    stats = sum((run_schedule(seed).stats for seed in SEEDS), start=run_schedule(SEEDS.stop).stats)
    for path in (
        "ended finished", "ended cancelled", "ended expired", "ended quarantined", "forced", "rebases", "graces over",
        "recoveries", "workers declared lost", "sessions lost", "client superseded", "Append gap", "Append stale",
        "Finish stale", "Restore ok", "Place stale", "Submit quota", "Submit tokens",
    ):  # fmt: skip
        assert stats[path], f"no schedule reaches: {path}"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_broken_protocol_is_noticed(name: str) -> None:
    with planted(name):
        found = first_broken(SHOWN_BY.get(name, ()))
    assert found is not None
    # What broke is the protocol: the very same schedule holds without the defect.
    assert not run_schedule(found.seed, only=SHOWN_BY.get(name, ())).violation


def test_enough_defects_are_planted() -> None:
    assert len(DEFECTS) >= 10
