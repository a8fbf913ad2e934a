"""The model's file or folder, looked into before anything starts."""

from pathlib import Path

from services.common.model.errors import ModelFileError
from services.common.model.location import default_model_path
from services.common.model.stored_model import read_stored_model
from shoal.fleet.errors import FleetError


def find_model(path: Path | None) -> Path:
    """The model's file or folder, after a look into it; the default model without a path. Raises FleetError."""
    try:
        found = path.resolve() if path else default_model_path()
        read_stored_model(found)
    except ModelFileError as error:
        raise FleetError(f"the model can't be used: {error}") from error
    return found
