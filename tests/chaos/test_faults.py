"""An accepted request ends exactly once, at the next token, whichever process dies or freezes.

docs/protocol.md, "Invariants".
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.storm import Report, faults, inflict, run_storm
from tests.fleet.conftest import Fleet

SEED = 1
NUM_FAULTS = 20


@pytest.mark.timeout(600)
async def test_no_answer_is_lost_or_altered_by_twenty_faults(
    start: Callable[..., Fleet], greedy_cases: list[dict[str, Any]]
) -> None:
    fleet = start("--gateways", "2", "--schedulers", "2", "--workers", "2")
    report = Report()
    await run_storm(fleet, greedy_cases, inflict(fleet, faults(SEED, NUM_FAULTS), report), SEED, report)
    print(report.summary(), *report.faults, sep="\n")
    assert report.failed == []
    assert len(report.answers) >= 16
