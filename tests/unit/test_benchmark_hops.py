"""Notes on where a token's time goes follow the code, and add up."""

import importlib
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.gateway.hops import FIRST_TOKEN_HOPS, TOKEN_HOPS, Run
from benchmarks.gateway.noted import SEAMS, Notes, Seam

OUTSIDE = {"client calls", "sampled", "step begins", "client has token"}
"""Events that the benchmark itself notes."""


@pytest.mark.parametrize("seam", [seam for seams in SEAMS.values() for seam in seams], ids=lambda seam: seam.event)
def test_what_is_noted_is_there(seam: Seam) -> None:
    owner: Any = importlib.import_module(seam.module)
    for part in seam.function.split("."):
        owner = getattr(owner, part)
    assert callable(owner)


@pytest.mark.parametrize("hops", [FIRST_TOKEN_HOPS, TOKEN_HOPS])
def test_each_hop_begins_where_the_one_before_ends_but_for_the_step_between(hops: Any) -> None:
    for (_, _, end), (_, begin, _) in pairwise(hops):
        assert begin == end or (end, begin) == ("step begins", "sampled")
    noted = OUTSIDE | {seam.event for seams in SEAMS.values() for seam in seams}
    assert {event for _, *events in hops for event in events} <= noted


async def test_a_function_is_noted_when_it_is_called_or_when_it_returns() -> None:
    notes = Notes()

    async def function(number: int) -> int:
        assert list(notes.passed) == ["called"]
        return number

    def num(number: int) -> int:
        return number

    noted = notes.around(Seam("answered", "", "", num, at_end=True), function)
    noted = notes.around(Seam("called", "", "", num), noted)
    assert await noted(3) == 3
    assert [(event, [number for _, number in passed]) for event, passed in notes.passed.items()] == [
        ("called", [3]), ("answered", [3]),
    ]  # fmt: skip


def test_a_services_notes_count_within_the_run_and_by_how_many_passed() -> None:
    run = Run(began_us=100, ended_us=200, passed={"sampled": [110, 120, 130]})
    notes = {"front has token": [(50, 1), (120, 2), (150, 1), (250, 9)]}
    assert run.mean_us("front has token", notes) - run.mean_us("sampled", notes) == pytest.approx(10)


def test_a_token_that_a_service_did_not_note_is_told() -> None:
    run = Run(began_us=100, ended_us=200, passed={"sampled": [110, 120]})
    with pytest.raises(RuntimeError, match="noted 1 times, and 2 tokens came"):
        run.mean_us("front has token", {"front has token": [(120, 1)]})
