"""What masks cost in an engine's steps: `python -m benchmarks.grammar_steps [--tokens 60] [--rounds 4]`.

One engine without its front, on the CPU: one and eight streams, free and under a schema, in turns. Of each step: how
long it took, how much of it planning and completing took (there the masks are made), and how many ms more a step under
a schema took. The tokens are sampled at temperature 1. Prints one line each.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.grammar import PERSON
from gen.shoal.fleet.v1 import engine_pb2, request_pb2
from gen.shoal.inference.v1 import inference_pb2
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.common.text.grammar import GrammarCompiler
from services.common.text.stored_vocabulary import read_vocabulary
from services.worker.engine.grammar import Grammars
from services.worker.engine.planner import Planner
from services.worker.engine.runner import Runner
from services.worker.engine.step_time import StepTimeModel
from services.worker.engine_config import EngineConfig
from services.worker.runner.start import start_cpu_runner
from services.worker.weights.open_decoder import open_decoder

SCHEMA = inference_pb2.ResponseFormat(json_schema=json.dumps({"type": "array", "items": PERSON, "minItems": 50}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    file = read_gguf(default_model_path())
    config = EngineConfig(0, Path(), 1 << 28, 16, 16, 256, 1000, options.threads, "float32")
    limits, runner = start_cpu_runner(open_decoder(file), config, lambda share: None)
    with ThreadPoolExecutor(1) as executor:
        grammars = Grammars(executor, lambda: GrammarCompiler(read_vocabulary(file)))
        for num_streams in (1, 8):
            figures: dict[str, list[tuple[float, float]]] = {"free": [], "under a schema": []}
            for round_number in range(options.rounds):
                for kind, form in (("free", None), ("under a schema", SCHEMA)):
                    planner = Planner(limits, StepTimeModel(), grammars)
                    for stream in range(num_streams):
                        planner.add(_add(stream + 1, options.tokens, round_number, form), 0.0)
                    figures[kind] += _steps(planner, runner)
            _report(num_streams, figures)


def _add(
    sequence_id: int, max_tokens: int, seed: int, form: inference_pb2.ResponseFormat | None
) -> engine_pb2.AddSequence:
    payload = request_pb2.RequestPayload(
        prompt_token_ids=[1, 504 + sequence_id, 2365, 6354], max_tokens=max_tokens, response_format=form
    )
    payload.sampling.seed = seed
    return engine_pb2.AddSequence(sequence_id=sequence_id, payload=payload)


def _steps(planner: Planner, runner: Runner) -> list[tuple[float, float]]:
    """Milliseconds of each decoding step, and of its planning and completing."""
    steps = []
    while True:
        began_s = time.perf_counter()
        plan = planner.plan()
        if plan is None:
            if planner.is_preparing:
                continue
            return steps
        planned_s = time.perf_counter()
        result = runner.launch(plan).result()
        ran_s = time.perf_counter()
        planner.complete(plan, result)
        done_s = time.perf_counter()
        if all(len(chunk.token_ids) == 1 for chunk in plan.chunks):
            steps.append((1000 * (done_s - began_s), 1000 * (planned_s - began_s + done_s - ran_s)))


def _report(num_streams: int, figures: dict[str, list[tuple[float, float]]]) -> None:
    for kind, steps in figures.items():
        whole, planning = [step[0] for step in steps], sorted(step[1] for step in steps)
        print(
            f"{num_streams} streams, {kind}: a step {statistics.median(whole):.2f} ms, of it planning "
            f"{statistics.median(planning):.3f} ms (p99 {planning[len(planning) * 99 // 100]:.2f}); medians"
        )


if __name__ == "__main__":
    main()
