"""The tokenizer service with many callers, against the library's own batch encodes.

    python -m benchmarks.tokenizer [--callers 32] [--seconds 3] [--sizes]

Starts a service, asks it over gRPC from this process, and encodes the same prompts here with `encode_batch` and
`encode_batch_fast` (which leaves out where tokens are in the text, as the service does). They take turns. Prompts are
mixed: prose in four languages, code and figures, of lognormal lengths as chat traffic has them; with --sizes also one
sentence repeated to each of some sizes: the smaller the prompt, the smaller the ratio, for a call costs about the same
whatever it carries (`front_us_per_call`).

`ratio` is of tokens a second of processor time, of the service's front and pool against the library's threads: a core
against a core, whoever else has the machine. `wall_ratio` is of tokens a second by the clock, on all cores, which the
service shares with its callers. Prints one JSON line for each kind of prompt.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
from tokenizers import Encoding, Tokenizer

from gen.shoal.fleet.v1 import tokenizer_pb2_grpc
from gen.shoal.fleet.v1.tokenizer_pb2 import EncodeRequest
from services.common import rpc
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.tokenizer.gguf_tokenizer import build_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and it is 2024 already. "
PROMPT_BYTES = (256, 1024, 4096, 16384, 65536)
NUM_PROMPTS = 64
ROUNDS = 6
MIXED = (
    "The committee met on a grey morning; nobody had read the report, and everybody had an opinion about it. ",
    "Das Gewitter zog über die Hügel, während die Kinder noch am Flussufer spielten und lachten. ",
    "海边的小镇在清晨醒来，渔民们把船推向浪里，孩子们跑过沙滩。",
    "Пароход отходил в полдень, и на пристани собралась толпа провожающих с цветами. ",
    "def total(rows: list[Row]) -> Decimal:\n    return sum((row.price * row.count for row in rows), Decimal(0))\n\n",
    "| 2024-03-17 | 1,048,576 | 3.14159 | -273.15 °C | 42 % |\n",
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, by the clock and of processor time."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    front_us_per_call: float = 0.0
    """Of the service."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of the three, for each kind of prompt")
    parser.add_argument("--sizes", action="store_true", help="also one sentence, repeated")
    options = parser.parse_args()
    started_s = time.perf_counter()
    with service() as (address, front):
        print(json.dumps({"start_up_s": round(time.perf_counter() - started_s, 2)}))
        kinds = {"mixed": mixed_prompts()}
        if options.sizes:
            kinds |= {f"{num_bytes} bytes": repeated_prompts(num_bytes) for num_bytes in PROMPT_BYTES}
        for kind, prompts in kinds.items():
            compared = compare(address, front, prompts, options.callers, options.seconds / ROUNDS)
            print(json.dumps({"prompts": kind, **compared}), flush=True)
        pool_mib = [child.memory_info().rss >> 20 for child in front.children()]
        print(json.dumps({"front_mib": front.memory_info().rss >> 20, "pool_mib": pool_mib}))


@contextmanager
def service() -> Iterator[tuple[str, psutil.Process]]:
    """A tokenizer: its address, and its front."""
    command = [sys.executable, "-m", "services.tokenizer", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        try:
            yield ready["address"], psutil.Process(process.pid)
        finally:
            process.terminate()


def mixed_prompts() -> list[str]:
    """Lengths in characters: lognormal with a median of 1,500 and sigma 1, from 50 to 16,384."""
    rng = random.Random(0)
    prompts = []
    for _ in range(NUM_PROMPTS):
        length = round(min(max(rng.lognormvariate(7.3, 1.0), 50), 16_384))
        text = ""
        while len(text) < length:
            text += rng.choice(MIXED)
        prompts.append(text[:length])
    return prompts


def repeated_prompts(num_bytes: int) -> list[str]:
    return [f"{number} {SENTENCE * (num_bytes // len(SENTENCE) + 1)}"[:num_bytes] for number in range(32)]


def compare(
    address: str, front: psutil.Process, prompts: Sequence[str], num_callers: int, round_s: float
) -> dict[str, float]:
    """Medians over the rounds, in which service and library take turns."""
    tokenizer: Tokenizer = build_tokenizer(read_gguf(default_model_path()))
    served, batch, fast = [], [], []
    for _ in range(ROUNDS):
        served.append(asyncio.run(serve(address, front, prompts, num_callers, round_s)))
        batch.append(batch_encode(tokenizer.encode_batch, prompts, round_s))
        fast.append(batch_encode(tokenizer.encode_batch_fast, prompts, round_s))

    def median_ratio(of: Callable[[Speed], float], peers: Sequence[Speed]) -> float:
        return round(statistics.median(of(ours) / of(peer) for ours, peer in zip(served, peers, strict=True)), 2)

    return {
        "service_tokens_per_s": round(statistics.median(one.tokens_per_s for one in served)),
        "encode_batch_tokens_per_s": round(statistics.median(one.tokens_per_s for one in batch)),
        "ratio": median_ratio(lambda speed: speed.tokens_per_cpu_s, batch),
        "wall_ratio": median_ratio(lambda speed: speed.tokens_per_s, batch),
        "ratio_to_fast": median_ratio(lambda speed: speed.tokens_per_cpu_s, fast),
        "front_us_per_call": round(statistics.median(one.front_us_per_call for one in served)),
    }


async def serve(address: str, front: psutil.Process, prompts: Sequence[str], num_callers: int, seconds: float) -> Speed:
    num_tokens = num_calls = 0
    requests = [EncodeRequest(prompt=prompt) for prompt in prompts]
    async with rpc.channel(address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

        async def call_until(end_s: float) -> None:
            nonlocal num_tokens, num_calls
            while time.perf_counter() < end_s:
                response = await stub.Encode(requests[num_calls % len(requests)])
                num_calls += 1
                num_tokens += len(response.token_ids)

        await stub.Encode(requests[0])
        front_before_s, pool_before_s, started_s = cpu_s([front]), cpu_s(front.children()), time.perf_counter()
        await asyncio.gather(*(call_until(started_s + seconds) for _ in range(num_callers)))
        elapsed_s = time.perf_counter() - started_s
    front_s, pool_s = cpu_s([front]) - front_before_s, cpu_s(front.children()) - pool_before_s
    return Speed(num_tokens / elapsed_s, num_tokens / (front_s + pool_s), front_s / num_calls * 1e6)


def batch_encode(encode: Callable[[list[str]], list[Encoding]], prompts: Sequence[str], seconds: float) -> Speed:
    """The library's speed, over batches of these prompts."""
    num_tokens = 0
    started_s, cpu_before_s = time.perf_counter(), time.process_time()
    while time.perf_counter() - started_s < seconds:
        num_tokens += sum(len(encoding.ids) for encoding in encode(list(prompts)))
    cpu_took_s = time.process_time() - cpu_before_s
    return Speed(num_tokens / (time.perf_counter() - started_s), num_tokens / cpu_took_s)


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Processor time of processes so far."""
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


if __name__ == "__main__":
    main()
