"""The engine's loop: commands between steps, what is said before and after each step, and how it waits and ends."""

from dataclasses import dataclass, field, replace

import pytest

from gen.shoal.fleet.v1 import engine_pb2
from services.worker.engine.loop import EngineLoop, FrontGoneError
from services.worker.engine.planner import Planner
from services.worker.engine.step_plan import StepPlan, StepResult
from services.worker.engine.step_time import StepTimeCoefficients, StepTimeModel
from tests.unit.engine_builders import (
    PretendedFront,
    PretendedRunner,
    PretendedStep,
    abort_command,
    add,
    add_command,
    limits_of,
    release_command,
    shutdown_command,
)


class Time:
    def __init__(self) -> None:
        self.now_ms = 0.0

    def __call__(self) -> float:
        return self.now_ms

    def pass_by(self, waited_ms: float | None) -> None:
        self.now_ms += waited_ms or 0.0


class SlowRunner(PretendedRunner):
    """Takes 20 ms a step."""

    time: Time

    def launch(self, plan: StepPlan) -> PretendedStep:
        self.time.now_ms += 20
        return super().launch(plan)


def run(front: PretendedFront) -> PretendedRunner:
    """Run a loop until the front says Shutdown; every step takes 20 ms, every wait its whole time."""
    limits = limits_of()
    runner = SlowRunner(limits)
    runner.time = Time()
    front.on_take = runner.time.pass_by
    step_time = StepTimeModel()
    EngineLoop(Planner(limits, step_time), step_time, runner, front, runner.time).run()
    return runner


def looks(*commands: list[engine_pb2.EngineCommand], then_steps: int = 0) -> PretendedFront:
    return PretendedFront([*commands, *([] for _ in range(then_steps)), [shutdown_command()]])


def test_a_step_is_announced_with_its_sequences_and_then_reported() -> None:
    front = looks([add_command(add(1, prompt=5, max_tokens=1)), add_command(add(2, prompt=7, max_tokens=4))])
    run(front)
    kinds = [event.WhichOneof("event") for event in front.events]
    assert kinds == ["begins", "done"]
    begins, done = front.events[0].begins, front.events[1].done
    assert (begins.step, list(begins.sequence_ids)) == (1, [1, 2])
    assert begins.predicted_ms > 0
    assert (done.step, done.took_us, done.waiting_prefill_tokens) == (1, 20_000, 4)
    assert done.free_blocks == 16 - 2
    assert done.step_time.ms_per_token > 0
    assert [(output.sequence_id, list(output.token_ids)) for output in done.outputs] == [(1, [5])]


def test_all_commands_that_wait_are_obeyed_before_the_next_step() -> None:
    front = looks(
        [add_command(add(1)), add_command(add(2, held=True)), add_command(add(3)), abort_command(1), release_command(2)]
    )
    runner = run(front)
    assert [chunk.sequence_id for chunk in runner.plans[0].chunks] == [2, 3]


def test_with_work_left_the_loop_looks_for_commands_without_waiting() -> None:
    front = looks([add_command(add(1, max_tokens=3))], then_steps=2)
    run(front)
    assert front.timeouts_ms == [None, 0, 0, 0]


def test_without_work_the_loop_waits_as_long_as_it_takes() -> None:
    front = looks([add_command(add(1, max_tokens=1))], then_steps=1)
    run(front)
    assert front.timeouts_ms == [None, 0, None]


def test_a_held_sequence_expires_though_nothing_else_happens() -> None:
    front = looks([add_command(add(1, prompt=1, held=True, remaining_ms=300))], then_steps=1)
    run(front)
    assert front.timeouts_ms == [None, 300, None]
    assert [output.end for output in front.outputs] == [engine_pb2.SEQUENCE_END_EXPIRED]


def test_an_end_without_a_step_is_told_under_the_last_steps_number() -> None:
    front = looks([add_command(add(1, max_tokens=1))], [add_command(add(2, prompt=0))])
    run(front)
    assert [(done.step, done.took_us) for done in front.steps_done] == [(1, 20_000), (1, 0)]
    assert front.outputs[1].end == engine_pb2.SEQUENCE_END_FAILED


def test_an_end_outside_a_step_comes_with_the_step_that_follows() -> None:
    front = looks([add_command(add(1, prompt=0)), add_command(add(2))])
    run(front)
    assert [[output.sequence_id for output in done.outputs] for done in front.steps_done] == [[1, 2]]


def test_a_shutdown_ends_the_loop_though_work_is_left() -> None:
    front = looks([add_command(add(1, max_tokens=9))])
    assert len(run(front).plans) == 1


def test_the_end_of_the_front_ends_the_loop() -> None:
    with pytest.raises(FrontGoneError):
        run(PretendedFront([[add_command(add(1, max_tokens=9))]]))


def test_an_exception_in_a_step_is_not_swallowed() -> None:
    class BrokenRunner(PretendedRunner):
        def launch(self, plan: StepPlan) -> PretendedStep:
            raise RuntimeError("the machine is on fire")

    limits = limits_of()
    front = looks([add_command(add(1))])
    step_time = StepTimeModel()
    with pytest.raises(RuntimeError, match="on fire"):
        EngineLoop(Planner(limits, step_time), step_time, BrokenRunner(limits), front, Time()).run()
    assert [event.WhichOneof("event") for event in front.events] == ["begins"]


# One step ahead


@dataclass
class Device(PretendedRunner):
    """Takes 10 ms a step, one behind the other, while the loop goes on."""

    steps_ahead: int = 1
    time: Time = field(default_factory=Time)
    ends_ms: float = 0.0
    idle_ms: float = 0.0

    def launch(self, plan: StepPlan) -> "DeviceStep":
        step = super().launch(plan)
        self.idle_ms += max(0.0, self.time.now_ms - self.ends_ms)
        self.ends_ms = max(self.time.now_ms, self.ends_ms) + 10
        return DeviceStep(step.result(), self.time, self.ends_ms)


@dataclass
class DeviceStep(PretendedStep):
    time: Time
    ends_ms: float

    def is_done(self) -> bool:
        return self.time.now_ms >= self.ends_ms

    def result(self) -> StepResult:
        self.time.now_ms = max(self.time.now_ms, self.ends_ms)
        return replace(super().result(), took_ms=10.0)


@dataclass
class TimedFront(PretendedFront):
    """Gives each command at its time."""

    time: Time = field(default_factory=Time)
    due: list[tuple[float, engine_pb2.EngineCommand]] = field(default_factory=list)

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        next_ms = self.due[0][0]
        self.time.now_ms = min(
            self.time.now_ms + (1e9 if timeout_ms is None else timeout_ms), max(self.time.now_ms, next_ms)
        )
        return [self.due.pop(0)[1]] if self.due[0][0] <= self.time.now_ms else []


def run_ahead(*due: tuple[float, engine_pb2.EngineCommand]) -> Device:
    """Run a loop on a device; commands come at these times, ms."""
    limits = limits_of(64)
    device = Device(limits)
    step_time = StepTimeModel()
    front = TimedFront([], time=device.time, due=list(due))
    EngineLoop(Planner(limits, step_time), step_time, device, front, device.time).run()
    return device


def test_who_arrives_while_a_step_runs_is_in_the_next_one() -> None:
    device = run_ahead(
        (0, add_command(add(1, 2, max_tokens=40))), (205, add_command(add(2, 2))), (300, shutdown_command())
    )
    first = next(plan for plan in device.plans if any(chunk.sequence_id == 2 for chunk in plan.chunks))
    assert first.step == 22, "the 21st runs from 200 to 210 ms"


def test_a_step_that_is_thought_to_take_longer_leaves_the_device_idle_for_a_moment_at_most() -> None:
    """30 ms are predicted of a step, by the model that no step has taught."""
    device = run_ahead((0, add_command(add(1, 2, max_tokens=60))), (400, shutdown_command()))
    assert device.idle_ms <= 0.5 * len(device.plans)
    assert len(device.plans) >= 400 / 10.5


def test_tokens_do_not_wait_for_the_launch_of_a_step_with_a_prompt() -> None:
    """It takes the host longer than the device still takes for the step in flight: so that is delivered first."""
    limits = limits_of(64)
    device = SlowToLaunch(limits)
    step_time = StepTimeModel(StepTimeCoefficients(fixed_ms=10.0, ms_per_token=0.01))
    commands = [
        (0.0, add_command(add(1, 2, max_tokens=50))),
        (100.0, add_command(add(2, 8))),
        (200.0, add_command(add(3, 8))),
    ]
    front = TimedFront([], time=device.time, due=[*commands, (300.0, shutdown_command())])
    EngineLoop(Planner(limits, step_time), step_time, device, front, device.time).run()
    assert step_time.launch_ms == pytest.approx(15)
    begun = {event.begins.step: at for at, event in enumerate(front.events) if event.HasField("begins")}
    done = {event.done.step: at for at, event in enumerate(front.events) if event.HasField("done")}
    (step,) = (plan.step for plan in device.plans if plan.has_prefill and plan.chunks[-1].sequence_id == 3)
    assert done[step - 1] < begun[step]


def test_a_prompt_that_takes_much_longer_than_its_launch_is_launched_before_the_step_in_flight_is_done() -> None:
    """Its tokens come a launch later; the device has no pause, and the next tokens come after so long anyway."""
    limits = limits_of(64)
    device = SlowToLaunch(limits)
    step_time = StepTimeModel(StepTimeCoefficients(fixed_ms=2.0, ms_per_token=8.0))
    front = TimedFront(
        [],
        time=device.time,
        due=[
            (0.0, add_command(add(1, 2, max_tokens=50))),
            (100.0, add_command(add(2, 2))),
            (200.0, add_command(add(3, 60))),
            (400.0, shutdown_command()),
        ],
    )
    EngineLoop(Planner(limits, step_time), step_time, device, front, device.time).run()
    begun = {event.begins.step: at for at, event in enumerate(front.events) if event.HasField("begins")}
    done = {event.done.step: at for at, event in enumerate(front.events) if event.HasField("done")}
    step = next(plan.step for plan in device.plans if plan.has_prefill and plan.chunks[-1].sequence_id == 3)
    assert begun[step] < done[step - 1]


@dataclass
class SlowToLaunch(Device):
    """The host takes 15 ms to launch a step with a prompt, and the device waits for it."""

    def launch(self, plan: StepPlan) -> "DeviceStep":
        if plan.has_prefill:
            self.time.now_ms += 15
            self.ends_ms = self.time.now_ms - 10
        return super().launch(plan)


def test_who_arrives_while_a_prompt_is_computed_is_in_the_next_step() -> None:
    """If a step with prompts is launched as quickly as one of decodes; else it is planned at once."""
    long, short = add_command(add(1, 40, max_tokens=2)), add_command(add(2, 2, max_tokens=2))
    device = run_ahead((0, long), (25, short), (300, shutdown_command()))
    first = next(plan for plan in device.plans if any(chunk.sequence_id == 2 for chunk in plan.chunks))
    assert first.step == 4, "the third runs from 20 to 30 ms"


# Preparing


@dataclass
class Preparing(PretendedRunner):
    """Has so many parts to prepare, of 30 ms each."""

    parts: int = 5
    time: Time = field(default_factory=Time)
    prepared_before_step: list[int] = field(default_factory=list)
    prepared: int = 0

    def prepare(self) -> bool:
        if self.prepared == self.parts:
            return False
        self.prepared += 1
        self.time.now_ms += 30
        return True

    def launch(self, plan: StepPlan) -> PretendedStep:
        self.prepared_before_step.append(self.prepared)
        return super().launch(plan)


def run_preparing(*due: tuple[float, engine_pb2.EngineCommand]) -> tuple[Preparing, TimedFront]:
    limits = limits_of()
    runner = Preparing(limits)
    step_time = StepTimeModel()
    front = TimedFront([], time=runner.time, due=list(due))
    EngineLoop(Planner(limits, step_time), step_time, runner, front, runner.time).run()
    return runner, front


def test_while_nothing_else_is_to_be_done_the_runner_prepares_a_part_at_a_time() -> None:
    runner, _ = run_preparing((70, add_command(add(1, 2, max_tokens=3))), (1000, shutdown_command()))
    assert runner.prepared_before_step == [3, 3, 3], "who came in the third part waited for that one, and no other"
    assert runner.prepared == 5


def test_a_sequence_expires_in_time_while_the_runner_prepares() -> None:
    held = add_command(add(1, prompt=1, held=True, remaining_ms=40))
    runner, front = run_preparing((0, held), (1000, shutdown_command()))
    assert [output.end for output in front.outputs] == [engine_pb2.SEQUENCE_END_EXPIRED]
    assert runner.prepared_before_step == []
