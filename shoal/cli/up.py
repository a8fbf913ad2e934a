"""`shoal up`: a whole fleet on this machine."""

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.cli.device_flags import add_device_flags
from shoal.cli.numbers import whole_number
from shoal.fleet.detach import start_detached
from shoal.fleet.dummy_model import with_tokenizer
from shoal.fleet.errors import FleetError
from shoal.fleet.model_file import find_model
from shoal.fleet.options import FleetOptions
from shoal.fleet.plan import FleetPlan, plan_fleet
from shoal.fleet.progress import Progress
from shoal.fleet.state_dir import StateDir, find_state_dir
from shoal.fleet.supervisor import Supervisor

_ABOUT = """Starts a fleet and keeps it running until Ctrl-C or `shoal down`: what dies is started again at its address.
When all processes are ready, and again after each restart, one JSON line lists them. Logs and data are in .shoal, or
where SHOAL_STATE_DIR says. The services' own settings can be given as SHOAL_ variables: see `python -m
services.worker --help`."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "up", help="start a fleet on this machine", description=_ABOUT, allow_abbrev=False
    )
    count, port = whole_number(1, 64), whole_number(0, 65_000)
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument("--workers", type=count, default=1, metavar="N", help="number of workers (1)")
    workers.add_argument(
        "--autoscale", type=_range, metavar="MIN:MAX", help="as many workers as there is work for; 0:N from none"
    )
    parser.add_argument(
        "--shards", type=count, default=1, metavar="N", help="processes that each worker's model is dealt out to (1)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what workers compute on: cuda is a GPU (cpu)"
    )
    add_device_flags(parser)
    for kind in ("gateways", "schedulers", "tokenizers"):
        parser.add_argument(f"--{kind}", type=count, default=1, metavar="N", help=f"number of {kind} (1)")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="a GGUF file, or a folder of Hugging Face (SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--redis", default="", metavar="URL", help="a Redis or Valkey to use (an embedded one)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="data of the embedded Redis (in .shoal)")
    parser.add_argument(
        "--port", type=port, default=0, metavar="N", help="port of the first gateway; the next: above it (free ones)"
    )
    parser.add_argument(
        "--http-port", type=port, default=0, metavar="N", help="the same of their OpenAI-compatible HTTP (free ones)"
    )
    parser.add_argument(
        "--tls", action="store_true", help="TLS for clients, mutual TLS between services, by a throw-away authority"
    )
    parser.add_argument("--metrics", action="store_true", help="serve Prometheus metrics, each process at a free port")
    parser.add_argument("--detach", action="store_true", help="leave it in the background once it is ready")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Run the fleet until it is told to stop, or start it and leave."""
    state = find_state_dir()
    if arguments.detach:
        fleet = start_detached([word for word in given if word != "--detach"], state)
        print(json.dumps(fleet.line()))
        return 0
    least, most = arguments.autoscale or (arguments.workers, arguments.workers)
    options = FleetOptions(
        model_path=_model(arguments, state),
        workers=least,
        spare_workers=most - least,
        shards=arguments.shards,
        device=arguments.device,
        dtype=arguments.dtype or "",
        kv_dtype=arguments.kv_dtype or "",
        dummy=arguments.dummy,
        gateways=arguments.gateways,
        schedulers=arguments.schedulers,
        tokenizers=arguments.tokenizers,
        redis_url=arguments.redis,
        data_dir=arguments.data_dir,
        port=arguments.port,
        http_port=arguments.http_port,
        metrics=arguments.metrics,
    )
    if options.redis_url:
        # Imported here only: the client of Redis would take a fifth of the time until anything is started.
        from shoal.fleet.foreign_redis import check_redis

        check_redis(options.redis_url)
    with state.lock():
        if arguments.tls:
            # Inside of the lock: they are not to be replaced under a fleet that runs. Imported here only, like Redis.
            from shoal.fleet.certificates import make_certificates

            options = replace(options, tls=make_certificates(state.certificates))
        plan = plan_fleet(options, state, random.Random())
        asyncio.run(_run(plan, state))
    return 0


def _model(arguments: argparse.Namespace, state: StateDir) -> Path:
    asked = [flag for flag in ("dtype", "kv_dtype", "dummy") if getattr(arguments, flag)]
    if asked and arguments.device == "cpu":
        raise FleetError(f"--{asked[0].replace('_', '-')} is of a GPU: give --device cuda with it")
    model = find_model(arguments.model)
    # Under the model's own name: the pool's is made of it.
    return with_tokenizer(model, state.dummy_models / model.name) if arguments.dummy else model


async def _run(plan: FleetPlan, state: StateDir) -> None:
    progress = Progress(sys.stderr)
    supervisor = Supervisor(plan, state, progress, sys.stdout)
    stop = asyncio.Event()

    def end() -> None:
        if stop.is_set():
            supervisor.kill_all()
        else:
            stop.set()
            progress.say("shoal: stopping (again to kill)")

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
    await supervisor.run(stop)


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and int(least) <= int(most) and 1 <= int(most) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, as 1:4, with MIN from 0 and MAX from 1 to 64")
    return int(least), int(most)
