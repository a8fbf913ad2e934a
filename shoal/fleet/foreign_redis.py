"""A Redis of the user's own, tried before anything starts."""

import asyncio

from services.common.config import without_password
from services.common.store.connection import StoreError, connect
from shoal.fleet.errors import FleetError


def check_redis(url: str) -> None:
    """Raises FleetError if the Redis there does not answer, or would drop what it was given."""
    try:
        asyncio.run(_connect(url))
    except (StoreError, ValueError) as error:
        raise FleetError(
            f"the Redis at {without_password(url)} can't be used: {error}. Without --redis, a fleet brings its own"
        ) from error


async def _connect(url: str) -> None:
    await (await connect(url)).aclose()
