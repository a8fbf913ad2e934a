"""A JSON object in a file: read once, its values asked for by key and type."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.common.model.errors import ModelFileError

_Value = TypeVar("_Value")
_NAMES: Mapping[type, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "an object",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON object. A key whose value is null counts as absent."""

    path: Path
    values: Mapping[str, object]

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str, kind: type[_Value]) -> _Value:
        """Return a value of the given type (int, float, bool, str, list or dict); a whole number is a float too.

        Raises ModelFileError if the key is absent or its value is of another type.
        """
        if key not in self:
            raise ModelFileError(self.path, f"key {key!r} is missing; this model cannot be served without it")
        return self._typed(key, self.values[key], kind)

    def optional(self, key: str, kind: type[_Value], default: _Value) -> _Value:
        """Return a value, or the default where the key is absent. Raises ModelFileError as `require` does."""
        return self.require(key, kind) if key in self else default

    def section(self, key: str) -> "JsonFile":
        """Return an object inside this one, empty where absent. Raises ModelFileError if it is no object."""
        return JsonFile(self.path, self.optional(key, dict, {}))

    def _typed(self, key: str, value: object, kind: type[_Value]) -> _Value:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # type: ignore[return-value]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelFileError(self.path, f"key {key!r} should be {_NAMES[kind]}, but is {_shown(value)}")
        return value


def read_json_file(path: Path, max_bytes: int) -> JsonFile:
    """Read a JSON object of at most `max_bytes`. Raises ModelFileError if the file is absent, longer or damaged."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise ModelFileError(path, f"has {num_bytes} bytes; the most that is read is {max_bytes}")
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFileError(path, "is missing from the model's folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFileError(path, f"should hold a JSON object, but holds {_shown(values)}")
    return JsonFile(path, values)


def _shown(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
