"""What both benchmarks are told of the engine, and the engine they make of it."""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.worker.cuda.cuda_runner import CudaRunner
from services.worker.cuda.rank_runner import LeadingRunner
from services.worker.cuda.source import open_source
from services.worker.cuda.start import DeviceOptions, start_cuda_runner
from services.worker.cuda.weights import DeviceWeights
from services.worker.engine.limits import EngineLimits
from services.worker.rank_file import RankFile
from services.worker.runner.models.decoder_weights import DecoderConfig
from services.worker.runner.models.shard import Shard
from services.worker.weight_format import DeviceWeightFormat


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A rank that is ready."""

    config: DecoderConfig
    """What it computes of the model: all of it, if it is the only one."""
    limits: EngineLimits
    runner: CudaRunner
    weights: DeviceWeights
    options: DeviceOptions
    shards: int
    start_s: float
    """From the call to the readiness: weights, a step of the largest size."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A runner that is measured, and what is said of it: of rank 0, if there are several."""

    rank: LoadedEngine
    runner: CudaRunner | LeadingRunner


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
    parser.add_argument(
        "--step-budget-ms", type=float, default=0.0, help="longest that a step with decodes may take (0: batch work)"
    )
    parser.add_argument("--context-tokens", type=int, default=defaults.context_tokens, help="most tokens of a sequence")
    parser.add_argument("--num-blocks", type=int, help="of the KV cache (what the memory holds)")
    parser.add_argument("--shards", type=int, default=1, help="ranks that the model is dealt out to, a device each (1)")
    parser.add_argument("--batch-invariant", action="store_true", help="the same tokens whatever else is in a step")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself, of a step as it is")


def device_of(name: str, rank: int) -> torch.device:
    """Return a rank's device, and make it the current one: "cuda" is one each, as long as there are some."""
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def load_engine(arguments: argparse.Namespace, rank: int = 0, file: RankFile | None = None) -> LoadedEngine:
    """Start a rank, of several with what they share. Raises ModelFileError, ConfigError and NcclError."""
    began = time.monotonic()
    weights: DeviceWeightFormat = arguments.dtype
    device = device_of(arguments.device, rank)
    options = replace(
        DeviceOptions(),
        weights=weights,
        has_fp8_cache=arguments.kv_dtype == "fp8",
        block_size_tokens=arguments.block_size,
        max_sequences=arguments.max_sequences,
        max_prefill_tokens_per_step=arguments.max_prefill_tokens,
        step_budget_ms=arguments.step_budget_ms or None,
        context_tokens=arguments.context_tokens,
        num_blocks=arguments.num_blocks,
        has_graphs=not arguments.no_graphs,
        is_batch_invariant=arguments.batch_invariant,
    )
    shard = Shard(rank, arguments.shards)
    config, load = open_source(arguments.model, weights, shard, device, lambda share: None, dummy=arguments.dummy)
    loaded = load()
    limits, runner = start_cuda_runner(config, lambda: loaded, shard, options, device, file)
    took_s = time.monotonic() - began
    return LoadedEngine(shard.config(config), limits, runner, loaded, options, arguments.shards, took_s)


def print_line(**values: object) -> None:
    """Print one JSON object, at once."""
    print(json.dumps(values), flush=True)
