"""The engine's loop: take messages, plan, run, deliver."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from services.worker.engine.planner import Planner
from services.worker.engine.runner import Runner, RunningStep
from services.worker.engine.sequence import SequenceId
from services.worker.engine.step_plan import StepPlan
from services.worker.engine.step_time import StepTimeModel

Clock = Callable[[], float]
"""Milliseconds that never go back."""

PREPARED_LOOK_MS = 1.0
"""How soon an engine that does nothing else looks again whether a grammar is compiled."""

SURE_SHARE = 0.95
"""Of what a step is predicted to take, so much is waited for."""
SHORTEST_LOOK_MS, LONGEST_LOOK_MS = 0.01, 0.5
"""How long the front is waited for at a time, before the step that runs is looked at again."""
FIRST_LEAD_MS = 3.0
LEAD_MARGIN = 1.5
"""Of what planning and launching decodes took of late."""
LEAD_SHARE = 0.1
QUICK_LAUNCH_MS = 5.0
"""A step with prompts that is launched in less is planned late, as decodes are, and no token is delivered before it."""

LONG_STEP_LAUNCHES = 2.0
"""A step with prompts that takes so many times its launch is launched before the one in front is done."""


class FrontChannel(Protocol):
    """The engine's connection to its front."""

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        """Return all commands that came, waiting for the first one at most `timeout_ms` (None: as long as it takes).

        Raises FrontGoneError if the front has closed its end.
        """
        ...

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """Send an event; blocks while the front does not read. One to a front that is gone is lost."""
        ...


class FrontGoneError(Exception):
    """The front has closed its end: it died, and nobody is left to compute for."""


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    plan: StepPlan
    running: RunningStep
    launched_ms: float
    launch_ms: float
    """What launching it took."""
    predicted_ms: float
    """What it was thought to take."""


class EngineLoop:
    """One engine's steps, until the front says Shutdown or goes."""

    def __init__(
        self, planner: Planner, step_time: StepTimeModel, runner: Runner, front: FrontChannel, clock: Clock
    ) -> None:
        """`step_time` is the planner's; the loop teaches it."""
        self._planner = planner
        self._step_time = step_time
        self._runner = runner
        self._front = front
        self._clock = clock
        self._launched: deque[_LaunchedStep] = deque()
        self._last_done_ms = 0.0
        self._lead_ms = FIRST_LEAD_MS
        """How long before a step's end the next is planned, to be launched in time."""

    def run(self) -> None:
        """Make steps while there is work, else wait for the front. Returns after Shutdown.

        While the runner computes a step, the next one is planned and launched, if the runner can take it: not before
        its turn has come, so that who arrives meanwhile is in it. Raises FrontGoneError; whatever else is raised in a
        step ends the engine, since the cache's content is unknown after it.
        """
        busy = False
        while self._obey_until_turn(busy):
            if self._finishes_first():
                self._finish(self._launched.popleft())
                continue
            began_ms = self._clock()
            self._planner.expire(began_ms)
            plan = self._planner.plan()
            if plan:
                self._launch(plan, began_ms)
            busy = bool(self._launched)
            if len(self._launched) > (self._runner.steps_ahead if plan else 0):
                self._finish(self._launched.popleft())
            elif not busy:
                self._deliver_ended()

    def _obey_until_turn(self, busy: bool) -> bool:
        """Carry out what the front wants, until a step is to be planned. False: it wants the engine to stop."""
        if not self._obey(self._front.take(0) if busy else self._take_idly()):
            return False
        if not self._launched or self._runner.steps_ahead == 0:
            return True
        lead_ms = self._lead_of_next_ms()
        # Planned any earlier, the next step would lie behind the one that runs, for nothing.
        while (early_ms := self._left_ms(SURE_SHARE) - lead_ms) > SHORTEST_LOOK_MS:
            # A step that ends sooner than was thought leaves the device idle.
            if commands := self._front.take(min(early_ms, LONGEST_LOOK_MS)):
                if not self._obey(commands):
                    return False
                lead_ms = self._lead_of_next_ms()
        return True

    def _take_idly(self) -> list[engine_pb2.EngineCommand]:
        """Wait for what the front wants. Meanwhile the runner prepares for later steps, a part at a time."""
        while (idle_ms := self._idle_ms()) is None or idle_ms > PREPARED_LOOK_MS:
            if not self._runner.prepare():
                break
            if commands := self._front.take(0):
                return commands
        return self._front.take(self._idle_ms())

    def _lead_of_next_ms(self) -> float:
        """How long before the end of the step that runs the next one is planned."""
        if not self._planner.prefills_next:
            return self._lead_ms
        launch_ms = self._step_time.launch_ms
        return self._lead_ms + LEAD_MARGIN * launch_ms if launch_ms <= QUICK_LAUNCH_MS else math.inf

    def _finishes_first(self) -> bool:
        """Whether what runs is done before a step with prompts is launched: its tokens are not to wait for that.

        If the next ones take much longer than the launch, a device that does nothing meanwhile costs more.
        """
        launch_ms = self._step_time.launch_ms
        if not self._launched or self._runner.steps_ahead == 0 or launch_ms <= QUICK_LAUNCH_MS:
            return False
        if not self._planner.prefills_next or self._left_ms() >= launch_ms:
            return False
        return self._planner.next_prefill_ms < LONG_STEP_LAUNCHES * launch_ms

    def _left_ms(self, share: float = 1.0) -> float:
        """How long the step that runs still takes, if it takes this share of what is predicted."""
        running = self._launched[0]
        if running.running.is_done():
            return 0.0
        begun_ms = max(running.launched_ms, self._last_done_ms)
        return begun_ms + share * running.predicted_ms - self._clock()

    def _launch(self, plan: StepPlan, began_ms: float) -> None:
        predicted_ms = self._step_time.predict_ms(plan)
        begins = engine_pb2.StepBegins(
            step=plan.step,
            predicted_ms=max(1, round(predicted_ms)),
            sequence_ids=[chunk.sequence_id for chunk in plan.chunks],
        )
        self._front.send(engine_pb2.EngineEvent(begins=begins))
        launched_ms = self._clock()
        running = self._runner.launch(plan)
        now_ms = self._clock()
        self._launched.append(_LaunchedStep(plan, running, launched_ms, now_ms - launched_ms, predicted_ms))
        if not plan.has_prefill:
            lead_ms = LEAD_MARGIN * (now_ms - began_ms)
            # Longer at once, shorter by and by: too early costs somebody's place in a step, too late the device's time.
            self._lead_ms = max(lead_ms, self._lead_ms + LEAD_SHARE * (lead_ms - self._lead_ms))

    def _finish(self, step: _LaunchedStep) -> None:
        result = step.running.result()
        now_ms = self._clock()
        if result.took_ms is None:
            # One that was launched behind another began when that was done.
            took_ms = now_ms - max(step.launched_ms, self._last_done_ms)
            self._step_time.observe(step.plan, took_ms)
        else:
            took_ms = result.took_ms
            self._step_time.observe(step.plan, took_ms, step.launch_ms)
        self._last_done_ms = now_ms
        outputs = self._planner.take_ended() + self._planner.complete(step.plan, result)
        self._deliver(step.plan.step, took_ms, outputs)

    def _deliver_ended(self) -> None:
        """Report ends that no step brought under the number of the last step, which took no time this time."""
        if outputs := self._planner.take_ended():
            self._deliver(self._planner.num_steps, 0.0, outputs)

    def _deliver(self, step: int, took_ms: float, outputs: list[engine_pb2.SequenceOutput]) -> None:
        done = engine_pb2.StepDone(
            step=step,
            took_us=round(took_ms * 1000),
            outputs=outputs,
            free_blocks=self._planner.num_free_blocks,
            waiting_prefill_tokens=self._planner.waiting_prefill_tokens,
            step_time=request_pb2.StepTime(**self._step_time.coefficients._asdict()),
            running_sequences=self._planner.num_running,
            waiting_sequences=self._planner.num_waiting,
            preemptions=self._planner.num_preemptions,
        )
        self._front.send(engine_pb2.EngineEvent(done=done))

    def _obey(self, commands: list[engine_pb2.EngineCommand]) -> bool:
        """Carry out commands in their order. False: the front wants the engine to stop."""
        for command in commands:
            match command.WhichOneof("command"):
                case "add":
                    self._planner.add(command.add, self._clock())
                case "abort":
                    self._planner.abort(SequenceId(command.abort.sequence_id))
                case "release":
                    release = command.release
                    self._planner.release(SequenceId(release.sequence_id), release.forced_token_ids)
                case "shutdown":
                    return False
        return True

    def _idle_ms(self) -> float | None:
        """How long nothing can happen by itself: until a sequence expires, or may have its grammar."""
        if self._planner.is_preparing:
            return PREPARED_LOOK_MS
        deadline_ms = self._planner.next_deadline_ms
        return None if deadline_ms is None else max(0.0, deadline_ms - self._clock())
