"""What both benchmarks are told of the engine, and the engine they make of it."""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.source import open_source
from services.worker.cuda.start import DeviceOptions, start_cuda_runner
from services.worker.cuda.weights import DeviceWeights
from services.worker.engine.limits import EngineLimits
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat


@dataclass(frozen=True, slots=True)
class Engine:
    """A runner that is ready, and what a benchmark says of it."""

    config: DecoderConfig
    limits: EngineLimits
    runner: CudaRunner
    weights: DeviceWeights
    options: DeviceOptions
    start_s: float
    """From the call to the readiness: weights, a step of the largest size, graphs."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say which engine is measured."""
    defaults = DeviceOptions()
    parser.add_argument("--device", default="cuda", help="a torch device; cpu: pretended, for tests (cuda)")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model's folder, or a GGUF file")
    parser.add_argument("--dummy", action="store_true", help="random weights of the folder's shape")
    parser.add_argument("--dtype", choices=("float32", "bf16", "fp8"), default="bf16", help="of the weights (bf16)")
    parser.add_argument(
        "--kv-dtype", choices=("auto", "fp8"), default="auto", help="of the KV cache: the weights' (auto)"
    )
    parser.add_argument("--block-size", type=int, default=defaults.block_size_tokens, help="tokens of a block (64)")
    parser.add_argument("--max-sequences", type=int, default=512, help="most sequences in a step (512)")
    parser.add_argument("--max-prefill-tokens", type=int, default=defaults.max_prefill_tokens_per_step, help="a step")
    parser.add_argument("--step-budget-ms", type=float, default=1e9, help="longest that a step with decodes may take")
    parser.add_argument("--context-tokens", type=int, default=defaults.context_tokens, help="most tokens of a sequence")
    parser.add_argument("--num-blocks", type=int, help="of the KV cache (what the memory holds)")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself")


def engine_of(arguments: argparse.Namespace) -> Engine:
    """Start the engine. Raises ModelFileError and ConfigError."""
    began = time.monotonic()
    weights: DeviceWeightFormat = arguments.dtype
    device = torch.device(arguments.device)
    options = replace(
        DeviceOptions(),
        weights=weights,
        has_fp8_cache=arguments.kv_dtype == "fp8",
        block_size_tokens=arguments.block_size,
        max_sequences=arguments.max_sequences,
        max_prefill_tokens_per_step=arguments.max_prefill_tokens,
        step_budget_ms=arguments.step_budget_ms,
        context_tokens=arguments.context_tokens,
        num_blocks=arguments.num_blocks,
        has_graphs=device.type == "cuda" and not arguments.no_graphs,
    )
    shard = Shard()
    config, load = open_source(arguments.model, weights, shard, device, lambda share: None, dummy=arguments.dummy)
    loaded = load()
    limits, runner = start_cuda_runner(config, lambda: loaded, shard, options, device)
    return Engine(config, limits, runner, loaded, options, time.monotonic() - began)


def print_line(**values: object) -> None:
    """Print one JSON object, at once."""
    print(json.dumps(values), flush=True)
