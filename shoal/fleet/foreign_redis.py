"""A Redis of the user's own, tried before anything starts."""

import asyncio

from services.common.store.connection import StoreError, connect
from shoal.fleet.errors import FleetError


def check_redis(url: str) -> None:
    """Raises FleetError if the Redis there does not answer, or would drop what it was given."""
    try:
        asyncio.run(_connect(url))
    except StoreError as error:
        raise FleetError(
            f"the Redis at {_without_password(url)} can't be used: {error}. Without --redis, a fleet brings its own"
        ) from error


async def _connect(url: str) -> None:
    await (await connect(url)).aclose()


def _without_password(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
