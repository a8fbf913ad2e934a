"""The leader's look at demand counts what waits and what runs, and remembers workers that are gone."""

import pytest

from gen.shoal.fleet.v1.demand_pb2 import PoolDemand
from gen.shoal.fleet.v1.request_pb2 import StepTime, WorkerReport
from services.common.ids import WorkerId
from services.common.store.demand import Told
from services.scheduler.demand import Bounds
from services.scheduler.liveness import Patience
from services.scheduler.scaling import Scaling
from services.scheduler.view import View
from tests.unit.scheduler_builders import W1, W2, a_queued, a_reservation, an_info

BOUNDS = Bounds(least=0, most=10, within_ms=1_000, quiet_ms=60_000)
STEP_TIME = StepTime(ms_per_token=1)
"""A token, of prompt or answer, is a ms."""
KNOWN = PoolDemand(step_time=STEP_TIME, smallest_worker=an_info(num_blocks=100), choice_tokens=100)


def a_view() -> View:
    return View(Patience())


def a_worker_joins(view: View, worker: WorkerId = W1, num_blocks: int = 100, step_time: StepTime | None = STEP_TIME,
                   ) -> None:  # fmt: skip
    view.add_worker(an_info(worker, num_blocks=num_blocks), (), now_ms=0)
    view.ledger.reported(WorkerReport(worker_id=worker, step_time=step_time))


def wait_for(view: View, num_requests: int, prompt_tokens: int = 400, attempt: int = 1) -> None:
    for number in range(num_requests):
        queued = a_queued(f"r{number}", prompt_tokens=prompt_tokens, max_tokens=100, attempt=attempt,
                          entry_id=f"{number + 1}-0")  # fmt: skip
        view.take_queued(queued)


def look(view: View, told: Told | None = None, now_ms: float = 0) -> PoolDemand:
    return Scaling(view, BOUNDS, told, now_ms).look(now_ms)


def test_what_waits_is_measured_by_what_workers_say_their_steps_take() -> None:
    view = a_view()
    a_worker_joins(view)
    wait_for(view, 6)
    told = look(view)
    assert (told.waiting_requests, told.running_requests, told.workers_ready) == (6, 0, 1)
    assert told.work_ms == 6 * (400 + 100)
    assert told.workers_wanted == 3


def test_what_runs_is_half_done_on_the_whole_and_needs_its_room() -> None:
    view = a_view()
    a_worker_joins(view)
    for number in range(4):
        view.found(W1, a_reservation(f"r{number}", prompt_tokens=400, max_tokens=100), now_ms=0)
    told = look(view)
    assert told.work_ms == 4 * (400 + 100) / 2
    assert told.workers_wanted == 2, "4 of 32 blocks each fill more than one worker of 100"


def test_from_zero_the_last_workers_pace_still_counts_under_the_next_leader() -> None:
    view = a_view()
    wait_for(view, 6)
    assert look(view).workers_wanted == 1, "nothing is known: one will teach it"
    assert look(view, Told(KNOWN, age_ms=3_600_000)).workers_wanted == 3
    slow = PoolDemand(startup_ms=600)
    slow.MergeFrom(KNOWN)
    assert look(view, Told(slow, age_ms=3_600_000)).workers_wanted == 6, "half of the time is left when they started"


def test_what_is_known_of_workers_outlives_them() -> None:
    view = a_view()
    a_worker_joins(view, W1, num_blocks=100)
    a_worker_joins(view, W2, num_blocks=50)
    scaling = Scaling(view, BOUNDS, None, now_ms=0)
    scaling.look(0)
    view.forget_worker(W1)
    view.forget_worker(W2)
    told = scaling.look(1_000)
    assert (told.workers_ready, told.smallest_worker.num_blocks) == (0, 50)
    assert told.step_time == STEP_TIME


def test_a_new_leader_wants_what_the_last_one_wanted_a_moment_ago() -> None:
    view = a_view()
    assert look(view, Told(PoolDemand(workers_wanted=5), age_ms=3_000)).workers_wanted == 5


def test_an_old_word_is_no_reason_to_want_anything() -> None:
    view = a_view()
    a_worker_joins(view)
    assert look(view, Told(PoolDemand(workers_wanted=5), age_ms=60_001)).workers_wanted == 1, "as many as there are"


def test_a_request_that_comes_again_did_not_arrive_again() -> None:
    view = a_view()
    scaling = Scaling(view, BOUNDS, None, now_ms=0)
    wait_for(view, 2, attempt=2)
    assert not view.arrived
    wait_for(view, 3)
    scaling.look(1_000)
    assert not view.arrived, "counted once"


def test_a_worker_that_drains_is_not_ready() -> None:
    view = a_view()
    view.add_worker(an_info(draining=True), (), now_ms=0)
    assert look(view).workers_ready == 0


@pytest.mark.parametrize("num_requests", [0, 1])
def test_zero_is_wanted_only_when_nothing_waits_or_runs(num_requests: int) -> None:
    view = a_view()
    wait_for(view, num_requests)
    scaling = Scaling(view, BOUNDS, Told(KNOWN, age_ms=0), now_ms=0)
    scaling.look(0)
    assert scaling.look(2 * BOUNDS.quiet_ms).workers_wanted == num_requests
