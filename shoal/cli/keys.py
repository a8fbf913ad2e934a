"""`shoal keys`: who may call the fleet's gateways."""

import argparse
import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from shoal.cli.environment import default
from shoal.cli.numbers import whole_number
from shoal.fleet.errors import FleetError
from shoal.fleet.running import find_running
from shoal.fleet.state_dir import find_state_dir

if TYPE_CHECKING:
    from services.common.store.api_keys import ApiKeys, KeyInfo

_ABOUT = """API keys live in the fleet's Redis, each only as a hash: `create` tells a key once, in its JSON line.
Gateways with --require-keys true serve nobody without one; the key says whose requests the caller's are. What was
revoked is refused within 2 s; streams that are open then go on to their end."""
_UNITS_MS: Mapping[str, int] = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def add_to(commands: Any) -> None:
    """Declare the command and its three parts."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "keys", help="make, list and revoke API keys", description=_ABOUT, allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a key and tell it", allow_abbrev=False)
    create.add_argument("--tenant", required=True, help="whose requests the caller's are: 1 to 64 of A-Z a-z 0-9 . _ -")
    create.add_argument(
        "--max-in-flight", type=whole_number(1, 1_000_000), default=0, metavar="N",
        help="most requests of the tenant at once (any number)",
    )  # fmt: skip
    create.add_argument(
        "--max-tokens-per-minute", type=whole_number(1, 1_000_000_000), default=0, metavar="N",
        help="most tokens that the tenant's requests take a minute (any number)",
    )  # fmt: skip
    create.add_argument(
        "--expires-in", type=_lifetime_ms, default=0, metavar="TIME", help="as 30m, 12h or 90d (it does not expire)"
    )
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="a JSON line for each key, without the key", allow_abbrev=False)
    listing.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="end a key", allow_abbrev=False)
    revoke.add_argument("key_id", help="the middle part of the key, as `shoal keys list` shows it")
    revoke.set_defaults(run=_revoke)
    for action in (create, listing, revoke):
        action.add_argument("--redis", default=default("REDIS_URL"), metavar="URL", help="(that of `shoal up` here)")


def _create(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    async def create(keys: "ApiKeys") -> None:
        key, info = await keys.create(
            arguments.tenant, arguments.max_in_flight, arguments.expires_in, arguments.max_tokens_per_minute
        )
        print(json.dumps({"key": key, **_shown(info)}))

    _with_keys(arguments, create)
    return 0


def _list(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    async def show(keys: "ApiKeys") -> None:
        for info in await keys.all():
            print(json.dumps(_shown(info)))

    _with_keys(arguments, show)
    return 0


def _revoke(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    async def revoke(keys: "ApiKeys") -> None:
        if not await keys.revoke(arguments.key_id):
            raise FleetError(f"there is no key with the id {arguments.key_id[:80]!r}: `shoal keys list` shows all ids")

    _with_keys(arguments, revoke)
    return 0


def _with_keys(arguments: argparse.Namespace, act: "Callable[[ApiKeys], Awaitable[None]]") -> None:
    # Imported here only: the client of Redis would slow the start of every other command.
    from services.common.store.api_keys import ApiKeys
    from services.common.store.connection import StoreError, connect

    url = arguments.redis or find_running(find_state_dir()).redis_url

    async def connected() -> None:
        redis = await connect(url)
        try:
            await act(ApiKeys(redis))
        finally:
            await redis.aclose()

    try:
        asyncio.run(connected())
    except (StoreError, ValueError) as error:
        raise FleetError(f"keys: {error}") from error


def _shown(info: "KeyInfo") -> dict[str, Any]:
    """Times as people read them."""
    fields = asdict(info)
    created_at_ms, expires_at_ms = fields.pop("created_at_ms"), fields.pop("expires_at_ms")
    return {**fields, "created_at": _time(created_at_ms), "expires_at": _time(expires_at_ms) if expires_at_ms else None}


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


def _lifetime_ms(text: str) -> int:
    parts = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: a number and one of s, m, h, d")
    return int(parts[1]) * _UNITS_MS[parts[2]]
