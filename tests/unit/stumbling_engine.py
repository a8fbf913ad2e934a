"""An engine's process whose first step raises, while a form is compiled without end."""

import threading
from unittest.mock import patch

from services.worker import engine_process
from services.worker.engine.limits import EngineLimits
from services.worker.engine.step_plan import StepPlan
from services.worker.engine.step_time import StepTimeModel
from tests.unit.engine_builders import PretendedRunner, PretendedStep, limits_of


class StumblingRunner(PretendedRunner):
    def launch(self, plan: StepPlan) -> PretendedStep:
        threading.Thread(target=threading.Event().wait, name="compiles").start()
        raise RuntimeError("an illegal memory access was encountered")


def load(*_: object) -> tuple[EngineLimits, StumblingRunner, StepTimeModel]:
    limits = limits_of()
    return limits, StumblingRunner(limits), StepTimeModel()


if __name__ == "__main__":
    with patch("services.worker.engine_process.load", load):
        engine_process.run()
