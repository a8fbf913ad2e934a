"""A model as it lies on disk, in either form."""

from pathlib import Path

from services.common.model.errors import ModelFileError
from services.common.model.folder import ModelFolder, read_folder
from services.common.model.gguf import GgufFile, read_gguf

StoredModel = GgufFile | ModelFolder


def read_stored_model(path: Path) -> StoredModel:
    """Read what a GGUF file, or a folder in the layout of Hugging Face, says of itself; no weights.

    Raises ModelFileError if it is absent, neither, or damaged.
    """
    if not path.exists():
        raise ModelFileError(path, "is not there: name a GGUF file, or a folder in the layout of Hugging Face")
    return read_folder(path) if path.is_dir() else read_gguf(path)


def context_tokens(model: StoredModel) -> int:
    """Return the most tokens of prompt and answer together. Raises ModelFileError if the model does not say."""
    if isinstance(model, GgufFile):
        return model.require(f"{model.require('general.architecture', str)}.context_length", int)
    return model.config.require("max_position_embeddings", int)
