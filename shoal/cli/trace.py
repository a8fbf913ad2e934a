"""`shoal trace`: what became of one request, phase by phase, by its decision record."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shoal._client import Client
from shoal._values import RequestInfo
from shoal.cli.access import add_access_flags
from shoal.cli.asking import FIRST_CONTACT, client_of

_ABOUT = """Prints each decision made about a request, when, and how long after the one before; and where its time went.
It works while the request runs, and for as long as ended ones are kept (10 minutes), with or without OpenTelemetry."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "trace", help="tell what became of a request", description=_ABOUT, allow_abbrev=False
    )
    parser.add_argument("request_id", metavar="ID", help="of a request; `shoal generate --stats` tells it")
    parser.add_argument("--gateways", metavar="ADDR,..", help="host:port of the gateways (those of `shoal up` here)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    add_access_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Ask a gateway and print."""
    with client_of(Client, arguments, FIRST_CONTACT) as client:
        info = client.get_request(arguments.request_id)
    print(json.dumps(asdict(info)) if arguments.json else "\n".join(lines_of(info)))
    return 0


def lines_of(info: RequestInfo) -> list[str]:
    """For a person: the request, its decisions, its phases."""
    usage = info.usage
    return [
        f"{info.request_id}: {info.state}, attempts: {info.attempts}, model {info.model}",
        f"trace {info.trace_id or '-'}; {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} generated",
        "",
        f"{'at ms':>9} {'after':>8}  attempt  decision",
        *_decisions(info),
        *_phases(info),
        *([f"error: {info.error}"] if info.error else []),
    ]


def _decisions(info: RequestInfo) -> list[str]:
    lines, before_ms = [], 0
    for each in info.decisions:
        after = f"+{each.at_ms - before_ms}"
        lines.append(f"{each.at_ms:>9} {after:>8}  {each.attempt:>7}  {each.what} {each.detail}".rstrip())
        before_ms = each.at_ms
    return lines


def _phases(info: RequestInfo) -> list[str]:
    timings = info.timings
    if timings is None:
        return []
    phases = {
        "in the queue": timings.placed_ms,
        # Counted from the first placement: earlier attempts, if there were any, are part of it.
        "to the first token": max(0, timings.first_token_ms - timings.placed_ms),
        "from there to the end": max(0, timings.finished_ms - timings.first_token_ms),
    }
    return ["", ", ".join(f"{name} {took_ms} ms" for name, took_ms in phases.items())]
