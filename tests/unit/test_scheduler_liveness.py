"""A worker is lost when it has work and makes no progress; not when it waits, and not when the leader was away."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.ids import WorkerId
from services.scheduler.liveness import Liveness, Loss, Patience
from tests.unit.scheduler_builders import W1, W2, a_report

PATIENCE = Patience(least_ms=1000, steps=8, held_ms=10_000, stall_ms=500)


def a_watch(busy: bool = True) -> Liveness:
    liveness = Liveness(PATIENCE)
    liveness.watch(W1, busy, now_ms=0)
    return liveness


def lost(liveness: Liveness, now_ms: float) -> list[WorkerId]:
    return [loss.worker for loss in liveness.lost(now_ms)]


def test_a_silent_worker_with_work_is_lost_after_a_second() -> None:
    liveness = a_watch()
    assert lost(liveness, 999) == []
    assert lost(liveness, 1000) == [W1]
    assert liveness.lost(1500)[0].silent_ms == 1500


def test_a_silent_worker_without_work_is_not_lost() -> None:
    assert lost(a_watch(busy=False), 1e9) == []


def test_its_second_begins_with_its_work() -> None:
    liveness = a_watch(busy=False)
    liveness.watch(W1, True, now_ms=5000)
    assert lost(liveness, 5999) == []
    assert lost(liveness, 6000) == [W1]


def test_further_work_gives_no_further_time() -> None:
    liveness = a_watch()
    liveness.watch(W1, True, now_ms=900)
    assert lost(liveness, 1000) == [W1]


def test_a_worker_that_reports_but_makes_no_step_is_lost() -> None:
    liveness = a_watch()
    for now_ms in range(0, 1000, 100):
        liveness.reported(a_report(steps=7, requests=1, predicted_step_ms=20), now_ms)
    assert lost(liveness, 999) == []
    assert lost(liveness, 1000) == [W1]


def test_a_worker_that_makes_steps_lives() -> None:
    liveness = a_watch()
    for step in range(100):
        liveness.reported(a_report(steps=step, requests=1, predicted_step_ms=20), step * 900)
        assert lost(liveness, step * 900 + 899) == []


def test_a_long_step_is_given_eight_times_its_prediction() -> None:
    liveness = a_watch()
    for at_ms in range(100, 4100, 200):
        liveness.reported(a_report(steps=1, requests=1, predicted_step_ms=500), at_ms)
    assert lost(liveness, 4099) == []
    assert lost(liveness, 4100) == [W1]


def test_a_long_step_does_not_excuse_that_its_front_is_silent() -> None:
    liveness = a_watch()
    liveness.reported(a_report(steps=1, requests=1, predicted_step_ms=500), 100)
    assert lost(liveness, 1099) == []
    assert lost(liveness, 1100) == [W1]


def test_the_prediction_of_a_step_long_past_gives_later_work_no_time() -> None:
    liveness = a_watch()
    liveness.reported(a_report(steps=1, requests=1, predicted_step_ms=5000), 100)
    liveness.watch(W1, False, 200)
    liveness.watch(W1, True, 300)
    assert lost(liveness, 1300) == [W1]


def test_attempts_that_wait_for_their_gateway_make_no_steps_and_are_no_death() -> None:
    liveness = a_watch()
    for now_ms in range(0, 10_000, 500):
        assert lost(liveness, now_ms) == []
        liveness.reported(a_report(steps=3, requests=2), now_ms)
    assert lost(liveness, 10_000) == [W1]


def test_a_worker_that_never_takes_its_request_is_lost_though_it_reports() -> None:
    liveness = a_watch()
    liveness.reported(a_report(steps=3, requests=0), 0)
    liveness.reported(a_report(steps=3, requests=0), 900)
    assert lost(liveness, 1000) == [W1]


def test_a_stalled_leader_gives_all_workers_their_time_again() -> None:
    liveness = a_watch()
    liveness.woke(now_ms=5000, expected_at_ms=400)
    assert lost(liveness, 5000) == []
    liveness.caught_up(5010)
    assert lost(liveness, 6009) == []
    assert lost(liveness, 6010) == [W1]


def test_nobody_is_judged_before_a_stalled_leader_has_read_what_it_missed() -> None:
    liveness = a_watch()
    liveness.woke(now_ms=5000, expected_at_ms=400)
    assert lost(liveness, 60_000) == []


def test_a_wake_up_in_time_restarts_nothing() -> None:
    liveness = a_watch()
    liveness.woke(now_ms=900, expected_at_ms=500)
    liveness.caught_up(900)
    assert lost(liveness, 1000) == [W1]


def test_a_hint_leaves_a_silent_worker_one_and_a_half_of_its_report_intervals() -> None:
    liveness = a_watch()
    liveness.hinted(W1, report_interval_ms=200, now_ms=400)
    assert liveness.next_due_ms() == 700
    assert lost(liveness, 699) == []
    assert liveness.lost(700) == [Loss(W1, silent_ms=700, hinted=True)]


def test_whoever_reports_after_a_hint_is_not_lost_by_it() -> None:
    liveness = a_watch()
    liveness.hinted(W1, 200, 400)
    liveness.reported(a_report(steps=1, requests=1, predicted_step_ms=20), 650)
    assert lost(liveness, 1649) == []
    assert liveness.lost(1650) == [Loss(W1, silent_ms=1000, hinted=False)]


def test_a_hint_never_gives_more_time_and_a_second_one_changes_nothing() -> None:
    liveness = a_watch()
    liveness.hinted(W1, 200, 100)
    liveness.hinted(W1, 200, 390)
    assert lost(liveness, 400) == [W1]
    liveness = a_watch()
    liveness.hinted(W1, 200, 900)
    assert lost(liveness, 1000) == [W1]


def test_a_hint_at_a_worker_without_work_or_without_a_known_interval_loses_nobody() -> None:
    idle, unknown = a_watch(busy=False), a_watch()
    idle.hinted(W1, 200, 0)
    unknown.hinted(W1, 0, 0)
    assert lost(idle, 1e9) == []
    assert lost(unknown, 999) == []


def test_a_hinted_worker_is_given_its_report_when_its_work_begins() -> None:
    liveness = a_watch(busy=False)
    liveness.hinted(W1, 200, 0)
    liveness.watch(W1, True, 5000)
    assert lost(liveness, 5299) == []
    assert lost(liveness, 5300) == [W1]


def test_after_a_stall_of_the_leader_a_hint_waits_anew() -> None:
    liveness = a_watch()
    liveness.hinted(W1, 200, 100)
    liveness.woke(now_ms=5000, expected_at_ms=400)
    assert lost(liveness, 5000) == []
    liveness.caught_up(5010)
    assert lost(liveness, 5309) == []
    assert lost(liveness, 5310) == [W1]


def test_the_leaders_own_delay_is_not_counted_against_a_hinted_worker() -> None:
    liveness = a_watch()
    liveness.hinted(W1, 200, 100)
    liveness.woke(now_ms=650, expected_at_ms=400)
    assert lost(liveness, 649) == []
    assert lost(liveness, 650) == [W1]


def test_the_next_loss_is_announced() -> None:
    liveness = a_watch()
    liveness.watch(W2, False, 0)
    assert liveness.next_due_ms() == 1000
    liveness.watch(W2, True, 100)
    liveness.forget(W1)
    assert liveness.next_due_ms() == 1100
    liveness.forget(W2)
    assert liveness.next_due_ms() is None


@given(st.lists(st.tuples(st.floats(1, 400), st.floats(0, 8000)), min_size=1, max_size=40), st.integers(20, 200))
def test_a_worker_that_steps_is_never_lost_however_the_leader_stalls(
    rounds: list[tuple[float, float]], step_ms: int
) -> None:
    """The leader follows, then is stopped for a while, again and again; the worker makes steps all the time, and its
    streams break all the time."""
    liveness = a_watch()
    now_ms = 0.0
    for wait_ms, stalled_ms in rounds:
        expected_ms = now_ms + wait_ms
        now_ms = expected_ms + stalled_ms
        liveness.woke(now_ms, expected_ms)
        # Of the reports that came meanwhile it reads the first half, and only then the rest.
        steps = int(now_ms / step_ms)
        liveness.reported(a_report(steps=steps // 2, requests=1, predicted_step_ms=step_ms), now_ms)
        assert lost(liveness, now_ms) == []
        liveness.reported(a_report(steps=steps, requests=1, predicted_step_ms=step_ms), now_ms)
        liveness.caught_up(now_ms)
        assert lost(liveness, now_ms) == []
        liveness.hinted(W1, 300, now_ms)
