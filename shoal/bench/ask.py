"""One request of a load, and files of them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_MAX_TOKENS = 128


class LoadError(Exception):
    """A load that cannot be made as it is asked for. The text says what is wrong, and where."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. Exactly one of `prompt`, `messages` and `token_ids` is given."""

    max_tokens: int
    token_ids: tuple[int, ...] = ()
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    ignore_eos: bool = False
    """The answer has `max_tokens`, whatever the model says."""
    temperature: float = 0.0
    arrival_s: float = 0.0
    """When it is to be sent, after the load's start."""


def read_asks(path: Path) -> Iterator[Ask]:
    """Yield the requests of a file: a JSON object a line.

    Each has one of `prompt`, `messages` and `token_ids` (or `prompt_token_ids`), and if wanted `max_tokens` (128),
    `ignore_eos` (false), `temperature` (0) and `arrival_s` (0). Raises LoadError.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _ask(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} can't be read: {error}") from error


def _ask(line: str, where: str) -> Ask:
    try:
        given = json.loads(line)
        if not isinstance(given, dict):
            raise TypeError(f"expected a JSON object, got {type(given).__name__}")
        return _checked(given)
    except (ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{where}: {error}") from error


def _checked(given: Mapping[str, Any]) -> Ask:
    token_ids = given.get("token_ids", given.get("prompt_token_ids"))
    inputs = [value for value in (given.get("prompt"), given.get("messages"), token_ids) if value is not None]
    if len(inputs) != 1:
        raise ValueError(f"{len(inputs)} of prompt, messages and token_ids are given; expected exactly 1")
    ask = Ask(
        max_tokens=int(given.get("max_tokens", DEFAULT_MAX_TOKENS)),
        token_ids=tuple(int(token_id) for token_id in token_ids or ()),
        prompt=given.get("prompt"),
        messages=tuple(
            {"role": str(each["role"]), "content": str(each["content"])} for each in given.get("messages") or ()
        ),
        ignore_eos=bool(given.get("ignore_eos", False)),
        temperature=float(given.get("temperature", 0.0)),
        arrival_s=float(given.get("arrival_s", 0.0)),
    )
    if ask.max_tokens < 1:
        raise ValueError(f"max_tokens is {ask.max_tokens}; the least is 1")
    if ask.arrival_s < 0:
        raise ValueError(f"arrival_s is {ask.arrival_s}; the least is 0")
    return ask
