"""What a front tells its engine at start."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import get_args

from services.worker.weight_format import Device, DeviceWeightFormat, KvFormat, WeightFormat

RANKS_LOST_STATUS = os.EX_TEMPFAIL
"""The exit status of a rank that waited for another one in vain."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's flags: each field, under its name. Those of a sharded engine may be left out."""

    fd: int = field(metadata={"help": "the engine's end of a pair of connected stream sockets"})
    model_path: Path = field(metadata={"help": "a GGUF file, or a folder in the layout of Hugging Face"})
    kv_cache_bytes: int = field(metadata={"help": "memory of the KV cache, taken at start; 0: what a GPU has left"})
    block_size_tokens: int = field(metadata={"help": "token slots a block"})
    max_sequences: int = field(metadata={"help": "most sequences in a step"})
    max_prefill_tokens_per_step: int = field(metadata={"help": "most prompt tokens in a step"})
    step_budget_ms: int = field(metadata={"help": "longest that a step shall take that holds decodes; 0: batch work"})
    threads: int = field(metadata={"help": "threads that compute"})
    weights: WeightFormat = field(metadata={"help": "how weights are held", "choices": get_args(WeightFormat)})
    device: Device = field(default="cpu", metadata={"help": "what computes", "choices": get_args(Device)})
    dtype: DeviceWeightFormat = field(
        default="bf16", metadata={"help": "how a GPU holds weights", "choices": get_args(DeviceWeightFormat)}
    )
    kv_dtype: KvFormat = field(
        default="auto", metadata={"help": "how a GPU holds keys and values", "choices": get_args(KvFormat)}
    )
    dummy: bool = field(default=False, metadata={"help": "whether weights are random"})
    context_tokens: int = field(default=0, metadata={"help": "most tokens of a sequence; 0: the model's"})
    shards: int = field(default=1, metadata={"help": "ranks that the model is dealt out to, a process each"})
    rank: int = field(default=0, metadata={"help": "which of them this is; 0 plans"})
    memory_fd: int = field(default=0, metadata={"help": "memory that all ranks map"})
    bell_fds: str = field(default="", metadata={"help": "sockets to the other ranks, or of another one to rank 0"})

    @classmethod
    def parse(cls, arguments: Sequence[str] | None) -> "EngineConfig":
        """Read flags (None: the process's own). Exits with status 2 if one is missing, unknown or out of range."""
        parser = argparse.ArgumentParser(prog="python -m services.worker.engine_process", description=cls.__doc__)
        for declared in fields(cls):
            _declare(parser, declared, is_required=declared.default is MISSING)
        return cls(**vars(parser.parse_args(arguments)))

    @property
    def budget_ms(self) -> int | None:
        """`step_budget_ms`, as an engine's limits have it."""
        return self.step_budget_ms or None

    @property
    def bells(self) -> tuple[int, ...]:
        """`bell_fds` as numbers."""
        return tuple(map(int, self.bell_fds.split(","))) if self.bell_fds else ()

    def arguments(self) -> list[str]:
        """Return the flags that `parse` reads back."""
        return as_flags({declared.name: getattr(self, declared.name) for declared in fields(self)})


def add_rank_flags(parser: argparse.ArgumentParser) -> None:
    """Declare those flags by which other programs than an engine's are ranks; they may be left out."""
    for declared in fields(EngineConfig):
        if declared.name in ("fd", "rank", "memory_fd", "bell_fds"):
            _declare(parser, declared, is_required=False)


def as_flags(told: Mapping[str, object]) -> list[str]:
    """Return fields as flags."""
    return [text for name, value in told.items() for text in (_flag(name), str(value))]


_MAY_BE_0 = ("fd", "rank", "memory_fd", "kv_cache_bytes", "context_tokens", "step_budget_ms")


def _declare(parser: argparse.ArgumentParser, declared: "Field[object]", *, is_required: bool) -> None:
    parser.add_argument(
        _flag(declared.name),
        type=_converter(declared),
        choices=declared.metadata.get("choices"),
        required=is_required,
        default=None if declared.default is MISSING else declared.default,
        help=declared.metadata["help"],
    )


def _converter(declared: "Field[object]") -> Callable[[str], object]:
    if declared.type is Path:
        return Path
    if declared.type is str or "choices" in declared.metadata:
        return str
    if declared.type is bool:
        return lambda text: {"True": True, "False": False}[text]
    return _whole_number if declared.name in _MAY_BE_0 else _positive


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _whole_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
