"""`shoal bench engine` and `shoal bench profile`: an engine on a device, without a fleet."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.cli.device_flags import add_device_flags
from shoal.fleet.errors import FleetError

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--shards", {"type": int, "metavar": "N", "help": "ranks that the model is dealt out to, a device each (1)"}),
    ("--block-size", {"type": int, "metavar": "N", "help": "tokens of a block (64)"}),
    ("--num-blocks", {"type": int, "metavar": "N", "help": "of the KV cache (what the memory holds)"}),
    ("--max-sequences", {"type": int, "metavar": "N", "help": "most sequences in a step (512)"}),
    ("--max-prefill-tokens", {"type": int, "metavar": "N", "help": "most prompt tokens in a step (8192)"}),
    (
        "--step-budget-ms",
        {"type": float, "metavar": "MS", "help": "longest that a step with decodes may take (batch work)"},
    ),
    ("--context-tokens", {"type": int, "metavar": "N", "help": "most tokens of a sequence (8192)"}),
)
"""Of the engine, whose own defaults hold for those that are not given."""


def add_to(kinds: Any) -> None:
    """Declare both."""
    engine: argparse.ArgumentParser = kinds.add_parser(
        "engine", help="an engine alone on a device: tokens a second, a JSON line a run", allow_abbrev=False
    )
    _add_options(engine)
    engine.add_argument("--workload", required=True, metavar="NAME|FILE", help="a shape's name, or requests")
    engine.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of a name: a run each (0 1 2)")
    engine.set_defaults(run=run_engine)
    profile: argparse.ArgumentParser = kinds.add_parser(
        "profile", help="where a step's time goes on a device, beside the least it can take", allow_abbrev=False
    )
    _add_options(profile)
    profile.add_argument(
        "--step", action="append", required=True, metavar="NxT@C", help="N chunks of T tokens behind C cached ones"
    )
    profile.set_defaults(run=run_profile)


def run_engine(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure; the engine's exit status."""
    # Imported here only: numpy need not be there for other commands.
    from shoal.bench import engine
    from shoal.bench.ask import LoadError

    try:
        return engine.run_engine(arguments.workload, arguments.seeds, arguments.model, _options(arguments))
    except LoadError as error:
        raise FleetError(str(error)) from error


def run_profile(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Look at steps; the engine's exit status."""
    from shoal.bench import engine

    steps = [part for step in arguments.step for part in ("--step", step)]
    return engine.run_profile(arguments.model, [*_options(arguments), *steps])


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model's folder")
    parser.add_argument("--device", metavar="NAME", help="a torch device (cuda)")
    add_device_flags(parser)
    for flag, settings in _OPTIONS:
        parser.add_argument(flag, **settings)


def _options(arguments: argparse.Namespace) -> list[str]:
    """Those that were given, as the engine takes them."""
    flags = ("--device", "--dtype", "--kv-dtype", *(flag for flag, _ in _OPTIONS))
    named = [(flag, getattr(arguments, flag.removeprefix("--").replace("-", "_"))) for flag in flags]
    given = [part for flag, value in named if value is not None for part in (flag, str(value))]
    return [*given, "--dummy"] if arguments.dummy else given
