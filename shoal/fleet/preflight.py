"""What can be known to be wrong before anything is started."""

import asyncio
from pathlib import Path

from services.common.model.errors import ModelFileError
from services.common.model.gguf import read_gguf
from services.common.model.location import default_model_path
from services.common.store.connection import StoreError, connect
from shoal.fleet.errors import FleetError


def find_model(path: Path | None) -> Path:
    """The model's file, after a look into it; the default model without a path. Raises FleetError."""
    try:
        found = path.resolve() if path else default_model_path()
        read_gguf(found)
    except ModelFileError as error:
        raise FleetError(f"the model can't be used: {error}") from error
    return found


def check_redis(url: str) -> None:
    """Raises FleetError if the Redis there does not answer, or would drop what it was given."""
    try:
        asyncio.run(_connect(url))
    except (StoreError, ValueError) as error:
        raise FleetError(f"the Redis at {url} can't be used: {error}") from error


async def _connect(url: str) -> None:
    await (await connect(url)).aclose()
