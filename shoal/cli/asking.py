"""Flags that `chat` and `generate` share: which fleet, and how it shall answer."""

import argparse
from pathlib import Path
from typing import TypeVar

from services.common.errors import ShoalError
from services.common.tls.files import Tls
from shoal._async_client import AsyncClient
from shoal._client import Client
from shoal._gateways import parse_addresses
from shoal._prompt import Options, ResponseFormat
from shoal._retries import RetryPolicy
from shoal._values import Priority
from shoal.cli.access import add_access_flags, tls_of
from shoal.fleet.errors import FleetError
from shoal.fleet.running import find_running
from shoal.fleet.state_dir import find_state_dir

C = TypeVar("C", Client, AsyncClient)

FIRST_CONTACT = RetryPolicy(outage_limit_s=3)
"""A wrong address is to be told soon; once a gateway has answered, a fleet that is away is one that restarts."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them. A flag that is left out leaves the choice to the fleet."""
    parser.add_argument("--gateways", metavar="ADDR,..", help="host:port of the gateways (those of `shoal up` here)")
    add_access_flags(parser)
    how = parser.add_argument_group("how to answer")
    how.add_argument("--model", help="a model's name (the fleet's only one)")
    how.add_argument("--temperature", type=float, help="0: always the most probable token (1)")
    how.add_argument("--top-p", type=float, help="keep the smallest set of tokens of this probability (1)")
    how.add_argument("--top-k", type=int, help="keep the k most probable tokens; 0: all (0)")
    how.add_argument("--min-p", type=float, help="drop tokens below this share of the best one's probability (0)")
    how.add_argument("--repetition-penalty", type=float, help="divide the logits of tokens seen before (1)")
    how.add_argument("--frequency-penalty", type=float, help="lower logits for each earlier occurrence (0)")
    how.add_argument("--presence-penalty", type=float, help="lower logits of tokens that occurred (0)")
    how.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=BIAS", help="add to a token's logit; may be repeated"
    )
    how.add_argument("--seed", type=int, help="the same seed, the same answer (drawn)")
    how.add_argument("--max-tokens", type=int, help="longest answer (what the context has left)")
    how.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    how.add_argument("--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID")
    how.add_argument("--ignore-eos", action="store_true", default=None, help="go on behind the model's end token")
    how.add_argument("--deadline-ms", type=int, help="give up after this time")
    form = how.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=_schema, dest="response_format", metavar="FILE", help="JSON that fits it")
    form.add_argument("--regex", type=_regex, dest="response_format", metavar="REGEX", help="text that matches whole")
    how.add_argument("--priority", choices=[str(priority) for priority in Priority])


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, as 42=-1.5") from error


def answer_options(arguments: argparse.Namespace) -> Options:
    """Only what was given."""
    options: Options = {}
    for name in Options.__optional_keys__:
        value = getattr(arguments, name, None)
        if value is not None:
            options[name] = value  # type: ignore[literal-required]
    return options


def _schema(path: str) -> ResponseFormat:
    try:
        return {"json_schema": Path(path).read_text()}
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error}") from error


def _regex(regex: str) -> ResponseFormat:
    return {"regex": regex}


async def client_in_contact(arguments: argparse.Namespace, retries: RetryPolicy | None = None) -> AsyncClient:
    """A client of the gateways given, else of the running fleet, of which one has just answered.

    Raises FleetError if there is neither, ShoalError if none answers within seconds.
    """
    async with client_of(AsyncClient, arguments, FIRST_CONTACT) as first:
        try:
            await first.list_models()
        except ShoalError as error:
            # What a gateway says has a reason: it is there, and says it again to the caller if that is to hear it.
            if not error.reason:
                raise
    return client_of(AsyncClient, arguments, retries)


def client_of(kind: type[C], arguments: argparse.Namespace, retries: RetryPolicy | None) -> C:
    """A client of this kind, which has asked nobody yet. Raises FleetError if the flags name no fleet."""
    try:
        gateways, tls = gateways_of(arguments)
        return kind(gateways, tls=tls, api_key=arguments.api_key, retries=retries)
    except ValueError as error:
        raise FleetError(f"no client can be made: {error}") from error


def gateways_of(arguments: argparse.Namespace) -> tuple[tuple[str, ...], Tls | None]:
    """The gateways given, else those of the running fleet, and how to call them.

    Raises FleetError if there is neither, ValueError for addresses or files that cannot be used.
    """
    running = None if arguments.gateways else find_running(find_state_dir())
    gateways = parse_addresses(running.gateways if running else arguments.gateways)
    return gateways, tls_of(arguments, running)
