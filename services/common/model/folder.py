"""A model's folder in the layout of Hugging Face: what its configuration says.

Of generation_config.json only `eos_token_id` is taken. Its defaults for sampling (`temperature`, `top_p`,
`repetition_penalty` and so on) and for lengths are not: a request's fields have the defaults that the API documents,
whichever model answers.
"""

from dataclasses import dataclass
from pathlib import Path

from services.common.model.errors import ModelFileError
from services.common.model.json_file import JsonFile, read_json_file

# Known ones stay below 100 KB.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with config.json, and generation_config.json where there is one (else an empty object)."""

    path: Path
    config: JsonFile
    generation_config: JsonFile


def read_folder(path: Path) -> ModelFolder:
    """Read a folder's configuration. Raises ModelFileError if config.json is absent, or one of the two is damaged."""
    generation = path / "generation_config.json"
    return ModelFolder(
        path,
        read_json_file(path / "config.json", MAX_CONFIG_BYTES),
        read_json_file(generation, MAX_CONFIG_BYTES) if generation.exists() else JsonFile(generation, {}),
    )


def end_token_ids(folder: ModelFolder, num_tokens: int) -> tuple[int, ...]:
    """Return the ids that end an answer: `eos_token_id` of generation_config.json or else of config.json.

    Raises ModelFileError if neither has it (no answer would end), or an id is not below `num_tokens`.
    """
    source = folder.generation_config if "eos_token_id" in folder.generation_config else folder.config
    given = source.require("eos_token_id", list) if isinstance(source.values.get("eos_token_id"), list) else None
    token_ids = given if given is not None else [source.require("eos_token_id", int)]
    for token_id in token_ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < num_tokens:
            raise ModelFileError(
                source.path, f"end token {token_id!r} of 'eos_token_id' is not in 0 to {num_tokens - 1}"
            )
    if not token_ids:
        raise ModelFileError(source.path, "key 'eos_token_id' is an empty list: no answer would end")
    return tuple(dict.fromkeys(token_ids))
