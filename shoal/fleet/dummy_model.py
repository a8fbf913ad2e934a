"""A model's shape with a tokenizer that is made up: for fleets with random weights, which need no more of a model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

from services.common.model.folder import read_folder
from services.common.text.byte_level import byte_level_alphabet
from shoal.fleet.errors import FleetError

_SPACE = "Ġ"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def with_tokenizer(model: Path, folder: Path) -> Path:
    """Return a folder with the model's config.json and a tokenizer: the model's own folder, if it has one.

    Else `folder` is written: each byte is a token, and every other id is a word of its own, so that each token that a
    model with random weights draws has a text, as those of real models. Raises FleetError for what is no folder.
    """
    if not model.is_dir():
        raise FleetError(f"--dummy takes the shape of a model's folder; {model} is a file")
    if (model / "tokenizer.json").exists():
        return model
    config = read_folder(model).config
    num_tokens = config.require("vocab_size", int)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            shutil.copyfile(model / name, folder / name)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(num_tokens)))
    return folder


def _tokenizer(num_tokens: int) -> dict[str, object]:
    vocabulary = {text: token_id for token_id, text in zip(range(num_tokens), _texts(), strict=False)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _texts() -> Iterator[str]:
    """The characters of all bytes, then words without end."""
    yield from byte_level_alphabet().values()
    words = [_SPACE]
    while True:
        words = [word + letter for word in words for letter in ascii_lowercase]
        yield from words
