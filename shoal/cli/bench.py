"""`shoal bench`: `serve` is load on a server, and what its users would see; the others are in `bench_engine`."""

import argparse
import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal._gateways import call_metadata
from shoal.cli import bench_engine
from shoal.cli.access import add_access_flags, tls_of
from shoal.cli.asking import gateways_of
from shoal.fleet.errors import FleetError

_ABOUT = """Puts a load on Shoal's gateways, or on any server with OpenAI's HTTP API (--url), and prints percentiles of
TTFT, ITL, TPOT and E2E, tokens a second, errors by kind, and goodput. Requests come as a Poisson process (--rate), a
fixed number at once (--concurrency), or at their own arrival_s (all at once in a workload). Latencies begin at the
intended arrival. ITL is the pause between two messages with tokens; an answer meets --slo-itl-ms if the p99 of its
pauses does."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser("bench", help="measure a server under load")
    kinds = parser.add_subparsers(required=True, metavar="serve|engine|profile")
    serve = kinds.add_parser("serve", help="latencies and throughput", description=_ABOUT, allow_abbrev=False)
    what = serve.add_mutually_exclusive_group()
    what.add_argument(
        "--workload", default="mixed", metavar="NAME", help="a shape of requests: see docs/benchmarks.md (mixed)"
    )
    what.add_argument("--input", type=Path, metavar="FILE", help="requests, a JSON object a line")
    serve.add_argument("--requests", type=int, metavar="N", help="only the first N")
    serve.add_argument("--seed", type=int, default=0, help="of lengths, tokens and arrivals (0)")
    serve.add_argument(
        "--vocab", type=int, metavar="N", help="the model's vocabulary (a fleet is asked); with --url needed"
    )
    serve.add_argument("--first-token", type=int, default=0, metavar="ID", help="lowest token id of a workload (0)")
    when = serve.add_mutually_exclusive_group()
    when.add_argument("--rate", type=float, metavar="R", help="mean arrivals a second, a Poisson process")
    when.add_argument("--concurrency", type=int, metavar="N", help="a closed loop: so many open at once")
    serve.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not counted (1)")
    serve.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="longest an answer may take (600)")
    where = serve.add_mutually_exclusive_group()
    where.add_argument("--gateways", metavar="ADDR,..", help="host:port of the gateways (those of `shoal up` here)")
    where.add_argument("--url", default="", metavar="URL", help="a server with OpenAI's API, http://host:port")
    add_access_flags(serve)
    serve.add_argument("--model", default="", help="a model's name (the server's first)")
    serve.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="expected time to the first token")
    serve.add_argument("--slo-itl-ms", type=float, metavar="MS", help="expected pause between tokens")
    serve.add_argument("--json", type=Path, metavar="FILE", help="write figures and every request there")
    serve.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the latencies' distributions there")
    serve.set_defaults(run=run)
    bench_engine.add_to(kinds)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Measure and print. Status 1 if a request failed."""
    _check(arguments)
    try:
        # Imported here only: numpy and aiohttp would slow down every other command, and need not be there.
        from shoal.bench.ask import LoadError
        from shoal.bench.serve import Settings, serve
        from shoal.bench.target import TargetError
    except ImportError as error:
        raise FleetError(f"{error.name} is missing: pip install 'shoal-inference[bench]'") from error
    told = {
        name: getattr(arguments, name)
        for name in Settings.__dataclass_fields__
        if name not in ("gateways", "tls", "metadata")
    }
    try:
        gateways, tls = ((), tls_of(arguments, None)) if arguments.url else gateways_of(arguments)
        settings = Settings(gateways=gateways, tls=tls, metadata=call_metadata(arguments.api_key), **told)
    except ValueError as error:
        raise FleetError(f"no client can be made: {error}") from error
    try:
        return 1 if asyncio.run(serve(settings)) else 0
    except (LoadError, TargetError) as error:
        raise FleetError(str(error)) from error


def _check(arguments: argparse.Namespace) -> None:
    for flag, least in (("requests", 1), ("concurrency", 1), ("warmup", 0), ("vocab", 16), ("first_token", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise FleetError(f"--{flag.replace('_', '-')} is {value}; the least is {least}")
    if arguments.rate is not None and not 0 < arguments.rate < math.inf:
        raise FleetError(f"--rate is {arguments.rate}; it must be a number above 0")
    if arguments.url and not arguments.url.startswith(("http://", "https://")):
        raise FleetError(f"--url is {arguments.url}; it looks like http://127.0.0.1:8000")
    for flag, file in (("json", arguments.json), ("plot", arguments.plot)):
        # Told before the load, which may take long.
        if file and not file.parent.is_dir():
            raise FleetError(f"--{flag} {file}: there is no folder {file.parent}")
