"""How long a step may take that holds both decodes and prompts.

Whoever decodes gets no token before the step's end. So a step keeps a budget, but for two cases:

- While a backlog of prompts lasts, the budget is stretched: larger chunks cost less time a token, and first tokens that
  are late by many steps weigh more than tokens that are late by one.
- One in a hundred intervals between tokens may be late. They are saved, and spent where the next prompt is a long one:
  one step takes up to five budgets. So a prompt of 4,000 tokens beside eight decodes is computed in two long steps,
  for 16 late tokens, instead of ten that take a fifth more time together. Shorter ones that wait with it go
  first, in a step of their own.
"""

LATE_SHARE = 1 / 128
"""Of all intervals between tokens, those that long steps may make late: less than one in a hundred, since some are late
for other reasons."""
MOST_SAVED = 64
"""Late intervals that may be spent at once; so beside more decodes no step is long."""
LONG_PROMPT = 2.0
"""Budgets that a prompt must take to be worth late tokens."""
LONGEST_STEP = 5.0
"""Budgets that a step takes at most while others decode: on a GPU 2,000 tokens of an 8B. On a CPU larger chunks spare
little, and a second is long enough to wait for."""
LASTING_BACKLOG = 0.75
"""Of the budget: what the backlog may take in the mean of the last hundred steps; if more, the budget grows with it."""
MOST_STRETCH = 2.5
MEMORY = 0.99
"""A step's backlog keeps this share of its weight with each later one."""


class StepBudget:
    """Which late intervals are saved, and how long the backlog was. Only its owner, the planner, changes it."""

    def __init__(self) -> None:
        self._num_saved = 0.0
        self._mean_backlog_ms = 0.0

    def begin_step(self, num_decodes: int, backlog_ms: float) -> None:
        """Take in what another step has to do. `backlog_ms`: what all that waits to be prefilled would take alone."""
        self._mean_backlog_ms += (1 - MEMORY) * (backlog_ms - self._mean_backlog_ms)
        self._num_saved = min(MOST_SAVED, self._num_saved + LATE_SHARE * num_decodes)

    def stretched_ms(self, budget_ms: float) -> float:
        """Return how long the step may take, if it is no long one."""
        return min(MOST_STRETCH * budget_ms, max(budget_ms, self._mean_backlog_ms / LASTING_BACKLOG))

    def spend(self, budget_ms: float, num_decodes: int, prompt_ms: float) -> float | None:
        """Return how long the step may take, late intervals paid for if it is a long one; None: as long as it likes.

        `prompt_ms`: what the first of its prompts would take alone.
        """
        if num_decodes == 0:
            return None
        if num_decodes <= self._num_saved and prompt_ms > LONG_PROMPT * budget_ms:
            self._num_saved -= num_decodes
            return LONGEST_STEP * budget_ms
        return self.stretched_ms(budget_ms)
