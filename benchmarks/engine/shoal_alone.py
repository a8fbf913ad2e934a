"""Shoal's engine alone in its process: the loop, the planner and the runner of a worker, no front and no fleet."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.engine.protocol import Answer, serve
from benchmarks.engine.shoal_settings import engine_config
from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from services.common.model.gguf import read_gguf
from services.worker.engine.loop import EngineLoop
from services.worker.engine.planner import Planner
from services.worker.engine.step_time import StepTimeModel
from services.worker.runner.start import start_cpu_runner
from services.worker.weights.open_decoder import open_decoder


class LocalFront:
    """A `FrontChannel` in the engine's own process: hands all sequences over at once, then stops when all have ended.

    `on_iteration` is called each time that the loop asks for messages, which is once a step, with the number of tokens
    generated until then.
    """

    def __init__(self, adds: Sequence[engine_pb2.AddSequence], on_iteration: Callable[[int], None]) -> None:
        self._commands = [engine_pb2.EngineCommand(add=add) for add in adds]
        self._on_iteration = on_iteration
        self._num_running = len(adds)
        self.token_ids: dict[int, list[int]] = {add.sequence_id: [] for add in adds}
        """What each sequence has generated."""
        self.first_s = 0.0
        """When the first token came, by `time.perf_counter`."""

    def take(self, timeout_ms: float | None) -> list[engine_pb2.EngineCommand]:
        """As FrontChannel.take; never waits."""
        self._on_iteration(sum(len(token_ids) for token_ids in self.token_ids.values()))
        if self._num_running == 0:
            return [engine_pb2.EngineCommand(shutdown=engine_pb2.EngineCommand.Shutdown())]
        commands, self._commands = self._commands, []
        return commands

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """As FrontChannel.send. Raises RuntimeError if a sequence failed."""
        if event.WhichOneof("event") != "done":
            return
        for output in event.done.outputs:
            if output.error:
                raise RuntimeError(f"sequence {output.sequence_id} failed: {output.error}")
            if output.token_ids and not self.first_s:
                self.first_s = time.perf_counter()
            self.token_ids[output.sequence_id].extend(output.token_ids)
            self._num_running -= bool(output.end)


class ShoalEngine:
    """An engine that lives on from run to run, with what it has learned of its steps' times."""

    def __init__(self) -> None:
        self._num_sequences = 0

    def load(self, model: Path, settings: Mapping[str, str]) -> str:
        """Load the model and allocate the KV cache as a worker would."""
        config = engine_config(model, settings)
        limits, self.runner = start_cpu_runner(open_decoder(read_gguf(model)), config, lambda share: None)
        self._step_time = StepTimeModel()
        self.planner = Planner(limits, self._step_time)
        return f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {config.threads} threads"

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        on_iteration: Callable[[int], None] = lambda num_tokens: None,
    ) -> Answer:
        """Answer all prompts at once."""
        began_s = time.perf_counter()
        front = LocalFront([self._add(prompt, max_tokens) for prompt in prompts], on_iteration)
        EngineLoop(self.planner, self._step_time, self.runner, front, lambda: 1000 * time.monotonic()).run()
        last_s = time.perf_counter()
        return Answer(list(front.token_ids.values()), front.first_s - began_s, last_s - began_s)

    def close(self) -> None:
        """Nothing was started."""

    def _add(self, prompt: Sequence[int], max_tokens: int) -> engine_pb2.AddSequence:
        self._num_sequences += 1
        # No stop tokens: that is what a gateway makes of `ignore_eos`.
        payload = request_pb2.RequestPayload(prompt_token_ids=prompt, max_tokens=max_tokens)
        payload.sampling.temperature = 0
        return engine_pb2.AddSequence(sequence_id=self._num_sequences, payload=payload)


if __name__ == "__main__":
    serve(ShoalEngine())
