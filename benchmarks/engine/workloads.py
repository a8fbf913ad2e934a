"""What every engine is asked, and the figure that comes of it.

Prompts are random tokens of a seed, the same for all engines, and other ones in each round and each try: nobody's
prefix cache has any. Answers are greedy, and an end token does not end them.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.engine.protocol import Answer

FIRST_TOKEN = 256
"""Below are a vocabulary's special tokens."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Streams that are submitted at once, `repeats` times over."""

    name: str
    num_streams: int
    prompt_tokens: int
    output_tokens: int
    repeats: int
    unit: str

    @property
    def lower_is_better(self) -> bool:
        """Whether the figure is a time."""
        return self.unit == "ms"

    def prompts(self, seed: int, round_number: int, try_number: int, vocabulary_size: int) -> list[list[list[int]]]:
        """Return the prompts of each repeat: [repeats][num_streams][prompt_tokens]."""
        rng = random.Random(f"{seed}/{round_number}/{try_number}/{self.name}")
        return [
            [rng.choices(range(FIRST_TOKEN, vocabulary_size), k=self.prompt_tokens) for _ in range(self.num_streams)]
            for _ in range(self.repeats)
        ]

    def figure(self, answers: Sequence[Answer]) -> float:
        """Return the workload's figure, in `unit`, of one answer a repeat.

        Raises ValueError if an engine did not give the tokens that were asked for: it did other work.
        """
        for answer in answers:
            lengths = {len(token_ids) for token_ids in answer.token_ids}
            if len(answer.token_ids) != self.num_streams or lengths != {self.output_tokens}:
                raise ValueError(
                    f"{self.name}: {len(answer.token_ids)} streams of {sorted(lengths)} tokens came; "
                    f"{self.num_streams} of {self.output_tokens} were asked for"
                )
        return statistics.median(self._figure(answer) for answer in answers)

    def _figure(self, answer: Answer) -> float:
        if self.lower_is_better:
            return 1000 * answer.first_s
        if self.num_streams == 1:
            return (self.output_tokens - 1) / (answer.last_s - answer.first_s)
        return self.num_streams * self.output_tokens / answer.last_s


DECODE = Workload("decode", 1, 128, 128, 1, "tok/s")
"""From the first token to the last."""
TTFT_512 = Workload("ttft512", 1, 512, 1, 3, "ms")
STREAMS_8 = Workload("streams8", 8, 128, 64, 1, "tok/s")
"""Output tokens over the whole time, prefill included."""
STREAMS_32 = Workload("streams32", 32, 128, 64, 1, "tok/s")

WORKLOADS: Mapping[str, Workload] = {workload.name: workload for workload in (DECODE, TTFT_512, STREAMS_8, STREAMS_32)}
