"""Reads the command line and runs one command."""

import argparse
import sys
from collections.abc import Sequence

from services.common.errors import ShoalError, Unavailable
from shoal.cli import bench, chat, down, generate, keys, status, top, trace, up
from shoal.fleet.errors import FleetError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
USAGE = 2
"""Exit status of a command line that cannot be understood, as argparse has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit status; what goes wrong is one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="shoal", description="An LLM inference fleet that loses no request.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (up, down, status, top, keys, chat, generate, trace, bench):
        command.add_to(commands)
    if not given:
        parser.print_help(sys.stderr)
        return USAGE
    parsed = parser.parse_args(given)
    try:
        return int(parsed.run(parsed, given[1:]))
    except (FleetError, ShoalError) as error:
        print(f"shoal: {error}{_advice(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; Python would complain once more at its end.
        sys.stdout = None
        return 1


def _advice(error: FleetError | ShoalError) -> str:
    """What to do about an error of the wire; those of a gateway, which have a reason, say so themselves."""
    if isinstance(error, Unavailable) and not error.reason:
        return (
            ". Is a gateway there? Start a fleet by `shoal up`, or name its gateways by --gateways; those with TLS are "
            "called with --tls-ca"
        )
    return ""
