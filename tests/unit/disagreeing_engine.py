"""An engine's process that, if it is rank 1, computes another token than it is told to in its third step."""

from dataclasses import replace
from unittest.mock import patch

from services.worker import engine_process
from services.worker.engine.step_plan import StepPlan, StepResult
from services.worker.runner.rank_runner import RankRunner

DIFFERENT_STEP, DIFFERENT_TOKEN = 3, 7


class DisagreeingRank(RankRunner):
    """A rank whose memory failed it, say."""

    def compute(self, plan: StepPlan) -> StepResult | None:
        if self._ranks.shard.rank == 1 and plan.step == DIFFERENT_STEP:
            (chunk,) = plan.chunks
            plan = replace(plan, chunks=(chunk._replace(token_ids=(DIFFERENT_TOKEN,)),))
        return super().compute(plan)


if __name__ == "__main__":
    with patch("services.worker.runner.start.RankRunner", DisagreeingRank):
        engine_process.run()
