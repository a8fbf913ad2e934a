"""A tokenizer out of a folder in the layout of Hugging Face: tokenizer.json, tokenizer_config.json and the template."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer

from services.common.model.errors import ModelFileError
from services.common.model.folder import ModelFolder
from services.common.model.json_file import JsonFile, read_json_file
from services.tokenizer.chat_template import ChatTemplate, TemplateError
from services.tokenizer.model_tokenizer import ModelTokenizer

# Llama 3's has 55 KB, of which half is its 256 reserved tokens; templates with many tools reach 20 KB.
MAX_CONFIG_BYTES = 8 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBE = "a"


def read_folder_tokenizer(folder: ModelFolder, now: Callable[[], datetime]) -> ModelTokenizer:
    """Read a tokenizer and its chat template. Raises ModelFileError if a file is missing, damaged or contradictory."""
    path = folder.path / "tokenizer.json"
    if not path.exists():
        raise ModelFileError(path, "is missing from the model's folder; other forms of tokenizers are not read")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ModelFileError(path, f"cannot be read by the tokenizers library: {error}") from error
    # Set by some that trained with it; a prompt is never cut or filled up here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix, suffix = _added_to_prompts(path, tokenizer)
    return ModelTokenizer(tokenizer, _read_template(folder.path, now), prefix, suffix)


def _added_to_prompts(path: Path, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer's last step puts before and after any text."""
    bare = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(_PROBE).ids
    start = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), None)
    if start is None:
        raise ModelFileError(
            path, f"its post-processor makes {whole} of the tokens {bare}; only additions are supported"
        )
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def _read_template(folder: Path, now: Callable[[], datetime]) -> ChatTemplate | None:
    """The template in a file of its own, or else the one in tokenizer_config.json. None if there is neither."""
    path = folder / "tokenizer_config.json"
    config = read_json_file(path, MAX_CONFIG_BYTES) if path.exists() else JsonFile(path, {})
    own = folder / "chat_template.jinja"
    source = _read_text(own) if own.exists() else _configured_template(config)
    if source is None:
        return None
    special_tokens = {name: _content(config, name) for name in SPECIAL_TOKENS if name in config}
    try:
        return ChatTemplate(source, special_tokens, now)
    except TemplateError as error:
        raise ModelFileError(own if own.exists() else path, str(error)) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(path, f"cannot be read: {error}") from error


def _configured_template(config: JsonFile) -> str | None:
    """`chat_template`: a text, or a list of named ones of which `default` is meant."""
    if not isinstance(config.values.get("chat_template"), list):
        return config.require("chat_template", str) if "chat_template" in config else None
    entries = [
        JsonFile(config.path, entry) for entry in config.require("chat_template", list) if isinstance(entry, dict)
    ]
    named = {entry.require("name", str): entry.require("template", str) for entry in entries}
    if "default" not in named:
        raise ModelFileError(config.path, f"'chat_template' has {sorted(named)}, but none that is named 'default'")
    return named["default"]


def _content(config: JsonFile, name: str) -> str:
    """A special token's text: given as it is, or as an object with its properties."""
    if isinstance(config.values[name], dict):
        return config.section(name).require("content", str)
    return config.require(name, str)
