"""`shoal down`: the end of a fleet."""

import argparse
from collections.abc import Sequence
from typing import Any

from shoal.fleet.running import stop_running
from shoal.fleet.state_dir import find_state_dir


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "down", help="stop the fleet", description="Stops the fleet and waits until all of its processes are gone."
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Stop the fleet of the state directory."""
    stop_running(find_state_dir())
    return 0
