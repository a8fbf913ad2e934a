"""`shoal status`: the fleet's processes."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from shoal.fleet.running import find_running
from shoal.fleet.state_dir import find_state_dir


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="list the fleet's processes",
        description="Prints the line of `shoal up` as it is now: a process that is being started has the pid null.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Print the processes of the state directory's fleet."""
    print(json.dumps(find_running(find_state_dir()).line()))
    return 0
